"""
Assignment 2, the gradient cache: the points, and the drivers (a1.py says what these are).
"""

import itertools
from types import SimpleNamespace

from child import tasks

SHIP = ["train_dpr.py", "tests/toy.py", "config/train_gcdpr_nq.yaml"]
DROP = []
SHOWN = ["torch.nn.ModuleDict(encoders).parameters()"]
TASKS = tasks("""
utils/grad_cache.py:grad_cache_step
  12 cache_gradient   the gradient of one graph over all chunks, cached or not | the head of the file
   9 cache_replay     both passes drop the same units | the docstring: seed
   5 cache_masks      each chunk and each seed has masks of its own, the same seed the same | chunk_seed
   6 cache_memory     the graph of a chunk is gone before the next chunk is read | paper, Sec. 3
   3 cache_values     what loss_of returned, without a graph | the docstring
   3 cache_backward   `backward` takes the place of .backward() where an encoder is behind
utils/distributed.py:chunk_seed
   3 seeds_differ     other seeds for every step, device and chunk | the docstring
   2 seeds_fit        ints from 0 to 2**63 - 1, for large numbers too | the docstring
utils/encoder.py:in_chunks
   4 chunks_order     the rows of all chunks, indexed by the places, are in the given order
   2 chunks_size      all rows, `size` in a chunk but for the last | the docstring
   2 chunks_padding   rows of like length are together | the docstring: why
train_dpr.py:add_gradient
   5 wire_gradient    the gradient of the batch, every question against its own passages | make_batch
   2 wire_scale       the gradient is multiplied by gradient_scale | config/train_dpr_nq.yaml
   2 wire_shown       the loss that is returned is not, and has no graph | the docstring
   2 wire_mask        the batch's `excluded` pairs reach the loss | in_batch_loss
   3 wire_seed        other masks in another step and on another device, the same in the same
together
   5 four_steps       all your functions in one training: the losses and weights of 4 steps
""")

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "plain": "A batch has {q} questions and {p} passages. Chunks have {c} rows of one kind. How many forward "
    "passes does a step need without the cache?",
    "cached": "And with the cache?",
    "rows": "How many rows have a graph at the same time in a cached step, at most?",
    "accumulated": "Somebody adds up the gradients of batches of {c} questions in its place, without hard "
    "negatives. How many negatives has each question then?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    chunk = int(rng.integers(3, 9))
    questions = int(rng.integers(20, 60))
    return {"q": questions, "p": questions * int(rng.integers(2, 4)), "c": chunk}


# ---------------------------------------------------------------- grad_cache_step
def toy(rng, rate=0.0):
    """Return (weight, encode, chunks of row numbers): one layer with dropout behind it, in float64."""
    import torch

    weight_DD = torch.tensor(rng.standard_normal((6, 6)), requires_grad=True)
    x_ND = torch.tensor(rng.standard_normal((8, 6)))

    def encode(rows):
        return torch.nn.functional.dropout(torch.tanh(x_ND[rows] @ weight_DD), rate)

    return weight_DD, encode, [[0, 1, 2], [3, 4, 5], [6, 7]]


def coupled(vectors):
    """A loss in which every row meets every other; the second value is the sum of all entries."""
    import torch

    z_ND = torch.cat(list(vectors))
    return torch.logsumexp(z_ND @ z_ND.T, 1).sum(), z_ND.detach().sum()


def cache_gradient(rng, grad_cache_step):
    weight_DD, encode, chunks = toy(rng)
    found = {}
    for cached in (True, False):
        weight_DD.grad = None
        grad_cache_step(encode, chunks, coupled, (int(rng.integers(99)),), cached=cached)
        found[f"gradient, cached {cached}"] = weight_DD.grad.clone()
    return found


def cache_values(rng, grad_cache_step):
    _, encode, chunks = toy(rng)
    loss, total = grad_cache_step(encode, chunks, coupled, (0,))
    return {"loss": loss, "second value": total, "has a graph": bool(loss.requires_grad)}


def cache_replay(rng, grad_cache_step):
    import torch

    rate = 0.4
    weight_DD, encode, chunks = toy(rng, rate)
    seen = []

    def loss_of(vectors):
        seen.append(torch.cat([x.detach() for x in vectors]))
        return coupled(vectors)

    grad_cache_step(encode, chunks, loss_of, (3, 1, 0))
    (vectors_ND,) = seen
    # the gradient for the very units that the loss saw dropped
    leaf_ND = vectors_ND.clone().requires_grad_()
    coupled([leaf_ND])[0].backward()
    kept_ND = (vectors_ND != 0).double() / (1 - rate)
    rows = [row for chunk in chunks for row in chunk]
    plain_ND = plain_vectors(encode, rows)
    wanted_DD = torch.autograd.grad((plain_ND * kept_ND * leaf_ND.grad).sum(), weight_DD)[0]
    factor = weight_DD.grad.norm() / wanted_DD.norm()
    gap = (wanted_DD * factor - weight_DD.grad).norm() / weight_DD.grad.norm()
    found = {"some units are dropped": bool((kept_ND == 0).any()), "same units": bool(gap < 1e-9)}
    return found | {"factor": round(float(factor), 6)}


def plain_vectors(encode, rows):
    """Return the vectors of an encoder of toy() without its dropout."""
    from unittest import mock

    import torch

    with mock.patch.object(torch.nn.functional, "dropout", lambda x, rate: x):
        return encode(rows)


def cache_masks(rng, grad_cache_step):
    import torch

    _, encode, _ = toy(rng, 0.4)
    seen = []

    def loss_of(vectors):
        seen.append([x.detach().clone() for x in vectors])
        return coupled(vectors)

    for seed in ((1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0)):
        grad_cache_step(encode, [[0, 1], [0, 1]], loss_of, seed)
    first, other_step, other_device, again = seen
    return {
        "chunks of one step alike": torch.equal(*first),
        "two steps alike": torch.equal(first[0], other_step[0]),
        "two devices alike": torch.equal(first[0], other_device[0]),
        "the same seed alike": torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]),
    }


def cache_memory(rng, grad_cache_step):
    import gc
    import weakref

    _, encode, _ = toy(rng)
    graphs, alive = [], []

    def counted(rows):
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))
        vectors_bD = encode(rows)
        if vectors_bD.requires_grad:
            graphs.append(weakref.ref(vectors_bD))
        return vectors_bD

    grad_cache_step(counted, [[i] for i in range(8)], coupled, (0,))
    return {
        "a graph lives while the next chunk is read": max(alive) > 0,
        "chunks have a graph": len(graphs) > 0,
    }


def cache_backward(rng, grad_cache_step):
    weight_DD, encode, chunks = toy(rng)
    norms = []
    for factor in (1, 4):
        weight_DD.grad = None
        grad_cache_step(encode, chunks, coupled, (0,), lambda scalar, f=factor: (f * scalar).backward())
        norms.append(float(weight_DD.grad.norm()))
    return {"four times the gradient": bool(abs(norms[1] / norms[0] - 4) < 1e-9)}


# ---------------------------------------------------------------- chunk_seed
def seeds_differ(rng, chunk_seed):
    start = int(rng.integers(1000))
    grid = itertools.product((start, start + 1), range(12), range(3), range(12))
    cells = [*grid]  # seed, step, device, chunk
    seeds = [int(chunk_seed(cell[:3], cell[3])) for cell in cells]
    again = [int(chunk_seed(cell[:3], cell[3])) for cell in cells]
    return {"how many differ": len(set(seeds)), "the same again": seeds == again}


def seeds_fit(rng, chunk_seed):
    large = int(rng.integers(2**31, 2**32))
    cells = [(a, b, c) for a in (0, 7, large) for b in (0, 10**6) for c in range(8)]
    seeds = [chunk_seed((*cell, large), i) for cell in cells for i in (0, 1, 3000)]
    return {"ints that fit": sum(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)}


# ---------------------------------------------------------------- in_chunks
def chunks_of(rng, in_chunks, size=5):
    """Return (chunks, places) of 12 id lists of different lengths; the first id tells a list from others."""
    lengths = rng.permutation([2, 2, 3, 4, 4, 6, 7, 9, 9, 12, 15, 15]).tolist()
    firsts = rng.permutation(100)[:12].tolist()
    ids = [[first] * length for first, length in zip(firsts, lengths, strict=True)]
    chunks, places = in_chunks(ids, size)
    return [list(chunk) for chunk in chunks], [int(place) for place in places]


def chunks_order(rng, in_chunks):
    chunks, places = chunks_of(rng, in_chunks)
    rows = [row for chunk in chunks for row in chunk]
    return {"rows in the given order": [rows[place] for place in places]}


def chunks_size(rng, in_chunks):
    chunks, _ = chunks_of(rng, in_chunks)
    return {
        "sizes": [len(chunk) for chunk in chunks],
        "rows": sorted(row for chunk in chunks for row in chunk),
    }


def chunks_padding(rng, in_chunks):
    padding = []
    for size in (2, 3, 4):
        chunks, _ = chunks_of(rng, in_chunks, size)
        padding.append(sum(max(map(len, chunk)) * len(chunk) - sum(map(len, chunk)) for chunk in chunks))
    return {"tokens of padding": padding}


# ---------------------------------------------------------------- add_gradient
def step_of(add_gradient, batch_of=None, step=0, rank=0, **changes):
    """Return (loss, correct, the gradient of both encoders) of add_gradient in the toy world."""
    import torch
    from toys import ACCELERATOR, toy_training

    from train_dpr import make_batch

    cfg, questions, corpus, encoders = toy_training(grad_cache=True, **changes)
    batch = make_batch(0, questions, corpus, encoders, cfg)
    if batch_of:
        batch = batch_of(batch)
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": rank})
    loss, correct = add_gradient(batch, encoders, accelerator, cfg, step)
    weights = torch.nn.ModuleDict(encoders).parameters()
    gradient = torch.cat([weight.grad.flatten() for weight in weights])
    return loss, correct, gradient


def wire_gradient(rng, add_gradient):
    import torch

    def without_pairs(batch):
        return batch | {"excluded": torch.zeros(2, 0, dtype=torch.long)}

    seed = int(rng.integers(1000))
    _, correct, gradient = step_of(add_gradient, without_pairs, seed=seed, gradient_scale=0.5)
    # why sums of parts: what comes back stays small, and every part tells a wrong order
    return {"gradient": gradient[: len(gradient) // 64 * 64].reshape(64, -1).norm(dim=1), "correct": correct}


def wire_scale(rng, add_gradient):
    seed = int(rng.integers(1000))
    norms = [float(step_of(add_gradient, seed=seed, gradient_scale=s)[2].norm()) for s in (1.0, 0.125)]
    return {"ratio": round(norms[1] / norms[0], 4)}


def wire_shown(rng, add_gradient):
    seed = int(rng.integers(1000))
    losses = [step_of(add_gradient, seed=seed, gradient_scale=s)[0] for s in (1.0, 0.125)]
    ratio = round(float(losses[1] / losses[0]), 4)
    return {"ratio of the losses": ratio, "has a graph": bool(losses[0].requires_grad)}


def wire_mask(rng, add_gradient):
    import torch

    seed = int(rng.integers(1000))

    def without_negatives(batch):
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
        pairs = torch.stack([rows.flatten(), columns.flatten()])
        return batch | {"excluded": pairs[:, pairs[1] != 2 * pairs[0]]}

    loss, *_ = step_of(add_gradient, without_negatives, seed=seed)
    return {"the loss without any negative is 0": bool(abs(float(loss)) < 1e-6)}


def wire_seed(rng, add_gradient):
    import torch

    seed = int(rng.integers(1000))
    cells = [(0, 0), (0, 0), (1, 0), (0, 1)]  # (step, device)
    found = [step_of(add_gradient, step=s, rank=d, seed=seed, dropout=0.3) for s, d in cells]
    first, again, step, device = (gradient for _, _, gradient in found)
    return {
        "the same alike": torch.equal(first, again),
        "two steps alike": torch.equal(first, step),
        "two devices alike": torch.equal(first, device),
    }


# ---------------------------------------------------------------- together
def four_steps(rng):
    from toys import train

    return train(4, seed=int(rng.integers(1000)), grad_cache=True, question_chunk=2, passage_chunk=3)
