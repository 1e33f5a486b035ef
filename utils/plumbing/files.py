"""
Files that are whole or absent (temporary name, fsync, rename), and the hashes that prove which file it is.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from utils.plumbing.config import UserError, disk_is_full


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """
    Open a temporary file (utf-8, newlines untouched) that becomes `path` when the block ends without an
    error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise UserError(f"{path}: the disk is full; free some space and repeat the command") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """
    Yield a temporary folder that becomes `path` (not existing yet) when the block ends without an error.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise UserError(f"{path}: the disk is full; free some space and repeat the command") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder):
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Atomically write `value` as indented json (NaN is refused: it is not json)."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path):
    """The json in `path`; UserError names the line when it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid json: {error}") from None


def sha256(path):
    """Hex sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(folder):
    """Bytes free where `folder` is or will be."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def need_space(folder, size, what):
    """UserError unless `size` bytes are free where `folder` is (or will be)."""
    free = free_space(folder)
    if free < size:
        raise UserError(f"{what} needs {size / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free")


def folder_hash(path):
    """
    One hex sha256 of the files of a folder (or of one file), "" for what is not here, such as a hub name. It
    tells whether weights are the same without loading them.
    """
    if not str(path):  # trap: Path("") is the folder that one stands in
        return ""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    parts = [f"{file.name} {sha256(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


def weights_hash(path):
    """folder_hash of starting weights; of a hub name, which has no files here, the hash of the name."""
    return folder_hash(path) or hashlib.sha256(str(path).encode()).hexdigest()
