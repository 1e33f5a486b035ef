"""The claims of RocketQA and ANCE-Tele: both recipes on sixty passages, and their figures by hand."""

import gzip
import random
from functools import partial

import pytest

from recipes import false_negatives, forgetting
from recipes.claim_data import choose
from recipes.false_negatives import is_copy, negatives_of, shares
from tests.processes import ENVIRONMENT
from tests.test_recipes import changes_nothing, lines, run_and_count, snapshot, stopped_by_the_gate
from tests.toy import make_world, write_lines, write_ranking
from utils.data import Corpus, read_run
from utils.plumbing.config import UserError, read_yaml
from utils.plumbing.files import read_json, write_json

FILES = ("ann_seed1/m1.jsonl", "ann_seed1/m2.jsonl", "momentum_seed1/m2.jsonl")
VARIABLES = {
    "QUESTIONS": 24, "PASSAGES": 56, "DEPTH": 30, "SCORED": 10, "START_EPOCHS": 1, "EPOCHS": 1,
    "ARMS": "none gated", "MEASURE": "",
    "FLAGS": "--batch_size 8 --question_tokens 16 --passage_tokens 32 --question_chunk 8 --passage_chunk 16",
    "CROSS_FLAGS": "--chunk 16 --pair_tokens 48 --batch_size 8 --learning_rate 1e-3",
}  # fmt: skip


# ---------------------------------------------------------------- the recipes
@pytest.fixture(scope="module")
def recipe(tmp_path_factory, python):
    """(DATA, RUN, a function that runs a recipe with some variables)."""
    folder = tmp_path_factory.mktemp("claims")
    world = make_world(folder / "data")
    text = (world / "corpus.tsv").read_bytes()
    (world / "corpus.tsv.gz").write_bytes(gzip.compress(text))
    (world / "corpus.tsv").unlink()
    variables = VARIABLES | {"DATA": world, "RUN": folder / "run", "START": world / "bert"}
    variables |= {"PATH": f"{python}:{ENVIRONMENT['PATH']}"}
    stages = tmp_path_factory.mktemp("stages") / "claims"

    def bash(name, **changes):
        return run_and_count([f"recipes/claim_{name}.sh"], stages, variables | changes)

    return world, folder / "run", bash


@pytest.fixture(scope="module")
def rocketqa(recipe):
    """(RUN, the gate) after a run that the gate stopped, one that went on, and one that had nothing to do."""
    _, run, bash = recipe
    bash = partial(bash, "rocketqa")
    below = stopped_by_the_gate(bash, run / "d0/train_ce.run", 0.5)
    bash = partial(bash, BELOW=below)
    done = bash()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "train_cross_encoder.py" not in done.stdout, "it goes on"
    changes_nothing(bash, run)
    return run, below


def test_rocketqa(recipe, rocketqa):
    """What is mined without answers, what the gate and the answers take out of it, and the arms."""
    world, (run, below) = recipe[0], rocketqa
    corpus = Corpus(run / "data" / "corpus.tsv")
    train, answers = (lines(run / f"data/{name}.jsonl") for name in ("train", "train_answers"))
    assert len(train) == 24 and {*train[0]} == {"qid", "question", "positives"} and len(corpus) == 56
    assert [row | {"answers": more["answers"]} for row, more in zip(train, answers, strict=True)] == answers
    assert {row["qid"] for row in train} < {row["qid"] for row in lines(world / "train.jsonl")}
    assert not any(passage.title for passage in corpus)

    # the negatives
    ranked, scores = read_run(run / "d0" / "train.run"), read_run(run / "d0" / "train_ce.run")
    files = {name: negatives_of(run / f"{name}.jsonl") for name in ("mined", "gated", "filtered", "checked")}
    for row in answers:
        qid = row["qid"]
        others = [pid for pid, _ in ranked[qid] if pid not in row["positives"]]
        assert files["mined"][qid] == others[:1]
        colour = row["answers"][0]
        assert files["filtered"][qid] == [pid for pid in others if colour not in corpus.passage(pid).text][:1]
        sure = [pid for pid in others if dict(scores[qid]).get(pid, 1) < below]
        assert files["checked"].get(qid, []) == sure[:1]
        unseen = {*others} - {*dict(scores[qid])}
        assert files["gated"][qid] == sure[:1] or not sure and {*files["gated"][qid]} <= unseen

    # the shares
    result = read_json(run / "shares.json")
    assert result["below"] == below and result["shares"]["filtered"]["value"] == 0
    assert result["shares"]["mined"]["n"] == result["shares"]["gated"]["n"] == 24
    assert result["shares"]["c"]["n"] == 4 * 24 and 0 < result["shares"]["mined"]["value"] < 1

    # the arms
    for name, negatives, file in (("none_seed1", 0, "mined"), ("gated_seed1", 1, "gated")):
        config = read_yaml(run / name / "config.yaml")
        assert config["init"] == f"{run}/d0/query_encoder" and config["negatives"] == negatives
        assert config["train"] == f"{run}/{file}.jsonl" and config["keep"] == "last"
        assert read_json(run / name / "metrics.json")["step"] == 3
    assert read_yaml(run / "d0" / "config.yaml")["train"] == f"{run}/data/train.jsonl"
    ranks = read_json(run / "ranks.json")
    assert [*ranks] == ["d0", "bm25", "none_seed1", "gated_seed1"]
    hits = [0 < rank <= 20 for rank in ranks["gated_seed1"]["answer"]]
    assert sum(hits) / 10 == read_json(run / "gated_seed1" / "test.metrics.json")["top-20"]["value"]


def test_unequal_files_are_refused(rocketqa, tmp_path):
    """Where an arm has fewer negatives it would have fewer updates."""
    run, _ = rocketqa
    (tmp_path / "data").symlink_to(run / "data")
    for path in [*run.glob("*.jsonl"), run / "gate.txt"]:
        (tmp_path / path.name).write_text(path.read_text())
    false_negatives.main(tmp_path)
    assert read_json(tmp_path / "shares.json") == read_json(run / "shares.json")
    write_lines(tmp_path / "gated.jsonl", lines(run / "gated.jsonl")[1:])
    with pytest.raises(UserError, match="gated.jsonl: not as many negatives a question as mined.jsonl"):
        false_negatives.main(tmp_path)


def test_ance_tele(recipe, rocketqa):
    """Two arms from M_D0, of which the first episode is one; momentum adds the last episode's negatives."""
    run, bash = rocketqa[0], recipe[2]
    variables = {"ARMS": "momentum ann", "FLOOR": "", "EPISODES": "1 2"}
    variables |= {"SAMPLE": 4, "NEGATIVES": 2, "DEPTH": 20}
    done = bash("ance_tele", **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    trained = snapshot(run)
    again = bash("ance_tele", **variables)
    assert again.returncode == 0 and "==" not in again.stdout, again.stdout + again.stderr
    changed = {path.name for path, time in snapshot(run).items() if trained.get(path) != time}
    assert changed == {"episodes.json", "episodes.png"}

    arms = run / "ance"
    first, second, both = (negatives_of(arms / name) for name in FILES)
    assert {len(pids) for pids in [*first.values(), *second.values()]} == {4}
    for qid, pids in both.items():
        assert pids == second[qid] + first.get(qid, [])
    assert (arms / "ann_seed1/m1").resolve() == arms / "momentum_seed1/m1"
    for model in ("momentum_seed1/m1", "ann_seed1/m2", "momentum_seed1/m2"):
        config = read_yaml(arms / model / "config.yaml")
        assert config["init"] == f"{run}/d0/query_encoder" and config["negatives"] == 2
        assert config["rotate_negatives"] and (config["keep"], config["seed"]) == ("last", 1)
        assert read_json(arms / model / "metrics.json")["step"] == 3
    result = read_json(run / "episodes.json")
    kept = read_json(run / "ance" / "ranks.json")
    assert [*kept] == [f"{arm}_m{i}_seed1" for arm in ("ann", "momentum") for i in range(3)]
    known = [row["metrics"]["known"]["value"] for row in result["rows"]]
    assert [sum(row["known"]) / 24 for row in kept.values()] == pytest.approx(known)
    assert len(result["rows"]) == 6 and (run / "episodes.png").read_bytes().startswith(b"\x89PNG")
    assert {row["metrics"]["known"]["n"] for row in result["rows"]} == {24}
    assert {row["metrics"]["top-20"]["n"] for row in result["rows"]} == {10}


# ---------------------------------------------------------------- figures by hand
TEXTS = ["it is red", "it is blue", "red and blue", "green", "now it is red"]
QUESTIONS = [
    {"qid": "r", "question": "which", "answers": ["red"], "positives": ["1"]},
    {"qid": "b", "question": "which", "answers": ["blue"], "positives": ["2"]},
]


@pytest.fixture
def corpus(tmp_path):
    rows = "".join(f"{pid}\t{text}\t\n" for pid, text in enumerate(TEXTS, 1))
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n" + rows)
    return Corpus(tmp_path / "corpus.tsv")


def test_choose():
    """Positives, then the first of every ranking, then the second; then at random, never twice."""
    rankings = [["a", "x", "y"], ["b", "a"], []]
    assert choose(["g"], rankings, "abcgxyz", 3, random.Random(0)) == {*"gab"}
    assert choose(["g"], rankings, "abcgxyz", 4, random.Random(0)) == {*"gabx"}
    drawn = [frozenset(choose(["g"], rankings, "abcgxyz", 6, random.Random(i))) for i in range(20)]
    assert {*drawn} == {frozenset("gabxyc"), frozenset("gabxyz")}
    with pytest.raises(UserError, match="2 passages are asked for, but the questions have 3 positives"):
        choose("abc", [], "abc", 2, random.Random(0))


def test_shares(corpus, tmp_path):
    """Two questions, two negatives each: three of four mined hold an answer, one of four after the gate."""
    rows = [("r", ["3"]), ("r", ["5"]), ("b", ["3", "4"])]
    write_lines(tmp_path / "mined.jsonl", [{"qid": qid, "negatives": pids} for qid, pids in rows])
    files = {"mined": negatives_of(tmp_path / "mined.jsonl"), "gated": {"r": ["4", "2"], "b": ["3", "4"]}}
    assert files["mined"] == {"r": ["3", "5"], "b": ["3", "4"]}
    assert shares(files, QUESTIONS, corpus) == {
        "mined": [1, 1, 1, 0], "gated": [0, 0, 1, 0], "thrown out": [1, 1], "gated - mined": [-1, 0],
        "mined, no copy": [1, 0, 1, 0], "gated, no copy": [0, 0, 1, 0],
        "thrown of false, no copy": [1, 0], "thrown of others": [0],
    }  # fmt: skip


def test_a_copy_shares_more_than_a_fifth():
    """Of six three-word sequences one in common, or two."""
    text = "a b c d e f g h"
    assert not is_copy(text, "a b c x y z u v") and is_copy(text, "x A b, c d y z u v w")


def test_by_answer(corpus, tmp_path):
    """The first passages with an answer have the ranks 3 and 1; nobody labelled them."""
    path = write_ranking(tmp_path / "x.run", {"r": "245", "b": "314"})
    values = forgetting.by_answer(path, QUESTIONS, corpus)
    found = {name: numbers.tolist() for name, numbers in values.items()}
    assert found == {"top-1": [0, 1], "MRR@10": [1 / 3, 1]}


def test_forgetting(corpus, tmp_path):
    """
    One of two questions is forgotten; then it is learned again, and the other is forgotten. The twenty-first
    place is not known any more.
    """
    path = write_ranking(tmp_path / "x.run", {"r": [*range(10, 29), 1], "b": [*range(10, 30), 2]})
    assert forgetting.known(path, QUESTIONS).tolist() == [True, False]
    both, forgets_r, forgets_b = {"r": "1", "b": "2"}, {"r": "4", "b": "2"}, {"r": "1", "b": "4"}
    arms = {}
    for arm, rankings in {"ann_seed1": (both, forgets_r, forgets_b), "all_seed1": (both, both)}.items():
        for number, pids in enumerate(rankings):
            for name in ("ann", "test"):
                write_ranking(tmp_path / arm / f"m{number}" / f"{name}.run", pids)
        arms[arm] = forgetting.episodes_of(tmp_path / arm, QUESTIONS, QUESTIONS, corpus)
    ann = [{name: numbers.tolist() for name, numbers in values.items()} for values in arms["ann_seed1"]]
    assert "forgotten" not in ann[0] and [values["known"] for values in ann] == [[1, 1], [0, 1], [1, 0]]
    changes = [(values["forgotten"], values["learned"]) for values in ann[1:]]
    assert changes == [([1, 0], [0, 0]), ([0, 1], [1, 0])]
    table = forgetting.table(arms)
    episodes = "ann_seed1 m0, ann_seed1 m1, ann_seed1 m2, all_seed1 m0, all_seed1 m1"
    assert [row["row"] for row in table["rows"]] == episodes.split(", ")
    assert table["rows"][1]["metrics"]["forgotten"]["value"] == 0.5
    gains = {(gain["row"], gain["over"]): gain["metrics"]["forgotten"]["value"] for gain in table["gains"]}
    assert gains == {("all_seed1 m1", "ann_seed1 m1"): -0.5, ("ann_seed1 m1", "all_seed1 m1"): 0.5}
    arms |= {"all_seed2": arms["all_seed1"], "ann_seed2": arms["ann_seed1"]}
    pairs = {(gain["row"], gain["over"]) for gain in forgetting.table(arms)["gains"]}
    assert {over for row, over in pairs if row == "all_seed2 m1"} == {"ann_seed2 m1", "all_seed1 m1"}


def test_unequal_steps_are_said(tmp_path, capsys):
    """One arm has lost a question and with it a step."""
    steps = {"ann_seed1": 61, "all_seed1": 62}
    for arm, step in steps.items():
        write_json(tmp_path / arm / "m2" / "metrics.json", {"step": step})
    forgetting.say_steps([tmp_path / arm for arm in steps])
    assert f"m2: the arms took unequally many steps: {steps}" in capsys.readouterr().out
    forgetting.say_steps([tmp_path / "ann_seed1"])
    assert not capsys.readouterr().out
