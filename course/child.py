"""
The other process of the course kit: it runs drivers on a tree of files, and sends arrays back.

The tree holds one student's function. No expected number is in the process, in its files or in its arguments.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import psutil

MEMORY = 4_000_000_000  # bytes that a child may hold; torch alone holds a tenth of it
SECONDS = 600  # of a child
LARGEST = 1e8  # bytes of arrays that a child may send back
# why a server that forks: torch and transformers take seconds to import, and are imported once
PRELOAD = "torch torch.distributed.nn.functional accelerate numpy psutil faiss yaml regex".split()
for name in "auto.modeling_auto auto.tokenization_auto bert.modeling_bert bert.tokenization_bert".split():
    PRELOAD.append(f"transformers.models.{name}")
for name in "dpr.modeling_dpr t5.modeling_t5 t5.tokenization_t5".split():
    PRELOAD.append(f"transformers.models.{name}")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def tasks(text):
    """
    Return {task: {check: (points, what is asked, where to read)}} of a table.

    A task is a line, file:function. Below it each check is one: points driver what is asked | where to read
    A part of a function is named by the beginnings of two statements: file:function ... first ... last
    """
    found = {}
    for line in text.strip().splitlines():
        if line[0] != " ":
            checks = found[line] = {}
            continue
        points, name, words = line.split(maxsplit=2)
        asked, _, read = words.partition(" | ")
        checks[name] = (int(points), asked, read)
    return found


def times(count):
    """A driver below this runs `count` times, each with new numbers: two seeds differ in its answer."""

    def decorate(driver):
        def runs(rng, *given):
            found = [driver(rng, *given) for _ in range(count)]
            return {f"{name}, {i}": value for i, run in enumerate(found, 1) for name, value in run.items()}

        return runs

    return decorate


def parts(task):
    """Return (file, function, first, last) of a task. No function: together. No first and last: all of it."""
    place, first, last = [*task.split(" ... "), "", ""][:3]
    path, _, name = place.partition(":")
    return path, name, first, last


# ---------------------------------------------------------------- in the child
def load(path):
    """Return the module in a file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guard(folder):
    """From here on this process reads Python, the system and `folder`, writes `folder`, starts no program."""
    # trap: this stops what a student writes in a lazy hour. It does not stop an attacker (README.md)
    places = (folder, sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev")
    readable = tuple(os.path.realpath(place) + os.sep for place in places)
    writable = tuple(os.path.realpath(place) + os.sep for place in (folder, "/dev"))
    changes = {"os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
    programs = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.kill", "os.killpg"}
    programs |= {"socket.connect"}

    def look(event, args):
        if event in programs:
            raise PermissionError(f"{event} is not allowed here")
        if event != "open" and event not in changes:
            return
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for path in args[:2]:
            # why the mode is left out: "r" is the second argument of open, and no path
            if not isinstance(path, str | bytes) or (event == "open" and path is args[1]):
                continue
            path = os.path.realpath(os.fsdecode(path)) + os.sep
            if not path.startswith(readable if reads else writable):
                raise PermissionError("a file outside of the assignment is not allowed here")

    sys.addaudithook(look)


def plain(value):
    """Return a tensor, an array or a number as an array of numbers; all else as an array with its json."""
    if type(value).__module__.startswith("torch"):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        value = np.array(value)
        if value.dtype.kind not in "fiub":
            raise TypeError(f"numbers are asked for, got {value.dtype}")
        return value
    return np.array(json.dumps(value))  # TypeError for an object that is no list, dict or str


def describe(error, tree):
    """Return an array of three texts: the error's type, its words, and where in the student's files."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(tree + os.sep):
            where = f"{frame.filename[len(tree) + 1 :]}:{frame.lineno}"
    return np.array([type(error).__name__, str(error)[:200], where])


def run_drivers(folder, assignment, task, seeds, most):
    """In the child: write what a task's drivers return at every seed to folder/out.npz, after each driver."""
    os.setsid()  # one group with all its children, so that all of it can be ended
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # where the parent is killed itself
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # on Linux; elsewhere the parent looks
    gc.freeze()  # why: a driver may collect, and torch's objects would take long each time
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    folder = os.path.realpath(folder)
    tree = f"{folder}/tree"
    os.chdir(tree)
    libraries = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [tree, *libraries]
    tempfile.tempdir = folder
    guard(folder)
    drivers = load(f"{tree}/{assignment}.py")
    path, function, *_ = parts(task)
    found = {}
    for seed in seeds:
        for name in drivers.TASKS[task]:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            try:
                given = []
                if function:
                    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
                    given = [getattr(module, function)]
                values = getattr(drivers, name)(rng, *given)
                values = {f"{seed}|{name}|{key}": plain(value) for key, value in values.items()}
            except BaseException as error:  # SystemExit and KeyboardInterrupt too
                values = {f"{seed}|{name}|error": describe(error, tree)}
            found |= values
            np.savez(f"{folder}/part.npz", **found)
            os.replace(f"{folder}/part.npz", f"{folder}/out.npz")


# ---------------------------------------------------------------- in the parent
def write_tree(files, folder):
    """Write {path: bytes} below a folder."""
    for path, content in files.items():
        target = Path(folder) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def outputs(files, assignment, task, seeds, seconds=SECONDS):
    """
    Run a task's drivers in a child, on a tree of the files {path: bytes}. Return (found, fault, seconds).

    found: {(seed, driver): {name: array}}, without the drivers that did not end. fault: why they did not.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_tree(files, f"{folder}/tree")
        child = context.Process(target=run_drivers, args=(folder, assignment, task, seeds, MEMORY))
        begin = time.monotonic()
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)  # what the server starts with
        child.start()
        os.environ.clear()
        os.environ.update(before)
        fault = "the process ended without an answer"
        while child.is_alive():
            child.join(0.1)
            if time.monotonic() - begin > seconds:
                fault = f"no answer after {seconds:.0f} seconds"
                break
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if psutil.Process(child.pid).memory_info().rss > MEMORY:
                    fault = f"more than {MEMORY / 1e9:.0f} GB of memory"
                    break
        for end in (lambda: os.killpg(child.pid, signal.SIGKILL), child.kill):
            with contextlib.suppress(ProcessLookupError):
                end()
        child.join()
        return read_outputs(f"{folder}/out.npz"), fault, time.monotonic() - begin


def read_outputs(path):
    """Return {(seed, driver): {name: array}} of a file that a child wrote; {} where it is none."""
    found = {}
    try:
        # why no link and no pipe: a student's function may have put one in the place of the file
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            state = os.fstat(opened.fileno())
            if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
                return {}
            with zipfile.ZipFile(opened) as file:
                if sum(entry.file_size for entry in file.infolist()) > LARGEST:
                    return {}
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                for key in arrays.files:
                    seed, name, part = key.split("|", 2)
                    found.setdefault((int(seed), name), {})[part] = arrays[key]
    except Exception:  # why all: what a child wrote must not stop the grading of others
        return {}
    return found


def flat(found):
    """Return what read_outputs reads, as np.savez takes it."""
    return {
        f"{seed}|{name}|{part}": a for (seed, name), arrays in found.items() for part, a in arrays.items()
    }
