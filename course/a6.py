"""
Assignment 6, EMDR2: the points, and the drivers (a1.py says what these are).
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

TITLE = "EMDR2: teaching the retriever without labels"
SHIP = ["train_emdr2.py", "train_dpr.py", "doc2embedding.py", "answer.py", "recipes/demo/prepare.py"]
SHIP += ["recipes/demo/flan_t5.py", "tests/saved.py", "config/train_emdr2_nq.yaml", "config/answer.yaml"]
SHIP += ["config/train_dpr_nq.yaml", "config/train_dpr_demo.yaml", "config/doc2embedding.yaml"]
SHIP += [f"recipes/demo/{name}.jsonl" for name in ("train", "dev", "test")]
DROP = []
# the first line of a function, and a line of another
SHOWN = ["log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast)", "mask_BT.sum(1, keepdim=True)"]
TASKS = {
    "utils/fid.py:encode_contexts": {
        "context_states": (4, "the states of each context, in the given order", "the docstring"),
        "context_mask": (2, "the mask is true at the tokens of a context", "the docstring"),
        "context_chunks": (2, "each context by itself: the chunk size changes nothing", "the docstring"),
    },
    "utils/fid.py:log_likelihood": {
        "token_value": (6, "log p of each answer token, given the tokens before it", "the docstring"),
        "token_pads": (4, "0 at PAD", "the docstring"),
        "token_mask": (4, "states where mask_bL is false are not read", ""),
    },
    "utils/fid.py:fused_log_likelihood": {
        "fused_value": (3, "all passages of a question as one long input", "the head of the file"),
        "fused_order": (1, "their order does not matter", "the head of the file"),
    },
    "utils/fid.py:document_log_likelihood": {
        "each_value": (9, "log p of each answer token from each passage alone", "the docstring"),
        "each_chunks": (3, "the chunk size changes nothing", ""),
        "each_memory": (2, "the logits of a chunk, never of all passages", "the comment: why in chunks"),
    },
    "train_emdr2.py:retriever_loss": {
        "marginal_token": (7, "token: log of a mean over passages, for each token", "the docstring"),
        "marginal_sequence": (6, "sequence: the same for the whole answer", "the docstring"),
        "marginal_mean": (3, "token: over all answer tokens; sequence: over questions", "the docstring"),
        "marginal_pads": (4, "what stands at padding changes nothing", "mask_BT"),
    },
    "train_emdr2.py:kl_loss": {
        "kl_value": (3, "the divergence from the prior, of the softmax of the mean log p", "the docstring"),
        "kl_zero": (1, "0 where both are the same", ""),
        "kl_pads": (1, "what stands at padding changes nothing", "mask_BT"),
    },
    "together": {
        "one_step": (5, "all your functions: a reader's loss, and the retriever's", ""),
    },
}

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "slope_1": "Three passages have the prior {p1}, {p2}, {p3}. The answer is one token; with each passage "
    "alone its probability is {l1}, {l2}, {l3}. What is d loss / d score of the first passage?",
    "slope_3": "And of the third?",
    "loss": "What is the loss (token)?",
    "even": "With each passage alone the probability is {l1}. What is d loss / d score of the first then?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    prior = rng.permutation([0.2, 0.3, 0.5] if rng.random() < 0.5 else [0.1, 0.3, 0.6])
    likely = rng.permutation([0.1, 0.4, 0.8] if rng.random() < 0.5 else [0.2, 0.3, 0.9])
    found = {f"p{i}": float(p) for i, p in enumerate(prior, 1)}
    return found | {f"l{i}": float(p) for i, p in enumerate(likely, 1)}


# ---------------------------------------------------------------- a tiny T5
def reader(rng, words=40):
    """Return a Fid around a random T5 of two layers, without a tokenizer that reads text."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from utils.fid import Fid

    torch.manual_seed(int(rng.integers(2**31)))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=words, decoder_start_token_id=0, **sizes)
    tokenizer = SimpleNamespace(pad_token_id=0, sep_token_id=1)
    fid = Fid(T5ForConditionalGeneration(config).eval(), tokenizer, {"token_types": "zeros"})
    for weight in fid.model.parameters():
        weight.data *= 3  # why: at T5's start every passage gives nearly the same probabilities
    return fid


def ids_of(rng, *lengths):
    return [rng.integers(2, 40, length).tolist() for length in lengths]


def states(rng, B, K, L):
    """Return (hidden_BKLD, mask_BKL, labels_BT with PAD): random states of passages of different lengths."""
    import torch

    hidden = torch.tensor(rng.standard_normal((B, K, L, 16)), dtype=torch.float32)
    lengths = torch.tensor(rng.permutation(np.arange(B * K) % (L - 1) + 2).reshape(B, K))
    mask = torch.arange(L) < lengths[:, :, None]
    labels = torch.tensor(rng.integers(2, 40, (B, 5)))
    labels[-1, 3:] = -100
    return hidden, mask, labels


def close(a, b):
    return bool((a - b).abs().max() < 1e-4)


# ---------------------------------------------------------------- encode_contexts
def contexts(rng, chunk):
    import torch

    from utils.fid import encode_contexts

    fid, ids = reader(rng), ids_of(rng, 5, 9, 3, 7, 9, 2)
    with torch.no_grad():
        hidden_NLD, mask_NL = encode_contexts(fid, ids, chunk)
    lengths = torch.tensor([*map(len, ids)])[:, None]
    true_NL = torch.arange(hidden_NLD.shape[1]) < lengths
    return hidden_NLD * true_NL[:, :, None], mask_NL


def context_states(rng):
    return {"states of the tokens": contexts(rng, 2)[0]}


def context_mask(rng):
    return {"mask": contexts(rng, 4)[1]}


def context_chunks(rng):
    seed = int(rng.integers(10**6))
    one, all_ = (contexts(np.random.default_rng(seed), chunk)[0] for chunk in (1, 99))
    return {"the same": close(one, all_), "there are states": bool((one != 0).any())}


# ---------------------------------------------------------------- log_likelihood
def tokens(rng, pads=0, short=False):
    """Return log_likelihood's log_bT of three rows; short: only the first states of a row may be read."""
    import torch

    from utils.fid import log_likelihood

    fid = reader(rng)
    hidden_bLD = torch.tensor(rng.standard_normal((3, 6, 16)), dtype=torch.float32)
    mask_bL = torch.ones(3, 6, dtype=torch.bool)
    if short:
        mask_bL = torch.arange(6) < torch.tensor([[2], [6], [4]])
    labels_bT = torch.tensor(rng.integers(2, 40, (3, 5)))
    if pads:
        labels_bT[1, -pads:] = -100
    with torch.no_grad():
        return log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, nullcontext)


def token_value(rng):
    return {"log p": tokens(rng)}


def token_pads(rng):
    log_bT = tokens(rng, pads=2)
    return {"log p at PAD": [float(x) + 0.0 for x in log_bT[1, -2:]], "shape": list(log_bT.shape)}


def token_mask(rng):
    return {"log p": tokens(rng, short=True)}


# ---------------------------------------------------------------- fused, and each alone
def fused(rng, flip=False):
    import torch

    from utils.fid import fused_log_likelihood

    fid = reader(rng)
    hidden_BKLD, mask_BKL, labels_BT = states(rng, 2, 3, 6)
    if flip:
        hidden_BKLD, mask_BKL = hidden_BKLD.flip(1), mask_BKL.flip(1)
    with torch.no_grad():
        return fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)


def fused_value(rng):
    return {"log p": fused(rng)}


def fused_order(rng):
    seed = int(rng.integers(10**6))
    there, back = (fused(np.random.default_rng(seed), flip) for flip in (False, True))
    return {"the same": close(there, back), "not nothing": bool((there != 0).any())}


def alone(rng, chunk, words=40):
    from utils.fid import document_log_likelihood

    fid = reader(rng, words)
    return document_log_likelihood(fid, *states(rng, 2, 4, 7), chunk)


def each_value(rng):
    return {"log p": alone(rng, 3)}


def each_chunks(rng):
    seed = int(rng.integers(10**6))
    first, *others = (alone(np.random.default_rng(seed), chunk) for chunk in (1, 3, 99))
    return {"the same": [close(first, other) for other in others], "not nothing": bool((first != 0).any())}


def each_memory(rng):
    from tests.saved import Largest
    from utils.fid import document_log_likelihood

    words = 3000
    fid, given = reader(rng, words), states(rng, 2, 4, 7)
    with Largest() as largest:
        log_BKT = document_log_likelihood(fid, *given, 1)
    all_logits = 2 * 4 * 5 * words
    # why not nothing: a function that does nothing needs no memory
    found = {"logits of half of all passages": largest.numel > all_logits / 2}
    return found | {"not nothing": bool((log_BKT != 0).any())}


# ---------------------------------------------------------------- losses
def marginal(rng, kind, B, K, T, lengths=None, at_pads=0.0):
    """Return (loss, gradient with respect to the scores) of retriever_loss in float64."""
    import torch

    from train_emdr2 import retriever_loss

    scores_BK = torch.tensor(rng.standard_normal((B, K)), requires_grad=True)
    log_BKT = torch.tensor(-rng.uniform(0.1, 3, (B, K, T)))
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    if lengths:
        mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    log_BKT = log_BKT.masked_fill(~mask_BT[:, None], at_pads)
    loss = retriever_loss(scores_BK.log_softmax(1), log_BKT, mask_BT, kind)
    loss.backward()
    return loss.detach(), scores_BK.grad


def marginal_token(rng):
    loss, slope_BK = marginal(rng, "token", 1, 5, 4)
    return {"loss": loss, "d loss / d scores": slope_BK}


def marginal_sequence(rng):
    loss, slope_BK = marginal(rng, "sequence", 1, 5, 4)
    return {"loss": loss, "d loss / d scores": slope_BK}


def marginal_mean(rng):
    # one passage a question: its prior is 1, and only the means are left
    return {kind: marginal(rng, kind, 3, 1, 4, lengths=[1, 4, 2])[0] for kind in ("token", "sequence")}


def marginal_pads(rng):
    same = []
    for kind in ("token", "sequence"):
        seed = int(rng.integers(10**6))
        losses = []
        for value in (0.0, -7.0):
            again = np.random.default_rng(seed)
            losses.append(marginal(again, kind, 2, 3, 4, lengths=[2, 3], at_pads=value)[0])
        same.append(abs(float(losses[0] - losses[1])) < 1e-9 and float(losses[0]) != 0)
    return {"the same": same}


def divergence(rng, at_pads=0.0, lengths=(4, 4), equal=False):
    import torch

    from train_emdr2 import kl_loss

    scores_BK = torch.tensor(rng.standard_normal((2, 5)), requires_grad=True)
    mask_BT = torch.arange(4) < torch.tensor(lengths)[:, None]
    log_BKT = torch.tensor(-rng.uniform(0.1, 3, (2, 5, 4))).masked_fill(~mask_BT[:, None], at_pads)
    log_prior_BK = scores_BK.log_softmax(1)
    if equal:
        log_prior_BK = (scores_BK * 0 + log_BKT.mean(2)).log_softmax(1)
    loss = kl_loss(log_prior_BK, log_BKT, mask_BT)
    loss.backward()
    return loss.detach(), scores_BK.grad


def kl_value(rng):
    loss, slope_BK = divergence(rng)
    return {"loss": loss, "d loss / d scores": slope_BK}


def kl_zero(rng):
    return {"zero": bool(abs(float(divergence(rng, equal=True)[0])) < 1e-9)}


def kl_pads(rng):
    seed = int(rng.integers(10**6))
    losses = [float(divergence(np.random.default_rng(seed), value, (2, 3))[0]) for value in (0.0, -7.0)]
    return {"the same": abs(losses[0] - losses[1]) < 1e-9 and losses[0] != 0}


# ---------------------------------------------------------------- together
def one_step(rng):
    import torch

    from train_emdr2 import kl_loss, retriever_loss
    from utils.fid import PAD, document_log_likelihood, encode_contexts, fused_log_likelihood

    fid = reader(rng)
    hidden_NLD, mask_NL = encode_contexts(fid, ids_of(rng, 5, 9, 3, 7, 9, 2), 2)
    hidden_BKLD, mask_BKL = hidden_NLD.unflatten(0, (2, 3)), mask_NL.unflatten(0, (2, 3))
    labels_BT = torch.tensor([[5, 6, 1], [9, 1, PAD]])
    loss = -fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT).sum() / 5
    loss.backward()
    log_BKT = document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, 2)
    log_prior_BK = torch.tensor(rng.standard_normal((2, 3)), dtype=torch.float32).log_softmax(1)
    mask_BT = labels_BT != PAD
    losses = [retriever_loss(log_prior_BK, log_BKT, mask_BT, kind) for kind in ("token", "sequence")]
    norms = [weight.grad.norm() for weight in fid.model.parameters() if weight.grad is not None]
    found = {"losses": torch.stack([loss.detach(), *losses, kl_loss(log_prior_BK, log_BKT, mask_BT)])}
    return found | {"gradient": torch.stack(norms)}
