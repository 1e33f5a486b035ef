"""Encoders: the original codes' token ids, batches by hand, and folders that could fail silently."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer

from tests.toy import ACCELERATOR, INPUTS, bert, golden_file, tokenizer
from tests.toy_t5 import t5
from utils import encoder as encoding
from utils.corpus import Passage
from utils.cross_encoder import load_cross_encoder
from utils.encoder import Encoder, collate, embed, tokenize_passages, tokenize_questions
from utils.fid import load_fid
from utils.plumbing.config import UserError
from utils.plumbing.files import read_json, write_json
from utils.plumbing.weights import encoder_hash, explain_load_errors, load_encoder, save_encoder
from utils.reader import load_reader

GOLDEN = golden_file("tokenize_pair")
PASSAGES = [
    Passage("1", "paris", "the old river is red."),
    Passage("2", "", "it stands in oslo"),
    Passage("3", "rome", "a tower and a garden. " * 5),
]
SIGNS = SimpleNamespace(pad_token_id=9, sep_token_id=3)


def without_weights(words, **inputs):
    """An Encoder that can only tokenise and collate."""
    return Encoder(torch.nn.Linear(1, 1), words, inputs, projection=torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- text -> token ids -> chunks
# the cross-encoder's own input, rocketqa_cross, is in tests/test_train_cross_encoder.py
TWO_TOWERS = [case for case in GOLDEN["cases"] if case["mode"] != "rocketqa_cross"]


@pytest.mark.parametrize("case", TWO_TOWERS, ids=range(len(TWO_TOWERS)))
def test_token_ids_equal_the_original_codes(case, tmp_path):
    """DPR 2020 (zeros) and RocketQA (segments): ids and token types, without their padding."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(GOLDEN["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    lengths = dict.fromkeys(("question_tokens", "passage_tokens"), case["max_length"])
    types = "zeros" if case["mode"] == "dpr2020" else "segments"
    encoder = without_weights(words, token_types=types, **lengths)
    if case["mode"] == "rocketqa_query":
        ids = tokenize_questions(encoder, [case["text"]])
    else:
        ids = tokenize_passages(encoder, [Passage("1", case["title"] or "", case["text"])])
    batch = collate(encoder, ids)

    tokens = sum(case["mask"])
    if case.get("tokenizer_version_dependent"):  # transformers 5 cuts the longer part one token differently
        assert batch["input_ids"][0].tolist() in (case["ids"][:tokens], case["ids_tokenizers_backend"])
        return
    for key, name in ("input_ids", "ids"), ("attention_mask", "mask"), ("token_type_ids", "token_type_ids"):
        assert batch[key][0].tolist() == case[name][:tokens]


def test_typographic_apostrophe_in_questions(world):
    """A question typed with U+2019 is the question typed with ' (DPR HEAD, nanoDPR)."""
    encoder = load_encoder(world / "query_encoder", "question")
    assert tokenize_questions(encoder, ["paris’ river"]) == tokenize_questions(encoder, ["paris' river"])


def test_a_batch_by_hand():
    """Padding (here 9) has mask 0 and type 0; a segment ends with its [SEP] (here 3); zeros are zeros."""
    ids = [[2, 5, 3, 6, 3], [2, 7, 3]]
    batch = collate(without_weights(SIGNS, token_types="segments"), ids)
    assert batch["input_ids"].tolist() == [[2, 5, 3, 6, 3], [2, 7, 3, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    batch = collate(without_weights(SIGNS, token_types="zeros"), ids)
    assert batch["token_type_ids"].tolist() == [[0] * 5] * 2


def test_chunks_by_hand():
    """Lengths 3 1 2 1 4 in chunks of 2: short rows first, and the places that give the old order back."""
    ids = [[1, 2, 3], [4], [5, 6], [7], [8, 9, 9, 9]]
    chunks, places = encoding.in_chunks(ids, 2)
    assert chunks == [[[4], [7]], [[5, 6], [1, 2, 3]], [[8, 9, 9, 9]]]
    assert places.tolist() == [3, 0, 2, 1, 4]  # the inverse of the order 1 3 2 0 4, and not that order
    # a stable order: the chunks of a batch, and so the masks of dropout, are a function of the batch
    ids = [[3, 1], [1, 9], [2, 2], [0, 5], [7, 7]]
    chunks, places = encoding.in_chunks(ids, 2)
    assert chunks == [ids[:2], ids[2:4], ids[4:]] and places.tolist() == [0, 1, 2, 3, 4]


def test_groups_by_hand():
    """Lengths 3 1 2 1 4: three rows at a time; as many as make 8 tokens; in lengths of 2 and 4, filled up."""
    ids = [[1, 2, 3], [4], [5, 6], [7], [8, 9, 9, 9]]
    assert encoding.groups_by_length(ids, 3) == [[4, 0, 2], [1, 3]]
    assert encoding.groups_by_length(ids, 0, tokens=8) == [[4, 0], [2, 1, 3]]
    assert encoding.groups_by_length(ids, 0, tokens=1) == [[4], [0], [2], [1], [3]]
    assert encoding.groups_by_length(ids, 0, tokens=8, lengths=(2, 4)) == [[4, 0], [2, 1, 3, 3]]
    assert encoding.groups_by_length(ids, 3, lengths=(2, 4)) == [[4, 0, 2], [1, 3, 3]]


def test_the_mask_goes_where_it_hides_nothing():
    """Rows of 2 2 1 tokens two at a time: the first batch has no mask; with lengths of 3 both have one."""
    encoder = without_weights(SIGNS, token_types="zeros")
    ids = [[1, 2], [3, 4], [5]]
    masks = [batch["attention_mask"] for _, batch in encoding.batches_by_length(encoder, ids, 2)]
    assert masks == [None, None]
    ((_, batch),) = encoding.batches_by_length(encoder, ids, 3)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 0]]
    (_, first), _ = encoding.batches_by_length(encoder, ids, 2, lengths=(3,))
    assert first["attention_mask"].tolist() == [[1, 1, 0]] * 2
    assert first["input_ids"].tolist() == [[1, 2, 9], [3, 4, 9]]


# ---------------------------------------------------------------- vectors
@pytest.mark.parametrize("pooling", encoding.POOLINGS)
def test_pooling_by_hand(world, pooling):
    """The padding of a batch takes no part; where all is text, no mask gives what a mask of ones gives."""
    encoder = load_encoder(world / "doc_encoder", "passage", INPUTS | {"pooling": pooling}).eval()
    ids = tokenize_passages(encoder, PASSAGES)
    batch = collate(encoder, ids[:1])
    with torch.no_grad():
        hidden_LD = encoder.model(**batch).last_hidden_state[0]
        masked_1D = encoder(**batch)
        plain_1D = encoder(**batch | {"attention_mask": None})
    wanted_D = {"cls": hidden_LD[0], "mean": hidden_LD.mean(0), "last": hidden_LD[-1]}[pooling]
    assert np.allclose(embed(encoder, ids, 3)[0], wanted_D, atol=1e-5)
    assert (masked_1D - plain_1D).abs().max() < 1e-6


def test_vectors_do_not_depend_on_batch_order_or_padding(world):
    encoder = load_encoder(world / "doc_encoder", "passage")
    ids = tokenize_passages(encoder, PASSAGES)
    wanted = embed(encoder, ids, 3)
    graph = encoding.vectors_with_graph(encoder.eval(), ids, 2, nullcontext)
    assert graph.requires_grad
    for vectors in (
        embed(encoder, ids, 1),
        embed(encoder, ids[::-1], 3)[::-1],
        embed(encoder, ids, 0, tokens=50),
        encoding.embed_on_devices(encoder, ids, 2, ACCELERATOR).numpy(),
        graph.detach().numpy(),
    ):
        assert np.allclose(vectors, wanted, atol=1e-5)
    for lengths in ((16, 32), (13, 32)):  # fixed lengths, groups filled up
        for sizes in ({"size": 2}, {"size": 0, "tokens": 64}):
            assert np.abs(embed(encoder, ids, lengths=lengths, **sizes) - wanted).max() < 1e-6
    assert not np.allclose(wanted[0], wanted[1], atol=0.1), "different passages must differ"


# ---------------------------------------------------------------- folders that are wrong
def test_what_a_folder_lacks_is_named(world, tmp_path):
    """trap: Hugging Face draws a missing weight at random, without an exception."""
    with pytest.raises(UserError, match="no such encoder folder"):
        load_encoder(world / "nothing_here", "question")
    with pytest.raises(UserError, match="encoder_inputs.json does not say passage_tokens, pooling"):
        load_encoder(world / "bert", "question")
    short = bert(70, layers=1)
    short.config.num_hidden_layers = 2
    short.save_pretrained(tmp_path)
    tokenizer(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights are missing"):
        load_encoder(tmp_path, "question", INPUTS)


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def wider(folder):
    write_json(folder / "config.json", read_json(folder / "config.json") | {"hidden_size": 64})


class Attack:
    """Unpickling this with the plain pickle module would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def malicious(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Attack(folder / "owned")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [pointer, wider, malicious])
def test_damaged_weights_are_named(world, tmp_path, damage):
    folder = shutil.copytree(world / "doc_encoder", tmp_path / "e")
    damage(folder)
    with pytest.raises(
        UserError, match="e: its weights are damaged, or of another shape than in config.json"
    ):
        load_encoder(folder, "passage")
    assert not (folder / "owned").exists()


LOADERS = {
    "encoder": lambda path: load_encoder(path, "passage", INPUTS),
    "cross": lambda path: load_cross_encoder(path, 32, new_head=True),
    "reader": lambda path: load_reader(path, {"reader_tokens": 32}, new_head=True),
    "fid": load_fid,
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_names_a_missing_tokenizer_and_damaged_weights(world, tmp_path, name):
    """trap: transformers 5 makes an empty tokenizer of nothing, and every text has the vector of [UNK]s."""
    load = LOADERS[name]
    folder = t5(tmp_path) if name == "fid" else shutil.copytree(world / "bert", tmp_path / "bert")
    load(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=f"{folder.name}: no tokenizer in it"):
        load(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{folder.name}: its weights are damaged"):
        load(folder)


def test_a_model_that_cannot_be_loaded_keeps_its_cause():
    """--debug shows what Hugging Face met."""
    for error in (OSError("no config.json"), RuntimeError("size mismatch")):
        with pytest.raises(UserError) as stopped, explain_load_errors("a"):
            raise error
        assert stopped.value.__cause__ is error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": "CLS"}, "'pooling': 'CLS': must be one of cls, mean"),
        ({"token_types": "segment"}, "'token_types': 'segment': must be one of zeros, segments"),
        ({"question_tokens": "32"}, "'question_tokens': '32': must be a number of at least 2"),
        ({"passage_tokens": -1}, "'passage_tokens': -1: must be a number"),
        ({"pair": None}, "'pair': None: must be a text"),
        ({"poling": "cls"}, "'poling': 'cls': did you mean 'pooling'"),
        (None, "does not say passage_tokens, pooling, token_types; write it there"),
        ([], "encoder_inputs.json: expected a json object"),
    ],
)
def test_inputs_written_by_hand_are_checked(world, tmp_path, change, words):
    """A value that no encoder knows must not become mean pooling, or segments of zeros, in silence."""
    shutil.copytree(world / "doc_encoder", tmp_path / "e")
    file = tmp_path / "e" / "encoder_inputs.json"
    inputs = {"role": "passage", "question_tokens": 16} if change is None else change
    if change:
        inputs = read_json(file) | change
    write_json(file, inputs)
    with pytest.raises(UserError, match=words):
        load_encoder(tmp_path / "e", "passage")


# ---------------------------------------------------------------- identity
def test_the_hash_knows_weights_and_inputs(world):
    encoder = load_encoder(world / "doc_encoder", "passage")
    first = encoder_hash(encoder)
    longer = INPUTS | {"passage_tokens": 30}
    assert first == encoder_hash(load_encoder(world / "doc_encoder", "passage"))
    assert first != encoder_hash(load_encoder(world / "doc_encoder", "passage", longer))
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[0, 0] += 1
    assert encoder_hash(encoder) != first


def test_other_libraries_see_the_token_types(tmp_path):
    """A folder of a segments model says so: another library's tokenizer call returns them too."""
    words = tokenizer(tmp_path)
    words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(tmp_path / "bare")
    bare = AutoTokenizer.from_pretrained(tmp_path / "bare", model_input_names=words.model_input_names)
    read = {}
    for types in ("zeros", "segments"):
        inputs = INPUTS | {"role": "shared", "token_types": types}
        save_encoder(Encoder(bert(len(words)), bare, inputs), tmp_path / types)
        read[types] = AutoTokenizer.from_pretrained(tmp_path / types)("paris", "rome")
    assert read["segments"]["token_type_ids"] == [0, 0, 0, 1, 1] and "token_type_ids" not in read["zeros"]
