"""
Does a test notice every wrong answer in course/answers/? In a copy of the tree with it, a test must fail.

Run: python -m tests.mutants         all of them, about 15 seconds each; exit code 1 if one is not noticed
     python -m tests.mutants utils/search.py:fetch mine_negatives.py:topk
"""

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

# the tests of a module, the quick ones first
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


def is_noticed(tree, names):
    """Return whether a test of test_NAME.py fails in a copy of the tree."""
    process = os.fork()  # why not a new python: this one has torch loaded
    if process == 0:
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        del sys.modules["tests"]  # the package of this tree
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        files = [f"tests/test_{name}.py" for name in names]
        os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files]))
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1), f"pytest ended with {code}"  # 1: a test failed; 2 and more: no test ran
    return code == 1


def main():
    tasks = sys.argv[1:] or list(WRONG)
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
        for task in tasks:
            path = task.partition(":")[0]
            source = (ROOT / path).read_bytes()
            for what, files, _ in wrong_submissions({path: source}, None, task):
                (tree / path).write_bytes(files[path])
                noticed = is_noticed(tree, TESTS[path].split())
                print(f"{'red ' if noticed else 'GREEN'} {task}: {what}", flush=True)
                missed += not noticed
                count += 1
            (tree / path).write_bytes(source)
    print(f"{count - missed} of {count} wrong answers are noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
