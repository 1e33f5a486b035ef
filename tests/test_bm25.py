"""BM25 against its formula, on a corpus that one can read."""

import math

import pytest

from tests.processes import main
from tests.toy import write_lines
from utils import bm25
from utils.data import Corpus, read_run
from utils.plumbing.config import UserError

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
    documents, scores = [], []
    for _, text, title in ROWS:
        words = f"{title} {text}".lower().replace(".", "").split()
        documents.append([word for word in words if word not in ("is", "the", "of", "in", "a")])
    mean = sum(map(len, documents)) / len(documents)
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
    texts = [("same text", "text text", "other text")[i % 3] for i in range(300)]
    (tmp_path / "same.tsv").write_text("".join(f"{i}\t{text}\tT\n" for i, text in enumerate(texts)))
    same = bm25.build_bm25(Corpus(tmp_path / "same.tsv"), tmp_path / "same")
    twice, once = [*range(1, 300, 3)], [row for row in range(300) if row % 3 != 1]
    for k in (50, 150, 300):
        assert [row for row, _ in bm25.search_bm25(same, ["text"], k)[0]] == (twice + once)[:k]
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


@pytest.mark.parametrize("name", ["bm25.json", "data.csc.index.npy", "vocab.index.json"])
def test_a_damaged_index_is_built_again(corpus, tmp_path, capsys, name):
    """A file that was cut off, as by a full disk: one line says so, and the ranking is the same."""
    first = bm25.search_bm25(bm25.build_bm25(corpus, tmp_path / "index"), ["oslo river"], 5)
    content = (tmp_path / "index" / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:middle], flipped, b""):
        (tmp_path / "index" / name).write_bytes(damaged)
        again = bm25.build_bm25(corpus, tmp_path / "index")
        assert "index: damaged (" in capsys.readouterr().err or name == "bm25.json"
        assert bm25.search_bm25(again, ["oslo river"], 5) == first
        assert (tmp_path / "index" / name).read_bytes() == content


def test_an_index_that_cannot_be_read_now_is_kept(corpus, tmp_path, monkeypatch):
    """Too many open files say nothing about the index, which takes an hour to build."""
    bm25.build_bm25(corpus, tmp_path / "index")

    def load(*_, **__):
        raise OSError(24, "Too many open files", "data.csc.index.npy")

    monkeypatch.setattr(bm25.bm25s.BM25, "load", load)
    monkeypatch.setattr(bm25, "atomic_folder", lambda *_, **__: pytest.fail("the index was replaced"))
    with pytest.raises(OSError, match="Too many open files"):
        bm25.build_bm25(corpus, tmp_path / "index")


def test_bm25_command(corpus, tmp_path, capsys):
    questions = [{"qid": "a", "question": "capital of Norway"}, {"qid": "b", "question": "xyzzy"}]
    write_lines(tmp_path / "q.jsonl", questions)

    keys = {"corpus": corpus.path, "questions": tmp_path / "q.jsonl", "k": 3}
    main("utils.bm25", keys | {"out": tmp_path / "x.run"})
    assert [pid for pid, _ in read_run(tmp_path / "x.run")["a"]] == ["1"]
    output = capsys.readouterr().out
    assert "1 of them without a passage" in output and "top-1" not in output  # no answers, no accuracy
    (tmp_path / "q.run").symlink_to("q.jsonl")
    (tmp_path / "folder.run").mkdir()
    refused = [("q.run", "an input too .questions."), ("folder.run", "is a folder; name a file")]
    refused += [(name, "must be the path of a .run file") for name in ("q.jsonl", ".", "x.test")]
    for out, message in refused:
        with pytest.raises(UserError, match=message):
            main("utils.bm25", keys | {"out": tmp_path / out})
