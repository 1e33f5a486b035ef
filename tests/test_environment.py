"""What the environment of a process says: to accelerate, of a launcher that is gone, and to the terminal."""

import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

from utils.plumbing.config import ROOT, UserError
from utils.plumbing.devices import LAUNCHED, PLAIN, start


@pytest.fixture
def environment(monkeypatch):
    """Set variables, `NAME=value NAME=value`, for a process that no launcher started."""
    for name in (*PLAIN, *LAUNCHED, "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("utils.plumbing.devices.default_config_file", "none")
    AcceleratorState._reset_state(True)

    def set_all(variables):
        for word in variables.split():
            monkeypatch.setenv(*word.split("="))

    yield set_all
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "STEPS=4 in the environment would change .* choose 1"),
        *((f"{name}=true", f"{name}=true in the environment") for name in PLAIN if "_USE_" in name),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "BACKEND=INDUCTOR in the environment"),
        ("ACCELERATE_USE_CPU=maybe", "cannot start .* invalid truth value maybe"),
        ("WORLD_SIZE=2", "the environment has WORLD_SIZE, but no launcher .* unset LOCAL_RANK"),
        ("WORLD_SIZE=two RANK=0 LOCAL_RANK=0 MASTER_ADDR=h MASTER_PORT=1", "no launcher set them all"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=h", "RANK, WORLD_SIZE, but no launcher set them all"),
        ("LOCAL_RANK=0", "the environment has LOCAL_RANK, but no launcher"),
    ],
)
def test_a_variable_that_would_change_the_work_is_refused(environment, variables, words):
    """accelerate would divide the gradient by four, shard the model, or wait in vain."""
    environment(variables)
    with pytest.raises(UserError, match=words):
        start()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1 ACCELERATE_DYNAMO_BACKEND=NO WORLD_SIZE=1 RANK=0", ""),
        ("ACCELERATE_USE_FSDP=false ACCELERATE_MIXED_PRECISION=no MASTER_PORT=29500", ""),
        ("ACCELERATE_MIXED_PRECISION=bf16", "mixed_precision bf16 is not used, the key says no"),
        ("ACCELERATE_MIXED_PRECISION=no MASTER_ADDR=h", "one process; for several: torchrun"),
    ],
)
def test_what_is_not_used_is_said(environment, capsys, variables, words):
    """What `accelerate launch` sets by itself is no conflict; what it asks for in vain is one line."""
    environment(variables)
    accelerator = start()
    assert (accelerator.num_processes, accelerator.gradient_accumulation_steps) == (1, 1)
    said = capsys.readouterr().err
    assert words in said and said.count("warning") == bool(words)


def test_a_config_file_of_accelerate_is_not_read_by_python(environment, capsys, monkeypatch, tmp_path):
    """Only `accelerate launch` reads it, so its precision and its processes would be missed in silence."""
    (tmp_path / "default_config.yaml").write_text("mixed_precision: bf16\nnum_processes: 2\n")
    monkeypatch.setattr("utils.plumbing.devices.default_config_file", str(tmp_path / "default_config.yaml"))
    start()
    assert "default_config.yaml is not used: only `accelerate launch`" in capsys.readouterr().err


WITHOUT = """
import importlib, os, sys
import accelerate, bm25s, faiss, psutil, transformers  # they know each system, and choose for themselves
sys.modules |= {"resource": None, "fcntl": None}  # None: cannot be imported
for name in ("pread", "sched_getaffinity"):
    delattr(os, name)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_module_is_imported_where_unix_is_not():
    """Windows has no resource, fcntl and pread, macOS no affinity: an import must not ask for them."""
    names = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("prepare/*.py")]:
        if path.stem != "__init__":
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], cwd=ROOT, capture_output=True, text=True)
    assert len(names) > 25 and done.returncode == 0, done.stderr[-600:]


def test_every_file_is_opened_as_utf_8():
    """Where LC_ALL is C, or on Windows, a file without an encoding fails at the first accent."""
    select = ["--preview", "--select", "PLW1514", "--exclude", "tests", "."]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *select], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
