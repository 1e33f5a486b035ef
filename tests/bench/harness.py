"""What the benchmarks share: ways that take turns, a median with its range, a peer's process, flags."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).resolve().parents[2]
ANSWER = "answer:"  # begins a line that a peer writes for us


def parser(doc):
    """Return an argument parser with the flags of all benchmarks."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeat", "--rounds", type=int, default=5, help="turns")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    return options


def take_turns(ways, repeat, warm_up=1, wait=lambda: None):
    """
    Return {name: seconds of `repeat` turns} for {name: function}. Every other turn goes backwards.

    A slow minute of the machine hits all ways. A way that returns a float has read the clock itself. wait():
    is called before the clock is read (a GPU is still at work when a function returns).
    """
    seconds = {name: [] for name in ways}
    for turn in range(-warm_up, repeat):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            wait()
            began = time.perf_counter()
            own = ways[name]()
            wait()
            spent = time.perf_counter() - began
            if turn >= 0:
                seconds[name].append(own if isinstance(own, float) else spent)
    return seconds


def spread(values, digits=2):
    """Return "median (smallest-largest)"."""
    numbers = statistics.median(values), min(values), max(values)
    median, low, high = (f"{number:,.{digits}f}" for number in numbers)
    return f"{median} ({low}-{high})"


def ratios(slow, fast, digits=2):
    """Return the spread of slow / fast within a turn."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)], digits)


def profile(work, rows):
    """Return the operations that work() spends most time in: their shares, and how often each is called."""
    gpu = torch.cuda.is_available()
    work()
    kind = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
    events = profiler.key_averages()
    times = [event.self_device_time_total if gpu else event.self_cpu_time_total for event in events]
    total = sum(times)  # microseconds
    lines = [f"operations take {total / 1e6 / spent:.2f} of the time; of theirs:"]
    for took, event in sorted(zip(times, events, strict=True), key=lambda pair: -pair[0])[:rows]:
        lines.append(f"  {took / total:6.1%} in {event.count:6} x {event.key[:90]}")
    return "\n".join(lines)


class Peer:
    """A way in a process of its own, which waits between its turns. A call takes one turn."""

    def __init__(self, python, *arguments):
        command = [python, "-W", "ignore", *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.answer()  # it is ready

    def __call__(self):
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        """Return what follows ANSWER in the next such line: packages print lines of their own."""
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        sys.exit("error: a way ended early; its message is above")

    def end(self):
        """Let the process end; what it wrote can still be read."""
        self.process.stdin.close()
        self.process.wait()
