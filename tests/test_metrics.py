"""Metrics: the numbers of DPR's, RocketQA's and nanoDPR's own scripts, hand-made cases, a plain bootstrap."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.toy import COLOURS, golden_file
from utils import metrics
from utils.data import Corpus, read_questions
from utils.metrics import bootstrap_interval, hit_at, mrr, ndcg, positive_ranks, topk_accuracy
from utils.plumbing.config import ROOT, UserError
from utils.text import has_answer

IR_MEASURES = 0.17063822328416517  # ir_measures 0.4.3, nDCG@10


def value(table):
    return {name: metric["value"] for name, metric in table.items()}


# ---------------------------------------------------------------- the originals' numbers
def test_topk_accuracy_golden():
    """DPR's table, as far as it goes: to the length of the first question's list. Ours reads on."""
    for case in golden_file("topk_accuracy")["cases"]:
        ours = topk_accuracy(case["hits"], range(1, case["n_docs"] + 1))
        assert list(ours.values()) == pytest.approx(case["accuracies"], abs=1e-9)
    hits = [[False], [], [False, False, True], [True]]
    assert topk_accuracy(hits, [1, 3, 100]) == {1: 0.25, 3: 0.5, 100: 0.5}


def test_msmarco_golden():
    """RocketQA's MS MARCO script: a question without results counts 0, and its recall@k is a hit rate."""
    cases = [case for case in golden_file("msmarco_eval")["cases"] if not case.get("reference_quirk")]
    assert len(cases) > 10
    for case in cases:
        relevant, ranks, expected = {}, {}, case["expected"]
        for qid, pid, *_ in case["qrels"]:
            relevant.setdefault(qid, set()).add(pid)
        ranked = {(qid, rank): pid for qid, pid, rank, *_ in case["run"]}  # of equal ranks the last
        for (qid, rank), pid in sorted(ranked.items()):
            if pid in relevant.get(qid, ()):
                ranks.setdefault(qid, rank)
        ranks = [ranks.get(qid, 0) for qid in relevant]
        assert mrr(ranks, 10) == pytest.approx(expected["MRR@10"], abs=1e-9)
        for name, k in (("recall@1", 1), ("recall@50", 50), ("recall@all", 1000)):
            assert hit_at(ranks, k) == pytest.approx(expected[name], abs=1e-9), case.get("note")


def test_nq_eval_golden():
    """RocketQA's NQ script, from texts to R@k, with DPR's answers: titles are not searched."""
    for case in golden_file("nq_eval")["cases"]:
        hits = {}
        for qid, pid, *_ in case["run"]:
            text = case["passages"][pid][1]
            hits.setdefault(qid, []).append(has_answer(text, case["answers"][qid]))
        expected = case.get("expected_with_dpr_answers", case["expected"])
        ours = topk_accuracy(list(hits.values()), [5, 10, 20, 50, 100])
        assert list(ours.values()) == pytest.approx([expected[f"R@{k}"] for k in ours], abs=1e-9)


def test_positive_ranks_golden_and_pessimistic():
    """nanoDPR's ranks; where scores tie, its rank depends on the sort, and ours is the worst possible."""
    for case in golden_file("avg_rank")["cases"]:
        ranks = positive_ranks(np.array(case["scores"]), np.array(case["labels"]))
        assert ranks.tolist() == case.get("rank_max", case["ranks_1based"])
        if "ties" not in case:
            assert ranks.mean() == pytest.approx(case["average_rank_1based"], abs=1e-8)
    # a collapsed encoder (all scores equal) and a broken one (NaN) rank last, where a sort may say first
    assert positive_ranks(np.zeros((2, 5), np.float32), [0, 4]).tolist() == [5, 5]
    assert positive_ranks(np.array([[np.nan, 1, 2], [np.nan, 1, 0]]), [0, 1]).tolist() == [3, 2]


# ---------------------------------------------------------------- by hand
def test_ndcg_by_hand():
    """DCG over the best DCG that the relevant passages allow, those not retrieved included."""
    assert ndcg([[1, 1, 0]], [[1, 1]], 10) == 1.0
    assert ndcg([[0, 1]], [[1]], 10) == pytest.approx(1 / np.log2(3))
    assert ndcg([[1, 0, 1]], [[1, 1, 1]], 2) == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert ndcg([[], [0], [1]], [[1], [], [1]], 10) == pytest.approx(1 / 3)
    # grades: the better passage second costs, whatever the order in which the positives are listed
    wanted = (1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3))
    assert ndcg([[1, 3]], [[1, 3]], 10) == ndcg([[1, 3]], [[3, 1]], 10) == pytest.approx(wanted)


def test_graded_ndcg_is_that_of_ir_measures(corpus):
    """IR_MEASURES was computed of these rankings and grades by ir_measures (pytrec_eval)."""
    rng = np.random.default_rng(3)
    ranked = []
    for _ in range(40):
        pids = [str(pid) for pid in rng.permutation(np.arange(1, 41))]
        grades = rng.integers(1, 4, 6).tolist()
        question = {"qid": "q", "answers": [], "positives": pids[::7], "grades": grades}
        ranked.append((question, [str(pid) for pid in rng.permutation(np.arange(1, 41))[:20]]))
    table = metrics.retrieval_metrics(ranked, corpus, [20])
    assert table["nDCG@10"]["value"] == pytest.approx(IR_MEASURES, abs=1e-7)
    for question, _ in ranked:
        del question["grades"]
    table = metrics.retrieval_metrics(ranked, corpus, [20])
    assert table["nDCG@10"]["value"] != pytest.approx(IR_MEASURES)


@pytest.mark.parametrize("kind", ["hits", "reciprocal ranks", "all different"])
def test_bootstrap_is_the_plain_bootstrap(kind):
    """The same interval as drawing questions one by one with replacement, up to the noise of the draws."""
    rng, n = np.random.default_rng(1), 200
    ranks = 1 / rng.integers(1, 12, n)
    values = {"hits": ranks < 0.3, "reciprocal ranks": ranks, "all different": rng.random(n) ** 2}[kind]
    means = [rng.choice(values, n).mean() for _ in range(4000)]
    width = np.subtract(*np.percentile(means, [97.5, 2.5]))
    ours = bootstrap_interval(values, samples=4000)
    assert ours == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.04 * width)


def test_bootstrap_by_hand():
    """Nothing varies: no width. The order of the questions does not change the interval, the seed does."""
    assert bootstrap_interval([0.25] * 7) == pytest.approx((0.25, 0.25))
    values = [0, 0, 1, 0.5, 0, 1]
    interval = bootstrap_interval(values)
    assert bootstrap_interval(values[::-1]) == interval != bootstrap_interval(values, seed=1)
    # of 20 drawn from 19 zeros and a one, none is the one in 36 % of the draws, and 4 or more are in 1.6 %
    assert bootstrap_interval([0] * 19 + [1]) == (0, 0.15)
    # 0.5 +- 1.96 * sqrt(0.25 / 400)
    assert bootstrap_interval([0, 1] * 200) == pytest.approx((0.451, 0.549), abs=0.004)


def test_no_questions_is_not_a_score():
    """A mean over nothing is a mistake of ours, not 0 and not NaN."""
    for empty in (lambda: mrr([], 10), lambda: topk_accuracy([], [1]), lambda: bootstrap_interval([])):
        with pytest.raises(AssertionError, match="no questions"):
            empty()


# ---------------------------------------------------------------- of a ranking, of answers
@pytest.fixture
def corpus(tmp_path):
    """Sixty passages with the title paris: the things 1, 6, 11 ... are red, 2, 7 ... blue and so on."""
    rows = "".join(f"{pid}\tthe thing is {COLOURS[(pid - 1) % 5]}\tparis\n" for pid in range(1, 61))
    (tmp_path / "corpus.tsv").write_text(rows)
    return Corpus(tmp_path / "corpus.tsv")


def test_metrics_of_a_hand_made_ranking(corpus):
    """A question without passages is a miss, a short list counts what it has, titles are not searched."""
    ranked = [
        ({"answers": ["Green"], "positives": ["3", "4"]}, ["1", "3"]),  # the answer and a positive at rank 2
        ({"answers": ["red"], "positives": []}, ["1"]),  # the answer at rank 1, nothing to judge by id
        ({"answers": ["red"], "positives": ["1"]}, []),
        ({"answers": [], "positives": [{"title": "", "text": "inline"}]}, ["1"]),  # in no metric
    ]
    ranked = [(question | {"qid": "q"}, pids) for question, pids in ranked]
    table = metrics.retrieval_metrics(ranked, corpus, metrics.KS)
    depths = (1, 5, 10, 20, 50, 100, 1000)  # hit@50 and hit@1000 are MS MARCO's recall
    counts = {f"top-{k}": 3 for k in depths} | {f"hit@{k}": 2 for k in depths} | {"MRR@10": 2, "nDCG@10": 2}
    assert {name: metric["n"] for name, metric in table.items()} == counts
    wanted = {f"top-{k}": 2 / 3 for k in depths} | {f"hit@{k}": 1 / 2 for k in depths}
    wanted |= {"top-1": 1 / 3, "hit@1": 0, "MRR@10": 1 / 4}
    wanted["nDCG@10"] = 1 / np.log2(3) / (1 + 1 / np.log2(3)) / 2
    assert value(table) == pytest.approx(wanted)
    for answer, regex, wanted in (("paris", False, 0), (r"gr\w+n\b", False, 0), (r"gr\w+n\b", True, 1)):
        ranked = [({"qid": "q", "answers": [answer], "positives": []}, ["1", "3"])]
        table = metrics.retrieval_metrics(ranked, corpus, [1, 5], regex)
        assert value(table) == {"top-1": 0, "top-5": wanted}


@pytest.mark.parametrize("grades", [[1], [1, 0], [2, -1], [1, "2"], [1, True], [1, float("inf")], 3])
def test_grades_are_one_number_above_0_a_positive(tmp_path, grades):
    question = {"qid": "q", "question": "?", "positives": ["1", "2"], "grades": grades}
    (tmp_path / "q.jsonl").write_text(json.dumps(question).replace("Infinity", "1e999") + "\n")
    with pytest.raises(UserError, match="q.jsonl:1: 'grades' must"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text(json.dumps(question | {"grades": [2, 0.5]}) + "\n")
    assert metrics.gold_ids(read_questions(tmp_path / "q.jsonl")[0]) == {"1": 2, "2": 0.5}


def test_questions_that_find_themselves(corpus, capsys):
    """In ArguAna a question is a passage: a warning, unless the passage is listed as its positive."""
    for positives, warned in (["2"], True), (["1"], False):
        ranked = [({"qid": "1", "answers": [], "positives": positives}, ["1", "2"])]
        metrics.retrieval_metrics(ranked, corpus, [1])
        assert ("1 of 1 questions find a passage of their own id first" in capsys.readouterr().out) == warned


def test_two_rankings_in_memory():
    """Each question with its passages or none; no more than the next ranking is read ahead."""
    read = []

    def rankings():
        for qid, hits in (("a", [("7", 2.0), ("8", 1.0)]), ("c", [("9", 3.0)]), ("d", [])):
            read.append(qid)
            yield qid, hits

    ranked = metrics.one_question_at_a_time([{"qid": qid} for qid in "abcd"], rankings())
    assert next(ranked) == ({"qid": "a"}, ["7", "8"]) and read == ["a", "c"]
    assert list(ranked) == [({"qid": "b"}, []), ({"qid": "c"}, ["9"]), ({"qid": "d"}, [])]
    with pytest.raises(UserError, match="the ranking: question 'c' is not in the questions"):
        list(metrics.one_question_at_a_time([{"qid": "a"}], rankings()))


def test_answer_scores_by_hand():
    """A value for each depth and question with answers; none is 0; one word of two is an F1 of 2/3."""
    examples = [{"answers": ["red river"]}, {"answers": []}, {"answers": ["blue"]}]
    answers = [[{"text": "Red River."}, {"text": "river"}], [None, None], [None, {"text": "green"}]]
    scores = metrics.answer_scores(examples, answers, [1, 5])
    assert scores == {"EM@1": [1, 0], "F1@1": [1, 0], "EM@5": [0, 0], "F1@5": [pytest.approx(2 / 3), 0]}


def test_no_torch():
    """Reading a ranking takes no second of importing torch."""
    code = "import sys, utils.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
