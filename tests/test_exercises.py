"""The exercises name code by its content: each statement, test and import of docs/exercises.md exists."""

import ast
import re

from tests.test_commands import keys_of
from utils.plumbing.config import ROOT

TEXT = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
FILES = [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("tests/*.py")]
CODE = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}


def test_what_is_deleted_or_replaced_stands_in_its_file_once():
    """Delete `X`, Replace `X` by `Y`: X is in the last file that was named before, and there only once."""
    changes = re.findall(r"`([\w/]+\.py)`|\b(?:[Dd]elete|[Rr]eplace)\s`([^`]+)`", TEXT)
    path, found = "", 0
    for name, statement in changes:
        path = name or path
        if statement:
            found += 1
            code = re.sub(r"\s+", "", CODE[path])  # the exercises are wrapped elsewhere than the code
            assert code.count(re.sub(r"\s+", "", statement)) == 1, f"{path}: {statement}"
    assert found >= 9


def test_every_function_and_test_that_is_named_exists():
    """`file.py`, `function`; the file that pytest is given, the words of -k, and the tests of the answers."""
    for path, functions in re.findall(r"Read `([\w/]+\.py)`((?:,\s`\w+`)*)", TEXT):
        assert all(f"def {name}(" in CODE[path] for name in re.findall(r"`(\w+)`", functions)), functions
    runs = re.findall(r'pytest (?:-s )?(tests/\w+\.py)(?:\s-k\s(\w+|"[^"]+"))?', TEXT)
    assert len(runs) == TEXT.count("-m pytest") >= 12
    for path, words in runs:
        for word in {*re.findall(r"[\w.]+", words)} - {"and", "or"}:
            assert word in CODE[path], f"{path}: nothing for -k {word}"
    tests = "".join(code for path, code in CODE.items() if path.startswith("tests/"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", TEXT))


def test_the_scripts_import_what_is_there():
    """Each script between <<'E' and E compiles; what it takes from our modules is in them."""
    scripts = re.findall(r"<<'E'\n(.*?)^E$", TEXT, re.M | re.S)
    assert len(scripts) == TEXT.count("<<'E'") >= 5
    for node in (node for script in scripts for node in ast.walk(ast.parse(script))):
        code = CODE.get(str(getattr(node, "module", "")).replace(".", "/") + ".py")
        for alias in node.names if code and isinstance(node, ast.ImportFrom) else []:
            assert re.search(
                rf"^(def {alias.name}\b|class {alias.name}\b|.*import.*\b{alias.name}\b)", code, re.M
            )


def test_short_names_stand_for_flags_of_their_scripts():
    """D="--key ...": each script that is given $D knows each key; tests/test_commands.py cannot see them."""
    short = dict(re.findall(r'^([A-Z])="(--.+)"$', TEXT, re.M))
    uses = re.findall(r"python (\w+\.py)([^`\n]*)", TEXT)
    seen = {(script, name) for script, rest in uses for name in re.findall(r"\$([A-Z])\b", rest)}
    assert {name for _, name in seen} == short.keys() and short
    for script, name in seen:
        assert {*re.findall(r"--(\w+)", short[name])} <= keys_of(script), f"{script}: ${name}"
