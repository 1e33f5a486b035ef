"""Other people's encoders: their vectors are sentence-transformers' own, or a sentence says why there are none."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from tests.toy import CITIES, COLOURS, OTHER, THINGS
from utils.corpus import Passage
from utils.encoder import embed, tokenize_passages, tokenize_questions
from utils.plumbing.weights import load_encoder, save_encoder

QUESTIONS = ["which colour has the river of paris?", "the tower", "what is named first in lima ’ and where"]
PASSAGES = [
    Passage("1", "paris", "the old river of paris is red ."),
    Passage("2", "", "it stands in oslo"),
    Passage("3", "rome", "a tower and a garden of rome , named first . " * 8),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 66, "initializer_range": 0.2}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 66}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 2.0}
ROTARY = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66, "initializer_range": 0.2}
# name: (configuration, pooling of its folder, the class of its tokens)
MODELS = {
    "bert": (hf.BertConfig, SIZES, "mean"),
    "distilbert": (hf.DistilBertConfig, DISTIL | {"initializer_range": 0.2}, "mean"),
    "roberta": (hf.RobertaConfig, SIZES | {"type_vocab_size": 1}, "mean"),
    "xlm-roberta": (hf.XLMRobertaConfig, SIZES | {"type_vocab_size": 1}, "cls"),
    "mpnet": (hf.MPNetConfig, SIZES, "mean"),
    "modernbert": (hf.ModernBertConfig, SIZES | LOCAL, "cls"),
    "electra": (hf.ElectraConfig, SIZES | {"embedding_size": 16}, "cls"),
    "albert": (hf.AlbertConfig, SIZES | {"embedding_size": 16}, "mean"),
    "deberta": (
        hf.DebertaConfig,
        SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "mean",
    ),
    "deberta-v2": (hf.DebertaV2Config, SIZES | {"relative_attention": True, "pos_att_type": ["c2p"]}, "cls"),
    "ernie": (hf.ErnieConfig, SIZES, "cls"),
    "nomic_bert": (hf.NomicBertConfig, SIZES, "mean"),
    "qwen2": (hf.Qwen2Config, ROTARY, "last"),
    "llama": (hf.LlamaConfig, ROTARY, "last"),
    "gpt2": (hf.GPT2Config, GPT2, "last"),
}
MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def words_of(folder, kind):
    """A lower-casing WordPiece tokenizer whose special tokens have the places that RoBERTa's or BERT's have."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if "roberta" in kind or kind == "mpnet":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = list("abcdefghijklmnopqrstuvwxyz’?")
    words = [*special, *CITIES, *THINGS, *COLOURS, *OTHER, *letters, *("##" + letter for letter in letters)]
    words = list(dict.fromkeys(words))
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    if special[0] == "<s>":
        names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
        return hf.BertTokenizer(vocab=str(folder / "vocab.txt"), mask_token="<mask>", **names)
    return hf.BertTokenizer(vocab=str(folder / "vocab.txt"))


def decoder_words(folder):
    """A tokenizer without [CLS] and [SEP], whose padding is its end of text, as GPT's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<|endoftext|>", "?", *CITIES, *THINGS, *COLOURS, *OTHER]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def model_folder(folder, kind, **settings):
    """Write a tiny random model of a kind, with its tokenizer, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, sizes, pooling = MODELS[kind]
    words = decoder_words(folder) if pooling == "last" else words_of(folder, kind)
    torch.manual_seed(0)
    tokens = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    model = hf.AutoModel.from_config(config(vocab_size=len(words), **tokens | sizes | settings))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def described(folder, pooling, dense=(), prompts=None, old=True, length=24):
    """Make a model folder one of sentence-transformers, by hand, in the old or in the new spelling."""
    width = json.loads((folder / "config.json").read_text())
    width = width.get("hidden_size") or width.get("dim") or width["n_embd"]
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {name: pooling == key for key, name in MODES.items()} | {"word_embedding_dimension": width}
    if not old:
        modes = {"embedding_dimension": width, "pooling_mode": {"last": "lasttoken"}.get(pooling, pooling)}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    torch.manual_seed(1)
    for out, activation in dense:
        place = folder / f"{len(steps)}_Dense"
        place.mkdir()
        name = f"{activation.__module__}.{activation.__name__}"
        settings = {"in_features": width, "out_features": out, "bias": old, "activation_function": name}
        (place / "config.json").write_text(json.dumps(settings))
        linear = nn.Linear(width, out, bias=old)
        torch.save({f"linear.{k}": v for k, v in linear.state_dict().items()}, place / "pytorch_model.bin")
        steps.append(("Dense", place.name))
        width = out
    steps.append(("Normalize", f"{len(steps)}_Normalize"))
    (folder / steps[-1][1]).mkdir()
    modules = []
    for i, (kind, path) in enumerate(steps):
        package = (
            "sentence_transformers.models" if old else f"sentence_transformers.base.modules.{kind.lower()}"
        )
        if not old and kind == "Pooling":
            package = "sentence_transformers.sentence_transformer.modules.pooling"
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"{package}.{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    config = {"prompts": prompts or {}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def vectors(encoder):
    """Our vectors of QUESTIONS and PASSAGES, in batches."""
    questions = tokenize_questions(encoder, QUESTIONS)
    return embed(encoder, questions, 3), embed(encoder, tokenize_passages(encoder, PASSAGES), 3)


def joined(passage, prompt=""):
    """The one text that a passage is to sentence-transformers."""
    return prompt + f"{passage.title} {passage.text}".strip()


def by_hand(folder, texts, pooling, dense=(), length=24):
    """The vectors of texts, one at a time, without any code of ours or of sentence-transformers."""
    words = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        ids = words(text, truncation=True, max_length=length).input_ids
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vector = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
        for place, (_, activation) in enumerate(dense, 2):
            weights = torch.load(folder / f"{place}_Dense" / "pytorch_model.bin")
            vector = activation()(weights["linear.weight"] @ vector + weights.get("linear.bias", 0))
        rows.append((vector / vector.norm()).numpy())
    return np.array(rows)


# ---------------------------------------------------------------- vectors
@pytest.mark.parametrize("kind", MODELS)
def test_the_vectors_of_a_described_folder(tmp_path, kind):
    """Every architecture: pooling, prompts, Dense, Normalize and length as its folder says; saved, the same again."""
    pooling = MODELS[kind][2]
    dense = [(20, nn.Tanh), (12, nn.Identity)] if kind in ("bert", "roberta", "qwen2") else []
    prompts = {"query": "what is ", "passage": "first : "} if kind != "albert" else {}
    folder = described(model_folder(tmp_path / "e", kind), pooling, dense, prompts, old=kind != "roberta")
    asked = [prompts.get("query", "") + question for question in QUESTIONS]
    texts = [joined(passage, prompts.get("passage", "")) for passage in PASSAGES]
    wanted = [by_hand(folder, texts, pooling, dense) for texts in (asked, texts)]
    for role, place in (("question", 0), ("passage", 1)):
        encoder = load_encoder(folder, role)
        got = vectors(encoder)[place]
        assert np.allclose(got, wanted[place], atol=1e-5)
        assert np.abs(got[0] - got[1]).max() > 1e-2, "different texts must differ"
        save_encoder(encoder, tmp_path / role)
        assert np.array_equal(vectors(load_encoder(tmp_path / role, role))[place], got)
        if importlib.util.find_spec("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            for path in (folder, tmp_path / role):
                theirs = SentenceTransformer(str(path), device="cpu")
                name = ("query", "passage" if path == folder else "document")[place]
                raw = (QUESTIONS, list(map(joined, PASSAGES)))[place]
                name = name if prompts else None
                assert np.allclose(theirs.encode(raw, prompt_name=name), got, atol=1e-5)


@pytest.mark.skipif(
    not importlib.util.find_spec("sentence_transformers"), reason="no sentence-transformers here"
)
@pytest.mark.parametrize("types", ["zeros", "segments"])
def test_our_folders_in_sentence_transformers(tmp_path, types):
    """A folder that a training wrote: the vectors of questions, and of passages as (title, text)."""
    from sentence_transformers import SentenceTransformer

    inputs = {
        "role": "shared",
        "question_tokens": 24,
        "passage_tokens": 24,
        "token_types": types,
        "pooling": "cls",
    }
    encoder = load_encoder(model_folder(tmp_path / "e", "bert"), "passage", inputs)
    save_encoder(encoder, tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    questions, passages = vectors(load_encoder(tmp_path / "ours", "passage"))
    texts = [(p.title, p.text) if p.title else p.text for p in PASSAGES]
    asked = [question.replace("’", "'") for question in QUESTIONS]
    assert np.allclose(theirs.encode_query(asked), questions, atol=1e-5)
    for text, vector in zip(texts, passages, strict=True):
        assert np.allclose(theirs.encode_document([text]), vector, atol=1e-5)
    assert theirs.similarity_fn_name == "dot"
