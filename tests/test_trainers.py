"""What all four trainers share: a run that ends, that is killed, that is told to stop, that goes wrong."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests import test_train_cross_encoder, test_train_dpr, test_train_emdr2, test_train_reader
from tests.processes import ENVIRONMENT, begin, begin_torchrun, kill_tree, main, rows, run
from tests.toy import make_world, write_lines
from tests.toy_t5 import t5
from utils.plumbing.checkpoint import load_moments, save_checkpoint
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.files import folder_hash, sha256, weights_hash, write_json
from utils.plumbing.model_card import model_card
from utils.plumbing.run import Run, parameter_groups
from utils.plumbing.weights import load_encoder, pair_id


class Trainer(NamedTuple):
    script: str
    keys: object  # (world, run_dir, **changes) -> {key: value}
    models: tuple  # the folders that a run writes
    chunks: dict  # other sizes of the chunks, which must not change the gradient
    start: str  # the key that names the starting weights


def emdr2_keys(world, run_dir, **changes):
    """A toy run of EMDR2: 40 questions in 2 epochs of 6 steps, the index renewed twice."""
    steps = {"epochs": 2, "learning_rate": 1e-3, "warmup": 0.1, "save_every": 3, "refresh_every": 4}
    steps |= {"retriever_lr_scale": 1.0, "eval_every": 7}
    return test_train_emdr2.keys(world, run_dir, **steps | changes)


TOWERS, CHUNKS = ("query_encoder", "doc_encoder"), {"question_chunk": 8, "passage_chunk": 40}
CACHED = {"question_chunk": 8, "passage_chunk": 5, "grad_cache": True}
CHUNKS_OF_THREE = {"question_chunk": 6, "passage_chunk": 24, "score_chunk": 24}
CROSS = test_train_cross_encoder.keys
TRAINERS = {
    "dpr": Trainer("train_dpr.py", test_train_dpr.keys, TOWERS, CACHED, "init"),
    "cross": Trainer("train_cross_encoder.py", CROSS, ("cross_encoder",), {"chunk": 16}, "init"),
    "reader": Trainer("train_reader.py", test_train_reader.keys, ("reader",), CHUNKS, "init"),
    "emdr2": Trainer("train_emdr2.py", emdr2_keys, ("reader", *TOWERS), CHUNKS_OF_THREE, "reader"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, with a T5 and the vectors of its passages."""
    world = make_world(tmp_path_factory.mktemp("world"))
    t5(world)
    keys = {"doc_encoder": world / "doc_encoder", "corpus": world / "corpus.tsv"}
    main("doc2embedding.py", keys | {"out": world / "embeddings"})
    return world


def same_weights(one, other, models):
    """Whether the models in two run_dirs or checkpoints are equal to the bit."""
    for name in models:
        these, those = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        if not all(torch.equal(these[key], those[key]) for key in these):
            return False
    return True


@pytest.fixture(scope="module", params=TRAINERS)
def whole(request, world, tmp_path_factory):
    """An uninterrupted run: (trainer, keys, folder)."""
    trainer, folder = TRAINERS[request.param], tmp_path_factory.mktemp(request.param) / "run"
    keys = trainer.keys(world, folder)
    main(trainer.script, keys)
    return trainer, keys, folder


@pytest.fixture(scope="module")
def whole_dpr(world, tmp_path_factory):
    trainer, folder = TRAINERS["dpr"], tmp_path_factory.mktemp("whole") / "run"
    keys = trainer.keys(world, folder, epochs=8, grad_cache=True)
    main(trainer.script, keys)
    return trainer, keys, folder


# ---------------------------------------------------------------- a run that ends
def test_a_finished_run(whole):
    """It has learned; every step stands once; the best is published as one pair; the folder is taken."""
    trainer, keys, folder = whole
    end = json.loads((folder / "metrics.json").read_text())
    steps = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [*range(1, end["step"] + 1)]
    losses = [row["loss"] for row in steps]
    third = len(losses) // 3
    assert np.mean(losses[-third:]) < np.mean(losses[:third])
    best = folder / "checkpoints" / f"step_{end['best_step']:08d}"
    assert same_weights(best, folder, trainer.models)
    pairs = {pair_id(folder / name) for name in trainer.models}
    assert len(pairs) == 1 and pairs.pop().endswith(f"-{end['best_step']}")
    assert "command: " in (folder / "config.yaml").read_text()

    with pytest.raises(UserError, match="holds a run .*--resume exact"):
        main(trainer.script, keys)
    with pytest.raises(UserError, match="learning_rate: .* then, 0.125 now"):
        main(trainer.script, keys | {"resume": "exact", "learning_rate": 0.125})
    before = rows(folder)
    main(trainer.script, keys | {"resume": "exact"})  # a finished run says so, and changes nothing
    assert rows(folder) == before and json.loads((folder / "metrics.json").read_text()) == end


def test_a_checkpoint_of_an_older_version_goes_on(whole_dpr, tmp_path):
    """It does not say `keep`, because there was only one way; a key that it lacks by fault is named."""
    trainer, keys, folder = whole_dpr
    keys = keys | {"run_dir": shutil.copytree(folder, tmp_path / "run"), "resume": "exact"}
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    state, hashes = (json.loads((newest / name).read_text()) for name in ("state.json", "manifest.json"))

    def forget(key):
        del state["settings"][key]
        write_json(newest / "state.json", state)
        write_json(newest / "manifest.json", hashes | {"state.json": sha256(newest / "state.json")})

    forget("keep")
    main(trainer.script, keys)
    forget("seed")
    with pytest.raises(UserError, match="seed: None then"):
        main(trainer.script, keys)


# ---------------------------------------------------------------- a run that is killed
def test_killed_anywhere_it_resumes_to_the_same_bits(whole, tmp_path):
    """SIGKILL at random moments, twice, then to the end: every number and the final weights are bit-equal."""
    trainer, keys, folder = whole
    rng = np.random.default_rng(1)
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact", "log_every": 1}
    for _ in range(2):
        process = begin(trainer.script, keys)
        steps = (line for line in process.stdout if line.startswith("step"))
        shown = [next(steps) for _ in range(int(rng.integers(2, 6)))]
        kill_tree(process, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    total = rows(folder)[-1]["step"]
    assert not shown[-1].startswith(f"step {total:>6}"), "the last kill must have hit a running process"
    main(trainer.script, keys)
    assert rows(tmp_path / "run") == rows(folder)
    assert same_weights(tmp_path / "run", folder, trainer.models)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(whole_dpr, tmp_path, processes):
    """The step is finished and saved, the exit code is 128 + the signal; the printed command ends alike."""
    trainer, keys, folder = whole_dpr
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact", "save_every": 1000}
    start, numbers = begin, (signal.SIGTERM, signal.SIGINT)
    if processes == 2:
        start, numbers = begin_torchrun, numbers[1:]
    for number in numbers:
        process = start(trainer.script, keys)
        next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(number)  # torchrun passes it on to its workers
        output = process.communicate()[0]
        assert "stopped by a signal" in output
        if processes == 1:  # torchrun has a traceback and an exit code of its own
            assert process.returncode == 128 + number and "Traceback" not in output
    printed = shlex.split(output.split("go on with: ")[1].splitlines()[0])
    assert printed[0] == ("python" if processes == 1 else "torchrun")
    if processes == 1:
        command = [sys.executable, *printed[1:]]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
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
sys.argv[0] = "train_dpr.py"
import train_dpr
train_dpr.main()
"""


def test_killed_during_the_checkpoint_write(whole_dpr, tmp_path):
    """A half-written checkpoint has no final name: the one before it is used, and the end is the same."""
    trainer, keys, folder = whole_dpr
    (tmp_path / "dying.py").write_text(KILL_DURING_SAVE)
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact"}
    assert run(str(tmp_path / "dying.py"), keys).returncode == -signal.SIGKILL
    assert list((tmp_path / "run" / "checkpoints").glob(".step*")), "the kill must have hit the write"
    main(trainer.script, keys)
    assert rows(tmp_path / "run") == rows(folder)
    assert same_weights(tmp_path / "run", folder, trainer.models)
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*"))


def test_a_damaged_checkpoint_is_named_and_passed_over(whole_dpr, tmp_path, capsys):
    """One flipped bit: the file is named, the checkpoint before it is used, the end is the same."""
    trainer, keys, folder = whole_dpr
    shutil.copytree(keys["init"], tmp_path / "init")
    keys = keys | {"run_dir": tmp_path / "run", "stop_after": 12, "init": tmp_path / "init"}
    main(trainer.script, keys)
    shutil.rmtree(tmp_path / "init")  # the weights come from the checkpoint
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    file = newest / "query_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    main(trainer.script, keys | {"stop_after": 0, "resume": "changed"})
    shown = capsys.readouterr().out
    assert "model.safetensors does not match its sha256" in shown
    assert "stop_after: 12 then, 0 now" in shown
    assert rows(tmp_path / "run") == rows(folder)
    assert same_weights(tmp_path / "run", folder, trainer.models)


def test_older_checkpoints_go_and_an_abandoned_future_too(world, tmp_path):
    """After a fall back to step 10, the damaged steps 30 and 40 must not crowd out step 15."""
    cfg = test_train_dpr.settings(world)
    towers = test_train_dpr.towers_of(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(torch.nn.ModuleDict(towers).parameters(), cfg))
    folder = tmp_path / "checkpoints"
    for step in (10, 30, 40, 15):
        save_checkpoint(tmp_path, step, towers, optimizer, {"step": step}, best_step=10)
    (folder / ".step_00000016.tmp").mkdir()
    save_checkpoint(tmp_path, 20, towers, optimizer, {"step": 20}, best_step=10)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_000000{n}" for n in (10, 15, 20)]
    sum(p.sum() for p in torch.nn.ModuleDict(towers).parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 21, towers, optimizer, {"step": 21}, best_step=10)
    small = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UserError, match="another architecture"):
        load_moments(folder / "step_00000021", small)


# ---------------------------------------------------------------- a gradient
@pytest.mark.parametrize("name", TRAINERS)
def test_chunks_and_devices_do_not_change_the_gradient(world, tmp_path, name):
    """Without dropout: other chunks, or two processes, give losses, gradient norms and dev metrics of one."""
    trainer = TRAINERS[name]
    short = {"dropout": 0.0, "stop_after": 2, "eval_batch_size": 3}
    main(trainer.script, trainer.keys(world, tmp_path / "one", **short))
    main(trainer.script, trainer.keys(world, tmp_path / "chunks", **short | trainer.chunks))
    done = run(trainer.script, trainer.keys(world, tmp_path / "devices", **short), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    *wanted, dev = rows(tmp_path / "one")
    for kind in ("chunks", "devices"):
        *steps, metrics = rows(tmp_path / kind)
        assert len(steps) == len(wanted) == 2 and metrics == dev
        for row, one in zip(steps, wanted, strict=True):
            assert row["loss"] == pytest.approx(one["loss"], rel=2e-5, abs=1e-7)
            assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", TRAINERS)
def test_biases_and_layer_norms_are_not_decayed(world, tmp_path, name):
    """After one step with an absurd decay and a learning rate of 0.1: only the other weights have shrunk."""
    trainer = TRAINERS[name]
    one = {"stop_after": 1, "warmup": 0.0, "learning_rate": 0.1, "weight_decay": 5.0, "dev": ""}
    main(trainer.script, trainer.keys(world, tmp_path / "run", **one | {"max_grad_norm": 1e-30}))
    for model in trainer.models:
        for key, tensor in load_file(tmp_path / "run" / model / "model.safetensors").items():
            if key.endswith(("LayerNorm.weight", "layer_norm.weight")):  # BERT's, T5's
                assert (tensor.mean() - 1).abs() < 0.3, key  # 1 at the start; decayed it would be 0.5


# ---------------------------------------------------------------- a run that goes wrong
def poisoned(start, folder):
    """A copy of a model folder whose first layer norm is NaN."""
    shutil.copytree(start, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "LayerNorm.weight" in key or "layer_norm.weight" in key)
    tensors[name][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", TRAINERS)
def test_nan_weights_or_those_that_the_optimizer_broke_are_never_saved(world, tmp_path, name, monkeypatch):
    """A NaN that the look at the starting weights does not see; adam_epsilon 0, which divides 0 by 0."""
    trainer = TRAINERS[name]
    broken = {"adam_epsilon": 0, "warmup": 0, "stop_after": 1, "dev": ""}
    with pytest.raises(UserError, match="step 1: a weight is NaN .*no checkpoint yet.*raise adam_epsilon"):
        main(trainer.script, trainer.keys(world, tmp_path / "broken", **broken))
    monkeypatch.setattr("utils.plumbing.weights.check_sound", lambda *_: None)
    keys = trainer.keys(world, tmp_path / "nan")
    keys[trainer.start] = poisoned(keys[trainer.start], tmp_path / "start")
    with pytest.raises(UserError, match="step 1: loss nan.*the training starts from hold NaN"):
        main(trainer.script, keys)
    assert not [*tmp_path.glob("*/checkpoints")]


def test_a_question_without_a_vector_names_the_step(world, tmp_path, monkeypatch):
    """EMDR2 searches before it learns: the step, and what to do, not the number of a question."""
    monkeypatch.setattr("utils.plumbing.weights.check_sound", lambda *_: None)
    keys = emdr2_keys(world, tmp_path / "run")
    keys["query_encoder"] = poisoned(keys["query_encoder"], tmp_path / "start")
    with pytest.raises(UserError, match="step 1: query_encoder gives NaN.* lower learning_rate"):
        main("train_emdr2.py", keys)


def test_a_step_that_teaches_nothing_is_said_once(world, tmp_path, capsys):
    """The loss and the gradient of a batch of one question without a negative are exactly 0."""
    lines = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    lines = [line | {"negatives": line["negatives"] if i == 0 else []} for i, line in enumerate(lines)]
    write_lines(tmp_path / "train.jsonl", lines)
    keys = {"batch_size": 1, "negatives": 1, "stop_after": 3, "dev": "", "train": tmp_path / "train.jsonl"}
    main("train_dpr.py", test_train_dpr.keys(world, tmp_path / "run", **keys))
    assert capsys.readouterr().out.count("are 0: from this batch nothing is learned") == 1


def test_of_equal_checkpoints_the_later_one_is_kept():
    """An exact match of 0 at every evaluation: the weights that have learned for longest are published."""
    run = Run.__new__(Run)
    run.cfg, run.state = SimpleNamespace(keep="best"), {"best": None, "best_step": 0}
    run.record = run.say = lambda _: None
    for step, em, best in ((2, 0.0, 2), (4, 0.0, 4), (6, 0.5, 6), (8, 0.25, 6), (10, 0.5, 10)):
        run.state["step"] = step
        run.dev({"em": em}, by="em", sign=1)
        assert run.state["best_step"] == best


def test_a_model_without_a_run_is_not_replaced(world, tmp_path):
    """run_dir holds the very model that training starts from, and no checkpoint: nothing is touched."""
    start = tmp_path / "run" / "query_encoder"
    shutil.copytree(world / "query_encoder", start)
    before = {file: file.read_bytes() for file in start.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="holds query_encoder, but no checkpoint.*another --run_dir"):
        main("train_dpr.py", test_train_dpr.keys(world, tmp_path / "run", init=start))
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


def test_wandb_needs_no_login(world, tmp_path):
    """tracker wandb without the package is one clear line, before a model is loaded."""
    keys = test_train_dpr.keys(world, tmp_path / "run", tracker="wandb", stop_after=2)
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install wandb"):
            main("train_dpr.py", keys)
        assert not (tmp_path / "run").exists()
    else:
        main("train_dpr.py", keys)
        assert len(rows(tmp_path / "run")) >= 2


@pytest.mark.parametrize("link", ["kept", "followed", "left out"])
def test_a_shared_encoder_in_a_run_that_was_copied(world, tmp_path, link):
    """cp -r, scp -r, rsync without links: the copy resumes, and its doc_encoder needs no other folder."""
    keys = test_train_dpr.keys(world, tmp_path / "run", shared_encoder=True, stop_after=3, save_every=2)
    main("train_dpr.py", keys)
    (tmp_path / "run" / "doc_encoder" / "README.md").write_text("my own words")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy, symlinks=link != "followed")
    for path in copy.rglob("doc_encoder"):
        if link == "left out" and path.is_symlink():
            path.unlink()
    main("train_dpr.py", keys | {"run_dir": copy, "stop_after": 5, "resume": "changed"})
    alone = shutil.copytree(copy / "doc_encoder", tmp_path / "alone", symlinks=True)
    moved = folder_hash(copy / "query_encoder")
    assert folder_hash(alone) == moved != folder_hash(tmp_path / "run" / "doc_encoder")
    assert load_encoder(alone, "passage").inputs["pair"].endswith("-5")


def test_the_model_card(whole):
    """The hub's first lines, the files, the command and the dev numbers of the published step."""
    trainer, keys, folder = whole
    end = json.loads((folder / "metrics.json").read_text())
    steps = [row for row in rows(folder) if row["step"] == end["best_step"] and "loss" not in row]
    for name in trainer.models:
        before = weights_hash(folder / name)
        card = (folder / name / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["license"] == "unknown" and "base_model" not in front
        is_tower = name in ("query_encoder", "doc_encoder")
        assert front["library_name"] == ("sentence-transformers" if is_tower else "transformers")
        assert f"{end['best_step']} steps" in card and f"trained on {Path(keys['train']).name}" in card
        assert f"command: {trainer.script} --" in card and "look it up" in card
        for key, value in steps[0].items():
            assert key == "step" or f"- {key}: {value}\n" in card
        (folder / name / "README.md").write_text("my own words")
        assert weights_hash(folder / name) == before


def test_the_model_card_of_a_hubs_weights_without_dev(tmp_path):
    """The base model and its licence, where they are known; no numbers where there are none."""
    (tmp_path / "state.json").write_text('{"step": 7}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    for start, licence in (("bert-base-uncased", "apache-2.0"), ("Luyu/co-condenser-wiki", "unknown")):
        config = {"init": start, "train": "a/train.jsonl", "corpus": "", "dev": "", "batch_size": 8}
        config["keep"] = "last"
        (tmp_path / "config.yaml").write_text("# command: x\n" + yaml.safe_dump(config))
        card = model_card("query_encoder", tmp_path, tmp_path)
        front = yaml.safe_load(card.split("---\n")[1])
        assert (front["base_model"], front["license"]) == (start, licence)
        assert "this run had no dev questions" in card and "{" not in card

    # dev numbers stand there; that they chose the step is said only where they did
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "mrr": 0.5}\n')
    for keep, words in (("last", "dev.jsonl:"), ("best", "dev.jsonl, by which this step was chosen:")):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"dev": "a/dev.jsonl", "keep": keep}))
        assert f"\n{words}\n- mrr: 0.5\n" in model_card("query_encoder", tmp_path, tmp_path)


@pytest.mark.parametrize(("devices", "launcher"), [(2, "--standalone"), (16, "--nnodes 8 YOUR_RENDEZVOUS")])
def test_a_signal_says_how_to_go_on(devices, launcher, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    stopped = SimpleNamespace(accelerator=SimpleNamespace(num_processes=devices), say=print, caught=[15])
    with pytest.raises(SystemExit) as end:
        Run._stop(stopped, 7)
    assert end.value.code == 143
    command = f"torchrun {launcher} --nproc_per_node 2 "
    assert f"stopped by a signal after step 7; go on with: {command}" in capsys.readouterr().out
