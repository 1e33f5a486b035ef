"""
Rankings of the same questions side by side, and what each gains over the first one, question by question; or
the answers of two readers, EM and F1.

Run: python recipes/compare.py data/nq/corpus.tsv data/nq/test.jsonl runs/x/d0/test.run runs/x/d1/test.run
     python recipes/compare.py data/nq/corpus.tsv data/nq/test.jsonl runs/fid.answers.json runs/x.answers.json

Both intervals are 95 % bootstrap over the questions. That of a gain is narrower than two separate ones
suggest, because most questions are right or wrong under both systems, and only those that change count
(paired test).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data import Corpus, read_questions, read_run  # noqa: E402
from utils.metrics import answer_scores, bootstrap_interval, gold_ids, mrr  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json  # noqa: E402
from utils.text import has_answer  # noqa: E402

KS = (1, 5, 20, 100)


def per_question(path, questions, corpus):
    """{metric: array [Q]} of one .run, or of {qid: answer}; a k beyond the depth of the run is left out."""
    if str(path).endswith(".answers.json"):
        found = read_json(path)
        if not any(q["qid"] in found for q in questions):
            raise UserError(
                f"{path}: these are answers to other questions; no qid of it is in the question file"
            )
        texts = [[{"text": text} if (text := found.get(q["qid"])) else None] for q in questions]
        values = answer_scores(questions, texts, [1])
        return {metric.partition("@")[0]: np.array(one) for metric, one in values.items()}
    found, values = read_run(path), {}
    depth = max(map(len, found.values()))
    for question in questions:
        pids, gold = [pid for pid, _ in found.get(question["qid"], [])], gold_ids(question)
        if question["answers"]:
            texts = (corpus[corpus.row(pid)].text for pid in pids)
            first = next((i for i, t in enumerate(texts, 1) if has_answer(t, question["answers"])), depth + 1)
            for k in KS:
                values.setdefault(f"top-{k}", []).append(first <= k) if k <= depth else None
        if gold:
            rank = next((i for i, pid in enumerate(pids, 1) if pid in gold), 0)
            values.setdefault("MRR@10", []).append(mrr([rank], 10))
    return {metric: np.array(one, dtype=float) for metric, one in values.items()}


def cell(values, signed=False):
    low, high = (100 * x for x in bootstrap_interval(values))
    return f"{100 * values.mean():{'+' if signed else ''}.1f} ({low:.1f} to {high:.1f})"


def main(corpus, questions, *runs):
    questions = read_questions(questions)
    corpus = (
        Corpus(corpus) if any(q["answers"] for q in questions) else None
    )  # the ids are enough for MS MARCO
    print(f"n = {len(questions)} questions; percent (95 % interval); second lines: the gain over {runs[0]}")
    baseline = {}
    for run in runs:
        values = per_question(run, questions, corpus)
        print(f"{run}\n    " + "   ".join(f"{metric} {cell(v)}" for metric, v in values.items()))
        if baseline:
            gains = {metric: v - baseline[metric] for metric, v in values.items() if metric in baseline}
            print("    " + "   ".join(f"{metric} {cell(v, True)}" for metric, v in gains.items()))
        baseline = baseline or values


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) < 4:
            raise UserError(
                "usage: python recipes/compare.py CORPUS QUESTIONS X [X ...], X a .run or .answers.json"
            )
        main(*sys.argv[1:])
