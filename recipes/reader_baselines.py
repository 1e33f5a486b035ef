"""
What a trained reader has to beat: the title of the first passage as the answer, and the best span of a reader
whose outputs were never trained (the words and positions it likes by chance).

Run: python recipes/reader_baselines.py data/models/tinybert-4l data/demo/test.jsonl runs/demo/test/test.run
data/demo/corpus.tsv 20

The last one is how many passages the untrained reader reads; its new outputs are drawn with seed 42.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_reader import answer_all  # noqa: E402
from utils.data import Corpus  # noqa: E402
from utils.distributed import start  # noqa: E402
from utils.metrics import print_table, with_intervals  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.predictions import answer_scores  # noqa: E402
from utils.reader import load_reader  # noqa: E402
from utils.reader_data import read_ranking  # noqa: E402


def title_answers(examples, corpus):
    """The title of each question's first passage, without what stands in brackets, as its one answer."""
    firsts = [corpus[int(example["rows"][0])] if len(example["rows"]) else None for example in examples]
    return [[{"text": re.sub(r" \(.*\)$", "", first.title)} if first else None] for first in firsts]


def main(init, questions, ranking, corpus, depth):
    examples, corpus, note = read_ranking(questions, ranking, Corpus(corpus), int(depth))
    print(note)
    values = {
        f"title {k}": v for k, v in answer_scores(examples, title_answers(examples, corpus), [1]).items()
    }
    torch.manual_seed(42)
    reader = load_reader(init, {"reader_tokens": 192, "token_types": "zeros"}, new_head=True)
    cfg = SimpleNamespace(max_answer_length=10, eval_batch_size=32)
    answers = answer_all(examples, corpus, reader, start(), cfg, [int(depth)])
    found = answer_scores(examples, answers, [int(depth)])
    print_table(with_intervals(values | {f"untrained {k}": v for k, v in found.items()}), "baselines")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 6 or not sys.argv[5].isdigit():
            raise UserError("usage: python recipes/reader_baselines.py INIT QUESTIONS RUN CORPUS DEPTH")
        main(*sys.argv[1:])
