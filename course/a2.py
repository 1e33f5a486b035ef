"""
Assignment 2, the gradient cache: the points, and the drivers (a1.py says what these are).
"""

import itertools

import numpy as np
from child import tasks

SHIP = ["train_dpr.py", "doc2embedding.py", "test_dpr.py", "tests/toy.py", "config/train_gcdpr_nq.yaml"]
DROP = []
SHOWN = ["torch.nn.ModuleDict(encoders).parameters()"]
TASKS = tasks("""
utils/grad_cache.py:grad_cache_step
  12 cache_gradient   the gradient of one graph over all chunks is added, cached or not | the head of the file
   8 cache_replay     both passes drop the same units | the docstring: seed
   4 cache_masks      each chunk and each seed has masks of its own, the same seed the same | chunk_seed
   5 cache_memory     the graph of a chunk is gone before the next chunk is read | paper, Sec. 3
   3 cache_plain      without the cache: the same masks, each chunk is read once | the docstring: cached
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
   4 wire_gradient    the gradient of the batch, every question against its own passages | make_batch
   1 wire_adds        it is added to the gradient that is there already | the docstring
   2 wire_scale       it is multiplied by gradient_scale | config/train_dpr_nq.yaml
   1 wire_shown       the loss that is returned is not, and has no graph | the docstring
   1 wire_mask        the batch's `excluded` pairs reach the loss | in_batch_loss
   2 wire_seed        other masks in another step and on another device, the same in the same
   2 wire_devices     of two devices each holds it, a shared encoder's too | utils/distributed.py
   1 wire_cache       each chunk is read twice, without a graph first; once where grad_cache is false
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
    import torch

    weight_DD, encode, chunks = toy(rng)
    found = {}
    for cached in (True, False):
        weight_DD.grad = torch.ones_like(weight_DD)
        grad_cache_step(encode, chunks, coupled, (int(rng.integers(99)),), cached=cached)
        found[f"gradient, cached {cached}"] = weight_DD.grad.clone()
    return found


def cache_values(rng, grad_cache_step):
    _, encode, chunks = toy(rng)
    found = [grad_cache_step(encode, chunks, coupled, (0,), cached=cached) for cached in (True, False)]
    numbers = [[loss.item(), total.item()] for loss, total in found]
    return {"loss, second value": np.array(numbers), "have a graph": [x.requires_grad for x, _ in found]}


def cache_replay(rng, grad_cache_step):
    import torch

    rate = 0.4
    weight_DD, encode, chunks = toy(rng, rate)
    times = float(rng.uniform(2, 9))
    seen = []

    def loss_of(vectors):
        seen.append(torch.cat([x.detach() for x in vectors]))
        return times * coupled(vectors)[0], 0

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
    return found | {"a loss of so many times": round(float(factor), 6)}


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
        seen.append(torch.stack([x.detach() for x in vectors]).tolist())
        return coupled(vectors)

    # another step, another device, another seed of the training, and some of them again
    seeds = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]
    for i in rng.permutation([0, 0, 1, 1, 2, 2, 3]):
        grad_cache_step(encode, [[0, 1], [0, 1]], loss_of, seeds[i])
    return {
        "chunks of one step alike": [one == other for one, other in seen],
        "alike with": [seen.index(vectors) for vectors in seen],
    }


def cache_memory(rng, grad_cache_step):
    import gc
    import weakref

    _, encode, _ = toy(rng)
    graphs, alive, rows_with_graph = [], [], []

    def counted(rows):
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))
        vectors_bD = encode(rows)
        if vectors_bD.requires_grad:
            graphs.append(weakref.ref(vectors_bD))
            rows_with_graph.append(len(rows))
        return vectors_bD

    grad_cache_step(counted, [[0] * size for size in rng.integers(1, 9, 8)], coupled, (0,))
    found = {"graphs that live while a chunk is read": max(alive)}
    return found | {"rows of the chunks that had a graph": sorted(rows_with_graph)}


def cache_plain(rng, grad_cache_step):
    _, encode, _ = toy(rng, 0.4)
    seen, passes = [], []

    def counted(rows):
        passes.append(rows)
        return encode(rows)

    def loss_of(vectors):
        seen.append([x.tolist() for x in vectors])
        return coupled(vectors)

    chunks = [[i % 8] for i in range(rng.integers(5, 60))]
    grad_cache_step(encode, chunks, loss_of, (4, 2))
    grad_cache_step(counted, chunks, loss_of, (4, 2), cached=False)
    return {"the same masks": seen[0] == seen[1], "passes": len(passes)}


def cache_backward(rng, grad_cache_step):
    weight_DD, encode, chunks = toy(rng)
    times = float(rng.uniform(2, 9))
    found = []
    for cached in (True, False):
        norms = []
        for factor in (1, times):
            weight_DD.grad = None
            backward = lambda scalar, f=factor: (f * scalar).backward()  # noqa: E731
            grad_cache_step(encode, chunks, coupled, (0,), backward, cached)
            norms.append(float(weight_DD.grad.norm()))
        found.append(round(norms[1] / norms[0], 6))
    return {"times the gradient": found}


# ---------------------------------------------------------------- chunk_seed
def seeds_differ(rng, chunk_seed):
    start = int(rng.integers(1000))
    steps, devices, chunks = rng.integers((11, 2, 11), (16, 6, 30)).tolist()
    cells = [*itertools.product((start, start + 1), range(steps), range(devices), range(chunks))]
    seeds = [int(chunk_seed(cell[:3], cell[3])) for cell in cells]
    again = [int(chunk_seed(cell[:3], cell[3])) for cell in cells]
    return {"how many differ": len(set(seeds)), "the same again": seeds == again}


def seeds_fit(rng, chunk_seed):
    large = int(rng.integers(2**31, 2**32))
    cells = [(a, b, c) for a in (0, 7, large) for b in (0, 10**6) for c in range(rng.integers(3, 60))]
    seeds = [chunk_seed((*cell, large), i) for cell in cells for i in (0, 1, 3000)]
    fit = [seed for seed in seeds if isinstance(seed, int) and 0 <= seed < 2**63]
    return {"ints that fit": len(fit), "all the same": len({*fit}) == 1}


# ---------------------------------------------------------------- in_chunks
def chunks_of(rng, in_chunks, size=5):
    """Return (chunks, places) of 12 id lists of different lengths; the first id tells a list from others."""
    lengths = rng.integers(2, 16, 12).tolist()
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


def wire_gradient(rng, add_gradient):
    import torch
    from toys import in_parts, step_of

    def without_pairs(batch):
        return batch | {"excluded": torch.zeros(2, 0, dtype=torch.long)}

    seed = int(rng.integers(1000))
    _, correct, gradient = step_of(add_gradient, without_pairs, seed=seed, gradient_scale=0.5)
    return {"gradient": in_parts(gradient), "correct": correct}


def wire_adds(rng, add_gradient):
    from toys import step_of

    seed, before = rng.integers((0, 2), (1000, 99)).tolist()
    (*_, alone), (*_, added) = (step_of(add_gradient, seed=seed, before=x) for x in (None, before))
    return {"was there already": [round(float(x), 2) for x in (added - alone).aminmax()]}


def wire_scale(rng, add_gradient):
    from toys import step_of

    seed, scale = int(rng.integers(1000)), float(rng.uniform(0.1, 0.9))
    norms = [float(step_of(add_gradient, seed=seed, gradient_scale=s)[2].norm()) for s in (1.0, scale)]
    return {"ratio": round(norms[1] / norms[0], 4)}


def wire_shown(rng, add_gradient):
    from toys import one_text, step_of

    batch_of = one_text(rng)
    losses = [step_of(add_gradient, batch_of, gradient_scale=scale)[0] for scale in (1.0, 0.125)]
    return {
        "losses": [round(float(loss), 5) for loss in losses],
        "has a graph": bool(losses[0].requires_grad),
    }


def wire_mask(rng, add_gradient):
    from toys import one_text, step_of

    return {"loss": step_of(add_gradient, one_text(rng))[0]}


def wire_seed(rng, add_gradient):
    from toys import step_of

    options = {"seed": int(rng.integers(1000)), "dropout": 0.3, "batch_size": 4}
    cells = [(0, 0), (1, 0), (0, 1)]  # (step, device)
    found = []
    for i in rng.permutation([0, 0, 0, 1, 1, 2]):
        found.append(step_of(add_gradient, None, *cells[i], **options)[2].tolist())
    return {"alike with": [found.index(gradient) for gradient in found]}


def wire_devices(rng, add_gradient):
    from toys import in_order, in_parts, step_of, toy_parts, two_devices

    toy_parts()  # read once for both devices
    seed = int(rng.integers(1000))

    def work(rank):
        options = {"rank": rank, "seed": seed}
        steps = [step_of(add_gradient, in_order, shared=shared, **options) for shared in (False, True)]
        return {name: in_parts(step[2]) for name, step in zip(("two", "one"), steps, strict=True)}

    found = two_devices(work)
    return {f"{name} encoder(s), device {rank}": found[rank][name] for rank in (0, 1) for name in found[rank]}


def wire_cache(rng, add_gradient):
    from unittest import mock

    from toys import step_of

    from utils.encoder import Encoder

    forward = Encoder.forward
    question_chunk, passage_chunk = rng.integers(1, 7, 2).tolist()
    sizes = {"question_chunk": question_chunk, "passage_chunk": passage_chunk}
    found = {}
    for cached in (True, False):
        rows = {True: [], False: []}

        def counted(encoder, input_ids, rows=rows, **inputs):
            vectors_bD = forward(encoder, input_ids, **inputs)
            rows[vectors_bD.requires_grad].append(len(input_ids))
            return vectors_bD

        with mock.patch.object(Encoder, "forward", counted):
            step_of(add_gradient, grad_cache=cached, **sizes)
        found[f"rows read without a graph, grad_cache {cached}"] = sorted(rows[False])
        found[f"rows read with a graph, grad_cache {cached}"] = sorted(rows[True])
    return found


# ---------------------------------------------------------------- together
def four_steps(rng):
    from toys import train

    return train(4, seed=int(rng.integers(1000)), grad_cache=True, question_chunk=2, passage_chunk=3)
