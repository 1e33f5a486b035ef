"""
Say what a training will do with your passages and questions, before it costs an hour.

In:  a folder with corpus.tsv and train.jsonl, dev.jsonl, test.jsonl. Where it has questions.jsonl and none of
     these, they are made from it: eight questions of ten to train, one to choose, one to test
Out: a report on the screen: what is cut, what is left out, and what looks wrong
Run: python -m prepare.check data/my --config config/train_dpr_demo.yaml --init data/models/tinybert-4l
     --match regex: the answers are regular expressions. It takes every key of train_dpr.py too.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from statistics import mean

from utils.data import Corpus, passage_of, question_key, read_questions
from utils.encoder import tokenize_passages, tokenize_questions
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import UserError, friendly_errors, load_config, need_file, need_model
from utils.plumbing.files import atomic_file
from utils.plumbing.weights import given_inputs, load_encoder
from utils.text import has_answer

SPLITS = ("train", "dev", "test")
LOOK = 5000  # texts of a kind that are tokenised, spread over the file


def split_questions(folder):
    """Write train.jsonl, dev.jsonl and test.jsonl from questions.jsonl; a question goes to one of them."""

    def draw(question):
        return hashlib.sha256(question_key(question["question"]).encode()).digest()

    questions = sorted(read_questions(folder / "questions.jsonl"), key=draw)
    tenth = len(questions) // 10
    if tenth == 0:
        raise UserError(f"{folder}/questions.jsonl: 10 questions or more are needed, got {len(questions)}")
    parts = {"test": questions[:tenth], "dev": questions[tenth : 2 * tenth], "train": questions[2 * tenth :]}
    with tempfile.TemporaryDirectory(prefix=".split.", dir=folder) as place:
        for name, part in parts.items():
            with atomic_file(Path(place, f"{name}.jsonl")) as file:
                file.writelines(json.dumps(question, ensure_ascii=False) + "\n" for question in part)
        for name in parts:
            Path(place, f"{name}.jsonl").rename(folder / f"{name}.jsonl")
    print(f"{folder}: questions.jsonl is split into train.jsonl, dev.jsonl and test.jsonl")


def spread(items):
    """Return at most LOOK items, at equal distances."""
    step = -(-len(items) // LOOK)
    return [items[i] for i in range(0, len(items), step)]


def percent(flags):
    return f"{100 * mean(flags):.0f} %" if flags else "none"


def report_cut(kind, ids, limit):
    """Print which share of the id lists is longer than the limit."""
    longer = [len(tokens) > limit for tokens in ids]
    longest = max(map(len, ids))
    print(f"{kind}: {percent(longer)} of {len(ids):,} are cut at {limit} tokens; the longest has {longest}")
    if mean(longer) > 0.2:
        more = min(512, max(256, limit))
        cure = f'FLAGS="--{kind[:-1]}_tokens {more}" reads more of each, and costs more'
        print(f"warning: the ends of {percent(longer)} of the {kind} are never read. {cure};")
        print("         or cut passages into pieces of about 100 words, as DPR does")


def report_questions(name, path, corpus, regex):
    """Print how many questions of a file can be used for what. Return (the questions, their positives)."""
    questions = read_questions(path, match="regex" if regex else "string")
    positives = []
    holding = []
    for question in questions:
        for entry in question["positives"]:
            passage = passage_of(entry, corpus)
            positives.append(passage)
            if question["answers"]:
                holding.append(has_answer(passage.text, question["answers"], regex))
    unanswered = sum(not question["answers"] for question in questions)
    unlabelled = sum(not question["positives"] for question in questions)
    lacks = f"{unanswered:,} without answers, {unlabelled:,} without positives"
    print(f"{name}: {len(questions):,} questions, {lacks}")
    if unlabelled:
        print("      for these the first passage of BM25 with an answer will count; others are left out")
    if holding and mean(holding) < 0.5:
        print(
            f"warning: only {percent(holding)} of the positives of {name} hold an answer of their question."
        )
        print("         Are the answers regular expressions (MATCH=regex), or ids of another corpus?")
    return questions, positives


def main():
    parser = argparse.ArgumentParser("python -m prepare.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--match", choices=["string", "regex"], default="string")
    parser.add_argument("--corpus", default="", help="default: corpus.tsv in the folder")
    args, flags = parser.parse_known_args()
    folder = args.folder
    cfg = load_config(__doc__, "config/train_dpr_nq.yaml", flags)
    cfg.corpus = args.corpus or str(folder / "corpus.tsv")
    need_file(cfg, "corpus")
    need_model(cfg, "init")
    there = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
    if (folder / "questions.jsonl").is_file():
        if there:
            made = ", ".join(f"{name}.jsonl" for name in there)
            cure = "delete these to split it again"
            print(f"warning: questions.jsonl is not read, because of {made}; {cure}")
        else:
            split_questions(folder)
    for name in SPLITS:
        if not (folder / f"{name}.jsonl").is_file():
            cure = "give all three, or questions.jsonl and none of them, to split"
            raise UserError(f"{folder}/{name}.jsonl: no such file; {cure}")

    # the passages
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    sample = spread(corpus)
    print(f"passages: {len(corpus):,}, {corpus.empty_texts:,} without a text")
    for word, passage in ("first", corpus[0]), ("last", corpus[len(corpus) - 1]):
        print(
            f"      the {word}: id {passage.id!r}, title {passage.title[:40]!r}, text {passage.text[:60]!r}"
        )

    # what does not fit into the encoder
    inputs = given_inputs(cfg) | {"role": "shared"}
    encoder = load_encoder(cfg.init, "passage", inputs)
    encoder.inputs |= {"passage_tokens": 10**6, "question_tokens": 10**6}
    report_cut("passages", tokenize_passages(encoder, sample), cfg.passage_tokens)
    texts = [passage.text for passage in sample]
    for note in notes_on_unknown(encoder.tokenizer, texts):
        print(note)
    parts = {}
    for name in SPLITS:
        path = folder / f"{name}.jsonl"
        parts[name] = report_questions(name, path, corpus, args.match == "regex")
    texts = [question["question"] for questions, _ in parts.values() for question in questions]
    report_cut("questions", tokenize_questions(encoder, spread(texts)), cfg.question_tokens)

    # what spoils a training or a test
    train, positives = parts["train"]
    if len(train) < cfg.batch_size:
        cure = f'FLAGS="--batch_size {max(1, len(train) // 2)}"'
        raise UserError(f"{len(train)} training questions fill no batch of {cfg.batch_size}; {cure}")
    seen = {question_key(question["question"]) for question in train}
    leaked = sum(question_key(question["question"]) in seen for question in parts["test"][0])
    if leaked:
        print(f"warning: {leaked} test questions stand in train.jsonl too; their answers are known")
    titled = [bool(passage.title) for passage in positives]
    usual = [bool(passage.title) for passage in sample]
    if titled and abs(mean(titled) - mean(usual)) > 0.2:
        shares = f"{percent(titled)} of the positives have a title, {percent(usual)} of the passages"
        print(f"warning: {shares}: the encoder will learn that instead of the meaning")


if __name__ == "__main__":
    with friendly_errors():
        main()
