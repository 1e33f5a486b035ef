"""
The demo's table: BM25, untrained and trained encoder, hybrid; the reader's answers; accuracy with n and 95 %
interval, seconds a stage.

Run: python recipes/demo/table.py runs/demo data/demo
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes.reader_baselines import title_answers  # noqa: E402
from utils.data import Corpus, iter_run, read_questions  # noqa: E402
from utils.metrics import (  # noqa: E402
    answer_scores,
    one_question_at_a_time,
    retrieval_metrics,
    with_intervals,
)
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json, write_json  # noqa: E402
from utils.reader_data import read_ranking  # noqa: E402

KS = (1, 5, 20, 100)
RUNS = {
    "BM25": "bm25_runs/test.run",
    "untrained encoder": "untrained/test.run",
    "trained encoder": "test/test.run",
    "trained + BM25": "test/hybrid.run",
}


def cell(m):
    return f"{m['value']:.1%} ({m['low']:.1%}-{m['high']:.1%})".replace("%", "")


def reading(run_dir, data, corpus):
    """{row: {"EM", "F1"}} of the first passage's title as the answer, and of the reader at each depth."""
    examples, corpus, _ = read_ranking(f"{data}/test.jsonl", f"{run_dir}/test/test.run", corpus, 1)
    titles = with_intervals(answer_scores(examples, title_answers(examples, corpus), [1]))
    found = read_json(f"{run_dir}/test/reader.metrics.json")
    depths = [name.partition("@")[2] for name in found if name.startswith("EM@")]
    rows = {"title of passage 1": (titles, "1")} | {f"reader, best of {n}": (found, n) for n in depths}
    return {row: {m: values[f"{m}@{n}"] for m in ("EM", "F1")} for row, (values, n) in rows.items()}


def main(run_dir, data):
    corpus, questions = Corpus(f"{data}/corpus.tsv"), read_questions(f"{data}/test.jsonl")
    table = {}
    for name, path in RUNS.items():
        ranked = one_question_at_a_time(questions, iter_run(f"{run_dir}/{path}"))
        table[name] = retrieval_metrics(ranked, corpus, KS)
    answers = reading(run_dir, data, corpus)
    write_json(Path(run_dir) / "table.json", table | answers)
    columns = [f"top-{k}" for k in KS] + ["MRR@10"]
    print(f"n = {len(questions)} questions, {len(corpus):,} passages; percent, 95 % bootstrap interval")
    print(f"{'':18}" + "".join(f"{column:>20}" for column in columns))
    for name, metrics in table.items():
        print(f"{name:18}" + "".join(f"{cell(metrics[column]):>20}" for column in columns))
    print(
        "top-k: an answer stands in one of the k best passages; MRR: the rank of the question's own passage"
    )
    print(f"\n{'':28}{'exact match':>20}{'F1':>20}")
    for name, metrics in answers.items():
        print(f"{name:28}{cell(metrics['EM']):>20}{cell(metrics['F1']):>20}")
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
