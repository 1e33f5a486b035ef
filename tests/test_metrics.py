"""Metrics: the numbers of DPR's, RocketQA's and nanoDPR's own scripts, hand-made cases, a plain bootstrap."""

import json
from pathlib import Path

import numpy as np
import pytest

from utils.metrics import bootstrap_interval, hit_at, mrr, ndcg, positive_ranks, topk_accuracy
from utils.text import has_answer

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def test_topk_accuracy_golden():
    """DPR's table, as far as it goes: to the length of the first question's list."""
    for case in golden("topk_accuracy"):
        ks = list(range(1, case["n_docs"] + 1))
        ours = topk_accuracy([[bool(hit) for hit in one] for one in case["hits"]], ks)
        assert list(ours) == ks
        assert list(ours.values()) == pytest.approx(case["accuracies"], abs=1e-9)


def test_topk_accuracy_counts_short_and_empty_lists():
    """A question with few or no results stays in the denominator, and long lists are read to the end."""
    hits = [[False], [], [False, False, True], [True]]
    assert topk_accuracy(hits, [1, 3, 100]) == {1: 0.25, 3: 0.5, 100: 0.5}


def first_ranks(qrels, run):
    """Per question of the qrels, the rank of its first relevant passage, or 0. Of equal ranks the last."""
    relevant, ranked = {}, {}
    for qid, pid, *_ in qrels:
        relevant.setdefault(qid, set()).add(pid)
    for qid, pid, rank, *_ in run:
        ranked.setdefault(qid, {})[rank] = pid
    found = {q: [r for r, pid in ranked.get(q, {}).items() if pid in pids] for q, pids in relevant.items()}
    return [min(ranks, default=0) for ranks in found.values()]


def test_msmarco_golden():
    """RocketQA's MS MARCO script: a query without results counts 0, and its recall@k is a hit rate."""
    cases = [case for case in golden("msmarco_eval") if not case.get("reference_quirk")]
    assert len(cases) > 10
    for case in cases:
        ranks, expected = first_ranks(case["qrels"], case["run"]), case["expected"]
        assert mrr(ranks, 10) == pytest.approx(expected["MRR@10"], abs=1e-9)
        for name, k in (("recall@1", 1), ("recall@50", 50), ("recall@all", 1000)):
            assert hit_at(ranks, k) == pytest.approx(expected[name], abs=1e-9), case.get("note")


def test_nq_eval_golden():
    """RocketQA's NQ script, from texts to R@k, with DPR's answers: titles are not searched."""
    for case in golden("nq_eval"):
        hits = {}
        for qid, pid, *_ in case["run"]:
            text = case["passages"][pid][1]
            hits.setdefault(qid, []).append(has_answer(text, case["answers"][qid]))
        expected = case.get("expected_with_dpr_answers", case["expected"])
        ours = topk_accuracy(list(hits.values()), [5, 10, 20, 50, 100])
        assert list(ours.values()) == pytest.approx([expected[f"R@{k}"] for k in ours], abs=1e-9)


def test_positive_ranks_golden():
    """nanoDPR's ranks; where scores tie, its rank depends on the sort, and ours is the worst possible."""
    for case in golden("avg_rank"):
        ranks = positive_ranks(np.array(case["scores"]), np.array(case["labels"]))
        assert ranks.tolist() == case.get("rank_max", case["ranks_1based"])
        if "ties" not in case:
            assert ranks.mean() == pytest.approx(case["average_rank_1based"], abs=1e-8)


def test_positive_ranks_are_pessimistic():
    """A collapsed encoder (all scores equal) and a broken one (NaN) rank last, where a sort may say first."""
    assert positive_ranks(np.zeros((2, 5), np.float32), [0, 4]).tolist() == [5, 5]
    assert positive_ranks(np.array([[np.nan, 1, 2], [np.nan, 1, 0]]), [0, 1]).tolist() == [3, 2]


def test_mrr_and_hit_by_hand():
    """Rank 0 is a miss; the cutoff itself still counts."""
    assert mrr([1, 4, 0, 11], 10) == pytest.approx((1 + 1 / 4) / 4)
    assert mrr([10], 10) == pytest.approx(0.1)
    assert hit_at([1, 4, 0, 11], 4) == 0.5


def test_ndcg_by_hand():
    """DCG over the best DCG that the relevant passages allow, those not retrieved included."""
    assert ndcg([[True, True, False]], [2], 10) == 1.0
    assert ndcg([[False, True]], [1], 10) == pytest.approx(1 / np.log2(3))
    assert ndcg([[True, False, True]], [3], 2) == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert ndcg([[], [False], [True]], [1, 0, 1], 10) == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["hits", "reciprocal ranks", "all different"])
def test_bootstrap_is_the_plain_bootstrap(kind):
    """The same interval as drawing questions one by one with replacement, up to the noise of the draws."""
    rng = np.random.default_rng(1)
    n = 200
    values = {
        "hits": rng.random(n) < 0.3,
        "reciprocal ranks": 1 / rng.integers(1, 12, n),
        "all different": rng.random(n) ** 2,
    }[kind]
    means = [rng.choice(values, n).mean() for _ in range(4000)]
    width = np.subtract(*np.percentile(means, [97.5, 2.5]))
    ours = bootstrap_interval(values, samples=4000)
    assert ours == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.1 * width)


def test_bootstrap_by_hand():
    """Nothing varies: no width. The order of the questions and the day do not change the interval."""
    assert bootstrap_interval([0.25] * 7) == pytest.approx((0.25, 0.25))
    assert bootstrap_interval([1.0]) == (1.0, 1.0)
    values = [0, 0, 1, 0.5, 0, 1]
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=0)
    low, high = bootstrap_interval([0, 1] * 200)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)  # 0.5 +- 1.96 * sqrt(0.25 / 400)


def test_no_questions_is_not_a_score():
    """A mean over nothing is a mistake of the caller, not 0 and not NaN."""
    for empty in (lambda: mrr([], 10), lambda: topk_accuracy([], [1]), lambda: bootstrap_interval([])):
        with pytest.raises(AssertionError, match="no questions"):
            empty()
