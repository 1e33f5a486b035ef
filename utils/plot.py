"""
Curves of training runs as one picture: a panel a metric, a line a run (package matplotlib, without a screen).

In:  run_dir/metrics.jsonl: a row a step, a row an evaluation      Out: a PNG
Run: python -m utils.plot runs/emdr2_nq
     python -m utils.plot runs/sync runs/frozen --keys em,hit@5,index_age --out runs/refresh.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # why not pyplot: it keeps figures alive and looks for a screen

from utils.config import UserError, friendly_errors, nearest
from utils.files import atomic_file
from utils.lines import iter_jsonl

COLUMNS = 3
SHORT = 60  # points; a longer line is drawn as the mean over a fiftieth of it, its values pale behind


def read_rows(path):
    """The rows of a metrics.jsonl; UserError when there is none."""
    rows = [row for _, row in iter_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: no row in it; nothing was logged yet")
    return rows


def points(rows, key, over):
    """(x, y) arrays of the rows that have a number for both; a loss that was not finite is logged as null."""
    pairs = [(row.get(over), row.get(key)) for row in rows]
    pairs = [pair for pair in pairs if all(isinstance(number, int | float) for number in pair)]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def curves(runs, png, keys=(), over="step"):
    """
    Write a PNG with a panel for each of `keys`: its values over those of `over`, a line a run.

    runs: a metrics.jsonl, or {label: metrics.jsonl}. keys: names of the rows' numbers, in the order of the
    panels; () for all. A key that no row has gets no panel: without a dev set there is no em. UserError for
    a file without rows, and when no panel is left.
    """
    runs = runs if isinstance(runs, dict) else {"": runs}
    rows = {label: read_rows(path) for label, path in runs.items()}
    keys = keys or list(dict.fromkeys(key for one in rows.values() for row in one for key in row))
    lines = {key: {label: points(one, key, over) for label, one in rows.items()} for key in keys}
    lines = {key: of for key, of in lines.items() if key != over and any(x.size for x, _ in of.values())}
    if not lines:
        raise UserError(f"{png}: no row has {' or '.join(keys)} beside {over}; there is nothing to draw")
    wide, high = min(len(lines), COLUMNS), -(-len(lines) // COLUMNS)
    figure = Figure(figsize=(4.5 * wide, 3 * high + 0.4 * len(runs)), layout="constrained")
    for place, (key, of) in enumerate(lines.items(), 1):
        same = {"sharex": figure.axes[0]} if figure.axes else {}
        axes = figure.add_subplot(high, wide, place, title=key, xlabel=over, **same)
        axes.grid(alpha=0.3)
        for number, (label, (x, y)) in enumerate(of.items()):
            colour, width = f"C{number}", max(1, len(x) // 50)
            if len(x) <= SHORT:
                axes.plot(x, y, ".-", color=colour, label=label)
                continue
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.5)
            mean = np.convolve(y, np.full(width, 1 / width), "valid")
            axes.plot(x[width - 1 :], mean, color=colour, label=label)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center")
    with atomic_file(png, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="+", help="one or more, each with a metrics.jsonl")
    parser.add_argument("--keys", default="", help="metrics to draw, between commas; default: all")
    parser.add_argument("--over", default="step", help="the metric along the horizontal axis")
    parser.add_argument("--out", default="", help="the PNG to write; default: curves.png in a single run_dir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not args.out and len(args.run_dir) > 1:
        raise UserError("several runs in one picture: name the file with --out")
    runs = {name: Path(name) / "metrics.jsonl" for name in args.run_dir}
    known = list(dict.fromkeys(key for path in runs.values() for row in read_rows(path) for key in row))
    keys = [key for key in args.keys.split(",") if key]
    for key in [*keys, args.over]:
        if key not in known:
            raise UserError(f"no run has the metric {key!r}; {nearest(key, known)}")
    out = args.out or Path(args.run_dir[0]) / "curves.png"
    curves(runs, out, keys, args.over)
    print(f"written: {out}")


if __name__ == "__main__":
    with friendly_errors():
        main()
