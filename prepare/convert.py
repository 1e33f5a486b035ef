"""
Other people's files become ours, and a ranking becomes theirs. All is streamed: DPR's json is 7 GB.

Run: python -m prepare.convert FORMAT IN... OUT
into a question file:
  dpr_json         biencoder-nq-train.json        OUT     DPR's training json; --ids: passages by id, not text
  dpr_qa           nq-test.qa.csv                 OUT     question \\t python list of answers
  nq_open          NQ-open.dev.jsonl              OUT     {"question", "answer": [...]}
  msmarco          queries.train.tsv [qrels.tsv]  OUT     without qrels: unlabelled questions
  beir             queries.jsonl [qrels/test.tsv] OUT
rankings:
  trec             test.run                       OUT     TREC's six columns, for trec_eval
  dpr_result       test.run test.jsonl corpus.tsv OUT     DPR's result json, which its reader reads
  from_dpr_result  result.json                    FOLDER  questions.jsonl, corpus.jsonl and result.run
"""

import argparse
import ast
import csv
import json
import warnings
from collections import Counter
from pathlib import Path

import ijson
from tqdm import tqdm

from utils.corpus import read_lines
from utils.data import Corpus, aligned_reader, iter_jsonl, iter_run, read_questions
from utils.plumbing.config import UserError, friendly_errors, need_file, need_folder, need_out
from utils.plumbing.files import atomic_file
from utils.text import has_answer


# ---------------------------------------------------------------- question files
def iter_json_list(path):
    """Yield (index, entry) of a file that is one json list, with one entry in memory."""
    bar = {"total": Path(path).stat().st_size, "desc": f"reading {path}", "delay": 5, "disable": None}
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", **bar) as blocks:
        if not file.read(64).lstrip().startswith(b"["):
            fix = "is it empty, jsonl already, or compressed (gunzip)?"
            raise UserError(f"{path}: does not start with [, so it is no json list; {fix}")
        file.seek(0)
        try:
            yield from enumerate(ijson.items(blocks, "item", use_float=True))
        except ijson.JSONError as error:
            fault = " ".join(str(error).split()).partition(" (right here)")[0]
            raise UserError(f"{path}: {fault}; get the file again") from None


def answer_list(value, where):
    """Return the value, a list of answers. UserError when it is anything else."""
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise UserError(f"{where}: the answers must be a list of strings, got {str(value)[:60]!r}")
    return value


def dpr_passages(ctxs, ids, where):
    """Return passages of DPR's training json as entries of a question file: {"title", "text"}, or ids."""
    if not ids:
        return [{"title": ctx.get("title") or "", "text": ctx["text"]} for ctx in ctxs]
    pids = [ctx.get("passage_id", ctx.get("psg_id")) for ctx in ctxs]
    if not all(pids):
        raise UserError(f"{where} has a passage without an id; convert without --ids")
    return [str(pid) for pid in pids]


def from_dpr_json(path, *, counts, ids=False):
    """Yield the questions of DPR's training json. positives[0] stays first: DPR trains on that one."""
    for index, entry in iter_json_list(path):
        where = f"{path}: example {index}"
        try:
            question = entry["question"]
            positives = dpr_passages(entry["positive_ctxs"], ids, where)
            # from: DPR dpr/models/biencoder.py:188 (hard_neg_fallback)
            hard = entry.get("hard_negative_ctxs") or entry.get("negative_ctxs") or []
            negatives = [passage for passage in dpr_passages(hard, ids, where) if passage not in positives]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is not DPR's: {error!r}; wrong file?") from None
        if not positives and not ids:
            counts["dropped, no positive"] += 1
            continue
        counts["without a positive, kept"] += not positives  # why: ANCE-Tele finds one (--positives find)
        counts["negatives that are positives too, left out"] += len(hard) - len(negatives)
        counts["without negatives"] += not negatives
        answers = answer_list(entry.get("answers", []), where)
        yield {"question": question, "answers": answers, "positives": positives, "negatives": negatives}


def from_dpr_qa(path, *, counts):
    """Yield the questions of DPR's csv: question \\t python list of answers."""
    rows = csv.reader((text for _, _, text in read_lines(path)), delimiter="\t")
    try:
        for question, cell in rows:
            # trap: DPR and nanoDPR use eval, which runs what the file says
            with warnings.catch_warnings(action="ignore"):  # why: a pattern's "\d" is no escape of python's
                answers = ast.literal_eval(cell)
            yield {"question": question, "answers": answer_list(answers, f"{path}:{rows.line_num}")}
    except (csv.Error, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}:{rows.line_num}: not `question \\t list of answers`: {error}") from None


def from_nq_open(path, *, counts):
    """Yield the questions of Google's jsonl, {"question", "answer": [...]}."""
    for number, entry in iter_jsonl(path):
        answers = answer_list(entry.get("answer"), f"{path}:{number}")
        yield {"question": entry.get("question"), "answers": answers}


def judged(queries, qrels, counts):
    """Yield those of the queries, (qid, text), that the file `qrels` judges; without qrels all of them."""
    positives = {}
    for number, _, text in read_lines(qrels) if qrels else ():
        columns = text.split()
        if number == 1 and columns[:1] == ["query-id"]:
            continue  # BEIR's header
        if len(columns) not in (2, 3, 4) or (len(columns) > 2 and not columns[-1].isdigit()):
            expected = "expected `qid 0 pid relevance`, `qid pid relevance` or `qid pid`"
            raise UserError(f"{qrels}:{number}: {expected}")
        if len(columns) == 2 or int(columns[-1]) > 0:
            pid = columns[2] if len(columns) == 4 else columns[1]
            positives.setdefault(columns[0], {})[pid] = True  # why a dict: no id twice, in the file's order
    for qid, text in queries:
        if not qrels:
            yield {"qid": qid, "question": text}
        elif qid in positives:
            yield {"qid": qid, "question": text, "positives": list(positives.pop(qid))}
        else:
            counts["dropped, not judged"] += 1
    counts["judged but not among the questions"] += len(positives)


def msmarco_queries(path):
    for number, _, text in read_lines(path):
        columns = text.rstrip("\r\n").split("\t")
        if len(columns) != 2:
            raise UserError(f"{path}:{number}: expected 2 columns (qid, question), got {len(columns)}")
        yield columns


def from_msmarco(path, qrels=None, *, counts):
    return judged(msmarco_queries(path), qrels, counts)


def from_beir(path, qrels=None, *, counts):
    queries = ((entry.get("_id"), entry.get("text")) for _, entry in iter_jsonl(path))
    return judged(queries, qrels, counts)


def write_questions(out, source, entries, counts):
    """Write a question file. An entry without a qid gets its number."""
    stem = Path(out).name.split(".")[0]
    qids = set()
    with atomic_file(out) as file:
        for i, entry in enumerate(entries):
            entry = {"qid": f"{stem}-{i}"} | entry
            if not all(isinstance(entry[key], str) and entry[key].strip() for key in ("qid", "question")):
                raise UserError(f"{source}: question {i} is empty or not text: {str(entry)[:80]}")
            if entry["qid"] in qids:
                raise UserError(f"{source}: question id {entry['qid']!r} is there twice")
            qids.add(entry["qid"])
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if not qids:
            raise UserError(f"{source}: no question left: {dict(counts)}")
    counts["questions"] = len(qids)
    print(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n))


# ---------------------------------------------------------------- rankings
def to_trec(run, out):
    """Write a .run in TREC's six columns, `qid Q0 pid rank score tag`."""
    with atomic_file(out) as file:
        for qid, hits in iter_run(run):
            for rank, (pid, score) in enumerate(hits, 1):
                if len(f"{qid} {pid}".split()) != 2:
                    raise UserError(f"{out}: TREC's columns end at spaces; {qid!r} or {pid!r} holds one")
                file.write(f"{qid} Q0 {pid} {rank} {score!r} run\n")


def to_dpr_result(run, questions, corpus, out):
    """Write a .run as DPR's result json: the answers of every question, its passages, and who has_answer."""
    corpus = Corpus(corpus)
    take, check = aligned_reader(run, iter_run(run), questions)
    begin = "[\n"
    with atomic_file(out) as file:
        for question in read_questions(questions):
            ctxs = []
            for pid, score in take(question["qid"]) or []:
                passage = corpus.passage(pid)
                has = has_answer(passage.text, question["answers"])
                ctxs.append({**passage._asdict(), "score": repr(score), "has_answer": has})
            entry = {"question": question["question"], "answers": question["answers"], "ctxs": ctxs}
            file.write(begin + json.dumps(entry, indent=4, ensure_ascii=False))
            begin = ",\n"
        check()
        file.write("\n]\n")


def from_dpr_result(path, folder):
    """Write DPR's result json as questions.jsonl, corpus.jsonl and result.run in `folder`."""
    folder = Path(folder)
    pids = set()
    with (
        atomic_file(folder / "questions.jsonl") as questions,
        atomic_file(folder / "corpus.jsonl") as corpus,
        atomic_file(folder / "result.run") as run,
    ):
        for index, entry in iter_json_list(path):
            try:
                answers = answer_list(entry["answers"], f"{path}: example {index}")
                question = {"qid": str(index), "question": entry["question"], "answers": answers}
                questions.write(json.dumps(question, ensure_ascii=False) + "\n")
                scores = [float(ctx["score"]) for ctx in entry["ctxs"]]
                if scores != sorted(scores, reverse=True):
                    raise ValueError("its passages are not sorted by score")
                for rank, (ctx, score) in enumerate(zip(entry["ctxs"], scores, strict=True), 1):
                    pid = str(ctx["id"])
                    run.write(f"{index}\t{pid}\t{rank}\t{score!r}\n")
                    if pid not in pids:
                        passage = {"_id": pid, "title": ctx.get("title") or "", "text": ctx["text"]}
                        corpus.write(json.dumps(passage, ensure_ascii=False) + "\n")
                        pids.add(pid)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                fix = "DPR's training files are converted by dpr_json"
                raise UserError(f"{path}: example {index} is no retrieval result: {error!r}; {fix}") from None


QUESTIONS = {"dpr_json": from_dpr_json, "dpr_qa": from_dpr_qa, "nq_open": from_nq_open}
QUESTIONS |= {"msmarco": from_msmarco, "beir": from_beir}
RANKINGS = {"trec": to_trec, "dpr_result": to_dpr_result, "from_dpr_result": from_dpr_result}


def main(argv=None):
    parser = argparse.ArgumentParser("python -m prepare.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("format", choices=[*QUESTIONS, *RANKINGS])
    parser.add_argument("files", nargs="+", metavar="IN... OUT")
    parser.add_argument("--ids", action="store_true", help="dpr_json: passages by id, not by text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    # refuse wrong arguments before any work
    *inputs, out = args.files
    numbers = {"msmarco": (1, 2), "beir": (1, 2), "dpr_result": (3,)}.get(args.format, (1,))
    if len(inputs) not in numbers:
        raise UserError(f"{args.format} takes {' or '.join(map(str, numbers))} input files and OUT")
    if args.ids and args.format != "dpr_json":
        raise UserError("--ids belongs to dpr_json")
    for path in inputs:
        paths = argparse.Namespace(IN=path, OUT=out)
        if args.format == "from_dpr_result":
            need_folder(paths, "OUT")
        else:
            need_out(paths, "OUT")
        need_file(paths, "IN")

    if args.format in RANKINGS:
        RANKINGS[args.format](*inputs, out)
        print(f"written: {out}")
    else:
        options = {"ids": True} if args.ids else {}
        counts = Counter()
        entries = QUESTIONS[args.format](*inputs, counts=counts, **options)
        write_questions(out, inputs[0], entries, counts)


if __name__ == "__main__":
    with friendly_errors():
        main()
