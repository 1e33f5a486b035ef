"""
Prove the grader: what the solution, the stubs, the wrong and the other right answers, the variants and some
attacks get. And draw the secret seeds, at which every wrong answer loses what it must.
"""

import ast
import itertools
import json
import secrets
import sys
import time
from pathlib import Path

import child
import kit
import numpy as np
import trees
import wrong

SEEDS = (1, 2)  # where no sealed seeds are given
# how the lines of prove begin, for the counts
KINDS = {"stub": ": the stub", "wrong": ": wrong:", "right": ": right:", "variant": ": variant:"}
KINDS |= {"attack": "attack:"}


# ---------------------------------------------------------------- prove
NOTHING = ["raise ValueError", "return 0", "return []"]
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


def alike(key):
    """Return the checks in which the solution's answer is the same at two seeds: a constant is right too."""
    found = {}
    for (_, check), arrays in key.items():
        found.setdefault(check, []).append(arrays)
    pairs = {check: itertools.combinations(answers, 2) for check, answers in found.items()}
    return [c for c in pairs if any(not kit.verdict(*pair, "", aloud=False) for pair in pairs[c])]


def prove(assignment, seeds=SEEDS, tasks=None, attacks=True, seconds=None):
    """Yield (what must hold, "" or the fault); tasks: parts of their names. Each line runs a child or two."""
    table = child.load(trees.HERE / f"{assignment}.py")
    solution = trees.solution_of(assignment, table)
    skeleton = trees.skeleton_of(solution, table)
    seeds = [*seeds]
    tasks = kit.tasks_named(table, tasks or [""])

    # without running anything
    points = sum(trees.points_of(table).values())
    yield "the points are 70", "" if points == kit.SECTIONS["code"] else f"they are {points}"
    found = [f"{task} in {path}: {piece}" for task, path, piece in trees.leaks(solution, skeleton, table)]
    yield "no piece of a removed body is left", "; ".join(found)
    for path, content in skeleton.items():
        if path.endswith(".py"):
            ast.parse(content)

    # the solution, twice
    key, took = trees.keys_of(assignment, table, solution, seeds, tasks)
    again, _ = trees.keys_of(assignment, table, solution, seeds, tasks)
    same = all(child.flat(key)[name].tobytes() == a.tobytes() for name, a in child.flat(again).items())
    yield "the solution gives the same bits twice", "" if same else "a driver draws outside of its generator"
    yield "no check has the same answer at two seeds", ", ".join(alike(key))

    def lost(submission, task):
        limit = seconds or 20 + 10 * took[task]
        found, *_ = trees.seen_of(assignment, table, solution, submission, task, seeds, key, limit)
        return {check: {s for s in seeds if found[s, check]} for check in table.TASKS[task]}, found

    for task in tasks:
        # what does nothing must lose every check where it is run, not only because it is known as a stub
        for line in NOTHING:
            old, new = b"    raise NotImplementedError(", f"    {line}\n    raise ValueError(".encode()
            bare = {path: content.replace(old, new) for path, content in skeleton.items()}
            losses, _ = lost(bare, task)
            kept = [check for check, at in losses.items() if len(at) < len(seeds)]
            yield f"{task}: the stub loses all, with {line!r}", f"it keeps {kept}" if kept else ""
        if ":" not in task:
            # the other right answers, all at once
            submission = {}
            for other, path, name in trees.tasks_of(table):
                source = submission.get(path, solution[path]).decode()
                source, _ = trees.graft(source, wrong.RIGHT[other][0][1], name)
                submission[path] = source.encode()
            losses, found = lost(submission, task)
            seen = next(filter(None, found.values()), "")
            yield f"{task}: right: all other right answers at once: keep all", seen
            continue
        for what, submission, named in trees.wrong_submissions(solution, table, task):
            losses, _ = lost(submission, task)
            unlike = [c for c, at in losses.items() if len(at) != (len(seeds) if c in named else 0)]
            text = ", ".join(f"{c} lost at {len(losses[c])} of {len(seeds)} seeds" for c in unlike)
            yield f"{task}: wrong: {what}: loses {', '.join(named)}", text
        path, name, *_ = child.parts(task)
        for what, text in wrong.RIGHT[task]:
            submission = {path: text.encode()}
            losses, found = lost(submission, task)
            text = "; ".join(f"{c}: {next(filter(None, found.values()))}" for c, at in losses.items() if at)
            yield f"{task}: right: {what}: keeps all", text

    variant = trees.HERE / "variants" / f"{assignment}.py"
    if variant.is_file():
        yield from prove_variant(assignment, table, variant, solution, seeds, tasks)
    if attacks:
        yield from prove_attacks(assignment, table, solution, seeds[:1], key)


def prove_variant(assignment, table, variant, solution, seeds, tasks):
    """Yield whether the public bodies lose at least 60 % of each task that a variant file changes."""
    theirs = variant.read_text(encoding="utf-8")
    for task, _, name in trees.tasks_of(table):
        if task not in tasks or not trees.find(theirs, name):
            continue
        varied = trees.solution_of(assignment, table, variant, only=name)
        key, took = trees.keys_of(assignment, table, varied, seeds, [task])
        limit = 20 + 10 * took[task]
        found, *_ = trees.seen_of(assignment, table, varied, solution, task, seeds, key, limit)
        points = {check: row[0] for check, row in table.TASKS[task].items()}
        gone = sum(points[c] for c in points if all(found[s, c] for s in seeds))
        share = gone / sum(points.values())
        fault = "" if share >= 0.6 else f"it loses {share:.0%}"
        yield f"{task}: variant: the public body loses 60 %", fault


def prove_attacks(assignment, table, solution, seeds, key):
    """Yield whether each attack on the first task gets 0 and a sentence."""
    task, path, name = next(trees.tasks_of(table))
    source = solution[path].decode()
    secret = str(trees.HERE / "wrong.py")
    files = {"an empty file": b"", "a file that does not parse": b"def f(:\n", "no text": b"\xff\x00\xfe"}
    for what, lines in ATTACKS.items():
        lines = [line.replace("KEY", repr(secret)) for line in lines]
        files[what] = trees.replace_body(source, name, lines).encode()
    for what, content in files.items():
        submission = {path: content}
        found, *_ = trees.seen_of(assignment, table, solution, submission, task, seeds, key, 8)
        kept = [check for (_, check), seen in found.items() if not seen]
        yield f"attack: {what}: 0 points, {next(iter(found.values()))!r}", f"keeps {kept}" if kept else ""
    body = ["print('hello')", "import sys", "print('hello', file=sys.stderr)"]
    first, last = trees.body_lines(source, name)
    right = [line[4:] for line in source.split("\n")[first:last]]
    submission = {path: trees.replace_body(source, name, body + right).encode()}
    found, *_ = trees.seen_of(assignment, table, solution, submission, task, seeds, key, 60)
    yield "a right function that prints keeps all", "; ".join(filter(None, found.values()))


def prove_command(args):
    """Print a line for everything that must hold, and how many hold; exit code 1 where one does not."""
    begin = time.monotonic()
    seeds = json.loads(Path(args.sealed).read_text(encoding="utf-8"))["seeds"] if args.sealed else SEEDS
    counts = {}
    bad = 0
    for what, fault in prove(args.assignment, seeds, args.tasks, attacks=not args.tasks):
        kind = next((kind for kind, sign in KINDS.items() if sign in what), "other")
        counts.setdefault(kind, [0, 0])
        counts[kind][0] += not fault
        counts[kind][1] += 1
        bad += bool(fault)
        print(f"{'FAULT' if fault else 'ok':6} {what}{': ' + fault if fault else ''}", flush=True)
    table = ", ".join(f"{kind} {good} of {of}" for kind, (good, of) in counts.items())
    print(f"{args.assignment}: {table}; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(bad))


# ---------------------------------------------------------------- seal
def faults_at(assignment, table, solution, seed):
    """Return (wrong answers that do not lose what they must, {(number, task>check): arrays}) at a seed."""
    key, took = trees.keys_of(assignment, table, solution, [seed])
    faults, outputs = [], {}
    for task, *_ in trees.tasks_of(table):
        for i, (what, submission, named) in enumerate(trees.wrong_submissions(solution, table, task)):
            given = (assignment, table, solution, submission, task, [seed], key)
            found, got, _ = trees.seen_of(*given, seconds=20 + 10 * took[task])
            outputs |= {(i, f"{task}>{check}"): parts for (_, check), parts in got.items()}
            if {check for (_, check), seen in found.items() if seen} != {*named}:
                faults.append(f"{task}: {what}")
    return faults, outputs


def seal(args):
    """Draw seeds until every wrong answer loses its checks at each; write them."""
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    table = child.load(trees.HERE / f"{args.assignment}.py")
    solution = trees.solution_of(args.assignment, table)
    seeds, sealed, keys = [], {}, {}
    while len(seeds) < args.count:
        seed = secrets.randbelow(2**48)
        key, _ = trees.keys_of(args.assignment, table, solution, [seed])
        if same := alike(keys | key):
            print(f"a seed has the answer of another one in {same[0]}")
            continue
        faults, outputs = faults_at(args.assignment, table, solution, seed)
        print(f"a seed {'is not good for ' + faults[0] if faults else 'is good for all wrong answers'}")
        if not faults:
            seeds.append(seed)
            keys |= key
            sealed = sealed or outputs
    Path(args.out).write_text(
        json.dumps({"assignment": args.assignment, "seeds": seeds}) + "\n", encoding="utf-8"
    )
    np.savez(Path(args.out).with_suffix(".npz"), **child.flat(sealed))  # at the first seed, for the feedback
    print(f"written: {args.out}; keep it out of every folder that students can read")
