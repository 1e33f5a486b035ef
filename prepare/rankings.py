"""
Rankings of TREC, DPR, FiD, Pyserini and RocketQA become ours, and ours TREC's and DPR's.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from prepare.questions import passage_id
from prepare.reading import answer_list, at_tabs_or_spaces, iter_entries, iter_table, not_of, number
from utils.data import Corpus, aligned_reader, iter_run, read_questions, write_run
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file
from utils.plumbing.lines import read_lines, split_contents
from utils.text import has_answer


# ---------------------------------------------------------------- TREC
def falling(scores):
    """
    Yield the scores, lowered by the least step of 32 bits where one is not below the score before it.

    why: trec_eval ignores the ranks, reads scores as 32 bits, and puts equal ones in an order of its own.
    """
    last = np.float32(np.inf)
    for score in scores:
        with np.errstate(over="ignore"):
            value = np.float32(score)
        if value >= last:
            value = np.nextafter(last, np.float32(-np.inf))
            score = float(value)
        if not np.isfinite(value):
            raise UserError(f"score {score} does not fit into 32 bits, which is what trec_eval reads")
        yield score
        last = value


def to_trec(run, out):
    """
    Write a .run in TREC's six columns, `qid Q0 pid rank score tag`. Scores fall strictly, so that every
    evaluator keeps our order; an equal score is written a little lower than the one before it.
    """
    with atomic_file(out) as file:
        for qid, hits in iter_run(run):
            scores = falling(score for _, score in hits)
            for rank, ((pid, _), score) in enumerate(zip(hits, scores, strict=True), 1):
                if len(f"{qid} {pid}".split()) != 2:
                    raise UserError(f"{out}: TREC's columns end at spaces; {qid!r} or {pid!r} holds one")
                file.write(f"{qid} Q0 {pid} {rank} {score!r} run\n")


def from_trec(path, out):
    """
    Write a TREC run as a .run, in the order in which trec_eval counts it: by the score in 32 bits, equal ones
    by passage id from the last to the first. The rank column is ignored, as there.
    """
    rankings = {}
    for place, columns in iter_table(path, at_tabs_or_spaces, header=False):
        if len(columns) != 6:
            raise UserError(f"{place}: expected `qid Q0 pid rank score tag`, got {len(columns)} columns")
        qid, _, pid, _, score, _ = columns
        hits = rankings.setdefault(qid, {})
        if pid in hits:
            raise UserError(f"{place}: passage {pid!r} of question {qid!r} is there twice")
        hits[pid] = number(score, place)

    def as_trec_eval(hit):
        pid, score = hit
        return np.float32(score), pid.encode()

    def ordered():
        for qid, hits in rankings.items():
            ranked = sorted(hits.items(), key=as_trec_eval, reverse=True)
            # why a minimum: two scores that are equal in 32 bits may rise in 64
            lowest = np.minimum.accumulate([score for _, score in ranked]).tolist()
            yield qid, [(pid, score) for (pid, _), score in zip(ranked, lowest, strict=True)]

    if not rankings:
        raise UserError(f"{path}: no ranking in it")
    write_run(out, ordered())


# ---------------------------------------------------------------- RocketQA
def from_rocketqa_scores(run, scores, out):
    """
    Write a .run with the scores of RocketQA's cross-encoder, a file with one number a line, best first.

    The numbers belong to the lines of the .run, or to the first N of each question (N = numbers / questions).
    """
    lengths = [len(hits) for _, hits in iter_run(run)]
    values = [number(text, f"{scores}:{line}") for line, _, text in read_lines(scores) if text.strip()]
    depth, rest = divmod(len(values), len(lengths))
    if len(values) == sum(lengths):
        depth = max(lengths)
    elif rest or depth > min(lengths):
        counted = f"{len(values)} scores for {len(lengths)} questions with {sum(lengths)} passages in {run}"
        raise UserError(f"{scores}: {counted}; expected one for each, or equally many for each question")

    def scored():
        rest = iter(values)
        for qid, hits in iter_run(run):
            pairs = [(pid, next(rest)) for pid, _ in hits[:depth]]
            yield qid, sorted(pairs, key=lambda pair: -pair[1])  # stable: equal ones stay in their order

    write_run(out, scored())


# ---------------------------------------------------------------- DPR, FiD, Pyserini
def to_dpr_result(run, questions, corpus, out):
    """Write a .run as DPR's result json: the answers of every question, its passages, and who has_answer."""
    corpus = Corpus(corpus)
    take, check = aligned_reader(run, iter_run(run), questions)
    begin = "[\n"
    with atomic_file(out) as file:
        for question in read_questions(questions, match="string"):
            ctxs = []
            for pid, score in take(question["qid"]) or []:
                passage = corpus[corpus.row(pid, run)]
                has = has_answer(passage.text, question["answers"])
                ctxs.append({**passage._asdict(), "score": repr(score), "has_answer": has})
            entry = {"question": question["question"], "answers": question["answers"], "ctxs": ctxs}
            file.write(begin + json.dumps(entry, indent=4, ensure_ascii=False))
            begin = ",\n"
        check()
        file.write("\n]\n")


def result_passages(ctxs):
    """
    Return [(id, score, (title, text) or None), ...] of a question. ValueError: its passages are no ranking.

    FiD's may have no ids and no scores: the id is then a hash of the passage, the score one over the rank.
    """
    found = []
    for rank, ctx in enumerate(ctxs, 1):
        passage = None
        if ctx.get("text") is not None:
            title, text = ctx.get("title") or "", ctx["text"]
            if "title" not in ctx and "docid" in ctx:
                title, text = split_contents(text)
            if not isinstance(title, str) or not isinstance(text, str):
                raise ValueError("a title or text is not text")
            passage = title, text
        pid = passage_id(ctx)
        if not pid:
            pid = hashlib.blake2b(
                json.dumps([ctx.get("title"), ctx["text"]]).encode(), digest_size=8
            ).hexdigest()
        found.append((pid, float(ctx.get("score", 1 / rank)), passage))

    scores = [score for _, score, _ in found]
    if not all(map(math.isfinite, scores)) or scores != sorted(scores, reverse=True):
        raise ValueError("its passages are not sorted by score")
    if len({pid for pid, _, _ in found}) < len(found):
        raise ValueError("a passage is there twice")
    return found


def from_dpr_result(path, folder):
    """
    Write DPR's result json as questions.jsonl, corpus.jsonl and result.run in `folder`; FiD's json or jsonl
    too, and Pyserini's dict, which has texts only with its --store-raw: without any there is no corpus.jsonl.
    """
    folder = Path(folder)
    pids = set()
    bare = 0
    with (
        atomic_file(folder / "questions.jsonl") as questions,
        atomic_file(folder / "corpus.jsonl") as corpus,
        atomic_file(folder / "result.run") as run,
    ):
        qids = set()
        for key, place, entry in iter_entries(path):
            kind = "contexts" if isinstance(entry, dict) and "contexts" in entry else "ctxs"
            try:
                qid = str(entry.get("id", key))
                if qid in qids:
                    raise ValueError(f"question id {qid!r} is there twice")
                qids.add(qid)
                answers = answer_list(entry["answers"], place)
                question = {"qid": qid, "question": entry["question"], "answers": answers}
                questions.write(json.dumps(question, ensure_ascii=False) + "\n")
                found = result_passages(entry[kind])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                fix = "DPR's training files are converted by dpr_json"
                raise not_of(place, entry, error, path, ("question", "answers", kind), fix) from None
            for rank, (pid, score, passage) in enumerate(found, 1):
                run.write(f"{qid}\t{pid}\t{rank}\t{score!r}\n")
                bare += passage is None
                if passage and pid not in pids:
                    line = {"_id": pid, "title": passage[0], "text": passage[1]}
                    corpus.write(json.dumps(line, ensure_ascii=False) + "\n")
                    pids.add(pid)
        if not qids:
            raise UserError(f"{path}: no question in it")
        if bare and pids:
            raise UserError(f"{path}: {bare} passages have no text, the others have one; get the file again")
    if not pids:
        (folder / "corpus.jsonl").unlink()
        print(f"{path}: its passages have no texts, so there is no {folder / 'corpus.jsonl'}")
