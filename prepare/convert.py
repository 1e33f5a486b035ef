"""
Other people's files become question files (jsonl, see utils/data.py), streamed: DPR's json is 7 GB.

Run: python -m prepare.convert FORMAT IN... OUT
  dpr_json  biencoder-nq-train.json            OUT   DPR's training json; --ids writes passage ids, not texts
  dpr_qa    nq-test.qa.csv                     OUT   question \\t python list of answers
  nq_open   NQ-open.dev.jsonl                  OUT   {"question", "answer": [...]}
  msmarco   queries.train.tsv [qrels.tsv]      OUT   without qrels: unlabelled questions
  beir      queries.jsonl     [qrels/test.tsv] OUT
"""

import argparse
import ast
import csv
import json
import re
import warnings
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from utils.lines import DECODER, iter_jsonl, read_lines
from utils.plumbing.config import UserError, file_fault, need_out
from utils.plumbing.files import atomic_file

BLOCK = 1 << 22  # characters
SEPARATOR = re.compile(r"[\s,]*")


def iter_json_list(path):
    """(index, object) of a file that is one json list of objects, in the memory of one block."""
    if fault := file_fault(path):
        raise UserError(f"{path}: {fault}")
    buffer, at, line, index, opened = "", 0, 1, 0, False
    size = Path(path).stat().st_size
    bar = tqdm(desc=f"reading {path}", total=size, unit="B", unit_scale=True, delay=5, disable=None)
    with bar, open(path, encoding="utf-8-sig") as file:
        while True:
            at, problem = SEPARATOR.match(buffer, at).end(), None
            if at < len(buffer) and not opened:
                if buffer[at] != "[":
                    raise UserError(
                        f"{path}: does not start with [, so it is no json list; is it jsonl already?"
                    )
                at, opened = at + 1, True
                continue
            if buffer[at : at + 1] == "]":
                return
            try:
                entry, at = DECODER.raw_decode(buffer, at)
            except UnicodeEncodeError as error:
                raise UserError(f"{path}: example {index}: holds half a character: {error}") from None
            except ValueError as error:
                problem = error
            else:
                if not isinstance(entry, dict):
                    raise UserError(f"{path}: example {index} is {str(entry)[:40]!r}, expected an object")
                yield index, entry
                index += 1
                continue
            # The buffer ends inside an example, or the json is wrong.
            pos, message = getattr(problem, "pos", at), getattr(problem, "msg", str(problem))
            cut = pos > len(buffer) - 16 or message.startswith("Unterminated string")
            try:
                more = file.read(max(BLOCK, len(buffer) - at)) if cut else ""
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not utf-8 ({error}); is it still compressed? gunzip it") from None
            if not more:
                where = f"{path}:{line + buffer.count(chr(10), 0, pos)}: example {index}"
                raise UserError(
                    f"{where}: {'the file ends too early' if cut else message}; get the file again"
                )
            line += buffer.count("\n", 0, at)
            buffer, at = buffer[at:] + more, 0
            bar.update(len(more))


def strings(value, where):
    """A list of answers as it is; UserError when it is anything else."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: the answers must be a list of strings, got {str(value)[:60]!r}")
    return value


def from_dpr_json(path, counts, ids=False):
    """DPR's training json. positives[0] stays first: DPR trains on that one."""

    def passages(ctxs):
        for ctx in ctxs:
            pid = ctx.get("passage_id", ctx.get("psg_id")) if ids else None
            if ids and not pid:
                raise UserError(f"{path}: example {index} has a passage without an id; convert without --ids")
            yield str(pid) if ids else {"title": ctx.get("title") or "", "text": ctx["text"]}

    for index, entry in iter_json_list(path):
        try:
            question, positives = entry["question"], list(passages(entry["positive_ctxs"]))
            # from: DPR dpr/models/biencoder.py:188 (hard_neg_fallback)
            hard = entry.get("hard_negative_ctxs") or entry.get("negative_ctxs") or []
            negatives = [p for p in passages(hard) if p not in positives]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: example {index} is not DPR's: {error!r}; wrong file?") from None
        if not positives and not ids:
            counts["dropped, no positive"] += 1
            continue
        counts["without a positive, kept"] += not positives  # why: ANCE-Tele finds one (--positives find)
        counts["negatives that are positives too, left out"] += len(hard) - len(negatives)
        counts["without negatives"] += not negatives
        answers = strings(entry.get("answers", []), f"{path}: example {index}")
        yield {"question": question, "answers": answers, "positives": positives, "negatives": negatives}


def from_dpr_qa(path, counts):
    """question \\t python list of answers; never eval, which would run what the file says."""
    rows = csv.reader((text for _, _, text in read_lines(path)), delimiter="\t")
    try:
        for row in rows:
            if len(row) != 2:
                raise ValueError(f"expected 2 columns (question, list of answers), got {len(row)}")
            yield {"question": row[0], "answers": strings(literal(row[1]), f"{path}:{rows.line_num}")}
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None


def literal(text):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # why: CuratedTREC's answers are patterns, and "\d" is no python escape
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            return DECODER.decode(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{text[:60]!r} is not a list of answers") from None


def from_nq_open(path, counts):
    for number, entry in iter_jsonl(path):
        answers = strings(entry.get("answer"), f"{path}:{number}")
        yield {"question": entry.get("question"), "answers": answers}


def judged(queries, qrels, counts):
    """Questions with positives. queries: [(qid, text)]; qrels: a file, or None: all of them, unlabelled."""
    positives = {}
    for number, _, text in read_lines(qrels) if qrels else ():
        columns = text.split()
        if number == 1 and columns and columns[0] == "query-id":
            continue  # BEIR's header
        if len(columns) not in (2, 3, 4) or not columns[-1].isdigit() and len(columns) > 2:
            raise UserError(
                f"{qrels}:{number}: expected `qid 0 pid relevance`, `qid pid relevance` or `qid pid`"
            )
        if len(columns) == 2 or int(columns[-1]) > 0:
            positives.setdefault(columns[0], []).append(columns[2] if len(columns) == 4 else columns[1])
    for qid, text in queries:
        found = positives.pop(qid, [])
        if qrels and not found:
            counts["dropped, not judged"] += 1
            continue
        yield {"qid": qid, "question": text} | ({"positives": list(dict.fromkeys(found))} if qrels else {})
    counts["judged but not among the questions"] += len(positives)


def from_msmarco(path, counts, qrels=None):
    def queries():
        for number, _, text in read_lines(path):
            columns = text.rstrip("\r\n").split("\t")
            if len(columns) != 2:
                raise UserError(f"{path}:{number}: expected 2 columns (qid, question), got {len(columns)}")
            yield columns

    return judged(queries(), qrels, counts)


def from_beir(path, counts, qrels=None):
    return judged(((q.get("_id"), q.get("text")) for _, q in iter_jsonl(path)), qrels, counts)


def main(argv):
    formats = {f.__name__[5:]: f for f in (from_dpr_json, from_dpr_qa, from_nq_open, from_msmarco, from_beir)}
    parser = argparse.ArgumentParser("python -m utils.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("verb", choices=["convert"])
    parser.add_argument("format", choices=formats)
    parser.add_argument("inputs", nargs="+", metavar="IN... OUT")
    parser.add_argument(
        "--ids", action="store_true", help="dpr_json: passages as the ids that the file gives"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    *inputs, out = args.inputs
    need_out(argparse.Namespace(OUT=out), "OUT")
    if Path(out).resolve() in [Path(path).resolve() for path in inputs]:
        raise UserError(f"{out}: OUT is the input too; name another file")
    judged_format = args.format in ("msmarco", "beir")
    if not 1 <= len(inputs) <= 1 + judged_format:
        raise UserError(
            f"convert {args.format} takes {'1 or 2 inputs' if judged_format else '1 input'} and OUT"
        )
    if args.ids and args.format != "dpr_json":
        raise UserError("--ids belongs to dpr_json")
    extra = {"ids": args.ids} if args.format == "dpr_json" else {"qrels": inputs[1]} if inputs[1:] else {}
    counts, seen, stem = Counter(), set(), Path(out).name.split(".")[0]
    with atomic_file(out) as file:
        for i, entry in enumerate(formats[args.format](inputs[0], counts, **extra)):
            entry = {"qid": f"{stem}-{i}"} | entry
            if not all(isinstance(entry[k], str) and entry[k].strip() for k in ("qid", "question")):
                raise UserError(f"{inputs[0]}: question {i} is empty or not text: {str(entry)[:80]}")
            if entry["qid"] in seen:
                raise UserError(f"{inputs[0]}: question id {entry['qid']!r} is there twice")
            seen.add(entry["qid"])
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            counts["questions"] += 1
        if not counts["questions"]:
            raise UserError(f"{inputs[0]}: no question left: {dict(counts)}")
    print(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n))
