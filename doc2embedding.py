"""
Encode every passage of a corpus once, before any question is asked (Karpukhin et al. 2020, Sec. 3.1).

In:   a corpus, the passage encoder of a training run
Out:  out/00000.npy ... ("shards" of `shard_size` passages), each with 00000.json (its sha256); manifest.json;
      ids.txt, line i + 1 is the passage id of row i
Run:  python doc2embedding.py --config config/doc2embedding.yaml
      accelerate launch doc2embedding.py --config config/doc2embedding.yaml
      After a crash, repeat the command: it continues, and no complete shard is encoded again.
      python doc2embedding.py --server 0 --servers 4     (machines that do not know of each other)
Next: test_dpr.py, ask.py

n passages of a shard or of a window · D dimensions
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data import Corpus
from utils.distributed import cut, prefetch
from utils.encoder import embed, tokenize_passages
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_folder,
    need_model,
)
from utils.plumbing.devices import rows_that_fit, start
from utils.plumbing.embeddings import (
    check_storable,
    finish_folder,
    open_embeddings,
    refuse_other_job,
    shards_to_encode,
    wait_for,
    write_shard,
)
from utils.plumbing.files import need_space, read_json, write_json
from utils.plumbing.weights import encoder_hash, given_inputs, load_encoder

# Processes that tokenise for a GPU. why not a thread: it shares Python's lock with the code that gives the
# GPU its work. Of 192 microseconds a passage 46 are tokenising (H200, results/bench/gpu_h200.txt)
WORKERS = 4
STEP = 32  # torch.compile makes code for each length; in steps of 32, 256 tokens are 8 lengths


# ---------------------------------------------------------------- the vectors
def tokenize_windows(windows, corpus, encoder, workers):
    """Yield the id lists of each window of passages. The next is tokenised while the device computes."""

    def tokenize(rows):
        return tokenize_passages(encoder, [corpus[row] for row in rows])

    if not workers:
        return prefetch(tokenize, windows)  # in a thread
    # for a GPU in processes; each has one thread, else the library warns of the fork
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loader = {"num_workers": workers, "multiprocessing_context": "fork"}
    return iter(DataLoader(windows, batch_size=None, collate_fn=tokenize, **loader))


def batch_sizes(cfg, encoder, stored, device):
    """
    Return {"size", "tokens", "lengths"} of utils.encoder.embed: as the key says, else as the folder's first
    run had it, else as fits the device. stored: the manifest.
    """
    lengths = []
    if cfg.compile:
        longest = encoder.inputs["passage_tokens"]
        lengths = [*range(STEP, longest, STEP), longest]
    if cfg.batch_size:
        return {"size": cfg.batch_size, "tokens": 0, "lengths": lengths}
    # rows of one token, so this is a number of tokens; on a CPU 0: there passages are counted
    tokens = rows_that_fit(0, 1, encoder.model.config.hidden_size, device)
    return {"size": 64, "tokens": tokens} | stored.get("batch", {}) | {"lengths": lengths}


def encode_shard(rows, tokenized, encoder, corpus, cfg, batching, bar):
    """Return the vectors [n, D] of the passages `rows`, and how many of these fill all their tokens."""
    vectors_nD = np.empty((len(rows), encoder.dim), cfg.dtype)
    full_length = 0
    # why windows of the shard: no batch depends on where a run was resumed
    for window in cut(rows, cfg.sort_window):
        # differs: DPR pads to 256 tokens, `embed` to the longest of a batch; the same vectors to 1e-6
        ids = next(tokenized)
        window_nD = embed(encoder, ids, progress=bar, **batching)
        advice = "the weights are broken" if cfg.mixed_precision == "no" else "use --mixed_precision no"
        check_storable(window_nD, cfg.dtype, corpus, window, advice)
        # differs: DPR and nanoDPR store float32, which takes twice the space of float16
        vectors_nD[window.start - rows.start : window.stop - rows.start] = window_nD
        full_length += sum(len(tokens) == encoder.inputs["passage_tokens"] for tokens in ids)
    return vectors_nD, full_length


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/doc2embedding.yaml")
    must_be_one_of(cfg, dtype=("float16", "float32"), mixed_precision=("no", "fp16", "bf16"))
    at_least(cfg, 1, "shard_size", "sort_window", "servers")
    if cfg.server >= cfg.servers:
        raise UserError(f"server must be one of 0 to {cfg.servers - 1}, got {cfg.server}")
    need_file(cfg, "corpus")
    need_model(cfg, "doc_encoder")
    inputs = given_inputs(cfg)
    need_folder(cfg, "out")

    # start the processes, open the corpus, load the encoder
    accelerator = start(cfg.mixed_precision)
    main_process = accelerator.is_main_process
    device = accelerator.device
    if cfg.compile and device.type == "cpu":
        raise UserError("compile: a CPU gains too little from it; use --compile false")
    with accelerator.main_process_first():  # the first process to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    encoder = load_encoder(cfg.doc_encoder, "passage", inputs).to(device)

    # cut the corpus into shards
    # differs: DPR and nanoDPR write one file a process; another number of processes means other files
    folder = Path(cfg.out)
    ranges = cut(range(len(corpus)), cfg.shard_size)
    shards = {folder / f"{i:05d}.npy": rows for i, rows in enumerate(ranges)}

    # refuse a folder of another model, corpus or setting: the vectors would be mixed
    manifest = {"rows": len(corpus), "dtype": cfg.dtype, "shard_size": cfg.shard_size, "role": "passage"}
    manifest |= {"mixed_precision": cfg.mixed_precision, "corpus": corpus.sha256}
    manifest |= {"dim": encoder.dim, "encoder": encoder_hash(encoder), "pair": encoder.inputs["pair"]}
    stored = read_json(folder / "manifest.json", {})
    refuse_other_job(folder, stored, manifest, shards)
    batching = batch_sizes(cfg, encoder, stored, device)
    manifest["batch"] = {"size": batching["size"], "tokens": batching["tokens"]}

    # find the shards that are missing: of this process, and how many passages of all
    # from: DPR's and GC-DPR's --shard_id and --num_shards; there each server writes one file of its own
    here = list(shards.items())[cfg.server :: cfg.servers]
    mine = here[accelerator.process_index :: accelerator.num_processes]
    todo = shards_to_encode(dict(mine), stored)
    share = torch.tensor(sum(map(len, todo.values())), device=device)
    count = int(accelerator.reduce(share, "sum"))  # a barrier too: all processes have read what is there
    if stored.get("complete") and not count:
        return accelerator.print(f"{folder}: already complete, {len(corpus):,} passages; nothing to do")

    # prepare the folder, say what is to come
    if main_process:
        need_space(folder, count * encoder.dim * np.dtype(cfg.dtype).itemsize, "embeddings")
        write_json(folder / "manifest.json", manifest | {"shards": {}, "complete": False})
        if corpus.empty_texts:
            print(f"warning: {corpus.empty_texts:,} passages have no text; only their titles are encoded")
        print(f"{len(corpus):,} passages, {len(corpus) - count:,} of them done before | {len(shards)} shards")
        batch = f"{batching['tokens']:,} tokens" if batching["tokens"] else f"{batching['size']} passages"
        where = f"{accelerator.num_processes} x {device.type}, precision {cfg.mixed_precision}"
        print(f"{encoder.dim} x {cfg.dtype} | {where} | batches of {batch}")
        print(f"inputs: {encoder.inputs}")
        first = tokenize_passages(encoder, [corpus[0]])[0]
        print(f"first passage: {encoder.tokenizer.decode(first)}", flush=True)
        sample = [corpus[row].text for row in range(0, len(corpus), 1 + len(corpus) // 1000)]
        for note in notes_on_unknown(encoder.tokenizer, sample):
            print(note, flush=True)
    for file in todo:
        file.unlink(missing_ok=True)  # a damaged one; the others would not wait for it below
    accelerator.wait_for_everyone()

    # half precision and compiled code
    batching["autocast"] = accelerator.autocast
    if cfg.mixed_precision == "bf16":
        # why not autocast: it turns the weights into bf16 anew for every batch, and the GPU waits for that
        # trap: not before encoder_hash above, which names the float32 weights
        encoder.to(torch.bfloat16)
        batching["autocast"] = contextlib.nullcontext
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 2 * len(batching["lengths"])  # with a mask and without one
        encoder.model.compile(dynamic=False)

    # encode
    began = time.perf_counter()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(WORKERS, os.cpu_count() // local) if device.type == "cuda" else 0
    windows = [window for rows in todo.values() for window in cut(rows, cfg.sort_window)]
    tokenized = tokenize_windows(windows, corpus, encoder, workers)
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a log file
    with tqdm(total=int(share), desc="passages", mininterval=often, disable=not main_process) as bar:
        for file, rows in todo.items():
            vectors_nD, full_length = encode_shard(rows, tokenized, encoder, corpus, cfg, batching, bar)
            write_shard(file, vectors_nD, full_length)
    wait_for(dict(here))
    seconds = time.perf_counter() - began

    # complete the manifest
    if main_process:
        print(f"{count:,} passages encoded | {count / seconds:.1f} passages/s")
        absent = [file.name for file in shards if not file.is_file()]
        if absent:
            print(f"{folder}: {len(absent)} shards are due from other servers, such as {absent[0]}")
            print("if they have other disks: bring all files together, then repeat this with --servers 1")
        else:
            full = finish_folder(folder, manifest, shards, corpus)
            open_embeddings(folder, verify=False)  # warns where the vectors hardly differ
            length = encoder.inputs["passage_tokens"]
            print(f"{full:,} passages fill all {length} tokens, their end may be cut")
            print(f"{folder}: complete, {len(corpus):,} passages")
    accelerator.end_training()


if __name__ == "__main__":
    with friendly_errors():
        main()
