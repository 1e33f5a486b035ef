"""
Metrics of rankings and of answers, and how far to trust them. Every metric is a fraction, 0 to 1. No torch.

hits: of each question a list of bool, whether its first, second ... passage is right. ranks: of each question
the rank of its first right passage, from 1, or 0 where there is none.

Q questions · N passages
"""

import numpy as np
from tqdm import tqdm

from utils.data import aligned_reader, is_itself, iter_rankings
from utils.plumbing.checks import note_on_own_ids
from utils.text import exact_match, f1, has_answer, report_regex_failures

# DPR counts 20 and 100; MS MARCO's R@50 and R@1000 are hit@50 and hit@1000
KS = (1, 5, 10, 20, 50, 100, 1000)


# ---------------------------------------------------------------- of a list of questions
def mean(values):
    assert len(values), "no questions: a mean over nothing has no value"
    return float(np.mean(values))


def topk_accuracy(hits, ks):
    """
    Return {k: share of questions with a hit among their first k}; the RocketQA papers call it Recall@k.
    topk_accuracy([[False, True], [False]], [1, 2]) is {1: 0.0, 2: 0.5}.
    """
    # differs: DPR's table is as long as the first question's list, so hits of longer lists fall off
    accuracy = {}
    for k in ks:
        accuracy[k] = mean([any(passages[:k]) for passages in hits])
    return accuracy


def mrr(ranks, cutoff):
    """Return the mean reciprocal rank. A rank beyond the cutoff counts 0: mrr([1, 4, 11], 10) is 1.25 / 3."""
    reciprocal = [1 / rank if 0 < rank <= cutoff else 0.0 for rank in ranks]
    return mean(reciprocal)


def hit_at(ranks, k):
    """Return the share of questions whose rank is in 1..k; RocketQA's script for MS MARCO says recall@k."""
    return mean([0 < rank <= k for rank in ranks])


def ndcg(gains, all_gains, cutoff):
    """
    Return the normalised discounted cumulative gain (Järvelin and Kekäläinen 2002; trec_eval's and BEIR's).

    gains: of each question the grade of its first, second ... passage, 0 where that is not relevant.
    all_gains: of each question the grades of all its relevant passages, in any order; none of them gives 0.
    """
    values = []
    for ranked, relevant in zip(gains, all_gains, strict=True):
        ideal = discounted(sorted(relevant, reverse=True)[:cutoff])
        values.append(discounted(ranked[:cutoff]) / ideal if ideal else 0.0)
    return mean(values)


def discounted(gains):
    return sum(gain / np.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def positive_ranks(scores_QN, gold_Q):
    """
    Return the rank of each question's positive (column gold_Q) among N passages, from 1: int array [Q].
    A passage with the same score counts as above it, and so does a NaN: a collapsed encoder is last.
    """
    gold_Q = np.asarray(gold_Q)
    gold_Q1 = np.take_along_axis(scores_QN, gold_Q[:, None], axis=1)
    below_QN = scores_QN < gold_Q1  # False for a NaN
    return (~below_QN).sum(axis=1)


# ---------------------------------------------------------------- how far to trust a mean
def bootstrap_interval(values_per_question, samples=1000, seed=0):
    """
    Return (low, high): the 95 % percentile bootstrap interval of the mean (Efron 1979).
    It says what another draw of questions would change, not another seed of the training.
    """
    values = np.asarray(values_per_question, dtype=np.float64)
    values, counts = np.unique(values, return_counts=True)
    n = int(counts.sum())
    assert n, "no questions: nothing to resample"

    # draw n questions with replacement; of equal values it is enough to draw how many occur
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, counts / n, size=samples)
    means = drawn @ values / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def with_intervals(values):
    """Return {name: {"value", "low", "high", "n"}} of {name: [a number a question]}."""
    metrics = {}
    for name, numbers in values.items():
        value = mean(numbers)
        low, high = bootstrap_interval(numbers)
        metrics[name] = {"value": value, "low": low, "high": high, "n": len(numbers)}
    return metrics


def print_table(metrics, name):
    """Print one line a metric, in percent."""
    print(f"{name:24} {'%':>6}   95 % interval      n")
    for metric, m in metrics.items():
        value, low, high = (100 * m[key] for key in ("value", "low", "high"))
        print(f"{metric:24} {value:6.1f}   {low:5.1f} - {high:5.1f}  {m['n']:7,}")


# ---------------------------------------------------------------- of a ranking
def gold_ids(question):
    """Return {passage id: grade} of the positives of a question; without grades each has 1."""
    # an inline passage has no id
    positives = question["positives"]
    grades = question.get("grades") or [1] * len(positives)
    return {pid: grade for pid, grade in zip(positives, grades, strict=True) if isinstance(pid, str)}


def one_question_at_a_time(questions, rankings):
    """
    Yield (question, ids of its passages, best first), with the rankings of two questions in memory.
    rankings: an iterator of (qid, [(pid, score), ...]) in the order of the questions; it may skip some.
    """
    take, check_end = aligned_reader("the ranking", rankings, "the questions")
    for question in tqdm(questions, "metrics", delay=2, leave=False, disable=None):
        hits = take(question["qid"]) or []
        yield question, [pid for pid, _ in hits]
    check_end()


def first_rank(hits):
    """Return the rank of the first passage that is a hit, from 1; 0 where none is."""
    return next((rank for rank, hit in enumerate(hits, 1) if hit), 0)


def ranks_of_question(question, pids, corpus, regex=False):
    """
    Return {"answer": the rank of the first passage with an answer, "right": of the first positive}; each only
    where the question has answers or gold ids.
    """
    ranks = {}
    if question["answers"]:
        # as in DPR, the answer must be in the text of a passage; titles are not searched
        texts = (corpus.passage(pid).text for pid in pids)
        ranks["answer"] = first_rank(has_answer(text, question["answers"], regex) for text in texts)
    gold = gold_ids(question)
    if gold:
        ranks["right"] = first_rank(pid in gold for pid in pids)
    return ranks


def metrics_of_question(question, pids, corpus, ks, regex):
    """Return {metric: value} of one question: top-k if it has answers, the others if it has gold ids."""
    values = {}
    ranks = ranks_of_question(question, pids, corpus, regex)
    if "answer" in ranks:
        values |= {f"top-{k}": hit_at([ranks["answer"]], k) for k in ks}
    if "right" in ranks:
        if max(ks) >= 10:
            values["MRR@10"] = mrr([ranks["right"]], 10)
            gold = gold_ids(question)
            gains = [gold.get(pid, 0) for pid in pids]
            values["nDCG@10"] = ndcg([gains], [list(gold.values())], 10)
        values |= {f"hit@{k}": hit_at([ranks["right"]], k) for k in ks}
    return values


def retrieval_metrics(ranked, corpus, ks, regex=False):
    """
    Return {name: {"value", "low", "high", "n"}}: top-k, MRR@10, nDCG@10 and hit@k of a ranking.
    ranked: of one_question_at_a_time. ks: at most its depth. n: how many questions a metric can judge.
    """
    values = {}
    questions = 0
    themselves = 0
    for question, pids in ranked:
        for name, value in metrics_of_question(question, pids, corpus, ks, regex).items():
            values.setdefault(name, []).append(value)
        questions += 1
        themselves += bool(pids) and is_itself(question, pids[0])
    if share := note_on_own_ids(themselves, questions):
        print(f"warning: {share}; where that is the question itself, search with --ignore_identical_ids true")
    return with_intervals(values)


def measure(run, questions, corpus, depth, match):
    """Return retrieval_metrics of the first `depth` passages of a .run, in the order of the questions."""
    rankings = iter_rankings(run, {question["qid"] for question in questions}, depth)
    ranked = one_question_at_a_time(questions, rankings)
    return retrieval_metrics(ranked, corpus, [k for k in KS if k <= depth], match == "regex")


def report(tables, path):
    """Print {name: metrics of measure()}. path: of the question file."""
    report_regex_failures()
    for name, metrics in tables.items():
        if metrics:
            print_table(metrics, name)
    if not any(tables.values()):
        print(f"{path} has neither answers nor passage ids as positives: only the ranking is written")


# ---------------------------------------------------------------- of answers
def answer_scores(examples, answers, top_docs):
    """
    Return {"EM@n", "F1@n": [one value a question]} over the questions that have answers.
    answers: of each question one dict with "text" for every n of top_docs, or None, which scores 0.
    """
    values = {}
    for example, predictions in zip(examples, answers, strict=True):
        gold = example["answers"]
        if not gold:
            continue
        for n, prediction in zip(top_docs, predictions, strict=True):
            em = exact_match(prediction["text"], gold) if prediction else False
            overlap = f1(prediction["text"], gold) if prediction else 0.0
            values.setdefault(f"EM@{n}", []).append(float(em))
            values.setdefault(f"F1@{n}", []).append(float(overlap))
    return values
