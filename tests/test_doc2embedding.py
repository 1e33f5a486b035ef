"""Encoding a corpus: every passage once, the same bits however it was run, and nothing wrong in silence."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import doc2embedding
from tests.processes import main, run
from utils.data import Corpus
from utils.distributed import prefetch
from utils.encoder import collate, tokenize_passages
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, sha256
from utils.plumbing.weights import load_encoder, save_encoder


@pytest.fixture
def keys(world):
    files = {"doc_encoder": world / "doc_encoder", "corpus": world / "corpus.tsv"}
    return files | {"shard_size": 16, "sort_window": 7, "batch_size": 4}


@pytest.fixture
def encode(keys, tmp_path):
    """encode(out="e", key=value ...) runs the script in this process and returns the folder it wrote."""

    def call(out="e", **changes):
        main("doc2embedding.py", keys | {"out": tmp_path / out} | changes)
        return tmp_path / out

    return call


def hashes(folder):
    return {file.name: sha256(file) for file in folder.iterdir()}


# ---------------------------------------------------------------- the vectors
@pytest.fixture(scope="module")
def alone_ND(world):
    """Every passage as encoded alone, without padding."""
    corpus, encoder = Corpus(world / "corpus.tsv"), load_encoder(world / "doc_encoder", "passage").eval()
    with torch.no_grad():
        rows = [encoder(**collate(encoder, tokenize_passages(encoder, [passage]))) for passage in corpus]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("shard_size, batch_size", [(16, 4), (7, 64), (100, 3)])
def test_row_i_is_the_vector_of_passage_i(world, encode, alone_ND, shard_size, batch_size):
    folder = encode(shard_size=shard_size, batch_size=batch_size, dtype="float32")
    shards, manifest = open_embeddings(folder, Corpus(world / "corpus.tsv").sha256)
    assert [len(s) for s in shards] == [min(shard_size, 60 - k) for k in range(0, 60, shard_size)]
    assert all(isinstance(shard, np.memmap) for shard in shards)
    assert manifest["pair"] == "toy" and manifest["role"] == "passage"
    assert np.abs(np.concatenate(shards) - alone_ND).max() < 1e-5
    assert (folder / "ids.txt").read_text() == "".join(f"{i}\n" for i in range(1, 61))


def test_bf16_is_that_of_the_weights(encode, alone_ND):
    """Weights and states in bf16: within 2e-2 of the largest number, but not float32's vectors."""
    shards, manifest = open_embeddings(encode(mixed_precision="bf16", dtype="float32"))
    apart = np.abs(np.concatenate(shards) - alone_ND).max() / np.abs(alone_ND).max()
    assert 1e-4 < apart < 2e-2 and manifest["mixed_precision"] == "bf16"


def test_processes_tokenise_as_a_thread_does(world):
    corpus, encoder = Corpus(world / "corpus.tsv"), load_encoder(world / "doc_encoder", "passage")
    windows = doc2embedding.cut(range(60), 7)
    wanted = list(doc2embedding.tokenize_windows(windows, corpus, encoder, 0))
    assert list(doc2embedding.tokenize_windows(windows, corpus, encoder, 2)) == wanted
    assert [len(ids) for ids in wanted] == [7] * 8 + [4]


def test_compiled_lengths(world):
    """Multiples of 32 and the longest: few shapes."""
    encoder = load_encoder(world / "doc_encoder", "passage", {"passage_tokens": 100})
    cfg = SimpleNamespace(compile=True, batch_size=5)
    sizes = doc2embedding.batch_sizes(cfg, encoder, {}, torch.device("cpu"))
    assert sizes == {"size": 5, "tokens": 0, "lengths": [32, 64, 96, 100]}


def test_two_processes_write_the_same_bits_as_one(keys, encode, tmp_path):
    """Shard i belongs to process i modulo W, and no batch crosses a shard: all files are identical."""
    done = run("doc2embedding.py", keys | {"out": tmp_path / "two"}, processes=2)
    assert done.returncode == 0, done.stderr
    # the first encodes shards 0 and 2 only
    assert "32/32" in done.stderr and "60 passages encoded" in done.stdout
    assert hashes(tmp_path / "two") == hashes(encode("one"))


def test_servers_that_do_not_know_of_each_other(encode, tmp_path, capsys):
    """Each encodes its share of the shards, on one disk or on several; the folder is that of one machine."""
    one = encode("one")
    for server in (2, 0, 1):
        encode("same_disk", server=server, servers=3)
        encode(f"disk_{server}", server=server, servers=3)
        assert read_json(tmp_path / f"disk_{server}/manifest.json")["complete"] is False
    assert "2 shards are due from other servers, such as 00001.npy" in capsys.readouterr().out
    for server in range(3):
        shutil.copytree(tmp_path / f"disk_{server}", tmp_path / "together", dirs_exist_ok=True)
    encode("together")
    assert "0 passages encoded" in capsys.readouterr().out
    assert hashes(tmp_path / "same_disk") == hashes(tmp_path / "together") == hashes(one)


def test_odd_texts_are_encoded_and_counted(encode, tmp_path, capsys):
    rows = ["1\t\tparis", "2\t😀 🏳️‍🌈\t", "3\tשלום עולם\toslo", f"4\t{'red ' * 9999}\triga", "5\t \t "]
    (tmp_path / "odd.tsv").write_text("id\ttext\ttitle\n" + "\n".join(rows) + "\n", encoding="utf-8")
    folder = encode(corpus=tmp_path / "odd.tsv")
    shards, _ = open_embeddings(folder)
    said = capsys.readouterr().out
    assert shards[0].shape == (5, 32) and np.isfinite(shards[0]).all()
    assert "2 passages have no text" in said and "1 passages fill all 32 tokens" in said
    assert "first passage: [CLS] paris" in said and "passages/s" in said
    assert read_json(folder / "00000.json") == {"sha256": sha256(folder / "00000.npy"), "full_length": 1}


def test_vectors_that_are_no_numbers_stop_it(world, encode, tmp_path):
    """NaN, or a value beyond float16's 65504: the first such passage is named, and what to do."""
    encoder = load_encoder(world / "doc_encoder", "passage")
    oslo = encoder.tokenizer.convert_tokens_to_ids("oslo")
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[oslo] = 3e38  # finite: NaN is refused at load
    save_encoder(encoder, tmp_path / "nan")
    with pytest.raises(UserError, match="passage '16': its vector holds NaN .*; the weights are broken"):
        encode(doc_encoder=tmp_path / "nan")
    encoder = load_encoder(world / "doc_encoder", "passage")
    with torch.no_grad():
        encoder.model.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    save_encoder(encoder, tmp_path / "large")
    with pytest.raises(UserError, match="passage '1': its vector reaches .* use --dtype float32"):
        encode("f16", doc_encoder=tmp_path / "large")
    shards, _ = open_embeddings(encode("f32", doc_encoder=tmp_path / "large", dtype="float32"))
    assert np.isfinite(shards[0]).all()


# ---------------------------------------------------------------- crashes
DIE = """
import os, numpy, doc2embedding
save, calls = numpy.save, []
def half(file, array):
    calls.append(1)
    if len(calls) == 3:
        file.write(b"half a shard"); file.flush(); os.kill(os.getpid(), 9)
    save(file, array)
numpy.save = half
doc2embedding.main()
"""


def test_killed_while_writing_a_shard(keys, encode, tmp_path, capsys):
    """SIGKILL amid the third shard: two stay as they are, the half one is swept away, the end is the same."""
    Corpus(keys["corpus"])  # its index is written by numpy.save too
    (tmp_path / "die.py").write_text(DIE)
    killed = run(str(tmp_path / "die.py"), keys | {"out": tmp_path / "e"})
    assert killed.returncode == -9 and list((tmp_path / "e").glob(".*.tmp"))
    with pytest.raises(UserError, match="not complete"):
        open_embeddings(tmp_path / "e")
    before = {file.name: os.stat(file).st_mtime_ns for file in (tmp_path / "e").glob("*.npy")}
    assert sorted(before) == ["00000.npy", "00001.npy"]
    folder = encode("e")
    assert "32 of them done before" in capsys.readouterr().out
    assert hashes(folder) == hashes(encode("whole"))
    assert all(os.stat(folder / name).st_mtime_ns == when for name, when in before.items())


def test_damaged_or_missing_shards_are_made_again(encode, monkeypatch, capsys):
    """A zero tail of the right size is seen by the hash; a whole folder is then left alone."""
    folder = encode()
    wanted = hashes(folder)
    damaged = bytearray((folder / "00002.npy").read_bytes())
    damaged[-64:] = bytes(64)
    (folder / "00002.npy").write_bytes(damaged)
    (folder / "00001.npy").unlink()
    encode()
    said = capsys.readouterr().out
    assert "00002.npy: damaged" in said and "28 of them done before" in said
    assert hashes(folder) == wanted
    monkeypatch.setattr(doc2embedding, "embed", None)
    encode()
    assert "already complete, 60 passages" in capsys.readouterr().out


def test_a_full_disk(encode, tmp_path, monkeypatch):
    """Too little space is found before work; a disk that fills up meanwhile leaves whole shards only."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10))
        with pytest.raises(UserError, match="embeddings needs .* are free"):
            encode()
    assert not (tmp_path / "e").exists()

    def full(file, array):
        raise OSError("512 requested and 20 written")  # numpy's, without an errno

    with monkeypatch.context() as patch, pytest.raises(UserError, match="00000.npy: the disk is full"):
        patch.setattr(np, "save", full)
        encode()
    assert [file.name for file in (tmp_path / "e").iterdir()] == ["manifest.json"]
    assert hashes(encode()) == hashes(encode("other"))


def test_the_next_item_is_made_meanwhile():
    """All items in order, at most one ahead of the one in use; a failure comes where its item is due."""
    made = []

    def make(item):
        made.append(item)
        return 6 // item

    stream = prefetch(make, iter([3, 2, 1, 0, 4]))
    for i, wanted in enumerate([2, 3, 6], 1):
        assert next(stream) == wanted and len(made) <= i + 1
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert list(prefetch(make, [])) == [] and list(prefetch(make, [1])) == [6]
