"""What several drivers need: two devices, and a trainer in the toy world of tests/toy.py."""

import copy
import os
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist


def two_devices(function):
    """Call function(rank), which returns {name: tensor}, on two gloo processes; return one dict of each."""
    folder = tempfile.mkdtemp()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            answer(function, rank, folder)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = []
    for rank in (0, 1):
        if os.path.exists(f"{folder}/{rank}.txt"):
            with open(f"{folder}/{rank}.txt", encoding="utf-8") as file:
                raise RuntimeError(f"on device {rank}: {file.read()}")
        with np.load(f"{folder}/{rank}.npz", allow_pickle=False) as arrays:
            found.append({name: arrays[name] for name in arrays.files})
    return found


def answer(function, rank, folder):
    """One of two devices: write what function(rank) returns, or its error, and end."""
    try:
        store = f"file://{folder}/store"
        limit = timedelta(seconds=20)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
        arrays = {name: tensor.detach().numpy() for name, tensor in function(rank).items()}
        np.savez(f"{folder}/{rank}.npz", **arrays)
    except BaseException as error:
        with open(f"{folder}/{rank}.txt", "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}"[:200])
    os._exit(0)


# ---------------------------------------------------------------- a trainer in the toy world
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    process_index=0,
    backward=torch.Tensor.backward,
    autocast=nullcontext,
    unscale_gradients=lambda: None,
)


@cache
def toy_parts():
    """Return (settings, questions, corpus, encoders) of train_dpr.py in the toy world, without dropout."""
    from tests.toy import make_world
    from utils.data import Corpus, read_questions
    from utils.plumbing.config import load_config
    from utils.plumbing.weights import TOWERS, load_towers

    world = make_world(tempfile.mkdtemp())
    keys = {"init": world / "bert", "corpus": world / "corpus.tsv", "train": world / "train.jsonl"}
    keys |= {"question_tokens": 16, "passage_tokens": 32, "batch_size": 8, "question_chunk": 3}
    keys |= {"passage_chunk": 4, "learning_rate": 0.01, "gradient_scale": 1.0, "dropout": 0.0}
    argv = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    cfg = load_config("", "config/train_dpr_nq.yaml", argv)
    encoders = load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")
    return cfg, read_questions(cfg.train), Corpus(cfg.corpus), encoders


def toy_training(dropout=0.0, **changes):
    """Return what toy_parts returns, with changed settings and with encoders of its own."""
    cfg, questions, corpus, encoders = toy_parts()
    encoders = copy.deepcopy(encoders)
    for module in torch.nn.ModuleDict(encoders).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return SimpleNamespace(**vars(cfg) | changes), copy.deepcopy(questions), corpus, encoders


def train(steps, **changes):
    """Return the losses of so many steps of train_dpr.py in the toy world, and the norms of the weights."""
    from train_dpr import make_batch, training_step

    cfg, questions, corpus, encoders = toy_training(**changes)
    weights = list(torch.nn.ModuleDict(encoders).parameters())
    # why SGD: Adam divides by the gradient's size, so that a rounding becomes a step
    optimizer = torch.optim.SGD(weights, lr=cfg.learning_rate)
    run = SimpleNamespace(warmup=2, total=steps, accelerator=ACCELERATOR, weights=weights)
    run.refuse_non_finite = lambda *numbers: None
    losses = []
    for step in range(steps):
        batch = make_batch(step, questions, corpus, encoders, cfg)
        shown, _ = training_step(step, batch, encoders, optimizer, run, cfg)
        losses.append(shown["loss"])
    norms = torch.stack([weight.detach().norm() for weight in weights])
    return {"losses": np.array(losses, np.float32), "weights": norms}


# ---------------------------------------------------------------- one step of it
def step_of(add_gradient, batch_of=None, step=0, rank=0, before=None, shared=False, **changes):
    """
    Return (loss, correct, the gradient of both encoders) of add_gradient in the toy world.

    batch_of: changes the batch. before: the gradient that is there already. shared: one encoder for both.
    changes: of the settings; the cache is on where they do not say it.
    """
    from train_dpr import make_batch

    cfg, questions, corpus, encoders = toy_training(**{"grad_cache": True} | changes)
    if shared:
        encoders = dict.fromkeys(encoders, encoders["doc_encoder"])
    batch = make_batch(0, questions, corpus, encoders, cfg)
    if batch_of:
        batch = batch_of(batch)
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": rank})
    weights = [*torch.nn.ModuleDict(encoders).parameters()]
    for weight in weights:
        weight.grad = None if before is None else torch.full_like(weight, before)
    loss, correct = add_gradient(batch, encoders, accelerator, cfg, step)
    return loss, correct, torch.cat([weight.grad.flatten() for weight in weights])


def in_parts(gradient):
    """Return the norms of 64 parts of a gradient: little to send, and each part tells a wrong order."""
    return gradient[: len(gradient) // 64 * 64].reshape(64, -1).norm(dim=1)


def in_order(batch):
    """Return a batch with its rows in the given order and no pair excluded: these are other checks."""
    for name in ("question", "passage"):
        rows = sum(batch[f"{name}_chunks"], [])
        rows = [rows[place] for place in batch[f"{name}_places"]]
        batch[f"{name}_chunks"] = [rows[first : first + 4] for first in range(0, len(rows), 4)]
        batch[f"{name}_places"] = torch.arange(len(rows))
    return batch | {"excluded": torch.zeros(2, 0, dtype=torch.long)}


def one_text(rng):
    """Return batch -> a batch of one text, whose loss depends on its `excluded` alone; these are drawn."""
    pairs = [(q, column) for q in range(8) for column in range(16) if column != 2 * q and rng.random() < 0.4]

    def batch_of(batch):
        for name in ("question_chunks", "passage_chunks"):
            batch[name] = [[batch[name][0][0]] * len(chunk) for chunk in batch[name]]
        return batch | {"excluded": torch.tensor(pairs).T}

    return batch_of
