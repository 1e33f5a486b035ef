"""
Read other people's files entry by entry: json lists of 7 GB, jsonl, one json dict of entries, tables.

Every reader keeps one entry in memory, and names the file and the place where it cannot go on.
"""

import math
import re
import reprlib
from pathlib import Path

import ijson
from tqdm import tqdm

from prepare.hints import foreign, kind_of
from utils.data import iter_jsonl
from utils.plumbing.config import UserError
from utils.plumbing.lines import names_columns, read_lines

BOM = b"\xef\xbb\xbf"
DICT_OF_ENTRIES = re.compile(rb'\{\s*("(\\.|[^"\\])*"\s*:\s*\{|\}?\s*$)')  # {"0": {..., as Pyserini writes


def iter_entries(path):
    """
    Yield (key, place, entry) of a json list, of jsonl, or of one json dict whose values are the entries.

    key: the number of the entry from 0, or its key in the dict. place: the words for an error message.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if kind := kind_of(head, path):
        raise UserError(f"{path}: {kind}")

    # what kind of json it is shows in its first characters
    begin = head.removeprefix(BOM).lstrip()
    if begin.startswith(b"["):
        items = ijson_items(path, ijson.items, "item", len(BOM) * head.startswith(BOM))
        for index, entry in enumerate(items):
            yield index, f"{path}: example {index}", entry
    elif DICT_OF_ENTRIES.match(begin):
        for key, entry in ijson_items(path, ijson.kvitems, "", len(BOM) * head.startswith(BOM)):
            yield key, f"{path}: example {key!r}", entry
    elif begin.startswith(b"{"):
        for index, (number, entry) in enumerate(iter_jsonl(path)):
            yield index, f"{path}:{number}", entry
    else:
        what = "is empty" if not begin else "does not start with [ or {"
        raise UserError(f"{path}: {what}, so it is no json list and no jsonl; wrong file?")


def ijson_items(path, parse, prefix, begin):
    """Yield what ijson finds in a file from byte `begin`. UserError for rubbish before or behind the json."""
    bar = {"total": Path(path).stat().st_size, "desc": f"reading {path}", "delay": 5, "disable": None}
    read = 0
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", **bar) as blocks:
        file.seek(begin)
        try:
            for item in parse(blocks, prefix, use_float=True):
                read += 1
                yield item
        except (ijson.JSONError, RecursionError) as error:
            fault = " ".join(str(error).split()).partition(" (right here)")[0]
            raise UserError(f"{path}: after {read} good examples: {fault}; get the file again") from None


def not_of(place, entry, error, path, needs, cure="wrong file?"):
    """Return the UserError for an entry that is not of its format; without the keys `needs` of another."""
    other = isinstance(entry, dict) and not entry.keys() >= set(needs)
    hint = foreign(entry, path) if other else ""
    if hint:
        return UserError(f"{path}: {hint}")
    fault = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    return UserError(f"{place} is not of this format: {fault}; {cure}")


def answer_list(value, place):
    """Return the value, a list of answers. UserError when it is anything else."""
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        # why reprlib: the repr of a list that is nested a thousand times is a RecursionError
        raise UserError(f"{place}: the answers must be a list of strings, got {reprlib.repr(value)[:60]}")
    return value


def iter_table(path, split, header=True):
    """
    Yield (place, columns) of every line but blank ones. split: a function line -> columns, as wide as it is.
    header: whether a first line that only names the columns is skipped.
    """
    first = True
    for number, _, text in read_lines(path):
        line = text.rstrip("\r\n")
        if not line.strip():
            continue
        columns = split(line)
        if not (first and header and names_columns(columns)):
            yield f"{path}:{number}", columns
        elif len(columns) > 1 and not re.search("q|^id$|topic", columns[0].lower()):
            names = ", ".join(columns)
            raise UserError(f"{path}:{number}: the columns are {names}; the question must be the first")
        first = False


def at_tabs_or_spaces(line):
    """Return the columns of a line: between its tabs, so that an id may hold a space; else between spaces."""
    columns = line.split("\t") if "\t" in line else line.split()
    return [column.strip() for column in columns]


def at_tabs(line):
    return line.split("\t")


def number(text, place):
    """Return a finite number. UserError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{place}: {text!r} is not a number")
    return value
