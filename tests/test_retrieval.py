"""test_dpr.py on sixty toy passages: a plain sort ranks, a hand counts."""

import numpy as np
import pytest

import test_dpr
from tests.processes import main
from tests.toy import make_world, write_lines
from utils.data import Corpus, read_questions, read_run, write_run
from utils.encoder import embed, tokenize_questions
from utils.metrics import retrieval_metrics
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json, write_json
from utils.plumbing.weights import load_encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, its embeddings in three shards."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    keys = {"corpus": folder / "corpus.tsv", "doc_encoder": folder / "doc_encoder", "shard_size": 25}
    main("doc2embedding.py", keys | {"out": folder / "embeddings"})
    return folder


@pytest.fixture
def test(world, tmp_path):
    """Run test_dpr.py as its command line does; returns the ranking and the metrics that it wrote."""

    def run(**keys):
        files = {"questions": "test.jsonl", "corpus": "corpus.tsv", "embeddings": "embeddings"}
        files = {key: world / name for key, name in (files | {"query_encoder": "query_encoder"}).items()}
        main("test_dpr.py", files | {"out": tmp_path / "out/test.run", "k": 20} | keys)
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


def test_question_vectors_are_kept_and_read(world, test, tmp_path, capsys):
    """Written once, read the next time without an encoding; foreign ones need the right size alone."""
    path = tmp_path / "vectors/test.npy"
    usual, _ = test(index="stream")
    assert test(index="stream", question_vectors=path)[0] == usual
    capsys.readouterr()
    assert test(index="stream", question_vectors=path)[0] == usual
    assert "first question" not in capsys.readouterr().out

    # rows are in the order of the questions
    vectors = np.load(path)
    np.save(path, vectors[::-1])
    backwards, _ = test(index="stream", question_vectors=path)
    assert [*backwards.values()] == [*usual.values()][::-1]

    # of other questions, of another size, not an array
    for content, message in ((vectors[:3], "10 questions by 32"), (np.array(["a"]), "holds <U1")):
        np.save(path, content)
        with pytest.raises(UserError, match=message):
            test(question_vectors=path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"not a whole .npy file .* delete it"):
        test(question_vectors=path)
    with pytest.raises(UserError, match="made from other questions or by another encoder"):
        test(question_vectors=path, questions=world / "dev.jsonl")
    path.with_suffix(".json").unlink()
    np.save(path, vectors)
    assert test(index="stream", question_vectors=path)[0] == usual
    assert "taken as they are" in capsys.readouterr().out

    # a file of somebody else under the name of the note
    write_json(tmp_path / "other.json", {"q50": "an answer"})
    with pytest.raises(UserError, match="other.json: would be replaced by a note on other.npy"):
        test(question_vectors=tmp_path / "other.npy")
    assert read_json(tmp_path / "other.json") == {"q50": "an answer"}


def test_a_question_that_is_a_passage_is_left_out(world, test, tmp_path):
    """ArguAna: the best passage is the question itself. The key leaves it out, and k others are listed."""
    passages = list(Corpus(world / "corpus.tsv"))[:5]
    rows = [{"qid": p.id, "question": p.text, "positives": [str(int(p.id) + 30)]} for p in passages]
    keys = {"questions": write_lines(tmp_path / "own.jsonl", rows), "k": 59}
    with_itself, before = test(**keys)
    without, after = test(**keys, ignore_identical_ids="true")
    for qid, hits in without.items():
        others = [hit for hit in with_itself[qid] if hit[0] != qid]
        assert len(hits) == 59 and hits[: len(others)] == others
    assert after["MRR@10"]["value"] >= before["MRR@10"]["value"]


def test_lookahead_searches_with_the_stored_vector_of_the_positive(world, test, x_ND, tmp_path, capsys):
    """The positive itself is first, as a layer norm made all vectors of one length. No encoder is read."""
    ranking, metrics = test(lookahead="true", query_encoder=tmp_path / "nowhere", index="stream")
    questions = read_questions(world / "test.jsonl")
    rows = [int(question["positives"][0]) - 1 for question in questions]
    assert_ranked_by(x_ND[rows] @ x_ND.T, questions, ranking)
    assert all(ranking[q["qid"]][0][0] == q["positives"][0] for q in questions)
    assert metrics is None and "no accuracy is counted" in capsys.readouterr().out
    assert test(lookahead="true", index="Flat")[0] == ranking


def test_lookahead_leaves_out_questions_without_a_passage_id(world, test, tmp_path, capsys):
    """Inline positives have no vector, unlabelled questions no positive."""
    questions = read_questions(world / "test.jsonl")
    questions[0]["positives"] = []
    questions[1]["positives"] = [{"title": "", "text": "inline"}, "3"]
    ranking, _ = test(lookahead="true", questions=write_lines(tmp_path / "some.jsonl", questions))
    assert list(ranking) == [q["qid"] for q in questions[2:]]
    assert "2 of 10 questions have no passage id" in capsys.readouterr().out


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
    with pytest.raises(UserError, match="257 tokens a text, but only 256"):
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
def test_the_metrics_are_those_of_the_run(world, test):
    ranking, metrics = test()
    questions = read_questions(world / "test.jsonl")
    ranked = [(q, [pid for pid, _ in ranking[q["qid"]]]) for q in questions]
    assert metrics == retrieval_metrics(ranked, Corpus(world / "corpus.tsv"), [1, 5, 10, 20])
    assert all(m["n"] == 10 and m["low"] <= m["value"] <= m["high"] for m in metrics.values())


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
    questions = read_questions(world / "test.jsonl")[:2]
    lines = [{"qid": q["qid"], "question": q["question"].upper() + " ?"} for q in questions]
    test(check_leak=write_lines(tmp_path / "train.jsonl", lines))
    assert "leak: 2 of 10 test questions occur" in capsys.readouterr().out


def test_an_encoder_that_names_no_partner_is_pointed_out(world, tmp_path, capsys):
    """Only one side says with which it was trained: nobody can tell, so a warning, and the search goes on."""
    for given, warned in (({"role": "question"}, 1), ({"role": "question", "pair": "toy"}, 0)):
        write_json(tmp_path / "e" / "encoder_inputs.json", given)
        assert len(open_embeddings(world / "embeddings", query_encoder=tmp_path / "e")[0]) == 3
        assert capsys.readouterr().err.count("names its partner") == warned
