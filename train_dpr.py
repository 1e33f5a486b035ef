"""
Train a question encoder and a passage encoder with in-batch negatives (DPR, Karpukhin et al. 2020, Sec. 3).

A question and a passage score the inner product of their vectors. Each question comes with its positive
passage and with hard negatives. Its negatives are its own hard ones and all passages of the other questions
in the batch, their hard negatives too. The loss is -log of the positive's share in the softmax over these.

In:   a questions file (train, dev) and the corpus that its passage ids point into
Out:  run_dir/{query_encoder,doc_encoder}/ (best on dev), checkpoints/, log.txt, metrics.jsonl
Run:  accelerate launch train_dpr.py --config config/train_dpr_nq.yaml    (data: recipes/dpr_nq.sh)
      python train_dpr.py --config config/train_gcdpr_nq.yaml --mixed_precision no    (on a CPU)
Next: doc2embedding.py         Expect: results/demo (make demo); the papers' numbers in docs/replication.md

Four systems train with this file, and a config names only what its system changes. GC-DPR encodes the batch
in chunks (train_gcdpr_nq.yaml). RocketQA takes 1024 or 4096 questions a batch (train_dpr_rocketqa_nq.yaml).
ANCE-Tele walks through many mined negatives and stops early (train_dpr_ance_tele_nq.yaml). The last two train
several rounds (ANCE-Tele: episodes). Each round starts anew from `init`, with a new training file.

B questions, P = B * (1 + negatives) passages of this device · Q, N: those of all devices · b of Q · D hidden
item: the place of a question in `train` · entry: a passage, as a corpus id or inline
"""

import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from utils import encoder as encoding
from utils.data import items_of_step, passage_key, passage_of, read_training
from utils.distributed import gather_rows, own_share, sum_gradients
from utils.grad_cache import grad_cache_step
from utils.metrics import positive_ranks
from utils.plumbing.checks import notes_on_negatives, notes_on_unknown
from utils.plumbing.config import at_least, friendly_errors, load_config, need_file
from utils.plumbing.run import NO_DEV, Run
from utils.plumbing.weights import TOWERS, given_inputs, load_towers


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def rotating_negatives(pool, k, seed, epoch):
    """
    Return the indexes of k of `pool` negatives: each epoch reads on where the last one stopped.

    The order is one permutation a question. Pool 5, k 2: the epochs take places 0 1, then 2 3, then 4 0 of
    it, so all of the pool is seen before anything comes back (from: ANCE-Tele dense_dataset.py:53).
    """
    order = list(range(pool))
    random.Random(seed).shuffle(order)
    begin = epoch * k
    # differs: a pool of fewer than k is taken once. ANCE-Tele draws k with replacement from an unseeded
    # generator, and a passage that stands twice in the softmax counts twice.
    places = range(begin, begin + min(k, pool))
    return [order[place % pool] for place in places]


def draw_passages(example, item, epoch, cfg):
    """Return the passages of question `item`, as entries: the positive, then the negatives."""
    positives = example["positives"]
    negatives = example["negatives"]
    first = 0
    if cfg.rotate_negatives:  # ANCE-Tele
        seed = item + cfg.seed
        if cfg.shuffle_positives:
            first = (seed + epoch) % len(positives)
        picked = rotating_negatives(len(negatives), cfg.negatives, seed, epoch)
    else:
        # from: DPR dpr/models/biencoder.py:184 shuffles the pool anew every epoch and takes the first ones
        # differs: where a question has no hard negative DPR takes another negative; here it is padded
        # why the 1: numpy takes [a, b, 0] for [a, b], which orders the epoch (items_of_step)
        rng = np.random.default_rng([cfg.seed, epoch, item, 1])
        if cfg.shuffle_positives:
            first = rng.integers(len(positives))
        picked = rng.permutation(len(negatives))[: cfg.negatives]
    return [positives[first]] + [negatives[i] for i in picked]


def draw_batch(step, train, cfg):
    """
    Draw the global batch of a step: (its items, its passages as entries, the columns of padding).

    Passages lie interleaved, [positive, negatives] question by question, so the positive of question i is
    column i * (1 + negatives). A question with too few negatives is padded with its positive.
    """
    # the questions and their passages
    epoch, items = items_of_step(step, len(train), cfg)
    entries, padding = [], set()
    for item in items:
        drawn = draw_passages(train[item], item, epoch, cfg)
        while len(drawn) < 1 + cfg.negatives:
            padding.add(len(entries) + len(drawn))
            drawn.append(drawn[0])
        entries += drawn
    return items, entries, padding


def excluded_pairs(items, entries, padding, train, cfg):
    """
    Return (the (question, column) pairs that the softmax leaves out, how many of them are duplicates).

    Padding is no negative. A question's own positive is none either, even if another question brought it.
    """
    width = 1 + cfg.negatives
    pairs = set(itertools.product(range(len(items)), padding))

    # differs: all four originals keep these duplicates as negatives. why: a gold passage that stands twice in
    # a batch of four is pushed away from its two questions. Their loss is log 2 at best, the mean then 0.35
    columns = {}
    for column, entry in enumerate(entries):
        if cfg.mask_duplicates and column not in padding:
            columns.setdefault(passage_key(entry), []).append(column)
    duplicates = set()
    for row, item in enumerate(items):
        for positive in train[item]["positives"]:
            for column in columns.get(passage_key(positive), []):
                duplicates.add((row, column))
        duplicates.discard((row, row * width))  # its own label stays
    return sorted(pairs | duplicates), len(duplicates)


def make_batch(step, train, corpus, encoders, cfg):
    """Return the batch of a step as this device sees it: its share of the texts, all labels."""
    # every device draws the whole batch: it must know which of all columns are duplicates
    width = 1 + cfg.negatives
    items, entries, padding = draw_batch(step, train, cfg)
    pairs, duplicates = excluded_pairs(items, entries, padding, train, cfg)

    # the texts of this device
    questions = [train[item]["question"] for item in own_share(items)]
    passages = [passage_of(entry, corpus) for entry in own_share(entries)]

    # their token ids in chunks by length; places: where the vector of each row is found afterwards
    question_ids = encoding.tokenize_questions(encoders["query_encoder"], questions)
    passage_ids = encoding.tokenize_passages(encoders["doc_encoder"], passages)
    question_chunks, question_places = encoding.in_chunks(question_ids, cfg.question_chunk)
    passage_chunks, passage_places = encoding.in_chunks(passage_ids, cfg.passage_chunk)
    excluded = torch.tensor(pairs, dtype=torch.long)
    return {
        "question_chunks": question_chunks,
        "passage_chunks": passage_chunks,
        "question_places": question_places,
        "passage_places": passage_places,
        "positive_Q": torch.arange(cfg.batch_size) * width,
        "excluded": excluded.reshape(-1, 2).T,
        "duplicates": duplicates,
    }


# ---------------------------------------------------------------- loss and gradient
def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    """
    Return (the mean of -log softmax_n(q . p_n) at the positives, how many questions score highest there).

    The paper's Eq. 2, without a temperature. q_QD, p_ND: vectors of the global batch. positive_Q: the column
    of each question's positive. excluded: [2, E], pairs (question, column) taken out of the softmax.
    """
    scores_QN = q_QD @ p_ND.T
    positive_Q = torch.as_tensor(positive_Q, device=scores_QN.device)
    if excluded is not None and excluded.numel():
        scores_QN = scores_QN.index_put(tuple(excluded), scores_QN.new_tensor(-math.inf))
    loss = F.cross_entropy(scores_QN, positive_Q)
    correct = (scores_QN.argmax(1) == positive_Q).sum()
    return loss, correct


def add_gradient(batch, encoders, accelerator, cfg, step):
    """Add the global batch's gradient, times gradient_scale, to .grad; return the global (loss, correct)."""
    device = accelerator.device
    question_chunks = len(batch["question_chunks"])
    chunks = [("query_encoder", ids) for ids in batch["question_chunks"]]
    chunks += [("doc_encoder", ids) for ids in batch["passage_chunks"]]

    def encode(chunk):
        name, ids = chunk
        encoder = encoders[name]
        with accelerator.autocast():
            return encoder(**encoding.collate(encoder, ids))

    def loss_of(vectors):
        # put the rows back into the batch's order: row i of q belongs to question i
        q_BD = torch.cat(vectors[:question_chunks])
        p_PD = torch.cat(vectors[question_chunks:])
        q_BD = q_BD[batch["question_places"].to(device)]
        p_PD = p_PD[batch["passage_places"].to(device)]

        # every device takes the loss of the global batch
        q_QD = gather_rows(q_BD)
        p_ND = gather_rows(p_PD)
        positive_Q = batch["positive_Q"].to(device)
        excluded = batch["excluded"].to(device)
        loss, correct = in_batch_loss(q_QD, p_ND, positive_Q, excluded)
        # differs: the gradient of the whole batch, on any number of devices. DPR's was 1/8 of it (DDP's mean
        # over 8 GPUs). Adam ignores a factor, clipping does not: `gradient_scale` makes it clip as DPR did.
        return loss * cfg.gradient_scale, loss.detach(), correct

    # differs: dropout is a function of (seed, step, device, chunk), so a killed run resumes to the same bits
    # (on a CPU; a GPU's attention may add in another order)
    seed = (cfg.seed, step, accelerator.process_index)
    backward = accelerator.backward  # with fp16's loss scaler
    # plain DPR goes this way too: without the cache all graphs are kept, and it is one loss.backward()
    _, loss, correct = grad_cache_step(encode, chunks, loss_of, seed, backward, cfg.grad_cache)
    sum_gradients(torch.nn.ModuleDict(encoders).parameters())  # each weight of a shared encoder once
    return loss, correct


def learning_rate_factor(step, warmup, total, floor):
    """Rise linearly from 0 over `warmup` steps, then fall to `floor` (from: DPR utils/model_utils.py:106)."""
    if step < warmup:
        return step / warmup
    # differs: the fall begins at the peak; RocketQA's rate drops to 0.9 of it after the warm-up
    return max(floor, (total - step) / max(1, total - warmup))


def training_step(step, batch, encoders, optimizer, run, cfg):
    """Learn from one batch; return (numbers to show, numbers to write)."""
    # set the learning rate
    factor = learning_rate_factor(step, run.warmup, run.total, cfg.min_lr_ratio)
    lr = cfg.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = lr

    # forward and backward
    loss, correct = add_gradient(batch, encoders, run.accelerator, cfg, step)
    loss = loss.item()
    accuracy = correct.item() / cfg.batch_size

    # clip the gradient, and stop before a broken one changes the weights
    run.accelerator.unscale_gradients()
    norm = clip_grad_norm_(run.weights, cfg.max_grad_norm).item()
    run.refuse_non_finite(loss, norm, lr)

    # step the optimizer
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    shown = {"loss": loss, "acc": accuracy, "lr": lr}
    hidden = {"grad_norm": norm, "duplicates_masked": batch["duplicates"]}
    return shown, hidden


# ---------------------------------------------------------------- evaluation
def dev_pool(dev, corpus, encoders, cfg):
    """Tokenise once: (token ids of the questions, of all distinct passages, places of the gold passages)."""
    passages = {}  # passage key -> entry; a dict keeps the order, and each passage once
    gold_keys = []
    for example in dev:
        gold = example["positives"][0]
        gold_keys.append(passage_key(gold))
        for entry in [gold, *example["negatives"][: cfg.dev_negatives]]:
            passages.setdefault(passage_key(entry), entry)
    places = {key: place for place, key in enumerate(passages)}
    gold_Q = np.array([places[key] for key in gold_keys])

    questions = [example["question"] for example in dev]
    texts = [passage_of(entry, corpus) for entry in passages.values()]
    question_ids = encoding.tokenize_questions(encoders["query_encoder"], questions)
    passage_ids = encoding.tokenize_passages(encoders["doc_encoder"], texts)
    return question_ids, passage_ids, gold_Q


def evaluate(pool, encoders, accelerator, cfg):
    """Return the average rank (1 is best) and the MRR of the gold passages in the pool of all passages."""
    # differs: one pool for all devices, from the first epoch on; a rank begins at 1, and equal passages count
    # once. DPR takes the loss until epoch 30. Then its rank begins at 0, in a pool for each device, to which
    # it adds 30 more negatives of a question.
    question_ids, passage_ids, gold_Q = pool
    size = cfg.eval_batch_size
    q_QD = encoding.embed_on_devices(encoders["query_encoder"], question_ids, size, accelerator)
    p_ND = encoding.embed_on_devices(encoders["doc_encoder"], passage_ids, size, accelerator)
    ranks = []
    for start in range(0, len(q_QD), 512):  # some questions at a time, to bound the memory
        block = slice(start, start + 512)
        scores_bN = q_QD[block] @ p_ND.T
        ranks_b = positive_ranks(scores_bN.cpu().numpy(), gold_Q[block])
        ranks.append(ranks_b)
    ranks_Q = np.concatenate(ranks)
    reciprocal_Q = 1 / ranks_Q
    average_rank = float(ranks_Q.mean())
    mrr = float(reciprocal_Q.mean())
    return {"average_rank": average_rank, "mrr": mrr}


# ---------------------------------------------------------------- main
def main():
    # settings, checked before anything is loaded
    cfg = load_config(__doc__, "config/train_dpr_nq.yaml")
    given_inputs(cfg)  # called here for its UserError: a value that no encoder knows
    at_least(cfg, 4, "question_tokens", "passage_tokens")
    need_file(cfg, "train", optional=("dev", "corpus"))

    # where the key is 0: (rows in one forward pass on a CPU, tokens of a row, of which a GPU takes what fits)
    sizes = {
        "question_chunk": (64, cfg.question_tokens),
        "passage_chunk": (64, cfg.passage_tokens),
    }

    # data
    run = Run(cfg, files=("train", "dev"), weights=("init",), sizes=sizes)
    corpus = run.corpus
    train, train_note = read_training(cfg.train, corpus)
    dev, dev_note = NO_DEV
    if cfg.dev:
        dev, dev_note = read_training(cfg.dev, corpus)
    run.notes += [train_note, *notes_on_negatives(cfg, train), dev_note]

    # models
    sources = {name: run.source(name, cfg.init) for name in TOWERS}
    encoders = load_towers(sources, cfg, run.device)
    questions = [example["question"] for example in train]
    run.notes += notes_on_unknown(encoders["query_encoder"].tokenizer, questions)
    optimizer = run.optimizer(encoders)
    pool = dev_pool(dev, corpus, encoders, cfg) if dev else None

    def batch_of(step):
        return make_batch(step, train, corpus, encoders, cfg)

    # the loop: the next batch is drawn meanwhile; run.log counts the step; run.save acts only when it is due
    wrong_passages = cfg.batch_size * (1 + cfg.negatives) - 1
    summary = f"{cfg.batch_size} questions a step against {wrong_passages} negatives each"
    summary += f" | gradient x {cfg.gradient_scale}"
    for step, batch in run.steps(len(train), batch_of, summary):
        if step == run.first:
            decode = encoders["query_encoder"].tokenizer.decode
            run.say(f"shortest question: {decode(batch['question_chunks'][0][0])}")
            run.say(f"shortest passage: {decode(batch['passage_chunks'][0][0])}")
        shown, hidden = training_step(step, batch, encoders, optimizer, run, cfg)
        run.log(shown, hidden)
        evaluated = bool(dev) and run.time_to_evaluate()
        if evaluated:
            metrics = evaluate(pool, encoders, run.accelerator, cfg)
            run.dev(metrics, by="average_rank", sign=-1)  # -1: a smaller rank is better
        run.save(encoders, optimizer, evaluated)


if __name__ == "__main__":
    with friendly_errors():
        main()
