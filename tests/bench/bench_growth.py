"""
How time and memory grow with the corpus: encode, search, mine and evaluate at several numbers of passages.

Run: python tests/bench/bench_growth.py --doc_encoder runs/demo/doc_encoder --words data/demo/corpus.tsv
     python tests/bench/bench_growth.py --doc_encoder runs/demo/doc_encoder --words data/demo/corpus.tsv
     --sizes 1000 2000 --repeat 1    (to see it work)

The passages are words of --words drawn with a fixed seed, so a smaller corpus is the beginning of a larger
one. Every measurement is a process of its own; a round runs all stages at all sizes, n rounds:
  encode     doc2embedding.py. Above --encode_passages only so many, in whole shards spread over the corpus,
             are encoded; the other shards (noisy copies of real vectors) lie there as if a run had been
             stopped. seconds = r + (s - r) * N / passages encoded: s of this run, r of the same command
             repeated, when nothing is left to do. Such a row is marked "sample".
  search     test_dpr.py --index stream, the same --questions questions at all sizes; they have no answers,
             so it stops after the ranking
  mine       mine_negatives.py, --k random passages a question, a question per --passages_per_question
  evaluate   the evaluation of test_dpr.py (retrieval_metrics: top-k accuracy by has_answer) of that ranking
So each of the four has work in proportion to the passages: linear is a slope of 1.

Printed: seconds, CPU seconds and the peak of resident memory of each (median, range), and the slope of log
seconds over log passages, fitted in each round, of what a stage takes beyond its start (imports, weights):
the same stage on --start passages in the same round, the first row. Making the corpus and its index is not
timed (bench_corpus.py). Small sizes are lost in the noise of the start: the last two say more.

trap: memory of a process counts the pages of files that it has mapped, the shards of a search for one.
The system takes those back when others need memory; "not files" leaves them out. Both are sampled 20 times
a second, on Linux.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data import Corpus  # noqa: E402
from utils.plumbing.files import read_json, sha256, write_json  # noqa: E402

STAGES = ("encode", "search", "mine", "evaluate")
EVALUATE = """
import sys
from test_dpr import KS, in_order, iter_run, print_table, read_questions, retrieval_metrics
from utils.data import Corpus
corpus, questions, run, k = sys.argv[1:]
ks = [one for one in KS if one <= int(k)]
rankings = in_order(iter_run(run))
print_table(retrieval_metrics(read_questions(questions), rankings, Corpus(corpus), ks)[0], run)
"""


# ------------------------------------------------------------------------------------------- the files
def write_corpus(path, rows, words, length):
    """`rows` passages of `length` words; 10,000 drawn at a time, so that every corpus begins alike."""
    words, rng = np.array(words, dtype=object), np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        for first in range(0, rows, 10_000):
            drawn = words[rng.integers(len(words), size=(10_000, length + 2))].tolist()
            for i, row in enumerate(drawn[: rows - first], first + 1):
                file.write(f"{i}\t{' '.join(row[2:])}\t{' '.join(row[:2])}\n")


def write_questions(folder, rows, words, args):
    """search.jsonl, questions without answers; judged.jsonl, with answers; judged.run, random passages."""
    chance, answers = random.Random(1), [word for word in words if word.isalpha() and len(word) > 6]
    with open(folder / "search.jsonl", "w") as file:
        for i in range(args.questions):
            file.write(json.dumps({"qid": str(i), "question": " ".join(chance.choices(words, k=9))}) + "\n")
    with open(folder / "judged.jsonl", "w") as file, open(folder / "judged.run", "w") as run:
        for i in range(max(1, rows // args.passages_per_question)):
            found = chance.sample(range(1, rows + 1), min(args.k, rows))
            question = {"qid": str(i), "question": " ".join(chance.choices(words, k=9))}
            question |= {"answers": chance.choices(answers, k=2), "positives": [str(found[0])]}
            file.write(json.dumps(question) + "\n")
            run.writelines(f"{i}\t{pid}\t{rank}\t{-rank}.0\n" for rank, pid in enumerate(found, 1))


def stop_early(folder, start, shards, sampled, size, args):
    """A run of doc2embedding.py that was stopped when all shards but the sampled ones were written."""
    out, rng, real_nD = folder / "embeddings", np.random.default_rng(2), np.load(start / "00000.npy")
    out.mkdir()
    for i in sorted(set(range(shards)) - sampled):
        rows = min(args.shard_size, size - i * args.shard_size)
        noise_nD = rng.standard_normal((rows, real_nD.shape[1]), dtype=np.float32) * real_nD.std() / 10
        vectors_nD = real_nD[rng.integers(len(real_nD), size=rows)] + noise_nD
        np.save(out / f"{i:05d}.npy", vectors_nD.astype(real_nD.dtype))
        write_json(out / f"{i:05d}.json", {"sha256": sha256(out / f"{i:05d}.npy"), "full_length": 0})
    manifest = read_json(start / "manifest.json") | {"shards": {}, "complete": False, "rows": size}
    write_json(out / "manifest.json", manifest | {"corpus": Corpus(folder / "corpus.tsv").sha256})


# ------------------------------------------------------------------------------------- one measurement
def memory(pid):
    """Of a process, in MB: the peak of its resident memory so far, and what is no file now; 0 once ended."""
    # why not getrusage: what it says of a child begins with the memory of the process that started it
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = dict(line.split(":") for line in lines if line.startswith(("VmHWM", "RssAnon")))
    return tuple(int(sizes.get(key, "0 kB").split()[0]) / 1024 for key in ("VmHWM", "RssAnon"))


def measure(command, threads):
    """Run a command to its end: {"seconds", "cpu", "peak" (MB), "private" (MB, not files)}."""
    settings = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    began, most = time.perf_counter(), (0.0, 0.0)
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, *map(str, command)]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=said, stderr=said)
        done = 0
        while not done:
            most = tuple(map(max, most, memory(process.pid)))
            time.sleep(0.05)
            done, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert process.returncode == 0, said.read().decode()[-2000:]
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak": most[0], "private": most[1]}


def encode(folder, sampled, size, args):
    """The stage `encode`, scaled up from the sampled shards (numbers) as the docstring says."""
    out = folder / "embeddings"
    if sampled is None:
        shutil.rmtree(out, ignore_errors=True)
    else:
        for i in sampled:
            (out / f"{i:05d}.npy").unlink(missing_ok=True)
            (out / f"{i:05d}.json").unlink(missing_ok=True)
    command = ["doc2embedding.py", "--doc_encoder", args.doc_encoder, "--corpus", folder / "corpus.tsv"]
    command += ["--out", out, "--shard_size", args.shard_size]
    work = measure(command, args.threads)
    if sampled is None:
        return work
    rest = measure(command, args.threads)
    encoded = sum(min(args.shard_size, size - i * args.shard_size) for i in sampled)
    scaled = {key: rest[key] + (work[key] - rest[key]) * size / encoded for key in ("seconds", "cpu")}
    return work | scaled


def other_stage(stage, folder, args):
    """The stages after encoding."""
    corpus, judged, run = (folder / name for name in ("corpus.tsv", "judged.jsonl", "judged.run"))
    if stage == "search":
        command = ["test_dpr.py", "--index", "stream", "--query_encoder", args.query_encoder, "--k", args.k]
        command += ["--corpus", corpus, "--questions", folder / "search.jsonl"]
        command += ["--embeddings", folder / "embeddings", "--out", folder / "search.run"]
    elif stage == "mine":
        command = ["mine_negatives.py", "--corpus", corpus, "--questions", judged, "--run", run]
        command += ["--out", folder / "mined.jsonl", "--depth", args.k, "--negatives", min(30, args.k)]
    else:
        command = ["-c", EVALUATE, corpus, judged, run, args.k]
    return measure(command, args.threads)


# ---------------------------------------------------------------------------------------------- main
def middle(values, form):
    return f"{np.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def slopes(runs, start, sizes, key):
    """The slope in words, fitted in every round to what these sizes take beyond the start."""
    fitted = []
    for at_start, *turn in zip(runs[start], *(runs[size] for size in sizes), strict=True):
        beyond = [run[key] - at_start[key] for run in turn]
        if min(beyond) <= 0:
            return "lost in the start"
        fitted.append(np.polyfit(np.log(sizes), np.log(beyond), 1)[0])
    return middle(fitted, ".2f")


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--doc_encoder", required=True, help="any passage (or shared) encoder folder")
    options.add_argument("--query_encoder", default="", help="default: --doc_encoder")
    options.add_argument("--words", required=True, help="a corpus whose words the passages are made of")
    options.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options.add_argument("--start", type=int, default=200, help="passages of the run that stands for none")
    options.add_argument("--length", type=int, default=100, help="words of a passage")
    options.add_argument("--encode_passages", type=int, default=10_000, help="more are encoded as a sample")
    options.add_argument("--shard_size", type=int, default=5_000)
    options.add_argument("--questions", type=int, default=3_610, help="of the search")
    options.add_argument("--passages_per_question", type=int, default=25, help="in mine and evaluate")
    options.add_argument("--k", type=int, default=100)
    options.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--repeat", type=int, default=3)
    args = options.parse_args()
    args.query_encoder = args.query_encoder or args.doc_encoder
    sizes = [args.start, *sorted(args.sizes)]
    if args.start > args.shard_size or args.start >= sizes[1]:
        sys.exit("error: --start must be the smallest size, and fit into one shard")
    if "search" in args.stages and "encode" not in args.stages:
        sys.exit("error: search needs the vectors of encode")
    corpus = Corpus(args.words)
    words = [word for row in range(len(corpus)) for word in corpus[row].text.split() if '"' not in word]
    found, sampled = {stage: {size: [] for size in sizes} for stage in args.stages}, {}
    with tempfile.TemporaryDirectory() as top:
        for size in sizes:
            folder = Path(top) / str(size)
            folder.mkdir()
            write_corpus(folder / "corpus.tsv", size, words, args.length)
            Corpus(folder / "corpus.tsv")  # its index
            write_questions(folder, size, words, args)
            shards, wanted = -(-size // args.shard_size), max(1, args.encode_passages // args.shard_size)
            sampled[size] = None
            if size > args.encode_passages and wanted < shards:
                sampled[size] = set(np.linspace(0, shards - 2, wanted).astype(int).tolist())  # whole ones
        for _ in range(args.repeat):
            for size in sizes:
                folder, start = Path(top) / str(size), Path(top) / str(args.start) / "embeddings"
                for stage in args.stages:
                    if stage == "encode":
                        if sampled[size] and not (folder / "embeddings").exists():
                            shards = -(-size // args.shard_size)
                            stop_early(folder, start, shards, sampled[size], size, args)
                        spent = encode(folder, sampled[size], size, args)
                    else:
                        spent = other_stage(stage, folder, args)
                    found[stage][size].append(spent)
                    print(f"{stage} {size:,}: {spent['seconds']:.1f} s", file=sys.stderr, flush=True)
    print(
        f"{args.doc_encoder}, {args.length} words a passage, {args.questions} questions searched,\n"
        f"{args.passages_per_question} passages a judged question, k = {args.k}, {args.threads} threads, "
        f"n = {args.repeat}"
    )
    forms = {"seconds": ".1f", "cpu": ".1f", "peak": ".0f", "private": ".0f"}
    names = ("seconds", "CPU seconds", "peak MB", "not files")
    print(f"{'stage':9} {'passages':>10}", *(f"{name:>21}" for name in names))
    for stage, runs in found.items():
        for size in sizes:
            columns = [middle([run[key] for run in runs[size]], form) for key, form in forms.items()]
            note = " (start)" if size == args.start else ""
            if stage == "encode" and sampled[size]:
                note = f" sample: {len(sampled[size])} of {-(-size // args.shard_size)} shards"
            print(f"{stage:9} {size:10,}", *(f"{column:>21}" for column in columns), note)
        for key, name in (("seconds", "seconds"), ("cpu", "CPU seconds")) if len(sizes) > 2 else ():
            both = [slopes(runs, args.start, part, key) for part in (sizes[1:], sizes[-2:])]
            print(f"{stage:9} slope of {name}: {both[0]}; of the last two sizes {both[1]}")


if __name__ == "__main__":
    main()
