"""
Checkpoints that are whole, checked and enough: weights, optimizer moments and counters, each file with its
sha256.

There is no random state in them: order, negatives and dropout are pure functions of (seed, step), so a killed
run resumes to the same bits. trap: accelerate's load_state accepts a flipped bit in the weights, and resumes
mid-epoch with other negatives (measured with 1.15).
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_folder, read_json, sha256, write_json
from utils.plumbing.weights import pair_id, save_encoder


def save_checkpoint(run_dir, step, encoders, optimizer, state, protect=0, keep=2):
    """
    Write run_dir/checkpoints/step_XXXXXXXX atomically, then delete all but the newest `keep` and the one of
    step `protect`.

    encoders: name -> Encoder; the same object under two names is stored once, the second name being a link to
    the first.
    optimizer: torch optimizer, its tensors go to a safetensors file. state: json-able dict of everything
    else.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    for other in [*folder.parent.glob("step_*"), *folder.parent.glob(".step_*")]:
        # why: what is newer belongs to a future that a resume has abandoned, what is hidden to a killed write
        if other.name >= folder.name or other.name.startswith("."):
            shutil.rmtree(other)
    with atomic_folder(folder) as temporary:
        stored = {}
        for name, encoder in encoders.items():
            if id(encoder) in stored:
                (temporary / name).symlink_to(stored[id(encoder)])
            else:
                save_encoder(encoder, temporary / name)
                stored[id(encoder)] = name
        moments = optimizer.state_dict()["state"]
        tensors = {f"{i}.{key}": value for i, entry in moments.items() for key, value in entry.items()}
        save_file(tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state)
        files = sorted(file for file in temporary.rglob("*") if file.is_file() and not file.is_symlink())
        write_json(temporary / "manifest.json", {str(f.relative_to(temporary)): sha256(f) for f in files})
    complete = sorted(folder.parent.glob("step_*"))
    for old in complete[:-keep]:
        if old.name != f"step_{protect:08d}":
            shutil.rmtree(old)
    return folder


def newest_checkpoint(run_dir, say=print):
    """
    The newest checkpoint folder whose every file matches its hash, or None where there is none at all. A
    damaged one is named and passed over; UserError when all are damaged. Reads and changes no model.
    """
    folders = sorted((Path(run_dir) / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        fault = damage(folder)
        if not fault:
            return folder
        say(f"{folder}: {fault}; trying the checkpoint before it")
    if folders:
        raise UserError(f"{run_dir}: every checkpoint is damaged; delete the folder to start again")
    return None


def damage(folder):
    """What is wrong with a checkpoint folder, or ""."""
    if not (folder / "manifest.json").is_file():
        return "manifest.json is missing"
    try:
        wanted = read_json(folder / "manifest.json")
    except UserError as error:
        return str(error)
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} does not match its sha256 (truncated or altered)"
    return ""


def make_optimizer(named, cfg):
    """
    AdamW for (name, parameter) pairs; biases and layer norms are not decayed (DPR
    dpr/models/hf_models.py:166, RocketQA model/src/optimization.py:102-131). load_optimizer needs the same
    pairs in the same order.
    """
    groups = {True: [], False: []}
    for name, parameter in named:
        plain = name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name  # BERT's, T5's
        groups[plain].append(parameter)
    groups = [
        {"params": p, "weight_decay": 0.0 if plain else cfg.weight_decay} for plain, p in groups.items()
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, eps=cfg.adam_epsilon)


def load_optimizer(folder, optimizer):
    """
    Put the stored moments back into `optimizer`, whose parameters must come in the same order and shapes.
    """
    tensors = load_file(Path(folder) / "optimizer.safetensors")
    entries = {}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        entries.setdefault(int(i), {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in entries.items():
        if i >= len(parameters) or entry["exp_avg"].shape != parameters[i].shape:
            raise UserError(f"{folder}: the optimizer state is of another architecture (parameter {i})")
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def publish(checkpoint, run_dir):
    """
    Copy the model folders of a checkpoint to run_dir/<name>, where the next stage looks; repairs a killed
    copy.
    """
    for source in sorted(path for path in Path(checkpoint).iterdir() if path.is_dir()):
        target = Path(run_dir) / source.name
        if source.is_symlink():
            target.unlink(missing_ok=True)
            target.symlink_to(source.readlink())
        elif not target.exists() or pair_id(target) != pair_id(source):
            old, copy = target.with_name(f".{source.name}.old"), target.with_name(f".{source.name}.new")
            for leftover in (old, copy):
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.copytree(source, copy)
            if target.exists():
                target.rename(old)
            copy.rename(target)
            shutil.rmtree(old, ignore_errors=True)
