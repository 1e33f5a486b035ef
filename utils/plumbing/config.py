"""
The settings of a script, and errors that a student can act on.

Every script has one full yaml. It lists all keys, each with a value of the right type, a comment and a
source. Any other yaml names only the keys that differ: config/train_gcdpr_nq.yaml *is* what GC-DPR changes.
`--key value` on the command line wins over both. An unknown key or a wrong type is an error that names the
nearest key. No number may be negative. `--help` prints the full yaml.
"""

import contextlib
import difflib
import errno
import json
import math
import os
import re
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import yaml

from prepare.hints import SYNONYMS

ROOT = Path(__file__).resolve().parents[2]
# Errors of the system that the user or the machine caused, and what to do. Not ENOENT, EEXIST and ENOTEMPTY:
# the user's paths are checked at the start, so these are renames of ours that went wrong.
NAMES = "EACCES EPERM EROFS EIO ENAMETOOLONG EISDIR ENOTDIR ELOOP ESTALE EBUSY ETXTBSY ENXIO ENODEV".split()
CURES = {getattr(errno, name): "" for name in NAMES if hasattr(errno, name)}
FULL = "the disk is full; free some space and repeat the command"
CURES |= {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.ENFILE: "too many open files in the system"}
CURES |= {errno.EMFILE: "too many open files; raise the limit: ulimit -n 4096"}
CURES |= {errno.EFBIG: "the file is larger than is allowed; raise the limit: ulimit -f unlimited"}
CURES |= {errno.EPIPE: "the program that read the output has ended; write the output into a file"}


class UserError(Exception):
    """A mistake of the user: printed as one line (what, where, the fix), without a traceback."""


# ---------------------------------------------------------------- errors
@contextlib.contextmanager
def friendly_errors():
    """Turn a fault of user or machine into one line and exit code 2, Ctrl-C into 130 (--debug: traceback)."""
    open_streams()
    try:
        yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        message = in_a_sentence(error)
        if not message:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
            # what torchrun prints last
            file = os.environ.get("TORCHELASTIC_ERROR_FILE") or os.devnull
            when = {"timestamp": str(int(time.time()))}
            report = {"message": {"message": f"error: {message}", "extraInfo": when}}
            Path(file).write_text(json.dumps(report), encoding="utf-8")
        sys.exit(2)


def open_streams():
    """Make the standard streams usable: open where they are closed, and in ASCII no letter is an error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # trap: the next file to be opened would get this number, and FAISS's warnings
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        setattr(sys, name, stream)
        with contextlib.suppress(OSError, AttributeError):  # a stream of another kind is left as it is
            stream.reconfigure(errors="backslashreplace")


def in_a_sentence(error):
    """Return what a fault of user or machine is; "" for one of ours, which deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if memory_is_full(error):
        advice = "lower the chunks, which changes no gradient (train_dpr.py: with --grad_cache true), "
        advice += "or the batch sizes, on a GPU use --mixed_precision bf16"
        detail = first_line(error)
        return f"the memory is full: {advice}" + (f" ({detail})" if detail else "")
    # trap: safetensors and shutil give the number of the system's error only in their text; numpy gives none
    number = getattr(error, "errno", None)
    if found := re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error)):
        number = number or int(found[1] or found[2])
    # numpy on a full disk says "4096 requested and 512 written", without a number
    if "requested and" in str(error) and isinstance(error, OSError):
        number = errno.ENOSPC
    if number == errno.EPIPE:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # why: python writes the rest when it ends
    place = getattr(error, "filename2", None) or getattr(
        error, "filename", None
    )  # of a rename the final name
    if place and (fault := broken_link(place)):
        return f"{place}: {fault}"
    if number not in CURES or not (place or CURES[number]):
        return ""
    return (f"{place}: " if place else "") + (CURES[number] or os.strerror(number))


def first_line(error):
    return str(error).strip().partition("\n")[0]


def memory_is_full(error):
    """Return whether an error of Python, numpy, torch or the system means that memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # trap: torch says it of a CPU by a plain RuntimeError, "can't allocate memory"
    return isinstance(error, RuntimeError | OSError) and "allocate memory" in str(error)


def disk_is_full(error):
    """Return whether an error of the system, of safetensors, shutil or numpy means ENOSPC."""
    return in_a_sentence(error).endswith(FULL)


def broken_link(path):
    """Return what is wrong where a path, or a folder above it, is a link to nowhere, or ""."""
    for part in (Path(path).absolute(), *Path(path).absolute().parents):
        if part.is_symlink() and not part.exists():
            return f"{part} is a link to {os.readlink(part)}, which is not there; is its disk mounted?"
    return ""


def nearest(name, names):
    """Return `did you mean ...?` for a misspelt name, or the list of the right names."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def hint(key, names):
    """Return what a key of another program is called here, or in another script; else the nearest name."""
    plain = key.rpartition(".")[2].replace("-", "_").lstrip("+_")  # hydra's train.batch_size, DPR's n-docs
    wanted = SYNONYMS.get(plain, plain).split()
    for name in wanted:
        if name in names and name != key:
            return f"{key} is {name} here"
    for path in sorted((ROOT / "config").glob("*.yaml")):
        script = path.stem.removesuffix("_nq")
        here = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.M)
        for name in wanted:
            if name in here and plain in SYNONYMS and (ROOT / f"{script}.py").is_file():
                return f"{key} is {name} of {script}.py"
    return nearest(key, names)


# ---------------------------------------------------------------- settings
def load_config(doc, base, argv=None):
    """
    Return the settings as a namespace: the full yaml `base`, changed by --config, then by --key value.

    doc: the script's docstring, for --help. base: a path below the repository, "config/train_dpr_nq.yaml".
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(f"{doc.strip()}\n\nKeys (from {base}; override any of them with --key value):\n")
        print((ROOT / base).read_text(encoding="utf-8"))
        sys.exit(0)
    defaults = read_yaml(ROOT / base)
    flags = read_flags([word for word in argv if word != "--debug"], defaults)
    path = flags.pop("config", str(ROOT / base))
    changes = read_yaml(path)
    for key in changes:
        if key not in defaults:
            raise UserError(f"{path}: unknown key {key!r}; {hint(str(key), list(defaults))}")
    values = {}
    for key, default in defaults.items():
        # why even where a flag wins: a wrong line of the yaml is told all the same
        values[key] = typed(key, changes.get(key, default), default, path)
        if key in flags:
            values[key] = typed(key, flags[key], default, "command line")
    return SimpleNamespace(**values, config=path)


def read_yaml(path):
    """Return a yaml file as a dict. UserError when it is missing, not yaml, or not flat."""
    if fault := file_fault(path):
        raise UserError(f"config {path}: {fault}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.safe_load(text)
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2026-13-45 is a ValueError
        raise UserError(f"{path}: not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UserError(f"{path}: expected flat `key: value` lines")
    keys = [key.value for key, _ in node.value]
    for place, key in enumerate(keys):  # trap: yaml takes the last of two values without a word
        if key in keys[:place]:
            raise UserError(f"{path}:{node.value[place][0].start_mark.line + 1}: {key!r} stands there twice")
    return values


def read_flags(argv, defaults):
    """Return {key: text} of `--key value`, `--key=value`, and `--key` alone, which means true."""
    flags, names = {}, [*defaults, "config"]
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        key = flag.removeprefix("--")
        if not flag.startswith("--"):
            advice = f"; {hint(flag, names)}" if equals or flag.startswith("-") else ""
            raise UserError(f"command line: {flag!r} is not a flag; write --key value (see --help){advice}")
        if key not in names:
            raise UserError(f"command line: unknown key {flag}; {hint(key, names)}")
        if not equals:
            value_follows = argv and not argv[0].startswith("--")
            if isinstance(defaults.get(key), bool) and not value_follows:
                value = "true"
            elif argv:
                value = argv.pop(0)
            else:
                raise UserError(f"command line: {flag} needs a value")
        flags[key] = value
    return flags


def typed(key, value, default, where):
    """Return `value` as the type of `default`: bool, int, float, str or list. UserError if it is another."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]  # trap: bool("false") is True
        if kind is list:
            items = yaml.safe_load(value) if isinstance(value, str) else value
            if not isinstance(items, list):
                items = [] if items in (None, "") else [items]  # why: --eval_top_docs 10 means a list of one
            return [typed(key, item, default[0], where) for item in items] if default else items
        if default == "auto" and isinstance(value, bool):  # `normalize: true` in a yaml
            return str(value).lower()
        if default in ("true", "false"):  # or auto; a bool otherwise, as in the checkpoints of before
            return {"true": True, "false": False, "auto": "auto"}[str(value).lower()]
        if value is None or isinstance(value, bool | list):
            raise ValueError
        if kind is str:
            return str(value)
        number = float(value)  # trap: PyYAML reads 2e-5 as a string, only 2.0e-5 as a number
        if kind is int and (number != int(number) or number > 2**53):  # from there on it would be another one
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, yaml.YAMLError):
        message = f"{where}: {key} must be of type {kind.__name__} (such as {default!r}), got {value!r}"
        raise UserError(message) from None
    if not 0 <= number < math.inf:  # NaN too
        raise UserError(f"{where}: {key} must be at least 0 and finite, got {value}")
    return kind(number)


# ---------------------------------------------------------------- checks before any work
def must_be_one_of(cfg, **allowed):
    """UserError unless each key has an allowed value: must_be_one_of(cfg, pooling=("cls", "mean"))."""
    for key, values in allowed.items():
        if getattr(cfg, key) not in values:
            raise UserError(f"{key} must be one of {', '.join(map(str, values))}, got {getattr(cfg, key)!r}")


def at_least(cfg, least, *keys):
    """UserError where the value of one of `keys` is under `least`."""
    for key in keys:
        if not getattr(cfg, key) >= least:  # NaN too
            raise UserError(f"{key} must be at least {least}, got {getattr(cfg, key)}")


def file_fault(path):
    """Return what keeps a file from being read, or ""."""
    if Path(path).is_file():
        return ""
    return "is a folder; name a file" if Path(path).is_dir() else broken_link(path) or "no such file"


def model_fault(path, kind="model"):
    """Return what is seen at once to be wrong with the path of a model (a folder or a hub name), or ""."""
    name, path = str(path), Path(path)
    inside = sorted(config.parent.name for config in path.glob("*/config.json"))
    if inside and not (path / "config.json").is_file() and not (path / "modules.json").is_file():
        return f"is no model, but the folder of {', '.join(inside)}; name one of these"
    if path.is_file() or name.endswith(".cp"):
        cure = "first: python -m prepare.checkpoints from_cp; of other files name the folder"
        return f"is a file; if it is a checkpoint of the original DPR, {cure}"
    if not path.exists() and "/" in name and (path.parent.exists() or name.count("/") > 1):
        return f"no such {kind} folder (its parent exists or it has many slashes, so this is no hub name)"
    return ""


def need_value(cfg, *keys):
    """UserError where a key that the work cannot do without is ""."""
    for key in keys:
        if not getattr(cfg, key):
            raise UserError(f"{key}: give a path, it is empty")


def need_file(cfg, *keys, optional=()):
    """UserError where a key names no file; one of `optional` may be "", which means that it is not given."""
    need_value(cfg, *keys)
    for key in (*keys, *optional):
        path = getattr(cfg, key)
        if path and (fault := file_fault(path)):
            raise UserError(f"{key}: {path}: {fault}")


def need_model(cfg, *keys):
    """UserError where a key names no model."""
    need_value(cfg, *keys)
    for key in keys:
        if fault := model_fault(getattr(cfg, key)):
            raise UserError(f"{key}: {getattr(cfg, key)}: {fault}")


def same_file(path, other):
    """Return whether two paths are one existing file; it may have two spellings, a link, another case."""
    return Path(path).exists() and Path(other).exists() and Path(path).samefile(other)


def refuse_input(out, *inputs):
    """UserError where a program would write over one of the files that it reads."""
    if any(same_file(out, path) for path in inputs):
        raise UserError(f"{out}: is an input too; name another file")


def need_folder(cfg, key, folder=""):
    """UserError where a key's folder (or `folder`) cannot be made or written into."""
    need_value(cfg, key)
    path = Path(folder or getattr(cfg, key)).absolute()
    if fault := broken_link(path):
        raise UserError(f"{key}: {fault}")
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: {getattr(cfg, key)}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{key}: {getattr(cfg, key)}: {existing} cannot be written")


def need_out(cfg, key, *suffixes, ending=""):
    """
    UserError where the file that a key names cannot be written, or is one that the command reads.

    suffixes: of the files that are written beside it, such as ".metrics.json". ending: how its name must end.
    """
    need_value(cfg, key)
    if not getattr(cfg, key).endswith(ending):
        raise UserError(f"{key} must be the path of a {ending} file, got {getattr(cfg, key)!r}")
    inputs = {k: Path(v) for k, v in vars(cfg).items() if k != key and isinstance(v, str) and v}
    out = Path(getattr(cfg, key))
    for path in (out, *map(out.with_suffix, suffixes)):
        fault = broken_link(path)
        if path.is_dir():
            fault = "is a folder; name a file"
        elif path.exists() and not path.is_file():
            fault = "is a device or a pipe, and would be replaced; name a file"
        for name, other in inputs.items() if path.exists() else ():
            model = (other / "config.json").is_file() and other.resolve() in path.resolve().parents
            if model or same_file(path, other):
                fault = f"is an input too ({name}); name another file"
        if fault:
            raise UserError(f"{key}: {path} {fault}")
        need_folder(cfg, key, path.parent)
