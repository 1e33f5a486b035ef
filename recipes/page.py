"""
Make a page of a run: what every system found, what taught it, how it was trained, how its vectors moved.

In:  the run folder of recipes/own_data.sh (the demo's too) or of recipes/ladder.sh, its corpus and questions
Out: one html file for a browser, without server and network; `page.html#q=QID` opens a question
Run: python recipes/page.py runs/demo --out runs/demo/page.html
     python recipes/page.py runs/ladder_small --out runs/ladder_small/page.html --megabytes 4

What the folder lacks says "not run". Test questions are drawn at random until the page has its size; the
table counts all of them. recipes/page_template.html holds the looks and gets everything as JSON.

N points of a picture · D dimensions · E encoders
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import ladder  # noqa: E402
from recipes.compare import first_rank  # noqa: E402
from recipes.demo.table import RUNS  # noqa: E402
from recipes.plot import points, read_rows  # noqa: E402
from utils.data import Corpus, iter_jsonl, iter_run, passage_key, passage_of, read_questions  # noqa: E402
from utils.metrics import gold_ids  # noqa: E402
from utils.plumbing.config import ROOT, UserError, friendly_errors, need_out, read_yaml  # noqa: E402
from utils.plumbing.files import atomic_file, read_json  # noqa: E402
from utils.text import exact_match, has_answer  # noqa: E402

TEMPLATE = Path(__file__).with_name("page_template.html")
RANKS, DEPTH = 10, 20  # passages shown of a ranking; so deep a system may "find" an answer
LESSONS, NEGATIVES = 60, 6  # training questions; negatives shown of each source
PICTURES, NEIGHBOURS = 24, 8  # questions with a picture of vectors; passages of each ranking in it
POINTS = 120  # of a curve; a longer one is drawn by the means of its pieces
CHARACTERS = 2000  # of a passage; more is cut
METRICS = [*ladder.METRICS[:4], "hit@1", "hit@5", "hit@20", "hit@100", *ladder.METRICS[4:]]
PANELS = "loss acc average_rank mrr accuracy em f1 hit@1 hit@5 hit@20 ret entropy agree".split()

# of the demo: what a row is built on, by the names in seconds.tsv
DPR = "bm25_train bm25_dev mine_train mine_dev cloze_data cloze_train train encode test"
STAGES = {
    "BM25": "bm25_test",
    "untrained encoder": "untrained encode_untrained test_untrained",
    "trained encoder": DPR,
    "trained + BM25": f"{DPR} bm25_test search_dev hybrid_weight test_hybrid",
    "title of passage 1": DPR,
}
READER = f"{DPR} search_dev search_train read_train read"


# ---------------------------------------------------------------- what stands where in a run folder
def text_lines(path):
    """Return the lines of a file, none where there is no file."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def demo_places(run, data):
    """Return what places_of() returns, for the folder of recipes/own_data.sh."""
    config = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    corpus = Path(config.get("corpus", "data/demo/corpus.tsv"))
    if not corpus.exists():
        corpus = ROOT / corpus
    if data:
        corpus = data / corpus.name
    table = read_json(run / "table.json") if (run / "table.json").is_file() else {}
    seconds = {}
    for line in text_lines(run / "seconds.tsv"):
        name, number = line.split("\t")
        seconds[name] = int(number)
    rows = []
    for name in dict.fromkeys(["BM25", "untrained encoder", "inverse cloze alone", *RUNS, *table]):
        stages = STAGES.get(name, READER if name.startswith("reader") else "").split()
        measured = [seconds[stage] for stage in stages if stage in seconds]
        row = {"key": name, "name": name, "ranking": RUNS.get(name, ""), "metrics": table.get(name, {})}
        row |= {"updates": None, "minutes_in_all": sum(measured) / 60 if measured else None, "seeds": 1}
        rows.append(row)
    return {
        "rows": rows, "notes": [], "corpus": corpus, "test": corpus.parent / "test.jsonl",
        "bm25": "bm25_runs/test.run", "readers": [("reader", "test/reader.answers.json")],
        "pairs": [("trained encoder", "BM25"), ("trained encoder", "untrained encoder"),
                  ("trained + BM25", "trained encoder"), ("trained + BM25", "BM25")],
        "lessons": [("negatives of BM25", "data/train.jsonl", {"BM25": "bm25_runs/train.run"}, "")],
        "encoders": [("untrained", "untrained", "untrained/test.run"), ("inverse cloze", "cloze", ""),
                     ("trained", ".", "test/test.run")],
        "scores": [], "belief": (),
    }  # fmt: skip


def ladder_places(run, data):
    """Return what places_of() returns, for the folder of recipes/ladder.sh."""
    data = data or run / "data"
    stored = read_json(run / "table.json") if (run / "table.json").is_file() else {}
    rows = stored.get("rows")
    if not rows:  # it was stopped before its table
        _, rows = ladder.table_of(run, read_questions(data / "test.jsonl"), Corpus(data / "corpus.tsv"))
    for row in rows:
        row["seeds"] = stored.get("seeds", {}).get(row["key"], {"n": 1})["n"]
    known = {row.key: row for row in ladder.rows_of(run)}
    best = known["best_ce"].runs[0].partition("/")[0]
    best = best if (run / best / "test.run").is_file() else "d0"
    lessons = [("negatives of BM25", "data/train.jsonl", {"BM25": "data/bm25_train.run"}, "")]
    for n in (1, 2, 3):
        rankings = {"ANN": f"m{n - 1}/ann.run", "look-ahead": f"m{n - 1}/lookahead.run"}
        momentum = f"m{n - 1}.jsonl" if n > 1 else ""
        lessons.append((f"ANCE-Tele, episode {n}", f"m{n}.jsonl", rankings, momentum))
    lessons.append(("RocketQA M_D1, denoised", "d1.jsonl", {"DPR": "d0/train.run"}, ""))
    lessons.append(("RocketQA, new labels", "pseudo.jsonl", {"M_D1": "d1/unlabelled.run"}, ""))
    steps = [(row["key"], over) for row in rows for over in row["over"]]
    return {
        "rows": rows, "notes": stored.get("notes", []),
        "corpus": data / "corpus.tsv", "test": data / "test.jsonl", "bm25": "data/bm25_test.run",
        "readers": [(known[key].name, known[key].answers) for key in ("reading", "fid", "emdr2")],
        "pairs": [("d0", "bm25"), (best, "bm25"), *steps], "lessons": lessons,
        "encoders": [(name, name, f"{name}/test.run") for name in ("untrained", "cloze", best)],
        "scores": ["d0/train_ce.run", "d1/unlabelled_ce.run"],
        "belief": ("d0/test.run", "emdr2/test.run", "emdr2/config.yaml"),
    }  # fmt: skip


def places_of(run, data):
    """
    Return where everything stands in a run folder, as a dict of paths below it.

    rows: of the table. readers: (name, answers). pairs: keys of rows to compare. lessons: (name, training
    file, rankings that it was mined from, the last episode's file). scores: of the cross-encoder. encoders:
    (name, folder, ranking). belief: the rankings before and after EMDR2, and its config.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name the run folder of recipes/own_data.sh or ladder.sh")
    is_ladder = (run / "data" / "bm25_test.run").is_file()
    places = ladder_places(run, data) if is_ladder else demo_places(run, data)
    for key in ("corpus", "test"):
        if not places[key].is_file():
            raise UserError(f"{places[key]}: no such file; --data names the folder of corpus and questions")
    return places


def rankings_of(path, wanted):
    """Return {qid: [(pid, score), ...]} of some questions of a .run; {} where there is no such file."""
    return {qid: hits for qid, hits in iter_run(path) if qid in wanted} if path.is_file() else {}


def ids_of(rankings, question):
    return [pid for pid, _ in rankings.get(question["qid"], [])]


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


# ---------------------------------------------------------------- the table
def table_of(places):
    """Return the rows as {"name", "metrics": {name: [value, low, high]}, "minutes", "updates", "seeds"}."""
    rows = []
    for row in places["rows"]:
        metrics = {}
        for name in METRICS:
            if name in row["metrics"]:
                cell = row["metrics"][name]
                metrics[name] = [round(100 * cell[key], 1) for key in ("value", "low", "high")]
        kept = {"name": row["name"], "metrics": metrics, "minutes": row["minutes_in_all"]}
        rows.append(kept | {"updates": row["updates"], "seeds": row["seeds"]})
    return rows


# ---------------------------------------------------------------- one question
def question_row(question, systems, said, shelf, regex):
    """Return what the page knows of a test question, numbers in place of passages."""
    answers, gold = question["answers"], gold_ids(question)
    row = {"qid": question["qid"], "text": question["question"], "answers": answers}
    row |= {"gold": [shelf.number(pid) for pid in gold], "ranks": [], "first": [], "goldRanks": []}
    hits = {}
    for rankings in systems:
        pids = ids_of(rankings, question)
        for pid in pids[:DEPTH]:
            if pid not in hits:
                hits[pid] = shelf.holds(pid, answers, regex) if answers else pid in gold
        row["ranks"].append([shelf.number(pid) for pid in pids[:RANKS]])
        row["first"].append(first_rank(hits[pid] for pid in pids[:DEPTH]))
        row["goldRanks"].append(first_rank(pid in gold for pid in pids))
    shown = [pid for pid, hit in hits.items() if hit and answers and pid in shelf.numbers]
    row["hits"] = [shelf.numbers[pid] for pid in shown]
    texts = [known.get(question["qid"]) for known in said]
    row["said"] = [text if text is None else [text, exact_match(text, answers)] for text in texts]
    return row


def belief_of(question, before, after, config, shelf):
    """
    Return [[passage, prior before, prior after], ...]: the retriever's belief in the passages that it found
    before EMDR2, a softmax over them of its scores of then and of afterwards.
    """
    old, new = (dict(rankings.get(question["qid"], [])) for rankings in (before, after))
    pids = [pid for pid in list(old)[: config["top_k"]] if pid in new]
    if not pids:
        return []
    logits_2K = np.array([[scores[pid] for pid in pids] for scores in (old, new)])
    weights_2K = np.exp((logits_2K - logits_2K.max(1, keepdims=True)) / config["temperature"])
    priors_2K = (weights_2K / weights_2K.sum(1, keepdims=True)).round(3).tolist()
    return [[shelf.number(pid), *priors] for pid, *priors in zip(pids, *priors_2K, strict=True)]


# ---------------------------------------------------------------- what taught it
def lessons_of(run, places, shelf):
    """Return {"files": names, "below": the gate, "questions": rows} of some training questions."""
    # the lines of every file: {qid: its lines}; RocketQA has one for each negative
    lines_of = {"": {}}
    for _, path, *_ in places["lessons"]:
        lines_of[path] = {}
        for _, line in iter_jsonl(run / path) if (run / path).is_file() else ():
            lines_of[path].setdefault(line["qid"], []).append(line)

    # questions of the first file and some of RocketQA's new ones, evenly spaced; the rankings of both
    wanted = {}
    for path, count in (("data/train.jsonl", LESSONS), ("pseudo.jsonl", LESSONS // 6)):
        lines = lines_of.get(path, {})
        wanted |= {qid: lines[qid][0] for qid in list(lines)[:: max(1, math.ceil(len(lines) / count))]}
    paths = {path for _, _, rankings, _ in places["lessons"] for path in rankings.values()}
    runs = {path: rankings_of(run / path, wanted) for path in paths}
    scores = {}
    for path in places["scores"]:
        scores |= {qid: dict(hits) for qid, hits in rankings_of(run / path, wanted).items()}
    gate = text_lines(run / "gate.txt")
    below = float(gate[0].split()[0]) if gate else 0.0

    # a row a question, in it a list of groups a file
    rows = []
    for qid, line in wanted.items():
        known = scores.get(qid, {})
        row = {"qid": qid, "text": line["question"], "answers": line.get("answers") or [], "files": []}
        row["gold"] = [shelf.number(entry) for entry in line["positives"]]
        for _, path, rankings, last in places["lessons"]:
            ranked = {name: ids_of(runs[ranking], row) for name, ranking in rankings.items()}
            groups = groups_of(lines_of[path].get(qid, []), ranked, lines_of[last].get(qid, []), shelf)
            if path == "d1.jsonl" and row["answers"]:
                groups += thrown_out(line, known, below, shelf)
            row["files"].append(groups)
        judged = [pid for pid in known if pid in shelf.numbers]
        rows.append(row | {"scores": {shelf.numbers[pid]: round(known[pid], 3) for pid in judged}})
    files = [[name, bool(lines_of[path])] for name, path, *_ in places["lessons"]]
    return {"files": files, "below": below, "questions": rows}


def negatives_of(lines):
    return [entry for line in lines for entry in line["negatives"]]


def groups_of(lines, ranked, last, shelf):
    """
    Return [[source, how many, [[passage, where it stood], ...]], ...] of the negatives of a question.

    ranked: {name: ids} of the rankings that they come from. last: the question's lines of the last episode,
    whose negatives (momentum) stand at the end.
    """
    negatives, momentum = negatives_of(lines), len(negatives_of(last))
    groups = {}
    for place, entry in enumerate(negatives):
        ranks = {name: pids.index(entry) + 1 for name, pids in ranked.items() if entry in pids}
        source = " and ".join(ranks) or "elsewhere"
        if place >= len(negatives) - momentum:
            source = "momentum"
        groups.setdefault(source, []).append(
            [entry, ", ".join(f"{name} {rank}" for name, rank in ranks.items())]
        )
    found = []
    for source, entries in groups.items():
        shown = [[shelf.number(entry), note] for entry, note in entries[:NEGATIVES]]
        found.append([source, len(entries), shown])
    return found


def thrown_out(line, scores, below, shelf):
    """Return the group of passages without an answer that the cross-encoder refused as negatives."""
    refused = []
    for pid in sorted(scores, key=scores.get, reverse=True):
        right = pid in line["positives"] or shelf.holds(pid, line["answers"])
        if scores[pid] >= below and not right:
            refused.append([pid, ""])
    shown = [[shelf.number(pid), note] for pid, note in refused[:NEGATIVES]]
    return [["thrown out", len(refused), shown]] if refused else []


# ---------------------------------------------------------------- training
def curves_of(run):
    """Return [{"name", "lines": {metric: [[step, minute, value], ...]}}] of every training in the folder."""
    curves = []
    for path in sorted(run.glob("**/metrics.jsonl")):
        if "checkpoints" in path.parts or not path.stat().st_size:
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


# ---------------------------------------------------------------- vectors
def vectors_of(folder, questions, pids, corpus):
    """Return (vectors of questions [Q, D], of passages [N, D]) by the encoders of a folder."""
    # why imported here: torch takes seconds
    from utils.encoder import embed, tokenize_passages, tokenize_questions
    from utils.plumbing.embeddings import open_embeddings
    from utils.plumbing.weights import load_encoder
    from utils.search import fetch

    asking = load_encoder(folder / "query_encoder", "question")
    q_QD = embed(asking, tokenize_questions(asking, [question["question"] for question in questions]), 32)
    manifest = folder / "embeddings" / "manifest.json"
    if manifest.is_file() and read_json(manifest)["complete"]:
        shards, _ = open_embeddings(manifest.parent, corpus.sha256, False, rows=len(corpus))
        return q_QD, fetch(shards, np.array([corpus.row(pid) for pid in pids])).astype(np.float32)
    reading = load_encoder(folder / "doc_encoder", "passage")
    return q_QD, embed(reading, tokenize_passages(reading, [corpus.passage(pid) for pid in pids]), 32)


def plane_of(vectors_END):
    """
    Return (places [E, N, 2], share [E]): the vectors of every encoder in one plane, and how much of their
    variance lies in it. Each encoder's cloud is centred first; the two axes are those of all clouds together.
    """
    centred_END = vectors_END - vectors_END.mean(1, keepdims=True)
    _, _, axes_DD = np.linalg.svd(centred_END.reshape(-1, centred_END.shape[2]), full_matrices=False)
    places_EN2 = centred_END @ axes_DD[:2].T
    return places_EN2, (places_EN2**2).sum((1, 2)) / (centred_END**2).sum((1, 2))


def kinds_of(question, bm25, rankings, shelf, regex):
    """Return {pid: gold, negative, or the encoder that found it} of the passages in a question's picture."""
    gold = list(gold_ids(question))
    kinds = {gold[0]: "gold"}
    for pid in ids_of(bm25, question):  # as DPR mines them
        right = pid in gold or (question["answers"] and shelf.holds(pid, question["answers"], regex))
        if not right and len(kinds) <= NEGATIVES:
            kinds[pid] = "negative"
    for name, ranking in rankings.items():
        for pid in ids_of(ranking, question)[:NEIGHBOURS]:
            kinds.setdefault(pid, name)
    return kinds


def pictures_of(run, places, questions, shelf, regex):
    """Return {"encoders", "missing", "questions"}: some questions and passages around them, in a plane."""
    there = [entry for entry in places["encoders"] if (run / entry[1] / "query_encoder").exists()]
    missing = [entry[0] for entry in places["encoders"] if entry not in there]
    pictures = {"encoders": [name for name, *_ in there], "missing": missing, "questions": []}
    questions = [question for question in questions if gold_ids(question)][:PICTURES]
    if not there or not questions:
        return pictures

    # the passages of every question, and all vectors
    qids = {question["qid"] for question in questions}
    rankings = {name: rankings_of(run / path, qids) if path else {} for name, _, path in there}
    bm25 = rankings_of(run / places["bm25"], qids)
    kinds = [kinds_of(question, bm25, rankings, shelf, regex) for question in questions]
    row_of = {pid: row for row, pid in enumerate(dict.fromkeys(pid for kind in kinds for pid in kind))}
    vectors = [vectors_of(run / folder, questions, list(row_of), shelf.corpus) for _, folder, _ in there]

    # a plane for each question
    for place, (question, kind) in enumerate(zip(questions, kinds, strict=True)):
        rows = [row_of[pid] for pid in kind]
        cloud_END = np.stack([np.concatenate([q_QD[[place]], p_ND[rows]]) for q_QD, p_ND in vectors])
        plane_EN2, share_E = plane_of(cloud_END.astype(np.float64))
        picture = {"qid": question["qid"], "text": question["question"], "kinds": list(kind.values())}
        picture["goldRanks"] = []
        for found in rankings.values():
            rank = first_rank(pid in gold_ids(question) for pid in ids_of(found, question))
            picture["goldRanks"].append(rank if found else None)
        picture |= {"passages": [shelf.number(pid) for pid in kind], "share": share_E.round(2).tolist()}
        pictures["questions"].append(picture | {"places": plane_EN2.round(3).tolist()})
    return pictures


# ---------------------------------------------------------------- main
def content_of(run, data, regex, megabytes):
    """Return all that the page shows, as one dict."""
    places = places_of(run, data)
    questions = read_questions(places["test"], match="regex" if regex else "string")
    shelf = Shelf(Corpus(places["corpus"]))
    order = np.random.default_rng(0).permutation(len(questions)).tolist()
    shuffled = [questions[place] for place in order]
    name = "/".join(run.parts[-2:])  # why not all of it: a page is shown to others
    content = {"run": name, "questionsInAll": len(questions), "passagesInAll": len(shelf.corpus)}
    content |= {"metrics": METRICS, "table": table_of(places), "notes": places["notes"]}
    content |= {"lessons": lessons_of(run, places, shelf), "curves": curves_of(run)}
    content |= {"pictures": pictures_of(run, places, shuffled, shelf, regex)}

    # the columns: every ranking once; a reader has the ranking of its retriever
    columns = {}
    for row in places["rows"]:
        if row["ranking"] and row["ranking"] not in [ranking for _, ranking in columns.values()]:
            columns[row["key"]] = (row["name"], row["ranking"])
    qids = {question["qid"] for question in questions}
    systems = [rankings_of(run / ranking, qids) for _, ranking in columns.values()]
    names = [name for name, _ in columns.values()]
    content["systems"] = [[name, bool(found)] for name, found in zip(names, systems, strict=True)]
    number = {key: i for i, key in enumerate(columns) if systems[i]}
    pairs = [(number[a], number[b]) for a, b in places["pairs"] if a in number and b in number]
    content["pairs"] = list(dict.fromkeys(pairs))
    said = [read_json(run / path) if (run / path).is_file() else {} for _, path in places["readers"]]
    readers = [name for name, _ in places["readers"]]
    content["readers"] = [[name, bool(known)] for name, known in zip(readers, said, strict=True)]
    belief = []
    if places["belief"] and all((run / path).is_file() for path in places["belief"]):
        old, new, config = (run / path for path in places["belief"])
        config = read_yaml(config)
        if not config["temperature"]:  # from: train_emdr2.py, retriever_gradient
            config["temperature"] = math.sqrt(read_json(old.parent / "embeddings/manifest.json")["dim"])
        belief = [rankings_of(old, qids), rankings_of(new, qids), config]

    # questions until the page is full
    room = (
        megabytes * 1e6 - TEMPLATE.stat().st_size - len(as_json(content | {"questions": [], "passages": []}))
    )
    rows, passages = {}, len(shelf.rows)
    for place, question in zip(order, shuffled, strict=True):
        row = question_row(question, systems, said, shelf, regex)
        row["belief"] = belief_of(question, *belief, shelf) if belief else []
        room -= len(as_json(row)) + 1
        if shelf.size + len(shelf.rows) > room:
            break
        rows[place], passages = row, len(shelf.rows)
    content["questions"] = [rows[place] for place in sorted(rows)]
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
