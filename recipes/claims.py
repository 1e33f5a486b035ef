"""
The papers' claims, and what our runs say about them: results/claims.json and docs/claims.md.

In:  results/claims.yaml, a claim an entry; results/FOLDER/ranks.json, what `store` made of the rankings
Out: results/claims.json, a row a claim; docs/claims.md, the same as a page
Run: python -m recipes.claims
     python -m recipes.claims store data/demo/corpus.tsv data/demo/test.jsonl results/demo/ranks.json \\
         bm25=runs/demo/bm25_runs/test.run dpr=runs/demo/test/test.run fid=runs/fid/answers.answers.json

A ranking is kept as two numbers a question: the ranks of the first passage with an answer and of the first
right passage, 0 where there is none; answers as EM and F1. So the figure of an entry with `arm` can be
computed again from the repository alone. One with `text` or `table` is read where it was printed, and what
stands in `reason` and `experiment` was typed by hand. Gains are paired: question by question, averaged over
the seeds first. The interval is a bootstrap over the questions. It does not say what another seed would
change; that is the range over seeds.
"""

import json
import re
import sys

import numpy as np
import yaml

from recipes.compare import first_ranks, metrics_of_ranks
from utils.data import Corpus, read_questions
from utils.metrics import bootstrap_interval
from utils.plumbing.config import ROOT, UserError, friendly_errors, refuse_input
from utils.plumbing.files import read_json, write_text

VERDICTS = ("shown", "shown in part", "not shown")
KEYS = "claim system experiment metric smaller folder arm over table text measured hardware verdict reason"
PAGE = """# What the papers claim, and what our runs show

Made by `python -m recipes.claims` from results/claims.yaml and the files that it names. results/claims.json
has the same rows for machines. A gain is in points of percent, paired by question, with its 95 % bootstrap
interval over the test questions. Where an arm has several seeds, a question's gain is first averaged over
them, and the range over seeds stands behind it.

*Shown*: the interval excludes zero, and there is more than one seed, each with the same sign. The program
sees to this; an identity or a size in memory has neither. We judged the rest: one thing differs between the
two arms, and no test question chose anything. *Shown in part*: something of this is missing, and the reason
says what. *Not shown*: the reason says what was found instead, or that it was not run.

"""


def store(corpus, questions, out, named):
    """Write {name: ranks or answers, a number a question} of rankings and answers; other names stay."""
    refuse_input(out, corpus, questions)
    questions = read_questions(questions, match="string")
    corpus = Corpus(corpus)
    stored = read_json(out, {})
    for item in named:
        name, sign, path = item.partition("=")
        if not sign:
            raise UserError(f"{item}: expected NAME=FILE, such as bm25=runs/demo/bm25_runs/test.run")
        refuse_input(out, path)
        stored[name] = first_ranks(path, questions, corpus)
    write_rows(out, stored)


def write_rows(path, rows):
    """Write {name: row} as json, a row a line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    write_text(path, f"{{\n{lines}\n}}\n")


def values_of(folder, name, metric):
    """Return one number a question: array [Q]."""
    path = ROOT / "results" / folder / "ranks.json"
    stored = read_json(path)
    if name not in stored:
        raise UserError(f"{path}: it has no {name!r}; it has {', '.join(stored)}")
    metrics = metrics_of_ranks(stored[name])
    if answer := stored[name].get("answer"):  # of the first passage with an answer, whoever labelled it
        metrics["answer MRR@10"] = metrics_of_ranks(stored[name] | {"right": answer})["MRR@10"]
    if metric not in metrics:
        raise UserError(f"{path}: {name} has no {metric!r}; it has {', '.join(metrics)}")
    return metrics[metric]


def gain_of(entry):
    """Return {"gain", "low", "high", "n", "seeds", "range"} of an entry with an arm, as fractions."""
    arms, overs = entry["arm"], entry["over"]
    if len({*arms}) < len(arms):
        raise UserError(f"claims.yaml: {entry['claim']}: an arm stands there twice")
    if len(overs) == 1:
        if len(arms) > 1 and re.search(r"_seed\d+$", overs[0]):
            raise UserError(f"claims.yaml: {entry['claim']}: {overs[0]} is one seed of its arm; name all")
        overs = overs * len(arms)
    gains_SQ = []
    for arm, over in zip(arms, overs, strict=True):
        folder, metric = entry["folder"], entry["metric"]
        gains_Q = values_of(folder, arm, metric) - values_of(folder, over, metric)
        gains_SQ.append(-gains_Q if entry.get("smaller") else gains_Q)
    gains_Q = np.mean(gains_SQ, axis=0)
    low, high = bootstrap_interval(gains_Q)
    seeds = [float(gains_Q.mean()) for gains_Q in gains_SQ]
    figure = {"gain": float(gains_Q.mean()), "low": low, "high": high, "n": len(gains_Q), "seeds": len(arms)}
    return figure | {"range": [min(seeds), max(seeds)]}


def gain_of_table(entry):
    """Return the same of an experiment whose rankings were not kept, from its table.json."""
    row, over = entry["table"]
    gains = read_json(ROOT / "results" / entry["folder"] / "table.json")["gains"]
    (found,) = [gain["metrics"] for gain in gains if gain["row"] == row and gain["over"] == over]
    figure = found[entry["metric"]]
    return {
        "gain": figure["value"],
        "low": figure["low"],
        "high": figure["high"],
        "n": figure["n"],
        "seeds": 1,
    }


def gain_of_text(entry):
    """Return the same from what recipes/compare.py printed: the gain of a ranking, named as it is there."""
    file, name = entry["text"]
    text = (ROOT / "results" / entry["folder"] / file).read_text(encoding="utf-8")
    _, _, rest = text.partition(f"\n{name}\n")
    rows = re.match(r"( .*\n)*", rest)[0]  # of this ranking; the next one begins without spaces
    interval = r"\(([\d.-]+) to ([\d.-]+)\)"
    mean = r"(?:[\d.]+ \([^)]*\) +)?"  # may stand before the gain
    found = re.search(rf" {re.escape(entry['metric'])} +{mean}([+-][\d.]+) {interval}", rows)
    if not found:
        raise UserError(f"results/{entry['folder']}/{file}: no gain in {entry['metric']} of {name}")
    gain, low, high = (round(float(number) / 100, 4) for number in found.groups())
    n = int(re.match(r"n = (\d+)", text)[1])
    return {"gain": gain, "low": low, "high": high, "n": n, "seeds": 1}


def row_of(entry):
    """Return the row of claims.json of an entry of claims.yaml. UserError where the verdict says too much."""
    name = entry["claim"]
    if unknown := {*entry} - {*KEYS.split()}:
        raise UserError(f"claims.yaml: {name}: unknown {', '.join(sorted(unknown))}")
    if "smaller" in entry and "arm" not in entry:
        raise UserError(f"claims.yaml: {name}: `smaller` needs `arm`")
    if entry["verdict"] not in VERDICTS:
        raise UserError(f"claims.yaml: {name}: the verdict is one of {', '.join(VERDICTS)}")
    if entry["verdict"] != "shown" and not entry.get("reason"):
        raise UserError(f"claims.yaml: {name}: {entry['verdict']}, but no reason")
    figure = dict.fromkeys(("gain", "low", "high", "n", "seeds", "range"))
    if "arm" in entry:
        figure = gain_of(entry)
    elif "table" in entry:
        figure |= gain_of_table(entry)
    elif "text" in entry:
        figure |= gain_of_text(entry)
    if entry["verdict"] == "shown" and not ("measured" in entry and figure["gain"] is None):
        if figure["low"] is None or figure["low"] <= 0:
            raise UserError(f"claims.yaml: {name}: shown, but the interval holds zero or there is none")
        if figure["seeds"] < 2:
            raise UserError(f"claims.yaml: {name}: shown, but by one seed; it is shown in part")
        if figure["range"][0] <= 0:
            raise UserError(f"claims.yaml: {name}: shown, but a seed shows the opposite; it is shown in part")
    texts = {key: entry.get(key, "") for key in ("experiment", "measured", "hardware", "reason")}
    head = {"claim": name, "system": entry["system"], "metric": entry.get("metric", "")}
    folder = f"results/{entry['folder']}" if entry.get("folder") else ""
    return head | figure | {"folder": folder, "verdict": entry["verdict"]} | texts


def percent(number):
    return f"{100 * number:+.1f}"


def figure_cell(row):
    if row["gain"] is None:
        return row["measured"] or "not run"
    text = f"{row['metric']} {percent(row['gain'])} ({percent(row['low'])} to {percent(row['high'])})"
    if row["range"] and row["seeds"] > 1:
        text += f"; seeds {percent(row['range'][0])} to {percent(row['range'][1])}"
    return text


def page(rows):
    """Return docs/claims.md: a table a system, then how each row was found."""
    text, number = PAGE, 0
    for system in dict.fromkeys(row["system"] for row in rows):
        body, notes = "", ""
        for row in rows:
            if row["system"] == system:
                number += 1
                size = "–" if row["n"] is None else f"{row['n']:,}, {row['seeds']}"
                cells = [str(number), row["claim"], figure_cell(row), size, row["verdict"]]
                body += f"| {' | '.join(cells)} |\n"
                where = f"[{row['folder']}](../{row['folder']})" if row["folder"] else ""
                parts = [row["experiment"], row["hardware"], where, row["reason"]]
                notes += f"- {number}. {'. '.join(part[0].upper() + part[1:] for part in parts if part)}.\n"
        head = "| | claim | figure | n, seeds | verdict |\n|---|---|---|---|---|\n"
        text += f"## {system}\n{head}{body}\n{notes}\n"
    return text.rstrip() + "\n"


def main():
    """Write results/claims.json and docs/claims.md."""
    entries = yaml.safe_load((ROOT / "results" / "claims.yaml").read_text(encoding="utf-8"))
    rows = [row_of(entry) for entry in entries]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(ROOT / "results" / "claims.json", f"[\n{lines}\n]\n")
    write_text(ROOT / "docs" / "claims.md", page(rows))


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) == 1:
            main()
        elif sys.argv[1] == "store" and len(sys.argv) > 5:
            store(*sys.argv[2:5], sys.argv[5:])
        else:
            raise UserError("usage: python -m recipes.claims, or: store CORPUS QUESTIONS OUT NAME=FILE ...")
