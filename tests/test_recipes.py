"""
Rehearsals: every pipeline of recipes/ from its first to its last command on sixty passages, and a second
time, when nothing is left to do. Two run at a time.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT
from tests.toy import make_world
from tests.toy_t5 import t5
from tests.warm_python import warm_python
from utils.data import Corpus, iter_jsonl, iter_run, read_run
from utils.plumbing.config import ROOT, read_yaml
from utils.plumbing.files import read_json
from utils.text import has_answer

SMALL = "--mixed_precision no --batch_size 8 --epochs 1 --question_chunk 8 --passage_chunk 16"
COMMON = {
    "LAUNCH": "python",
    "ENCODE_FLAGS": "",
    "TRAIN_FLAGS": f"{SMALL} --question_tokens 16 --passage_tokens 32",
    "OMP_NUM_THREADS": "1",  # why: two recipes at a time on two cores
    "PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}",
}
RESCORE = {
    "CROSS_FLAGS": "--chunk 16 --pair_tokens 48 --batch_size 8 --epochs 1 --learning_rate 1e-3",
    "SCORED": 10, "UNLABELLED_DEPTH": 10, "ABOVE": 0,
}  # fmt: skip
RECIPES = {  # recipe: its variables; the longest first
    "rocketqa_nq": RESCORE | {"DEPTH": 20, "ABLATION": "true"},
    "rocketqa_marco": RESCORE | {"DEPTH": 60},
    "demo": {
        "FLAGS": "--batch_size 8 --stop_after 4 --dev_negatives 2 --question_chunk 4 --passage_chunk 4",
        "READER_FLAGS": "--reader_tokens 48 --stop_after 3",
    },
    "dpr_nq": {
        "GOLD": "",
        "READER_FLAGS": "--reader_tokens 48 --batch_size 4 --stop_after 3 --workers 0",
    },
    "emdr2_nq": {
        "TRAIN_FLAGS": "--mixed_precision no --batch_size 8 --question_chunk 4 --top_k 4 --reader_tokens 48 "
        "--answer_tokens 8 --encoding_batch_size 32 --refresh_every 2 --stop_after 3 --warmup 0",
        "SPAN_FLAGS": "--model rules --passages 30 --workers 0",
        "MSS": "true", "BASELINE": "true", "DEPTH": 20,
    },
    "ance_tele_nq": {"EPISODES": "1 2", "NEGATIVES": "2 3", "STOP_AFTER": "3 0", "DEPTH": 20, "SAMPLE": 5},
    "ance_tele_trivia": {"EPISODES": "1", "DEPTH": 20, "SAMPLE": 5},
    "ance_tele_marco": {"EPISODES": "1", "DEPTH": 20, "SAMPLE": 5},
}  # fmt: skip


PAPERS = {  # recipe: the numbers of the papers' code (RocketQA run_nq.sh, run_marco.sh; ANCE-Tele shells/)
    "rocketqa_nq": dict(
        DEPTH=100, SCORED=100, UNLABELLED_DEPTH=50, BELOW=0.1, ABOVE=0.9, POSITIVES="ranking"
    ),
    "rocketqa_marco": dict(DEPTH=1000, SCORED=50, UNLABELLED_DEPTH=50, BELOW=0.1, ABOVE=0.9),
    "ance_tele_nq": dict(
        NEGATIVES="3 7 11", STOP_AFTER="2000 2000 0", DEPTH=200, SAMPLE=80, EPISODES="1 2 3"
    ),
    "ance_tele_marco": dict(NEGATIVES="15 31 31", STOP_AFTER="20000 20000 0", SAMPLE=30, TEST_DEPTH=1000),
    "ance_tele_trivia": dict(TEST_TOKENS=64),
}


def lines(path):
    return [row for _, row in iter_jsonl(path)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(recipe, folder):
    """The toy world as the recipe expects its DATA; ten of its questions are unlabelled."""
    world = make_world(folder)
    unlabelled = [
        {"qid": f"u{i}", "question": row["question"]} for i, row in enumerate(lines(world / "dev.jsonl"))
    ]
    if recipe == "demo":  # the inverse cloze takes a sentence out
        text = (world / "corpus.tsv").read_text()
        (world / "corpus.tsv").write_text(re.sub(r"\.\t", ". It was named first.\t", text))
    if recipe == "rocketqa_nq":
        write_lines(world / "unlabelled.jsonl", unlabelled)
    if recipe == "emdr2_nq":  # a year to mask, a trained retriever, a T5, and DPR's other file names
        text = re.sub(r"\.\t", ". It was named by an old town in 1889.\t", (world / "corpus.tsv").read_text())
        (world / "corpus.tsv").write_text(text)
        (world / "dpr").mkdir()
        for name in ("query_encoder", "doc_encoder"):
            (world / name).rename(world / "dpr" / name)
        (world / "dev.jsonl").rename(world / "dev_qa.jsonl")
        t5(world)
    if recipe == "ance_tele_trivia":  # DPR names no passage for some questions
        rows = lines(world / "train.jsonl")
        write_lines(
            world / "train.jsonl", [row | {"positives": []} if i < 10 else row for i, row in enumerate(rows)]
        )
    if recipe.endswith("marco"):  # RocketQA's files: text and title apart, no answers, extra positives
        passages = list(Corpus(world / "corpus.tsv"))
        (world / "para.txt").write_text("".join(f"{p.id}\t{p.text}\n" for p in passages))
        (world / "para.title.txt").write_text("".join(f"{p.id}\t{p.title}\n" for p in passages[1:]))
        (world / "corpus.tsv").unlink()
        for name in ("train", "test"):
            rows = lines(world / f"{name}.jsonl")
            write_lines(
                world / f"{name}.jsonl",
                [{k: row[k] for k in ("qid", "question", "positives")} for row in rows],
            )
        tsv = "".join(f"{row['qid']}\t{row['question']}\n" for row in unlabelled)
        (world / "orcas_yahoo_nq.query.txt").write_text(tsv)
        (world / "msmarco").mkdir()
        (world / "msmarco" / "queries.train.tsv").write_text("q0\twhich colour\nq1\twhich colour\n")
        (world / "qrels.train.addition.tsv").write_text("".join(f"q0\t{pid}\n" for pid in range(2, 31)))
    return world


def snapshot(folder):
    """What a second run may not touch: names and times of all files."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def gate(recipe, run):
    """A toy teacher is sure of nothing: BELOW is a quantile of its scores, that keeps a quarter out."""
    name = {"rocketqa_nq": "d0/train_ce.run", "rocketqa_marco": "d1/unlabelled_ce.run"}[recipe]
    scores = sorted(score for _, hits in iter_run(run / name) for _, score in hits)
    return scores[int(0.75 * len(scores))]


def rehearse(recipe, folder, python):
    """
    (DATA, RUN, output) of a rehearsal; asserts that it succeeds, and that a second one changes nothing.
    python: the folder of a warm one; `make demo`, the first that a newcomer sees, has the real one.
    """
    world, run = make_data(recipe, folder / "data"), folder / "run"
    variables = COMMON | {
        "DATA": world,
        "TRAIN": world / "train.jsonl",
        "RUN": run,
        "START": world / "bert",
        "CROSS_START": world / "bert",
        "INIT": world / "bert",
        "READER_INIT": world / "bert",
        "RETRIEVER": world / "dpr",
        "READER": world / "t5",
    }
    if recipe != "demo":
        variables["PATH"] = f"{python}:{COMMON['PATH']}"

    def bash(**changes):
        environment = {key: str(value) for key, value in (variables | RECIPES[recipe] | changes).items()}
        command = ["bash", f"recipes/{recipe}.sh"]
        return subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True
        )

    below = {}
    if recipe.startswith("rocketqa"):  # no score is below 0: it stops, and later goes on from there
        stopped = bash(BELOW=0)
        assert stopped.returncode == 2 and "no question is left" in stopped.stderr, stopped.stderr[-2000:]
        below = {"BELOW": gate(recipe, run)}
    done = bash(**below)
    assert done.returncode == 0, f"{recipe}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "train_cross_encoder.py" not in done.stdout
    if recipe not in ("demo", "dpr_nq"):  # whose short stages are repeated
        before, again = snapshot(folder), bash(**below)
        assert again.returncode == 0 and "==" not in again.stdout, again.stdout + again.stderr
        assert snapshot(folder) == before
    return world, run, done.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, request):
    """A function: recipe -> what rehearse returns, or its failure; only selected tests start theirs."""
    wanted = [name for name in RECIPES if any(item.name == f"test_{name}" for item in request.session.items)]
    folder = tmp_path_factory.mktemp("warm") / "bin"
    with warm_python(folder, ENVIRONMENT) as python, ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(rehearse, name, tmp_path_factory.mktemp(name), python) for name in wanted
        }
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_numbers_of_the_papers(recipe):
    """What a rehearsal makes smaller is the papers' number when nobody sets it."""
    text = (ROOT / "recipes" / f"{recipe}.sh").read_text()
    for name, number in PAPERS[recipe].items():
        found = re.search(rf"\b{name}=\(?\$\{{{name}:-([^}}]*)\}}", text)
        assert found and found[1] == str(number), f"{recipe}: {name}"
    if recipe == "rocketqa_marco":  # epochs: 40, and 10 from step 3 on (run_marco.sh:13,54,88)
        assert re.findall(r"^train (d\d) (\d+)$", text, re.M) == [("d0", "40"), ("d1", "10"), ("d2", "10")]


def metrics_of(run, name):
    """The metrics of a retriever on the test questions, alone and rescored; both must be there."""
    before, both = read_json(run / name / "test.metrics.json"), read_json(run / name / "test_ce.metrics.json")
    assert set(both) == {"before", "after"}
    return before


def test_a_stage_runs_once(tmp_path):
    """Not again where its output is; again where a manifest is incomplete; a failure ends the recipe."""
    (tmp_path / "done").touch()
    (tmp_path / "manifest.json").write_text('{"complete": false}')

    def bash(script):
        text = f"DATA=d RUN={tmp_path} FORMAT=auto; . recipes/stage.sh; cd {tmp_path}; {script}; echo end"
        return subprocess.run(["bash", "-c", text], cwd=ROOT, capture_output=True, text=True)

    assert bash("stage done echo ran").stdout == "end\n"
    assert "ran\nend" in bash("stage manifest.json echo ran").stdout
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    assert bash("stage manifest.json echo ran").stdout == "end\n"
    assert "touch" in bash("stage new touch new").stdout and (tmp_path / "new").exists()
    failed, idle = bash("stage other false"), bash("stage other true")
    assert failed.returncode == 1 and "end" not in failed.stdout
    assert idle.returncode == 1 and "other is not there after: true" in idle.stderr
    (tmp_path / "more").write_text("2\n")
    (tmp_path / "done").write_text("1\n")
    assert bash("stage both write both cat done more").returncode == 0
    assert (tmp_path / "both").read_text() == "1\n2\n"
    assert bash("stage half write half cat done missing").returncode and not (tmp_path / "half").exists()


def test_rocketqa_nq(rehearsal):
    """
    M_D0 -> M_C -> M_D1 -> M_D2: every step starts from START, a negative of step 3 is one that M_C calls
    irrelevant, a pseudo-label one of which it is sure, and step 4 is step 3's file and the pseudo-labels.
    """
    world, run, _ = rehearsal("rocketqa_nq")
    corpus, questions = (
        Corpus(world / "corpus.tsv"),
        {row["qid"]: row for row in lines(world / "train.jsonl")},
    )
    for name in ("d0", "d1", "d2", "d1_raw"):
        assert read_yaml(run / name / "config.yaml")["init"] == str(world / "bert")
        assert {"top-5", "top-20", "MRR@10", "hit@20"} <= set(metrics_of(run, name)) and read_json(
            run / name / "metrics.json"
        )

    def right(pid, qid):
        return has_answer(corpus[corpus.row(pid)].text, questions[qid]["answers"])

    for row in lines(run / "c.jsonl"):
        assert right(row["positives"][0], row["qid"]) and not right(row["negatives"][0], row["qid"])
    scores, ranking = read_run(run / "d0" / "train_ce.run"), read_run(run / "d0" / "train.run")
    for name, below in (("d1", gate("rocketqa_nq", run)), ("d1_raw", 2)):
        expected = []
        for qid, hits in ranking.items():
            scored = dict(scores[qid])
            positive = [pid for pid, _ in hits if right(pid, qid)][:1]
            negative = [p for p, _ in hits if not right(p, qid) and scored.get(p, 9) < below][:1]
            expected += [(qid, positive, negative)] if positive and negative else []
        rows = lines(run / f"{name}.jsonl")
        assert [(row["qid"], row["positives"], row["negatives"]) for row in rows] == expected
    assert lines(run / "d1.jsonl") != lines(run / "d1_raw.jsonl")
    pseudo, scores = lines(run / "pseudo.jsonl"), read_run(run / "d1" / "unlabelled_ce.run")
    for row in pseudo:
        best = scores[row["qid"]][0]
        assert row["positives"] == [best[0]]
        assert dict(scores[row["qid"]])[row["negatives"][0]] < gate("rocketqa_nq", run)
    assert pseudo and lines(run / "d2.jsonl") == lines(run / "d1.jsonl") + pseudo


def test_rocketqa_marco(rehearsal):
    """
    Four random passages for a positive; then four of a ranking, which at the gate 0 are all from below the
    scored ones. Extra positives are never drawn, and a passage without a title has the title "-".
    """
    world, run, _ = rehearsal("rocketqa_marco")
    corpus = Corpus(world / "corpus.tsv", "marco")
    assert [corpus[0].title, corpus[1].title] == ["-", "paris"] and "river of paris" in corpus[0].text
    positives = {row["qid"]: row["positives"] for row in lines(world / "train.jsonl")}
    scored, ranking = read_run(run / "d0" / "train_ce.run"), read_run(run / "d0" / "train.run")
    extra = {str(pid) for pid in range(2, 31)}
    for name in ("d0", "d1"):
        rows = lines(run / f"{name}.jsonl")
        assert len(rows) == 160
        for i in range(0, 160, 4):
            qid, negatives = rows[i]["qid"], [row["negatives"][0] for row in rows[i : i + 4]]
            assert len({*negatives, *positives[qid]}) == 5 and all(
                row["qid"] == qid for row in rows[i : i + 4]
            )
            if name == "d1":
                assert not {*negatives} & {*dict(scored[qid])}
                assert qid != "q0" or not extra & {*negatives}
    assert len(scored["q0"]) == 10 and len(ranking["q0"]) == 60
    assert all("hit@50" in metrics_of(run, name) for name in ("d0", "d1", "d2"))
    assert lines(run / "d2.jsonl") == lines(run / "d1.jsonl") + lines(run / "pseudo.jsonl")


def sources(run, episode, row):
    """The parts of a teleport list with SAMPLE 5: (near the question, near its positive, last episode's)."""
    ann, lookahead = (
        dict(iter_run(run / f"m{episode - 1}" / f"{name}.run"))[row["qid"]] for name in ("ann", "lookahead")
    )
    assert lookahead[0][0] == row["positives"][0], "the positive is its own nearest neighbour"
    parts = row["negatives"][:5], row["negatives"][5:10], row["negatives"][10:]
    assert {*parts[0]} <= {*dict(ann)} and {*parts[1]} <= {*dict(lookahead)}
    assert len({*parts[0]}) == len({*parts[1]}) == 5 and not {*row["negatives"]} & {*row["positives"]}
    return parts


def test_ance_tele_nq(rehearsal):
    """
    Two episodes: ten negatives, then ten new ones and the old ten; each model from START, the first one
    stopped early; m1 finds what m2 learns from.
    """
    world, run, _ = rehearsal("ance_tele_nq")
    old = {row["qid"]: row["negatives"] for row in lines(run / "m1.jsonl")}
    moved = 0
    for row in lines(run / "m1.jsonl"):
        assert sources(run, 1, row)[2] == []
    for row in lines(run / "m2.jsonl"):
        assert sources(run, 2, row)[2] == old[row["qid"]]
        moved += row["negatives"][:10] != old[row["qid"]]
    assert len(old) == 40 and moved
    for episode, negatives, steps in ((1, 2, 3), (2, 3, 5)):
        config = read_yaml(run / f"m{episode}" / "config.yaml")
        assert config["init"] == str(world / "bert") and config["negatives"] == negatives
        assert read_json(run / f"m{episode}" / "metrics.json")["step"] == steps
        assert "top-20" in read_json(run / f"m{episode}" / "test.metrics.json")


def test_ance_tele_trivia(rehearsal):
    """A question without a positive takes the first passage with its answer, and looks ahead from there."""
    world, run, output = rehearsal("ance_tele_trivia")
    corpus, rows = Corpus(world / "corpus.tsv"), lines(run / "m1.jsonl")
    found = [row for row in rows if int(row["qid"][1:]) < 10]
    assert found and len(rows) >= 30
    for row in found:
        assert has_answer(corpus[corpus.row(row["positives"][0])].text, row["answers"])
        sources(run, 1, row)
    assert "--question_tokens 64" in output and "top-20" in read_json(run / "m1" / "test.metrics.json")


def test_ance_tele_marco(rehearsal):
    """One encoder is both towers, and the file has MS MARCO's metrics."""
    _, run, _ = rehearsal("ance_tele_marco")
    assert all(sources(run, 1, row)[2] == [] for row in lines(run / "m1.jsonl"))
    assert (run / "m1" / "doc_encoder").is_symlink() and not (run / "m0" / "questions.jsonl").exists()
    assert {"MRR@10", "hit@1000"} <= set(read_json(run / "m1" / "test.metrics.json"))


def test_emdr2_nq(rehearsal):
    """
    Masked sentences, then questions: EMDR2 and plain FiD both start from what the sentences taught; accuracy
    before and after, and exact match of both.
    """
    world, run, output = rehearsal("emdr2_nq")
    masked = lines(run / "mss.jsonl")
    assert len(masked) == 30 and all(row["answers"] == ["1889"] for row in masked)
    mss, fid, emdr2 = (read_yaml(run / name / "config.yaml") for name in ("mss", "fid", "."))
    assert mss["query_encoder"] == f"{world}/dpr/query_encoder" and not mss["dev"]
    for config in (fid, emdr2):
        assert config["doc_encoder"] == f"{run}/mss/doc_encoder" and config["reader"] == f"{run}/mss/reader"
        assert config["embeddings"] == f"{run}/mss/embeddings"
    assert (fid["retriever_loss"], emdr2["retriever_loss"], emdr2["refresh"]) == ("none", "emdr2", "sync")
    for name in ("fid", "."):
        assert read_json(run / name / "metrics.json")["step"] == 3 and (run / name / "curves.png").is_file()
        assert read_json(run / name / "answers.metrics.json")["EM@4"]["n"] == 10
    assert {"top-5", "top-20"} <= set(read_json(run / "test.metrics.json"))
    assert f"{run}/test.run" in (run / "compare.txt").read_text() and "n = 10 questions" in output
    assert re.search(r"EM .*F1 ", (run / "compare_answers.txt").read_text())
    index_age = [row["index_age"] for row in lines(run / "metrics.jsonl") if "index_age" in row]
    assert index_age == [0, 1, 0], "the passages are encoded anew after two steps"


def test_dpr_nq(rehearsal):
    """From the official files to exact match."""
    _, run, output = rehearsal("dpr_nq")
    assert len(read_json(run / "test" / "reader.json")) == 10
    scores = read_json(run / "test" / "reader.metrics.json")
    assert scores["EM@100"]["n"] == 10 and "test.run" in output


def test_demo(rehearsal):
    """The whole of `make demo` after its downloads, from BM25 to a question that is answered."""
    _, run, output = rehearsal("demo")
    for words in ("untrained encoder", "n = 10 questions, 60 passages", "dense 1 |", "60 pairs, 0 passages"):
        assert words in output, words
    table = read_json(run / "table.json")
    retrieval = {"BM25", "untrained encoder", "trained encoder", "trained + BM25"}
    assert set(table) == retrieval | {"title of passage 1", *(f"reader, best of {n}" for n in (1, 2, 3))}
    assert table["reader, best of 3"]["EM"]["n"] == 10
    assert re.search(r"^answer: .* \| span .* \| in dense \d", output, re.M)
    assert table["trained encoder"]["top-100"]["value"] == 1  # sixty passages
