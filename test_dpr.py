"""
Test a retriever: questions -> vectors -> the best k passages -> accuracy, MRR (Karpukhin et al. 2020).

In:   a questions file, the corpus, runs/X/query_encoder/, runs/X/embeddings/ (doc2embedding.py)
Out:  a .run (qid, pid, rank, score), which every later stage reads, and its .metrics.json
Run:  python test_dpr.py --config config/test_dpr.yaml
      python test_dpr.py --config config/test_dpr.yaml --index HNSW32
      python test_dpr.py --config config/test_dpr.yaml --bm25_run runs/bm25/test.run --out runs/both/test.run
      python test_dpr.py --questions data/nq/train.jsonl --lookahead true --k 200 --out runs/nq/lookahead.run
Next: mine_negatives.py, rerank.py, ask.py

top-k is the share of questions with an answer in the text of the first k passages; as in DPR, titles are not
searched. MRR@10, hit@k and nDCG@10 ask for the passages that the question file lists as positives, by id;
hit@50 and hit@1000 are what MS MARCO's papers print as R@50 and R@1000.

lookahead (ANCE-Tele, Sun et al. 2022): the query is a question's positive passage. Its neighbours are what a
question will find once training has moved it to its positive: negatives of the near future.

Differs from DPR and nanoDPR: (1) exact search without an index in memory is one key away (`stream`). (2) Ties
are in corpus order, and k is min(k, passages), where theirs repeats the last passage. (3) Only the retrieved
passages are read. (4) Every number has its n and a 95 % bootstrap interval over the questions. (5) Look-ahead
takes the positive's stored vector, where ANCE-Tele encodes the same text with the same model again.

Q questions · D dimensions
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from utils.data import (
    Corpus,
    aligned_reader,
    iter_jsonl,
    iter_run,
    read_questions,
    read_run,
    write_dpr_json,
    write_run,
    write_trec,
)
from utils.encoder import embed, tokenize_questions
from utils.estimate import dry_run
from utils.faiss_index import build_index, search_index
from utils.metrics import hit_at, mrr, ndcg, print_table, topk_accuracy, with_intervals
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
from utils.plumbing.files import sha256, write_json
from utils.plumbing.weights import load_encoder
from utils.search import as_lists, exact_topk, faiss, fetch
from utils.text import has_answer, report_regex_failures

KS = (1, 5, 20, 50, 100, 1000)
BLOCK = 16384  # questions searched at a time: MS MARCO's 502,939 x 1,000 hits would fill 100 GB
HIT_ONLY = (50, 1000)  # MS MARCO's R@50 and R@1000 are hit rates; of the answers, DPR counts the others


# ------------------------------------------------------------------------------------------- data
def check_inputs(cfg):
    """All mistakes are found here, before a model is loaded: (questions, corpus, shards, manifest, bm25)."""
    must_be_one_of(cfg, match=("string", "regex"))
    at_least(cfg, 1, "k", "batch_size", "nprobe", "ef_search")
    if cfg.question_tokens:
        at_least(cfg, 4, "question_tokens")
    need_file(cfg, "questions", "corpus", optional=("bm25_run", "check_leak"))
    if not cfg.out.endswith(".run"):
        raise UserError(f"out must be the path of a .run file, got {cfg.out!r}")
    need_out(cfg, "out", "questions", "corpus", "bm25_run", "check_leak")
    need_value(cfg, "embeddings")
    if not cfg.lookahead:
        need_model(cfg, "query_encoder")
    if cfg.lookahead and (cfg.bm25_run or cfg.dry_run):
        raise UserError("lookahead only looks vectors up: leave out bm25_run and dry_run")
    questions = read_questions(cfg.questions)
    if cfg.lookahead:
        asked = questions
        questions = [q for q in asked if q["positives"] and isinstance(q["positives"][0], str)]
        note = f"{len(asked) - len(questions)} of {len(asked)} questions have no passage id as first positive"
        if not questions:
            raise UserError(f"{cfg.questions}: {note}; `convert dpr_json --ids` keeps DPR's passage ids")
        print(f"look-ahead: {note} and are left out")
    if cfg.check_leak:
        leaked(questions, cfg.check_leak)
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    for pid in {pid for question in questions for pid in gold_ids(question)}:
        corpus.row(pid)
    bm25 = {}
    if cfg.bm25_run:
        bm25 = read_run(cfg.bm25_run)
        bm25 = {qid: [(corpus.row(pid), score) for pid, score in found] for qid, found in bm25.items()}
        missing = [q["qid"] for q in questions if q["qid"] not in bm25]
        if len(missing) == len(questions):
            raise UserError(f"{cfg.bm25_run}: has none of the questions of {cfg.questions}")
        if missing:
            print(f"warning: {cfg.bm25_run} lacks {len(missing)} questions, such as {missing[0]}")
    pair_of = "" if cfg.lookahead else cfg.query_encoder  # look-ahead needs no question encoder
    shards, manifest = open_embeddings(cfg.embeddings, corpus.sha256, cfg.verify, pair_of, len(corpus))
    return questions, corpus, shards, manifest, bm25


def gold_ids(question):
    """The passage ids that a question lists as positives; inline passages have none."""
    return {entry for entry in question["positives"] if isinstance(entry, str)}


def leaked(questions, train):
    """Print how many test questions occur in the training file, up to case, spaces and the question mark."""

    def plain(text):
        return " ".join(text.casefold().split()).rstrip("? ")

    seen = {plain(str(example.get("question", ""))) for _, example in iter_jsonl(train)}
    both = [q["question"] for q in questions if plain(q["question"]) in seen]
    example = f", such as {both[0]!r}" if both else ""
    print(f"leak: {len(both)} of {len(questions)} test questions occur in {train}{example}")


# ------------------------------------------------------------------------------------------ model
def load_question_encoder(cfg, manifest):
    """The question tower, which must give vectors of the passages' dimension."""
    encoder = load_encoder(cfg.query_encoder, "question")
    if encoder.dim != manifest["dim"]:
        raise UserError(f"{cfg.query_encoder}: {encoder.dim} dimensions, {cfg.embeddings}: {manifest['dim']}")
    if cfg.question_tokens > (longest := encoder.model.config.max_position_embeddings):
        raise UserError(f"question_tokens: {cfg.query_encoder} reads at most {longest} tokens")
    encoder.inputs["question_tokens"] = cfg.question_tokens or encoder.inputs["question_tokens"]
    return encoder


def encode(encoder, questions, cfg):
    """The question vectors, numpy float32 [Q, D]."""
    ids = tokenize_questions(encoder, [q["question"] for q in questions])
    print(f"first question: {encoder.tokenizer.decode(ids[0])}")
    with tqdm(total=len(ids), desc="questions", disable=None) as bar:
        return embed(encoder, ids, cfg.batch_size, "question", progress=bar)


def search(vectors_QD, shards, index, cfg, device):
    """List per question of up to k (row, score), best first; empty for a question whose vector holds NaN."""
    fine = np.isfinite(vectors_QD).all(1)
    if index is None:
        found = iter(as_lists(*exact_topk(vectors_QD[fine], shards, cfg.k, device=device)))
    else:
        found = iter(search_index(index, vectors_QD[fine], shards, cfg.k, exact=cfg.index == "Flat"))
    return [next(found) if one else [] for one in fine]


def hybrid(dense, bm25, weight, k):
    """
    One list of (row, score) from two: score = bm25 + weight * dense over both top-k lists (Karpukhin et al.
    2020, Sec. 5.1: weight 1.1; top 2000, that is --k 2000 here and for utils.bm25). A passage missing from
    one list gets that list's lowest score.
    """
    # differs: the paper does not say what a missing score is, and no code for it was released
    dense, bm25 = dict(dense), dict(bm25)
    low_dense, low_bm25 = (min(found.values(), default=0.0) for found in (dense, bm25))
    scores = {row: bm25.get(row, low_bm25) + weight * dense.get(row, low_dense) for row in dense | bm25}
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]


# --------------------------------------------------------------------------------------- evaluate
def retrieval_metrics(questions, results, corpus, ks, regex=False):
    """
    (metrics, hits) of a ranking. results: {qid: [(pid, score), ...]} best first, as read_run gives it; a
    question that is not in it counts as a miss. ks: at most the depth of the ranking. metrics: {name:
    {"value", "low", "high", "n"}}, n the number of questions that have answers (top-k), or positives with ids
    (MRR@10, hit@k, nDCG@10); without one, a metric is left out. hits: per question, has_answer of every
    retrieved passage's text.
    """
    values, hits, misses = {}, [], {}
    for question in tqdm(questions, "metrics", delay=2, leave=False, disable=None):
        pids, gold = [pid for pid, _ in results.get(question["qid"], [])], gold_ids(question)
        if question["answers"]:
            texts = (corpus[corpus.row(pid)].text for pid in pids)
            hits.append([has_answer(text, question["answers"], regex) for text in texts])
        else:  # MS MARCO: one list for all, of half a million questions
            hits.append(misses.setdefault(len(pids), [False] * len(pids)))
        accuracy = topk_accuracy(hits[-1:], [k for k in ks if k not in HIT_ONLY])
        one = {f"top-{k}": value for k, value in accuracy.items() if question["answers"]}
        if gold:
            relevant = [pid in gold for pid in pids]
            rank = relevant.index(True) + 1 if True in relevant else 0
            if max(ks) >= 10:
                one |= {"MRR@10": mrr([rank], 10), "nDCG@10": ndcg([relevant], [len(gold)], 10)}
            one |= {f"hit@{k}": hit_at([rank], k) for k in ks}
        for name, value in one.items():
            values.setdefault(name, []).append(float(value))
    return with_intervals(values), hits


def one_question_at_a_time(rankings):
    """(qid, hits) in the order of the questions, with a `get` like a dict's: one question's in memory."""
    take, _ = aligned_reader("", rankings, "")
    return SimpleNamespace(get=lambda qid, default: take(qid) or default)


# ------------------------------------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/test_dpr.yaml")
    questions, corpus, shards, manifest, bm25 = check_inputs(cfg)
    out = Path(cfg.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = f"{len(questions):,} questions, {len(corpus):,} passages x {manifest['dim']} {manifest['dtype']}"
    threads = torch.get_num_threads() if cfg.index == "stream" else faiss.omp_get_max_threads()
    print(f"{size}, index {cfg.index}, {device}, {threads} threads", flush=True)
    encoder = None if cfg.lookahead else load_question_encoder(cfg, manifest).to(device)
    if cfg.dry_run:

        def probe():  # 16 questions stand for all, one block of passages for the corpus
            together = min(len(questions), BLOCK)
            some_QD = np.resize(encode(encoder, questions[:16], cfg), (together, encoder.dim))
            exact_topk(some_QD, [shards[0][:16384]], cfg.k, device=device)
            return len(shards[0][:16384]) * together / len(questions)

        memory = 0 if cfg.index == "stream" else 4 * encoder.dim * len(corpus)
        n, disk = len(corpus), 60 * len(questions) * cfg.k
        return dry_run("search", [encoder], probe, n, "passages", out.parent, disk, memory)
    index = None  # stream needs none
    if cfg.index != "stream":
        folder, name = cfg.embeddings.rstrip("/"), sha256(Path(cfg.embeddings) / "manifest.json")
        index = build_index(cfg.index, shards, f"{folder}.index", name, cfg.nprobe, cfg.ef_search)
    if cfg.lookahead:
        rows = np.array([corpus.row(question["positives"][0]) for question in questions])
        vectors_QD = fetch(shards, rows).astype(np.float32)
    else:
        vectors_QD = encode(encoder, questions, cfg)
    lost = []

    def rankings():
        for first in range(0, len(questions), BLOCK):
            found = search(vectors_QD[first : first + BLOCK], shards, index, cfg, device)
            for question, one in zip(questions[first : first + BLOCK], found, strict=True):
                lost.extend([] if one else [question["qid"]])
                if bm25:
                    one = hybrid(one, bm25.get(question["qid"], []), cfg.hybrid_weight, cfg.k)
                yield question["qid"], [(corpus[row].id, score) for row, score in one]

    write_run(cfg.out, rankings())
    if lost:
        print(f"warning: no result for {len(lost)} questions (NaN in their vectors): {', '.join(lost[:5])}")
    if cfg.lookahead:
        return print(f"written: {cfg.out}; no accuracy is counted, the queries were passages")

    ks = [k for k in KS if k <= cfg.k]
    metrics, hits = retrieval_metrics(
        questions, one_question_at_a_time(iter_run(cfg.out)), corpus, ks, cfg.match == "regex"
    )
    path = out.with_suffix(".metrics.json")
    write_json(path, metrics)
    report_regex_failures()
    if metrics:
        print_table(metrics, out.name)
    else:
        print(f"{cfg.questions} has neither answers nor positives: only the ranking is written")
    if cfg.trec:
        write_trec(out.with_suffix(".trec"), iter_run(cfg.out))
    if cfg.dpr_json:
        get = one_question_at_a_time(iter_run(cfg.out)).get
        again = ((question["qid"], get(question["qid"], [])) for question in questions)
        write_dpr_json(out.with_suffix(".json"), questions, again, corpus, hits)
    print(f"written: {cfg.out}, {path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
