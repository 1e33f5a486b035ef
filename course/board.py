"""
The board: questions that students wrote, and what their entries gain on the questions of others.
"""

import json
import re
import tempfile
from pathlib import Path

import child
import kit
import numpy as np
import trees


def questions_of(text):
    """Return the questions of a student's file; ValueError where one is not as the handout says."""
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    for row in rows:
        answers = row.get("answers") if isinstance(row, dict) else None
        texts = [row["question"], row["title"], *answers] if isinstance(answers, list) and answers else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"not a question: {row}")
    return rows


def questions(args):
    """Check the students' questions; write board.jsonl for them, and sealed.jsonl with the answers."""
    from recipes.demo.check_questions import LEAST, faults_of
    from utils.data import Corpus, iter_jsonl

    passages = {passage.title: passage for passage in Corpus(args.corpus)}
    theirs = {}
    for name, student, files in trees.hand_ins(args.folder):
        try:
            theirs[student] = questions_of(files.get("questions.jsonl", b"").decode())
        except (ValueError, KeyError) as error:
            print(f"{name}: {error}")

    # no question is asked twice; the demo's own questions count
    demo = {}
    for name in LEAST:
        demo[name] = [row for _, row in iter_jsonl(trees.ROOT / "recipes" / "demo" / f"{name}.jsonl")]
    faults, share = faults_of(demo | theirs, {title: passage.text for title, passage in passages.items()})
    faults = {fault.partition(": ")[0]: fault for fault in faults if fault.split(".jsonl:")[0] in theirs}
    for fault in faults.values():
        print(fault)

    # write those without a fault; a qid names its author, who is not scored on it
    board, sealed = [], []
    for student, rows in theirs.items():
        for number, row in enumerate(rows, 1):
            if f"{student}.jsonl:{number}" not in faults:
                question = {"qid": f"{student}-{number}", "question": row["question"]}
                board.append(json.dumps(question, ensure_ascii=False))
                question |= {"answers": row["answers"], "positives": [passages[row["title"]].id]}
                sealed.append(json.dumps(question, ensure_ascii=False))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("board.jsonl", board), ("sealed.jsonl", sealed)):
        (out / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(board)} questions of {sum(map(bool, theirs.values()))} students; {len(faults)} have a fault")


def baselines(path, questions, corpus):
    """Return {metric: [Q]} of a .run, and as "EM" that of the titles of its first passages."""
    from recipes.compare import per_question
    from utils.data import read_run
    from utils.text import exact_match

    found = per_question(path, questions, corpus)
    first = {qid: corpus.passage(hits[0][0]).title for qid, hits in read_run(path).items() if hits}
    titles = [re.sub(r" \(.*\)$", "", first.get(question["qid"], "")) for question in questions]
    right = [exact_match(title, q["answers"]) for title, q in zip(titles, questions, strict=True)]
    return found | {"EM": np.array(right, float)}


def table(args):
    """Print each entry's score on the sealed questions of others, its paired gain, and its points."""
    from recipes.compare import cell, per_question
    from utils.data import Corpus, read_questions
    from utils.metrics import bootstrap_interval
    from utils.plumbing.config import UserError

    questions = read_questions(args.questions)
    corpus = Corpus(args.corpus)
    base = baselines(args.baseline, questions, corpus)
    print(f"percent (95 % interval); gain over {Path(args.baseline).name}, EM: over its first titles; points")
    for name, student, files in trees.hand_ins(args.table):
        others = np.array([not question["qid"].startswith(f"{student}-") for question in questions])
        for entry in ("board.run", "board.answers.json"):
            if entry not in files:
                continue
            with tempfile.TemporaryDirectory() as folder:
                child.write_tree({entry: files[entry]}, folder)
                try:
                    values = per_question(f"{folder}/{entry}", questions, corpus)
                except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
                    print(f"{name:20} no entry: {error}")
                    continue
            metric = "EM" if "EM" in values else "MRR@10"
            mine, gain = values[metric][others], (values[metric] - base[metric])[others]
            earned = kit.SECTIONS["board"] if bootstrap_interval(gain)[0] > 0 else 0
            print(f"{name:20} n {len(mine)}  {metric} {cell(mine)}  {cell(gain, signed=True)}  {earned}")
