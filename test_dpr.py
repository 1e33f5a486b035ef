"""
Test a retriever: questions -> vectors -> the best k passages -> accuracy, MRR (Karpukhin et al. 2020).

In:   a questions file, the corpus, runs/X/query_encoder/, runs/X/embeddings/ (doc2embedding.py)
Out:  a .run (qid, pid, rank, score), which every later stage reads, and its .metrics.json
Run:  python test_dpr.py --config config/test_dpr.yaml
      python test_dpr.py --config config/test_dpr.yaml --index HNSW32
      python test_dpr.py --config config/test_dpr.yaml --bm25_run runs/bm25/test.run --out runs/both/test.run
      python test_dpr.py --questions data/nq/train.jsonl --lookahead true --k 200 --out runs/nq/lookahead.run
      python test_dpr.py --questions data/nq/train.jsonl --question_vectors runs/nq/train.npy (kept for later)
Next: mine_negatives.py, rerank.py, ask.py

top-k is the share of questions with an answer in the text of the first k passages. MRR@10, nDCG@10 and hit@k
count the listed positives, by id. MRR@10 is the mean of 1 / rank of the first one, 0 where none is among
ten. nDCG@10 counts all of them, less and less down the ranking. hit@50 and hit@1000 are MS MARCO's R@50 and
R@1000. lookahead (ANCE-Tele, Sun et al. 2022) searches with the vector of the positive passage. why: training
moves the vector of the question towards it.

Q questions · D dimensions · row: the place of a passage in the corpus, from 0 · qid, pid: ids
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data import Corpus, iter_jsonl, iter_run, named_hits, question_key, read_questions, write_run
from utils.encoder import embed, tokenize_questions
from utils.metrics import measure, report
from utils.plumbing.checks import check_ids
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
    need_out,
    need_value,
)
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.faiss_setup import faiss
from utils.plumbing.files import atomic_file, read_json, sha256, write_json
from utils.plumbing.weights import encoder_hash, given_inputs, load_encoder
from utils.search import as_lists, build_index, exact_topk, fetch, search_index

BLOCK = 16384  # questions searched at a time: MS MARCO's 502,939 x 1,000 hits would fill 100 GB


# ---------------------------------------------------------------- data
def check_settings(cfg):
    """UserError for every mistake that can be seen without reading a file."""
    must_be_one_of(cfg, match=("string", "regex"))
    at_least(cfg, 1, "k", "batch_size", "nprobe", "ef_search")
    if cfg.question_tokens:
        at_least(cfg, 4, "question_tokens")
    need_file(cfg, "questions", "corpus", optional=("bm25_run", "check_leak"))
    need_out(cfg, "out", ".metrics.json", ending=".run")
    need_value(cfg, "embeddings")
    if not cfg.lookahead:
        need_model(cfg, "query_encoder")
        given_inputs(cfg)  # UserError for a value that no encoder knows
    if cfg.lookahead and (cfg.bm25_run or cfg.question_vectors):
        raise UserError("lookahead only looks vectors up: leave out bm25_run and question_vectors")
    if cfg.question_vectors:
        need_out(cfg, "question_vectors", ".json", ending=".npy")


def with_positive_id(questions, path):
    """Return the questions whose first positive is a passage id, which has a stored vector."""
    kept = [q for q in questions if q["positives"] and isinstance(q["positives"][0], str)]
    lacking = len(questions) - len(kept)
    note = f"{lacking} of {len(questions)} questions have no passage id as first positive"
    if not kept:
        raise UserError(f"{path}: {note}; `convert dpr_json --ids` keeps DPR's passage ids")
    print(f"look-ahead: {note} and are left out")
    return kept


def count_leaks(questions, train):
    """Print how many test questions occur in the training file, as `question_key` compares them."""
    seen = {question_key(str(example.get("question", ""))) for _, example in iter_jsonl(train)}
    leaked = [question["question"] for question in questions if question_key(question["question"]) in seen]
    example = f", such as {leaked[0]!r}" if leaked else ""
    print(f"leak: {len(leaked)} of {len(questions)} test questions occur in {train}{example}")


def read_bm25(questions, corpus, cfg):
    """Return BM25's ranking as {qid: [(row, score), ...]}."""
    bm25 = {}
    for qid, hits in iter_run(cfg.bm25_run):
        bm25[qid] = [(corpus.row(pid, cfg.bm25_run), score) for pid, score in hits]
    missing = [question["qid"] for question in questions if question["qid"] not in bm25]
    if len(missing) == len(questions):
        raise UserError(f"{cfg.bm25_run}: has none of the questions of {cfg.questions}")
    if missing:
        print(f"warning: {cfg.bm25_run} lacks {len(missing)} questions, such as {missing[0]}")
    return bm25


# ---------------------------------------------------------------- model
def load_question_encoder(cfg, dim, device):
    """Return the question tower; its vectors must have `dim` dimensions."""
    encoder = load_encoder(cfg.query_encoder, "question", given_inputs(cfg)).to(device)
    if encoder.dim != dim:
        raise UserError(f"{cfg.query_encoder}: {encoder.dim} dimensions, {cfg.embeddings}: {dim}")
    print(f"inputs: {encoder.inputs}")
    return encoder


def encode(encoder, questions, cfg):
    """Return the question vectors, numpy float32 [Q, D]."""
    ids = tokenize_questions(encoder, [question["question"] for question in questions])
    print(f"first question: {encoder.tokenizer.decode(ids[0])}")
    with tqdm(total=len(ids), desc="questions", disable=None) as bar:
        return embed(encoder, ids, cfg.batch_size, progress=bar)


def encode_once(encoder, questions, cfg):
    """Return the vectors of the file `question_vectors`; where it is absent, encode and write it."""
    path = Path(cfg.question_vectors)
    note = path.with_suffix(".json")
    job = {"questions": sha256(cfg.questions), "encoder": encoder_hash(encoder)}
    if path.is_file():
        # the note tells vectors of another encoder, which fit in size and mean nothing here
        if note.is_file() and read_json(note) != job:
            raise UserError(f"{path}: made from other questions or by another encoder; name another file")
        if not note.is_file():
            print(f"{path}: no {note.name} says who made these vectors; they are taken as they are")
        return read_vectors(path, len(questions), encoder.dim)
    if note.is_file() and {*read_json(note)} != {*job}:
        raise UserError(f"{note}: would be replaced by a note on {path.name}; give that another name")
    vectors_QD = encode(encoder, questions, cfg)
    write_json(note, job)
    with atomic_file(path, "wb") as file:
        np.save(file, vectors_QD)
    print(f"written: {path}")
    return vectors_QD


def read_vectors(path, rows, dim):
    """Return a .npy file as float32 [rows, dim]. UserError where it is something else."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a whole .npy file ({error}); delete it, it is written again") from None
    if vectors.shape != (rows, dim) or vectors.dtype.kind != "f":
        content = f"{vectors.dtype} {list(vectors.shape)}"
        raise UserError(f"{path}: holds {content}; {rows} questions by {dim} dimensions are needed")
    return vectors.astype(np.float32)


def vectors_of_positives(questions, shards, corpus):
    """Return the stored vector of each question's first positive, numpy float32 [Q, D]."""
    # differs: ANCE-Tele encodes the same text with the same model again
    rows = [corpus.row(question["positives"][0]) for question in questions]
    return fetch(shards, np.array(rows)).astype(np.float32)


# ---------------------------------------------------------------- search
def search(vectors_QD, shards, index, k, device):
    """
    Yield per question a list of up to k (row, score), best first. It is empty where the vector holds NaN.
    index: of FAISS, or None for `stream`, exact search that reads the shards one block at a time.
    """
    for start in range(0, len(vectors_QD), BLOCK):
        block_QD = vectors_QD[start : start + BLOCK]
        valid_Q = np.isfinite(block_QD).all(axis=1)
        if index is None:
            hits = as_lists(*exact_topk(block_QD[valid_Q], shards, k, device=device))
        else:
            hits = search_index(index, block_QD[valid_Q], shards, k)
        hits = iter(hits)
        for valid in valid_Q:
            yield next(hits) if valid else []


def hybrid(dense, bm25, weight, k):
    """
    Return one list of (row, score) from two: score = bm25 + weight * dense (Karpukhin et al. 2020, Sec. 5.1).
    A passage that one list lacks gets its lowest score. The paper's lists hold 2000: give --k 2000 to both.
    """
    # differs: the paper does not say what a missing score is, and no code for it was released
    dense = dict(dense)
    bm25 = dict(bm25)
    low_dense = min(dense.values(), default=0.0)
    low_bm25 = min(bm25.values(), default=0.0)
    hits = []
    for row in dense | bm25:
        score = bm25.get(row, low_bm25) + weight * dense.get(row, low_dense)
        hits.append((row, score))
    hits.sort(key=lambda hit: (-hit[1], hit[0]))  # equal scores in the order of the corpus
    return hits[:k]


def rankings(questions, results, bm25, corpus, cfg):
    """Yield (qid, [(pid, score), ...]) of every question; `results` are its dense hits."""
    for question, hits in zip(questions, results, strict=True):
        if bm25:
            hits = hybrid(hits, bm25.get(question["qid"], []), cfg.hybrid_weight, cfg.k + 1)
        yield question["qid"], named_hits(question, hits, corpus, cfg.k, cfg.ignore_identical_ids)


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/test_dpr.yaml")
    check_settings(cfg)

    # read everything but the model
    questions = read_questions(cfg.questions, match="" if cfg.lookahead else cfg.match)
    if cfg.lookahead:
        questions = with_positive_id(questions, cfg.questions)
    if cfg.check_leak:
        count_leaks(questions, cfg.check_leak)
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    check_ids(cfg.questions, questions, corpus, "positives")
    bm25 = read_bm25(questions, corpus, cfg) if cfg.bm25_run else {}
    partner = "" if cfg.lookahead else cfg.query_encoder
    shards, manifest = open_embeddings(cfg.embeddings, corpus.sha256, cfg.verify, partner, len(corpus))

    # say what is searched and where
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads() if cfg.index == "stream" else faiss.omp_get_max_threads()
    size = f"{len(questions):,} questions, {len(corpus):,} passages x {manifest['dim']} {manifest['dtype']}"
    print(f"{size}, index {cfg.index}, {device}, {threads} threads", flush=True)

    # questions -> vectors
    if cfg.lookahead:
        vectors_QD = vectors_of_positives(questions, shards, corpus)
    else:
        encoder = load_question_encoder(cfg, manifest["dim"], device)
        vectors_of = encode_once if cfg.question_vectors else encode
        vectors_QD = vectors_of(encoder, questions, cfg)

    # build the index, or read a saved one
    index = None
    if cfg.index != "stream":
        folder = cfg.embeddings.rstrip("/") + ".index"
        embeddings_hash = sha256(Path(cfg.embeddings) / "manifest.json")
        index = build_index(cfg.index, shards, folder, embeddings_hash, cfg.nprobe, cfg.ef_search)

    # vectors -> the best passages; one more where named_hits drops the question's own document
    k = cfg.k + cfg.ignore_identical_ids
    results = search(vectors_QD, shards, index, k, device)
    write_run(cfg.out, rankings(questions, results, bm25, corpus, cfg))

    # name the questions that could not be asked
    valid_Q = np.isfinite(vectors_QD).all(axis=1)
    lost = [questions[i]["qid"] for i in np.flatnonzero(~valid_Q)]
    if lost:
        print(f"warning: no result for {len(lost)} questions (NaN in their vectors): {', '.join(lost[:5])}")
    if cfg.lookahead:
        return print(f"written: {cfg.out}; no accuracy is counted, the queries were passages")

    # count what was found
    metrics = measure(cfg.out, questions, corpus, cfg.k, cfg.match)
    path = Path(cfg.out).with_suffix(".metrics.json")
    write_json(path, metrics)
    report({Path(cfg.out).name: metrics}, cfg.questions)
    print(f"written: {cfg.out}, {path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
