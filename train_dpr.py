"""
Train a question encoder and a passage encoder with in-batch negatives (DPR, Karpukhin et al. 2020, Sec. 3).

In:   a questions file (train, dev) and the corpus that its passage ids point into
Out:  run_dir/{query_encoder,doc_encoder}/ (best on dev), checkpoints/, log.txt, metrics.jsonl
Run:  accelerate launch train_dpr.py --config config/train_dpr_nq.yaml
      accelerate launch train_dpr.py --config config/train_gcdpr_nq.yaml
Next: doc2embedding.py

Expect: results/demo (make demo), results/nq_small; the papers' numbers beside ours in README.md

One trainer, four systems, all with the softmax over every passage of the global batch; `diff` two configs for
the lesson. GC-DPR: chunks (train_gcdpr_nq). RocketQA: 1024 or 4096 questions a batch, its "cross-batch
negatives", on one GPU by the same chunks (train_dpr_rocketqa_*). ANCE-Tele: a window that moves on through
mined negatives, an early stop (train_dpr_ance_tele_*). In the last two every round starts anew from `init`;
only the training file is new.

Differs from the papers and their code: (1) the gradient is that of the full batch on any number of devices;
DPR trained with 1/8 of it, which `gradient_scale` restores. (2) A question's own positives are not its
negatives (`mask_duplicates`); in all four they can be. (3) The dev metric, from the first epoch on, is the
rank (from 1) in one global pool of positives and hard negatives; DPR's is the loss until epoch 30, then the
rank in a pool per device. (4) Dropout, order and negatives are functions of (seed, step), so a killed run
resumes to the same bits (on a CPU; a GPU's attention may add in another order). (5) torch's AdamW, whose
epsilon is outside the bias correction. (6) The learning rate falls from its peak; RocketQA's drops to 0.9 of
it after the warm-up.

B questions, P = B * (1 + negatives) passages on this device · Q, N the same on all devices · D hidden
"""

import math
import random
import time
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from utils.data import Corpus, passage_of, read_training
from utils.distributed import gather_rows, prefetch, start, sum_gradients, world
from utils.encoder import collate, embed_on_devices, full_length, tokenize_passages, tokenize_questions
from utils.estimate import dry_run
from utils.grad_cache import grad_cache_step
from utils.metrics import positive_ranks
from utils.plumbing.checkpoint import load_optimizer, make_optimizer
from utils.plumbing.config import UserError, at_least, friendly_errors, load_config, must_be_one_of, need_file
from utils.plumbing.files import folder_hash, weights_hash
from utils.plumbing.run import Run, need_start, plan
from utils.plumbing.weights import load_encoder

TOWERS = {"query_encoder": "question", "doc_encoder": "passage"}
INPUTS = ("question_tokens", "passage_tokens", "pooling", "token_types")


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def rotating_negatives(pool, k, seed, epoch):
    """
    Indexes of k of `pool` negatives: one permutation a question, read on where the last epoch stopped, so
    that all of the pool is seen before anything comes back (from: ANCE-Tele dense_dataset.py:53).
    """
    order = list(range(pool))
    random.Random(seed).shuffle(order)
    # differs: a pool of fewer than k is taken once; ANCE-Tele draws k with replacement from an unseeded
    # generator, and a passage that stands twice in the softmax counts twice
    return [order[(epoch * k + j) % pool] for j in range(min(k, pool))]


def draw_passages(example, item, epoch, cfg):
    """Line `item` of the training file -> [positive, negative, ...]; fewer negatives where it has fewer."""
    positives, negatives = example["positives"], example["negatives"]
    if cfg.rotate_negatives:
        first = (item + cfg.seed + epoch) % len(positives)
        picked = rotating_negatives(len(negatives), cfg.negatives, item + cfg.seed, epoch)
    else:  # from: DPR dpr/models/biencoder.py:184 shuffles the pool anew every epoch and takes the first ones
        rng = np.random.default_rng([cfg.seed, epoch, item, 1])
        first = rng.integers(len(positives)) if cfg.shuffle_positives else 0
        picked = rng.permutation(len(negatives))[: cfg.negatives]
    return [positives[first if cfg.shuffle_positives else 0]] + [negatives[i] for i in picked]


def passage_key(entry):
    """What makes two entries the same passage: the corpus id, or title and text of an inline passage."""
    return entry if isinstance(entry, str) else (entry.get("title", ""), entry["text"])


def make_batch(step, train, corpus, encoders, cfg):
    """
    The batch of a step as this device sees it. Passages lie interleaved, [positive, negatives] question by
    question, so the positive of question i is column i * (1 + negatives) whatever the number of devices.
    """
    rank, devices = world()
    epoch, offset = divmod(step, len(train) // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(train))
    picked = order[offset * cfg.batch_size : (offset + 1) * cfg.batch_size]
    width, entries, filler = 1 + cfg.negatives, [], set()
    for i in picked:  # of the global batch: every device must know which of all columns are duplicates
        drawn = draw_passages(train[i], int(i), epoch, cfg)
        filler |= {*range(len(entries) + len(drawn), len(entries) + width)}
        entries += drawn + drawn[:1] * (width - len(drawn))  # a stand-in, masked for every question

    # why: the same gold passage twice in a batch of four raises the lowest loss that can be reached from 0 to
    # 0.35, and pushes a right answer away.
    columns, duplicates = {}, set()
    for column, entry in enumerate(entries):
        columns.setdefault(passage_key(entry), []).append(column)
    for row, i in enumerate(picked if cfg.mask_duplicates else []):
        same = chain.from_iterable(columns.get(passage_key(entry), []) for entry in train[i]["positives"])
        duplicates |= {(row, column) for column in same if column != row * width and column not in filler}
    excluded = sorted(duplicates | {(row, column) for row in range(len(picked)) for column in filler})

    share = cfg.batch_size // devices
    mine = slice(rank * share, (rank + 1) * share)
    questions = tokenize_questions(encoders["query_encoder"], [train[i]["question"] for i in picked[mine]])
    passages = [passage_of(entry, corpus) for entry in entries[mine.start * width : mine.stop * width]]
    passages = tokenize_passages(encoders["doc_encoder"], [(p.title, p.text) for p in passages])
    question_chunks, question_places = in_chunks(questions, cfg.question_chunk)
    passage_chunks, passage_places = in_chunks(passages, cfg.passage_chunk)
    return {
        "question_chunks": question_chunks,
        "passage_chunks": passage_chunks,
        "question_places": question_places,
        "passage_places": passage_places,
        "positive_Q": torch.arange(cfg.batch_size) * width,
        "excluded": torch.tensor(excluded, dtype=torch.long).reshape(-1, 2).T,
        "duplicates": len(duplicates),
    }


def in_chunks(ids, size):
    """
    Id lists -> (chunks of `size` in order of length, the places that restore the given order). why: a chunk
    costs as much as its longest row, so rows of equal length together save the padding.
    """
    by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    chunks = [[ids[i] for i in by_length[k : k + size]] for k in range(0, len(ids), size)]
    return chunks, torch.from_numpy(np.argsort(by_length))


# ---------------------------------------------------------------- loss and gradient
def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    """
    (mean over questions of -log softmax_n(q . p_n) at the positive, paper Eq. 2; how many positives score
    highest). No temperature, as in the papers.

    q_QD, p_ND: vectors of the global batch. positive_Q: column of each question's positive. excluded: [2, E]
    pairs (question, column) taken out of the softmax.
    """
    scores_QN = q_QD @ p_ND.T
    if excluded is not None and excluded.numel():
        scores_QN = scores_QN.index_put(tuple(excluded), scores_QN.new_tensor(-math.inf))
    return F.cross_entropy(scores_QN, positive_Q), (scores_QN.argmax(1) == positive_Q).sum()


def add_gradient(batch, encoders, accelerator, cfg, step):
    """Add the global batch's gradient, times gradient_scale, to .grad; returns the global (loss, correct)."""
    towers, device = {kind: encoders[name] for name, kind in TOWERS.items()}, accelerator.device
    chunks = [(kind, ids) for kind in towers for ids in batch[f"{kind}_chunks"]]

    def encode(chunk):
        kind, ids = chunk
        with accelerator.autocast():
            return towers[kind](**collate(towers[kind], ids, full_length(towers[kind], kind)))

    def loss_of(vectors):
        n = len(batch["question_chunks"])
        q_BD = torch.cat(vectors[:n])[batch["question_places"].to(device)]
        p_PD = torch.cat(vectors[n:])[batch["passage_places"].to(device)]
        positive_Q, excluded = batch["positive_Q"].to(device), batch["excluded"].to(device)
        loss, correct = in_batch_loss(gather_rows(q_BD), gather_rows(p_PD), positive_Q, excluded)
        return loss * cfg.gradient_scale, loss.detach(), correct

    seed = (cfg.seed, step, accelerator.process_index)
    _, loss, correct = grad_cache_step(encode, chunks, loss_of, seed, accelerator.backward, cfg.grad_cache)
    sum_gradients(named_weights(encoders).values())
    return loss, correct


def named_weights(encoders):
    """Name -> parameter of both towers, each once: a shared encoder is one tower under two names."""
    named = chain.from_iterable(tower.named_parameters(prefix) for prefix, tower in encoders.items())
    return {name: p for p, name in {p: name for name, p in named}.items()}


# ---------------------------------------------------------------- optimizer
def learning_rate_factor(step, warmup, total, floor):
    """Linear rise from 0 over `warmup` steps, then fall, not under `floor` (DPR utils/model_utils.py:106)."""
    return step / warmup if step < warmup else max(floor, (total - step) / max(1, total - warmup))


# ---------------------------------------------------------------- evaluation
def dev_pool(dev, corpus, encoders, cfg):
    """Tokenise once: (ids of the questions, of all their distinct passages, place of each gold passage)."""
    places, entries = {}, []
    for example in dev:
        for entry in example["positives"][:1] + example["negatives"][: cfg.dev_negatives]:
            if places.setdefault(passage_key(entry), len(entries)) == len(entries):
                entries.append(entry)
    passages = [passage_of(entry, corpus) for entry in entries]
    return (
        tokenize_questions(encoders["query_encoder"], [example["question"] for example in dev]),
        tokenize_passages(encoders["doc_encoder"], [(p.title, p.text) for p in passages]),
        np.array([places[passage_key(example["positives"][0])] for example in dev]),
    )


def evaluate(pool, encoders, accelerator, cfg):
    """Average rank (1 is best) and MRR of the gold passages among all passages of the dev pool."""
    q_QD = embed_on_devices(encoders["query_encoder"], pool[0], cfg.eval_batch_size, "question", accelerator)
    p_ND = embed_on_devices(encoders["doc_encoder"], pool[1], cfg.eval_batch_size, "passage", accelerator)
    blocks = [slice(k, k + 512) for k in range(0, len(q_QD), 512)]
    ranks = [positive_ranks((q_QD[rows] @ p_ND.T).cpu().numpy(), pool[2][rows]) for rows in blocks]
    ranks_Q = np.concatenate(ranks)
    return {"average_rank": float(ranks_Q.mean()), "mrr": float((1 / ranks_Q).mean())}


# ---------------------------------------------------------------- main
def load_towers(starts, cfg, device):
    """{"query_encoder": ..., "doc_encoder": ...} from {name: path}; a shared one stands under both names."""
    inputs, encoders = {key: getattr(cfg, key) for key in INPUTS}, {}
    for name, role in TOWERS.items():
        if name == "doc_encoder" and cfg.shared_encoder:
            encoders[name] = encoders["query_encoder"]
        else:
            stored = inputs | {"role": "shared" if cfg.shared_encoder else role}
            encoder = load_encoder(starts[name], role, stored, cfg.dropout, cfg.layer_norm_epsilon)
            encoders[name] = encoder.to(device).train()
    return encoders


def main():
    cfg = load_config(__doc__, "config/train_dpr_nq.yaml")
    must_be_one_of(cfg, pooling=("cls", "mean"), token_types=("zeros", "segments", "zeros_sep"))
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"), tracker=("none", "wandb"))
    must_be_one_of(cfg, resume=("never", "exact", "changed"))
    at_least(cfg, 1, "batch_size", "question_chunk", "passage_chunk", "eval_batch_size")
    at_least(cfg, 1, "epochs", "save_every", "log_every")
    at_least(cfg, 4, "question_tokens", "passage_tokens")
    if cfg.batch_size == 1 and not cfg.negatives:
        raise UserError("batch_size 1 with negatives 0 has nothing to tell apart: the loss would be 0")
    need_file(cfg, "train", optional=("dev", "corpus"))
    need_start(cfg, "init")
    accelerator = start(cfg.mixed_precision)
    if cfg.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {cfg.batch_size} is not shared by {accelerator.num_processes} devices")
    corpus = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None
    content = {key: folder_hash(getattr(cfg, key)) for key in ("train", "dev")}
    content["init"] = weights_hash(cfg.init)
    run = Run(cfg, accelerator, content | {"corpus": corpus.sha256 if corpus else ""})
    train, train_note = read_training(cfg.train, corpus)
    dev, dev_note = [], "no dev set: the last checkpoint is the best"
    if cfg.dev:
        dev, dev_note = read_training(cfg.dev, corpus)
    per_epoch, total, last, warmup, late = plan(len(train), cfg)

    starts = {name: run.checkpoint / name if run.checkpoint else cfg.init for name in TOWERS}
    encoders = load_towers(starts, cfg, accelerator.device)
    optimizer = make_optimizer(named_weights(encoders).items(), cfg)
    if run.checkpoint:
        load_optimizer(run.checkpoint, optimizer)
    optimizer = accelerator.prepare(optimizer)  # for fp16's loss scaler; gradients are summed by add_gradient
    pool = dev_pool(dev, corpus, encoders, cfg) if dev else None
    weights = list(named_weights(encoders).values())
    size = sum(p.numel() for p in weights)

    if cfg.dry_run:
        small = type(cfg)(**vars(cfg) | {"batch_size": min(cfg.batch_size, 32 * accelerator.num_processes)})
        part = small.batch_size / cfg.batch_size

        def probe():
            add_gradient(make_batch(0, train, corpus, encoders, small), encoders, accelerator, small, 0)
            return part

        probe()  # fills .grad, which is no activation
        growth, towers = 1 if cfg.grad_cache else 1 / part, list(encoders.values())
        return dry_run("training", towers, probe, last, "steps", cfg.run_dir, 52 * size, 8 * size, growth)
    banner = (
        f"{size / 1e6:.1f} M parameters, {accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{accelerator.mixed_precision} | {cfg.batch_size} questions a step against "
        f"{cfg.batch_size * (1 + cfg.negatives) - 1} negatives each | {per_epoch} steps an epoch, "
        f"{len(train) % cfg.batch_size} questions left over; {last} in all | gradient x {cfg.gradient_scale}"
    )
    if not run.start(last, size, [train_note, dev_note, banner, *late]):
        return

    def batch_of(step):
        return make_batch(step, train, corpus, encoders, cfg)

    steps = range(run.first, last)
    for step, batch in zip(steps, prefetch(batch_of, steps), strict=True):  # the next is tokenised meanwhile
        began = time.time()
        if step == run.first:
            decode = encoders["query_encoder"].tokenizer.decode
            run.say(f"example question: {decode(batch['question_chunks'][0][0])}")
            run.say(f"example passage: {decode(batch['passage_chunks'][0][0])}")
        lr = cfg.learning_rate * learning_rate_factor(step, warmup, total, cfg.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            loss, correct = add_gradient(batch, encoders, accelerator, cfg, step)
        except torch.OutOfMemoryError:
            raise UserError("out of memory: --grad_cache true or smaller chunks give the same") from None
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm).item()
        run.refuse_non_finite(loss.item(), norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - began
        run.step(
            f"{cfg.batch_size / seconds:.1f} q/s",
            {"loss": loss.item(), "acc": correct.item() / cfg.batch_size, "lr": lr},
            {"grad_norm": norm, "duplicates_masked": batch["duplicates"], "seconds": seconds},
        )
        if pool and ((step + 1) % (cfg.eval_every or per_epoch) == 0 or step + 1 == last):
            run.dev(evaluate(pool, encoders, accelerator, cfg), by="average_rank", sign=-1)
        for encoder in encoders.values():
            encoder.inputs["pair"] = f"{run.fingerprint}-{step + 1}"  # these two towers belong together
        run.save(encoders, optimizer, evaluates=bool(pool))


if __name__ == "__main__":
    with friendly_errors():
        main()
