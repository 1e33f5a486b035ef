"""
Ask a question, read the best passages: what the dense retriever finds, and what BM25 thinks of it.

In:   runs/X/{query_encoder,embeddings}/ (train_dpr.py, doc2embedding.py) and the corpus; runs/X/bm25/ is built once
Run:  python ask.py --run runs/demo "who wrote hamlet"
      python ask.py --run runs/demo

Each passage has its dense rank, its BM25 rank (`-`: not among BM25's best 1000), the inner product, id, title and
text; words of the question stand out in bold. A passage of dense rank 1 without a bold word is what DPR is about.
"""

import re
import shutil
import sys
import textwrap
import time
from pathlib import Path

from utils.config import UserError, at_least, choose, friendly_errors, load_config, need_file

BM25_DEPTH = 1000


def split_question(argv):
    """argv -> (the flags with their values, the question after them or None). Words need no quotes."""
    start = len(argv)
    while start and not argv[start - 1].startswith("--"):
        start -= 1
    takes_value = start and "=" not in argv[start - 1] and argv[start - 1] not in ("--debug", "--help")
    start += bool(takes_value and start < len(argv))
    return argv[:start], " ".join(argv[start:]) if start < len(argv) else None


def check_inputs(cfg, question):
    """All mistakes that can be seen without loading anything."""
    at_least(cfg, 1, "k")
    choose(cfg, corpus_format=("auto", "dpr", "marco", "beir"))
    if question is not None and not question.strip():
        raise UserError('the question is empty; write python ask.py "who wrote hamlet"')
    if not Path(cfg.run).is_dir():
        raise UserError(f"run: {cfg.run}: no such folder; name the run_dir of train_dpr.py")
    for part, script in (("query_encoder", "train_dpr.py"), ("embeddings/manifest.json", "doc2embedding.py")):
        if not (Path(cfg.run) / part).exists():
            raise UserError(f"{cfg.run} has no {part}; {script} writes it")
    if not cfg.corpus:
        raise UserError("corpus: name the file that the embeddings were made from")
    need_file(cfg, "corpus")


def load(cfg):
    """Everything a question needs: a function, question -> (hits, milliseconds, notes)."""
    # why here and not at the top: torch takes seconds to import, and a mistake should show at once
    import torch

    from utils.bm25 import build_bm25, search_bm25
    from utils.data import Corpus
    from utils.encoder import embed, load_encoder, pair_id, tokenize_questions
    from utils.search import as_lists, exact_topk, open_embeddings

    run = Path(cfg.run)
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    shards, manifest = open_embeddings(run / "embeddings", corpus.sha256)
    pair = pair_id(run / "query_encoder")
    if pair and manifest["pair"] and pair != manifest["pair"]:
        raise UserError(
            f"{run}: query_encoder (pair {pair}) and embeddings ({manifest['pair']}) are of two runs"
        )
    index = build_bm25(corpus, run / "bm25")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(run / "query_encoder", "question").to(device)

    def answer(question):
        times = [time.perf_counter()]
        ids = tokenize_questions(encoder, [question])
        q_1D = embed(encoder, ids, 1, "question")
        times.append(time.perf_counter())
        dense = as_lists(*exact_topk(q_1D, shards, cfg.k))[0]
        times.append(time.perf_counter())
        bm25 = {row: rank for rank, (row, _) in enumerate(search_bm25(index, [question], BM25_DEPTH)[0], 1)}
        times.append(time.perf_counter())
        hits = [(corpus[row], score, bm25.get(row, "-")) for row, score in dense]
        spent = [1000 * (end - begin) for begin, end in zip(times, times[1:], strict=False)]
        cut = len(ids[0]) == encoder.inputs["question_tokens"]
        return hits, spent, f" | only the first {len(ids[0])} tokens of the question were read" if cut else ""

    return answer, len(corpus)


def plain(text):
    """Without line breaks and control characters: a passage must not be able to command a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def emphasise(text, question):
    """Bold for the words of the question: those of four letters or more, and numbers and names however short."""
    words = [word for word in re.findall(r"\w+", question) if len(word) > 3 or not word.islower()]
    if not words:
        return text
    return re.sub(rf"\b({'|'.join(map(re.escape, words))})\b", "\033[1m\\1\033[0m", text, flags=re.IGNORECASE)


def show(question, answer):
    """Print the passages for one question, and what it cost."""
    hits, (encode, search, bm25), note = answer(question)
    width = max(40, shutil.get_terminal_size().columns)
    for rank, (passage, score, bm25_rank) in enumerate(hits, 1):
        head = f"dense {rank} | BM25 {bm25_rank} | {score:.3f} | {passage.id} | {passage.title}"
        lines = [plain(head)[:width], *textwrap.wrap(plain(passage.text), width - 4)]
        text = "\n    ".join(lines)
        print(emphasise(text, question) if sys.stdout.isatty() else text)
    print(f"encode {encode:.0f} ms | search {search:.0f} ms | BM25 {bm25:.0f} ms{note}\n", flush=True)


def main():
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a terminal that cannot show a letter shows `?`
        stream.reconfigure(errors="replace")
    flags, question = split_question(sys.argv[1:])
    cfg = load_config(__doc__, "config/ask.yaml", flags)
    check_inputs(cfg, question)
    answer, passages = load(cfg)
    if question is not None:
        return show(question, answer)
    print(f"{passages:,} passages. Type a question; Ctrl-D ends.")
    while True:
        try:
            question = input("question> ")
        except EOFError:
            return print()
        if question.strip():
            show(question, answer)
        else:
            print("that was empty; type a question, or Ctrl-D to end")


if __name__ == "__main__":
    with friendly_errors():
        main()
