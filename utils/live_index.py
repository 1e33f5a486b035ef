"""
The vectors of the passages while the encoder that made them goes on learning: EMDR2's index.

Each device holds its slice of the rows and searches it exactly; the best of all slices are merged on every
device. A refresh replaces all rows by those of a newer encoder, either made here by all devices while
training waits (sync), or taken over from a folder that utils/index_worker.py wrote meanwhile (async).

why an exact search: vectors that change every 500 steps leave no time to train an index, and the retrieved
set is what the loss is taken over.

Q questions · D dimensions · k results · K candidates · n rows of this device · W devices · N passages
"""

import functools

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from utils.distributed import gather_rows, prefetch, world
from utils.encoder import embed, tokenize_passages
from utils.index_worker import finished, folder_of, vectors
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.weights import load_encoder
from utils.search import exact_topk, fetch

BLOCK = 16384  # rows that are sent to the GPU at a time
WINDOW = 8192  # passages tokenised and sorted by length together, as doc2embedding.py's sort_window
ALIKE = 0.98  # cosine under which two vectors of a passage are of two encoders; rounding to fp16 leaves 0.999


class LiveIndex:
    """
    corpus: utils.corpus.Corpus. folder: embeddings of it (doc2embedding.py), made by a passage encoder that
    `check` then proves to be the right one. step: of training, whose encoder made the rows (0: the start).

    Device r of W holds the rows [N * r // W, N * (r + 1) // W) as views of the memory maps until the first
    refresh, then in memory; a GPU with room for twice as much has a copy and searches that. UserError when
    the folder is incomplete, damaged, or made from another corpus.

    Every device makes the same calls in the same order: a search waits for all of them.
    """

    def __init__(self, corpus, folder, accelerator):
        self.corpus, self.device, (rank, devices) = corpus, accelerator.device, world()
        self.rows = range(len(corpus) * rank // devices, len(corpus) * (rank + 1) // devices)
        self.copy_nD = None
        self.load(folder, 0, verify=rank == 0)  # why one: every device would hash all 32 GB of Wikipedia

    def load(self, folder, step, verify=False):
        """
        Take over the embeddings in `folder`, made by the encoder of `step`; no row is copied. verify: compare
        the shards with their hashes. UserError unless they are complete and of this corpus.
        """
        shards, manifest = open_embeddings(folder, self.corpus.sha256, verify, rows=len(self.corpus))
        begin, end, self.shards = self.rows.start, self.rows.stop, []
        for shard in shards:
            part_nD = shard[max(0, begin) : max(0, end)]
            self.shards += [part_nD] if len(part_nD) else []
            begin, end = begin - len(shard), end - len(shard)
        self.origin, self.step, self.dtype = str(folder), step, manifest["dtype"]
        self._copy()

    def search(self, q_QD, k):
        """
        The k passages of the largest inner product for every question, best first, ties in corpus order:
        (scores_Qk float32, rows_Qk int64), numpy, the same on every device and for every W; k = min(k, N).

        q_QD: numpy float32, the same questions on every device (trap: each device searches its slice for all
        of them). UserError for NaN and for a dimension that does not fit.
        """
        scores_Qk = np.full((len(q_QD), k), -np.inf, np.float32)
        rows_Qk = np.full((len(q_QD), k), -1)
        if self.shards:  # fewer passages than devices leave some without
            found_Qk, local_Qk = exact_topk(
                q_QD, self.shards, k, device=str(self.device), resident_ND=self.copy_nD
            )
            scores_Qk[:, : found_Qk.shape[1]] = found_Qk
            rows_Qk[:, : found_Qk.shape[1]] = local_Qk + self.rows.start

        def of_all(x_Qk):  # [Q, W * k]
            x_WQk = gather_rows(torch.from_numpy(x_Qk).to(self.device)).cpu().numpy()
            return np.concatenate(x_WQk.reshape(-1, *x_Qk.shape), axis=1)

        scores_QK, rows_QK = of_all(scores_Qk), of_all(rows_Qk)
        best_Qk = np.lexsort((rows_QK, -scores_QK))[:, : min(k, len(self.corpus))]
        return np.take_along_axis(scores_QK, best_Qk, 1), np.take_along_axis(rows_QK, best_Qk, 1)

    def check(self, encoder, accelerator):
        """
        UserError unless `encoder` (a passage encoder) made these rows: eight of each slice are encoded again,
        and the cosine of each pair must exceed 0.98. why: with the vectors of another encoder training runs
        as ever, only worse (EMDR2 issue 8: 2.6 points of exact match, unnoticed until its author looked).
        """
        if not self.shards:
            return
        local = np.unique(np.linspace(0, len(self.rows) - 1, 8).astype(int))
        rows = local + self.rows.start
        stored_nD = fetch(self.shards, local).astype(np.float32)
        what, advice = f"{self.origin}: these vectors", "repeat doc2embedding.py with this encoder"
        if stored_nD.shape[1] != encoder.dim:
            raise UserError(
                f"{what} have {stored_nD.shape[1]} dimensions, doc_encoder {encoder.dim}; {advice}"
            )
        fresh_nD = embed(encoder, self._tokenize(encoder, rows), len(rows), "passage", accelerator.autocast)
        lengths_n = np.linalg.norm(stored_nD, axis=1) * np.linalg.norm(fresh_nD, axis=1)
        cosine_n = (stored_nD * fresh_nD).sum(1) / np.maximum(lengths_n, 1e-12)
        for i in np.flatnonzero(~(cosine_n > ALIKE)):  # trap: a comparison with NaN is false
            raise UserError(
                f"{what} are not those of doc_encoder (passage {self.corpus[rows[i]].id!r}: cosine "
                f"{cosine_n[i]:.3f} with what it gives now); {advice}, or name the folder that it made"
            )

    def refresh(self, encoder, step, batch_size, autocast):
        """
        Replace the rows by those of `encoder` as it is after `step`; every device encodes its slice,
        `batch_size` passages in one forward pass. The same bits for the same encoder and W; without dropout,
        without a draw of the random generators. UserError names a passage whose vector is no number.

        Stored in the type of the folder, in place: there is no second copy of the rows.
        """
        if self.shards and isinstance(self.shards[0], np.memmap):
            self.shards = [np.empty((len(self.rows), encoder.dim), self.dtype)]
        windows = [self.rows[k : k + WINDOW] for k in range(0, len(self.rows), WINDOW)]
        bar = tqdm(total=len(self.rows), desc="refresh", delay=5, leave=False, disable=None)
        with bar:
            tokenized = prefetch(functools.partial(self._tokenize, encoder), windows)
            for rows, ids in zip(windows, tokenized, strict=True):
                try:
                    fresh_nD = embed(encoder, ids, batch_size, "passage", autocast, bar)
                except torch.OutOfMemoryError:
                    raise UserError(
                        f"the GPU's memory is full: lower --encoding_batch_size (now {batch_size})"
                    ) from None
                with np.errstate(over="ignore"):  # why: the error below says it better
                    stored_nD = fresh_nD.astype(self.dtype)
                for i in np.flatnonzero(~np.isfinite(stored_nD).all(1)):
                    raise UserError(
                        f"{self.corpus.path}: passage {self.corpus[rows[i]].id!r}: after step {step} its "
                        f"vector holds NaN or infinity, or more than {self.dtype} can; training diverged: "
                        "lower learning_rate"
                    )
                self.shards[0][rows.start - self.rows.start : rows.stop - self.rows.start] = stored_nD
        self.origin, self.step = f"{self.corpus.path} after the refresh at step {step}", step
        self._copy()

    def follow(self, run_dir):
        """Take over the newest embeddings that a worker has completed; True where they are newer."""
        newest = torch.zeros((), dtype=torch.long, device=self.device)
        if world()[0] == 0:
            newest += finished(run_dir)
        if world()[1] > 1:
            dist.all_reduce(newest)  # one device looks, so that all change over at the same step
        if newest <= self.step:
            return False
        self.load(vectors(run_dir, int(newest)), int(newest))
        return True

    def restore(self, run_dir, step, doc_encoder, batch_size, accelerator):
        """
        The rows that a run had made at `step`: a worker's embeddings, or its export encoded again. 0: those
        of the folder, which `doc_encoder` must have made.
        """
        if step and vectors(run_dir, step).is_dir():
            return self.load(vectors(run_dir, step), step)
        source = folder_of(run_dir, step) / "doc_encoder" if step else doc_encoder
        encoder = load_encoder(source, "passage").to(self.device)
        if step:
            self.refresh(encoder, step, batch_size, accelerator.autocast)
        else:
            self.check(encoder, accelerator)

    def _copy(self):
        """Bring the copy on the GPU up to date; only where it leaves as much room again for training."""
        # why: to send 32 GB of rows to the GPU takes seconds, and they are searched at every step
        if self.copy_nD is None and self.device.type == "cuda" and self.shards:
            room = torch.cuda.mem_get_info(self.device)[0] / 2
            if sum(shard.nbytes for shard in self.shards) < room:
                size, dtype = (len(self.rows), self.shards[0].shape[1]), getattr(torch, self.dtype)
                self.copy_nD = torch.empty(size, dtype=dtype, device=self.device)
        if self.copy_nD is not None:
            at = 0
            for shard in self.shards:
                for part_nD in np.split(shard, range(BLOCK, len(shard), BLOCK)):
                    self.copy_nD[at : at + len(part_nD)] = torch.from_numpy(part_nD.copy())
                    at += len(part_nD)

    def _tokenize(self, encoder, rows):
        passages = [self.corpus[row] for row in rows]
        return tokenize_passages(encoder, [(passage.title, passage.text) for passage in passages])
