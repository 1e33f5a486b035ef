"""
Train DPR's extractive reader, and answer questions with it: exact match (Karpukhin et al. 2020, Sec. 6).

In:   question files with answers, a .run each (test_dpr.py, rerank.py) and the corpus; or DPR's result json
Out:  training: run_dir/reader/ (best dev EM), checkpoints/, log.txt, metrics.jsonl
      prediction: `out` (DPR's json), beside it .answers.json ({qid: answer}) and .metrics.json
Run:  accelerate launch train_reader.py --config config/train_reader_nq.yaml
      accelerate launch train_reader.py --train "" --init runs/reader_nq/reader --test data/nq/test.jsonl
      --test_run runs/dpr_nq/test/test.run --corpus data/nq/corpus.tsv --out runs/reader_nq/test.json
Next: ask.py --reader

A question is learned from one passage with the answer, in which every mention of it is right, beside others
without: no span was ever labelled. To answer, take the passage of highest relevance among the first n, then
the best span in it. GC-DPR and RocketQA use this reader as it is.

Differs from DPR: (1) no file is prepared: the answers are found in the passages at the start, and a report
says which questions are dropped and why. (2) Padding takes no part in the softmax over passages nor in those
over tokens; `padding_takes_part` restores that. (3) The loss is the mean over the batch; DPR sums over the
questions of a GPU and takes the mean over GPUs: with its 16 on 8 GPUs, twice ours, so its clipping at 1.0 is
our max_grad_norm 0.5. (4) The best checkpoint is that of the highest dev EM, over all devices; DPR compares
the wrong way round, on the first device's share. (5) A predicted text is cut out of the passage, not decoded.
(6) A positive passage has an answer before the cut; DPR redraws another where the drawn one has not.
(7) Order, negatives and dropout are functions of (seed, step), so a killed run resumes to the same bits (on a
CPU; a GPU's attention may add in another order). (8) torch's AdamW, whose epsilon is outside the bias
correction.

N questions · M passages a question · A answer spans · L tokens · b rows of one forward pass
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from utils.data import Corpus
from utils.distributed import gather_items, prefetch, start, sum_gradients, world
from utils.encoder import collate
from utils.estimate import dry_run
from utils.grad_cache import chunk_seed
from utils.plumbing.checkpoint import load_optimizer, make_optimizer
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
)
from utils.plumbing.files import folder_hash, weights_hash
from utils.plumbing.run import Run, need_start, plan
from utils.predictions import answer_scores, need_predictions_out, write_predictions
from utils.reader import load_reader, predict
from utils.reader_data import (
    find_spans,
    find_training_rows,
    read_gold,
    read_ranking,
    tokenize_rows,
    word_pieces,
)

INPUTS = ("reader_tokens", "token_types")
MAX_SPANS = 10  # mentions of the answers in a positive [DPR dpr/models/reader.py:114-274, max_n_answers]
BLOCK = 16  # questions that are answered together, so that passages of like length meet


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def draw_passages(example, item, epoch, corpus, reader, cfg):
    """One question as {"ids": [positive, negatives...], "spans": [(begin, end), ...] in the positive}."""
    rng = np.random.default_rng([cfg.seed, epoch, item, 1])
    negatives = rng.permutation(example["negatives"])[: cfg.passages_per_question - 1]
    passages = [corpus[row] for row in [rng.choice(example["positives"]), *negatives]]
    length = reader.inputs["reader_tokens"]
    rows = tokenize_rows(reader.tokenizer, example["question"], passages, length)
    spans = find_spans(*rows[0], word_pieces(reader.tokenizer, example["answers"]))
    return {"ids": [ids for ids, _ in rows], "spans": spans[:MAX_SPANS]}


def make_batch(step, train, corpus, reader, cfg):
    """This device's share of the batch of a step, as chunks of questions."""
    rank, devices = world()
    epoch, offset = divmod(step, len(train) // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(train))
    share = cfg.batch_size // devices
    first = offset * cfg.batch_size + rank * share
    drawn = [
        draw_passages(train[i], int(i), epoch, corpus, reader, cfg) for i in order[first : first + share]
    ]
    return [drawn[k : k + cfg.question_chunk] for k in range(0, share, cfg.question_chunk)]


# ---------------------------------------------------------------- loss and gradient
def reader_loss(start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    """
    (loss summed over questions, how many positives have the highest relevance). Of a question:

        - log sum_a  P_start(begin_a) P_end(end_a)  -  log P(passage 0 | all M)

    with softmaxes over the tokens of the positive and over the passages (paper Eq. 3-5; DPR
    dpr/models/reader.py:72-111, 178-182).

    start_NL, end_NL: logits of the positive passage; relevance_NM: its logit first; -inf takes no part.
    begin_NA, end_NA: tokens of each mention, where spans_NA is true. Without one only relevance counts.
    """
    log_NA = start_NL.log_softmax(1).gather(1, begin_NA) + end_NL.log_softmax(1).gather(1, end_NA)
    known_N = spans_NA.any(1)
    log_NA = log_NA.masked_fill(~spans_NA, -torch.inf)[known_N]  # trap: a row of -inf has a NaN gradient
    loss = -log_NA.logsumexp(1).sum() - relevance_NM.log_softmax(1)[:, 0].sum()
    return loss, (relevance_NM.argmax(1) == 0).sum()


def logits_of(questions, reader, autocast, cfg):
    """
    The (start_NL, end_NL, relevance_NM) of reader_loss for drawn questions. Rows are read sorted by length,
    passage_chunk at a time; all activations stay, since a question's passages meet in its softmax.
    """
    full = reader.inputs["reader_tokens"] if cfg.padding_takes_part else 0
    width = cfg.passages_per_question if full else max(len(question["ids"]) for question in questions)
    rows = [(n, m, ids) for n, question in enumerate(questions) for m, ids in enumerate(question["ids"])]
    if full:  # passages that are not there, as sequences of padding
        rows += [(n, m, []) for n, q in enumerate(questions) for m in range(len(q["ids"]), width)]
    rows.sort(key=lambda row: len(row[2]))
    longest, device = (
        full or max(len(question["ids"][0]) for question in questions),
        next(reader.parameters()).device,
    )
    start_NL, end_NL = (torch.full((len(questions), longest), -torch.inf, device=device) for _ in range(2))
    relevance_NM = torch.full((len(questions), width), -torch.inf, device=device)
    for k in range(0, len(rows), cfg.passage_chunk):
        part = rows[k : k + cfg.passage_chunk]
        with autocast():
            start_bL, end_bL, relevance_b = reader(**collate(reader, [ids for *_, ids in part], full))
        relevance_NM[[n for n, _, _ in part], [m for _, m, _ in part]] = relevance_b
        for i, (n, m, ids) in enumerate(part):
            if m == 0:
                size = full or len(ids)
                start_NL[n, :size], end_NL[n, :size] = start_bL[i, :size], end_bL[i, :size]
    return start_NL, end_NL, relevance_NM


def add_gradient(chunks, reader, accelerator, cfg, step):
    """Add the gradient of the global batch's mean loss to .grad; returns the global (loss, correct)."""
    totals, device = torch.zeros(2, device=accelerator.device), accelerator.device
    for i, questions in enumerate(chunks):
        torch.manual_seed(chunk_seed((cfg.seed, step, accelerator.process_index), i))  # the dropout masks
        most = max(len(question["spans"]) for question in questions)
        spans = [q["spans"] + [(0, 0)] * (most - len(q["spans"])) for q in questions]
        spans_NA = torch.tensor(
            [[a < len(q["spans"]) for a in range(most)] for q in questions], device=device
        )
        begin_NA, end_NA = torch.tensor(spans, device=device).unbind(2)
        logits = logits_of(questions, reader, accelerator.autocast, cfg)
        loss, correct = reader_loss(*logits, begin_NA, end_NA, spans_NA)
        loss = loss / cfg.batch_size
        accelerator.backward(loss)
        totals += torch.stack([loss.detach(), correct])
    sum_gradients(reader.parameters())
    if world()[1] > 1:
        dist.all_reduce(totals)
    return totals


# ---------------------------------------------------------------- evaluation
def answer_all(examples, corpus, reader, accelerator, cfg, top_docs):
    """What utils.reader.predict says of every example, on every device, each having answered its share."""
    rank, devices = world()
    blocks = [range(k, min(k + BLOCK, len(examples))) for k in range(0, len(examples), BLOCK)]
    mine, answers = blocks[rank::devices], {}

    def tokenized(block):
        passages = [[corpus[row] for row in examples[i]["rows"].tolist()] for i in block]
        length = reader.inputs["reader_tokens"]
        pairs = zip((examples[i]["question"] for i in block), passages, strict=True)
        return passages, [tokenize_rows(reader.tokenizer, *pair, length) for pair in pairs]

    bar = tqdm(total=sum(map(len, mine)), desc="answers", delay=5, leave=False, disable=None)
    with bar:
        for block, (passages, rows) in zip(mine, prefetch(tokenized, mine), strict=True):
            sizes = cfg.max_answer_length, cfg.eval_batch_size
            found = predict(reader, passages, rows, top_docs, *sizes, accelerator.autocast)
            answers |= zip(block, found, strict=True)
            bar.update(len(block))
    answers = gather_items(answers)
    return [answers[i] for i in range(len(examples))]


def evaluate(dev, corpus, reader, accelerator, cfg):
    """{"em", "f1"} of the answers from the first test_depth passages."""
    top_docs = [cfg.test_depth]
    values = answer_scores(dev, answer_all(dev, corpus, reader, accelerator, cfg, top_docs), top_docs)
    return {name.partition("@")[0].lower(): float(np.mean(value)) for name, value in values.items()}


# ---------------------------------------------------------------- predict
def answer_file(cfg, accelerator):
    """Answer the test questions: two prediction files and a table of EM and F1."""
    corpus = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None
    examples, corpus, note = read_ranking(cfg.test, cfg.test_run, corpus, cfg.test_depth)
    # why: a `.cp` does not say how its inputs are built; before May 2021 DPR had zeros, then segments
    how = {key: getattr(cfg, key) for key in INPUTS} if cfg.init.endswith(".cp") else {}
    reader = load_reader(cfg.init, how).to(accelerator.device)
    top_docs = sorted({n for n in cfg.eval_top_docs if 0 < n < cfg.test_depth} | {cfg.test_depth})
    if cfg.dry_run:

        def probe():
            answer_all(examples[:4], corpus, reader, accelerator, cfg, top_docs)
            return len(examples[:4])

        disk = len(examples) * len(top_docs) * 1000
        out = Path(cfg.out).parent
        return dry_run("answering", [reader], probe, len(examples), "questions", out, disk)
    began = time.time()
    answers = answer_all(examples, corpus, reader, accelerator, cfg, top_docs)
    seconds = time.time() - began
    if not accelerator.is_main_process:
        return
    print(f"{note}\n{len(examples) / seconds:.1f} questions/s of up to {cfg.test_depth} passages")
    write_predictions(cfg.out, examples, answers, top_docs)


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/train_reader_nq.yaml")
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"), tracker=("none", "wandb"))
    must_be_one_of(cfg, resume=("never", "exact", "changed"), token_types=("zeros", "segments"))
    at_least(cfg, 1, "train_depth", "test_depth", "max_answer_length", "eval_batch_size", "batch_size")
    at_least(cfg, 1, "question_chunk", "passage_chunk", "epochs", "save_every", "log_every")
    at_least(cfg, 2, "passages_per_question")
    at_least(cfg, 8, "reader_tokens")
    if bool(cfg.train) == bool(cfg.test):
        raise UserError('give either train, or test with --train "" and the reader as init')
    inputs = ("test", "test_run") if cfg.test else ("train", "train_run", "dev", "dev_run", "gold")
    need_file(cfg, optional=(*inputs, "corpus"))
    if cfg.test:
        need_predictions_out(cfg, *inputs, "corpus")
        need_model(cfg, "init")
    else:
        need_start(cfg, "init")
    accelerator = start(cfg.mixed_precision)
    if cfg.test:
        return answer_file(cfg, accelerator)
    if cfg.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {cfg.batch_size} is not shared by {accelerator.num_processes} devices")
    corpus = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None
    content = {key: folder_hash(getattr(cfg, key)) for key in inputs}
    content["init"] = weights_hash(cfg.init)
    run = Run(cfg, accelerator, content | {"corpus": corpus.sha256 if corpus else ""})
    torch.manual_seed(cfg.seed)  # the new outputs, the same on every device
    source = run.checkpoint / "reader" if run.checkpoint else cfg.init
    how = {key: getattr(cfg, key) for key in INPUTS}
    reader = load_reader(source, how, cfg.dropout, new_head=not run.checkpoint)
    reader.to(accelerator.device).train()
    gold = read_gold(cfg.gold) if cfg.gold else {}
    found, train_corpus, depth_note = read_ranking(
        cfg.train, cfg.train_run, corpus, cfg.train_depth, ("answers",)
    )
    train, train_note = find_training_rows(
        cfg.train, found, train_corpus, reader.tokenizer, gold, cfg, world(), gather_items
    )
    dev, dev_corpus, dev_note = [], None, "no dev set: the last checkpoint is the best"
    if cfg.dev:
        dev, dev_corpus, dev_note = read_ranking(cfg.dev, cfg.dev_run, corpus, cfg.test_depth, ("answers",))
    per_epoch, _, last, warmup, late = plan(len(train), cfg)
    optimizer = make_optimizer(reader.named_parameters(), cfg)
    if run.checkpoint:
        load_optimizer(run.checkpoint, optimizer)
    optimizer = accelerator.prepare(optimizer)  # for fp16's loss scaler; gradients are summed by add_gradient
    weights = list(reader.parameters())
    size = sum(p.numel() for p in weights)

    if cfg.dry_run:
        few = min(cfg.batch_size, 2 * cfg.question_chunk * accelerator.num_processes)
        small = type(cfg)(**vars(cfg) | {"batch_size": few})

        def probe():
            batch = make_batch(0, train, train_corpus, reader, small)
            add_gradient(batch, reader, accelerator, small, 0)
            return few / cfg.batch_size

        probe()  # fills .grad, which is no activation
        return dry_run("training", [reader], probe, last, "steps", cfg.run_dir, 52 * size, 8 * size)
    banner = (
        f"{size / 1e6:.1f} M parameters, {accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{accelerator.mixed_precision} | {cfg.batch_size} questions a step, {cfg.passages_per_question} "
        f"passages each | {per_epoch} steps an epoch, {len(train) % cfg.batch_size} questions left over; "
        f"{last} in all"
    )
    if not run.start(last, size, [depth_note, train_note, dev_note, banner, *late]):
        return

    def batch_of(step):
        return make_batch(step, train, train_corpus, reader, cfg)

    steps = range(run.first, last)
    for step, chunks in zip(steps, prefetch(batch_of, steps), strict=True):  # the next is tokenised meanwhile
        began = time.time()
        if step == run.first:
            ids, spans = chunks[0][0]["ids"][0], chunks[0][0]["spans"]
            decode = reader.tokenizer.decode
            run.say(f"example passage: {decode(ids)}")
            run.say(f"example answers: {' | '.join(decode(ids[a : b + 1]) for a, b in spans)}")
        # from: DPR trains with a rate that hardly falls (100,000 epochs are planned, about 17 needed)
        lr = cfg.learning_rate * (step / warmup if step < warmup else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            loss, correct = add_gradient(chunks, reader, accelerator, cfg, step).tolist()
        except torch.OutOfMemoryError:
            raise UserError(
                "out of GPU memory: lower --question_chunk if above 1 (same gradient, other dropout "
                "masks), then --passages_per_question, or use --mixed_precision bf16"
            ) from None
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm).item()
        run.refuse_non_finite(loss, norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - began
        run.step(
            f"{cfg.batch_size / seconds:.1f} q/s",
            {"loss": loss, "acc": correct / cfg.batch_size, "lr": lr},
            {"grad_norm": norm, "seconds": seconds},
        )
        if dev and ((step + 1) % (cfg.eval_every or per_epoch) == 0 or step + 1 == last):
            run.dev(evaluate(dev, dev_corpus, reader, accelerator, cfg), by="em", sign=1)
        reader.inputs["pair"] = f"{run.fingerprint}-{step + 1}"  # tells these weights from an older copy
        run.save({"reader": reader}, optimizer, evaluates=bool(dev))


if __name__ == "__main__":
    with friendly_errors():
        main()
