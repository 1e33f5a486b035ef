"""
Ask a question and read the best passages: what the dense retriever finds, and what BM25 thinks of it.

In:   the corpus, runs/X/query_encoder/ (train_dpr.py), runs/X/embeddings/ (doc2embedding.py); optional: a
      reader (train_reader.py, train_emdr2.py), which answers from the passages shown
Out:  the answer on the screen; runs/X/bm25/, once
Run:  python ask.py --run runs/demo "who wrote hamlet"
      python ask.py --run runs/demo --reader runs/demo/reading/reader
      python ask.py --run runs/emdr2_nq --corpus data/nq/corpus.tsv --reader runs/emdr2_nq/reader

A passage has its dense rank, BM25 rank (`-`: not in the best 1000), inner product, id, title and text. Where
the run's page (recipes/page.py) has the question, its address is printed.
"""

import json
import re
import shutil
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from utils.data import question_key, read_questions
from utils.plumbing import config
from utils.plumbing.config import UserError
from utils.text import answer_position, has_answer

BM25_DEPTH = 1000
BATCH = 8  # passages that a reader reads at a time
NO_TEXT = "none, no text of a passage fits beside the question"


# ---------------------------------------------------------------- the inputs
def split_question(argv):
    """Split argv into (flags with their values, the question after them or None); it needs no quotes."""
    start = len(argv)
    while start and not argv[start - 1].startswith("--"):
        start -= 1
    # the first word behind the last flag is its value, unless it takes none or has it behind a `=`
    flag = argv[start - 1] if start else ""
    if flag and start < len(argv) and "=" not in flag and flag not in ("--debug", "--help"):
        start += 1
    question = " ".join(argv[start:]) if start < len(argv) else None
    return argv[:start], question


def check_inputs(cfg, question):
    """UserError for every mistake that can be seen without loading anything."""
    config.at_least(cfg, 1, "k")
    config.must_be_one_of(cfg, corpus_format=("auto", "dpr", "marco", "beir"))
    if question is not None and not question.strip():
        raise UserError('the question is empty; write python ask.py "who wrote hamlet"')
    if not Path(cfg.run).is_dir():
        raise UserError(f"run: {cfg.run}: no such folder; name the run_dir of train_dpr.py")
    parts = {} if cfg.query_encoder else {"query_encoder": "train_dpr.py"}
    parts["embeddings/manifest.json"] = "doc2embedding.py"
    for part, script in parts.items():
        if not (Path(cfg.run) / part).exists():
            raise UserError(f"{cfg.run} has no {part}; {script} writes it")
    if not cfg.corpus and (Path(cfg.run) / "config.yaml").is_file():
        trained = config.read_yaml(Path(cfg.run) / "config.yaml")
        cfg.corpus = trained.get("corpus") or ""
        cfg.corpus_format = trained.get("corpus_format") or "auto"
    config.need_file(cfg, "corpus", optional=["questions"])
    if cfg.reader:
        config.need_model(cfg, "reader")


def links_of(run):
    """Return {question_key: address} of the questions of the run's page, or of its ladder's; or {}."""
    pages = [path for path in (run / "page.html", run.parent / "page.html") if path.is_file()]
    if not pages:
        return {}
    _, _, rest = pages[0].read_text(encoding="utf-8").partition('id="data">')
    data = json.loads(rest.partition("</script>")[0] or '{"questions": []}')
    links = {}
    for row in data["questions"]:
        links[question_key(row["text"])] = f"{pages[0].resolve().as_uri()}#q={quote(row['qid'], safe='')}"
    return links


def load(cfg):
    """Return a namespace of corpus, shards, bm25, encoder, reader (None without one), links to the page."""
    # why imported here and below: torch takes seconds, and a mistake on the command line should show at once
    import torch

    from answer import load_model
    from utils.bm25 import build_bm25
    from utils.data import Corpus
    from utils.plumbing.embeddings import open_embeddings
    from utils.plumbing.weights import given_inputs, load_encoder

    # the passages, their vectors, their words
    run = Path(cfg.run)
    query_encoder = cfg.query_encoder or run / "query_encoder"
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    verify = len(corpus) < 10**6  # why not always: to hash the 32 GB of Wikipedia takes a minute
    shards, _ = open_embeddings(run / "embeddings", corpus.sha256, verify, query_encoder, len(corpus))
    bm25 = build_bm25(corpus, run / "bm25")

    # the models
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(query_encoder, "question", given_inputs(cfg)).to(device)
    reader = None
    if cfg.reader:
        kind, model = load_model(cfg.reader)
        model.to(device)
        reader = partial(kind.answer_line, model)
    links = links_of(run)
    return SimpleNamespace(
        corpus=corpus, shards=shards, bm25=bm25, encoder=encoder, reader=reader, links=links
    )


# ---------------------------------------------------------------- the screen
def plain(text):
    """Return one line without control characters: a passage must not be able to command the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def embolden(text, words, answers):
    """Return `text` with the words of the question in bold, and the first of `answers` in reverse."""
    span = answer_position(text, answers)

    def mark(match):
        if span and span[0] <= match.start() < span[1]:
            return f"\033[7m{match[0]}\033[0m"
        return f"\033[1m{match[0]}\033[0m" if match[0].lower() in words else match[0]

    return re.sub(r"\w+", mark, text)


def show(question, tools, known, k):
    """Print the passages for one question, and what it cost. known: {question_key(question): its answers}."""
    from utils.bm25 import search_bm25, tokens
    from utils.encoder import embed, tokenize_questions
    from utils.search import as_lists, exact_topk

    # the best passages by inner product
    began = time.perf_counter()
    seconds = {}
    ids = tokenize_questions(tools.encoder, [question])
    q_1D = embed(tools.encoder, ids, 1)
    seconds["encode"] = time.perf_counter() - began
    began = time.perf_counter()
    dense = as_lists(*exact_topk(q_1D, tools.shards, k))[0]
    seconds["search"] = time.perf_counter() - began

    # their ranks by BM25
    began = time.perf_counter()
    ranked = search_bm25(tools.bm25, [question], BM25_DEPTH)[0]
    bm25 = {row: rank for rank, (row, _) in enumerate(ranked, 1)}
    words = tokens([question]).vocab
    seconds["BM25"] = time.perf_counter() - began

    # answers: those known from the question file, and the reader's
    passages = [tools.corpus[row] for row, _ in dense]
    answers = known.get(question_key(question), [])
    if answers:
        print(f"known answers: {', '.join(answers)}")
    if tools.reader:
        began = time.perf_counter()
        print(f"answer: {plain(tools.reader(question, passages, BATCH)) or NO_TEXT}")
        seconds["read"] = time.perf_counter() - began

    # the passages
    width = max(40, shutil.get_terminal_size().columns)
    for rank, (passage, (row, score)) in enumerate(zip(passages, dense, strict=True), 1):
        mark = " | holds the answer" if has_answer(passage.text, answers) else ""
        name = f"{plain(passage.id)} | {plain(passage.title)}{mark}"
        print(f"dense {rank} | BM25 {bm25.get(row, '-')} | {score:.3f} | {name}")
        text = textwrap.fill(plain(passage.text), width, initial_indent="    ", subsequent_indent="    ")
        print(embolden(text, words, answers) if sys.stdout.isatty() else text)

    # what the other systems find for it, and the cost
    if question_key(question) in tools.links:
        print(f"all systems on this question: {tools.links[question_key(question)]}")
    costs = [f"{name} {1000 * passed:.0f} ms" for name, passed in seconds.items()]
    if len(ids[0]) == tools.encoder.inputs["question_tokens"]:
        costs.append(f"the question fills all {len(ids[0])} tokens, its end may be cut")
    print(" | ".join(costs) + "\n", flush=True)


# ---------------------------------------------------------------- main
def main():
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no such letter shows `?`
    flags, question = split_question(sys.argv[1:])
    try:
        cfg = config.load_config(__doc__, "config/ask.yaml", flags)
    except UserError as error:
        # most often a question stands before a flag
        raise UserError(f"{error} (the question comes last)") from None
    check_inputs(cfg, question)
    rows = read_questions(cfg.questions, repeats=True) if cfg.questions else []
    known = {question_key(row["question"]): row["answers"] for row in rows}

    # one question from the command line, or one after the other
    tools = load(cfg)
    if question is not None:
        question = question.encode("utf-8", "replace").decode()
        return show(question, tools, known, cfg.k)
    print(f"{len(tools.corpus):,} passages. Type a question; Ctrl-D ends.")
    while True:
        try:
            question = input("question> ")
        except EOFError:
            return print()
        if question.strip():
            show(question, tools, known, cfg.k)
        else:
            print("that was empty; type a question, or Ctrl-D to end")


if __name__ == "__main__":
    with config.friendly_errors():
        main()
