"""
Make a page of a run: what every system found, what taught it, how it was trained, how its vectors moved.

In:  the run folder of recipes/own_data.sh (the demo's too) or of ladder.sh, whose table.json names the rows
     and where all stands (of other runs: page_table.py); the corpus and the test questions
Out: one html file for a browser, without server and network; `page.html#q=QID` opens a question
Run: python recipes/page.py runs/demo --out runs/demo/page.html
     python recipes/page.py runs/ladder_small --out runs/ladder_small/page.html --megabytes 4

What the folder lacks says "not run". Test questions are taken until the page has its size, those with beliefs
of EMDR2 (belief.json) first, the others drawn at random; the table counts all. page_template.html holds the
looks and gets everything as JSON; page_vectors.py makes the pictures of vectors.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.page_vectors import pictures_of  # noqa: E402
from recipes.plot import points, read_rows  # noqa: E402
from utils.data import Corpus, iter_jsonl, iter_run, passage_key, passage_of, read_questions  # noqa: E402
from utils.metrics import first_rank, gold_ids  # noqa: E402
from utils.plumbing.config import ROOT, UserError, friendly_errors, need_out, read_yaml  # noqa: E402
from utils.plumbing.files import atomic_file, read_json  # noqa: E402
from utils.text import exact_match, has_answer  # noqa: E402

TEMPLATE = Path(__file__).with_name("page_template.html")
RANKS, DEPTH = 10, 20  # passages shown of a ranking; so deep a system may "find" an answer
LESSONS, NEGATIVES = 60, 6  # training questions; negatives shown of each source
POINTS = 120  # of a curve; a longer one is drawn by the means of its pieces
CHARACTERS = 2000  # of a passage; more is cut
PANELS = "loss acc average_rank mrr accuracy em f1 hit@1 hit@5 hit@20 ret entropy agree".split()


# ---------------------------------------------------------------- the run folder
def open_run(run, data):
    """Return (its table.json, path of the corpus, path of the test questions)."""
    if not (run / "table.json").is_file():
        raise UserError(f"{run}/table.json: no such file; recipes/own_data.sh and ladder.sh write it")
    table = read_json(run / "table.json")
    if "pictures" not in table:
        again = "make it again by recipes/ladder.py or recipes/demo/table.py"
        raise UserError(f"{run}/table.json: it does not say where the encoders are; {again}")

    # the ladder has its own data folder; a demo knows the corpus that it was trained on
    if data is None and (run / "data" / "test.jsonl").is_file():
        data = run / "data"
    corpus = data / "corpus.tsv" if data else ROOT / read_yaml(run / "config.yaml")["corpus"]
    if not corpus.is_file() and corpus.with_suffix(".jsonl").is_file():
        corpus = corpus.with_suffix(".jsonl")
    test = corpus.parent / "test.jsonl"
    for path in (corpus, test):
        if not path.is_file():
            raise UserError(f"{path}: no such file; --data names the folder of corpus and test.jsonl")
    return table, corpus, test


def rankings_of(path, wanted):
    """Return {qid: {pid: score}} of some questions of a .run, best first; {} where there is no such file."""
    return {qid: dict(hits) for qid, hits in iter_run(path) if qid in wanted} if path.is_file() else {}


# ---------------------------------------------------------------- passages
class Shelf:
    """The passages of the page, each once, by their numbers; `size`: the bytes that they take."""

    def __init__(self, corpus):
        self.corpus, self.numbers, self.rows, self.size = corpus, {}, [], 0

    def number(self, entry):
        """Return the number of a passage id or of an inline passage."""
        key = passage_key(entry)
        if key not in self.numbers:
            self.numbers[key] = len(self.rows)
            pid, title, text = passage_of(entry, self.corpus)
            cut = text[:CHARACTERS] + "…" * (len(text) > CHARACTERS)
            self.rows.append([pid, title, cut])
            self.size += len(as_json(self.rows[-1]))
        return self.numbers[key]

    def holds(self, pid, answers, regex=False):
        return has_answer(self.corpus.passage(pid).text, answers, regex)


def as_json(value):
    """Return utf-8 json that can stand in html: no text in it can end its element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode()


# ---------------------------------------------------------------- one question
def question_row(question, systems, said, beliefs, shelf, regex):
    """Return what the page knows of a test question, numbers in place of passages."""
    answers, gold = question["answers"], gold_ids(question)
    row = {"qid": question["qid"], "text": question["question"], "answers": answers}
    row |= {"gold": [shelf.number(pid) for pid in gold], "ranks": [], "first": [], "goldRanks": []}

    # the rankings, and which of their passages hold an answer
    hits = {}
    for rankings in systems:
        pids = list(rankings.get(row["qid"], ()))
        for pid in pids[:DEPTH]:
            if pid not in hits:
                hits[pid] = shelf.holds(pid, answers, regex) if answers else pid in gold
        row["ranks"].append([shelf.number(pid) for pid in pids[:RANKS]])
        row["first"].append(first_rank(hits[pid] for pid in pids[:DEPTH]))
        row["goldRanks"].append(first_rank(pid in gold for pid in pids))

    # the readers' answers, and how far reader and retriever of EMDR2 believed in a passage
    texts = [known.get(row["qid"]) for known in said]
    row["said"] = [text if text is None else [text, exact_match(text, answers)] for text in texts]
    row["belief"] = belief_of(beliefs[row["qid"]], shelf) if row["qid"] in beliefs else []
    shown = [pid for pid, hit in hits.items() if hit and answers and pid in shelf.numbers]
    row["hits"] = [shelf.numbers[pid] for pid in shown]
    return row


def belief_of(belief, shelf):
    """Return [[passage, prior and posterior before EMDR2, both after it], ...] (recipes/reader_signal.py)."""
    numbers = [shelf.number(pid) for pid in belief["passages"]]
    shares = [belief[time][kind] for time in ("before", "after") for kind in ("prior", "posterior")]
    return [list(line) for line in zip(numbers, *shares, strict=True)]


# ---------------------------------------------------------------- what taught it
def ranking_of_bm25(rows):
    return next((row["ranking"] for row in rows if row["system"] == "BM25"), "")


def training_files(rows):
    """Return [(name, file, {source: the ranking it was mined from}, the last episode's file), ...]."""
    systems = {row["system"] for row in rows}
    bm25 = ranking_of_bm25(rows).replace("test.run", "train.run")
    files = [("negatives of BM25", "data/train.jsonl", {"BM25": bm25}, "")]
    for n in (1, 2, 3) if "ANCE-Tele" in systems else ():
        rankings = {"ANN": f"m{n - 1}/ann.run", "look-ahead": f"m{n - 1}/lookahead.run"}
        momentum = f"m{n - 1}.jsonl" if n > 1 else ""
        files.append((f"ANCE-Tele, episode {n}", f"m{n}.jsonl", rankings, momentum))
    if "RocketQA" in systems:
        files.append(("RocketQA M_D1, denoised", "d1.jsonl", {"DPR": "d0/train.run"}, ""))
        files.append(("RocketQA, new labels", "pseudo.jsonl", {"M_D1": "d1/unlabelled.run"}, ""))
    return files


def lines_of(path):
    """Return {qid: its line} of a training file; RocketQA has a line for each negative, here they are one."""
    found = {}
    for _, line in iter_jsonl(path) if path.is_file() else ():
        kept = found.setdefault(line["qid"], line | {"negatives": []})
        kept["negatives"] += line["negatives"]
    return found


def lessons_of(run, files, shelf):
    """Return {"files": names, "below": the gate, "questions": rows} of some training questions."""
    lines = {path: lines_of(run / path) for path in ["", *(path for _, path, *_ in files)]}

    # questions of the first file and some of RocketQA's new ones, evenly spaced
    wanted = {}
    for path, count in (("data/train.jsonl", LESSONS), ("pseudo.jsonl", LESSONS // 6)):
        qids = list(lines.get(path, ()))
        wanted |= {qid: lines[path][qid] for qid in qids[:: max(1, math.ceil(len(qids) / count))]}

    # their rankings, the cross-encoder's scores, and the gate under which a passage may be a negative
    paths = {path for _, _, rankings, _ in files for path in rankings.values()}
    runs = {path: rankings_of(run / path, wanted) for path in paths}
    scores = rankings_of(run / "d0/train_ce.run", wanted)
    scores |= rankings_of(run / "d1/unlabelled_ce.run", wanted)
    gate = run / "gate.txt"
    below = float(gate.read_text().split()[0]) if gate.is_file() else 0.0

    # a row a question, in it a list of groups a file
    rows = []
    for qid, line in wanted.items():
        known = scores.get(qid, {})
        row = {"qid": qid, "text": line["question"], "answers": line.get("answers") or [], "files": []}
        row["gold"] = [shelf.number(entry) for entry in line["positives"]]
        for _, path, rankings, last in files:
            ranked = {name: list(runs[ranking].get(qid, ())) for name, ranking in rankings.items()}
            groups = groups_of(lines[path].get(qid, {}), ranked, lines[last].get(qid, {}), shelf)
            if path == "d1.jsonl" and row["answers"]:
                groups += thrown_out(line, known, below, shelf)
            row["files"].append(groups)
        row["scores"] = {shelf.numbers[pid]: round(known[pid], 3) for pid in known if pid in shelf.numbers}
        rows.append(row)
    names = [[name, bool(lines[path])] for name, path, *_ in files]
    return {"files": names, "below": below, "questions": rows}


def groups_of(line, ranked, last, shelf):
    """
    Return [[source, how many, [[passage, where it stood], ...]], ...] of the negatives of a question.

    ranked: {name: ids} of the rankings that they come from. last: the question's line of the last episode,
    whose negatives (momentum) stand at the end.
    """
    negatives, groups = line.get("negatives", []), {}
    for place, entry in enumerate(negatives):
        ranks = {name: pids.index(entry) + 1 for name, pids in ranked.items() if entry in pids}
        source = " and ".join(ranks) or "elsewhere"
        if place >= len(negatives) - len(last.get("negatives", [])):
            source = "momentum"
        note = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        groups.setdefault(source, []).append((entry, note))
    return [group_of(source, entries, shelf) for source, entries in groups.items()]


def group_of(source, entries, shelf):
    return [source, len(entries), [[shelf.number(entry), note] for entry, note in entries[:NEGATIVES]]]


def thrown_out(line, scores, below, shelf):
    """Return the group of passages without an answer that the cross-encoder refused as negatives."""
    refused = []
    for pid in sorted(scores, key=scores.get, reverse=True):
        right = pid in line["positives"] or shelf.holds(pid, line["answers"])
        if scores[pid] >= below and not right:
            refused.append((pid, ""))
    return [group_of("thrown out", refused, shelf)] if refused else []


# ---------------------------------------------------------------- training
def curves_of(run):
    """Return [{"name", "lines": {metric: [[step, minute, value], ...]}}] of every training in the folder."""
    curves = []
    for path in sorted(run.glob("**/metrics.jsonl")):
        if not path.stat().st_size:
            continue
        rows = read_rows(path)
        clock, lines = points(rows, "minutes", "step"), {}
        for key in PANELS:
            steps, values = points(rows, key, "step")
            if len(values):
                minutes = np.interp(steps, *clock) if clock.size else 0 * steps
                numbers = np.stack([steps, minutes, values])
                pieces = np.array_split(numbers, min(len(values), POINTS), axis=1)
                lines[key] = [[float(f"{number:.4g}") for number in piece.mean(1)] for piece in pieces]
        name = str(path.parent.relative_to(run))
        curves.append({"name": "trained encoder" if name == "." else name, "lines": lines})
    return curves


# ---------------------------------------------------------------- main
def content_of(run, data, regex, megabytes):
    """Return all that the page shows, as one dict."""
    table, corpus, test = open_run(run, data)
    questions = read_questions(test, match="regex" if regex else "string")
    qids = {question["qid"] for question in questions}
    shelf, rows = Shelf(Corpus(corpus)), table["rows"]

    # in what order questions are taken: those with a belief, then by chance
    beliefs = {}
    for path in sorted(run.glob("**/belief.json")):
        beliefs |= {belief["qid"]: belief for belief in read_json(path)}
    shuffled = np.random.default_rng(0).permutation(len(questions)).tolist()
    order = sorted(shuffled, key=lambda place: questions[place]["qid"] not in beliefs)
    drawn = [questions[place] for place in order]

    # everything but the questions. why not the whole path: a page is shown to others
    content = {"run": "/".join(run.parts[-2:])}
    content |= {"questionsInAll": len(questions), "passagesInAll": len(shelf.corpus)}
    content |= {key: table[key] for key in ("rows", "seeds", "notes")}
    content |= {"lessons": lessons_of(run, training_files(rows), shelf), "curves": curves_of(run)}
    bm25 = rankings_of(run / ranking_of_bm25(rows), qids)
    encoders = [(name, run / at, rankings_of(run / path, qids)) for name, at, path in table["pictures"]]
    content["pictures"] = pictures_of(encoders, bm25, drawn, shelf, regex)

    # the columns: every ranking once, because a reader has the ranking of its retriever; then the readers
    columns = []
    for row in rows:
        if row["ranking"] and row["ranking"] not in [other["ranking"] for other in columns]:
            columns.append(row)
    systems = [rankings_of(run / row["ranking"], qids) for row in columns]
    content["systems"] = [[row["name"], bool(found)] for row, found in zip(columns, systems, strict=True)]
    number = {row["key"]: i for i, row in enumerate(columns) if systems[i]}
    content["pairs"] = [[number[a], number[b]] for a, b in table["pairs"] if a in number and b in number]
    readers = [row for row in rows if row["answers"]]
    said = [read_json(run / row["answers"], {}) for row in readers]
    content["readers"] = [[row["name"], bool(answers)] for row, answers in zip(readers, said, strict=True)]

    # questions until the page is full
    room = megabytes * 1e6 - TEMPLATE.stat().st_size
    room -= len(as_json(content | {"questions": [], "passages": []}))
    shown, passages = {}, len(shelf.rows)
    for place, question in zip(order, drawn, strict=True):
        row = question_row(question, systems, said, beliefs, shelf, regex)
        room -= len(as_json(row)) + 1
        if shelf.size + len(shelf.rows) > room:
            break
        shown[place], passages = row, len(shelf.rows)
    content["questions"] = [shown[place] for place in sorted(shown)]
    return content | {"passages": shelf.rows[:passages]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--out", required=True, help="the html file to write")
    parser.add_argument("--data", help="the folder of corpus and test.jsonl; default: the run names it")
    parser.add_argument("--match", default="string", choices=("string", "regex"), help="what answers are")
    parser.add_argument("--megabytes", type=float, default=5.0, help="the page's size at most")
    args = parser.parse_args(argv)
    if not args.out.endswith(".html"):
        raise UserError(f"out must be the path of an .html file, got {args.out!r}")
    need_out(args, "out")
    data = Path(args.data) if args.data else None
    content = content_of(Path(args.run), data, args.match == "regex", args.megabytes)
    before, after = TEMPLATE.read_bytes().split(b"DATA_OF_THE_PAGE")
    with atomic_file(args.out, "wb") as file:
        file.write(before + as_json(content) + after)
    size = Path(args.out).stat().st_size / 1e6
    shown = f"{len(content['questions'])} of {content['questionsInAll']} questions"
    print(f"written: {args.out} ({size:.1f} MB, {shown}); open it in a browser")


if __name__ == "__main__":
    with friendly_errors():
        main()
