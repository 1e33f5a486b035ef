"""
The course kit. An assignment is a folder of this repository's code in which some functions have no body.

Students, in that folder:
  python kit.py check [NAME]      run the public checks of all functions, or of those whose name holds NAME
  python kit.py predict           print the questions that are answered before any code is written
  python kit.py pack              zip what is handed in
  python kit.py board FILE        make the entry for the board from a .run or .answers.json
Staff, in the repository: python course/kit.py make | prove | seal | grade | board --table   (course/staff.py)

The solution is the answer key. A driver is a function of a1.py, a2.py ... It calls the student's function
with numbers drawn from a seed and returns arrays. Drivers run in a child process that holds no expected
number: only the arrays come back, and this process compares them with those of the solution.
"""

import argparse
import base64
import builtins
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from child import load, outputs, read_outputs

HERE = Path(__file__).resolve().parent
PUBLIC_SHARE = 1 / 3  # of the points of a check; the rest is for seeds that the student has not seen
BOARD = ["questions.jsonl", "board.run", "board.answers.json"]
SECTIONS = {"code": 70, "predict": 10, "experiment": 15, "board": 5}


# ---------------------------------------------------------------- comparing
def difference(got, wanted):
    """Return "" where two arrays are the same, else how they differ, without the number that is wanted."""
    if wanted.dtype.kind == "U" or got.dtype.kind == "U":
        if got.dtype.kind == wanted.dtype.kind and got.shape == wanted.shape and (got == wanted).all():
            return ""
        return "other entries"
    if got.dtype.kind not in "fiub":
        return "no numbers"
    if got.shape != wanted.shape:
        return f"shape {list(got.shape)}, asked for {list(wanted.shape)}"
    # why by type: the solution's own rounding is 1e-16 in float64 and 1e-7 in float32; counts are exact
    tolerance = {"float64": 1e-9, "float32": 1e-5}.get(str(wanted.dtype), 0.0)
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.nan_to_num(got)[~finite], np.nan_to_num(wanted)[~finite]):
        return "a finite number in the place of an infinite one"
    if not np.isfinite(got[finite]).all():
        return "NaN or infinity"
    got, wanted = got[finite], wanted[finite]
    scale = np.abs(wanted).max(initial=0.0)
    error = np.abs(got - wanted).max(initial=0.0)
    if error <= tolerance * scale:
        return ""

    # what kind of difference it is
    if scale and np.abs(got).max() > 0:
        factor = (got * wanted).sum() / (wanted * wanted).sum()
        if got.size > 1 and np.abs(got - factor * wanted).max() <= 1e-5 * np.abs(got).max():
            return f"{factor:.4g} times what is asked for"
    if np.allclose(np.sort(got), np.sort(wanted), rtol=1e-5):
        return "the same numbers in another order"
    if tolerance == 0:
        return f"{(got != wanted).sum()} of {got.size} entries differ"
    entry = "what is asked for" if got.size == 1 else "the largest entry"
    return f"off by {error / max(scale, 1e-300):.2g} of {entry}"


def told(got, wanted):
    """Return "got ..., asked for ...", of lists the first entry that differs; "" where that says little."""
    if (wanted.dtype.kind == "f" and wanted.size > 1) or got.nbytes > 1e6:
        return ""
    try:
        got, wanted = (json.loads(str(x)) if x.dtype.kind == "U" else x.tolist() for x in (got, wanted))
    except (ValueError, RecursionError):  # not what a child writes
        return ""
    where = ""
    while isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        unlike = [i for i in range(len(got)) if got[i] != wanted[i]]
        if not unlike:
            return ""
        where += f"[{unlike[0]}]"
        got, wanted = got[unlike[0]], wanted[unlike[0]]
    return f"{where}{' ' if where else ''}got {str(got)[:60]}, asked for {str(wanted)[:60]}"


def verdict(got, wanted, fault, aloud):
    """
    Return "" for a driver whose arrays are right, else what was seen.

    aloud: with an error's own words, and with what was asked for; for the student's own numbers alone.
    """
    if got is None:
        return fault
    if "error" in got:
        if got["error"].shape != (3,) or got["error"].dtype.kind != "U":
            return "an error"
        kind, words, where = (str(text) for text in got["error"])
        if aloud:
            return f"{kind}: {words} ({where})"
        # why so strict: an error's words, or a name made for it, could read our other functions aloud
        kind = kind if hasattr(builtins, kind) else "an error"
        return f"{kind} ({where})" if re.fullmatch(r"[\w/]{1,40}\.py:\d{1,4}", where) else kind
    for part in wanted:
        if part not in got:
            return f"no {part}"
        if seen := difference(got[part], wanted[part]):
            return f"{part}: {aloud and told(got[part], wanted[part]) or seen}"
    return ""


def read_causes(path, seed):
    """Return {(task, number of a wrong answer): its arrays at a seed}; {} where there is no such file."""
    wrong = {}
    for (i, driver), arrays in read_outputs(path).items():
        task, check = driver.split(">")
        wrong.setdefault((task, i), {})[seed, check] = arrays
    return wrong


def explain(task, seed, got, table, wrong):
    """Return what is known to give the very arrays of `got` at a seed, "" where nothing or more than one."""
    causes = []
    for i, cause in enumerate(table):
        arrays = {name: parts for (_, name), parts in wrong.get((task, i), {}).items()}
        mine = {name: parts for (at, name), parts in got.items() if at == seed}
        unlike = arrays.keys() != mine.keys() or any("error" in parts for parts in arrays.values())
        if not unlike and not any(verdict(mine[n], arrays[n], "", False) for n in arrays):
            causes.append(cause)
    return causes[0] if len(causes) == 1 else ""


# ---------------------------------------------------------------- students
def student_folder():
    """Return (kit.json, the table of the assignment) of the folder this file lies in."""
    if not (HERE / "kit.json").is_file():
        sys.exit("error: this is the repository; `python course/kit.py make` makes a folder to work in")
    made = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    return made, load(HERE / f"{made['assignment']}.py")


def tasks_named(table, names):
    """Return the tasks that have one of `names` in their name."""
    for name in names:
        if not any(name in task for task in table.TASKS):
            sys.exit(f"error: no task has {name!r} in its name: {', '.join(table.TASKS)}")
    return [task for task in table.TASKS if any(name in task for name in names)]


def public_results(made, table, name=""):
    """Yield (task, check, points, of, what was seen, the cause if it is known) at the student's own seed."""
    key = read_outputs(HERE / "public.npz")
    wrong = read_causes(HERE / "causes.npz", made["seed"])
    files = {path: (HERE / path).read_bytes() for path in made["files"] if (HERE / path).is_file()}
    for task in tasks_named(table, [name]):
        checks = table.TASKS[task]
        limit = 60 + 30 * made["seconds"][task]
        got, fault, _ = outputs(files, made["assignment"], task, [made["seed"]], limit)
        cause = explain(task, made["seed"], got, made["causes"].get(task, []), wrong)
        for check, (points, *_) in checks.items():
            place = (made["seed"], check)
            seen = verdict(got.get(place), key[place], fault, aloud=True)
            of = points * PUBLIC_SHARE
            yield task, check, 0.0 if seen else of, of, seen, cause


def check(args):
    """Say for each check what was asked and what was seen; --classroom prints GitHub Classroom's line."""
    made, table = student_folder()
    rows = []
    for row in public_results(made, table, args.name):
        task, name, points, of, seen, cause = row
        if not rows or rows[-1][0] != task:
            print(f"\n{task}", file=sys.stderr)
        rows.append(row)
        _, asked, read = table.TASKS[task][name]
        print(f"  {'lost' if seen else 'holds':6} {name:20} {asked}", file=sys.stderr)
        if seen:
            print(f"         seen       {seen}", file=sys.stderr)
            if cause:
                print(f"         comes out when   {cause}", file=sys.stderr)
            if read:
                print(f"         read       {read}", file=sys.stderr)
        sys.stderr.flush()
    total, most = (sum(row[i] for row in rows) for i in (2, 3))
    print(f"\n{total:.1f} of {most:.1f} public points. The rest is for other seeds.", file=sys.stderr)
    if args.classroom:
        print(f"result={classroom(rows)}")


def classroom(rows):
    """Return the base64 that GitHub Classroom's grading reporter adds up (KIT_RESULTS)."""
    tests = []
    for task, name, points, of, seen, _ in rows:
        status = "fail" if seen else "pass"
        title = f"{task} {name}"
        tests.append({"name": title, "status": status, "message": seen, "score": round(points, 2)})
        tests[-1]["max_score"] = round(of, 2)
    most = round(sum(row[3] for row in rows), 2)
    status = "fail" if any(row[4] for row in rows) else "pass"
    text = json.dumps({"version": 1, "status": status, "max_score": most, "tests": tests})
    return base64.b64encode(text.encode()).decode()


def numbers_of(table, seed):
    """Return the numbers of a student's predict questions."""
    return table.numbers(np.random.default_rng([seed, 1]))


def predict(args):
    """Print the questions, and make answers.json where it is not there yet."""
    made, table = student_folder()
    numbers = numbers_of(table, made["seed"])
    for name, question in table.QUESTIONS.items():
        print(f"{name}: {question.format(**numbers)}")
    path = HERE / "answers.json"
    if not path.exists():
        path.write_text(json.dumps(dict.fromkeys(table.QUESTIONS), indent=1) + "\n", encoding="utf-8")
    print("write your numbers into answers.json, before you write any code")


def pack(args):
    """Zip the files with holes, the answers, the report and the board's entry, and say what is in it."""
    made, table = student_folder()
    holes = dict.fromkeys(task.partition(":")[0] for task in table.TASKS if ":" in task)
    path = HERE / f"{made['assignment']}_{made['student']}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in [*holes, "kit.json", "answers.json", "report.md", *BOARD]:
            there = (HERE / name).is_file()
            print(f"{'packed' if there else 'not there':10} {name}")
            if there:
                file.write(HERE / name, name)
    print(f"written: {path.name}")


def board(args):
    """Copy what answers the questions of board.jsonl to board.run or board.answers.json."""
    made, _ = student_folder()
    if not (HERE / "board.jsonl").is_file():
        sys.exit("error: board.jsonl is missing; the staff give it out")
    lines = (HERE / "board.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {json.loads(line)["qid"] for line in lines if line.strip()}
    if args.file.endswith(".run"):
        rows = Path(args.file).read_text(encoding="utf-8").splitlines()
        rows = [row for row in rows if row.split("\t")[0] in asked]
        found = {row.split("\t")[0] for row in rows}
        (HERE / "board.run").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    else:
        answers = json.loads(Path(args.file).read_text(encoding="utf-8"))
        found = answers.keys() & asked
        kept = {qid: answers[qid] for qid in sorted(found)}
        (HERE / "board.answers.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print(f"{len(found)} of {len(asked)} questions of the board")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("check", help="run the public checks")
    command.add_argument("name", nargs="?", default="")
    command.add_argument("--classroom", action="store_true", help="print GitHub Classroom's result line too")
    command.set_defaults(run=check)
    commands.add_parser("predict", help="print the questions").set_defaults(run=predict)
    commands.add_parser("pack", help="zip what is handed in").set_defaults(run=pack)
    if (HERE / "staff.py").is_file():
        load(HERE / "staff.py").add_commands(commands)
    else:
        command = commands.add_parser("board", help="make the entry for the board")
        command.add_argument("file", help="a .run or .answers.json")
        command.set_defaults(run=board)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
