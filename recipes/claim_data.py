"""
Make the small corpus and the questions of recipes/claim_rocketqa.sh.

In:  a folder with {train,dev,test}.jsonl (answers, positives as passage ids), a corpus with these passages
Out: OUT/corpus.tsv and, of the sampled training questions, OUT/train.jsonl without answers and
     OUT/train_answers.jsonl with them; OUT/{dev,test}.jsonl
Run: python recipes/claim_data.py data/nq_small data/nq_small/corpus.tsv runs/x/data 2000 16000
     (QUESTIONS of train.jsonl, PASSAGES of the corpus)

The corpus takes the positives of all questions first, then the best of BM25 for the training questions, rank
by rank, then passages at random, until there are PASSAGES. why BM25's: they are close to a question, and many
answer it, although nobody said so.
"""

import csv
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.bm25 import build_bm25, search_bm25  # noqa: E402
from utils.data import Corpus, read_questions  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors, refuse_input  # noqa: E402
from utils.plumbing.files import atomic_file  # noqa: E402

SEED = 111
BEST = 10  # BM25's passages of a training question


def choose(gold, rankings, ids, count, rng):
    """
    Return `count` ids: all of `gold`, then the first passages of all rankings, then the second ones ..., then
    others of `ids` at random.
    """
    if len(gold) > count:
        raise UserError(f"{count} passages are asked for, but the questions have {len(gold)} positives")
    chosen = dict.fromkeys(gold)
    for rank in range(BEST):
        chosen |= dict.fromkeys(ranking[rank] for ranking in rankings if rank < len(ranking))
    others = list(ids)
    rng.shuffle(others)
    chosen |= dict.fromkeys(others)
    return set(list(chosen)[:count])


def write_questions(path, questions, keys):
    with atomic_file(path) as file:
        for question in questions:
            row = {key: question[key] for key in ("qid", "question", *keys)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(source, corpus_path, out, count, passages):
    out, rng = Path(out), random.Random(SEED)
    corpus = Corpus(corpus_path)
    refuse_input(out / "corpus.tsv", corpus_path)
    parts = {}
    for name in ("train", "dev", "test"):
        path = Path(source) / f"{name}.jsonl"
        refuse_input(out / f"{name}.jsonl", path)
        parts[name] = read_questions(path, need=("answers", "positives"), match="string")
    if len(parts["train"]) < count:
        raise UserError(f"{source}/train.jsonl: {len(parts['train'])} questions, {count} are asked for")
    parts["train"] = rng.sample(parts["train"], count)

    # the passages
    index = build_bm25(corpus, out / "bm25_source")
    found = search_bm25(index, [question["question"] for question in parts["train"]], BEST)
    rankings = [[corpus[row].id for row, _ in hits] for hits in found]
    gold = {pid: None for part in parts.values() for question in part for pid in question["positives"]}
    chosen = choose(gold, rankings, [passage.id for passage in corpus], passages, rng)

    # the files; the corpus last, because its presence says that all are there
    for name, questions in parts.items():
        hidden = name == "train"
        write_questions(
            out / f"{name}.jsonl", questions, ["positives"] if hidden else ["answers", "positives"]
        )
    write_questions(out / "train_answers.jsonl", parts["train"], ["answers", "positives"])
    with atomic_file(out / "corpus.tsv") as file:
        rows = csv.writer(file, "excel-tab", lineterminator="\n")
        rows.writerow(["id", "text", "title"])
        rows.writerows((p.id, p.text, p.title) for p in corpus if p.id in chosen)
    print(f"{out}: {count:,} training questions, {len(gold):,} positives, {len(chosen):,} passages")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 6 or not all(map(str.isdigit, sys.argv[4:])):
            raise UserError("usage: python recipes/claim_data.py SOURCE CORPUS OUT QUESTIONS PASSAGES")
        main(*sys.argv[1:4], *map(int, sys.argv[4:]))
