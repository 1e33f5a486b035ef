"""
Draw the curves of training runs, a panel a metric and a line a run, or the figure of a table (a PNG).

In:  run_dir/metrics.jsonl, a row a step or evaluation; or the table.json of recipes/ladder.py, or the
     episodes.json of recipes/forgetting.py
Run: python -m recipes.plot runs/emdr2_nq                   (writes curves.png into it)
     python -m recipes.plot runs/d0 runs/m1 --keys mrr,loss --over minutes --out runs/dev.png
     python -m recipes.plot --table runs/ladder_small/table.json --out runs/ladder_small/ladder.png
     python -m recipes.plot --episodes runs/x/episodes.json --out runs/x/episodes.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # why not pyplot: it keeps figures alive and looks for a screen

from utils.data import iter_jsonl
from utils.plumbing.config import UserError, friendly_errors, nearest, need_out
from utils.plumbing.files import atomic_file, read_json

SHORT = 60  # points; a longer line is drawn as the mean over a fiftieth of it, with all points pale behind it


def save(figure, png):
    """Write a figure, whole or not at all."""
    with atomic_file(png, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"written: {png}")


def read_rows(path):
    """Return the rows of a metrics.jsonl. Where steps have seconds, "minutes" adds them up until the row."""
    rows = [row for _, row in iter_jsonl(path)]
    if not rows:
        raise UserError(f"{path}: no row in it; nothing was logged yet")
    seconds = 0.0
    for row in rows if any("seconds" in row for row in rows) else []:
        seconds += row.get("seconds") or 0.0
        row.setdefault("minutes", seconds / 60)
    return rows


def points(rows, key, over):
    """Return arrays x, y of the rows that have a number for both; a loss that was not finite is null."""
    pairs = [(row.get(over), row.get(key)) for row in rows]
    pairs = [pair for pair in pairs if all(isinstance(number, int | float) for number in pair)]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def draw_line(axes, x, y, **look):
    if len(x) <= SHORT:
        axes.plot(x, y, ".-", **look)
        return
    axes.plot(x, y, alpha=0.25, linewidth=0.5, color=look["color"])
    width = len(x) // 50
    mean = np.convolve(y, np.full(width, 1 / width), "valid")
    axes.plot(x[width - 1 :], mean, **look)


def curves(run_dirs, keys, over, png):
    """Draw the metrics `keys` (none: all) of some runs over the metric `over`."""
    rows = {name: read_rows(Path(name) / "metrics.jsonl") for name in run_dirs}
    logged = list(dict.fromkeys(key for run in rows.values() for row in run for key in row))
    for key in [*keys, over]:
        if key not in logged:
            raise UserError(f"no run has the metric {key!r}; {nearest(key, logged)}")

    # a panel for each metric that has a number
    wanted = keys or [key for key in logged if key not in ("step", "minutes")]
    panels = [key for key in wanted if any(points(run, key, over).size for run in rows.values())]
    if not panels:
        raise UserError(f"{png}: no row has {' or '.join(wanted)} next to {over}; there is nothing to draw")
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * lines + 0.4 * len(rows)), layout="constrained")
    for number, key in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, number, title=key, xlabel=over)
        axes.grid(alpha=0.3)
        for colour, (name, run) in enumerate(rows.items()):
            draw_line(axes, *points(run, key, over), color=f"C{colour}", label=name)
    if len(rows) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center")
    save(figure, png)


def ladder(table, png):
    """Draw the metrics of every row of the ladder that was run, with their intervals, and its minutes."""
    rows = [row for row in read_json(table)["rows"] if row["metrics"]]
    if not rows:
        raise UserError(f"{table}: no row was run; run recipes/ladder.sh first")
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(16, 0.3 * len(rows) + 1), layout="constrained")
    *panels, last = figure.subplots(1, 5, sharey=True)
    for place, row in enumerate(rows):
        colour = f"C{systems.index(row['system']) % 10}"
        for axes, metric in zip(panels, ("top-1", "top-20", "MRR@10", "EM"), strict=True):
            axes.set(title=f"{metric}, percent")
            if metric in row["metrics"]:
                value, low, high = (100 * row["metrics"][metric][key] for key in ("value", "low", "high"))
                axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=colour, marker="o")
        if row["minutes_in_all"] is not None:
            last.barh(place, row["minutes_in_all"], color=colour)
    last.set(title="minutes, in all")
    last.set_yticks(range(len(rows)), [row["name"] for row in rows])
    last.invert_yaxis()
    for axes in [*panels, last]:
        axes.grid(alpha=0.3)
    save(figure, png)


def episodes(table, png):
    """Draw forgetting and accuracy of ANCE-Tele's arms over the episodes, a line an arm."""
    rows = read_json(table)["rows"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = Figure(figsize=(16, 4), layout="constrained")
    panels = figure.subplots(1, 4)
    for axes, metric in zip(panels, ("forgotten", "known", "MRR@10", "top-20"), strict=True):
        axes.set(title=f"{metric}, percent", xlabel="episode")
        axes.grid(alpha=0.3)
        axes.set_xticks(sorted({row["episode"] for row in rows}))
        for place, arm in enumerate(arms):
            drawn = [row for row in rows if row["arm"] == arm and metric in row["metrics"]]
            x = [row["episode"] + 0.04 * place for row in drawn]  # side by side, or intervals hide each other
            cells = [row["metrics"][metric] for row in drawn]
            y, low, high = (np.array([100 * cell[key] for cell in cells]) for key in ("value", "low", "high"))
            look = {"color": f"C{place}", "marker": ".", "label": arm}
            axes.errorbar(x, y, yerr=np.maximum(0, [y - low, high - y]), **look)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(arms))
    save(figure, png)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("run_dir", nargs="*", help="one or more, each with a metrics.jsonl")
    parser.add_argument("--table", help="the ladder's table.json, in place of run_dir")
    parser.add_argument("--episodes", help="the episodes.json of recipes/forgetting.py, in place of run_dir")
    parser.add_argument("--keys", default="", help="metrics to draw, between commas; default: all")
    parser.add_argument("--over", default="step", help="the metric along the horizontal axis")
    parser.add_argument("--out", help="the PNG to write; default: curves.png in a single run_dir")
    args = parser.parse_args()
    given = [bool(args.run_dir), bool(args.table), bool(args.episodes)]
    if sum(given) != 1 or not args.out and len(args.run_dir) != 1:
        tables = "a --table and an --out, or --episodes and an --out"
        raise UserError(f"name one run folder, several and an --out, or {tables}")
    args.out = args.out or str(Path(args.run_dir[0]) / "curves.png")
    if not args.out.endswith(".png"):
        raise UserError(f"out must be the path of a .png file, got {args.out!r}")
    need_out(args, "out")
    if args.table:
        ladder(args.table, args.out)
    elif args.episodes:
        episodes(args.episodes, args.out)
    else:
        curves(args.run_dir, [key for key in args.keys.split(",") if key], args.over, args.out)


if __name__ == "__main__":
    with friendly_errors():
        main()
