"""
Text files, line by line: utf-8, json lines, and the lines of a corpus. An error names the file, the line, and
what else it may be.
"""

import csv
import json
import os
import re
from statistics import median

from tqdm import tqdm

from prepare.hints import CONVERT, kind_of
from utils.plumbing.config import UserError, file_fault

csv.field_size_limit(2**31 - 1)  # trap: csv refuses fields of more than 131,072 characters
# how people name the columns of a passage or question file, small letters alone
COLUMN_NAMES = """
id pid qid did docid docno documentid passageid psgid queryid questionid corpusid text title contents content
passage passages body document doc paragraph context abstract heading headline name page corpus url query
question answer answers score relevance label iter rel
"""
COLUMN_NAMES = frozenset(COLUMN_NAMES.split())


# ---------------------------------------------------------------- any text
def read_lines(path, digest=None):
    """
    Yield (number, byte offset, text with its line end) of every line of a utf-8 file, in constant memory.

    A line ends at \\n only: U+2028 is text. A byte-order mark is skipped. `digest` is fed every byte.
    """
    if fault := file_fault(path):
        raise UserError(f"{path}: {fault}")
    size = os.path.getsize(path)
    bar = tqdm(desc=f"reading {path}", total=size, unit="B", unit_scale=True, delay=5, disable=None)
    end = 0
    with bar, open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and (fault := kind_of(line, path)):
                raise UserError(f"{path}: {fault}")
            if digest:
                digest.update(line)
            bar.update(len(line))
            begin = end
            end += len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                begin = 3
                line = line[3:]
            try:
                text = line.decode()
            except UnicodeDecodeError:
                text = None
            if text is None or "\0" in text:
                raise UserError(f"{path}:{number}: is no utf-8 text; convert it (iconv), or get it again")
            yield number, begin, text


def not_json(constant):
    raise ValueError(f"{constant} is not json")


def load_json(text):
    """Return the value in a line of json. ValueError says what is wrong."""
    value = json.loads(text, parse_constant=not_json)  # trap: python's json accepts NaN
    # trap: it also accepts half of a surrogate pair, such as \ud83d alone; every tokenizer fails at it
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def iter_jsonl(path):
    """Yield (line number, dict) of every line of a jsonl file but blank ones, in constant memory."""
    for number, _, text in read_lines(path):
        if not text.strip():
            continue
        if number == 1 and text.lstrip().startswith("["):
            raise UserError(f"{path}: is one json list; {CONVERT} dpr_json {path} OUT")
        if number == 1 and not text.lstrip().startswith("{") and ("\t" in text or "," in text):
            formats = "dpr_qa (DPR's .qa.csv), msmarco (qid, question), rocketqa (six columns)"
            what = f"is a table, not json lines; {CONVERT} FORMAT {path} OUT"
            raise UserError(f"{path}: {what}, with FORMAT one of {formats}")
        if number == 1 and text.strip() == "{":
            raise UserError(f"{path}: is one json over many lines; one question a line is needed (README.md)")
        try:
            entry = load_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a json object on one line: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: expected a json object, got {text.strip()[:40]}")
        yield number, entry


# ---------------------------------------------------------------- a corpus
def split_fields(line):
    """
    Return the columns of a line between tabs. One line is one record, and a lone quote is a character.

    A column is in csv quoting (DPR's psgs_w100.tsv) only if it begins and ends with a quote and doubles those
    inside: `"a ""b"" c"` is `a "b" c`, but `"a" or "b"` is as it stands. ValueError for a carriage return
    outside such quotes.
    """
    raw = line.split("\t")
    if len(raw) > 3 and '\t"' in line:  # more than id, text, title: a tab may stand inside quotes
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


def passage_fields(text, fmt):
    """Return (id, title, text) of the passage in a line of a corpus. ValueError says what is wrong."""
    line = text.rstrip("\r\n")
    if fmt == "beir":
        entry = load_json(line)
        if not isinstance(entry, dict):
            entry = {}
        # BEIR's names, Tevatron's and Pyserini's
        pid = entry.get("_id", entry.get("docid", entry.get("id")))
        pid = str(pid) if type(pid) is int else pid
        title = entry.get("title") or ""
        body = entry.get("text", 0)  # 0: there is no text, which is refused below; null is an empty one
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
        raise ValueError(columns_fault(columns, line, fmt))
    pid, body, title = columns
    if not pid or "\t" in pid or "\r" in pid:
        raise ValueError(f"{pid!r} cannot be a passage id")
    return pid, title, body


def columns_fault(columns, line, fmt):
    """Return what is wrong with a line that has not three columns, and what it may be."""
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
    return f"expected 3 columns ({names}), got {len(columns)}{advice}"


def names_columns(columns):
    """Return whether the columns of a first line are names, such as `docid contents title` or `qid query`."""
    words = [re.findall("[a-z]+", column.lower()) for column in columns]
    return all(named and COLUMN_NAMES.issuperset(named) for named in words)


def is_header(path, fields, fmt):
    """Return whether the first line names the columns. UserError when it names them in another order."""
    pid, title, text = fields
    columns = [pid, text, title]
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
    # why 15 characters: a name beside an empty or short text is no sign of a swap
    return title > 15 and title > 2 * text
