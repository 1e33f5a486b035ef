"""
The folder of vectors: 00000.npy, 00001.npy ... and manifest.json; who may read it, and who may go on writing
it.

A shard is whole or absent, and stands under its name only after its sha256 was noted in 00000.json beside it;
the manifest collects these at the end. Vectors of another model, corpus or setting are never mixed or
searched.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.distributed import world
from utils.plumbing.config import UserError
from utils.plumbing.files import read_json, sha256
from utils.plumbing.weights import pair_id


def open_embeddings(folder, corpus_sha256="", verify=True, query_encoder="", rows=0):
    """
    (shards, manifest) of an embeddings folder: memory-mapped [n, D] fp16 or fp32 arrays in corpus order, as
    its manifest lists them. UserError when it is incomplete, made from another corpus ("" skips this) or from
    other than `rows` passages (0 skips this), or a shard is missing, extra, out of order, of another shape or
    type, or (verify) of another sha256; or when the encoder folder `query_encoder` was trained with another
    passage encoder (where both say with which).
    """

    def refuse(what):
        raise UserError(
            f"{folder}: {what}; repeat doc2embedding.py, or name the folder that it wrote"
        ) from None

    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        refuse("no manifest.json, so no finished embeddings")
    manifest = read_json(folder / "manifest.json")
    absent = {"rows", "dim", "dtype", "shard_size", "corpus", "role", "shards", "complete"} - set(manifest)
    if absent:
        refuse(f"manifest.json has no {', '.join(sorted(absent))}")
    if manifest["complete"] is not True:
        refuse("not complete")
    if manifest["role"] != "passage":
        refuse(f"made by a {manifest['role']} encoder, passages need a passage encoder")
    if corpus_sha256 and manifest["corpus"] != corpus_sha256:
        refuse(f"made from another corpus (sha256 {manifest['corpus'][:12]}, this one {corpus_sha256[:12]})")
    if rows and manifest["rows"] != rows:  # trap: a header taken for a passage moves all others by one
        refuse(f"made from {manifest['rows']} passages, the corpus as it is read now has {rows}")
    pair = pair_id(query_encoder) if query_encoder else ""
    if pair and manifest.get("pair") and pair != manifest["pair"]:
        raise UserError(
            f"{query_encoder} (pair {pair}) was not trained with the passage encoder of {folder} "
            f"(pair {manifest['pair']}); use the two encoders of one run"
        )
    if query_encoder and bool(pair) != bool(manifest.get("pair")) and world()[0] == 0:
        what = f"only one of {query_encoder} and {folder} names its partner"
        print(f"warning: {what}: nobody can tell whether they were trained together", file=sys.stderr)
    names, shards = list(manifest["shards"]), []
    for file in sorted(folder.glob("*.npy")):
        if file.name not in names:
            refuse(f"{file.name} is not in manifest.json")
    for i, name in enumerate(names):
        if name != f"{i:05d}.npy":
            refuse(f"{name} is out of order in manifest.json, {i:05d}.npy is due")
        try:
            shards.append(np.load(folder / name, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            refuse(f"{name} is missing or not a whole .npy file ({error})")
        size = min(manifest["shard_size"], manifest["rows"] - i * manifest["shard_size"])
        found, due = (str(shards[i].dtype), shards[i].shape), (manifest["dtype"], (size, manifest["dim"]))
        if found != due or found[0] not in ("float16", "float32"):
            refuse(f"{name} holds {found}, manifest.json says {due}")
    if sum(map(len, shards)) != manifest["rows"]:
        refuse(f"{sum(map(len, shards))} rows, manifest.json says {manifest['rows']}")
    for name in tqdm(names if verify else [], "checking embeddings", delay=5, leave=False, disable=None):
        if sha256(folder / name) != manifest["shards"][name]:
            refuse(f"{name} has another sha256 than in manifest.json: damaged or replaced")
    return shards, manifest


def refuse_other_job(folder, stored, want, files):
    """
    UserError unless what `folder` holds is part of this job. stored: its manifest ({}: none), want: the one
    to be written, as far as it is known, files: the names that the shards will have.
    """
    changed = [
        f"{key} was {stored.get(key)!r} there and is {value!r} now"
        for key, value in want.items()
        if stored and key != "pair" and stored.get(key) != value
    ]
    if changed:
        raise UserError(f"{folder}: {'; '.join(changed)}; name another --out, or delete that folder")
    for file in sorted(folder.glob("*.npy")):
        if not (stored and file in files and file.with_suffix(".json").is_file()):
            raise UserError(f"{file} is not from this job; name another --out, or delete that folder")


def shards_to_encode(shards, stored):
    """
    Those of `shards` {file: rows} that are to be encoded: absent, or damaged, that is of another sha256 than
    noted in the manifest (`stored`, when it is complete) or beside the shard.
    """
    todo = {}
    for file, rows in tqdm(shards.items(), "checking shards", delay=5, disable=None, leave=False):
        note = file.with_suffix(".json")
        noted = read_json(note)["sha256"] if note.is_file() else ""
        if not file.is_file():
            todo[file] = rows
        elif sha256(file) != stored.get("shards", {}).get(file.name, noted):
            print(f"{file}: damaged (another sha256 than when written), it is encoded again", flush=True)
            todo[file] = rows
    return todo


def check_finite(vectors_nD, stored_nD, rows, corpus, cfg):
    """UserError that names the first passage whose vector is NaN or infinite, in float32 or once stored."""
    for i in np.flatnonzero(~np.isfinite(stored_nD).all(1)):
        where, largest = f"{corpus.path}: passage {corpus[rows[i]].id!r}", np.abs(vectors_nD[i]).max()
        if np.isfinite(largest):
            raise UserError(
                f"{where}: its vector reaches {largest:.4g}, float16 ends at 65504; use --dtype float32"
            )
        advice = "the weights are broken" if cfg.mixed_precision == "no" else "use --mixed_precision no"
        raise UserError(f"{where}: its vector holds NaN or infinity; {advice}")
