"""
Exact search side by side: FAISS's flat index as its wheel comes, the same with OpenBLAS's kernel named, ours
from fp16 shards on disk, and the bare matrix product that none of them can beat.

Run: python tests/bench/bench_search.py --rows 100000 --dim 384 --questions 1000 --k 100 --repeat 5

Each way is a fresh process (OpenBLAS chooses its kernel when it is loaded), in turn, so that a busy machine
hurts all alike. A way's time is what a user waits for once the vectors are on disk: reading, adding,
searching; the product has its matrices in memory. Printed: seconds, and the ratio to ours within the same
turn (median, range).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARD = 25_000
WAYS = ("faiss as it comes", "faiss, kernel named", "ours, stream", "matrix product")


def make(folder, rows, dim, questions):
    """Normalised random vectors: fp16 shards and fp32 questions."""
    rng = np.random.default_rng(0)
    for i, start in enumerate(range(0, rows, SHARD)):
        x_nD = rng.standard_normal((min(SHARD, rows - start), dim), dtype=np.float32)
        np.save(
            folder / f"{i:05d}.npy", (x_nD / np.linalg.norm(x_nD, axis=1, keepdims=True)).astype(np.float16)
        )
    q_QD = rng.standard_normal((questions, dim), dtype=np.float32)
    np.save(folder / "questions.npy", q_QD / np.linalg.norm(q_QD, axis=1, keepdims=True))


def once(way, folder, k):
    """Time one way in this process: {"seconds", "cpu" (of all threads), "rows" (a checksum of the ids)}."""
    q_QD = np.load(folder / "questions.npy")
    shards = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("0*.npy"))]
    if way == "faiss as it comes":
        import faiss
    else:
        from utils.search import exact_topk, faiss
    if way == "matrix product":
        x_ND = np.concatenate(shards).astype(np.float32)
        out_QN = np.zeros(
            (len(q_QD), len(x_ND)), np.float32
        )  # why: its pages are touched before the clock runs
    rows_Qk = np.zeros(1, np.int64)
    wall, cpu = time.perf_counter(), time.process_time()
    if way == "ours, stream":
        rows_Qk = exact_topk(q_QD, shards, k)[1]
    elif way == "matrix product":
        np.matmul(q_QD, x_ND.T, out=out_QN)
    else:
        index = faiss.IndexFlatIP(q_QD.shape[1])
        for shard in shards:
            index.add(shard.astype(np.float32))
        rows_Qk = index.search(q_QD, k)[1]
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "rows": int(rows_Qk.sum())}


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("rows", 100_000), ("dim", 384), ("questions", 1000), ("k", 100), ("repeat", 5)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--way", choices=WAYS)  # used by this script itself, in its own processes
    options.add_argument("--folder", type=Path)
    args = options.parse_args()
    if args.way:
        print(json.dumps(once(args.way, args.folder, args.k)))
        return
    turns = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.rows, args.dim, args.questions)
        for _ in range(args.repeat):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", folder, "--k", str(args.k)]
                env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
                env["PYTHONPATH"] = str(ROOT)
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                turns[way].append(json.loads(done.stdout))
    print(
        f"{args.rows} x {args.dim}, {args.questions} questions, k = {args.k}, "
        f"n = {args.repeat}, {os.cpu_count()} cores"
    )
    print(f"{'way':22} {'seconds':>18} {'CPU seconds':>18} {'times ours':>18}")
    ours = turns["ours, stream"]
    for way, runs in turns.items():
        columns = [[run[key] for run in runs] for key in ("seconds", "cpu")]
        columns.append([run["seconds"] / mine["seconds"] for run, mine in zip(runs, ours, strict=True)])
        print(f"{way:22}", *(f"{np.median(c):6.2f} ({min(c):.2f}-{max(c):.2f})".rjust(18) for c in columns))
    if len({run["rows"] for way in WAYS[:3] for run in turns[way]}) > 1:
        print("the ids differ: near-ties, which float32 rounds either way")


if __name__ == "__main__":
    main()
