"""Gradient cache against the original code's numbers, the plain step, and what a step keeps alive."""

import gc
import itertools
import weakref

import torch

from tests.toy import close, golden_file
from train_dpr import in_batch_loss
from utils.distributed import chunk_seed
from utils.grad_cache import grad_cache_step


def test_equals_the_original_code():
    """GradCache's loss and gradients on tanh towers, separate and tied, for every pair of chunk sizes."""
    for case in golden_file("grad_cache")["cases"]:
        x = {k: torch.tensor(case[k], dtype=torch.float64) for k in ("q", "p")}
        for question_chunk, passage_chunk in case["chunks"]:
            names = ["w_q", "b_q"] if case["tied"] else ["w_q", "b_q", "w_p", "b_p"]
            w = {k: torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in names}

            def encode(chunk, w=w, tied=case["tied"]):
                side, rows = chunk
                side = "q" if tied else side
                return torch.tanh(rows @ w[f"w_{side}"].T + w[f"b_{side}"])

            q_chunks, p_chunks = x["q"].split(question_chunk), x["p"].split(passage_chunk)
            question_chunks = len(q_chunks)
            chunks = [("q", c) for c in q_chunks] + [("p", c) for c in p_chunks]

            def loss_of(vectors, n=question_chunks, positive=case["positive_idx"]):
                return in_batch_loss(torch.cat(vectors[:n]), torch.cat(vectors[n:]), torch.tensor(positive))

            loss, _ = grad_cache_step(encode, chunks, loss_of, (0,))
            assert abs(loss.item() - case["loss"]) < 1e-8
            for name in names:
                assert close(w[name].grad, torch.tensor(case["grads"][name], dtype=torch.float64), 1e-7), name


def linear(chunks, noise=torch.rand, seed=(7,), cached=True):
    """One step of a linear encoder whose "dropout" is noise(shape) -> (gradient, vectors of all passes)."""
    weight_DD = torch.eye(4, requires_grad=True)
    passes = []

    def encode(x_bD):
        passes.append((x_bD @ weight_DD) * noise(x_bD.shape))
        return passes[-1]

    def loss_of(vectors):
        return (torch.cat(vectors).square().sum(),)

    grad_cache_step(encode, chunks, loss_of, seed, cached=cached)
    return weight_DD.grad, passes


CHUNKS = [torch.ones(2, 4), torch.ones(3, 4)]


def test_dropout_is_replayed():
    """With noise in them two passes give the gradient of one graph; another step draws other masks."""
    wanted, passes = linear(CHUNKS, cached=False)
    assert len(passes) == len(CHUNKS)
    got, _ = linear(CHUNKS)
    assert close(got, wanted)
    other_step, _ = linear(CHUNKS, seed=(8,))
    assert not close(other_step, wanted, 0.1)


def test_without_a_replay_the_gradient_is_another():
    """Negative control: noise that does not come from torch's seeded generator differs between the passes."""
    gradient, passes = linear(CHUNKS)
    assert all(torch.equal(first, second) for first, second in zip(passes[:2], passes[2:], strict=True))
    own = torch.Generator().manual_seed(0)
    other, passes = linear(CHUNKS, lambda shape: torch.rand(shape, generator=own))
    assert not torch.equal(passes[0], passes[2]) and not close(gradient, other, 0.1)


def test_every_chunk_has_masks_of_its_own():
    """The same chunk twice in a step, and the same rows on two devices or in two steps: other vectors."""
    _, passes = linear([torch.ones(2, 4)] * 2)
    assert not torch.equal(passes[0], passes[1])
    grid = itertools.product(range(2), range(5), range(3), range(5))  # seed, step, device, chunk
    seeds = [chunk_seed(cell[:3], cell[3]) for cell in grid]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert chunk_seed((1, 2, 3), 4) == chunk_seed((1, 2, 3), 4)


def test_one_graph_lives_at_a_time_and_none_is_returned():
    """When the cached step encodes a chunk, the graph of the chunk before it is gone; the loss has none."""
    weight_DD = torch.eye(4, requires_grad=True)
    graphs, alive = [], []

    def encode(x_bD):
        gc.collect()
        alive.append(sum(graph() is not None for graph in graphs))
        vectors_bD = x_bD @ weight_DD
        if vectors_bD.requires_grad:
            graphs.append(weakref.ref(vectors_bD))
        return vectors_bD

    chunks = [torch.ones(2, 4)] * 3
    loss, *_ = grad_cache_step(encode, chunks, lambda vectors: (torch.cat(vectors).sum(),), (0,))
    assert len(graphs) == 3 and alive == [0] * 6
    assert not loss.requires_grad
