"""
A corpus of any size, read from disk one passage at a time: 21M passages never become a python list.

The first opening reads the file once and writes where each passage begins to `<path>.index/`, 8 bytes each.
After that `corpus[row]` is one read of the file, and all processes share the index through the page cache.
trap: of several processes one must open it first, alone, because it writes the index:
`with accelerator.main_process_first(): Corpus(path)`.
"""

import contextlib
import hashlib
import os
import tempfile
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.plumbing.config import UserError, file_fault
from utils.plumbing.files import atomic_folder, read_json, temporary_name, write_json
from utils.plumbing.lines import is_header, look_swapped, passage_fields, read_lines


# ---------------------------------------------------------------- a passage
class Passage(NamedTuple):
    """One passage. `id` is "" when the passage came inline in a training file."""

    id: str
    title: str
    text: str


def passage_key(entry):
    """Return what makes two entries the same passage: the corpus id, or title and text of an inline one."""
    if isinstance(entry, str):
        return entry
    return entry.get("title") or "", entry["text"]


def passage_of(entry, corpus):
    """Return the Passage that an entry of `positives` or `negatives` names. An inline one gets the id ""."""
    if isinstance(entry, dict):
        return Passage("", entry.get("title") or "", entry["text"])
    if corpus is None:
        raise UserError(f"passage {entry!r} is named by its id: give the corpus too")
    return corpus.passage(entry)


# ---------------------------------------------------------------- the index
def id_hash(pid):
    """Return 64 bits of a passage id. Two of 21M ids would share them with a chance of 1 in 100,000."""
    return int.from_bytes(hashlib.blake2b(pid.encode(), digest_size=8).digest(), "little")


def write_index(path, fmt, folder):
    """
    Write the index of a corpus into `folder`. Return what meta.json says about the file.

    offsets.npy: int64 [rows + 1], in bytes. Unless the ids just count up from 0 or 1, also hashes.npy, uint64
    [rows], the sorted hashes of the ids, and rows.npy, int64 [rows], the row of each hash.
    """
    offsets = array("q")
    hashes = array("Q")
    first_ids = {0, 1}  # the ids count up from one of them, or from none
    empty_texts = 0
    lengths = []  # of the first passages of a file whose columns have no names
    digest = hashlib.sha256()
    for number, offset, text in read_lines(path, digest):
        if not text.strip(" \r\n"):
            continue
        try:
            passage = Passage(*passage_fields(text, fmt))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if number == 1 and fmt != "beir" and is_header(path, passage, fmt):
            lengths = None
            continue
        if lengths is not None and len(lengths) < 1000:
            lengths.append((len(passage.text), len(passage.title)))
        # of the two beginnings those that still fit
        first_ids = {first for first in first_ids if passage.id == str(first + len(offsets))}
        hashes.append(id_hash(passage.id))
        offsets.append(offset)
        empty_texts += not passage.text.strip()

    # where each passage begins, and where the last one ends
    rows = len(offsets)
    if rows == 0:
        raise UserError(f"{path}: 0 passages; is this the right file?")
    offsets.append(os.path.getsize(path))
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))

    # the table of ids, sorted by hash: a search by halves finds the row of an id
    first_id = min(first_ids, default=None)
    if first_id is None:
        hashes = np.frombuffer(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        twins = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twins):
            first, second = order[twins[0] : twins[0] + 2].tolist()
            with open(path, "rb") as file:
                file.seek(offsets[first])
                pid = passage_fields(file.readline().decode(), fmt)[0]
            raise UserError(f"{path}: id {pid!r} is there twice, as passages {first + 1} and {second + 1}")
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "rows.npy", order)
    meta = {"rows": rows, "first_id": first_id, "empty_texts": empty_texts, "sha256": digest.hexdigest()}
    return meta | {"swapped": bool(lengths) and look_swapped(lengths)}


def load_index(folder, want):
    """Return (meta, {name: array}), memory-mapped; None if it is absent, broken or of another file."""
    try:
        meta = read_json(folder / "meta.json")
        lengths = {"offsets": meta["rows"] + 1}
        if meta["first_id"] is None:
            lengths |= {"hashes": meta["rows"], "rows": meta["rows"]}
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in lengths}
        fresh = all(meta[key] == value for key, value in want.items())
    except (UserError, OSError, ValueError, TypeError, LookupError, EOFError):
        return None
    whole = {name: len(values) for name, values in arrays.items()} == lengths
    return (meta, arrays) if fresh and whole and arrays["offsets"][-1] == meta["size"] else None


class Corpus:
    """
    corpus[row] -> Passage, corpus.passage(pid) -> Passage, corpus.row(pid) -> row, len(corpus), corpus.sha256
    (of the file), corpus.empty_texts (how many passages have no text). It can be pickled and forked.

    fmt: "dpr" (id, text, title; csv quoting; header optional), "marco" (id, title, text or id, text; raw),
    "beir" (jsonl; Tevatron's and Pyserini's too), "auto" (what begins with { is beir, all else dpr).
    """

    def __init__(self, path, fmt="auto"):
        self.path = Path(path)
        self.fmt = fmt
        if fmt not in ("auto", "dpr", "marco", "beir"):
            raise UserError(f"the corpus format must be auto, dpr, marco or beir, got {fmt!r}")
        if fault := file_fault(path):
            raise UserError(f"{path}: {fault}")
        if fmt == "auto":
            with open(path, "rb") as file:
                fmt = "beir" if file.read(100).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") else "dpr"

        # open the index, or build it in the place of one that is broken or of another file
        stat = self.path.stat()
        # another version: the index of before is built again
        want = {"version": 3, "fmt": fmt, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        folder = Path(f"{path}.index")
        if load_index(folder, want) is None:
            if not os.access(folder.parent, os.W_OK):
                why = f"its index belongs next to it, and {folder.parent} cannot be written"
                raise UserError(f"{path}: {why}; link the corpus (ln -s) into a writable folder")
            # why a name of its own: two programs may open a new corpus at once; the faster one wins
            with tempfile.TemporaryDirectory(prefix=temporary_name(folder), dir=folder.parent) as place:
                new = Path(place) / "new"
                with atomic_folder(new) as building:
                    write_json(building / "meta.json", want | write_index(path, fmt, building))
                if load_index(folder, want) is None:
                    with contextlib.suppress(OSError):
                        folder.rename(Path(place) / "old")  # a stale index moves out of the way
                    with contextlib.suppress(OSError):
                        new.rename(folder)
        index = load_index(folder, want)
        if index is None:
            raise UserError(f"{path}: changed while it was being read; run the command again")
        self.meta, self.arrays = index
        if self.fmt == "auto" and self.meta["swapped"]:
            what = "without a header, and the third column is longer than the second: is it id, title, text?"
            raise UserError(f"{path}: {what} Add --corpus_format marco; if it is id, text, title: dpr")
        self.sha256 = self.meta["sha256"]
        self.empty_texts = self.meta["empty_texts"]
        self.file = open(self.path, "rb", buffering=0)

    def __reduce__(self):
        return Corpus, (str(self.path), self.fmt)

    def __len__(self):
        return self.meta["rows"]

    def __getitem__(self, row):
        if not 0 <= row < len(self):  # trap: -1 is FAISS's "nothing found", never the last passage
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        begin, end = self.arrays["offsets"][row : row + 2].tolist()
        line = os.pread(self.file.fileno(), end - begin, begin)  # why pread: forks share no file position
        if os.fstat(self.file.fileno()).st_mtime_ns != self.meta["mtime_ns"]:
            raise UserError(f"{self.path}: changed while it was being read; run the command again")
        return Passage(*passage_fields(line.decode(), self.meta["fmt"]))

    def row(self, pid, source=""):
        """Return the row of a passage id. UserError where there is none; source: the file that names it."""
        row = -1
        first_id = self.meta["first_id"]
        if first_id is None:
            value = np.uint64(id_hash(pid))
            place = np.searchsorted(self.arrays["hashes"], value)
            if place < len(self) and self.arrays["hashes"][place] == value:
                row = int(self.arrays["rows"][place])
        elif pid.isascii() and pid.isdigit() and pid == str(int(pid)):  # "01" is not "1"
            row = int(pid) - first_id
        if 0 <= row < len(self):
            return row
        named = f" that {source} names" if source else ""
        fault = f"no passage has the id {pid!r}{named}; was that id made with another corpus?"
        raise UserError(f"{self.path}: {fault}")

    def passage(self, pid):
        return self[self.row(pid)]
