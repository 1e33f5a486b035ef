"""
Exact search over the embedding shards, in the memory of one block; utils/faiss_index.py has the indexes.

Whatever proposes the candidates (a matrix product, HNSW, IVF-PQ), their scores are computed again in float64
from the stored vectors and rounded to float32; ties go to the earlier row of the corpus. why: a matrix
product rounds the same vector differently at different places of a block (faiss-cpu: a third of the
entries), so twins would change places with the block size, the device or the number of questions.

Q questions · D dimensions · k results · K candidates, a few more than k · n rows of a block · N passages
"""

import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.plumbing.config import UserError

SPARE = 32  # candidates kept beyond k, so that rounding at the boundary of k is seen instead of guessed
TILE = 32  # passages whose best score decides whether any of them is looked at
PANEL = 2**22, 2**26  # scores in memory at a time, 4 bytes each: on a CPU, on a GPU
BLOCK = 2**15, 2**17  # passages widened to float32 at a time, likewise
CHUNK = 4096  # questions searched again at a time: 4096 x 32,768 scores are 0.5 GB


def name_blas_kernel(cpuinfo="/proc/cpuinfo"):
    """Name OpenBLAS's kernel by the processor's flags, before faiss is imported; a user's choice is kept."""
    # why: the OpenBLAS in the faiss-cpu wheel does not know every processor; its fallback was 5x slower
    if platform.machine() in ("x86_64", "AMD64") and Path(cpuinfo).is_file():
        flags = set(re.search(r"^flags\s*:(.*)|\Z", Path(cpuinfo).read_text(), re.M)[0].split())
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
        elif {"avx2", "fma"} <= flags:
            os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


name_blas_kernel()
import faiss  # noqa: E402  (after its kernel has a name)

# why: two hyper-threads on one core slow a matrix product down (faiss issue 2953: 58 s became 1 h 43)
ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if "OMP_NUM_THREADS" not in os.environ:
    faiss.omp_set_num_threads(min(psutil.cpu_count(logical=False) or ALLOWED, ALLOWED))


def exact_topk(queries_QD, shards, k, block=0, device="cpu", resident_ND=None):
    """
    The k passages of the largest inner product for every question, best first, ties in corpus order.

    queries_QD: numpy floats. shards: list of [n, D] numpy arrays (memory-mapped fp16 or fp32), corpus order.
    block: passages that are widened to float32 at a time; 0: BLOCK.
    resident_ND: a torch tensor of the same rows, searched where it lies instead of sending blocks to device.
    Returns (scores_Qk float32, rows_Qk int64), k = min(k, N): the same bits for any block, sharding, device.
    UserError for NaN, or a dimension that does not fit.
    Memory: a block, a panel of scores, and of every question 12 bytes for each of k + 32 that are kept and
    up to four times as many (and those of a panel) that were found since: 0.1 GB for 3,610 questions, k 100.
    """
    queries_QD, N = check(queries_QD, shards, k), sum(map(len, shards))
    Q, k, K = len(queries_QD), min(k, N), min(k + SPARE, N)
    if not Q:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    on = torch.device(device) if resident_ND is None else resident_ND.device
    gpu = on.type != "cpu"
    block = block or BLOCK[gpu]
    q_QD = torch.from_numpy(queries_QD).to(on)
    panel = max(1, PANEL[gpu] // Q // TILE) * TILE
    panel_nQ = q_QD.new_empty(min(panel, -(-min(block, N) // TILE) * TILE), Q)
    rough_QK, rows_QK = q_QD.new_full((Q, K), -np.inf), q_QD.new_full((Q, K), -1, dtype=torch.long)
    found, count_Q, seen, merged, floor_Q = [], rows_QK.new_zeros(Q), 0, 0, None
    for start, x_nD in blocks(shards, block, on, resident_ND):
        for x_pD in x_nD.split(len(panel_nQ)):
            scores_pQ = torch.mm(x_pD, q_QD.T, out=panel_nQ[: len(x_pD)])
            if floor_Q is None:
                q_h, at_h, score_h = _best(scores_pQ, min(K, len(x_pD)))
            else:
                whole_pQ = panel_nQ[: -(-len(x_pD) // TILE) * TILE]
                whole_pQ[len(x_pD) :] = -np.inf
                q_h, at_h, score_h = _better(whole_pQ, floor_Q)
            found.append((q_h, at_h + start, score_h))
            count_Q += torch.bincount(q_h, minlength=Q)
            start, seen = start + len(x_pD), seen + len(x_pD)
            # why not always: most of the work would be merging. As many rows again bring about K more
            if merged < K or seen >= 2 * merged or seen == N or count_Q.max() > 4 * K:
                rough_QK, rows_QK = _merge(rough_QK, rows_QK, found, count_Q)
                found, count_Q, merged = [], torch.zeros_like(count_Q), seen
                # trap: everything is "not under" NaN, and would be kept until the memory is full
                floor_Q = rough_QK.amin(1).nan_to_num(np.inf, np.inf, -np.inf) if seen >= K else None
    found = rough_QK.cpu().numpy(), rows_QK.cpu().numpy()
    return rescore(queries_QD, shards, k, *found, min(block, BLOCK[0]))


def _best(scores_nQ, k):
    """The k best scores of every question: (questions, rows, scores), flat."""
    score_kQ, at_kQ = scores_nQ.topk(k, dim=0)
    return torch.arange(scores_nQ.shape[1], device=at_kQ.device).repeat(k), at_kQ.ravel(), score_kQ.ravel()


def _better(scores_nQ, floor_Q):
    """
    The scores above the floor of their question: (questions, rows, scores), flat. why by tiles: after some
    thousands of passages few are better than the best so far; of most tiles only the maximum is looked at.
    """
    tiles_mTQ = scores_nQ.unflatten(0, (-1, TILE))
    # trap: NaN is not above anything, and must be found
    tile_m, q_m = (~(tiles_mTQ.amax(1) <= floor_Q)).nonzero(as_tuple=True)
    near_mT = tiles_mTQ[tile_m, :, q_m]
    m, at = (~(near_mT <= floor_Q[q_m, None])).nonzero(as_tuple=True)
    return q_m[m], tile_m[m] * TILE + at, near_mT[m, at]


def _merge(rough_QK, rows_QK, found, count_Q):
    """The K best of those kept and those found since, count_Q of each question: (scores, rows)."""
    q_h, row_h, score_h = (torch.cat(part) for part in zip(*found, strict=True))
    order_h = q_h.argsort(stable=True)
    q_h, row_h, score_h = q_h[order_h], row_h[order_h], score_h[order_h]
    # beside those kept, a place for each of its question
    first_Q = rough_QK.shape[1] + count_Q - count_Q.cumsum(0)
    place_h, room = first_Q[q_h] + torch.arange(len(q_h), device=q_h.device), (0, int(count_Q.max()))
    rough_QM, rows_QM = F.pad(rough_QK, room, value=-np.inf), F.pad(rows_QK, room, value=-1)
    rough_QM[q_h, place_h], rows_QM[q_h, place_h] = score_h, row_h
    rough_QK, best_QK = rough_QM.topk(rough_QK.shape[1], sorted=False)
    return rough_QK, rows_QM.gather(1, best_QK)


def as_lists(scores_Qk, rows_Qk):
    """
    Arrays of a search -> per question a list of (row, score), best first, without FAISS's -1 (not found).
    """
    pairs = zip(rows_Qk.tolist(), scores_Qk.tolist(), strict=True)
    return [[(row, score) for row, score in zip(*pair, strict=True) if row >= 0] for pair in pairs]


def check(queries_QD, shards, k):
    """The questions as contiguous float32; UserError when a search cannot be right."""
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    if k < 1 or not sum(map(len, shards)):
        raise UserError(f"k is {k} and there are {sum(map(len, shards))} passages; both must be at least 1")
    if queries_QD.shape[1] != shards[0].shape[1]:
        raise UserError(
            f"the questions have {queries_QD.shape[1]} dimensions, the passages {shards[0].shape[1]}; "
            "encode both with the two encoders of one training run"
        )
    for i in np.flatnonzero(~np.isfinite(queries_QD).all(1)):
        raise UserError(
            f"the vector of question {i} (from 0) holds NaN or infinity; leave it out, or check it"
        )
    return queries_QD


def blocks(shards, block, device, resident_ND=None):
    """Yield (first row, float32 tensor [n, D] on `device`), n <= block; the next one uses the same memory."""
    if resident_ND is not None:
        yield from ((at, resident_ND[at : at + block].float()) for at in range(0, len(resident_ND), block))
        return
    raw_bD = np.empty((min(block, max(map(len, shards))), shards[0].shape[1]), shards[0].dtype)
    raw_bD = torch.from_numpy(raw_bD)
    if device.type == "cuda":
        raw_bD = raw_bD.pin_memory()  # sent at the rate of the bus
    wide_bD = torch.empty(raw_bD.shape, device=device)
    done = 0
    with tqdm(total=sum(map(len, shards)), desc="passages", delay=5, leave=False, disable=None) as bar:
        for shard in shards:
            for at in range(0, len(shard), block):
                n = len(shard[at : at + block])
                raw_bD.numpy()[:n] = shard[at : at + block]
                # why torch: it widens fp16 15 times faster than numpy, and on a GPU after half as many bytes
                yield done, wide_bD[:n].copy_(raw_bD[:n].to(device))
                done += n
                bar.update(n)


def fetch(shards, rows):
    """[n, D] array of these corpus rows, in the stored type."""
    ends = np.cumsum([len(shard) for shard in shards])
    home = np.searchsorted(ends, rows, side="right")
    x_nD = np.empty((len(rows), shards[0].shape[1]), shards[0].dtype)
    for i in np.unique(home):
        x_nD[home == i] = shards[i][rows[home == i] - (ends[i] - len(shards[i]))]
    return x_nD


def _exact(x_knD, q_kD):
    """Inner products [k, n], summed in float64, as float32: the one definition of a score."""
    return np.einsum("knd,kd->kn", x_knD, q_kD.astype(np.float64)).astype(np.float32)


def rescore(queries_QD, shards, k, rough_QK, rows_QK, block, exact=True):
    """
    Candidates with the scores of any float32 arithmetic -> (scores_Qk, rows_Qk) by _exact and corpus order.
    exact: where the k-th score is so close to the last candidate's that rounding may have kept out a better
    passage or an earlier twin, the question is searched again, every row near the boundary by _exact.
    """
    Q, K, D, N = *rows_QK.shape, queries_QD.shape[1], sum(map(len, shards))
    scores_QK, longest_Q = np.zeros((Q, K), np.float32), np.zeros(Q)
    step = max(1, 2**18 // (K * D))  # questions at a time: 2 MB in float64 stay in a core's cache

    def rescore(at):
        part = slice(at, at + step)
        rows, where = np.unique(rows_QK[part], return_inverse=True)  # each row is read once, in file order
        x_qKD = fetch(shards, rows.clip(0))[where.reshape(rows_QK[part].shape)]
        x_qKD = torch.from_numpy(x_qKD).double()
        scores_QK[part] = _exact(x_qKD.numpy(), queries_QD[part])
        longest_Q[part] = torch.linalg.vector_norm(x_qKD, dim=2).amax(1)

    # numpy lets the others run meanwhile; beware: each of these threads brings torch's own for the widening
    with ThreadPoolExecutor(min(4, faiss.omp_get_max_threads())) as pool:
        list(pool.map(rescore, range(0, Q, step)))
    for row in rows_QK[~np.isfinite(scores_QK) | (exact & (rows_QK < 0))]:
        raise UserError(
            f"the vector of passage row {row} holds NaN or infinity; repeat doc2embedding.py --dtype float32"
            if row >= 0
            else "vectors of passages hold NaN; repeat doc2embedding.py"
        )
    scores_QK[rows_QK < 0] = -np.inf  # trap: list[-1] is the last passage
    order_Qk = np.lexsort((rows_QK, -scores_QK))[:, :k]
    scores_Qk, best_Qk = (np.take_along_axis(a_QK, order_Qk, 1) for a_QK in (scores_QK, rows_QK))
    if exact and K < N:
        # the bound on the rounding of a float32 sum of D products: D * 2^-24 * |question| * |passage|; it is
        # sqrt(D) times the usual error, which covers a passage longer than all candidates
        slack_Q = D * 2.0**-24 * np.linalg.norm(queries_QD, axis=1) * longest_Q
        floor_Q = scores_Qk[:, -1] - slack_Q
        unsure = np.flatnonzero(rough_QK.min(1) >= floor_Q)
        for part in (unsure[at : at + CHUNK] for at in range(0, len(unsure), CHUNK)):
            scores_Qk[part], best_Qk[part] = _rescan(queries_QD[part], shards, k, floor_Q[part], block)
    return scores_Qk, best_Qk


def _rescan(queries_QD, shards, k, floor_Q, block):
    """Top k by _exact of every row whose float32 score reaches the question's floor: (scores_Qk, rows_Qk)."""
    scores_Qk = np.full((len(queries_QD), k), -np.inf, np.float32)
    rows_Qk = np.zeros((len(queries_QD), k), np.int64)
    for start, x_nD in blocks(shards, block, torch.device("cpu")):
        for i, rough_n in enumerate(queries_QD @ x_nD.numpy().T):
            near = np.flatnonzero(rough_n >= floor_Q[i])
            near_1nD = x_nD.numpy()[None, near].astype(np.float64)
            scores = np.append(scores_Qk[i], _exact(near_1nD, queries_QD[i : i + 1])[0])
            rows = np.append(rows_Qk[i], near + start)
            order = np.lexsort((rows, -scores))[:k]
            scores_Qk[i], rows_Qk[i] = scores[order], rows[order]
    return scores_Qk, rows_Qk
