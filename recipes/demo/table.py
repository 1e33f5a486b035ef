"""
Print the table of recipes/own_data.sh: BM25, untrained and trained encoder, both; the reader; seconds.

In:  the run folder of recipes/own_data.sh, its data folder and corpus; `regex`: the answers are patterns
Out: the table on the screen; RUN/table.json with the same rows and what recipes/page.py needs to know. Every
     number has its 95 % interval
Run: python recipes/demo/table.py runs/demo data/demo data/demo/corpus.tsv string
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
WITH_ANSWERS = [f"top-{k}" for k in KS] + ["MRR@10"]
BY_ID = [f"hit@{k}" for k in KS] + ["MRR@10", "nDCG@10"]

# of a ranking: its row, its system, the file, the stages of seconds.tsv that it is built on, its own last
CLOZE = "bm25_dev mine_dev cloze_data cloze_train"
DPR = f"bm25_train mine_train {CLOZE} train encode test"
RANKINGS = [
    ("BM25", "BM25", "bm25_runs/test.run", "bm25_test"),
    ("untrained encoder", "no questions", "untrained/test.run", "untrained encode_untrained test_untrained"),
    ("inverse cloze alone", "no questions", "cloze/test.run", f"{CLOZE} encode_cloze test_cloze"),
    ("trained encoder", "DPR", "test/test.run", DPR),
    ("trained + BM25", "+ BM25", "test/hybrid.run", f"{DPR} bm25_test search_dev hybrid_weight test_hybrid"),
]
READER = f"{DPR} search_dev search_train read_train read"
PAIRS = [
    ("trained encoder", "BM25"),
    ("trained encoder", "inverse cloze alone"),
    ("inverse cloze alone", "untrained encoder"),
    ("trained + BM25", "trained encoder"),
    ("trained + BM25", "BM25"),
]
PICTURES = [
    ("untrained", "untrained", "untrained/test.run"),
    ("inverse cloze", "cloze", "cloze/test.run"),
    ("trained", ".", "test/test.run"),
]


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


def reader_scores(run_dir, questions, corpus):
    """Return {row: {"EM", "F1"}} of the reader, and of one that says the title of the first passage."""
    ranked = one_question_at_a_time(questions, iter_run(f"{run_dir}/test/test.run"))
    titles = title_scores(ranked, corpus)
    if not titles:  # no test question has answers
        return {}
    answers = {"title of passage 1": {metric: titles[f"{metric}@1"] for metric in ("EM", "F1")}}
    found = read_json(f"{run_dir}/test/reader.metrics.json")
    for depth in [name.partition("@")[2] for name in found if name.startswith("EM@")]:
        row = {metric: found[f"{metric}@{depth}"] for metric in ("EM", "F1")}
        answers[f"reader, best of {depth}"] = row
    return answers


def minutes_of(stages, seconds):
    """Return what the stages of a row took together; None where its own one was not measured."""
    stages = stages.split()
    measured = [seconds[stage] for stage in stages if stage in seconds]
    return sum(measured) / 60 if stages[-1] in seconds else None


def write_table(run_dir, table, answers, seconds):
    """Write RUN/table.json, with the keys of the ladder's (recipes/ladder.py)."""
    rows = []

    def row(name, system, ranking, metrics, stages, said=""):
        entry = {"key": name, "name": name, "system": system, "ranking": ranking, "answers": said}
        entry |= {"metrics": metrics, "minutes_in_all": minutes_of(stages, seconds), "updates": None}
        rows.append(entry)

    for name, system, ranking, stages in RANKINGS:
        row(name, system, ranking, table.get(name, {}), stages)
    for name, metrics in answers.items():
        reads = name.startswith("reader")
        said = "test/reader.answers.json" if name == list(answers)[-1] else ""  # those of the largest depth
        row(name, "reader", "test/test.run", metrics, READER if reads else DPR, said)
    result = {"rows": rows, "notes": [], "seeds": {}, "pairs": PAIRS, "pictures": PICTURES}
    write_json(Path(run_dir) / "table.json", result)


def main(run_dir, data, corpus, match):
    # what the retrievers find, and what a reader answers from it
    corpus = Corpus(corpus)
    questions = read_questions(f"{data}/test.jsonl")
    table = {}
    for name, _, path, _ in RANKINGS:
        if Path(f"{run_dir}/{path}").is_file():  # a small corpus has no inverse cloze
            ranked = one_question_at_a_time(questions, iter_run(f"{run_dir}/{path}"))
            table[name] = retrieval_metrics(ranked, corpus, KS, match == "regex")
    answers = {}
    if Path(f"{run_dir}/test/reader.metrics.json").is_file():
        answers = reader_scores(run_dir, questions, corpus)
    lines = (Path(run_dir) / "seconds.tsv").read_text().splitlines()
    seconds = {name: int(number) for name, number in (line.split("\t") for line in lines)}
    write_table(run_dir, table, answers, seconds)

    # print both, and the time
    print(f"n = {len(questions)} questions, {len(corpus):,} passages; percent, 95 % bootstrap interval")
    columns = WITH_ANSWERS if "top-1" in table["BM25"] else BY_ID
    print(f"{'':20}" + "".join(f"{column:>20}" for column in columns))
    for name, metrics in table.items():
        print(f"{name:20}" + "".join(f"{cell(metrics, column):>20}" for column in columns))
    print("top-k: one of the k best passages holds an answer; MRR: by the rank of the question's own passage")
    if answers:
        print(f"\n{'':28}{'exact match':>20}{'F1':>20}")
    for name, metrics in answers.items():
        print(f"{name:28}{cell(metrics, 'EM'):>20}{cell(metrics, 'F1'):>20}")
    print("seconds: " + ", ".join(f"{name} {number}" for name, number in seconds.items()), end="")
    print(f"; in all {sum(seconds.values()) / 60:.1f} minutes")
    if columns[2] not in table["trained encoder"]:
        print("No test question has answers, or passage ids as positives, so nothing can be counted.")
        return
    trained, untrained = table["trained encoder"][columns[2]], table["untrained encoder"][columns[2]]
    verdict = "beats" if trained["low"] > untrained["high"] else "does not beat"
    print(f"The trained encoder {verdict} the untrained one by more than the interval ({columns[2]}).")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 5:
            raise UserError("usage: python recipes/demo/table.py RUN_FOLDER DATA_FOLDER CORPUS string|regex")
        main(*sys.argv[1:])
