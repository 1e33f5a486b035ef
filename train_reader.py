"""
Train DPR's extractive reader (Karpukhin et al. 2020, Sec. 6), which GC-DPR and RocketQA use as it is.

No span (tokens in a row) was ever labelled. A question is learned from one passage that holds its answer,
where every span that spells it counts as right, next to passages without it. To answer, the reader takes the
best span of the passage that it finds most relevant.

In:   question files with answers (train, dev), a ranking of each (test_dpr.py, rerank.py), and the corpus
Out:  run_dir/reader/ (best exact match on dev), checkpoints/, log.txt, metrics.jsonl
Run:  accelerate launch train_reader.py --config config/train_reader_nq.yaml
Next: answer.py, ask.py --reader

N questions · M passages a question · A mentions of the answers · L tokens · b rows of one forward pass
"""

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from utils import reader as reading
from utils.data import items_of_step, read_ranking
from utils.distributed import chunk_seed, cut, own_share, sum_gradients, sum_over_devices
from utils.encoder import collate
from utils.metrics import answer_scores
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_value,
)
from utils.plumbing.run import NO_DEV, Run
from utils.reader import best_spans as best_spans  # a public name of this script too

MAX_SPANS = 10  # mentions in a positive (from: DPR dpr/models/reader.py:114-274, max_n_answers)


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def draw_passages(example, item, epoch, corpus, reader, cfg):
    """Return {"ids": sequences of a question, the positive first, "spans": the mentions in the positive}."""
    # one positive, and as many negatives as fill up the softmax
    rng = np.random.default_rng([cfg.seed, epoch, item, 1])
    count = cfg.passages_per_question - 1
    negatives = rng.permutation(example["negatives"])[:count]
    positive = rng.choice(example["positives"])
    passages = [corpus[row] for row in (positive, *negatives)]

    # their token ids, and the mentions of the answers
    sequences = reading.tokenize_rows(reader, example["question"], passages)
    answers = reading.word_pieces(reader, example["answers"])
    ids, first = sequences[0]
    spans = reading.find_spans(ids, first, answers)
    all_ids = [ids for ids, _ in sequences]
    return {"ids": all_ids, "spans": spans[:MAX_SPANS]}


def make_batch(step, train, corpus, reader, cfg):
    """Return this device's share of the batch of a step, as chunks of questions."""
    epoch, items = items_of_step(step, len(train), cfg)
    mine = own_share(items)
    questions = []
    for item in mine:
        example = train[item]
        question = draw_passages(example, item, epoch, corpus, reader, cfg)
        questions.append(question)
    return cut(questions, cfg.question_chunk)


# ---------------------------------------------------------------- loss and gradient
def reader_loss(start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    """
    Return (loss summed over questions, how many positives have the highest relevance). Of a question:

        - log sum_a  P_start(begin_a) P_end(end_a)  -  log P(passage 0 | all M)

    (Eq. 3-5; DPR dpr/models/reader.py:72-111, 178-182). start_NL, end_NL: logits of the positive passage.
    relevance_NM: its logit first. A logit of -inf takes no part. begin_NA, end_NA: tokens of each mention,
    where spans_NA is true. Without a mention only the relevance counts.
    """
    # the log probability of every mention
    log_start_NA = start_NL.log_softmax(1).gather(1, begin_NA)
    log_end_NA = end_NL.log_softmax(1).gather(1, end_NA)
    log_NA = log_start_NA + log_end_NA
    spans_NA = spans_NA.bool()
    log_NA = log_NA.masked_fill(~spans_NA, -torch.inf)
    has_span_N = spans_NA.any(1)
    log_nA = log_NA[has_span_N]  # trap: a row of -inf has a NaN gradient
    span_loss = -log_nA.logsumexp(1).sum()

    # the log probability of the positive passage
    log_NM = relevance_NM.log_softmax(1)
    relevance_loss = -log_NM[:, 0].sum()
    correct = (relevance_NM.argmax(1) == 0).sum()
    return span_loss + relevance_loss, correct


def logits_of(questions, reader, autocast, cfg):
    """Return (start_NL, end_NL, relevance_NM) of reader_loss for drawn questions, read in passage_chunks."""
    # differs: padding takes no part in the softmaxes over tokens and over passages; in DPR it does
    device = next(reader.parameters()).device
    N = len(questions)
    M = max(len(question["ids"]) for question in questions)
    L = max(len(question["ids"][0]) for question in questions)
    relevance_NM = torch.full((N, M), -torch.inf, device=device)
    start_NL = torch.full((N, L), -torch.inf, device=device)
    end_NL = start_NL.clone()

    # all rows, those of like length together
    rows = []
    for n, question in enumerate(questions):
        for m, ids in enumerate(question["ids"]):
            rows.append((n, m, ids))
    rows.sort(key=lambda row: len(row[2]))

    # read them, and put the logits where they belong. trap: all activations stay until the softmaxes
    for chunk in cut(rows, cfg.passage_chunk):
        places_n, places_m, ids = zip(*chunk, strict=True)
        with autocast():
            start_bL, end_bL, relevance_b = reader(**collate(reader, ids))
        relevance_NM[places_n, places_m] = relevance_b
        for i, (n, m, ids) in enumerate(chunk):
            if m == 0:  # the positive
                size = len(ids)
                start_NL[n, :size] = start_bL[i, :size]
                end_NL[n, :size] = end_bL[i, :size]
    return start_NL, end_NL, relevance_NM


def span_tensors(questions, device):
    """Return (begin_NA, end_NA, spans_NA) of reader_loss; a question with fewer mentions is padded."""
    most = max(len(question["spans"]) for question in questions)
    spans = []
    is_span = []
    for question in questions:
        size = len(question["spans"])
        padding = most - size
        spans.append(question["spans"] + [(0, 0)] * padding)
        is_span.append([True] * size + [False] * padding)
    spans_NA2 = torch.tensor(spans, device=device)
    begin_NA, end_NA = spans_NA2.unbind(2)
    return begin_NA, end_NA, torch.tensor(is_span, device=device)


def add_gradient(chunks, reader, accelerator, cfg, step):
    """Add the gradient of the global batch's mean loss to .grad; return the global (loss, correct)."""
    device = accelerator.device
    totals = torch.zeros(2, device=device)
    for i, questions in enumerate(chunks):
        # why: with dropout a function of this seed, a killed run resumes to the same bits (on a CPU)
        seed = (cfg.seed, step, accelerator.process_index)
        torch.manual_seed(chunk_seed(seed, i))
        logits = logits_of(questions, reader, accelerator.autocast, cfg)
        spans = span_tensors(questions, device)
        loss, correct = reader_loss(*logits, *spans)
        # differs: the mean of 16. DPR's gradient is twice as large (a sum of 2, averaged over 8 GPUs), so its
        # clipping at 1.0 is our max_grad_norm 0.5
        loss = loss / cfg.batch_size
        accelerator.backward(loss)  # with fp16's loss scaler
        totals += torch.stack([loss.detach(), correct])

    # sum over the devices
    sum_gradients(reader.parameters())
    return sum_over_devices(totals)


def training_step(step, chunks, reader, optimizer, run, cfg):
    """Learn from one batch; return (numbers to show, numbers to write)."""
    # set the learning rate
    # constant after the warm-up. why: DPR plans 100,000 epochs and needs about 17, so its rate hardly falls
    lr = cfg.learning_rate
    if step < run.warmup:
        lr *= step / run.warmup
    for group in optimizer.param_groups:
        group["lr"] = lr

    # forward and backward
    totals = add_gradient(chunks, reader, run.accelerator, cfg, step)
    loss, correct = totals.tolist()

    # clip the gradient, and stop before a broken one changes the weights
    run.accelerator.unscale_gradients()
    norm = clip_grad_norm_(run.weights, cfg.max_grad_norm).item()
    run.refuse_non_finite(loss, norm, lr)

    # step the optimizer
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    shown = {"loss": loss, "acc": correct / cfg.batch_size, "lr": lr}
    return shown, {"grad_norm": norm}


# ---------------------------------------------------------------- evaluation
def evaluate(dev, corpus, reader, accelerator, cfg):
    """Return {"em", "f1"} of the answers to the dev questions from their first test_depth passages."""
    # differs: DPR calls a checkpoint the best if its exact match is below 0, so none is, and keeps them all;
    # it looks at the questions of the first device alone
    top_docs = [cfg.test_depth]
    size = cfg.eval_batch_size
    answers = reading.answer_all(reader, dev, corpus, top_docs, size, accelerator)
    scores = answer_scores(dev, answers, top_docs)
    em = np.mean(scores[f"EM@{cfg.test_depth}"])
    f1 = np.mean(scores[f"F1@{cfg.test_depth}"])
    return {"em": float(em), "f1": float(f1)}


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/train_reader_nq.yaml")
    must_be_one_of(cfg, token_types=("zeros", "segments"))
    at_least(cfg, 1, "train_depth", "test_depth", "max_answer_length")
    at_least(cfg, 2, "passages_per_question")
    at_least(cfg, 8, "reader_tokens")
    need_file(cfg, "train", "train_run", "corpus", optional=("dev", "dev_run", "gold"))
    if cfg.dev:
        need_value(cfg, "dev_run")

    # data
    files = ("train", "train_run", "dev", "dev_run", "gold")
    tokens = cfg.passages_per_question * cfg.reader_tokens
    sizes = {"question_chunk": (1, tokens), "passage_chunk": (24, cfg.reader_tokens)}
    run = Run(cfg, files, weights=("init",), sizes=sizes)
    corpus = run.corpus
    examples, train_note = read_ranking(cfg.train, cfg.train_run, corpus, cfg.train_depth)
    dev, dev_note = NO_DEV
    if cfg.dev:
        dev, dev_note = read_ranking(cfg.dev, cfg.dev_run, corpus, cfg.test_depth)
    gold = {}
    if cfg.gold:
        gold = reading.read_gold(cfg.gold)

    # model
    torch.manual_seed(cfg.seed)  # the new outputs, the same on every device
    how = {"reader_tokens": cfg.reader_tokens, "token_types": cfg.token_types}
    source = run.source("reader", cfg.init)
    reader = reading.load_reader(source, how, cfg.dropout, new_head=not run.checkpoint)
    reader.max_answer_length = cfg.max_answer_length
    reader.to(run.device).train()
    optimizer = run.optimizer({"reader": reader})

    # what it learns from: the passages in which its tokens spell an answer
    train, rows_note = reading.find_training_rows(cfg.train, examples, corpus, reader, gold)
    run.notes += [train_note, rows_note, dev_note]
    run.notes += notes_on_unknown(reader.tokenizer, [example["question"] for example in train])
    if not any(len(example["negatives"]) for example in train):
        fault = "every passage holds an answer, so none is wrong and relevance cannot be learned"
        raise UserError(f"{cfg.train}: {fault}; raise train_depth, or give a longer --train_run")

    def batch_of(step):
        return make_batch(step, train, corpus, reader, cfg)

    # the loop
    summary = f"{cfg.batch_size} questions a step, {cfg.passages_per_question} passages each"
    for step, chunks in run.steps(len(train), batch_of, summary):
        if step == run.first:
            example = chunks[0][0]
            ids = example["ids"][0]
            decode = reader.tokenizer.decode
            spans = [ids[begin : end + 1] for begin, end in example["spans"]]
            answers = " | ".join(map(decode, spans))
            run.say(f"example passage: {decode(ids)}")
            run.say(f"example answers: {answers}")
        shown, hidden = training_step(step, chunks, reader, optimizer, run, cfg)
        run.log(shown, hidden)
        evaluated = bool(dev) and run.time_to_evaluate()
        if evaluated:
            metrics = evaluate(dev, corpus, reader, run.accelerator, cfg)
            run.dev(metrics, by="em", sign=1)
        run.save({"reader": reader}, optimizer, evaluated)


if __name__ == "__main__":
    with friendly_errors():
        main()
