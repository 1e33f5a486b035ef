"""
Print the demo's table: BM25, untrained and trained encoder, hybrid; the reader's answers; seconds a stage.

In:  the run folder of recipes/demo.sh and its data folder
Out: the table on the screen, RUN/table.json. Every number has its 95 % interval
Run: python recipes/demo/table.py runs/demo data/demo
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data import Corpus, iter_run, read_questions  # noqa: E402
from utils.metrics import (  # noqa: E402
    answer_scores,
    one_question_at_a_time,
    retrieval_metrics,
    with_intervals,
)
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json, write_json  # noqa: E402

KS = (1, 5, 20, 100)
COLUMNS = [f"top-{k}" for k in KS] + ["MRR@10"]
RUNS = {
    "BM25": "bm25_runs/test.run",
    "untrained encoder": "untrained/test.run",
    "trained encoder": "test/test.run",
    "trained + BM25": "test/hybrid.run",
}


def cell(metrics, name):
    """Return `12.3 (10.1-14.5)`, in percent; `-` where there is no such metric."""
    if name not in metrics:
        return "-"
    value, low, high = (100 * metrics[name][key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def title_scores(ranked, corpus):
    """Return the scores of a reader that always answers with the title of the first passage."""
    examples, answers = [], []
    for question, pids in ranked:
        answer = None
        if pids:
            title = corpus.passage(pids[0]).title
            answer = {"text": re.sub(r" \(.*\)$", "", title)}  # without what stands in brackets
        examples.append(question)
        answers.append([answer])
    return with_intervals(answer_scores(examples, answers, [1]))


def main(run_dir, data):
    # what the retrievers find
    corpus = Corpus(f"{data}/corpus.tsv")
    questions = read_questions(f"{data}/test.jsonl")
    table = {}
    for name, path in RUNS.items():
        ranked = one_question_at_a_time(questions, iter_run(f"{run_dir}/{path}"))
        table[name] = retrieval_metrics(ranked, corpus, KS)

    # what the reader answers from the first passages
    ranked = one_question_at_a_time(questions, iter_run(f"{run_dir}/test/test.run"))
    titles = title_scores(ranked, corpus)
    answers = {"title of passage 1": {metric: titles[f"{metric}@1"] for metric in ("EM", "F1")}}
    found = read_json(f"{run_dir}/test/reader.metrics.json")
    for depth in [name.partition("@")[2] for name in found if name.startswith("EM@")]:
        row = {metric: found[f"{metric}@{depth}"] for metric in ("EM", "F1")}
        answers[f"reader, best of {depth}"] = row
    write_json(Path(run_dir) / "table.json", table | answers)

    # print both, and the time
    print(f"n = {len(questions)} questions, {len(corpus):,} passages; percent, 95 % bootstrap interval")
    print(f"{'':18}" + "".join(f"{column:>20}" for column in COLUMNS))
    for name, metrics in table.items():
        print(f"{name:18}" + "".join(f"{cell(metrics, column):>20}" for column in COLUMNS))
    print("top-k: one of the k best passages holds an answer; MRR: by the rank of the question's own passage")
    print(f"\n{'':28}{'exact match':>20}{'F1':>20}")
    for name, metrics in answers.items():
        print(f"{name:28}{cell(metrics, 'EM'):>20}{cell(metrics, 'F1'):>20}")
    seconds = [line.split("\t") for line in (Path(run_dir) / "seconds.tsv").read_text().splitlines()]
    print("seconds: " + ", ".join(f"{name} {time}" for name, time in seconds), end="")
    print(f"; in all {sum(int(time) for _, time in seconds) / 60:.1f} minutes")
    trained, untrained = table["trained encoder"]["top-20"], table["untrained encoder"]["top-20"]
    verdict = "beats" if trained["low"] > untrained["high"] else "does not beat"
    print(f"The trained encoder {verdict} the untrained one by more than the interval (top-20).")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 3:
            raise UserError("usage: python recipes/demo/table.py RUN_FOLDER DATA_FOLDER")
        main(*sys.argv[1:])
