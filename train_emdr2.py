"""
Train a reader and its retriever together, from questions and answers alone (EMDR2, Singh et al. 2021).

In:   questions with answers, a corpus, the two encoders of train_dpr.py and the vectors that doc2embedding.py
      made with them, any T5
Out:  training: run_dir/{query_encoder,doc_encoder,reader}/ (best dev EM), checkpoints/, log.txt,
      metrics.jsonl, curves.png; prediction: `out` (DPR's json), beside it .answers.json and .metrics.json
Run:  accelerate launch train_emdr2.py --config config/train_emdr2_nq.yaml
      python train_emdr2.py --train "" --reader runs/emdr2_nq/reader --test data/nq/test.jsonl
      --test_run runs/emdr2_nq/test/test.run --out runs/emdr2_nq/test.json
Next: doc2embedding.py and test_dpr.py show what the retriever learned; ask.py --reader

A step: (1) search the K best passages with the question's vector of now, in vectors that may be some steps
old. (2) Fusion-in-Decoder (FiD): T5 encodes each passage by itself, its decoder reads all of them at once and
learns the answer. (3) How well could the reader, kept constant, have said the answer from each passage alone?
(4) The encoders of now turn scores into a prior over the K passages, and learn to give weight to those that
explained the answer. (5) Every so many steps the corpus is encoded again (`refresh`).

`retriever_loss: none` is plain FiD with a frozen retriever, the baseline. config/train_emdr2_mss.yaml trains
on masked sentences (prepare/salient_spans.py) by the same lines.

Differs from the paper and its code: (1) The mixture of passages is taken per answer token, as released; the
paper's equation is `marginal: sequence`. (2) Any Hugging Face T5 and our own DPR in the place of their
MSS-trained T5 and BERT. (3) The one-document likelihood reads the encoder states that FiD has computed, which
is the paper's Figure 1; the code encodes again, as it fills FiD's inputs up with neighbouring passages: that
is `neighbors: true`. (4) The search is without dropout (as in Atlas). (5) `refresh: sync` stops training and
encodes on its devices, so vectors are 0 to refresh_every - 1 steps old (as in the author's later ART); theirs
are 500 to 1000. `refresh: async` is theirs, but never waits for late vectors. (6) Losses divide by the answer
tokens of the global batch (sequence, kl: by its questions), theirs by those of a GPU. (7) bf16, not fp16. (8)
Order, drawn answers and dropout are functions of (seed, step), so a killed run with refresh sync or none
resumes to the same bits (on a CPU). (9) `temperature` 1, theirs sqrt(D), which would leave an almost even
prior: the encoders of train_dpr.py have learned plain inner products.

Q questions of the global batch · B questions of a chunk · K passages each · T answer tokens · L tokens of a
context · D hidden
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from recipes.plot import curves
from utils.data import Corpus, read_questions
from utils.distributed import prefetch, start, sum_gradients, world
from utils.encoder import embed_on_devices, tokenize_passages, tokenize_questions, vectors_of
from utils.estimate import dry_run
from utils.fid import (
    PAD,
    answer_all,
    contexts_of,
    document_log_likelihood,
    encode_contexts,
    fused_log_likelihood,
    load_fid,
    tokenize_answers,
    tokenize_contexts,
)
from utils.grad_cache import chunk_seed
from utils.index_worker import abandon, clean, export, worker_state
from utils.live_index import LiveIndex
from utils.metrics import topk_accuracy
from utils.plumbing.checkpoint import load_optimizer, make_optimizer
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_model,
    need_value,
)
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import folder_hash, weights_hash
from utils.plumbing.run import Run, need_start, plan
from utils.plumbing.weights import load_encoder, read_inputs
from utils.predictions import answer_scores, need_predictions_out, write_predictions
from utils.reader_data import read_ranking
from utils.text import has_answer

TOWERS = {"query_encoder": "question", "doc_encoder": "passage"}
SHOWN = ("loss", "has", "ret", "entropy", "agree")  # of a step; the last three where the retriever learns
CURVES = "loss ret entropy agree has em hit@1 hit@5 hit@20 index_age search_seconds refresh_seconds".split()


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def load_questions(path, corpus):
    """(the questions of a file that have answers, with "own": the rows that they never retrieve; a note)."""
    questions = read_questions(path, need=("answers",))
    kept = [question for question in questions if question["answers"]]
    for question in kept:
        # why: a masked sentence would read its answer in the passage that it was cut from [EM:264-265]. trap:
        # a question that somebody asked may name its right passages too, and is to find them
        masked = "[MASK]" in question["question"]
        ids = [passage for passage in question["positives"] if isinstance(passage, str)]
        if masked and not ids:
            raise UserError(f"{path}: {question['qid']}: a masked sentence needs the id of its own passage")
        question["own"] = {corpus.row(pid) for pid in ids} if masked else set()
    note = f"{path}: {len(kept)} questions, {len(questions) - len(kept)} without an answer left out"
    return kept, note


def draw_questions(step, train, cfg):
    """The questions of a step's global batch, and for each one of its answers [DU:128-134]."""
    epoch, offset = divmod(step, len(train) // cfg.batch_size)
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(train))
    picked = order[offset * cfg.batch_size : (offset + 1) * cfg.batch_size].tolist()
    draws = [np.random.default_rng([cfg.seed, epoch, i, 1]) for i in picked]
    answers = [str(rng.choice(train[i]["answers"])) for rng, i in zip(draws, picked, strict=True)]
    return [train[i] for i in picked], answers


def retrieve(examples, index, query_encoder, k, accelerator, cfg):
    """Of every question the rows of its k best passages, its own left out: lists, the same on all devices."""
    ids = tokenize_questions(query_encoder, [example["question"] for example in examples])
    q_QD = embed_on_devices(query_encoder, ids, cfg.encoding_batch_size, "question", accelerator)
    # from: EM:389-391: one more is fetched where one may have to go
    spare = max(len(example["own"]) for example in examples)
    _, rows_Qk = index.search(q_QD.cpu().numpy(), k + spare)
    pairs = zip(examples, rows_Qk.tolist(), strict=True)
    return [[row for row in rows if row not in example["own"]][:k] for example, rows in pairs]


def tokenize_chunk(examples, rows, labels_BT, corpus, models, cfg):
    """All that the models read of a chunk of B questions; rows: their passages."""
    fid, batch = models["reader"], {"contexts": [], "bare": [], "texts": [], "has": 0.0}
    batch["labels_BT"] = labels_BT[:, : int((labels_BT != PAD).sum(1).max())]
    for example, own in zip(examples, rows, strict=True):
        passages = [corpus[row] for row in own]
        batch["contexts"] += contexts_of(example["question"], passages, own, corpus, fid)
        if cfg.neighbors and cfg.retriever_loss != "none":
            batch["bare"] += tokenize_contexts(fid, example["question"], passages)
        batch["texts"] += [(passage.title, passage.text) for passage in passages]
        batch["has"] += sum(has_answer(p.text, example["answers"]) for p in passages) / cfg.top_k
    if cfg.retriever_loss != "none":
        questions = [example["question"] for example in examples]
        batch["question_ids"] = tokenize_questions(models["query_encoder"], questions)
        batch["passage_ids"] = tokenize_passages(models["doc_encoder"], batch["texts"])
    return batch


# ---------------------------------------------------------------- loss and gradient
def retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, marginal):
    """
    How badly the answers are explained by the passages together, the retriever's belief as their weights:

        token     - sum_t log sum_k prior_k p(a_t | a_<t, q, z_k)  /  answer tokens       (EMDR2 TR:100-107)
        sequence  - log sum_k prior_k prod_t p(a_t | a_<t, q, z_k), mean over questions   (the paper's form)

    With scores s and log_prior = log_softmax(s), d loss / d s = prior - posterior, where the posterior is
    softmax(log_prior + log p(answer | k)): of the whole answer, or the mean of those of its tokens. So a
    passage rises when the reader finds the answer likelier with it than the retriever had believed.

    log_likelihood_BKT: log p of the answer's tokens by each passage alone, constants; mask_BT: true at
    tokens.
    """
    assert marginal in ("token", "sequence"), marginal
    mask_BT = mask_BT.bool()
    log_likelihood_BKT = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0)
    if marginal == "token":
        log_BT = (log_prior_BK[:, :, None] + log_likelihood_BKT).logsumexp(1)
        return -log_BT[mask_BT].sum() / mask_BT.sum()
    return -(log_prior_BK + log_likelihood_BKT.sum(2)).logsumexp(1).mean()


def kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT):
    """
    KL(preference || prior), mean over questions: the preference is a softmax over passages of the mean log p
    of the answer's tokens, whatever the prior says (EMDR2 TR:184-214; the ancestor of ART and Atlas' PDist).
    Here d loss / d s = prior - preference.
    """
    mask_BT = mask_BT.bool()
    sums_BK = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0).sum(2)
    wish_BK = (sums_BK / mask_BT.sum(1, keepdim=True)).softmax(1)
    return (torch.xlogy(wish_BK, wish_BK) - wish_BK * log_prior_BK).sum(1).mean()  # 0 log 0 is 0


def emdr2_gradient(batch, models, tokens, accelerator, cfg):
    """
    The method, for one chunk of B questions: add its share of the gradient to .grad. tokens: answer tokens of
    the global batch. Returns the chunk's part of the means that SHOWN names: the reader's loss, the share of
    passages with an answer; where the retriever learns also its loss, the entropy of the prior in nats, how
    often prior and posterior have the same first passage.

    The two losses have two graphs with nothing in common, so each runs backward by itself, and the
    activations of T5 are gone before those of the encoders come.
    """
    fid, device, autocast = models["reader"], accelerator.device, accelerator.autocast
    labels_BT = batch["labels_BT"].to(device)
    mask_BT, B, K, Q = labels_BT != PAD, len(labels_BT), cfg.top_k, cfg.batch_size

    # The reader: - log p(answer | question, all K passages). Its gradient ends in T5: the passages were
    # chosen by a search, and no score enters the decoder.                                 [EM:152-183]
    hidden_NLD, mask_NL = encode_contexts(fid, batch["contexts"], cfg.passage_chunk, autocast)
    hidden_BKLD, mask_BKL = hidden_NLD.unflatten(0, (B, K)), mask_NL.unflatten(0, (B, K))
    reader = -fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast).sum() / tokens
    accelerator.backward(reader)
    reader, hidden_BKLD, hidden_NLD = reader.detach(), hidden_BKLD.detach(), None  # frees the graph
    if cfg.retriever_loss == "none":
        return torch.tensor([reader, batch["has"] / Q], device=device)

    # What each passage alone would have made of the answer, the reader a constant.       [EM:187-210]
    if cfg.neighbors:  # FiD has read more than the passage, for which alone the retriever answers
        with torch.no_grad():
            hidden_NLD, mask_NL = encode_contexts(fid, batch["bare"], cfg.passage_chunk, autocast)
        hidden_BKLD, mask_BKL = hidden_NLD.unflatten(0, (B, K)), mask_NL.unflatten(0, (B, K))
    likelihood_BKT = document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, cfg.score_chunk, autocast)
    hidden_BKLD = hidden_NLD = None

    # The retriever's belief in its K passages, by the encoders of now, not the search's scores. [EM:98-145]
    query, doc = models["query_encoder"], models["doc_encoder"]
    q_BD = vectors_of(query, batch["question_ids"], "question", cfg.passage_chunk, autocast)
    d_BKD = vectors_of(doc, batch["passage_ids"], "passage", cfg.passage_chunk, autocast).unflatten(0, (B, K))
    scores_BK = torch.einsum("bd,bkd->bk", q_BD, d_BKD) / (cfg.temperature or math.sqrt(query.dim))
    log_prior_BK = scores_BK.log_softmax(1)

    # Where belief and evidence differ the encoders learn; nothing here leads to T5.       [TR:100-178]
    if cfg.retriever_loss == "kl":
        loss = kl_loss(log_prior_BK, likelihood_BKT, mask_BT)
    else:
        loss = retriever_loss(log_prior_BK, likelihood_BKT, mask_BT, cfg.marginal)
    share, weight_B1 = B / Q, 1 / Q  # of the chunk, and of a question, in the batch's mean
    if cfg.retriever_loss == "emdr2" and cfg.marginal == "token":
        share, weight_B1 = mask_BT.sum() / tokens, mask_BT.sum(1, keepdim=True) / tokens
    loss = loss * share
    (slope_BK,) = torch.autograd.grad(loss, scores_BK, retain_graph=True)  # weight * (prior - posterior)
    accelerator.backward(loss)
    prior_BK = log_prior_BK.detach().exp()
    agree_B = prior_BK.argmax(1) == (prior_BK - slope_BK / weight_B1).argmax(1)
    entropy = torch.special.entr(prior_BK).sum()
    shown = [reader, batch["has"] / Q, loss.detach(), entropy / Q, agree_B.sum() / Q]
    return torch.tensor(shown, device=device)


def add_gradient(examples, answers, rows, corpus, models, accelerator, cfg, step):
    """
    Add the gradient of the global batch's losses to .grad; rows: the passages of every question of it.
    Returns the batch's numbers by their names in SHOWN.
    """
    rank, devices = world()
    labels_QT = tokenize_answers(models["reader"], answers)
    tokens, share = int((labels_QT != PAD).sum()), cfg.batch_size // devices
    mine = slice(rank * share, (rank + 1) * share)
    examples, rows, labels_BT = examples[mine], rows[mine], labels_QT[mine]
    totals = 0.0

    def batch_of(k):
        part = slice(k, k + cfg.question_chunk)
        return tokenize_chunk(examples[part], rows[part], labels_BT[part], corpus, models, cfg)

    for i, batch in enumerate(prefetch(batch_of, range(0, share, cfg.question_chunk))):
        torch.manual_seed(chunk_seed((cfg.seed, step, rank), i))  # the dropout masks
        totals = totals + emdr2_gradient(batch, models, tokens, accelerator, cfg)
    for model in models.values():
        sum_gradients(model.parameters())
    if devices > 1:
        dist.all_reduce(totals)
    return dict(zip(SHOWN, totals.tolist(), strict=False))


# ---------------------------------------------------------------- the index
def refresh(step, index, doc_encoder, run, accelerator, cfg):
    """Before a step: bring the index up to date, as `refresh` says. Every device calls it at every step."""
    due, main_process = step > 0 and step % cfg.refresh_every == 0, accelerator.is_main_process
    if cfg.refresh == "none" or (cfg.refresh == "sync" and not due):
        return
    if due and main_process:
        export(run.dir, step, doc_encoder)  # for the worker, and for a resume
        if cfg.refresh == "async" and (fault := worker_state(run.dir)):
            run.say(f"warning: {fault}; training goes on with vectors of step {index.step}")
    if cfg.refresh == "sync":
        index.refresh(doc_encoder, step, cfg.encoding_batch_size, accelerator.autocast)
    elif index.follow(run.dir):
        run.say(f"step {step}: the vectors of step {index.step} are in use")
    run.state["index_step"] = index.step
    if due and main_process:
        clean(run.dir, {index.step})


# ---------------------------------------------------------------- evaluation
def evaluate(dev, corpus, index, models, query_encoder, accelerator, cfg):
    """{"em", "f1", "hit@k"...}: the reader's greedy answers, and what the live index finds for them."""
    most = max(cfg.top_k, *cfg.eval_hits)
    rows = retrieve(dev, index, query_encoder, most, accelerator, cfg)
    hits = [
        [has_answer(corpus[row].text, example["answers"]) for row in one[: max(cfg.eval_hits)]]
        for example, one in zip(dev, rows, strict=True)
    ]
    read = [one[: cfg.top_k] for one in rows]
    answers = answer_all(models["reader"], dev, read, corpus, cfg.eval_batch_size, accelerator)
    values = answer_scores(dev, answers, [cfg.top_k])
    metrics = {name.partition("@")[0].lower(): float(np.mean(value)) for name, value in values.items()}
    return metrics | {f"hit@{k}": share for k, share in topk_accuracy(hits, cfg.eval_hits).items()}


# ---------------------------------------------------------------- predict
def answer_file(cfg, accelerator):
    """Answer the test questions from the first top_k passages of a ranking: three files and a table."""
    known = read_inputs(cfg.reader, "reader")
    if known.get("role") != "fid":
        raise UserError(f"reader: {cfg.reader} has not learned to answer; with test, give run_dir/reader")
    whole = Corpus(cfg.corpus, cfg.corpus_format) if cfg.corpus else None
    examples, corpus, note = read_ranking(cfg.test, cfg.test_run, whole, cfg.top_k)
    if known.get("neighbors") and corpus is not whole:
        raise UserError(f"{cfg.reader} reads neighbours too: give a question file, test_run and corpus")
    fid = load_fid(cfg.reader).to(accelerator.device)
    rows = [example["rows"].tolist() for example in examples]
    if cfg.dry_run:

        def probe():
            return len(answer_all(fid, examples[:4], rows[:4], corpus, cfg.eval_batch_size, accelerator))

        out, disk = Path(cfg.out).parent, len(examples) * 1000
        return dry_run("answering", [fid], probe, len(examples), "questions", out, disk)
    began = time.time()
    answers = answer_all(fid, examples, rows, corpus, cfg.eval_batch_size, accelerator)
    seconds = time.time() - began
    if accelerator.is_main_process:
        print(f"{note}\n{len(examples) / seconds:.1f} questions/s of up to {cfg.top_k} passages")
        write_predictions(cfg.out, examples, answers, [cfg.top_k])


# ---------------------------------------------------------------- main
def main():
    cfg = load_config(__doc__, "config/train_emdr2_nq.yaml")
    must_be_one_of(cfg, retriever_loss=("emdr2", "kl", "none"), marginal=("token", "sequence"))
    must_be_one_of(cfg, refresh=("sync", "async", "none"), resume=("never", "exact", "changed"))
    must_be_one_of(cfg, mixed_precision=("no", "fp16", "bf16"), tracker=("none", "wandb"))
    at_least(cfg, 1, "top_k", "batch_size", "question_chunk", "passage_chunk", "score_chunk", "epochs")
    at_least(cfg, 1, "refresh_every", "encoding_batch_size", "eval_batch_size", "save_every", "log_every")
    if not cfg.eval_hits or min(cfg.eval_hits) < 1:
        raise UserError(f"eval_hits must name depths of at least 1, got {cfg.eval_hits}")
    at_least(cfg, 2, "answer_tokens")
    at_least(cfg, 8, "reader_tokens")
    if bool(cfg.train) == bool(cfg.test):
        raise UserError('give either train, or test with --train "" and the reader of a run')
    inputs = ("test", "test_run") if cfg.test else ("train", "dev")
    need_file(cfg, optional=(*inputs, "corpus"))
    if cfg.test:
        need_model(cfg, "reader")
        need_predictions_out(cfg, *inputs, "corpus")
        return answer_file(cfg, start(cfg.mixed_precision))
    need_file(cfg, "corpus")
    need_value(cfg, "embeddings")
    need_model(cfg, *TOWERS)  # of a resume too: the vectors are compared with them
    need_start(cfg, "reader")
    accelerator = start(cfg.mixed_precision)
    if cfg.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {cfg.batch_size} is not shared by {accelerator.num_processes} devices")
    with accelerator.main_process_first():  # the first to open a corpus writes its index
        corpus = Corpus(cfg.corpus, cfg.corpus_format)
    open_embeddings(cfg.embeddings, corpus.sha256, False, cfg.query_encoder, len(corpus))
    content = {key: folder_hash(getattr(cfg, key)) for key in inputs} | {"corpus": corpus.sha256}
    content |= {key: weights_hash(getattr(cfg, key)) for key in (*TOWERS, "reader")}
    content["embeddings"] = folder_hash(Path(cfg.embeddings) / "manifest.json")  # has the hash of every shard
    run = Run(cfg, accelerator, content)
    train, train_note = load_questions(cfg.train, corpus)
    dev, dev_note = [], "no dev set: the last checkpoint is the best"
    if cfg.dev:
        dev, dev_note = load_questions(cfg.dev, corpus)
    spare = max(len(question["own"]) for question in train + dev)
    if cfg.neighbors and spare:
        raise UserError("neighbors: a masked sentence's own passage would come back as a neighbour")
    if cfg.top_k + spare > len(corpus):
        raise UserError(f"top_k {cfg.top_k}: {cfg.corpus} has {len(corpus)} passages, {spare} may be dropped")
    per_epoch, total, last, warmup, late = plan(len(train), cfg)

    learns = cfg.retriever_loss != "none"
    if not learns:
        cfg.refresh = "none"  # a frozen encoder makes the vectors that are there
    encoders = {}
    for name, role in TOWERS.items():
        source = run.checkpoint / name if run.checkpoint and learns else getattr(cfg, name)
        encoder = load_encoder(source, role, dropout=cfg.dropout)
        if learns and encoder.projection:
            raise UserError(f"{name}: {source} has a projection on top, and would not be saved with it")
        encoder.inputs["role"] = role  # a shared encoder becomes two, which part from here on
        encoders[name] = encoder.to(accelerator.device).train()
    how = {key: getattr(cfg, key) for key in ("reader_tokens", "answer_tokens", "neighbors")}
    fid = load_fid(run.checkpoint / "reader" if run.checkpoint else cfg.reader, how, cfg.dropout)
    fid.to(accelerator.device).train()
    models = {"reader": fid} | (encoders if learns else {})
    if cfg.gradient_checkpointing:
        for model in models.values():
            model.model.activation_checkpointing_enable()
    groups = []
    for name, model in models.items():
        scale = cfg.retriever_lr_scale if name in TOWERS else 1.0
        for group in make_optimizer(model.named_parameters(), cfg).param_groups:
            groups.append(group | {"scale": scale})
    optimizer = torch.optim.AdamW(groups)
    if run.checkpoint:
        load_optimizer(run.checkpoint, optimizer)
    optimizer = accelerator.prepare(optimizer)  # for fp16's loss scaler; gradients are summed by add_gradient
    weights = [p for model in models.values() for p in model.parameters()]
    size = sum(p.numel() for p in weights)
    index = LiveIndex(corpus, cfg.embeddings, accelerator)
    first, made = run.state["step"], run.state.setdefault("index_step", 0)
    anew = made and cfg.refresh == "sync" and first % cfg.refresh_every == 0  # by the first step
    if first < last and not anew:
        index.restore(run.dir, made, cfg.doc_encoder, cfg.encoding_batch_size, accelerator)

    if cfg.dry_run:
        few = min(cfg.batch_size, 2 * cfg.question_chunk * accelerator.num_processes)
        small = type(cfg)(**vars(cfg) | {"batch_size": few})

        def probe():
            examples, answers = draw_questions(0, train, small)
            rows = retrieve(examples, index, encoders["query_encoder"], cfg.top_k, accelerator, cfg)
            add_gradient(examples, answers, rows, corpus, models, accelerator, small, 0)
            return few / cfg.batch_size

        probe()  # fills .grad, which is no activation
        disk = 52 * size  # four checkpoints at most, the best weights once more
        return dry_run("training", [*models.values()], probe, last, "steps", cfg.run_dir, disk, 8 * size)
    banner = (
        f"{size / 1e6:.1f} M parameters, {accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{accelerator.mixed_precision} | {cfg.batch_size} questions a step, {cfg.top_k} of {len(corpus):,} "
        f"passages each | {per_epoch} steps an epoch, {len(train) % cfg.batch_size} questions left over; "
        f"{last} in all"
    )
    run.start(last, size, [train_note, dev_note, banner, *late])
    if accelerator.is_main_process:
        abandon(run.dir, run.first)
    for step in range(run.first, last):
        began = time.perf_counter()
        refresh(step, index, encoders["doc_encoder"], run, accelerator, cfg)
        refreshed = time.perf_counter()
        examples, answers = draw_questions(step, train, cfg)
        rows = retrieve(examples, index, encoders["query_encoder"], cfg.top_k, accelerator, cfg)
        searched = time.perf_counter()
        if step == run.first:
            ids = contexts_of(examples[0]["question"], [corpus[rows[0][0]]], rows[0][:1], corpus, fid)[0]
            run.say(f"example context: {fid.tokenizer.decode(ids)}\nexample answer: {answers[0]}")
        fall = max(cfg.min_lr_ratio, (total - step) / max(1, total - warmup))
        lr = cfg.learning_rate * (step / warmup if step < warmup else fall)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        try:
            shown = add_gradient(examples, answers, rows, corpus, models, accelerator, cfg, step)
        except torch.OutOfMemoryError:
            cure = "--gradient_checkpointing true, then lower --question_chunk, --score_chunk or --top_k"
            raise UserError(f"out of GPU memory: {cure}") from None
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm).item()
        run.refuse_non_finite(shown["loss"] + shown.get("ret", 0.0), norm, lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        if step == run.first and learns:
            even = shown["entropy"] / math.log(max(2, cfg.top_k))  # 1: all passages have the same weight
            run.say(f"entropy of the prior: {shown['entropy']:.3f} nats, {even:.2f} of the log of top_k")
            if even > 0.95:
                run.say("warning: the prior hardly tells the passages apart: lower --temperature")
        hidden = {"grad_norm": norm, "refresh_seconds": refreshed - began}
        hidden |= {"search_seconds": searched - refreshed, "seconds": seconds}
        if learns:
            hidden["index_age"] = step - index.step
        run.step(f"{cfg.batch_size / seconds:.1f} q/s", shown | {"lr": lr}, hidden)
        if dev and ((step + 1) % (cfg.eval_every or per_epoch) == 0 or step + 1 == last):
            found = evaluate(dev, corpus, index, models, encoders["query_encoder"], accelerator, cfg)
            run.dev(found, by="em", sign=1)
        for model in models.values():
            model.inputs["pair"] = f"{run.fingerprint}-{step + 1}"  # these belong together
        run.save(models, optimizer, evaluates=bool(dev))
    if accelerator.is_main_process:
        curves(run.dir / "metrics.jsonl", run.dir / "curves.png", CURVES)


if __name__ == "__main__":
    with friendly_errors():
        main()
