"""EMDR2's index against brute force and doc2embedding.py; its worker alive, slow, dead and started again."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ask
import doc2embedding
import test_dpr
import train_emdr2
import utils.live_index
from tests.processes import ENVIRONMENT, kill_tree, on_devices
from tests.toy import make_world
from utils import index_worker
from utils.data import Corpus
from utils.live_index import LiveIndex
from utils.plumbing.config import ROOT, UserError, load_config
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, sha256, write_json
from utils.plumbing.weights import load_encoder, save_encoder
from utils.search import exact_topk

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
torch.set_num_threads(1)


def make_embeddings(doc_encoder, corpus, out, **keys):
    """Run doc2embedding.py in this process; returns `out`."""
    keys = {"doc_encoder": doc_encoder, "corpus": corpus, "out": out, "shard_size": 16} | keys
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["doc2embedding.py", *flags])
        doc2embedding.main()
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, its passages encoded: embeddings; by a trained encoder: trained/, trained_embeddings."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_embeddings(folder / "doc_encoder", folder / "corpus.tsv", folder / "embeddings")
    save_encoder(trained(folder), folder / "trained")
    make_embeddings(folder / "trained", folder / "corpus.tsv", folder / "trained_embeddings")
    return folder


def trained(world, dropout=0.0):
    """The passage encoder after training, so to speak: every weight moved."""
    encoder = load_encoder(world / "doc_encoder", "passage", dropout=dropout)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def rows_in(folder):
    return np.concatenate(open_embeddings(folder)[0])


def write_vectors(folder, corpus, x_ND, size):
    """An embeddings folder of given rows, as doc2embedding.py would have written it."""
    folder.mkdir(parents=True)
    hashes = {}
    for i in range(0, len(x_ND), size):
        file = folder / f"{i // size:05d}.npy"
        np.save(file, x_ND[i : i + size])
        hashes[file.name] = sha256(file)
    about = {"rows": len(x_ND), "dim": x_ND.shape[1], "dtype": str(x_ND.dtype), "shard_size": size}
    about |= {"corpus": corpus.sha256, "role": "passage", "complete": True, "shards": hashes}
    write_json(folder / "manifest.json", about)
    return folder


def brute_force(q_QD, x_ND, k):
    """(scores, rows) by definition: float64 products, the largest first, ties in corpus order."""
    scores_QN = (q_QD.astype(np.float64) @ x_ND.astype(np.float64).T).astype(np.float32)
    rows_Qk = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QN, rows_Qk, 1), rows_Qk


# ---------------------------------------------------------------- search
def search_cases(world, out):
    """Every search of the test on this device, and what brute force says; a .npz a device in `out`."""
    rank, corpus, found = utils.live_index.world()[0], Corpus(world / "corpus.tsv"), {}
    rng = np.random.default_rng(3)
    q_QD = rng.integers(-2, 3, (9, 8)).astype(np.float32)
    x_ND = rng.integers(-1, 2, (60, 8)).astype(np.float16)  # so few values that ties are everywhere
    x_ND[40:45] = x_ND[3]
    for size in (1, 7, 16, 100):
        folder = out / f"{rank}_{size}"
        index = LiveIndex(corpus, write_vectors(folder, corpus, x_ND, size), ACCELERATOR)
        for k in (1, 7, 60, 99):
            found[f"{size} {k} scores"], found[f"{size} {k} rows"] = index.search(q_QD, k)
    (out / f"{rank}.tsv").write_text("1\ta text\ta\n2\tb text\tb\n")
    two = Corpus(out / f"{rank}.tsv")  # of three devices one holds nothing
    index = LiveIndex(two, write_vectors(out / f"{rank}_two", two, x_ND[:2], 2), ACCELERATOR)
    if not index.shards:
        index.check(None, ACCELERATOR)
        index.refresh(None, 1, 4, nullcontext)
    found["two scores"], found["two rows"] = index.search(q_QD, 5)
    index = LiveIndex(corpus, world / "embeddings", ACCELERATOR)
    index.refresh(trained(world), 7, 5, nullcontext)
    found["refreshed"] = np.concatenate(index.shards)
    q_QD = rows_in(world / "trained_embeddings")[:4].astype(np.float32)
    found["refreshed scores"], found["refreshed rows"] = index.search(q_QD, 9)
    np.savez(out / f"{rank}.npz", **found)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_the_search_is_brute_force_on_any_number_of_devices(world, tmp_path, devices):
    """Ids, scores and ties of the whole corpus, for every shard size and k, the same on every device."""
    if devices == 1:
        search_cases(world, tmp_path)
    else:
        on_devices(devices, search_cases, world, tmp_path)
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(devices)]
    rng = np.random.default_rng(3)
    q_QD, x_ND = rng.integers(-2, 3, (9, 8)), rng.integers(-1, 2, (60, 8))
    x_ND[40:45] = x_ND[3]
    for found in parts:
        for size in (1, 7, 16, 100):
            for k in (1, 7, 60, 99):
                scores_Qk, rows_Qk = brute_force(q_QD, x_ND, k)
                assert np.array_equal(found[f"{size} {k} scores"], scores_Qk)
                assert np.array_equal(found[f"{size} {k} rows"], rows_Qk)
        assert np.array_equal(found["two rows"], brute_force(q_QD, x_ND[:2], 2)[1])
    # after a refresh: the slices are the corpus, and a search meets the new rows of all of them
    fresh_ND = np.concatenate([found["refreshed"] for found in parts])
    wanted_ND = rows_in(world / "trained_embeddings")
    assert fresh_ND.shape == (60, 32) and np.abs(fresh_ND - wanted_ND).max() < 4e-3  # fp16's last bit
    scores_Qk, rows_Qk = brute_force(wanted_ND[:4].astype(np.float32), fresh_ND, 9)
    for found in parts:
        assert np.array_equal(found["refreshed rows"], rows_Qk)
        assert np.array_equal(found["refreshed scores"], scores_Qk)


def test_the_copy_on_a_gpu_is_searched_as_the_rows_are(world, tmp_path, monkeypatch):
    """Its code, on a CPU: any block, ties, few spare candidates; load and refresh bring it up to date."""
    monkeypatch.setattr(utils.search, "SPARE", 2)
    rng, corpus = np.random.default_rng(4), Corpus(world / "corpus.tsv")
    q_QD = rng.integers(-2, 3, (9, 32)).astype(np.float32)
    x_ND = rng.integers(-1, 2, (60, 32)).astype(np.float16)
    x_ND[20:40] = x_ND[3]
    index = LiveIndex(corpus, write_vectors(tmp_path / "e", corpus, x_ND, 16), ACCELERATOR)
    index.copy_nD = torch.full((60, 32), torch.nan, dtype=torch.float16)
    given, real = [], exact_topk

    def search(*arguments, resident_ND, **named):
        given.append(resident_ND)
        return real(*arguments, resident_ND=resident_ND, **named)

    monkeypatch.setattr(utils.live_index, "exact_topk", search)
    for block, panel, chunk in ((7, 9 * 32, 2), (60, 9 * 32, 2), (60, 9999, 100)):
        monkeypatch.setattr(utils.live_index, "BLOCK", block)
        monkeypatch.setattr(utils.search, "BLOCK", (block, block))
        monkeypatch.setattr(utils.search, "PANEL", (panel, panel))
        monkeypatch.setattr(utils.search, "CHUNK", chunk)
        index.load(tmp_path / "e", 1)
        for k in (1, 5, 60, 99):
            for found, wanted in zip(index.search(q_QD, k), brute_force(q_QD, x_ND, k), strict=True):
                assert np.array_equal(found, wanted)
    index.refresh(trained(world), 2, 64, nullcontext)
    wanted = brute_force(q_QD, index.shards[0], 5)
    assert all(np.array_equal(*pair) for pair in zip(index.search(q_QD, 5), wanted, strict=True))
    assert all(x_ND is index.copy_nD for x_ND in given)


# ---------------------------------------------------------------- refresh, check, load
def test_a_refresh_is_doc2embedding(world, monkeypatch):
    """The rows of the encoder as it is now, in any windows, the same bits each time, training undisturbed."""
    corpus, encoder = Corpus(world / "corpus.tsv"), trained(world, dropout=0.5).train()
    index = LiveIndex(corpus, world / "embeddings", ACCELERATOR)
    before_ND, wanted_ND = rows_in(world / "embeddings"), rows_in(world / "trained_embeddings")
    assert index.step == 0 and all(isinstance(shard, np.memmap) for shard in index.shards)
    state = torch.get_rng_state()
    index.refresh(encoder, 12, 64, nullcontext)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training and encoder.model.training
    assert index.step == 12 and index.shards[0].dtype == np.float16
    assert np.array_equal(index.shards[0], wanted_ND) and np.abs(wanted_ND - before_ND).max() > 0.5
    assert np.array_equal(rows_in(world / "embeddings"), before_ND), "the folder on disk was written to"
    monkeypatch.setattr(utils.live_index, "WINDOW", 7)
    rows_nD = index.shards[0]
    index.refresh(encoder, 13, 3, nullcontext)
    assert index.shards[0] is rows_nD and np.abs(rows_nD - wanted_ND).max() < 4e-3
    once_nD = rows_nD.copy()
    index.refresh(encoder, 13, 3, nullcontext)
    assert np.array_equal(index.shards[0], once_nD)


def test_vectors_of_another_encoder_are_refused(world):
    """Other weights, the other tower, rows in another order, another dimension, NaN; its own pass."""
    corpus = Corpus(world / "corpus.tsv")
    index = LiveIndex(corpus, world / "embeddings", ACCELERATOR)
    encoder = load_encoder(world / "doc_encoder", "passage", dropout=0.5).train()
    state = torch.get_rng_state()
    index.check(encoder, ACCELERATOR)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    other = load_encoder(world / "query_encoder", "question")
    other.inputs["role"] = "passage"
    for wrong in (trained(world), other):
        with pytest.raises(UserError, match="embeddings: .* not those of doc_encoder .*cosine .*repeat doc2"):
            index.check(wrong, ACCELERATOR)
    index.refresh(trained(world), 3, 64, nullcontext)
    index.check(trained(world), ACCELERATOR)
    with pytest.raises(UserError, match="after the refresh at step 3: these vectors are not"):
        index.check(encoder, ACCELERATOR)
    rows_ND = rows_in(world / "embeddings")
    index.shards = [rows_ND[::-1]]
    with pytest.raises(UserError, match="cosine 0.97"):
        index.check(encoder, ACCELERATOR)
    index.shards = [np.full_like(rows_ND, np.nan)]
    with pytest.raises(UserError, match="passage '1': cosine nan"):
        index.check(trained(world), ACCELERATOR)
    index.shards = [index.shards[0][:, :16]]
    with pytest.raises(UserError, match="have 16 dimensions, doc_encoder 32"):
        index.check(encoder, ACCELERATOR)


def test_a_diverged_encoder_ends_the_refresh(world):
    """NaN, and values beyond float16, name the passage and the step."""
    index = LiveIndex(Corpus(world / "corpus.tsv"), world / "embeddings", ACCELERATOR)
    for value in (float("nan"), 1e6):
        encoder = trained(world)
        oslo = encoder.tokenizer.convert_tokens_to_ids("oslo")
        with torch.no_grad():
            encoder.model.encoder.layer[-1].output.LayerNorm.bias.zero_()
            encoder.model.embeddings.word_embeddings.weight[oslo] = value
            if np.isfinite(value):
                encoder.model.encoder.layer[-1].output.LayerNorm.weight.fill_(value)
        first = "16" if np.isnan(value) else "1"
        with pytest.raises(
            UserError, match=f"passage '{first}': after step 8 its vector holds NaN .* float16"
        ):
            index.refresh(encoder, 8, 64, nullcontext)


def test_only_whole_folders_of_this_corpus_are_loaded(world, tmp_path):
    """A load takes the rows over without a copy; another corpus, or an unfinished folder, is refused."""
    index = LiveIndex(Corpus(world / "corpus.tsv"), world / "embeddings", ACCELERATOR)
    index.load(world / "trained_embeddings", 9)
    assert index.step == 9 and all(isinstance(shard, np.memmap) for shard in index.shards)
    assert np.array_equal(np.concatenate(index.shards), rows_in(world / "trained_embeddings"))
    (tmp_path / "other.tsv").write_text((world / "corpus.tsv").read_text().replace("old", "new"))
    other = make_embeddings(world / "trained", tmp_path / "other.tsv", tmp_path / "other")
    with pytest.raises(UserError, match="other: made from another corpus"):
        index.load(other, 10)
    shutil.copytree(world / "trained_embeddings", tmp_path / "half")
    write_json(tmp_path / "half" / "manifest.json", read_json(other / "manifest.json") | {"complete": False})
    with pytest.raises(UserError, match="half: not complete"):
        index.load(tmp_path / "half", 10)
    assert index.step == 9
    damaged = tmp_path / "damaged"
    shutil.copytree(world / "embeddings", damaged)
    np.save(damaged / "00001.npy", np.zeros((16, 32), np.float16))
    with pytest.raises(UserError, match="00001.npy has another sha256"):
        LiveIndex(Corpus(world / "corpus.tsv"), damaged, ACCELERATOR)


# ---------------------------------------------------------------- the hand-over
def stand(run_dir, step, name):
    """A folder of the hand-over, as if it were whole."""
    (index_worker.folder_of(run_dir, step) / name).mkdir(parents=True)


def names(run_dir):
    """{step: names in its folder}"""
    folders = sorted((run_dir / "refresh").glob("step_*"))
    return {int(f.name[5:]): sorted(path.name for path in f.iterdir()) for f in folders}


def test_what_is_half_written_is_invisible(world, tmp_path, monkeypatch):
    """A trainer or a worker that dies amid writing leaves nothing that the other side would take."""
    encoder = load_encoder(world / "doc_encoder", "passage")
    assert index_worker.exported_step(tmp_path) == index_worker.finished(tmp_path) == 0
    stand(tmp_path, 5, ".doc_encoder.tmp")
    stand(tmp_path, 5, ".embeddings.tmp")
    assert index_worker.exported_step(tmp_path) == index_worker.finished(tmp_path) == 0

    def die(*_):
        assert index_worker.exported_step(tmp_path) == 0, "visible before it is whole"
        raise OSError(5, "died")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="died"):
        patch.setattr("utils.plumbing.weights.write_json", die)  # the last thing that save_encoder writes
        index_worker.export(tmp_path, 6, encoder)
    assert index_worker.exported_step(tmp_path) == 0
    index_worker.export(tmp_path, 6, encoder)
    assert index_worker.exported_step(tmp_path) == 6 and index_worker.finished(tmp_path) == 0
    there = load_encoder(index_worker.folder_of(tmp_path, 6) / "doc_encoder", "passage").state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in encoder.state_dict().items())
    stand(tmp_path, 6, "embeddings")
    assert index_worker.finished(tmp_path) == 6
    assert index_worker.vectors(tmp_path, 6) == tmp_path / "refresh" / "step_00000006" / "embeddings"


def test_what_is_old_or_abandoned_is_deleted(world, tmp_path):
    """clean keeps what is asked for and what is newer; abandon and export drop the future; forget_old two."""
    for step in (1, 2, 3, 4, 5):
        stand(tmp_path, step, "doc_encoder")
        stand(tmp_path, step, "embeddings")
    stand(tmp_path, 2, ".embeddings.tmp")
    (tmp_path / "refresh" / ".step_00000000.old").mkdir()  # of a process that was killed while deleting
    index_worker.clean(tmp_path, [])
    assert list(names(tmp_path)) == [1, 2, 3, 4, 5]
    index_worker.forget_old(tmp_path)
    whole = ["doc_encoder", "embeddings"]
    assert names(tmp_path) == {1: whole[:1], 2: whole[:1], 3: whole[:1], 4: whole, 5: whole}
    write_json(tmp_path / "refresh" / "worker.json", {"step": 3})  # at work, so overtaken but not deleted
    index_worker.clean(tmp_path, [1])
    assert list(names(tmp_path)) == [1, 3, 4, 5]
    write_json(tmp_path / "checkpoints" / "step_00000007" / "state.json", {"index_step": 4})
    index_worker.clean(tmp_path, [1])
    assert list(names(tmp_path)) == [1, 4, 5], "a checkpoint resumes with step 4, which is newer than 3"
    index_worker.abandon(tmp_path, 4)
    assert list(names(tmp_path)) == [1, 4] and index_worker.finished(tmp_path) == 4
    index_worker.export(tmp_path, 4, load_encoder(world / "doc_encoder", "passage"))
    assert names(tmp_path) == {1: whole[:1], 4: whole[:1]}, "vectors of an abandoned step 4 survived"
    assert not list((tmp_path / "refresh").glob(".*.old"))


def test_the_state_of_a_worker(tmp_path):
    """Never seen, alive, silent, gone; of another machine only its silence can tell."""
    assert "no index worker has been seen; start one" in index_worker.worker_state(tmp_path, 60)
    index_worker.show_life(tmp_path, 0)
    assert index_worker.worker_state(tmp_path, 60) == ""
    file = tmp_path / "refresh" / "worker.json"
    life = read_json(file)
    assert set(life) == {"pid", "host", "time", "step"} and life["pid"] == os.getpid()
    write_json(file, life | {"time": time.time() - 100})
    assert "last sign of life 100 s ago" in index_worker.worker_state(tmp_path, 60)
    assert index_worker.worker_state(tmp_path, 200) == ""
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_json(file, life | {"pid": ended.pid})
    assert f"{ended.pid} on {life['host']}: its process is gone" in index_worker.worker_state(tmp_path, 60)
    write_json(file, life | {"pid": ended.pid, "host": "elsewhere"})
    assert index_worker.worker_state(tmp_path, 60) == ""


def settings(world, folder, **changes):
    """(the worker's config, its flags); `launch` may be the text of a shell script that gets the command."""
    keys = {"run_dir": folder, "corpus": world / "corpus.tsv", "batch_size": 16, "poll_seconds": 0.1}
    keys |= changes
    if "\n" in str(keys.get("launch")):
        script = folder / f"launch{len(list(folder.glob('launch*')))}.sh"
        script.write_text(keys["launch"])
        keys["launch"] = f"sh {script}"
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return load_config("", "config/index_worker.yaml", flags), flags


def encode_once(world, run_dir, launch, step=5):
    cfg, _ = settings(world, run_dir, launch=launch)
    with index_worker.take_place(cfg) as lock:
        index_worker.encode(cfg, step, lock)


def test_an_encoding_that_fails_or_is_withdrawn(world, tmp_path, capsys):
    """A failure is said once and not repeated; vectors of a replaced export are never handed over."""
    index_worker.export(tmp_path, 5, load_encoder(world / "doc_encoder", "passage"))
    with pytest.raises(
        UserError, match=r"failed on .*step_00000005.doc_encoder \(exit code 1, .*goes on from"
    ):
        encode_once(world, tmp_path, "false")
    with pytest.raises(UserError, match=r"exit code 0"):  # nothing was made
        encode_once(world, tmp_path, "true")
    folder = index_worker.folder_of(tmp_path, 5)
    building = f"mkdir -p {folder}/.embeddings.tmp\ntouch {folder}/.embeddings.tmp/manifest.json\n"
    again = f"mv {folder}/doc_encoder {tmp_path}/old\ncp -r {tmp_path}/old {folder}/doc_encoder\n"
    for end in ("", "exit 1\n"):
        encode_once(world, tmp_path, building + again + end)
        assert names(tmp_path) == {5: ["doc_encoder"]} and "withdrawn" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "old")
    for end in ("exit 1\n", building, building + "exit 1\n"):
        index_worker.export(tmp_path, 5, load_encoder(world / "doc_encoder", "passage"))
        encode_once(world, tmp_path, f"rm -r {folder}\n{end}")
        assert names(tmp_path) == {} and "withdrawn" in capsys.readouterr().out


def test_the_encoding_never_outlives_its_reason(world, tmp_path, monkeypatch):
    """When training ends, or Ctrl-C comes, the process of doc2embedding.py is stopped, and its children."""
    index_worker.export(tmp_path, 5, load_encoder(world / "doc_encoder", "passage"))
    slow = f"sleep 60 &\necho $! > {tmp_path}/pid\nwait\n"
    show_life = index_worker.show_life

    def later(then):
        def look(*arguments):
            show_life(*arguments)
            if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
                then()

        return look

    def ctrl_c():
        raise KeyboardInterrupt

    def child_is_gone():
        pid = int((tmp_path / "pid").read_text())
        (tmp_path / "pid").unlink()
        for _ in range(50):
            stat = f"/proc/{pid}/stat"
            if not os.path.exists(stat) or open(stat).read().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            time.sleep(0.1)
        return False

    monkeypatch.setattr(index_worker, "show_life", later(ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        encode_once(world, tmp_path, slow)
    assert child_is_gone()
    monkeypatch.setattr(index_worker, "show_life", later(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    flags = settings(world, tmp_path, launch=slow)[1]
    monkeypatch.setattr(sys, "argv", ["index_worker", *flags])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        index_worker.main()
    signal.signal(signal.SIGTERM, before)
    assert child_is_gone()
    ended = later(lambda: write_json(tmp_path / "metrics.json", {}))
    monkeypatch.setattr(index_worker, "show_life", ended)
    index_worker.main()
    assert child_is_gone() and names(tmp_path) == {5: ["doc_encoder"]}


def test_one_worker_is_enough(world, tmp_path, monkeypatch, capsys):
    """A second is refused while the first lives; what a killed one left behind is waited for."""
    cfg, _ = settings(world, tmp_path)
    first = index_worker.take_place(cfg)
    index_worker.show_life(tmp_path, 0)
    with pytest.raises(UserError, match=f"has a worker: process {os.getpid()}"):
        index_worker.take_place(cfg)
    file = tmp_path / "refresh" / "worker.json"
    write_json(file, read_json(file) | {"time": 0})
    waited = []
    monkeypatch.setattr(index_worker.time, "sleep", lambda _: waited.append(len(waited) < 3 or first.close()))
    with index_worker.take_place(cfg) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(open(tmp_path / "refresh" / "worker.lock"), fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert len(waited) == 4 and capsys.readouterr().out.count("that a killed worker left behind") == 1
    assert lock.closed


def test_vectors_from_before_a_header_was_known(world, tmp_path, monkeypatch):
    """The same file, but its first line was a passage then: each hit would be the neighbouring passage."""
    path = tmp_path / "corpus.tsv"
    path.write_text("pid\ttext\ttitle\n" + (world / "corpus.tsv").read_text().partition("\n")[2])
    corpus, run = Corpus(path), tmp_path / "run"
    write_vectors(run / "embeddings", corpus, np.ones((len(corpus) + 1, 32), np.float16), 100)
    shutil.copytree(world / "query_encoder", run / "query_encoder")
    flags = {"query_encoder": run / "query_encoder", "embeddings": run / "embeddings", "corpus": path}
    asking = {"questions": world / "test.jsonl", "out": tmp_path / "x.run"}
    training = {"train": world / "train.jsonl", "dev": "", "run_dir": tmp_path / "new", "reader": "t5-small"}
    training |= {"doc_encoder": world / "doc_encoder", "mixed_precision": "no"}
    for open_them, keys in (
        (lambda: LiveIndex(corpus, run / "embeddings", ACCELERATOR), {}),
        (lambda: ask.load(SimpleNamespace(run=run, corpus=path, corpus_format="auto")), {}),
        (test_dpr.main, flags | asking),
        (train_emdr2.main, flags | training),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *(f"--{key}={value}" for key, value in keys.items())])
        with pytest.raises(UserError, match=f"made from {len(corpus) + 1} passages, .* has {len(corpus)};"):
            open_them()


def test_bad_settings_of_a_worker_are_said_at_once(world, tmp_path, monkeypatch):
    """No corpus, no such launcher, an unknown precision: one line, before it waits for anything."""
    for changes, message in (
        ({"corpus": tmp_path / "none.tsv"}, "corpus: .*none.tsv: no such file"),
        ({"launch": "acelerate launch"}, "launch: 'acelerate': no such program"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"run_dir": ""}, "run_dir: give a path"),
    ):
        _, flags = settings(world, tmp_path, **changes)
        monkeypatch.setattr(sys, "argv", ["index_worker", *flags])
        with pytest.raises(UserError, match=message):
            index_worker.main()
    assert not (tmp_path / "refresh").exists()


def test_a_worker_of_another_corpus_stops_before_it_encodes(world, tmp_path):
    """The newest checkpoint names the corpus of the run; a run without one says nothing."""
    corpus = Corpus(world / "corpus.tsv")
    index_worker.check_corpus(tmp_path, corpus)
    for step, known in ((1, "0" * 16), (2, corpus.sha256[:16])):
        settings = {"settings": {"content of corpus": known}}
        write_json(tmp_path / "checkpoints" / f"step_{step:08d}" / "state.json", settings)
        if step == 1:
            with pytest.raises(UserError, match="trained on another corpus than .*corpus.tsv"):
                index_worker.check_corpus(tmp_path, corpus)
    index_worker.check_corpus(tmp_path, corpus)


def test_an_export_withdrawn_in_the_last_moment(world, tmp_path, monkeypatch, capsys):
    """Between the last look and the hand-over the folder goes: said, and no traceback."""
    index_worker.export(tmp_path, 5, load_encoder(world / "doc_encoder", "passage"))
    folder, replace = index_worker.folder_of(tmp_path, 5), os.replace
    building = f"mkdir -p {folder}/.embeddings.tmp\ntouch {folder}/.embeddings.tmp/manifest.json\n"

    def late(source, target):
        if str(source).endswith(".embeddings.tmp") and folder.exists():
            shutil.rmtree(folder)
        replace(source, target)

    monkeypatch.setattr(index_worker.os, "replace", late)
    encode_once(world, tmp_path, building)
    assert names(tmp_path) == {} and "withdrawn" in capsys.readouterr().out


def wait_until(condition, process, seconds=240):
    """Wait for condition(); fails when the process ends or the time is over."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < end, "took too long"
        time.sleep(0.1)


def start_worker(world, run_dir, **changes):
    argv = [sys.executable, "-m", "utils.index_worker", *settings(world, run_dir, **changes)[1]]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, **out)


def test_a_worker_beside_a_run(world, tmp_path):
    """
    Killed amid an encoding it is seen as dead; started again it goes on. Its rows are those of a refresh
    here. Of two exports only the newer is encoded. The end of the run is its end.
    """
    life, encoder = tmp_path / "refresh" / "worker.json", trained(world)
    index_worker.export(tmp_path, 4, encoder)
    slow = f'touch {tmp_path}/begun\nsleep 5\nexec python "$@"\n'
    process = start_worker(world, tmp_path, launch=slow)
    wait_until((tmp_path / "begun").is_file, process)  # the sign of life is older than the child
    assert read_json(life)["step"] == 4
    assert index_worker.worker_state(tmp_path, 60) == "" and index_worker.finished(tmp_path) == 0
    process.kill()
    process.wait()
    assert "its process is gone" in index_worker.worker_state(tmp_path, 60)

    process = start_worker(world, tmp_path)
    try:
        wait_until(lambda: index_worker.finished(tmp_path) == 4, process)
        index = LiveIndex(Corpus(world / "corpus.tsv"), world / "embeddings", ACCELERATOR)
        index.load(index_worker.vectors(tmp_path, 4), 4)
        rows_ND = np.concatenate(index.shards)
        index.refresh(encoder, 4, 16, nullcontext)
        assert np.array_equal(rows_ND, index.shards[0])
        process.send_signal(signal.SIGSTOP)
        index_worker.export(tmp_path, 5, encoder)
        index_worker.export(tmp_path, 6, load_encoder(world / "doc_encoder", "passage"))
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: index_worker.finished(tmp_path) == 6, process)
        assert names(tmp_path)[5] == ["doc_encoder"]
        assert np.array_equal(rows_in(index_worker.vectors(tmp_path, 6)), rows_in(world / "embeddings"))
        write_json(tmp_path / "metrics.json", {})
        said = process.communicate(timeout=240)[0]
    finally:
        kill_tree(process, signal.SIGKILL)
    assert process.returncode == 0 and "training has finished, so has its worker" in said, said
    assert "that a killed worker left behind" in said
