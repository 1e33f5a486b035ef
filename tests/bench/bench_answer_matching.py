"""
Answer matching side by side: `has_answer`, and the naive way of tokenising passage and answers at every call.

Run: python tests/bench/bench_answer_matching.py --corpus data/nq/corpus.tsv --questions data/nq/dev.jsonl

The pairs are what a test run judges: each question with its k best passages among the first `rows` of the
corpus, ranked by the question's words that they share, the rare ones first. Both ways judge all pairs in
turn, n times, in this process, with empty caches; CPU seconds. Verdicts must be identical. Printed: CPU
microseconds per pair, and the ratio within a turn (median, range).
"""

import argparse
import csv
import gzip
import json
import math
import statistics
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import regex

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import text  # noqa: E402  (the line above makes it importable)


def naive_has_answer(passage, answers):
    """The token match of the reference codes, all done anew at each call; blank answers left out."""
    flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
    pattern = regex.compile(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags)

    def tokens(string):
        return [m.group().lower() for m in pattern.finditer(unicodedata.normalize("NFD", string))]

    have = tokens(passage)
    for wanted in map(tokens, answers):
        n = len(wanted)
        if n and any(have[i : i + n] == wanted for i in range(len(have) - n + 1)):
            return True
    return False


def read_passages(path, rows):
    """The texts of the first rows of a DPR corpus (id, text, title; header), plain or .gz."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        next(lines)
        return [line[1] for _, line in zip(range(rows), lines, strict=False)]


def make_pairs(passages, questions, k):
    """[(passage, answers)], k passages per question."""
    holders = {}
    for row, passage in enumerate(passages):
        for word in set(passage.lower().split()):
            holders.setdefault(word, []).append(row)
    pairs = []
    for question in questions:
        scores = Counter()
        for word in set(question["question"].lower().split()):
            weight = math.log(len(passages) / len(holders.get(word, passages)))
            for row in holders.get(word, []):
                scores[row] += weight
        pairs += [(passages[row], question["answers"]) for row, _ in scores.most_common(k)]
    return pairs


def judge(way, pairs):
    """(verdicts, CPU seconds), from cold caches."""
    regex.purge()
    for cached in (text._probe, text._token_pattern):
        cached.cache_clear()
    start = time.process_time()
    verdicts = [way(passage, answers) for passage, answers in pairs]
    return verdicts, time.process_time() - start


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--corpus", required=True)
    options.add_argument("--questions", required=True)
    for name, value in (("rows", 5000), ("limit", 100), ("k", 100), ("repeat", 7)):
        options.add_argument(f"--{name}", type=int, default=value)
    args = options.parse_args()
    with open(args.questions, encoding="utf-8") as file:
        questions = [json.loads(line) for _, line in zip(range(args.limit), file, strict=False)]
    passages = read_passages(args.corpus, args.rows)
    pairs = make_pairs(passages, questions, args.k)

    naive, ours = [], []
    for _ in range(args.repeat):
        expected, seconds = judge(naive_has_answer, pairs)
        naive.append(seconds)
        verdicts, seconds = judge(text.has_answer, pairs)
        ours.append(seconds)
        different = sum(a != b for a, b in zip(expected, verdicts, strict=True))
        if different:
            sys.exit(f"{different} of {len(pairs)} verdicts differ")
    print(
        f"{len(pairs)} pairs ({len(questions)} questions, {len(passages)} passages), {sum(expected)} with an "
        f"answer, {sum(p.isascii() for p, _ in pairs) / len(pairs):.0%} ASCII, n = {args.repeat}; "
        "verdicts identical"
    )
    ratios = [slow / fast for slow, fast in zip(naive, ours, strict=True)]
    for name, values, unit in (
        ("naive", [1e6 * t / len(pairs) for t in naive], "us per pair"),
        ("ours", [1e6 * t / len(pairs) for t in ours], "us per pair"),
        ("ratio", ratios, "times faster"),
    ):
        print(f"{name:6} {statistics.median(values):8.2f} ({min(values):.2f}-{max(values):.2f}) {unit}")


if __name__ == "__main__":
    main()
