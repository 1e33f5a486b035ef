"""What only a GPU can get wrong: its random state, half precision, search where the vectors lie, a resume."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils.search
from tests import processes
from tests.processes import rows
from tests.test_live_index import make_index, make_run
from tests.test_train_dpr import keys, load
from tests.toy import flat_gradient
from tests.toy_t5 import t5
from train_dpr import add_gradient, make_batch
from utils.corpus import Corpus
from utils.encoder import embed, tokenize_passages
from utils.plumbing.weights import load_encoder
from utils.search import exact_topk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = {key: value for key, value in processes.ENVIRONMENT.items() if key != "ACCELERATE_USE_CPU"}
HALF = {"no": nullcontext}
HALF |= {kind: partial(torch.autocast, "cuda", dtype) for kind, dtype in
         (("bf16", torch.bfloat16), ("fp16", torch.float16))}  # fmt: skip


def run(script, settings):
    """What the script prints, on the GPU, to the end."""
    done = processes.run(script, settings, env=ON_GPU)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def gradient(world, kind="no", step=0, **changes):
    """Loss and gradient of the first batch on the GPU, the masks of dropout those of (seed, step, chunk)."""
    cfg, train, corpus, towers = load(world, **changes)
    for tower in towers.values():
        tower.to("cuda")
    accelerator = SimpleNamespace(device=torch.device("cuda"), process_index=0)
    accelerator.backward, accelerator.autocast = torch.Tensor.backward, HALF[kind]
    batch = make_batch(0, train, corpus, towers, cfg)
    loss, _ = add_gradient(batch, towers, accelerator, cfg, step)
    return loss.item(), flat_gradient(*towers.values())


@pytest.mark.parametrize("kind", HALF)
def test_both_passes_of_the_gradient_cache_drop_the_same_units(world, kind):
    """Dropout 0.3: the cached gradient is the plain one, and that of other masks is far from it."""
    plain_loss, plain = gradient(world, kind, dropout=0.3)
    loss, cached = gradient(world, kind, dropout=0.3, grad_cache=True)
    _, other = gradient(world, kind, step=1, dropout=0.3, grad_cache=True)
    near = 1e-4 if kind == "no" else 2e-2
    assert abs(loss - plain_loss) < near
    assert (cached - plain).norm() < near * plain.norm()
    assert (other - plain).norm() > 0.2 * plain.norm()


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision_points_the_same_way(world, kind):
    """Without dropout: cosine with the gradient in float32 over 0.999."""
    assert torch.cosine_similarity(*(gradient(world, k, dropout=0.0)[1] for k in ("no", kind)), dim=0) > 0.999


@pytest.mark.parametrize("kind", HALF)
def test_a_run_that_stops_goes_on_as_if_it_had_not(world, tmp_path, kind):
    """Five steps, stopped, resumed with its dropout and its loss scaler: the losses of the unbroken run."""
    changes = {"mixed_precision": kind, "dropout": 0.1, "grad_cache": True, "save_every": 5, "epochs": 2}
    run("train_dpr.py", keys(world, tmp_path / "whole", **changes))
    run("train_dpr.py", keys(world, tmp_path / "parts", **changes, stop_after=5))
    again = changes | {"resume": "changed", "log_every": 1}
    said = run("train_dpr.py", keys(world, tmp_path / "parts", **again))
    assert "step      6/10" in said and "step      5/10" not in said
    whole, parts = (
        {row["step"]: row["loss"] for row in rows(tmp_path / name) if "loss" in row}
        for name in ("whole", "parts")
    )
    assert len(whole) == 10 and parts == pytest.approx(whole, rel=1e-4 if kind == "no" else 2e-2)


def test_vectors_of_a_gpu_are_those_of_a_cpu(world):
    """float32 to 1e-5, autocast to 2e-2 of the largest number, whatever the batch, by tokens too."""
    encoder, corpus = load_encoder(world / "doc_encoder", "passage"), Corpus(world / "corpus.tsv")
    ids = tokenize_passages(encoder, list(corpus))
    wanted_ND = embed(encoder, ids, 8)
    encoder.to("cuda")
    for kind, near in (("no", 1e-5), ("bf16", 2e-2), ("fp16", 2e-2)):
        for size in (3, 64):
            apart = np.abs(embed(encoder, ids, size, HALF[kind]) - wanted_ND).max()
            assert apart < near * np.abs(wanted_ND).max()
    for how in ({"tokens": 100}, {"tokens": 4000}, {"tokens": 4000, "lengths": (16, 32)}):
        assert np.abs(embed(encoder, ids, 0, **how) - wanted_ND).max() < 1e-5 * np.abs(wanted_ND).max()


@pytest.mark.parametrize(
    "flags", [{}, {"mixed_precision": "bf16"}, {"mixed_precision": "bf16", "compile": True}], ids=str
)
def test_encoding_on_the_gpu(world, tmp_path, flags):
    """By tokens, tokenised by processes: the vectors of a CPU to 1e-3 (float16 on disk), bf16 to 2e-2."""
    keys = {"doc_encoder": world / "doc_encoder", "corpus": world / "corpus.tsv", "out": tmp_path / "e"}
    said = run("doc2embedding.py", keys | {"shard_size": 16} | flags)
    assert "1 x cuda" in said and "batches of 65,536 tokens" in said
    encoder, corpus = load_encoder(world / "doc_encoder", "passage"), Corpus(world / "corpus.tsv")
    wanted_ND = embed(encoder, tokenize_passages(encoder, list(corpus)), 8)
    x_ND = np.concatenate([np.load(file) for file in sorted((tmp_path / "e").glob("*.npy"))])
    apart = np.abs(x_ND - wanted_ND).max() / np.abs(wanted_ND).max()
    assert apart < (2e-2 if flags else 1e-3)


def test_chunks_fit_the_gpu(world, tmp_path):
    """Keys of 0: 64k tokens at 16 and 32 a row; a resume keeps them."""
    settings = keys(world, tmp_path / "run", question_chunk=0, passage_chunk=0, stop_after=2)
    assert "question_chunk 4096, passage_chunk 2048" in run("train_dpr.py", settings)
    again = settings | {"stop_after": 4, "resume": "changed"}
    assert "question_chunk 4096, passage_chunk 2048" in run("train_dpr.py", again)


@pytest.mark.parametrize("k", [10, 100])  # 10: few enough for tiles; the cut is among twins
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_search_on_the_gpu_has_the_bits_of_the_cpu(dtype, k, monkeypatch):
    """Sent by blocks or lying there; all questions at once or seven; twins everywhere."""
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((4000, 64)).astype(dtype)
    x_ND[1000:1400] = x_ND[:400]
    x_ND[3000:3020] = x_ND[5]
    queries_QD = np.concatenate([rng.standard_normal((50, 64)), x_ND[:20]]).astype(np.float32)
    shards = [x_ND[:1300], x_ND[1300:1301], x_ND[1301:]]
    wanted = exact_topk(queries_QD, shards, k)
    resident_ND = torch.from_numpy(x_ND).to("cuda")
    for block, scores in ((512, 512 * 7), (512, 2**24), (32768, 2**24)):
        monkeypatch.setattr(utils.search, "SCORES", scores)
        for found in (
            exact_topk(queries_QD, shards, k, block, "cuda"),
            exact_topk(queries_QD, shards, k, block, resident_ND=resident_ND),
        ):
            assert all((a == b).all() for a, b in zip(found, wanted, strict=True))


def test_emdr2_keeps_its_vectors_on_the_gpu(world, tmp_path):
    """Three steps in bf16 with a refresh between; then the copy on the GPU has the refreshed rows."""
    corpus = world / "corpus.tsv"
    run("doc2embedding.py", {"doc_encoder": world / "doc_encoder", "corpus": corpus, "out": tmp_path / "x"})
    settings = {name: world / name for name in ("query_encoder", "doc_encoder")}
    settings |= {"embeddings": tmp_path / "x", "reader": t5(tmp_path), "train": world / "train.jsonl"}
    settings |= {"dev": "", "corpus": corpus, "run_dir": tmp_path / "run", "batch_size": 4, "top_k": 3}
    settings |= {"reader_tokens": 48, "answer_tokens": 6, "stop_after": 3, "refresh_every": 2}
    settings |= {"learning_rate": 1e-3}
    said = run("train_emdr2.py", settings)
    assert "1 x cuda" in said, said
    losses = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 3 and all(np.isfinite(row["loss"]) for row in losses)
    assert [row["index_age"] for row in losses] == [0, 1, 0]

    device = torch.device("cuda")
    accelerator = SimpleNamespace(device=device, autocast=nullcontext)
    live = make_run(tmp_path / "run", accelerator=accelerator, device=device)
    index = make_index(world, live, embeddings=tmp_path / "x", encoding_batch_size=8)
    encoder = load_encoder(tmp_path / "run" / "doc_encoder", "passage").to(device)
    before = index.on_gpu_nD.clone()
    index.make_rows(encoder, 3)
    assert index.on_gpu_nD.is_cuda and not torch.equal(before, index.on_gpu_nD)
    assert torch.equal(index.on_gpu_nD.cpu(), torch.from_numpy(np.concatenate(index.shards)))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_the_commands_run_in_half_precision(world, tmp_path, kind):
    """A cross-encoder, its ranking and a reader on the GPU, to the end."""
    questions, corpus = world / "train.jsonl", world / "corpus.tsv"
    common = {"corpus": corpus, "mixed_precision": kind}
    run("doc2embedding.py", common | {"doc_encoder": world / "doc_encoder", "out": tmp_path / "x"})
    ranking = tmp_path / "train.run"
    settings = {"query_encoder": world / "query_encoder", "embeddings": tmp_path / "x", "index": "stream"}
    run("test_dpr.py", settings | {"corpus": corpus, "questions": questions, "k": 10, "out": ranking})
    settings = {"init": world / "bert", "train": questions, "run_dir": tmp_path / "c", "batch_size": 8}
    settings |= {"dev": "", "pair_tokens": 48, "stop_after": 3}
    said = run("train_cross_encoder.py", common | settings)
    settings = {"cross_encoder": tmp_path / "c" / "cross_encoder", "ranking": ranking, "questions": questions}
    run("rerank.py", common | settings | {"out": tmp_path / "ce.run", "depth": 5})
    settings = {"init": world / "bert", "train": questions, "train_run": ranking, "dev": "", "dev_run": ""}
    settings |= {"run_dir": tmp_path / "r", "batch_size": 4, "reader_tokens": 48, "stop_after": 3}
    settings |= {"passages_per_question": 3, "gold": ""}
    for text in (said, run("train_reader.py", common | settings)):
        assert f"1 x cuda, precision {kind}" in text
    for name in ("c", "r"):
        losses = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
        assert len(losses) == 3 and np.isfinite(losses).all()
