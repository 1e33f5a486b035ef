"""
What a run will cost on this machine, from a short timed probe, before any work: `--dry_run` of every script.
"""

import time
from pathlib import Path

import torch

from utils.distributed import peak_memory, world
from utils.plumbing.config import UserError
from utils.plumbing.files import free_space


def dry_run(what, models, probe, units, unit, folder, disk, fixed_memory=0, growth=1.0):
    """
    Print parameters, memory, disk and minutes of a run; UserError when this machine cannot hold it.

    models: modules of the run. probe: does a small real piece of the work and returns how many units that
    was; it runs twice, the first time to warm up. units: how many the whole run has, `unit` their name. disk:
    bytes written to folder. fixed_memory: bytes beside the weights that do not depend on the batch
    (gradients, moments, an index).
    growth: activation memory of the real batch over that of the probe (1 when it does not grow).
    """
    device = next(models[0].parameters()).device
    unique = {id(p): p.numel() for model in models for p in model.parameters()}
    before = peak_memory(device)
    probe()
    start = time.perf_counter()
    done = probe()
    seconds = (time.perf_counter() - start) / done * units
    activations = max(0, peak_memory(device) - before) * growth
    if device.type == "cuda":
        name, limit = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    else:
        name, limit = f"CPU, {torch.get_num_threads()} threads", total_memory()
    memory = before + activations + fixed_memory
    free = free_space(folder)
    if world()[0] == 0:
        print(
            f"dry run: {what} on {name}\n"
            f"  parameters {sum(unique.values()) / 1e6:.1f} M\n"
            f"  memory     {memory / 1e9:.2f} GB of {limit / 1e9:.1f}\n"
            f"  disk       {disk / 1e9:.2f} GB of {free / 1e9:.1f} free\n"
            f"  time       {seconds / 60:.1f} minutes for {units} {unit}, without evaluations"
        )
    if memory > limit:
        raise UserError(
            "this does not fit in memory: lower the chunks or the batch size; train_dpr.py: --grad_cache true"
        )
    if disk > free:
        raise UserError(
            f"this does not fit on the disk of {folder}: free some space or choose another folder"
        )


def total_memory():
    """Bytes of memory of this machine or container (the smaller)."""
    lines = Path("/proc/meminfo")
    total = int(lines.read_text().split()[1]) * 1024 if lines.is_file() else 1 << 62
    limit = Path("/sys/fs/cgroup/memory.max")
    value = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(value)) if value.isdigit() else total
