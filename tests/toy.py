"""
A toy world for the tests: a WordPiece vocabulary, tiny random BERTs and sixty passages; nothing is
downloaded. And what many tests need: golden numbers, lines of json, a device, flat gradients.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from utils.data import write_run
from utils.encoder import Encoder
from utils.plumbing.weights import save_encoder

INPUTS = {"question_tokens": 16, "passage_tokens": 32, "pooling": "cls", "token_types": "zeros"}
INPUTS |= {"pair": "toy"}
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), process_index=0, scaler=None)
ACCELERATOR.backward, ACCELERATOR.autocast = torch.Tensor.backward, nullcontext
CITIES = "paris london rome oslo cairo lima tokyo quito delhi sofia riga minsk".split()
THINGS = "river bridge tower market garden".split()
COLOURS = "red blue green white black".split()
OTHER = "the a of in is was named old new what which where stands and it has ' . ? , first".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def golden_file(name):
    """The numbers that an original code gave: {"cases": [...], ...}."""
    return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())


def write_lines(path, rows):
    """One row of json a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_ranking(path, rankings):
    """Write {qid: passage ids, the best first} as a .run; returns the path."""
    hits = []
    for qid, pids in rankings.items():
        hits.append((qid, [(str(pid), -float(place)) for place, pid in enumerate(pids)]))
    write_run(path, hits)
    return path


def flat_gradient(*models):
    """The gradients of all parameters as one vector."""
    return torch.cat([p.grad.flatten() for model in models for p in model.parameters()])


def close(got, wanted, tolerance=1e-5):
    """The largest difference, relative to the largest entry."""
    return (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def tokenizer(folder):
    """A lower-casing WordPiece tokenizer over the toy words, with letters as pieces for everything else."""
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = SPECIAL + CITIES + THINGS + COLOURS + OTHER + letters + ["##" + c for c in letters]
    words = list(dict.fromkeys(words))
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(words))
    return BertTokenizer(vocab=str(path), do_lower_case=True)


def bert(vocab_size, seed=0, hidden=32, layers=2):
    """A random BERT of 2 layers x 32 without a pooler."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=256,
        initializer_range=0.2,  # why: at BERT's 0.02 a tiny random model gives every text the same vector
    )
    return BertModel(config, add_pooling_layer=False)


def passages():
    """
    Sixty (id, title, text): every city has every thing, in some colour. Ids are 1..60. why of 8 lengths:
    where all texts have one length, sorting by length changes no order, and a batch put back in a wrong order
    looks right.
    """
    rows = []
    for i, city in enumerate(CITIES):
        for j, thing in enumerate(THINGS):
            colour, n = COLOURS[(i + j) % 5], len(rows)
            more = " ".join(f"and it stands in {city} and is old".split()[: 3 * n % 8])
            rows.append((str(n + 1), city, f"the old {thing} of {city} is {colour} {more}".strip() + "."))
    return rows


def ask(n, thing, city):
    """Question n about a thing of a city, in one of three lengths."""
    return (
        f"which colour has the {thing} of {city}",
        f"what is the {thing} of {city}",
        f"the {thing} , {city}",
    )[n % 3]


def make_world(folder):
    """
    Write a toy world into `folder` and return it as a Path: vocab.txt, bert/ (Hugging Face folder),
    query_encoder/, doc_encoder/ (with encoder_inputs.json, one pair), corpus.tsv, train.jsonl (40), dev.jsonl
    (10), test.jsonl (10).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(folder)
    bert(len(words)).save_pretrained(folder / "bert")
    words.save_pretrained(folder / "bert")
    for seed, (name, role) in enumerate([("query_encoder", "question"), ("doc_encoder", "passage")]):
        save_encoder(Encoder(bert(len(words), seed), words, INPUTS | {"role": role}), folder / name)
    rows = passages()
    with open(folder / "corpus.tsv", "w", encoding="utf-8", newline="") as file:
        file.write("id\ttext\ttitle\n" + "".join(f"{i}\t{text}\t{title}\n" for i, title, text in rows))
    questions = []
    for n, (pid, title, text) in enumerate(rows):
        thing, colour = text.split()[2], text.split()[6].strip(".")
        question = {"qid": f"q{n}", "question": ask(n, thing, title), "answers": [colour]}
        negatives = [rows[(n + 1) % 60][0], rows[(n + 5) % 60][0]]
        questions.append(question | {"positives": [pid], "negatives": negatives})
    for name, part in (("train", questions[:40]), ("dev", questions[40:50]), ("test", questions[50:])):
        write_lines(folder / f"{name}.jsonl", part)
    return folder
