"""
Text files, line by line: utf-8, and json lines. An error names the file, the line, and what else it may be.
"""

import json
import os
import re

from tqdm import tqdm

from prepare.hints import CONVERT, kind_of
from utils.plumbing.config import UserError, file_fault


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
                text = "\0"
            if "\0" in text:
                raise UserError(f"{path}:{number}: is no utf-8 text; convert it (iconv), or get it again")
            yield number, begin, text


def not_json(constant):
    raise ValueError(f"{constant} is not json")


def load_json(text):
    """Return the value in a line of json. ValueError says what is wrong."""
    value = json.loads(text, parse_constant=not_json)  # trap: python's json accepts NaN
    # trap: it also accepts half of a character that is written as two; every tokenizer fails at it
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
