"""
Assignment 6, EMDR2: the points, and the drivers (a1.py says what these are).
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
from child import tasks

SHIP = ["train_emdr2.py", "train_dpr.py", "doc2embedding.py", "answer.py", "recipes/demo/flan_t5.py"]
SHIP += ["test_dpr.py", "recipes/demo/inverse_cloze.py", "config/train_dpr_demo_cloze.yaml"]
SHIP += ["tests/saved.py", "tests/toy.py"]
DROP = []
# the first line of a function
SHOWN = ["log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast)"]
TASKS = tasks("""
utils/fid.py:encode_contexts
   2 context_states   the states of each context, in the given order | the docstring
   1 context_mask     the mask is true at the tokens of a context | the docstring
   1 context_chunks   each context by itself: the chunk size changes nothing | the docstring
utils/fid.py:log_likelihood
   5 token_value      log p of each answer token, given the tokens before it | the docstring
   3 token_pads       0 at PAD | the docstring
   4 token_mask       states where mask_bL is false are not read
utils/fid.py:fused_log_likelihood
   3 fused_value      all passages of a question as one long input | the head of the file
   1 fused_order      their order does not matter | the head of the file
utils/fid.py:document_log_likelihood
   8 each_value       log p of each answer token from each passage alone | the docstring
   2 each_chunks      the chunk size changes nothing
   2 each_memory      the logits of a chunk, never of all passages | the comment: why in chunks
train_emdr2.py:retriever_gradient ... q_BD = ... log_prior_BK =
   3 prior_value      the softmax over the passages of a question, of its inner products | docstring, (4)
   3 prior_gradient   both encoders learn | vectors_with_graph
   2 prior_temperature  inner products are divided by it; 0 means the root of D | config/train_emdr2_nq.yaml
train_emdr2.py:retriever_loss
   7 marginal_token   token: log of a mean over passages, for each token | the docstring
   6 marginal_sequence sequence: the same for the whole answer | the docstring
   3 marginal_mean    token: over all answer tokens; sequence: over questions | the docstring
   4 marginal_pads    what stands at padding changes nothing | mask_BT
train_emdr2.py:kl_loss
   3 kl_value         the divergence from the prior, of the softmax of the mean log p | the docstring
   1 kl_zero          0 where both are the same
   1 kl_pads          what stands at padding changes nothing | mask_BT
together
   5 one_step         all your functions: a reader's loss, and the retriever's
""")

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
    return Fid(T5ForConditionalGeneration(config).eval(), tokenizer, {"token_types": "zeros"})


def ids_of(rng, *lengths):
    return [rng.integers(2, 40, length).tolist() for length in lengths]


def states(rng, B, K, L, T=5):
    """Return (hidden_BKLD, mask_BKL, labels_BT): passages and answers of different lengths."""
    import torch

    hidden = torch.tensor(rng.standard_normal((B, K, L, 16)), dtype=torch.float32)
    lengths = torch.tensor(rng.permutation(np.arange(B * K) % (L - 1) + 2).reshape(B, K))
    mask = torch.arange(L) < lengths[:, :, None]
    labels = torch.tensor(rng.integers(2, 40, (B, T)))
    return (
        hidden,
        mask,
        labels.masked_fill(torch.arange(T) >= torch.tensor(rng.integers(2, T + 1, (B, 1))), -100),
    )


def close(a, b):
    return bool((a - b).abs().max() < 1e-4)


def flags(rng):
    """Return where the same is asked for, and where another: what does nothing never gives another."""
    return rng.permutation([True, False] * 4).tolist()


# ---------------------------------------------------------------- encode_contexts
def contexts(rng, encode_contexts, chunk):
    import torch

    fid, ids = reader(rng), ids_of(rng, *rng.permutation([5, 9, 3, 7, 9, 2]))
    with torch.no_grad():
        hidden_NLD, mask_NL = encode_contexts(fid, ids, chunk)
    lengths = torch.tensor([*map(len, ids)])[:, None]
    true_NL = torch.arange(hidden_NLD.shape[1]) < lengths
    return hidden_NLD * true_NL[:, :, None], mask_NL


def context_states(rng, encode_contexts):
    return {"states of the tokens": contexts(rng, encode_contexts, 2)[0]}


def context_mask(rng, encode_contexts):
    return {"mask": contexts(rng, encode_contexts, 4)[1]}


def context_chunks(rng, encode_contexts):
    seed = int(rng.integers(10**6))
    one, all_ = (contexts(np.random.default_rng(seed), encode_contexts, chunk)[0] for chunk in (1, 99))
    return {"the same": close(one, all_), "states": one}


# ---------------------------------------------------------------- log_likelihood
def tokens(rng, log_likelihood, pads=(0, 0, 0), short=False):
    """Return log_likelihood's log_bT of three rows; short: only the first states of a row may be read."""
    import torch

    fid = reader(rng)
    hidden_bLD = torch.tensor(rng.standard_normal((3, 6, 16)), dtype=torch.float32)
    mask_bL = torch.ones(3, 6, dtype=torch.bool)
    if short:
        mask_bL = torch.arange(6) < torch.tensor([[2], [6], [4]])
    labels_bT = torch.tensor(rng.integers(2, 40, (3, 8)))
    labels_bT[torch.arange(8) >= 8 - torch.tensor(pads)[:, None]] = -100
    with torch.no_grad():
        return log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, nullcontext)


def token_value(rng, log_likelihood):
    return {"log p": tokens(rng, log_likelihood)}


def token_pads(rng, log_likelihood):
    return {"log p is 0": tokens(rng, log_likelihood, rng.integers(1, 8, 3)) == 0}


def token_mask(rng, log_likelihood):
    return {"log p": tokens(rng, log_likelihood, short=True)}


# ---------------------------------------------------------------- fused, and each alone
def fused(rng, fused_log_likelihood):
    import torch

    with torch.no_grad():
        return fused_log_likelihood(reader(rng), *states(rng, 2, 3, 6))


def fused_value(rng, fused_log_likelihood):
    return {"log p": fused(rng, fused_log_likelihood)}


def fused_order(rng, fused_log_likelihood):
    fid, (hidden_BKLD, mask_BKL, labels_BT) = reader(rng), states(rng, 2, 3, 6)
    first = fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)
    found = []
    for same in flags(rng):
        passages = hidden_BKLD if same else -hidden_BKLD
        found.append(close(first, fused_log_likelihood(fid, passages.flip(1), mask_BKL.flip(1), labels_BT)))
    return {"the same": found}


def each_value(rng, document_log_likelihood):
    return {"log p": document_log_likelihood(reader(rng), *states(rng, 2, 4, 7), 3)}


def each_chunks(rng, document_log_likelihood):
    fid, (hidden_BKLD, *rest) = reader(rng), states(rng, 2, 4, 7)
    first = document_log_likelihood(fid, hidden_BKLD, *rest, 3)
    found = []
    for i, same in enumerate(flags(rng)):
        passages = hidden_BKLD if same else -hidden_BKLD
        found.append(close(first, document_log_likelihood(fid, passages, *rest, (1, 99)[i % 2])))
    return {"the same": found}


def each_memory(rng, document_log_likelihood):
    from tests.saved import Largest

    words = 3000
    fid, given = reader(rng, words), states(rng, 4, 4, 7, 20)
    with Largest() as largest:
        log_BKT = document_log_likelihood(fid, *given, 1)
    all_logits = 4 * 4 * 20 * words
    # why their number: a function that does nothing needs no memory
    found = {"logits of half of all passages": largest.numel > all_logits / 2}
    return found | {"how many log p": int((log_BKT != 0).sum())}


# ---------------------------------------------------------------- the prior
def learned(rng, retriever_gradient, temperature):
    """Return (the numbers that are shown, the size of both encoders' gradients) in the toy world."""
    import torch
    from toys import ACCELERATOR, toy_training

    encoders = toy_training()[3]
    keys = {"passage_chunk": 4, "top_k": 3, "batch_size": 2, "temperature": temperature}
    cfg = SimpleNamespace(**keys, retriever_loss="emdr2", marginal="sequence")
    batch = {"question_ids": ids_of(rng, 4, 6), "passage_ids": ids_of(rng, 5, 9, 3, 7, 9, 2)}
    batch["labels_BT"] = torch.tensor(rng.integers(2, 40, (2, 3)))
    log_BKT = torch.tensor(-rng.uniform(0.1, 3, (2, 3, 3)), dtype=torch.float32)
    shown = retriever_gradient(batch, log_BKT, encoders, 6, ACCELERATOR, cfg)
    norms = []
    for encoder in encoders.values():
        gradients = [weight.grad.flatten() for weight in encoder.parameters() if weight.grad is not None]
        norms.append(torch.cat([torch.zeros(1), *gradients]).norm())
    return torch.stack(shown), torch.stack(norms)


def prior_value(rng, retriever_gradient):
    return {"loss and entropy": learned(rng, retriever_gradient, 1.0)[0]}


def prior_gradient(rng, retriever_gradient):
    return {"size of the gradients": learned(rng, retriever_gradient, 1.0)[1]}


def prior_temperature(rng, retriever_gradient):
    seed = int(rng.integers(10**6))
    found = [learned(np.random.default_rng(seed), retriever_gradient, t)[0] for t in (0.0, 3.0)]
    return {"root of D": found[0], "3": found[1]}


# ---------------------------------------------------------------- losses
def marginal(rng, retriever_loss, kind, B, K, T, lengths=None, pads=0.0, words=1.0):
    """Return (loss of retriever_loss, scores); pads, words: factors at padding, and elsewhere."""
    import torch

    scores_BK = torch.tensor(rng.standard_normal((B, K)), requires_grad=True)
    log_BKT = torch.tensor(-rng.uniform(0.1, 3, (B, K, T)))
    mask_BT = torch.arange(T) < torch.tensor(lengths or [T] * B)[:, None]
    log_BKT = torch.where(mask_BT[:, None], words, pads) * log_BKT
    return retriever_loss(scores_BK.log_softmax(1), log_BKT, mask_BT, kind), scores_BK


def slope(loss, scores_BK):
    loss.backward()
    return {"loss": loss, "d loss / d scores": scores_BK.grad}


def marginal_token(rng, retriever_loss):
    return slope(*marginal(rng, retriever_loss, "token", 1, 5, 4))


def marginal_sequence(rng, retriever_loss):
    return slope(*marginal(rng, retriever_loss, "sequence", 1, 5, 4))


def marginal_mean(rng, retriever_loss):
    # one passage a question: its prior is 1, and only the means are left
    sizes = {"B": 3, "K": 1, "T": 4, "lengths": [1, 4, 2]}
    return {kind: marginal(rng, retriever_loss, kind, **sizes)[0] for kind in ("token", "sequence")}


def same_with_pads(rng, loss_of):
    """Return where loss_of(rng, pads, words) stays the same: what stands at padding changes, or all."""
    seed, factors = int(rng.integers(10**6)), [1.0] + [1.0 if same else 1.1 for same in flags(rng)]
    losses = [loss_of(np.random.default_rng(seed), 5.0 * i, x).item() for i, x in enumerate(factors)]
    return {"the same": [abs(loss - losses[0]) < 1e-9 for loss in losses[1:]]}


def marginal_pads(rng, retriever_loss):
    found = {}
    for kind in ("token", "sequence"):

        def loss_of(rng, pads, words, kind=kind):
            return marginal(rng, retriever_loss, kind, 2, 3, 4, [2, 3], pads, words)[0]

        found[kind] = same_with_pads(rng, loss_of)["the same"]
    return found


def divergence(rng, kl_loss, pads=0.0, words=1.0, lengths=(4, 4), equal=False):
    """Return (loss of kl_loss, scores) in float64; equal: the prior is what the reader prefers."""
    import torch

    scores_BK = torch.tensor(rng.standard_normal((2, 5)), requires_grad=True)
    log_BKT = torch.tensor(-rng.uniform(0.1, 3, (2, 5, 4)))
    mask_BT = torch.arange(4) < torch.tensor(lengths)[:, None]
    log_BKT = torch.where(mask_BT[:, None], words, pads) * log_BKT
    log_prior_BK = (log_BKT.mean(2) if equal else scores_BK).log_softmax(1)
    return kl_loss(log_prior_BK, log_BKT, mask_BT), scores_BK


def kl_value(rng, kl_loss):
    return slope(*divergence(rng, kl_loss))


def kl_zero(rng, kl_loss):
    losses = [divergence(rng, kl_loss, equal=equal)[0].item() for equal in flags(rng)]
    return {"zero": [abs(loss) < 1e-9 for loss in losses]}


def kl_pads(rng, kl_loss):
    return same_with_pads(rng, lambda rng, *factors: divergence(rng, kl_loss, *factors, (2, 3))[0])


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
