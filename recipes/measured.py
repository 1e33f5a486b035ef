"""
Run a command as it is, and note what it cost: its seconds, and the memory of its largest process.

Run: python recipes/measured.py runs/x/peaks.tsv runs/x/embeddings/manifest.json sleep 1
Out: a line `output \\t script \\t seconds \\t MB` (10^6 bytes) at the end of the .tsv, also after a failure.
     A stage that was stopped and continued has several lines, which add up

A signal is handed on, once. The exit code is the command's; 128 + number when a signal ended it. Of several
processes the largest counts, not their sum. The trainers' own log lines have a GPU's memory.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.plumbing.config import UserError, friendly_errors  # noqa: E402

PR_SET_PDEATHSIG = 1  # from: linux/prctl.h


def end_with_parent():
    """Ask Linux to send SIGTERM to the command when this process is killed: no trainer runs on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def name_of(command):
    """Return the script or module that an argv runs, `train_dpr.py` or `utils.bm25`, or its first word."""
    for i, word in enumerate(command):
        if word == "-m" or word.endswith(".py"):
            return " ".join(command[i + 1 : i + 2]) if word == "-m" else word
    return command[0]


def main(table, output, *command):
    began = time.monotonic()
    # why a group of its own: Ctrl-C goes to a whole group, and would come twice with what is handed on; a
    # trainer's second signal does not wait for the checkpoint
    try:
        child = subprocess.Popen(command, process_group=0, preexec_fn=end_with_parent)
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}; is its folder in PATH?") from None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _: child.poll() is None and os.killpg(child.pid, number))
    code = child.wait()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    megabytes = peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    Path(table).parent.mkdir(parents=True, exist_ok=True)
    with open(table, "a", encoding="utf-8") as file:
        file.write(f"{output}\t{name_of(command)}\t{time.monotonic() - began:.1f}\t{megabytes:.0f}\n")
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) < 4:
            raise UserError("usage: python recipes/measured.py PEAKS_TSV OUTPUT COMMAND ...")
        main(*sys.argv[1:])
