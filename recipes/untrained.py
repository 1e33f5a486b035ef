"""
Save starting weights as a query_encoder/ and a doc_encoder/ that build their inputs as the training will.

They are the demo's "untrained" row, and ANCE-Tele's M_0: its first negatives are those of a language model.

Run: python recipes/untrained.py --config config/train_dpr_demo.yaml --run_dir runs/demo/untrained
     It takes every key of train_dpr.py, so a recipe hands both the same flags; it reads init, run_dir and
     what says how inputs are built.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.plumbing.config import UserError, friendly_errors, load_config  # noqa: E402
from utils.plumbing.files import atomic_folder  # noqa: E402
from utils.plumbing.weights import encoder_hash, given_inputs, load_encoder, save_encoder  # noqa: E402


def main():
    cfg = load_config(__doc__, "config/train_dpr_nq.yaml")
    inputs = given_inputs(cfg) | {"role": "shared"}
    query_encoder = Path(cfg.run_dir) / "query_encoder"
    doc_encoder = Path(cfg.run_dir) / "doc_encoder"
    encoder = load_encoder(cfg.init, "passage", inputs, layer_norm_epsilon=cfg.layer_norm_epsilon)
    if not query_encoder.exists():
        save_encoder(encoder, query_encoder)
    elif encoder_hash(load_encoder(query_encoder, "passage")) != encoder_hash(encoder):
        raise UserError(f"{query_encoder}: holds other weights or inputs; choose another --run_dir")
    if not doc_encoder.exists():
        with atomic_folder(doc_encoder) as folder:
            shutil.copytree(query_encoder, folder, dirs_exist_ok=True)  # one model is both
    print(f"{cfg.run_dir}: the weights of {cfg.init}, as they are")


if __name__ == "__main__":
    with friendly_errors():
        main()
