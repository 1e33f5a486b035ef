"""
What the byte-offset index saves: a corpus as python lists (nanoDPR's and DPR's way) against utils/corpus.py.

Run: python tests/bench/bench_corpus.py [rows, default 5000000] [turns, default 3]

Each measurement is a process of its own, the ways take turns, the file is in the page cache: seconds and peak
memory (RSS) to start and read the same 1000 random passages, which must be the same text. Printed: median and
range, and the ratio within a turn. Building the index, once a corpus, stands apart. 5M rows are 3.4 GB of
temporary disk, and 4.5 GB of memory in lists.
"""

import csv
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import ratios, spread  # noqa: E402

READS = 1000


def write_corpus(path, rows):
    """About 650 bytes a row; a third of the texts hold quotes, as in psgs_w100.tsv."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(chance.choices(words, k=100)) for _ in range(9999)]  # why so few: to draw takes minutes
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["id", "text", "title"])
        for i in range(rows):
            text = texts[i % 9999]
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
    """Print the seconds and the peak MB of one way in this process, and a checksum of what it read."""
    began = time.perf_counter()
    rows, read = {"lists": lists, "index": index, "build": index}[way](path)
    chance = random.Random(1)
    passages = [read(chance.randrange(rows)) for _ in range(READS)]
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(seconds, peak, zlib.crc32(repr(passages).encode()))


def main(rows, turns):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.tsv"
        write_corpus(path, rows)
        results = {"build": [], "lists": [], "index": []}
        for way in ["build"] + ["lists", "index"] * turns:
            command = [sys.executable, __file__, "--measure", way, str(path)]
            results[way].append([float(x) for x in subprocess.check_output(command, text=True).split()])
        assert len({run[2] for runs in results.values() for run in runs}) == 1, "the ways read different text"
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB, {READS} random reads, n = {turns}")
    print(f"{'way':6} {'seconds':>22} {'peak MB':>22}")
    columns = {way: list(zip(*runs, strict=True)) for way, runs in results.items()}
    for way, (seconds, peaks, _) in columns.items():
        print(f"{way:6} {spread(seconds):>22} {spread(peaks, 0):>22}")
    times, memory = (ratios(columns["lists"][i], columns["index"][i], 1) for i in (0, 1))
    print(f"lists take {times} times as long as the index, and {memory} times its memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4])
    else:
        numbers = [int(argument) for argument in sys.argv[1:]]
        main(*numbers, *[5_000_000, 3][len(numbers) :])
