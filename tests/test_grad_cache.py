"""
Gradient cache against three oracles: the original code's numbers, plain autograd, and a count of saved bytes.
"""

import gc
import itertools
import weakref

import pytest
import torch

from tests.saved import Saved
from tests.toy import INPUTS, bert, close, golden_file, tokenizer
from train_dpr import in_batch_loss
from utils.data import Passage
from utils.distributed import chunk_seed
from utils.encoder import Encoder, collate, tokenize_passages, tokenize_questions
from utils.grad_cache import grad_cache_step


def test_equals_the_original_code():
    """
    Loss and every gradient equal GradCache's on tanh towers, separate and tied, for every pair of chunk
    sizes.
    """
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    words = tokenizer(tmp_path_factory.mktemp("toy"))
    towers = {}
    for kind in ("question", "passage"):
        towers[kind] = Encoder(bert(len(words), kind == "passage"), words, INPUTS | {"role": kind}).train()
    questions = tokenize_questions(
        towers["question"], ["which colour has the river of paris", "oslo", "a", "tower"]
    )
    texts = [
        ("paris", "the old river is red."),
        ("oslo", "it stands in oslo."),
        ("", "green"),
        ("rome", "new tower"),
    ]
    passages = [Passage("", title, text) for title, text in texts]
    return towers, questions, tokenize_passages(towers["passage"], passages)


def gradients(world, question_chunk, passage_chunk, cached, repeat=1, seed=(7,)):
    """One step on the toy towers -> (loss, flat gradient of all parameters)."""
    towers, questions, passages = world
    questions, passages = questions * repeat, passages * repeat
    q = [("question", questions[i : i + question_chunk]) for i in range(0, len(questions), question_chunk)]
    p = [("passage", passages[i : i + passage_chunk]) for i in range(0, len(passages), passage_chunk)]
    for tower in towers.values():
        tower.zero_grad(set_to_none=True)

    def loss_of(v):
        return in_batch_loss(torch.cat(v[: len(q)]), torch.cat(v[len(q) :]), torch.arange(len(questions)))

    def encode(chunk):
        return towers[chunk[0]](**collate(towers[chunk[0]], chunk[1]))

    loss, _ = grad_cache_step(encode, q + p, loss_of, seed, cached=cached)
    flat = [x.grad.flatten() for t in towers.values() for x in t.parameters() if x.grad is not None]
    return loss, torch.cat(flat)


def set_dropout(world, p):
    for tower in world[0].values():
        for module in tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = p


def test_dropout_is_replayed(world):
    """With dropout on, two passes equal one graph over the same chunks: the masks are drawn again alike."""
    set_dropout(world, 0.1)
    _, wanted = gradients(world, 3, 2, cached=False)
    _, got = gradients(world, 3, 2, cached=True)
    assert close(got, wanted)
    _, other_step = gradients(world, 3, 2, cached=True, seed=(8,))
    assert not close(other_step, wanted, 0.1), "another step must draw other masks"


def linear(chunks, noise):
    """One cached step of a linear encoder whose "dropout" is noise() -> (gradient, vectors of all passes)."""
    weight_DD = torch.eye(4, requires_grad=True)
    passes = []

    def encode(x_bD):
        passes.append((x_bD @ weight_DD) * noise(x_bD.shape))
        return passes[-1]

    grad_cache_step(encode, chunks, lambda vectors: (torch.cat(vectors).square().sum(),), (7,))
    return weight_DD.grad, passes


def test_without_a_replay_the_gradient_is_another():
    """Negative control: noise that does not come from torch's seeded generator differs between the passes."""
    chunks = [torch.ones(2, 4), torch.ones(3, 4)]
    own = torch.Generator().manual_seed(0)
    gradient, passes = linear(chunks, lambda shape: torch.rand(shape))
    assert all(torch.equal(first, second) for first, second in zip(passes[:2], passes[2:], strict=True))
    other, passes = linear(chunks, lambda shape: torch.rand(shape, generator=own))
    assert not torch.equal(passes[0], passes[2]) and not close(gradient, other, 0.1)


def test_every_chunk_has_masks_of_its_own():
    """
    The same chunk twice in a step, and the same rows on two devices or in two steps: other vectors each time.
    """
    _, passes = linear([torch.ones(2, 4)] * 2, torch.rand)
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


def test_activation_memory_does_not_grow_with_the_batch(world):
    """
    Saved bytes: constant from batch 16 to 64 with the cache (but for the score matrix), four times as many
    without.
    """
    set_dropout(world, 0.1)
    peak = {}
    for cached in (True, False):
        for repeat in (4, 16):
            with Saved() as saved:
                gradients(world, 4, 4, cached, repeat)
            peak[cached, repeat] = saved.peak
    assert peak[True, 16] < 1.1 * peak[True, 4], peak
    assert peak[False, 16] > 3.5 * peak[False, 4], peak
    assert peak[True, 16] < peak[False, 16] / 8, peak
