"""EMDR2's index against brute force and doc2embedding.py: search, refresh, resume, folders handed over."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils.live_index
import utils.search
from tests.processes import main, on_devices
from tests.toy import ACCELERATOR, make_world
from utils.data import Corpus
from utils.distributed import gather_items
from utils.distributed import world as devices_of
from utils.live_index import LiveIndex
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, sha256, write_json
from utils.plumbing.weights import load_encoder, save_encoder
from utils.search import exact_topk


def make_embeddings(doc_encoder, corpus, out):
    """Run doc2embedding.py in this process; returns `out`."""
    main("doc2embedding.py", {"doc_encoder": doc_encoder, "corpus": corpus, "out": out, "shard_size": 16})
    return out


def trained(world, dropout=0.0):
    """The passage encoder after training, so to speak: every weight moved."""
    encoder = load_encoder(world / "doc_encoder", "passage", dropout=dropout)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, its passages encoded: vectors; by a trained encoder: trained/, trained_vectors."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_embeddings(folder / "doc_encoder", folder / "corpus.tsv", folder / "vectors")
    save_encoder(trained(folder), folder / "trained")
    make_embeddings(folder / "trained", folder / "corpus.tsv", folder / "trained_vectors")
    return folder


def make_run(folder, **changes):
    """What LiveIndex uses of utils.plumbing.run.Run."""
    run = {"accelerator": ACCELERATOR, "device": ACCELERATOR.device, "main": True, "dir": folder, "said": []}
    run = SimpleNamespace(**run | {"state": {"step": 0}, "checkpoint": None, "first": 0} | changes)
    run.say = run.said.append
    return run


def make_index(world, run=None, corpus=None, **changes):
    """A LiveIndex over the toy corpus, or another."""
    cfg = {"embeddings": world / "vectors", "refresh": "sync", "refresh_every": 10, "encoding_batch_size": 5}
    cfg |= {name: world / name for name in ("query_encoder", "doc_encoder")}
    cfg |= {"train_doc_encoder": True} | changes
    corpus = corpus or Corpus(world / "corpus.tsv")
    return LiveIndex(corpus, run or make_run(world / "run"), SimpleNamespace(**cfg))


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


def twins():
    """(nine questions, sixty passages) of so few values that equal scores are everywhere."""
    rng = np.random.default_rng(3)
    q_QD = rng.integers(-2, 3, (9, 32)).astype(np.float32)
    x_ND = rng.integers(-1, 2, (60, 32)).astype(np.float16)
    x_ND[40:45] = x_ND[3]
    return q_QD, x_ND


# ---------------------------------------------------------------- search
def search_cases(world, out):
    """Every search of the test, on this device."""
    rank, devices = devices_of()
    corpus = Corpus(world / "corpus.tsv")
    q_QD, x_ND = twins()
    index = make_index(world, corpus=corpus)
    for size in (1, 7, 16, 100):
        index.load(write_vectors(out / f"{rank}_{size}", corpus, x_ND, size), 1)
        for k in (1, 7, 60, 99):
            assert all(map(np.array_equal, index.search(q_QD, k), brute_force(q_QD, x_ND, k)))

    # after a refresh: the slices are the corpus, and a search meets the new rows of all of them
    index.load(world / "vectors", 0)
    index.make_rows(trained(world), 7)
    slices = gather_items({rank: np.concatenate(index.shards)})
    fresh_ND = np.concatenate([*slices.values()])
    assert np.abs(fresh_ND - rows_in(world / "trained_vectors")).max() < 4e-3  # fp16's last bit
    assert all(map(np.array_equal, index.search(q_QD, 9), brute_force(q_QD, fresh_ND, 9)))

    # two passages: of three devices one holds nothing
    (out / f"{rank}.tsv").write_text("1\ta text\ta\n2\tb text\tb\n")
    two = Corpus(out / f"{rank}.tsv")
    if devices == 1:
        make_embeddings(world / "doc_encoder", two.path, world / "two")
    index = make_index(world, corpus=two, embeddings=world / "two")
    index.make_rows(load_encoder(world / "doc_encoder", "passage"), 1)
    assert np.array_equal(index.search(q_QD, 5)[1], brute_force(q_QD, rows_in(world / "two"), 5)[1])


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_the_search_is_brute_force_on_any_number_of_devices(world, tmp_path, devices):
    """Ids, scores and ties of the whole corpus, for every shard size and k, the same on every device."""
    if devices == 1:
        search_cases(world, tmp_path)
    else:
        on_devices(devices, search_cases, world, tmp_path)


def test_the_copy_on_a_gpu_is_searched_as_the_rows_are(world, tmp_path, monkeypatch):
    """Its code, on a CPU, copied in blocks of any size: load and refresh bring it up to date."""
    q_QD, x_ND = twins()
    index = make_index(world)
    write_vectors(tmp_path / "e", index.corpus, x_ND, 16)
    index.on_gpu_nD = torch.full((60, 32), torch.nan, dtype=torch.float16)
    given, real = [], exact_topk

    def search(*arguments, resident_ND, **named):
        given.append(resident_ND)
        return real(*arguments, resident_ND=resident_ND, **named)

    monkeypatch.setattr(utils.live_index, "exact_topk", search)
    for block in (7, 60):
        monkeypatch.setattr(utils.live_index, "BLOCK", block)
        monkeypatch.setattr(utils.search, "BLOCK", block)
        index.load(tmp_path / "e", 1)
        for k in (1, 5, 99):
            assert all(map(np.array_equal, index.search(q_QD, k), brute_force(q_QD, x_ND, k)))
    index.make_rows(trained(world), 2)
    assert all(map(np.array_equal, index.search(q_QD, 5), brute_force(q_QD, index.shards[0], 5)))
    assert len(given) == 7 and all(copy_nD is index.on_gpu_nD for copy_nD in given)


# ---------------------------------------------------------------- load, check, make
def test_a_refresh_is_doc2embedding(world, monkeypatch):
    """The rows of the encoder as it is now, in any windows, the same bits each time, training undisturbed."""
    encoder = trained(world, dropout=0.5).train()
    index = make_index(world, encoding_batch_size=64)
    before_ND, wanted_ND = rows_in(world / "vectors"), rows_in(world / "trained_vectors")
    assert index.step == 0 and index.encoder == {}
    assert all(isinstance(shard, np.memmap) for shard in index.shards)
    state = torch.get_rng_state()
    index.refresh(10, encoder)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training and encoder.model.training
    assert index.step == index.run.state["index_step"] == 10 and index.shards[0].dtype == np.float16
    assert np.array_equal(index.shards[0], wanted_ND) and np.abs(wanted_ND - before_ND).max() > 0.5
    assert np.array_equal(rows_in(world / "vectors"), before_ND), "the folder on disk was written to"
    for step in (0, 9, 11):
        index.refresh(step, None)
    assert index.step == 10, "nothing is due"

    monkeypatch.setattr(utils.live_index, "WINDOW", 7)
    rows_nD = index.shards[0]
    for _ in range(2):
        once_nD = rows_nD.copy()
        index.refresh(20, encoder)
        assert index.shards[0] is rows_nD and np.abs(rows_nD - wanted_ND).max() < 4e-3
    assert np.array_equal(rows_nD, once_nD)
    kept = index.encoder["index_encoder"].state_dict()
    encoder.model.encoder.layer[0].output.dense.weight.data.zero_()  # it learns on; the copy does not
    assert all(torch.equal(kept[name], tensor) for name, tensor in trained(world).state_dict().items())


def test_vectors_of_another_encoder_are_refused(world, tmp_path):
    """Other weights, the other tower, rows in another order, another dimension, NaN; its own pass."""
    index = make_index(world)
    encoder = load_encoder(world / "doc_encoder", "passage", dropout=0.5).train()
    state = torch.get_rng_state()
    index.check(encoder)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    other = load_encoder(world / "query_encoder", "question")
    other.inputs["role"] = "passage"
    for wrong in (trained(world), other):
        with pytest.raises(UserError, match="vectors: .* not those of doc_encoder .*cosine .*repeat doc2"):
            index.check(wrong)
    with pytest.raises(UserError, match="trained_vectors: these vectors are not those of doc_encoder"):
        make_index(world, embeddings=world / "trained_vectors")
    index.refresh(10, trained(world))
    index.check(trained(world))
    rows_ND = rows_in(world / "vectors")
    for rows, message in (
        (rows_ND[::-1], "passage '1': cosine 0"),
        (np.full_like(rows_ND, np.nan), "passage '1': cosine nan"),
        (rows_ND[:, :16], "have 16 dimensions, doc_encoder 32"),
    ):
        index.shards = [rows]
        with pytest.raises(UserError, match=message):
            index.check(encoder)
    # no cosine shows this edit, only the hash in the manifest
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[-1] += 1e-3
    save_encoder(encoder, tmp_path / "edited")
    with pytest.raises(UserError, match="made by an encoder of other weights than .*edited; repeat doc2emb"):
        make_index(world, doc_encoder=tmp_path / "edited")


def test_a_diverged_encoder_ends_the_refresh(world):
    """NaN, and values beyond float16, name the passage and the step."""
    index = make_index(world)
    for value, first, fault in ((np.nan, 16, "holds NaN.*after step 10"), (1e6, 1, "reaches .*float32")):
        encoder = trained(world)
        oslo = encoder.tokenizer.convert_tokens_to_ids("oslo")
        with torch.no_grad():
            encoder.model.encoder.layer[-1].output.LayerNorm.bias.zero_()
            encoder.model.embeddings.word_embeddings.weight[oslo] = value
            if np.isfinite(value):
                encoder.model.encoder.layer[-1].output.LayerNorm.weight.fill_(value)
        with pytest.raises(UserError, match=f"passage '{first}': its vector {fault}"):
            index.refresh(10, encoder)


def test_only_whole_folders_of_this_corpus_are_loaded(world, tmp_path):
    """A load takes the rows over without a copy; another corpus, or an unfinished folder, is refused."""
    index = make_index(world)
    index.load(world / "trained_vectors", 9)
    assert index.step == 9 and all(isinstance(shard, np.memmap) for shard in index.shards)
    assert np.array_equal(np.concatenate(index.shards), rows_in(world / "trained_vectors"))
    (tmp_path / "other.tsv").write_text((world / "corpus.tsv").read_text().replace("old", "new"))
    other = make_embeddings(world / "trained", tmp_path / "other.tsv", tmp_path / "other")
    with pytest.raises(UserError, match="other: made from another corpus"):
        index.load(other, 10)
    shutil.copytree(world / "trained_vectors", tmp_path / "half")
    write_json(tmp_path / "half" / "manifest.json", read_json(other / "manifest.json") | {"complete": False})
    with pytest.raises(UserError, match="half: not complete"):
        index.load(tmp_path / "half", 10)
    assert index.step == 9
    shutil.copytree(world / "vectors", tmp_path / "damaged")
    np.save(tmp_path / "damaged" / "00001.npy", np.zeros((16, 32), np.float16))
    with pytest.raises(UserError, match="00001.npy has another sha256"):
        make_index(world, embeddings=tmp_path / "damaged")
    # a corpus whose first line was a passage before it was a header: each hit would be the neighbour
    path = tmp_path / "corpus.tsv"
    path.write_text("pid\ttext\ttitle\n" + (world / "corpus.tsv").read_text().partition("\n")[2])
    write_vectors(tmp_path / "61", Corpus(path), np.ones((61, 32), np.float16), 100)
    with pytest.raises(UserError, match="made from 61 passages, .* has 60;"):
        make_index(world, corpus=Corpus(path), embeddings=tmp_path / "61")


def test_a_resumed_run_has_the_vectors_that_it_had(world, tmp_path):
    """index_encoder makes them again; not where the first step makes new ones, or where none were made."""
    checkpoint = tmp_path / "checkpoint"
    save_encoder(trained(world), checkpoint / "index_encoder")
    (tmp_path / "refresh" / "step_00000010").mkdir(parents=True)
    (tmp_path / "refresh" / "step_00000020" / ".embeddings").mkdir(parents=True)
    state = {"step": 13, "index_step": 10}
    index = make_index(world, make_run(tmp_path, state=state, checkpoint=checkpoint, first=13))
    index.refresh(13, None)
    assert index.step == 10 and np.abs(index.shards[0] - rows_in(world / "trained_vectors")).max() < 4e-3
    assert names(tmp_path) == {20: [".embeddings"]}, "only what the worker is at work on stays"
    rows_ND = index.shards[0].copy()
    index.refresh(14, None)
    assert np.array_equal(index.shards[0], rows_ND) and index.step == 10

    encoder = load_encoder(world / "doc_encoder", "passage")
    index = make_index(world, make_run(tmp_path, state=state, checkpoint=checkpoint, first=20))
    index.refresh(20, encoder)
    assert index.step == 20 and np.abs(index.shards[0] - rows_in(world / "vectors")).max() < 4e-3
    index = make_index(world, make_run(tmp_path, checkpoint=tmp_path / "early", first=3))
    index.refresh(3, None)
    assert index.step == 0 and index.run.state["index_step"] == 0


# ---------------------------------------------------------------- async: folders that change hands
def names(run_dir):
    """{step: names in its folder}"""
    folders = sorted((run_dir / "refresh").glob("step_*"))
    return {int(folder.name[5:]): sorted(path.name for path in folder.iterdir()) for folder in folders}


def test_the_exchange_of_folders(world, tmp_path, monkeypatch):
    """Handed over when the worker is idle; the newest finished vectors come into use; the rest is deleted."""
    run = make_run(tmp_path)
    index = make_index(world, run, refresh="async", refresh_every=5)
    encoder = trained(world)
    folder = tmp_path / "refresh"

    def die(*_):
        assert not list(folder.glob("step_*/doc_encoder")), "visible before it is whole"
        raise OSError(5, "died")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="died"):
        patch.setattr("utils.plumbing.weights.write_json", die)  # the last thing that save_encoder writes
        index.refresh(5, encoder)
    index.refresh(5, encoder)
    assert names(tmp_path) == {5: ["doc_encoder"]} and index.step == 0
    saved = load_encoder(folder / "step_00000005" / "doc_encoder", "passage").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in encoder.state_dict().items())

    index.refresh(10, encoder)  # no worker has begun: the newer encoder replaces the older one
    assert names(tmp_path) == {10: ["doc_encoder"]}
    (folder / "step_00000010" / ".embeddings").mkdir()
    index.refresh(15, encoder)
    index.refresh(16, encoder)
    assert names(tmp_path) == {10: [".embeddings", "doc_encoder"]}, "the worker is at work on it"
    assert index.step == 0 and "step 15: the vectors in use are those of step 0" in run.said

    (folder / "step_00000010" / ".embeddings").rmdir()
    shutil.copytree(world / "trained_vectors", folder / "step_00000010" / "embeddings")
    index.refresh(17, encoder)
    assert index.step == run.state["index_step"] == 10
    assert "step 17: the vectors of step 10 are in use" in run.said
    assert np.array_equal(np.concatenate(index.shards), rows_in(world / "trained_vectors"))
    assert all(map(torch.equal, index.encoder["index_encoder"].parameters(), encoder.parameters()))
    for step in (20, 25):
        index.refresh(step, encoder)
    assert names(tmp_path) == {10: ["doc_encoder", "embeddings"], 25: ["doc_encoder"]}
    shutil.copytree(world / "trained_vectors", folder / "step_00000025" / "embeddings")
    index.refresh(24, encoder)
    assert index.step == 10, "vectors of a future that a resume has left are not taken"
    index.refresh(25, encoder)
    assert index.step == 25
    index.refresh(30, encoder)
    shutil.copytree(world / "vectors", folder / "step_00000030" / "embeddings")
    with pytest.raises(UserError, match="step_00000030/embeddings: these vectors are not those of doc_enc"):
        index.refresh(31, encoder)
