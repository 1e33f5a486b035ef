"""
Choose the weight of the dense score beside BM25's, score = bm25 + weight * dense, on the dev questions.

The paper's 1.1 is for its own encoder and its own BM25: the two scores have no common unit. The weights tried
are 0 (BM25 alone) and fractions and multiples of the one at which both scores spread equally.

In:  a corpus, the dev questions, BM25's and the dense .run for them
Out: the best weight on the screen, alone in its line, by the MRR of the first right passage; the table goes
     to the error stream
Run: python recipes/hybrid_weight.py data/demo/corpus.tsv data/demo/dev.jsonl BM25.run DENSE.run
"""

import sys
from pathlib import Path
from statistics import mean, pstdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_dpr import hybrid  # noqa: E402
from utils.data import Corpus, read_questions, read_run  # noqa: E402
from utils.metrics import first_rank, gold_ids, mrr  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.text import has_answer  # noqa: E402

FRACTIONS = (0, 0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8)
DEPTH = 100


def spread(rankings):
    """Return the mean standard deviation of the scores within a ranking."""
    return mean([pstdev([score for _, score in hits]) for hits in rankings.values() if hits] or [0.0])


def right_passages(question, pids, corpus, regex):
    """Return the right ids: the positives of the question; where it has none, the passages with an answer."""
    gold = gold_ids(question)
    if gold:
        return gold.keys()
    return {pid for pid in pids if has_answer(corpus.passage(pid).text, question["answers"], regex)}


def main(corpus, questions, bm25, dense, match="string"):
    corpus = Corpus(corpus)
    questions = read_questions(questions, match=match)
    bm25, dense = read_run(bm25), read_run(dense)
    unit = spread(bm25) / (spread(dense) or 1.0)

    # the rank of the first right passage, for every weight and question
    ranks = {fraction * unit: [] for fraction in FRACTIONS}
    for question in questions:
        words, meaning = bm25.get(question["qid"], []), dense.get(question["qid"], [])
        right = right_passages(question, dict(words) | dict(meaning), corpus, match == "regex")
        for weight, found in ranks.items():
            hits = hybrid(meaning, words, weight, DEPTH)
            found.append(first_rank(pid in right for pid, _ in hits))

    # the best weight; of equals the smallest
    scores = {weight: mrr(found, DEPTH) for weight, found in ranks.items()}
    best = max(scores, key=scores.get)
    if not scores[best]:
        best = unit
        print("no question has a right passage in the two rankings: both scores count alike", file=sys.stderr)
    for weight, score in scores.items():
        mark = "  <- chosen" if weight == best else ""
        print(f"hybrid_weight {weight:8.3f}   MRR on dev {100 * score:5.1f}{mark}", file=sys.stderr)
    print(f"{best:.4g}")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) not in (5, 6):
            raise UserError(
                "usage: python recipes/hybrid_weight.py CORPUS DEV.jsonl BM25.run DENSE.run [regex]"
            )
        main(*sys.argv[1:])
