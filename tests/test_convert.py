"""Other people's files become ours and back: hand-made cases of every format, and what must be refused."""

import collections
import io
import json
import pickle
import tracemalloc

import numpy as np
import pytest

from prepare import convert
from tests.toy import tokenizer, write_lines
from utils.data import Corpus, read_questions, read_run, write_run
from utils.plumbing.config import UserError
from utils.plumbing.embeddings import open_embeddings


def save(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def call(*argv):
    convert.main([str(word) for word in argv])


def run(*argv):
    call(*argv)
    return read_questions(argv[-1])


def refused(words, *argv):
    with pytest.raises(UserError, match=words) as error:
        call(*argv)
    assert "\n" not in str(error.value)


def ctx(text, **more):
    return {"title": "T", "text": text, **more}


LISTS = ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs")
GOLD = [ctx("gold", passage_id="1"), ctx("also", passage_id="2")]
RANDOM = [ctx("random", passage_id="3")]
HARD = [ctx("hard", psg_id="4"), ctx("gold", psg_id="1")]
UNTITLED = [{"title": None, "text": "p", "passage_id": "5"}]
DPR = [
    {"question": "who?", "answers": ["Ann"]} | dict(zip(LISTS, (GOLD, RANDOM, HARD), strict=True)),
    {"question": "none?", "answers": []} | dict.fromkeys(LISTS, []),
    {"question": "fallback?", "answers": ["Bob"]} | dict(zip(LISTS, (UNTITLED, RANDOM, []), strict=True)),
    {"question": "no lists?", "answers": ["Cid"], "positive_ctxs": [ctx("p", passage_id="6")]},
]
DEEP = "[" * 5000 + "]" * 5000  # deeper than Python's recursion limit
HIT = {"docid": "2", "score": "2.5", "text": '"A title"\nAnn did', "has_answer": True}
MISS = {"docid": "1", "score": "2.5", "text": "no title", "has_answer": False}
PYSERINI = {  # as convert_trec_run_to_dpr_retrieval_run.py --store-raw writes it
    "q7": {"question": "who?", "answers": ["Ann"], "contexts": [HIT, MISS]},
    "q8": {"question": "what?", "answers": [], "contexts": []},
}


def test_dpr_json(tmp_path, capsys):
    """DPR's rules: no positive: dropped; hard negatives or else the others."""
    source = save(tmp_path / "in.json", json.dumps(DPR, indent=4))
    questions = run("dpr_json", source, tmp_path / "train.jsonl")
    assert [question["qid"] for question in questions] == ["train-0", "train-1", "train-2"]
    assert questions[0]["answers"] == ["Ann"]
    wanted = [[ctx("gold"), ctx("also")], [{"title": "", "text": "p"}], [ctx("p")]]
    assert [question["positives"] for question in questions] == wanted
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
    refused("example 0 .*--ids", "--ids", "dpr_json", source, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(DPR, indent=1)[:-40], "in.json: .*premature EOF; get the file again"),
        (json.dumps(DPR).replace('"T",', '"T"', 1), "in.json: after 0 good examples: .*I expect ',' or '}'"),
        (json.dumps(DPR) * 2, "after 4 good examples: parse error: trailing garbage"),
        (f"[{DEEP}]", "example 0 is not of this format"),
        (json.dumps([DPR[0] | {"answers": 5}]).replace("5", DEEP), "example 0: the answers must be a list"),
        (json.dumps([DPR[2] | {"question": 7}]).replace("7", DEEP), "question 0 is empty or not text"),
        (json.dumps([DPR[3] | {"positive_ctxs": [ctx(9)]}]).replace("9", DEEP), "question 0 has a passage"),
        ("x" + json.dumps(DPR), "does not start with"),
        (json.dumps(PYSERINI, indent=4), "is Pyserini's retrieval result; .* from_dpr_result"),
        (json.dumps([{"question": "x", "ctxs": []}]), "is a retrieval result .* from_dpr_result"),
        (json.dumps(DPR).replace('"Ann"', "NaN"), "in.json: .*invalid char in json text.*NaN"),
        (json.dumps(DPR).encode().replace(b"Ann", b"\xff"), "in.json: .*invalid bytes in UTF8"),
        (json.dumps(DPR[0]) + "\n" + json.dumps(DPR[1])[:-9], "in.json:2: not a json object on one line"),
        (json.dumps([5]), "example 0 is not of this format: .*int"),
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
    refused(words, "dpr_json", save(tmp_path / "in.json", content), tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_dpr_json_is_streamed(tmp_path):
    """A file of 40 MB passes through a few MB of memory, so NQ's 7 GB do too."""
    entry = json.dumps({**DPR[0], "negative_ctxs": [ctx("x" * 1000)] * 40})
    save(tmp_path / "in.json", "[" + ",\n".join([entry] * 1000) + "]")
    tracemalloc.start()
    call("dpr_json", tmp_path / "in.json", tmp_path / "out.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6, peak


def test_dpr_qa(tmp_path):
    """Answers are a python list (regex backslashes kept as they are) or json; quotes in csv are undone."""
    rows = "who?\t[\"Ann\", 'Bob']\n" + 'how many\t"[""3"", ""three""]"\n'
    rows += "when\t['19\\d\\d']\r\n" + 'j\t["a\\/b"]'
    # one line is one record: a lone quote swallows nothing; blank lines and a header are no questions
    lone = 'question\tanswers\n\n"what\t["x"]\n"who"\t["a\tb"]\n\n'
    found = run("dpr_qa", save(tmp_path / "lone.csv", lone), tmp_path / "lone.jsonl")
    assert [(q["question"], q["answers"]) for q in found] == [('"what', ["x"]), ("who", ["a\tb"])]
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
    refused("in.csv:2:", "dpr_qa", "in.csv", "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["in.csv"]


def test_msmarco(tmp_path, capsys):
    queries = save(tmp_path / "queries.tsv", '10\twhat is "x\n11\tunjudged\n12\tirrelevant\n')
    qrels = save(tmp_path / "qrels.tsv", "10\t0\t7\t1\n10\t0\t9\t1\n10\t0\t7\t1\n12\t0\t5\t0\n99\t0\t1\t1\n")
    found = run("msmarco", queries, qrels, tmp_path / "out.jsonl")
    assert len(found) == 1 and found[0]["question"] == 'what is "x' and found[0]["qid"] == "10"
    assert found[0]["positives"] == ["7", "9"]
    printed = capsys.readouterr().out
    assert "2 dropped, not judged" in printed and "1 judged but not among the questions" in printed
    unlabelled = run("msmarco", queries, tmp_path / "out.jsonl")
    assert [q["qid"] for q in unlabelled] == ["10", "11", "12"] and unlabelled[0]["positives"] == []
    save(tmp_path / "queries.tsv", "10\tx\n10\ty\n")
    refused("'10' is there twice", "msmarco", queries, tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("lines", "positives", "grades"),
    [
        ("q1 0 a 1\nq1 0 b 1\n", ["a", "b"], None),
        ("q1\tNew York\t2\nq1\tb\t1\n\n", ["New York", "b"], [2, 1]),
        ("query_id iter doc_id relevance\nq1 Q0 a 0.5\nq1 Q0 b -1\nq1 Q0 c 0\n", ["a"], [0.5]),
        ("qid\tpid\tscore\r\nq1\ta\t1.0\r\n  \r\n", ["a"], None),
        ("\ufeffqid pid\nq1 7\nq1 7\n", ["7"], None),
        ("topic corpus-id rel\nq1 a 1\n", None, "expected|not a number"),
        ("q1\ta\tyes\n", None, "qrels:1: 'yes' is not a number"),
        ("q1 a nan\n", None, "qrels:1: 'nan' is not a number"),
        ("q1 0 a 1\n\nq1 0 a 2\n", None, "qrels:3: passage 'a' .* has two grades, 1 and 2"),
        ("docid\tqid\trel\na\tq1\t1\n", None, "qrels:1: the columns are docid, qid, rel"),
        ("q1,a,1\n", None, "qrels:1: .*got 1 columns"),
    ],
)
def test_qrels(tmp_path, lines, positives, grades):
    """TREC's four columns or RocketQA's two, tabs or spaces, headers, grades; a refusal names the line."""
    queries = save(tmp_path / "queries.tsv", "qid\tquery\nq1\twho?\n\n")
    argv = ("msmarco", queries, save(tmp_path / "qrels", lines), tmp_path / "out.jsonl")
    if positives is None:
        return refused(grades, *argv)
    (question,) = run(*argv)
    assert question["positives"] == positives and question.get("grades") == grades


def test_rocketqa(tmp_path):
    """data_train's six raw columns; NQ's answers; the cross-encoder's scores, for all or for the first N."""
    row = 'who "x\tT\tgold\t-\thard "neg\t0\n'
    first, second = run("rocketqa", save(tmp_path / "t.tsv", row * 2), tmp_path / "t.jsonl")
    assert first["positives"] == [ctx("gold")] and first["question"] == 'who "x'
    assert second["negatives"] == [{"title": "-", "text": 'hard "neg'}]
    four = save(tmp_path / "t.tsv", "q\tt\tp\t1\n")
    refused("t.tsv:1: expected 6 columns.*got 4; four are", "rocketqa", four, tmp_path / "t.jsonl")
    queries = save(tmp_path / "test.query.txt", "0\twho?\n1\twhat?\n")
    answers = save(tmp_path / "test.answers.txt", "0\tAnn\tAnn B.\n")
    found = run("rocketqa_answers", queries, answers, tmp_path / "q.jsonl")
    assert [(q["qid"], q["answers"]) for q in found] == [("0", ["Ann", "Ann B."]), ("1", [])]

    write_run(tmp_path / "a.run", [(qid, [("x", 3.0), ("y", 2.0), ("z", 1.0)]) for qid in "ab"])
    for scores, wanted in [
        ("0.1\n0.9\n0.5\n0.5\n", [("y", 0.9), ("x", 0.1)]),
        ("0.1\n0.9\n0.2\n0.5\n0.5\n0.5\n", [("y", 0.9), ("z", 0.2), ("x", 0.1)]),
    ]:
        files = [tmp_path / "a.run", save(tmp_path / "s.txt", scores), tmp_path / "s.run"]
        call("rocketqa_scores", *files)
        result = read_run(tmp_path / "s.run")
        assert result["a"] == wanted and [pid for pid, _ in result["b"]] == ["x", "y", "z"][: len(wanted)]
    save(tmp_path / "s.txt", "0.1\n0.2\n0.3\n")
    refused("3 scores for 2 questions with 6 passages", "rocketqa_scores", *files)


def test_ance_tele(tmp_path):
    """*-train-qrels.jsonl: questions without positives stay; split*.hn.json: token ids come back."""
    rows = [
        {"qid": 3, "question": "who?", "answers": ["Ann"], "positive_ctxs": [ctx("gold")]},
        {"qid": 4, "question": "what?", "answers": ["Bob"], "positive_ctxs": []},
    ]
    source = save(tmp_path / "nq-train-qrels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="prepare.convert ance_tele "):
        read_questions(source)
    found = run("ance_tele", source, tmp_path / "t.jsonl")
    assert [(q["qid"], q["positives"]) for q in found] == [("3", [ctx("gold")]), ("4", [])]

    words = tokenizer(tmp_path)
    texts = ["the old bridge of paris", "lima's river , zzq"]

    def ids(text):
        return words(text, add_special_tokens=False)["input_ids"]

    line = {"query": ids("which river"), "positives": [ids("paris[SEP]" + texts[0])]}
    line["negatives"] = [ids("lima[SEP]" + texts[1]), ids("[SEP]" + texts[0])]
    splits = [save(tmp_path / f"split0{i}.hn.json", json.dumps(line) + "\n") for i in range(2)]
    with pytest.raises(UserError, match="prepare.convert ance_tele_hn "):
        read_questions(splits[0])
    found = run("ance_tele_hn", *splits, tmp_path / "vocab.txt", tmp_path / "h.jsonl")
    assert len(found) == 2 and ids(found[1]["question"]) == line["query"]
    for key in ("positives", "negatives"):
        assert [ids(f"{p['title']}[SEP]{p['text']}") for p in found[1][key]] == line[key]
    save(tmp_path / "split00.hn.json", json.dumps(line | {"negatives": [[10**6]]}))
    words = "split00.hn.json:1 .*token id is not in .*vocab.txt"
    refused(words, "ance_tele_hn", splits[0], tmp_path / "vocab.txt", tmp_path / "h.jsonl")


def test_tevatron(tmp_path):
    row = {"query_id": 5, "query": "who?", "positive_passages": [ctx("gold", docid=0)]}
    row["negative_passages"] = [ctx("hard", docid="9")]
    source = save(tmp_path / "t.jsonl", json.dumps(row) + "\n" + '{"query_id": "6", "query": "what?"}\n')
    found = run("tevatron", source, tmp_path / "o.jsonl")
    assert [(q["qid"], q["positives"]) for q in found] == [("5", [ctx("gold")]), ("6", [])]
    found = run("tevatron", "--ids", source, tmp_path / "o.jsonl")
    assert (found[0]["positives"], found[0]["negatives"]) == (["0"], ["9"])
    rows = '{"docid": 0, "title": "T", "text": "gold"}\n{"id": "9", "contents": "\\"U\\"\\nhard"}\n'
    source = save(tmp_path / "c.jsonl", rows)
    assert list(Corpus(source)) == [("0", "T", "gold"), ("9", "U", "hard")]


def test_ours_to_dpr_and_back(tmp_path):
    """A training file as DPR's json, passages by id from the corpus or inline; questions as DPR's csv."""
    save(tmp_path / "c.tsv", '7\t"say ""x"""\tT\n9\tb\tU\n')
    row = {"qid": "a", "question": 'why "x\ty?', "answers": ["it's", 'a "b"\n']}
    row |= {"positives": ["7", ctx("in")]}
    ours = save(tmp_path / "t.jsonl", json.dumps(row | {"negatives": ["9"]}) + "\n")
    call("to_dpr_json", ours, tmp_path / "c.tsv", tmp_path / "d.json")
    (entry,) = json.loads((tmp_path / "d.json").read_text())
    assert entry["positive_ctxs"] == [ctx('say "x"', passage_id="7"), ctx("in")]
    assert entry["hard_negative_ctxs"] == [{"title": "U", "text": "b", "passage_id": "9"}]
    (back,) = run("dpr_json", tmp_path / "d.json", tmp_path / "back.jsonl")
    assert (back["question"], back["answers"]) == (row["question"], row["answers"])
    assert back["positives"][0] == ctx('say "x"')
    refused("give the corpus too", "to_dpr_json", ours, tmp_path / "d.json")
    call("to_dpr_qa", ours, tmp_path / "d.csv")
    (back,) = run("dpr_qa", tmp_path / "d.csv", tmp_path / "back.jsonl")
    assert (back["question"], back["answers"]) == ('why "x y?', row["answers"])


def test_beir_and_nq_open(tmp_path):
    """BEIR's queries.jsonl and its qrels with a header; Google's jsonl, which calls the list `answer`."""
    queries = save(tmp_path / "queries.jsonl", '{"_id": "a", "text": "who?", "metadata": {}}\n')
    qrels = save(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore\na\tMED-1\t2\na\tMED-2\t0\n")
    assert run("beir", queries, qrels, tmp_path / "out.jsonl")[0]["positives"] == ["MED-1"]
    source = save(tmp_path / "in.jsonl", '{"question": "who?", "answer": ["Ann"]}\n')
    assert run("nq_open", source, tmp_path / "dev.jsonl")[0]["answers"] == ["Ann"]
    save(tmp_path / "in.jsonl", '{"question": "who?", "answer": "Ann"}\n')
    refused("in.jsonl:1:.*list", "nq_open", source, tmp_path / "dev.jsonl")


# ---------------------------------------------------------------- rankings
CTXS = [  # best first
    {"id": "2", "title": "U", "text": "b", "score": "2.5", "has_answer": False},
    {"id": "1", "title": "T", "text": 'say "x"', "score": "1.0", "has_answer": True},
]
FOUND = {"question": "who?", "answers": ["x"], "ctxs": CTXS}
RESULT = [FOUND, {"question": "é?", "answers": [], "ctxs": []}]


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
    call("trec", ranking[0], tmp_path / "a.trec")
    assert (tmp_path / "a.trec").read_text() == "q1 Q0 2 1 2.5 run\nq1 Q0 1 2 1.0 run\n"
    # trec_eval reads 32 bits and reorders equal scores: they fall strictly, also through zero and in 32 bits
    ranked = [3.0, 3.0, 1 + 1e-12, 1.0, 0.5, 0.0, 0.0, -7.5, -7.5]
    write_run(tmp_path / "t.run", [("q", [(f"p{i}", score) for i, score in enumerate(ranked)])])
    call("trec", tmp_path / "t.run", tmp_path / "t.trec")
    rows = [line.split() for line in (tmp_path / "t.trec").read_text().splitlines()]
    scores = np.array([row[4] for row in rows]).astype(np.float32)
    assert (np.diff(scores) < 0).all() and np.abs(scores - ranked).max() < 1e-6
    assert rows[4][4] == "0.5" and [row[2] for row in rows] == [f"p{i}" for i in range(9)]
    call("from_trec", tmp_path / "t.trec", tmp_path / "back.run")
    assert [pid for pid, _ in read_run(tmp_path / "back.run")["q"]] == [f"p{i}" for i in range(9)]
    for line, words in (("q\ta\t1\t-1e39\n", "32 bits"), ("a b\t2\t1\t2.5\n", "'a b' or '2' holds one")):
        refused(words, "trec", save(tmp_path / "b.run", line), tmp_path / "b.trec")


def test_dpr_result(tmp_path, ranking):
    """DPR's result json out, with has_answer and scores as strings; and in again, as three files of ours."""
    out = tmp_path / "result.json"
    call("dpr_result", *ranking, out)
    assert json.loads(out.read_text()) == RESULT
    call("from_dpr_result", out, tmp_path / "back")
    questions = read_questions(tmp_path / "back" / "questions.jsonl")
    assert [(q["question"], q["answers"]) for q in questions] == [("who?", ["x"]), ("é?", [])]
    assert read_run(tmp_path / "back" / "result.run") == {questions[0]["qid"]: [("2", 2.5), ("1", 1.0)]}
    assert list(Corpus(tmp_path / "back" / "corpus.jsonl")) == [("2", "U", "b"), ("1", "T", 'say "x"')]
    # answers that are patterns would be looked for letter by letter
    rows = [{"qid": qid, "question": "?", "answers": [r"19\d\d"]} for qid in "123"]
    patterns = write_lines(tmp_path / "patterns.jsonl", rows)
    refused("which are regular expressions", "dpr_result", ranking[0], patterns, ranking[2], out)
    # a run and a question file that do not belong together
    save(tmp_path / "q.jsonl", '{"qid": "q9", "question": "who?"}\n')
    other = tmp_path / "other.json"
    refused("a.run: question 'q1' is not in .*q.jsonl", "dpr_result", *ranking, other)
    assert not other.exists()


@pytest.mark.parametrize(
    ("score_lines", "order"),
    [
        ("q 0 a 1 1.0 t\nq 0 b 2 2.0 t\n", "ba"),
        ("q\t0\ta\t1\t1.0\tt\n\nq\t0\tb\t2\t1.0\tt\nq\t0\tc\t3\t1.0\tt\n", "cba"),
        ("q 0 a 1 1.00000000001 t\nq 0 b 2 1.0 t\n", "ba"),
    ],
)
def test_from_trec(tmp_path, score_lines, order):
    """trec_eval's order: score in 32 bits, equal ones by id from the last; the rank column says nothing."""
    source = save(tmp_path / "a.trec", score_lines + "q2 0 x 1 -3 t\n")
    call("from_trec", source, tmp_path / "a.run")
    assert ["".join(pid for pid, _ in hits) for hits in read_run(tmp_path / "a.run").values()] == [order, "x"]
    for line, words in [
        ("q2 0 y 1 x t", "'x' is not a number"),
        ("q2 0 x 1 2 t", "twice"),
        ("q 0 y 1", "6|got 4"),
    ]:
        save(tmp_path / "b.trec", "q2 0 x 1 1 t\n" + line)
        refused(f"b.trec:2: .*({words})", "from_trec", tmp_path / "b.trec", tmp_path / "b.run")


def test_results_of_fid_and_pyserini(tmp_path):
    entries = [{"id": f"f{i}", "question": "who?", "target": "Ann", "answers": ["Ann"]} for i in range(2)]
    entries = [entry | {"ctxs": [ctx("a"), ctx(f"b{i}")]} for i, entry in enumerate(entries)]
    for content in (json.dumps(entries), "".join(json.dumps(entry) + "\n" for entry in entries)):
        call("from_dpr_result", save(tmp_path / "fid", content), tmp_path / "fid_out")
        result = read_run(tmp_path / "fid_out" / "result.run")
        corpus = Corpus(tmp_path / "fid_out" / "corpus.jsonl")
        texts = {qid: [corpus.passage(pid).text for pid, _ in hits] for qid, hits in result.items()}
        assert texts == {"f0": ["a", "b0"], "f1": ["a", "b1"]} and len(corpus) == 3

    for indent in (None, 4):
        source = save(tmp_path / "p.json", json.dumps(PYSERINI, indent=indent))
        call("from_dpr_result", source, tmp_path / "p")
        assert read_run(tmp_path / "p" / "result.run") == {"q7": [("2", 2.5), ("1", 2.5)]}
        passages = [("2", "A title", "Ann did"), ("1", "", "no title")]
        assert list(Corpus(tmp_path / "p" / "corpus.jsonl")) == passages
        assert [q["qid"] for q in read_questions(tmp_path / "p" / "questions.jsonl")] == ["q7", "q8"]
    bare = json.dumps({"0": {"question": "who?", "answers": [], "contexts": [{"docid": "2", "score": 1}]}})
    call("from_dpr_result", save(tmp_path / "p.json", bare), tmp_path / "bare")
    assert sorted(file.name for file in (tmp_path / "bare").iterdir()) == ["questions.jsonl", "result.run"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ctxs": CTXS[::-1]}, "example 0 .* not sorted by score"),
        ({"ctxs": [{"score": 1}]}, "example 0 is not of this format: 'text' is missing.*dpr_json"),
        ({"ctxs": CTXS[:1] * 2}, "example 0 .*a passage is there twice"),
        ({"ctxs": [{"id": "1", "text": "b", "score": "nan"}]}, "example 0 .* not sorted by score"),
        ({"ctxs": [*CTXS, {"id": "3", "score": "0"}]}, "1 passages have no text"),
        ({"ctxs": [{"id": "1", "text": "b", "score": "x"}]}, "example 0 .*could not convert string to float"),
        ({"answers": "x"}, "example 0: the answers must be a list of strings, got 'x'"),
    ],
)
def test_broken_dpr_result(tmp_path, change, words):
    source = save(tmp_path / "in.json", json.dumps([FOUND | change]))
    refused(words, "from_dpr_result", source, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------- vectors
@pytest.fixture
def vectors(tmp_path):
    save(tmp_path / "c.tsv", "".join(f"{i + 1}\ttext {i}\ttitle\n" for i in range(25)))
    return np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["dpr", "wiki", "tevatron", "npy"])
@pytest.mark.parametrize("shard_size", [4, 65536])
def test_vectors(tmp_path, vectors, monkeypatch, kind, shard_size):
    """12 files in the order of a shell's *, where 10 comes before 2: row i is passage i, bit for bit."""
    monkeypatch.setattr("prepare.vectors.SHARD_SIZE", shard_size)
    names = []
    for i, rows in enumerate(np.array_split(np.arange(25), 12)):
        ids = [f"{'wiki:' * (kind == 'wiki')}{row + 1}" for row in rows]
        value = (vectors[rows], ids) if kind == "tevatron" else list(zip(ids, vectors[rows], strict=True))
        names.append(tmp_path / f"wikipedia_shard_{i}.{'npy' if kind == 'npy' else 'pkl'}")
        if kind == "npy":
            np.save(names[-1], vectors[rows])
        else:
            names[-1].write_bytes(pickle.dumps(value, protocol=i % 6))
    argv = ["vectors", *sorted(map(str, names)), tmp_path / "c.tsv", tmp_path / "e"]
    call(*argv)
    shards, manifest = open_embeddings(tmp_path / "e", Corpus(tmp_path / "c.tsv").sha256, rows=25)
    assert (np.concatenate(shards) == vectors).all() and "encoder unknown" in manifest["note"]
    assert (tmp_path / "e" / "ids.txt").read_text().split() == [str(i + 1) for i in range(25)]
    refused("is there already", *argv)


class Evil:
    def __reduce__(self):
        return eval, ("open('hacked', 'w')",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: pickle.dumps([("1", Evil())]), "eval, which could run a program"),
        (lambda v: pickle.dumps([("1", collections.Counter())]), "collections.Counter"),
        (lambda v: pickle.dumps([(str(i + 2), row) for i, row in enumerate(v)]), "vector 0 is of '2'"),
        (lambda v: pickle.dumps([("1", v[0])]), "1 vectors in all, .* has 25"),
        (lambda v: pickle.dumps([("1", v[0])])[:-9], "is no pickle of"),
        (lambda v: pickle.dumps([1, 2]), "is no pickle of"),
        (lambda v: pickle.dumps([("1", v[0].astype(object))]), "expected numbers"),
        (lambda v: pickle.dumps((v, ["1"])), "25 vectors, 1 ids"),
        (lambda v: pickle.dumps([(str(i + 1), row * np.inf) for i, row in enumerate(v)]), "NaN or infinity"),
        (lambda v: b"rubbish", "is no pickle of"),
        (lambda v: npy(v[:, 0]), "expected numbers .n, D., got float32 .25."),
        (lambda v: npy(np.concatenate([v, v])), "beyond the 25 passages"),
        (lambda v: npy(v)[:-7], "not a whole .npy"),
        (lambda v: npy(v.astype(object)), "not a whole .npy"),
    ],
)
def test_broken_vectors(tmp_path, vectors, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "v.pkl", change(vectors))
    refused(f"v.pkl: .*{words}", "vectors", "v.pkl", "c.tsv", "e")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.tsv", "c.tsv.index", "v.pkl"]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_no_words_show_the_formats(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main([])
    assert stopped.value.code == 0
    assert set(convert.FORMATS) <= set(capsys.readouterr().out.split())


def test_command_line(tmp_path, monkeypatch):
    """Too many or too few files, and an output that is the input, are refused before anything is read."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "there", "{}\n")
    for argv, words in [
        (["nq_open", "a", "b", "c"], "nq_open takes 1 input"),
        (["nq_open", "a"], "takes 1 input"),
        (["beir", "a"], "takes 1 or 2 input"),
        (["nq_open", "there", "./there"], "there is an input too"),
        (["nq_open", "a", "."], "OUT: . is a folder; name a file"),
        (["nq_open", "a", "b", "--ids"], "--ids belongs to dpr_json, ance_tele, tevatron"),
        (["vectors", "a", "b"], "takes 2 or more"),
        (["from_dpr_result", "a/corpus.jsonl", "a"], "would be overwritten"),
        (["dpr_json", "missing.json", "b"], "missing.json: no such file"),
    ]:
        refused(words, *argv)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["there"]
