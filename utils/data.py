"""
The on-disk formats, which nothing else knows: question files (jsonl), rankings (.run), corpora (corpus.py).

A question file has one example a line: {"qid", "question", "answers": [], "positives": [], "negatives": []},
all but `qid` and `question` optional; a passage is a corpus id or an inline {"title", "text"}. A .run has the
lines `qid \\t pid \\t rank \\t score`, ranks from 1, best first.
Other formats become these: python -m prepare.convert FORMAT IN... OUT
"""

import json
import math
import sys
import unicodedata

from utils.corpus import Corpus as Corpus
from utils.corpus import Passage
from utils.lines import iter_jsonl, read_lines
from utils.plumbing.config import UserError, friendly_errors
from utils.plumbing.files import atomic_file


def blank(answer):
    """True when DPR's tokenizer finds nothing in it: such an answer would match every passage."""
    return all(unicodedata.category(c)[0] in "ZC" for c in answer)


def check_passage(entry):
    if isinstance(entry, dict):
        return isinstance(entry.get("text"), str) and isinstance(entry.get("title", ""), str)
    return isinstance(entry, str) and entry != ""


def read_questions(path, need=(), repeats=False):
    """
    The examples of a question file as dicts; absent lists become [], keys of your own are kept.

    need: lists that every line must have (may be empty) and that may not be empty everywhere, such as
    ("answers",). repeats: a qid may come back. Blank answers are removed, and counted in one warning.
    UserError names file:line.
    """
    questions, seen, blanks = [], {}, 0
    for number, q in iter_jsonl(path):
        where = f"{path}:{number}"
        for key in ("qid", "question"):
            if not isinstance(q.get(key), str) or not q[key].strip():
                raise UserError(f"{where}: {key!r} must be a string with something in it, got {q.get(key)!r}")
        if "\t" in q["qid"] or "\n" in q["qid"]:
            raise UserError(f"{where}: a qid cannot hold tabs or line breaks, got {q['qid']!r}")
        if seen.setdefault(q["qid"], number) != number and not repeats:
            raise UserError(
                f"{where}: qid {q['qid']!r} is already on line {seen[q['qid']]}; qids must differ"
            )
        for key in ("answers", "positives", "negatives"):
            if key in need and key not in q:
                raise UserError(f"{where}: {key!r} is missing; this step needs it (an empty list is allowed)")
            kind = "strings" if key == "answers" else 'corpus ids (strings) or {"title", "text"} objects'
            fits = (lambda a: isinstance(a, str)) if key == "answers" else check_passage
            if not isinstance(q.setdefault(key, []), list) or not all(map(fits, q[key])):
                raise UserError(f"{where}: {key!r} must be a list of {kind}, got {str(q[key])[:60]!r}")
        answers = [a for a in q["answers"] if not blank(a)]
        blanks += len(q["answers"]) - len(answers)
        q["answers"] = answers
        questions.append(q)
    if not questions:
        raise UserError(f"{path}: no questions in it")
    for key in need:
        if not any(q[key] for q in questions):
            raise UserError(f"{path}: no question has any {key}; this step needs some")
    if blanks:
        print(f"warning: {path}: {blanks} blank answers left out", file=sys.stderr)
    return questions


def read_training(path, corpus):
    """
    (the questions of `path` that have a positive passage, a line that says what was left out). corpus: where
    passage ids must be found, or None. UserError for an id that is not there, and when no question is left.
    """
    examples = read_questions(path, repeats=True)  # why: RocketQA has one line for each negative
    kept = [example for example in examples if example["positives"]]
    for example in kept:
        for entry in example["positives"] + example["negatives"]:
            if isinstance(entry, str):
                if corpus is None:
                    raise UserError(
                        f"{path}: question {example['qid']} names passage {entry!r}, but corpus is empty"
                    )
                corpus.row(entry)
    if not kept:
        raise UserError(f"{path}: none of its {len(examples)} questions has a positive passage")
    bare = sum(not example["negatives"] for example in kept)
    note = f"{path}: {len(kept)} questions, {len(examples) - len(kept)} without a positive left out"
    return kept, f"{note}, {bare} have no negative of their own"


def passage_of(entry, corpus):
    """The Passage that an entry of `positives` or `negatives` means; an inline one gets the id ""."""
    if isinstance(entry, dict):
        return Passage("", entry.get("title", ""), entry["text"])
    if corpus is None:
        raise UserError(f"passage {entry!r} is named by its id: give the corpus too")
    return corpus[corpus.row(entry)]


def passage_key(entry):
    """Return what makes two entries the same passage: the corpus id, or title and text of an inline passage."""
    if isinstance(entry, str):
        return entry
    return entry.get("title", ""), entry["text"]


def ranked(results):
    """(qid, pid, rank, score as text) of every line; `results` is [(qid, [(pid, score), ...]), ...]."""
    for qid, hits in results:
        for rank, (pid, score) in enumerate(hits, 1):
            if not math.isfinite(score):
                raise UserError(
                    f"question {qid!r}: the score of passage {pid!r} is {score}; check the vectors"
                )
            yield qid, pid, rank, repr(float(score))  # why repr: it reads back to the same bits


def write_run(path, results):
    """Write [(qid, [(pid, score), ...]), ...], best first, in the .run format (RocketQA's own)."""
    with atomic_file(path) as file:
        for qid, pid, rank, score in ranked(results):
            file.write(f"{qid}\t{pid}\t{rank}\t{score}\n")


def write_trec(path, results, tag="run"):
    """The same in TREC's six columns, `qid Q0 pid rank score tag`, for trec_eval."""
    with atomic_file(path) as file:
        for qid, pid, rank, score in ranked(results):
            if len(f"{qid} {pid}".split()) != 2:
                raise UserError(f"{path}: TREC's columns end at spaces; {qid!r} or {pid!r} holds one")
            file.write(f"{qid} Q0 {pid} {rank} {score} {tag}\n")


def write_dpr_json(path, questions, results, corpus, hits):
    """DPR's result json, the input of its reader. hits: per question, one bool per passage found."""
    with atomic_file(path) as file:
        for i, (q, (_, found), has) in enumerate(zip(questions, results, hits, strict=True)):
            ctxs = [
                {**corpus[corpus.row(pid)]._asdict(), "score": repr(float(score)), "has_answer": bool(hit)}
                for (pid, score), hit in zip(found, has, strict=True)
            ]
            entry = {"question": q["question"], "answers": q["answers"], "ctxs": ctxs}
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(entry, indent=4, ensure_ascii=False))
        file.write("\n]\n")


def iter_run(path):
    """(qid, [(pid, score), ...]), best first, of every question of a .run, validated, in constant memory."""
    qid, hits, pids, done = None, [], set(), set()
    for number, _, text in read_lines(path):
        where, columns = f"{path}:{number}", text.rstrip("\r\n").split("\t")
        try:
            this, pid, rank, score = columns[0], columns[1], int(columns[2]), float(columns[3])
        except (ValueError, IndexError):
            this = None
        if this is None or len(columns) != 4:
            raise UserError(f"{where}: expected `qid \\t pid \\t rank \\t score`, got {text.strip()[:60]!r}")
        if this != qid:
            if hits:
                yield qid, hits
            done.add(qid)
            qid, hits, pids = this, [], set()
            if qid in done:
                raise UserError(
                    f"{where}: question {qid!r} comes back; keep its lines together (sort the file)"
                )
        if pid in pids:
            raise UserError(f"{where}: passage {pid!r} is ranked twice for question {qid!r}")
        if rank != len(hits) + 1:
            raise UserError(
                f"{where}: expected rank {len(hits) + 1} for question {qid!r}, got {rank}; sort by rank"
            )
        if not math.isfinite(score) or (hits and score > hits[-1][1]):
            raise UserError(
                f"{where}: score {score} under rank {rank} is not in descending order; sort by score"
            )
        hits.append((pid, score))
        pids.add(pid)
    if not hits:
        raise UserError(f"{path}: no ranking in it")
    yield qid, hits


def aligned_reader(path, items, other):
    """
    (take, check) for a file in the order of another, of which one question is in memory. items: (qid, value),
    read from `path`. take(qid) gives its value, or None; check() raises UserError when an item was never
    asked for, so that nothing is lost.
    """
    ahead = [next(items, None)]

    def take(qid):
        if ahead[0] is None or ahead[0][0] != qid:
            return None
        value, ahead[0] = ahead[0][1], next(items, None)
        return value

    def check():
        if ahead[0] is not None:
            where = f"{path}: question {ahead[0][0]!r} is not in {other}, or not in its order"
            raise UserError(f"{where}; both must come from one question file")

    return take, check


def read_run(path):
    """A .run as {qid: [(pid, score), ...]}, best first; UserError names the first line that is wrong."""
    return dict(iter_run(path))


if __name__ == "__main__":  # python -m prepare.convert ...
    from prepare.convert import main  # not needed by anyone who only reads

    with friendly_errors():
        main(sys.argv[1:])
