"""
Train a cross-encoder, question and passage in one model: RocketQA's teacher (Qu et al. 2021, Sec. 3.3).

In:   a questions file (train, dev) and the corpus that its passage ids point into; every positive is a pair
      of label 1, every negative one of label 0: mine_negatives.py --mode denoise writes it
Out:  run_dir/cross_encoder/ (best on dev), checkpoints/, log.txt, metrics.jsonl
Run:  accelerate launch train_cross_encoder.py --config config/train_cross_encoder_nq.yaml
      accelerate launch train_cross_encoder.py --config config/train_cross_encoder_marco.yaml
Next: rerank.py

A dual encoder meets a passage before it knows the question, so that 21 million of them can wait as vectors.
A cross-encoder reads both at once: better, and far too slow to search with. RocketQA therefore lets it judge
what a dual encoder has found, throw out the false negatives, and label questions that nobody has labelled.

Differs from the paper and its code: (1) `adversarial_epsilon` is in the code and not in the paper; 0 trains
as the paper says. (2) Its direction is the gradient of the global batch, so that it does not depend on the
number of devices; Paddle took each worker's own. (3) A dev file may choose the best checkpoint; RocketQA
takes the last. (4) torch's AdamW, whose epsilon is outside the bias correction; new labels are drawn from the
normal distribution, not a truncated one. (5) Dropout and order are functions of (seed, step), so a killed run
resumes to the same bits (on a CPU; a GPU's attention may add in another order). (6) MS MARCO's title "-",
which stands for none, is read here as in the dual encoder; RocketQA trains its cross-encoder with "" there.

B pairs in the global batch, b in a chunk of it · 2 labels · N pairs of the dev set · V words · D hidden
"""

import time
from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs
from utils.data import Corpus, passage_of, read_training
from utils.distributed import prefetch, start, sum_gradients, world
from utils.encoder import collate
from utils.estimate import dry_run
from utils.grad_cache import chunk_seed
from utils.plumbing.checkpoint import load_optimizer, make_optimizer
from utils.plumbing.config import UserError, at_least, friendly_errors, load_config, must_be_one_of, need_file
from utils.plumbing.files import folder_hash, weights_hash
from utils.plumbing.run import Run, need_start, plan


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def read_pairs(path, corpus):
    """(examples, their pairs [(question, passage entry, label)], a line that says what was left out)."""
    examples, note = read_training(path, corpus)
    if not any(example["negatives"] for example in examples):
        raise UserError(f"{path}: no question has any negatives, so label 1 would always be right; mine some")
    pairs = [
        (example["question"], entry, label)
        for example in examples
        for label, key in ((1, "positives"), (0, "negatives"))
        for entry in example[key]
    ]
    return examples, pairs, note


def tokenize(pairs, corpus, cross):
    return tokenize_pairs(cross, [(question, passage_of(entry, corpus)) for question, entry, _ in pairs])


def make_batch(step, pairs, corpus, cross, cfg):
    """This device's share of the batch of a step, as chunks (id lists, labels) of pairs of like length."""
    rank, devices = world()
    epoch, offset = divmod(step, len(pairs) // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(pairs))
    share = cfg.batch_size // devices
    first = offset * cfg.batch_size + rank * share
    mine = [pairs[i] for i in order[first : first + share]]
    ids = tokenize(mine, corpus, cross)
    # why: a chunk costs as much as its longest row
    by_length = sorted(range(share), key=lambda i: (len(ids[i]), i))
    parts = [by_length[k : k + cfg.chunk] for k in range(0, share, cfg.chunk)]
    return [([ids[i] for i in part], [mine[i][2] for i in part]) for part in parts]


# ---------------------------------------------------------------- loss and gradient
def chunk_loss(chunk, cross, autocast, batch_size):
    """
    The chunk's part of the mean over the global batch of -log softmax(logits)[label], and how many of its
    pairs are right. The parts of all chunks and devices add up to the loss, and so do their gradients.
    """
    ids, labels = chunk
    with autocast():
        logits_b2 = cross(**collate(cross, ids))
    labels_b = torch.tensor(labels, device=logits_b2.device)
    loss = F.cross_entropy(logits_b2, labels_b, reduction="sum") / batch_size
    return loss, (logits_b2.argmax(1) == labels_b).sum()


def adversarial_step(chunks, cross, accelerator, cfg):
    """
    Where the word embeddings E_VD are moved before the loss that is trained (fast gradient method, Miyato et
    al. 2017; from: RocketQA model/src/finetune/cross_encoder.py:109-126):

        g = d loss(E) / d E, without dropout         delta = epsilon * g / sqrt(sum of g^2 + 1e-8)

    It is the step of length epsilon that raises the loss most; a model that is still right there does not
    hang on single words. Touches no .grad.
    """
    weight_VD = cross.model.get_input_embeddings().weight
    # why: under fp16 this small gradient would vanish, since no loss scaler lifts it here
    autocast = nullcontext if accelerator.scaler else accelerator.autocast
    gradient_VD = torch.zeros_like(weight_VD)
    cross.eval()
    for chunk in chunks:
        loss, _ = chunk_loss(chunk, cross, autocast, cfg.batch_size)
        gradient_VD += torch.autograd.grad(loss, weight_VD)[0]
    cross.train()
    if world()[1] > 1:
        dist.all_reduce(gradient_VD)
    return cfg.adversarial_epsilon * gradient_VD / (gradient_VD.square().sum() + 1e-8).sqrt()


def add_gradient(chunks, cross, accelerator, cfg, step):
    """
    Add the gradient of the global batch to .grad; returns the global (loss, correct), with dropout, at the
    moved embeddings where there is an adversarial step.
    """
    weight_VD, totals = cross.model.get_input_embeddings().weight, torch.zeros(2, device=accelerator.device)
    if cfg.adversarial_epsilon:
        kept_VD, step_VD = weight_VD.detach().clone(), adversarial_step(chunks, cross, accelerator, cfg)
        with torch.no_grad():
            weight_VD += step_VD
    for i, chunk in enumerate(chunks):
        torch.manual_seed(chunk_seed((cfg.seed, step, accelerator.process_index), i))  # the dropout masks
        loss, correct = chunk_loss(chunk, cross, accelerator.autocast, cfg.batch_size)
        accelerator.backward(loss)
        totals += torch.stack([loss.detach(), correct])
    if cfg.adversarial_epsilon:
        with torch.no_grad():
            weight_VD.copy_(kept_VD)  # trap: subtracting the step again leaves rounding errors behind
    sum_gradients(cross.parameters())
    if world()[1] > 1:
        dist.all_reduce(totals)
    return totals


# ---------------------------------------------------------------- evaluation
def evaluate(examples, ids, cross, accelerator, cfg):
    """
    {"accuracy", "mrr"} on the dev set; ids: the id lists of its pairs. The groups are the same for any number
    of devices, so the numbers do not depend on how many there are.
    """
    (rank, devices), size = world(), cfg.eval_batch_size
    p_N, order = np.zeros(len(ids)), sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    for first in range(rank * size, len(ids), devices * size):
        group = order[first : first + size]
        p_N[group] = probabilities(cross, [ids[i] for i in group], size, accelerator.autocast)
    if devices > 1:
        everyones_N = torch.from_numpy(p_N).to(accelerator.device)
        dist.all_reduce(everyones_N)  # every pair is zero on all devices but one
        p_N = everyones_N.cpu().numpy()
    return dev_metrics(examples, p_N)


def dev_metrics(examples, p_N):
    """
    Accuracy of all pairs at P > 0.5, and the mean of 1 / rank of the best positive among the question's own
    passages, over the questions that have negatives too. p_N: P(relevant) of each pair, positives before
    negatives, question by question. A negative of equal probability stands above the positive, and so does a
    NaN.
    """
    ranks, right, first = [], 0, 0
    for example in examples:
        middle = first + len(example["positives"])
        last = middle + len(example["negatives"])
        positive, negative, first = p_N[first:middle], p_N[middle:last], last
        right += (positive > 0.5).sum() + (negative <= 0.5).sum()
        if len(negative):
            ranks.append(1 + (~(negative < positive.max())).sum())
    return {"accuracy": float(right / len(p_N)), "mrr": float(np.mean(1 / np.array(ranks)))}


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/train_cross_encoder_nq.yaml")
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"), tracker=("none", "wandb"))
    must_be_one_of(cfg, resume=("never", "exact", "changed"))
    at_least(cfg, 1, "batch_size", "chunk", "eval_batch_size", "epochs", "save_every", "log_every")
    at_least(cfg, 4, "pair_tokens")
    need_file(cfg, "train", optional=("dev", "corpus"))
    need_start(cfg, "init")
    accelerator = start(cfg.mixed_precision)
    if cfg.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {cfg.batch_size} is not shared by {accelerator.num_processes} devices")
    corpus = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None
    content = {key: folder_hash(getattr(cfg, key)) for key in ("train", "dev")}
    content["init"] = weights_hash(cfg.init)
    run = Run(cfg, accelerator, content | {"corpus": corpus.sha256 if corpus else ""})
    _, pairs, train_note = read_pairs(cfg.train, corpus)
    dev, dev_pairs, dev_note = [], [], "no dev set: the last checkpoint is the best"
    if cfg.dev:
        dev, dev_pairs, dev_note = read_pairs(cfg.dev, corpus)
    per_epoch, _, last, warmup, late = plan(len(pairs), cfg, "pairs")

    torch.manual_seed(cfg.seed)  # the new labels, the same on every device
    source = run.checkpoint / "cross_encoder" if run.checkpoint else cfg.init
    cross = load_cross_encoder(
        source, cfg.pair_tokens, cfg.dropout, not run.checkpoint, cfg.layer_norm_epsilon
    )
    cross.to(accelerator.device).train()
    optimizer = make_optimizer(cross.named_parameters(), cfg)
    if run.checkpoint:
        load_optimizer(run.checkpoint, optimizer)
    optimizer = accelerator.prepare(optimizer)  # for fp16's loss scaler; gradients are summed by add_gradient
    dev_ids = tokenize(dev_pairs, corpus, cross)
    weights = list(cross.parameters())
    size = sum(p.numel() for p in weights)

    if cfg.dry_run:
        few = min(cfg.batch_size, 2 * cfg.chunk * accelerator.num_processes)
        small = type(cfg)(**vars(cfg) | {"batch_size": few})

        def probe():
            add_gradient(make_batch(0, pairs, corpus, cross, small), cross, accelerator, small, 0)
            return few / cfg.batch_size

        probe()  # fills .grad, which is no activation
        return dry_run("training", [cross], probe, last, "steps", cfg.run_dir, 52 * size, 8 * size)
    relevant = sum(label for _, _, label in pairs)
    banner = (
        f"{size / 1e6:.1f} M parameters, {accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{accelerator.mixed_precision} | {len(pairs)} pairs, {relevant} of them relevant | {cfg.batch_size} "
        f"a step, {per_epoch} steps an epoch, {len(pairs) % cfg.batch_size} pairs left over; {last} in all | "
        f"adversarial step {cfg.adversarial_epsilon}"
    )
    if not run.start(last, size, [train_note, dev_note, banner, *late]):
        return

    def batch_of(step):
        return make_batch(step, pairs, corpus, cross, cfg)

    steps = range(run.first, last)
    for step, chunks in zip(steps, prefetch(batch_of, steps), strict=True):  # the next is tokenised meanwhile
        began = time.time()
        if step == run.first:
            ids, labels = chunks[0]
            run.say(f"example of label {labels[0]}: {cross.tokenizer.decode(ids[0])}")
        # from: RocketQA model/src/optimization.py:70: after the warm-up the rate is constant, no decay
        lr = cfg.learning_rate * (step / warmup if step < warmup else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            loss, correct = add_gradient(chunks, cross, accelerator, cfg, step).tolist()
        except torch.OutOfMemoryError:
            raise UserError("out of GPU memory: a smaller --chunk gives the same gradient") from None
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm).item()
        run.refuse_non_finite(loss, norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - began
        run.step(
            f"{cfg.batch_size / seconds:.1f} pairs/s",
            {"loss": loss, "acc": correct / cfg.batch_size, "lr": lr},
            {"grad_norm": norm, "seconds": seconds},
        )
        if dev and ((step + 1) % (cfg.eval_every or per_epoch) == 0 or step + 1 == last):
            run.dev(evaluate(dev, dev_ids, cross, accelerator, cfg), by="mrr", sign=1)
        cross.inputs["pair"] = f"{run.fingerprint}-{step + 1}"  # tells these weights from an older copy
        run.save({"cross_encoder": cross}, optimizer, evaluates=bool(dev))


if __name__ == "__main__":
    with friendly_errors():
        main()
