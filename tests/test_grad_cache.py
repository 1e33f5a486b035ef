"""
Gradient cache against three oracles: the original code's numbers, plain autograd, and a count of saved bytes.
"""

import json
from pathlib import Path

import pytest
import torch

import utils.grad_cache
from tests.saved import Saved
from tests.toy import INPUTS, bert, tokenizer
from train_dpr import in_batch_loss
from utils.encoder import Encoder, collate, tokenize_passages, tokenize_questions
from utils.grad_cache import grad_cache_step

GOLDEN = Path(__file__).parent / "golden"


def close(a, b, tolerance=1e-5):
    """Largest difference relative to the largest entry of b."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


def test_equals_the_original_code():
    """
    Loss and every gradient equal GradCache's on tanh towers, separate and tied, for every pair of chunk
    sizes.
    """
    for case in json.loads((GOLDEN / "grad_cache.json").read_text())["cases"]:
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
    return towers, questions, tokenize_passages(towers["passage"], texts)


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


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2), (4, 4), (8, 8)])
def test_any_chunk_size_gives_the_gradient_of_the_whole_batch(world, sizes):
    """Without dropout the chunks do not matter: cached gradients equal one unchunked pass."""
    set_dropout(world, 0.0)
    loss, wanted = gradients(world, 99, 99, cached=False)
    cached_loss, got = gradients(world, *sizes, cached=True)
    assert abs(loss - cached_loss) < 1e-5 and close(got, wanted)


def test_dropout_is_replayed(world):
    """With dropout on, two passes equal one graph over the same chunks: the masks are drawn again alike."""
    set_dropout(world, 0.1)
    _, wanted = gradients(world, 3, 2, cached=False)
    _, got = gradients(world, 3, 2, cached=True)
    assert close(got, wanted)
    _, other_step = gradients(world, 3, 2, cached=True, seed=(8,))
    assert not close(other_step, wanted, 0.1), "another step must draw other masks"


def test_without_the_replay_it_is_wrong(world, monkeypatch):
    """Negative control: forget the seed between the passes, and the gradient is off by more than a tenth."""
    set_dropout(world, 0.1)
    _, wanted = gradients(world, 3, 2, cached=False)
    fresh = iter(range(10**6))
    monkeypatch.setattr(utils.grad_cache, "chunk_seed", lambda seed, i: next(fresh))
    _, got = gradients(world, 3, 2, cached=True)
    assert not close(got, wanted, 0.1)


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
