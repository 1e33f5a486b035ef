"""
The folder of vectors: 00000.npy, 00001.npy ... and manifest.json. Who may read it, and who may add to it.

A shard is whole or absent: it gets its name only after its sha256 was noted in 00000.json next to it. The
manifest collects these hashes at the end. Vectors of two models, corpora or settings are never mixed.
"""

import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.distributed import world
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file, read_json, sha256, write_json
from utils.plumbing.weights import pair_id

KEYS = {"rows", "dim", "dtype", "shard_size", "corpus", "role", "shards", "complete"}  # of manifest.json


# ---------------------------------------------------------------- reading
def open_embeddings(folder, corpus_sha256="", verify=True, query_encoder="", rows=0):
    """
    Return (shards, manifest): memory-mapped [n, D] arrays in corpus order, and the content of manifest.json.

    UserError when the folder is incomplete, or not what its manifest says; verify: each sha256 is compared,
    which reads every byte. UserError also for vectors of another corpus ("" skips this) or of other than
    `rows` passages (0 skips this), and for a question encoder of another training run, where both name one.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        refuse(folder, "no manifest.json, so no finished embeddings")
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        refuse(folder, "manifest.json is damaged")
    if absent := KEYS - manifest.keys():
        refuse(folder, f"manifest.json has no {', '.join(sorted(absent))}")
    if manifest["complete"] is not True:
        refuse(folder, "not complete")
    if manifest["role"] != "passage":
        refuse(folder, f"made by a {manifest['role']} encoder, passages need a passage encoder")
    if corpus_sha256 and manifest["corpus"] != corpus_sha256:
        hashes = f"sha256 {manifest['corpus'][:12]}, this one {corpus_sha256[:12]}"
        refuse(folder, f"made from another corpus ({hashes})")
    if rows and manifest["rows"] != rows:  # trap: a header taken for a passage moves all others by one
        refuse(folder, f"made from {manifest['rows']} passages, the corpus as it is read now has {rows}")
    if query_encoder:
        check_pair(folder, manifest.get("pair"), query_encoder)
    shards = open_shards(folder, manifest, verify)
    warn_where_alike(folder, shards)
    return shards, manifest


def refuse(folder, fault):
    raise UserError(f"{folder}: {fault}; repeat doc2embedding.py, or name the folder that it wrote") from None


def check_pair(folder, passage_pair, query_encoder):
    """UserError where both encoders name a training run and not the same, a warning where only one does."""
    pair = pair_id(query_encoder)
    # what follows a + names the question encoder of a run in which the passage encoder stood still
    same = pair.partition("+")[0] == str(passage_pair).partition("+")[0]
    if pair and passage_pair and not same:
        raise UserError(
            f"{query_encoder} (pair {pair}) was not trained with the passage encoder of {folder} "
            f"(pair {passage_pair}); use the two encoders of one run"
        )
    if bool(pair) != bool(passage_pair) and world()[0] == 0:
        warning = f"warning: only one of {query_encoder} and {folder} names its partner"
        print(f"{warning}: nobody can tell whether they were trained together", file=sys.stderr)


def open_shards(folder, manifest, verify):
    """Return the memory-mapped arrays that the manifest lists. UserError where they are not as it says."""
    names = list(manifest["shards"])
    for file in sorted(folder.glob("*.npy")):
        if file.name not in names:
            refuse(folder, f"{file.name} is not in manifest.json")
    shards = []
    for i, name in enumerate(names):
        if name != f"{i:05d}.npy":
            refuse(folder, f"{name} is out of order in manifest.json, {i:05d}.npy is due")
        try:
            shard = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            refuse(folder, f"{name} is missing or not a whole .npy file ({error})")
        size = min(manifest["shard_size"], manifest["rows"] - i * manifest["shard_size"])
        due = manifest["dtype"], (size, manifest["dim"])
        content = str(shard.dtype), shard.shape
        if content != due or content[0] not in ("float16", "float32"):
            refuse(folder, f"{name} holds {content}, manifest.json says {due}")
        shards.append(shard)
    rows = sum(map(len, shards))
    if rows != manifest["rows"]:
        refuse(folder, f"{rows} rows, manifest.json says {manifest['rows']}")
    for name in tqdm(names if verify else [], "checking embeddings", delay=5, leave=False, disable=None):
        if sha256(folder / name) != manifest["shards"][name]:
            refuse(folder, f"{name} has another sha256 than in manifest.json: damaged or replaced")
    return shards


def warn_where_alike(folder, shards):
    """Warn where the vectors of up to 256 passages hardly differ: then a ranking is the corpus's order."""
    rows = [shard[:: max(1, len(shard) * len(shards) // 256)] for shard in shards]
    x_nD = np.concatenate(rows).astype(np.float32)
    length = max(1e-30, np.linalg.norm(x_nD, axis=1).mean())
    spread = np.linalg.norm(x_nD - x_nD.mean(0), axis=1).mean() / length
    distinct = len(np.unique(x_nD, axis=0))
    # why a half: a corpus may hold texts twice. why 1 %: a BERT that was never trained reaches 10 %
    if world()[0] == 0 and len(x_nD) > 1 and not (spread > 0.01 and 2 * distinct >= len(x_nD)):
        fault = f"{folder}: of the vectors of {len(x_nD)} passages {distinct} differ, by {spread:.1%}"
        print(f"warning: {fault}: the encoder does not tell passages apart", file=sys.stderr)


# ---------------------------------------------------------------- writing
def check_storable(vectors_nD, dtype, corpus, rows, advice):
    """UserError for the first of the passages `rows` whose vector holds NaN, or more than `dtype` can."""
    largest_n = np.abs(vectors_nD).max(axis=1)
    for i in np.flatnonzero(~(largest_n <= np.finfo(dtype).max)):  # trap: a comparison with NaN is false
        fault = "holds NaN or infinity"
        if np.isfinite(largest_n[i]):
            fault = f"reaches {largest_n[i]:.4g}, {dtype} ends at {np.finfo(dtype).max:.6g}"
            advice = "doc2embedding.py: use --dtype float32"
        raise UserError(f"{corpus.path}: passage {corpus[rows[i]].id!r}: its vector {fault}; {advice}")


def refuse_other_job(folder, stored, job, files):
    """
    UserError unless what `folder` holds is part of this job. stored: its manifest, {} where there is none.
    job: the manifest to be written, as far as it is known. files: the names that the shards will have.
    """
    changes = []
    for key, value in job.items():
        if stored and key != "pair" and stored.get(key) != value:
            changes.append(f"{key} was {stored.get(key)!r} there and is {value!r} now")
    if changes:
        raise UserError(f"{folder}: {'; '.join(changes)}; name another --out, or delete that folder")
    for file in sorted(folder.glob("*.npy")):
        if not (stored and file in files and file.with_suffix(".json").is_file()):
            raise UserError(f"{file} is not from this job; name another --out, or delete that folder")


def shards_to_encode(shards, stored):
    """
    Return those of `shards` {file: rows} that are absent, or damaged: of another sha256 than the manifest
    (`stored`, where it is complete) or the note next to the shard says.
    """
    todo = {}
    for file, rows in tqdm(shards.items(), "checking shards", delay=5, disable=None, leave=False):
        try:
            noted = read_json(file.with_suffix(".json"))["sha256"]
        except (UserError, LookupError, TypeError):  # no note, or a damaged one
            noted = ""
        if not file.is_file():
            todo[file] = rows
        elif noted == "" or sha256(file) != stored.get("shards", {}).get(file.name, noted):
            print(f"{file}: damaged (another sha256 than when written), it is encoded again", flush=True)
            todo[file] = rows
    return todo


def write_shard(file, vectors_nD, full_length):
    """Write a shard and the note next to it: its sha256, and how many of its passages fill all tokens."""
    with atomic_file(file, "wb") as temporary:
        np.save(temporary, vectors_nD)
        temporary.flush()
        # why in here: the shard gets its name when this block ends, so never without its hash
        note = {"sha256": sha256(temporary.name), "full_length": full_length}
        write_json(file.with_suffix(".json"), note)


def finish_folder(folder, manifest, shards, corpus):
    """Write ids.txt and the manifest of a folder with all its shards. Return how many passages may be cut."""
    notes = {file.name: read_json(file.with_suffix(".json")) for file in shards}
    with atomic_file(folder / "ids.txt") as file:
        file.writelines(f"{passage.id}\n" for passage in corpus)
    hashes = {name: note["sha256"] for name, note in notes.items()}
    write_json(folder / "manifest.json", manifest | {"shards": hashes, "complete": True})
    return sum(note["full_length"] for note in notes.values())


def wait_for(files):
    """Wait until all processes have written their files."""
    # why not a barrier: it fails after 10 to 30 minutes; another device's last file may take longer
    while not all(file.is_file() for file in files):
        time.sleep(0.1)
