"""
A corpus of any size, read from disk one passage at a time: 21M passages never become a python list.

The first opening reads the file once and writes where each passage begins to `<path>.index/`, 8 bytes each.
After that `corpus[row]` is one read of the file, and all processes share the index through the page cache.
trap: of several processes one must be the first: `with accelerator.main_process_first(): Corpus(path)`.
"""

import contextlib
import csv
import hashlib
import os
import re
import tempfile
from array import array
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from utils.plumbing.config import UserError, file_fault
from utils.plumbing.files import atomic_folder, read_json, temporary_name, write_json
from utils.plumbing.lines import load_json, read_lines

csv.field_size_limit(2**31 - 1)  # trap: csv refuses fields of more than 131,072 characters
# how people name the columns of a passage or question file, small letters alone
COLUMN_NAMES = "id pid qid did docid docno documentid passageid psgid queryid questionid corpusid text title"
COLUMN_NAMES += (
    " contents content passage passages body document doc paragraph context abstract heading headline"
)
COLUMN_NAMES += " name page corpus url query question answer answers score relevance label iter rel"
COLUMN_NAMES = frozenset(COLUMN_NAMES.split())


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


def split_fields(line):
    """
    Return the columns of a line between tabs. One line is one record, and a lone quote is a character.

    A column is in csv quoting (DPR's psgs_w100.tsv) only if it begins and ends with a quote and doubles those
    inside: `"a ""b"" c"` is `a "b" c`, but `"a" or "b"` is as it stands. ValueError for a carriage return
    outside such quotes.
    """
    raw = line.split("\t")
    if len(raw) > 3 and '\t"' in line:  # a tab may stand inside quotes
        quoted = next(csv.reader([line + "\n"], delimiter="\t"))
        if len(quoted) == 3:
            return quoted
    columns = [unquote(column) for column in raw]
    for before, after in zip(raw, columns, strict=True):
        if "\r" in before and before == after:
            raise ValueError("a carriage return in a field without quotes; put the field into quotes")
    return columns


def split_contents(text):
    """Return (title, text) of Anserini's `"title"\\ntext`; without such a first line the title is ""."""
    first, line_end, rest = text.partition("\n")
    quoted = line_end and len(first) > 1 and first[0] == first[-1] == '"'
    return (first[1:-1], rest) if quoted else ("", text)


def unquote(column):
    """Return a column without its csv quotes, or as it stands where it is not in csv quoting."""
    inside = column[1:-1]
    quoted = len(column) > 1 and column[0] == column[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else column


def parse(text, fmt):
    """Return the Passage in a line. ValueError says what is wrong."""
    line = text.rstrip("\r\n")
    if fmt == "beir":
        entry = load_json(line)
        if not isinstance(entry, dict):
            entry = {}
        # BEIR's names, Tevatron's and Pyserini's
        pid = entry.get("_id", entry.get("docid", entry.get("id")))
        pid = str(pid) if type(pid) is int else pid
        title, body = entry.get("title") or "", entry.get("text", 0)
        if isinstance(entry.get("contents"), str):
            title, body = split_contents(entry["contents"])
        columns = [pid, "" if body is None else body, title]
        if not all(isinstance(column, str) for column in columns):
            raise ValueError('expected {"_id": "...", "title": "...", "text": "..."}')
    elif fmt == "dpr" and ('"' in line or "\r" in line):
        columns = split_fields(line)
    else:
        columns = line.split("\t")

    # MS MARCO has the title before the text: its collection.tsv has no titles, RocketQA's has
    if fmt == "marco" and len(columns) in (2, 3):
        title = columns[1] if len(columns) == 3 else ""
        columns = [columns[0], columns[-1], title]

    if len(columns) != 3:
        names = "id, title, text" if fmt == "marco" else "id, text, title"
        advice = ""
        if any(column.startswith('"') for column in columns):
            advice = "; one line is one record, so a quote that is opened on a line must be closed on it"
        elif len(columns) == 2 and fmt == "dpr":
            advice = "; MS MARCO's collection.tsv has two: add --corpus_format marco"
        elif len(columns) == 1 and line.startswith("["):
            advice = "; is one json list? One object a line is needed, as README.md shows"
        elif len(columns) == 1 and line.count(",") > 1:
            advice = "; a csv with commas? README.md shows how ten lines of python make a corpus.tsv of it"
        raise ValueError(f"expected 3 columns ({names}), got {len(columns)}{advice}")
    pid, body, title = columns
    if not pid or "\t" in pid or "\r" in pid:
        raise ValueError(f"{pid!r} cannot be a passage id")
    return Passage(pid, title, body)


def names_columns(columns):
    """Return whether the columns of a first line are names, such as `docid contents title` or `qid query`."""
    words = [re.findall("[a-z]+", column.lower()) for column in columns]
    return all(named and COLUMN_NAMES.issuperset(named) for named in words)


def is_header(path, passage, fmt):
    """Return whether the first line names the columns. UserError when it names them in another order."""
    columns = [passage.id, passage.text, passage.title]
    if not names_columns(columns):
        return False
    names = [name.strip().lower() for name in columns]
    if not any(key in names[0] for key in ("id", "doc")) or "title" in names[1] + names[0]:
        order = f"{names[0]}, {names[2]}, {names[1]}" if fmt == "marco" else ", ".join(names)
        cure = "write them as id, text, title, or add --corpus_format marco for id, title, text"
        raise UserError(f"{path}:1: the columns are {order}; {cure}")
    return True


def look_swapped(lengths):
    """Return whether texts and titles of these (text, title) lengths stand in each other's place."""
    text, title = (median(numbers) for numbers in zip(*lengths, strict=True))
    return title > 15 and title > 2 * text


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
            passage = parse(text, fmt)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if number == 1 and fmt != "beir" and is_header(path, passage, fmt):
            lengths = None
            continue
        if lengths is not None and len(lengths) < 1000:
            lengths.append((len(passage.text), len(passage.title)))
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
                pid = parse(file.readline().decode(), fmt).id
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
        return parse(line.decode(), self.meta["fmt"])

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
