"""
Exact search side by side, in turns in one process.

    ours           utils.search.exact_topk
    IndexFlatIP    FAISS's flat index: all vectors in memory in float32, added before the clock runs

Run: python tests/bench/bench_search.py --rows 100000 1000000 --dim 384 768 --questions 1 32 3610 --k 100

The vectors are random, of length 1, in fp16 shards in memory. The results of the flat index may differ from
ours in near-ties, as float32 rounds. Two more ways were compared with commit ced5a49.
FAISS works with the OpenBLAS kernel that utils/plumbing/faiss_setup.py names.
A line for every combination of rows, dimensions and questions: the seconds of each, median (range).
"""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.harness import parser, spread, take_turns  # noqa: E402
from utils.search import exact_topk, faiss  # noqa: E402

SHARD = 50_000


def unit_vectors(rng, rows, dim):
    """Random vectors of length 1: float32 [rows, dim]."""
    x_nD = rng.standard_normal((rows, dim), dtype=np.float32)
    return x_nD / np.linalg.norm(x_nD, axis=1, keepdims=True)


def compare(shards, index, q_QD, args):
    """Return {way: seconds of every turn} on one size."""
    ways = {"ours": partial(exact_topk, q_QD, shards, args.k)}
    ways["IndexFlatIP"] = partial(index.search, q_QD, min(args.k, index.ntotal))
    results = {name: way() for name, way in ways.items()}  # it also warms up
    _, rows_Qk = results["ours"]
    assert (results["IndexFlatIP"][1] == rows_Qk).mean() > 0.99, "the flat index found other passages"
    return take_turns(ways, args.repeat, warm_up=0)


def main():
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[100_000])
    options.add_argument("--dim", type=int, nargs="+", default=[384])
    options.add_argument("--questions", type=int, nargs="+", default=[1, 32, 1000])
    options.add_argument("--k", type=int, default=100)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    print(f"k = {args.k}, n = {args.repeat}, OpenBLAS kernel {os.environ.get('OPENBLAS_CORETYPE')}")
    rng = np.random.default_rng(0)
    for N in args.rows:
        for D in args.dim:
            index = faiss.IndexFlatIP(D)
            shards = []
            for start in range(0, N, SHARD):
                shard = unit_vectors(rng, min(SHARD, N - start), D).astype(np.float16)
                index.add(shard.astype(np.float32))
                shards.append(shard)
            for Q in args.questions:
                seconds = compare(shards, index, unit_vectors(rng, Q, D), args)
                columns = " | ".join(f"{name} {spread(spent, 3)}" for name, spent in seconds.items())
                print(f"N {N} D {D} Q {Q} threads {args.threads}: {columns}", flush=True)


if __name__ == "__main__":
    main()
