"""
Encoders: the original codes' token ids, Hugging Face's own DPR classes, and every door that could fail
silently.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from prepare.checkpoints import export_hf_dpr
from tests.toy import INPUTS, bert, make_world, tokenizer
from tests.toy_t5 import t5
from utils.cross_encoder import load_cross_encoder
from utils.encoder import Encoder, collate, embed, tokenize_passages, tokenize_questions
from utils.fid import load_fid
from utils.plumbing.config import UserError
from utils.plumbing.weights import encoder_hash, explain_load_errors, load_encoder, save_encoder
from utils.reader import load_reader

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenize_pair.json").read_text())
PASSAGES = [
    ("paris", "the old river is red."),
    ("", "it stands in oslo"),
    ("rome", "a tower and a garden. " * 5),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def golden_encoder(folder, length, token_types):
    path = folder / "golden_vocab.txt"
    path.write_text("\n".join(GOLDEN["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    inputs = {
        "question_tokens": length,
        "passage_tokens": length,
        "pooling": "cls",
        "token_types": token_types,
    }
    return Encoder(torch.nn.Linear(1, 1), words, inputs, projection=torch.nn.Linear(1, 1))


def row(batch, key):
    return batch[key][0].tolist()


# The cross-encoder's own input, rocketqa_cross, is train_cross_encoder.py's business.
TWO_TOWERS = [case for case in GOLDEN["cases"] if case["mode"] != "rocketqa_cross"]


@pytest.mark.parametrize("case", TWO_TOWERS, ids=range(len(TWO_TOWERS)))
def test_token_ids_equal_the_original_codes(case, tmp_path):
    """DPR 2020 (zeros), DPR 2021 (trailing [SEP]) and RocketQA (segments): ids, mask and token types."""
    dpr = case["mode"] == "dpr2020"
    for kind, wanted, mask in [
        ("zeros" if dpr else "segments", case["ids"], case["mask"]),
        ("zeros_sep", case.get("ids_dpr2021"), case.get("mask_dpr2021")),
    ]:
        if wanted is None:
            continue
        encoder = golden_encoder(tmp_path, case["max_length"], kind)
        if case["mode"] == "rocketqa_query":
            ids = tokenize_questions(encoder, [case["text"]])
        else:
            ids = tokenize_passages(encoder, [(case["title"] or "", case["text"])])
        batch = collate(encoder, ids, len(wanted))
        if case.get(
            "tokenizer_version_dependent"
        ):  # transformers 5 cuts the longer part one token differently
            if kind != "zeros_sep":
                assert row(batch, "input_ids") in (wanted, case["ids_tokenizers_backend"])
            continue
        assert row(batch, "input_ids") == wanted
        assert row(batch, "attention_mask") == mask
        if kind != "zeros_sep":
            assert row(batch, "token_type_ids") == case["token_type_ids"]


def test_typographic_apostrophe_in_questions(world):
    """A question typed with U+2019 is the question typed with ' (DPR HEAD, nanoDPR)."""
    encoder = load_encoder(world / "query_encoder", "question")
    assert tokenize_questions(encoder, ["paris’ river"]) == tokenize_questions(encoder, ["paris' river"])


def test_vectors_do_not_depend_on_batch_order_or_padding(world):
    """Batches of 1 and of 3, sorted or not: the same vectors, in the given order."""
    encoder = load_encoder(world / "doc_encoder", "passage")
    ids = tokenize_passages(encoder, PASSAGES)
    one, three, turned = (embed(encoder, x, n, "passage") for x, n in ((ids, 1), (ids, 3), (ids[::-1], 3)))
    assert np.allclose(one, three, atol=1e-5) and np.allclose(turned[::-1], three, atol=1e-5)
    assert not np.allclose(one[0], one[1], atol=0.1), "different passages must differ"


def test_mean_pooling_ignores_padding(world):
    """pooling mean is the average over real tokens only (sentence-transformers)."""
    encoder = load_encoder(world / "doc_encoder", "passage", INPUTS | {"pooling": "mean"})
    ids = tokenize_passages(encoder, PASSAGES)
    with torch.no_grad():
        hidden = encoder.model(**collate(encoder, ids[:1])).last_hidden_state[0]
    assert np.allclose(embed(encoder, ids, 3, "passage")[0], hidden.mean(0).numpy(), atol=1e-5)


def test_same_vectors_as_hugging_face_dpr(world, tmp_path):
    """The official DPR classes on random weights give our vectors, and our export gives theirs back."""
    words = tokenizer(tmp_path)
    settings = bert(len(words)).config.to_diff_dict()
    for role, wanted_class in (("question", DPRQuestionEncoder), ("passage", DPRContextEncoder)):
        torch.manual_seed(3)
        official = wanted_class(DPRConfig(**settings | {"initializer_range": 0.2})).eval()
        official.save_pretrained(tmp_path / role)
        words.save_pretrained(tmp_path / role)
        ours = load_encoder(tmp_path / role, role)
        text = ["the river of paris", "a red tower"]
        ids = (
            tokenize_questions(ours, text)
            if role == "question"
            else tokenize_passages(ours, [("", t) for t in text])
        )
        batch = words(text, padding=True, return_tensors="pt")
        with torch.no_grad():  # only input_ids: its own defaults for mask and token types
            theirs = official(batch.input_ids, attention_mask=batch.attention_mask).pooler_output.numpy()
        assert np.allclose(embed(ours, ids, 2, role), theirs, atol=1e-5)
        save_encoder(ours, tmp_path / f"{role}_ours")
        export_hf_dpr(tmp_path / f"{role}_ours", role, tmp_path / f"{role}_export")
        again = load_encoder(tmp_path / f"{role}_export", role)
        assert encoder_hash(again) == encoder_hash(ours)
        with pytest.raises(UserError, match="encoder"):
            load_encoder(tmp_path / f"{role}_export", "passage" if role == "question" else "question")


def write_cp(path, towers, extra=None):
    """A checkpoint as the original DPR writes it: both towers under their prefixes, and the dead pooler."""
    weights = {}
    for prefix, model in towers.items():
        weights |= {f"{prefix}.{k}": v for k, v in model.state_dict().items()}
        weights[f"{prefix}.pooler.dense.weight"] = torch.zeros(32, 32)
        weights[f"{prefix}.embeddings.position_ids"] = torch.arange(256)[None]
    fields = {"model_dict": weights, "optimizer_dict": {}, "scheduler_dict": {}, "offset": 0, "epoch": 1}
    torch.save(fields | {"encoder_params": extra or {"pretrained_model_cfg": "bert-base-uncased"}}, path)


def test_original_checkpoint(world, tmp_path):
    """Both towers of a DPR .cp load with every weight, dead keys ignored."""
    words = tokenizer(tmp_path)
    towers = {"question_model": bert(len(words), 1, 64, 3), "ctx_model": bert(len(words), 2, 64, 3)}
    for model in towers.values():  # .cp files do not name the heads: 64 a head is assumed
        model.config.num_attention_heads = 1
    words.save_pretrained(tmp_path)
    weights = {f"{p}.{k}": v for p, m in towers.items() for k, v in m.state_dict().items()}
    weights["ctx_model.embeddings.position_ids"] = torch.arange(256)[None]
    torch.save({"model_dict": weights, "encoder_params": {}}, tmp_path / "dpr.cp")
    (tmp_path / "alone").mkdir()
    named = {"pretrained_model_cfg": "of/no/network"}
    torch.save({"model_dict": weights, "encoder_params": named}, tmp_path / "alone" / "dpr.cp")
    with pytest.raises(UserError, match=r"dpr.cp: its tokenizer cannot be loaded \(tokenizer.json is looked"):
        load_encoder(tmp_path / "alone" / "dpr.cp", "passage")
    for role, prefix in (("question", "question_model"), ("passage", "ctx_model")):
        loaded = load_encoder(tmp_path / "dpr.cp", role)
        assert all(
            torch.equal(v, loaded.model.state_dict()[k]) for k, v in towers[prefix].state_dict().items()
        )
        assert loaded.model.config.num_hidden_layers == 3 and loaded.inputs["token_types"] == "zeros"
    del weights["ctx_model.encoder.layer.1.output.dense.weight"]
    torch.save({"model_dict": weights, "encoder_params": {}}, tmp_path / "broken.cp")
    with pytest.raises(UserError, match="missing"):
        load_encoder(tmp_path / "broken.cp", "passage")
    weights["ctx_model.encoder.layer.1.output.dense.weight"] = torch.zeros(1)
    torch.save({"model_dict": weights, "encoder_params": {}}, tmp_path / "broken.cp")
    with pytest.raises(UserError, match="broken.cp: its weights are damaged .get it again"):
        load_encoder(tmp_path / "broken.cp", "passage")


class Attack:
    """Unpickling this with the plain pickle module would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_malicious_checkpoint_runs_nothing(world, tmp_path):
    """Code hidden in a .cp stays inert; the weights beside it still load."""
    words = tokenizer(tmp_path)
    words.save_pretrained(tmp_path)
    trap = tmp_path / "owned"
    model = bert(len(words), 1, 64, 1)
    write_cp(tmp_path / "evil.cp", {"question_model": model}, Attack(trap))
    load_encoder(tmp_path / "evil.cp", "question")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Attack(trap)))
    assert trap.exists(), "the attack itself works, so the test can fail"


def test_wrong_folders_are_refused(world, tmp_path):
    """
    The other tower, a folder without input conventions, a missing folder and missing weights: one clear line
    each.
    """
    with pytest.raises(UserError, match="passage encoder"):
        load_encoder(world / "doc_encoder", "question")
    with pytest.raises(UserError, match="encoder_inputs.json"):
        load_encoder(world / "bert", "question")
    with pytest.raises(UserError, match="no such"):
        load_encoder(world / "nothing_here", "question")
    small = bert(70, layers=1)
    small.config.num_hidden_layers = 2
    small.save_pretrained(tmp_path / "short")
    tokenizer(tmp_path).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="missing"):
        load_encoder(tmp_path / "short", "question", INPUTS)


def test_a_folder_without_a_tokenizer_is_refused(world, tmp_path):
    """trap: transformers 5 makes an empty one, and every passage has the vector of [UNK] [UNK] [UNK]."""
    shutil.copytree(world / "doc_encoder", tmp_path / "bert")
    t5(tmp_path)
    for folder, load in (("bert", lambda path: load_encoder(path, "passage")), ("t5", load_fid)):
        load(tmp_path / folder)
        for file in (tmp_path / folder).glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match=f"{folder}: no tokenizer in it"):
            load(tmp_path / folder)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def wider(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def malicious(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Attack(folder / "owned")}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("damage", [cut, pointer, wider, malicious])
def test_damaged_weights_are_named(world, tmp_path, damage):
    """A truncated file, a git-lfs pointer, another shape, a pickle with a program in it: one sentence."""
    shutil.copytree(world / "doc_encoder", tmp_path / "e")
    damage(tmp_path / "e")
    with pytest.raises(
        UserError, match="e: its weights are damaged, or of another shape than in config.json"
    ):
        load_encoder(tmp_path / "e", "passage")
    assert not (tmp_path / "e" / "owned").exists()


def test_a_model_that_cannot_be_loaded_keeps_its_cause(tmp_path, monkeypatch):
    """--debug shows what Hugging Face met; a full memory is no damaged file, and has a line of its own."""
    for error in (OSError("no config.json"), RuntimeError("size mismatch")):
        with pytest.raises(UserError) as stopped, explain_load_errors("a"):
            raise error
        assert stopped.value.__cause__ is error

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    (tmp_path / "x.cp").touch()
    monkeypatch.setattr("torch.load", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_encoder(tmp_path / "x.cp", "passage")


def test_the_other_loaders_name_damaged_weights_too(world, tmp_path):
    """Cross-encoder, reader and FiD go through the same door."""
    shutil.copytree(world / "bert", tmp_path / "bert")
    t5(tmp_path)
    for folder, load in (
        ("bert", lambda path: load_cross_encoder(path, 32, new_head=True)),
        ("bert", lambda path: load_reader(path, {"reader_tokens": 32}, new_head=True)),
        ("t5", load_fid),
    ):
        cut(tmp_path / folder)
        with pytest.raises(UserError, match=f"{folder}: its weights are damaged"):
            load(tmp_path / folder)


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
    inputs = {"role": "passage", "question_tokens": 16} if change is None else change
    if change:
        inputs = json.loads((tmp_path / "e" / "encoder_inputs.json").read_text()) | change
    (tmp_path / "e" / "encoder_inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(UserError, match=words):
        load_encoder(tmp_path / "e", "passage")


def test_the_hash_knows_weights_and_inputs(world):
    """One changed weight or one changed length is another encoder; loading again is the same."""
    encoder = load_encoder(world / "doc_encoder", "passage")
    first = encoder_hash(encoder)
    assert first == encoder_hash(load_encoder(world / "doc_encoder", "passage"))
    assert first != encoder_hash(
        load_encoder(world / "doc_encoder", "passage", INPUTS | {"passage_tokens": 30})
    )
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[0, 0] += 1
    assert encoder_hash(encoder) != first


def test_other_libraries_see_the_token_types(tmp_path):
    """A folder of a segments model says so: another library's tokenizer call returns them too."""
    words = tokenizer(tmp_path)
    words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(tmp_path / "bare")
    bare = AutoTokenizer.from_pretrained(tmp_path / "bare", model_input_names=words.model_input_names)
    for kind in ("zeros", "segments"):
        inputs = INPUTS | {"role": "shared", "token_types": kind}
        save_encoder(Encoder(bert(len(words)), bare, inputs), tmp_path / kind)
    segments, zeros = (
        AutoTokenizer.from_pretrained(tmp_path / k)("paris", "rome") for k in ("segments", "zeros")
    )
    assert segments["token_type_ids"] == [0, 0, 0, 1, 1] and "token_type_ids" not in zeros
