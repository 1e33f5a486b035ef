"""
Curves of training runs as one picture: a panel a metric, a line a run (package matplotlib, without a screen).

In:  run_dir/metrics.jsonl: a row a step, a row an evaluation; or recipes/ladder.py's table.json
Out: a PNG
Run: python -m recipes.plot runs/emdr2_nq
     python -m recipes.plot runs/sync runs/frozen --keys em,hit@5,index_age --out runs/refresh.png
     python -m recipes.plot runs/d0 runs/m1 --keys mrr --over minutes --out runs/dev.png
     python -m recipes.plot --table runs/ladder_small/table.json --out runs/ladder_small/ladder.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # why not pyplot: it keeps figures alive and looks for a screen

from utils.lines import iter_jsonl
from utils.plumbing.config import UserError, friendly_errors, nearest, need_out
from utils.plumbing.files import atomic_file, read_json

COLUMNS = 3
KS = (1, 5, 20, 100)  # of top-k, in the ladder's picture
STYLES = ("-", "--", ":", "-.")  # the rungs of a system, which have one colour
SHORT = 60  # points; a longer line is drawn as the mean over a fiftieth of it, its values pale behind


def read_rows(path, over="step"):
    """
    The rows of a metrics.jsonl; UserError when there is none. Over minutes, rows that have none get them: the
    "seconds" of all steps until then, so that an evaluation stands at the step before it.
    """
    rows, seconds = [row for _, row in iter_jsonl(path)], 0.0
    if not rows:
        raise UserError(f"{path}: no row in it; nothing was logged yet")
    if over == "minutes" and not any(over in row for row in rows) and any("seconds" in row for row in rows):
        for row in rows:
            seconds += row.get("seconds") or 0.0
            row[over] = seconds / 60
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
    rows = {label: read_rows(path, over) for label, path in runs.items()}
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
    save(figure, png)


def save(figure, png):
    """Write a figure as a PNG, whole or not at all."""
    with atomic_file(png, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def name_lines(axes, ends, side, gap=0.045):
    """
    Names along the left (side 0) or right (1) edge instead of a legend, at least `gap` of the height apart,
    each with a thin line to where its own line ends. ends: [(x, y, name, colour)].
    """
    (low, high), ends = axes.get_ylim(), sorted(ends, key=lambda end: end[1])
    places = [(y - low) / (high - low) for _, y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):  # what was pushed out at the top comes down again
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
    for (x, y, name, colour), place in zip(ends, places, strict=True):
        thin = {"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 0.6, "relpos": (1 - side, 0.5)}
        where = {"textcoords": "axes fraction", "va": "center", "ha": ("right", "left")[side]}
        at = (1.06 * side - 0.03, place)
        axes.annotate(
            name, (x, y), at, color=colour, fontsize=8, arrowprops=thin, annotation_clip=False, **where
        )


def ladder(table, png):
    """
    Two panels of the rows of recipes/ladder.py's table.json. Left: top-20 accuracy with its interval over the
    minutes of everything that a row is built on, a system's rungs connected; the untrained encoder only sets
    the scale and is left out. Right: top-k over k, a line a row. A ranking that several rows read is drawn
    once; what was not run or not measured is not drawn. UserError when nothing is left.
    """
    rows, seen = read_json(table)["rows"], set()
    rows = [row for row in rows if "top-20" in row["metrics"]]
    rows = [row for row in rows if not (row["ranking"] in seen or seen.add(row["ranking"]))]
    if not rows:
        raise UserError(f"{table}: no row with a top-20; run recipes/ladder.sh first")
    figure, systems = Figure(figsize=(15, 6.5), layout="constrained"), {}
    left, right = figure.subplots(1, 2)
    rungs, lines = [], []
    for row in rows:
        systems.setdefault(row["system"], []).append(row)
    for number, (system, own) in enumerate(systems.items()):
        colour = f"C{number % 10}"
        timed = [row for row in own if row["minutes_in_all"] is not None and row["key"] != "untrained"]
        if timed:
            found = [row["metrics"]["top-20"] for row in timed]
            y, low, high = (np.array([100 * one[of] for one in found]) for of in ("value", "low", "high"))
            x, look = [row["minutes_in_all"] for row in timed], {"marker": "o", "ms": 4, "elinewidth": 0.7}
            left.errorbar(x, y, (y - low, high - y), color=colour, capsize=2, **look)
            rungs.append((x[-1], y[-1], system, colour))
        for style, row in enumerate(own):
            ks = [k for k in KS if f"top-{k}" in row["metrics"]]
            values = [100 * row["metrics"][f"top-{k}"]["value"] for k in ks]
            right.plot(ks, values, STYLES[style % len(STYLES)], color=colour, linewidth=1.2, marker=".")
            lines.append((ks[0], values[0], row["name"], colour))
    left.set(title="top-20, over the minutes of all that it is built on", xlabel="minutes", ylabel="percent")
    right.set(title="top-k", xlabel="k", xscale="log", ylabel="percent of questions with an answer")
    right.set_xticks(KS, map(str, KS))
    right.minorticks_off()
    right.yaxis.tick_right()
    right.yaxis.set_label_position("right")
    for axes, ends, side in ((left, rungs, 1), (right, lines, 0)):
        axes.grid(alpha=0.3)
        name_lines(axes, ends, side)
    save(figure, png)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="*", help="one or more, each with a metrics.jsonl")
    parser.add_argument("--table", default="", help="recipes/ladder.py's table.json, in place of run_dir")
    parser.add_argument("--keys", default="", help="metrics to draw, between commas; default: all")
    parser.add_argument("--over", default="step", help="the metric along the horizontal axis")
    parser.add_argument("--out", default="", help="the PNG to write; default: curves.png in a single run_dir")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if bool(args.table) == bool(args.run_dir) or (args.table and not args.out):
        raise UserError("name run folders, or a --table and the --out of its picture")
    if not args.out and len(args.run_dir) > 1:
        raise UserError("several runs in one picture: name the file with --out")
    args.out = args.out or str(Path(args.run_dir[0]) / "curves.png")
    if not args.out.endswith(".png"):
        raise UserError(f"out must be the path of a .png file, got {args.out!r}")
    need_out(args, "out")
    if args.table:
        ladder(args.table, args.out)
        return print(f"written: {args.out}")
    runs = {name: Path(name) / "metrics.jsonl" for name in args.run_dir}
    known = list(
        dict.fromkeys(key for path in runs.values() for row in read_rows(path, args.over) for key in row)
    )
    keys = [key for key in args.keys.split(",") if key]
    for key in [*keys, args.over]:
        if key not in known:
            raise UserError(f"no run has the metric {key!r}; {nearest(key, known)}")
    curves(runs, args.out, keys, args.over)
    print(f"written: {args.out}")


if __name__ == "__main__":
    with friendly_errors():
        main()
