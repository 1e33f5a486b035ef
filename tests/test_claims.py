"""recipes/claims.py: figures from stored ranks, verdicts no stronger than they, the committed pages."""

import json

import pytest
import torch
import yaml

from recipes import claims, reader_signal
from recipes.reader_signal import shares
from tests.toy import write_lines
from utils.data import write_run
from utils.plumbing.config import ROOT, UserError

# four questions; the rank of the first passage with an answer, and of the first right one
RANKS = {
    "start": {"depth": 100, "answer": [0, 30, 3, 1], "right": [0, 0, 2, 2]},
    "one": {"depth": 100, "answer": [20, 2, 21, 1], "right": [4, 0, 1, 1]},
    "two": {"depth": 100, "answer": [9, 1, 1, 1], "right": [1, 1, 1, 1]},
    "less": {"depth": 100, "answer": [0, 30, 3, 1], "right": [0, 0, 3, 2]},
    "control_seed1": {"depth": 100, "answer": [0, 30, 3, 1], "right": [0, 0, 3, 2]},
}
ENTRY = {"claim": "it learns", "system": "X", "metric": "top-20", "folder": "toy", "verdict": "not shown"}
ENTRY |= {"reason": "too few questions"}


@pytest.fixture
def house(tmp_path, monkeypatch):
    (tmp_path / "results" / "toy").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "toy" / "ranks.json").write_text(json.dumps(RANKS))
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    return tmp_path


def test_gains_are_paired_and_averaged_over_seeds(house):
    """By hand: at 20 the start finds 2 of 4, one seed 3 (it loses one, gains two), the other all 4."""
    one = claims.row_of(ENTRY | {"arm": ["one"], "over": ["start"]})
    assert (one["gain"], one["n"], one["seeds"]) == (0.25, 4, 1) and one["low"] < 0 < one["high"]
    seeds = ENTRY | {"arm": ["one", "two"], "over": ["start"]}
    both = claims.row_of(seeds)
    assert both["gain"] == pytest.approx((0.25 + 0.5) / 2) and both["range"] == [0.25, 0.5]
    smaller = claims.row_of(seeds | {"smaller": True})
    assert smaller["gain"] == -both["gain"], "less may be better"
    mrr = claims.row_of(ENTRY | {"arm": ["one"], "over": ["start"], "metric": "MRR@10"})
    assert mrr["gain"] == pytest.approx((0.25 + 0 + 0.5 + 0.5) / 4)
    by_answer = claims.row_of(ENTRY | {"arm": ["two"], "over": ["start"], "metric": "answer MRR@10"})
    assert by_answer["gain"] == pytest.approx((1 / 9 + 1 + 2 / 3 + 0) / 4)


def test_the_gain_is_that_of_its_own_ranking(house):
    """What compare.py prints: a ranking ends where the next one begins, a mean may stand before the gain."""
    text = "n = 8 questions\nbase\n    MRR@10  12.3 (10.0 to 14.0)\none\n    MRR@10     13.3 (11.0 to 15.0)"
    text += "          +1.0 (-0.5 to 2.5)\ntwo\n    top-1  1.0 (0.0 to 2.0) +0.5 (0.0 to 1.0)\n"
    text += "three\n    MRR@10  +2.0 (1.0 to 3.0)\n"
    (house / "results" / "toy" / "compare.txt").write_text(text)
    for name, *figures in (("one", 0.01, -0.005, 0.025), ("three", 0.02, 0.01, 0.03)):
        row = claims.row_of(ENTRY | {"metric": "MRR@10", "text": ["compare.txt", name]})
        assert [row["gain"], row["low"], row["high"], row["n"]] == [*figures, 8]
    with pytest.raises(UserError, match="no gain in MRR@10 of two"):
        claims.row_of(ENTRY | {"metric": "MRR@10", "text": ["compare.txt", "two"]})


def test_a_verdict_says_no_more_than_the_figure(house):
    for changes, message in (
        ({"verdict": "shown", "arm": ["one"], "over": ["start"]}, "the interval holds zero"),
        ({"verdict": "shown"}, "or there is none"),
        ({"verdict": "shown", "arm": ["two"], "over": ["start"], "metric": "MRR@10"}, "by one seed"),
        ({"verdict": "shown in part", "reason": ""}, "but no reason"),
        ({"verdict": "proved"}, "the verdict is one of"),
        ({"verdict": "shown", "arm": ["two", "less"], "over": ["start"], "metric": "MRR@10"}, "the opposite"),
        ({"arm": ["two", "two"], "over": ["start"]}, "an arm stands there twice"),
        ({"arm": ["one", "two"], "over": ["control_seed1"]}, "one seed of its arm"),
        ({"text": ["compare.txt", "two"], "smaller": True}, "`smaller` needs `arm`"),
        ({"arm": ["three"], "over": ["start"]}, "it has no 'three'; it has start, one, two"),
        ({"arm": ["one"], "over": ["start"], "metric": "EM"}, "one has no 'EM'"),
        ({"seed": 3}, "unknown seed"),
    ):
        with pytest.raises(UserError, match=message):
            claims.row_of(ENTRY | changes)


def test_store_keeps_what_compare_computes(house, tmp_path):
    """The ranks of a ranking: 1 and 2 for the first question, none for the second, which finds nothing."""
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n1\tIt is red.\tA\n2\tIt is blue.\tB\n")
    question = {"question": "?", "answers": ["red"], "positives": ["2"]}
    write_lines(tmp_path / "q.jsonl", [question | {"qid": qid} for qid in "ab"])
    (tmp_path / "x.run").write_text("a\t1\t1\t9\na\t2\t2\t8\n")
    out = house / "results" / "toy" / "ranks.json"
    claims.store(tmp_path / "corpus.tsv", tmp_path / "q.jsonl", out, [f"x={tmp_path / 'x.run'}"])
    stored = json.loads(out.read_text())
    assert stored == RANKS | {"x": {"depth": 2, "answer": [1, 0], "right": [2, 0]}}


def test_the_pages_are_those_of_the_evidence(house):
    """docs/claims.md and results/claims.json of this repository are what its own files give."""
    for folder in (ROOT / "results").iterdir():
        if folder.is_dir() and folder.name != "toy":
            (house / "results" / folder.name).symlink_to(folder)
    entries = (ROOT / "results" / "claims.yaml").read_text()
    (house / "results" / "claims.yaml").write_text(entries)
    claims.main()
    for page in ("docs/claims.md", "results/claims.json"):
        assert (house / page).read_text() == (ROOT / page).read_text(), page
    systems = {entry["system"] for entry in yaml.safe_load(entries)}
    assert {"DPR", "GC-DPR", "RocketQA", "ANCE-Tele", "EMDR2"} <= systems


def test_the_share_of_belief_on_passages_with_an_answer():
    """By hand: two tokens, 0.9 each with the right passage and 0.1 with the other; an even prior."""
    log_KT = torch.tensor([[0.1, 0.1], [0.9, 0.9]]).log()
    found = shares(torch.tensor([0.5, 0.5]).log(), log_KT, [False, True])
    wanted = {"prior": 0.5, "token": 0.9, "sequence": 0.81 / 0.82, "kl": 0.9}
    assert found == pytest.approx(wanted | {"likeliest": 1.0, "by_chance": 0.5})


def test_the_beliefs_of_a_batch_by_hand(tmp_path, monkeypatch):
    """
    Three passages: prior and posterior before and after, of the passages that the first ranking found; not of
    a question of which all passages hold an answer, nor of one that lost a passage.
    """
    texts = "a\ta red car\tt\nb\ta blue car\tt\nc\ta green car\tt\n"
    (tmp_path / "corpus.tsv").write_text(f"id\ttext\ttitle\n{texts}")
    answers = {"one": "blue", "all": "car", "lost": "red"}
    questions = []
    for qid, text in answers.items():
        questions.append({"qid": qid, "question": "which ?", "answers": [text], "positives": []})
    write_lines(tmp_path / "test.jsonl", questions)
    before = [("a", 2.0), ("b", 1.0), ("c", 1.0)]
    after = [("b", 3.0), ("a", 1.0), ("c", 0.0)]
    write_run(tmp_path / "before.run", [(qid, before) for qid in answers])
    write_run(tmp_path / "after.run", [("one", after), ("all", after), ("lost", after[:2])])
    monkeypatch.setattr(reader_signal.fid, "load_fid", lambda path, lengths: torch.nn.Linear(1, int(path)))

    def read(reader, question, passages):  # a reader of two tokens that prefers the answer's passage
        likelihoods = [0.1 * reader.out_features if "blue" in passage.text else 0.1 for passage in passages]
        return torch.tensor([[p, p] for p in likelihoods]).log()

    monkeypatch.setattr(reader_signal, "read", read)
    files = (tmp_path / name for name in ("corpus.tsv", "test.jsonl", "before.run"))
    reader_signal.batch(*files, "3", tmp_path / "after.run", "9", tmp_path / "o.json")
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert (row["qid"], row["passages"]) == ("one", ["a", "b", "c"])
    for name, scores, factor in (("before", [2, 1, 1], 3), ("after", [1, 3, 0], 9)):
        prior = torch.tensor(scores, dtype=torch.float).softmax(0)
        posterior = prior * torch.tensor([1.0, factor, 1.0])
        assert row[name]["prior"] == pytest.approx(prior.tolist(), abs=1e-4)
        assert row[name]["posterior"] == pytest.approx((posterior / posterior.sum()).tolist(), abs=1e-4)
