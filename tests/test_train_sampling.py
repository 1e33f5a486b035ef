"""What RocketQA and ANCE-Tele add to the trainer: rotating negatives, a batch of chunks, an early stop."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.processes import run
from tests.saved import Saved
from tests.test_train_dpr import ACCELERATOR, cases, config, decoded, flat_gradient, parts, rows
from tests.toy import make_world
from train_dpr import (
    TOWERS,
    add_gradient,
    draw_passages,
    in_batch_loss,
    load_towers,
    make_batch,
    rotating_negatives,
)
from utils.data import Corpus, read_questions, read_training
from utils.encoder import collate, embed, tokenize_passages
from utils.plumbing.config import UserError
from utils.plumbing.weights import load_encoder, save_encoder

torch.set_num_threads(1)  # why: threads that wait for each other take seconds on a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# ---------------------------------------------------------------- which negatives
def test_the_window_equals_ance_teles():
    """
    Positive and negatives of an (item, epoch) are those of the original DenseTrainDataset. Where it has too
    few negatives and draws some twice, ours takes each once.
    """
    exact, short = 0, 0
    for case in cases("train_sampling"):
        if case["negative_passage_no_shuffle"]:  # no published recipe sets it
            continue
        cfg = SimpleNamespace(
            seed=case["seed"],
            negatives=case["train_n_passages"] - 1,
            shuffle_positives=not case["positive_passage_no_shuffle"],
            rotate_negatives=True,
        )
        pool = {"positives": [*range(case["n_positives"])], "negatives": [*range(case["n_negatives"])]}
        positive, *negatives = draw_passages(pool, case["item"], int(case["epoch"]), cfg)
        assert positive == case["positive"], case
        if case["n_negatives"] < cfg.negatives:
            assert sorted(negatives) == pool["negatives"] and len(case["negatives"]) == cfg.negatives
            short += 1
        else:
            assert negatives == case["negatives"], case
            exact += 1
    assert (exact, short) == (95, 6)


def test_no_negative_comes_back_before_all_were_seen():
    """
    MS MARCO, episode 3: in 3 epochs a question meets 93 different ones of its 180 negatives; drawn anew each
    epoch, as DPR does, some would be met twice. Five epochs of 2 of 5 show each exactly twice.
    """
    seen = [i for epoch in range(3) for i in rotating_negatives(180, 31, 42, epoch)]
    assert len(set(seen)) == len(seen) == 93
    fresh = SimpleNamespace(seed=42, negatives=31, shuffle_positives=False, rotate_negatives=False)
    pool = {"positives": ["gold"], "negatives": [*range(180)]}
    assert len({i for epoch in range(3) for i in draw_passages(pool, 0, epoch, fresh)[1:]}) < 93
    counts = np.bincount([i for epoch in range(5) for i in rotating_negatives(5, 2, 42, epoch)])
    assert (
        counts.tolist() == [2] * 5
        and rotating_negatives(0, 3, 42, 1) == []
        and rotating_negatives(3, 0, 42, 1) == []
    )


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 11])
def test_the_label_is_right_for_any_number_of_negatives(world, negatives, rotate):
    """
    Passages as one-hot vectors, questions as the vector of their own passage: every label scores highest, and
    the loss is that of no second copy, also where questions have 0, 2 or 11 negatives.
    """
    cfg, train, corpus, towers = parts(world, negatives=negatives, rotate_negatives=rotate)
    ids = [p for example in train for p in example["positives"]]
    for n, example in enumerate(train):
        example["negatives"] = [ids[(n + 1 + j) % 40] for j in range((0, 2, 11)[n % 3])]
    for step in (0, 7):
        batch = make_batch(step, train, corpus, towers, cfg)
        texts = {
            "question": decoded(towers["query_encoder"], batch["question_chunks"], batch["question_places"]),
            "passage": decoded(towers["doc_encoder"], batch["passage_chunks"], batch["passage_places"]),
        }
        facts = {kind: [re.search(r"(\w+) of (\w+)", t)[0] for t in ts] for kind, ts in texts.items()}
        assert len(facts["passage"]) == 8 * (1 + negatives)
        place = {fact: i for i, fact in enumerate(sorted(set(facts["passage"])))}
        q_QD, p_ND = (30.0 * torch.eye(len(place))[[place[f] for f in facts[kind]]] for kind in texts)
        loss, correct = in_batch_loss(q_QD, p_ND, batch["positive_Q"], batch["excluded"])
        assert correct == 8 and loss < 1e-6


# ---------------------------------------------------------------- RocketQA's batch on one device
def test_a_big_batch_needs_the_memory_of_one_chunk(world):
    """
    512 questions and 1024 passages, what RocketQA puts on a GPU, in chunks of 64: the cached step keeps the
    activations of one chunk, the plain step those of all, for the same gradient.
    """
    found, peak = {}, {}
    for name, cache in (("plain", False), ("cached", True)):
        cfg, train, corpus, towers = parts(
            world, grad_cache=cache, batch_size=512, question_chunk=64, passage_chunk=64,
            token_types="segments", layer_norm_epsilon=1e-5,
        )  # fmt: skip
        batch = make_batch(0, train * 13, corpus, towers, cfg)
        with Saved() as saved:
            add_gradient(batch, towers, ACCELERATOR, cfg, 0)
        found[name], peak[name] = flat_gradient(towers), saved.peak
    with Saved() as one:  # the longest rows come last
        towers["doc_encoder"](**collate(towers["doc_encoder"], batch["passage_chunks"][-1]))
    assert peak["cached"] < 1.1 * one.peak and peak["plain"] > 15 * peak["cached"], (peak, one.peak)
    close = (found["cached"] - found["plain"]).abs().max() / found["plain"].abs().max()
    assert close < 1e-5


# ---------------------------------------------------------------- ERNIE's layer norm
def test_layer_norm_epsilon_is_kept_with_the_weights(world, tmp_path):
    """
    1e-5 in the place of 1e-12 gives other vectors; saved and loaded again, without a word about it, the same.
    """
    vectors = {}
    for epsilon in (0.0, 1e-5):
        cfg, _ = config(world, layer_norm_epsilon=epsilon, dropout=0.0)
        tower = load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")["doc_encoder"]
        norms = {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)}
        assert norms == {epsilon or 1e-12}
        ids = tokenize_passages(tower, [("oslo", "the old river of oslo is red")])
        vectors[epsilon] = embed(tower, ids, 1, "passage")
        save_encoder(tower, tmp_path / str(epsilon))
        again = load_encoder(tmp_path / str(epsilon), "passage")
        assert np.array_equal(embed(again, ids, 1, "passage"), vectors[epsilon])
    assert np.abs(vectors[0.0] - vectors[1e-5]).max() > 1e-6


# ---------------------------------------------------------------- RocketQA's file, ANCE-Tele's stop
def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path


def test_a_qid_may_come_back_in_a_training_file_only(world, tmp_path):
    """RocketQA has a line for each negative of a question; a test question that comes back is a fault."""
    first = read_questions(world / "train.jsonl")[0]
    lines = [dict(first, negatives=[pid]) for pid in first["negatives"]]
    path = write(tmp_path / "lines.jsonl", lines)
    kept, note = read_training(path, Corpus(world / "corpus.tsv"))
    assert [example["negatives"] for example in kept] == [["2"], ["6"]] and "2 questions" in note
    with pytest.raises(UserError, match=r"lines.jsonl:2: qid 'q0' is already on line 1; qids must differ"):
        read_questions(path)


def test_an_early_stop_keeps_the_schedule(world, tmp_path):
    """
    An episode in small: stopped after 4 of 20 steps, the learning rates are those of 20 steps with 2 of
    warm-up, and the epsilon that it was trained with stands in the saved config.
    """
    _, keys = config(
        world, run_dir=tmp_path / "run", dev="", stop_after=4, rotate_negatives=True, shuffle_positives=True,
        grad_cache=True, layer_norm_epsilon=1e-5, seed=42, min_lr_ratio=0.0,
    )  # fmt: skip
    done = run("train_dpr.py", keys)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 17 / 18])
    for name in TOWERS:
        assert json.loads((tmp_path / "run" / name / "config.json").read_text())["layer_norm_eps"] == 1e-5
