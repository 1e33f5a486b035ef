"""Pictures: what is drawn is what was logged, and a mistake is one line."""

import json

import numpy as np
import pytest

from recipes import plot
from tests.toy import write_lines
from utils.plumbing.config import ROOT, UserError


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """A function: the command's arguments, {folder: rows of its metrics.jsonl} -> the figure's axes."""
    figures = []

    class Kept(plot.Figure):
        def __init__(self, *arguments, **keys):
            super().__init__(*arguments, **keys)
            figures.append(self)

    def run(*arguments, **runs):
        for name, rows in runs.items():
            (tmp_path / name).mkdir(exist_ok=True)
            write_lines(tmp_path / name / "metrics.jsonl", rows)
        folders = [str(tmp_path / name) for name in runs]
        monkeypatch.setattr("sys.argv", ["plot", *folders, *map(str, arguments)])
        plot.main()
        return figures[-1].axes

    monkeypatch.setattr(plot, "Figure", Kept)
    return run


def drawn(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def test_a_panel_a_metric(draw, tmp_path):
    """In the order asked, without rows that lack the metric or have null; a PNG in the run's own folder."""
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, None), (3, 1.0))]
    rows.append({"step": 3, "em": 0.5})
    em, loss = draw("--keys", "em,loss", a=rows)
    assert [em.get_title(), loss.get_title(), em.get_xlabel()] == ["em", "loss", "step"]
    assert drawn(em) == [([3], [0.5])] and drawn(loss) == [([1, 3], [3, 1])]
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in draw(a=rows)] == ["loss", "em"], "all but the horizontal axis"


def test_several_runs_over_minutes(draw, tmp_path):
    """A line a run, of one colour in all panels; minutes are the seconds of all steps until the row."""
    a = [{"step": 1, "loss": 3, "seconds": 60}, {"step": 2, "loss": 2, "seconds": 30}]
    a.append({"step": 2, "mrr": 0.5})
    b = [{"step": 1, "loss": 1, "seconds": 15}]
    loss, mrr = draw("--keys", "loss,mrr", "--over", "minutes", "--out", tmp_path / "new" / "x.png", a=a, b=b)
    assert drawn(loss) == [([1, 1.5], [3, 2]), ([0.25], [1])] and drawn(mrr) == [([1.5], [0.5]), ([], [])]
    for axes in (loss, mrr):
        assert [line.get_color() for line in axes.lines] == ["C0", "C1"]
    assert [line.get_label() for line in loss.lines] == [str(tmp_path / name) for name in "ab"]


def test_a_long_line_is_smoothed(draw):
    """5,000 noisy points: the mean over the last hundred, at the last of them; all values pale behind it."""
    noise = np.random.default_rng(0).normal(size=5000)
    (axes,) = draw("--keys", "loss", a=[{"step": i + 1, "loss": value} for i, value in enumerate(noise)])
    pale, mean = axes.lines
    assert np.array_equal(pale.get_ydata(), noise) and pale.get_alpha() < 0.5
    assert mean.get_xdata()[[0, -1]].tolist() == [100, 5000]
    expected = [noise[k - 100 : k].mean() for k in range(100, 5001)]
    assert np.allclose(mean.get_ydata(), expected, atol=1e-12)


def test_the_ladder_shows_every_row_that_was_run(draw, tmp_path):
    """The committed table: each row with its intervals, in its system's colour, and its minutes."""
    table = ROOT / "results" / "ladder_small" / "table.json"
    *metrics, minutes = draw("--table", table, "--out", tmp_path / "ladder.png")
    rows = [row for row in json.loads(table.read_text())["rows"] if row["metrics"]]
    assert [label.get_text() for label in metrics[0].get_yticklabels()] == [row["name"] for row in rows]
    for axes, metric in zip(metrics, ("top-1", "top-20", "MRR@10", "EM"), strict=True):
        shown = [row for row in rows if metric in row["metrics"]]
        points = [container[0].get_xdata()[0] for container in axes.containers]
        assert points == pytest.approx([100 * row["metrics"][metric]["value"] for row in shown])
        (low, _), (high, _) = axes.containers[0][2][0].get_segments()[0]
        first = shown[0]["metrics"][metric]
        assert [low, high] == pytest.approx([100 * first["low"], 100 * first["high"]])
    widths = [bar.get_width() for bar in minutes.patches]
    assert widths == pytest.approx([row["minutes_in_all"] for row in rows])
    colours = {(row["system"], bar.get_facecolor()) for row, bar in zip(rows, minutes.patches, strict=True)}
    assert len(colours) == len({system for system, _ in colours}), "one colour a system"


def test_mistakes(draw, tmp_path):
    rows = [{"step": 1, "loss": 2.0, "text": "x"}]
    a = tmp_path / "a"
    (tmp_path / "table.json").write_text(json.dumps({"rows": [{"metrics": {}}]}))
    for arguments, runs, message in (
        ((), {"a": rows, "b": rows}, "name one run folder, several and an --out"),
        ((), {}, "name one run folder"),
        (("--table", tmp_path / "table.json"), {}, "a --table and an --out"),
        (("--table", tmp_path / "table.json", "--out", "a.png"), {"a": rows}, "a --table and an --out"),
        (("--table", tmp_path / "table.json", "--out", tmp_path / "a.png"), {}, "no row was run"),
        (("--keys", "los"), {"a": rows}, "no run has the metric 'los'; did you mean 'loss'"),
        (("--over", "minutes"), {"a": rows}, "no run has the metric 'minutes'; known: step, loss, text"),
        (("--keys", "text"), {"a": rows}, "no row has text next to step"),
        ((), {"empty": []}, "empty/metrics.jsonl: no row in it"),
        ((tmp_path,), {}, "metrics.jsonl: no such file"),
        (("--out", a / "metrics.jsonl"), {"a": rows}, "out must be the path of a .png file"),
        (("--out", a / "metrics.jsonl" / "x.png"), {"a": rows}, "metrics.jsonl is a file, not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            draw(*arguments, **runs)
    assert not (tmp_path / "empty" / "curves.png").exists()
