"""
Check the demo's questions against the corpus: exit code 1 and a line for each fault.

Run: python recipes/demo/check_questions.py         (after recipes/demo/prepare.py; the tests run it on what
is there)
Checked: the first answer occurs in the passage and not in the question, no question repeats, no passage
serves two questions, splits are large enough, and at least a third of the questions share no rare word with
their passage, so that word matching alone does not solve them. Rare: in at most 1 % of the passages.
"""

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data import Corpus, iter_jsonl  # noqa: E402
from utils.text import has_answer, tokenize  # noqa: E402

LEAST = {"train": 600, "dev": 100, "test": 300}


def faults_of(splits, passages):
    """
    splits: {name: [{"question", "answers", "title"}]}, passages: {title: text}. Returns (list of faults as
    sentences, share of questions that have no rare word in common with their passage).
    """
    words = {title: {*tokenize(f"{title} {text}")} for title, text in passages.items()}
    frequency, faults, seen, without_rare = Counter(), [], {}, 0
    for found in words.values():
        frequency.update(found)
    for name, rows in splits.items():
        for number, row in enumerate(rows, 1):
            where, title = f"{name}.jsonl:{number}", row["title"]
            if title not in passages:
                faults.append(f"{where}: no passage has the title {title!r}")
                continue
            if not has_answer(passages[title], row["answers"][:1]):
                faults.append(
                    f"{where}: the first answer {row['answers'][0]!r} is not in the passage {title!r}"
                )
            if has_answer(row["question"], row["answers"]):
                faults.append(f"{where}: an answer stands in the question")
            for what in (("question", " ".join(tokenize(row["question"].strip(" ?")))), ("passage", title)):
                if what in seen:
                    faults.append(f"{where}: the {what[0]} of {seen[what]} again")
                seen.setdefault(what, where)
            shared = words[title].intersection(tokenize(row["question"]))
            without_rare += not any(w.isalnum() and frequency[w] <= len(passages) / 100 for w in shared)
        if len(rows) < LEAST[name]:
            faults.append(f"{name}.jsonl: {len(rows)} questions, at least {LEAST[name]} are needed")
    share = without_rare / sum(map(len, splits.values()))
    if share < 1 / 3:
        faults.append(f"only {share:.0%} of the questions share no rare word with their passage")
    return faults, share


def main():
    splits = {
        name: [row for _, row in iter_jsonl(ROOT / "recipes" / "demo" / f"{name}.jsonl")] for name in LEAST
    }
    faults, share = faults_of(
        splits, {p.title: p.text for p in Corpus(ROOT / "data" / "demo" / "corpus.tsv")}
    )
    print("\n".join(faults))
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    print(f"{sizes}; {share:.0%} share no rare word with their passage; {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
