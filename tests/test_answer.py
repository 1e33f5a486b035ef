"""Answers to a ranking, from readers of both kinds: the three files by hand, and on two devices."""

import json

import pytest
import torch

import answer
from tests.processes import main, run
from tests.test_train_reader import keys, open_reader
from tests.toy import make_world
from tests.toy_t5 import t5
from utils.data import Corpus, read_questions, read_run
from utils.fid import answer as write
from utils.fid import load_fid, tokenize_contexts
from utils.plumbing.weights import save_encoder
from utils.reader import load_reader, predict, to_read


def talkative_fid(folder):
    """A FiD on a random T5 whose answer depends on what it reads; by itself it mostly repeats one word."""
    fid = load_fid(t5(folder), {"reader_tokens": 40, "answer_tokens": 4})
    torch.manual_seed(0)
    fid.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(fid.model.lm_head.weight))
    for block in fid.model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4
    return fid


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world with a ranking that lacks one question, an extractive reader and a FiD."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    keys(folder, "")
    lines = (folder / "dev.run").read_text().splitlines()
    (folder / "less.run").write_text("\n".join(line for line in lines if not line.startswith("q40\t")))
    save_encoder(open_reader(folder / "bert"), folder / "reader")
    save_encoder(talkative_fid(folder), folder / "fid")
    return folder


def files(world, out, **changes):
    """The keys of a toy run."""
    asked = {"questions": world / "dev.jsonl", "ranking": world / "less.run", "corpus": world / "corpus.tsv"}
    reader = {"reader": world / "reader", "depth": 6, "eval_top_docs": "[3, 1, 50]"}
    return asked | reader | {"out": out} | changes


def written(out):
    """What stands in the three files."""
    return [json.loads(out.with_suffix(suffix).read_text()) for suffix in answer.SUFFIXES]


def test_the_best_span_of_the_most_relevant_passage(world, tmp_path, capsys):
    """In DPR's layout for n = 1, 3 and 6, by one forward pass a passage; an unranked question is wrong."""
    out = tmp_path / "x.y.json"
    main("answer.py", files(world, out))
    rows, texts, metrics = written(out)
    printed = capsys.readouterr().out
    assert "1 of them without passages, such as q40" in printed and "EM@6" in printed
    assert list(metrics) == [f"{name}@{n}" for n in (1, 3, 6) for name in ("EM", "F1")]
    assert rows[0]["predictions"] == [] and texts["q40"] == "" and len(texts) == len(rows) == 10
    reader, corpus = load_reader(world / "reader"), Corpus(world / "corpus.tsv")
    ranking, right = read_run(world / "less.run"), {n: 0 for n in (1, 3, 6)}
    questions = read_questions(world / "dev.jsonl")
    for question, row in zip(questions[1:], rows[1:], strict=True):
        passages = [corpus.passage(pid) for pid, _ in ranking[question["qid"]][:6]]
        wanted = predict(reader, [to_read(reader, question["question"], passages)], [1, 3, 6], 1)[0]
        assert (row["question"], row["gold_answers"]) == (question["question"], question["answers"])
        for n, entry, best in zip(right, row["predictions"], wanted, strict=True):
            prediction = entry["prediction"]
            assert entry["top_k"] == n and prediction == pytest.approx(best, abs=1e-4)
            assert [*prediction] == ["text", "score", "relevance_score", "passage", "passage_idx"]
            right[n] += prediction["text"] == question["answers"][0]
        assert texts[question["qid"]] == prediction["text"]
    assert all(metrics[f"EM@{n}"]["value"] == right[n] / 10 and metrics[f"EM@{n}"]["n"] == 10 for n in right)
    assert 0 <= metrics["F1@1"]["low"] <= metrics["F1@1"]["value"] <= metrics["F1@1"]["high"] <= 1


def test_a_fid_writes_from_all_passages(world, tmp_path):
    """The role chooses the reader: what it generates from the first `depth` passages, one entry each."""
    fid, corpus = load_fid(world / "fid"), Corpus(world / "corpus.tsv")
    ranking, seen = read_run(world / "less.run"), []
    for depth in (1, 4):
        main("answer.py", files(world, tmp_path / "fid.json", reader=world / "fid", depth=depth))
        rows, texts, metrics = written(tmp_path / "fid.json")
        assert rows[0]["predictions"] == [] and texts["q40"] == ""
        assert [*metrics] == [f"EM@{depth}", f"F1@{depth}"]
        for qid, row in zip([*texts][1:], rows[1:], strict=True):
            passages = [corpus[corpus.row(pid)] for pid, _ in ranking[qid][:depth]]
            wanted = write(fid, [tokenize_contexts(fid, row["question"], passages)], 8)[0]
            assert row["predictions"] == [{"top_k": depth, "prediction": {"text": wanted}}]
            assert texts[qid] == wanted
        seen.append(texts)
    assert seen[0] != seen[1] and len({*seen[1].values()}) > 3


def test_two_devices_answer_as_one(world, tmp_path):
    """Each answers its share, one block of 25 questions; one writes the same three files, bytes and all."""
    lines = (world / "train.jsonl").read_text().splitlines()[:25]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    asked = {"questions": tmp_path / "many.jsonl", "ranking": world / "train.run"}
    main("answer.py", files(world, tmp_path / "one.json", **asked))
    done = run("answer.py", files(world, tmp_path / "two.json", **asked), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written: ") == 1
    for suffix in answer.SUFFIXES:
        one, two = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), suffix
