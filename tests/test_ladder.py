"""The ladder: its recipe from the first to the last command, its table by hand, and what measures it."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from recipes.compare import per_question
from recipes.ladder import choose
from recipes.ladder import main as ladder
from tests.processes import ENVIRONMENT, command
from tests.toy import make_world
from tests.toy_t5 import t5
from tests.warm_python import warm_python
from utils.data import Corpus, iter_jsonl, iter_run, read_questions, write_run
from utils.metrics import bootstrap_interval
from utils.plumbing.config import ROOT, UserError, read_yaml
from utils.plumbing.files import read_json, write_json

ROWS = (
    "bm25 untrained cloze inbatch d0 gc m1 m2 m3 d1 d2 d0_long d0_ce best_ce hybrid reading fid emdr2".split()
)
VARIABLES = {
    "BATCH": 8, "EPOCHS": 1, "GC_BATCH": 16, "DEPTH": 20, "SAMPLE": 5, "SCORED": 10, "ABOVE": 0,
    "EPISODES": "1 2",
    "FLAGS": "--question_tokens 16 --passage_tokens 32 --question_chunk 8 --passage_chunk 16 "
    "--dev_negatives 2",
    "CLOZE_FLAGS": "--batch_size 8 --stop_after 2",
    "CROSS_FLAGS": "--chunk 16 --pair_tokens 48 --batch_size 8 --epochs 1 --learning_rate 1e-3",
    "READER_FLAGS": "--reader_tokens 48 --stop_after 3",
    "EMDR2_FLAGS": "--top_k 4 --reader_tokens 48 --answer_tokens 8 --batch_size 8 --question_chunk 4 "
    "--stop_after 2 --warmup 0 --encoding_batch_size 32 --refresh_every 1",
}  # fmt: skip


def rows_of(run):
    return {row["key"]: row for row in read_json(run / "table.json")["rows"]}


def lines(path):
    return [row for _, row in iter_jsonl(path)]


# ---------------------------------------------------------------- the recipe
@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """(DATA, a folder for RUNs, a function that runs the recipe with these variables)."""
    folder = tmp_path_factory.mktemp("ladder")
    world = make_world(folder / "data")
    text = re.sub(r"\.\t", ". It was named first.\t", (world / "corpus.tsv").read_text())
    (world / "corpus.tsv").write_text(text)  # the inverse cloze takes a sentence out
    t5(world)
    with warm_python(folder / "bin", ENVIRONMENT) as python:
        variables = VARIABLES | {"DATA": world, "START": world / "bert", "T5": ""}
        variables |= {"PATH": f"{python}:{ENVIRONMENT['PATH']}"}

        def bash(**changes):
            environment = {key: str(value) for key, value in (variables | changes).items()}
            argv, environment = ["bash", "recipes/ladder.sh"], ENVIRONMENT | environment
            return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)

        yield world, folder, bash


@pytest.fixture(scope="module")
def rehearsal(recipe):
    """
    (DATA, RUN, outcomes, did the last run change nothing): stopped in RocketQA's step 3; to the end without a
    T5; with one; once more.
    """
    world, folder, bash = recipe
    run = folder / "run"
    outcomes = [bash(RUN=run, BELOW=0)]
    scores = sorted(score for _, hits in iter_run(run / "d0" / "train_ce.run") for _, score in hits)
    below = scores[int(0.75 * len(scores))]  # a toy teacher is sure of nothing
    outcomes.append(bash(RUN=run, BELOW=below))
    (run / "table_without.json").write_text((run / "table.json").read_text())
    outcomes.append(bash(RUN=run, BELOW=below, T5=world / "t5"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    outcomes.append(bash(RUN=run, BELOW=below, T5=world / "t5"))
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    return world, run, outcomes, before == after


def test_the_recipe_goes_on_and_ends(rehearsal):
    """It stops where a recipe that it calls stops, goes on from there, and a last run has nothing to do."""
    _, run, (stopped, done, more, again), unchanged = rehearsal
    assert stopped.returncode == 2 and "no question is left" in stopped.stderr, stopped.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "--run_dir" in done.stdout and "train_cross_encoder.py" not in done.stdout
    assert more.returncode == 0, more.stdout[-2000:] + more.stderr[-2000:]
    assert again.returncode == 0 and "==" not in again.stdout and unchanged, again.stdout + again.stderr
    assert again.stdout.endswith((run / "table.md").read_text())
    assert (run / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_rungs_learn_from_what_they_may(rehearsal):
    """A third has no labels, and only M_D2 and the readers see it; equal updates; the encoders' one start."""
    world, run, *_ = rehearsal
    known = [row["qid"] for row in lines(world / "train.jsonl")]
    free = {qid for i, qid in enumerate(known, 1) if i % 3 == 0}
    assert all(
        set(row) == {"qid", "question"} and row["qid"] in free for row in lines(run / "data/unlabelled.jsonl")
    )
    for name in ("data/train", "m1", "m2", "c", "d1"):
        assert {row["qid"] for row in lines(run / f"{name}.jsonl")} <= {*known} - free, name
    assert {row["qid"] for row in lines(run / "d2.jsonl")} & free
    start = f"{run}/cloze/query_encoder"
    for name in "inbatch d0 gc m1 m2 d1 d2 d0_long".split():
        config = read_yaml(run / name / "config.yaml")
        assert (config["init"], config["shared_encoder"], config["passage_tokens"]) == (start, True, 32), name
        assert config["negatives"] == (name != "inbatch") and config["dev"] == f"{run}/data/dev.jsonl"
        assert config["rotate_negatives"] == (name in ("m1", "m2"))
    gc = read_yaml(run / "gc" / "config.yaml")
    assert gc["grad_cache"] and gc["batch_size"] == 16
    for name in ("c", "reading"):
        assert read_yaml(run / name / "config.yaml")["init"] == str(world / "bert")
    steps = {key: row["updates"] for key, row in rows_of(run).items()}
    assert [steps[key] for key in ("inbatch", "d0", "gc", "m1", "m2")] == [3] * 5 and steps["d2"] == steps[
        "d0_long"
    ]
    for name in ("emdr2/fid", "emdr2"):
        config = read_yaml(run / name / "config.yaml")
        assert (
            config["query_encoder"] == f"{run}/d0/query_encoder"
            and config["train"] == f"{run}/data/questions.jsonl"
        )
        assert len(lines(run / "data/questions.jsonl")) == len(known)


def test_the_table_is_what_the_stages_wrote(rehearsal):
    """All rows; each value is that of a .metrics.json; what was not run says so; every row has its cost."""
    _, run, *_ = rehearsal
    rows, best = rows_of(run), (run / "best.txt").read_text().split()[0]
    assert list(rows) == ROWS
    folders = {key: key for key in "untrained cloze inbatch d0 gc m1 m2 d1 d2 d0_long emdr2".split()}
    folders |= {"reading": best, "fid": "d0"}
    for key, folder in folders.items():
        stored = read_json(run / folder / "test.metrics.json")
        found = {
            metric: value for metric, value in rows[key]["metrics"].items() if metric not in ("EM", "F1")
        }
        assert found and found == {metric: stored[metric] for metric in found}, key
    assert rows["hybrid"]["metrics"]["MRR@10"] == read_json(run / best / "hybrid.metrics.json")["MRR@10"]
    rescored = read_json(run / "d0" / "test_ce.metrics.json")["after"]
    for metric in ("top-1", "top-5"):
        assert rows["d0_ce"]["metrics"][metric] == rescored[metric]
    assert rows["d0_ce"]["metrics"]["top-20"] == rows["d0"]["metrics"]["top-20"]
    for key, path, depth in (("reading", "reading", 3), ("fid", "emdr2/fid", 4), ("emdr2", "emdr2", 4)):
        stored = read_json(run / path / "answers.metrics.json")
        assert [rows[key]["metrics"][m] for m in ("EM", "F1")] == [
            stored[f"{m}@{depth}"] for m in ("EM", "F1")
        ]
    for key, row in rows.items():
        if key != "m3":  # EPISODES="1 2"
            assert 0 < row["minutes"] <= row["minutes_in_all"] and row["peak_gb"] > 0, key
    text = (run / "table.md").read_text()
    assert rows["m3"]["metrics"] == {} and "| ANCE-Tele, episode 3 | not run | not run |" in text
    without = {row["key"]: row["metrics"] for row in read_json(run / "table_without.json")["rows"]}
    assert without["fid"] == without["emdr2"] == {} and without["d2"] == rows["d2"]["metrics"]


def test_the_full_size_from_the_weights_themselves(recipe):
    """Blank titles, no inverse cloze: the encoders start from START; a rung alone; another seed."""
    world, folder, bash = recipe
    run, flags = folder / "full", VARIABLES["FLAGS"] + " --mixed_precision no"
    done = bash(RUN=run, SIZE="full", RUNGS="dpr", FLAGS=flags, ENCODE_FLAGS="", SEED=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    titled, blank = Corpus(world / "corpus.tsv"), Corpus(run / "data" / "corpus.tsv")
    assert [p._replace(title="") for p in titled] == list(blank)
    config = read_yaml(run / "d0" / "config.yaml")
    assert (config["init"], config["seed"]) == (str(world / "bert"), 2)
    assert os.readlink(run / "m0") == "untrained" and not (run / "cloze").exists()
    rows = rows_of(run)
    assert read_json(run / "table.json")["notes"][0].endswith("All titles are blank.")
    ran = ["bm25", "untrained", "inbatch", "d0", "hybrid"]
    assert [key for key, row in rows.items() if row["metrics"]] == ran and "cloze" not in rows
    assert rows["inbatch"]["over"] == ["untrained"] and rows["d0"]["minutes"] > 0


# ---------------------------------------------------------------- the table
@pytest.fixture
def made(tmp_path):
    """(run folder, data folder): BM25, d0 and d1 with a cross-encoder; what their stages cost."""
    data, run = make_world(tmp_path / "data"), tmp_path / "run"
    questions, rng = read_questions(data / "test.jsonl"), np.random.default_rng(0)
    for path in ("data/bm25_test.run", "d0/test.run", "d1/test.run"):
        ranked = [
            (q["qid"], [(str(p + 1), -i) for i, p in enumerate(rng.permutation(60)[:20])]) for q in questions
        ]
        write_run(run / path, ranked)
    hits = {qid: hits[:5][::-1] for qid, hits in iter_run(run / "d0" / "test.run")}
    write_run(
        run / "d0/test_ce.run", [(qid, [(p, -i) for i, (p, _) in enumerate(h)]) for qid, h in hits.items()]
    )
    for name, steps in (("cloze", 2), ("d0", 7), ("c", 4), ("d1", 6)):
        write_json(run / name / "metrics.json", {"step": steps, "best_step": steps})
    for path in ("data/train.jsonl", "d1.jsonl"):
        (run / path).write_text("{}\n")
    (run / "m0").symlink_to("cloze")
    seconds = [
        ("data/bm25_test.run", 3),
        ("data/train.jsonl", 6),
        ("cloze/metrics.json", 60),
        ("d0/metrics.json", 90),
    ]
    seconds += [("d0/metrics.json", 30), ("c/metrics.json", 30), ("d1.jsonl", 12), ("d1/metrics.json", 120)]
    table = "".join(
        f"elsewhere/run/{output}\tx.py\t{s}\t{100 * i}\n" for i, (output, s) in enumerate(seconds)
    )
    (run / "peaks.tsv").write_text(table)
    return run, data


def test_the_columns(made, capsys):
    """Accuracy of the ranking, updates, own minutes and peak; in all: each stage it is built on, once."""
    run, data = made
    ladder(run, data)
    rows, questions, corpus = rows_of(run), read_questions(data / "test.jsonl"), Corpus(data / "corpus.tsv")
    values = per_question(run / "d1" / "test.run", questions, corpus)
    assert {m: one["value"] for m, one in rows["d1"]["metrics"].items()} == {
        m: v.mean() for m, v in values.items()
    }
    assert (rows["d0"]["updates"], rows["d1"]["updates"], rows["bm25"]["updates"]) == (7, 6, None)
    assert rows["d0"]["minutes"] == pytest.approx(2) and rows["d0"]["peak_gb"] == pytest.approx(0.4)
    assert rows["d0"]["minutes_in_all"] == pytest.approx(2 + 1 + 0.1)
    assert rows["d1"]["minutes"] == pytest.approx(2.2) and rows["d1"]["peak_gb"] == pytest.approx(0.7)
    assert rows["d1"]["minutes_in_all"] == pytest.approx(2.2 + 0.5 + 3.1)
    assert rows["d0_ce"]["minutes"] is None, "no line of its stage"
    assert "d2" in rows and rows["d2"]["metrics"] == {} and list(rows) == ROWS
    text = capsys.readouterr().out
    assert text == (run / "table.md").read_text()
    assert "| RocketQA M_D2 |" + " not run |" * 13 in text and "| not measured |" in text
    before = (run / "table.json").stat().st_mtime_ns
    ladder(run, data)
    assert (run / "table.json").stat().st_mtime_ns == before


def test_an_unmeasured_stage_is_no_zero(made):
    """A stage that is there and was not measured leaves no minutes, own or in all."""
    run, data = made
    (run / "peaks.tsv").write_text((run / "peaks.tsv").read_text().replace("d1.jsonl", "other.jsonl"))
    ladder(run, data)
    assert rows_of(run)["d1"]["minutes"] is None and rows_of(run)["d1"]["minutes_in_all"] is None
    assert rows_of(run)["d0"]["minutes"] == pytest.approx(2)


def test_gains_are_paired(made):
    """As recipes/compare.py: the mean of the differences question by question, and its interval."""
    run, data = made
    ladder(run, data)
    questions, corpus = read_questions(data / "test.jsonl"), Corpus(data / "corpus.tsv")
    d0, d1 = (per_question(run / name / "test.run", questions, corpus) for name in ("d0", "d1"))
    gains = {(gain["row"], gain["over"]): gain["metrics"] for gain in read_json(run / "table.json")["gains"]}
    found = gains["RocketQA M_D1", "DPR + BM25 negative = RocketQA M_D0"]
    assert set(found) == {"top-5", "top-20", "MRR@10"}
    for metric, one in found.items():
        difference = d1[metric] - d0[metric]
        assert (one["low"], one["high"]) == bootstrap_interval(difference)
        assert one["value"] == pytest.approx(difference.mean())
        assert one["cell"].startswith(f"{100 * difference.mean():+.1f} (")


def test_seeds(made, tmp_path):
    """Mean and range over the folders that have the row; one that only the first has counts one seed."""
    run, data = made
    (tmp_path / "other" / "d1").mkdir(parents=True)
    (tmp_path / "other/d1/test.run").write_text((run / "d0" / "test.run").read_text())
    ladder(run, tmp_path / "other", data)
    seeds, rows = read_json(run / "table.json")["seeds"], rows_of(run)
    both = sorted(rows[key]["metrics"]["MRR@10"]["value"] for key in ("d0", "d1"))
    assert seeds["d0"]["n"] == 1 and seeds["d1"]["n"] == 2 and seeds["d2"] == {"n": 0}
    assert [seeds["d1"]["MRR@10"][of] for of in ("low", "mean", "high")] == pytest.approx(
        [both[0], sum(both) / 2, both[1]]
    )
    assert "Mean over seeds" in (run / "table.md").read_text()


def test_the_best_retriever(made):
    """By the dev MRR of the weights that were kept, not of the last; equal ones: the lower rung."""
    run, _ = made
    with pytest.raises(UserError, match="no dual encoder that was evaluated"):
        choose(run / "nothing")
    for name, dev in (("d0", {3: 0.9, 7: 0.5}), ("d1", {3: 0.1, 6: 0.6}), ("gc", {2: 0.6})):
        rows = [{"step": 1, "loss": 1.0}, *({"step": step, "mrr": value} for step, value in dev.items())]
        (run / name).mkdir(exist_ok=True)
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(run / name / "metrics.json", {"step": max(dev), "best_step": max(dev)})
    assert choose(run) == [("gc", 0.6), ("d1", 0.6), ("d0", 0.5)]


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


def measure(table, *argv, **keys):
    """Start a measured command in a group of its own, whose SIGINT is not ignored."""
    return subprocess.Popen(
        [sys.executable, "recipes/measured.py", table, "run/out", *argv], cwd=ROOT, env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **keys,
    )  # fmt: skip


def test_measured(tmp_path):
    """The exit code passes; a line each, named by script or module; the peak is that of its process."""
    table = tmp_path / "new" / "peaks.tsv"
    (tmp_path / "take.py").write_text("import time; text = b'x' * 200_000_000; time.sleep(0.2)")
    for argv, code in (
        ([sys.executable, tmp_path / "take.py"], 0),
        ([sys.executable, "-m", "timeit", "-n", "1", "1"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "kill -9 $$"], 137),
    ):
        process = measure(table, *argv)
        process.communicate()
        assert process.returncode == code
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert [row[:2] for row in rows] == [
        ["run/out", name] for name in (str(tmp_path / "take.py"), "timeit", "sh", "sh")
    ]
    assert 0.2 < float(rows[0][2]) < 60 and 200 < float(rows[0][3]) < 400 and float(rows[2][3]) < 100
    missing = measure(table, "no-such-command")
    assert "no-such-command: No such file" in missing.communicate()[0] and missing.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_signal_is_handed_on_once(tmp_path, number, to_group):
    """By kill, and by a terminal's Ctrl-C or `timeout`, which signal the group: the command gets one."""
    process = measure(tmp_path / "peaks.tsv", sys.executable, "-c", LISTENER)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_group else os.kill)(process.pid, number)
    assert process.communicate()[0] == "1\n" and process.returncode == 128 + number
    assert len((tmp_path / "peaks.tsv").read_text().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child that its parent is gone")
def test_killed_it_leaves_no_trainer_behind(tmp_path):
    """After a SIGKILL of what measures, the command is told to end."""
    process = measure(tmp_path / "peaks.tsv", sys.executable, "-c", LISTENER)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.communicate()[0] == "1\n"


def test_a_measured_trainer_saves(tmp_path):
    """SIGTERM to the whole group, as `timeout` sends it: it finishes the step, saves, keeps its exit code."""
    world = make_world(tmp_path / "world")
    keys = {
        "config": "config/train_dpr_demo.yaml",
        "run_dir": tmp_path / "run",
        "init": world / "bert",
        "dev": "",
    }
    keys |= {"train": world / "train.jsonl", "corpus": world / "corpus.tsv", "batch_size": 4, "epochs": 1000}
    keys |= {"log_every": 1, "question_tokens": 16, "passage_tokens": 32}
    process = measure(tmp_path / "peaks.tsv", *command("train_dpr.py", keys))
    while not (line := process.stdout.readline()).startswith("step"):
        assert line, "it ended"
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped by a signal" in process.communicate()[0] and process.returncode == 143
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    assert (tmp_path / "peaks.tsv").read_text().split("\t")[1] == "train_dpr.py"
