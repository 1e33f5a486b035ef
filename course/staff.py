"""
The staff's side of the course kit. kit.py adds these commands where this file lies beside it.

python course/kit.py make A --student ID --out FOLDER     a folder with holes in which a student can start
python course/kit.py prove A                              prove the grader with the wrong answers of wrong.py
python course/kit.py seal A --out FILE                    draw the secret seeds
python course/kit.py grade A FOLDER --sealed FILE         grade the zips of a folder
python course/kit.py board --table FOLDER --questions FILE --corpus FILE --baseline FILE

A tree is a dict {path: bytes}. A submission is a tree of the files with holes. Each function of it is grafted
alone into the solution, so a wrong function costs only its own points.
"""

import argparse
import ast
import csv
import hashlib
import json
import re
import secrets
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import kit  # noqa: E402
import wrong as answers  # noqa: E402

SEEDS = (1, 2)  # of prove, where no sealed seeds are given
PIECE = 28  # letters from which on a piece of a removed body counts as a leak
COMMON = ["LICENSE", "requirements.txt", "utils/__init__.py", "prepare/__init__.py"]


# ---------------------------------------------------------------- functions: cut, graft
def find(source, name):
    """Return the node of a top-level function; None where there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def body_lines(source, name):
    """Return (first, last) of the lines of a body without its docstring, from 0, the last excluded."""
    node = find(source, name)
    body = node.body[ast.get_docstring(node) is not None :]
    first = body[0].lineno - 1
    while source.split("\n")[first - 1].strip().startswith("#"):  # comments above the first statement
        first -= 1
    return first, body[-1].end_lineno


def replace_body(source, name, lines):
    """Return the source with other lines, not indented, as the body of a function; its docstring stays."""
    first, last = body_lines(source, name)
    body = ["    " + line if line else "" for line in lines]
    rows = source.split("\n")
    return "\n".join(rows[:first] + body + rows[last:])


def stub(name):
    return ["# yours", f'raise NotImplementedError("{name} is not written yet")']


def without(source, name):
    """Return the source without a function."""
    node = find(source, name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    rows = source.split("\n")
    return "\n".join(rows[: first - 1] + rows[node.end_lineno :])


def signature(node):
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return named, len(arguments.defaults)


def graft(ours, theirs, name):
    """
    Return (our source with their function `name`, "") or ("", why not).

    Their imports, and their functions, classes and constants that ours lacks, come along at the end.
    """
    try:
        node = find(theirs, name)
        their_tree = ast.parse(theirs)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "", f"the file does not parse: {error}"
    if node is None:
        return "", f"there is no function {name}"
    old = find(ours, name)
    if signature(node) != signature(old):
        return "", "the arguments were changed"
    body = node.body[ast.get_docstring(node) is not None :]
    if len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.dump(body[0]):
        return "", "not written yet"

    known = {getattr(n, "name", None) for n in ast.parse(ours).body}
    known |= {n.targets[0].id for n in ast.parse(ours).body if is_constant(n)}
    extra = []
    for n in their_tree.body:
        is_import = isinstance(n, ast.Import | ast.ImportFrom)
        is_new = isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name not in known
        if is_import or is_new or (is_constant(n) and n.targets[0].id not in known):
            text = ast.get_source_segment(theirs, n)
            if text not in ours:
                extra.append(text)
    rows, mine = ours.split("\n"), theirs.split("\n")
    rows = rows[: old.lineno - 1] + mine[node.lineno - 1 : node.end_lineno] + rows[old.end_lineno :]
    return "\n".join(rows + extra) + "\n", ""


def is_constant(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


# ---------------------------------------------------------------- trees
def closure(paths):
    """Return the files of this repository that Python files import, they themselves first."""
    found = {}
    waiting = [*paths]
    while waiting:
        path = waiting.pop(0)
        if path in found or not (ROOT / path).is_file():
            continue
        found[path] = (ROOT / path).read_bytes()
        if not path.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(found[path])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [name.replace(".", "/") + ".py" for name in names]
    return found


def tasks_of(table):
    """Yield (task, path, function) of the functions of an assignment, without "together"."""
    for task in table.TASKS:
        path, _, name = task.partition(":")
        if name:
            yield task, path, name


def solution_of(assignment, table, variant=""):
    """Return the tree of the solution; a variant is a file whose functions replace those of their name."""
    files = closure([*table.SHIP, *COMMON])
    files[f"{assignment}.py"] = (HERE / f"{assignment}.py").read_bytes()
    files["toys.py"] = (HERE / "toys.py").read_bytes()
    if variant:
        theirs = Path(variant).read_text(encoding="utf-8")
        for _, path, name in tasks_of(table):
            if find(theirs, name):
                source, fault = graft(files[path].decode(), theirs, name)
                if fault:
                    sys.exit(f"error: {variant}: {name}: {fault}")
                files[path] = source.encode()
    return files


def skeleton_of(solution, table):
    """Return the solution's tree with stubs as bodies, and without the functions of DROP."""
    files = dict(solution)
    for dropped in table.DROP:
        path, name = dropped.split(":")
        files[path] = without(files[path].decode(), name).encode()
    for _, path, name in tasks_of(table):
        files[path] = replace_body(files[path].decode(), name, stub(name)).encode()
    return files


def leaks(solution, skeleton, table):
    """Yield (task, path, piece) of every piece of a removed body that still stands in the skeleton."""
    flat = {path: " ".join(content.decode().split()) for path, content in skeleton.items()}
    for task, path, name in tasks_of(table):
        source = solution[path].decode()
        node = find(source, name)
        pieces = set()
        for statement in node.body[ast.get_docstring(node) is not None :]:
            for part in ast.walk(statement):
                if isinstance(part, ast.stmt | ast.expr):
                    pieces.add(" ".join(ast.get_source_segment(source, part).split()))
        for piece in sorted(pieces):
            for where, text in flat.items():
                if len(piece) >= PIECE and piece in text and not any(piece in s for s in table.SHOWN):
                    yield task, where, piece


def submission_of(path, table):
    """Return (kit.json, answers.json, {path: bytes} of the files with holes) of a zip or a folder."""
    files = {}
    wanted = {"kit.json", "answers.json", *(path for _, path, _ in tasks_of(table))}
    if Path(path).is_dir():
        for name in wanted:
            if (Path(path) / name).is_file():
                files[name] = (Path(path) / name).read_bytes()
    else:
        with zipfile.ZipFile(path) as file:
            for entry in file.infolist():
                if entry.filename in wanted and entry.file_size < 1e6:
                    files[entry.filename] = file.read(entry)
    return files


# ---------------------------------------------------------------- one task of one submission
def tree_with(solution, submission, table, task):
    """Return (the solution with the submission's function of a task, why it has none); together: with all."""
    tasks = [t for t in tasks_of(table) if task in (t[0], "together")]
    files = dict(solution)
    for _, path, name in tasks:
        if path not in submission:
            return files, f"{path} was not handed in"
        theirs = submission[path].decode("utf-8", "replace")
        source, fault = graft(files[path].decode(), theirs, name)
        if fault:
            return files, fault if task != "together" else f"{name}: {fault}"
        files[path] = source.encode()
    return files, ""


def seen_of(assignment, table, solution, submission, task, seeds, key, seconds):
    """Return ({(seed, check): what was seen, "" where it holds}, the child's arrays, seconds) of a task."""
    checks = [*table.TASKS[task]]
    files, fault = tree_with(solution, submission, table, task)
    if fault:
        return {(seed, check): fault for seed in seeds for check in checks}, {}, 0.0
    got, fault, took = kit.outputs(files, assignment, checks, seeds, seconds)
    seen = {}
    for seed in seeds:
        for check in checks:
            place = (seed, check)
            # an error's own words could read a file aloud
            seen[place] = kit.verdict(got.get(place), key[place], fault, aloud=False)
    return seen, got, took


def keys_of(assignment, table, solution, seeds):
    """Return ({(seed, check): arrays of the solution}, {task: seconds})."""
    key, seconds = {}, {}
    for task, checks in table.TASKS.items():
        found, fault, seconds[task] = kit.outputs(solution, assignment, [*checks], seeds)
        key |= found
        for seed in seeds:
            for check in checks:
                arrays = found.get((seed, check), {"error": [fault]})
                if "error" in arrays:
                    sys.exit(f"error: the solution fails {check} at seed {seed}: {arrays['error']}")
    return key, seconds


def wrong_submissions(solution, table, task):
    """Yield (what it is, {path: bytes}, the checks that it must lose) of the wrong answers to a task."""
    path, name = task.split(":")
    source = solution[path].decode()
    node = find(source, name)
    rows = source.split("\n")
    text = "\n".join(rows[node.lineno - 1 : node.end_lineno])
    for what, old, new, loses in answers.WRONG[task]:
        if text.count(old) != 1:
            sys.exit(f"error: wrong.py: {task}: {what}: {old!r} stands {text.count(old)} times")
        changed = rows[: node.lineno - 1] + [text.replace(old, new)] + rows[node.end_lineno :]
        yield what, {path: "\n".join(changed).encode()}, loses.split()


# ---------------------------------------------------------------- prove
ATTACKS = {
    "while True": ["while True:", "    pass"],
    "10 GB of memory": ["return [bytearray(b'x') * 10**9 for _ in range(10)]"],
    "sys.exit(0)": ["import sys", "sys.exit(0)"],
    "os._exit(0)": ["import os", "os._exit(0)"],
    "ends its parent": ["import os", "os.kill(os.getppid(), 9)"],
    "an object equal to everything": [
        "class Equal:",
        "    def __getattr__(self, name):",
        "        return self",
        "    def __eq__(self, other):",
        "        return True",
        "    def __call__(self, *given, **named):",
        "        return self",
        "    def __iter__(self):",
        "        return iter([self, self])",
        "return Equal()",
    ],
    "prints points": ["print('{\"score\": 70}')", "return 70.0, 70"],
    "reads the key": ["raise ValueError(open(KEY).read())"],
    "asks the system for the key": ["import subprocess", "return subprocess.check_output(['cat', KEY])"],
    "writes its own result": ["open('../out.npz', 'wb').write(b'70')", "import os", "os._exit(0)"],
}


def prove(assignment, seeds=SEEDS, tasks=None, attacks=True, seconds=None):
    """Yield (what must hold, "" or the fault); tasks: only these. Each line is the run of a child or two."""
    table = kit.load(HERE / f"{assignment}.py")
    solution = solution_of(assignment, table)
    skeleton = skeleton_of(solution, table)
    seeds = [*seeds]
    tasks = tasks or [*table.TASKS]

    # without running anything
    yield (
        "the points are 70",
        "" if sum(points_of(table).values()) == kit.SECTIONS["code"] else "they are not",
    )
    found = [f"{task} in {path}: {piece}" for task, path, piece in leaks(solution, skeleton, table)]
    yield "no piece of a removed body is left", "; ".join(found)
    for path, content in skeleton.items():
        if path.endswith(".py"):
            ast.parse(content)

    # the solution, twice
    key, took = keys_of(assignment, table, solution, seeds)
    again, _ = keys_of(assignment, table, solution, seeds)
    same = all(kit.flat(key)[name].tobytes() == a.tobytes() for name, a in kit.flat(again).items())
    yield "the solution gives the same bits twice", "" if same else "a driver draws outside of its generator"

    def lost(submission, task):
        limit = seconds or 20 + 10 * took[task]
        found, *_ = seen_of(assignment, table, solution, submission, task, seeds, key, limit)
        return {check: {s for s in seeds if found[s, check]} for check in table.TASKS[task]}, found

    for task in tasks:
        # the stub must lose every check where it is run, not only because it is known as a stub
        bare = {path: content for path, content in skeleton.items()}
        for path, content in bare.items():
            bare[path] = content.replace(
                b"    raise NotImplementedError(", b"    pass\n    raise ValueError("
            )
        losses, _ = lost(bare, task)
        kept = [check for check, at in losses.items() if len(at) < len(seeds)]
        yield f"{task}: the stub loses all", f"it keeps {kept}" if kept else ""
        if ":" not in task:
            continue
        for what, submission, named in wrong_submissions(solution, table, task):
            losses, _ = lost(submission, task)
            unlike = [c for c, at in losses.items() if len(at) != (len(seeds) if c in named else 0)]
            text = ", ".join(f"{c} lost at {len(losses[c])} of {len(seeds)} seeds" for c in unlike)
            yield f"{task}: wrong: {what}: loses {', '.join(named)}", text
        path, name = task.split(":")
        for what, text in answers.RIGHT[task]:
            submission = {path: text.encode()}
            losses, found = lost(submission, task)
            text = "; ".join(f"{c}: {next(filter(None, found.values()))}" for c, at in losses.items() if at)
            yield f"{task}: right: {what}: keeps all", text

    variant = HERE / "variants" / f"{assignment}.py"
    if variant.is_file():
        yield from prove_variant(assignment, table, variant, solution, seeds, tasks)
    if attacks:
        yield from prove_attacks(assignment, table, solution, seeds[:1], key)


def prove_variant(assignment, table, variant, solution, seeds, tasks):
    """Yield whether the public bodies lose at least 60 % of each task that a variant file changes."""
    varied = solution_of(assignment, table, variant)
    theirs = variant.read_text(encoding="utf-8")
    key, took = keys_of(assignment, table, varied, seeds)
    for task, _, name in tasks_of(table):
        if task in tasks and find(theirs, name):
            limit = 20 + 10 * took[task]
            found, *_ = seen_of(assignment, table, varied, solution, task, seeds, key, limit)
            points = {check: row[0] for check, row in table.TASKS[task].items()}
            gone = sum(points[c] for c in points if all(found[s, c] for s in seeds))
            share = gone / sum(points.values())
            fault = "" if share >= 0.6 else f"it loses {share:.0%}"
            yield f"{task}: variant: the public body loses 60 %", fault


def prove_attacks(assignment, table, solution, seeds, key):
    """Yield whether each attack on the first task gets 0 and a sentence, and costs no other task."""
    task, path, name = next(tasks_of(table))
    source = solution[path].decode()
    secret = str(HERE / "wrong.py")
    files = {"an empty file": b"", "a file that does not parse": b"def f(:\n", "no text": b"\xff\x00\xfe"}
    for what, lines in ATTACKS.items():
        lines = [line.replace("KEY", repr(secret)) for line in lines]
        files[what] = replace_body(source, name, lines).encode()
    for what, content in files.items():
        submission = {path: content}
        found, *_ = seen_of(assignment, table, solution, submission, task, seeds, key, 8)
        kept = [check for (_, check), seen in found.items() if not seen]
        yield f"attack: {what}: 0 points, {next(iter(found.values()))!r}", f"keeps {kept}" if kept else ""
    body = ["print('hello')", "import sys", "print('hello', file=sys.stderr)"]
    first, last = body_lines(source, name)
    right = [line[4:] for line in source.split("\n")[first:last]]
    submission = {path: replace_body(source, name, body + right).encode()}
    found, *_ = seen_of(assignment, table, solution, submission, task, seeds, key, 60)
    yield "a right function that prints keeps all", "; ".join(filter(None, found.values()))


def points_of(table):
    """Return {task: points}."""
    return {task: sum(row[0] for row in checks.values()) for task, checks in table.TASKS.items()}


def prove_command(args):
    begin = time.monotonic()
    seeds = json.loads(Path(args.sealed).read_text())["seeds"] if args.sealed else SEEDS
    counts = {}
    bad = 0
    for what, fault in prove(args.assignment, seeds, args.tasks):
        kind = next((k for k in ("wrong", "right", "variant", "attack", "stub") if f"{k}" in what), "other")
        counts.setdefault(kind, [0, 0])
        counts[kind][0] += not fault
        counts[kind][1] += 1
        bad += bool(fault)
        print(f"{'FAULT' if fault else 'ok':6} {what}{': ' + fault if fault else ''}", flush=True)
    table = ", ".join(f"{kind} {good} of {of}" for kind, (good, of) in counts.items())
    print(f"{args.assignment}: {table}; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(bad))


# ---------------------------------------------------------------- make
def seed_of(assignment, student):
    """Return the public seed of a student, from the id."""
    return int(hashlib.sha256(f"{assignment} {student}".encode()).hexdigest()[:12], 16)


def make(args):
    """Write the folder in which a student starts."""
    table = kit.load(HERE / f"{args.assignment}.py")
    solution = solution_of(args.assignment, table, args.variant)
    skeleton = skeleton_of(solution, table)
    for task, path, piece in leaks(solution, skeleton, table):
        sys.exit(f"error: {path} shows a piece of {task}: {piece}")
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty")
    seed = seed_of(args.assignment, args.student)
    key, seconds = keys_of(args.assignment, table, solution, [seed])
    kit.write_tree(skeleton, out)
    (out / "kit.py").write_bytes((HERE / "kit.py").read_bytes())
    (out / "README.md").write_bytes((HERE / f"{args.assignment}.md").read_bytes())
    np.savez(out / "public.npz", **kit.flat(key))
    causes = {}
    if args.hints:
        found = {}
        for task, i, what, arrays in wrong_outputs(args.assignment, table, solution, seed):
            causes.setdefault(task, []).append(what)
            found |= {(i, f"{task}>{check}"): parts for (_, check), parts in arrays.items()}
        np.savez(out / "causes.npz", **kit.flat(found))
    made = {"assignment": args.assignment, "student": args.student, "seed": seed, "seconds": seconds}
    made |= {"files": [*skeleton], "causes": causes}
    (out / "kit.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"written: {out}, {len(skeleton)} files; begin with its README.md")


def wrong_outputs(assignment, table, solution, seed):
    """Yield (task, number, what it is, {(seed, check): arrays}) of every wrong answer at a seed."""
    for task, *_ in tasks_of(table):
        for i, (what, submission, _) in enumerate(wrong_submissions(solution, table, task)):
            files, _ = tree_with(solution, submission, table, task)
            found, *_ = kit.outputs(files, assignment, [*table.TASKS[task]], [seed])
            yield task, i, what, found


# ---------------------------------------------------------------- seal
def seal(args):
    """Draw seeds until every wrong answer loses its checks at each; write them."""
    table = kit.load(HERE / f"{args.assignment}.py")
    solution = solution_of(args.assignment, table)
    seeds = []
    while len(seeds) < args.count:
        seed = secrets.randbelow(2**48)
        key, _ = keys_of(args.assignment, table, solution, [seed])
        faults = []
        for task, *_ in tasks_of(table):
            for what, submission, named in wrong_submissions(solution, table, task):
                found, *_ = seen_of(args.assignment, table, solution, submission, task, [seed], key, 60)
                if {check for (_, check), seen in found.items() if seen} != {*named}:
                    faults.append(f"{task}: {what}")
        print(f"a seed {'is not good for ' + faults[0] if faults else 'is good for all wrong answers'}")
        if not faults:
            seeds.append(seed)
    Path(args.out).write_text(json.dumps({"assignment": args.assignment, "seeds": seeds}) + "\n")
    print(f"written: {args.out}; keep it out of every folder that students can read")


# ---------------------------------------------------------------- grade
def grade_one(assignment, table, solution, sealed, submission):
    """
    Yield the rows of one submission, one a check: task, check, points, of, seen (public), sealed, cause.

    A third of the points is for the student's own seed, the rest for all sealed seeds together.
    """
    made = json.loads(submission.get("kit.json", b"{}"))
    public = seed_of(assignment, str(made.get("student", "")))
    seeds = [public, *sealed["seeds"]]
    key, took = keys_of(assignment, table, solution, seeds)
    for task, checks in table.TASKS.items():
        limit = 20 + 10 * took[task]
        found, got, _ = seen_of(assignment, table, solution, submission, task, seeds, key, limit)
        at, causes, wrong = sealed["explained"].get(task, (0, [], {}))
        cause = kit.explain(task, at, got, causes, wrong)
        for check, (points, *_) in checks.items():
            seen = found[public, check]
            hidden = next(filter(None, (found[seed, check] for seed in sealed["seeds"])), "")
            earned = (not seen) * kit.PUBLIC_SHARE + (not hidden) * (1 - kit.PUBLIC_SHARE)
            if not seen and all(found[seed, check] for seed in sealed["seeds"]):
                earned, hidden = 0.0, f"right for your own numbers only ({hidden})"
            row = {"task": task, "check": check, "points": round(points * earned, 2), "of": points}
            yield row | {"seen": seen, "sealed": hidden, "cause": cause if seen or hidden else ""}


def predict_row(assignment, table, submission):
    """Return the row of the predictions: their share of 10 points, each right within 1 %."""
    made = json.loads(submission.get("kit.json", b"{}"))
    try:
        given = json.loads(submission.get("answers.json", b"{}"))
    except ValueError:
        given = {}
    seed = seed_of(assignment, str(made.get("student", "")))
    wanted = answers.PREDICT[assignment](**kit.numbers_of(table, seed))
    right = []
    for name, value in wanted.items():
        mine = given.get(name) if isinstance(given, dict) else None
        if type(mine) in (int, float) and abs(mine - value) <= 0.01 * abs(value) + 1e-9:
            right.append(name)
    most = kit.SECTIONS["predict"]
    missing = ", ".join(name for name in wanted if name not in right)
    row = {"task": "predict", "check": "answers.json", "points": round(most * len(right) / len(wanted), 2)}
    return row | {"of": most, "seen": missing and f"not right: {missing}", "sealed": "", "cause": ""}


def feedback(student, rows, table):
    """Return the text that a student reads: each lost check with what was asked, seen, known, and to read."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        points, of = (sum(row[name] for row in mine) for name in ("points", "of"))
        lines.append(f"{task}   {points:g} of {of:g}")
        for row in mine:
            if row["points"] == row["of"]:
                continue
            _, asked, read = table.TASKS.get(task, {}).get(row["check"], (0, "your predictions", ""))
            lines.append(f"  lost {row['of'] - row['points']:g}  {asked}")
            seen = row["seen"] or f"other seeds: {row['sealed']}"
            for label, text in (("seen", seen), ("comes out when", row["cause"]), ("read", read)):
                if text:
                    lines.append(f"       {label:15} {text}")
    total = sum(row["points"] for row in rows)
    most = kit.SECTIONS["code"] + kit.SECTIONS["predict"]
    lines.append(f"{student}: {total:g} of {most}. Experiment and board are marked by people.")
    return "\n".join(lines) + "\n"


def gradescope(rows):
    """Return the dict of Gradescope's results.json: a test for the public and one for the sealed part."""
    tests = []
    for i, row in enumerate(rows, 1):
        parts = [("", 1.0, row["seen"], "visible")]
        if row["task"] != "predict":
            share = kit.PUBLIC_SHARE
            parts = [
                ("", share, row["seen"], "visible"),
                (", other seeds", 1 - share, row["sealed"], "after_due_date"),
            ]
        only_public = row["sealed"].startswith("right for your own")
        for n, (suffix, share, seen, visibility) in enumerate(parts, 1):
            most = round(row["of"] * share, 2)
            score = 0.0 if seen or only_public else most
            if row["task"] == "predict":
                score = row["points"]
            test = {"name": f"{row['task']} {row['check']}{suffix}", "number": f"{i}.{n}", "score": score}
            test |= {"max_score": most, "status": "failed" if seen else "passed", "output": seen}
            tests.append(test | {"visibility": visibility})
    return {"tests": tests, "visibility": "visible", "stdout_visibility": "hidden"}


def grade(args):
    """Grade every zip or folder in a folder; write grades.json, grades.csv, feedback/ and results/."""
    table = kit.load(HERE / f"{args.assignment}.py")
    solution = solution_of(args.assignment, table, args.variant)
    sealed = json.loads(Path(args.sealed).read_text())
    sealed["explained"] = {}
    if not args.variant:  # the wrong answers are those of the public text
        for task, i, what, arrays in wrong_outputs(args.assignment, table, solution, sealed["seeds"][0]):
            at, causes, found = sealed["explained"].setdefault(task, (sealed["seeds"][0], [], {}))
            causes.append(what)
            found[task, i] = arrays
    out = Path(args.out)
    for folder in ("feedback", "gradescope"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    everything = []
    places = [Path(args.folder)] if args.folder.endswith(".zip") else sorted(Path(args.folder).iterdir())
    for place in places:
        if not (place.is_dir() or place.suffix == ".zip"):
            continue
        name = re.sub(r"\W", "_", place.stem)
        try:
            submission = submission_of(place, table)
            student = str(json.loads(submission.get("kit.json", b"{}")).get("student", name))
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError, RuntimeError) as error:
            print(f"{place.name}: not readable ({type(error).__name__}), 0 points")
            submission, student = {}, name
        rows = []
        for row in grade_one(args.assignment, table, solution, sealed, submission):
            rows.append(row)
            # after every check, so that an overall time limit leaves the points so far
            text = json.dumps(gradescope(rows), indent=1)
            (out / "gradescope" / f"{name}.json").write_text(text)
        rows.append(predict_row(args.assignment, table, submission))
        (out / "gradescope" / f"{name}.json").write_text(json.dumps(gradescope(rows), indent=1))
        (out / "feedback" / f"{name}.txt").write_text(feedback(student, rows, table), encoding="utf-8")
        everything += [{"student": student} | row for row in rows]
        print(f"{student}: {sum(row['points'] for row in rows):g} of 80", flush=True)

    (out / "grades.json").write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["student", "task", "check", "points", "of", "seen", "sealed", "cause"])
        writer.writeheader()
        writer.writerows(everything)


# ---------------------------------------------------------------- board
def board_table(args):
    """Print each entry's score on the sealed questions and its paired gain over the baseline."""
    from recipes.compare import cell, per_question
    from utils.data import Corpus, read_questions
    from utils.metrics import bootstrap_interval
    from utils.plumbing.config import UserError

    questions = read_questions(args.questions)
    corpus = Corpus(args.corpus)
    base = per_question(args.baseline, questions, corpus)
    print(f"n = {len(questions)}; percent (95 % interval); gain over {Path(args.baseline).name}; 5 points")
    for path in sorted(Path(args.table).iterdir()):
        if path.suffix not in (".run", ".json"):
            continue
        try:
            values = per_question(path, questions, corpus)
        except (UserError, ValueError) as error:
            print(f"{path.name:30} no entry: {error}")
            continue
        metric = "EM" if "EM" in values else "MRR@10"
        gain = values[metric] - base[metric]
        earned = 5 if bootstrap_interval(gain)[0] > 0 else 0
        print(f"{path.name:30} {metric} {cell(values[metric])}  {cell(gain, signed=True)}  {earned}")


def add_commands(commands):
    """Add the staff's commands to the parser of kit.py."""
    assignment = re.compile(r"a?([1-6])")

    def of_number(text):
        match = assignment.fullmatch(text)
        if not match or not (HERE / f"a{match[1]}.py").is_file():
            raise argparse.ArgumentTypeError(f"there is no assignment {text}")
        return f"a{match[1]}"

    command = commands.add_parser("make", help="make a student's folder")
    command.add_argument("assignment", type=of_number)
    command.add_argument("--out", required=True, help="a new folder")
    command.add_argument("--student", default="me", help="an id; the public numbers depend on it")
    command.add_argument("--hints", action="store_true", help="check also names known mistakes")
    command.add_argument("--variant", default="", help="a file of functions that replace those of the text")
    command.set_defaults(run=make)
    command = commands.add_parser("prove", help="prove the grader")
    command.add_argument("assignment", type=of_number)
    command.add_argument("tasks", nargs="*", help="only these, such as train_dpr.py:in_batch_loss")
    command.add_argument("--sealed", default="", help="a file of seal")
    command.set_defaults(run=prove_command)
    command = commands.add_parser("seal", help="draw the secret seeds")
    command.add_argument("assignment", type=of_number)
    command.add_argument("--out", required=True)
    command.add_argument("--count", type=int, default=3)
    command.set_defaults(run=seal)
    command = commands.add_parser("grade", help="grade zips or folders")
    command.add_argument("assignment", type=of_number)
    command.add_argument("folder", help="a zip, or a folder of zips and folders")
    command.add_argument("--sealed", required=True, help="the file of seal")
    command.add_argument("--out", required=True)
    command.add_argument("--variant", default="")
    command.set_defaults(run=grade)
    command = commands.add_parser("board", help="print the board's table")
    command.add_argument("--table", required=True, help="a folder of entries")
    command.add_argument("--questions", required=True, help="with answers and positives")
    command.add_argument("--corpus", required=True)
    command.add_argument("--baseline", required=True)
    command.set_defaults(run=board_table)
