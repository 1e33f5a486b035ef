"""recipes/compare.py: rankings and answers side by side."""

import json

import numpy as np
import pytest

from recipes.compare import main, per_question
from utils.data import Corpus, read_questions
from utils.plumbing.config import UserError

QUESTIONS = [
    {"qid": "a", "question": "which colour is the sky", "answers": ["blue"], "positives": ["1"]},
    {"qid": "b", "question": "who wrote it", "answers": ["Ann Lee", "Lee"], "positives": ["2"]},
    {"qid": "c", "question": "who sang it", "answers": ["Bo"], "positives": ["3"]},
]


@pytest.fixture
def world(tmp_path):
    texts = ["id\ttext\ttitle", "1\tIt is blue.\tSky", "2\tBy Ann Lee.\tBook", "3\tSung by Bo.\tSong"]
    (tmp_path / "corpus.tsv").write_text("\n".join(texts) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    runs = {"x": {"a": "12", "b": "12", "c": "12"}, "y": {"a": "12", "b": "21", "c": "32"}}
    for name, ranks in runs.items():
        rows = [f"{qid}\t{pid}\t{i}\t{9 - i}" for qid, pids in ranks.items() for i, pid in enumerate(pids, 1)]
        (tmp_path / f"{name}.run").write_text("\n".join(rows) + "\n")
    (tmp_path / "x.answers.json").write_text(json.dumps({"a": "red", "b": "Mrs Ann Lee"}))
    (tmp_path / "y.answers.json").write_text(json.dumps({"a": "Blue.", "b": "lee", "c": "Bo"}))
    return tmp_path


def test_values_by_hand(world, capsys):
    """Two passages deep: top-1 and MRR@10 alone; the gain is of pairs."""
    questions, corpus = read_questions(world / "q.jsonl"), Corpus(world / "corpus.tsv")
    x = per_question(world / "x.run", questions, corpus)
    assert {name: value.tolist() for name, value in x.items()} == {"top-1": [1, 0, 0], "MRR@10": [1, 0.5, 0]}
    main(world / "corpus.tsv", world / "q.jsonl", world / "x.run", world / "y.run")
    lines = capsys.readouterr().out.splitlines()
    assert "top-1 33.3" in lines[2] and "top-1 100.0" in lines[4]
    assert "top-1 +66.7 (0.0 to 100.0)" in lines[5] and "MRR@10 +50.0" in lines[5]


def test_answers_by_hand(world, capsys):
    """An answer that is not there scores 0; F1 is that of the best known answer."""
    x = per_question(world / "x.answers.json", QUESTIONS, None)
    assert x["EM"].tolist() == [0, 0, 0] and np.allclose(x["F1"], [0, 0.8, 0])
    files = [str(world / f"{name}.answers.json") for name in "xy"]
    main(world / "corpus.tsv", world / "q.jsonl", *files)
    assert "EM +100.0 (100.0 to 100.0)" in capsys.readouterr().out
    (world / "z.answers.json").write_text(json.dumps({"q": "Bo"}))
    with pytest.raises(UserError, match="other questions"):
        per_question(str(world / "z.answers.json"), QUESTIONS, None)
