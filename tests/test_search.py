"""Search: the same passages, scores and order as a plain sort, however the vectors are stored and cut up."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from tests.saved import Largest
from tests.toy import golden_file
from utils.distributed import cut
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.faiss_setup import name_blas_kernel
from utils.plumbing.files import sha256, write_json
from utils.search import as_lists, build_index, exact_topk, fetch, search_index

GOLDEN = golden_file("merge_topk")["cases"]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def vectors(seed, rows, dim=24, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(dtype)


def plain_sort(queries_QD, x_ND, k):
    """The definition: float64 inner products as float32, larger first, then the earlier row."""
    scores_QN = (queries_QD.astype(np.float64) @ x_ND.astype(np.float64).T).astype(np.float32)
    order_Qk = np.lexsort((np.broadcast_to(np.arange(len(x_ND)), scores_QN.shape), -scores_QN))[:, :k]
    return np.take_along_axis(scores_QN, order_Qk, 1), order_Qk


def same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def embeddings_folder(folder, x_ND, size=40, **changes):
    """A folder as doc2embedding.py writes it; `changes` replace keys of the manifest."""
    folder.mkdir()
    for i, part in enumerate(cut(x_ND, size)):
        np.save(folder / f"{i:05d}.npy", part)
    manifest = {"rows": len(x_ND), "dim": x_ND.shape[1], "dtype": str(x_ND.dtype), "shard_size": size}
    manifest |= {"encoder": "e", "pair": "p", "role": "passage", "corpus": "c" * 64, "complete": True}
    manifest["shards"] = {file.name: sha256(file) for file in sorted(folder.glob("*.npy"))}
    write_json(folder / "manifest.json", manifest | changes)
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", GOLDEN, ids=[case.get("note", "plain")[:30] for case in GOLDEN])
def test_shards_give_the_list_that_merging_them_gives(case, device):
    """RocketQA's index_search + merge; where its padding bug shows (shard smaller than k), the flat truth."""
    queries_QD = np.array(case["queries"], np.float32)
    shards = [np.array(shard, np.float32) for shard in case["shards"]]
    scores_Qk, rows_Qk = exact_topk(queries_QD, shards, case["topk"], device=device)
    starts = np.cumsum([0] + [len(shard) for shard in shards])
    for i, expected in enumerate(case.get("flat", case["expected"])):
        home = np.searchsorted(starts, rows_Qk[i], side="right") - 1
        ids_k = case["shift"] * home + rows_Qk[i] - starts[home]
        np.testing.assert_allclose(scores_Qk[i], expected["scores"], atol=1e-6)
        if not case.get("ties"):
            assert ids_k.tolist() == expected["ids"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("questions", [1, 64, 300])  # from 256 on a CPU takes another way
def test_the_same_bits_for_every_sharding_block_and_device(questions, device):
    """Memory for one block is enough: shards and blocks of any size give the plain sort, to the last bit."""
    q_QD, x_ND = vectors(0, questions), vectors(1, 1003, dtype=np.float16)
    expected = plain_sort(q_QD, x_ND, 10)
    for size, block in ((1003, 16384), (1003, 64), (100, 17), (7, 16384)):
        same(exact_topk(q_QD, cut(x_ND, size), 10, block, device), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("questions", [3, 300])
def test_twins_stay_in_corpus_order_also_across_the_boundary_of_k(questions, device):
    """10 vectors, 30 copies each: rounding differs by place in a block; the answer must not (10 of 30)."""
    q_QD, x_ND = vectors(2, questions, 96), np.repeat(vectors(3, 10, 96, np.float16), 30, 0)
    x_ND = x_ND[np.random.default_rng(4).permutation(len(x_ND))]
    expected = plain_sort(q_QD, x_ND, 10)
    assert (np.diff(expected[0], axis=1) == 0).all()
    for size, block in ((300, 16384), (300, 37), (11, 16)):
        same(exact_topk(q_QD, cut(x_ND, size), 10, block, device), expected)
    flat = build_index("Flat", [x_ND], "", "")
    assert search_index(flat, q_QD, [x_ND], 10) == as_lists(*expected)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_that_of_a_block(device):
    """Scores rise along the corpus, so every passage is among the best so far: still few stay in memory."""
    q_QD, x_ND = np.eye(24, dtype=np.float32)[:6], np.abs(vectors(23, 20000))
    x_ND[:, :3] = np.sort(x_ND[:, :3], axis=0)
    x_ND[:, 3:6] = np.sort(x_ND[:, 3:6], axis=0)[::-1]
    with Largest() as largest:
        same(exact_topk(q_QD, cut(x_ND, 3000), 10, 500, device), plain_sort(q_QD, x_ND, 10))
    assert largest.numel < len(q_QD) * len(x_ND) / 4, largest.numel


@pytest.mark.parametrize("questions", [3, 300])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_passage_that_could_not_be_found_is_named(value, questions):
    """In the first block or in a late one, whatever the question: it would only be missing in the results."""
    for row in (3, 2999):
        x_ND = np.abs(vectors(24, 3000))
        x_ND[row, 5] = value
        for block in (100, 3000):
            with pytest.raises(UserError, match=f"passage row {row}"):
                exact_topk(np.abs(vectors(25, questions)), cut(x_ND, 700), 5, block)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat", "PQ4x4"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_no_index_takes_a_passage_that_it_could_not_find(factory, value, tmp_path):
    x_ND = vectors(30, 500, 16)
    x_ND[433, 0] = value
    with pytest.raises(UserError, match="passage row 433"):
        build_index(factory, cut(x_ND, 100), tmp_path, "e")
    assert not list(tmp_path.iterdir())


def test_vectors_that_do_not_differ_are_said(tmp_path, capsys):
    """Twelve vectors for sixty passages, one vector and noise, no length at all; equal scores of a search."""
    good_ND = vectors(31, 60)
    alike = [good_ND[np.arange(60) % 12], 5 + good_ND / 1000, np.zeros_like(good_ND)]
    for i, x_ND in enumerate([*alike, good_ND, good_ND[:1]]):
        open_embeddings(embeddings_folder(tmp_path / str(i), x_ND))
        assert ("does not tell passages apart" in capsys.readouterr().err) == (i < 3), i
    for scores_Qk, warned in (([[2, 2], [1, 1]], 1), ([[2, 2], [1, 0]], 0), ([[3], [3]], 0)):
        as_lists(np.array(scores_Qk, np.float32), np.zeros((2, len(scores_Qk[0])), int))
        assert capsys.readouterr().err.count("all scores are equal") == warned


def test_row_0_is_a_passage_and_minus_1_is_none():
    """The first passage of the corpus stays in a list; FAISS's "nothing found" never does."""
    rows_Qk, scores_Qk = np.array([[0, 7, -1], [3, 0, -1]]), np.array([[2.0, 1.0, -9.0], [5.0, 4.0, -9.0]])
    assert as_lists(scores_Qk, rows_Qk) == [[(0, 2.0), (7, 1.0)], [(3, 5.0), (0, 4.0)]]
    x_ND = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert fetch(cut(x_ND, 2), np.array([2, 1, 5, 0, 2]))[:, 0].tolist() == [4, 2, 10, 0, 4]
    half_ND = fetch(cut(x_ND.astype(np.float16), 2), np.array([5]))
    assert half_ND.dtype == np.float16 and half_ND.tolist() == [[10, 11]]


@pytest.mark.parametrize("device", DEVICES)
def test_k_larger_than_the_corpus_and_no_questions(device):
    """k is min(k, N): FAISS would fill up with -1, which Python reads as the last passage."""
    x_ND = vectors(9, 6)
    scores_Qk, rows_Qk = exact_topk(vectors(10, 4), [x_ND], 100, device=device)
    assert rows_Qk.shape == (4, 6) and (np.sort(rows_Qk) == np.arange(6)).all()
    flat = build_index("Flat", [x_ND], "", "")
    assert search_index(flat, vectors(10, 4), [x_ND], 100) == as_lists(scores_Qk, rows_Qk)
    for k, width in ((3, 3), (100, 6)):
        scores_Qk, rows_Qk = exact_topk(np.zeros((0, 24)), [x_ND], k, device=device)
        assert scores_Qk.shape == rows_Qk.shape == (0, width)


def test_what_cannot_be_searched_is_named():
    q_QD, x_ND = vectors(11, 4), vectors(12, 50)
    q_QD[2, 3] = np.nan
    with pytest.raises(UserError, match="question 2 .*NaN"):
        exact_topk(q_QD, [x_ND], 3)
    with pytest.raises(UserError, match="24 dimensions, the passages 23"):
        exact_topk(vectors(11, 4), [x_ND[:, :23]], 3)
    with pytest.raises(UserError, match="k is 0"):
        exact_topk(vectors(11, 4), [x_ND], 0)


@pytest.mark.parametrize("factory", ["HNSW32", "IVF8,Flat", "IVF4,PQ4x4", "PQ4x4", "OPQ4,IVF4,PQ4x4"])
def test_indexes_score_by_inner_product(factory, tmp_path):
    """Never silently L2: lengths differ by 10x here, so the nearest is not the largest product."""
    x_ND = vectors(13, 700, 16, np.float16) * np.linspace(0.1, 3, 700).astype(np.float16)[:, None]
    q_QD = vectors(14, 20, 16)
    found = search_index(build_index(factory, cut(x_ND, 90), tmp_path, "e"), q_QD, cut(x_ND, 90), 10)
    _, truth_Qk = plain_sort(q_QD, x_ND, 10)
    recall = np.mean([len({row for row, _ in f} & set(t)) / 10 for f, t in zip(found, truth_Qk, strict=True)])
    assert recall > 0.8, recall
    for query, results in zip(q_QD, found, strict=True):
        assert [score for _, score in results] == sorted([score for _, score in results], reverse=True)
        for row, score in results:
            assert score == pytest.approx(float(query @ x_ND[row].astype(np.float32)), abs=1e-4)


def test_a_saved_index_is_read_only_while_its_hash_and_its_embeddings_match(tmp_path, capsys):
    """FAISS loads a flipped bit without a word; here it is rebuilt, with a line that says so."""
    shards = [vectors(15, 300, 16)]
    assert build_index("HNSW8", shards, tmp_path, "one").hnsw.efConstruction == 200  # DPR's
    written = (tmp_path / "HNSW8.faiss").stat().st_mtime_ns
    build_index("HNSW8", shards, tmp_path, "one")
    assert (tmp_path / "HNSW8.faiss").stat().st_mtime_ns == written and not capsys.readouterr().out
    content = bytearray((tmp_path / "HNSW8.faiss").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "HNSW8.faiss").write_bytes(content)
    for embeddings in ("one", "two"):
        build_index("HNSW8", shards, tmp_path, embeddings)
        assert "building it again" in capsys.readouterr().out
        assert json.loads((tmp_path / "HNSW8.json").read_text())["sha256"] == sha256(tmp_path / "HNSW8.faiss")
    for note in ("", "{", "[]", "{}"):
        (tmp_path / "HNSW8.json").write_text(note)
        build_index("HNSW8", shards, tmp_path, "two")
        assert "building it again" in capsys.readouterr().out


def test_an_index_that_finds_too_little_gives_a_shorter_list_and_says_so(tmp_path, capsys):
    """With nprobe 1 an IVF index sees one list of passages and pads with -1, which never comes out."""
    x_ND = vectors(16, 300, 16)
    index = build_index("IVF30,Flat", [x_ND], tmp_path, "e", nprobe=1)
    assert "300 vectors are few to train 30 lists, 1170 would do" in capsys.readouterr().err
    seen = (index.search(vectors(17, 9, 16), 100)[1] >= 0).sum(1)
    found = search_index(index, vectors(17, 9, 16), [x_ND], 100)
    assert [len(results) for results in found] == seen.tolist() and 0 < seen.max() < 100
    assert all(row >= 0 and np.isfinite(score) for results in found for row, score in results)
    assert "fewer than 100 passages for 9 of 9 questions: raise nprobe" in capsys.readouterr().err
    assert search_index(index, np.zeros((0, 16)), [x_ND], 5) == []


def test_an_index_that_cannot_be_built_says_why(tmp_path):
    for factory, why in (
        ("IVF400,Flat", "at least 400 vectors"),
        ("Bogus", "Bogus"),
        ("LSH", "inner-product"),
        ("IDMap,Flat", "add does not make sense with IndexIDMap"),
        ("IVF4,PQ3", "should be a multiple"),
        ("IVF0,Flat", "cur_nprobe > 0"),
        ("", "could not parse"),
    ):
        with pytest.raises(UserError, match=why):
            build_index(factory, [vectors(18, 300, 16)], tmp_path, "e")
    assert not list(tmp_path.iterdir())


def swap(folder):
    (folder / "00000.npy").rename(folder / "x")
    (folder / "00001.npy").rename(folder / "00000.npy")
    (folder / "x").rename(folder / "00001.npy")


@pytest.mark.parametrize(
    "changes, damage, why",
    [
        ({"complete": False}, None, "not complete"),
        ({"corpus": "d" * 64}, None, "another corpus"),
        ({"role": "question"}, None, "question encoder"),
        ({"rows": 99}, None, "00002.npy holds"),
        ({"rows": 130}, None, "00002.npy holds"),
        ({"dim": 25}, None, r"40, 24.*40, 25"),
        ({"dtype": "float32"}, None, "float16.*float32"),
        ({"shards": {"00001.npy": "", "00000.npy": "", "00002.npy": ""}}, None, "out of order"),
        ({"shards": {"00000.npy": ""}}, None, "00001.npy is not in manifest"),
        ({}, lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        ({}, lambda folder: (folder / "00001.npy").unlink(), "00001.npy is missing"),
        ({}, lambda folder: os.truncate(folder / "00001.npy", 900), "not a whole .npy"),
        ({}, lambda folder: shutil.copy(folder / "00000.npy", folder / "00010.npy"), "00010.npy is not in"),
        ({}, lambda folder: shutil.copy(folder / "00000.npy", folder / "00001.npy"), "00001.npy has another"),
        ({}, swap, "00000.npy has another sha256"),
    ],
)
def test_embeddings_that_are_not_what_they_claim_are_refused(changes, damage, why, tmp_path):
    """Every one of these would search the wrong vectors, or the right ones under the wrong ids."""
    folder = embeddings_folder(tmp_path / "e", vectors(20, 100, dtype=np.float16), **changes)
    if damage:
        damage(folder)
    with pytest.raises(UserError, match=why):
        open_embeddings(folder, "c" * 64)


def test_the_kernel_is_named_by_the_flags_and_the_user_is_obeyed(tmp_path, monkeypatch):
    """OpenBLAS guesses wrongly on newer processors; a file without x86 flags names nothing."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    avx512 = "avx2 fma avx512f avx512dq avx512bw avx512vl"
    for flags, kernel in ((avx512, "SkylakeX"), ("avx2 fma avx512f", "Haswell"), ("sse2", None)):
        monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} mmx\nbugs\t: avx2 fma\n")
        name_blas_kernel(tmp_path / "cpuinfo")
        assert os.environ.get("OPENBLAS_CORETYPE") == kernel
    (tmp_path / "cpuinfo").write_text("Features : asimd\n")
    name_blas_kernel(tmp_path / "cpuinfo")
    assert "OPENBLAS_CORETYPE" not in os.environ
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    (tmp_path / "cpuinfo").write_text(f"flags : {avx512}\n")
    name_blas_kernel(tmp_path / "cpuinfo")
    assert os.environ["OPENBLAS_CORETYPE"] == "Zen"
