"""Other people's files become ours and back: hand-made cases of every format, and what must be refused."""

import json
import tracemalloc

import pytest

from prepare import convert
from utils.data import Corpus, read_questions, read_run
from utils.plumbing.config import UserError


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def run(*argv):
    convert.main([str(word) for word in argv])
    return read_questions(argv[-1])


def ctx(text, **more):
    return {"title": "T", "text": text, **more}


DPR = [
    {
        "question": "who?",
        "answers": ["Ann"],
        "positive_ctxs": [ctx("gold", passage_id="1"), ctx("also", passage_id="2")],
        "negative_ctxs": [ctx("random", passage_id="3")],
        "hard_negative_ctxs": [ctx("hard", psg_id="4"), ctx("gold", psg_id="1")],
    },
    {"question": "none?", "answers": [], "positive_ctxs": [], "negative_ctxs": [], "hard_negative_ctxs": []},
    {
        "question": "fallback?",
        "answers": ["Bob"],
        "positive_ctxs": [{"title": None, "text": "p", "passage_id": "5"}],
        "negative_ctxs": [ctx("random", passage_id="3")],
        "hard_negative_ctxs": [],
    },
    {"question": "no lists?", "answers": ["Cid"], "positive_ctxs": [ctx("p", passage_id="6")]},
]


def test_dpr_json(tmp_path, capsys):
    """DPR's rules: no positive: dropped; hard negatives or else the others."""
    source = save(tmp_path / "in.json", json.dumps(DPR, indent=4))
    questions = run("dpr_json", source, tmp_path / "train.jsonl")
    assert [question["qid"] for question in questions] == ["train-0", "train-1", "train-2"]
    assert questions[0]["answers"] == ["Ann"]
    assert [question["positives"] for question in questions] == [
        [ctx("gold"), ctx("also")],
        [{"title": "", "text": "p"}],
        [ctx("p")],
    ]
    # the gold passage is not its own negative
    assert [question["negatives"] for question in questions] == [[ctx("hard")], [ctx("random")], []]
    printed = capsys.readouterr().out
    for words in ("3 questions", "1 dropped, no positive", "1 negatives that are", "1 without negatives"):
        assert words in printed


def test_dpr_json_ids(tmp_path):
    """--ids writes references into the corpus, under either name in DPR's files, and drops nothing."""
    source = save(tmp_path / "in.json", json.dumps(DPR))
    lines = run("--ids", "dpr_json", source, tmp_path / "out.jsonl")
    first, *_ = lines
    assert (first["positives"], first["negatives"]) == (["1", "2"], ["4"])
    assert ["3"] in [line["negatives"] for line in lines]
    # a question without a positive is kept: ANCE-Tele takes the first passage with the answer
    assert len(lines) == len(DPR) and [] in [line["positives"] for line in lines]
    source = save(tmp_path / "in.json", json.dumps([{**DPR[0], "positive_ctxs": [ctx("no id")]}]))
    with pytest.raises(UserError, match="example 0 .*--ids"):
        run("--ids", "dpr_json", source, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(DPR, indent=1)[:-40], "in.json: .*premature EOF; get the file again"),
        (json.dumps(DPR).replace('"T",', '"T"', 1), "in.json: parse error: .*I expect ',' or '}'"),
        (json.dumps(DPR).replace('"Ann"', "NaN"), "in.json: .*invalid char in json text.*NaN"),
        (json.dumps(DPR).encode().replace(b"Ann", b"\xff"), "in.json: .*invalid bytes in UTF8"),
        (json.dumps(DPR[0]) + "\n" + json.dumps(DPR[1]), "jsonl already"),
        (json.dumps([5]), "example 0 is not DPR's: .*int"),
        (json.dumps([{"question": "x"}]), "example 0.*positive_ctxs"),
        (json.dumps([{**DPR[0], "answers": "Ann"}]), "example 0.*list of strings.*Ann"),
        (json.dumps([{**DPR[0], "positive_ctxs": [{"title": "T"}]}]), "example 0.*text"),
        (json.dumps([{**DPR[0], "question": ""}]), "question 0 is empty"),
        (json.dumps([DPR[1]]), "no question left.*no positive"),
        ("", "in.json"),
        (b"\x1f\x8b\x08rest", "gunzip"),
    ],
)
def test_broken_dpr_json(tmp_path, content, words):
    """Truncated, NaN, jsonl, missing keys: one sentence with the place, and no output file."""
    source = save(tmp_path / "in.json", content)
    with pytest.raises(UserError, match=words) as error:
        run("dpr_json", source, tmp_path / "out.jsonl")
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_dpr_json_is_streamed(tmp_path):
    """A file of 40 MB passes through a few MB of memory, so NQ's 7 GB do too."""
    entry = json.dumps({**DPR[0], "negative_ctxs": [ctx("x" * 1000)] * 40})
    save(tmp_path / "in.json", "[" + ",\n".join([entry] * 1000) + "]")
    tracemalloc.start()
    convert.main(["dpr_json", str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6, peak


def test_dpr_qa(tmp_path):
    """Answers are a python list (regex backslashes kept as they are) or json; quotes in csv are undone."""
    rows = "who?\t[\"Ann\", 'Bob']\n" + 'how many\t"[""3"", ""three""]"\n'
    rows += "when\t['19\\d\\d']\r\n" + 'j\t["a\\/b"]'
    found = run("dpr_qa", save(tmp_path / "nq-test.qa.csv", rows), tmp_path / "test.jsonl")
    assert [q["answers"] for q in found] == [["Ann", "Bob"], ["3", "three"], ["19\\d\\d"], ["a\\/b"]]
    assert [q["qid"] for q in found] == ["test-0", "test-1", "test-2", "test-3"]


@pytest.mark.parametrize(
    "cell", ["__import__('os').mkdir('hacked')", "[os.getcwd()]", "'Ann'", "[1]", "(", "nan"]
)
def test_code_in_a_qa_cell_is_refused(tmp_path, monkeypatch, cell):
    """DPR and nanoDPR run this cell with eval; here it is an error with file and line."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "in.csv", f"who?\t['Ann']\nwhat?\t{cell}\n")
    with pytest.raises(UserError, match="in.csv:2:"):
        run("dpr_qa", "in.csv", "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_msmarco(tmp_path, capsys):
    """Queries with judgements in TREC's four columns or RocketQA's two; or without, and then unlabelled."""
    queries = save(tmp_path / "queries.tsv", '10\twhat is "x\n11\tunjudged\n12\tirrelevant\n')
    qrels = save(tmp_path / "qrels.tsv", "10\t0\t7\t1\n10\t0\t9\t1\n10\t0\t7\t1\n12\t0\t5\t0\n99\t0\t1\t1\n")
    found = run("msmarco", queries, qrels, tmp_path / "out.jsonl")
    assert len(found) == 1 and found[0]["question"] == 'what is "x' and found[0]["qid"] == "10"
    assert found[0]["positives"] == ["7", "9"]
    printed = capsys.readouterr().out
    assert "2 dropped, not judged" in printed and "1 judged but not among the questions" in printed
    two = save(tmp_path / "two.tsv", "10\t7\n11\t3\n")
    assert [q["positives"] for q in run("msmarco", queries, two, tmp_path / "out.jsonl")] == [["7"], ["3"]]
    unlabelled = run("msmarco", queries, tmp_path / "out.jsonl")
    assert [q["qid"] for q in unlabelled] == ["10", "11", "12"] and unlabelled[0]["positives"] == []
    save(tmp_path / "queries.tsv", "10\tx\n10\ty\n")
    with pytest.raises(UserError, match="'10' is there twice"):
        run("msmarco", queries, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="qrels.tsv:1:"):
        run("msmarco", queries, save(tmp_path / "qrels.tsv", "10 a b c d\n"), tmp_path / "out.jsonl")


def test_beir_and_nq_open(tmp_path):
    """BEIR's queries.jsonl and its qrels with a header; Google's jsonl, which calls the list `answer`."""
    queries = save(tmp_path / "queries.jsonl", '{"_id": "a", "text": "who?", "metadata": {}}\n')
    qrels = save(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore\na\tMED-1\t2\na\tMED-2\t0\n")
    assert run("beir", queries, qrels, tmp_path / "out.jsonl")[0]["positives"] == ["MED-1"]
    source = save(tmp_path / "in.jsonl", '{"question": "who?", "answer": ["Ann"]}\n')
    assert run("nq_open", source, tmp_path / "dev.jsonl")[0]["answers"] == ["Ann"]
    save(tmp_path / "in.jsonl", '{"question": "who?", "answer": "Ann"}\n')
    with pytest.raises(UserError, match="in.jsonl:1:.*list"):
        run("nq_open", source, tmp_path / "dev.jsonl")


# ---------------------------------------------------------------- rankings
RESULT = [  # best first; the second question found nothing
    {
        "question": "who?",
        "answers": ["x"],
        "ctxs": [
            {"id": "2", "title": "U", "text": "b", "score": "2.5", "has_answer": False},
            {"id": "1", "title": "T", "text": 'say "x"', "score": "1.0", "has_answer": True},
        ],
    },
    {"question": "é?", "answers": [], "ctxs": []},
]


@pytest.fixture
def ranking(tmp_path):
    """a.run, q.jsonl and c.tsv, which together are RESULT."""
    save(tmp_path / "a.run", "q1\t2\t1\t2.5\nq1\t1\t2\t1.0\n")
    save(tmp_path / "c.tsv", '1\t"say ""x"""\tT\n2\tb\tU\n')
    questions = '{"qid": "q1", "question": "who?", "answers": ["x"]}\n{"qid": "q2", "question": "é?"}\n'
    save(tmp_path / "q.jsonl", questions)
    return [str(tmp_path / name) for name in ("a.run", "q.jsonl", "c.tsv")]


def test_trec(tmp_path, ranking):
    """TREC's six columns; an id with a space would shift them."""
    convert.main(["trec", ranking[0], str(tmp_path / "a.trec")])
    assert (tmp_path / "a.trec").read_text() == "q1 Q0 2 1 2.5 run\nq1 Q0 1 2 1.0 run\n"
    save(tmp_path / "b.run", "a b\t2\t1\t2.5\n")
    with pytest.raises(UserError, match="'a b' or '2' holds one"):
        convert.main(["trec", str(tmp_path / "b.run"), str(tmp_path / "b.trec")])


def test_dpr_result(tmp_path, ranking):
    """DPR's result json out, with has_answer and scores as strings; and in again, as three files of ours."""
    out = tmp_path / "result.json"
    convert.main(["dpr_result", *ranking, str(out)])
    assert json.loads(out.read_text()) == RESULT
    convert.main(["from_dpr_result", str(out), str(tmp_path / "back")])
    questions = read_questions(tmp_path / "back" / "questions.jsonl")
    assert [(q["question"], q["answers"]) for q in questions] == [("who?", ["x"]), ("é?", [])]
    assert read_run(tmp_path / "back" / "result.run") == {questions[0]["qid"]: [("2", 2.5), ("1", 1.0)]}
    assert list(Corpus(tmp_path / "back" / "corpus.jsonl")) == [("2", "U", "b"), ("1", "T", 'say "x"')]
    # a run and a question file that do not belong together
    save(tmp_path / "q.jsonl", '{"qid": "q9", "question": "who?"}\n')
    with pytest.raises(UserError, match="a.run: question 'q1' is not in .*q.jsonl"):
        convert.main(["dpr_result", *ranking, str(tmp_path / "other.json")])
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ctxs": RESULT[0]["ctxs"][::-1]}, "example 0 .* not sorted by score"),
        ({"ctxs": [{"text": "b", "score": 1}]}, "example 0 is no retrieval result: KeyError.'id'.*dpr_json"),
        ({"ctxs": [{"id": "1", "text": "b", "score": "x"}]}, "example 0 .*could not convert string to float"),
        ({"answers": "x"}, "example 0: the answers must be a list of strings, got 'x'"),
    ],
)
def test_broken_dpr_result(tmp_path, change, words):
    """Refused with the example, and none of the three files is written."""
    source = save(tmp_path / "in.json", json.dumps([RESULT[0] | change]))
    with pytest.raises(UserError, match=words):
        convert.main(["from_dpr_result", source, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_command_line(tmp_path, monkeypatch):
    """Too many or too few files, and an output that is the input, are refused before anything is read."""
    monkeypatch.chdir(tmp_path)
    for argv, words in [
        (["nq_open", "a", "b", "c"], "nq_open takes 1 input"),
        (["nq_open", "a"], "takes 1 input"),
        (["beir", "a"], "takes 1 or 2 input"),
        (["dpr_result", "a", "b"], "takes 3 input"),
        (["nq_open", "a", "./a"], "a is an input too"),
        (["nq_open", "a", "."], "OUT: . is a folder; name a file"),
        (["nq_open", "a", "b", "--ids"], "--ids belongs to dpr_json"),
        (["dpr_json", "missing.json", "b"], "missing.json: no such file"),
        (["from_dpr_result", "missing.json", "b"], "missing.json: no such file"),
    ]:
        with pytest.raises(UserError, match=words):
            convert.main(argv)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
