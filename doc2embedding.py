"""
Encode every passage once, before any question is asked (Karpukhin et al. 2020, Sec. 3.1).

In:   a corpus, the passage encoder of a training run
Out:  out/00000.npy ... in corpus order, each with 00000.json (its sha256); manifest.json
Run:  python doc2embedding.py --config config/doc2embedding.yaml
      accelerate launch doc2embedding.py --config config/doc2embedding.yaml
      The same command goes on after a crash; what is complete is not encoded again.
Next: test_dpr.py, ask.py

Differs from DPR and nanoDPR: (1) A file holds a fixed number of rows, whatever the number W of processes:
shard i belongs to process i modulo W. The bits are the same, too, on one kind of processor (tests: a CPU,
1 and 2 processes; by hand: 1 to 4 threads). (2) Passages are sorted by length, then padded to the longest of
a batch and not to 256: half the work, the same vectors to 1e-6. (3) float16 on disk unless told otherwise.
(4) A shard is whole or absent, and hashed; a folder of another model, corpus or setting is refused. (5) No
pickle.

n rows of a shard or of a window · D dimensions
"""

import functools
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.data import Corpus
from utils.distributed import prefetch, start
from utils.encoder import embed, tokenize_passages
from utils.estimate import dry_run
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
from utils.plumbing.embeddings import check_finite, refuse_other_job, shards_to_encode
from utils.plumbing.files import atomic_file, need_space, read_json, sha256, write_json
from utils.plumbing.weights import encoder_hash, load_encoder

PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------- the vectors
def windows_of(rows, size):
    """Windows counted from the start of the shard, so that no batch depends on where a run was resumed."""
    return [rows[k : k + size] for k in range(0, len(rows), size)]


def read_windows(corpus, encoder, windows):
    """The id lists of each window (rows), one by one; the next is tokenised while the device computes."""

    def read(rows):
        passages = [corpus[row] for row in rows]
        return tokenize_passages(encoder, [(passage.title, passage.text) for passage in passages])

    return prefetch(read, windows)


def encode_shard(file, rows, stream, encoder, corpus, cfg, autocast, bar):
    """Encode the passages `rows` into `file`. stream: yields the id lists of their windows."""
    vectors_nD, full = np.empty((len(rows), encoder.dim), cfg.dtype), 0
    for window in windows_of(rows, cfg.sort_window):
        ids = next(stream)
        try:
            window_nD = embed(encoder, ids, cfg.batch_size, "passage", autocast, bar)
        except torch.OutOfMemoryError:
            raise UserError(f"the GPU's memory is full: lower --batch_size (now {cfg.batch_size})") from None
        with np.errstate(over="ignore"):  # why: check_finite says it better
            stored_nD = window_nD.astype(cfg.dtype)
        check_finite(window_nD, stored_nD, window, corpus, cfg)
        vectors_nD[window.start - rows.start : window.stop - rows.start] = stored_nD
        full += sum(len(row) == encoder.inputs["passage_tokens"] for row in ids)
    with atomic_file(file, "wb") as temporary:
        np.save(temporary, vectors_nD)
        temporary.flush()
        # why in here: no shard ever stands under its name without its hash
        write_json(file.with_suffix(".json"), {"sha256": sha256(temporary.name), "full_length": full})


# ----------------------------------------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/doc2embedding.yaml")
    must_be_one_of(cfg, dtype=("float16", "float32"), mixed_precision=("no", *PRECISION))
    at_least(cfg, 1, "batch_size", "shard_size", "sort_window")
    need_file(cfg, "corpus")
    need_model(cfg, "doc_encoder")
    need_folder(cfg, "out")
    folder = Path(cfg.out)
    accelerator = start()
    if cfg.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError('mixed_precision fp16 needs a GPU; a CPU takes "no" (fastest there) or bf16')
    rank, devices, say = accelerator.process_index, accelerator.num_processes, accelerator.print
    with accelerator.main_process_first():  # the first to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    shards = windows_of(range(len(corpus)), cfg.shard_size)
    shards = {folder / f"{i:05d}.npy": rows for i, rows in enumerate(shards)}
    mine = dict(list(shards.items())[rank::devices])
    want = {"rows": len(corpus), "dtype": cfg.dtype, "shard_size": cfg.shard_size, "role": "passage"}
    want |= {"mixed_precision": cfg.mixed_precision, "corpus": corpus.sha256}
    manifest = folder / "manifest.json"
    stored = read_json(manifest) if manifest.is_file() else {}
    refuse_other_job(folder, stored, want, shards)  # what can be known before a model is loaded

    encoder = load_encoder(cfg.doc_encoder, "passage").to(accelerator.device)
    autocast = nullcontext
    if cfg.mixed_precision != "no":
        autocast = functools.partial(torch.autocast, accelerator.device.type, PRECISION[cfg.mixed_precision])
    want |= {"dim": encoder.dim, "encoder": encoder_hash(encoder), "pair": encoder.inputs["pair"]}
    refuse_other_job(folder, stored, want, shards)
    todo = shards_to_encode(mine, stored)
    count = torch.tensor(sum(map(len, todo.values())), device=accelerator.device)
    count = int(accelerator.reduce(count, "sum"))  # also a barrier: all have read what is there
    if stored.get("complete") and not count:
        return say(f"{folder}: already complete, {len(corpus):,} passages; nothing to do")
    share, disk = sum(map(len, todo.values())), count * encoder.dim * np.dtype(cfg.dtype).itemsize
    if cfg.dry_run:
        rows = np.linspace(0, len(corpus) - 1, min(len(corpus), 4 * cfg.batch_size)).astype(int).tolist()
        ids = next(read_windows(corpus, encoder, [rows]))
        probe = functools.partial(embed, encoder, ids, cfg.batch_size, "passage", autocast)
        if rank == 0:
            unit = "passages on this device"
            dry_run("encoding", [encoder], lambda: len(probe()), share, unit, folder, disk)
        return
    if rank == 0:
        need_space(folder, disk, "embeddings")
        for leftover in folder.glob(".*.tmp"):  # of a killed run
            leftover.unlink()
        write_json(manifest, want | {"shards": {}, "complete": False})
        if corpus.empty_texts:
            print(f"warning: {corpus.empty_texts:,} passages have no text; only their titles are encoded")
        work = f"{len(corpus):,} passages, {len(corpus) - count:,} of them done before | {len(shards)} shards"
        print(f"{work} | {encoder.dim} x {cfg.dtype} | {devices} x {accelerator.device.type}")
        first = next(read_windows(corpus, encoder, [[0]]))[0]
        print(f"first passage: {encoder.tokenizer.decode(first)}", flush=True)
    for file in todo:
        file.unlink(missing_ok=True)  # damaged ones, for which the others would not wait below
    accelerator.wait_for_everyone()

    began = time.perf_counter()
    stream = [window for rows in todo.values() for window in windows_of(rows, cfg.sort_window)]
    stream = read_windows(corpus, encoder, stream)
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a log file
    with tqdm(total=share, desc="passages", mininterval=often, disable=rank > 0) as bar:
        for file, rows in todo.items():
            encode_shard(file, rows, stream, encoder, corpus, cfg, autocast, bar)
    # why not a barrier: it fails after 10 to 30 minutes; another device's last shard may take longer
    while not all(file.is_file() for file in shards):
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if rank == 0:
        notes = {file.name: read_json(file.with_suffix(".json")) for file in shards}
        hashes = {name: note["sha256"] for name, note in notes.items()}
        write_json(manifest, want | {"shards": hashes, "complete": True})
        full = sum(note["full_length"] for note in notes.values())
        print(f"{full:,} passages fill all {encoder.inputs['passage_tokens']} tokens, their end may be cut")
        print(f"{folder}: complete | {count:,} passages encoded | {count / seconds:.1f} passages/s")
    accelerator.end_training()


if __name__ == "__main__":
    with friendly_errors():
        main()
