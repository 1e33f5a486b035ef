"""Run a script of the repository in fresh processes, as its user would, or a function on W gloo processes."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.plumbing.config import ROOT

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # why: tiny models' threads wait for each other, up to 30 times as long
}


def command(script, arguments, processes=1):
    """The argv of a script; `arguments` is a dict of keys. With 2 processes it goes through torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    keys = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    return [sys.executable, *(launcher if processes > 1 else []), script, *keys]


def run(script, arguments, processes=1, env=ENVIRONMENT):
    """Run to the end and return the CompletedProcess with text output."""
    argv = command(script, arguments, processes)
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def begin(script, arguments, processes=1):
    """Start it in the background in its own process group, output merged and readable."""
    argv = command(script, arguments, processes)
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **out)


def kill_tree(process, number):
    """Signal a process and all its descendants; torchrun's workers have a session of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # gone meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    family = [process.pid]
    for pid in family:
        family += parents.get(pid, [])
    for pid in reversed(family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _member(rank, function, devices, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=devices)
    function(*arguments)
    dist.destroy_process_group()


def on_devices(devices, function, *arguments):
    """Call function(*arguments) on `devices` gloo processes; results go through files."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_member, (function, devices, f"{folder}/store", arguments), nprocs=devices)
