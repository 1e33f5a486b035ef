"""
Make training pairs from a corpus without questions: the inverse cloze task (Lee et al. 2019, ORQA, Sec. 4).

One sentence of a passage stands for the question, the rest of the passage is its positive. EMDR2's retriever
began like this.

In:  a corpus
Out: a questions file with inline positives, one line a passage that has two sentences or more
Run: python recipes/demo/inverse_cloze.py data/demo/corpus.tsv runs/demo/data/inverse_cloze.jsonl
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data import Corpus  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors, refuse_input  # noqa: E402
from utils.plumbing.files import atomic_file  # noqa: E402

# A full stop after a small letter or digit, then a capital: "St. Paul" and "J. S. Bach" mostly stay whole.
SENTENCE_END = re.compile(r'(?<=[a-z0-9)"][.!?]) (?=[A-Z])')
# Other scripts: Chinese and Japanese have stops of their own, without spaces; Hindi has a bar.
OTHER_END = re.compile("(?<=[。！？])|(?<=[.!?।؟۔]) ")


def split_sentences(text):
    """Return the sentences of a text, by the rule of the script in which most of it is written."""
    latin = sum(character < "\u0250" for character in text)
    end = SENTENCE_END if 2 * latin > len(text) else OTHER_END
    return [sentence for sentence in end.split(text) if sentence]


def main(corpus_path, out, corpus_format="auto"):
    refuse_input(out, corpus_path)
    rng, corpus, written = random.Random(0), Corpus(corpus_path, corpus_format), 0
    with atomic_file(out) as file:
        for passage in corpus:
            sentences = split_sentences(passage.text)
            if len(sentences) < 2:
                continue
            # differs: ORQA takes the sentence out of its passage nine times in ten, and leaves the title out
            question = sentences.pop(rng.randrange(len(sentences)))
            positive = {"title": passage.title, "text": " ".join(sentences)}
            row = {"qid": f"cloze-{passage.id}", "question": question, "positives": [positive]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print(f"{out}: {written} pairs, {len(corpus) - written} passages have a single sentence")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) not in (3, 4):
            raise UserError("usage: python recipes/demo/inverse_cloze.py CORPUS OUT [CORPUS_FORMAT]")
        main(*sys.argv[1:])
