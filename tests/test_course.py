"""
The course kit in seconds: what is cut, what is grafted, what a child may do, and a proof of small functions.

The whole proof of an assignment is a command: python course/kit.py prove 1
"""

import ast
import base64
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from utils.plumbing.config import ROOT

sys.path.insert(0, str(ROOT / "course"))

import child  # noqa: E402
import kit  # noqa: E402
import prove  # noqa: E402
import staff  # noqa: E402
import trees  # noqa: E402
import wrong  # noqa: E402

NAMES = sorted(path.stem for path in (ROOT / "course").glob("a[1-6].py"))
TABLES = {name: child.load(ROOT / "course" / f"{name}.py") for name in NAMES}
METRICS = ["utils/metrics.py:mrr", "utils/metrics.py:topk_accuracy"]  # their children import no torch


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Children that import numpy alone at their start, and are ended soon."""
    monkeypatch.setattr(child, "PRELOAD", ["numpy", "psutil"])


# ---------------------------------------------------------------- cut and graft
@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_is_cut_without_a_trace(name):
    """70 points; every hole parses and says its name; no piece of a body is left; the handout fits."""
    table = TABLES[name]
    solution = trees.solution_of(name, table)
    skeleton = trees.skeleton_of(solution, table)
    assert sum(trees.points_of(table).values()) == kit.SECTIONS["code"] == 70
    assert [*trees.leaks(solution, skeleton, table)] == []
    for path, content in skeleton.items():
        if path.endswith(".py"):
            ast.parse(content)
    for task, path, function in trees.tasks_of(table):
        assert f"{function} is not written yet".encode() in skeleton[path], task
        assert ast.get_docstring(trees.find(skeleton[path].decode(), function)), "the docstring is the task"
        assert len(wrong.WRONG[task]) >= 3 and wrong.RIGHT[task], task
        assert all(hasattr(table, check) for check in table.TASKS[task])
        for *_, loses in wrong.WRONG[task]:
            assert {*loses} <= table.TASKS[task].keys(), task
    assert wrong.PREDICT[name](**kit.numbers_of(table, 1)).keys() == table.QUESTIONS.keys()
    handout = (ROOT / "course" / f"{name}.md").read_text(encoding="utf-8")
    named = {*re.findall(r"\b(?:(?:utils|recipes|config|tests)/)?[\w/]+\.(?:py|yaml)\b", handout)}
    named -= {"kit.py"}
    assert named <= skeleton.keys(), named - skeleton.keys()


def test_a_leak_is_found():
    """The check of the test before can fail: a removed line, pasted into another file of the kit."""
    table = TABLES["a1"]
    solution = trees.solution_of("a1", table)
    skeleton = trees.skeleton_of(solution, table)
    skeleton["utils/text.py"] += b"\n# duplicates.discard((row, row *  width))\n"
    assert {path for _, path, _ in trees.leaks(solution, skeleton, table)} == {"utils/text.py"}


OURS = '''import math

LIMIT = 3


def double(x):
    """Return twice x."""
    return 2 * x


def other(x):
    return x
'''


def test_a_graft_takes_the_function_and_what_it_brings():
    """The function, and the imports, functions and constants that ours lacks; nothing else of the file."""
    theirs = (
        "import cmath\nLIMIT = 9\nTWO = 2\ndef help(x): return x\n"
        "def double(x):\n    return TWO * help(x)\ndef other(x): return 0\n"
    )
    source, fault = trees.graft(OURS, theirs, "double")
    names = {}
    exec(source, names)
    assert not fault and names["double"](4) == 8 and names["other"](5) == 5 and names["LIMIT"] == 3
    assert "cmath" in names


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ("", "there is no function double"),
        ("def double(x:\n", "does not parse"),
        ("def double(x, y):\n    return x\n", "the arguments were changed"),
        (trees.replace_body(OURS, "double", trees.stub("double")), "not written yet"),
    ],
)
def test_what_cannot_be_grafted_is_said(theirs, words):
    source, fault = trees.graft(OURS, theirs, "double")
    assert source == "" and words in fault


# ---------------------------------------------------------------- compare
@pytest.mark.parametrize(
    ("got", "wanted", "words"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-12], ""),
        ([3.0, 6.0, 9.0], [1.0, 2.0, 3.0], "3 times what is asked for"),
        ([2.0, 1.0, 7.0], [1.0, 2.0, 7.0], "another order"),
        ([1.0, np.nan], [1.0, 2.0], "NaN"),
        ([1.0, 2.0], [1.0, np.inf], "in the place of an infinite one"),
        ([1.0, np.inf], [1.0, np.inf], ""),
        ([1.0], [1.0, 2.0], "shape [1], asked for [2]"),
        ([0.0, 0.0], [1.0, 2.0], "off by 1 of the largest entry"),
        ([6.0], [2.0], "off by 2 of what is asked for"),
        ([True, 3.0], [1, 3], ""),
        ([1, 4], [1, 3], "1 of 2 entries differ"),
        ("[1]", "[1]", ""),
        ("[1]", "[2]", "other entries"),
        ("[1]", [1.0], "other entries"),
    ],
)
def test_a_difference_is_named_without_the_wanted_number(got, wanted, words):
    seen = kit.difference(np.array(got), np.array(wanted))
    assert bool(seen) == bool(words) and words in seen


# ---------------------------------------------------------------- the child
DRIVERS = """
TASKS = {"mine.py:double": ["answer"]}
def answer(rng, double):
    return {"twice": double(rng.standard_normal(3)), "list": [1, 2]}
"""


def run(body, seconds=20):
    files = {"mine.py": f"def double(x):\n{body}\n".encode(), "a.py": DRIVERS.encode()}
    found, fault, _ = child.outputs(files, "a", "mine.py:double", [5], seconds)
    return found.get((5, "answer")), fault


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    while True: pass", "no answer after 2 seconds"),
        ("    return [bytearray(b'x') * 10**8 for _ in range(100)]", "MemoryError"),
        ("    import sys; sys.exit(0)", "SystemExit"),
        ("    import os; os._exit(0)", "ended without an answer"),
        ("    import os; os.kill(os.getppid(), 9)", "PermissionError"),
        (f"    return open({str(ROOT / 'course/wrong.py')!r}).read()", "PermissionError"),
        ("    import subprocess; return subprocess.run('ls')", "PermissionError"),
        ("    open('../out.npz', 'w').write('x'); import os; os._exit(0)", "ended without an answer"),
        ("    print(70); return type('E', (), {'__eq__': lambda *a: True})()", "TypeError"),
    ],
)
def test_a_hostile_function_gets_a_sentence(monkeypatch, body, words):
    """And the next child works as before; what is printed goes nowhere."""
    monkeypatch.setattr(child, "MEMORY", 800_000_000)
    got, fault = run(body, 2 if "while" in body else 60)
    assert words in kit.verdict(got, {"twice": np.zeros(3), "list": np.array("[1, 2]")}, fault, aloud=False)


def test_a_child_sends_arrays():
    got, _ = run("    print('hello')\n    return 2 * x")
    rng = np.random.default_rng([5, child.zlib.crc32(b"answer")])
    assert np.array_equal(got["twice"], 2 * rng.standard_normal(3)) and got["list"] == "[1, 2]"


# ---------------------------------------------------------------- prove and grade
def test_a_small_function_is_proved():
    """Solution, stub, wrong and other right answers, and the variant of a function, at two seeds."""
    lines = [*prove.prove("a3", tasks=METRICS[:1], attacks=False)]
    assert [what for what, fault in lines if fault] == []
    kinds = ("wrong", "right", "variant", "the stub")
    counts = [sum(f": {kind}" in what for what, _ in lines) for kind in kinds]
    assert counts == [len(wrong.WRONG[METRICS[0]]), 1, 1, 1]


def graded(submission):
    """The rows of a submission to an assignment of two functions, sealed with two seeds."""
    tasks = {task: TABLES["a3"].TASKS[task] for task in METRICS}
    table = SimpleNamespace(TASKS=tasks)
    solution = trees.solution_of("a3", TABLES["a3"])
    one = SimpleNamespace(TASKS={METRICS[0]: tasks[METRICS[0]]})
    found = {(task, i): arrays for task, i, _, arrays in trees.wrong_outputs("a3", one, solution, 7)}
    sealed = {"seeds": [7, 8], "wrong": found}
    return [*staff.grade_one("a3", table, solution, sealed, submission)], table


def test_a_wrong_function_costs_its_own_points_and_is_named():
    source = (ROOT / "utils/metrics.py").read_text()
    source = source.replace("0 < rank <= cutoff else", "0 < rank < cutoff else")
    submission = {"utils/metrics.py": source.encode()}
    submission["kit.json"] = b'{"student": "s1"}'
    rows, table = graded(submission)
    points = {row["check"]: (row["points"], row["of"]) for row in rows}
    assert points == {
        "mrr_cut": (0, 2), "mrr_miss": (1, 1), "accuracy_cut": (2, 2), "accuracy_all": (2, 2)
    }  # fmt: skip
    (lost,) = (row for row in rows if row["seen"])
    assert lost["cause"] == "the cutoff itself does not count" and lost["sealed"]
    text = staff.feedback("s1", rows, table)
    assert "comes out when  the cutoff itself does not count" in text and "5 of 80" in text


def test_the_outputs_of_other_systems():
    """A recorded example of Gradescope's results.json, and of what GitHub Classroom's reporter reads."""
    row = {
        "task": "f.py:g",
        "check": "c",
        "points": 1.0,
        "of": 3,
        "seen": "",
        "sealed": "off by 2",
        "cause": "",
    }
    assert staff.gradescope([row]) == {
        "tests": [
            {
                "name": "f.py:g c", "number": "1.1", "score": 1.0, "max_score": 1.0, "status": "passed",
                "output": "", "visibility": "visible",
            },
            {
                "name": "f.py:g c, other seeds", "number": "1.2", "score": 0.0, "max_score": 2.0,
                "status": "failed", "output": "off by 2", "visibility": "after_due_date",
            },
        ],
        "visibility": "visible",
        "stdout_visibility": "hidden",
    }  # fmt: skip
    text = kit.classroom([("f.py:g", "c", 0.0, 1 / 3, "off by 2", "")])
    assert json.loads(base64.b64decode(text)) == {
        "version": 1,
        "status": "fail",
        "max_score": 0.33,
        "tests": [
            {"name": "f.py:g c", "status": "fail", "message": "off by 2", "score": 0.0, "max_score": 0.33}
        ],
    }


def test_an_entry_for_the_board_and_its_points(tmp_path, monkeypatch, capsys):
    """The entry has the board's questions alone; one that beats the baseline gets 5 points."""
    corpus = [f"{i}\tthe {i}th text holds word{i}\ttitle {i}\n" for i in range(30)]
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(corpus))
    questions = []
    for i in range(20):
        question = {"qid": f"q{i}", "question": "x", "answers": [f"word{i}"], "positives": [str(i)]}
        questions.append(json.dumps(question) + "\n")
    (tmp_path / "sealed.jsonl").write_text("".join(questions))
    for name, shift, count in (("good", 0, 30), ("base", 7, 20)):
        rows = [f"q{i}\t{(i + shift) % 30}\t1\t2.0\n" for i in range(count)]
        (tmp_path / f"{name}.run").write_text("".join(rows))

    # a student's folder
    (tmp_path / "kit.json").write_text('{"assignment": "a1", "student": "s1"}')
    (tmp_path / "a1.py").write_text("")
    (tmp_path / "board.jsonl").write_text("".join(f'{{"qid": "q{i}"}}\n' for i in range(20)))
    monkeypatch.setattr(kit, "HERE", tmp_path)
    kit.board(SimpleNamespace(file=str(tmp_path / "good.run")))
    assert "20 of 20" in capsys.readouterr().out
    assert len((tmp_path / "board.run").read_text().splitlines()) == 20

    # the staff's table
    (tmp_path / "entries").mkdir()
    (tmp_path / "board.run").rename(tmp_path / "entries" / "s1.run")
    (tmp_path / "entries" / "broken.run").write_text("nonsense")
    files = {"questions": "sealed.jsonl", "corpus": "corpus.tsv", "baseline": "base.run"}
    files = {key: tmp_path / name for key, name in files.items()}
    staff.board_table(SimpleNamespace(table=tmp_path / "entries", **files))
    head, broken, entry = capsys.readouterr().out.splitlines()
    assert "n = 20" in head and "no entry" in broken
    assert re.search(r"s1.run +MRR@10 100.0 .* \+100.0 .* 5$", entry)
