"""The course kit: cut, graft, child, grade. The whole proof of an assignment: python course/kit.py prove 1"""

import ast
import base64
import gc
import importlib
import json
import os
import re
import sys
import zipfile
import zlib
from functools import cache
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

import tests.test_commands as commands
from tests.toy import write_lines
from utils.plumbing.config import ROOT

sys.path.insert(0, str(ROOT / "course"))

import board  # noqa: E402
import child  # noqa: E402
import kit  # noqa: E402
import prove  # noqa: E402
import staff  # noqa: E402
import trees  # noqa: E402
import wrong  # noqa: E402

NAMES = sorted(path.stem for path in (ROOT / "course").glob("a[1-6].py"))
TABLES = {name: child.load(ROOT / "course" / f"{name}.py") for name in NAMES}
MRR = "utils/metrics.py:mrr"  # a child of it imports no torch


@cache
def built(name):
    """The trees of an assignment's solution and skeleton."""
    solution = trees.solution_of(name, TABLES[name])
    return solution, trees.skeleton_of(solution, TABLES[name])


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Children that import numpy alone at their start, and are ended soon."""
    monkeypatch.setattr(child, "PRELOAD", ["numpy", "psutil"])


# ---------------------------------------------------------------- cut and graft
@pytest.mark.parametrize("name", NAMES)
def test_an_assignment_is_cut_without_a_trace(name):
    """70 points; every hole parses and says its name; no piece of a body is left."""
    table = TABLES[name]
    solution, skeleton = built(name)
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
        for *_, loses in trees.wrong_submissions(solution, table, task):  # their pieces are in the solution
            assert loses and {*loses} <= table.TASKS[task].keys(), task
    assert wrong.PREDICT[name](**kit.numbers_of(table, 1)).keys() == table.QUESTIONS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_handout_names_what_is_there(name):
    """Its files are in the folder, its commands and their flags exist, its points are those of the table."""
    texts = [(ROOT / "course" / f"{part}.md").read_text(encoding="utf-8") for part in (name, "working")]
    handout = "\n".join(texts)
    named = {*re.findall(r"\b(?:(?:utils|recipes|config|tests)/)?[\w/]+\.(?:py|yaml)\b", handout)}
    assert named <= {"kit.py", *built(name)[1]}
    found = 0
    for piece in re.split(r"[\n`;]", handout.replace("\\\n", " ")):
        for match in commands.COMMAND.finditer(piece.replace("kit.py", "course/kit.py")):
            if not match[1].startswith("make "):  # a word here
                commands.test_the_command_exists(f"course/{name}.md", match[1].strip())
                found += 1
    assert found > 5
    rows = re.findall(r"^\| (.*?) \| ([\d, ]+) \|", handout, re.M)
    shown = [int(number) for _, numbers in rows for number in numbers.split(", ")]
    assert shown == [*trees.points_of(TABLES[name]).values()]


def test_a_leak_is_found():
    """The check of the test before can fail: a removed line, pasted into another file of the kit."""
    solution, skeleton = built("a1")
    leak = skeleton["utils/text.py"] + b"\n# duplicates.discard((row, row *  width))\n"
    found = trees.leaks(solution, skeleton | {"utils/text.py": leak}, TABLES["a1"])
    assert {path for _, path, _ in found} == {"utils/text.py"}


def test_a_part_of_a_function_is_cut():
    source = built("a6")[1]["train_emdr2.py"].decode()
    body = ast.unparse(trees.find(source, "retriever_gradient"))
    assert "einsum" not in body and "log_prior_BK =" not in body
    assert "query, doc = " in body and "entropy = " in body


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
    assert not fault and names["double"](4) == 8 and names["other"](5) == 5
    assert names["LIMIT"] == 3 and "cmath" in names


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
    ("got", "wanted", "sealed", "own"),
    [
        ([1.0, 2.0], [1.0, 2.0 + 1e-12], "", ""),
        ([3.0, 6.0, 9.0], [1.0, 2.0, 3.0], "3 times what is asked for", ""),
        ([2.0, 1.0, 7.0], [1.0, 2.0, 7.0], "the same numbers in another order", ""),
        ([1.0, np.nan], [1.0, 2.0], "NaN or infinity", ""),
        ([1.0, 2.0], [1.0, np.inf], "a finite number in the place of an infinite one", ""),
        ([1.0, np.inf], [1.0, np.inf], "", ""),
        ([1.0], [1.0, 2.0], "shape [1], asked for [2]", ""),
        ([0.0, 0.0], [1.0, 2.0], "off by 1 of the largest entry", ""),
        (6.0, 2.0, "off by 2 of what is asked for", "got 6.0, asked for 2.0"),
        (True, False, "1 of 1 entries differ", "got True, asked for False"),
        (3, 4, "1 of 1 entries differ", "got 3, asked for 4"),
        ([True, 3.0], [1, 3], "", ""),
        ([1, 4], [1, 3], "1 of 2 entries differ", "[1] got 4, asked for 3"),
        ("[1]", "[1]", "", ""),
        ("[[1, 2], [true]]", "[[1, 2], [false]]", "other entries", "[1][0] got True, asked for False"),
        ("[1]", "[1, 2]", "other entries", "got [1], asked for [1, 2]"),
        ("[1]", [1], "other entries", ""),
        ("[1]", [1.0], "other entries", ""),
        ("no json", "[1]", "other entries", ""),
    ],
)
def test_a_difference_is_named(got, wanted, sealed, own):
    """The wanted number is told for a student's own numbers alone. own: "" where both read the same."""
    arrays = {"x": np.array(got)}, {"x": np.array(wanted)}
    for aloud, words in ((False, sealed), (True, own or sealed)):
        assert kit.verdict(*arrays, "", aloud) == (words and f"x: {words}")


# ---------------------------------------------------------------- the child
DRIVERS = """
TASKS = {"mine.py:double": ["answer"]}
def answer(rng, double):
    return {"twice": double(rng.standard_normal(3)), "list": [1, 2]}
"""


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
        ("    print('hello'); return 2 * x", ""),
    ],
)
def test_a_hostile_function_gets_a_sentence(monkeypatch, body, words):
    """And the next child, whose function is right, sends its arrays; what is printed goes nowhere."""
    monkeypatch.setattr(child, "MEMORY", 800_000_000)
    files = {"mine.py": f"def double(x):\n{body}\n".encode(), "a.py": DRIVERS.encode()}
    found, fault, _ = child.outputs(files, "a", "mine.py:double", [5], 2 if "while" in body else 60)
    rng = np.random.default_rng([5, zlib.crc32(b"answer")])
    wanted = {"twice": 2 * rng.standard_normal(3), "list": np.array("[1, 2]")}
    seen = kit.verdict(found.get((5, "answer")), wanted, fault, aloud=False)
    assert bool(seen) == bool(words) and words in seen


# ---------------------------------------------------------------- prove and grade
# tasks whose drivers take milliseconds once torch is there, and end on every wrong answer
QUICK = {
    "a1": "in_batch_loss excluded_pairs learning_rate_factor positive_ranks",
    "a2": "grad_cache_step chunk_seed in_chunks",
    "a3": "fetch as_lists has_answer topk_accuracy mrr ndcg hybrid",
    "a4": "wrong_for topk denoise pseudo_label teleport rotating_negatives",
    "a5": "find_spans reader_loss best_spans exact_match f1",
    "a6": "log_likelihood fused_log_likelihood retriever_loss kl_loss",
}


def ran(table, task, source, seed=1):
    """What the drivers of a task return on the function in a source, in this process."""
    path, name, *_ = child.parts(task)
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    names = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(source, path, "exec"), names)
    found = {}
    for check in table.TASKS[task]:
        rng = np.random.default_rng([seed, zlib.crc32(check.encode())])
        try:
            values = getattr(table, check)(rng, names[name])
            found[check] = {key: child.plain(value) for key, value in values.items()}
        except Exception as error:
            found[check] = {"error": child.describe(error, "")}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_wrong_and_right_answers(name):
    """
    Every wrong answer to a quick function loses the checks named for it and no other, a constant all, right
    ones none. No check has the same answer at two seeds.
    """
    gc.freeze()  # a driver collects garbage: what torch made at import is left out, as in a child
    table = TABLES[name]
    solution, _ = built(name)
    for task, path, function in trees.tasks_of(table):
        if function not in QUICK[name].split():
            continue
        source = solution[path].decode()
        key = ran(table, task, source)
        other = ran(table, task, source, seed=2)
        assert prove.alike({(s, c): f[c] for s, f in enumerate((key, other)) for c in f}) == []
        cases = [("a constant", trees.replace_body(source, function, ["return 0"]), key)]
        for what, files, loses in trees.wrong_submissions(solution, table, task):
            cases.append((what, files[path], loses))
        for what, text in wrong.RIGHT[task]:
            grafted, fault = trees.graft(source, text, function)
            cases.append((what, grafted or fault, []))
        for what, text, loses in cases:
            found = ran(table, task, text)
            lost = [check for check in key if kit.verdict(found[check], key[check], "", True)]
            assert {*lost} == {*loses}, (task, what)
    gc.unfreeze()


def test_a_small_function_is_proved():
    """Solution, stub, wrong and other right answers, and the variant of a function: in children."""
    lines = [*prove.prove("a3", tasks=[MRR], attacks=False)]
    assert [what for what, fault in lines if fault] == []
    kinds = ("wrong", "right", "variant", "the stub")
    counts = [sum(f": {kind}" in what for what, _ in lines) for kind in kinds]
    assert counts == [len(wrong.WRONG[MRR]), 1, 1, 3]
    with pytest.raises(SystemExit, match="no task has 'mmr' in its name: .*:mrr, "):
        list(prove.prove("a3", tasks=["mmr"]))


def test_an_answer_that_is_the_same_at_two_seeds_is_a_fault(monkeypatch):
    """Where the grader would count a constant as right. It would also be right at every sealed seed."""
    answers = {"counted": (3, 3), "rounded": (3.0, 3.0 + 1e-12), "drawn": (3.0, 3.1)}
    key = {(seed, c): {"x": np.array(x)} for c, pair in answers.items() for seed, x in enumerate(pair)}
    monkeypatch.setattr(trees, "keys_of", lambda *_: (key, {}))
    lines = dict(islice(prove.prove("a3", tasks=[MRR]), 4))
    assert lines["no check has the same answer at two seeds"] == "counted, rounded"


@pytest.fixture
def small(monkeypatch):
    """Assignment 3 with one function."""
    keys = {"SHIP": ["utils/metrics.py"], "DROP": [], "SHOWN": [], "TASKS": {MRR: TABLES["a3"].TASKS[MRR]}}
    table = SimpleNamespace(**vars(TABLES["a3"]) | keys)
    monkeypatch.setattr(child, "load", lambda path: table)
    return table


def make(out, hints=False, open=False, variant=""):
    keys = {"assignment": "a3", "student": "s1", "out": str(out)}
    staff.make(SimpleNamespace(**keys, hints=hints, open=open, variant=variant))


def hand_in(folder, student, files):
    """Write {path: text} as a student's folder."""
    files = {"kit.json": json.dumps({"student": student})} | files
    child.write_tree({path: text.encode() for path, text in files.items()}, folder / student)


def grade(folder, sealed, variant=""):
    """Grade folder/in; return the rows of folder/grades."""
    keys = {"folder": str(folder / "in"), "sealed": str(sealed), "out": str(folder / "grades")}
    staff.grade(SimpleNamespace(assignment="a3", variant=variant, **keys))
    return json.loads((folder / "grades/grades.json").read_text())


def test_a_term(small, tmp_path, monkeypatch, capsys):
    """seal, make, check, pack and grade: a wrong function costs its own points, and the mistake is named."""
    sealed, made = tmp_path / "new" / "a3.json", tmp_path / "s1"
    prove.seal(SimpleNamespace(assignment="a3", count=1, out=str(sealed)))
    make(made, hints=True, open=True)
    solution = (made / "solution/utils/metrics.py").read_text()
    assert "0 < rank <= cutoff" not in (made / "utils/metrics.py").read_text()
    assert "Do not" in (made / "AGENTS.md").read_text()

    # the student
    wrong_one = solution.replace("0 < rank <= cutoff else", "0 < rank < cutoff else")
    (made / "utils/metrics.py").write_text(wrong_one)
    monkeypatch.setattr(kit, "HERE", made)
    kit.check(SimpleNamespace(name="mrr", classroom=True))
    out, seen = capsys.readouterr()
    report = json.loads(base64.b64decode(out.rpartition("result=")[2]))
    assert [test["score"] for test in report["tests"]] == [0, 0.33] and report["max_score"] == 1.0
    assert "lost   mrr_cut" in seen and "holds  mrr_miss" in seen
    assert "comes out when   the cutoff itself does not count" in seen
    kit.predict(None)
    key = wrong.PREDICT["a3"](**kit.numbers_of(small, staff.seed_of("a3", "s1")))
    (made / "answers.json").write_text(json.dumps(key | {"ndcg": None}))
    kit.pack(None)
    packed = zipfile.ZipFile(made / "a3_s1.zip").namelist()
    assert {"utils/metrics.py", "kit.json", "answers.json"} <= {*packed}

    # the staff; a file that is no zip is said, and is graded as nothing
    (tmp_path / "in").mkdir()
    (made / "a3_s1.zip").rename(tmp_path / "in" / "s1.zip")
    (tmp_path / "in" / "broken.zip").write_text("no zip")
    rows = {(row["file"], row["check"]): row for row in grade(tmp_path, sealed)}
    points = {check: (row["points"], row["of"]) for (file, check), row in rows.items() if file == "s1"}
    assert points == {"mrr_cut": (0, 2), "mrr_miss": (1, 1), "answers.json": (7.5, 10)}
    cut = rows["s1", "mrr_cut"]
    assert cut["cause"] == "the cutoff itself does not count"
    assert "asked for 0." in cut["seen"] and cut["sealed"].startswith("mrr: off by")
    assert rows["broken", "mrr_miss"]["seen"] == "utils/metrics.py was not handed in"
    grades = tmp_path / "grades"
    assert "8.5 of 80" in (grades / "feedback" / "s1.txt").read_text()
    assert len((grades / "grades.csv").read_text().splitlines()) == 7
    tests = json.loads((grades / "gradescope" / "s1.json").read_text())["tests"]
    assert sum(test["score"] for test in tests) == 8.5 and sum(test["max_score"] for test in tests) == 13


@pytest.mark.parametrize("graded", [0, 1])
def test_a_grading_that_is_cut_short_leaves_all_rows(small, tmp_path, monkeypatch, graded):
    """Gradescope stops what takes too long: what was graded counts, the rest has 0 of its points."""

    def first_row(*_):
        if graded:
            yield staff.blank_rows(small)[0] | {"points": 2, "seen": "", "sealed": ""}
        raise TimeoutError

    monkeypatch.setattr(staff, "grade_one", first_row)
    hand_in(tmp_path / "in", "s1", {})
    (tmp_path / "sealed.json").write_text('{"seeds": [7]}')
    with pytest.raises(TimeoutError):
        grade(tmp_path, tmp_path / "sealed.json")
    tests = json.loads((tmp_path / "grades/gradescope/s1.json").read_text())["tests"]
    assert [(test["score"], test["max_score"]) for test in tests] == [
        (graded * 0.67, 0.67), (graded * 1.33, 1.33), (0, 0.33), (0, 0.67), (0, 10)
    ]  # fmt: skip


def test_a_variant_is_made_and_graded(small, tmp_path):
    """The folder has the variant's docstring; its body keeps all points, the public body loses them."""
    variant = str(ROOT / "course/variants/a3.py")
    make(tmp_path / "s1", variant=variant)
    theirs = trees.find((ROOT / "course/variants/a3.py").read_text(), "mrr")
    shown = trees.find((tmp_path / "s1/utils/metrics.py").read_text(), "mrr")
    assert ast.get_docstring(shown) == ast.get_docstring(theirs)
    kit_json = (tmp_path / "s1/kit.json").read_text()
    public = (ROOT / "utils/metrics.py").read_text()
    for name, source in (("public", public), ("own", ast.unparse(theirs))):
        hand_in(tmp_path / "in", name, {"kit.json": kit_json, "utils/metrics.py": source})
    (tmp_path / "sealed.json").write_text('{"seeds": [7]}')
    points = {"own": 0, "public": 0}
    for row in grade(tmp_path, tmp_path / "sealed.json", variant):
        points[row["file"]] += row["points"]
    assert points["own"] == 3 and points["public"] <= 0.4 * 3


def test_a_seed_that_hides_a_wrong_answer_is_not_sealed(small, monkeypatch):
    """At seed 1 a wrong answer loses what it must; one that gives the right numbers there is a fault."""
    what, old, new, loses = wrong.WRONG[MRR][0]
    monkeypatch.setitem(wrong.WRONG, MRR, [(what, old, new, loses), ("hidden", old, old, loses)])
    faults, outputs = prove.faults_at("a3", small, trees.solution_of("a3", small), 1)
    assert faults == [f"{MRR}: hidden"] and {number for number, _ in outputs} == {0, 1}


def test_the_outputs_of_other_systems():
    """A recorded example of Gradescope's results.json, and of what GitHub Classroom's reporter reads."""
    row = {"task": "f.py:g", "check": "c", "points": 1.0, "of": 3}
    row |= {"seen": "", "sealed": "off by 2", "cause": ""}
    seen = {"name": "f.py:g c", "number": "1.1", "score": 1.0, "max_score": 1.0}
    seen |= {"status": "passed", "output": "", "visibility": "visible"}
    sealed = {"name": "f.py:g c, other seeds", "number": "1.2", "score": 0.0, "max_score": 2.0}
    sealed |= {"status": "failed", "output": "off by 2", "visibility": "after_due_date"}
    whole = {"tests": [seen, sealed], "visibility": "visible", "stdout_visibility": "hidden"}
    assert staff.gradescope([row]) == whole
    text = kit.classroom([("f.py:g", "c", 0.0, 1 / 3, "off by 2", "")])
    test = {"name": "f.py:g c", "status": "fail", "message": "off by 2", "score": 0.0, "max_score": 0.33}
    whole = {"version": 1, "status": "fail", "max_score": 0.33, "tests": [test]}
    assert json.loads(base64.b64decode(text)) == whole


def corpus_of(folder, count=30):
    corpus = [f"{i}\tthe {i}th text holds word{i}\ttitle{i}\n" for i in range(count)]
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(corpus))
    return str(folder / "corpus.tsv")


def asked(**changes):
    question = {"question": "what is it", "answers": ["word3"], "title": "title3"}
    return json.dumps(question | changes) + "\n"


def test_students_questions_are_checked(tmp_path, capsys):
    """A question with a fault is said and left out; the board's file has no answers."""
    spelled = asked(question="is it word4", answers=["word4"], title="title4")
    elsewhere = asked(answers=["word9"], title="title5")
    for student, text in (("s1", asked() + spelled), ("s2", elsewhere), ("s3", asked(answers=[]))):
        hand_in(tmp_path / "in", student, {"questions.jsonl": text})
    keys = {"folder": str(tmp_path / "in"), "corpus": corpus_of(tmp_path), "out": str(tmp_path / "out")}
    board.questions(SimpleNamespace(**keys))
    said = capsys.readouterr().out
    assert "s1.jsonl:2: an answer stands in the question" in said and "s3: not a question" in said
    assert "s2.jsonl:1" in said and "1 questions of 2 students; 2 have a fault" in said
    shown = json.loads((tmp_path / "out/board.jsonl").read_text())
    assert shown == {"qid": "s1-1", "question": "what is it"}
    sealed = json.loads((tmp_path / "out/sealed.jsonl").read_text())
    assert sealed == shown | {"answers": ["word3"], "positives": ["3"]}


def test_the_board(tmp_path, monkeypatch, capsys):
    """An entry has the board's questions alone. It gets 5 points if it gains on the questions of others."""
    qids = [f"s{i % 6}-{i}" for i in range(24)]
    rows = []
    for i, qid in enumerate(qids):
        rows.append({"qid": qid, "question": "x", "answers": [f"word{i}"], "positives": [str(i)]})
    write_lines(tmp_path / "sealed.jsonl", rows)

    def ranked(shift):
        return "".join(f"{qid}\t{(i + shift) % 30}\t1\t2.0\n" for i, qid in enumerate(qids))

    # a student's folder
    made = tmp_path / "made"
    files = {"good.run": ranked(0) + "other\t1\t1\t2.0\n", "a1.py": ""}
    hand_in(tmp_path, "made", files | {"kit.json": '{"assignment": "a1", "student": "s1"}'})
    write_lines(made / "board.jsonl", [{"qid": qid} for qid in qids])
    monkeypatch.setattr(kit, "HERE", made)
    kit.board(SimpleNamespace(file=str(made / "good.run")))
    assert "24 of 24" in capsys.readouterr().out and (made / "board.run").read_text() == ranked(0)

    # the staff's table
    answers = json.dumps({qid: f"word{i}" for i, qid in enumerate(qids)})
    for student, files in {
        "s1": {"board.run": (made / "board.run").read_text()},
        "s2": {"board.answers.json": answers},
        "s3": {"board.run": "nonsense", "board.answers.json": json.dumps({qids[0]: 5})},
        "s4": {"board.run": ranked(7)},
    }.items():
        hand_in(tmp_path / "in", student, files)
    (tmp_path / "base.run").write_text(ranked(7))
    files = {"questions": str(tmp_path / "sealed.jsonl"), "corpus": corpus_of(tmp_path)}
    board.table(SimpleNamespace(table=str(tmp_path / "in"), baseline=str(tmp_path / "base.run"), **files))
    _, *lines = capsys.readouterr().out.splitlines()
    assert re.search(r"s1 +n 20  MRR@10 100.0 .* \+100.0 .* 5$", lines[0])
    assert re.search(r"s2 +n 20  EM 100.0 .* \+100.0 .* 5$", lines[1])
    assert all("s3" in line and "no entry" in line for line in lines[2:4])
    assert re.search(r"s4 +n 20  MRR@10 0.0 .* 0$", lines[4])


def test_what_a_child_left_does_not_stop_the_grading(tmp_path):
    key = tmp_path / "key.npz"
    np.savez(key, **{"1|value|x": np.ones(2)})
    assert child.read_outputs(key)[1, "value"]["x"].tolist() == [1, 1]
    (tmp_path / "link.npz").symlink_to(key)
    os.mkfifo(tmp_path / "pipe.npz")
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as file:
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000000,), }"
        header = (header.ljust(117) + "\n").encode()
        file.writestr("1|value|x.npy", b"\x93NUMPY\x01\x00" + bytes([len(header), 0]) + header)
    for name in ("link", "pipe", "large"):
        assert child.read_outputs(tmp_path / f"{name}.npz") == {}, name
    os.link(key, tmp_path / "second.npz")
    assert child.read_outputs(tmp_path / "second.npz") == {}
