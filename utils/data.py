"""
The files that pass between stages: question files (jsonl), rankings (.run), corpora (utils/corpus.py).

A question file has one example a line: {"qid", "question", "answers": [], "positives": [], "negatives": []}.
All but `qid` and `question` are optional. A passage is a corpus id or an inline {"title", "text"}. "grades"
may say how relevant each positive is, in numbers above 0; nDCG counts them. A .run has the lines
`qid \\t pid \\t rank \\t score`: ranks begin at 1, the best passage comes first.
Other formats become these: python -m prepare.convert FORMAT IN... OUT
"""

import math
import re
import sys
import unicodedata

import numpy as np

from prepare.hints import CONVERT, foreign
from utils.corpus import Corpus as Corpus
from utils.corpus import Passage, load_json, read_lines
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file

# \d, .*, (a|b), a|b, [A-Z], x)?: signs of a regular expression that hardly any plain answer has
REGEX_SYNTAX = re.compile(r"\\[a-zA-Z.()?+]|\.[*+]|\([^)]*\|[^)]*\)|\w\|\w|\[[^\]]*-[^\]]*\]|\)[?*]|\(\?")


# ---------------------------------------------------------------- question files
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


def blank(answer):
    """Return whether DPR's tokenizer finds nothing in an answer, which then would match every passage."""
    return all(unicodedata.category(character)[0] in "ZC" for character in answer)


def is_string(entry):
    return isinstance(entry, str)


def whole_number(value):
    """Return an id or answer that was written as a number, 17, as the string that it stands for."""
    return str(value) if type(value) is int else value


def check_passage(entry):
    """Return whether an entry of `positives` or `negatives` is a corpus id or a passage."""
    if isinstance(entry, dict):
        return is_string(entry.get("text")) and is_string(entry.get("title") or "")
    return is_string(entry) and entry != ""


def question_key(text):
    """Return what makes two questions the same: their words, without case and a question mark at the end."""
    return " ".join(text.casefold().split()).rstrip("? ")


def named_hits(question, hits, corpus, k, ignore_identical_ids):
    """Return the best k [(pid, score), ...] of a question from its [(row, score), ...], best first."""
    named = [(corpus[row].id, score) for row, score in hits]
    if ignore_identical_ids:
        named = [(pid, score) for pid, score in named if not is_itself(question, pid)]
    return named[:k]


def grades_fault(question):
    """Return what is wrong with the `grades` of a question, one number for each positive, or ""."""
    grades = question.get("grades", [])
    if not isinstance(grades, list):
        return f"must be a list of numbers, got {str(grades)[:60]}"
    if grades and len(grades) != len(question["positives"]):
        return f"must have one number for each of the {len(question['positives'])} positives"
    good = all(type(grade) in (int, float) and 0 < grade < math.inf for grade in grades)
    return "" if good else f"must be numbers above 0, got {str(grades)[:60]}"


def is_itself(question, pid):
    """
    Return whether a passage is the question's own document: it has the question's id and is no positive.

    In ArguAna and Quora (BEIR) the questions are documents of the corpus. Each finds itself first.
    """
    return pid == question["qid"] and pid not in question["positives"]


def find_themselves(count, questions):
    """Return a sentence where `count` of so many questions find their own id first, "" where few do."""
    # why a tenth: a few may meet a passage of the same number by chance
    few = count <= 0.1 * questions
    return "" if few else f"{count} of {questions} questions find a passage of their own id first"


def refuse_patterns(questions, path):
    """UserError where the answers look like regular expressions, which as plain strings are in no passage."""
    answered = [question["answers"] for question in questions if question["answers"]]
    patterns = [answers[0] for answers in answered if any(map(REGEX_SYNTAX.search, answers))]
    # why a fifth: many patterns of CuratedTREC are plain words or years
    if len(patterns) > max(1, 0.2 * len(answered)):
        share = f"{len(patterns)} of {len(answered)} questions have answers like {patterns[0]!r}"
        cure = "add --match regex (a recipe: MATCH=regex); a reader needs plain answers"
        raise UserError(f"{path}: {share}, which are regular expressions: {cure}")


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
        question["qid"] = whole_number(question.get("qid"))
        for key in ("qid", "question"):
            value = question.get(key)
            if not is_string(value) or not value.strip():
                raise UserError(f"{where}: {key!r} must be a string with something in it, got {value!r}")
        qid = question["qid"]
        if "\t" in qid or "\n" in qid:
            raise UserError(f"{where}: a qid cannot hold tabs or line breaks, got {qid!r}")
        if qid in line_of and not repeats:
            raise UserError(f"{where}: qid {qid!r} is already on line {line_of[qid]}; qids must differ")
        line_of[qid] = number
        for key in ("answers", "positives", "negatives"):
            if key in need and key not in question:
                raise UserError(f"{where}: {key!r} is missing; this step needs it (an empty list is allowed)")
            if question.get(key) is None:  # absent, or null
                question[key] = []
            if isinstance(question[key], list):
                question[key] = [whole_number(entry) for entry in question[key]]
            entries = question[key]
            kind = "strings" if key == "answers" else 'corpus ids (strings) or {"title", "text"} objects'
            fits = is_string if key == "answers" else check_passage
            if not isinstance(entries, list) or not all(map(fits, entries)):
                raise UserError(f"{where}: {key!r} must be a list of {kind}, got {str(entries)[:60]!r}")
        if fault := grades_fault(question):
            raise UserError(f"{where}: 'grades' {fault}")
        answers = [answer for answer in question["answers"] if not blank(answer)]
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


def check_ids(path, examples, corpus, *keys):
    """UserError for an id under one of `keys` that the corpus lacks: its line in the file `path`."""
    for example in examples:
        for pid in filter(is_string, [entry for key in keys for entry in example[key]]):
            if corpus is None:
                fault = f"question {example['qid']} names passage {pid!r}, but corpus is empty"
                raise UserError(f"{path}: {fault}")
            try:
                corpus.row(pid)
            except UserError as error:
                for number, entry in iter_jsonl(path):
                    named = [*entry.get("positives", []), *entry.get("negatives", [])]
                    if entry["qid"] == example["qid"] and pid in named:
                        raise UserError(f"{path}:{number}: {error}") from None
                raise


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


def refuse_strange_answers(path, questions, corpus, holds):
    """
    UserError where most questions of a file have no answer in any of their positives: mined from such a file,
    right passages would be negatives. holds(passage, question): whether an answer stands in the passage.
    """
    judged = [question for question in questions if question["answers"] and question["positives"]]
    without = []
    for question in judged:
        passages = [passage_of(entry, corpus) for entry in question["positives"]]
        if not any(holds(passage, question) for passage in passages):
            without.append(question)
    if len(without) > 0.5 * len(judged):
        share = f"{len(without)} of {len(judged)} questions have no answer in a positive passage of theirs"
        example = f"such as {without[0]['qid']!r} with {without[0]['answers'][0]!r}"
        cure = "try --match regex or --match_title true; answers that stand in no text at all: leave them out"
        raise UserError(f"{path}: {share}, {example}. Right passages would become negatives; {cure}")


def passage_of(entry, corpus):
    """Return the Passage that an entry of `positives` or `negatives` names. An inline one gets the id ""."""
    if isinstance(entry, dict):
        return Passage("", entry.get("title") or "", entry["text"])
    if corpus is None:
        raise UserError(f"passage {entry!r} is named by its id: give the corpus too")
    return corpus.passage(entry)


def items_of_step(step, count, cfg):
    """
    Return (epoch, the items of the global batch of a step). An epoch is a permutation of `count` items, a
    step is a slice of it; an unfilled last batch is dropped.
    """
    epoch, offset = divmod(step, count // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(count).tolist()
    start = offset * cfg.batch_size
    return epoch, order[start : start + cfg.batch_size]


def passage_key(entry):
    """Return what makes two entries the same passage: the corpus id, or title and text of an inline one."""
    if isinstance(entry, str):
        return entry
    return entry.get("title") or "", entry["text"]


def count_negatives(cfg, train):
    """Return what the log says of the negatives. UserError where no batch can hold a wrong passage."""
    # the passages that may stand beside a question in a batch
    counts = [len(example["negatives"]) for example in train]
    positives = {passage_key(entry) for example in train for entry in example["positives"]}

    def meets_a_wrong_one(example):
        own = {passage_key(entry) for entry in example["negatives"] if cfg.negatives}
        beside = positives | own if cfg.batch_size > 1 else own
        return not beside <= {passage_key(entry) for entry in example["positives"]}

    if not any(map(meets_a_wrong_one, train)):
        fault = (
            f"batch_size {cfg.batch_size} with negatives {cfg.negatives}: no question meets a wrong passage"
        )
        raise UserError(f"{cfg.train}: {fault}, there is nothing to tell apart; mine negatives first")

    # how many there are, and what is encoded for nothing
    taken = sum(min(count, cfg.negatives) for count in counts) / len(train)
    notes = [f"{taken:.1f} negatives of its own for a question on average, {cfg.negatives} asked for"]
    if max(counts) < cfg.negatives:
        padding = (
            f"no question has more than {max(counts)} negatives, the rest is padding that is encoded too"
        )
        notes.append(f"warning: {padding}: use --negatives {max(counts)}")
    if len(positives) == 1 and len(train) > 1:
        notes.append("warning: all questions have the same positive, so what a question says does not matter")
    return notes


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


def iter_lists(path):
    """Yield (qid, (negatives, positives)) of every line of a training file."""
    for number, example in iter_jsonl(path):
        lists = (example.get("negatives"), example.get("positives") or [])
        for name, passages in zip(("negatives", "positives"), lists, strict=True):
            if not isinstance(passages, list) or not all(map(check_passage, passages)):
                fault = f"{name!r} must be a list of passages; not a training file"
                raise UserError(f"{path}:{number}: {fault}")
        yield example.get("qid"), lists


def check_scores(qid, scores, ranked, cfg):
    """UserError unless `scores` [(id, p), ...] are probabilities of passages of this ranking."""
    if not scores:
        raise UserError(f"{cfg.scores}: question {qid!r} is missing; rescore {cfg.run} again (rerank.py)")
    for pid, p in scores:
        if pid not in ranked:
            raise UserError(f"{cfg.scores}: passage {pid!r} of question {qid!r} is not in {cfg.run}")
        if not 0 <= p <= 1:
            raise UserError(f"{cfg.scores}: question {qid!r}: {p} is no probability; rerank.py gives some")


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
