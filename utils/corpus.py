"""
A corpus of any size, read from disk one passage at a time: 21M passages are never a python list.

The first opening streams the file once and writes where each passage begins to `<path>.index/` (8 bytes a
passage); afterwards `corpus[row]` is one read of the file, and all processes share the index through the
page cache.
"""

import csv
import hashlib
import itertools
import os
import tempfile
import weakref
from array import array
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.lines import DECODER, read_lines
from utils.plumbing.config import UserError, file_fault
from utils.plumbing.files import atomic_folder, read_json, write_json

csv.field_size_limit(2**31 - 1)  # trap: csv refuses fields of more than 131,072 characters


class Passage(NamedTuple):
    """One passage; `id` is "" when it came inline in a training file."""

    id: str
    title: str
    text: str


def continuation(path, number, lines):
    """The lines that a csv record takes beyond its first, line `number`, while a quoted field stays open."""
    for _, _, text in lines:
        columns = text.split("\t")
        if len(columns) == 3 and columns[0] and " " not in columns[0]:
            break  # why: this is the next row; csv would swallow it, and all others up to the next quote
        yield text
    raise UserError(
        f'{path}:{number}: a quote opened on this line is never closed; remove it or double it ("")'
    )


def parse(text, fmt, more=()):
    """The passage in a record; `more` yields the lines after its first one. ValueError says what is wrong."""
    if fmt == "beir":
        entry = DECODER.decode(text)
        columns = (
            [entry.get("_id"), entry.get("text"), entry.get("title") or ""] if type(entry) is dict else [0]
        )
        if not all(isinstance(column, str) for column in columns):
            raise ValueError('expected {"_id": "...", "title": "...", "text": "..."}')
    elif fmt == "dpr" and ('"' in text or "\r" in text):
        try:
            columns = next(csv.reader(itertools.chain([text], more), delimiter="\t"))
        except csv.Error:
            raise ValueError(
                "a carriage return in a field without quotes; put the field into quotes"
            ) from None
    else:
        columns = text.rstrip("\r\n").split("\t")
    if fmt == "marco" and len(columns) in (2, 3):  # MS MARCO's collection.tsv has no titles, RocketQA's has
        columns = [columns[0], columns[-1], columns[1] if len(columns) == 3 else ""]
    if len(columns) != 3:
        names = "id, title, text" if fmt == "marco" else "id, text, title"
        raise ValueError(f"expected 3 columns ({names}), got {len(columns)}")
    pid, body, title = columns
    if not pid or any(c in pid for c in "\t\r\n"):
        raise ValueError(f"{pid!r} cannot be a passage id")
    return Passage(pid, title, body)


def is_header(path, passage):
    """Whether the first line names the columns, whatever it calls the id; UserError for another order."""
    names = [name.strip().lower() for name in (passage.id, passage.text, passage.title)]
    if names[0] != "id" and not {"text", "title"} <= {*names}:
        return False
    if "title" in names[:2] or "text" in names[::2]:
        raise UserError(f"{path}:1: the columns are {', '.join(names)}; write them as id, text, title")
    return True


def read_row(fd, offsets, row, fmt):
    begin, end = offsets[row : row + 2].tolist()
    return parse(os.pread(fd, end - begin, begin).decode(), fmt)  # why pread: forks share no file position


def id_hash(pid):
    return int.from_bytes(hashlib.blake2b(pid.encode(), digest_size=8).digest(), "little")


def build_index(path, fmt, folder):
    """
    Stream the corpus once into `folder`. Returns what meta.json says of it.

    offsets.npy: int64 [rows + 1], in bytes. Unless the ids just count up from 0 or 1, also hashes.npy, uint64
    [rows], the sorted hashes of the ids, and rows.npy, int64 [rows], the row of each hash.
    """
    offsets, hashes, first, empty, digest = array("q"), array("Q"), None, 0, hashlib.sha256()
    lines = read_lines(path, digest)
    for number, offset, text in lines:
        if text in ("\n", "\r\n"):
            continue
        try:
            passage = parse(text, fmt, continuation(path, number, lines))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if number == 1 and fmt == "dpr" and is_header(path, passage):
            continue
        row = len(offsets)
        if row == 0 and passage.id in ("0", "1"):
            first = int(passage.id)
        if first is not None and passage.id != str(first + row):
            hashes.extend(id_hash(str(first + r)) for r in range(row))
            first = None
        if first is None:
            hashes.append(id_hash(passage.id))
        offsets.append(offset)
        empty += not passage.text.strip()
    rows = len(offsets)
    if rows == 0:
        raise UserError(f"{path}: 0 passages; is this the right file?")
    offsets.append(os.path.getsize(path))
    offsets = np.frombuffer(offsets, np.int64)
    np.save(folder / "offsets.npy", offsets)
    if first is None:
        hashes = np.frombuffer(hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        with open(path, "rb") as file:
            for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
                a, b = order[i : i + 2].tolist()
                pid = read_row(file.fileno(), offsets, a, fmt).id
                if pid == read_row(file.fileno(), offsets, b, fmt).id:
                    raise UserError(f"{path}: id {pid!r} is there twice, as passages {a + 1} and {b + 1}")
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "rows.npy", order)
    return {"rows": rows, "first_id": first, "empty_texts": empty, "sha256": digest.hexdigest()}


def load_index(folder, want):
    """(meta, offsets, hashes, rows), memory-mapped; None when it is absent, broken or of another file."""
    try:
        meta = read_json(folder / "meta.json")
        names = ["offsets"] if meta["first_id"] is not None else ["offsets", "hashes", "rows"]
        arrays = [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names]
        lengths = [meta["rows"] + 1, meta["rows"], meta["rows"]]
        fresh = all(meta[key] == value for key, value in want.items()) and arrays[0][-1] == meta["size"]
    except (UserError, OSError, ValueError, TypeError, LookupError):
        return None
    whole = [len(array) for array in arrays] == lengths[: len(arrays)]
    return (meta, *arrays, *[None] * (3 - len(arrays))) if fresh and whole else None


class Corpus:
    """
    corpus[row] -> Passage, corpus.row(pid) -> row, len(corpus), corpus.sha256 (of the file).

    fmt: "dpr" (id, text, title; csv quoting; header optional), "marco" (id, title, text or id, text; raw),
    "beir" (jsonl), "auto" (.jsonl is beir, else dpr). corpus.empty_texts counts passages without text.
    May be pickled, forked, and opened by many processes at once.
    """

    def __init__(self, path, fmt="auto"):
        self.path, self.fmt = Path(path), fmt
        if fmt not in ("auto", "dpr", "marco", "beir"):
            raise UserError(f"the corpus format must be auto, dpr, marco or beir, got {fmt!r}")
        if fault := file_fault(path):
            raise UserError(f"{path}: {fault}")
        kind = fmt if fmt != "auto" else "beir" if self.path.suffix == ".jsonl" else "dpr"
        stat, folder = self.path.stat(), Path(f"{path}.index")
        want = {"version": 2, "fmt": kind, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        loaded = load_index(folder, want) or self.make_index(folder, want)
        self.meta, self.offsets, self.hashes, self.rows = loaded
        self.sha256, self.empty_texts = self.meta["sha256"], self.meta["empty_texts"]
        self.fd = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)

    def make_index(self, folder, want):
        try:
            temporary = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
        except OSError:
            why = f"its index belongs beside it, and {folder.parent} cannot be written"
            raise UserError(f"{self.path}: {why}; link the corpus (ln -s) into a writable folder") from None
        with temporary:
            new = Path(temporary.name) / "new"
            with atomic_folder(new) as building:
                write_json(building / "meta.json", want | build_index(self.path, want["fmt"], building))
            loaded = load_index(new, want)  # why: mapped before the rename, so that no twin can take it away
            if loaded is None:
                raise UserError(f"{self.path}: changed while it was being read; run the command again")
            if load_index(folder, want) is None:
                with suppress(OSError):  # a stale index moves out of the way
                    os.rename(folder, Path(temporary.name) / "old")
                with suppress(OSError):  # a twin was faster
                    os.rename(new, folder)
        return loaded

    def __reduce__(self):
        return Corpus, (str(self.path), self.fmt)

    def __len__(self):
        return self.meta["rows"]

    def __getitem__(self, row):
        if not 0 <= row < len(self):  # trap: -1 is FAISS's "nothing found", never the last passage
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        return read_row(self.fd, self.offsets, row, self.meta["fmt"])

    def row(self, pid):
        """The row of a passage id; UserError when the corpus has no such passage."""
        first = self.meta["first_id"]
        if first is not None:
            row = int(pid) - first if pid.isascii() and pid.isdigit() else -1
            if 0 <= row < len(self) and str(row + first) == pid:
                return row
        else:
            value = np.uint64(id_hash(pid))
            begin, end = (np.searchsorted(self.hashes, value, side) for side in ("left", "right"))
            for row in self.rows[begin:end].tolist():
                if self[row].id == pid:
                    return row
        raise UserError(f"{self.path}: no passage has the id {pid!r}; was that id made with another corpus?")
