"""
How many negatives hold an answer, before and after RocketQA's gate, of a run of recipes/claim_rocketqa.sh.

In:  RUN/{bm25,c,mined,gated,checked,filtered}.jsonl, RUN/gate.txt; RUN/data/{corpus.tsv,train_answers.jsonl}
Out: RUN/shares.json: shares with n, the number of negatives, and a 95 % bootstrap interval; also printed
Run: python recipes/false_negatives.py runs/claim_rocketqa

An answer in a passage does not prove that the passage is right, and a right passage may use other words. So
read some of them too. A corpus may hold a passage in two versions: a copy of the labelled one is an easy
false negative, and is counted apart.
"""

import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data import Corpus, iter_lists, read_questions  # noqa: E402
from utils.metrics import print_table, with_intervals  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import write_json  # noqa: E402
from utils.text import has_answer  # noqa: E402

FILES = ("bm25", "c", "mined", "gated", "checked", "filtered")  # checked: gated without unchecked passages


def negatives_of(path):
    """Return {qid: [ids of its negatives]} of a training file; a question may have several lines."""
    negatives = {}
    for qid, (pids, _) in iter_lists(path):
        negatives.setdefault(qid, []).extend(pids)
    return negatives


def triples(text):
    """Return the three-word sequences of a text."""
    words = re.findall(r"\w+", text.lower())
    return {*zip(words, words[1:], words[2:], strict=False)}


def is_copy(text, other):
    """Return whether two texts have more than a fifth of the shorter one's three-word sequences in common."""
    mine, theirs = triples(text), triples(other)
    return len(mine & theirs) > 0.2 * min(len(mine), len(theirs))


# answer: 1.0 where the passage holds an answer. copied: it does, and is a copy of a labelled passage
Negative = namedtuple("Negative", "qid pid answer copied")


def judge(negatives, questions, corpus):
    """Return a Negative for each one of negatives_of()."""
    judged = []
    for qid, pids in negatives.items():
        question = questions[qid]
        labelled = [corpus.passage(pid).text for pid in question["positives"]]
        for pid in pids:
            text = corpus.passage(pid).text
            answer = has_answer(text, question["answers"])
            copied = answer and any(is_copy(text, other) for other in labelled)
            judged.append(Negative(qid, pid, float(answer), copied))
    return judged


def shares(files, questions, corpus):
    """
    Return {name: [a number a negative]}: 1 where it holds an answer.

    files: {name: negatives_of(its path)}. "thrown out": the negatives of "mined" that "gated" lacks. "gated -
    mined": a number a question, the difference of its two shares. ", no copy": 1 where it holds an answer and
    is no copy of a labelled passage. "thrown of ...": 1 where "gated" lacks a negative of "mined".
    """
    questions = {question["qid"]: question for question in questions}
    judged = {name: judge(negatives, questions, corpus) for name, negatives in files.items()}
    values = {name: [row.answer for row in rows] for name, rows in judged.items()}

    # the change of each question's share
    by_question = {"mined": {}, "gated": {}}
    for name, answers in by_question.items():
        for row in judged[name]:
            answers.setdefault(row.qid, []).append(row.answer)
    after = by_question["gated"]
    values["gated - mined"] = [np.mean(after[q]) - np.mean(was) for q, was in by_question["mined"].items()]

    # without the copies
    for name in by_question:
        values[f"{name}, no copy"] = [row.answer * (not row.copied) for row in judged[name]]

    # what the gate throws out: of the false negatives that are no copies, and of those without an answer
    values |= {"thrown out": [], "thrown of false, no copy": [], "thrown of others": []}
    for row in judged["mined"]:
        thrown = float(row.pid not in files["gated"][row.qid])
        if thrown:
            values["thrown out"].append(row.answer)
        if not row.answer:
            values["thrown of others"].append(thrown)
        elif not row.copied:
            values["thrown of false, no copy"].append(thrown)
    return {name: numbers for name, numbers in values.items() if numbers}


def main(run):
    """Write shares.json. UserError unless the arms have equally many lines, that is equally many updates."""
    run = Path(run)
    files = {name: negatives_of(run / f"{name}.jsonl") for name in FILES}
    counts = {name: [(qid, len(pids)) for qid, pids in files[name].items()] for name in FILES}
    for name in ("gated", "filtered"):
        if counts[name] != counts["mined"]:
            cure = "take a larger DEPTH, in another RUN, so that each question finds its negatives"
            raise UserError(f"{run}/{name}.jsonl: not as many negatives a question as mined.jsonl; {cure}")
    questions, corpus = read_questions(run / "data/train_answers.jsonl"), Corpus(run / "data/corpus.tsv")
    result = with_intervals(shares(files, questions, corpus))
    print_table(result, "negatives with an answer")
    size = {"questions": len(questions), "passages": len(corpus)}
    write_json(run / "shares.json", size | {"below": float((run / "gate.txt").read_text()), "shares": result})


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 2:
            raise UserError("usage: python recipes/false_negatives.py RUN")
        main(sys.argv[1])
