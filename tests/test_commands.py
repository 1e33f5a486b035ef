"""Commands are code: each one in README, docs, recipes, configs and docstrings names what exists."""

import functools
import re

import pytest
import yaml

from utils.plumbing.config import ROOT

TEXTS = [ROOT / "README.md"]
PATTERNS = "docs/*.md results/demo/*.md results/ladder_small/*.md recipes/**/*.sh config/*.yaml *.py"
for pattern in f"{PATTERNS} utils/**/*.py prepare/*.py recipes/**/*.py tests/bench/*.py".split():
    TEXTS += ROOT.glob(pattern)
OURS = ("utils", "prepare", "recipes")

COMMAND = re.compile(
    r"(?:^|[\s`(])("
    r"(?:accelerate launch|torchrun|\.venv/bin/python|python3?) (?:--?\w\S* |[\d.]+ )*"  # launcher flags
    r"(?:[\w/]*\b\w+\.py\b|-m [\w.]+)[^`#]*"
    r"|(?:[A-Z_0-9]+=\S+ )*bash \S+\.sh|make \w+)"
)


def commands():
    """(file, command) for every line that runs python, accelerate, torchrun, bash or make in our texts."""
    for path in TEXTS:
        # why not the log: it records what was run, with names of its day
        text = "" if path.name == "log.md" else path.read_text(encoding="utf-8").replace("\\\n", " ")
        for piece in re.split(r"[\n`;]", text):
            for match in COMMAND.finditer(piece):
                if path.suffix == ".md" or not match[1].startswith("make "):  # elsewhere "make" is a word
                    yield path.relative_to(ROOT), match[1].strip()


FOUND = list(commands())


@functools.cache
def keys_of(script):
    """The keys that a script takes: those of its full yaml, or of its argparse."""
    text = (ROOT / script).read_text(encoding="utf-8")
    full = re.search(r'load_config\([^)]*"(config/\w+\.yaml)"', text)
    flags = {*re.findall(r'add_argument\(\s*f?"--(\w+)"', text), "help", "debug"}
    if full:
        flags |= {*yaml.safe_load((ROOT / full[1]).read_text()), "config"}
    if 'f"--{name}"' in text:  # flags made in a loop
        flags |= {*re.findall(r'"(\w+)"', text), *re.findall(r"(\w+)=\d", text)}
    return flags


def check_bash(path, command):
    """The recipe exists, and reads every variable that is set in front of it, itself or in what it calls."""
    *settings, _, script = command.split()
    script = next(place / script for place in (ROOT, ROOT / path.parent) if (place / script).is_file())
    text = script.read_text()
    called = [ROOT / "recipes" / name for name in {*re.findall(r"\w+\.sh\b", text)}]
    text += "".join(recipe.read_text() for recipe in called if recipe.is_file())
    for name in {setting.partition("=")[0] for setting in settings} - {"CUDA_VISIBLE_DEVICES"}:
        assert re.search(rf"\$\{{?{name}\b", text), f"{path}: {script.name} has no {name}"


@pytest.mark.parametrize(("path", "command"), FOUND, ids=[f"{p}-{i}" for i, (p, _) in enumerate(FOUND)])
def test_the_command_exists(path, command):
    """Script or module, config file and every flag exist; a make target stands in the Makefile."""
    words = [word.strip("\"'`,;()") for word in re.sub(r"\s\(.*", "", command).split()]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    if "bash" in words:
        check_bash(path, command)
        return
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    script = words[at]
    if script == "-m":
        if words[at + 1].partition(".")[0] not in OURS:
            return  # pytest, venv, pip
        script = words[at + 1].replace(".", "/") + ".py"
    assert (ROOT / script).is_file(), f"{path}: {command}"
    for flag, value in zip(words[at + 1 :], [*words[at + 2 :], ""], strict=False):
        if flag.startswith("--"):
            key, _, joined = flag[2:].partition("=")
            assert key in keys_of(script), f"{path}: {script} has no flag {flag}"
            if key == "config" and value != "..." and not value.startswith("$"):
                assert (ROOT / (joined or value)).is_file(), f"{path}: {value}"


def test_there_are_commands():
    """The walk finds the commands that it is meant to guard."""
    assert len(FOUND) > 60 and any(str(path) == "README.md" for path, _ in FOUND)


def test_every_path_in_the_documents_exists():
    """Links, and files of ours that are named in backticks or in the README's tree."""
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*/README.md")]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"
        if path.name in ("log.md", "README.md") and path.parent.parent == ROOT / "results":
            continue  # what was run is told in the names of its day
        for target in re.findall(r"\b((?:utils|prepare|recipes|config|tests|docs)/[\w/]+\.\w+)", text):
            assert path.name == "log.md" or (ROOT / target).exists(), f"{path}: {target}"
    tree = re.search(r"```\n(train_dpr\.py .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    scripts = set(re.findall(r"^(\w+\.py)", tree, re.M))
    assert scripts == {path.name for path in ROOT.glob("*.py")}, "the tree has every script"


def test_the_readme_is_short():
    """A front page: at most 131 lines without the Python that converts files, at most 120 numbers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```python\n.*?```\n", "", text, flags=re.S)
    assert len(text.splitlines()) <= 131 and len(re.findall(r"\b\d[\d.,]*\b", text)) <= 120


def test_no_path_of_a_machine_and_no_stub():
    """Nothing in the repository names somebody's home folder, and nothing only looks done."""
    for path in [*TEXTS, *ROOT.glob("tests/*.py")]:
        if path.name == "test_commands.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(work|home|root)/\w", text), path
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text), path
        assert not re.search(r"(?<![\w.])eval\(|pickle\.load\(|except:", text), path
