"""
Rescore a ranking with a cross-encoder, which reads question and passage together (RocketQA, Qu et al. 2021).

In:   a question file, a .run that ranks passages for it, the corpus, runs/X/cross_encoder/
Out:  a .run with the first `depth` hits of a question, sorted by the probability of being relevant, which is
      their score; its .metrics.json, before and after
Run:  python rerank.py --config config/rerank.yaml
      accelerate launch rerank.py --config config/rerank.yaml
      After a crash, repeat the command: it continues, and no finished block is scored again.
Next: mine_negatives.py; for RocketQA under 0.1 is a negative, above 0.9 an unlabelled question's positive
"""

import shutil
import sys
import time
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs
from utils.data import Corpus, iter_rankings, iter_run, read_questions, write_run
from utils.distributed import prefetch
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
)
from utils.plumbing.devices import rows_that_fit, start
from utils.plumbing.embeddings import refuse_other_job, wait_for
from utils.plumbing.files import folder_hash, lock, need_space, read_json, sha256, write_json


# ---------------------------------------------------------------- data
def read_inputs(cfg, corpus, say):
    """Return {qid: question} in the order of the run, unranked ones last, and the pairs of each block."""
    unranked = {question["qid"]: question for question in read_questions(cfg.questions, match=cfg.match)}
    check_ids(cfg.questions, unranked.values(), corpus, "positives")

    # does the corpus have all passages of the run, and how much work is it?
    questions = {}
    sizes = []
    strangers = 0
    for qid, hits in iter_run(cfg.ranking):
        if qid not in unranked:
            strangers += 1
            continue
        if len(questions) % cfg.block == 0:
            sizes.append(0)
        questions[qid] = unranked.pop(qid)
        for pid, _ in hits[: cfg.depth]:
            corpus.row(pid, cfg.ranking)
            sizes[-1] += 1

    # say what does not match
    if not questions:
        raise UserError(f"{cfg.ranking}: has none of the questions of {cfg.questions}")
    if strangers:
        say(f"warning: {cfg.ranking}: {strangers:,} rankings left out, {cfg.questions} has no such questions")
    if unranked:
        say(f"warning: {cfg.ranking} lacks {len(unranked):,} questions, such as {next(iter(unranked))}")
    return questions | unranked, sizes


def read_blocks(todo, questions, corpus, cross, cfg):
    """Yield (i, rankings, id lists of the pairs) of the blocks `todo`. The next is tokenised meanwhile."""

    def blocks():
        rest = iter_rankings(cfg.ranking, questions, cfg.depth)
        for i in range(max(todo, default=-1) + 1):
            rankings = list(islice(rest, cfg.block))
            if i in todo:
                yield i, rankings

    def tokenize(block):
        i, rankings = block
        pairs = []
        for qid, hits in rankings:
            question = questions[qid]["question"]
            pairs += [(question, corpus.passage(pid)) for pid, _ in hits]
        return i, rankings, tokenize_pairs(cross, pairs)

    return prefetch(tokenize, blocks())


# ---------------------------------------------------------------- model
def rescore(rankings, ids, cross, cfg, autocast, bar):
    """Return the rankings of a block by descending probability; equal ones stay in the given order."""
    # differs: RocketQA pads each pair to 160 tokens, and writes float32; float64 keeps the order near 1
    scores = probabilities(cross, ids, cfg.batch_size, autocast, bar)
    pairs = [(qid, pid) for qid, hits in rankings for pid, _ in hits]
    broken = np.flatnonzero(np.isnan(scores))
    if len(broken):
        qid, pid = pairs[broken[0]]
        advice = "the weights are broken" if cfg.mixed_precision == "no" else "use --mixed_precision no"
        raise UserError(f"question {qid!r}, passage {pid!r}: the score is NaN; {advice}")

    # sort each ranking anew
    scores = iter(scores.tolist())
    rescored = []
    for qid, hits in rankings:
        hits = [(pid, next(scores)) for pid, _ in hits]
        hits.sort(key=lambda hit: -hit[1])
        rescored.append((qid, hits))
    return rescored


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/rerank.yaml")
    must_be_one_of(cfg, match=("string", "regex"), mixed_precision=("no", "fp16", "bf16"))
    at_least(cfg, 1, "depth", "block")
    need_file(cfg, "questions", "ranking", "corpus")
    need_model(cfg, "cross_encoder")
    need_out(cfg, "out", ".metrics.json", ending=".run")
    out = Path(cfg.out)

    # start the processes, read everything but the model
    accelerator = start(cfg.mixed_precision)
    main_process = accelerator.is_main_process
    with accelerator.main_process_first():  # the first process to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    questions, sizes = read_inputs(cfg, corpus, accelerator.print)

    # refuse the blocks of another job
    folder = Path(f"{cfg.out}.parts")
    manifest = {"depth": cfg.depth, "block": cfg.block, "mixed_precision": cfg.mixed_precision}
    manifest |= {"ranking": sha256(cfg.ranking), "questions": sha256(cfg.questions)}
    manifest |= {"corpus": corpus.sha256, "corpus_format": corpus.meta["fmt"]}
    manifest |= {"cross_encoder": folder_hash(cfg.cross_encoder)}
    stored = read_json(folder / "manifest.json", {})
    if not stored and any(folder.glob("[!.]*")):
        raise UserError(f"{folder} is not from this job; name another --out, or delete that folder")
    refuse_other_job(folder, stored, manifest, ())
    cross = load_cross_encoder(cfg.cross_encoder).to(accelerator.device)

    # how many pairs go through it together: the key's number, the first run's, or what fits the device
    width = cross.model.config.hidden_size
    fits = rows_that_fit(128, cross.inputs["pair_tokens"], width, accelerator.device)
    cfg.batch_size = cfg.batch_size or stored.get("batch_size", fits)
    manifest["batch_size"] = cfg.batch_size

    # find the blocks that are missing: of this process, and how many pairs of all
    files = [folder / f"{i:05d}.run" for i in range(len(sizes))]
    mine = range(accelerator.process_index, len(files), accelerator.num_processes)
    todo = {i for i in mine if not files[i].is_file()}
    share = torch.tensor(sum(sizes[i] for i in todo), device=accelerator.device)
    count = int(accelerator.reduce(share, "sum"))  # a barrier too: all processes have read what is there
    if main_process:
        lines = sum(sizes) + count  # in `out`, and in the blocks
        need_space(out.parent, 100 * lines, "the ranking")  # about 100 bytes a line
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder / ".lock")
        write_json(folder / "manifest.json", manifest)
        work = f"{sum(sizes):,} pairs, {sum(sizes) - count:,} of them done before | {len(sizes):,} blocks"
        work += f" | batches of {cfg.batch_size}"
        print(f"{work} | {accelerator.num_processes} x {accelerator.device.type}", flush=True)
    accelerator.wait_for_everyone()

    # score
    began = time.perf_counter()
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a log file
    with tqdm(total=int(share), desc="pairs", mininterval=often, disable=not main_process) as bar:
        for i, rankings, ids in read_blocks(todo, questions, corpus, cross, cfg):
            if i == min(todo):
                accelerator.print(f"first pair: {cross.tokenizer.decode(ids[0])}", flush=True)
            write_run(files[i], rescore(rankings, ids, cross, cfg, accelerator.autocast, bar))

    # join the blocks and measure
    if main_process:
        wait_for(files)
        seconds = time.perf_counter() - began
        write_run(out, chain.from_iterable(map(iter_run, files)))
        tables = {}
        for name, path in {"before": cfg.ranking, "after": out}.items():
            tables[name] = measure(path, questions.values(), corpus, cfg.depth, cfg.match)
        write_json(out.with_suffix(".metrics.json"), tables)
        report(tables, cfg.questions)
        shutil.rmtree(folder)  # why last: after a crash above, no pair is scored again
        print(f"written: {out} | {count:,} pairs scored | {count / seconds:.1f} pairs/s")
    accelerator.end_training()


if __name__ == "__main__":
    with friendly_errors():
        main()
