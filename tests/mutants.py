"""
Does a test notice every wrong answer in course/answers/? In a copy of the tree with it, a test must fail.

First all tests run on the right code, in both orders: they must pass, and their seconds say which are quick.

Run: python -m tests.mutants         all of them; exit code 1 if one is not noticed
     python -m tests.mutants utils/search.py:fetch mine_negatives.py:topk
"""

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "course"))
from trees import wrong_submissions  # noqa: E402
from wrong import WRONG  # noqa: E402

# the tests of a module
TESTS = {
    "train_dpr.py": "train_dpr grad_cache trainers",
    "train_reader.py": "train_reader",
    "train_emdr2.py": "train_emdr2",
    "test_dpr.py": "retrieval",
    "mine_negatives.py": "mine_negatives",
    "utils/distributed.py": "grad_cache train_dpr doc2embedding trainers",
    "utils/encoder.py": "encoder grad_cache train_dpr",
    "utils/fid.py": "fid train_emdr2",
    "utils/grad_cache.py": "grad_cache train_dpr",
    "utils/live_index.py": "live_index",
    "utils/metrics.py": "metrics retrieval",
    "utils/reader.py": "train_reader answer",
    "utils/search.py": "search retrieval",
    "utils/text.py": "text languages",
}


class QuickFirst:
    """Sorts tests by the seconds of an earlier run, {test: seconds}; writes this run's, and what failed."""

    def __init__(self, seconds, out):
        self.seconds, self.out = seconds, out
        self.now = collections.Counter()
        self.failed = ""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report):
        self.now[report.nodeid] += report.duration
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_sessionfinish(self):
        self.out.write_text(json.dumps({"seconds": self.now, "failed": self.failed}))


def run_tests(tree, names, seconds):
    """Run test_NAME.py in a copy of the tree: {"seconds", "failed": the first that failed, or "", "log"}."""
    (tree / "report.json").unlink(missing_ok=True)
    process = os.fork()  # why not a new python: this one has torch loaded
    if process == 0:
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        del sys.modules["tests"]  # the package of this tree
        sink = os.open(tree / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        files = [f"tests/test_{name}.py" for name in names]
        plugin = QuickFirst(seconds, tree / "report.json")
        os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files], [plugin]))
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    log = (tree / "log.txt").read_text()[-2000:]
    assert (tree / "report.json").is_file(), log
    report = json.loads((tree / "report.json").read_text())
    # why not the code alone: pytest also ends with 1 where a file cannot be collected
    assert code == bool(report["failed"]), f"pytest ended with {code}: {log}"
    return report | {"log": log}


def main():
    tasks = [task for task in WRONG if any(name in task for name in sys.argv[1:] or [""])]
    assert tasks, f"no task has such a name; the tasks are {', '.join(WRONG)}"
    import accelerate  # noqa: F401
    import faiss  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in files.splitlines() if not name.startswith("results/")]
    missed = count = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        paths = {task: task.partition(":")[0] for task in tasks}
        names = {name: None for path in paths.values() for name in TESTS[path].split()}
        seconds = {}
        for _ in ("in the given order", "the quick ones first"):
            right = run_tests(tree, names, seconds)
            assert not right["failed"], f"fails on the right code: {right['log']}"
            seconds = right["seconds"]
        for task, path in paths.items():
            source = (ROOT / path).read_bytes()
            for what, files, _ in wrong_submissions({path: source}, None, task):
                (tree / path).write_bytes(files[path])
                failed = run_tests(tree, TESTS[path].split(), seconds)["failed"]
                print(f"{'red ' if failed else 'GREEN'} {task}: {what} | {failed}", flush=True)
                missed += not failed
                count += 1
            (tree / path).write_bytes(source)
    print(f"{count - missed} of {count} wrong answers are noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
