"""
The vectors of the passages while the encoder that makes them goes on learning: EMDR2's index.

Each device holds a slice of the vectors and searches it exactly; the best of all slices are merged. Every
`refresh_every` steps the vectors are made again, as the key `refresh` says:

    sync   here, by all devices, while training waits
    async  on other devices, by recipes/emdr2_worker.sh. The trainer saves its passage encoder as
           run_dir/refresh/step_XXXXXXXX/doc_encoder. The worker puts `embeddings` next to it.
    none   never

why an exact search: vectors that change every 500 steps leave no time to train an index, and the loss is
taken over the passages that are found. A tag such as [EM:264] is explained in train_emdr2.py.

Q questions · D dimensions · k results · n rows of this device · W devices · K candidates, W * k · N passages
"""

import copy
import functools
import shutil

import numpy as np
import torch
from tqdm import tqdm

from utils import encoder as encoding
from utils.distributed import cut, gather_items, prefetch, world
from utils.plumbing.config import UserError, at_least, must_be_one_of, need_value
from utils.plumbing.embeddings import check_storable, open_embeddings
from utils.plumbing.weights import encoder_hash, load_encoder, save_encoder
from utils.search import exact_topk, fetch

BLOCK = 16384  # rows that are sent to the GPU at a time
WINDOW = 8192  # passages tokenised and sorted by length together, as doc2embedding.py's sort_window
ALIKE = 0.98  # below this cosine two vectors come from different encoders; fp16 rounding leaves 0.999


def own_rows(question, path, corpus):
    """Return the rows that a question of the file `path` never retrieves: a set, mostly empty."""
    # why: a masked sentence would read its answer in the passage that it was cut from [EM:264-265]
    # trap: a question that a person asked may name its right passages too, and is to find them
    if "[MASK]" not in question["question"]:
        return set()
    ids = [entry for entry in question["positives"] if isinstance(entry, str)]
    if not ids:
        raise UserError(f"{path}: {question['qid']}: a masked sentence needs the id of its own passage")
    return {corpus.row(pid) for pid in ids}


class LiveIndex:
    """
    cfg: names `embeddings`, the first vectors, and `doc_encoder`, which must have made them.
    step: the training step whose passage encoder made the vectors (0: the start). encoder: {"index_encoder":
    that encoder} after the first refresh. A checkpoint keeps it, so that a resumed run has the same vectors.

    Device r of W holds the rows [N * r // W, N * (r + 1) // W), in the files until the first refresh, then in
    memory. All devices make the same calls in the same order: a search waits for all of them.
    """

    def __init__(self, corpus, run, cfg):
        must_be_one_of(cfg, refresh=("sync", "async", "none"))
        at_least(cfg, 1, "refresh_every", "encoding_batch_size")
        if cfg.refresh != "none" and not cfg.train_doc_encoder:
            raise UserError("train_doc_encoder false: no vector changes, so --refresh none goes with it")
        need_value(cfg, "embeddings")
        rank, devices = world()
        self.corpus, self.run, self.cfg = corpus, run, cfg
        self.rows = range(len(corpus) * rank // devices, len(corpus) * (rank + 1) // devices)
        self.on_gpu_nD = None
        self.encoder = {}
        # why on one device: every device would hash all 32 GB of Wikipedia
        self.load(cfg.embeddings, 0, verify=rank == 0, query_encoder=cfg.query_encoder)
        if not run.state.get("index_step"):
            encoder = load_encoder(cfg.doc_encoder, "passage").to(run.device)
            self.check(encoder)
            if encoder_hash(encoder) != self.made_by:  # an edit that eight passages do not show
                fault = f"{cfg.embeddings}: made by an encoder of other weights than {cfg.doc_encoder}"
                raise UserError(f"{fault}; repeat doc2embedding.py with this one, or name the other")

    def load(self, folder, step, **how):
        """Take over the embeddings in `folder`, made by the encoder of `step`; on a CPU no row is copied."""
        shards, manifest = open_embeddings(folder, self.corpus.sha256, rows=len(self.corpus), **how)
        self.folder = folder
        self.step = step
        self.dtype = manifest["dtype"]
        self.made_by = manifest.get("encoder")
        self.shards = []
        first = 0
        for shard in shards:
            begin = max(0, self.rows.start - first)
            end = max(0, self.rows.stop - first)
            if len(shard[begin:end]):
                self.shards.append(shard[begin:end])
            first += len(shard)
        self.send()

    def send(self):
        """Copy the rows to the GPU, where that leaves as much room again for training."""
        # why: to send 32 GB of rows takes seconds, and they are searched at every step
        device = self.run.device
        if self.on_gpu_nD is None and device.type == "cuda":
            size = sum(shard.nbytes for shard in self.shards)
            free, _ = torch.cuda.mem_get_info(device)
            if 0 < size < free / 2:
                shape = (len(self.rows), self.shards[0].shape[1])
                self.on_gpu_nD = torch.empty(shape, dtype=getattr(torch, self.dtype), device=device)
        if self.on_gpu_nD is None:
            return
        first = 0
        for shard in self.shards:
            for block_nD in np.split(shard, range(BLOCK, len(shard), BLOCK)):
                self.on_gpu_nD[first : first + len(block_nD)] = torch.from_numpy(block_nD.copy())
                first += len(block_nD)

    def tokenize(self, encoder, rows):
        return encoding.tokenize_passages(encoder, [self.corpus[row] for row in rows])

    def check(self, encoder):
        """UserError unless `encoder` made these rows: eight of each slice are encoded again, and compared."""
        # why: with the vectors of another encoder training runs as ever, only 2.6 points of exact match
        # worse (EMDR2 issue 8: unnoticed until its author looked)
        if not self.shards:
            return
        fault = f"{self.folder}: these vectors"
        advice = "repeat doc2embedding.py with this encoder"
        local = np.unique(np.linspace(0, len(self.rows) - 1, 8).astype(int))
        stored_nD = fetch(self.shards, local).astype(np.float32)
        if stored_nD.shape[1] != encoder.dim:
            dimensions = f"have {stored_nD.shape[1]} dimensions, doc_encoder {encoder.dim}"
            raise UserError(f"{fault} {dimensions}; {advice}")
        rows = local + self.rows.start
        fresh_nD = encoding.embed(encoder, self.tokenize(encoder, rows), 8, self.run.accelerator.autocast)
        lengths_n = np.linalg.norm(stored_nD, axis=1) * np.linalg.norm(fresh_nD, axis=1)
        cosine_n = (stored_nD * fresh_nD).sum(1) / np.maximum(lengths_n, 1e-12)
        strange = np.flatnonzero(~(cosine_n > ALIKE))  # trap: a comparison with NaN is false
        if len(strange):
            i = strange[0]
            passage = f"passage {self.corpus[rows[i]].id!r}: cosine {cosine_n[i]:.3f} with what it gives now"
            advice += ", or name the folder that it made"
            raise UserError(f"{fault} are not those of doc_encoder ({passage}); {advice}")

    # ------------------------------------------------------------ search
    def retrieve(self, examples, query_encoder, k):
        """Return the examples, each with "rows": its k best passages, the same on all devices."""
        # differs: without dropout, as in Atlas; EMDR2 searches with dropout in the question's vector
        ids = encoding.tokenize_questions(query_encoder, [example["question"] for example in examples])
        size = self.cfg.encoding_batch_size
        q_QD = encoding.embed_on_devices(query_encoder, ids, size, self.run.accelerator)

        if not torch.isfinite(q_QD).all():
            fault = f"step {self.run.state['step'] + 1}: query_encoder gives NaN or infinity"
            good = f"what {self.run.dir} holds is good"
            raise UserError(f"{fault}: its first weights are broken, or lower learning_rate ({good})")

        # find some more, because a question's own passages are left out [EM:389-391]
        spare = max(len(example["own"]) for example in examples)
        _, rows_Qk = self.search(q_QD.cpu().numpy(), k + spare)
        retrieved = []
        for example, rows in zip(examples, rows_Qk.tolist(), strict=True):
            rows = [row for row in rows if row not in example["own"]]
            retrieved.append(example | {"rows": rows[:k]})
        return retrieved

    def search(self, q_QD, k):
        """
        Find the k passages of the largest inner product for every question, best first, ties in corpus order.

        Return (scores_Qk float32, rows_Qk int64), the same on every device. q_QD: numpy float32. k <= N.
        """
        scores_Qk = np.zeros((len(q_QD), 0), np.float32)
        rows_Qk = np.zeros((len(q_QD), 0), np.int64)
        if self.shards:  # with fewer passages than devices some hold none
            device = str(self.run.device)
            scores_Qk, rows_Qk = exact_topk(q_QD, self.shards, k, device=device, resident_ND=self.on_gpu_nD)

        # the best of all devices
        hits = gather_items({world()[0]: (scores_Qk, rows_Qk + self.rows.start)})
        scores_QK = np.concatenate([scores for scores, _ in hits.values()], axis=1)
        rows_QK = np.concatenate([rows for _, rows in hits.values()], axis=1)
        best_Qk = np.lexsort((rows_QK, -scores_QK))[:, :k]  # by score, then by row
        return np.take_along_axis(scores_QK, best_Qk, 1), np.take_along_axis(rows_QK, best_Qk, 1)

    # ------------------------------------------------------------ refresh
    def refresh(self, step, doc_encoder):
        """Before a step: bring the vectors up to date, as cfg.refresh says."""
        # differs: vectors of `sync` are 0 to refresh_every - 1 steps old. EMDR2's are 500 to 1000 steps old:
        # it refreshes on other devices, and waits for late vectors; `async` never waits
        due = step > 0 and step % self.cfg.refresh_every == 0
        make_now = due and self.cfg.refresh == "sync"
        if self.run.checkpoint and step == self.run.first:
            self.restore(make_now)
        if make_now:
            self.make_rows(doc_encoder, step)
        if self.cfg.refresh == "async":
            self.take_over(step)  # first, or hand_over would delete what is just complete
            if due and self.run.main:
                self.hand_over(step, doc_encoder)
        self.run.state["index_step"] = self.step

    def restore(self, make_now):
        """In a resumed run: get back the vectors that it had, and begin the exchange with the worker anew."""
        folder = self.run.checkpoint / "index_encoder"
        if self.run.state.get("index_step") and not folder.is_dir():
            fault = "has no index_encoder, an older version wrote it"
            raise UserError(f"{self.run.checkpoint}: {fault}; choose another --run_dir")
        for old in self.run.dir.glob("refresh/step_*") if self.run.main else ():
            if not (old / ".embeddings").is_dir():  # the worker is at work there
                shutil.rmtree(old)
        if folder.is_dir() and not make_now:
            encoder = load_encoder(folder, "passage").to(self.run.device)
            self.make_rows(encoder, self.run.state["index_step"])

    def make_rows(self, encoder, step):
        """Replace the rows, in place, by those of `encoder` at `step`; each device makes its own."""
        if self.shards and isinstance(self.shards[0], np.memmap):
            self.shards = [np.empty((len(self.rows), encoder.dim), self.dtype)]
        windows = cut(self.rows, WINDOW)
        tokenized = prefetch(functools.partial(self.tokenize, encoder), windows)
        size, autocast = self.cfg.encoding_batch_size, self.run.accelerator.autocast
        with tqdm(total=len(self.rows), desc="refresh", delay=5, leave=False, disable=None) as bar:
            for rows, ids in zip(windows, tokenized, strict=True):
                fresh_nD = encoding.embed(encoder, ids, size, autocast, bar)
                advice = f"after step {step} training diverged: lower learning_rate"
                check_storable(fresh_nD, self.dtype, self.corpus, rows, advice)
                begin = rows.start - self.rows.start
                self.shards[0][begin : begin + len(rows)] = fresh_nD
        self.step = step
        self.encoder = {"index_encoder": copy.deepcopy(encoder).cpu()}
        self.send()

    def hand_over(self, step, doc_encoder):
        """Save the passage encoder for the worker, unless it is at work; keep only what is in use."""
        exchange = self.run.dir / "refresh"
        self.run.say(f"step {step}: the vectors in use are those of step {self.step}")
        if step == self.step or list(exchange.glob("step_*/.embeddings")):
            return
        for folder in exchange.glob("step_*"):
            if folder.name != f"step_{self.step:08d}":
                shutil.rmtree(folder)
        save_encoder(doc_encoder, exchange / f"step_{step:08d}" / "doc_encoder")

    def take_over(self, step):
        """Use the vectors that the worker has completed, if they are newer than those in use."""
        complete = [0]
        for folder in self.run.dir.glob("refresh/step_*"):
            if (folder / "embeddings").is_dir() and (folder / "doc_encoder").is_dir():
                complete.append(int(folder.name.removeprefix("step_")))
        newest = max(made for made in complete if made <= step)  # not those of a future that a resume left
        newest = gather_items({world()[0]: newest})[0]  # one device looks: all change over at the same step
        if newest > self.step:
            folder = self.run.dir / "refresh" / f"step_{newest:08d}"
            encoder = load_encoder(folder / "doc_encoder", "passage").to(self.run.device)
            self.load(folder / "embeddings", newest, verify=False)  # the worker has just hashed them
            self.check(encoder)
            self.encoder = {"index_encoder": encoder.cpu()}
            self.run.say(f"step {step}: the vectors of step {newest} are in use")
