"""
What the byte-offset index saves: a corpus as python lists (nanoDPR's and DPR's way) against utils/corpus.py.

Run: python tests/bench/bench_corpus.py [rows, default 1000000] [repetitions, default 3]
Each measurement is a process of its own, the ways take turns, the file is in the page cache: seconds and peak
memory (RSS) to start and read the same 1000 random passages. Building the index, once a corpus, stands apart.
"""

import csv
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
READS = 1000


def write_corpus(path, rows):
    """About 650 bytes a row; a third of the texts hold quotes, as in psgs_w100.tsv."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(5000)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["id", "text", "title"])
        for i in range(rows):
            text = " ".join(chance.choices(words, k=100))
            table.writerow([i + 1, f'{text} "x"' if i % 3 == 0 else text, words[i % 5000]])


def lists(path):
    """Three lists of strings from csv.reader."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        next(reader)
        ids, texts, titles = [], [], []
        for row in reader:
            ids.append(row[0]), texts.append(row[1]), titles.append(row[2])
    return len(ids), lambda row: (ids[row], titles[row], texts[row])


def index(path):
    """utils.corpus.Corpus."""
    from utils.corpus import Corpus

    corpus = Corpus(path)
    return len(corpus), lambda row: tuple(corpus[row])


def measure(way, path):
    begin = time.perf_counter()
    rows, read = {"lists": lists, "index": index, "build": index}[way](path)
    chance = random.Random(1)
    found = [read(chance.randrange(rows)) for _ in range(READS)]
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(seconds, peak, sum(hash_of(passage) for passage in found) % 2**32)


def hash_of(passage):
    return sum(len(part) * i + ord(part[0]) for i, part in enumerate(passage, 1))


def main(rows, repetitions):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.tsv"
        write_corpus(path, rows)
        ways = ["build"] + ["lists", "index"] * repetitions
        results = {way: [] for way in ways}
        for way in ways:
            command = [sys.executable, __file__, "--measure", way, str(path)]
            results[way].append([float(x) for x in subprocess.check_output(command, text=True).split()])
        assert len({run[2] for runs in results.values() for run in runs}) == 1, "the ways read different text"
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:.0f} MB, {READS} random reads, n = {repetitions}")
        mean = {}
        for way, runs in results.items():
            seconds, peaks, _ = zip(*runs, strict=True)
            mean[way] = statistics.mean(seconds), max(peaks)
            spread = f" ± {statistics.stdev(seconds):.2f}" if len(runs) > 1 else " (once)"
            print(f"{way:6s} {mean[way][0]:8.2f} s{spread}   peak {mean[way][1]:7.0f} MB")
        slow, fast = mean["lists"], mean["index"]
        print(f"lists / index: {slow[0] / fast[0]:.1f}x the seconds, {slow[1] / fast[1]:.1f}x the memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4])
    else:
        arguments = [int(argument) for argument in sys.argv[1:]]
        main(*arguments, *[1_000_000, 3][len(arguments) :])
