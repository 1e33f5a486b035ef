"""The demo's own pieces: its questions hold what they promise, and its weights are converted right."""

import json

import numpy as np
import pytest

from recipes.demo.check_questions import LEAST, faults_of
from recipes.demo.inverse_cloze import main as inverse_cloze
from recipes.demo.prepare import dequantise
from utils.data import iter_jsonl
from utils.plumbing.config import ROOT


def splits():
    return {
        name: [row for _, row in iter_jsonl(ROOT / "recipes" / "demo" / f"{name}.jsonl")] for name in LEAST
    }


def test_the_committed_questions():
    """
    Enough of them, no repeats, no passage in two splits, answers not in the question (no corpus needed for
    these).
    """
    titles, texts = set(), set()
    for name, rows in splits().items():
        assert len(rows) >= LEAST[name]
        for row in rows:
            assert set(row) == {"title", "question", "answers"} and row["answers"] and row["question"].strip()
            assert row["title"] not in titles and row["question"].lower() not in texts
            titles.add(row["title"]), texts.add(row["question"].lower())


def test_the_check_against_the_corpus():
    """With the real corpus where `make demo` has fetched it: no fault at all."""
    corpus = ROOT / "data" / "demo" / "corpus.tsv"
    if not corpus.is_file():
        pytest.skip("no demo corpus here: `make demo` fetches it, the tests download nothing")
    from utils.data import Corpus

    faults, share = faults_of(splits(), {p.title: p.text for p in Corpus(corpus)})
    assert faults == [] and share >= 1 / 3


def test_the_check_finds_every_kind_of_fault():
    """One bad question of each kind, each named by file and line."""
    passages = {"Otter": "An otter is a small animal that swims.", "Owl": "The owl flies at night."}
    rows = [
        {"title": "Otter", "question": "what swims and is not a fish", "answers": ["otter"]},
        {"title": "Owl", "question": "which owl flies", "answers": ["owl"]},
        {"title": "Owl", "question": "when does it fly", "answers": ["noon"]},
        {"title": "Eel", "question": "what is long", "answers": ["eel"]},
        {"title": "Otter", "question": "What swims and is not a fish?", "answers": ["otter"]},
    ]
    faults, _ = faults_of({"train": rows, "dev": [], "test": []}, passages)
    text = "\n".join(faults)
    for words in (
        "train.jsonl:2: an answer stands",
        "train.jsonl:3: the first answer 'noon'",
        "train.jsonl:3: the passage of",
        "train.jsonl:4: no passage",
        "train.jsonl:5: the question of",
        "train.jsonl: 5 questions",
    ):
        assert words in text, words


def test_inverse_cloze_takes_the_sentence_out(tmp_path):
    """A sentence becomes the question and leaves its passage; a passage of one sentence is left out."""
    (tmp_path / "corpus.tsv").write_text(
        "id\ttext\ttitle\n1\tThe otter swims well. The owl of St. Ives flies. It is grey.\tA\n2\tOne.\tB\n"
    )
    inverse_cloze(tmp_path / "corpus.tsv", tmp_path / "out.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    sentences = ["The otter swims well.", "The owl of St. Ives flies.", "It is grey."]
    sentences.remove(row["question"])
    assert row["positives"] == [{"title": "A", "text": " ".join(sentences)}] and row["qid"] == "cloze-1"


def test_dequantised_weights_are_those_of_the_graph():
    """int8 (stored - zero) * scale, a MatMul's weight named by its node and transposed to torch's order."""
    from onnx import TensorProto, helper, numpy_helper

    stored = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int8)
    tensors = {
        "w_quantized": stored,
        "w_scale": np.array(0.5, dtype=np.float32),
        "w_zero_point": np.array(1, dtype=np.int8),
        "bert.bias": np.array([7.0], dtype=np.float32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"], ["w"], name="dq"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/bert/layer/dense/MatMul"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    )
    weights = dequantise(graph)
    assert np.array_equal(weights["bert.layer.dense.weight"], ((stored - 1.0) * 0.5).T)
    assert np.array_equal(weights["bert.bias"], [7.0])
