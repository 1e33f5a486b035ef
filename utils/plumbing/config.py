"""
One flat yaml per run, `--key value` to override it, and errors that a student can act on.

The yaml that a script names as its schema lists every key that the script knows, with a comment and a value
of the right type. Any other yaml or override is checked against it: an unknown key or a wrong type is an
error that names the nearest key, and no number may be negative. No default hides in code. `--help` prints the
schema.
"""

import contextlib
import difflib
import errno
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Errors of the system that the user or the machine is behind. Not ENOENT, EEXIST and ENOTEMPTY: the paths of
# the user are checked at the start, so these are renames of ours that went wrong.
NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
NOT_OURS |= {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EMFILE}


class UserError(Exception):
    """
    A mistake of the user, or of the user's files: printed as one line (what, where, the fix), no traceback.
    """


@contextlib.contextmanager
def friendly_errors():
    """
    A fault of the user or of the machine becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    `--debug` keeps the traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(_fail("stopped by Ctrl-C", 130))
    except Exception as error:
        message = in_a_sentence(error)
        if not message:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        sys.exit(_fail(f"error: {message}", 2))


def in_a_sentence(error):
    """What a fault of the user or of the machine is; "" for one of ours, which deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if memory_is_full(error):
        line = "the memory is full: lower the batch sizes or the chunks, on a GPU use --mixed_precision bf16"
        said = str(error).strip().partition("\n")[0]
        return f"{line} ({said})" if said else line
    if not isinstance(error, OSError):
        return ""
    place = error.filename2 or error.filename  # of a rename the final name, not the temporary one
    if disk_is_full(error):
        return f"{f'{place}: ' if place else ''}the disk is full; free some space and repeat the command"
    return f"{place}: {error.strerror}" if place and error.errno in NOT_OURS else ""


def memory_is_full(error):
    """Whether an error of Python, numpy, torch or the system means that the memory is full, of a GPU too."""
    # trap: torch says it of a CPU by a plain RuntimeError, "can't allocate memory"; of a GPU by its own class
    ours = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return ours or (isinstance(error, RuntimeError | OSError) and "allocate memory" in str(error))


def disk_is_full(error):
    """Whether an error of the system, of safetensors, shutil or numpy around it, means ENOSPC."""
    # trap: numpy gives no errno where not all of an array was written
    signs = ("os error 28", "No space left", "requested and")
    return getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in signs)


def _fail(message, code):
    print(message, file=sys.stderr, flush=True)
    return code


def nearest(name, known):
    """`did you mean ...?` for a misspelt name, or the list of known names."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def read_yaml(path):
    """The mapping in a flat yaml file. UserError when it is missing, not yaml, or not flat."""
    if fault := file_fault(path):
        raise UserError(f"config {path}: {fault}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise UserError(f"{path}: expected flat `key: value` lines")
    return values


def convert(key, value, example, where):
    """`value` as the type of `example` (bool, int, float, str or list); UserError if it cannot be that."""
    kind = type(example)
    try:
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"  # trap: bool("false") is True
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)  # trap: PyYAML reads 2e-5 as a string, only 2.0e-5 as a number
        if kind is list:
            items = value if isinstance(value, list) else yaml.safe_load(value)
            if isinstance(items, int | float) or (isinstance(items, str) and items):
                items = [items]  # why: --eval_top_docs 10 means a list of one
            return [convert(key, x, example[0], where) for x in items] if example else items
        if kind is str and not isinstance(value, dict | list | bool | None.__class__):
            return str(value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError):
        pass
    raise UserError(f"{where}: {key} must be of type {kind.__name__} (such as {example!r}), got {value!r}")


def load_config(doc, schema, argv=None):
    """
    Config of a run as a namespace: the yaml of `--config` (default: the schema), overridden by `--key value`.

    doc: the script's docstring, shown by --help. schema: path below the repository,
    "config/train_dpr_nq.yaml". The result has one attribute per schema key and `config`, the path that was
    read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = read_yaml(ROOT / schema)
    if "--help" in argv or "-h" in argv:
        print(f"{doc.strip()}\n\nKeys (from {schema}; override any of them with --key value):\n")
        print((ROOT / schema).read_text(encoding="utf-8"))
        sys.exit(0)
    argv = [a for a in argv if a != "--debug"]
    overrides, path = {}, str(ROOT / schema)
    while argv:
        flag, joined, value = argv.pop(0).partition("=")
        key = flag.removeprefix("--")
        if not flag.startswith("--"):
            raise UserError(f"command line: {flag!r} is not a flag; write --key value (see --help)")
        if key != "config" and key not in known:
            raise UserError(f"command line: unknown key {flag}; {nearest(key, [*known, 'config'])}")
        if not joined:
            lone_switch = isinstance(known.get(key), bool) and (not argv or argv[0].startswith("--"))
            if not argv and not lone_switch:
                raise UserError(f"command line: {flag} needs a value")
            value = "true" if lone_switch else argv.pop(0)
        if key == "config":
            path = value
        else:
            overrides[key] = convert(key, value, known[key], "command line")
    values = read_yaml(path)
    for key in values:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(key, list(known))}")
    for key in known:
        if key not in values:
            raise UserError(f"{path}: key {key!r} is missing; copy its line from {schema}")
    resolved = {key: convert(key, values[key], known[key], path) for key in known} | overrides
    at_least(SimpleNamespace(**resolved), 0, *(key for key in known if type(known[key]) in (int, float)))
    return SimpleNamespace(**resolved, config=path)


def must_be_one_of(cfg, **allowed):
    """UserError unless each key's value is among those allowed: choose(cfg, pooling=("cls", "mean"))."""
    for key, values in allowed.items():
        if getattr(cfg, key) not in values:
            raise UserError(f"{key} must be one of {', '.join(map(str, values))}, got {getattr(cfg, key)!r}")


def at_least(cfg, least, *keys):
    """UserError where the value of one of `keys` is under `least`."""
    for key in keys:
        if not getattr(cfg, key) >= least:  # NaN too
            raise UserError(f"{key} must be at least {least}, got {getattr(cfg, key)}")


def file_fault(path):
    """What keeps a file from being read, or ""."""
    path = Path(path)
    return "" if path.is_file() else "is a folder; name a file" if path.is_dir() else "no such file"


def model_fault(path, what="model"):
    """What is seen at once to be wrong with the path of a model (a folder, hub name or `.cp` file), or ""."""
    path, here = str(path), Path(path)
    inside = sorted(config.parent.name for config in here.glob("*/config.json"))
    if inside and not (here / "config.json").is_file():
        return f"is no model, but the folder of {', '.join(inside)}; name one of these"
    if here.is_file() and not path.endswith(".cp"):
        return "is a file; name the folder that it is in"
    if not here.exists() and "/" in path and (here.parent.exists() or path.count("/") > 1):
        return f"no such {what} folder (its parent exists or it has many slashes, so this is no hub name)"
    return ""


def need_file(cfg, *keys, optional=()):
    """UserError where a key names no file; one of `optional` may be "", which is not given."""
    need_value(cfg, *keys)
    for key in (*keys, *optional):
        if getattr(cfg, key) and (fault := file_fault(getattr(cfg, key))):
            raise UserError(f"{key}: {getattr(cfg, key)}: {fault}")


def need_value(cfg, *keys):
    """UserError where a key that the work cannot do without is ""."""
    for key in keys:
        if not getattr(cfg, key):
            raise UserError(f"{key}: give a path, it is empty")


def need_model(cfg, *keys):
    """UserError, before any work, where a key names no model."""
    need_value(cfg, *keys)
    for key in keys:
        if fault := model_fault(getattr(cfg, key)):
            raise UserError(f"{key}: {getattr(cfg, key)}: {fault}")


def need_folder(cfg, key, folder=""):
    """UserError, before any work, where a key's folder (or `folder`) cannot be written into or made."""
    need_value(cfg, key)
    path = Path(folder or getattr(cfg, key))
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise UserError(f"{key}: {getattr(cfg, key)}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{key}: {getattr(cfg, key)}: {there} cannot be written")


def need_out(cfg, key, *inputs):
    """
    UserError, before any work, where the file that a key names cannot be written or is one of the inputs.
    """
    need_value(cfg, key)
    path = Path(getattr(cfg, key))
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; name a file")
    need_folder(cfg, key, path.parent)
    for other in inputs:
        if getattr(cfg, other) and Path(getattr(cfg, other)).resolve() == path.resolve():
            raise UserError(f"{key}: {path} is an input too ({other}); name another file")
