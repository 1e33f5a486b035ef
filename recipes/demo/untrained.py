"""
Starting weights -> an encoder folder that builds its inputs as the demo does: the "untrained" row of its
table.

Run: python recipes/demo/untrained.py data/models/tinybert-4l runs/demo/untrained/encoder
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.config import UserError, friendly_errors, read_yaml  # noqa: E402
from utils.encoder import load_encoder, save_encoder  # noqa: E402


def main(start, out):
    config = read_yaml(ROOT / "config" / "train_dpr_demo.yaml")
    inputs = {key: config[key] for key in ("question_tokens", "passage_tokens", "pooling", "token_types")}
    if not Path(out).exists():
        save_encoder(load_encoder(start, "passage", inputs | {"role": "shared"}), out)
    print(f"{out}: the weights of {start}, as they are")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 3:
            raise UserError("usage: python recipes/demo/untrained.py START OUT")
        main(*sys.argv[1:])
