"""BM25 against its formula, and DPR's choice of negatives on a corpus that one can read."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

import mine_negatives
from utils import bm25
from utils.config import UserError, friendly_errors
from utils.data import Corpus, read_questions, read_run, write_run

ROWS = [
    ("1", "Oslo is the capital of Norway.", "Oslo"),
    ("2", "The river of Oslo is the Akerselva river.", "River"),
    ("3", "Lima lies in Peru.", "Lima"),
    ("4", "Nothing here.", "Oslo"),
    ("5", "Nothing here.", "Oslo"),
    ("6", "The", "A"),
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.tsv"
    path.write_text("id\ttext\ttitle\n" + "".join("\t".join(row) + "\n" for row in ROWS))
    return Corpus(path)


def formula(question, k1=0.9, b=0.4):
    """Robertson's BM25 with Lucene's idf, word by word, over title + text without stop words."""
    stop = {"is", "the", "of", "in", "a"}
    documents = [
        [w for w in f"{title} {text}".lower().replace(".", "").split() if w not in stop and len(w) > 1]
        for _, text, title in ROWS
    ]
    mean, scores = sum(map(len, documents)) / len(documents), []
    for words in documents:
        score = 0.0
        for word in question.lower().split():
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = words.count(word)
            score += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("question", ["oslo", "river oslo", "norway peru nothing", "oslo oslo capital"])
def test_bm25_is_the_formula(corpus, tmp_path, question):
    """Oracle: the published formula with k1 = 0.9, b = 0.4 gives the scores and the order; no zeros."""
    index = bm25.build_bm25(corpus, tmp_path / "index")
    expected = formula(question)
    (hits,) = bm25.search_bm25(index, [question], 10)
    order = sorted((r for r in range(6) if expected[r] > 0), key=lambda r: -expected[r])
    assert [row for row, _ in hits] == order
    assert [score for _, score in hits] == pytest.approx([expected[r] for r in order], rel=1e-5)


def test_ties_and_short_lists(corpus, tmp_path):
    """Equal passages keep the corpus order at every k; a question without known words finds nothing."""
    index = bm25.build_bm25(corpus, tmp_path / "index")
    rows = [[row for row, _ in bm25.search_bm25(index, ["nothing"], k)[0]] for k in (1, 2, 3)]
    assert rows == [[3], [3, 4], [3, 4]]
    (tmp_path / "same.tsv").write_text("".join(f"{i}\tsame text\tT\n" for i in range(1, 301)))
    same = bm25.build_bm25(Corpus(tmp_path / "same.tsv"), tmp_path / "same")
    assert [row for row, _ in bm25.search_bm25(same, ["text"], 100)[0]] == list(range(100))
    assert bm25.search_bm25(index, ["xyzzy", "", "the of", "?"], 5) == [[], [], [], []]


def test_index_is_kept_for_this_corpus_only(corpus, tmp_path, monkeypatch):
    """The saved index serves the same corpus and no other; a folder that is no index is never deleted."""
    first = bm25.search_bm25(bm25.build_bm25(corpus, tmp_path / "index"), ["oslo river"], 5)
    counted, tokens = [], bm25.tokens
    monkeypatch.setattr(bm25, "tokens", lambda texts: counted.append(1) or tokens(texts))
    again = bm25.build_bm25(corpus, tmp_path / "index")
    assert counted == [] and bm25.search_bm25(again, ["oslo river"], 5) == first
    (tmp_path / "other.tsv").write_text("1\toslo river\tT\n")
    other = bm25.build_bm25(Corpus(tmp_path / "other.tsv"), tmp_path / "index")
    assert [row for row, _ in bm25.search_bm25(other, ["oslo"], 5)[0]] == [0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a BM25 index"):
        bm25.build_bm25(corpus, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_bm25_command(corpus, tmp_path, monkeypatch, capsys):
    """The command writes a .run of passage ids, one question after the other."""
    questions = [{"qid": "a", "question": "capital of Norway"}, {"qid": "b", "question": "xyzzy"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    argv = [
        "--corpus",
        corpus.path,
        "--questions",
        tmp_path / "q.jsonl",
        "--out",
        tmp_path / "x.run",
        "--k",
        3,
    ]
    monkeypatch.setattr(sys, "argv", ["bm25", *map(str, argv)])
    bm25.main()
    assert [pid for pid, _ in read_run(tmp_path / "x.run")["a"]] == ["1"]
    assert "1 of them without a passage" in capsys.readouterr().out


def config(tmp_path, **keys):
    values = dict(negatives=2, depth=5, match="string", find_positives=False, keep_without_positives=False)
    return SimpleNamespace(run=str(tmp_path / "x.run"), **(values | keys))


ALL = [("1", 6.0), ("2", 5.0), ("3", 4.0), ("4", 3.0), ("5", 2.0), ("6", 1.0)]


@pytest.mark.parametrize(
    ("question", "keys", "positives", "negatives"),
    [
        ({"answers": ["norway"], "positives": ["1"]}, {}, ["1"], ["2", "3"]),
        ({"answers": ["Akerselva"], "positives": ["1"]}, {}, ["1"], ["3", "4"]),
        ({"answers": ["Oslo"], "positives": ["1"]}, {"negatives": 5}, ["1"], ["3", "4", "5"]),
        ({"answers": [], "positives": ["1", "3"]}, {}, ["1", "3"], ["2", "4"]),
        ({"answers": ["x"], "positives": [{"title": "?", "text": ROWS[1][1]}]}, {}, 0, ["1", "3"]),
        ({"answers": ["Peru"], "positives": []}, {"find_positives": True}, ["3"], ["1", "2"]),
        ({"answers": ["Peru"], "positives": ["4"]}, {"find_positives": True}, ["4"], ["1", "2"]),
        (
            {"answers": ["P.ru"], "positives": []},
            {"find_positives": True, "match": "regex"},
            ["3"],
            ["1", "2"],
        ),
        ({"answers": ["Peru"], "positives": []}, {}, [], ["1", "2"]),
        ({"answers": ["xyzzy"], "positives": []}, {"find_positives": True}, [], ["1", "2"]),
    ],
)
def test_topk(corpus, tmp_path, question, keys, positives, negatives):
    """By hand: no passage with an answer and no positive (by id or text) is a negative; ranks decide."""
    cfg = config(tmp_path, **keys)
    found = mine_negatives.topk(question, ALL[: cfg.depth], corpus, cfg)
    assert found == (positives or question["positives"], negatives)


def test_nothing_is_dropped_silently(corpus, tmp_path):
    """What does not reach the output, question or ranking, is counted; depth limits what is looked at."""
    questions = [
        {
            "qid": "gold",
            "question": "?",
            "answers": ["Peru"],
            "positives": ["3"],
            "negatives": ["old"],
            "own": 7,
        },
        {"qid": "none", "question": "?", "answers": ["Peru"], "positives": [], "negatives": []},
        {"qid": "unranked", "question": "?", "answers": ["Peru"], "positives": ["3"], "negatives": []},
    ]
    write_run(tmp_path / "x.run", [("none", ALL), ("gold", ALL), ("stranger", ALL)])

    def mined(**keys):
        counts = mine_negatives.Counter()
        cfg = config(tmp_path, **keys)
        examples = list(mine_negatives.mine(mine_negatives.topk, questions, corpus, cfg, counts))
        return {e["qid"]: e for e in examples}, +counts

    examples, counts = mined(depth=1)
    assert (
        list(examples) == ["gold", "unranked"]
        and examples["gold"]["negatives"] == ["1"]
        and examples["gold"]["own"] == 7
    )
    assert counts == {
        "questions dropped, no positive": 1,
        "questions without a ranking": 1,
        "questions without a negative": 1,
        "rankings of other questions, ignored": 1,
        "questions with fewer than asked": 1,
        "negatives": 1,
    }
    examples, counts = mined(find_positives=True)
    assert examples["none"]["positives"] == ["3"] and counts["positives found"] == 1
    assert list(mined(keep_without_positives=True)[0]) == ["none", "gold", "unranked"]


def test_mining_command(corpus, tmp_path, monkeypatch, capsys):
    """The rehearsal: BM25's ranking in, a training file out that the trainer's reader accepts."""
    question = {"qid": "q", "question": "capital of norway oslo", "answers": ["Norway"], "positives": ["1"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    index = bm25.build_bm25(corpus, tmp_path / "index")
    hits = bm25.search_bm25(index, [question["question"]], 5)[0]
    write_run(tmp_path / "x.run", [("q", [(corpus[row].id, score) for row, score in hits])])
    argv = ["mine_negatives.py", "--questions", tmp_path / "q.jsonl", "--run", tmp_path / "x.run"]
    argv += ["--corpus", corpus.path, "--out", tmp_path / "train.jsonl", "--negatives", "2"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    mine_negatives.main()
    (mined,) = read_questions(tmp_path / "train.jsonl", need=("positives", "negatives"))
    assert mined["negatives"] == ["4", "5"] and mined["positives"] == ["1"]
    assert "2 negatives, 1 questions written" in capsys.readouterr().out


def test_mistakes_are_one_line(corpus, tmp_path, monkeypatch, capsys):
    """An id that the corpus does not have: one line with the id, exit code 2, no output file."""
    (tmp_path / "q.jsonl").write_text(
        '{"qid": "q", "question": "x", "answers": ["y"], "positives": ["77"]}\n'
    )
    write_run(tmp_path / "x.run", [("q", ALL)])
    argv = ["mine_negatives.py", "--questions", tmp_path / "q.jsonl", "--run", tmp_path / "x.run"]
    argv += ["--corpus", corpus.path, "--out", tmp_path / "train.jsonl"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        mine_negatives.main()
    assert stopped.value.code == 2 and not (tmp_path / "train.jsonl").exists()
    assert "corpus.tsv: no passage has the id '77'" in capsys.readouterr().err.splitlines()[-1]
