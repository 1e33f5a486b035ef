"""Lines of utf-8 text and of jsonl, read in constant memory, with errors that name file and line."""

import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from utils.plumbing.config import UserError, file_fault

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a character beyond 16 bits, which json may write as two


def not_json(constant):
    raise ValueError(f"{constant} is not json")


class Decoder(json.JSONDecoder):
    """trap: python's json accepts NaN, Infinity, and half a character, at which every tokenizer fails."""

    def raw_decode(self, text, idx=0):
        value, end = super().raw_decode(text, idx)
        if HALF.search(text, idx, end):
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
        return value, end


DECODER = Decoder(parse_constant=not_json)


def read_lines(path, digest=None):
    """
    (line number, byte offset, text with its line end) of every line of a utf-8 file, in constant memory.

    Lines end at \\n only (U+2028 is text); a byte-order mark is skipped. `digest` is fed every byte.
    """
    if fault := file_fault(path):
        raise UserError(f"{path}: {fault}")
    number, offset, size = 0, 0, os.path.getsize(path)
    bar = tqdm(
        desc=f"reading {Path(path).name}", total=size, unit="B", unit_scale=True, delay=5, disable=None
    )
    with bar, open(path, "rb") as file:
        while lines := file.readlines(1 << 22):
            if offset == 0 and lines[0].startswith(b"\x1f\x8b"):
                raise UserError(f"{path}: is compressed; unpack it first: gunzip {path}")
            if digest:
                digest.update(b"".join(lines))
            for line in lines:
                number += 1
                begin, offset = offset, offset + len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    begin, line = 3, line[3:]
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    where = f"{path}:{number}: byte {begin + error.start} of the file"
                    raise UserError(f"{where} is not utf-8; convert the file (iconv)") from None
                if "\0" in text:
                    where = f"{path}:{number}: byte {begin + line.index(0)} of the file"
                    raise UserError(f"{where} is zero, which no text has; get the file again")
                yield number, begin, text
            bar.update(offset - bar.n)


def iter_jsonl(path):
    """(line number, dict) of every line of a jsonl file, in constant memory; blank lines are skipped."""
    for number, _, text in read_lines(path):
        if not text.strip():
            continue
        if number == 1 and text.lstrip().startswith("["):
            fix = f"convert it: python -m prepare.convert dpr_json {path} OUT.jsonl"
            raise UserError(f"{path}: is one json list, expected one object a line; {fix}")
        try:
            entry = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a json object on one line: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: expected a json object, got {text.strip()[:40]}")
        yield number, entry
