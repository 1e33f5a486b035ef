"""
Rescore a ranking with a cross-encoder, which reads question and passage together (RocketQA, Qu et al. 2021).

In:   a question file, a .run that ranks passages for it, the corpus, runs/X/cross_encoder/
Out:  a .run with the first `depth` hits of a question, sorted by the probability of being relevant, which is
      their score; its .metrics.json, before and after
Run:  python rerank.py --config config/rerank.yaml
      accelerate launch rerank.py --config config/rerank.yaml
      The same command goes on after a crash; blocks that are there are not scored again.
Next: mine_negatives.py; for RocketQA under 0.1 is a negative, above 0.9 an unlabelled question's positive

Differs from RocketQA: (1) Ids stand beside the scores; its file is one number a line, meant for a depth that
the reader has to know. (2) Pairs are sorted by length, then padded to the longest of a batch and not to 160.
(3) float64 on disk, to the last bit: probabilities near 1 keep their order. (4) Block i of the questions
belongs to process i modulo W and is one part file, whole or absent: with as many threads in each process,
the bytes are the same for any W.
"""

import shutil
import sys
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from test_dpr import KS, gold_ids, one_question_at_a_time, retrieval_metrics
from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs
from utils.data import Corpus, iter_run, read_questions, write_run
from utils.distributed import prefetch, start
from utils.estimate import dry_run
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
    need_out,
)
from utils.plumbing.embeddings import refuse_other_job
from utils.plumbing.files import folder_hash, need_space, read_json, sha256, write_json
from utils.text import report_regex_failures


# ------------------------------------------------------------------------------------------- data
def check_inputs(cfg, corpus, say):
    """
    ({qid: question} in the order of the run, those without a ranking last; the pairs in each block). Mistakes
    are found here, before the model is loaded.
    """
    unranked = {question["qid"]: question for question in read_questions(cfg.questions)}
    for pid in {pid for question in unranked.values() for pid in gold_ids(question)}:
        corpus.row(pid)
    questions, sizes, strangers = {}, [], 0
    for qid, hits in iter_run(cfg.ranking):
        if qid not in unranked:
            strangers += 1
            continue
        sizes += [0] if len(questions) % cfg.block == 0 else []
        sizes[-1] += sum(corpus.row(pid) >= 0 for pid, _ in hits[: cfg.depth])  # row() refuses unknown ids
        questions[qid] = unranked.pop(qid)
    if not questions:
        raise UserError(f"{cfg.ranking}: has none of the questions of {cfg.questions}")
    if strangers:
        say(f"warning: {cfg.ranking}: {strangers:,} rankings left out, {cfg.questions} has no such questions")
    if unranked:
        say(f"warning: {cfg.ranking} lacks {len(unranked):,} questions, such as {next(iter(unranked))}")
    return questions | unranked, sizes


def rankings_of(path, questions, depth):
    """(qid, [(pid, score), ...]) of the first `depth` hits of those of `questions` that `path` ranks."""
    return ((qid, hits[:depth]) for qid, hits in iter_run(path) if qid in questions)


def read_blocks(todo, questions, corpus, cross, cfg):
    """(i, rankings, id lists) of the blocks `todo`; the next is tokenised while the device computes."""

    def read(numbered):
        i, block = numbered
        pairs = [(questions[qid]["question"], pid) for qid, hits in block for pid, _ in hits]
        return i, block, tokenize_pairs(cross, [(text, corpus[corpus.row(pid)]) for text, pid in pairs])

    rankings = rankings_of(cfg.ranking, questions, cfg.depth)
    blocks = ((i, list(islice(rankings, cfg.block))) for i in range(max(todo, default=-1) + 1))
    return prefetch(read, ((i, block) for i, block in blocks if i in todo))


# ------------------------------------------------------------------------------------------ model
def rescore(cross, block, ids, cfg, autocast, bar):
    """The rankings of a block by descending probability; equal ones stay in the given order."""
    try:
        scores = probabilities(cross, ids, cfg.batch_size, autocast, bar)
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full: lower --batch_size (now {cfg.batch_size})") from None
    if np.isnan(scores).any():
        first = [(qid, pid) for qid, hits in block for pid, _ in hits][np.isnan(scores).argmax()]
        advice = "the weights are broken" if cfg.mixed_precision == "no" else "use --mixed_precision no"
        raise UserError(f"question {first[0]!r}, passage {first[1]!r}: the score is NaN; {advice}")
    scores = iter(scores.tolist())
    scored = [(qid, [(pid, next(scores)) for pid, _ in hits]) for qid, hits in block]
    return [(qid, sorted(hits, key=lambda hit: -hit[1])) for qid, hits in scored]


# --------------------------------------------------------------------------------------- evaluate
def measure(path, questions, corpus, cfg):
    """The metrics of test_dpr.py for the first `depth` hits, one question's hits in memory at a time."""
    results, ks = (
        one_question_at_a_time(rankings_of(path, questions, cfg.depth)),
        [k for k in KS if k <= cfg.depth],
    )
    return retrieval_metrics(list(questions.values()), results, corpus, ks, cfg.match == "regex")[0]


def print_both(before, after):
    """One line a metric, in percent, with its 95 % interval."""
    print(f"{'%':10} {'before':>21} {'after':>21} {'n':>9}")
    for name in before:
        columns = [
            [100 * metrics[name][key] for key in ("value", "low", "high")] for metrics in (before, after)
        ]
        columns = ["{:.1f} ({:.1f} - {:.1f})".format(*column) for column in columns]
        print(f"{name:10} {columns[0]:>21} {columns[1]:>21} {before[name]['n']:9,}")


# ------------------------------------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/rerank.yaml")
    must_be_one_of(cfg, match=("string", "regex"), mixed_precision=("no", "fp16", "bf16"))
    at_least(cfg, 1, "depth", "batch_size", "block")
    need_file(cfg, "questions", "ranking", "corpus")
    need_model(cfg, "cross_encoder")
    need_out(cfg, "out", "questions", "ranking", "corpus")
    out, folder = Path(cfg.out), Path(f"{cfg.out}.parts")
    if out.suffix != ".run":
        raise UserError(f"out must be the path of a .run file, got {cfg.out!r}")
    accelerator = start(cfg.mixed_precision)
    rank, devices, say = accelerator.process_index, accelerator.num_processes, accelerator.print
    with accelerator.main_process_first():  # the first to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    questions, sizes = check_inputs(cfg, corpus, say)
    want = {key: getattr(cfg, key) for key in ("depth", "block", "mixed_precision")}
    want |= {"ranking": sha256(cfg.ranking), "questions": sha256(cfg.questions), "corpus": corpus.sha256}
    want |= {"corpus_format": corpus.meta["fmt"], "cross_encoder": folder_hash(cfg.cross_encoder)}
    manifest = folder / "manifest.json"
    stored = read_json(manifest) if manifest.is_file() else {}
    if not stored and any(folder.glob("[!.]*")):
        raise UserError(f"{folder} is not from this job; name another --out, or delete that folder")
    refuse_other_job(folder, stored, want, ())

    cross = load_cross_encoder(cfg.cross_encoder).to(accelerator.device)
    parts = [folder / f"{i:05d}.run" for i in range(len(sizes))]
    todo = {i for i in range(rank, len(sizes), devices) if not parts[i].is_file()}
    share = sum(sizes[i] for i in todo)
    count = torch.tensor(share, device=accelerator.device)
    count = int(accelerator.reduce(count, "sum"))  # also a barrier: all have read what is there
    disk = 100 * (sum(sizes) + count)  # bytes a line, in `out` and in its part
    if cfg.dry_run:
        ids = next(read_blocks({0}, questions, corpus, cross, cfg))[2][: 4 * cfg.batch_size]
        if rank == 0:
            made = [cross, ids, cfg.batch_size, accelerator.autocast]
            probe, unit = lambda: len(probabilities(*made)), "pairs on this device"
            dry_run("rescoring", [cross], probe, share, unit, out.parent, disk)
        return
    if rank == 0:
        need_space(out.parent, disk, "the ranking")
        write_json(manifest, want)
        work = f"{sum(sizes):,} pairs, {sum(sizes) - count:,} of them done before | {len(sizes):,} blocks"
        print(f"{work} | {devices} x {accelerator.device.type}", flush=True)
    accelerator.wait_for_everyone()

    began = time.perf_counter()
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a log file
    with tqdm(total=share, desc="pairs", mininterval=often, disable=rank > 0) as bar:
        for i, block, ids in read_blocks(todo, questions, corpus, cross, cfg):
            if i == min(todo):
                say(f"first pair: {cross.tokenizer.decode(ids[0])}", flush=True)
            write_run(parts[i], rescore(cross, block, ids, cfg, accelerator.autocast, bar))
    if rank == 0:
        # why not a barrier: it fails after 10 to 30 minutes; another device's last block may take longer
        while not all(part.is_file() for part in parts):
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        write_run(out, chain.from_iterable(map(iter_run, parts)))
        before, after = (measure(path, questions, corpus, cfg) for path in (cfg.ranking, out))
        write_json(out.with_suffix(".metrics.json"), {"before": before, "after": after})
        report_regex_failures()
        if before:
            print_both(before, after)
        else:
            print(f"{cfg.questions} has neither answers nor positives: only the ranking is written")
        shutil.rmtree(folder)  # why last: after a crash above, no pair is scored again
        print(f"written: {out} | {count:,} pairs scored | {count / seconds:.1f} pairs/s")
    accelerator.end_training()


if __name__ == "__main__":
    with friendly_errors():
        main()
