"""
Exact search side by side, in turns in one process.

    ours           utils.search.exact_topk
    IndexFlatIP    FAISS's flat index: all vectors in memory in float32, added before the clock runs
    knn            FAISS's knn on each block, merged by its ResultHeap
    torch.topk     a matrix product and torch.topk on each block

Run: python tests/bench/bench_search.py --rows 100000 1000000 --dim 384 768 --questions 1 32 3610 --k 100

The vectors are random, of length 1, in fp16 shards in memory. All but the flat index read them block by
block, propose a few candidates more than k, and compute these again in float64 (utils.search.rescore): their
results must have the bits of ours. Those of the flat index may differ in near-ties, as float32 rounds.
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
from utils.search import BLOCK, SPARE, blocks, exact_topk, faiss, rescore  # noqa: E402

SHARD = 50_000
CPU = torch.device("cpu")


def unit_vectors(rng, rows, dim):
    """Random vectors of length 1: float32 [rows, dim]."""
    x_nD = rng.standard_normal((rows, dim), dtype=np.float32)
    return x_nD / np.linalg.norm(x_nD, axis=1, keepdims=True)


def by_knn(q_QD, shards, k):
    """FAISS's knn on each block, and one heap."""
    K = min(k + SPARE, sum(map(len, shards)))
    heap = faiss.ResultHeap(len(q_QD), K, keep_max=True)
    for start, x_nD in blocks(shards, BLOCK, CPU):
        metric = faiss.METRIC_INNER_PRODUCT
        scores_Qk, places_Qk = faiss.knn(q_QD, x_nD.numpy(), min(K, len(x_nD)), metric)
        heap.add_result(scores_Qk, places_Qk + start)
    heap.finalize()
    return rescore(q_QD, shards, heap.I, k)


def by_topk(q_QD, shards, k):
    """torch.topk on each block, and on the best of it and of all blocks before."""
    questions_QD = torch.from_numpy(q_QD)
    K = min(k + SPARE, sum(map(len, shards)))
    best_QK = torch.empty(len(q_QD), 0)
    rows_QK = torch.empty(len(q_QD), 0, dtype=torch.long)
    for start, x_nD in blocks(shards, BLOCK, CPU):
        scores_Qk, places_Qk = (questions_QD @ x_nD.T).topk(min(K, len(x_nD)))
        best_QM = torch.cat([best_QK, scores_Qk], 1)
        rows_QM = torch.cat([rows_QK, places_Qk + start], 1)
        best_QK, order_QK = best_QM.topk(min(K, best_QM.shape[1]))
        rows_QK = rows_QM.gather(1, order_QK)
    return rescore(q_QD, shards, rows_QK.numpy(), k)


def compare(shards, index, q_QD, args):
    """Return {way: seconds of every turn} on one size."""

    def flat(q_QD, shards, k):
        return index.search(q_QD, min(k, index.ntotal))

    ways = {"ours": exact_topk, "IndexFlatIP": flat, "knn": by_knn, "torch.topk": by_topk}
    ways = {name: partial(way, q_QD, shards, args.k) for name, way in ways.items()}
    results = {name: way() for name, way in ways.items()}  # it also warms up
    scores_Qk, rows_Qk = results["ours"]
    for name in ("knn", "torch.topk"):
        assert np.array_equal(results[name][0], scores_Qk), f"{name} has other scores"
        assert np.array_equal(results[name][1], rows_Qk), f"{name} found other passages"
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
