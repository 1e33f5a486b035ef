"""
Masked salient spans: questions that nobody asked, EMDR2's pre-training (REALM, Guu et al. 2020, Sec. 3.4).

A sentence of the corpus loses a name or a date. The question is what fills the gap: another passage about the
same thing tells it. The sentence's own passage stands in `positives`, so that it is not retrieved.

In:   a corpus
Out:  a question file: {"qid", "question": "... in [MASK] ...", "answers": ["1997"], "positives": [passage]}
Run:  python -m prepare.salient_spans --corpus data/nq/corpus.tsv --out data/nq/mss.jsonl
Next: accelerate launch train_emdr2.py --config config/train_emdr2_mss.yaml

The entities come from a spaCy pipeline with NER (`python -m spacy download en_core_web_sm`). Where it is not
installed, rules find dates and capitalised names, but no name of one word at the start of a sentence.
"""

import json
import multiprocessing
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.data import Corpus
from utils.plumbing import config
from utils.plumbing.config import UserError, friendly_errors
from utils.plumbing.files import atomic_file
from utils.text import has_answer

# ---------------------------------------------------------------- the rules, where no NER is installed
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
BLOCK = 1000  # passages that a process masks at a time


# differs: EMDR2 used Stanza, with the same 18 labels (OntoNotes); it released 20 M sentences but no code
@cache
def pipeline(model):
    """Return the spaCy pipeline `model` with a sentence splitter and without its slow parts; or the rules."""
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


# ---------------------------------------------------------------- sentences
def mask(sentence, rng, cfg):
    """Mask an entity drawn at random: (label, question, answer), or (why nothing is masked, "", "")."""
    text = sentence.text
    length = len(text.split())
    if length < cfg.min_words:
        return f"shorter than {cfg.min_words} words", "", ""
    if length > cfg.max_words:
        return f"longer than {cfg.max_words} words", "", ""
    if "[MASK]" in text:
        return "with a [MASK] of its own", "", ""
    entities = [span for span in sentence.ents if span.label_ in cfg.labels]
    entities = [span for span in entities if any(map(str.isalnum, span.text))]
    if not entities:
        return "without an entity", "", ""
    masked = []
    for span in entities:
        begin = span.start_char - sentence.start_char
        end = span.end_char - sentence.start_char
        question = f"{text[:begin]}[MASK]{text[end:]}"
        # differs: EMDR2 does not say so, but a span that the rest says again could be copied
        if not has_answer(question, [span.text]):
            masked.append((span.label_, question, span.text))
    if not masked:
        return "whose entities are all said twice", "", ""
    return masked[rng.integers(len(masked))]


def mask_passages(rows, corpus, cfg):
    """Return (lines of the question file, counts of labels and of reasons why not) for rows of the corpus."""
    nlp = pipeline(cfg.model)
    passages = [corpus[row] for row in rows]
    # trap: spaCy makes a token of a tab or a second space, and no pattern, learnt or written, expects one
    texts = [" ".join(passage.text[: nlp.max_length].split()) for passage in passages]
    lines = []
    counts = Counter()
    for row, passage, doc in zip(rows, passages, nlp.pipe(texts, batch_size=64), strict=True):
        rng = np.random.default_rng([cfg.seed, row])
        for i, sentence in enumerate(doc.sents):
            label, question, answer = mask(sentence, rng, cfg)
            counts[label] += 1
            if question:
                entry = {"qid": f"mss-{passage.id}-{i}", "question": question, "answers": [answer]}
                lines.append(json.dumps(entry | {"positives": [passage.id]}, ensure_ascii=False) + "\n")
    return lines, counts


def write_questions(rows, corpus, cfg):
    """Write the questions of these rows, in their order, with cfg.workers processes. Return the counts."""
    counts = Counter()
    blocks = [rows[begin : begin + BLOCK] for begin in range(0, len(rows), BLOCK)]
    # why our own pool: spaCy's n_process is slower than one process, and hangs when a worker is killed
    spawn = multiprocessing.get_context("spawn")
    no_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # it is for the parent alone
    pool = ProcessPoolExecutor(max(cfg.workers, 1), spawn, signal.signal, no_ctrl_c)
    try:
        with atomic_file(cfg.out) as file:
            masked = (pool.map if cfg.workers else map)(mask_passages, blocks, repeat(corpus), repeat(cfg))
            for lines, found in tqdm(masked, "masking", len(blocks), unit=" blocks", delay=5, disable=None):
                file.writelines(lines)
                counts.update(found)
            if not file.tell():
                raise UserError(f"no sentence has an entity to mask: {dict(counts)}; try other --labels")
    except BrokenProcessPool:
        raise UserError("a worker was killed, by lack of memory perhaps: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
    return counts


def main():
    cfg = config.load_config(__doc__, "config/salient_spans.yaml")
    config.need_value(cfg, "model")
    config.need_file(cfg, "corpus")
    config.need_out(cfg, "out")
    config.at_least(cfg, 1, "min_words")
    config.at_least(cfg, cfg.min_words, "max_words")
    if Path(cfg.out).exists():
        raise UserError(f"out: {cfg.out} is there already; delete it first, or name another file")

    # the pipeline, and which of the labels it knows
    nlp = pipeline(cfg.model)
    name = f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}"
    labels = {label for labels in nlp.pipe_labels.values() for label in labels}
    if not labels & {*cfg.labels}:
        raise UserError(f"labels: {name} has none of {cfg.labels}; it has {', '.join(sorted(labels))}")
    if nlp.meta["name"] == "rules" != cfg.model:
        install = f"{cfg.model} is not installed (python -m spacy download {cfg.model})"
        print(f"warning: {install}: rules for dates and names take its place", file=sys.stderr)
    wanted = ", ".join(label for label in cfg.labels if label in labels)
    print(f"pipeline {name}, entities {wanted}", flush=True)

    # the passages, a sample in the order of the corpus
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    rows = range(len(corpus))
    if 0 < cfg.passages < len(corpus):
        rows = np.sort(np.random.default_rng(cfg.seed).choice(len(corpus), cfg.passages, replace=False))

    counts = write_questions(rows, corpus, cfg)
    kept = Counter({label: counts.pop(label) for label in labels if label in counts})
    print(f"{cfg.out}: {kept.total():,} questions of {len(rows):,} passages")
    print("entities: " + (", ".join(f"{n:,} {label}" for label, n in kept.most_common()) or "none"))
    print("sentences dropped: " + (", ".join(f"{n:,} {why}" for why, n in counts.most_common()) or "none"))


if __name__ == "__main__":
    with friendly_errors():
        main()
