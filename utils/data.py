"""
The files that pass between stages: question files (jsonl), rankings (.run), corpora (utils/corpus.py).

A question file has one example a line: {"qid", "question", "answers": [], "positives": [], "negatives": []}.
All but `qid` and `question` are optional. A passage is a corpus id or an inline {"title", "text"}. "grades"
may say how relevant each positive is, in numbers above 0; nDCG counts them. A .run has the lines
`qid \\t pid \\t rank \\t score`: ranks begin at 1, the best passage comes first.
Other formats become these: python -m prepare.convert FORMAT IN... OUT

pid: a passage's id · row: its place in the corpus. corpus.passage(pid) and corpus[row] give the Passage
What a file must not hold is refused in utils/plumbing/checks.py.
"""

import math
import sys

import numpy as np

from prepare.hints import foreign
from utils.corpus import Corpus, Passage, passage_key, passage_of  # noqa: F401 (scripts get them from here)
from utils.plumbing.checks import (
    check_ids,
    check_question,
    is_blank,
    is_passage,
    refuse_patterns,
    refuse_patterns_to_learn,
)
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file
from utils.plumbing.lines import iter_jsonl, read_lines


# ---------------------------------------------------------------- question files
def read_questions(path, need=(), repeats=False, match=""):
    """
    Return the examples of a question file as dicts. Absent lists become []; keys of your own are kept.

    need: lists that every line must have, such as ("answers",); some may be empty, but not all of them.
    repeats: a qid may come back. match: how the answers will be looked for, string or regex; "" for not at
    all. Blank answers are left out. UserError names file:line.
    """
    questions = []
    line_of = {}
    blanks = 0
    for number, question in iter_jsonl(path):
        where = f"{path}:{number}"
        if hint := foreign(question, path):
            raise UserError(f"{path}: {hint}")
        check_question(question, where, need)
        qid = question["qid"]
        if qid in line_of and not repeats:
            raise UserError(f"{where}: qid {qid!r} is already on line {line_of[qid]}; qids must differ")
        line_of[qid] = number
        answers = [answer for answer in question["answers"] if not is_blank(answer)]
        blanks += len(question["answers"]) - len(answers)
        question["answers"] = answers
        questions.append(question)

    if not questions:
        raise UserError(f"{path}: no questions in it")
    for key in need:
        if not any(question[key] for question in questions):
            raise UserError(f"{path}: no question has any {key}; this step needs some")
    if match == "string":
        refuse_patterns(questions, path)
    if blanks:
        print(f"warning: {path}: {blanks} blank answers left out", file=sys.stderr)
    return questions


def read_training(path, corpus):
    """Return (the questions that have a positive passage, a line on those left out). corpus: may be None."""
    examples = read_questions(path, repeats=True)  # why: RocketQA has one line for each negative
    kept = [example for example in examples if example["positives"]]
    if not kept:
        raise UserError(f"{path}: none of its {len(examples)} questions has a positive passage")
    check_ids(path, kept, corpus, "positives", "negatives")
    bare = sum(not example["negatives"] for example in kept)
    note = f"{path}: {len(kept)} questions, {len(examples) - len(kept)} without a positive left out"
    return kept, f"{note}, {bare} have no negative of their own"


def items_of_step(step, count, cfg):
    """
    Return (epoch, the items of the global batch of a step). An epoch is a permutation of `count` items, a
    step is a slice of it; an unfilled last batch is dropped.
    """
    epoch, offset = divmod(step, count // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(count).tolist()
    start = offset * cfg.batch_size
    return epoch, order[start : start + cfg.batch_size]


def question_key(text):
    """Return what makes two questions the same: their words, without case and a question mark at the end."""
    return " ".join(text.casefold().split()).rstrip("? ")


def is_itself(question, pid):
    """
    Return whether a passage is the question's own document: it has the question's id and is no positive.

    In ArguAna and Quora (BEIR) the questions are documents of the corpus. Each finds itself first.
    """
    return pid == question["qid"] and pid not in question["positives"]


# ---------------------------------------------------------------- rankings
def write_run(path, results):
    """Write [(qid, [(pid, score), ...]), ...], the best passage first, as a .run (RocketQA's format)."""
    with atomic_file(path) as file:
        for qid, hits in results:
            for rank, (pid, score) in enumerate(hits, 1):
                if not math.isfinite(score):
                    raise UserError(f"question {qid!r}: the score of {pid!r} is {score}; check the vectors")
                # why !r: it reads back to the same bits
                file.write(f"{qid}\t{pid}\t{rank}\t{float(score)!r}\n")


def iter_run(path):
    """Yield (qid, [(pid, score), ...]) of every question of a .run, best first. UserError names the line."""
    qid = None
    hits = []
    pids = set()
    finished = set()
    for number, _, text in read_lines(path):
        where = f"{path}:{number}"
        if not text.strip():
            continue
        try:
            line_qid, pid, rank, score = text.rstrip("\r\n").split("\t")
            rank = int(rank)
            score = float(score)
        except ValueError:
            raise UserError(f"{where}: expected qid \\t pid \\t rank \\t score, got {text[:60]!r}") from None

        # the next question begins
        if line_qid != qid:
            if hits:
                yield qid, hits
            finished.add(qid)
            qid = line_qid
            hits = []
            pids = set()
            if qid in finished:
                raise UserError(f"{where}: question {qid!r} comes back; sort the file by question")

        # the next passage of the question
        fault = ""
        if pid in pids:
            fault = f"passage {pid!r} is ranked twice for question {qid!r}"
        elif rank != len(hits) + 1:
            fault = f"expected rank {len(hits) + 1} for question {qid!r}, got {rank}; sort by rank"
        elif not math.isfinite(score) or (hits and score > hits[-1][1]):
            fault = f"score {score} under rank {rank} is not in descending order; sort by score"
        if fault:
            raise UserError(f"{where}: {fault}")
        hits.append((pid, score))
        pids.add(pid)
    if not hits:
        raise UserError(f"{path}: no ranking in it")
    yield qid, hits


def iter_rankings(path, qids, depth):
    """Yield (qid, [(pid, score), ...]), the first `depth` passages, of those of `qids` that a .run ranks."""
    for qid, hits in iter_run(path):
        if qid in qids:
            yield qid, hits[:depth]


def read_run(path):
    """Return a .run as {qid: [(pid, score), ...]}, the best passage first."""
    return dict(iter_run(path))


def named_hits(question, hits, corpus, k, ignore_identical_ids):
    """Return the best k [(pid, score), ...] of a question from its [(row, score), ...], best first."""
    named = [(corpus[row].id, score) for row, score in hits]
    if ignore_identical_ids:
        named = [(pid, score) for pid, score in named if not is_itself(question, pid)]
    return named[:k]


# ---------------------------------------------------------------- two files side by side
def read_ranking(path, run, corpus, depth, need=("answers",)):
    """
    Read a question file and its ranking for a reader: (examples, a note that says how deep the ranking is).

    An example is {"qid", "question", "answers", "rows": those of its first `depth` passages in the corpus}.
    """
    examples = {}
    for question in read_questions(path, need=need, match="string"):
        example = {key: question[key] for key in ("qid", "question", "answers")}
        examples[question["qid"]] = example | {"rows": np.zeros(0, dtype=np.int64)}
    refuse_patterns_to_learn(path, list(examples.values()))

    # the passages of each question, best first
    for qid, hits in iter_run(run):
        if qid in examples:
            rows = [corpus.row(pid, run) for pid, _ in hits[:depth]]
            examples[qid]["rows"] = np.array(rows)
    examples = list(examples.values())

    # how many passages the questions have
    depths = [len(example["rows"]) for example in examples if len(example["rows"])]
    without = [example["qid"] for example in examples if not len(example["rows"])]
    if not depths:
        raise UserError(f"{run}: has passages for none of the questions of {path}")
    note = f"{path}: {len(examples)} questions"
    if without:
        note += f", {len(without)} of them without passages, such as {without[0]}"
    note += f"; passages each: {min(depths)} or more, median {np.median(depths):g}"
    short = sum(size < depth for size in depths)
    if short:
        note += f"\nwarning: {run}: {short} questions have passages, but fewer than the {depth} asked for"
    return examples, note


def iter_lists(path):
    """Yield (qid, (negatives, positives)) of every line of a training file."""
    for number, example in iter_jsonl(path):
        lists = (example.get("negatives"), example.get("positives") or [])
        for name, passages in zip(("negatives", "positives"), lists, strict=True):
            if not isinstance(passages, list) or not all(map(is_passage, passages)):
                fault = f"{name!r} must be a list of passages; not a training file"
                raise UserError(f"{path}:{number}: {fault}")
        yield example.get("qid"), lists


def aligned_reader(path, items, other):
    """
    Read the (qid, value) pairs `items` of a file that lists its questions in the same order as `other`.

    Return two functions: take(qid) gives the value of a question, or None if the file skips it; check()
    raises UserError if a value was never taken.
    """
    upcoming = next(items, None)

    def take(qid):
        nonlocal upcoming
        if upcoming is None or upcoming[0] != qid:
            return None
        value = upcoming[1]
        upcoming = next(items, None)
        return value

    def check():
        if upcoming is not None:
            where = f"{path}: question {upcoming[0]!r} is not in {other}, or not in its order"
            raise UserError(f"{where}; both must come from one question file")

    return take, check
