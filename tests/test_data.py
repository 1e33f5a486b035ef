"""The corpus index against python's csv, and every broken file that a student may bring."""

import csv
import io
import json
import multiprocessing
import pickle
import random
import struct

import numpy as np
import pytest

from utils import corpus as corpus_module
from utils.data import (
    Corpus,
    Passage,
    iter_jsonl,
    passage_of,
    read_questions,
    read_run,
    write_dpr_json,
    write_run,
    write_trec,
)
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


def test_random_access_equals_csv(tmp_path):
    """Oracle: what python's csv writes (quotes, tabs, line breaks inside fields), we read back row by row."""
    chance = random.Random(0)
    alphabet = ['"', '""', "a", "é", "\u2028", " ", "b c", "'", "\n", "中", "\t"]
    rows = [["id", "text", "title"]]
    for i in range(300):
        text, title = ("".join(chance.choices(alphabet, k=chance.randint(0, 9))) for _ in range(2))
        rows.append([f"p{i}", text.replace("\n", "\n ").replace("\t", "\t "), title.replace("\t", "")])
    table = io.StringIO()
    csv.writer(table, delimiter="\t", lineterminator="\n").writerows(rows)
    path = save(tmp_path / "corpus.tsv", table.getvalue())
    with open(path, encoding="utf-8", newline="") as file:
        expected = [Passage(r[0], r[2], r[1]) for r in list(csv.reader(file, delimiter="\t"))[1:]]
    corpus = Corpus(path)
    assert len(corpus) == 300 and list(corpus) == expected
    for i in chance.sample(range(300), 50):
        assert corpus[i] == expected[i] and corpus.row(f"p{i}") == i


@pytest.mark.parametrize("ids", ["1 2 3", "0 1 2", "1 2 9", "b a c", "7 8 9", "1 02 3"])
def test_ids_of_any_kind(tmp_path, ids):
    """Ids that count up need no table; all others are found by their hash, and read back to be sure."""
    ids = ids.split()
    corpus = Corpus(save(tmp_path / "c.tsv", "".join(f"{i}\ttext {i}\tT\n" for i in ids)))
    assert [corpus.row(i) for i in ids] == [0, 1, 2] and [p.id for p in corpus] == ids
    assert (corpus.meta["first_id"] is None) == (ids not in (["1", "2", "3"], ["0", "1", "2"]))
    for absent in ("4", "01", "-1", "", "²", "x"):
        fails(lambda pid=absent: corpus.row(pid), "c.tsv", repr(absent))


def test_ids_whose_hashes_collide(tmp_path, monkeypatch):
    """The hash only says where to look: with the same hash for all, every id still has its own row."""
    monkeypatch.setattr(corpus_module, "id_hash", lambda pid: 7)
    corpus = Corpus(save(tmp_path / "c.tsv", "b\ttext\tT\na\ttext\tT\nc\ttext\tT\n"))
    assert [corpus.row(i) for i in "bac"] == [0, 1, 2]
    fails(lambda: corpus.row("d"), "'d'")


def test_minus_one_is_never_the_last_passage(tmp_path):
    """FAISS says -1 for "nothing found"; a python list would answer with its last passage."""
    corpus = Corpus(save(tmp_path / "c.tsv", "1\ta\tT\n2\tb\tT"))
    assert corpus[1].text == "b"
    for row in (-1, 2):
        with pytest.raises(IndexError):
            corpus[row]


def test_tolerated_files(tmp_path):
    """A byte-order mark, CRLF, no header, no last line end, blank lines, empty titles: all are fine."""
    plain = Corpus(save(tmp_path / "a.tsv", "id\ttext\ttitle\n1\tx\tA\n2\ty\t\n\n"))
    bom = Corpus(save(tmp_path / "b.tsv", "\ufeffid\ttext\ttitle\r\n1\tx\tA\r\n2\ty\t\r\n"))
    bare = Corpus(save(tmp_path / "c.tsv", "\ufeff1\tx\tA\n2\ty\t"))
    assert list(plain) == list(bom) == list(bare) == [Passage("1", "A", "x"), Passage("2", "", "y")]
    named_id = Corpus(save(tmp_path / "d.tsv", "1\tx\tA\nid\ty\tB\n"))
    assert [p.id for p in named_id] == ["1", "id"]  # a header stands on line 1 or nowhere
    for i, header in enumerate(("pid\ttext\ttitle", "ID\tText\tTitle", "id\tpassage\theading")):
        other = Corpus(save(tmp_path / f"e{i}.tsv", f"{header}\n1\tx\tA\n"))
        assert list(other) == [Passage("1", "A", "x")], header


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
    beir = Corpus(
        save(
            tmp_path / "c.jsonl", '{"_id": "d1", "title": "T", "text": "x\\ny"}\n{"_id": "d0", "text": ""}\n'
        )
    )
    assert list(beir) == [Passage("d1", "T", "x\ny"), Passage("d0", "", "")] and beir.row("d0") == 1
    fails(lambda: Corpus(save(tmp_path / "d.jsonl", '{"_id": 1, "text": "x"}\n')), "d.jsonl:1:", "_id")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1\ta\tT\n2\tb\n", [":2:", "expected 3 columns (id, text, title), got 2"]),
        ("1\ta\tT\n2\tb\tT\tx\n", [":2:", "got 4"]),
        ('1\ta\tT\n2\t"b\tT\n3\tc\tT\n4\t"d"\tT\n', [":2:", "quote"]),
        ('1\ta\tT\n2\t"b\tT\nno row\n', [":2:", "quote"]),
        ('1\ta\tT\n2\t"b\tT', [":2:", "quote"]),
        ("1\ta\tT\n2\tb\rc\tT\n", [":2:", "carriage return"]),
        ("1\ta\tT\n2\tb\0\tT\n", [":2:", "byte 9 "]),
        (b"1\ta\tT\n2\tb\xff\tT\n", [":2:", "byte 9 ", "utf-8"]),
        ("1\ta\tT\n2\tb\tT\n1\tc\tT\n", ["'1'", "passages 1 and 3"]),
        ("x\ta\tT\ny\tb\tT\nx\tc\tT\n", ["'x'", "passages 1 and 3"]),
        ("\ta\tT\n", [":1:", "id"]),
        ("id\ttitle\ttext\n1\tT\ta\n", [":1:", "id, title, text"]),
        ("text\ttitle\tid\na\tT\t1\n", [":1:", "the columns are text, title, id; write them as id, text"]),
        ("PID\tTitle\tText\n1\tT\ta\n", [":1:", "pid, title, text"]),
        ("id\ttext\ttitle\n", ["0 passages"]),
        ("", ["0 passages"]),
        (b"\x1f\x8b\x08\x00rest", ["gunzip"]),
    ],
)
def test_broken_corpora(tmp_path, content, words):
    """Every broken corpus is one sentence with file and line, and leaves no index behind."""
    path = save(tmp_path / "psgs.tsv", content)
    fails(lambda: Corpus(path), "psgs.tsv", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["psgs.tsv"]


def test_index_is_built_once_and_again_when_stale(tmp_path, monkeypatch):
    """The index serves while size, time and format of the corpus stay; broken or stale, it is made anew."""
    path = save(tmp_path / "c.tsv", "1\ta\tT\n2\tb\tT\n")
    builds, build = [], corpus_module.build_index
    monkeypatch.setattr(corpus_module, "build_index", lambda *a: builds.append(1) or build(*a))
    assert Corpus(path)[1].text == "b" and Corpus(path)[1].text == "b" and len(builds) == 1
    save(path, "1\taa\tT\n2\tbb\tT\n")
    changed = Corpus(path)
    assert changed[1].text == "bb" and len(builds) == 2 and changed.sha256 != ""
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


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A read-only data folder gets advice, not a traceback."""
    path = save(tmp_path / "c.tsv", "1\ta\tT\n")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_module.tempfile, "TemporaryDirectory", refuse)
    fails(lambda: Corpus(path), "c.tsv", "link the corpus", "writable")


def open_and_report(path, queue):
    corpus = Corpus(path)
    queue.put([corpus[row].text for row in (0, 999)] + [corpus.row("p500")])


def test_four_processes_race_for_the_index(tmp_path):
    """Four processes that find no index all build one; one wins, all succeed, nothing else is left."""
    path = save(tmp_path / "c.tsv", "".join(f"p{i}\ttext {i}\tT\n" for i in range(1000)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=open_and_report, args=(path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [["text 0", "text 999", 500]] * 4
    for process in processes:
        process.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tsv", "c.tsv.index"]


def test_corpus_travels_to_another_process(tmp_path):
    """A pickled corpus is its path: a data loader's worker opens the same index."""
    corpus = Corpus(save(tmp_path / "c.tsv", "1\ta\tT\n2\tb\tT\n"))
    data = pickle.dumps(corpus)
    assert len(data) < 500 and pickle.loads(data)[1] == corpus[1]


def test_questions_are_read(tmp_path):
    """Absent lists become empty, blank answers (also zero-width ones) are removed, own keys stay."""
    path = save(
        tmp_path / "q.jsonl",
        '\ufeff{"qid": "1", "question": "who?", "answers": ["", " \\t", "\\u200b", "Ann"], "note": 5}\r\n\n'
        '{"qid": "2", "question": "a\u2028b", "positives": ["7", {"title": "T", "text": "x"}]}\n',
    )
    first, second = read_questions(path)
    assert first == dict(qid="1", question="who?", answers=["Ann"], note=5, positives=[], negatives=[])
    assert second["question"] == "a\u2028b" and second["answers"] == [] and len(second["positives"]) == 2
    assert [line for line, _ in iter_jsonl(path)] == [1, 3]


def test_blank_answers_are_counted(tmp_path, capsys):
    """One line on stderr says how many answers were left out: they would match every passage."""
    read_questions(save(tmp_path / "q.jsonl", '{"qid": "1", "question": "x", "answers": ["", "\\u200b"]}\n'))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 blank answers" in error and "q.jsonl" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"qid": "1", "question": "x", "answers": "Ann"}', [":1:", "answers", "list of strings", "Ann"]),
        ('{"qid": "1", "question": "x", "answers": [1990]}', [":1:", "answers"]),
        ('{"qid": "1"}', [":1:", "question"]),
        ('{"qid": "1", "question": " "}', [":1:", "question"]),
        ('{"qid": 1, "question": "x"}', [":1:", "qid", "string"]),
        ('{"qid": "1", "question": "x"}\n\n{"qid": "1", "question": "y"}', [":3:", "'1'", "line 1"]),
        ('{"qid": "1", "question": "x"}\n{"qid": "2", "ques', [":2:", "json"]),
        ('{"qid": "1", "question": "x", "score": NaN}', [":1:", "NaN"]),
        ('[{"qid": "1", "question": "x"}]', ["convert dpr_json"]),
        ("5", [":1:", "object"]),
        ('{"qid": "1", "question": "x\\ud83d\\ude00 \\uD800"}', [":1:", "surrogates not allowed"]),
        ('{"qid": "1", "question": "x", "positives": [7]}', [":1:", "positives"]),
        ('{"qid": "1", "question": "x", "negatives": [{"title": "T"}]}', [":1:", "negatives"]),
        ("", ["no questions"]),
    ],
)
def test_broken_questions(tmp_path, content, words):
    """Every broken question file is one sentence with file and line."""
    path = save(tmp_path / "q.jsonl", content + "\n")
    fails(lambda: read_questions(path), "q.jsonl", *words)


def test_what_is_no_file(tmp_path):
    """A folder and a missing file are told apart; a surrogate pair is a letter, half of one is not."""
    fails(lambda: read_questions(tmp_path), "is a folder; name a file")
    fails(lambda: Corpus(tmp_path), "is a folder; name a file")
    fails(lambda: Corpus(tmp_path / "no.tsv"), "no.tsv: no such file")
    whole, half = ('{"_id": "1", "text": "\\ud83d\\ude00"}\n', '{"_id": "1", "text": "\\ud83d x"}\n')
    assert Corpus(save(tmp_path / "a.jsonl", whole))[0].text == "\U0001f600"
    fails(lambda: Corpus(save(tmp_path / "b.jsonl", half)), "b.jsonl:1:", "surrogates not allowed")


def test_needed_lists(tmp_path):
    """`need` refuses a line without the list, and a file where all are empty; some may be empty."""
    some = (
        '{"qid": "1", "question": "x", "positives": []}\n{"qid": "2", "question": "y", "positives": ["7"]}\n'
    )
    assert len(read_questions(save(tmp_path / "a.jsonl", some), need=("positives",))) == 2
    fails(lambda: read_questions(tmp_path / "a.jsonl", need=("answers",)), "a.jsonl:1:", "answers")
    fails(
        lambda: read_questions(save(tmp_path / "b.jsonl", some.split("\n")[0]), need=("positives",)),
        "b.jsonl",
        "no question has any positives",
    )


def test_passage_of(tmp_path):
    """An entry of positives is a corpus id or the passage itself."""
    corpus = Corpus(save(tmp_path / "c.tsv", "1\ta\tT\n"))
    assert passage_of("1", corpus) == Passage("1", "T", "a")
    assert passage_of({"text": "x"}, None) == Passage("", "", "x")
    fails(lambda: passage_of("9", corpus), "'9'")
    fails(lambda: passage_of("1", None), "'1'", "corpus")


def test_run_round_trip_is_exact(tmp_path):
    """Scores keep all their bits: float32 -> text -> the same float32."""
    scores = np.sort(np.random.default_rng(0).normal(50, 30, 100).astype(np.float32))[::-1]
    write_run(
        tmp_path / "a.run", [("q1", [(f"p{i}", s) for i, s in enumerate(scores)]), ("q2", [("p1", 1e-9)])]
    )
    back = read_run(tmp_path / "a.run")
    assert list(back) == ["q1", "q2"] and back["q2"] == [("p1", 1e-9)]
    assert [struct.pack("f", s) for _, s in back["q1"]] == [struct.pack("f", s) for s in scores]
    fails(lambda: write_run(tmp_path / "b.run", [("q1", [("p1", float("nan"))])]), "'q1'", "nan")
    assert not (tmp_path / "b.run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("q\tp\t1\t2.0\nq\tp\t2\t1.0\n", [":2:", "'p'", "twice"]),
        ("q\ta\t2\t2.0\nq\tb\t1\t3.0\n", [":1:", "rank 1"]),
        ("q\ta\t1\t2.0\nq\tb\t2\t3.0\n", [":2:", "3.0", "order"]),
        ("q\ta\t1\t2.0\nr\ta\t1\t2.0\nq\tb\t1\t3.0\n", [":3:", "'q'"]),
        ("q Q0 a 1 2.0 tag\n", [":1:", "expected"]),
        ("q\ta\t1\n", [":1:", "expected"]),
        ("q\ta\tone\t2.0\n", [":1:", "expected"]),
        ("q\ta\t1\tnan\n", [":1:", "nan"]),
        ("", ["no ranking"]),
    ],
)
def test_broken_runs(tmp_path, content, words):
    """Duplicates, wrong order, wrong columns: an error with its line; nothing is sorted or dropped."""
    fails(lambda: read_run(save(tmp_path / "a.run", content)), "a.run", *words)


def test_run_with_crlf_and_exponents(tmp_path):
    """Other people's runs: CRLF line ends, scientific notation, equal scores."""
    path = save(tmp_path / "a.run", "q\ta\t1\t1.5e2\r\nq\tb\t2\t1e-3\r\nq\tc\t3\t1e-3\r\n")
    assert read_run(path) == {"q": [("a", 150.0), ("b", 0.001), ("c", 0.001)]}


def test_trec_and_dpr_json(tmp_path):
    """TREC's six columns; DPR's result json with scores as strings, best first."""
    corpus = Corpus(save(tmp_path / "c.tsv", '1\t"say ""x"""\tT\n2\tb\tU\n'))
    results = [("q1", [("2", 2.5), ("1", 1.0)]), ("q2", [])]
    write_trec(tmp_path / "a.trec", results)
    assert (tmp_path / "a.trec").read_text() == "q1 Q0 2 1 2.5 run\nq1 Q0 1 2 1.0 run\n"
    questions = [{"question": "who?", "answers": ["x"]}, {"question": "é?", "answers": []}]
    write_dpr_json(tmp_path / "a.json", questions, results, corpus, [[False, True], []])
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert first["ctxs"][1] == {
        "id": "1",
        "title": "T",
        "text": 'say "x"',
        "score": "1.0",
        "has_answer": True,
    }
    assert first["answers"] == ["x"] and first["ctxs"][0]["has_answer"] is False
    assert second == {"question": "é?", "answers": [], "ctxs": []}
    fails(lambda: write_trec(tmp_path / "b.trec", [("a b", [("1", 1.0)])]), "a b")
