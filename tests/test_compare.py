"""recipes/compare.py: rankings and answers next to each other."""

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
RUNS = {"x": {"a": "12", "b": "12", "c": "12"}, "y": {"a": "12", "b": "21", "c": "32"}}
ANSWERS = {
    "x": {"a": "red", "b": "Mrs Ann Lee"},
    "y": {"a": "Blue.", "b": "lee", "c": "Bo"},
    "z": {"q": "Bo"},
}


@pytest.fixture
def world(tmp_path):
    texts = ["id\ttext\ttitle", "1\tIt is blue.\tSky", "2\tBy Ann Lee.\tBook", "3\tSung by Bo.\tSong"]
    (tmp_path / "corpus.tsv").write_text("\n".join(texts) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, ranks in RUNS.items():
        rows = [
            f"{qid}\t{pid}\t{i}\t{9 - i}\n" for qid, pids in ranks.items() for i, pid in enumerate(pids, 1)
        ]
        (tmp_path / f"{name}.run").write_text("".join(rows))
    for name, answers in ANSWERS.items():
        (tmp_path / f"{name}.answers.json").write_text(json.dumps(answers))
    return tmp_path


def test_rankings_by_hand(world, capsys):
    """Two passages deep: top-1 and MRR@10 alone; the gain is of pairs."""
    x = per_question(world / "x.run", read_questions(world / "q.jsonl"), Corpus(world / "corpus.tsv"))
    assert {name: value.tolist() for name, value in x.items()} == {"top-1": [1, 0, 0], "MRR@10": [1, 0.5, 0]}
    main(world / "corpus.tsv", world / "q.jsonl", world / "x.run", world / "y.run")
    lines = capsys.readouterr().out.splitlines()
    assert "top-1 33.3" in lines[2] and "top-1 100.0" in lines[4]
    assert "top-1 +66.7 (0.0 to 100.0)" in lines[5] and "MRR@10 +50.0" in lines[5]


def test_answers_by_hand(world, capsys):
    """A missing answer scores 0; F1 takes the best known answer; answers to other questions are refused."""
    x = per_question(world / "x.answers.json", QUESTIONS, None)
    assert x["EM"].tolist() == [0, 0, 0] and np.allclose(x["F1"], [0, 0.8, 0])
    main(world / "corpus.tsv", world / "q.jsonl", *(str(world / f"{name}.answers.json") for name in "xy"))
    assert "EM +100.0 (100.0 to 100.0)" in capsys.readouterr().out
    with pytest.raises(UserError, match="other questions"):
        per_question(str(world / "z.answers.json"), QUESTIONS, None)
