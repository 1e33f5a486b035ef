"""
Retrieval metrics over questions, and how far to trust them. All are fractions, 0 to 1. No torch.

A question is one list entry: `hits[q]` tells of each retrieved passage, best first, whether it is right;
`ranks[q]` is the rank of the first right one, from 1, or 0 when there is none. A question without results
counts as a miss, so the denominator is always the number of questions.
"""

import numpy as np


def _mean(values):
    assert len(values), "no questions: a mean over nothing has no value"
    return float(np.mean(values))


def topk_accuracy(hits, ks):
    """
    {k: share of questions with a hit among their first k}. hits: a list of bool per question, of any length.

    topk_accuracy([[False, True], [False]], [1, 2]) is {1: 0.0, 2: 0.5}. Also Recall@k of the RocketQA papers.
    """
    # differs: DPR's table is as long as the first question's list, so hits of longer lists fall off
    return {k: _mean([any(one[:k]) for one in hits]) for k in ks}


def mrr(ranks, cutoff):
    """Mean reciprocal rank; a rank beyond the cutoff counts 0. mrr([1, 4, 0, 11], 10) is (1 + 1/4) / 4."""
    return _mean([1 / rank if 0 < rank <= cutoff else 0.0 for rank in ranks])


def hit_at(ranks, k):
    """Share of questions whose rank is in 1..k: what MS MARCO's script calls recall@k."""
    return _mean([0 < rank <= k for rank in ranks])


def ndcg(relevances, n_relevant, cutoff):
    """
    Normalised discounted cumulative gain, gains 0 and 1 (Järvelin and Kekäläinen 2002; trec_eval's).

    relevances: a list of bool per question, best first. n_relevant: per question, how many passages are
    relevant in all, found or not; 0 gives 0.
    """
    values = []
    for one, n in zip(relevances, n_relevant, strict=True):
        gain = sum(1 / np.log2(i + 2) for i, relevant in enumerate(one[:cutoff]) if relevant)
        ideal = sum(1 / np.log2(i + 2) for i in range(min(n, cutoff)))
        values.append(gain / ideal if n else 0.0)
    return _mean(values)


def positive_ranks(scores_QN, gold_Q):
    """
    Rank of each question's positive among N passages, from 1: int array [Q]. DPR averages it to validate.

    gold_Q: the column of the positive. Pessimistic: a passage with the positive's score counts as above it,
    and so does a NaN; an encoder that maps everything to one point is last, not first.
    """
    scores_QN, gold_Q = np.asarray(scores_QN), np.asarray(gold_Q)
    gold_Q1 = np.take_along_axis(scores_QN, gold_Q[:, None], axis=1)
    return (~(scores_QN < gold_Q1)).sum(
        axis=1
    )  # why "not below": it counts the positive itself, ties and NaN


def bootstrap_interval(values_per_question, samples=1000, seed=0):
    """
    (low, high): 95 % percentile bootstrap interval of the mean, by resampling questions (Efron 1979).

    It says what another draw of questions would change, not another seed of the training.
    """
    values, counts = np.unique(np.asarray(values_per_question, dtype=np.float64), return_counts=True)
    n = int(counts.sum())
    assert n, "no questions: nothing to resample"
    # why: questions with equal values are alike, so drawing how often each value occurs is drawing questions,
    # without a matrix of samples x questions
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=samples)
    low, high = np.percentile(drawn @ values / n, [2.5, 97.5])
    return float(low), float(high)


def with_intervals(values):
    """{name: [a number a question]} -> {name: {"value", "low", "high", "n"}}: mean and bootstrap interval."""
    metrics = {}
    for name, per_question in values.items():
        low, high = bootstrap_interval(per_question)
        value, n = float(np.mean(per_question)), len(per_question)
        metrics[name] = {"value": value, "low": low, "high": high, "n": n}
    return metrics


def print_table(metrics, name):
    """One line a metric, in percent."""
    print(f"{name:24} {'%':>6}   95 % interval      n")
    for metric, m in metrics.items():
        value, low, high = (100 * m[key] for key in ("value", "low", "high"))
        print(f"{metric:24} {value:6.1f}   {low:5.1f} - {high:5.1f}  {m['n']:7,}")
