"""How many rows go through a model together: what fits the device, and the same when a run goes on."""

import importlib
import shutil

import pytest
import torch
import yaml

import doc2embedding
import utils.plumbing.devices
import utils.plumbing.run
from tests import test_train_dpr
from tests.processes import main, rows
from tests.toy_t5 import t5
from utils.plumbing.config import UserError
from utils.plumbing.devices import rows_that_fit
from utils.plumbing.files import read_json
from utils.plumbing.weights import width_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BERT_BASE = 12 * 768


@pytest.mark.parametrize(
    ("free", "length", "width", "wanted"),
    [
        (140e9, 256, BERT_BASE, 256),  # 64k tokens of the papers' passages
        (140e9, 32, BERT_BASE, 2048),
        (140e9, 1, 768, 65536),
        (24e9, 256, BERT_BASE, 72),  # 12e9 bytes at 70 a number are 18,601 tokens
        (24e9, 256, 24 * 1024, 27),  # BERT-large
        (1e6, 256, BERT_BASE, 1),
    ],
)
def test_what_fits_a_gpu(free, length, width, wanted, monkeypatch):
    """64k tokens, or what half of its memory holds; one row at least; all devices take the least."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(140e9)))
    assert rows_that_fit(64, length, width, GPU) == wanted
    assert rows_that_fit(64, length, width, CPU) == 64
    # or the settings, and so the name of a run, would be others on each
    monkeypatch.setattr(utils.plumbing.devices, "gather_items", lambda mine: mine | {1: 7})
    assert rows_that_fit(64, length, width, GPU) == min(7, wanted)


def test_the_width_of_a_model(world, tmp_path):
    """2 layers of 32 numbers, in BERT's names, in T5's, and one folder further in."""
    folders = [world / "bert", t5(tmp_path), tmp_path / "sentences"]
    shutil.copytree(world / "bert", folders[2] / "0_Transformer")
    assert [width_of(folder) for folder in folders] == [64] * 3


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("train_dpr", {"question_chunk": (64, 256), "passage_chunk": (64, 256)}),
        ("train_cross_encoder", {"chunk": (64, 160)}),
        ("train_reader", {"question_chunk": (1, 24 * 350), "passage_chunk": (24, 350)}),
        ("train_emdr2", {"question_chunk": (4, 50 * 256), "passage_chunk": (200, 256)}),
    ],
)
def test_the_configs_leave_it_open(world, script, wanted, monkeypatch):
    """The keys are 0; on a CPU they are what the configs said before, (rows, tokens of a row)."""

    def stop(cfg, files, weights, sizes):
        assert all(getattr(cfg, key) == 0 for key in sizes)
        raise Stop(sizes)

    monkeypatch.setattr(importlib.import_module(script), "Run", stop)
    files = {"train": world / "train.jsonl", "dev": "", "corpus": world / "corpus.tsv"}
    if script == "train_reader":
        files |= {"train_run": world / "train.jsonl", "gold": "", "dev_run": ""}
    with pytest.raises(Stop) as stopped:
        main(f"{script}.py", files)
    assert stopped.value.args == (wanted,)


# ---------------------------------------------------------------- a run that goes on
def device_of(size, monkeypatch):
    """From now on a device takes `size` rows."""
    for module in (utils.plumbing.run, doc2embedding):
        monkeypatch.setattr(module, "rows_that_fit", lambda *_: size)


def test_a_training_keeps_its_chunks_on_another_device(world, tmp_path, monkeypatch, capsys):
    """They stand in the first line and in config.yaml; a number that the user gives is the number."""
    device_of(5, monkeypatch)
    keys = test_train_dpr.keys(world, tmp_path / "run", stop_after=3, question_chunk=0, passage_chunk=0)
    main("train_dpr.py", keys)
    assert "precision no | question_chunk 5, passage_chunk 5 |" in capsys.readouterr().out
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (stored["question_chunk"], stored["passage_chunk"]) == (5, 5)

    # the whole run at once, and the rest of the first one on another device
    main("train_dpr.py", keys | {"run_dir": tmp_path / "whole", "stop_after": 6})
    device_of(2, monkeypatch)
    main("train_dpr.py", keys | {"stop_after": 6, "resume": "changed"})
    assert "question_chunk 5, passage_chunk 5" in capsys.readouterr().out
    parts, whole = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("run", "whole"))
    assert len(whole) == 6 and parts == whole

    # its config.yaml says the same; another number is another run
    again = keys | {"stop_after": 6, "resume": "exact"}
    main("train_dpr.py", again | {"question_chunk": 5, "passage_chunk": 5})
    with pytest.raises(UserError, match="passage_chunk: 5 then, 3 now"):
        main("train_dpr.py", again | {"passage_chunk": 3})


def test_encoding_keeps_its_batches_on_another_device(world, tmp_path, monkeypatch, capsys):
    """A folder begun by tokens is completed by tokens, to the same bits; a given number prevails."""
    keys = {"doc_encoder": world / "doc_encoder", "corpus": world / "corpus.tsv", "shard_size": 16}
    device_of(100, monkeypatch)
    for name in ("one", "two"):
        main("doc2embedding.py", keys | {"out": tmp_path / name})
    assert "batches of 100 tokens" in capsys.readouterr().out
    before = (tmp_path / "two/00001.npy").read_bytes()
    (tmp_path / "two/00001.npy").unlink()
    device_of(0, monkeypatch)
    main("doc2embedding.py", keys | {"out": tmp_path / "two"})
    assert (tmp_path / "two/00001.npy").read_bytes() == before
    assert read_json(tmp_path / "two/manifest.json") == read_json(tmp_path / "one/manifest.json")
    main("doc2embedding.py", keys | {"out": tmp_path / "three"})
    assert "batches of 64 passages" in capsys.readouterr().out
    (tmp_path / "two/00001.npy").unlink()
    main("doc2embedding.py", keys | {"out": tmp_path / "two", "batch_size": 3})
    assert "batches of 3 passages" in capsys.readouterr().out
