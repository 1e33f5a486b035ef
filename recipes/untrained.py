"""
Starting weights -> query_encoder/ and doc_encoder/ that build their inputs as a training config says.

The demo's "untrained" row, and ANCE-Tele's M_0: the first negatives are those of the language model itself.

Run: python recipes/untrained.py config/train_dpr_demo.yaml data/models/tinybert-4l runs/demo/untrained
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import UserError, friendly_errors, read_yaml  # noqa: E402
from utils.encoder import load_encoder, save_encoder  # noqa: E402


def main(config, start, out):
    inputs = {
        k: read_yaml(config)[k] for k in ("question_tokens", "passage_tokens", "pooling", "token_types")
    }
    query_encoder, doc_encoder = Path(out) / "query_encoder", Path(out) / "doc_encoder"
    if not query_encoder.exists():
        save_encoder(load_encoder(start, "passage", inputs | {"role": "shared"}), query_encoder)
    if not doc_encoder.exists():
        doc_encoder.symlink_to(query_encoder.name)  # one model is both
    print(f"{out}: the weights of {start}, as they are")


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 4:
            raise UserError("usage: python recipes/untrained.py CONFIG START OUT")
        main(*sys.argv[1:])
