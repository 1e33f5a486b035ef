"""
Save an extractive reader that never learned: a BERT with random outputs, the least that a reader has to beat.

In:   a BERT, a folder or hub name
Out:  a reader's folder, for answer.py and ask.py. Its outputs are drawn with seed 42
Run:  python recipes/untrained_reader.py data/models/tinybert-4l runs/demo/untrained_reader
Next: python answer.py --reader runs/demo/untrained_reader --questions data/demo/test.jsonl
      --ranking runs/demo/test/test.run --corpus data/demo/corpus.tsv --depth 20 --out runs/demo/new.json
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.weights import save_encoder  # noqa: E402
from utils.reader import load_reader  # noqa: E402


def main(init, out):
    torch.manual_seed(42)
    reader = load_reader(init, {"reader_tokens": 192, "token_types": "zeros"}, new_head=True)
    save_encoder(reader, out)
    print(f"{out}: the weights of {init}, with outputs that are random")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 3:
            raise UserError("usage: python recipes/untrained_reader.py INIT OUT")
        main(*sys.argv[1:])
