"""
BM25, the baseline of every table and the source of DPR's first hard negatives (package bm25s; Lu 2024).

In:  a corpus, a question file      Out: a .run; the index is kept, and used again for the same corpus
Run: python -m utils.bm25 --corpus data/nq/corpus.tsv --questions data/nq/test.jsonl --out runs/bm25/test.run
"""

import argparse
import sys
from pathlib import Path

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from bm25s.tokenization import Tokenized
from tqdm import tqdm

from utils.data import Corpus, named_hits, read_questions, write_run
from utils.metrics import measure, report
from utils.plumbing.config import UserError, friendly_errors, need_out
from utils.plumbing.files import atomic_folder, lock, read_json, sha256, write_json
from utils.text import words

# from: Karpukhin et al. 2020, Sec. 5.1 (b and k1, tuned there on dev sets). words: its value changes when
# `words` does, so that old indexes are built again
SETTINGS = {"k1": 0.9, "b": 0.4, "stopwords": "english", "words": "utils/text.py, December 2026"}
STOPWORDS = frozenset(STOPWORDS_EN)


def tokens(texts):
    """Return the words of the texts as bm25s takes them: a list of word ids for each, and {word: id}."""
    # differs: Lucene (Pyserini, the paper's BM25) stems its words and keeps those of one letter
    vocabulary = {}
    ids = []
    for text in texts:
        kept = [word for word in words(text) if word not in STOPWORDS]
        ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in kept])
    return Tokenized(ids=ids, vocab=vocabulary)


def hashes_of(folder):
    """Return {name: sha256} of the files of an index."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != "bm25.json"}


def build_bm25(corpus, folder):
    """Return the BM25 index of title + text: the one in `folder` if it is of this corpus, else a new one."""
    folder = Path(folder)
    want = {"corpus": corpus.sha256, "rows": len(corpus), **SETTINGS}
    if folder.exists():
        if not (folder / "bm25.json").is_file():
            raise UserError(f"{folder}: is there, but is not a BM25 index; name another folder")
        try:
            stored = read_json(folder / "bm25.json")
            hashes = stored.pop("files", {})
            if stored == want:
                # why: bm25s reads a file with a flipped bit, and fails at some later question
                if hashes != hashes_of(folder):
                    raise ValueError("another sha256 than when written")
                return bm25s.BM25.load(folder, show_progress=False)
        # why no other OSError: after "too many open files" the index may be whole
        except (UserError, FileNotFoundError, ValueError, EOFError, LookupError) as error:
            print(f"{folder}: damaged ({error}), it is built again", file=sys.stderr)

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock(folder.with_name(f".{folder.name}.lock"))
    passages = tqdm(corpus, "BM25 index", delay=5, disable=None)
    indexed = tokens(f"{passage.title} {passage.text}" for passage in passages)
    if not indexed.vocab:
        raise UserError(f"{corpus.path}: no passage has a word that BM25 can index")
    index = bm25s.BM25(k1=SETTINGS["k1"], b=SETTINGS["b"])
    index.index(indexed, show_progress=False)
    with atomic_folder(folder, replace=True) as building:
        index.save(building, show_progress=False)
        write_json(building / "bm25.json", want | {"files": hashes_of(building)})
    return index


def search_bm25(index, questions, k):
    """
    Return the best k passages of every question (a string): [[(row, score), ...], ...], the best first.

    Equal scores keep the order of the corpus. A passage without a word of the question (score 0) is left out.
    """
    results = []
    for question in tqdm(questions, "BM25 search", delay=5, disable=None):
        # the scores of all passages; a word that is asked twice counts twice
        asked = [word for word in words(question) if word not in STOPWORDS]
        scores = index.get_scores_from_ids([index.vocab_dict[w] for w in asked if w in index.vocab_dict])

        # the best k; of passages as good as the k-th, the first in the corpus
        rows = np.flatnonzero(scores > 0)
        if len(rows) > k:
            kth_best = np.partition(scores[rows], -k)[-k]
            rows = rows[scores[rows] >= kth_best]
        rows = rows[np.argsort(-scores[rows], kind="stable")][:k]
        results.append(list(zip(rows.tolist(), scores[rows].tolist(), strict=True)))
    return results


def main():
    parser = argparse.ArgumentParser("python -m utils.bm25", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--corpus_format", default="auto", help="auto, dpr, marco or beir")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--out", required=True, help="the .run to write")
    parser.add_argument("--k", type=int, default=100, help="passages per question")
    parser.add_argument("--match", choices=["string", "regex"], default="string", help="what an answer is")
    parser.add_argument(
        "--ignore_identical_ids", action="store_true", help="leave out a passage of its own id"
    )
    parser.add_argument("--index", default="", help="folder of the index; default: the corpus path + .bm25")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.k < 1:
        raise UserError(f"--k must be 1 or more, got {args.k}")
    need_out(args, "out", ".metrics.json", ending=".run")
    questions = read_questions(args.questions, match=args.match)
    corpus = Corpus(args.corpus, args.corpus_format)
    index = build_bm25(corpus, args.index or f"{args.corpus}.bm25")

    depth = args.k + args.ignore_identical_ids
    results = search_bm25(index, [question["question"] for question in questions], depth)
    rankings = []
    for question, hits in zip(questions, results, strict=True):
        named = named_hits(question, hits, corpus, args.k, args.ignore_identical_ids)
        rankings.append((question["qid"], named))
    write_run(args.out, rankings)
    empty = sum(not hits for _, hits in rankings)
    print(f"{args.out}: {len(questions)} questions, {empty} of them without a passage")

    # what test_dpr.py counts of a dense ranking
    metrics = measure(args.out, questions, corpus, args.k, args.match)
    write_json(Path(args.out).with_suffix(".metrics.json"), metrics)
    report({Path(args.out).name: metrics}, args.questions)


if __name__ == "__main__":
    with friendly_errors():
        main()
