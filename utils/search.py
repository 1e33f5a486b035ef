"""
Search: which passages have the largest inner product with a question?

`exact_topk` reads every vector. Its method is one line of `best_of_block`, a product and a topk; all else
keeps the order exact and the memory at one block. `build_index` and `search_index` use a FAISS
index of any factory string: Flat (all vectors), HNSW32 (a graph of neighbours), "IVF4096,PQ48" (a few of 4096
clusters, a vector in 48 bytes) ... Both only propose candidates, a few more than k. The scores of candidates
are computed again in float64 from the stored vectors, and rounded to float32; ties go to the earlier row.
why: a matrix product rounds the same vector differently at different places of a block (faiss-cpu: a third of
the entries), so twins would change places with the block size, the device or the number of questions.

Q questions, q of them at a time · D dimensions · k results · K candidates · n rows of a block · N passages
"""

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

from utils.plumbing.config import UserError
from utils.plumbing.faiss_setup import faiss
from utils.plumbing.files import atomic_file, read_json, sha256, write_json

# candidates beyond k: the order is right for up to so many passages whose scores are equal at the cut
SPARE = 32
BLOCK = 2**15  # passages widened to float32 at a time
MANY = 256  # questions from which on FAISS's knn is faster on a CPU than a product and topk


# ---------------------------------------------------------------- exact search, without an index
def exact_topk(queries_QD, shards, k, block=0, device="cpu", resident_ND=None):
    """
    Find the k passages of the largest inner product for every question, best first, ties in corpus order.

    queries_QD: numpy floats. shards: list of [n, D] numpy arrays (memory-mapped fp16 or fp32), corpus order.
    block: passages that are widened to float32 at a time; 0: BLOCK. resident_ND: a torch tensor of the same
    rows, searched where it lies instead of sending blocks to `device`. Returns (scores_Qk float32, rows_Qk
    int64), numpy, k = min(k, N): the same for any block, sharding and device, if at most SPARE passages have
    equal scores at the cut. UserError for NaN or infinity, or a dimension that does not fit.
    """
    queries_QD = checked_queries(queries_QD, shards, k)
    N = sum(map(len, shards))
    Q = len(queries_QD)
    if not Q:
        return np.zeros((0, min(k, N)), np.float32), np.zeros((0, min(k, N)), np.int64)
    K = min(k + SPARE, N)
    k = min(k, N)
    device = torch.device(device) if resident_ND is None else resident_ND.device
    q_QD = torch.from_numpy(queries_QD).to(device)
    best_QK = q_QD.new_empty(Q, 0)
    rows_QK = q_QD.new_empty(Q, 0, dtype=torch.long)
    for start, x_nD in blocks(shards, block or BLOCK, device, resident_ND):
        refuse_non_finite(x_nD, range(start, start + len(x_nD)))
        # the best of this block, then the best of it and of all blocks before (M of them)
        scores_QK, places_QK = best_of_block(q_QD, x_nD, K)
        scores_QM = torch.cat([best_QK, scores_QK], 1)
        rows_QM = torch.cat([rows_QK, places_QK + start], 1)
        best_QK, order_QK = scores_QM.topk(min(K, scores_QM.shape[1]))
        rows_QK = rows_QM.gather(1, order_QK)
    return rescore(queries_QD, shards, rows_QK.cpu().numpy(), k)


def best_of_block(q_QD, x_nD, K):
    """Return the K best scores of each question in a block, and their places in it."""
    K = min(K, len(x_nD))
    if x_nD.device.type == "cpu" and len(q_QD) >= MANY:
        scores_QK, places_QK = faiss.knn(q_QD.numpy(), x_nD.numpy(), K, faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores_QK), torch.from_numpy(places_QK)
    scores = []
    places = []
    for q_qD in q_QD.split(1024):  # some questions at a time, to bound the memory of their scores
        scores_qK, places_qK = (q_qD @ x_nD.T).topk(K)
        scores.append(scores_qK)
        places.append(places_qK)
    return torch.cat(scores), torch.cat(places)


def refuse_non_finite(x_nD, rows):
    """UserError that names the first of `rows`, whose vectors x_nD are, that holds NaN or infinity."""
    # trap: a search does not find such a passage, and says nothing
    if not torch.isfinite(x_nD.sum()):
        for i in (~torch.isfinite(x_nD).all(1)).nonzero()[:, 0].tolist():
            message = f"the vector of passage row {rows[i]} holds NaN or infinity"
            raise UserError(f"{message}; repeat doc2embedding.py --dtype float32")


def rescore(queries_QD, shards, rows_QK, k):
    """
    Turn candidates into results: (scores_Qk, rows_Qk) by inner products in float64, ties in corpus order.

    rows_QK: -1 means "nothing found"; it scores -inf and comes last.
    """
    K = rows_QK.shape[1]
    D = queries_QD.shape[1]
    rows_QK = np.sort(rows_QK)  # in corpus order, which a stable sort keeps for equal scores
    scores_QK = np.empty(rows_QK.shape, np.float32)
    questions = max(1, 2**18 // max(1, K * D))  # at a time: 2 MB in float64 stay in a core's cache
    for first in range(0, len(rows_QK), questions):
        part = slice(first, first + questions)
        # each row is read once, in file order
        rows, places = np.unique(rows_QK[part], return_inverse=True)
        x_qKD = fetch(shards, rows.clip(0))[places.reshape(rows_QK[part].shape)]
        x_qKD = torch.from_numpy(x_qKD).double().numpy()  # why torch: 15 times faster than numpy for fp16
        q_qD = queries_QD[part].astype(np.float64)
        scores_QK[part] = np.einsum("qkd,qd->qk", x_qKD, q_qD)

    scores_QK[rows_QK < 0] = -np.inf  # trap: list[-1] is the last passage
    order_Qk = np.argsort(-scores_QK, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QK, order_Qk, 1), np.take_along_axis(rows_QK, order_Qk, 1)


def as_lists(scores_Qk, rows_Qk):
    """Turn the arrays of a search into a list of (row, score) a question, best first, without FAISS's -1."""
    results = []
    if scores_Qk.size > len(scores_Qk) and (scores_Qk[:, 0] == scores_Qk[:, -1]).all():
        print("warning: all scores are equal, so the ranking means nothing", file=sys.stderr)
    for scores, rows in zip(scores_Qk.tolist(), rows_Qk.tolist(), strict=True):
        results.append([(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0])
    return results


def checked_queries(queries_QD, shards, k):
    """Return the queries as contiguous float32. UserError when they cannot be searched for."""
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    if k < 1:
        raise UserError(f"k is {k}: it must be at least 1")
    if queries_QD.shape[1] != shards[0].shape[1]:
        raise UserError(
            f"the questions have {queries_QD.shape[1]} dimensions, the passages {shards[0].shape[1]}; "
            "encode both with the two encoders of one training run"
        )
    strange = np.flatnonzero(~np.isfinite(queries_QD).all(1))
    if len(strange):
        fault = f"the vector of question {strange[0]} (from 0) holds NaN or infinity"
        raise UserError(f"{fault}; leave it out, or check it")
    return queries_QD


def blocks(shards, block, device, resident_ND=None):
    """Yield (first row, float32 tensor [n, D] on `device`), n <= block; the next one uses the same memory."""
    if resident_ND is not None:
        for start in range(0, len(resident_ND), block):
            yield start, resident_ND[start : start + block].float()
        return
    raw_nD = np.empty((min(block, max(map(len, shards))), shards[0].shape[1]), shards[0].dtype)
    raw_nD = torch.from_numpy(raw_nD)
    if device.type == "cuda":
        raw_nD = raw_nD.pin_memory()  # sent at the rate of the bus
    wide_nD = torch.empty(raw_nD.shape, device=device)
    start = 0
    with tqdm(total=sum(map(len, shards)), desc="passages", delay=5, leave=False, disable=None) as bar:
        for shard in shards:
            for first in range(0, len(shard), block):
                n = len(shard[first : first + block])
                raw_nD.numpy()[:n] = shard[first : first + block]
                # why torch: it widens fp16 15 times faster than numpy, and on a GPU after half as many bytes
                yield start, wide_nD[:n].copy_(raw_nD[:n].to(device))
                start += n
                bar.update(n)


def fetch(shards, rows):
    """Return the [n, D] array of these corpus rows, in the stored type."""
    ends = np.cumsum([len(shard) for shard in shards])
    home = np.searchsorted(ends, rows, side="right")
    x_nD = np.empty((len(rows), shards[0].shape[1]), shards[0].dtype)
    for i in np.unique(home):
        begin = ends[i] - len(shards[i])
        x_nD[home == i] = shards[i][rows[home == i] - begin]
    return x_nD


# ---------------------------------------------------------------- FAISS's indexes
def build_index(factory, shards, folder, embeddings, nprobe=64, ef_search=128):
    """
    Return the FAISS index over the shards, by inner product.

    It is saved in `folder` next to its sha256 and `embeddings` (a hash that names the shards), and read again
    only while both match. why: FAISS loads a flipped bit without a word. Flat stays in memory. With faiss-gpu
    the index is copied to all GPUs. UserError: not enough vectors to train, or memory for Flat, or no such
    index.

    nprobe: IVF lists, ef_search: HNSW candidates that a search visits; more is slower and nearer to exact.
    """
    N = sum(map(len, shards))
    dim = shards[0].shape[1]
    need = 4 * N * dim / 1e9
    free = psutil.virtual_memory().available / 1e9
    if factory == "Flat" and need > free:
        raise UserError(f"index Flat needs {need:.1f} GB, {free:.1f} GB are free; use index stream")
    path = Path(folder) / (re.sub(r"[^\w,.-]", "_", factory) + ".faiss")
    stamp = path.with_suffix(".json")
    saved = {}
    with contextlib.suppress(UserError):  # no note, or a damaged one
        saved = read_json(stamp) if path.is_file() else {}
    if saved and saved == {"factory": factory, "embeddings": embeddings, "sha256": sha256(path)}:
        index = faiss.read_index(str(path))
    else:
        if path.is_file():
            print(f"{path}: damaged, or made from other embeddings; building it again", flush=True)
        index = fill_index(factory, shards)
        if factory != "Flat":
            with atomic_file(path, "wb") as file:
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            write_json(stamp, {"factory": factory, "embeddings": embeddings, "sha256": sha256(path)})
    for name, value, kind in (("nprobe", nprobe, "IVF"), ("efSearch", ef_search, "HNSW")):
        if kind in factory:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() and "HNSW" not in factory else index


def fill_index(factory, shards):
    """Return a new index, trained where it needs that, with every row added."""
    N = sum(map(len, shards))
    dim = shards[0].shape[1]
    try:
        # trap: without the metric, every factory string means L2
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if "HNSW" in factory:  # from: DPR dpr/indexer/faiss_indexers.py; FAISS's own number is 40
            faiss.ParameterSpace().set_index_parameter(index, "efConstruction", 200)
        if not index.is_trained:
            lists = max(map(int, re.findall(r"IVF(\d+)", factory)), default=0)
            if N < 39 * lists:  # from: FAISS's ClusteringParameters.min_points_per_centroid
                few = f"{N} vectors are few to train {lists} lists, {39 * lists} would do"
                print(f"warning: index {factory}: {few}; stream and HNSW32 need no training", file=sys.stderr)
            # FAISS uses 256 for each centroid, and a PQ has 256 centroids
            sample = np.linspace(0, N - 1, min(N, 256 * max(256, lists))).astype(np.int64)
            x_nD = fetch(shards, sample).astype(np.float32)
            refuse_non_finite(torch.from_numpy(x_nD), sample)
            index.train(x_nD)
        for start, x_nD in blocks(shards, BLOCK, torch.device("cpu")):
            refuse_non_finite(x_nD, range(start, start + len(x_nD)))
            index.add(x_nD.numpy())
        index.search(x_nD[:1].numpy(), 1)  # trap: some kinds fail only here
    except RuntimeError as error:
        few = re.search(r"number of clusters \((\d+)\)", str(error))
        if few:
            message = (
                f"index {factory}: need at least {few[1]} vectors to train it, there are {N}; use stream"
            )
            raise UserError(message) from None
        raise UserError(
            f"index {factory!r}: not an inner-product index that FAISS can fill "
            f"({str(error).split(': ')[-1]}); use stream, Flat, HNSW32, 'IVF4096,PQ48' ..."
        ) from None
    return index


def search_index(index, queries_QD, shards, k):
    """
    Search with candidates from `index`, scores and order from the vectors: a list of (row, score) a question,
    best first. It has min(k, N) entries, fewer where the index found fewer (FAISS's id -1).
    """
    queries_QD = checked_queries(queries_QD, shards, k)
    if not len(queries_QD):
        return []
    _, rows_QK = index.search(queries_QD, min(k + SPARE, index.ntotal))
    short = int(((rows_QK >= 0).sum(1) < min(k, index.ntotal)).sum())
    if short:
        fewer = f"the index found fewer than {k} passages for {short} of {len(rows_QK)} questions"
        print(f"warning: {fewer}: raise nprobe (IVF) or ef_search (HNSW), or use stream", file=sys.stderr)
    return as_lists(*rescore(queries_QD, shards, rows_QK, k))
