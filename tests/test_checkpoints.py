"""The original DPR's checkpoints become Hugging Face's DPR classes and back; the oracle is those classes."""

import importlib
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
import transformers as hf

from prepare.checkpoints import from_cp, main, to_cp, to_hf_dpr
from tests.test_encoder import Attack
from tests.toy import INPUTS, bert, tokenizer
from utils.corpus import Passage
from utils.encoder import Encoder, embed, tokenize_passages, tokenize_questions
from utils.plumbing.config import UserError
from utils.plumbing.weights import encoder_hash, load_encoder, save_encoder
from utils.reader import load_reader

OFFICIAL = {"question": hf.DPRQuestionEncoder, "passage": hf.DPRContextEncoder, "reader": hf.DPRReader}
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
    return OFFICIAL[role](hf.DPRConfig(**sizes | settings)).eval()


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


def refused(cp, fault, role="passage", **options):
    with pytest.raises(UserError, match=fault):
        from_cp(cp, cp.with_name("out"), role, **options)


def same(a, b):
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

    refused(cp, "3 attention heads or config.json do not fit its 64 dimensions", heads=3)
    named.write_text('{"num_attention_heads": 8}')
    assert config()["num_attention_heads"] == 8
    bert_config = hf.BertConfig(num_attention_heads=4, hidden_size=64, layer_norm_eps=1e-5)
    bert_config.save_pretrained(tmp_path)
    written = config()
    assert written["model_type"] == "dpr" and written["vocab_size"] == len(words)
    assert written["num_attention_heads"] == 4 and written["layer_norm_eps"] == 1e-5
    assert config(heads=2)["num_attention_heads"] == 2
    load_encoder(tmp_path / "out", "passage")
    here.write_text('{"num_attention_heads": 4, "hidden_size": 128}')
    refused(cp, "4 attention heads or config.json do not fit its 64 dimensions")
    here.unlink()
    base = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    write_cp(cp, official("passage", words, **base))
    assert config()["num_attention_heads"] == 12


def test_a_damaged_cp_is_named(tmp_path, monkeypatch, words):
    cp, lone = tmp_path / "dpr.cp", tmp_path / "alone" / "lone.cp"
    lone.parent.mkdir()
    model, reader = official("passage", words), official("reader", words)
    write_cp(cp, model, without="ctx_model.encoder.layer.1.output.dense.weight")
    refused(cp, "dpr.cp: 1 weights are missing, such as .*layer.1.output.dense.weight", heads=2)
    refused(cp, "dpr.cp: no weights under encoder.embeddings.*: not a reader checkpoint", "reader")
    write_cp(cp, reader, without="qa_classifier.bias")
    refused(cp, "dpr.cp: 1 weights are missing, such as .*qa_classifier.bias", "reader", heads=2)
    refused(cp, "dpr.cp: no weights under ctx_model.embeddings.*: not a bi-encoder checkpoint")
    model.ctx_encoder.bert_model.encoder.layer[1].output.dense.weight = torch.nn.Parameter(torch.zeros(1))
    write_cp(cp, model)
    refused(cp, "dpr.cp: its weights are damaged .get it again", heads=2)
    cp.write_bytes(cp.read_bytes()[:5000])
    refused(cp, "dpr.cp: not a DPR checkpoint, or truncated")
    refused(tmp_path / "nowhere.cp", "nowhere.cp: no such file")
    write_cp(lone, reader, pretrained_model_cfg="of/no/network")
    refused(lone, r"lone.cp: its tokenizer cannot be loaded \(tokenizer.json is looked", "reader", heads=2)
    assert not (tmp_path / "out").exists() and not (lone.parent / "out").exists()
    with pytest.raises(UserError, match="first: python -m prepare.checkpoints from_cp"):
        load_encoder(cp, "passage")

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("torch.load", full)
    with pytest.raises(RuntimeError, match="allocate memory"):  # a full memory has a line of its own
        from_cp(cp, tmp_path / "out", "passage")


class Node:
    """An object of omegaconf, in which DPR of 2021 keeps its settings."""

    def __init__(self, **state):
        vars(self).update(state)


@pytest.mark.parametrize(("place", "role"), [("beside", "passage"), ("named", "reader"), ("flag", "passage")])
def test_twelve_heads_of_26_dimensions(tmp_path, words, place, role):
    """TinyBERT's 312 dimensions: a BertModel of its own config gives the same states, wherever that lies."""
    cp, start, out = tmp_path / "dpr.cp", tmp_path / "start", tmp_path / "out"
    torch.manual_seed(3)
    config = bert(len(words)).config
    config.update({"hidden_size": 312, "num_attention_heads": 12, "max_position_embeddings": 64})
    config.update({"layer_norm_eps": 1e-3, "hidden_act": "relu", "type_vocab_size": 3})
    config.save_pretrained(tmp_path if place == "beside" else start)
    words.save_pretrained(start)
    model = hf.BertModel(config).eval()
    prefix = "encoder" if role == "reader" else "ctx_model"
    weights = {f"{prefix}.{key}": value for key, value in model.state_dict().items()}
    for name, size in (("qa_outputs", 2), ("qa_classifier", 1)) if role == "reader" else ():
        weights |= {f"{name}.weight": torch.zeros(size, 312), f"{name}.bias": torch.zeros(size)}
    encoder = {"sequence_length": 9, "encoder_model_type": "hf_bert"}
    encoder["pretrained_model_cfg"] = str(start) if place == "named" else "someone/unknown"
    nodes = {key: Node(_val=value) for key, value in encoder.items()}
    params = {"do_lower_case": True, "encoder": Node(_content=nodes)}
    torch.save({"model_dict": weights, "encoder_params": params}, cp)
    if place == "flag":
        refused(cp, "how many .* 312 dimensions; add --heads N, or --config .*someone/unknown")
        refused(cp, "--config no/such/folder: no such folder", config="no/such/folder")
    from_cp(cp, out, role, config=str(start) if place == "flag" else "")

    text = "The Tower of London is red and it was named first"
    ids = words(text, truncation=True, max_length=9, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        if role == "reader":
            again = load_reader(out)
            states = again.model.span_predictor.encoder.bert_model(ids).last_hidden_state
            assert again.inputs["reader_tokens"] == 9 and torch.allclose(states, wanted, atol=1e-5)
            return
    encoder = load_encoder(out, "passage")
    vectors = embed(encoder, tokenize_passages(encoder, [Passage("1", "", text)]), 1)
    assert np.allclose(vectors, wanted[:, 0], atol=1e-5)


@pytest.mark.parametrize("lower", [True, False])
def test_capitals_as_the_cp_says(tmp_path, words, lower):
    """DPR gives the stored do_lower_case to its tokenizer, whatever the tokenizer's own file says."""
    write_cp(tmp_path / "dpr.cp", official("question", words), do_lower_case=lower)
    from_cp(tmp_path / "dpr.cp", tmp_path / "out", "question", heads=2)
    encoder = load_encoder(tmp_path / "out", "question")
    wanted = hf.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=lower)
    theirs, ours = ((folder / "vocab.txt").read_text().split() for folder in (tmp_path, tmp_path / "out"))
    assert theirs == ours
    text = "Which River of PARIS?"
    assert tokenize_questions(encoder, [text]) == [wanted(text).input_ids]
    assert encoder.tokenizer("a").keys() == {"input_ids", "attention_mask"}


def test_what_is_no_bert_of_dprs(tmp_path, words):
    """A weight without a place, a config of RoBERTa, an encoder of pytext: vectors would be others."""
    cp = tmp_path / "dpr.cp"
    model = official("passage", words)
    for key, fault in (
        ("ctx_model.embeddings.task_type.weight", "a BERT has no place for .*task_type.weight"),
        ("embeddingHead.weight", "DPR knows no weight embeddingHead.weight"),
    ):
        write_cp(cp, model)
        saved = torch.load(cp)
        saved["model_dict"][key] = torch.zeros(1)
        torch.save(saved, cp)
        refused(cp, fault, heads=2)
    write_cp(cp, model)
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "num_attention_heads": 2}')
    refused(cp, "is a roberta, and DPR's models are BERTs; add --heads N")
    torch.save({"model_dict": {}, "encoder_params": {"encoder_model_type": "pytext_bert"}}, cp)
    refused(cp, "not a bi-encoder checkpoint; its encoder is pytext_bert, and only hf_bert can be read")


def both_towers(folder, words, **inputs):
    """A run of two encoders whose texts are cut at 12 tokens."""
    inputs = INPUTS | {"question_tokens": 12, "passage_tokens": 12} | inputs
    encoders = {}
    for seed, (name, role) in enumerate((("query_encoder", "question"), ("doc_encoder", "passage"))):
        config = bert(len(words), seed).config
        config.num_attention_heads = 8  # as no size tells
        model = hf.BertModel(config, add_pooling_layer=False)
        encoders[role] = Encoder(model, words, inputs | {"role": role})
        save_encoder(encoders[role].eval(), folder / name)
    return encoders


TEXTS = ["Which river of paris is it and where is the tower of rome and the old market", "the red tower"]


def vectors(encoder, role):
    if role == "question":
        return embed(encoder, tokenize_questions(encoder, TEXTS), 2)
    return embed(encoder, tokenize_passages(encoder, [Passage("1", "Paris", text) for text in TEXTS]), 2)


def test_to_a_cp_and_back(tmp_path, words):
    """Both towers have their vectors again, and so has a program that looks only at what DPR looks at."""
    encoders = both_towers(tmp_path / "run", words)
    to_cp(tmp_path / "run", tmp_path / "export")
    for role, encoder in encoders.items():
        from_cp(tmp_path / "export" / "dpr.cp", tmp_path / role, role)
        again = load_encoder(tmp_path / role, role)
        assert np.allclose(vectors(again, role), vectors(encoder, role), atol=1e-6)

    # as DPR does it: strict, every text cut to sequence_length, the words of vocab.txt
    saved = torch.load(tmp_path / "export" / "dpr.cp", weights_only=True)
    assert {*saved} == {*"model_dict optimizer_dict scheduler_dict offset epoch encoder_params".split()}
    settings = saved["encoder_params"]
    model = hf.BertModel(hf.BertConfig.from_pretrained(settings["pretrained_model_cfg"])).eval()
    prefix = "question_model."
    tower = {key.removeprefix(prefix): x for key, x in saved["model_dict"].items() if key.startswith(prefix)}
    del tower["embeddings.position_ids"]
    model.load_state_dict(tower)
    vocabulary = str(tmp_path / "export" / "vocab.txt")
    plain = hf.BertTokenizer(vocab=vocabulary, do_lower_case=settings["do_lower_case"])
    length = settings["sequence_length"]
    ids = plain(TEXTS[0], truncation=True, max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        state = model(ids).last_hidden_state[0, 0]
    assert np.allclose(state, vectors(encoders["question"], "question")[0], atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ({"pooling": "mean"}, "only pooling cls with token_types zeros, not pooling 'mean'"),
        ({"token_types": "segments"}, "not token_types 'segments'"),
        ({"question_tokens": 8}, "at 8 tokens and passages at 12, .* holds one length; add --tokens 12"),
    ],
)
def test_exports_refuse_what_the_format_cannot_hold(tmp_path, words, inputs, fault):
    """The vectors of a round trip are the same, or there is none."""
    both_towers(tmp_path / "run", words, **inputs)
    with pytest.raises(UserError, match=fault):
        to_cp(tmp_path / "run", tmp_path / "export")
    if "question_tokens" not in inputs:
        with pytest.raises(UserError, match=fault):
            to_hf_dpr(tmp_path / "run" / "query_encoder", tmp_path / "export")


def test_to_hf_dpr_and_back(tmp_path, words):
    """Lengths come along, for us and for whoever lets the tokenizer cut."""
    for role, encoder in both_towers(tmp_path / "run", words).items():
        name = {"question": "query_encoder", "passage": "doc_encoder"}[role]
        to_hf_dpr(tmp_path / "run" / name, tmp_path / role)
        wanted = vectors(encoder, role)
        assert np.allclose(vectors(load_encoder(tmp_path / role, role), role), wanted, atol=1e-6)
    words = hf.AutoTokenizer.from_pretrained(tmp_path / "passage")
    batch = words("Paris", "which river of paris is it and where is the tower of rome", truncation=True)
    assert len(batch.input_ids) == 12 and "token_type_ids" not in batch


@pytest.mark.parametrize("module", ["check", "checkpoints", "convert", "download", "salient_spans"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(monkeypatch, capsys, module, flag):
    monkeypatch.setattr("sys.argv", [f"prepare.{module}", flag])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"prepare.{module}").main()
    assert end.value.code == 0 and f"python -m prepare.{module}" in capsys.readouterr().out
    if module == "checkpoints":
        monkeypatch.setattr("sys.argv", ["prepare.checkpoints"])
        main()
        assert "from_cp" in capsys.readouterr().out
