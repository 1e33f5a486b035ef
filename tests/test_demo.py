"""The demo's own pieces: its questions hold what they promise, its weights are converted right, its table."""

import numpy as np
import pytest

from recipes.demo.check_questions import LEAST, faults_of
from recipes.demo.inverse_cloze import main as inverse_cloze
from recipes.demo.prepare import dequantise
from recipes.demo.table import title_scores
from utils.data import Corpus, iter_jsonl
from utils.plumbing.config import ROOT

SPLITS = {name: [row for _, row in iter_jsonl(ROOT / f"recipes/demo/{name}.jsonl")] for name in LEAST}


def test_the_committed_questions():
    """Enough of them, no repeats, no passage in two splits (no corpus is needed for these)."""
    rows = [row for split in SPLITS.values() for row in split]
    assert all(len(SPLITS[name]) >= least for name, least in LEAST.items())
    assert all(set(row) == {"title", "question", "answers"} and row["answers"] for row in rows)
    for texts in ([row["title"] for row in rows], [row["question"].lower().strip() for row in rows]):
        assert len({*texts}) == len(rows) and all(texts)


def test_the_check_against_the_corpus():
    """With the real corpus where `make demo` has fetched it: no fault at all."""
    corpus = ROOT / "data" / "demo" / "corpus.tsv"
    if not corpus.is_file():
        pytest.skip("no demo corpus here: `make demo` fetches it, the tests download nothing")
    faults, share = faults_of(SPLITS, {passage.title: passage.text for passage in Corpus(corpus)})
    assert faults == [] and share >= 1 / 3


def test_the_check_finds_every_kind_of_fault():
    passages = {"Otter": "An otter is a small animal that swims.", "Owl": "The owl flies at night."}
    rows = [
        {"title": "Otter", "question": "what swims and is not a fish", "answers": ["otter"]},
        {"title": "Owl", "question": "which owl flies", "answers": ["owl"]},
        {"title": "Owl", "question": "when does it fly", "answers": ["noon"]},
        {"title": "Eel", "question": "what is long", "answers": ["eel"]},
        {"title": "Otter", "question": "What swims and is not a fish?", "answers": ["otter"]},
    ]
    text = "\n".join(faults_of({"train": rows, "dev": [], "test": []}, passages)[0])
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
    sentences = ["The otter swims well.", "The owl of St. Ives flies.", "It is grey."]
    text = f"id\ttext\ttitle\n1\t{' '.join(sentences)}\tA\n2\tOne.\tB\n"
    (tmp_path / "corpus.tsv").write_text(text)
    inverse_cloze(tmp_path / "corpus.tsv", tmp_path / "out.jsonl")
    ((_, row),) = iter_jsonl(tmp_path / "out.jsonl")
    sentences.remove(row["question"])
    assert row["positives"] == [{"title": "A", "text": " ".join(sentences)}] and row["qid"] == "cloze-1"


SCRIPTS = ["北京很大。人很多。", "दिल्ली बड़ी है। लोग बहुत हैं।", "Москва велика. Людей много."]
SCRIPTS += ["القاهرة كبيرة. هل هي قديمة؟ نعم."]


@pytest.mark.parametrize("text", SCRIPTS)
def test_sentences_of_other_scripts(tmp_path, text):
    (tmp_path / "corpus.tsv").write_text(f"id\ttext\ttitle\n1\t{text}\t\n", encoding="utf-8")
    inverse_cloze(tmp_path / "corpus.tsv", tmp_path / "out.jsonl")
    ((_, row),) = iter_jsonl(tmp_path / "out.jsonl")
    assert row["question"] in text and 0 < len(row["positives"][0]["text"]) < len(text)


def test_the_title_as_an_answer(tmp_path):
    """Without its brackets; a question without a passage scores 0."""
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n1\tIt flies.\tOwl (bird)\n")
    ranked = [({"answers": ["owl"]}, ["1"]), ({"answers": ["eel"]}, ["1"]), ({"answers": ["owl"]}, [])]
    scores = title_scores(ranked, Corpus(tmp_path / "corpus.tsv"))
    assert scores["EM@1"]["value"] == pytest.approx(1 / 3) and scores["EM@1"]["n"] == 3


def test_dequantised_weights_are_those_of_the_graph():
    """int8 (stored - zero) * scale, a MatMul's weight named by its node and transposed to torch's order."""
    from onnx import TensorProto, helper, numpy_helper

    stored = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.int8)
    scale, zero = np.array(0.5, dtype=np.float32), np.array(1, dtype=np.int8)
    tensors = {"w_quantized": stored, "w_scale": scale, "w_zero_point": zero}
    tensors["bert.bias"] = np.array([7.0], dtype=np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "w_scale", "w_zero_point"], ["w"], name="dq"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/bert/layer/dense/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    stored_tensors = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    weights = dequantise(helper.make_graph(nodes, "g", [x], [y], stored_tensors))
    assert np.array_equal(weights["bert.layer.dense.weight"], ((stored - 1.0) * 0.5).T)
    assert np.array_equal(weights["bert.bias"], [7.0])
