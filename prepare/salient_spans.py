"""
Masked salient spans: questions that nobody asked, EMDR2's pre-training (REALM, Guu et al. 2020, Sec. 3.4).

A sentence of the corpus loses a name or a date, and to fill the gap is the question: whoever finds another
passage about it can answer. The sentence's own passage stands in `positives`, so that it is not retrieved.

In:   a corpus
Out:  a question file: {"qid", "question": "... in [MASK] ...", "answers": ["1997"], "positives": [passage]}
Run:  python -m prepare.salient_spans --corpus data/nq/corpus.tsv --out data/nq/mss.jsonl
Next: accelerate launch train_emdr2.py --config config/train_emdr2_mss.yaml

The entities come from spaCy: any pipeline with NER (`python -m spacy download en_core_web_sm`); where it is
not installed, rules for dates and capitalised names, which tell no person from a place and miss a name that
is one word at the start of a sentence.

Differs from EMDR2, which released its 20 M sentences but no code: (1) spaCy instead of Stanza; both have
OntoNotes' 18 labels. (2) A span that the rest of the sentence says again is not masked: it could be copied.
(3) The text stays as it is but for white space; theirs has spaces around its punctuation.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import repeat
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from utils.data import Corpus
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    need_file,
    need_out,
    need_value,
)
from utils.plumbing.files import atomic_file, read_json, write_json
from utils.text import has_answer

# ---------------------------------------------------------------------- the rules, where no NER is installed
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
UNITS = "km kilometres kilometers miles m metres meters ft feet inches kg tonnes tons pounds acres hectares"
MONTH, COMMA = {"TEXT": {"IN": MONTHS}}, {"TEXT": ",", "OP": "?"}
DAY, YEAR = {"TEXT": {"REGEX": r"^[0-3]?\d(st|nd|rd|th)?$"}}, {"TEXT": {"REGEX": r"^(1\d|20)\d\ds?$"}}
CAPITAL = {"TEXT": {"REGEX": "^[A-ZÀ-ÖØ-Þ]", "NOT_IN": MONTHS + DAYS}, "IS_STOP": False}
LINK = {"LOWER": {"IN": "of de la du von van der the".split()}, "OP": "+"}  # Bank of the West
NUMBER = {"LIKE_NUM": True, "OP": "+"}
RULES = [  # (label, tokens); of overlapping matches the longest counts
    *(("DATE", [*day, COMMA, YEAR]) for day in ([DAY, MONTH], [MONTH, DAY], [MONTH])),
    *(("DATE", date) for date in ([DAY, MONTH], [MONTH, DAY], [YEAR])),
    ("DATE", [{"LOWER": {"REGEX": r"^\d+(st|nd|rd|th)$"}}, {"LOWER": {"IN": ["century", "centuries"]}}]),
    ("QUANTITY", [NUMBER, {"LOWER": {"IN": UNITS.split()}}]),  # why, though no default: 1500 m is no year
    ("PERCENT", [NUMBER, {"LOWER": {"IN": ["%", "percent"]}}]),
    ("MONEY", [{"IS_CURRENCY": True}, NUMBER]),
    ("NAME", [CAPITAL | {"SENT_START": False}]),  # why: at the start of a sentence a capital says nothing
    ("NAME", [CAPITAL, CAPITAL | {"OP": "+"}]),
    ("NAME", [CAPITAL | {"OP": "+"}, LINK, CAPITAL | {"OP": "+"}]),
]


@cache
def pipeline(model):
    """The spaCy pipeline `model` with a sentence splitter and nothing else that is slow, or the rules."""
    try:
        import spacy
    except ImportError:
        raise UserError("salient spans are found by spaCy: pip install spacy==3.8.18") from None
    if not (spacy.util.is_package(model) or Path(model).is_dir()):
        if "/" in model:
            raise UserError(f"model: {model}: no such folder")
        nlp = spacy.blank("en", meta={"name": "rules", "version": spacy.__version__})
        nlp.add_pipe("sentencizer")
        rules = [{"label": label, "pattern": pattern} for label, pattern in RULES]
        nlp.add_pipe("entity_ruler").add_patterns(rules)
        return nlp
    try:
        nlp = spacy.load(model, exclude="tagger parser morphologizer attribute_ruler lemmatizer".split())
    except (OSError, ValueError) as error:
        raise UserError(f"model: {model}: spaCy cannot load it: {' '.join(str(error).split())}") from None
    if not {"ner", "entity_ruler"} & {*nlp.pipe_names}:
        raise UserError(f"model: {model} finds no entities, it has only {nlp.pipe_names}; name one with NER")
    if "senter" in nlp.disabled:  # en_core_web_sm has it, switched off: its parser splits too, slower
        nlp.enable_pipe("senter")
    elif not {"senter", "sentencizer"} & {*nlp.pipe_names}:
        nlp.add_pipe("sentencizer", first=True)
    return nlp


# -------------------------------------------------------------------------------------------- one sentence
def mask(sentence, rng, cfg):
    """
    (label, question, answer) of a sentence (a spaCy Span): one of its entities, drawn at random, is [MASK]
    (REALM's rule). Where there is none: (why, "", "").
    """
    text, begin = sentence.text, sentence.start_char
    if len(text.split()) < cfg.min_words:
        return f"shorter than {cfg.min_words} words", "", ""
    if len(text.split()) > cfg.max_words:
        return f"longer than {cfg.max_words} words", "", ""
    if "[MASK]" in text:
        return "with a [MASK] of its own", "", ""
    spans = [span for span in sentence.ents if span.label_ in cfg.labels and any(map(str.isalnum, span.text))]
    found = []
    for span in spans:
        question = f"{text[: span.start_char - begin]}[MASK]{text[span.end_char - begin :]}"
        if not has_answer(question, [span.text]):
            found.append((span.label_, question, span.text))
    if not found:
        return "whose entities are all said twice" if spans else "without an entity", "", ""
    return found[rng.integers(len(found))]


# ------------------------------------------------------------------------------------------------- a block
def do_block(part, rows, corpus, cfg):
    """Write the questions of these rows of the corpus to `part`, after a line with their counts."""
    nlp, counts, lines = pipeline(cfg.model), Counter(passages=len(rows)), []
    passages = [corpus[row] for row in rows]
    # trap: spaCy makes a token of a tab or a second space, and no pattern, learnt or written, expects one
    texts = (" ".join(passage.text[: nlp.max_length].split()) for passage in passages)
    for row, pid, doc in zip(rows, (p.id for p in passages), nlp.pipe(texts, batch_size=64), strict=True):
        rng = np.random.default_rng([cfg.seed, row])
        for i, sentence in enumerate(doc.sents):
            what, question, answer = mask(sentence, rng, cfg)
            counts[what] += 1
            if question:
                line = {"qid": f"mss-{pid}-{i}", "question": question, "answers": [answer]}
                lines.append(json.dumps(line | {"positives": [pid]}, ensure_ascii=False) + "\n")
    with atomic_file(part) as file:
        file.writelines([json.dumps(counts) + "\n", *lines])


def begin_worker():
    """Ctrl-C is for the parent alone; and when the parent is killed, so is this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # trap: a pool's worker waits for work for ever, parent or not
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def do_blocks(todo, corpus, cfg):
    """Write the blocks `todo`, {part: rows}, in cfg.workers processes; 0: in this one."""
    spawn = multiprocessing.get_context("spawn")  # why: a fork of a process with threads can hang
    pool = ProcessPoolExecutor(cfg.workers, spawn, begin_worker) if cfg.workers else None
    work = todo, todo.values(), repeat(corpus), repeat(cfg)
    try:
        done = (pool.map if pool else map)(do_block, *work)
        for _ in tqdm(done, "masking", len(todo), unit=" blocks", delay=5, disable=None):
            pass
    except BrokenProcessPool:
        raise UserError("a worker was killed, by lack of memory perhaps: try fewer --workers") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)  # the blocks in hand are finished, and found again next time


# -------------------------------------------------------------------------------------------------- the file
def plan(folder, corpus, name, cfg):
    """
    {part: rows} of the whole job, in the order of the corpus. UserError where `folder` holds parts that were
    made otherwise; name: of the pipeline.
    """
    rows = range(len(corpus))
    if 0 < cfg.passages < len(corpus):
        rows = np.sort(np.random.default_rng(cfg.seed).choice(len(corpus), cfg.passages, replace=False))
    keys = "model labels min_words max_words passages block seed".split()
    settings = {"corpus": corpus.sha256, "pipeline": name} | {key: getattr(cfg, key) for key in keys}
    file = folder / "settings.json"
    stored = read_json(file) if file.is_file() else settings
    changed = [f"{k} {stored.get(k)!r} then, {v!r} now" for k, v in settings.items() if stored.get(k) != v]
    if changed:
        raise UserError(f"{folder}: half done: {'; '.join(changed)}; delete it, or name another --out")
    write_json(file, settings)
    return {folder / f"{k:09d}.jsonl": rows[k : k + cfg.block] for k in range(0, len(rows), cfg.block)}


def join(parts, out):
    """Write the questions of all parts to `out`; returns the counts. UserError when there is none."""
    counts = Counter()
    with atomic_file(out) as file:
        for part in parts:
            with open(part, encoding="utf-8") as lines:
                counts.update(json.loads(next(lines)))
                file.writelines(lines)
        if not file.tell():
            raise UserError(f"{out}: no sentence has an entity to mask: {dict(counts)}; try other --labels")
    return counts


def main():
    cfg = load_config(__doc__, "config/salient_spans.yaml")
    need_value(cfg, "model")
    need_file(cfg, "corpus")
    need_out(cfg, "out", "corpus")
    at_least(cfg, 1, "min_words", "block")
    at_least(cfg, cfg.min_words, "max_words")
    if Path(cfg.out).exists():
        raise UserError(f"out: {cfg.out} is there already; delete it first, or name another file")
    nlp = pipeline(cfg.model)
    name = f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}"
    known = {label for labels in nlp.pipe_labels.values() for label in labels}
    if not known & {*cfg.labels}:
        raise UserError(f"labels: {name} has none of {cfg.labels}; it has {', '.join(sorted(known))}")
    if nlp.meta["name"] == "rules" != cfg.model:
        what = f"the spaCy pipeline {cfg.model} is not installed (python -m spacy download {cfg.model})"
        print(f"warning: {what}: rules for dates and capitalised names take its place", file=sys.stderr)
    found = ", ".join(label for label in cfg.labels if label in known)
    print(f"pipeline {name}, entities {found}", flush=True)

    corpus, folder = Corpus(cfg.corpus, cfg.corpus_format), Path(f"{cfg.out}.parts")
    blocks = plan(folder, corpus, name, cfg)
    todo = {part: rows for part, rows in blocks.items() if not part.is_file()}
    if len(todo) < len(blocks):
        print(f"{len(blocks) - len(todo)} of {len(blocks)} blocks are there already", flush=True)
    do_blocks(todo, corpus, cfg)
    counts = join(blocks, cfg.out)
    shutil.rmtree(folder)
    kept = Counter({label: counts.pop(label) for label in known if label in counts})
    print(f"{cfg.out}: {kept.total():,} questions of {counts.pop('passages'):,} passages")
    print("entities: " + (", ".join(f"{n:,} {label}" for label, n in kept.most_common()) or "none"))
    print("sentences dropped: " + (", ".join(f"{n:,} {why}" for why, n in counts.most_common()) or "none"))


if __name__ == "__main__":
    with friendly_errors():
        main()
