"""Files that are whole or absent, also when two processes want the same ones, or one was killed."""

import os
import subprocess
import sys

import pytest

from recipes import claim_data, claims, random_negatives
from recipes.demo import inverse_cloze
from tests import test_train_dpr
from tests.processes import main
from tests.test_rerank import save_cross
from tests.toy import make_world, tokenizer
from utils.bm25 import build_bm25
from utils.data import Corpus
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.files import HELD, atomic_file, read_json

pytest.importorskip("fcntl")  # Windows has no locks
# holds a lock until it dies
HOLDER = "import sys, utils.plumbing.files as f; f.lock(sys.argv[1]); print(flush=True); sys.stdin.read()"


@pytest.fixture
def world(tmp_path):
    HELD.clear()
    return make_world(tmp_path / "world")


def rerank(world, out):
    if not (world / "cross_encoder").exists():
        save_cross(world / "cross_encoder", tokenizer(world))
    (world / "test.run").write_text("q50\t51\t1\t2.0\n")
    keys = {"questions": world / "test.jsonl", "ranking": world / "test.run", "out": f"{out}/x.run"}
    main("rerank.py", keys | {"corpus": world / "corpus.tsv", "cross_encoder": world / "cross_encoder"})


COMMANDS = {
    ".lock": lambda world, out: main("train_dpr.py", test_train_dpr.keys(world, out, stop_after=1, dev="")),
    ".bm25.lock": lambda world, out: build_bm25(Corpus(world / "corpus.tsv"), out / "bm25"),
    "x.run.parts/.lock": rerank,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_of_two_is_refused_in_a_sentence(world, tmp_path, name):
    """A run, an index, a ranking on which a living process works; a killed one gives it back at once."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, **pipes)
    process.stdout.readline()
    before = sorted(tmp_path.joinpath("out").rglob("*"))
    with pytest.raises(UserError, match=f"{path.parent}: process {process.pid} on .* is at work there; wait"):
        COMMANDS[name](world, tmp_path / "out")
    assert sorted(tmp_path.joinpath("out").rglob("*")) == before
    process.kill()
    process.communicate()
    COMMANDS[name](world, tmp_path / "out")
    assert sorted(tmp_path.joinpath("out").rglob("*")) != before


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path):
    """Of a process that is dead, on this machine: not that of a living one, of another file or machine."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with atomic_file(tmp_path / "x[1].run") as file:
        own = next(tmp_path.glob(".x*.tmp")).name
        file.write("whole")
    old = own.replace(str(os.getpid()), str(dead.pid))
    stay = [own, old.replace("x[1]", "y"), f".x[1].run.far.{dead.pid}.tmp"]
    for name in [*stay, old]:
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "x[1].run"):
        assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(stay)

    # half an index of a corpus
    corpus = tmp_path / "c.tsv"
    corpus.write_text("1\tone\tA\n")
    half = tmp_path / own.replace("x[1].run", "c.tsv.index").replace(f"{os.getpid()}.tmp", f"{dead.pid}.a1_b")
    (half / "new").mkdir(parents=True)
    Corpus(corpus)
    assert not half.exists() and sorted(path.name for path in tmp_path.glob("*.index")) == ["c.tsv.index"]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (inverse_cloze.main, ("corpus.tsv", "corpus.tsv")),
        (random_negatives.main, ("corpus.tsv", "dpr", "train.jsonl", "train.jsonl")),
        (claim_data.main, (".", "corpus.tsv", ".", 8, 40)),
        (claims.store, ("corpus.tsv", "test.jsonl", "test.jsonl", ["x=test.run"])),
    ],
)
def test_no_program_writes_over_what_it_reads(program, arguments, tmp_path, monkeypatch):
    folder = make_world(tmp_path / "world")
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}
    with pytest.raises(UserError, match="is an input too; name another file"):
        program(*arguments)
    assert {path: path.read_bytes() for path in before} == before


def test_a_link_stays_a_link(tmp_path):
    """What is written lands where the link points to, on the large disk."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large/x.run").write_text("old")
    (tmp_path / "x.run").symlink_to("large/x.run")
    with atomic_file(tmp_path / "x.run") as file:
        file.write("new")
    assert (tmp_path / "x.run").is_symlink() and (tmp_path / "large/x.run").read_text() == "new"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 9999])
def test_a_damaged_note_says_what_to_do(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match="x.json: not valid json: .*; get it again, or delete it and repeat"):
        read_json(tmp_path / "x.json")
