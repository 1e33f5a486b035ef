"""
Question files of DPR, NQ-open, MS MARCO, BEIR, RocketQA, ANCE-Tele and Tevatron become ours, and ours DPR's.

Every from_... yields the entries of our question file (utils/data.py); counts: what became of the entries.
"""

import ast
import csv
import json
import reprlib
import warnings
from functools import partial
from pathlib import Path

from prepare.reading import answer_list, at_tabs, at_tabs_or_spaces, iter_entries, iter_table, not_of, number
from utils.data import Corpus, iter_jsonl, passage_of, read_questions
from utils.plumbing.checks import as_text, is_passage
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file
from utils.plumbing.lines import read_lines, unquote

# the keys of a training entry: id, question, positives, its hard negatives or else the others
DPR_KEYS = ("qid", "question", "positive_ctxs", ("hard_negative_ctxs", "negative_ctxs"))
TEVATRON_KEYS = ("query_id", "query", "positive_passages", ("negative_passages",))
ID_KEYS = ("passage_id", "psg_id", "docid", "id")  # a passage's id: DPR's two names, Tevatron's, FiD's


# ---------------------------------------------------------------- passages in the training file
def passage_id(passage):
    """Return the id of somebody's passage as text, or "". trap: 0 is an id too."""
    ids = (passage.get(key) for key in ID_KEYS)
    return str(next((pid for pid in ids if pid not in (None, "")), ""))


def passages_of(passages, ids, place):
    """Return passages of a training file as entries of a question file: {"title", "text"}, or ids."""
    if not ids:
        return [{"title": ctx.get("title") or "", "text": ctx["text"] or ""} for ctx in passages]
    pids = [passage_id(passage) for passage in passages]
    if not all(pids):
        raise UserError(f"{place} has a passage without an id; convert without --ids")
    return pids


def from_training(path, *, counts, ids=False, names=DPR_KEYS, keep=False):
    """
    Yield the questions of a training file that brings its passages. positives[0] stays first, for DPR.

    keep: a question without a positive is kept; else it is dropped, as in DPR, unless passages go by id.
    """
    id_key, text_key, positive_key, negative_keys = names
    for _, place, entry in iter_entries(path):
        try:
            question = entry[text_key]
            given = entry.get(positive_key) if keep else entry[positive_key]
            positives = passages_of(given or [], ids, place)
            # from: DPR dpr/models/biencoder.py:188 (hard_neg_fallback)
            hard = next((entry[key] for key in negative_keys if entry.get(key)), [])
            negatives = [passage for passage in passages_of(hard, ids, place) if passage not in positives]
        except (KeyError, TypeError, AttributeError) as error:
            raise not_of(place, entry, error, path, (text_key, positive_key)) from None
        if not positives and not ids and not keep:
            counts["dropped, no positive"] += 1
            continue
        counts["without a positive, kept"] += not positives  # why: ANCE-Tele finds one (--positives find)
        counts["negatives that are positives too, left out"] += len(hard) - len(negatives)
        counts["without negatives"] += not negatives
        answers = answer_list(entry.get("answers") or [], place)
        result = {"question": question, "answers": answers, "positives": positives, "negatives": negatives}
        if id_key in entry:
            result["qid"] = as_text(entry[id_key])
        yield result


# DPR_KEYS has "qid": DPR's files have none, ANCE-Tele's *-train-qrels.jsonl have it, and no negatives
from_ance_tele = partial(from_training, keep=True)
from_tevatron = partial(from_training, names=TEVATRON_KEYS, keep=True)


def from_rocketqa(path, *, counts):
    """Yield RocketQA's data_train/*.tsv: question, title and text of a positive, of a negative, and 0."""
    for place, columns in iter_table(path, at_tabs, header=False):
        if len(columns) != 6 or columns[5].strip() != "0":
            expected = "expected 6 columns (question, title, positive, title, negative, 0)"
            four = "; four are the cross-encoder's training data, which mine_negatives.py makes"
            raise UserError(f"{place}: {expected}, got {len(columns)}{four if len(columns) == 4 else ''}")
        question, title, text, other_title, other_text, _ = columns
        positive = {"title": title, "text": text}
        negative = {"title": other_title, "text": other_text}
        yield {"question": question, "positives": [positive], "negatives": [negative]}


def from_ance_tele_hn(*paths, counts):
    """
    Yield ANCE-Tele's split*.hn.json: token ids only, made into text by the last path, the vocab.txt of BERT.

    The text is in small letters, with spaces around signs; BERT's tokenizer gives the same ids for it again,
    up to words that it did not know: [UNK]. Passage ids, answers and full lengths cannot be had.
    """
    *splits, vocabulary = paths
    words = [text.rstrip("\r\n") for _, _, text in read_lines(vocabulary)]

    def text_of(ids):
        if not all(type(i) is int and 0 <= i < len(words) for i in ids):
            raise ValueError(f"a token id is not in {vocabulary}, which has {len(words)}")
        return " ".join(words[i] for i in ids).replace(" ##", "")

    def passage_of_ids(ids):
        title, _, text = text_of(ids).partition("[SEP]")
        return {"title": title.strip(), "text": text.strip()}

    for path in splits:
        for line, entry in iter_jsonl(path):
            try:
                passages = {
                    key: [passage_of_ids(ids) for ids in entry[key]] for key in ("positives", "negatives")
                }
                result = {"question": text_of(entry["query"])} | passages
            except (KeyError, TypeError, ValueError) as error:
                raise not_of(f"{path}:{line}", entry, error, path, ("query", "negatives")) from None
            if "qid" in entry:  # NQ's and TriviaQA's have it, MS MARCO's do not
                result["qid"] = as_text(entry["qid"])
            yield result


# ---------------------------------------------------------------- questions with answers
def from_dpr_qa(path, *, counts):
    """Yield the questions of DPR's csv: question \\t python list of answers. One line is one record."""

    def split(line):  # why not csv.reader: a lone quote would swallow the lines that follow
        question, tab, cell = line.partition("\t")
        return [unquote(question), unquote(cell)] if tab else [line]

    for place, columns in iter_table(path, split):
        try:
            question, cell = columns
            # trap: DPR and nanoDPR use eval, which runs what the file says
            with warnings.catch_warnings(action="ignore"):  # why: a pattern's "\d" is no escape of python's
                answers = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise UserError(f"{place}: not `question \\t list of answers`: {error}") from None
        yield {"question": question, "answers": answer_list(answers, place)}


def from_nq_open(path, *, counts):
    """Yield the questions of Google's jsonl, {"question", "answer": [...]}."""
    for line, entry in iter_jsonl(path):
        answers = answer_list(entry.get("answer"), f"{path}:{line}")
        yield {"question": entry.get("question"), "answers": answers}


def from_rocketqa_answers(queries, answers, *, counts):
    """Yield RocketQA's NQ questions, `qid \\t question`, with its *.answers.txt, `qid \\t answer \\t ...`."""
    answers_of = {}
    for place, (qid, *found) in iter_table(answers, at_tabs):
        if qid in answers_of:
            raise UserError(f"{place}: question {qid!r} is there twice")
        answers_of[qid] = [answer for answer in found if answer.strip()]
    for qid, question in msmarco_queries(queries):
        counts["without answers"] += qid not in answers_of
        yield {"qid": qid, "question": question, "answers": answers_of.pop(qid, [])}
    counts["answered but not among the questions"] += len(answers_of)


# ---------------------------------------------------------------- questions with judgements
def read_qrels(path):
    """
    Return {qid: {passage id: grade}}, only grades above 0: TREC's -1 and 0 mean that a passage is wrong.

    Lines: `qid 0 pid grade`, `qid pid grade` or `qid pid` (grade 1); a header is skipped.
    """
    grades = {}
    for place, columns in iter_table(path, at_tabs_or_spaces):
        if len(columns) not in (2, 3, 4):
            expected = "expected `qid 0 pid relevance`, `qid pid relevance` or `qid pid`"
            raise UserError(f"{place}: {expected}, got {len(columns)} columns")
        qid = columns[0]
        pid = columns[2] if len(columns) == 4 else columns[1]
        grade = number(columns[-1], place) if len(columns) > 2 else 1.0

        # a passage may stand there twice, but not with two grades
        of_question = grades.setdefault(qid, {})
        if of_question.setdefault(pid, grade) != grade:
            both = f"{of_question[pid]:g} and {grade:g}"
            raise UserError(f"{place}: passage {pid!r} of question {qid!r} has two grades, {both}")

    positives = {}
    for qid, of_question in grades.items():
        found = {pid: grade for pid, grade in of_question.items() if grade > 0}
        if found:
            positives[qid] = found
    return positives


def judged(queries, qrels, counts):
    """Yield those of the queries, (qid, text), that the file `qrels` judges; without qrels all of them."""
    positives = read_qrels(qrels) if qrels else {}
    for qid, text in queries:
        if not qrels:
            yield {"qid": qid, "question": text}
        elif qid in positives:
            grades = positives.pop(qid)
            entry = {"qid": qid, "question": text, "positives": list(grades)}
            if any(grade != 1 for grade in grades.values()):
                whole = [int(grade) if grade.is_integer() else grade for grade in grades.values()]
                entry["grades"] = whole
            yield entry
        else:
            counts["dropped, not judged"] += 1
    counts["judged but not among the questions"] += len(positives)


def msmarco_queries(path):
    for place, columns in iter_table(path, at_tabs):
        if len(columns) != 2:
            raise UserError(f"{place}: expected 2 columns (qid, question), got {len(columns)}")
        yield columns[0].strip(), columns[1]


def from_msmarco(path, qrels=None, *, counts):
    return judged(msmarco_queries(path), qrels, counts)


def from_beir(path, qrels=None, *, counts):
    queries = ((as_text(entry.get("_id")), entry.get("text")) for _, entry in iter_jsonl(path))
    return judged(queries, qrels, counts)


# ---------------------------------------------------------------- writing
def write_questions(out, source, entries, counts):
    """Write a question file. An entry without a qid gets its number."""
    stem = Path(out).name.split(".")[0]
    qids = set()
    with atomic_file(out) as file:
        for i, entry in enumerate(entries):
            entry = {"qid": f"{stem}-{i}"} | entry
            if not all(isinstance(entry[key], str) and entry[key].strip() for key in ("qid", "question")):
                raise UserError(f"{source}: question {i} is empty or not text: {reprlib.repr(entry)[:80]}")
            if not all(map(is_passage, entry.get("positives", []) + entry.get("negatives", []))):
                raise UserError(f"{source}: question {i} has a passage whose title or text is not text")
            if entry["qid"] in qids:
                raise UserError(f"{source}: question id {entry['qid']!r} is there twice")
            qids.add(entry["qid"])
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if not qids:
            raise UserError(f"{source}: no question left: {dict(counts)}")
    counts["questions"] = len(qids)
    print(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n))


def to_dpr_json(questions, *corpus_and_out):
    """Write our training file as DPR's json. The corpus is needed where passages go by id."""
    *corpus, out = corpus_and_out
    corpus = Corpus(corpus[0]) if corpus else None
    begin = "[\n"
    with atomic_file(out) as file:
        for question in read_questions(questions, need=("positives",), repeats=True):
            entry = {"dataset": Path(questions).stem, "question": question["question"]}
            entry |= {"answers": question["answers"], "positive_ctxs": [], "negative_ctxs": []}
            lists = {"positive_ctxs": "positives", "hard_negative_ctxs": "negatives"}
            for theirs, ours in lists.items():
                entry[theirs] = []
                for reference in question[ours]:
                    passage = passage_of(reference, corpus)
                    ctx = {"title": passage.title, "text": passage.text}
                    entry[theirs].append(ctx | ({"passage_id": passage.id} if passage.id else {}))
            file.write(begin + json.dumps(entry, indent=4, ensure_ascii=False))
            begin = ",\n"
        file.write("\n]\n")


def to_dpr_qa(questions, out):
    """Write our questions as DPR's csv, question \\t python list of answers, one line each."""
    with atomic_file(out) as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for question in read_questions(questions, need=("answers",)):
            one_line = " ".join(question["question"].split())
            writer.writerow([one_line, repr(question["answers"])])
