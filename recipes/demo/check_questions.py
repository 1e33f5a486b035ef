"""
Check the demo's questions against the corpus: exit code 1 and a line for each fault.

Run: python recipes/demo/check_questions.py         (after recipes/demo/prepare.py)

The first answer must occur in the passage, and no answer in the question. No question repeats, and no passage
serves two questions. The splits are large enough. At least a third of the questions share no rare word with
their passage, so that word matching alone does not solve them; rare means in at most 1 % of the passages.
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
    Return (faults as sentences, the share of questions that have no rare word in common with their passage).

    splits: {name: [{"question", "answers", "title"}]}. passages: {title: text}.
    """
    words = {title: {*tokenize(f"{title} {text}")} for title, text in passages.items()}
    frequency = Counter(word for text in words.values() for word in text)
    faults, seen, without_rare = [], {}, 0
    for name, rows in splits.items():
        for number, row in enumerate(rows, 1):
            where, title = f"{name}.jsonl:{number}", row["title"]
            if title not in passages:
                faults.append(f"{where}: no passage has the title {title!r}")
                continue
            if not has_answer(passages[title], row["answers"][:1]):
                answer = row["answers"][0]
                faults.append(f"{where}: the first answer {answer!r} is not in the passage {title!r}")
            if has_answer(row["question"], row["answers"]):
                faults.append(f"{where}: an answer stands in the question")
            question = " ".join(tokenize(row["question"].strip(" ?")))
            for kind, text in (("question", question), ("passage", title)):
                if (kind, text) in seen:
                    faults.append(f"{where}: the {kind} of {seen[kind, text]} again")
                seen.setdefault((kind, text), where)
            shared = words[title].intersection(tokenize(row["question"]))
            without_rare += not any(w.isalnum() and frequency[w] <= len(passages) / 100 for w in shared)
        if len(rows) < LEAST.get(name, 0):
            faults.append(f"{name}.jsonl: {len(rows)} questions, at least {LEAST[name]} are needed")
    share = without_rare / sum(map(len, splits.values()))
    if share < 1 / 3:
        faults.append(f"only {share:.0%} of the questions share no rare word with their passage")
    return faults, share


def main():
    splits = {}
    for name in LEAST:
        splits[name] = [row for _, row in iter_jsonl(ROOT / "recipes" / "demo" / f"{name}.jsonl")]
    corpus = Corpus(ROOT / "data" / "demo" / "corpus.tsv")
    faults, share = faults_of(splits, {passage.title: passage.text for passage in corpus})
    print("\n".join(faults))
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    print(f"{sizes}; {share:.0%} share no rare word with their passage; {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
