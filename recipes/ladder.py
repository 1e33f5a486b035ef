"""
Write the ladder's table: every system of recipes/ladder.sh on the same questions, and what each rung gains.

In:  one folder of recipes/ladder.sh, or several (other seeds of the first); its data folder
Out: RUN/table.json, which plot.py and page.py read, and RUN/table.md; of the first folder, also printed
Run: python recipes/ladder.py runs/ladder_small runs/ladder_small/data
     python recipes/ladder.py runs/ladder_small runs/ladder_small_seed2 runs/ladder_small/data

A row of which a file is missing says "not run". Numbers are percent with 95 % bootstrap intervals; gains are
paired by question.
"""

import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.compare import per_question  # noqa: E402
from utils.data import Corpus, iter_jsonl, read_questions  # noqa: E402
from utils.metrics import with_intervals  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json, write_text  # noqa: E402

KS = (1, 5, 20, 100)
METRICS = [f"top-{k}" for k in KS] + ["MRR@10", "EM", "F1"]
GAINS = ("top-5", "top-20", "MRR@10", "EM")
NOT_RUN = "not run"
NO_QUESTION = {"untrained": "untrained", "cloze": "inverse cloze"}  # encoders that have seen no question
NOTES = """
Data: every third training question has no label ({labelled} have one, {unlabelled} have none). All dual
encoders learn from the labelled ones; M_D2 also from the cross-encoder's labels of the others. The readers
need answers alone and take all questions. FiD and EMDR2 start from {first}, which never saw
a question.{titles}

Start: cross-encoder and extractive reader from the same weights, all dual encoders from {start}; one tower,
one config.

Updates: equal for DPR, GC-DPR (more questions in each) and ANCE-Tele; GC-DPR's control has as many questions
as GC-DPR, in more updates. M_D1 has fewer where denoising leaves a question without a negative, M_D2 those of
its longer file. EMDR2's updates follow those of FiD, whose reader it takes.

Choice: no checkpoint. The weights of the last step count, for every model; the dev questions are only
watched. The defaults of EMDR2, the reader and the gate come from earlier runs on the demo's data, some of
which had looked at its test questions.

ANCE-Tele: one hard negative a question in every episode, the window rotating, no early stop.

RocketQA: for the cross-encoder a negative is below {below}, a new question's positive above {above} (the
paper: 0.1 and 0.9).

Rankings: the cross-encoder rescores the first passages only, so that top-20 and top-100 are its
retriever's. The extractive reader and FiD show the ranking that they read.

Cost: minutes of the row's own stages (mining, training, encoding, test); in all: with everything it is
built on, each once. GB: the largest process of its own stages, on the host.
"""

# A row of the table. over: rows that it is measured against. own: outputs of its own stages. after: what it
# is built on, keys of the costs. runs: rankings, of which a later one replaces what it knows. answers: a
# file, or ""
Row = namedtuple("Row", "key name system over own after runs answers")


def start_of(run_dir):
    """Return where the encoders of a folder start from: "cloze" or "untrained"."""
    name = (run_dir / "m0").resolve().name
    return name if name in NO_QUESTION else "untrained"


def rows_of(run_dir):
    """Return the rows of the table, in order."""
    first = start_of(run_dir)
    rows = []

    def row(key, name, system, over, own, after, runs, answers=""):
        rows.append(Row(key, name, system, over.split(), own.split(), after.split(), runs.split(), answers))

    def encoder(key, name, system, over, own="", after="start", answers=""):
        own += f" {key}/metrics.json {key}/embeddings/manifest.json {key}/test.metrics.json"
        row(key, name, system, over, own, after, f"{key}/test.run", answers)

    # retrievers
    row("bm25", "BM25", "BM25", "", "data/bm25_test.run", "", "data/bm25_test.run")
    encoder("untrained", "untrained encoder", "no questions", "", "untrained/doc_encoder", "")
    if first == "cloze":
        encoder("cloze", "inverse cloze alone", "no questions", "untrained", "data/cloze.jsonl", "negatives")
    encoder("inbatch", "DPR, in-batch negatives only", "DPR", first)
    encoder("d0", "DPR + BM25 negative = RocketQA M_D0", "DPR", "inbatch")
    encoder("more", "DPR, as many questions as GC-DPR", "DPR", "d0")
    encoder("gc", "GC-DPR, larger batch", "GC-DPR", "d0 more")
    for n in (1, 2, 3):
        last = f"m{n - 1}"
        own = f"{last}/ann.metrics.json {last}/lookahead.run m{n}.jsonl"
        over, after = ("d0", "start vectors") if n == 1 else (last, last)
        encoder(f"m{n}", f"ANCE-Tele, episode {n}", "ANCE-Tele", over, own, after)
    encoder("d1", "RocketQA M_D1", "RocketQA", "d0", "d0/train_ce.metrics.json d1.jsonl", "d0 c")
    own = "d1/unlabelled.metrics.json d1/unlabelled_ce.metrics.json pseudo.jsonl"
    encoder("d2", "RocketQA M_D2", "RocketQA", "d1 d0", own, "d1 c")

    # what reorders DPR's ranking
    own, runs = "d0/test_ce.metrics.json", "d0/test.run d0/test_ce.run"
    row("d0_ce", "DPR + cross-encoder", "+ cross-encoder", "d0", own, "d0 c", runs)
    row("hybrid", "DPR + BM25", "+ BM25", "d0 bm25", "d0/hybrid.metrics.json", "d0 bm25", "d0/hybrid.run")

    # readers
    own = "d0/questions.metrics.json d0/dev.metrics.json reading/metrics.json reading/answers.metrics.json"
    answers = "reading/answers.answers.json"
    row("reading", "extractive reader on DPR", "reader", "", own, "d0", "d0/test.run", answers)
    own, answers = "emdr2/fid/metrics.json emdr2/fid/answers.metrics.json", "emdr2/fid/answers.answers.json"
    name = f"FiD, its retriever ({NO_QUESTION[first]}) frozen"
    row("fid", name, "FiD", "", own, "start vectors", f"{first}/test.run", answers)
    own, answers = "emdr2/answers.metrics.json", "emdr2/answers.answers.json"
    encoder("emdr2", "EMDR2 after this FiD", "EMDR2", f"{first} fid", own, "fid", answers)
    return rows


def costs_of(run_dir, rows):
    """Return {key: (outputs of its stages, keys that it is built on)} of the rows and what they share."""
    first = start_of(run_dir)
    shared = {
        "negatives": ("data/bm25_train.run data/bm25_dev.run data/train.jsonl data/dev.jsonl", ""),
        "start": ("data/cloze.jsonl cloze/metrics.json", "negatives"),
        "vectors": (f"{first}/embeddings/manifest.json", ""),
        "c": ("d0/train.metrics.json c.jsonl c/metrics.json", "d0"),
    }
    costs = {key: (own.split(), after.split()) for key, (own, after) in shared.items()}
    return costs | {row.key: (row.own, row.after) for row in rows}


def all_of(key, costs):
    """Return the outputs of everything that `key` is built on, its own among them, each once."""
    outputs, parents = costs.get(key, ([], []))
    return {*outputs}.union(*(all_of(parent, costs) for parent in parents))


def measured(run_dir):
    """Return [(output, seconds, MB)] of recipes/measured.py."""
    path = run_dir / "peaks.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.is_file() else []
    return [(output, float(seconds), float(megabytes)) for output, _, seconds, megabytes in lines]


def cost(outputs, run_dir, lines):
    """Return (minutes, peak in GB) of some stages; Nones when one that was run was not measured."""
    seconds, megabytes = 0.0, []
    for output in outputs:
        if (run_dir / output).exists():
            mine = [line for line in lines if line[0].endswith(f"/{output}")]
            if not mine:
                return None, None
            seconds += sum(line[1] for line in mine)
            megabytes += [line[2] for line in mine]
    return (seconds / 60, max(megabytes) / 1000) if megabytes else (None, None)


def values_of(row, run_dir, questions, corpus):
    """Return {metric: array [Q]} of a row, a number a question; {} where one of its files is missing."""
    paths = [run_dir / path for path in [*row.runs, row.answers] if path]
    values = {}
    if all(path.is_file() for path in paths):
        for path in paths:
            # a later ranking has the first passages in another order: top-k stays for every larger k
            values |= per_question(path, questions, corpus)
    return values


def table_of(run_dir, questions, corpus):
    """Return ({key: {metric: array [Q]}}, the table's rows as dicts) of one folder."""
    rows = rows_of(run_dir)
    costs, lines = costs_of(run_dir, rows), measured(run_dir)
    values, table = {}, []
    for row in rows:
        values[row.key] = values_of(row, run_dir, questions, corpus)
        steps = minutes = peak = in_all = None
        if values[row.key]:
            minutes, peak = cost(row.own, run_dir, lines)
            in_all, _ = cost(sorted(all_of(row.key, costs)), run_dir, lines)
            for output in row.own:
                if output.endswith("/metrics.json") and (run_dir / output).is_file():
                    steps = read_json(run_dir / output)["step"]
        entry = {"key": row.key, "name": row.name, "system": row.system, "over": row.over}
        entry |= {"ranking": row.runs[-1], "answers": row.answers, "n": len(questions)}
        entry["metrics"] = with_intervals(values[row.key])
        entry |= {"updates": steps, "minutes": minutes, "minutes_in_all": in_all, "peak_gb": peak}
        table.append(entry)
    return values, table


def shown_of(table):
    """Return {"pairs", "pictures"} for recipes/page.py: rows to compare, and encoders with their rankings."""
    steps = [(row["key"], over) for row in table for over in row["over"]]
    pairs = dict.fromkeys([("d0", "bm25"), *steps])
    encoders = [row["key"] for row in table if row["key"] in ("untrained", "cloze", "d0")]
    return {"pairs": [*pairs], "pictures": [(key, key, f"{key}/test.run") for key in encoders]}


def gains_of(table, values):
    """Return [{"row", "over", "metrics"}]: each row against those before it, question by question."""
    names = {row["key"]: row["name"] for row in table}
    gains = []
    for row in table:
        mine = values[row["key"]]
        for over in row["over"]:
            theirs = values.get(over, {})
            both = {m: mine[m] - theirs[m] for m in GAINS if m in mine and m in theirs}
            if both:
                gains.append({"row": row["name"], "over": names[over], "metrics": with_intervals(both)})
    return gains


def notes_of(run_dir, data, table, corpus):
    """Return what differs between the rows: sentences, with the numbers of this run."""
    counts = {}
    for name in ("labelled", "unlabelled"):
        path = data / f"{name}.jsonl"
        counts[name] = f"{sum(1 for _ in iter_jsonl(path)):,}" if path.is_file() else "?"
    first = start_of(run_dir)
    counts["first"] = f"the {NO_QUESTION[first]} encoder"
    counts["start"] = "what the inverse cloze taught them" if first == "cloze" else "those weights too"
    counts["titles"] = "" if any(passage.title for passage in corpus) else " All titles are blank."
    gate = run_dir / "gate.txt"
    words = gate.read_text().split() if gate.is_file() else [NOT_RUN, NOT_RUN]
    counts |= dict(zip(("below", "above"), words, strict=True))
    return [" ".join(note.split()) for note in NOTES.format(**counts).strip().split("\n\n")]


def over_seeds(tables):
    """Return {key: {"n", metric: {"mean", "low", "high"}}} over the folders that ran the row; a range."""
    seeds = {}
    for row in tables[0]:
        key = row["key"]
        metrics = [other["metrics"] for table in tables for other in table if other["key"] == key]
        metrics = [values for values in metrics if values]
        seeds[key] = {"n": len(metrics)}
        for name in METRICS:
            numbers = [values[name]["value"] for values in metrics if name in values]
            if numbers:
                mean = float(np.mean(numbers))
                seeds[key][name] = {"mean": mean, "low": min(numbers), "high": max(numbers)}
    return seeds


# ---------------------------------------------------------------- markdown
def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(metrics, name, middle="value", form="{:.1f} ({:.1f}–{:.1f})"):
    """Return `12.3 (10.1–14.5)`, or – where there is no such metric."""
    if name not in metrics:
        return "–"
    return form.format(*(100 * metrics[name][key] for key in (middle, "low", "high")))


def page(result):
    """Return the table, the notes, the seeds and the gains as markdown."""
    rows, seeds = result["rows"], result["seeds"]
    body = []
    for row in rows:
        costs = [row["minutes"], row["minutes_in_all"], row["peak_gb"]]
        cells = [percent(row["metrics"], name) for name in METRICS]
        cells += [f"{row['n']:,}", str(row["updates"] or "–")]
        cells += ["not measured" if number is None else f"{number:.1f}" for number in costs]
        cells += [str(seeds[row["key"]]["n"])]
        body.append([row["name"], *(cells if row["metrics"] else [NOT_RUN] * len(cells))])
    head = ["", *METRICS, "n", "updates", "minutes", "in all", "GB", "seeds"]
    text = markdown(head, body) + "\n" + "".join(f"- {note}\n" for note in result["notes"])

    body = []
    for row in rows:
        over = seeds[row["key"]]
        if over["n"] > 1:
            body.append([row["name"], str(over["n"]), *(percent(over, name, "mean") for name in METRICS)])
    if body:
        text += "\nMean over seeds (lowest–highest):\n\n" + markdown(["", "seeds", *METRICS], body)

    body = []
    for gain in result["gains"]:
        cells = [percent(gain["metrics"], name, form="{:+.1f} ({:.1f} to {:.1f})") for name in GAINS]
        body.append([f"{gain['row']} over {gain['over']}", *cells])
    return text + "\nGains, paired by question, first seed:\n\n" + markdown(["", *GAINS], body)


def main(*arguments):
    *folders, data = map(Path, arguments)
    questions, corpus = read_questions(data / "test.jsonl"), Corpus(data / "corpus.tsv")
    tables = [table_of(folder, questions, corpus) for folder in folders]
    values, table = tables[0]
    result = {"questions": len(questions), "passages": len(corpus), "rows": table}
    result |= {"notes": notes_of(folders[0], data, table, corpus), "gains": gains_of(table, values)}
    result |= {"seeds": over_seeds([rows for _, rows in tables])} | shown_of(table)
    size = f"{len(questions):,} questions, {len(corpus):,} passages"
    text = f"{size}; percent (95 % bootstrap interval).\n\n{page(result)}"
    print(text, end="")
    as_json = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    for name, content in (("table.md", text), ("table.json", as_json)):
        write_text(folders[0] / name, content)


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) < 3:
            raise UserError("usage: python recipes/ladder.py RUN [RUN ...] DATA")
        main(*sys.argv[1:])
