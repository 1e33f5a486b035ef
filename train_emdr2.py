"""
Train a reader and its retriever together, from questions and answers alone (EMDR2, Singh et al. 2021).

Nobody says which passages are right: the reader finds out, because they make the answer likelier. A step:
(0) Every `refresh_every` steps encode the corpus again; never, where the question encoder learns alone.
(1) Search the K best passages of each question, by vectors that may be some steps old.
(2) Fusion-in-Decoder (FiD): T5 encodes each passage by itself, reads all at once and learns the answer.
(3) Ask the reader, kept constant, how likely the answer is from each passage alone.
(4) The encoders' scores give a prior over the K passages. With (3), Bayes' rule makes a posterior of it. The
    encoders learn to move the prior towards the posterior.

In:   questions with answers, a corpus, two encoders (train_dpr.py), their vectors (doc2embedding.py), any T5
Out:  run_dir/{query_encoder,doc_encoder,reader}/ (best exact match on dev), checkpoints/, metrics.jsonl
Run:  accelerate launch train_emdr2.py --config config/train_emdr2_nq.yaml
Next: doc2embedding.py and test_dpr.py show what the retriever learned, answer.py what the reader learned

A tag such as [EM:264] is a line of the released code, github.com/DevSinghSachan/emdr2:
EM megatron/model/emdr2_model.py · TR, DU tasks/openqa/e2eqa/{train_e2eqa,train_data_utils}.py
B questions of a chunk · K passages each · N = B * K · T answer tokens · L tokens of a passage · D hidden
"""

import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from train_dpr import learning_rate_factor
from utils import encoder as encoding
from utils import fid
from utils.data import items_of_step, read_questions
from utils.distributed import chunk_seed, cut, own_share, prefetch, sum_gradients, sum_over_devices
from utils.live_index import LiveIndex, own_rows
from utils.metrics import answer_scores, topk_accuracy
from utils.plumbing import config
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import UserError
from utils.plumbing.run import NO_DEV, Run
from utils.plumbing.weights import TOWERS, load_encoder
from utils.text import has_answer

# what a step shows: the reader's loss, the share of passages with an answer, the retriever's loss, and the
# prior's entropy (log K where no passage is preferred, 0 where one is certain)
SHOWN = ("loss", "has", "ret", "entropy")


# ---------------------------------------------------------------- data: a batch is a function of (seed, step)
def load_questions(path, corpus):
    """Return (the questions with answers, a line for the log); "own": the rows that its search leaves out."""
    questions = read_questions(path, need=("answers",), match="string")
    kept = [question for question in questions if question["answers"]]
    for question in kept:
        question["own"] = own_rows(question, path, corpus)
    left_out = len(questions) - len(kept)
    return kept, f"{path}: {len(kept)} questions, {left_out} without an answer left out"


def draw_questions(step, train, cfg):
    """Draw the global batch of a step: its questions, each with one of its answers as "answer" [DU:128]."""
    epoch, items = items_of_step(step, len(train), cfg)
    examples = []
    for item in items:
        rng = np.random.default_rng([cfg.seed, epoch, item, 1])  # the 1: see draw_passages in train_dpr.py
        answer = str(rng.choice(train[item]["answers"]))
        examples.append(train[item] | {"answer": answer})
    return examples


def tokenize_chunk(examples, corpus, models, cfg):
    """Return a dict: token ids for each model, "labels_BT", and "with_answer", how many passages have one."""
    reader = models["reader"]
    questions = [example["question"] for example in examples]
    labels_BT = fid.tokenize_answers(reader, [example["answer"] for example in examples])
    batch = {"labels_BT": labels_BT, "contexts": [], "with_answer": 0}
    all_passages = []
    for example in examples:
        passages = [corpus[row] for row in example["rows"]]
        all_passages += passages
        batch["contexts"] += fid.tokenize_contexts(reader, example["question"], passages)
        batch["with_answer"] += sum(has_answer(passage.text, example["answers"]) for passage in passages)
    if cfg.retriever_loss != "none":
        batch["question_ids"] = encoding.tokenize_questions(models["query_encoder"], questions)
        batch["passage_ids"] = encoding.tokenize_passages(models["doc_encoder"], all_passages)
    return batch


# ---------------------------------------------------------------- losses
def retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, marginal):
    """
    Return how badly all passages together explain the answers, weighted by the prior:

        token     - sum_t log sum_k prior_k p(a_t | a_<t, q, z_k)  /  answer tokens       (released, [TR:100])
        sequence  - log sum_k prior_k prod_t p(a_t | a_<t, q, z_k), mean over questions   (the paper)

    With scores s and log_prior = log_softmax(s), d loss / d s = prior - posterior. The posterior is
    softmax(log_prior + log p(answer | k)): of the whole answer, or the mean of those of its tokens. So the
    score of a passage rises where its posterior is above its prior.
    """
    assert marginal in ("token", "sequence"), marginal
    mask_BT = mask_BT.bool()
    log_likelihood_BKT = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0)
    if marginal == "token":
        log_BT = (log_prior_BK[:, :, None] + log_likelihood_BKT).logsumexp(1)
        return -log_BT[mask_BT].sum() / mask_BT.sum()
    return -(log_prior_BK + log_likelihood_BKT.sum(2)).logsumexp(1).mean()


def kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT):
    """Return KL(preference || prior), mean over questions [TR:184-214]; d loss / d s = prior - preference."""
    # the preference is a softmax over passages of the mean log p of the answer, whatever the prior says
    mask_BT = mask_BT.bool()
    sums_BK = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0).sum(2)
    preference_BK = (sums_BK / mask_BT.sum(1, keepdim=True)).softmax(1)
    negentropy_BK = torch.xlogy(preference_BK, preference_BK)  # 0 log 0 is 0
    return (negentropy_BK - preference_BK * log_prior_BK).sum(1).mean()


# ---------------------------------------------------------------- gradients
def reader_gradient(batch, reader, tokens, accelerator, cfg):
    """Add the gradient of the reader's loss (2) to T5's .grad; return (that loss, (3) log_likelihood_BKT)."""
    # - log p(answer | question, all K passages); no score of the retriever enters it [EM:152-183]
    autocast = accelerator.autocast
    labels_BT = batch["labels_BT"].to(accelerator.device)
    hidden_NLD, mask_NL = fid.encode_contexts(reader, batch["contexts"], cfg.passage_chunk, autocast)
    hidden_BKLD = hidden_NLD.unflatten(0, (-1, cfg.top_k))
    mask_BKL = mask_NL.unflatten(0, (-1, cfg.top_k))
    log_BT = fid.fused_log_likelihood(reader, hidden_BKLD, mask_BKL, labels_BT, autocast)
    loss = -log_BT.sum() / tokens
    accelerator.backward(loss)
    if cfg.retriever_loss == "none":
        return loss.detach(), None
    # (3) log p(a_t | question, passage k alone), a constant [EM:187-210]
    log_BKT = fid.document_log_likelihood(reader, hidden_BKLD, mask_BKL, labels_BT, cfg.score_chunk, autocast)
    return loss.detach(), log_BKT


def retriever_gradient(batch, log_likelihood_BKT, models, tokens, accelerator, cfg):
    """(4) Add the gradient of the retriever's loss to both encoders' .grad; return [this loss, entropy]."""
    # the prior, by the encoders of now; the scores of the search are old [EM:98-145]
    query, doc = models["query_encoder"], models["doc_encoder"]
    chunk, autocast = cfg.passage_chunk, accelerator.autocast
    q_BD = encoding.vectors_with_graph(query, batch["question_ids"], chunk, autocast)
    d_ND = encoding.vectors_with_graph(doc, batch["passage_ids"], chunk, autocast)
    d_BKD = d_ND.unflatten(0, (-1, cfg.top_k))
    temperature = cfg.temperature or math.sqrt(query.dim)
    scores_BK = torch.einsum("bd,bkd->bk", q_BD, d_BKD) / temperature
    log_prior_BK = scores_BK.log_softmax(1)

    # the loss [TR:100-178], times the weight of this chunk in the batch's mean
    mask_BT = (batch["labels_BT"] != fid.PAD).to(accelerator.device)
    weight_of_chunk = len(mask_BT) / cfg.batch_size
    if cfg.retriever_loss == "kl":
        loss = kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT)
    else:
        loss = retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, cfg.marginal)
        if cfg.marginal == "token":
            weight_of_chunk = mask_BT.sum() / tokens
    loss = loss * weight_of_chunk
    accelerator.backward(loss)

    prior_BK = log_prior_BK.detach().exp()
    entropy = torch.special.entr(prior_BK).sum()
    return [loss.detach(), entropy / cfg.batch_size]


def add_gradient(examples, corpus, models, accelerator, cfg, step):
    """(2) to (4): add the gradient of both losses of the global batch to .grad; return numbers to show."""
    # differs: the losses are divided by the answer tokens of the global batch, theirs by those of a GPU
    answers = [example["answer"] for example in examples]
    tokens = int((fid.tokenize_answers(models["reader"], answers) != fid.PAD).sum())

    def batch_of(chunk):
        return tokenize_chunk(chunk, corpus, models, cfg)

    # the graphs of the two losses have nothing in common: T5's activations are gone before the encoders' come
    seed = (cfg.seed, step, accelerator.process_index)
    mine = own_share(examples)
    chunks = cut(mine, cfg.question_chunk)
    totals = 0.0
    for i, batch in enumerate(prefetch(batch_of, chunks)):
        torch.manual_seed(chunk_seed(seed, i))  # the dropout masks
        loss, log_BKT = reader_gradient(batch, models["reader"], tokens, accelerator, cfg)
        numbers = [loss, batch["with_answer"] / cfg.top_k / cfg.batch_size]
        if cfg.retriever_loss != "none":
            numbers += retriever_gradient(batch, log_BKT, models, tokens, accelerator, cfg)
        totals = totals + torch.tensor(numbers, device=accelerator.device)
    sum_gradients(torch.nn.ModuleDict(models).parameters())
    totals = sum_over_devices(totals)
    return dict(zip(SHOWN, totals.tolist(), strict=False))  # plain FiD has only the first two


def training_step(step, examples, corpus, models, optimizer, run, cfg):
    """Learn from one batch; return (numbers to show, numbers to write)."""
    # set the learning rate
    factor = learning_rate_factor(step, run.warmup, run.total, cfg.min_lr_ratio)
    lr = cfg.learning_rate * factor
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]

    # forward and backward
    shown = add_gradient(examples, corpus, models, run.accelerator, cfg, step)

    # clip the gradient, and stop before a broken one changes the weights
    run.accelerator.unscale_gradients()
    norm = clip_grad_norm_(run.weights, cfg.max_grad_norm).item()
    run.refuse_non_finite(shown["loss"] + shown.get("ret", 0.0), norm, lr)

    # step the optimizer
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return shown | {"lr": lr}, {"grad_norm": norm}


# ---------------------------------------------------------------- evaluation
def evaluate(dev, corpus, index, models, accelerator, cfg):
    """Return {"em", "f1", "hit@k"...}: of the reader's answers, and of what the live index finds."""
    dev = index.retrieve(dev, models["query_encoder"], max(cfg.top_k, *cfg.eval_hits))
    hits = []
    for example in dev:
        hits.append([has_answer(corpus[row].text, example["answers"]) for row in example["rows"]])
    size = cfg.eval_batch_size
    answers = fid.answer_all(models["reader"], dev, corpus, [cfg.top_k], size, accelerator)
    em, f1 = answer_scores(dev, answers, [cfg.top_k]).values()
    metrics = {"em": float(np.mean(em)), "f1": float(np.mean(f1))}
    for k, share in topk_accuracy(hits, cfg.eval_hits).items():
        metrics[f"hit@{k}"] = share
    return metrics


# ---------------------------------------------------------------- main
def load_models(run, cfg):
    """Return {"reader": ..., "query_encoder": ..., "doc_encoder": ...}."""
    # differs: any Hugging Face T5 and our own DPR; theirs were pre-trained for this
    lengths = {"reader_tokens": cfg.reader_tokens, "answer_tokens": cfg.answer_tokens}
    models = {"reader": fid.load_fid(run.source("reader", cfg.reader), lengths, cfg.dropout)}
    retriever_learns = cfg.retriever_loss != "none"
    for name, role in TOWERS.items():
        source = run.source(name, getattr(cfg, name)) if retriever_learns else getattr(cfg, name)
        encoder = load_encoder(source, role, dropout=cfg.dropout)
        encoder.inputs["role"] = role  # a shared encoder becomes two, which part from here on
        models[name] = encoder
    for model in models.values():
        model.to(run.device).train()
        if cfg.gradient_checkpointing:
            model.model.activation_checkpointing_enable()
    if retriever_learns and not cfg.train_doc_encoder:
        # why: the passage encoder stands still, so the trained question encoder goes with its vectors
        run.pair = models["doc_encoder"].inputs["pair"].partition("+")[0]
        models["doc_encoder"].requires_grad_(False).eval()
    return models


def main():
    # settings, checked before anything is loaded
    cfg = config.load_config(__doc__, "config/train_emdr2_nq.yaml")
    config.must_be_one_of(cfg, retriever_loss=("emdr2", "kl", "none"), marginal=("token", "sequence"))
    # why 2: the prior of one passage is always 1, so no retriever learns
    config.at_least(cfg, 1 if cfg.retriever_loss == "none" else 2, "top_k")
    config.at_least(cfg, 1, "score_chunk")
    config.at_least(cfg, 2, "answer_tokens", "reader_tokens")
    if not cfg.eval_hits or min(cfg.eval_hits) < 1:
        raise UserError(f"eval_hits must name depths of at least 1, got {cfg.eval_hits}")
    config.need_file(cfg, "train", "corpus", optional=("dev",))
    config.need_value(cfg, "embeddings")

    # data
    sizes = {"question_chunk": (4, cfg.top_k * cfg.reader_tokens), "passage_chunk": (200, cfg.reader_tokens)}
    run = Run(cfg, files=("train", "dev"), weights=(*TOWERS, "reader"), sizes=sizes)
    corpus = run.corpus
    train, train_note = load_questions(cfg.train, corpus)
    dev, dev_note = load_questions(cfg.dev, corpus) if cfg.dev else NO_DEV
    run.notes += [train_note, dev_note]
    spare = max(len(question["own"]) for question in train + dev)
    if cfg.top_k + spare > len(corpus):
        raise UserError(f"top_k {cfg.top_k}: {cfg.corpus} has {len(corpus)} passages, {spare} may be dropped")
    index = LiveIndex(corpus, run, cfg)

    # models
    retriever_learns = cfg.retriever_loss != "none"
    models = load_models(run, cfg)
    answers = [answer for question in train for answer in question["answers"]]
    run.notes += notes_on_unknown(models["reader"].tokenizer, answers)
    trained = models if retriever_learns else {"reader": models["reader"]}
    scales = {name: 1.0 if name == "reader" else cfg.retriever_lr_scale for name in trained}
    optimizer = run.optimizer(trained, scales)

    def batch_of(step):
        return draw_questions(step, train, cfg)

    # the loop
    summary = f"{cfg.batch_size} questions a step, {cfg.top_k} of {len(corpus):,} passages each"
    for step, examples in run.steps(len(train), batch_of, summary):
        if retriever_learns:
            index.refresh(step, models["doc_encoder"])  # (0)
        examples = index.retrieve(examples, models["query_encoder"], cfg.top_k)  # (1)
        if step == run.first:
            context = fid.example_context(models["reader"], examples[0], corpus)
            run.say(f"example context: {context}\nexample answer: {examples[0]['answer']}")
        shown, hidden = training_step(step, examples, corpus, models, optimizer, run, cfg)  # (2) to (4)
        if retriever_learns:
            hidden["index_age"] = step - index.step
        if retriever_learns and step == run.first:
            even = shown["entropy"] / math.log(max(2, cfg.top_k))
            run.say(f"entropy of the prior: {shown['entropy']:.3f} nats, {even:.2f} of the log of top_k")
            if even > 0.95:
                run.say("warning: the prior hardly tells the passages apart: lower --temperature")
        run.log(shown, hidden)
        evaluated = bool(dev) and run.time_to_evaluate()
        if evaluated:
            metrics = evaluate(dev, corpus, index, models, run.accelerator, cfg)
            run.dev(metrics, by="em", sign=1)
        run.save(trained | index.encoder, optimizer, evaluated)  # with the encoder that made the index


if __name__ == "__main__":
    with config.friendly_errors():
        main()
