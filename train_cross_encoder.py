"""
Train a cross-encoder, question and passage in one model: RocketQA's teacher (Qu et al. 2021, Sec. 3.3).

It reads both at once: it is better than a dual encoder, and far too slow to search with. RocketQA lets it
throw out false negatives, and label questions that nobody has labelled.

In:   a questions file (train, dev) and its corpus; a positive is a pair of label 1, a negative one of label 0
Out:  run_dir/cross_encoder/ (best on dev), checkpoints/, log.txt, metrics.jsonl
Run:  accelerate launch train_cross_encoder.py --config config/train_cross_encoder_nq.yaml
      accelerate launch train_cross_encoder.py --config config/train_cross_encoder_marco.yaml
Next: rerank.py

B pairs in the global batch, b in a chunk of it · 2 labels · N pairs of the dev set · V words · D hidden
"""

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs
from utils.data import items_of_step, passage_of, read_training
from utils.distributed import chunk_seed, cut, own_share, share_out, sum_gradients, sum_over_devices
from utils.encoder import by_length, collate
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import UserError, at_least, friendly_errors, load_config, need_file
from utils.plumbing.run import NO_DEV, Run


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def read_pairs(path, corpus):
    """Read (examples, [(question, passage entry, label), ...], a log line): of a question positives first."""
    examples, note = read_training(path, corpus)
    if not any(example["negatives"] for example in examples):
        raise UserError(f"{path}: no question has any negatives, so label 1 would always be right; mine some")
    pairs = []
    for example in examples:
        question = example["question"]
        pairs += [(question, entry, 1) for entry in example["positives"]]
        pairs += [(question, entry, 0) for entry in example["negatives"]]
    return examples, pairs, note


def tokenize(pairs, corpus, cross):
    """Return the id lists of pairs."""
    # differs: RocketQA trains its cross-encoder with "" where MARCO's title is "-"; we keep it
    texts = [(question, passage_of(entry, corpus)) for question, entry, _ in pairs]
    return tokenize_pairs(cross, texts)


def make_batch(step, pairs, corpus, cross, cfg):
    """Return this device's share of the batch of a step: chunks (id lists, labels)."""
    _, items = items_of_step(step, len(pairs), cfg)
    picked = [pairs[item] for item in own_share(items)]

    # chunks of pairs of like length: a chunk costs as much as its longest row
    ids = tokenize(picked, corpus, cross)
    chunks = []
    for rows in cut(by_length(ids), cfg.chunk):
        chunk_ids = [ids[row] for row in rows]
        labels = [picked[row][2] for row in rows]
        chunks.append((chunk_ids, labels))
    return chunks


# ---------------------------------------------------------------- loss and gradient
def chunk_loss(chunk, cross, autocast, batch_size):
    """
    Return (the chunk's part of the loss, how many of its pairs are right). Over all chunks and devices the
    parts add up to the mean over the global batch of -log softmax(logits)[label].
    """
    ids, labels = chunk
    with autocast():
        logits_b2 = cross(**collate(cross, ids))
    labels_b = torch.tensor(labels, device=logits_b2.device)
    loss = F.cross_entropy(logits_b2, labels_b, reduction="sum") / batch_size
    correct = (logits_b2.argmax(1) == labels_b).sum()
    return loss, correct


def adversarial_step(chunks, cross, accelerator, cfg):
    """
    Return the step of length epsilon of the word embeddings E_VD that raises the loss most.

        g = d loss(E) / d E, without dropout         step = epsilon * g / sqrt(sum of g^2 + 1e-8)

    (Miyato et al. 2017; RocketQA model/src/finetune/cross_encoder.py:109-126). No .grad changes.
    """
    weight_VD = cross.model.get_input_embeddings().weight
    gradient_VD = torch.zeros_like(weight_VD)
    # why: under fp16 this small gradient would vanish, since no loss scaler lifts it here
    autocast = nullcontext if accelerator.scaler else accelerator.autocast

    # the gradient of the global batch, without dropout
    cross.eval()
    for chunk in chunks:
        loss, _ = chunk_loss(chunk, cross, autocast, cfg.batch_size)
        gradient_VD += torch.autograd.grad(loss, weight_VD)[0]
    cross.train()
    sum_over_devices(gradient_VD)

    # a step of length epsilon
    norm = (gradient_VD.square().sum() + 1e-8).sqrt()
    return cfg.adversarial_epsilon * gradient_VD / norm


def add_gradient(chunks, cross, accelerator, cfg, step):
    """Add the global batch's gradient to .grad; return the global (loss, correct) as one tensor."""
    # move the word embeddings. differs: this step is in RocketQA's code, not in its paper
    weight_VD = cross.model.get_input_embeddings().weight
    if cfg.adversarial_epsilon:
        kept_VD = weight_VD.detach().clone()
        step_VD = adversarial_step(chunks, cross, accelerator, cfg)
        with torch.no_grad():
            weight_VD += step_VD

    # forward and backward, chunk by chunk
    seed = (cfg.seed, step, accelerator.process_index)
    totals = torch.zeros(2, device=accelerator.device)
    for i, chunk in enumerate(chunks):
        # why: with dropout a function of this seed, a killed run resumes to the same bits (on a CPU)
        torch.manual_seed(chunk_seed(seed, i))
        loss, correct = chunk_loss(chunk, cross, accelerator.autocast, cfg.batch_size)
        accelerator.backward(loss)
        totals += torch.stack([loss.detach(), correct])

    # move the word embeddings back. trap: subtracting the step would leave rounding errors behind
    if cfg.adversarial_epsilon:
        with torch.no_grad():
            weight_VD.copy_(kept_VD)

    # sum over devices
    sum_gradients(cross.parameters())
    return sum_over_devices(totals)


def training_step(step, chunks, cross, optimizer, run, cfg):
    """Learn from one batch; return (numbers to show, numbers to write)."""
    # set the learning rate: it rises, then it is constant (from: RocketQA model/src/optimization.py:70)
    lr = cfg.learning_rate
    if step < run.warmup:
        lr *= step / run.warmup
    for group in optimizer.param_groups:
        group["lr"] = lr

    # forward and backward
    loss, correct = add_gradient(chunks, cross, run.accelerator, cfg, step).tolist()
    accuracy = correct / cfg.batch_size

    # clip the gradient, and stop before a broken one changes the weights
    run.accelerator.unscale_gradients()
    norm = clip_grad_norm_(run.weights, cfg.max_grad_norm).item()
    run.refuse_non_finite(loss, norm, lr)

    # step the optimizer
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "acc": accuracy, "lr": lr}, {"grad_norm": norm}


# ---------------------------------------------------------------- evaluation
def evaluate(examples, ids, cross, accelerator, cfg):
    """Return {"accuracy", "mrr"} on the dev set, the same for any number of devices; ids: of its pairs."""
    size = cfg.eval_batch_size

    def ids_of(group):
        return [ids[i] for i in group]

    def score(group_ids):
        return probabilities(cross, group_ids, size, accelerator.autocast)

    # each device scores every W-th group; then all pairs, in the order of the file
    groups = cut(by_length(ids), size)
    scores = share_out(groups, ids_of, score, "dev")
    p_N = np.array([scores[i] for i in range(len(ids))])
    return dev_metrics(examples, p_N)


def dev_metrics(examples, p_N):
    """
    Return the accuracy of all pairs at P > 0.5, and the MRR of each question's best positive. p_N: P of the
    pairs in the order of read_pairs. A negative of equal P, or a NaN, stands above the positive.
    """
    right, ranks = 0, []
    first = 0
    for example in examples:
        middle = first + len(example["positives"])
        last = middle + len(example["negatives"])
        positive = p_N[first:middle]
        negative = p_N[middle:last]
        right += (positive > 0.5).sum() + (negative <= 0.5).sum()
        if len(negative):  # a question without negatives has no rank
            below = negative < positive.max()
            ranks.append(1 + (~below).sum())
        first = last
    reciprocal = 1 / np.array(ranks)
    accuracy = right / len(p_N)
    return {"accuracy": float(accuracy), "mrr": float(reciprocal.mean())}


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/train_cross_encoder_nq.yaml")
    at_least(cfg, 4, "pair_tokens")
    need_file(cfg, "train", optional=("dev", "corpus"))

    # data
    sizes = {"chunk": (64, cfg.pair_tokens)}
    run = Run(cfg, ("train", "dev"), weights=("init",), sizes=sizes)
    corpus = run.corpus
    _, pairs, train_note = read_pairs(cfg.train, corpus)
    dev, dev_note = NO_DEV
    dev_pairs = []
    if cfg.dev:
        dev, dev_pairs, dev_note = read_pairs(cfg.dev, corpus)
    run.notes += [train_note, dev_note]

    # the model; its new head is drawn (differs: from a normal distribution, not a truncated one)
    torch.manual_seed(cfg.seed)
    source = run.source("cross_encoder", cfg.init)
    new_head = not run.checkpoint
    cross = load_cross_encoder(source, cfg.pair_tokens, cfg.dropout, new_head, cfg.layer_norm_epsilon)
    cross.to(run.device).train()
    run.notes += notes_on_unknown(cross.tokenizer, [question for question, _, _ in pairs])
    optimizer = run.optimizer({"cross_encoder": cross})
    dev_ids = tokenize(dev_pairs, corpus, cross)

    def batch_of(step):
        return make_batch(step, pairs, corpus, cross, cfg)

    # the loop
    relevant = sum(label for _, _, label in pairs)
    summary = f"{len(pairs)} pairs, {relevant} of them relevant, {cfg.batch_size} a step"
    summary += f" | adversarial step {cfg.adversarial_epsilon}"
    for step, chunks in run.steps(len(pairs), batch_of, summary, unit="pairs"):
        if step == run.first:
            ids, labels = chunks[0]
            run.say(f"example of label {labels[0]}: {cross.tokenizer.decode(ids[0])}")
        shown, hidden = training_step(step, chunks, cross, optimizer, run, cfg)
        run.log(shown, hidden)
        # differs: a dev set may choose the best checkpoint; RocketQA takes the last
        evaluated = bool(dev) and run.time_to_evaluate()
        if evaluated:
            metrics = evaluate(dev, dev_ids, cross, run.accelerator, cfg)
            run.dev(metrics, by="mrr", sign=1)
        run.save({"cross_encoder": cross}, optimizer, evaluated)


if __name__ == "__main__":
    with friendly_errors():
        main()
