"""Settings: what a yaml and the command line may say; a mistake ends in one line with the right name."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError

from prepare.hints import SYNONYMS
from utils.plumbing import config
from utils.plumbing.config import ROOT, UserError, friendly_errors, load_config
from utils.plumbing.files import folder_hash, weights_hash

FULL = "config/train_dpr_nq.yaml"
FULLS = [f"config/train_{name}_nq.yaml" for name in ("dpr", "cross_encoder", "reader", "emdr2")]
VARIANTS = [path for path in ROOT.glob("config/train_*.yaml") if f"config/{path.name}" not in FULLS]


# ---------------------------------------------------------------- what is read
def test_the_yaml_is_the_default_a_variant_changes_it_and_a_flag_wins(tmp_path):
    """--key value, --key=value, a bare boolean flag; 2e-5, which PyYAML reads as a string, is a number."""
    (tmp_path / "x.yaml").write_text("learning_rate: 2e-5\nseed: 7\n")
    argv = ["--config", str(tmp_path / "x.yaml"), "--batch_size", "64", "--warmup=1e-1", "--grad_cache"]
    cfg = load_config("doc", FULL, [*argv, "--dev", ""])
    assert (cfg.learning_rate, cfg.seed, cfg.epochs) == (2e-5, 7, 40)
    assert (cfg.batch_size, cfg.warmup, cfg.grad_cache, cfg.dev) == (64, 0.1, True, "")


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variant_holds_only_what_differs_and_says_why(path):
    text = path.read_text(encoding="utf-8")
    full = next((name for name in FULLS if path.stem.startswith(Path(name).stem.removesuffix("_nq"))), FULL)
    base = yaml.safe_load((ROOT / full).read_text(encoding="utf-8"))
    cfg = vars(load_config("", full, ["--config", str(path)]))
    for key in yaml.safe_load(text):
        assert cfg[key] != base[key], f"{key} is that of {full}"
        explained = re.search(rf"^{key}: .*\S\s+# \S", text, re.M)
        assert explained or isinstance(base[key], str), f"{key} has no comment"


def test_gc_dpr_is_nine_lines_and_every_full_yaml_has_a_comment_a_key():
    """The config of GC-DPR *is* its lesson; a full yaml explains every key of its script."""
    assert len((ROOT / "config/train_gcdpr_nq.yaml").read_text().splitlines()) == 9 and len(VARIANTS) >= 13
    for path in set(ROOT.glob("config/*.yaml")) - set(VARIANTS):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"\w+:", line) or re.search(r"\s# \S", line), f"{path.name}: {line}"


def test_help_shows_the_docstring_and_every_key(capsys):
    with pytest.raises(SystemExit) as leave:
        load_config("What it does.", FULL, ["--help"])
    shown = capsys.readouterr().out
    assert leave.value.code == 0 and "What it does." in shown
    assert all(f"{key}:" in shown for key in yaml.safe_load((ROOT / FULL).read_text()))


def test_what_a_run_was_made_from_has_a_name(tmp_path, monkeypatch):
    """Path("") is the folder one stands in, and no dev set; hub names that begin alike are two models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert folder_hash("") == folder_hash("no-such/hub-name") == "" != folder_hash(".")
    names = ("Luyu/co-condenser-wiki", "Luyu/co-condenser-marco")
    assert len({weights_hash(name)[:16] for name in names}) == 2


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "8"], ["--batchsize", "batch_size"]),
        (["--batch_size", "many"], ["batch_size", "int", "'many'"]),
        (["--batch_size", "1.5"], ["batch_size", "int"]),
        (["--grad_cache", "maybe"], ["grad_cache", "bool"]),
        (["--seed"], ["--seed", "value"]),
        (["batch_size", "8"], ["'batch_size'", "--key value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["--config", "config"], ["config: is a folder; name a file"]),
        (["--config", sys.executable], [sys.executable, "not valid yaml"]),
        (["--seed", "-1"], ["seed must be at least 0 and finite, got -1"]),
        (["--learning_rate", "nan"], ["learning_rate must be at least 0 and finite, got nan"]),
        ("epoch: 3", ["x.yaml: unknown key 'epoch'", "did you mean 'epochs'"]),
        ("seed: one", ["x.yaml: seed must be of type int", "'one'"]),
        (["--learning_rate", "1e400"], ["learning_rate must be at least 0 and finite, got 1e400"]),
        (["--seed", "inf"], ["seed must be of type int"]),
        (["--seed", "9007199254740993000"], ["seed must be of type int"]),
        ("1: 2", ["x.yaml: unknown key 1; known: run_dir"]),
        ("epochs: 1\n\nseed: 1\n'epochs': 2", ["x.yaml:4: 'epochs' stands there twice"]),
        ("seed: [1, 2]", ["x.yaml: seed must be of type int", "[1, 2]"]),
        ("? [a]\n: 1", ["x.yaml: not valid yaml", "unhashable"]),
        ("dev: 2026-13-45", ["x.yaml: not valid yaml: month must be in 1..12"]),
        ("seed: {a: 1}", ["x.yaml: expected flat `key: value` lines"]),
    ],
)
def test_mistakes_are_named(tmp_path, argv, words):
    """On the command line (a list) or in a yaml (its text): what is wrong, where, and what would be right."""
    if isinstance(argv, str):
        (tmp_path / "x.yaml").write_text(argv)
        argv = ["--config", str(tmp_path / "x.yaml")]
    with pytest.raises(UserError) as error:
        load_config("doc", FULL, argv)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_paths_that_cannot_be(tmp_path, monkeypatch):
    for name in ("query_encoder", "doc_encoder"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    inside = "run: is no model, but the folder of doc_encoder, query_encoder; name"
    for need, value, message in (
        (config.need_file, "", "key: give a path, it is empty"),
        (config.need_file, tmp_path, "key: .* is a folder; name a file"),
        (config.need_file, tmp_path / "none", "key: .*none: no such file"),
        (config.need_model, "", "key: give a path, it is empty"),
        (config.need_model, tmp_path / "run", inside),
        (config.need_model, tmp_path / "run" / "reader", "key: .*reader: no such model folder"),
        (config.need_model, "runs/nowhere/reader", "key: runs/nowhere/reader: no such model folder"),
        (config.need_model, tmp_path / "file", "key: .*file: is a file; .*of other files name the folder"),
        (config.need_folder, "", "key: give a path, it is empty"),
        (config.need_folder, tmp_path / "file", "key: .*file is a file, not a folder"),
        (config.need_folder, tmp_path / "file" / "run", "key: .*file is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            need(SimpleNamespace(key=str(value)), "key")
    for name in (tmp_path / "run" / "doc_encoder", "bert-base-uncased", "facebook/dpr-reader"):
        config.need_model(SimpleNamespace(key=str(name)), "key")
    config.need_file(SimpleNamespace(key=""), optional=["key"])
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="key: .*run/new: .*run cannot be written"):
        config.need_folder(SimpleNamespace(key=str(tmp_path / "run" / "new")), "key")


def test_a_link_to_nowhere_is_named_wherever_it_stands(tmp_path, capsys):
    """A run on a disk that is not mounted: as a folder, above one, as a file to read or to write."""
    (tmp_path / "runs").symlink_to("/mnt/not-there/runs")
    (tmp_path / "x.run").symlink_to("/mnt/not-there/x.run")
    lost = "a link to /mnt/not-there/.*, which is not there; is its disk"
    for need in (config.need_folder, config.need_file, config.need_out):
        for path in ("runs", "runs/x/y", "runs/x.tsv", "x.run"):
            with pytest.raises(UserError, match=lost):
                need(SimpleNamespace(key=str(tmp_path / path)), "key")
    with pytest.raises(SystemExit), friendly_errors():  # in a script without any check
        (tmp_path / "runs" / "x").mkdir(parents=True)
    assert "is a link to /mnt/not-there/runs" in capsys.readouterr().err


def test_no_file_that_a_command_reads_is_replaced(tmp_path):
    """Under every name that is written, and every spelling; nor a part of a model, a device or a pipe."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("a.run", "a.metrics.json", "model/config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.run").symlink_to(tmp_path / "a.run")
    os.link(tmp_path / "a.run", tmp_path / "hard.run")
    os.mkfifo(tmp_path / "pipe.run")
    for out, keys, words in (
        ("a.run", {"questions": tmp_path / "a.run"}, "a.run is an input too .questions"),
        ("a.run", {"ranking": f"{model}/../a.metrics.json"}, "a.metrics.json is an input too .ranking"),
        ("link.run", {"questions": tmp_path / "a.run"}, "link.run is an input too"),
        ("hard.run", {"questions": tmp_path / "link.run"}, "hard.run is an input too"),
        ("model/config.json", {"reader": model}, "config.json is an input too .reader"),
        ("pipe.run", {}, "is a device or a pipe"),
        ("model", {}, "is a folder"),
    ):
        cfg = SimpleNamespace(out=str(tmp_path / out), **{key: str(value) for key, value in keys.items()})
        with pytest.raises(UserError, match=words):
            config.need_out(cfg, "out", ".metrics.json")
    cfg = SimpleNamespace(out=str(tmp_path / "a.run"), questions="", k=3, reader=str(model))
    config.need_out(cfg, "out", ".json")


@pytest.mark.parametrize(
    ("script", "flag", "words"),
    [
        ("train_dpr_nq", "--lr", "lr is learning_rate here"),
        ("train_dpr_nq", "--q_chunk_size", "is question_chunk here"),
        ("train_dpr_nq", "--ctx_chunk_size", "is passage_chunk here"),
        ("train_dpr_nq", "--hard_negatives", "is negatives here"),
        ("train_dpr_nq", "--per_device_train_batch_size", "is batch_size here"),
        ("train_dpr_nq", "--max_train_epochs", "is epochs here"),
        ("train_dpr_nq", "--wikipedia_path", "is corpus here"),
        ("train_dpr_nq", "--fp16", "is mixed_precision here"),
        ("train_dpr_nq", "--encoded_ctx_file", "is embeddings of test_dpr.py"),
        ("train_dpr_nq", "train.batch_size=8", "train.batch_size is batch_size here"),
        ("train_dpr_nq", "+train.lr=1", "is learning_rate here"),
        ("train_dpr_nq", "-lr", "is learning_rate here"),
        ("train_dpr_nq", "batch_size=8", "did you mean 'batch_size'"),
        ("doc2embedding", "--pretrained_model_path", "is doc_encoder here"),
        ("doc2embedding", "--model_file", "is doc_encoder here"),
        ("doc2embedding", "--ctx_file", "is corpus here"),
        ("test_dpr", "--pretrained_model_path", "is query_encoder here"),
        ("test_dpr", "--nq_test_file", "is questions here"),
        ("test_dpr", "--qa_file", "is questions here"),
        ("test_dpr", "--n-docs", "is k here"),
    ],
)
def test_flags_of_the_originals_name_ours(script, flag, words):
    """DPR's, GC-DPR's and nanoDPR's flags, and hydra's form: what is called so here, or in which script."""
    with pytest.raises(UserError, match=re.escape(words)):
        load_config("doc", f"config/{script}.yaml", [flag, "1"])


def test_every_synonym_is_a_key_of_a_script():
    """What a hint names exists; no key of ours is hidden behind a flag of theirs."""
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("config/*.yaml")]
    keys = set(re.findall(r"^(\w+):", "\n".join(texts), re.M)) | {"server", "servers"}
    assert {name for names in SYNONYMS.values() for name in names.split()} <= keys


STREAMS = r"""
import os, sys
from utils.plumbing.config import friendly_errors
with friendly_errors():
    print("Dvo\u0159\xe1k", flush=True)
    print("\u0159", file=sys.stderr)
    file = open(sys.argv[1], "w")
    for _ in range(9000):
        print("a line", flush=True)
    os.write(2, b"faiss")
    print(file.fileno() > 2, file=file)
"""


@pytest.mark.parametrize(
    ("redirect", "code", "words"),
    [
        ("", 0, r"Dvo\u0159\xe1k"),
        (">&-", 0, ""),
        ("2>&-", 0, "Dvo"),
        ("<&- >&- 2>&-", 0, ""),
        ("| head -1", 2, "error: the program that read the output has ended"),
        ("> /dev/full", 2, "error: the disk is full"),
    ],
)
def test_standard_streams_may_be_ascii_closed_or_broken(tmp_path, redirect, code, words):
    """No letter is an error; a file never gets the number of a closed stream; a broken one is a sentence."""
    script = f"'{sys.executable}' -c '{STREAMS}' '{tmp_path}/file' {redirect}; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", script], **how)
    assert done.returncode == code and words in done.stdout + done.stderr, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done
    assert code or (tmp_path / "file").read_text() == "True\n"


MEMORY = "error: the memory is full: lower the chunks, which changes no gradient (train_dpr.py: with "
MEMORY += "--grad_cache true), or the batch sizes, on a GPU use --mixed_precision bf16"
NO_ROOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "error: runs/x: Permission denied"),
        (OSError(21, "Is a directory", ".x.tmp", None, "x"), "error: x: Is a directory"),
        (OSError(28, "No space left on device"), "error: the disk is full; free some"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "error: the disk is full"),
        (OSError("64000 requested and 20416 written"), "error: the disk is full"),  # numpy's
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), MEMORY),
        (NO_ROOM, MEMORY),
        (MemoryError("Unable to allocate 9 GiB\nfor"), f"{MEMORY} (Unable to allocate 9 GiB)\n"),
        (MemoryError(), f"{MEMORY}\n"),
        (OSError(24, "", "runs/x"), "error: runs/x: too many open files; raise the limit: ulimit -n"),
        (OSError(27, ""), "error: the file is larger than is allowed; raise the limit: ulimit -f"),
        (SafetensorError("I/O error: File too large (os error 27)"), "error: the file is larger than is"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "error: the disk is full"),
        (BrokenPipeError(32, "Broken pipe"), "error: the program that read the output has ended"),
        (OSError(116, "Stale file handle", "runs/x"), "error: runs/x: Stale file handle"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
    ],
)
def test_faults_of_the_machine_are_one_line(capsys, monkeypatch, error, line):
    """A folder that cannot be written, a full disk, a full GPU: the place and the fix, no traceback."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        raise error
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1
    assert stopped.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)


def test_faults_of_ours_keep_their_traceback():
    """Only what the user or the machine did becomes a sentence."""
    lost = FileNotFoundError(2, "No such file or directory", "x")
    kept = OSError(39, "Directory not empty", ".x.tmp", None, "x")
    for error in (ValueError("x"), OSError("a socket"), OSError(13, "no place"), lost, kept):
        with pytest.raises(type(error)), friendly_errors():
            raise error


@pytest.mark.parametrize(("said", "value"), [("auto", "auto"), ("true", True), ("False", False)])
def test_normalize_may_be_what_init_says(tmp_path, said, value):
    """In the yaml and on the command line; a bool there, as in the checkpoints of before."""
    base = "config/train_dpr_nq.yaml"
    (tmp_path / "c.yaml").write_text(f"normalize: {said}\n")
    assert load_config("", base, ["--normalize", said]).normalize is value
    assert load_config("", base, ["--config", str(tmp_path / "c.yaml")]).normalize is value
    assert load_config("", base, []).normalize is False
    with pytest.raises(UserError, match="normalize must be of type"):
        load_config("", base, ["--normalize", "yes"])
