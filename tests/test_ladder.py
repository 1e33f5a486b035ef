"""The ladder: its recipe from the first to the last command, its table by hand, and what measures it."""

import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from recipes.compare import per_question
from recipes.ladder import main as ladder
from recipes.ladder import page
from tests.processes import ENVIRONMENT
from tests.test_page import data_of
from tests.test_recipes import add_sentence, changes_nothing, lines, run_and_count, stopped_by_the_gate
from tests.toy import make_world, write_ranking
from tests.toy_t5 import t5
from utils.data import Corpus, read_questions
from utils.metrics import bootstrap_interval
from utils.plumbing.config import ROOT, read_yaml
from utils.plumbing.files import read_json, write_json

ROWS = "bm25 untrained cloze inbatch d0 more gc m1 m2 m3 d1 d2 d0_ce hybrid reading fid emdr2"
VARIABLES = {
    "BATCH": 8, "EPOCHS": 1, "GC_BATCH": 16, "DEPTH": 20, "SAMPLE": 5, "SCORED": 10, "ABOVE": 0,
    "EPISODES": "1 2", "READ": 4,
    "FLAGS": "--question_tokens 16 --passage_tokens 32 --question_chunk 8 --passage_chunk 16 "
    "--dev_negatives 2",
    "CLOZE_FLAGS": "--batch_size 8 --stop_after 2",
    "CROSS_FLAGS": "--chunk 16 --pair_tokens 48 --batch_size 8 --epochs 1 --learning_rate 1e-3",
    "READER_FLAGS": "--reader_tokens 48 --stop_after 3",
    "EMDR2_FLAGS": "--top_k 4 --reader_tokens 48 --answer_tokens 8 --batch_size 8 --question_chunk 4 "
    "--stop_after 2 --warmup 0 --encoding_batch_size 32",
}  # fmt: skip


def rows_of(run):
    return {row["key"]: row for row in read_json(run / "table.json")["rows"]}


# ---------------------------------------------------------------- the recipe
@pytest.fixture(scope="module")
def recipe(tmp_path_factory, python):
    """(DATA, a folder for RUNs, a function that runs the recipe with these variables)."""
    folder = tmp_path_factory.mktemp("ladder")
    world = make_world(folder / "data")
    add_sentence(world / "corpus.tsv", "It was named first.")  # the inverse cloze takes a sentence out
    t5(world)
    variables = VARIABLES | {"DATA": world, "START": world / "bert", "T5": ""}
    variables |= {"PATH": f"{python}:{ENVIRONMENT['PATH']}"}
    stages = tmp_path_factory.mktemp("stages") / "ladder"

    def bash(**changes):
        return run_and_count(["recipes/ladder.sh"], stages, variables | changes)

    return world, folder, bash


@pytest.fixture(scope="module")
def run(recipe):
    """RUN after four runs: one stops in RocketQA's step 3, one has no T5, one has, one has nothing to do."""
    world, folder, bash = recipe
    run = folder / "run"
    bash = partial(bash, RUN=run)
    bash = partial(bash, BELOW=stopped_by_the_gate(bash, run / "d0/train_ce.run"))
    done = bash()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "--run_dir" in done.stdout and "train_cross_encoder.py" not in done.stdout, "it goes on"
    without = rows_of(run)
    assert without["fid"]["metrics"] == without["emdr2"]["metrics"] == {} != without["d2"]["metrics"]
    bash = partial(bash, T5=world / "t5")
    more = bash()
    assert more.returncode == 0, more.stdout[-2000:] + more.stderr[-2000:]
    again = changes_nothing(bash, folder)
    assert again.stdout.endswith((run / "table.md").read_text())
    assert (run / "ladder.png").read_bytes().startswith(b"\x89PNG")
    return run


def test_the_rungs_learn_from_what_they_may(recipe, run):
    """A third has no labels, and only M_D2 and the readers see it; equal updates; the encoders' one start."""
    world = recipe[0]
    qids = [row["qid"] for row in lines(world / "train.jsonl")]
    free = {*qids[2::3]}
    unlabelled = lines(run / "data/unlabelled.jsonl")
    assert {row["qid"] for row in unlabelled} == free and {*unlabelled[0]} == {"qid", "question"}
    for name in ("data/train", "m1", "m2", "c", "d1"):
        assert {row["qid"] for row in lines(run / f"{name}.jsonl")} <= {*qids} - free, name
    assert {row["qid"] for row in lines(run / "d2.jsonl")} & free
    for name in "inbatch d0 more gc m1 m2 d1 d2".split():
        config = read_yaml(run / name / "config.yaml")
        assert config["init"] == f"{run}/cloze/query_encoder" and config["shared_encoder"]
        assert config["negatives"] == (name != "inbatch") and config["dev"] == f"{run}/data/dev.jsonl"
        assert config["rotate_negatives"] == (name in ("m1", "m2")) and config["passage_tokens"] == 32
        assert (config["grad_cache"], config["batch_size"]) == ((True, 16) if name == "gc" else (False, 8))
        assert config["keep"] == "last", "nothing is chosen"
    for name in ("c", "reading"):
        config = read_yaml(run / name / "config.yaml")
        assert (config["init"], config["keep"]) == (str(world / "bert"), "last")
    for name, reader in (("emdr2/fid", world / "t5"), ("emdr2", run / "emdr2" / "fid" / "reader")):
        config = read_yaml(run / name / "config.yaml")
        assert (config["query_encoder"], config["reader"]) == (f"{run}/m0/query_encoder", str(reader))
        assert len(lines(config["train"])) == len(qids)
        assert (config["keep"], config["train_doc_encoder"]) == ("last", False)
    steps = {key: row["updates"] for key, row in rows_of(run).items()}
    assert [steps[key] for key in ("inbatch", "d0", "gc", "m1", "m2")] == [3] * 5
    assert steps["more"] == 6, "as many questions as gc: 3 steps of 16"


def test_the_table_is_what_the_stages_wrote(run):
    """All rows; each value is that of a .metrics.json; what was not run says so; every row has its cost."""
    rows = rows_of(run)
    assert list(rows) == ROWS.split()
    files = {key: f"{key}/test" for key in "untrained cloze inbatch d0 more gc m1 m2 d1 d2 emdr2".split()}
    files |= {"reading": "d0/test", "fid": "cloze/test", "hybrid": "d0/hybrid"}
    for key, path in files.items():
        stored = read_json(run / f"{path}.metrics.json")
        for metric in {*rows[key]["metrics"]} - {"EM", "F1"}:
            assert rows[key]["metrics"][metric] == stored[metric], key
    rescored = read_json(run / "d0" / "test_ce.metrics.json")["after"]
    for metric, expected in (("top-1", rescored), ("top-5", rescored), ("top-20", rows["d0"]["metrics"])):
        assert rows["d0_ce"]["metrics"][metric] == expected[metric]
    for key, path, depth in (("reading", "reading", 3), ("fid", "emdr2/fid", 4), ("emdr2", "emdr2", 4)):
        stored = read_json(run / path / "answers.metrics.json")
        assert all(rows[key]["metrics"][m] == stored[f"{m}@{depth}"] for m in ("EM", "F1"))
    for key in {*rows} - {"m3"}:  # EPISODES="1 2"
        row = rows[key]
        assert 0 < row["minutes"] <= row["minutes_in_all"] and row["peak_gb"] > 0, key
    assert rows["m3"]["metrics"] == {}
    assert "| ANCE-Tele, episode 3 | not run | not run |" in (run / "table.md").read_text()


def test_the_page(run):
    """Every system that was run, three encoders, all trainings, the momentum of the second episode."""
    data = data_of(run / "page.html")
    names = {row["key"]: row["name"] for row in data["rows"]}
    assert data["rows"] == [*rows_of(run).values()]
    assert [name for name, ran in data["systems"] if not ran] == ["ANCE-Tele, episode 3"]
    assert data["readers"] == [[names[key], True] for key in ("reading", "fid", "emdr2")]
    steps = [(data["systems"][a][0], data["systems"][b][0]) for a, b in data["pairs"]]
    assert steps[0] == (names["d0"], names["bm25"]) and (names["m1"], names["d0"]) in steps
    beliefs = {belief["qid"] for belief in read_json(run / "emdr2" / "belief.json")}
    assert beliefs and beliefs == {row["qid"] for row in data["questions"] if row["belief"]}
    pictures = data["pictures"]
    assert pictures["encoders"] == ["untrained", "cloze", "d0"] and not pictures["missing"]
    assert pictures["questions"]
    names = [name for name, ran in data["lessons"]["files"] if ran]
    assert names[1:3] == ["ANCE-Tele, episode 1", "ANCE-Tele, episode 2"] and "RocketQA, new labels" in names
    sources = {group[0] for row in data["lessons"]["questions"] for group in row["files"][2]}
    assert "momentum" in sources and sources & {"ANN", "look-ahead", "ANN and look-ahead"}
    assert "elsewhere" not in sources, "every new negative stands in the ranking that it was mined from"
    trained = {str(path.parent.relative_to(run)) for path in run.glob("**/metrics.jsonl")}
    assert {curve["name"] for curve in data["curves"]} == trained


def test_the_full_size_from_the_weights_themselves(recipe):
    """Blank titles, no inverse cloze: the encoders start from START; a rung alone; another seed."""
    world, folder, bash = recipe
    run, flags = folder / "full", VARIABLES["FLAGS"] + " --mixed_precision no"
    done = bash(RUN=run, SIZE="full", RUNGS="dpr", FLAGS=flags, ENCODE_FLAGS="", SEED=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    titled, blank = Corpus(world / "corpus.tsv"), Corpus(run / "data" / "corpus.tsv")
    assert [passage._replace(title="") for passage in titled] == list(blank)
    config = read_yaml(run / "d0" / "config.yaml")
    assert config["init"] == str(world / "bert") and config["seed"] == 2
    assert os.readlink(run / "m0") == "untrained" and not (run / "cloze").exists()
    rows = rows_of(run)
    assert read_json(run / "table.json")["notes"][0].endswith("All titles are blank.")
    ran = [key for key, row in rows.items() if row["metrics"]]
    assert ran == ["bm25", "untrained", "inbatch", "d0", "hybrid"] and "cloze" not in rows
    assert rows["inbatch"]["over"] == ["untrained"] and rows["d0"]["minutes"] > 0
    assert data_of(run / "page.html")["pictures"]["encoders"] == ["untrained", "d0"]


# ---------------------------------------------------------------- the table
SECONDS = "data/bm25_test.run 3, data/train.jsonl 6, cloze/metrics.json 60, d0/metrics.json 90, "
SECONDS += "d0/metrics.json 30, c/metrics.json 30, d1.jsonl 12, d1/metrics.json 120"


@pytest.fixture
def made(tmp_path):
    """(run folder, data folder): BM25, d0 and d1 with a cross-encoder; what their stages cost."""
    data, run = make_world(tmp_path / "data"), tmp_path / "run"
    qids = [question["qid"] for question in read_questions(data / "test.jsonl")]
    rng = np.random.default_rng(0)
    for path in ("data/bm25_test.run", "d0/test.run", "d1/test.run"):
        write_ranking(run / path, {qid: rng.permutation(60)[:20] + 1 for qid in qids})
    for name, steps in (("cloze", 2), ("d0", 7), ("c", 4), ("d1", 6)):
        write_json(run / name / "metrics.json", {"step": steps, "best_step": steps})
    for path in ("data/train.jsonl", "d1.jsonl"):
        (run / path).write_text("{}\n")
    (run / "m0").symlink_to("cloze")
    rows = [stage.split() for stage in SECONDS.split(", ")]
    peaks = [f"elsewhere/run/{output}\tx.py\t{s}\t{100 * i}\n" for i, (output, s) in enumerate(rows)]
    (run / "peaks.tsv").write_text("".join(peaks))
    return run, data


def test_the_columns(made, capsys):
    """Accuracy, updates, own minutes and peak; in all: each stage it is built on, once; gains are paired."""
    run, data = made
    ladder(run, data)
    rows, questions, corpus = rows_of(run), read_questions(data / "test.jsonl"), Corpus(data / "corpus.tsv")
    d0, d1 = (per_question(run / name / "test.run", questions, corpus) for name in ("d0", "d1"))
    means = {metric: values.mean() for metric, values in d1.items()}
    assert {metric: cell["value"] for metric, cell in rows["d1"]["metrics"].items()} == means
    assert [rows[key]["updates"] for key in ("d0", "d1", "bm25")] == [7, 6, None]
    for key, minutes, in_all, peak in (("d0", 2, 2 + 1 + 0.1, 0.4), ("d1", 2.2, 2.2 + 0.5 + 3.1, 0.7)):
        measured = [rows[key][column] for column in ("minutes", "minutes_in_all", "peak_gb")]
        assert measured == pytest.approx([minutes, in_all, peak]), key
    gains = {(gain["row"], gain["over"]): gain["metrics"] for gain in read_json(run / "table.json")["gains"]}
    gain = gains["RocketQA M_D1", "DPR + BM25 negative = RocketQA M_D0"]
    assert set(gain) == {"top-5", "top-20", "MRR@10"}
    for metric, cell in gain.items():
        difference = d1[metric] - d0[metric]
        assert (cell["low"], cell["high"]) == bootstrap_interval(difference)
        assert cell["value"] == pytest.approx(difference.mean())
    text = capsys.readouterr().out
    assert text == (run / "table.md").read_text() and list(rows) == ROWS.split()
    assert "| RocketQA M_D2 |" + " not run |" * 13 in text

    # a stage that was not measured is no zero, own or in all
    (run / "peaks.tsv").write_text((run / "peaks.tsv").read_text().replace("d1.jsonl", "other.jsonl"))
    ladder(run, data)
    assert rows_of(run)["d1"]["minutes"] is rows_of(run)["d1"]["minutes_in_all"] is None
    assert "| not measured |" in capsys.readouterr().out


def test_the_committed_table():
    """The page that is made of the committed numbers is the committed page, gains with their signs."""
    folder = ROOT / "results" / "ladder_small"
    assert (folder / "table.md").read_text().endswith(page(read_json(folder / "table.json")))


def test_seeds(made, tmp_path):
    """Mean and range over the folders that have the row; one that only the first has counts one seed."""
    run, data = made
    (tmp_path / "other" / "d1").mkdir(parents=True)
    (tmp_path / "other/d1/test.run").write_text((run / "d0" / "test.run").read_text())
    ladder(run, tmp_path / "other", data)
    seeds, rows = read_json(run / "table.json")["seeds"], rows_of(run)
    low, high = sorted(rows[key]["metrics"]["MRR@10"]["value"] for key in ("d0", "d1"))
    assert (seeds["d0"]["n"], seeds["d1"]["n"], seeds["d2"]) == (1, 2, {"n": 0})
    assert seeds["d1"]["MRR@10"] == pytest.approx({"low": low, "mean": (low + high) / 2, "high": high})
    assert "Mean over seeds" in (run / "table.md").read_text()


# ---------------------------------------------------------------- what measures it
LISTENER = """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.02)
time.sleep(0.3)
print(len(got), flush=True)
sys.exit(128 + got[0])
"""


def measure(table, *argv):
    """Start a measured command in a group of its own, whose SIGINT is not ignored."""
    return subprocess.Popen(
        [sys.executable, "recipes/measured.py", table, "run/out", *argv], cwd=ROOT, env=ENVIRONMENT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_measured(tmp_path):
    """The exit code passes; a line each, named by script or module; the peak is that of its process."""
    table, take = tmp_path / "new" / "peaks.tsv", tmp_path / "take.py"
    take.write_text("import time; text = b'x' * 200_000_000; time.sleep(0.2)")
    for argv, code in (
        ([sys.executable, take], 0),
        ([sys.executable, "-m", "timeit", "-n", "1", "1"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 137),
    ):
        process = measure(table, *argv)
        process.communicate()
        assert process.returncode == code
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert [row[:2] for row in rows] == [["run/out", name] for name in (str(take), "timeit", "sh", "sh")]
    assert 0.2 < float(rows[0][2]) < 60 and 200 < float(rows[0][3]) < 400 and float(rows[2][3]) < 100
    missing = measure(table, "no-such-command")
    assert "no-such-command: No such file" in missing.communicate()[0] and missing.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_is_handed_on_once(tmp_path, number, to_group):
    """By kill, and by Ctrl-C or `timeout`, which signal the group; a SIGKILL of it ends the command too."""
    if number == signal.SIGKILL and (to_group or sys.platform != "linux"):
        pytest.skip("only Linux tells a child that its parent is gone")
    process = measure(tmp_path / "peaks.tsv", sys.executable, "-c", LISTENER)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.communicate()[0] == "1\n"
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert len((tmp_path / "peaks.tsv").read_text().splitlines()) == 1
