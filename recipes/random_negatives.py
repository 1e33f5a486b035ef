"""
Draw negatives at random from the corpus: step 1 of RocketQA on MS MARCO (Qu et al. 2021).

In:  a corpus, a question file with positives
Out: a training file, one line for each (question, positive, negative), as RocketQA counts its epochs
Run: python recipes/random_negatives.py data/msmarco/corpus.tsv marco data/msmarco/train.jsonl runs/d0.jsonl
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data import Corpus, read_questions  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors, refuse_input  # noqa: E402
from utils.plumbing.files import atomic_file  # noqa: E402

# from: RocketQA's README says four per question. Its later files have four per positive (2,131,044 lines, not
# 2,011,756), and so has this one. Its own draw was not released.
NEGATIVES = 4


def main(corpus_path, corpus_format, questions, out):
    refuse_input(out, corpus_path, questions)
    corpus = Corpus(corpus_path, corpus_format)
    rng = random.Random(111)
    lines = without = 0
    with atomic_file(out) as file:
        for question in read_questions(questions, need=("positives",)):
            positives = question["positives"]
            without += not positives
            if len(positives) + NEGATIVES > len(corpus):
                raise UserError(f"{corpus_path}: {len(corpus)} passages, too few to draw negatives from")
            for first in positives:
                drawn = []
                while len(drawn) < NEGATIVES:
                    pid = corpus[rng.randrange(len(corpus))].id
                    if pid not in positives and pid not in drawn:
                        drawn.append(pid)
                others = [p for p in positives if p != first]  # so that the trainer masks them
                for pid in drawn:
                    example = question | {"positives": [first, *others], "negatives": [pid]}
                    file.write(json.dumps(example, ensure_ascii=False) + "\n")
                    lines += 1
    print(f"{out}: {lines:,} lines; {without:,} questions without a positive left out")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 5:
            raise UserError("usage: python recipes/random_negatives.py CORPUS FORMAT QUESTIONS OUT")
        main(*sys.argv[1:])
