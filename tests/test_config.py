"""Mistakes in a config end in one line that names the key, the file and the nearest right name."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from utils.plumbing.config import (
    ROOT,
    UserError,
    friendly_errors,
    load_config,
    need_file,
    need_folder,
    need_model,
)
from utils.plumbing.files import folder_hash, weights_hash

SCHEMA = "config/train_dpr_nq.yaml"


def test_the_schema_is_the_default_and_overrides_win():
    """--key value and --key=value override the yaml; a bare flag of a boolean key means true."""
    cfg = load_config(
        "doc", SCHEMA, ["--batch_size", "64", "--learning_rate=1e-4", "--grad_cache", "--dev", ""]
    )
    assert (cfg.batch_size, cfg.learning_rate, cfg.grad_cache, cfg.dev) == (64, 1e-4, True, "")


def test_scientific_notation_in_yaml_is_a_number(tmp_path):
    """PyYAML reads 2e-5 as a string; we do not."""
    text = (ROOT / SCHEMA).read_text().replace("learning_rate: 2.0e-5", "learning_rate: 2e-5")
    (tmp_path / "x.yaml").write_text(text)
    assert load_config("doc", SCHEMA, ["--config", str(tmp_path / "x.yaml")]).learning_rate == 2e-5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "8"], ["--batchsize", "batch_size"]),
        (["--batch_size", "many"], ["batch_size", "int", "'many'"]),
        (["--batch_size", "1.5"], ["batch_size", "int"]),
        (["--grad_cache", "maybe"], ["grad_cache", "bool"]),
        (["--learning_rate", "fast"], ["learning_rate", "float"]),
        (["--seed"], ["--seed", "value"]),
        (["batch_size", "8"], ["'batch_size'", "--key value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["--config", "config"], ["config: is a folder; name a file"]),
        (["--config", sys.executable], [sys.executable, "not valid yaml"]),
        (["--seed", "-1"], ["seed must be at least 0, got -1"]),
        (["--learning_rate", "-2e-5"], ["learning_rate must be at least 0"]),
        (["--learning_rate", "nan"], ["learning_rate must be at least 0, got nan"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    """The message holds what is wrong and what would be right."""
    with pytest.raises(UserError) as error:
        load_config("doc", SCHEMA, argv)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_mistakes_in_a_yaml(tmp_path):
    """An unknown key names the nearest; a missing one and broken yaml name the file."""
    values = yaml.safe_load((ROOT / SCHEMA).read_text())
    path = tmp_path / "x.yaml"
    for change, word in (({"epoch": 3}, "epochs"), ({"seed": "one"}, "seed")):
        path.write_text(yaml.safe_dump(values | change))
        with pytest.raises(UserError, match=word):
            load_config("doc", SCHEMA, ["--config", str(path)])
    del values["seed"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="seed.*missing"):
        load_config("doc", SCHEMA, ["--config", str(path)])
    path.write_text("a: [1")
    with pytest.raises(UserError, match="x.yaml"):
        load_config("doc", SCHEMA, ["--config", str(path)])


def test_help_lists_every_key(capsys):
    """--help prints the docstring and the schema with its comments, and leaves."""
    with pytest.raises(SystemExit) as leave:
        load_config("What it does.", SCHEMA, ["--help"])
    shown = capsys.readouterr().out
    assert leave.value.code == 0 and "What it does." in shown
    assert all(f"{key}:" in shown for key in yaml.safe_load((ROOT / SCHEMA).read_text()))


def test_all_configs_of_a_script_have_its_keys_in_its_order():
    """`diff config/a.yaml config/b.yaml` teaches only when both have the same keys in the same order."""
    others = [*ROOT.glob("config/train_dpr_*.yaml"), *ROOT.glob("config/train_gcdpr_*.yaml")]
    assert len(others) >= 8
    for other in others:
        load_config("", SCHEMA, ["--config", str(other)])
        first, second = (list(yaml.safe_load(p.read_text())) for p in (ROOT / SCHEMA, other))
        assert first == second, other.name


def test_nothing_has_no_hash(tmp_path, monkeypatch):
    """Path("") is the folder one stands in: a run without a dev set must not depend on what lies there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert folder_hash("") == folder_hash("no-such/hub-name") == "" != folder_hash(".")


def test_a_hub_name_is_an_identity():
    """A run started from one hub model does not go on from another, however alike their names begin."""
    names = ("Luyu/co-condenser-wiki", "Luyu/co-condenser-marco")
    assert len({weights_hash(name)[:16] for name in names}) == 2


def test_paths_that_cannot_be(tmp_path, monkeypatch):
    """A folder for a file, a file for a folder, a run for its model: each is named with its key."""
    for name in ("query_encoder", "doc_encoder"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for need, value, message in (
        (need_file, "", "key: give a path, it is empty"),
        (need_file, tmp_path, "key: .* is a folder; name a file"),
        (need_file, tmp_path / "none", "key: .*none: no such file"),
        (need_model, "", "key: give a path, it is empty"),
        (
            need_model,
            tmp_path / "run",
            "run: is no model, but the folder of doc_encoder, query_encoder; name",
        ),
        (need_model, tmp_path / "run" / "reader", "key: .*reader: no such model folder"),
        (need_model, "runs/nowhere/reader", "key: runs/nowhere/reader: no such model folder"),
        (need_model, tmp_path / "file", "key: .*file: is a file; name the folder"),
        (need_folder, "", "key: give a path, it is empty"),
        (need_folder, tmp_path / "file", "key: .*file is a file, not a folder"),
        (need_folder, tmp_path / "file" / "run", "key: .*file is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            need(SimpleNamespace(key=str(value)), "key")
    for name in (tmp_path / "run" / "doc_encoder", "bert-base-uncased", "facebook/dpr-reader"):
        need_model(SimpleNamespace(key=str(name)), "key")
    need_file(SimpleNamespace(key=""), optional=["key"])
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="key: .*run/new: .*run cannot be written"):
        need_folder(SimpleNamespace(key=str(tmp_path / "run" / "new")), "key")


@pytest.mark.parametrize(
    ("script", "key"),
    [
        ("doc2embedding", "doc_encoder"),
        ("test_dpr", "query_encoder"),
        ("rerank", "cross_encoder"),
        ("train_dpr", "init"),
        ("train_cross_encoder", "init"),
        ("train_reader", "init"),
        ("train_emdr2", "reader"),
        ("train_emdr2", "doc_encoder"),
        *((f"train_{name}", "run_dir") for name in ("dpr", "cross_encoder", "reader", "emdr2")),
        ("test_dpr", "embeddings"),
        ("train_emdr2", "embeddings"),
    ],
)
def test_a_wrong_folder_is_found_before_the_corpus_is_read(tmp_path, monkeypatch, script, key):
    """The index of 21M passages takes minutes; whether a folder is there is known at once."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "Corpus", lambda *_: pytest.fail("the corpus was opened"))
    (tmp_path / "file").write_text("x")
    known = yaml.safe_load((ROOT / f"config/{script}{'_nq' if 'train' in script else ''}.yaml").read_text())
    files = "questions corpus ranking train dev gold train_run dev_run".split()
    keys = {name: tmp_path / "file" for name in files if name in known}
    keys |= {
        name: "bert-base-uncased" for name in ("query_encoder", "doc_encoder", "reader") if name in known
    }
    keys |= {name: tmp_path / "x.run" for name in ("out",) if name in known}
    keys |= {name: tmp_path / "run" for name in ("run_dir",) if name in known}
    faults = {"run_dir": (tmp_path / "file", "is a file, not a folder"), "embeddings": ("", "give a path")}
    keys[key], why = faults.get(key, (tmp_path / "nowhere", "no such model folder"))
    monkeypatch.setattr("sys.argv", [script, *(f"--{name}={value}" for name, value in keys.items())])
    with pytest.raises(UserError, match=f"{key}: .*{why}"):
        module.main()


FULL = "the memory is full: lower the batch sizes or the chunks, on a GPU use --mixed_precision bf16"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/x"), "error: runs/x: Permission denied"),
        (OSError(21, "Is a directory", ".x.tmp", None, "x"), "error: x: Is a directory"),
        (OSError(28, "No space left on device"), "error: the disk is full; free some"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "error: the disk is full"),
        (OSError("64000 requested and 20416 written"), "error: the disk is full"),  # numpy's
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            "error: the memory is full: lower the batch",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: the memory is full: lower the batch",
        ),
        (MemoryError("Unable to allocate 9 GiB\nfor"), f"error: {FULL} (Unable to allocate 9 GiB)\n"),
        (MemoryError(), f"error: {FULL}\n"),
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
    ],
)
def test_faults_of_the_machine_are_one_line(capsys, error, line):
    """A folder that cannot be written, a full disk, a full GPU: the place and the fix, no traceback."""
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        raise error
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
    assert stopped.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)


def test_faults_of_ours_keep_their_traceback():
    """Only what the user or the machine did is made a sentence of."""
    for error in (
        ValueError("x"),
        OSError("a socket"),
        BrokenPipeError(32, "Broken pipe"),
        FileNotFoundError(2, "No such file or directory", "x"),
        OSError(39, "Directory not empty", ".x.tmp", None, "x"),
    ):
        with pytest.raises(type(error)), friendly_errors():
            raise error
