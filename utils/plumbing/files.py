"""
Write files that are whole or absent, and tell by a hash which file it is.

A file or a folder is written under a temporary name, forced to the disk, and renamed.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

import psutil
from safetensors import SafetensorError

from utils.plumbing.config import UserError, disk_is_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


HELD = {}  # path -> open file: the system gives a lock back when its process ends, however it ends


def lock(path):
    """Hold the file `path` for the life of this process. UserError where another process holds it."""
    if not fcntl or path in HELD:  # Windows
        return
    file = open(path, "a+", encoding="utf-8")
    try:
        # why not flock: that knows no NFS. trap: closing the same file anywhere in this process unlocks it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"{Path(path).parent}: {holder} is at work there; wait until it ends, or end it"
        ) from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=file, flush=True)
    HELD[path] = file


def temporary_name(path):
    """Return how a temporary name beside `path` begins; what killed processes left there is deleted."""
    begin = f".{path.name}.{platform.node()[:20]}."
    for leftover in path.parent.glob(f"{glob.escape(begin)}*.*"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover, ignore_errors=True)
    return f"{begin}{os.getpid()}."


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """
    Open a temporary file (utf-8, newlines untouched) that becomes `path` when the block ends well.

    A link stays a link: the file that it points to is replaced. What a killed process left is deleted.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name(path) + "tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with explain_full_disk(path):
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path, replace=False):
    """Yield a temporary folder that becomes `path` when the block ends well. replace: a folder there goes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with explain_full_disk(path):
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if replace and path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            os.replace(temporary, path)
            sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explain_full_disk(path):
    """UserError where the disk is full while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise UserError(f"{path}: the disk is full; free some space and repeat the command") from None
        raise


def sync_folder(folder):
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def need_space(folder, size, what):
    """UserError unless `size` bytes are free where `folder` is or will be."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(f"{what} needs {size / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free")


def write_text(path, text):
    """Write a file, whole or not at all; where it holds this text already, nothing changes."""
    path = Path(path)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_file(path) as file:
            file.write(text)


def write_json(path, value):
    """Write `value` atomically as indented json. NaN is refused: it is not json."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path, absent=None):
    """Return the json in `path`, or `absent` where there is none. UserError names the line of a fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if absent is not None:
            return absent
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        advice = "get it again, or delete it and repeat the command that wrote it (of vectors: the folder)"
        raise UserError(f"{path}: not valid json: {error}; {advice}") from None


def sha256(path):
    """Return the hex sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(path):
    """Return one hex sha256 of the files of a folder, or of a file; "" for what is not here (a hub name)."""
    if not str(path):  # trap: Path("") is the current folder
        return ""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and file.name != "README.md"]  # a card is no weight
    files = [file for file in files if not file.name.startswith(".")]  # .DS_Store
    lines = [f"{file.name} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def weights_hash(path):
    """Return folder_hash of starting weights, or the hash of the name where that is a hub's."""
    return folder_hash(path) or hashlib.sha256(str(path).encode()).hexdigest()
