"""
Search through a FAISS index of any factory string: Flat, HNSW32, "IVF4096,PQ48" ... always by inner product.

The index proposes candidates (a few more than k); their scores and order come from the stored vectors
(utils/search.py), so a score is an inner product for every index, and twins stay in corpus order.
"""

import re
from pathlib import Path

import numpy as np
import psutil
import torch

from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file, read_json, sha256, write_json
from utils.search import SPARE, as_lists, blocks, check, faiss, fetch, rescore

BLOCK = 16384


def build_index(factory, shards, folder, embeddings, nprobe=64, ef_search=128):
    """
    The FAISS index over the shards. It is saved in `folder` beside its sha256 and `embeddings` (a hash that
    names the shards), and read again only while both match. why: FAISS loads a flipped bit without a word.
    Flat stays in memory. With faiss-gpu the index is copied to all GPUs. UserError: not enough vectors to
    train, or memory for Flat, or no such index.

    nprobe: IVF lists, ef_search: HNSW candidates that a search visits; more is slower and nearer to exact.
    """
    N, dim = sum(map(len, shards)), shards[0].shape[1]
    need, free = 4 * N * dim, psutil.virtual_memory().available
    if factory == "Flat" and need > free:
        raise UserError(
            f"index Flat needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use index stream"
        )
    path = Path(folder) / (re.sub(r"[^\w,.-]", "_", factory) + ".faiss")
    stamp = path.with_suffix(".json")
    saved = read_json(stamp) if stamp.is_file() and path.is_file() else {}
    if saved and saved == {"factory": factory, "embeddings": embeddings, "sha256": sha256(path)}:
        index = faiss.read_index(str(path))
    else:
        if saved:
            print(f"{path}: damaged, or made from other embeddings; building it again", flush=True)
        index = _filled(factory, shards)
        if factory != "Flat":
            with atomic_file(path, "wb") as file:
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            write_json(stamp, {"factory": factory, "embeddings": embeddings, "sha256": sha256(path)})
    for name, value, kind in (("nprobe", nprobe, "IVF"), ("efSearch", ef_search, "HNSW")):
        if kind in factory:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
    return faiss.index_cpu_to_all_gpus(index) if faiss.get_num_gpus() and "HNSW" not in factory else index


def _filled(factory, shards):
    """A new index, trained where it needs that, with every row added."""
    N, dim = sum(map(len, shards)), shards[0].shape[1]
    try:
        # trap: without the metric, every factory string means L2
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            centroids = max(256, *map(int, re.findall(r"IVF(\d+)", factory)), 0)
            sample = np.linspace(0, N - 1, min(N, 256 * centroids)).astype(
                np.int64
            )  # FAISS uses 256 for each
            index.train(fetch(shards, sample).astype(np.float32))
    except RuntimeError as error:
        few = re.search(r"number of clusters \((\d+)\)", str(error))
        if few:
            raise UserError(
                f"index {factory}: need at least {few[1]} vectors to train it, there are {N}; use stream"
            ) from None
        raise UserError(
            f"index {factory!r}: not an inner-product index of FAISS ({str(error).split(': ')[-1]}); "
            "use stream, Flat, HNSW32, 'IVF4096,PQ48' ..."
        ) from None
    for _, x_nD in blocks(shards, BLOCK, torch.device("cpu")):
        index.add(x_nD.numpy())
    return index


def search_index(index, queries_QD, shards, k, exact=False):
    """
    Candidates from `index`, scores and order from the vectors: per question a list of (row, score), best
    first. It has min(k, N) entries, fewer where the index found fewer (FAISS's id -1). exact: True for Flat,
    so that ties at the boundary of k are settled as in exact_topk.
    """
    queries_QD, K = check(queries_QD, shards, k), min(k + SPARE, index.ntotal)
    if not len(queries_QD):
        return []
    scores_Qk, rows_Qk = rescore(queries_QD, shards, k, *index.search(queries_QD, K), BLOCK, exact)
    return as_lists(scores_Qk, rows_Qk)
