"""test_dpr.py on sixty toy passages: a plain sort ranks, a hand counts the metrics, and errors come early."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import test_dpr
from tests.toy import make_world
from utils.data import Corpus, read_questions, read_run, write_run
from utils.encoder import embed, tokenize_passages, tokenize_questions
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, sha256, write_json
from utils.plumbing.weights import load_encoder
from utils.text import has_answer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world and its embeddings, written as doc2embedding.py writes them."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    corpus = Corpus(folder / "corpus.tsv")
    encoder = load_encoder(folder / "doc_encoder", "passage")
    x_ND = embed(encoder, tokenize_passages(encoder, [corpus[i][1:] for i in range(60)]), 16, "passage")
    (folder / "embeddings").mkdir()
    for i in range(3):
        np.save(folder / "embeddings" / f"{i:05d}.npy", x_ND[25 * i : 25 * i + 25].astype(np.float16))
    manifest = {
        "rows": 60,
        "dim": x_ND.shape[1],
        "dtype": "float16",
        "shard_size": 25,
        "encoder": "e",
        "pair": "toy",
        "role": "passage",
        "corpus": corpus.sha256,
        "shards": {f"{i:05d}.npy": sha256(folder / "embeddings" / f"{i:05d}.npy") for i in range(3)},
        "complete": True,
    }
    write_json(folder / "embeddings" / "manifest.json", manifest)
    return folder


@pytest.fixture
def test(world, tmp_path, monkeypatch):
    """Run test_dpr.py as its command line does; returns the ranking and the metrics of this run."""

    def run(**keys):
        keys = {
            "questions": world / "test.jsonl",
            "corpus": world / "corpus.tsv",
            "embeddings": world / "embeddings",
            "query_encoder": world / "query_encoder",
            "out": tmp_path / "out" / "test.run",
            "k": 20,
        } | keys
        monkeypatch.setattr(sys, "argv", ["test_dpr.py", *(f"--{k}={v}" for k, v in keys.items())])
        test_dpr.main()
        out = Path(keys["out"])
        return read_run(out), read_json(out.with_suffix(".metrics.json"))

    return run


def test_the_ranking_is_a_plain_sort_of_the_inner_products(world, test):
    """Question vectors times passage vectors, largest first: the whole of dense retrieval in three lines."""
    ranking, _ = test(index="stream")
    encoder, questions = (
        load_encoder(world / "query_encoder", "question"),
        read_questions(world / "test.jsonl"),
    )
    q_QD = embed(encoder, tokenize_questions(encoder, [q["question"] for q in questions]), 64, "question")
    shards = [np.load(world / "embeddings" / f"{i:05d}.npy") for i in range(3)]
    scores_QN = q_QD.astype(np.float64) @ np.concatenate(shards).astype(np.float64).T
    for question, scores_N in zip(questions, scores_QN, strict=True):
        best = np.argsort(-scores_N, kind="stable")[:20]
        assert [pid for pid, _ in ranking[question["qid"]]] == [str(row + 1) for row in best]
        np.testing.assert_allclose([s for _, s in ranking[question["qid"]]], scores_N[best], rtol=1e-5)


def test_flat_writes_the_bytes_that_stream_writes(test, tmp_path):
    """Two ways of exact search, one answer; HNSW on sixty passages finds nearly the same."""
    test(index="stream")
    streamed = (tmp_path / "out" / "test.run").read_bytes()
    test(index="Flat")
    assert (tmp_path / "out" / "test.run").read_bytes() == streamed
    exact, (hnsw, _) = read_run(tmp_path / "out" / "test.run"), test(index="HNSW32")
    shared = [len(dict(hnsw[qid]).keys() & dict(exact[qid]).keys()) for qid in exact]
    assert np.mean(shared) > 19


def test_metrics_are_those_counted_from_the_run(world, test):
    """top-k: the colour is a word of the text; MRR@10 and hit@k: the rank of the one positive."""
    ranking, metrics = test()
    corpus, top5, reciprocal, hit20, gain = Corpus(world / "corpus.tsv"), [], [], [], []
    for q in read_questions(world / "test.jsonl"):
        pids = [pid for pid, _ in ranking[q["qid"]]]
        texts = [corpus[int(pid) - 1].text.split() for pid in pids]
        top5.append(any(q["answers"][0] in text for text in texts[:5]))
        rank = pids.index(q["positives"][0]) + 1 if q["positives"][0] in pids else 999
        reciprocal.append(1 / rank if rank <= 10 else 0)
        hit20.append(rank <= 20)
        gain.append(1 / np.log2(1 + rank) if rank <= 10 else 0)
    for name, values in (("top-5", top5), ("MRR@10", reciprocal), ("hit@20", hit20), ("nDCG@10", gain)):
        m = metrics[name]
        assert m["value"] == pytest.approx(np.mean(values)) and m["n"] == 10
        assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1
    assert "top-100" not in metrics  # k is 20


def test_metrics_of_a_hand_made_ranking(world):
    """A missing question is a miss, a short list counts what it has, titles are not searched."""
    corpus = Corpus(world / "corpus.tsv")  # passages 1-5: paris, river to garden, red blue green white black
    questions = [
        {"qid": "a", "answers": ["Green"], "positives": ["3", "4"]},  # first answer at rank 2, positives at 2
        {"qid": "b", "answers": ["red"], "positives": []},  # answer at rank 1, nothing to judge by id
        {"qid": "c", "answers": ["red"], "positives": ["1"]},  # not in the ranking
        {"qid": "d", "answers": [], "positives": [{"title": "", "text": "inline"}]},  # in no metric
    ]
    results = {"a": [("1", 9.0), ("3", 8.0)], "b": [("1", 7.0)], "d": [("1", 1.0)]}
    metrics, hits = test_dpr.retrieval_metrics(questions, results, corpus, ks=[1, 10])
    assert hits == [[False, True], [True], [], [False]]
    assert {name: m["n"] for name, m in metrics.items()} == {
        "top-1": 3, "top-10": 3, "MRR@10": 2, "nDCG@10": 2, "hit@1": 2, "hit@10": 2,
    }  # fmt: skip
    ideal = 1 + 1 / np.log2(3)
    expected = {"top-1": 1 / 3, "top-10": 2 / 3, "MRR@10": 1 / 4, "nDCG@10": 1 / np.log2(3) / ideal / 2}
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected)
    by_regex, _ = test_dpr.retrieval_metrics(
        [{"qid": "a", "answers": [r"gr\w+n\b"], "positives": []}], results, corpus, [1, 10], regex=True
    )
    assert (by_regex["top-1"]["value"], by_regex["top-10"]["value"]) == (0, 1)


def test_hits_at_50_and_1000_are_ms_marcos_recall(world):
    """
    A hit rate, however many positives: the first at rank 50 counts, at 51 not before 1000. A question that is
    not in the run counts as 0. Accuracies stay DPR's 1, 5, 20, 100.
    """
    corpus = Corpus(world / "corpus.tsv")
    at_50, at_51 = [str(pid) for pid in range(1, 61)], [str(pid) for pid in [60, *range(1, 60)]]
    questions = [
        {"qid": qid, "answers": ["red"], "positives": positives}
        for qid, positives in (("a", ["50", "59"]), ("b", ["50"]), ("missing", ["1"]))
    ]
    results = {qid: [(pid, 0.0) for pid in pids] for qid, pids in (("a", at_50), ("b", at_51))}
    metrics, _ = test_dpr.retrieval_metrics(questions, results, corpus, test_dpr.KS)
    hits = {name: m["value"] for name, m in metrics.items() if name.startswith("hit")}
    expected = {"hit@1": 0, "hit@5": 0, "hit@20": 0, "hit@50": 1 / 3, "hit@100": 2 / 3, "hit@1000": 2 / 3}
    assert hits == pytest.approx(expected)
    assert [name for name in metrics if name.startswith("top")] == ["top-1", "top-5", "top-20", "top-100"]
    assert metrics["top-5"]["value"] == pytest.approx(2 / 3) and metrics["hit@1000"]["n"] == 3


def test_lookahead_searches_with_the_stored_vector_of_the_positive(world, test, tmp_path, capsys):
    """
    The neighbours of a question's positive by a plain sort of the fp16 vectors; the positive itself is first,
    as a layer norm made all vectors of one length. No encoder is read, and no accuracy is counted.
    """
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "test.metrics.json", {})  # for the fixture; look-ahead writes none
    ranking, metrics = test(lookahead="true", query_encoder=tmp_path / "nowhere", index="stream")
    shards = [np.load(world / "embeddings" / f"{i:05d}.npy") for i in range(3)]
    x_ND = np.concatenate(shards).astype(np.float64)
    for question in read_questions(world / "test.jsonl"):
        scores_N = x_ND @ x_ND[int(question["positives"][0]) - 1]
        assert ranking[question["qid"]][0][0] == question["positives"][0]
        best = np.argsort(-scores_N, kind="stable")[:20]
        assert [pid for pid, _ in ranking[question["qid"]]] == [str(row + 1) for row in best]
        np.testing.assert_allclose([s for _, s in ranking[question["qid"]]], scores_N[best], rtol=1e-6)
    assert metrics == {} and "no accuracy is counted" in capsys.readouterr().out
    flat = test(lookahead="true", index="Flat")[0]
    assert flat == ranking


def test_lookahead_leaves_out_questions_without_a_passage_id(world, test, tmp_path, capsys):
    """Inline positives have no vector, unlabelled questions no positive; nothing left to ask is an error."""
    questions = read_questions(world / "test.jsonl")
    questions[0]["positives"] = []
    questions[1]["positives"] = [{"title": "", "text": "inline"}, "3"]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "none.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions[:2]))
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "test.metrics.json", {})
    ranking, _ = test(lookahead="true", questions=tmp_path / "some.jsonl")
    assert list(ranking) == [q["qid"] for q in questions[2:]]
    assert "2 of 10 questions have no passage id" in capsys.readouterr().out
    with pytest.raises(UserError, match="none.jsonl: 2 of 2"):
        test(lookahead="true", questions=tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="leave out bm25_run"):
        test(lookahead="true", dry_run="true")


def test_question_tokens_overrides_the_stored_length(world, test, monkeypatch):
    """ANCE-Tele trains with 32 tokens and tests TriviaQA with 64: the key is what tokenize_questions sees."""
    lengths, plain = [], test_dpr.tokenize_questions

    def spy(encoder, questions):
        lengths.append(max(map(len, plain(encoder, questions))))
        return plain(encoder, questions)

    monkeypatch.setattr(test_dpr, "tokenize_questions", spy)
    rankings = [test(question_tokens=n)[0] for n in (0, 16, 5)]
    assert lengths[:2] == [lengths[0]] * 2 and lengths[0] > 5 and lengths[2] == 5
    assert rankings[0] == rankings[1] != rankings[2]
    with pytest.raises(UserError, match="at most 256 tokens"):
        test(question_tokens=257)


def test_k_above_the_corpus_lists_every_passage_once(test):
    """min(k, passages) lines a question; DPR and nanoDPR repeat the last passage instead."""
    for index in ("Flat", "stream", "HNSW32"):
        ranking, _ = test(k=1000, index=index)
        assert all(len({pid for pid, _ in found}) == len(found) <= 60 for found in ranking.values())
        assert index == "HNSW32" or all(len(found) == 60 for found in ranking.values())


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
        assert ranking == {qid: found for qid, found in expected.items() if qid != "q53"}
        assert metrics["top-5"]["n"] == 10


def test_other_formats_and_the_leak_count(world, test, tmp_path, capsys):
    """Two of the ten test questions are put into a training file, in capitals and with a question mark."""
    questions = read_questions(world / "test.jsonl")
    lines = [{"qid": str(i), "question": q["question"].upper() + " ?"} for i, q in enumerate(questions[:2])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "out").mkdir()
    write_json(tmp_path / "out" / "metrics.json", {"loss": 1.0})
    ranking, _ = test(check_leak=tmp_path / "train.jsonl", trec="true", dpr_json="true")
    assert "leak: 2 of 10 test questions occur" in capsys.readouterr().out
    pid, score = ranking["q50"][0]
    first = (tmp_path / "out" / "test.trec").read_text().split("\n")[0].split()
    assert first[:4] == ["q50", "Q0", pid, "1"] and float(first[4]) == score
    entry = read_json(tmp_path / "out" / "test.json")[0]
    assert entry["ctxs"][0]["id"] == pid
    for found in entry["ctxs"]:
        assert found["has_answer"] == has_answer(found["text"], entry["answers"])
    assert read_json(tmp_path / "out" / "metrics.json")["loss"] == 1.0, (
        "a trainer's file of that name is left alone"
    )


def test_mistakes_are_found_before_a_model_is_loaded(world, test, tmp_path, monkeypatch):
    """Every check of a file comes first: here loading the model would fail the test."""
    monkeypatch.setattr(test_dpr, "load_encoder", lambda *_: pytest.fail("the model was loaded"))
    shutil.copytree(world / "embeddings", tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / "00001.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged" / "00001.npy").write_bytes(content)
    (tmp_path / "corpus.tsv").write_text((world / "corpus.tsv").read_text().replace("red", "pink"))
    (tmp_path / "other_encoder").mkdir()
    (tmp_path / "folder.run").mkdir()
    write_json(tmp_path / "other_encoder" / "encoder_inputs.json", {"role": "question", "pair": "another"})
    (tmp_path / "bad.jsonl").write_text('{"qid": "1", "question": "q", "positives": ["999"]}\n')
    (tmp_path / "bad.run").write_text("q50\t999\t1\t3.0\n")
    for keys, why in (
        ({"embeddings": tmp_path / "damaged"}, "00001.npy has another sha256"),
        ({"corpus": tmp_path / "corpus.tsv"}, "another corpus"),
        ({"query_encoder": tmp_path / "other_encoder"}, "pair another.*pair toy"),
        ({"questions": tmp_path / "bad.jsonl"}, "999"),
        ({"bm25_run": tmp_path / "bad.run"}, "999"),
        ({"bm25_run": tmp_path / "none.run"}, "none.run: no such file"),
        ({"k": 0}, "k must be at least 1"),
        ({"match": "fuzzy"}, "string, regex"),
        ({"out": tmp_path / "x.txt"}, ".run"),
        ({"out": tmp_path / "folder.run"}, "out: .*folder.run is a folder; name a file"),
        ({"bm25_run": tmp_path / "bad.run", "out": tmp_path / "bad.run"}, "is an input too .bm25_run."),
        ({"questions": tmp_path / "bad.run", "out": tmp_path / "bad.run"}, "is an input too .questions."),
        ({"questions": ""}, "questions: give a path, it is empty"),
        ({"embeddings": ""}, "embeddings: give a path, it is empty"),
        ({"question_tokens": 2}, "question_tokens must be at least 4, got 2"),
    ):
        with pytest.raises(UserError, match=why):
            test(**keys)
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_names_no_partner_is_pointed_out(world, tmp_path, capsys):
    """Only one side says with which it was trained: nobody can tell, so a warning, and the search goes on."""
    for given, warned in (({"role": "question"}, 1), ({"role": "question", "pair": "toy"}, 0)):
        (tmp_path / "e").mkdir(exist_ok=True)
        write_json(tmp_path / "e" / "encoder_inputs.json", given)
        assert len(open_embeddings(world / "embeddings", query_encoder=tmp_path / "e")[0]) == 3
        assert capsys.readouterr().err.count("names its partner") == warned


def test_the_command_line_ends_in_one_sentence(tmp_path):
    """Exit code 2, one line on stderr with the file, no traceback."""
    command = [sys.executable, "test_dpr.py", "--questions", str(tmp_path / "missing.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "missing.jsonl" in done.stderr.strip().splitlines()[-1]


def test_dry_run_writes_nothing(world, test, tmp_path, capsys):
    """
    Memory, disk and minutes are printed, from 16 questions and one block; no ranking, no metrics, no index.
    """
    before = sorted(world.rglob("*"))
    with pytest.raises(UserError, match="no such file"):  # of the .run, which the fixture reads afterwards
        test(dry_run="true")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("dry run: search", "memory", "disk", "minutes"))
    assert not (tmp_path / "out").exists() and sorted(world.rglob("*")) == before
