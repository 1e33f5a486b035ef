"""
Exact search side by side: FAISS's flat index as its wheel comes, the same with OpenBLAS's kernel named, ours
from fp16 shards on disk, the bare matrix product that none of them can beat, and the peak of the machine.

Run: python tests/bench/bench_search.py --rows 100000 1000000 --dim 384 768 --questions 1 32 3610 --k 100

Every combination of --rows, --dim and --questions, n rounds each. Each way is a fresh process (OpenBLAS
chooses its kernel when it is loaded), in turn, so that a busy machine hurts all alike. A way's time is what
a user waits for once the vectors are on disk: reading, adding, searching; the product has its matrices in
memory, and keeps the scores of one block of passages at a time.
"GEMM peak" is the time that 2 * questions * passages * dim FLOP would take at the rate of torch.mm on square
float32 matrices, measured in the same round. With one question no way comes near: every number of the corpus
is then read for two operations, and the memory is the limit.

Printed: seconds, CPU seconds, the ratio to ours within the same turn (median, range), and the most memory
that a way had beyond its imports and questions (median): resident memory, and of that what is not a file's.
Ours reads mapped files, whose pages count as resident until the system wants them back. Sampled 100 times a
second, on Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARD = 25_000
BLOCK = 16_384  # passages whose scores the bare product keeps: 3,610 x 1,000,000 would be 14 GB
WAYS = ("faiss as it comes", "faiss, kernel named", "ours, stream", "matrix product", "GEMM peak")


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


class Memory(threading.Thread):
    """The most memory of this process between start() and stop(), beyond what it had before: [MB, MB]."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.ended = self.now(), threading.Event()
        self.most = self.before

    def now(self):
        """Resident memory, and of that what is not a file's."""
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":") for line in lines if line.startswith(("VmRSS", "RssAnon")))
        return [int(sizes[key].split()[0]) / 1024 for key in ("VmRSS", "RssAnon")]

    def run(self):
        while not self.ended.wait(0.01):
            self.most = list(map(max, self.most, self.now()))

    def stop(self):
        self.ended.set()
        self.join()
        self.most = list(map(max, self.most, self.now()))
        return [most - before for most, before in zip(self.most, self.before, strict=True)]


def peak_rate():
    """FLOP per second of torch.mm, 2048 x 2048 in float32, all threads; half a second after a warm-up."""
    import torch

    a_nn, b_nn, out_nn = (torch.randn(2048, 2048) for _ in range(3))
    torch.mm(a_nn, b_nn, out=out_nn)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.5:
        torch.mm(a_nn, b_nn, out=out_nn)
        count += 2 * 2048**3
    return count / (time.perf_counter() - began), count / (time.process_time() - cpu)


def once(way, folder, k):
    """
    Time one way in this process: {"seconds", "cpu" (of all threads), "memory", "private" (MB, see above),
    "rows" (a checksum of the ids)}.
    """
    q_QD = np.load(folder / "questions.npy")
    shards = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("0*.npy"))]
    if way == "GEMM peak":
        flop = 2 * len(q_QD) * sum(map(len, shards)) * q_QD.shape[1]
        wall, cpu = peak_rate()
        return {"seconds": flop / wall, "cpu": flop / cpu, "memory": 0, "private": 0, "rows": 0}
    if way == "faiss as it comes":
        import faiss
    else:
        from utils.search import exact_topk, faiss
    memory = Memory()
    if way == "matrix product":
        x_ND = np.empty((sum(map(len, shards)), q_QD.shape[1]), np.float32)
        np.concatenate(shards, out=x_ND)
        # why: its pages are touched before the clock runs
        out_Qn = np.ones((len(q_QD), min(BLOCK, len(x_ND))), np.float32)
    memory.start()
    rows_Qk = np.zeros(1, np.int64)
    wall, cpu = time.perf_counter(), time.process_time()
    if way == "ours, stream":
        rows_Qk = exact_topk(q_QD, shards, k)[1]
    elif way == "matrix product":
        for start in range(0, len(x_ND), BLOCK):
            x_nD = x_ND[start : start + BLOCK]
            np.matmul(q_QD, x_nD.T, out=out_Qn[:, : len(x_nD)])
    else:
        index = faiss.IndexFlatIP(q_QD.shape[1])
        for shard in shards:
            index.add(shard.astype(np.float32))
        rows_Qk = index.search(q_QD, k)[1]
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    resident, private = memory.stop()
    spent = {"seconds": seconds, "cpu": cpu, "memory": resident, "private": private}
    return spent | {"rows": int(rows_Qk.sum())}


def compare(rows, dim, questions, k, repeat):
    """All ways on one size, `repeat` rounds; prints its table."""
    turns = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), rows, dim, questions)
        for _ in range(repeat):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", folder, "--k", str(k)]
                env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
                env["PYTHONPATH"] = str(ROOT)
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"error: {way} ended with {done.returncode}; its message is above")
                turns[way].append(json.loads(done.stdout))
    threads = os.environ.get("OMP_NUM_THREADS", f"all of {os.cpu_count()}")
    print(f"\n{rows} x {dim}, {questions} questions, k = {k}, n = {repeat}, {threads} threads")
    print(
        f"{'way':20} {'seconds':>24} {'CPU seconds':>24} {'times ours':>24} {'more MB':>8} {'not files':>9}"
    )
    ours = turns["ours, stream"]
    for way, runs in turns.items():
        columns = [[run[key] for run in runs] for key in ("seconds", "cpu")]
        columns.append([run["seconds"] / mine["seconds"] for run, mine in zip(runs, ours, strict=True)])
        text = [f"{np.median(c):.3g} ({min(c):.3g}-{max(c):.3g})".rjust(24) for c in columns]
        memory = [np.median([run[key] for run in runs]) for key in ("memory", "private")]
        print(f"{way:20}", *text, f"{memory[0]:8.0f} {memory[1]:9.0f}", flush=True)
    if len({run["rows"] for way in WAYS[:3] for run in turns[way]}) > 1:
        print("the ids differ: near-ties, which float32 rounds either way")


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, nargs="+", default=[100_000])
    options.add_argument("--dim", type=int, nargs="+", default=[384])
    options.add_argument("--questions", type=int, nargs="+", default=[1000])
    options.add_argument("--k", type=int, default=100)
    options.add_argument("--repeat", type=int, default=5)
    options.add_argument("--way", choices=WAYS)  # used by this script itself, in its own processes
    options.add_argument("--folder", type=Path)
    args = options.parse_args()
    if args.way:
        print(json.dumps(once(args.way, args.folder, args.k)))
        return
    for rows in args.rows:
        for dim in args.dim:
            for questions in args.questions:
                compare(rows, dim, questions, args.k, args.repeat)


if __name__ == "__main__":
    main()
