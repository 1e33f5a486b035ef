"""test_dpr.py on sixty toy passages: a plain sort ranks, a hand counts. Mistakes of four scripts."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import test_dpr
from tests.processes import command
from tests.test_rerank import save_cross
from tests.toy import make_world, tokenizer
from utils.data import Corpus, read_questions, read_run, write_run
from utils.encoder import embed, tokenize_questions
from utils.plumbing.config import UserError, friendly_errors
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, write_json
from utils.plumbing.weights import load_encoder


def call(patch, script, keys):
    """Run a script in this process as its command line does."""
    patch.setattr(sys, "argv", command(script, keys)[1:])
    AcceleratorState._reset_state(True)  # why: it keeps the first mixed_precision of a process for ever
    importlib.import_module(script.removesuffix(".py")).main()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, its embeddings in three shards, and a ranking."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    keys = {"corpus": folder / "corpus.tsv", "doc_encoder": folder / "doc_encoder", "shard_size": 25}
    with pytest.MonkeyPatch.context() as patch:
        call(patch, "doc2embedding.py", keys | {"out": folder / "embeddings"})
    save_cross(folder / "cross_encoder", tokenizer(folder))
    write_run(folder / "test.run", [("q50", [("51", 2.0), ("1", 1.0)])])
    return folder


@pytest.fixture
def test(world, tmp_path, monkeypatch):
    """Run test_dpr.py as its command line does; returns the ranking and the metrics that it wrote."""

    def run(**keys):
        files = {"questions": "test.jsonl", "corpus": "corpus.tsv", "embeddings": "embeddings"}
        files = {key: world / name for key, name in (files | {"query_encoder": "query_encoder"}).items()}
        call(monkeypatch, "test_dpr.py", files | {"out": tmp_path / "out/test.run", "k": 20} | keys)
        metrics = tmp_path / "out/test.metrics.json"
        return read_run(tmp_path / "out/test.run"), read_json(metrics) if metrics.is_file() else None

    return run


@pytest.fixture(scope="module")
def x_ND(world):
    """The stored vectors, in float64."""
    return np.concatenate(open_embeddings(world / "embeddings")[0]).astype(np.float64)


def assert_ranked_by(scores_QN, questions, ranking):
    """Each question has the 20 best of its row, equal ones in the order of the corpus."""
    for question, scores_N in zip(questions, scores_QN, strict=True):
        best = np.argsort(-scores_N, kind="stable")[:20]
        assert [pid for pid, _ in ranking[question["qid"]]] == [str(row + 1) for row in best]
        np.testing.assert_allclose([s for _, s in ranking[question["qid"]]], scores_N[best], rtol=1e-5)


# ---------------------------------------------------------------- search
def test_the_ranking_is_a_plain_sort_of_the_inner_products(world, test, x_ND):
    """Question vectors times passage vectors, largest first: the whole of dense retrieval in three lines."""
    encoder = load_encoder(world / "query_encoder", "question")
    questions = read_questions(world / "test.jsonl")
    q_QD = embed(encoder, tokenize_questions(encoder, [q["question"] for q in questions]), 64)
    assert_ranked_by(q_QD.astype(np.float64) @ x_ND.T, questions, test(index="stream")[0])


def test_flat_writes_the_bytes_that_stream_writes(test, tmp_path, monkeypatch):
    """Two ways of exact search, in any blocks of questions, one answer; HNSW finds nearly the same."""
    exact, _ = test(index="stream")
    streamed = (tmp_path / "out/test.run").read_bytes()
    monkeypatch.setattr(test_dpr, "BLOCK", 3)
    for index in ("stream", "Flat"):
        test(index=index)
        assert (tmp_path / "out/test.run").read_bytes() == streamed
    hnsw, _ = test(index="HNSW32")
    assert np.mean([len(dict(hnsw[qid]).keys() & dict(exact[qid]).keys()) for qid in exact]) > 19


def test_k_above_the_corpus_lists_every_passage_once(test):
    """min(k, passages) lines a question; DPR and nanoDPR repeat the last passage instead."""
    for index in ("Flat", "stream", "HNSW32"):
        ranking, _ = test(k=1000, index=index)
        assert all(len({pid for pid, _ in hits}) == len(hits) <= 60 for hits in ranking.values())
        assert index == "HNSW32" or all(len(hits) == 60 for hits in ranking.values())


def test_lookahead_searches_with_the_stored_vector_of_the_positive(world, test, x_ND, tmp_path, capsys):
    """
    The neighbours of a question's positive by a plain sort of the fp16 vectors; the positive itself is first,
    as a layer norm made all vectors of one length. No encoder is read, and no accuracy is counted.
    """
    ranking, metrics = test(lookahead="true", query_encoder=tmp_path / "nowhere", index="stream")
    questions = read_questions(world / "test.jsonl")
    rows = [int(question["positives"][0]) - 1 for question in questions]
    assert_ranked_by(x_ND[rows] @ x_ND.T, questions, ranking)
    assert all(ranking[q["qid"]][0][0] == q["positives"][0] for q in questions)
    assert metrics is None and "no accuracy is counted" in capsys.readouterr().out
    assert test(lookahead="true", index="Flat")[0] == ranking


def test_lookahead_leaves_out_questions_without_a_passage_id(world, test, tmp_path, capsys):
    """Inline positives have no vector, unlabelled questions no positive; nothing left to ask is an error."""
    questions = read_questions(world / "test.jsonl")
    questions[0]["positives"] = []
    questions[1]["positives"] = [{"title": "", "text": "inline"}, "3"]
    for name, some in (("some", questions), ("none", questions[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in some))
    ranking, _ = test(lookahead="true", questions=tmp_path / "some.jsonl")
    assert list(ranking) == [q["qid"] for q in questions[2:]]
    assert "2 of 10 questions have no passage id" in capsys.readouterr().out
    with pytest.raises(UserError, match="none.jsonl: 2 of 2"):
        test(lookahead="true", questions=tmp_path / "none.jsonl")


def test_question_tokens_overrides_the_stored_length(test, monkeypatch):
    """ANCE-Tele trains with 32 tokens and tests TriviaQA with 64: the key is what tokenize_questions sees."""
    lengths, plain = [], test_dpr.tokenize_questions

    def spy(encoder, questions):
        ids = plain(encoder, questions)
        lengths.append(max(map(len, ids)))
        return ids

    monkeypatch.setattr(test_dpr, "tokenize_questions", spy)
    rankings = [test(question_tokens=n)[0] for n in (0, 16, 5)]
    assert lengths[0] == lengths[1] > 5 == lengths[2]
    assert rankings[0] == rankings[1] != rankings[2]
    with pytest.raises(UserError, match="at most 256 tokens"):
        test(question_tokens=257)


def test_hybrid_by_hand(world, test, tmp_path, capsys):
    """bm25 + weight * dense, a list's lowest score for a passage that it lacks; equal sums by corpus row."""
    dense, bm25 = [(7, 2.0), (3, 1.0)], [(3, 10.0), (5, 4.0)]
    # 7: 4 + 2x2 = 8 · 3: 10 + 2x1 = 12 · 5: 4 + 2x1 = 6
    assert test_dpr.hybrid(dense, bm25, 2.0, 10) == [(3, 12.0), (7, 8.0), (5, 6.0)]
    assert test_dpr.hybrid([(9, 1.0), (2, 1.0)], [], 1.1, 1) == [(2, 1.1)]
    dense_ranking, _ = test()
    qids = [q["qid"] for q in read_questions(world / "test.jsonl")]
    write_run(tmp_path / "bm25.run", [(qid, [("60", 1e6), ("1", 1.0)]) for qid in qids[1:]])
    ranking, _ = test(bm25_run=tmp_path / "bm25.run")
    assert all(ranking[qid][0][0] == "60" for qid in qids[1:])
    assert [pid for pid, _ in ranking[qids[0]]] == [pid for pid, _ in dense_ranking[qids[0]]]
    assert f"lacks 1 questions, such as {qids[0]}" in capsys.readouterr().out


# ---------------------------------------------------------------- what is counted and said
def test_metrics_are_those_counted_from_the_run(world, test):
    """top-k: the colour is a word of the text; MRR@10, hit@k, nDCG@10: the rank of the one positive."""
    ranking, metrics = test()
    corpus = Corpus(world / "corpus.tsv")
    values = {"top-5": [], "MRR@10": [], "hit@20": [], "nDCG@10": []}
    for q in read_questions(world / "test.jsonl"):
        pids = [pid for pid, _ in ranking[q["qid"]]]
        words = [corpus[int(pid) - 1].text.replace(".", "").split() for pid in pids]
        rank = pids.index(q["positives"][0]) + 1 if q["positives"][0] in pids else 999
        values["top-5"].append(any(q["answers"][0] in text for text in words[:5]))
        values["MRR@10"].append(1 / rank if rank <= 10 else 0)
        values["hit@20"].append(rank <= 20)
        values["nDCG@10"].append(1 / np.log2(1 + rank) if rank <= 10 else 0)
    for name, numbers in values.items():
        m = metrics[name]
        assert m["value"] == pytest.approx(np.mean(numbers)) and m["n"] == 10
        assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1
    assert "top-20" in metrics and "top-100" not in metrics  # k is 20


def test_a_question_whose_vector_is_nan_is_reported_and_the_others_answered(test, monkeypatch, capsys):
    """It counts as a miss: n stays 10."""

    def broken(*args, **keys):
        q_QD = embed(*args, **keys)
        q_QD[3] = np.nan
        return q_QD

    expected, _ = test()
    monkeypatch.setattr(test_dpr, "embed", broken)
    for index in ("Flat", "stream"):
        ranking, metrics = test(index=index)
        assert "no result for 1 questions (NaN in their vectors): q53" in capsys.readouterr().out
        assert ranking == {qid: hits for qid, hits in expected.items() if qid != "q53"}
        assert metrics["top-5"]["n"] == 10


def test_the_leak_count(world, test, tmp_path, capsys):
    """Two of the ten test questions are put into a training file, in capitals and with a question mark."""
    questions = read_questions(world / "test.jsonl")
    lines = [{"qid": str(i), "question": q["question"].upper() + " ?"} for i, q in enumerate(questions[:2])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    test(check_leak=tmp_path / "train.jsonl")
    assert "leak: 2 of 10 test questions occur" in capsys.readouterr().out


def test_an_encoder_that_names_no_partner_is_pointed_out(world, tmp_path, capsys):
    """Only one side says with which it was trained: nobody can tell, so a warning, and the search goes on."""
    for given, warned in (({"role": "question"}, 1), ({"role": "question", "pair": "toy"}, 0)):
        (tmp_path / "e").mkdir(exist_ok=True)
        write_json(tmp_path / "e" / "encoder_inputs.json", given)
        assert len(open_embeddings(world / "embeddings", query_encoder=tmp_path / "e")[0]) == 3
        assert capsys.readouterr().err.count("names its partner") == warned


# ---------------------------------------------------------------- mistakes
CORRECT = {  # paths are in the folder `mistakes`
    "doc2embedding": {"doc_encoder": "doc_encoder", "out": "new", "shard_size": 25},
    "test_dpr": {"embeddings": "embeddings", "query_encoder": "query_encoder", "out": "new/x.run"},
    "mine_negatives": {"run": "test.run", "out": "new/x.jsonl", "negatives": 2},
    "rerank": {"ranking": "test.run", "cross_encoder": "cross_encoder", "out": "new/x.run"},
}
MISTAKES = [  # (script, keys, words of the one line on the screen)
    ("doc2embedding", {"doc_encoder": "query_encoder"}, "a question encoder; a passage encoder is needed"),
    ("doc2embedding", {"corpus": "none.tsv"}, "corpus: none.tsv: no such file"),
    ("doc2embedding", {"corpus": "empty.tsv"}, "empty.tsv: 0 passages"),
    ("doc2embedding", {"out": "test.run/e"}, "test.run is a file, not a folder"),
    ("doc2embedding", {"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
    ("doc2embedding", {"out": "embeddings", "dtype": "float32"}, "dtype was 'float16' there and is"),
    ("doc2embedding", {"out": "embeddings", "shard_size": 8}, "shard_size was 25 there and is 8 now"),
    ("doc2embedding", {"out": "embeddings", "mixed_precision": "bf16"}, "mixed_precision was 'no' there"),
    ("doc2embedding", {"out": "embeddings", "corpus": "short.tsv"}, "rows was 60 there and is 1 now; corpus"),
    ("doc2embedding", {"out": "embeddings", "doc_encoder": "other_encoder"}, "encoder was '"),
    ("doc2embedding", {"out": "stray"}, "00003.npy is not from this job"),
    ("doc2embedding", {"out": "noteless"}, "00002.npy is not from this job"),
    ("doc2embedding", {"out": "unnamed"}, "00000.npy is not from this job"),
    ("test_dpr", {"embeddings": "damaged"}, "00001.npy has another sha256"),
    ("test_dpr", {"embeddings": "truncated"}, "00001.npy is missing or not a whole .npy file"),
    ("test_dpr", {"embeddings": "unfinished"}, "not complete; repeat doc2embedding.py"),
    ("test_dpr", {"embeddings": ""}, "embeddings: give a path, it is empty"),
    ("test_dpr", {"corpus": "pink.tsv"}, "another corpus"),
    ("test_dpr", {"query_encoder": "stranger"}, "stranger (pair another) was not trained with the passage"),
    ("test_dpr", {"query_encoder": "a/b/c"}, "query_encoder: a/b/c: no such model folder"),
    ("test_dpr", {"questions": "ghost.jsonl"}, "no passage has the id '999'"),
    ("test_dpr", {"questions": "missing.jsonl"}, "questions: missing.jsonl: no such file"),
    ("test_dpr", {"questions": "empty.tsv"}, "empty.tsv: no questions in it"),
    ("test_dpr", {"questions": ""}, "questions: give a path, it is empty"),
    ("test_dpr", {"bm25_run": "ghost.run"}, "no passage has the id '999'"),
    ("test_dpr", {"bm25_run": "other.run"}, "other.run: has none of the questions of test.jsonl"),
    ("test_dpr", {"bm25_run": "none.run"}, "bm25_run: none.run: no such file"),
    ("test_dpr", {"bm25_run": "test.run", "lookahead": "true"}, "leave out bm25_run"),
    ("test_dpr", {"k": 0}, "k must be at least 1"),
    ("test_dpr", {"match": "fuzzy"}, "match must be one of string, regex"),
    ("test_dpr", {"out": "x.txt"}, "out must be the path of a .run file"),
    ("test_dpr", {"out": "folder.run"}, "out: folder.run is a folder; name a file"),
    ("test_dpr", {"bm25_run": "test.run", "out": "test.run"}, "is an input too (bm25_run)"),
    ("test_dpr", {"question_tokens": 2}, "question_tokens must be at least 4, got 2"),
    ("mine_negatives", {"out": ""}, "out: give a path, it is empty"),
    ("mine_negatives", {"run": ""}, "run: give a path, it is empty"),
    ("mine_negatives", {"out": "."}, "out: . is a folder; name a file"),
    ("mine_negatives", {"out": "test.jsonl/x.jsonl"}, "is a file, not a folder"),
    ("mine_negatives", {"out": "test.jsonl"}, "is an input too (questions)"),
    ("mine_negatives", {"negatives": 9, "depth": 5}, "negatives (9) must be at most depth (5)"),
    ("mine_negatives", {"run": "other.run"}, "other.run: has none of the questions of"),
    ("mine_negatives", {"questions": "ghost.jsonl"}, "no passage has the id '999'"),
    ("mine_negatives", {"questions": "bare.jsonl"}, "no question is left"),
    ("mine_negatives", {"mode": "pseudo_label"}, "give --scores, a .run of rerank.py"),
    ("mine_negatives", {"scores": "test.run"}, "scores is for mode denoise or pseudo_label, not topk"),
    ("mine_negatives", {"lookahead_run": "test.run", "mode": "denoise"}, "lookahead_run is for mode tele"),
    ("mine_negatives", {"mode": "denoise", "fill": "true"}, "fill tops up what the scores leave"),
    ("mine_negatives", {"mode": "teleport", "momentum": "test.run"}, "test.run:1: "),
    ("mine_negatives", {"mode": "teleport", "momentum": "bare.jsonl"}, "bare.jsonl:1: 'negatives' must be"),
    ("rerank", {"out": "x.tsv"}, "out must be the path of a .run file"),
    ("rerank", {"out": "test.run"}, "is an input too (ranking)"),
    ("rerank", {"depth": 0}, "depth must be at least 1"),
    ("rerank", {"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
    ("rerank", {"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    ("rerank", {"ranking": "absent.run"}, "ranking: absent.run: no such file"),
    ("rerank", {"ranking": "ghost.run"}, "no passage has the id '999'"),
    ("rerank", {"ranking": "rising.run"}, "rising.run:2: score 3.0 under rank 2 is not in descending order"),
    ("rerank", {"ranking": "other.run"}, "has none of the questions of"),
    ("rerank", {"questions": "ghost.jsonl"}, "no passage has the id '999'"),
    ("rerank", {"cross_encoder": "doc_encoder"}, "a cross-encoder is needed"),
]  # fmt: skip


def change_json(path, keys):
    write_json(path, read_json(path) | keys)


@pytest.fixture(scope="module")
def mistakes(world, tmp_path_factory):
    """A copy of the world with everything in it that can be wrong."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("mistakes") / "world")
    for name in ("damaged", "truncated", "unfinished", "stray", "noteless"):
        shutil.copytree(folder / "embeddings", folder / name)
    content = bytearray((folder / "damaged/00001.npy").read_bytes())
    content[-1] ^= 1
    (folder / "damaged/00001.npy").write_bytes(content)
    (folder / "truncated/00001.npy").write_bytes(content[:-9])
    change_json(folder / "unfinished/manifest.json", {"complete": False})
    shutil.copy(folder / "stray/00000.npy", folder / "stray/00003.npy")
    shutil.copy(folder / "stray/00000.json", folder / "stray/00003.json")
    (folder / "noteless/00002.json").unlink()
    for name in ("unnamed", "folder.run", "stranger"):
        (folder / name).mkdir()
    shutil.copy(folder / "embeddings/00000.npy", folder / "unnamed")
    write_json(folder / "stranger/encoder_inputs.json", {"role": "question", "pair": "another"})
    shutil.copytree(folder / "doc_encoder", folder / "other_encoder")
    change_json(folder / "other_encoder/encoder_inputs.json", {"passage_tokens": 31})
    texts = {
        "empty.tsv": "",
        "short.tsv": "1\tthe old river\tparis\n",
        "pink.tsv": (folder / "corpus.tsv").read_text().replace("red", "pink"),
        "ghost.jsonl": '{"qid": "q50", "question": "who", "answers": ["x"], "positives": ["999"]}\n',
        "bare.jsonl": '{"qid": "q50", "question": "who"}\n',
        "ghost.run": "q50\t1\t1\t2.0\nq50\t999\t2\t1.0\n",
        "rising.run": "q50\t1\t1\t2.0\nq50\t2\t2\t3.0\n",
        "other.run": "x\t1\t1\t2.0\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("short.tsv", "pink.tsv"):
        Corpus(folder / name)  # why: their index is no file that the scripts below may be blamed for
    return folder


def content_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("script", "keys", "words"), MISTAKES)
def test_a_mistake_is_one_line_before_any_work(script, keys, words, mistakes, monkeypatch, capsys):
    """Exit code 2, one line on stderr, nothing written, and no model was loaded to find it."""
    monkeypatch.chdir(mistakes)
    if "cross_encoder" not in keys:
        monkeypatch.setattr("rerank.load_cross_encoder", None)
    monkeypatch.setattr("test_dpr.load_encoder", None)
    common = {"corpus": "corpus.tsv"} | ({} if script == "doc2embedding" else {"questions": "test.jsonl"})
    before = content_of(mistakes)
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        call(monkeypatch, f"{script}.py", common | CORRECT[script] | keys)
    assert stopped.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert content_of(mistakes) == before
