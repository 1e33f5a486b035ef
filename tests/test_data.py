"""The corpus index against python's csv, and every broken file that a student may bring."""

import csv
import io
import json
import os
import pickle
import random

import numpy as np
import pytest

from utils import corpus as corpus_module
from utils import data
from utils.data import Corpus, Passage, passage_of, read_questions, read_run, read_training, write_run
from utils.plumbing.config import UserError


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fails(call, *words):
    """`call` must end in a UserError whose one line holds all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


# ---------------------------------------------------------------- corpora
def test_random_access_equals_csv(tmp_path):
    """Oracle: what python's csv writes (quotes, tabs in fields), we read back row by row."""
    chance = random.Random(0)
    alphabet = ['"', '""', "a", "é", "\u2028", " ", "b c", "'", "中", "\t"]
    rows = [["id", "text", "title"]]
    for i in range(300):
        text, title = ("".join(chance.choices(alphabet, k=chance.randint(0, 9))) for _ in range(2))
        rows.append([f"p{i}", text, title])
    table = io.StringIO()
    csv.writer(table, delimiter="\t", lineterminator="\n").writerows(rows)
    corpus = Corpus(save(tmp_path / "corpus.tsv", table.getvalue()))
    expected = [Passage(pid, title, text) for pid, text, title in rows[1:]]
    assert len(corpus) == 300 and list(corpus) == expected
    for i in chance.sample(range(300), 50):
        assert corpus[i] == expected[i] == corpus.passage(f"p{i}") and corpus.row(f"p{i}") == i
    pickled = pickle.dumps(corpus)  # for a data loader's worker: the path, not the passages
    assert len(pickled) < 500 and list(pickle.loads(pickled)) == expected


@pytest.mark.parametrize("ids", ["1 2 3", "0 1 2", "1 2 9", "b a c", "7 8 9", "1 02 3"])
def test_ids_of_any_kind(tmp_path, ids):
    """Ids that count up need no table; all others are found by their hash."""
    ids = ids.split()
    corpus = Corpus(save(tmp_path / "c.tsv", "".join(f"{i}\ttext {i}\tT\n" for i in ids)))
    assert [corpus.row(i) for i in ids] == [0, 1, 2] and [p.id for p in corpus] == ids
    assert (corpus.meta["first_id"] is None) == (ids not in (["1", "2", "3"], ["0", "1", "2"]))
    for absent in ("4", "01", "-1", "", "²", "x"):
        fails(lambda pid=absent: corpus.row(pid), "c.tsv", repr(absent))
    for row in (-1, 3):  # FAISS says -1 for "nothing found"; a python list would answer with its last passage
        with pytest.raises(IndexError):
            corpus[row]


def test_the_index_on_disk(tmp_path):
    """Version 2, which the indexes of earlier corpora have: byte offsets, and the ids' sorted hashes."""
    save(tmp_path / "c.tsv", "\ufeffid\ttext\ttitle\nb\té\tT\n\na\tx\t\n")
    assert list(Corpus(tmp_path / "c.tsv")) == [Passage("b", "T", "é"), Passage("a", "", "x")]
    folder = tmp_path / "c.tsv.index"
    b2sum = {"a": "40f89e395b66422f", "b": "8472c2e34d854f75"}  # printf a | b2sum -l 64
    hashes = [int.from_bytes(bytes.fromhex(b2sum[pid]), "little") for pid in "ab"]
    assert np.load(folder / "offsets.npy").tolist() == [17, 25, 30]
    assert np.load(folder / "hashes.npy").tolist() == hashes == sorted(hashes)
    assert np.load(folder / "rows.npy").tolist() == [1, 0]


def test_headers_are_not_passages_and_what_is_tolerated(tmp_path):
    plain = Corpus(save(tmp_path / "a.tsv", "id\ttext\ttitle\n1\tx\tA\n2\ty\t\n\n"))
    bom = Corpus(save(tmp_path / "b.tsv", "\ufeffid\ttext\ttitle\r\n1\tx\tA\r\n2\ty\t\r\n"))
    bare = Corpus(save(tmp_path / "c.tsv", "\ufeff1\tx\tA\n2\ty\t"))
    assert list(plain) == list(bom) == list(bare) == [Passage("1", "A", "x"), Passage("2", "", "y")]
    named_id = Corpus(save(tmp_path / "d.tsv", "1\tx\tA\nid\ty\tB\n"))
    assert [p.id for p in named_id] == ["1", "id"]  # a header stands on line 1 or nowhere
    headers = "docid contents title, pid passage title, _id text title, DocID Body Heading, ID Text Title"
    for i, header in enumerate(headers.split(", ")):
        path = save(tmp_path / f"{i}.tsv", "\t".join(header.split()) + "\n7\tx\tA\n")
        assert list(Corpus(path)) == [Passage("7", "A", "x")], header


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ('"Relativity is his theory', '"Relativity is his theory'),
        ('said "if I have seen', 'said "if I have seen'),
        ('"Hi" or "Hello"', '"Hi" or "Hello"'),
        ('"a ""b"" c"', 'a "b" c'),
        ('"tab\there"', "tab\there"),
        ('""', ""),
        ('"', '"'),
        ('"""', '"""'),
    ],
)
def test_one_line_is_one_passage(tmp_path, column, text):
    """A quote that is never closed swallows nothing, whatever the ids and the lines after it."""
    lines = ["id\ttext\ttitle", f"Albert Einstein\t{column}\tPhysics", 'x\tas "b\tB', "Ada L.\tc\tC"]
    rows = list(Corpus(save(tmp_path / "c.tsv", "\n".join(lines) + "\n")))[::2]
    assert rows == [Passage("Albert Einstein", "Physics", text), Passage("Ada L.", "C", "c")]


def test_text_and_title_in_each_others_place(tmp_path):
    """Without a header the lengths tell; a format that was named is believed."""
    long = "a sentence of some length that is a text, " * 3
    path = save(tmp_path / "c.tsv", "".join(f"{i}\tname {i}\t{long}{i}\n" for i in range(9)))
    fails(lambda: Corpus(path), "c.tsv", "the third column is longer", "--corpus_format marco")
    assert Corpus(path, "marco")[3] == Passage("3", "name 3", f"{long}3")
    assert Corpus(path, "dpr")[3] == Passage("3", f"{long}3", "name 3")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04rest", "unzip"),
        (b"PAR1\x15\x04", "parquet"),
        (b"\xff\xfe{\x00", "iconv -f UTF-16"),
        (b"BZh9", "bunzip2"),
        (b"\xfd7zXZ\x00", "unxz"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b'{"positive_passages": [], "query": "x"}', "convert tevatron"),
        (b'{"question": "x", "positive_ctxs": []}', "convert dpr_json"),
        (b'{"id": "1", "question": "x", "ctxs": []}', "convert from_dpr_result"),
        (b'{"version": "1.1", "data": []}', "SQuAD"),
        (b"{\n", "over many lines"),
        (b'{"_id": "1", "text": "x"}', "convert beir"),
        (b'{"question": "x", "answer": ["y"]}', "convert nq_open"),
        (b"[\n", "convert dpr_json"),
        (b"who wrote it\t['x']\n", "dpr_qa"),
        (b"question,answer\n", "is a table"),
    ],
)
def test_other_peoples_files_are_named_with_their_cure(tmp_path, content, words):
    fails(lambda: read_questions(save(tmp_path / "q.jsonl", content)), "q.jsonl", words)
    if not content.startswith((b"{", b"[", b"who", b"question")):
        fails(lambda: Corpus(tmp_path / "q.jsonl", "dpr"), "q.jsonl", words)


def test_numbers_and_nulls_are_what_they_stand_for(tmp_path):
    row = {"qid": 0, "question": "x", "answers": [1990, "y"], "positives": [0, {"title": None, "text": "t"}]}
    path = save(tmp_path / "q.jsonl", json.dumps(row | {"negatives": None}) + "\n\n \n")
    (question,) = read_questions(path)
    assert question["qid"] == "0" and question["answers"] == ["1990", "y"] and question["negatives"] == []
    lines = '{"_id": 0, "title": null, "text": "a"}\n{"_id": 1, "text": null}\n\n'
    corpus = Corpus(save(tmp_path / "c.jsonl", lines))
    assert list(corpus) == [Passage("0", "", "a"), Passage("1", "", "")] and corpus.empty_texts == 1
    assert [passage_of(entry, corpus) for entry in question["positives"]] == [corpus[0], Passage("", "", "t")]


@pytest.mark.parametrize("quoted", [False, True])
def test_text_is_kept_exactly(tmp_path, quoted):
    """A passage that ends in a quote keeps it (DPR's strip('"') does not); 200,000 characters are allowed."""
    rows = ['1\t"he said ""no"""\t"""A"""\n', f"2\t{'long ' * 40000}\tB\n", "3\t  \tC\n", '4\t5" pipe\t\n']
    rows[1] = f'2\t"{"long " * 40000}"\tB\n' if quoted else rows[1]
    corpus = Corpus(save(tmp_path / "c.tsv", "".join(rows)))
    assert corpus[0] == Passage("1", '"A"', 'he said "no"')
    assert len(corpus[1].text) == 200000 and corpus[3].text == '5" pipe'
    assert corpus.empty_texts == 1


def test_marco_and_beir(tmp_path):
    """MS MARCO's order (raw, quotes are text, with or without titles) and BEIR's jsonl."""
    marco = Corpus(save(tmp_path / "m.tsv", '0\tT\t"x\n1\tU\ty"\n'), "marco")
    assert list(marco) == [Passage("0", "T", '"x'), Passage("1", "U", 'y"')]
    two = Corpus(save(tmp_path / "n.tsv", "0\tx\n1\ty\n"), "marco")
    assert list(two) == [Passage("0", "", "x"), Passage("1", "", "y")]
    lines = '{"_id": "d1", "title": "T", "text": "x\\ny"}\n{"_id": "d0", "text": "\\ud83d\\ude00"}\n'
    beir = Corpus(save(tmp_path / "c.jsonl", lines))
    assert list(beir) == [Passage("d1", "T", "x\ny"), Passage("d0", "", "\U0001f600")]
    assert beir.row("d0") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1\ta\tT\n2\tb\n", [":2:", "expected 3 columns (id, text, title), got 2; MS MARCO's"]),
        ("1\ta\tT\n2\tb\tT\tx\n", [":2:", "got 4"]),
        ('1\ta\tT\n2\t"b\nc"\tT\n', [":2:", "a quote that is opened on a line must be closed on it"]),
        ("1\ta\tT\n2\tb\rc\tT\n", [":2:", "carriage return"]),
        ("1\ta\tT\n2\tb\0\tT\n", [":2:", "no utf-8 text"]),
        (b"1\ta\tT\n2\tb\xff\tT\n", [":2:", "no utf-8 text; convert it (iconv)"]),
        ("1\ta\tT\n2\tb\tT\n1\tc\tT\n", ["'1'", "passages 1 and 3"]),
        ("\ta\tT\n", [":1:", "id"]),
        ("id\ttitle\ttext\n1\tT\ta\n", [":1:", "id, title, text"]),
        ("text\ttitle\tid\na\tT\t1\n", [":1:", "the columns are text, title, id; write them as id, text"]),
        ("id\ttext\ttitle\n", ["0 passages"]),
        ("", ["0 passages"]),
        ('{"_id": 1.5, "text": "x"}\n', [":1:", "_id"]),
        ('{"_id": "1", "body": "x"}\n', [":1:", "_id"]),
        ("1,a,T\n2,b,T\n", [":1:", "a csv with commas?"]),
        ("[\n", [":1:", "is one json list"]),
        ("<!DOCTYPE html>\n", ["html page"]),
        ('{"_id": "1", "text": "\\ud83d x"}\n', [":1:", "surrogates not allowed"]),
    ],
)
def test_broken_corpora(tmp_path, content, words):
    path = save(tmp_path / "psgs.tsv", content)
    fails(lambda: Corpus(path, "beir" if "_id" in str(content) else "dpr"), "psgs.tsv", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["psgs.tsv"]


def test_index_is_built_once_and_again_when_stale(tmp_path, monkeypatch):
    """The index serves while size, time and format of the corpus stay; broken or stale, it is made anew."""
    path = save(tmp_path / "c.tsv", "1\ta\tT\n2\tb\tT\n")
    builds, build = [], corpus_module.write_index
    monkeypatch.setattr(corpus_module, "write_index", lambda *a: builds.append(1) or build(*a))
    assert Corpus(path)[1].text == "b" and Corpus(path)[1].text == "b" and len(builds) == 1
    save(path, "1\taa\tT\n2\tbb\tT\n")
    assert Corpus(path)[1].text == "bb" and len(builds) == 2
    offsets = tmp_path / "c.tsv.index" / "offsets.npy"
    offsets.write_bytes(offsets.read_bytes()[:-8])
    assert Corpus(path)[1].text == "bb" and len(builds) == 3
    np.save(offsets, np.load(offsets)[1:])
    assert Corpus(path)[1].text == "bb" and len(builds) == 4
    (tmp_path / "c.tsv.index" / "meta.json").write_text("[]")
    assert Corpus(path)[1].text == "bb" and len(builds) == 5
    assert Corpus(path, "marco")[1].text == "T" and len(builds) == 6
    assert Corpus(path, "marco")[1].text == "T" and len(builds) == 6  # the stale one was replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tsv", "c.tsv.index"]


def test_index_that_cannot_be_made(tmp_path, monkeypatch):
    """A read-only folder, and a file that grows while it is read: a sentence with the fix."""
    path = save(tmp_path / "c.tsv", "1\ta\tT\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda folder, _: folder != tmp_path)
        fails(lambda: Corpus(path), "c.tsv", "cannot be written; link the corpus (ln -s) into a writable")
    digest = corpus_module.hashlib.sha256

    def append():
        with open(path, "a") as file:
            file.write("2\tb\tT\n")
        return digest()

    monkeypatch.setattr(corpus_module.hashlib, "sha256", append)
    fails(lambda: Corpus(path), "c.tsv: changed while it was being read; run the command again")
    monkeypatch.undo()
    assert len(Corpus(path)) == 2


# ---------------------------------------------------------------- question files
def test_questions_are_read(tmp_path, capsys):
    """Absent lists become empty, blank answers (also zero-width ones) are left out, own keys stay."""
    path = save(
        tmp_path / "q.jsonl",
        '\ufeff{"qid": "1", "question": "who?", "answers": ["", " \\t", "\\u200b", "Ann"], "note": 5}\r\n\n'
        '{"qid": "2", "question": "a\u2028b", "positives": ["7", {"title": "T", "text": "x"}]}\n',
    )
    first, second = read_questions(path)
    assert first == dict(qid="1", question="who?", answers=["Ann"], note=5, positives=[], negatives=[])
    assert second["question"] == "a\u2028b" and second["answers"] == [] and len(second["positives"]) == 2
    assert [line for line, _ in data.iter_jsonl(path)] == [1, 3]
    assert capsys.readouterr().err == f"warning: {path}: 3 blank answers left out\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"qid": "1", "question": "x", "answers": "Ann"}', [":1:", "answers", "list of strings", "Ann"]),
        ('{"qid": "1", "question": "x", "answers": [19.5]}', [":1:", "answers"]),
        ('{"qid": "1"}', [":1:", "question"]),
        ('{"qid": "1", "question": " "}', [":1:", "question"]),
        ('{"qid": 1.5, "question": "x"}', [":1:", "qid", "string"]),
        ('{"qid": "1\\t", "question": "x"}', [":1:", "a qid cannot hold tabs"]),
        ('{"qid": "1", "question": "x"}\n\n{"qid": "1", "question": "y"}', [":3:", "'1'", "line 1"]),
        ('{"qid": "1", "question": "x"}\n{"qid": "2", "ques', [":2:", "json"]),
        ('{"qid": "1", "question": "x", "score": NaN}', [":1:", "NaN"]),
        ("5", [":1:", "object"]),
        ('{"qid": "1", "question": "x\\ud83d\\ude00 \\uD800"}', [":1:", "surrogates not allowed"]),
        ('{"qid": "1", "question": "x", "positives": [7.5]}', [":1:", "positives", "corpus ids"]),
        ('{"qid": "1", "question": "x", "negatives": [{"title": "T"}]}', [":1:", "negatives"]),
        ('{"qid": "1", "question": "x", "positive": ["7"]}', [":1:", "'positive'", "the key is 'positives'"]),
        ('{"qid": "1", "question": "x", "answer": "Ann"}', [":1:", "'answer'", "the key is 'answers'"]),
        ("", ["no questions"]),
    ],
)
def test_broken_questions(tmp_path, content, words):
    path = save(tmp_path / "q.jsonl", content + "\n")
    fails(lambda: read_questions(path), "q.jsonl", *words)


def test_what_is_no_file(tmp_path):
    for read in (read_questions, read_run, Corpus):
        fails(lambda read=read: read(tmp_path), "is a folder; name a file")
        fails(lambda read=read: read(tmp_path / "no.tsv"), "no.tsv: no such file")


def test_needed_lists(tmp_path):
    """`need` refuses a line without the list, and a file where all are empty; some may be empty."""
    first = '{"qid": "1", "question": "x", "positives": []}\n'
    some = save(tmp_path / "a.jsonl", first + '{"qid": "2", "question": "y", "positives": ["7"]}\n')
    none = save(tmp_path / "b.jsonl", first)
    assert len(read_questions(some, need=("positives",))) == 2
    fails(lambda: read_questions(some, need=("answers",)), "a.jsonl:1:", "answers")
    fails(lambda: read_questions(none, need=("positives",)), "b.jsonl", "no question has any positives")


def test_passages_of_questions(tmp_path):
    """An entry of positives is a corpus id, which must exist, or the passage itself."""
    corpus = Corpus(save(tmp_path / "c.tsv", "1\ta\tT\n"))
    assert passage_of("1", corpus) == Passage("1", "T", "a")
    assert passage_of({"text": "x"}, None) == Passage("", "", "x")
    fails(lambda: passage_of("9", corpus), "'9'")
    fails(lambda: passage_of("1", None), "'1'", "corpus")

    bare = '{"qid": "1", "question": "x"}\n'
    full = '{"qid": "1", "question": "x", "positives": ["1"], "negatives": ["1"]}\n'
    path = save(tmp_path / "q.jsonl", bare + full)
    (example,), note = read_training(path, corpus)
    assert example["positives"] == ["1"]
    assert note.endswith("1 questions, 1 without a positive left out, 0 have no negative of their own")
    fails(lambda: read_training(path, None), "q.jsonl: question 1 names passage '1', but corpus is empty")
    save(path, full.replace('["1"]}', '["9"]}'))
    fails(lambda: read_training(path, corpus), "c.tsv: no passage has the id '9'")
    fails(lambda: read_training(save(path, bare), corpus), "none of its 1 questions has a positive")


# ---------------------------------------------------------------- rankings
def test_run_round_trip_is_exact(tmp_path):
    scores = np.sort(np.random.default_rng(0).normal(50, 30, 100).astype(np.float32))[::-1]
    hits = [(f"p{i}", score) for i, score in enumerate(scores)]
    write_run(tmp_path / "a.run", [("q1", hits), ("q2", [("p1", 1e-9)])])
    back = read_run(tmp_path / "a.run")
    assert list(back) == ["q1", "q2"] and back["q2"] == [("p1", 1e-9)]
    assert [score for _, score in back["q1"]] == scores.tolist()  # all bits of them
    fails(lambda: write_run(tmp_path / "b.run", [("q1", [("p1", float("nan"))])]), "'q1'", "nan")
    assert not (tmp_path / "b.run").exists()
    # of other people: CRLF line ends, scientific notation, equal scores
    path = save(tmp_path / "a.run", "q\ta\t1\t1.5e2\r\nq\tb\t2\t1e-3\r\nq\tc\t3\t1e-3\r\n")
    assert read_run(path) == {"q": [("a", 150.0), ("b", 0.001), ("c", 0.001)]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("q\tp\t1\t2.0\nq\tp\t2\t1.0\n", [":2:", "'p'", "twice"]),
        ("q\ta\t2\t2.0\nq\tb\t1\t3.0\n", [":1:", "rank 1"]),
        ("q\ta\t1\t2.0\nq\tb\t2\t3.0\n", [":2:", "3.0", "order"]),
        ("q\ta\t1\t2.0\nr\ta\t1\t2.0\nq\tb\t1\t3.0\n", [":3:", "'q'"]),
        ("q Q0 a 1 2.0 tag\n", [":1:", "expected"]),
        ("q\ta\tone\t2.0\n", [":1:", "expected"]),
        ("q\ta\t1\tnan\n", [":1:", "nan"]),
        ("", ["no ranking"]),
    ],
)
def test_broken_runs(tmp_path, content, words):
    """Duplicates, wrong order, wrong columns: an error with its line; nothing is sorted or dropped."""
    fails(lambda: read_run(save(tmp_path / "a.run", content)), "a.run", *words)


def test_aligned_reader(tmp_path):
    """A ranking next to its questions: one that it skips is None; one that nobody asked for is not lost."""
    path = save(tmp_path / "a.run", "q1\ta\t1\t2.0\nq3\tb\t1\t2.0\n")
    take, check = data.aligned_reader("a.run", data.iter_run(path), "q.jsonl")
    assert [take(qid) for qid in ("q1", "q2")] == [[("a", 2.0)], None]
    fails(check, "a.run: question 'q3' is not in q.jsonl, or not in its order")
    assert take("q3") == [("b", 2.0)] and take("q4") is None
    check()
