"""
Compare rankings of the same questions, or the answers of two readers: what each gains over the first one.

Run: python recipes/compare.py data/nq/corpus.tsv data/nq/test.jsonl runs/x/d0/test.run runs/x/d1/test.run
     python recipes/compare.py data/nq/corpus.tsv data/nq/test.jsonl runs/fid.answers.json runs/x.answers.json
     python recipes/compare.py --regex data/trec/corpus.tsv data/trec/test.jsonl any.run
     One .run alone gives its table.

All intervals are 95 % bootstrap over the questions. A gain is taken question by question (a paired test). Its
interval is narrower than the two separate ones suggest: most questions are right or wrong in both systems,
and only those that change count.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data import Corpus, read_questions, read_run  # noqa: E402
from utils.metrics import KS, answer_scores, bootstrap_interval, ranks_of_question  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json  # noqa: E402
from utils.text import report_regex_failures  # noqa: E402


def answers_per_question(path, questions):
    """Return {"EM", "F1": [Q]} of a file {qid: answer}; a question that is not in it scores 0."""
    answers = read_json(path)
    if not any(question["qid"] in answers for question in questions):
        raise UserError(f"{path}: these are answers to other questions; no qid of it is in the question file")
    texts = [answers.get(question["qid"]) for question in questions]
    values = answer_scores(questions, [[{"text": text} if text else None] for text in texts], [1])
    return {metric.partition("@")[0]: list(map(float, numbers)) for metric, numbers in values.items()}


def first_ranks(path, questions, corpus, regex=False):
    """
    Return what one .run or .answers.json says of every question, as lists of Q numbers:

    "answer": the rank of the first passage with an answer, for questions that have answers. "right": of the
    first of their positives. 0 where there is none. "depth": of the ranking. Of answers: "EM" and "F1".
    """
    if str(path).endswith(".answers.json"):
        return answers_per_question(path, questions)
    rankings = read_run(path)
    ranked = sum(question["qid"] in rankings for question in questions)
    if not ranked:
        raise UserError(f"{path}: is a ranking of other questions; no qid of it is in the question file")
    if ranked < len(questions):
        share = f"{ranked} of {len(questions)} questions"
        print(f"warning: {path}: ranks {share}, the others count as wrong", file=sys.stderr)
    found = {"depth": max(map(len, rankings.values())), "answer": [], "right": []}
    for question in questions:
        pids = [pid for pid, _ in rankings.get(question["qid"], [])]
        for kind, rank in ranks_of_question(question, pids, corpus, regex).items():
            found[kind].append(rank)
    return found


def metrics_of_ranks(found):
    """Return {metric: array [Q]} of first_ranks; a k beyond the ranking's depth is left out."""
    if "depth" not in found:
        return {metric: np.array(numbers, dtype=float) for metric, numbers in found.items()}
    metrics = {}
    depths = [k for k in KS if k <= found["depth"]]
    if found["answer"]:
        ranks = np.array(found["answer"])
        metrics |= {f"top-{k}": within(ranks, k) for k in depths}
    if found["right"]:
        ranks = np.array(found["right"])
        metrics["MRR@10"] = within(ranks, 10) / np.maximum(ranks, 1)
        metrics |= {f"hit@{k}": within(ranks, k) for k in depths}
    return metrics


def within(ranks, k):
    """Return 1.0 where a rank is in 1..k, else 0.0."""
    return ((0 < ranks) & (ranks <= k)).astype(float)


def per_question(path, questions, corpus, regex=False):
    """Return {metric: array [Q]} of one .run or .answers.json, a number a question."""
    return metrics_of_ranks(first_ranks(path, questions, corpus, regex))


def cell(values, signed=False):
    """Return `12.3 (10.1 to 14.5)`, in percent; with a sign where asked."""
    low, high = (100 * bound for bound in bootstrap_interval(values))
    mean = 100 * values.mean()
    return f"{mean:+.1f} ({low:.1f} to {high:.1f})" if signed else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def main(corpus, questions, *runs, regex=False, corpus_format="auto"):
    questions = read_questions(questions, match="regex" if regex else "string")
    # why not always: without answers, as on MS MARCO, the ids are enough
    corpus = Corpus(corpus, corpus_format) if any(question["answers"] for question in questions) else None
    print(f"n = {len(questions)} questions; percent (95 % interval); then the gain over {runs[0]}")
    baseline = {}
    for run in runs:
        values = per_question(run, questions, corpus, regex)
        print(run)
        for metric, numbers in values.items():
            gain = cell(numbers - baseline[metric], signed=True) if metric in baseline else ""
            print(f"    {metric:10} {cell(numbers):24} {gain}".rstrip())
        baseline = baseline or values
    report_regex_failures()


if __name__ == "__main__":
    with friendly_errors():
        parser = argparse.ArgumentParser(description=__doc__)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("corpus")
        parser.add_argument("questions")
        parser.add_argument("runs", nargs="+", help="of .run or .answers.json")
        parser.add_argument("--regex", action="store_true", help="the answers are regular expressions")
        parser.add_argument("--corpus_format", default="auto", help="as in every script")
        args = parser.parse_args()
        main(args.corpus, args.questions, *args.runs, regex=args.regex, corpus_format=args.corpus_format)
