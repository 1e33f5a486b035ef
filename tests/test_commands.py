"""
Commands are code: every one in README, recipes, configs and docstrings names scripts, files and flags that
exist.
"""

import re

import pytest
import yaml

from utils.plumbing.config import ROOT

TEXTS = [
    ROOT / "README.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("recipes/**/*.sh"),
    *ROOT.glob("config/*.yaml"),
    *(p for p in ROOT.glob("*.py")),
    *ROOT.glob("utils/*.py"),
    *ROOT.glob("recipes/**/*.py"),
    *ROOT.glob("tests/bench/*.py"),
]


COMMAND = re.compile(
    r"(?:^|[\s`(])("
    r"(?:accelerate launch|torchrun|\.venv/bin/python|python3?) (?:--?\w\S* |[\d.]+ )*"  # launcher flags
    r"(?:[\w/]*\b\w+\.py\b|-m [\w.]+)[^`#]*"
    r"|bash \S+\.sh|make \w+)"
)


def commands():
    """
    (file, command) for every line that runs python, accelerate, torchrun, bash or make in one of our texts.
    """
    found = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r"[`;]", line):
                for match in COMMAND.finditer(part):
                    found.append((path.relative_to(ROOT), match[1].strip()))
    return found


FOUND = commands()


def test_there_are_commands():
    """The walk finds the commands that it is meant to guard."""
    assert len(FOUND) > 40 and any(str(path) == "README.md" for path, _ in FOUND)


def schema_keys(script):
    """The keys a script takes: those of the yaml that it hands to load_config, or of its argparse."""
    text = (ROOT / script).read_text(encoding="utf-8")
    schema = re.search(r'load_config\([^)]*"(config/[\w]+\.yaml)"', text)
    if schema and "argparse" not in text:
        return {*yaml.safe_load((ROOT / schema[1]).read_text()), "config", "help", "debug"}
    flags = set(re.findall(r'add_argument\(\s*f?"--(\w+)"', text)) | {"help", "debug"}
    if 'f"--{name}"' in text:  # flags made in a loop
        flags |= set(re.findall(r'"(\w+)"', text)) | set(re.findall(r"(\w+)=\d", text))
    return flags | schema_keys("prepare/convert.py") if script == "utils/data.py" else flags


@pytest.mark.parametrize(("path", "command"), FOUND, ids=[f"{p}-{i}" for i, (p, _) in enumerate(FOUND)])
def test_the_command_exists(path, command):
    """Script or module, config file and every flag exist; a make target stands in the Makefile."""
    words = [word.strip("\"'`,;()") for word in re.sub(r"\s\(.*", "", command).split()]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file() or (ROOT / path.parent / words[1]).is_file(), command
        return
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    script = words[at] if words[at] != "-m" else words[at + 1].replace(".", "/") + ".py"
    if words[at] == "-m" and not script.startswith("utils/"):
        return  # pytest, venv, pip
    assert (ROOT / script).is_file(), f"{path}: {command}"
    for flag, value in zip(words[at + 1 :], [*words[at + 2 :], ""], strict=False):
        if flag.startswith("--"):
            key, _, joined = flag[2:].partition("=")
            assert key in schema_keys(script), f"{path}: {script} has no flag {flag}"
            if key == "config" and value != "..." and not value.startswith("$"):
                assert (ROOT / (joined or value)).is_file(), f"{path}: {value}"


def test_no_path_of_a_machine_and_no_stub():
    """Nothing in the repository names somebody's home folder, and nothing only looks done."""
    for path in [*TEXTS, *ROOT.glob("tests/*.py")]:
        if path.name == "test_commands.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(work|home|root)/\w", text), path
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), path
        assert not re.search(r"(?<![\w.])eval\(|pickle\.load\(|except:", text), path


def test_the_readme_is_whole():
    """No place holder is left, and every file that it links to exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
