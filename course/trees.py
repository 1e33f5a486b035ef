"""
Trees of the course kit: what is cut out of the solution, and how a student's function is put into it.

A tree is a dict {path: bytes}. A submission is a tree of the files with holes. Each function of it is grafted
alone into the solution, so a wrong function costs only its own points.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import child  # noqa: E402
import kit  # noqa: E402
import wrong  # noqa: E402

HANDED_IN = ["kit.json", "answers.json", *kit.BOARD]
PIECE = 28  # letters from which on a piece of a removed body counts as a leak
COMMON = ["LICENSE", "requirements.txt", "utils/__init__.py", "prepare/__init__.py"]
COMMON += ["recipes/demo/prepare.py", "recipes/compare.py", "config/train_dpr_demo.yaml"]
COMMON += [f"recipes/demo/{name}.jsonl" for name in ("train", "dev", "test")]


# ---------------------------------------------------------------- functions: cut, graft
def find(source, name):
    """Return the node of a top-level function; None where there is none."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def statements(source, name, first="", last=""):
    """Return the statements of a function without its docstring, or those from `first` to `last`."""
    node = find(source, name)
    body = node.body[ast.get_docstring(node) is not None :]
    if first:
        texts = [ast.get_source_segment(source, statement) for statement in body]
        (begin,), (end,) = ([i for i, text in enumerate(texts) if text.startswith(x)] for x in (first, last))
        body = body[begin : end + 1]
    return body


def body_lines(source, name, *region):
    """Return (first, last) of the lines of these statements, from 0, the last excluded."""
    body = statements(source, name, *region)
    first = body[0].lineno - 1
    while source.split("\n")[first - 1].strip().startswith("#"):  # comments above the first statement
        first -= 1
    return first, body[-1].end_lineno


def replace_body(source, name, lines, *region):
    """Return the source with other lines, not indented, in the place of these statements."""
    first, last = body_lines(source, name, *region)
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
    """Return these files of the repository, and what their Python imports or names (a script its config)."""
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
            if isinstance(node, ast.Constant) and str(node.value).startswith("config/"):
                waiting.append(node.value)
            waiting += [name.replace(".", "/") + ".py" for name in names]
    return found


def tasks_of(table):
    """Yield (task, path, function) of the functions of an assignment, without "together"."""
    for task in table.TASKS:
        path, name, *_ = child.parts(task)
        if name:
            yield task, path, name


def solution_of(assignment, table, variant="", only=""):
    """
    Return the tree of the solution. A variant is a file whose functions replace those of their name, or only
    the one of that name.
    """
    files = closure([*table.SHIP, *COMMON])
    files[f"{assignment}.py"] = (HERE / f"{assignment}.py").read_bytes()
    files["toys.py"] = (HERE / "toys.py").read_bytes()
    if variant:
        theirs = Path(variant).read_text(encoding="utf-8")
        for _, path, name in tasks_of(table):
            node = find(theirs, name)
            if node and only in ("", name):
                # alone: the other functions of the file are for other files
                text = "\n".join(theirs.split("\n")[node.lineno - 1 : node.end_lineno])
                source, fault = graft(files[path].decode(), text, name)
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
    for task, path, name in tasks_of(table):
        files[path] = replace_body(files[path].decode(), name, stub(name), *child.parts(task)[2:]).encode()
    return files


def segment(rows, node):
    """Return the text of a node in a file's lines (bytes), its white space made single."""
    # why not ast.get_source_segment: it goes through the whole file, letter by letter, for each node
    part = rows[node.lineno - 1 : node.end_lineno]
    part[-1] = part[-1][: node.end_col_offset]
    part[0] = part[0][node.col_offset :]
    return " ".join(b"\n".join(part).decode().split())


def leaks(solution, skeleton, table):
    """Yield (task, path, piece) of every piece of a removed body that still stands in the skeleton."""
    flat = {path: " ".join(content.decode().split()) for path, content in skeleton.items()}
    for task, path, name in tasks_of(table):
        rows = solution[path].split(b"\n")
        pieces = set()
        for statement in statements(solution[path].decode(), name, *child.parts(task)[2:]):
            for part in ast.walk(statement):
                if isinstance(part, ast.stmt | ast.expr):
                    pieces.add(segment(rows, part))
        for piece in sorted(pieces):
            for where, text in flat.items():
                if len(piece) >= PIECE and piece in text and not any(piece in s for s in table.SHOWN):
                    yield task, where, piece


def submission_of(path, wanted):
    """Return {path: bytes} of the files that are wanted of a zip or a folder, each of up to 10 MB."""
    if Path(path).is_dir():
        there = [Path(path) / name for name in wanted]
        return {str(file.relative_to(path)): file.read_bytes() for file in there if file.is_file()}
    with zipfile.ZipFile(path) as file:
        entries = [entry for entry in file.infolist() if entry.filename in wanted and entry.file_size < 1e7]
        return {entry.filename: file.read(entry) for entry in entries}


def hand_ins(folder, more=()):
    """
    Yield (name, student, {path: bytes}) of every zip and folder in a folder, or of the one that it is itself.

    more: paths to read besides HANDED_IN. What cannot be read is said, and has no files.
    """
    folder = Path(folder)
    single = folder.suffix == ".zip" or (folder / "kit.json").is_file()
    for place in [folder] if single else sorted(folder.iterdir()):
        if not (place.is_dir() or place.suffix == ".zip"):
            continue
        name = re.sub(r"\W", "_", place.stem)
        try:
            files = submission_of(place, {*HANDED_IN, *more})
            student = str(json.loads(files.get("kit.json", b"{}")).get("student", name))
        except (OSError, ValueError, zipfile.BadZipFile, AttributeError, RuntimeError) as error:
            print(f"{place.name}: not readable ({type(error).__name__}), 0 points")
            files, student = {}, name
        yield name, student, files


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
    got, fault, took = child.outputs(files, assignment, task, seeds, seconds)
    seen = {}
    for seed in seeds:
        for check in checks:
            place = (seed, check)
            # an error's own words could read a file aloud
            seen[place] = kit.verdict(got.get(place), key[place], fault, aloud=False)
    return seen, got, took


def keys_of(assignment, table, solution, seeds, tasks=None):
    """Return ({(seed, check): arrays of the solution}, {task: seconds})."""
    key, seconds = {}, {}
    for task in tasks or table.TASKS:
        checks = table.TASKS[task]
        found, fault, seconds[task] = child.outputs(solution, assignment, task, seeds)
        key |= found
        for seed in seeds:
            for check in checks:
                arrays = found.get((seed, check), {"error": [fault]})
                if "error" in arrays:
                    sys.exit(f"error: the solution fails {check} at seed {seed}: {arrays['error']}")
    return key, seconds


def wrong_submissions(solution, table, task):
    """Yield (what it is, {path: bytes}, the checks that it must lose) of the wrong answers to a task."""
    path, name, *_ = child.parts(task)
    source = solution[path].decode()
    node = find(source, name)
    rows = source.split("\n")
    text = "\n".join(rows[node.lineno - 1 : node.end_lineno])
    for what, old, new, loses in wrong.WRONG[task]:
        if text.count(old) != 1:
            sys.exit(f"error: answers: {task}: {what}: {old!r} stands {text.count(old)} times")
        changed = rows[: node.lineno - 1] + [text.replace(old, new)] + rows[node.end_lineno :]
        yield what, {path: "\n".join(changed).encode()}, loses


def wrong_outputs(assignment, table, solution, seed):
    """Yield (task, number, what it is, {(seed, check): arrays}) of every wrong answer at a seed."""
    for task, *_ in tasks_of(table):
        for i, (what, submission, _) in enumerate(wrong_submissions(solution, table, task)):
            files, _ = tree_with(solution, submission, table, task)
            found, *_ = child.outputs(files, assignment, task, [seed])
            yield task, i, what, found


def points_of(table):
    """Return {task: points}."""
    return {task: sum(row[0] for row in checks.values()) for task, checks in table.TASKS.items()}
