"""The trainer against the original codes' numbers, one big graph, and its own uninterrupted run."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.processes import ENVIRONMENT, begin, kill_tree, on_devices, run
from tests.toy import make_world
from train_dpr import (
    TOWERS,
    add_gradient,
    dev_pool,
    evaluate,
    in_batch_loss,
    learning_rate_factor,
    load_towers,
    make_batch,
    named_weights,
)
from utils.data import Corpus, read_questions
from utils.encoder import collate
from utils.plumbing.checkpoint import make_optimizer
from utils.plumbing.config import ROOT, load_config
from utils.plumbing.weights import load_encoder

torch.set_num_threads(1)  # why: threads that wait for each other take seconds on a busy machine
GOLDEN = Path(__file__).parent / "golden"


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


# ---------------------------------------------------------------- loss, schedule
def test_loss_equals_the_original_codes():
    """Loss, number correct and both gradients equal DPR's BiEncoderNllLoss in float64."""
    for case in cases("in_batch_loss"):
        q, p = (torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ("q", "p"))
        loss, correct = in_batch_loss(q, p, torch.tensor(case["positive_idx"]))
        loss = loss * case.get("loss_scale", 1)
        loss.backward()
        assert (
            abs(loss.item() - case["loss"]) < 1e-8 * max(1, abs(case["loss"])) and correct == case["correct"]
        )
        for got, wanted in ((q.grad, case["grad_q"]), (p.grad, case["grad_p"])):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            assert (got - wanted).abs().max() <= 1e-8 * max(1, wanted.abs().max())


def test_schedule_equals_the_original_codes():
    """Linear up and down; only the floor differs between DPR (1e-7) and GC-DPR (0); step 0 has factor 0."""
    for case in cases("lr_schedule"):
        floors = {"factor_dpr": 1e-7, "factor_gc_dpr": 0.0}
        for key, floor in ((key, floor) for key, floor in floors.items() if key in case):
            steps = [k + case.get("steps_shift", 0) for k in case["steps"]]
            got = [learning_rate_factor(k, case["warmup"], case["total"], floor) for k in steps]
            assert np.allclose(got, case[key], rtol=0, atol=1e-9)


def test_a_duplicate_positive_can_be_masked():
    """Four questions, two with the same gold passage: its copy costs ln 2 / 2 = 0.35 until it is masked."""
    vectors = torch.eye(3)[[0, 1, 2, 2]] * 30
    plain, _ = in_batch_loss(vectors, vectors, torch.arange(4))
    masked, correct = in_batch_loss(vectors, vectors, torch.arange(4), torch.tensor([[2, 3], [3, 2]]))
    assert abs(plain - np.log(2) / 2) < 1e-4 and masked < 1e-4 and correct == 4


# ---------------------------------------------------------------- batches
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def config(world, **changes):
    """The settings of the toy runs, with changes."""
    keys = {
        "init": world / "bert",
        "train": world / "train.jsonl",
        "dev": world / "dev.jsonl",
        "corpus": world / "corpus.tsv",
        "question_tokens": 16,
        "passage_tokens": 32,
        "batch_size": 8,
        "question_chunk": 3,
        "passage_chunk": 4,
        "learning_rate": 1e-3,
        "warmup": 0.1,
        "epochs": 4,
        "save_every": 3,
        "gradient_scale": 1.0,
    } | changes
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return load_config("", "config/train_dpr_nq.yaml", argv), keys


def parts(world, **changes):
    cfg, _ = config(world, **changes)
    corpus = Corpus(cfg.corpus)
    return cfg, read_questions(cfg.train), corpus, load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")


def decoded(encoder, chunks, places):
    """The texts of a batch in their given order."""
    flat = [ids for chunk in chunks for ids in chunk]
    return [encoder.tokenizer.decode(flat[i]) for i in places]


def test_a_batch_is_a_function_of_seed_and_step(world):
    """Twice the same, other steps differ, an epoch shows every question once, passages are interleaved."""
    cfg, train, corpus, towers = parts(world)
    seen = []
    for step in range(5):
        batch, again = (make_batch(step, train, corpus, towers, cfg) for _ in range(2))
        assert batch["question_chunks"] == again["question_chunks"]
        assert batch["passage_chunks"] == again["passage_chunks"]
        questions = decoded(towers["query_encoder"], batch["question_chunks"], batch["question_places"])
        passages = decoded(towers["doc_encoder"], batch["passage_chunks"], batch["passage_places"])
        for i, question in enumerate(questions):  # "which colour has the river of paris": its passage says so
            thing, city = re.search(r"the (\w+) of (\w+)", question).groups()
            assert f"the old {thing} of {city} is" in passages[batch["positive_Q"][i]]
            assert f"the old {thing} of {city} is" not in passages[batch["positive_Q"][i] + 1]
        seen += questions
    assert len(set(seen)) == 40


def test_short_pools_and_duplicates_are_masked_and_counted(world):
    """
    A question without negatives gets a stand-in that nobody sees; a positive that stands elsewhere is masked.
    """
    cfg, train, corpus, towers = parts(world, batch_size=4)
    train = [dict(train[0]), dict(train[0]), dict(train[1], negatives=[]), dict(train[2])]
    batch = make_batch(0, train, corpus, towers, cfg)
    pairs = {tuple(pair) for pair in batch["excluded"].T.tolist()}
    order = np.random.default_rng([cfg.seed, 0]).permutation(4).tolist()
    bare, first, second = order.index(2), order.index(0), order.index(1)
    assert {(row, 2 * bare + 1) for row in range(4)} <= pairs
    assert {(first, 2 * second), (second, 2 * first)} <= pairs
    cfg.mask_duplicates = False
    off = make_batch(0, train, corpus, towers, cfg)
    assert batch["duplicates"] >= 2 and off["duplicates"] == 0 and off["excluded"].shape[1] == 4


# ---------------------------------------------------------------- gradients
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, backward=torch.Tensor.backward, autocast=nullcontext
)


def flat_gradient(towers):
    return torch.cat([p.grad.flatten() for p in named_weights(towers).values()])


def one_graph(batch, towers, cfg):
    """
    The oracle: every row in one padded batch, one graph, plain autograd; no chunks, no cache, no gather.
    """
    vectors = []
    for name, kind in (("query_encoder", "question"), ("doc_encoder", "passage")):
        ids = [row for chunk in batch[f"{kind}_chunks"] for row in chunk]
        vectors.append(towers[name](**collate(towers[name], ids))[batch[f"{kind}_places"]])
    loss, _ = in_batch_loss(*vectors, batch["positive_Q"], batch["excluded"])
    (loss * cfg.gradient_scale).backward()
    return loss


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_gradient_equals_one_graph(world, shared, cache):
    """
    Chunks of any size, cached or not, separate or shared towers: the gradient of the plain batch, times the
    scale.
    """
    for question_chunk, passage_chunk in ((1, 1), (3, 5), (8, 16), (99, 99)):
        cfg, train, corpus, towers = parts(
            world, dropout=0.0, grad_cache=cache, shared_encoder=shared, gradient_scale=0.125,
            question_chunk=question_chunk, passage_chunk=passage_chunk,
        )  # fmt: skip
        batch = make_batch(0, train, corpus, towers, cfg)
        wanted_loss = one_graph(batch, towers, cfg)
        wanted = flat_gradient(towers)
        for p in named_weights(towers).values():
            p.grad = None
        loss, _ = add_gradient(batch, towers, ACCELERATOR, cfg, 0)
        got = flat_gradient(towers)
        assert abs(loss - wanted_loss) < 1e-5 and (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def device_gradient(folder, cfg, cached):
    """On each of W processes: one step; rank 0 writes loss, gradient and the dev metrics."""
    rank = dist.get_rank()
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": rank})
    corpus, train, dev = Corpus(cfg.corpus), read_questions(cfg.train), read_questions(cfg.dev)
    towers = load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")
    cfg.grad_cache = cached
    batch = make_batch(0, train, corpus, towers, cfg)
    loss, correct = add_gradient(batch, towers, accelerator, cfg, 0)
    cfg.eval_batch_size = 3
    metrics = evaluate(dev_pool(dev, corpus, towers, cfg), towers, accelerator, cfg)
    torch.save(
        {"loss": loss, "gradient": flat_gradient(towers), "batch": batch, "metrics": metrics},
        f"{folder}/{rank}.pt",
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_devices_give_the_gradient_of_one(world, tmp_path, dropout):
    """
    Two gloo processes, cached: without dropout the gradient of one device; with it, that of one graph over
    the same chunks with the same masks. The dev metrics do not depend on the number of devices.
    """
    torch.manual_seed(0)
    cfg, train, corpus, towers = parts(world, dropout=dropout)
    on_devices(2, device_gradient, str(tmp_path), cfg, True)
    parts_of = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(parts_of[0]["gradient"], parts_of[1]["gradient"]), (
        "devices must hold the same gradient"
    )
    batch = make_batch(0, train, corpus, towers, cfg)
    if not dropout:
        wanted_loss = one_graph(batch, towers, cfg)
    else:  # one graph over both devices' chunks, each chunk with the seed that its device gave it
        from utils.grad_cache import chunk_seed

        vectors = {"question": [], "passage": []}
        for rank, part in enumerate(parts_of):
            chunks = [(kind, c) for kind in vectors for c in part["batch"][f"{kind}_chunks"]]
            made = []
            for i, (kind, ids) in enumerate(chunks):
                torch.manual_seed(chunk_seed((cfg.seed, 0, rank), i))
                tower = towers["query_encoder" if kind == "question" else "doc_encoder"]
                made.append((kind, tower(**collate(tower, ids))))
            for kind in vectors:
                rows = torch.cat([v for k, v in made if k == kind])
                vectors[kind].append(rows[part["batch"][f"{kind}_places"]])
        q_QD, p_ND = (torch.cat(vectors[kind]) for kind in ("question", "passage"))
        wanted_loss, _ = in_batch_loss(q_QD, p_ND, batch["positive_Q"], batch["excluded"])
        wanted_loss.backward()
    wanted, got = flat_gradient(towers), parts_of[0]["gradient"]
    assert abs(parts_of[0]["loss"] - wanted_loss) < 1e-5
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    one = evaluate(dev_pool(read_questions(cfg.dev), corpus, towers, cfg), towers, ACCELERATOR, cfg)
    assert one == pytest.approx(parts_of[0]["metrics"], rel=1e-6)


def test_biases_and_layer_norms_are_not_decayed(world):
    """Two groups, every weight of a shared encoder once."""
    cfg, _, _, towers = parts(world, weight_decay=0.1, shared_encoder=True)
    groups = {
        group["weight_decay"]: len(group["params"])
        for group in make_optimizer(named_weights(towers).items(), cfg).param_groups
    }
    total = len(list(towers["query_encoder"].parameters()))
    assert groups[0.1] + groups[0.0] == total and groups[0.0] > groups[0.1] > 0


# ---------------------------------------------------------------- the command, as its user meets it
def rows(run_dir):
    """metrics.jsonl without what differs between two runs: the time."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(run_dir):
    return {
        name: load_file(Path(run_dir) / name / "model.safetensors")
        for name in ("query_encoder", "doc_encoder")
    }


def same_weights(a, b):
    return all(torch.equal(a[tower][k], b[tower][k]) for tower in a for k in a[tower])


def whole_run(world, folder, processes):
    """An uninterrupted run of 40 steps: (its arguments, its folder, number of processes)."""
    _, keys = config(world, epochs=8, grad_cache=True, train=world / "train.jsonl")
    done = run("train_dpr.py", keys | {"run_dir": folder / "run"}, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    return keys, folder / "run", processes


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, world, tmp_path_factory):
    return whole_run(world, tmp_path_factory.mktemp("whole"), request.param)


@pytest.fixture(scope="module")
def whole_1(world, tmp_path_factory):
    return whole_run(world, tmp_path_factory.mktemp("whole_1"), 1)


def test_a_finished_run(whole):
    """Loss falls, the best checkpoint is published as a pair that loads, and a used folder is refused."""
    keys, folder, processes = whole
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert len(losses) == 40 and np.mean(losses[-10:]) < np.mean(losses[:10])
    best = json.loads((folder / "metrics.json").read_text())["best_step"]
    stored = folder / "checkpoints" / f"step_{best:08d}"
    assert same_weights(
        {n: load_file(stored / n / "model.safetensors") for n in weights(folder)}, weights(folder)
    )
    pair = [
        load_encoder(folder / n, r).inputs["pair"]
        for n, r in (("query_encoder", "question"), ("doc_encoder", "passage"))
    ]
    assert pair[0] == pair[1] and pair[0].endswith(f"-{best}")
    if processes == 1:
        again = run("train_dpr.py", keys | {"run_dir": folder})
        assert again.returncode == 2 and "--resume exact" in again.stderr and "Traceback" not in again.stderr
        other = run("train_dpr.py", keys | {"run_dir": folder, "resume": "exact", "learning_rate": 1e-4})
        assert other.returncode == 2 and "learning_rate: 0.001 then, 0.0001 now" in other.stderr


def test_killed_anywhere_it_resumes_to_the_same_bits(whole, tmp_path):
    """SIGKILL at random moments until it is through: every loss and the final weights are bit-equal."""
    keys, folder, processes = whole
    rng, keys = np.random.default_rng(1), keys | {"run_dir": tmp_path / "run", "resume": "exact"}
    for _ in range(3):
        process = begin("train_dpr.py", keys, processes)
        steps = (line for line in process.stdout if line.startswith("step"))
        shown = [next(steps) for _ in range(int(rng.integers(2, 9)))]
        kill_tree(process, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not shown[-1].startswith("step     40/40"), "the last kill must have hit a running process"
    done = run("train_dpr.py", keys, processes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows(tmp_path / "run") == rows(folder) and same_weights(weights(tmp_path / "run"), weights(folder))


def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(whole, tmp_path):
    """The step is finished and saved, the exit code is 128 + the signal; the printed command ends alike."""
    keys, folder, processes = whole
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact", "save_every": 1000}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = begin("train_dpr.py", keys, processes)
        next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(number)  # torchrun passes it on to its workers
        rest = process.communicate()[0]
        assert "stopped by a signal" in rest
        if processes == 1:  # torchrun has a traceback and an exit code of its own
            assert process.returncode == 128 + number and "Traceback" not in rest
    printed = shlex.split(rest.split("go on with: ")[1].splitlines()[0])
    assert printed[0] == ("python" if processes == 1 else "torchrun")
    module = [] if processes == 1 else ["-m", "torch.distributed.run"]
    done = subprocess.run(
        [sys.executable, *module, *printed[1:]], cwd=ROOT, env=ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0 and rows(tmp_path / "run") == rows(folder)


KILL_DURING_SAVE = """
import os, signal, sys
import utils.plumbing.checkpoint as checkpoint
real, calls = checkpoint.write_json, []
def dying(path, value):
    calls.append(path)
    if len(calls) == 8:  # the fourth checkpoint, after its weights, before its manifest
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, value)
checkpoint.write_json = dying
sys.argv = ["train_dpr.py", *sys.argv[1:]]
import train_dpr
train_dpr.main()
"""


def test_killed_during_the_checkpoint_write(whole_1, tmp_path):
    """A half-written checkpoint has no final name: the one before it is used, and the end is the same."""
    keys, folder, _ = whole_1
    (tmp_path / "dying.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + KILL_DURING_SAVE)
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact"}
    assert run(str(tmp_path / "dying.py"), keys).returncode == -signal.SIGKILL
    assert list((tmp_path / "run" / "checkpoints").glob(".step*")), "the kill must have hit the write"
    assert run("train_dpr.py", keys).returncode == 0
    assert rows(tmp_path / "run") == rows(folder) and same_weights(weights(tmp_path / "run"), weights(folder))
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*"))


def test_a_damaged_checkpoint_is_named_and_passed_over(whole_1, tmp_path):
    """
    One flipped bit in the weights: the file is named, the checkpoint before it is used, the end is the same.
    """
    keys, folder, _ = whole_1
    shutil.copytree(keys["init"], tmp_path / "init")
    keys = keys | {"run_dir": tmp_path / "run", "stop_after": 12, "init": tmp_path / "init"}
    assert run("train_dpr.py", keys).returncode == 0
    shutil.rmtree(tmp_path / "init")  # the weights come from the checkpoint
    newest = (
        sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1] / "query_encoder" / "model.safetensors"
    )
    data = bytearray(newest.read_bytes())
    data[-100] ^= 1
    newest.write_bytes(data)
    keys = {k: v for k, v in keys.items() if k != "stop_after"} | {"resume": "changed"}
    done = run("train_dpr.py", keys)
    assert done.returncode == 0 and "model.safetensors does not match its sha256" in done.stdout, done.stdout[
        :3000
    ]
    assert "stop_after: 12 then, 0 now" in done.stdout
    assert rows(tmp_path / "run") == rows(folder) and same_weights(weights(tmp_path / "run"), weights(folder))


def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(world, tmp_path):
    """A NaN in the starting weights: exit code 2, step, loss and norm named, nothing saved."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(world / "bert", add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(world / "bert").save_pretrained(tmp_path / "bert")
    _, keys = config(world, init=tmp_path / "bert", run_dir=tmp_path / "run")
    done = run("train_dpr.py", keys)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: step 1: loss nan")
    assert not (tmp_path / "run" / "checkpoints").exists() and "Traceback" not in done.stderr


def test_dry_run_writes_nothing(world, tmp_path):
    """Parameters, memory, disk and minutes are printed; no folder appears."""
    _, keys = config(world, run_dir=tmp_path / "run", dry_run=True)
    done = run("train_dpr.py", keys)
    assert done.returncode == 0 and not (tmp_path / "run").exists()
    assert all(word in done.stdout for word in ("parameters", "memory", "disk", "minutes"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "nowhere.jsonl"}, ["train", "nowhere.jsonl"]),
        ({"init": "nowhere/at/all"}, ["nowhere/at/all"]),
        ({"batch_size": 64}, ["40 questions", "64"]),
        ({"batch_size": 1, "negatives": 0}, ["nothing to tell apart"]),
        ({"corpus": ""}, ["corpus"]),
        ({"train": ""}, ["train: give a path, it is empty"]),
        ({"run_dir": "train_dpr.py"}, ["run_dir", "train_dpr.py is a file, not a folder"]),
        ({"question_tokens": 0}, ["question_tokens must be at least 4, got 0"]),
        ({"passage_tokens": 3}, ["passage_tokens must be at least 4"]),
        ({"dropout": 1.5}, ["dropout must be below 1, got 1.5"]),
        ({"pooling": "max"}, ["pooling", "cls, mean", "'max'"]),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, monkeypatch, changes, words):
    """Exit code 2 and one sentence with the file or key, before any training."""
    from train_dpr import main
    from utils.plumbing.config import UserError

    _, keys = config(world, **{"run_dir": tmp_path / "run"} | changes)
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_dpr.py", *argv])
    with pytest.raises(UserError) as error:
        main()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_without_a_run_is_not_replaced(world, tmp_path, monkeypatch):
    """run_dir holds the very model that training starts from, and no checkpoint: nothing is touched."""
    from train_dpr import main
    from utils.plumbing.config import UserError

    shutil.copytree(world / "query_encoder", tmp_path / "run" / "query_encoder")
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "query_encoder").iterdir()}
    _, keys = config(world, run_dir=tmp_path / "run", init=tmp_path / "run" / "query_encoder", stop_after=1)
    monkeypatch.setattr("sys.argv", ["train_dpr.py", *(f"--{key}={value}" for key, value in keys.items())])
    with pytest.raises(UserError, match="holds query_encoder, but no checkpoint.*another --run_dir"):
        main()
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_a_half_precision_start_is_trained_in_full(world, tmp_path):
    """Weights stored as float16 are trained in float32: transformers 5 would keep the type of the file."""
    from transformers import AutoModel

    AutoModel.from_pretrained(world / "bert", add_pooling_layer=False).half().save_pretrained(tmp_path)
    cfg, _ = config(world, init=world / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((world / "bert" / name).read_bytes())
    towers = load_towers(dict.fromkeys(TOWERS, tmp_path), cfg, "cpu")
    assert {p.dtype for p in named_weights(towers).values()} == {torch.float32}


def test_older_checkpoints_go_and_an_abandoned_future_too(world, tmp_path):
    """After a fall back to step 10, the damaged steps 30 and 40 must not crowd out step 15."""
    from utils.plumbing.checkpoint import load_optimizer, make_optimizer, save_checkpoint
    from utils.plumbing.config import UserError

    cfg, _, _, towers = parts(world)
    optimizer = make_optimizer(named_weights(towers).items(), cfg)
    for step in (10, 30, 40, 15):
        save_checkpoint(tmp_path, step, towers, optimizer, {"step": step}, protect=10)
    (tmp_path / "checkpoints" / ".step_00000016.tmp").mkdir()
    save_checkpoint(tmp_path, 20, towers, optimizer, {"step": 20}, protect=10)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000010", "step_00000015", "step_00000020",
    ]  # fmt: skip
    sum(p.sum() for p in named_weights(towers).values()).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, 21, towers, optimizer, {"step": 21})
    small = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match="another architecture"):
        load_optimizer(folder, small)


def test_bf16_gives_the_cached_gradient_too(world):
    """Under bf16 autocast, cached and uncached gradients point the same way (spec: cosine at least 0.999)."""
    found = []
    for cache in (False, True):
        cfg, train, corpus, towers = parts(world, grad_cache=cache)
        accelerator = SimpleNamespace(
            **vars(ACCELERATOR) | {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
        )
        add_gradient(make_batch(0, train, corpus, towers, cfg), towers, accelerator, cfg, 0)
        found.append(flat_gradient(towers))
    assert torch.cosine_similarity(*found, dim=0) > 0.999


def test_wandb_needs_no_login(world, tmp_path):
    """tracker wandb without the package is one clear line; jsonl is written in any case."""
    _, keys = config(world, run_dir=tmp_path / "run", tracker="wandb", stop_after=2)
    done = run("train_dpr.py", keys)
    try:
        import wandb  # noqa: F401
    except ImportError:
        assert done.returncode == 2 and "pip install wandb" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists(), "it is known before a model is loaded"
    else:
        assert done.returncode == 0 and len(rows(tmp_path / "run")) >= 2


def test_a_shared_encoder_is_one_folder_named_twice(world, tmp_path):
    """shared_encoder: doc_encoder is a link to query_encoder, and both doors open."""
    _, keys = config(world, run_dir=tmp_path / "run", shared_encoder=True, epochs=1, dev="")
    done = run("train_dpr.py", keys)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "doc_encoder").is_symlink()
    for name, role in TOWERS.items():
        assert load_encoder(tmp_path / "run" / name, role).inputs["role"] == "shared"
