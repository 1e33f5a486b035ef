"""
Checks of question files and rankings before a training: what is an error, and what a warning.
"""

import math
import re
import unicodedata

from utils.corpus import passage_key, passage_of
from utils.plumbing.config import UserError
from utils.plumbing.lines import iter_jsonl

# \d, .*, (a|b), a|b, [A-Z], x)?: signs of a regular expression that hardly any plain answer has
# why not every backslash: \sum and \beta are LaTeX
ESCAPE = r"\\[dwsb](?![a-z])|(?<=\w)\\s"
REGEX_SYNTAX = re.compile(
    ESCAPE + r"|\\[DWSB](?![a-zA-Z])|\\[.()?+]|\.[*+]|\([^)]*\|[^)]*\)|\w\|\w|\[[^\]]*-[^\]]*\]|\)[?*]|\(\?"
)
# what no plain answer holds; REGEX_SYNTAX has signs that some do, such as )?
PATTERN = re.compile(ESCAPE + r"|\.\*|\(\?:|\w\|\w|\[\^?\w-\w")


# ---------------------------------------------------------------- one question
def is_blank(answer):
    """Return whether DPR's tokenizer finds nothing in an answer, which then would match every passage."""
    return all(unicodedata.category(character)[0] in "ZC" for character in answer)


def is_string(entry):
    return isinstance(entry, str)


def as_text(value):
    """Return an id or answer that was written as a number, 17, as the string that it stands for."""
    return str(value) if type(value) is int else value


def is_passage(entry):
    """Return whether an entry of `positives` or `negatives` is a corpus id or a passage."""
    if isinstance(entry, dict):
        return is_string(entry.get("text")) and is_string(entry.get("title") or "")
    return is_string(entry) and entry != ""


def grades_fault(question):
    """Return what is wrong with the `grades` of a question, one number for each positive, or ""."""
    grades = question.get("grades", [])
    if not isinstance(grades, list):
        return f"must be a list of numbers, got {str(grades)[:60]}"
    if grades and len(grades) != len(question["positives"]):
        return f"must have one number for each of the {len(question['positives'])} positives"
    good = all(type(grade) in (int, float) and 0 < grade < math.inf for grade in grades)
    return "" if good else f"must be numbers above 0, got {str(grades)[:60]}"


def check_question(question, where, need):
    """Refuse a line of a question file, or bring it into our form: ids are strings, absent lists are []."""
    question["qid"] = as_text(question.get("qid"))
    for key in ("qid", "question"):
        value = question.get(key)
        if not is_string(value) or not value.strip():
            raise UserError(f"{where}: {key!r} must be a string with something in it, got {value!r}")
    if "\t" in question["qid"] or "\n" in question["qid"]:
        raise UserError(f"{where}: a qid cannot hold tabs or line breaks, got {question['qid']!r}")
    for key in ("answers", "positives", "negatives"):
        single = key.removesuffix("s")
        if single in question and key not in question:
            raise UserError(f"{where}: {single!r} is not read; the key is {key!r}, and its value a list")
        if key in need and key not in question:
            raise UserError(f"{where}: {key!r} is missing; this step needs it (an empty list is allowed)")
        if question.get(key) is None:  # absent, or null
            question[key] = []
        if isinstance(question[key], list):
            question[key] = [as_text(entry) for entry in question[key]]
        entries = question[key]
        kind = "strings" if key == "answers" else 'corpus ids (strings) or {"title", "text"} objects'
        fits = is_string if key == "answers" else is_passage
        if not isinstance(entries, list) or not all(map(fits, entries)):
            raise UserError(f"{where}: {key!r} must be a list of {kind}, got {str(entries)[:60]!r}")
    if fault := grades_fault(question):
        raise UserError(f"{where}: 'grades' {fault}")


# ---------------------------------------------------------------- a file of questions
def notes_on_unknown(tokenizer, texts):
    """Return [a warning] where a tokenizer does not know a twentieth of the tokens of texts, or []."""
    unknown = tokenizer.unk_token_id
    if unknown in (None, tokenizer.eos_token_id):  # it knows every byte
        return []
    sample = texts[:: max(1, len(texts) // 1000)]
    ids = tokenizer(sample, add_special_tokens=False, verbose=False).input_ids
    shares = [row.count(unknown) / max(1, len(row)) for row in ids]
    share = sum(row.count(unknown) for row in ids) / max(1, sum(map(len, ids)))
    if share <= 0.05:
        return []
    example = sample[shares.index(max(shares))][:40]
    fault = f"{100 * share:.0f} % of the tokens are unknown to this tokenizer, as in {example!r}"
    cure = "that is not read; take weights of this language, such as bert-base-multilingual-cased"
    return [f"warning: {fault}: {cure}"]


def note_on_own_ids(count, questions):
    """Return a sentence where `count` of so many questions find their own id first, "" where few do."""
    # why a tenth: a few may meet a passage of the same number by chance
    few = count <= 0.1 * questions
    return "" if few else f"{count} of {questions} questions find a passage of their own id first"


def refuse_patterns(questions, path):
    """UserError where the answers look like regular expressions, which as plain strings are in no passage."""
    answered = [question["answers"] for question in questions if question["answers"]]
    patterns = []
    for answers in answered:
        patterns += [answer for answer in answers if REGEX_SYNTAX.search(answer)][:1]
    # why a fifth: many patterns of CuratedTREC are plain words or years
    if len(patterns) > max(1, 0.2 * len(answered)):
        share = f"{len(patterns)} of {len(answered)} questions have answers like {patterns[0]!r}"
        cure = "add --match regex (a recipe: MATCH=regex); a reader needs plain answers"
        raise UserError(f"{path}: {share}, which are regular expressions: {cure}")


def refuse_patterns_to_learn(path, questions):
    """UserError where more than a twentieth of the questions have a pattern as first answer; for a reader."""
    patterns = []
    for question in questions:
        patterns += [answer for answer in question["answers"][:1] if PATTERN.search(answer)]
    # why fewer than refuse_patterns lets pass: a pattern is a wrong lesson here, not only a missed hit
    if 20 * len(patterns) > len(questions):
        share = f"{len(patterns)} of {len(questions)} questions have a regular expression as answer"
        cure = "a reader learns, and is scored on, plain answers only"
        raise UserError(f"{path}: {share}, such as {patterns[0]!r} (CuratedTREC?); {cure}")


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


def notes_on_negatives(cfg, train):
    """Return what the log says of the negatives. UserError where no batch can hold a wrong passage."""
    # the passages that may stand beside a question in a batch
    counts = [len(example["negatives"]) for example in train]
    positives = {passage_key(entry) for example in train for entry in example["positives"]}

    def meets_a_wrong_one(example):
        own = {passage_key(entry) for entry in example["negatives"]} if cfg.negatives else set()
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
def check_scores(qid, scores, ranked, cfg):
    """UserError unless `scores` [(id, p), ...] are probabilities of passages of this ranking."""
    if not scores:
        raise UserError(f"{cfg.scores}: question {qid!r} is missing; rescore {cfg.run} again (rerank.py)")
    for pid, p in scores:
        if pid not in ranked:
            raise UserError(f"{cfg.scores}: passage {pid!r} of question {qid!r} is not in {cfg.run}")
        if not 0 <= p <= 1:
            raise UserError(f"{cfg.scores}: question {qid!r}: {p} is no probability; rerank.py gives some")
