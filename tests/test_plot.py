"""Curves: what is drawn is what was logged, and a picture stands at the end."""

import json
import sys

import numpy as np
import pytest

from utils import plot
from utils.plumbing.config import UserError


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that are made while it is in use."""
    made = []

    class Kept(plot.Figure):
        def __init__(self, *arguments, **keys):
            super().__init__(*arguments, **keys)
            made.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    return made


def drawn(axes):
    """(x, y) of the lines of a panel, as lists."""
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def test_a_panel_a_metric(tmp_path, figures):
    """Panels in the order asked, rows without the metric or with null left out; a PNG of that size."""
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
        {"step": 3, "em": 0.5},
    ]
    path = write_rows(tmp_path / "a" / "metrics.jsonl", rows)
    plot.curves(path, tmp_path / "new" / "a.png", ["em", "absent", "loss"])
    em, loss = figures[0].axes
    assert [em.get_title(), loss.get_title(), em.get_xlabel()] == ["em", "loss", "step"]
    assert drawn(em) == [([3], [0.5])] and drawn(loss) == [([1, 3], [3, 1])]
    content = (tmp_path / "new" / "a.png").read_bytes()
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert content.startswith(b"\x89PNG") and (width, height) == tuple(
        figures[0].get_size_inches() * 110 // 1
    )
    plot.curves(path, tmp_path / "all.png")
    assert [axes.get_title() for axes in figures[1].axes] == ["loss", "em"], "all but the horizontal axis"


def test_several_runs_over_minutes(tmp_path, figures):
    """A line a run, of one colour in all panels, over the same minutes; without the metric, no point."""
    short = [{"minutes": 5 * i, "top-20": 0.1 * i, "em": i} for i in range(3)]
    paths = {"dpr": write_rows(tmp_path / "dpr" / "metrics.jsonl", [{"minutes": 1, "top-20": 0.2}])}
    paths["ours"] = write_rows(tmp_path / "ours" / "metrics.jsonl", short)
    plot.curves(paths, tmp_path / "ladder.png", ["em", "top-20"], over="minutes")
    em, top = figures[0].axes
    assert drawn(em) == [([], []), ([0, 5, 10], [0, 1, 2])] and em.get_xlabel() == "minutes"
    assert drawn(top) == [([1], [0.2]), ([0, 5, 10], [0, 0.1, 0.2])]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["dpr", "ours"]
    assert em.get_xlim() == top.get_xlim() and em.get_xlim()[0] <= 0 and em.get_xlim()[1] >= 10
    assert [line.get_color() for line in em.lines] == [line.get_color() for line in top.lines] == ["C0", "C1"]


def test_a_long_line_is_smoothed(tmp_path, figures):
    """5,000 noisy points: the mean over the last hundred, at the last of them; all values pale behind it."""
    noise = np.random.default_rng(0).normal(size=5000)
    rows = [{"step": i + 1, "loss": value} for i, value in enumerate(noise)]
    plot.curves(write_rows(tmp_path / "a" / "metrics.jsonl", rows), tmp_path / "a.png", ["loss"])
    pale, mean = figures[0].axes[0].lines
    assert np.array_equal(pale.get_ydata(), noise) and pale.get_alpha() < 0.5
    assert mean.get_xdata()[[0, -1]].tolist() == [100, 5000]
    expected = [noise[k - 100 : k].mean() for k in range(100, 5001)]
    assert np.allclose(mean.get_ydata(), expected, atol=1e-12)


def test_the_command(tmp_path, monkeypatch, capsys):
    """curves.png in the run's folder; several runs need a name; what cannot be drawn is said in one line."""
    rows = [{"step": 1, "loss": 2.0, "text": "x"}]
    a = write_rows(tmp_path / "a" / "metrics.jsonl", rows).parent
    b = write_rows(tmp_path / "b" / "metrics.jsonl", [{"step": 1, "acc": 1}]).parent
    empty = write_rows(tmp_path / "empty" / "metrics.jsonl", []).parent

    def say(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
        plot.main()

    say(a)
    assert (a / "curves.png").is_file() and capsys.readouterr().out == f"written: {a / 'curves.png'}\n"
    say(a, b, "--keys", "acc,loss", "--out", tmp_path / "both.png")
    assert (tmp_path / "both.png").is_file()
    for arguments, message in (
        ((a, b), "name the file with --out"),
        ((a, "--keys", "los"), "no run has the metric 'los'; did you mean 'loss'"),
        ((a, "--over", "minutes"), "no run has the metric 'minutes'; known: step, loss, text"),
        ((a, "--keys", "text"), "no row has text beside step"),
        ((empty,), "empty/metrics.jsonl: no row in it"),
        ((tmp_path,), "metrics.jsonl: no such file"),
        ((a, "--out", a / "metrics.jsonl"), "out must be the path of a .png file"),
        ((a, "--out", a / "metrics.jsonl" / "x.png"), "metrics.jsonl is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            say(*arguments)
    assert not (empty / "curves.png").exists()


def test_minutes_are_added_up(tmp_path, figures):
    """Rows without minutes: the seconds of all steps until then; an evaluation has its step's."""
    rows = [
        {"step": 1, "loss": 3.0, "seconds": 60},
        {"step": 2, "loss": 2.0, "seconds": 30},
        {"step": 2, "mrr": 0.5},
        {"step": 3, "loss": 1.0, "seconds": 15},
    ]
    path = write_rows(tmp_path / "a" / "metrics.jsonl", rows)
    plot.curves(path, tmp_path / "a.png", ["loss", "mrr"], over="minutes")
    assert [drawn(axes) for axes in figures[0].axes] == [[([1, 1.5, 1.75], [3, 2, 1])], [([1.5], [0.5])]]
    plot.curves(path, tmp_path / "b.png", over="step")
    assert [axes.get_title() for axes in figures[1].axes] == ["loss", "seconds", "mrr"], "none over steps"


def ladder_row(key, system, minutes, values, ranking=""):
    metrics = {f"top-{k}": {"value": v, "low": v - 0.1, "high": v + 0.05} for k, v in values.items()}
    return {"key": key, "name": f"row {key}", "system": system, "ranking": ranking or f"{key}.run"} | {
        "minutes_in_all": minutes,
        "metrics": metrics,
    }


def test_the_ladder(tmp_path, figures, monkeypatch, capsys):
    """Left a line a system with its intervals, right a line a row of the same colour, named at its end."""
    values = {1: 0.2, 5: 0.3, 20: 0.5, 100: 0.9}
    rows = [
        ladder_row("untrained", "none", 1, {20: 0.1}),
        ladder_row("d0", "DPR", 10, values),
        ladder_row("d1", "RocketQA", 30, values | {20: 0.6}),
        ladder_row("d2", "RocketQA", 40, values | {20: 0.7}),
        ladder_row("fid", "FiD", 90, values, "d0.run"),  # reads d0's ranking
        ladder_row("gc", "GC-DPR", None, {5: 0.1, 20: 0.2}),  # not measured
        ladder_row("m1", "ANCE-Tele", 5, {}),  # not run
    ]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    table, out = str(tmp_path / "table.json"), tmp_path / "new" / "ladder.png"
    monkeypatch.setattr(sys, "argv", ["plot", "--table", table, "--out", str(out)])
    plot.main()
    assert out.read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out == f"written: {out}\n"
    left, right = figures[0].axes
    systems = [one for one in left.containers]
    assert [one[0].get_xydata().tolist() for one in systems] == [[[10, 50]], [[30, 60], [40, 70]]]
    low, high = systems[1][2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((60, 75))
    curves = [[([1, 5, 20, 100], [20, 30, middle, 90])] for middle in (50, 60, 70)]
    found = [(x, [round(number, 6) for number in y]) for x, y in drawn(right)]
    assert found == [([20], [10]), *(one for (one,) in curves), ([5, 20], [10, 20])]
    colours = [line.get_color() for line in right.lines]
    assert colours[2] == colours[3] == systems[1][0].get_color() and len(set(colours)) == 4
    assert right.lines[2].get_linestyle() != right.lines[3].get_linestyle()
    names = [[text.get_text() for text in axes.texts] for axes in (left, right)]
    assert sorted(names[0]) == ["DPR", "RocketQA"] and len(names[1]) == 5
    heights = [text.xyann[1] for text in right.texts]
    assert min(np.diff(heights)) >= 0.045 - 1e-9 and max(heights) <= 1, "names do not overlap"


def test_the_ladder_has_something_to_draw(tmp_path, monkeypatch):
    """Nothing run, no name for the picture, runs beside a table: one line each."""
    (tmp_path / "table.json").write_text(json.dumps({"rows": [ladder_row("m1", "ANCE-Tele", None, {})]}))
    for arguments, message in (
        (("--table", tmp_path / "table.json", "--out", tmp_path / "a.png"), "no row with a top-20"),
        (("--table", tmp_path / "table.json"), "a --table and the --out"),
        ((tmp_path, "--table", tmp_path / "table.json", "--out", "a.png"), "a --table and the --out"),
        ((), "name run folders"),
    ):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
        with pytest.raises(UserError, match=message):
            plot.main()
