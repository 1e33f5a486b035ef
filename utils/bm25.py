"""
BM25, the baseline of every table and the source of DPR's first hard negatives (package bm25s; Lu 2024).

In:  a corpus, a question file      Out: a .run; the index is kept, and used again for the same corpus
Run: python -m utils.bm25 --corpus data/nq/corpus.tsv --questions data/nq/test.jsonl --out runs/bm25/test.run
Differs from Lucene (Pyserini, the paper's BM25): no stemmer, words of one letter are dropped.
"""

import argparse
import errno
import shutil
import sys
from pathlib import Path

import bm25s
import numpy as np
from tqdm import tqdm

from utils.data import Corpus, read_questions, write_run
from utils.plumbing.config import UserError, friendly_errors, need_out
from utils.plumbing.files import atomic_folder, read_json, write_json

SETTINGS = {
    "k1": 0.9,
    "b": 0.4,
    "stopwords": "english",
}  # from: Karpukhin et al. 2020, Sec. 5.1 (Lucene's b and k1)


def tokens(texts):
    return bm25s.tokenize(texts, stopwords=SETTINGS["stopwords"], show_progress=False)


def build_bm25(corpus, folder):
    """The BM25 index of title + text, saved as `folder`; read from there when it is of this very corpus."""
    folder = Path(folder)
    want = {"corpus": corpus.sha256, "rows": len(corpus), **SETTINGS}
    if folder.exists():
        if not (folder / "bm25.json").is_file():
            raise UserError(f"{folder}: is there, but is not a BM25 index; name another folder")
        try:
            if read_json(folder / "bm25.json") == want:
                return bm25s.BM25.load(folder, show_progress=False)
        except (UserError, OSError, ValueError, EOFError, LookupError) as error:
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise  # no right to read it, too many open files: the index may be whole
            print(f"{folder}: damaged ({error}), it is built again", file=sys.stderr)
        shutil.rmtree(folder)  # of another corpus or other settings
    index = bm25s.BM25(k1=SETTINGS["k1"], b=SETTINGS["b"])
    passages = tqdm(corpus, "BM25 index", total=len(corpus), delay=5, disable=None)
    found = tokens(f"{p.title} {p.text}" for p in passages)
    if not found.vocab:
        raise UserError(f"{corpus.path}: no passage has a word that BM25 can index")
    index.index(found, show_progress=False)
    with atomic_folder(folder) as building:
        index.save(building, show_progress=False)
        write_json(building / "bm25.json", want)
    return index


def search_bm25(index, questions, k):
    """
    The best k passages of every question (a string): [[(row, score), ...], ...], best first.

    Equal scores keep the order of the corpus. A passage without a word of the question (score 0) is not
    returned, so a list may be short.
    """
    results = []
    for question in tqdm(questions, "BM25 search", delay=5, disable=None):
        found = tokens([question])
        words = [list(found.vocab)[i] for i in found.ids[0]]  # a word said twice counts twice
        scores = index.get_scores_from_ids([index.vocab_dict[w] for w in words if w in index.vocab_dict])
        rows = np.flatnonzero(scores > 0)
        if len(rows) > k:  # why >= : the corpus order decides between passages as good as the k-th, not numpy
            rows = rows[scores[rows] >= np.partition(scores[rows], -k)[-k]]
        rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
        results.append(list(zip(rows.tolist(), scores[rows].tolist(), strict=True)))
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--corpus_format", default="auto", help="auto, dpr, marco or beir")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--out", required=True, help="the .run to write")
    parser.add_argument("--k", type=int, default=100, help="passages per question")
    parser.add_argument("--index", default="", help="folder of the index; default: the corpus path + .bm25")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.k < 1:
        raise UserError(f"--k must be 1 or more, got {args.k}")
    need_out(args, "out", "questions", "corpus")
    questions, corpus = read_questions(args.questions), Corpus(args.corpus, args.corpus_format)
    index = build_bm25(corpus, args.index or f"{args.corpus}.bm25")
    results = search_bm25(index, [q["question"] for q in questions], args.k)
    pids = [[(corpus[row].id, score) for row, score in hits] for hits in results]
    write_run(args.out, [(q["qid"], hits) for q, hits in zip(questions, pids, strict=True)])
    empty = sum(not hits for hits in results)
    print(f"{args.out}: {len(questions)} questions, {empty} of them without a passage")


if __name__ == "__main__":
    with friendly_errors():
        main()
