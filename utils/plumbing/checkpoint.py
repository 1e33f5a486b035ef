"""
Checkpoints that are whole, checked and enough: weights, optimizer moments and counters, each file with its
sha256.

There is no random state in them. Order, negatives and dropout are functions of (seed, step), so a killed run
resumes to the same bits. why not accelerate's save_state: its load_state accepts a flipped bit in the
weights, and resumes in the middle of an epoch with other negatives (measured with accelerate 1.15).
"""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_folder, read_json, sha256, write_json
from utils.plumbing.model_card import model_card
from utils.plumbing.weights import pair_id, read_inputs, save_encoder

KEEP = 2  # checkpoints that stay, beside the best one


def save_checkpoint(run_dir, step, models, optimizer, state, best_step):
    """
    Write run_dir/checkpoints/step_XXXXXXXX atomically, then delete all but the newest two and the best.

    models: name -> model; one object under two names is stored once, and the second name is a link to the
    first. optimizer: its tensors go to a safetensors file. state: a dict for json with everything else.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{step:08d}"
    for other in [*folder.parent.glob("step_*"), *folder.parent.glob(".step_*")]:
        # why: what is newer was abandoned by a resume, what is hidden was left by a killed write
        if other.name >= folder.name or other.name.startswith("."):
            shutil.rmtree(other)

    with atomic_folder(folder) as temporary:
        names = {}
        for name, model in models.items():
            if id(model) in names:
                (temporary / name).symlink_to(names[id(model)])
            else:
                save_encoder(model, temporary / name)
                names[id(model)] = name
        save_moments(temporary, optimizer)
        write_json(temporary / "state.json", state)
        files = sorted(file for file in temporary.rglob("*") if file.is_file() and not file.is_symlink())
        write_json(temporary / "manifest.json", {str(f.relative_to(temporary)): sha256(f) for f in files})

    for old in sorted(folder.parent.glob("step_*"))[:-KEEP]:
        if old.name != f"step_{best_step:08d}":
            shutil.rmtree(old)


def newest_checkpoint(run_dir, say=print):
    """
    Return the newest checkpoint folder whose every file matches its hash, or None where there is none at all.

    A damaged one is named and passed over: an unattended restart needs the one before it. UserError when all
    are damaged.
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
    """Return what is wrong with a checkpoint folder, or ""."""
    if not (folder / "manifest.json").is_file():
        return "manifest.json is missing"
    try:
        hashes = read_json(folder / "manifest.json")
    except UserError as error:
        return str(error)
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} does not match its sha256 (truncated or altered)"
    return ""


def save_moments(folder, optimizer):
    """Write AdamW's two moments and step counts of every parameter as `<number>.<name>` tensors."""
    tensors = {}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            tensors[f"{number}.{name}"] = tensor
    save_file(tensors, folder / "optimizer.safetensors")


def load_moments(folder, optimizer):
    """
    Put the stored moments back into `optimizer`, whose parameters must come in the same order and shapes.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {}
    for key, tensor in load_file(Path(folder) / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        entries.setdefault(int(number), {})[name] = tensor
    for number, entry in entries.items():
        if number >= len(parameters) or entry["exp_avg"].shape != parameters[number].shape:
            raise UserError(f"{folder}: the optimizer state is of another architecture (parameter {number})")
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def publish(checkpoint, run_dir):
    """
    Copy the models of a checkpoint to run_dir/<name>, where the next stage looks; repair a killed copy.

    Each is a folder that needs no other, with a model card (README.md), so that it can be uploaded.
    """
    sources = {path.name: path for path in sorted(Path(checkpoint).iterdir()) if path.is_dir()}
    sources.pop("index_encoder", None)  # only a resume of EMDR2 needs it (utils/live_index.py)
    if "query_encoder" in sources and read_inputs(sources["query_encoder"]).get("role") == "shared":
        # why not the checkpoint's link: where a run was copied by scp or zip it is a folder, or missing
        sources["doc_encoder"] = sources["query_encoder"]
    for name, source in sources.items():
        target = Path(run_dir) / name
        if target.is_symlink():  # of before December 2026
            target.unlink()
        if not target.exists() or pair_id(target) != pair_id(source):
            with atomic_folder(target, replace=True) as copy:  # a killed copy must not look like a model
                shutil.copytree(source, copy, dirs_exist_ok=True)
                (copy / "README.md").write_text(model_card(name, checkpoint, run_dir), encoding="utf-8")
