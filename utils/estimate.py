"""
What a run will cost on this machine, from a short timed probe, before any work: the `--dry_run` of every
script.
"""

import shutil
import time
from pathlib import Path

import torch

from utils.config import UserError
from utils.distributed import peak_memory


def dry_run(what, models, probe, units, unit, folder, disk, extra_memory=0, growth=1.0):
    """
    Print parameters, memory, disk and minutes of a run; UserError when this machine cannot hold it.

    models: modules of the run. probe: function that does a small real piece of the work and returns how many
    units it did; it runs twice, the first time to warm up. units: number of units of the whole run. disk:
    bytes it will write below run_dir.
    extra_memory: bytes that the probe does not see, such as an optimizer's moments. growth: memory of the
    real piece of work over that of the probe (1 when it does not grow).
    """
    parameters = sum(p.numel() for p in {id(p): p for model in models for p in model.parameters()}.values())
    before = peak_memory()
    probe()
    start = time.perf_counter()
    done = probe()
    seconds = (time.perf_counter() - start) / done * units
    memory = before + (peak_memory() - before) * growth + extra_memory
    if torch.cuda.is_available():
        device, limit = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        device, limit = f"CPU, {torch.get_num_threads()} threads", total_memory()
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(
        f"dry run: {what} on {device}\n"
        f"  parameters {parameters / 1e6:.1f} M\n"
        f"  memory     {memory / 1e9:.1f} GB of {limit / 1e9:.1f}\n"
        f"  disk       {disk / 1e9:.2f} GB of {free / 1e9:.1f} free\n"
        f"  time       {seconds / 60:.1f} minutes for {units} {unit} (from a probe of {done:.3g} {unit})"
    )
    if memory > limit:
        raise UserError(
            "this does not fit in memory: turn on grad_cache or lower its chunks (or the batch size)"
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
