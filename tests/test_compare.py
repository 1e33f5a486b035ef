"""recipes/compare.py: rankings and answers next to each other."""

import json
import re

import numpy as np
import pytest

from recipes.compare import main, per_question
from tests.toy import write_lines, write_ranking
from utils.data import Corpus, read_questions
from utils.plumbing.config import UserError

QUESTIONS = [
    {"qid": "a", "question": "which colour is the sky", "answers": ["blue"], "positives": ["1"]},
    {"qid": "b", "question": "who wrote it", "answers": ["Ann Lee", "Lee"], "positives": ["2"]},
    {"qid": "c", "question": "who sang it", "answers": ["Bo"], "positives": ["3"]},
]
RUNS = {"x": {"a": "12", "b": "12", "c": "12"}, "y": {"a": "12", "b": "21", "c": "32"}}
ANSWERS = {"x": {"a": "red", "b": "Mrs Ann Lee"}, "y": {"a": "Blue.", "b": "lee", "c": "Bo"}}
ANSWERS["z"] = {"q": "Bo"}


@pytest.fixture
def world(tmp_path):
    texts = ["id\ttext\ttitle", "1\tIt is blue.\tSky", "2\tBy Ann Lee.\tBook", "3\tSung by Bo.\tSong"]
    (tmp_path / "corpus.tsv").write_text("\n".join(texts) + "\n")
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    for name, ranks in RUNS.items():
        write_ranking(tmp_path / f"{name}.run", ranks)
    for name, answers in ANSWERS.items():
        (tmp_path / f"{name}.answers.json").write_text(json.dumps(answers))
    return tmp_path


def test_rankings_by_hand(world, capsys):
    """Two passages deep: top-1 and MRR@10 alone; the gain is of pairs."""
    x = per_question(world / "x.run", read_questions(world / "q.jsonl"), Corpus(world / "corpus.tsv"))
    values = {name: value.tolist() for name, value in x.items()}
    assert values == {"top-1": [1, 0, 0], "MRR@10": [1, 0.5, 0], "hit@1": [1, 0, 0]}
    main(world / "corpus.tsv", world / "q.jsonl", world / "x.run", world / "y.run")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:2] == ["top-1", "33.3"] and len(lines[2]) == 5
    assert lines[6][:2] == ["top-1", "100.0"] and lines[6][5:] == "+66.7 (0.0 to 100.0)".split()
    assert lines[7][0] == "MRR@10" and lines[7][5] == "+50.0"


def test_rankings_of_other_questions(world, capsys):
    """None of the questions is an error, some of them a warning: they would count as lost."""
    write_ranking(world / "other.run", {"x": "12"})
    with pytest.raises(UserError, match="is a ranking of other questions"):
        main(world / "corpus.tsv", world / "q.jsonl", world / "x.run", world / "other.run")
    write_ranking(world / "some.run", {"a": "12"})
    main(world / "corpus.tsv", world / "q.jsonl", world / "some.run")
    assert "some.run: ranks 1 of 3 questions" in capsys.readouterr().err


def test_answers_that_are_patterns(world, capsys):
    """CuratedTREC: as plain strings they are in no passage, so they are refused; with the flag they count."""
    rows = [question | {"answers": [r"A\w+\s?Lee|blue|B[a-z]+"]} for question in QUESTIONS]
    write_lines(world / "q.jsonl", rows)
    with pytest.raises(UserError, match=r"3 of 3 questions have answers like .*add --match regex"):
        main(world / "corpus.tsv", world / "q.jsonl", world / "y.run")
    main(world / "corpus.tsv", world / "q.jsonl", world / "y.run", regex=True)
    assert re.search(r"top-1 +100.0", capsys.readouterr().out)


def test_answers_by_hand(world, capsys):
    """A missing answer scores 0; F1 takes the best known answer; answers to other questions are refused."""
    x = per_question(world / "x.answers.json", QUESTIONS, None)
    assert x["EM"].tolist() == [0, 0, 0] and np.allclose(x["F1"], [0, 0.8, 0])
    main(world / "corpus.tsv", world / "q.jsonl", *(str(world / f"{name}.answers.json") for name in "xy"))
    assert re.search(r"EM +100.0 \(.*\) +\+100.0 \(100.0 to 100.0\)", capsys.readouterr().out)
    with pytest.raises(UserError, match="other questions"):
        per_question(str(world / "z.answers.json"), QUESTIONS, None)
