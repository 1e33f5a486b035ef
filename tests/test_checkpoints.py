"""The original DPR's checkpoints become Hugging Face's DPR classes and back; the oracle is those classes."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, DPRConfig, DPRContextEncoder, DPRQuestionEncoder, DPRReader

from prepare.checkpoints import from_cp, main, to_hf_dpr
from tests.test_encoder import Attack
from tests.toy import INPUTS, bert, tokenizer
from utils.corpus import Passage
from utils.encoder import embed, tokenize_passages, tokenize_questions
from utils.plumbing.config import UserError
from utils.plumbing.weights import encoder_hash, load_encoder, save_encoder
from utils.reader import load_reader

OFFICIAL = {"question": DPRQuestionEncoder, "passage": DPRContextEncoder, "reader": DPRReader}
# Hugging Face's names -> the original code's
ORIGINAL = {
    "bert_model.": "",
    "question_encoder.": "question_model.",
    "ctx_encoder.": "ctx_model.",
    "span_predictor.encoder.": "encoder.",
    "span_predictor.": "",
}


@pytest.fixture
def words(tmp_path):
    """The toy tokenizer, which lies next to the checkpoints of a test."""
    words = tokenizer(tmp_path)
    words.save_pretrained(tmp_path)
    return words


def official(role, words, **settings):
    """The class of facebook/dpr-* on random weights: 3 layers of 64 dimensions, 2 heads."""
    torch.manual_seed(3)
    sizes = bert(len(words), 1, 64, 3).config.to_diff_dict() | {"initializer_range": 0.2}
    return OFFICIAL[role](DPRConfig(**sizes | settings)).eval()


def write_cp(path, *models, without=None, **settings):
    """Write a checkpoint as the original DPR writes it: its names, dead poolers and dead position ids."""
    weights = {}
    for tower in ("question_model", "ctx_model", "encoder"):
        weights[f"{tower}.pooler.dense.weight"] = torch.zeros(64, 64)
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(256)[None]
    for model in models:
        for key, value in model.state_dict().items():
            for theirs, original in ORIGINAL.items():
                key = key.replace(theirs, original)
            weights[key] = value
    weights.pop(without, None)
    torch.save({"model_dict": weights, "optimizer_dict": {}, "encoder_params": settings}, path)


def same(a, b):
    """Whether two models have the same weights under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("role", "size"), [("question", 0), ("passage", 0), ("passage", 8)])
def test_same_vectors_as_hugging_face_dpr(tmp_path, words, role, size):
    """The official DPR classes give our vectors, with a projection too, and our export gives theirs back."""
    model = official(role, words, projection_dim=size)
    model.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path, role)
    texts = ["the river of paris", "a red tower"]
    batch = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():  # its own defaults for the token types
        wanted = model(batch.input_ids, attention_mask=batch.attention_mask).pooler_output.numpy()
    passages = [Passage("1", "", text) for text in texts]
    ids = tokenize_questions(ours, texts) if role == "question" else tokenize_passages(ours, passages)
    assert np.allclose(embed(ours, ids, 2), wanted, atol=1e-5)
    with pytest.raises(UserError, match="encoder"):
        load_encoder(tmp_path, "passage" if role == "question" else "question")
    if size:
        with pytest.raises(UserError, match="is one of the DPR classes already"):
            to_hf_dpr(tmp_path, tmp_path / "out", role)
        return

    for name, stored in (("both", "shared"), ("ours", role)):
        ours.inputs["role"] = stored
        save_encoder(ours, tmp_path / name)
    with pytest.raises(UserError, match="its role is shared; add --role"):
        to_hf_dpr(tmp_path / "both", tmp_path / "new")
    to_hf_dpr(tmp_path / "ours", tmp_path / "out")
    to_hf_dpr(tmp_path / "both", tmp_path / "new", role)
    assert encoder_hash(load_encoder(tmp_path / "out", role)) == encoder_hash(ours)
    assert same(OFFICIAL[role].from_pretrained(tmp_path / "new"), model)


@pytest.mark.parametrize(("role", "size"), [("question", 0), ("passage", 8), ("reader", 0)])
def test_a_cp_becomes_the_official_model(tmp_path, monkeypatch, words, role, size):
    """Every weight of a model in a .cp, in a folder that the stages read; code in the file stays inert."""
    trap, out = tmp_path / "owned", tmp_path / "out"
    models = {name: official(name, words, projection_dim=size) for name in OFFICIAL}
    towers = [models["reader"]] if role == "reader" else [models["question"], models["passage"]]
    write_cp(tmp_path / "dpr.cp", *towers, sequence_length=100, encoder=Attack(trap))
    argv = ["prepare.checkpoints", "from_cp", str(tmp_path / "dpr.cp"), str(out), "--heads", "2"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match="from_cp needs --role"):
        main()
    monkeypatch.setattr("sys.argv", [*argv, "--role", role])
    main()
    with pytest.raises(UserError, match="is there already"):
        main()
    assert not trap.exists()
    pickle.loads(pickle.dumps(Attack(trap)))
    assert trap.exists(), "the attack itself works, so the test can fail"

    again = OFFICIAL[role].from_pretrained(out)
    assert same(again, models[role])
    assert again.config.num_attention_heads == 2 and again.config.num_hidden_layers == 3
    if role == "reader":
        inputs = {"role": role, "pair": "", "reader_tokens": 100, "token_types": "zeros"}
        assert load_reader(out).inputs == inputs
    else:
        inputs = INPUTS | {"role": role, "pair": "", "question_tokens": 100, "passage_tokens": 100}
        assert load_encoder(out, role).inputs == inputs


def test_the_heads_of_a_cp_are_never_guessed(tmp_path, words):
    """--heads, a config.json next to it or where it says, BERT's own sizes; else the number is asked for."""
    cp, named, here = tmp_path / "dpr.cp", tmp_path / "named" / "config.json", tmp_path / "config.json"
    named.parent.mkdir()
    write_cp(cp, official("passage", words), pretrained_model_cfg=str(named.parent))

    def config(**options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        from_cp(cp, tmp_path / "out", "passage", **options)
        return json.loads((tmp_path / "out" / "config.json").read_text())

    with pytest.raises(UserError, match=r"how many attention heads .*64 dimensions; add --heads N"):
        config()
    with pytest.raises(UserError, match="3 attention heads or config.json do not fit its 64 dimensions"):
        config(heads=3)
    named.write_text('{"num_attention_heads": 8}')
    assert config()["num_attention_heads"] == 8
    bert_config = BertConfig(num_attention_heads=4, hidden_size=64, layer_norm_eps=1e-5)
    bert_config.save_pretrained(tmp_path)
    written = config()
    assert written["model_type"] == "dpr" and written["vocab_size"] == len(words)
    assert written["num_attention_heads"] == 4 and written["layer_norm_eps"] == 1e-5
    assert config(heads=2)["num_attention_heads"] == 2
    load_encoder(tmp_path / "out", "passage")
    here.write_text('{"num_attention_heads": 4, "hidden_size": 128}')
    with pytest.raises(UserError, match="4 attention heads or config.json do not fit its 64 dimensions"):
        config()
    here.unlink()
    base = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    write_cp(cp, official("passage", words, **base))
    assert config()["num_attention_heads"] == 12


def test_a_damaged_cp_is_named(tmp_path, monkeypatch, words):
    """A missing weight, another shape, another model, no tokenizer, no file: a sentence each."""
    cp, lone = tmp_path / "dpr.cp", tmp_path / "alone" / "lone.cp"
    lone.parent.mkdir()
    model, reader = official("passage", words), official("reader", words)

    def refused(fault, path=cp, role="passage"):
        with pytest.raises(UserError, match=f"{path.name}: {fault}"):
            from_cp(path, tmp_path / "out", role, heads=2)

    write_cp(cp, model, without="ctx_model.encoder.layer.1.output.dense.weight")
    refused("1 weights are missing, such as .*layer.1.output.dense.weight")
    refused("no weights under encoder.embeddings.*: not a reader checkpoint", role="reader")
    write_cp(cp, reader, without="qa_classifier.bias")
    refused("1 weights are missing, such as .*qa_classifier.bias", role="reader")
    refused("no weights under ctx_model.embeddings.*: not a bi-encoder checkpoint")
    model.ctx_encoder.bert_model.encoder.layer[1].output.dense.weight = torch.nn.Parameter(torch.zeros(1))
    write_cp(cp, model)
    refused("its weights are damaged .get it again")
    cp.write_bytes(cp.read_bytes()[:5000])
    refused("not a DPR checkpoint, or truncated")
    refused("no such file", tmp_path / "nowhere.cp")
    write_cp(lone, reader, pretrained_model_cfg="of/no/network")
    refused(r"its tokenizer cannot be loaded \(tokenizer.json is looked", lone, "reader")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="first: python -m prepare.checkpoints from_cp"):
        load_encoder(cp, "passage")

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("torch.load", full)
    with pytest.raises(RuntimeError, match="allocate memory"):  # a full memory has a line of its own
        from_cp(cp, tmp_path / "out", "passage")
