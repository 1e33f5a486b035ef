"""
Does mining need more memory for more questions? Peak memory and time of mine_negatives.py, teleport, 200
candidates from each of two rankings, at 1,000 and 10,000 questions.

Run: python tests/bench/bench_mining.py --corpus data/demo/corpus.tsv --questions data/demo/train.jsonl

The questions of the file are repeated under new ids until there are enough, their rankings are drawn at
random.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data import Corpus, read_questions  # noqa: E402

PEAK = "import resource, subprocess, sys, time; t = time.time(); subprocess.run(sys.argv[1:], check=True); \
print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, time.time() - t)"


def write_files(folder, questions, corpus, count, depth):
    """count questions and two rankings of `depth` random passages each."""
    rng = random.Random(0)
    with (
        open(folder / "q.jsonl", "w") as out,
        open(folder / "a.run", "w") as ann,
        open(folder / "l.run", "w") as la,
    ):
        for i in range(count):
            question = questions[i % len(questions)] | {"qid": str(i), "negatives": []}
            out.write(json.dumps(question) + "\n")
            for file in (ann, la):
                rows = rng.sample(range(len(corpus)), depth)
                file.writelines(f"{i}\t{corpus[row].id}\t{r}\t{-r}.0\n" for r, row in enumerate(rows, 1))


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--corpus", required=True)
    options.add_argument("--questions", required=True)
    options.add_argument("--counts", type=int, nargs="+", default=[1000, 10000])
    options.add_argument("--depth", type=int, default=200)
    args = options.parse_args()
    corpus, questions = Corpus(args.corpus), read_questions(args.questions)
    for count in args.counts:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_files(folder, questions, corpus, count, args.depth)
            mine = [sys.executable, "mine_negatives.py", "--mode", "teleport", "--corpus", args.corpus]
            mine += ["--questions", str(folder / "q.jsonl"), "--run", str(folder / "a.run")]
            mine += ["--lookahead_run", str(folder / "l.run"), "--out", str(folder / "out.jsonl")]
            mine += ["--negatives", "80", "--depth", str(args.depth)]
            done = subprocess.run(
                [sys.executable, "-c", PEAK, *mine], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-2000:]
            _, peak, seconds = done.stdout.split("\n")[-2].split()
            pairs = 2 * count * args.depth
            rate = f"{pairs / float(seconds):,.0f} candidates a second"
            print(f"{count:,} questions x 2 x {args.depth}: peak {peak} MB, {rate}", flush=True)


if __name__ == "__main__":
    main()
