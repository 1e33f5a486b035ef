"""
Ask a question and read the best passages: what the dense retriever finds, and what BM25 thinks of it.

In:   the corpus, runs/X/query_encoder/ (train_dpr.py), runs/X/embeddings/ (doc2embedding.py); if you like a
      reader, which answers from the passages shown: train_reader.py's cuts the answer out of one of them,
      train_emdr2.py's (FiD) writes it from all of them
Out:  the answer on the screen; runs/X/bm25/, once
Run:  python ask.py --run runs/demo "who wrote hamlet"
      python ask.py --run runs/demo
      python ask.py --run runs/demo --reader runs/demo/reading/reader
      python ask.py --run runs/emdr2_nq --corpus data/nq/corpus.tsv --reader runs/emdr2_nq/reader

A passage has its dense rank, its BM25 rank (`-`: not among BM25's best 1000), the inner product, id, title
and text. Words of the question stand out: a first passage without any of them is what DPR is about.
"""

import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

from utils.data import read_questions
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
)
from utils.text import answer_position, has_answer

BM25_DEPTH = 1000
ANSWER_TOKENS = 10  # of a reader's answer [DPR conf/extractive_reader_train_cfg.yaml max_answer_length]
BATCH = 8  # passages that a reader reads at a time


# ----------------------------------------------------------------------------------------- the inputs
def split_question(argv):
    """argv -> (flags with their values, the question after them or None); its words need no quotes."""
    start = len(argv)
    while start and not argv[start - 1].startswith("--"):
        start -= 1
    flag = argv[start - 1] if start else "--debug"
    if start < len(argv) and "=" not in flag and flag not in ("--debug", "--help"):
        start += 1  # the value of the last flag
    return argv[:start], " ".join(argv[start:]) if start < len(argv) else None


def check_inputs(cfg, question):
    """Every mistake that can be seen without loading anything."""
    at_least(cfg, 1, "k")
    must_be_one_of(cfg, corpus_format=("auto", "dpr", "marco", "beir"))
    if question is not None and not question.strip():
        raise UserError('the question is empty; write python ask.py "who wrote hamlet"')
    if not Path(cfg.run).is_dir():
        raise UserError(f"run: {cfg.run}: no such folder; name the run_dir of train_dpr.py")
    for part, script in (("query_encoder", "train_dpr.py"), ("embeddings/manifest.json", "doc2embedding.py")):
        if not (Path(cfg.run) / part).exists():
            raise UserError(f"{cfg.run} has no {part}; {script} writes it")
    if not cfg.corpus:
        raise UserError("corpus: name the file that the embeddings were made from")
    need_file(cfg, "corpus", optional=["questions"])
    if cfg.reader:
        need_model(cfg, "reader")


# ----------------------------------------------------------------------------------------- the answer
def load_reading(path, corpus, device):
    """
    The reader in a folder, of either kind, as a function: (question, passages, their rows in the corpus)
    -> what stands after `answer: `.
    """
    from utils.fid import answer, contexts_of, load_fid, text_budget
    from utils.plumbing.weights import read_inputs
    from utils.reader import load_reader, predict
    from utils.reader_data import tokenize_rows

    no_room = "none, no text of a passage fits beside the question"
    if read_inputs(path, "reader").get("role") == "fid":
        fid = load_fid(path).to(device)

        def write(question, passages, rows):
            if all(text_budget(fid, question, passage.title) < 1 for passage in passages):
                return no_room
            text = plain(answer(fid, [contexts_of(question, passages, rows, corpus, fid)], BATCH)[0])
            return f"{text or 'none, the reader wrote an empty text'} | FiD over {len(passages)} passages"

        return write
    reader = load_reader(path).to(device)

    def cut(question, passages, _):
        rows = tokenize_rows(reader.tokenizer, question, passages, reader.inputs["reader_tokens"])
        found = predict(reader, [passages], [rows], [len(passages)], ANSWER_TOKENS, BATCH)[0][0]
        if not found:
            return no_room
        i = found["passage_idx"]
        likely = f"span {found['score']:.3f} | relevance {found['relevance_score']:.3f}"
        where = f"dense {i + 1} | {plain(passages[i].id)} | {plain(passages[i].title)}"
        return f"{plain(found['text'])} | {likely} | in {where}"

    return cut


def load(cfg):
    """
    Load everything once. Returns a function: question -> (hits, milliseconds, words, note, said); hits: list
    of (passage, score, BM25 rank), words: those of the question that BM25 looks for, said: what the reader
    answers, "" without a reader.
    """
    # why imported here: torch takes seconds, and a mistake on the command line should show at once
    import torch

    from utils.bm25 import build_bm25, search_bm25, tokens
    from utils.data import Corpus
    from utils.encoder import embed, tokenize_questions
    from utils.plumbing.embeddings import open_embeddings
    from utils.plumbing.weights import load_encoder
    from utils.search import as_lists, exact_topk

    run, corpus = Path(cfg.run), Corpus(cfg.corpus, cfg.corpus_format)
    query_encoder = run / "query_encoder"
    shards, _ = open_embeddings(
        run / "embeddings", corpus.sha256, verify=False, query_encoder=query_encoder, rows=len(corpus)
    )
    index = build_bm25(corpus, run / "bm25")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(query_encoder, "question").to(device)
    read = load_reading(cfg.reader, corpus, device) if cfg.reader else None

    def answer(question):
        times = [time.perf_counter()]
        ids = tokenize_questions(encoder, [question])
        q_1D = embed(encoder, ids, 1, "question")
        times.append(time.perf_counter())
        dense = as_lists(*exact_topk(q_1D, shards, cfg.k))[0]
        times.append(time.perf_counter())
        bm25 = {row: rank for rank, (row, _) in enumerate(search_bm25(index, [question], BM25_DEPTH)[0], 1)}
        times.append(time.perf_counter())
        hits, said = [(corpus[row], score, bm25.get(row, "-")) for row, score in dense], ""
        if read:
            said = read(question, [passage for passage, _, _ in hits], [row for row, _ in dense])
            times.append(time.perf_counter())
        full = len(ids[0]) == encoder.inputs["question_tokens"]
        note = f" | the question fills all {len(ids[0])} tokens, its end may be cut" if full else ""
        return (
            hits,
            [1000 * (b - a) for a, b in zip(times, times[1:], strict=False)],
            tokens([question]).vocab,
            note,
            said,
        )

    return answer, len(corpus)


# ----------------------------------------------------------------------------------------- the screen
def plain(text):
    """One line, without control characters: a passage must not be able to command the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def embolden(text, words, answers):
    """`text` with its words that stand in the question in bold, and the first of `answers` in reverse."""
    bold, span = {word.casefold() for word in words if word}, answer_position(text, answers)

    def mark(match):
        if span and span[0] <= match.start() < span[1]:
            return f"\033[7m{match[0]}\033[0m"
        return f"\033[1m{match[0]}\033[0m" if match[0].casefold() in bold else match[0]

    return re.sub(r"\w+", mark, text)


def show(question, answer, known):
    """Print the passages for one question, and what it cost. known: {question in lower case: its answers}."""
    hits, (encode, search, bm25, *reading), words, note, said = answer(question)
    answers = known.get(question.lower().strip(" ?"), [])
    if answers:
        print(f"known answers: {', '.join(answers)}")
    if said:
        print(f"answer: {said}")
    width = max(40, shutil.get_terminal_size().columns)
    for rank, (passage, score, bm25_rank) in enumerate(hits, 1):
        found = " | holds the answer" if has_answer(passage.text, answers) else ""
        title = plain(passage.title) + found
        print(f"dense {rank} | BM25 {bm25_rank} | {score:.3f} | {plain(passage.id)} | {title}")
        text = textwrap.fill(plain(passage.text), width, initial_indent="    ", subsequent_indent="    ")
        print(embolden(text, words, answers) if sys.stdout.isatty() else text)
    took = f" | read {reading[0]:.0f} ms" if reading else ""
    print(f"encode {encode:.0f} ms | search {search:.0f} ms | BM25 {bm25:.0f} ms{took}{note}\n", flush=True)


def main():
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no such letter shows `?`
    flags, question = split_question(sys.argv[1:])
    try:
        cfg = load_config(__doc__, "config/ask.yaml", flags)
    except UserError as error:
        raise UserError(f"{error} (the question comes last)") from None
    check_inputs(cfg, question)
    rows = read_questions(cfg.questions, repeats=True) if cfg.questions else []
    known = {row["question"].lower().strip(" ?"): row["answers"] for row in rows}
    answer, passages = load(cfg)
    if question is not None:
        return show(question.encode("utf-8", "replace").decode(), answer, known)
    print(f"{passages:,} passages. Type a question; Ctrl-D ends.")
    while True:
        try:
            question = input("question> ")
        except EOFError:
            return print()
        if question.strip():
            show(question, answer, known)
        else:
            print("that was empty; type a question, or Ctrl-D to end")


if __name__ == "__main__":
    with friendly_errors():
        main()
