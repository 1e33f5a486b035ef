"""What somebody brings: the README's conversions, the look before a training, the hybrid's weight."""

import contextlib
import json
import re
import sys
from types import SimpleNamespace

import pytest

from prepare import check
from recipes import hybrid_weight, untrained
from recipes.demo import table
from tests.toy import make_world, write_lines
from utils.data import Corpus, Passage, read_questions
from utils.plumbing import checks
from utils.plumbing.checks import notes_on_unknown
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.files import write_json

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
QUOTED = 'She said "yes", twice.\n\nAnd "no".'


# ---------------------------------------------------------------- the conversions that the README shows
@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "data" / "my").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_squad(place):
    """Quotes, line breaks and several questions of a paragraph survive."""
    answers = [{"text": "Oslo", "answer_start": 0}, {"text": "Oslo city", "answer_start": 0}]
    asked = [{"id": "a", "question": "Where?", "answers": answers}]
    asked.append({"id": "b", "question": "No?", "answers": []})
    paragraphs = [{"context": QUOTED, "qas": asked}, {"context": '"Hi', "qas": []}]
    squad = {"version": "1.1", "data": [{"title": "Ann", "paragraphs": paragraphs}]}
    (place / "squad.json").write_text(json.dumps(squad), encoding="utf-8")
    exec(BLOCKS[0], {})  # what stands in the README
    first, second = Corpus("data/my/corpus.tsv")
    assert first == Passage("Ann 0", "Ann", 'She said "yes", twice. And "no".')
    assert second == Passage("Ann 1", "Ann", '"Hi')
    first, second = read_questions("data/my/questions.jsonl")
    assert first["answers"] == ["Oslo", "Oslo city"]
    assert first["positives"] == second["positives"] == ["Ann 0"]


def test_csv(place):
    """As a spreadsheet writes it, with a byte-order mark and a comma in a field."""
    table = '\ufeffquestion,answer\n"Who, then?",Ann\nWhere?,Zürich\n'
    (place / "faq.csv").write_text(table, encoding="utf-8")
    exec(BLOCKS[1], {})
    rows = read_questions("data/my/questions.jsonl")
    rows = [(row["qid"], row["question"], row["answers"]) for row in rows]
    assert rows == [("q0", "Who, then?", ["Ann"]), ("q1", "Where?", ["Zürich"])]


def test_folder_of_texts(place):
    """Two files of one name; 250 words are three passages."""
    for folder, text in (("a", QUOTED), ("b", "word " * 250)):
        (place / "texts" / folder).mkdir(parents=True)
        (place / "texts" / folder / "note.txt").write_text(text, encoding="utf-8")
    exec(BLOCKS[2], {})
    rows = list(Corpus("data/my/corpus.tsv"))
    assert [len(row.text.split()) for row in rows] == [6, 100, 100, 50]
    assert rows[0] == Passage("texts/a/note.txt-0", "note", 'She said "yes", twice. And "no".')


# ---------------------------------------------------------------- the look before a training
@pytest.fixture
def look(tmp_path, monkeypatch, capsys):
    """(a toy world, a function that runs prepare.check on it and returns what it printed)."""
    world = make_world(tmp_path / "world")

    def call(*flags):
        keys = ["--init", str(world / "bert"), "--corpus", str(world / "corpus.tsv"), "--batch_size", "8"]
        monkeypatch.setattr(sys, "argv", ["check", str(world), *keys, *flags])
        check.main()
        return capsys.readouterr().out

    return world, call


def test_the_report(look):
    """What is cut, what is missing, what leaks: counted by hand."""
    world, call = look
    train = read_questions(world / "train.jsonl")
    train[0]["answers"], train[1]["positives"] = [], []
    write_lines(world / "train.jsonl", train)
    again = train[2] | {"qid": "t", "question": f"{train[2]['question'].upper()}  ?"}
    write_lines(world / "test.jsonl", [again, *read_questions(world / "test.jsonl")])
    output = call("--passage_tokens", "14", "--question_tokens", "7")
    assert "passages: 60, 0 without a text" in output and "id '1', title 'paris'" in output
    assert "train: 40 questions, 1 without answers, 1 without positives" in output
    assert "warning: 1 test questions stand in train.jsonl too" in output
    cut = re.search(r"^passages: (\d+) % of 60 are cut at 14 tokens; the longest has (\d+)", output, re.M)
    # [CLS] title [SEP] text . [SEP]: the text has 7 words, a full stop and 0 to 7 more words
    lengths = [4 + len(passage.text.replace(".", " .").split()) for passage in Corpus(world / "corpus.tsv")]
    assert int(cut[1]) == round(100 * sum(length > 14 for length in lengths) / 60)
    assert int(cut[2]) == max(lengths) and "ends of" in output
    assert 'FLAGS="--passage_tokens 256"' in output


def test_what_looks_wrong_is_said(look):
    """Answers of another kind, titles that give the positives away, too few questions."""
    world, call = look
    train = read_questions(world / "train.jsonl")
    write_lines(world / "train.jsonl", [row | {"answers": ["Ωmega"]} for row in train])
    assert "only 0 % of the positives of train hold an answer" in call()
    bare = [row | {"positives": [{"title": "", "text": row["answers"][0]}]} for row in train]
    write_lines(world / "train.jsonl", bare)
    assert "warning: 0 % of the positives have a title, 100 % of the passages" in call()
    write_lines(world / "train.jsonl", train[:3])
    with pytest.raises(UserError, match='3 training questions fill no batch of 8; FLAGS="--batch_size 1"'):
        call()


def test_questions_are_split_once(look):
    """Eight, one and one of ten, all different; what is there is not split again."""
    world, call = look
    splits = [world / f"{name}.jsonl" for name in ("train", "dev", "test")]
    questions = [row for path in splits for row in read_questions(path)]
    for path in splits:
        path.unlink()
    with pytest.raises(UserError, match=r"train.jsonl: no such file; give all three, or questions.jsonl"):
        call()
    write_lines(world / "questions.jsonl", questions)
    splits[2].write_text("my own test questions")  # is not written over
    with pytest.raises(UserError, match=r"train.jsonl: no such file; give all three"):
        call()
    assert splits[2].read_text() == "my own test questions" and not splits[0].exists()
    splits[2].unlink()
    assert "is split into" in call()
    parts = [[row["qid"] for row in read_questions(path)] for path in splits]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert sorted(sum(parts, [])) == sorted(row["qid"] for row in questions)
    output = call()
    assert "is split into" not in output
    assert "questions.jsonl is not read, because of train.jsonl, dev.jsonl, test.jsonl" in output


def test_a_language_that_the_start_does_not_know(look):
    """Thai for weights of English: nearly every word is [UNK], which is said; a known text is no news."""
    world, call = look
    assert "unknown to this tokenizer" not in call()
    header, *lines = (world / "corpus.tsv").read_text(encoding="utf-8").splitlines()
    thai = [line.split("\t")[0] + "\tกรุงเทพ ใหญ่ มาก\tparis" for line in lines]
    (world / "corpus.tsv").write_text("\n".join([header, *thai]) + "\n", encoding="utf-8")
    assert "warning: 100 % of the tokens are unknown to this tokenizer, as in 'กรุงเทพ ใหญ่ มาก'" in call()


def test_untrained_weights_of_two_kinds_are_not_mixed(look, monkeypatch, capsys):
    """A second call repeats the first; with other weights or inputs it is refused, not passed over."""
    world, _ = look
    keys = ["untrained", "--init", str(world / "bert"), "--run_dir", str(world / "run")]
    monkeypatch.setattr(sys, "argv", keys)
    untrained.main()
    untrained.main()
    assert capsys.readouterr().out.count("as they are") == 2
    monkeypatch.setattr(sys, "argv", [*keys, "--passage_tokens", "16"])
    with pytest.raises(UserError, match="holds other weights or inputs"):
        untrained.main()


def test_tokenizers_that_know_every_byte():
    """Where [UNK] is the end of a text, or is not, nothing is counted."""
    for unknown, end in ((None, 2), (2, 2)):
        assert notes_on_unknown(SimpleNamespace(unk_token_id=unknown, eos_token_id=end), ["?"]) == []


def test_answers_that_are_patterns(look):
    """CuratedTREC's: as strings they match no positive, as patterns they do."""
    world, call = look
    train = read_questions(world / "train.jsonl")
    train = [row | {"answers": [rf"\b{row['answers'][0][:2]}\w+"]} for row in train]
    write_lines(world / "train.jsonl", train)
    with pytest.raises(UserError, match="which are regular expressions: add --match regex"):
        call()
    assert "hold an answer" not in call("--match", "regex")


FORMULAS = [r"\frac{1}{2}", r"\alpha + \beta", r"\sum x", r"3 \times 4"]
PATTERNS = [r"Eiffel\sTower", r"new\syork", r"\bfoo\b", r"\d+"]


@pytest.mark.parametrize("answer", FORMULAS + PATTERNS)
def test_formulas_are_no_patterns(answer):
    """LaTeX has backslashes too; a pattern that joins words by one of them is still a pattern."""
    rows = [{"qid": str(i), "question": "?", "answers": [answer]} for i in range(3)]
    for refuse in (checks.refuse_patterns, lambda rows, path: checks.refuse_patterns_to_learn(path, rows)):
        with pytest.raises(UserError) if answer in PATTERNS else contextlib.nullcontext():
            refuse(rows, "file")


# ---------------------------------------------------------------- the table of one's own data
@pytest.mark.parametrize("reader", [False, True])
def test_the_table_where_nothing_can_be_counted(tmp_path, capsys, reader):
    """Test questions with texts as positives, without answers: the table comes, and says why it is empty."""
    (tmp_path / "c.tsv").write_text("id\ttext\ttitle\na\tx\tA\nb\ty\tB\n")
    question = {"qid": "q", "question": "?", "positives": [{"title": "", "text": "x"}]}
    write_lines(tmp_path / "test.jsonl", [question])
    for name in ("bm25_runs", "untrained", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.run").write_text("q\ta\t1\t5.0\nq\tb\t2\t1.0\n")
    (tmp_path / "seconds.tsv").write_text("train\t7\n")
    if reader:  # the training questions had answers
        write_json(tmp_path / "test" / "reader.metrics.json", {})
    table.main(str(tmp_path), str(tmp_path), str(tmp_path / "c.tsv"), "string")
    assert "so nothing can be counted" in capsys.readouterr().out
    assert (tmp_path / "table.json").is_file()


# ---------------------------------------------------------------- the hybrid's weight
def test_the_weight_where_nothing_is_right(tmp_path, capsys):
    """Without a right passage no weight is better: both scores count alike, and this is said."""
    (tmp_path / "c.tsv").write_text("id\ttext\ttitle\na\tx\tA\nb\ty\tB\nc\tz\tC\n")
    write_lines(tmp_path / "dev.jsonl", [{"qid": "q", "question": "?", "positives": ["c"]}])
    (tmp_path / "one.run").write_text("q\ta\t1\t5.0\nq\tb\t2\t1.0\n")
    places = [str(tmp_path / name) for name in ("c.tsv", "dev.jsonl", "one.run", "one.run")]
    hybrid_weight.main(*places)
    said = capsys.readouterr()
    assert float(said.out) == 1 and "no question has a right passage" in said.err


def test_the_weight_is_the_best_of_those_tried(tmp_path, capsys):
    """Where BM25 alone is right the weight is 0; where the dense score is, it is not."""
    (tmp_path / "c.tsv").write_text("id\ttext\ttitle\na\tx\tA\nb\ty\tB\n")
    write_lines(tmp_path / "dev.jsonl", [{"qid": "q", "question": "?", "positives": ["a"]}])
    (tmp_path / "right.run").write_text("q\ta\t1\t5.0\nq\tb\t2\t1.0\n")
    (tmp_path / "wrong.run").write_text("q\tb\t1\t90.0\nq\ta\t2\t80.0\n")
    places = [str(tmp_path / name) for name in ("c.tsv", "dev.jsonl", "right.run", "wrong.run")]
    hybrid_weight.main(*places)
    assert float(capsys.readouterr().out) == 0
    hybrid_weight.main(*places[:2], places[3], places[2])
    weight = float(capsys.readouterr().out)
    # the scores spread by 5 and by 2: from 2.5 on the dense score decides
    assert weight >= 2.5 and 80 + 5 * weight >= 90 + weight
