"""
Run a script of the repository: its main() in this process, in processes of its own, or a function on W gloo
processes.

why forks: a new Python spends five seconds of CPU on the imports of torch and transformers, a toy run less
than one on its work. A process of its own is here a fork of a server that has the libraries loaded, and
nothing of this repository. tests/test_trainers.py runs a command as its user types it, with and without
torchrun.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from tests.warm_python import LIBRARIES
from utils.plumbing.config import ROOT

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # why: tiny models' threads wait for each other, up to 30 times as long
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(LIBRARIES))


def flags(keys):
    """{key: value} as the words of a command line."""
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def no_handler(*_):
    """In the place of signal.signal. why not a lambda: processes that are spawned are told of it by name."""


def main(script, keys, *words):
    """Run main() of a script or module in this process, without its signal handlers."""
    AcceleratorState._reset_state(True)  # why: it keeps the first mixed_precision of a process for ever
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, *flags(keys), *words])
        patch.setattr("signal.signal", no_handler)
        importlib.import_module(script.removesuffix(".py")).main()


def rows(run_dir):
    """metrics.jsonl without what differs between two runs: the time."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ---------------------------------------------------------------- processes of its own
class Fork(FORKS.Process):
    """`python script --key value ...`, with what subprocess.Popen has."""

    def __init__(self, script, keys, environment, *outputs):
        super().__init__()
        self.argv, self.environment = [script, *flags(keys)], environment
        self.outputs = [Connection(os.dup(place), readable=False) for place in outputs]

    def run(self):
        os.setsid()
        for place, output in enumerate(self.outputs, 1):
            os.dup2(output.fileno(), place)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(ROOT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # why: a shell's background jobs ignore it
        sys.argv = self.argv
        runpy.run_path(self.argv[0], run_name="__main__")

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self):
        text = self.stdout.read()
        self.join()
        return text, None

    @property
    def returncode(self):
        return self.exitcode


def torchruns(processes):
    """What torchrun tells each of its processes."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "toy"}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(script, keys, processes=1, env=ENVIRONMENT):
    """Run to the end and return what a CompletedProcess has, of several processes the texts of all."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        places = torchruns(processes)
        forks = [Fork(script, keys, env | place, out.fileno(), err.fileno()) for place in places]
        for fork in forks:
            fork.start()
        for fork in forks:
            fork.join(900)
            fork.kill()
            fork.join()
        for file in (out, err):
            file.seek(0)
        code = max((fork.exitcode for fork in forks), key=abs)
        return SimpleNamespace(returncode=code, stdout=out.read(), stderr=err.read())


def begin(script, keys):
    """Start it in the background in its own process group, output merged and readable."""
    read, write = os.pipe()
    fork = Fork(script, keys, ENVIRONMENT, write, write)
    fork.start()
    os.close(write)
    fork.outputs.clear()
    fork.stdout = open(read)
    return fork


def begin_torchrun(script, keys):
    """Start it on two processes by the real launcher, output merged and readable."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    argv = [sys.executable, *launcher, script, *flags(keys)]
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


# ---------------------------------------------------------------- a function on W devices
def _member(rank, function, devices, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=devices)
    function(*arguments)
    dist.destroy_process_group()


def on_devices(devices, function, *arguments):
    """Call function(*arguments) on `devices` gloo processes; results go through files."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, devices, f"{folder}/store", arguments)
        mp.start_processes(_member, arguments, nprocs=devices, start_method="forkserver")
