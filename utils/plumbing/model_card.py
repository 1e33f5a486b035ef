"""
The README.md beside published weights: what they are, how made, their dev numbers, how to load them.

The hub reads its first lines. With it `hf upload NAME FOLDER` is a publication. Every number comes from the
files of the run; what they do not say is not in the card.
"""

import json
import re
from pathlib import Path

import yaml

from utils.plumbing.files import read_json

# the licence of starting weights, by how their name begins. from: their pages on the hub
LICENCES = dict.fromkeys(("bert-", "google-bert/", "t5-", "google-t5/", "google/flan-t5-"), "apache-2.0")
LICENCES["facebook/dpr-"] = "cc-by-nc-4.0"
ENCODED = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
question = model.encode(["who wrote it?"], prompt_name="query")
passage = model.encode([("its title", "its text")], prompt_name="document")
```
The score of a question (by the query encoder) and a passage (by the doc encoder) is the product
`question @ passage.T`. Here:
```
"""
# name: (what it does, the hub's library and task, how it is loaded)
MODELS = {
    "query_encoder": (
        "The question encoder of a dual encoder: a question becomes a vector.",
        "sentence-transformers",
        "sentence-similarity",
        ENCODED + "python test_dpr.py --query_encoder FOLDER",
    ),
    "doc_encoder": (
        "The passage encoder of a dual encoder: a passage becomes a vector.",
        "sentence-transformers",
        "sentence-similarity",
        ENCODED + "python doc2embedding.py --doc_encoder FOLDER",
    ),
    "cross_encoder": (
        "A cross-encoder: question and passage, read together, become the probability of being relevant.",
        "transformers",
        "text-ranking",
        "python rerank.py --cross_encoder FOLDER",
    ),
    "reader": (
        "A reader: it answers a question from the passages that a retriever found.",
        "transformers",
        "question-answering",
        "python answer.py --reader FOLDER",
    ),
}
CARD = """---
library_name: {library}
pipeline_tag: {task}
license: {licence}
{base}tags:
- dense-retrieval
- open-domain-qa
---
# {title}
{what}

Started from {start}; trained on {train} with the passages of {corpus}: {step} steps of {batch}.

## Numbers on the dev questions
{numbers}

## How it was trained
```
{head}
```

## How to load it
How its inputs are built stands in `encoder_inputs.json`.
```
{code}
```

## Licence
{terms}
"""


def model_card(name, checkpoint, run_dir):
    """Return the README.md of the model `name` in a checkpoint of run_dir."""
    what, library, task, code = MODELS[name]
    run_dir = Path(run_dir)
    step = read_json(Path(checkpoint) / "state.json")["step"]
    written = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(written)
    head = [line.removeprefix("# ") for line in written.splitlines() if line.startswith("# ")]

    # what it started from
    start = str(config.get("init") or config[name])
    on_the_hub = not Path(start).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", start)
    licence = ""
    for prefix, known in LICENCES.items():
        if on_the_hub and start.startswith(prefix):
            licence = known

    # the row of its step that a dev evaluation wrote; that of a training step has a loss
    numbers = []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.pop("step") == step and "loss" not in row:
            numbers = [f"- {key}: {value}" for key, value in row.items()]
    chosen = ", by which this step was chosen" if config["keep"] == "best" else ""
    dev = [f"{Path(config['dev']).name}{chosen}:", *numbers]
    return CARD.format(
        library=library,
        task=task,
        licence=licence or "unknown",
        base=f"base_model: {start}\n" if on_the_hub else "",
        title=f"{run_dir.resolve().name} {name}",
        what=what,
        start=start,
        train=Path(config["train"]).name,
        corpus=Path(config["corpus"]).name or "the same file",
        step=step,
        batch=config["batch_size"],
        numbers="\n".join(dev) if numbers else "None: this run had no dev questions.",
        head="\n".join(head),
        code=code.replace("FOLDER", name),
        terms=licence or f"That of {start}: look it up.",
    )
