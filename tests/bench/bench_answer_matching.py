"""
Answer matching side by side: `has_answer`, and how nanoDPR and DPR judge, restated from their behaviour.

Run: python tests/bench/bench_answer_matching.py --corpus data/nq/corpus.tsv --questions data/nq/dev.jsonl

Both peers normalise passage and answer (NFD), cut both into tokens and look for the one list in the other;
the answers of a question anew for each of its passages. A token is kept with its place and with the white
space after it, which this comparison does not need.
  nanoDPR         builds its tokenizer, that is compiles the pattern, at every call
  DPR             builds its tokenizer once; here in one process, there in a pool of 16
Theirs find a blank answer everywhere, so those are left out.

The pairs are what a test run judges: each question with its k best passages among the first `rows` of the
corpus, ranked by the question's words that they share, the rare ones first. All ways judge all pairs in
turn, n times, in this process, with empty caches; CPU seconds. Verdicts must be identical. Printed: pairs
per second, and how many times as fast ours is within a turn (median, range).
"""

import argparse
import csv
import functools
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


class Tokenizer:
    """The tokenizer of both peers."""

    def __init__(self):
        flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
        self.pattern = regex.compile(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags)

    def words(self, string):
        """Tokens in lower case."""
        found = list(self.pattern.finditer(unicodedata.normalize("NFD", string)))
        ends = [match.start() for match in found[1:]] + [match.end() for match in found[-1:]]
        tokens = [
            (m.group(), m.string[m.start() : end], m.span()) for m, end in zip(found, ends, strict=True)
        ]
        return [word.lower() for word, _, _ in tokens]


def dpr(passage, answers, tokenizer):
    """Whether the tokens of an answer stand in a row among those of the passage, as DPR compares them."""
    have = tokenizer.words(passage)
    for answer in answers:
        wanted = tokenizer.words(answer)
        for i in range(len(have) - len(wanted) + 1):
            if have[i : i + len(wanted)] == wanted:
                return True
    return False


def nano_dpr(passage, answers):
    """The same with a tokenizer of its own."""
    return dpr(passage, answers, Tokenizer())


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
        answers = [answer for answer in question["answers"] if answer.strip()]
        pairs += [(passages[row], answers) for row, _ in scores.most_common(k)]
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

    ways = {
        "nanoDPR": nano_dpr,
        "DPR": functools.partial(dpr, tokenizer=Tokenizer()),
        "ours": text.has_answer,
    }
    seconds, expected = {name: [] for name in ways}, None
    for _ in range(args.repeat):
        for name, way in ways.items():
            verdicts, spent = judge(way, pairs)
            seconds[name].append(spent)
            expected = expected or verdicts
            if different := sum(a != b for a, b in zip(expected, verdicts, strict=True)):
                sys.exit(f"{name}: {different} of {len(pairs)} verdicts are not those of nanoDPR")
    print(
        f"{len(pairs)} pairs ({len(questions)} questions, {len(passages)} passages), {sum(expected)} with an "
        f"answer, {sum(p.isascii() for p, _ in pairs) / len(pairs):.0%} ASCII, n = {args.repeat}; "
        "verdicts identical"
    )
    print(f"{'way':8} {'pairs per CPU second':>32} {'ours is faster by':>24}")
    for name, spent in seconds.items():
        rates = [len(pairs) / s for s in spent]
        ratios = [s / ours for s, ours in zip(spent, seconds["ours"], strict=True)]
        rate = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:8} {rate:>32} {ratio:>24}")


if __name__ == "__main__":
    main()
