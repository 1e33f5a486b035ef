"""
The staff's side of the course kit. kit.py adds these commands where this file lies beside it.

python course/kit.py make A --student ID --out FOLDER     a folder with holes in which a student can start
python course/kit.py prove A                              prove the grader with the wrong answers of wrong.py
python course/kit.py seal A --out FILE                    draw the secret seeds
python course/kit.py grade A FOLDER --sealed FILE --out FOLDER      grade what was handed in
python course/kit.py questions FOLDER --corpus FILE --out FOLDER    check and collect the students' questions
python course/kit.py board --table FOLDER --questions FILE --corpus FILE --baseline FILE

trees.py cuts and grafts, prove.py proves, wrong.py has the wrong answers, board.py the board.
"""

import argparse
import csv
import hashlib
import json
import re
import sys
from itertools import chain
from pathlib import Path

import board
import child
import kit
import numpy as np
import prove
import trees
import wrong

from utils.plumbing.files import write_json  # trees.py has put the repository on sys.path

HERE = trees.HERE
WAITING = "not graded yet"


# ---------------------------------------------------------------- make
def seed_of(assignment, student):
    """Return the public seed of a student, from the id."""
    return int(hashlib.sha256(f"{assignment} {student}".encode()).hexdigest()[:12], 16)


def make(args):
    """Write the folder in which a student starts."""
    table = child.load(HERE / f"{args.assignment}.py")
    solution = trees.solution_of(args.assignment, table, args.variant)
    skeleton = trees.skeleton_of(solution, table)
    for task, path, piece in trees.leaks(solution, skeleton, table):
        sys.exit(f"error: {path} shows a piece of {task}: {piece}")
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty")
    seed = seed_of(args.assignment, args.student)
    key, seconds = trees.keys_of(args.assignment, table, solution, [seed])
    child.write_tree(skeleton, out)
    for name in ("kit.py", "child.py"):
        (out / name).write_bytes((HERE / name).read_bytes())
    texts = [(HERE / name).read_text(encoding="utf-8") for name in (f"{args.assignment}.md", "working.md")]
    (out / "README.md").write_text("\n".join(texts), encoding="utf-8")
    (out / "AGENTS.md").write_bytes((HERE / "assistants.md").read_bytes())
    if args.open:
        child.write_tree({path: solution[path] for _, path, _ in trees.tasks_of(table)}, out / "solution")
    np.savez(out / "public.npz", **child.flat(key))
    causes = {}
    if args.hints:
        found = {}
        for task, i, what, arrays in trees.wrong_outputs(args.assignment, table, solution, seed):
            causes.setdefault(task, []).append(what)
            found |= {(i, f"{task}>{check}"): parts for (_, check), parts in arrays.items()}
        np.savez(out / "causes.npz", **child.flat(found))
    made = {"assignment": args.assignment, "student": args.student, "seed": seed, "seconds": seconds}
    made |= {"files": [*skeleton], "causes": causes}
    write_json(out / "kit.json", made)
    print(f"written: {out}, {len(skeleton)} files; begin with its README.md")


# ---------------------------------------------------------------- grade
def blank_rows(table):
    """Return the rows of a submission of which nothing has been graded yet."""
    checks = [(task, check, row[0]) for task, checks in table.TASKS.items() for check, row in checks.items()]
    checks.append(("predict", "answers.json", kit.SECTIONS["predict"]))
    rest = {"seen": WAITING, "sealed": WAITING, "cause": ""}
    return [{"task": task, "check": check, "points": 0.0, "of": of} | rest for task, check, of in checks]


def grade_one(assignment, table, solution, sealed, submission):
    """
    Yield the rows of one submission, one a check: task, check, points, of, seen (public), sealed, cause.

    A third of the points is for the student's own seed, the rest for all sealed seeds together.
    """
    made = json.loads(submission.get("kit.json", b"{}"))
    public = seed_of(assignment, str(made.get("student", "")))
    seeds = [public, *sealed["seeds"]]
    for task, checks in table.TASKS.items():
        key, took = {}, {task: 0.0}
        _, fault = trees.tree_with(solution, submission, table, task)
        if not fault:
            key, took = trees.keys_of(assignment, table, solution, seeds, [task])
        limit = 20 + 10 * took[task]
        found, got, _ = trees.seen_of(assignment, table, solution, submission, task, seeds, key, limit)
        causes = [what for what, *_ in wrong.WRONG.get(task, [])]
        cause = kit.explain(task, sealed["seeds"][0], got, causes, sealed["wrong"])
        for check, (points, *_) in checks.items():
            seen, mine = found[public, check], got.get((public, check), {"error": ""})
            if seen and "error" not in mine:  # its numbers are public
                seen = kit.verdict(mine, key[public, check], "", aloud=True)
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
    wanted = wrong.PREDICT[assignment](**kit.numbers_of(table, seed))
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
    """Grade what was handed in; write grades.json, grades.csv, feedback/ and gradescope/."""
    table = child.load(HERE / f"{args.assignment}.py")
    solution = trees.solution_of(args.assignment, table, args.variant)
    sealed = json.loads(Path(args.sealed).read_text(encoding="utf-8"))
    sealed["wrong"] = {}
    if not args.variant:  # the wrong answers are those of the public text
        path = Path(args.sealed).with_suffix(".npz")
        sealed["wrong"] = kit.read_causes(path, sealed["seeds"][0])
    out = Path(args.out)
    for folder in ("feedback", "gradescope"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    everything = []
    paths = [path for _, path, _ in trees.tasks_of(table)]
    for name, student, submission in trees.hand_ins(args.folder, paths):
        rows = blank_rows(table)
        graded = grade_one(args.assignment, table, solution, sealed, submission)
        last = [predict_row(args.assignment, table, submission)]
        # written at once and after every check, so that an overall time limit leaves the points so far
        results = out / "gradescope" / f"{name}.json"
        write_json(results, gradescope(rows))
        for i, row in enumerate(chain(graded, last)):
            rows[i] = row
            write_json(results, gradescope(rows))
        (out / "feedback" / f"{name}.txt").write_text(feedback(student, rows, table), encoding="utf-8")
        everything += [{"file": name, "student": student} | row for row in rows]
        print(f"{name}: {sum(row['points'] for row in rows):g} of 80", flush=True)

    write_json(out / "grades.json", everything)
    with open(out / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, everything[0] if everything else ["file", "student"])
        writer.writeheader()
        writer.writerows(everything)


# ---------------------------------------------------------------- the commands
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
    command.add_argument("--open", action="store_true", help="for self-study: the solution too, in solution/")
    command.add_argument("--variant", default="", help="a file of functions that replace those of the text")
    command.set_defaults(run=make)
    command = commands.add_parser("prove", help="prove the grader")
    command.add_argument("assignment", type=of_number)
    command.add_argument("tasks", nargs="*", help="only these, such as train_dpr.py:in_batch_loss")
    command.add_argument("--sealed", default="", help="a file of seal")
    command.set_defaults(run=prove.prove_command)
    command = commands.add_parser("seal", help="draw the secret seeds")
    command.add_argument("assignment", type=of_number)
    command.add_argument("--out", required=True)
    command.add_argument("--count", type=int, default=3)
    command.set_defaults(run=prove.seal)
    command = commands.add_parser("grade", help="grade zips or folders")
    command.add_argument("assignment", type=of_number)
    command.add_argument("folder", help="a zip, or a folder of zips and folders")
    command.add_argument("--sealed", required=True, help="the file of seal")
    command.add_argument("--out", required=True)
    command.add_argument("--variant", default="")
    command.set_defaults(run=grade)
    command = commands.add_parser("questions", help="check and collect the students' questions for the board")
    command.add_argument("folder", help="what was handed in, as for grade")
    command.add_argument("--corpus", required=True)
    command.add_argument("--out", required=True)
    command.set_defaults(run=board.questions)
    command = commands.add_parser("board", help="print the board's table")
    command.add_argument("--table", required=True, help="what was handed in, as for grade")
    command.add_argument("--questions", required=True, help="with answers and positives")
    command.add_argument("--corpus", required=True)
    command.add_argument("--baseline", required=True)
    command.set_defaults(run=board.table)
