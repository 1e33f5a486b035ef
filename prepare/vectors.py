"""
Vectors of other programs become our embeddings folder: pickles of DPR, GC-DPR, ANCE-Tele; nanoDPR's .npy.

A pickle can run any program. Here it may only build lists, texts, numbers and numpy arrays.
"""

import pickle
import re
import warnings
from pathlib import Path

import numpy as np

from utils.data import Corpus
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import finish_folder, write_shard
from utils.plumbing.files import atomic_folder

SHARD_SIZE = 65536  # passages in one of our files, as in config/doc2embedding.yaml
NUMPY = {"_reconstruct", "scalar", "_frombuffer", "ndarray", "dtype"}  # what the pickle of an array names
MODULES = {
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
}


class ArraysOnly(pickle.Unpickler):
    """Unpickle numpy arrays in plain lists and tuples. UnpicklingError for any other class or function."""

    def find_class(self, module, name):
        # why encode: an array pickled by protocol 2 is a text that this function makes bytes of
        allowed = module in MODULES and name in NUMPY or (module, name) == ("_codecs", "encode")
        if not allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run a program")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(path):
    """Return (vectors [n, D], ids) of DPR's list of (id, vector), or of Tevatron's pair (vectors, ids)."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            value = ArraysOnly(file).load()
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], np.ndarray):
            vectors, ids = value
        else:
            ids, vectors = zip(*value, strict=True)
            vectors = np.stack(vectors)
        # trap: a pickle can build an object array, and any error while it is read
        if len(vectors) != len(ids):
            raise ValueError(f"{len(vectors)} vectors, {len(ids)} ids")
        return vectors, [str(pid) for pid in ids]
    except (pickle.UnpicklingError, EOFError, ImportError, ArithmeticError, LookupError) as error:
        raise UserError(f"{path}: is no pickle of (id, vector) pairs: {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no pickle of (id, vector) pairs: {error}") from None


def read_vectors(path, corpus, start):
    """Return the vectors of a file, [n, D], which are those of the passages from row `start` on."""
    with open(path, "rb") as file:
        is_npy = file.read(6) == b"\x93NUMPY"
    if is_npy:
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path}: is not a whole .npy file ({error})") from None
        ids = []
    else:
        vectors, ids = read_pickle(path)
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32, np.float64):
        raise UserError(f"{path}: expected numbers [n, D], got {vectors.dtype} {list(vectors.shape)}")
    if start + len(vectors) > len(corpus):
        raise UserError(f"{path}: its last vectors are beyond the {len(corpus)} passages of {corpus.path}")

    # the ids must be the corpus's, in its order. why the end: DPR puts `wiki:` before every id
    for row, pid in enumerate(ids, start):
        wanted = corpus[row].id
        if pid not in (wanted, f"wiki:{wanted}"):
            where = f"vector {row - start} is of {pid!r}, passage {row} of {corpus.path} is {wanted!r}"
            raise UserError(f"{path}: {where}; name all files, and the corpus that was encoded")
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: a vector holds NaN or infinity; encode again")
    return vectors


def by_number(path):
    """Return the sort key that puts shard_10 after shard_9; a shell's * puts it after shard_1."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [int(part) if part.isdigit() else part for part in parts]


def from_vectors(*paths):
    """
    Write files of vectors as an embeddings folder. paths: the files of all shards, the corpus, the folder.

    The files are read in the order of the numbers in their names. Pickles name each passage, which is
    checked; of .npy files only the number of rows can be. The encoder is not known: `encoder` is "".
    """
    *files, corpus, folder = paths
    corpus = Corpus(corpus)
    if Path(folder).exists():
        raise UserError(f"{folder}: is there already; delete it, or name another folder")
    files = sorted(files, key=by_number)
    print("in this order: " + ", ".join(Path(file).name for file in files))

    with atomic_folder(folder) as building:
        waiting = []  # arrays that are not yet written
        rows = 0
        shards = []
        form = None

        def write(size):
            rest = np.concatenate(waiting)
            file = building / f"{len(shards):05d}.npy"
            write_shard(file, rest[:size], 0)
            shards.append(file)
            waiting[:] = [rest[size:]]

        # cut what they hold into our shards
        for path in files:
            vectors = read_vectors(path, corpus, rows)
            dtype = np.float16 if vectors.dtype == np.float16 else np.float32
            form = form or (vectors.shape[1], dtype)
            if form != (vectors.shape[1], dtype):
                raise UserError(
                    f"{path}: holds {vectors.shape[1]} x {vectors.dtype}, unlike the files before it"
                )
            for begin in range(0, len(vectors), SHARD_SIZE):
                waiting.append(vectors[begin : begin + SHARD_SIZE].astype(dtype))
                while sum(map(len, waiting)) >= SHARD_SIZE:
                    write(SHARD_SIZE)
            rows += len(vectors)
        if rows != len(corpus):
            raise UserError(f"{files[-1]}: {rows} vectors in all, {corpus.path} has {len(corpus)} passages")
        if sum(map(len, waiting)):
            write(sum(map(len, waiting)))

        dim, dtype = form
        manifest = {"rows": rows, "dim": dim, "dtype": np.dtype(dtype).name, "shard_size": SHARD_SIZE}
        manifest |= {"role": "passage", "corpus": corpus.sha256, "encoder": "", "pair": ""}
        note = "made by another program, encoder unknown: search with the question encoder of the same model"
        finish_folder(building, manifest | {"note": note}, shards, corpus)
