"""Other people's encoders: the vectors of sentence-transformers, or a sentence that says why not."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from tests.processes import main
from tests.toy import CITIES, COLOURS, OTHER, SPECIAL, THINGS, make_world
from tests.toy_t5 import t5
from utils.corpus import Passage
from utils.cross_encoder import load_cross_encoder, probabilities, tokenize_pairs
from utils.encoder import DEFAULTS, collate, embed, tokenize_passages, tokenize_questions
from utils.fid import load_fid
from utils.plumbing import weights
from utils.plumbing.config import UserError
from utils.plumbing.run import parameter_groups
from utils.plumbing.weights import encoder_hash, load_encoder, load_tokenizer, save_encoder
from utils.reader import load_reader

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
RELATIVE = SIZES | {"relative_attention": True}
ROTARY = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 66, "initializer_range": 0.2}
THEIRS = importlib.util.find_spec("sentence_transformers")  # compared with where it is installed
# name: (configuration, sizes, pooling of its folder)
MODELS = {
    "bert": (hf.BertConfig, SIZES, "mean"),
    "distilbert": (hf.DistilBertConfig, DISTIL | {"initializer_range": 0.2}, "mean"),
    "roberta": (hf.RobertaConfig, SIZES | {"type_vocab_size": 1}, "mean"),
    "xlm-roberta": (hf.XLMRobertaConfig, SIZES | {"type_vocab_size": 1}, "cls"),
    "mpnet": (hf.MPNetConfig, SIZES, "mean"),
    "modernbert": (hf.ModernBertConfig, SIZES | LOCAL, "cls"),
    "electra": (hf.ElectraConfig, SIZES | {"embedding_size": 16}, "cls"),
    "albert": (hf.AlbertConfig, SIZES | {"embedding_size": 16}, "mean"),
    "deberta": (hf.DebertaConfig, RELATIVE | {"pos_att_type": ["c2p", "p2c"]}, "mean"),
    "deberta-v2": (hf.DebertaV2Config, RELATIVE | {"pos_att_type": ["c2p"]}, "cls"),
    "ernie": (hf.ErnieConfig, SIZES, "cls"),
    "nomic_bert": (hf.NomicBertConfig, SIZES, "mean"),
    "qwen2": (hf.Qwen2Config, ROTARY, "last"),
    "llama": (hf.LlamaConfig, ROTARY, "last"),
    "gpt2": (hf.GPT2Config, GPT2, "last"),
}
SHORT = {"role": "shared", "question_tokens": 24, "passage_tokens": 24, "pooling": "cls"}
SETTINGS = SimpleNamespace(weight_decay=0.1, learning_rate=1e-3, adam_epsilon=1e-8)
END = "<|endoftext|>"
MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}


def words_of(folder, kind):
    """A lower-casing WordPiece tokenizer; its special tokens stand where RoBERTa or BERT have theirs."""
    special = SPECIAL
    names = {}
    if "roberta" in kind or kind == "mpnet":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
        names["mask_token"] = "<mask>"
    letters = list("abcdefghijklmnopqrstuvwxyz’?")
    words = [*special, *CITIES, *THINGS, *COLOURS, *OTHER, *letters, *("##" + letter for letter in letters)]
    words = list(dict.fromkeys(words))
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return hf.BertTokenizer(vocab=str(folder / "vocab.txt"), **names)


def decoder_words(kind):
    """A tokenizer without [CLS] and [SEP], whose padding is its end of text, as GPT's is."""
    if kind == "qwen2":  # its own class, over single bytes
        signs = [END, *"abcdefghijklmnopqrstuvwxyz.,?", "Ġ", "â", "Ģ", "Ļ"]
        return hf.Qwen2Tokenizer(vocab={sign: i for i, sign in enumerate(signs)}, merges=[])
    names = [END, "?", *CITIES, *THINGS, *COLOURS, *OTHER]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(names))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


def model_folder(folder, kind):
    """Write a tiny random model of a kind, with its tokenizer, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config, sizes, pooling = MODELS[kind]
    words = decoder_words(kind) if pooling == "last" else words_of(folder, kind)
    torch.manual_seed(0)
    tokens = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    model = hf.AutoModel.from_config(config(vocab_size=len(words), **tokens | sizes))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def described(folder, pooling, dense=(), prompts=None, old=True):
    """Make a model folder one of sentence-transformers, by hand, in the old or in the new spelling."""
    width = json.loads((folder / "config.json").read_text())
    width = width.get("hidden_size") or width.get("dim") or width["n_embd"]
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modes = {f"pooling_mode_{name}": pooling == key for key, name in MODES.items()}
    modes["word_embedding_dimension"] = width
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
        package = "models"
        if not old:
            base = "sentence_transformer" if kind == "Pooling" else "base"
            package = f"{base}.modules.{kind.lower()}"
        name = f"sentence_transformers.{package}.{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": name})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    config = {"prompts": prompts or {}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def vectors(encoder):
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
    """Every architecture: pooling, prompts, Dense, Normalize, length as its folder says; saved, the same."""
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
        if THEIRS:
            from sentence_transformers import SentenceTransformer

            for path in (folder, tmp_path / role):
                theirs = SentenceTransformer(str(path), device="cpu")
                name = ("query", "passage" if path == folder else "document")[place]
                raw = (QUESTIONS, list(map(joined, PASSAGES)))[place]
                name = name if prompts else None
                assert np.allclose(theirs.encode(raw, prompt_name=name), got, atol=1e-5)


@pytest.mark.skipif(not THEIRS, reason="sentence-transformers is not installed here")
@pytest.mark.parametrize("types", ["zeros", "segments"])
def test_our_folders_in_sentence_transformers(tmp_path, types):
    """A folder that a training wrote: the vectors of questions, and of passages as (title, text)."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(model_folder(tmp_path / "e", "bert"), "passage", SHORT | {"token_types": types})
    save_encoder(encoder, tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    questions, passages = vectors(load_encoder(tmp_path / "ours", "passage"))
    texts = [(p.title, p.text) if p.title else p.text for p in PASSAGES]
    asked = [question.replace("’", "'") for question in QUESTIONS]
    assert np.allclose(theirs.encode_query(asked), questions, atol=1e-5)
    for text, vector in zip(texts, passages, strict=True):
        assert np.allclose(theirs.encode_document([text]), vector, atol=1e-5)
    assert theirs.similarity_fn_name == "dot"


# ---------------------------------------------------------------- keys
def test_a_bare_folder_takes_keys(tmp_path):
    """Without a note it names the keys; with good ones it is an encoder, and is saved with them."""
    bare = model_folder(tmp_path / "bare", "bert")
    words = "does not say passage_tokens, pooling, .*doc2embedding.py --doc_encoder .*bare --pooling cls.mean"
    with pytest.raises(UserError, match=words):
        load_encoder(bare, "passage")
    cfg = SimpleNamespace(pooling="mean", normalize="true", passage_prefix="first : ", passage_tokens=0)
    keys = weights.given_inputs(cfg)
    assert keys == {"pooling": "mean", "normalize": True, "passage_prefix": "first : "}
    with pytest.raises(UserError, match="normalize: 'yes': must be one of false, true"):
        weights.given_inputs(SimpleNamespace(normalize="yes"))
    with pytest.raises(UserError, match="passage: 'both': must be one of pair, joined"):
        weights.given_inputs(SimpleNamespace(passage="both"))
    encoder = load_encoder(bare, "passage", keys | {"passage": "joined"})
    texts = [joined(passage, "first : ") for passage in PASSAGES]
    wanted = by_hand(bare, texts, "mean", length=66)
    assert np.allclose(vectors(encoder)[1], wanted, atol=1e-5)
    save_encoder(encoder, tmp_path / "saved")
    assert load_encoder(tmp_path / "saved", "passage").inputs == encoder.inputs


def test_a_projection_is_saved(tmp_path):
    """DPR's Linear on top, which no BERT folder has a place for, stands beside it as a Dense step."""
    encoder = load_encoder(model_folder(tmp_path / "e", "bert"), "passage", SHORT)
    encoder.projection = nn.Linear(32, 8)
    encoder.dim = 8
    save_encoder(encoder, tmp_path / "saved")
    again = load_encoder(tmp_path / "saved", "passage")
    assert again.dim == 8 and np.array_equal(vectors(again)[1], vectors(encoder)[1])
    assert encoder_hash(again) == encoder_hash(encoder)


def test_a_key_prevails_over_the_folder_and_says_so(tmp_path, capsys):
    """The other pooling than the folder's is a warning, an empty prefix is no prefix."""
    folder = described(model_folder(tmp_path / "e", "bert"), "mean", prompts={"query": "the "})
    encoder = load_encoder(folder, "question", {"pooling": "cls", "question_prefix": ""})
    assert encoder.inputs["pooling"] == "cls" and encoder.inputs["normalize"]
    assert "e: pooling 'mean' is stored with these weights, 'cls' is asked for" in capsys.readouterr().err
    assert np.allclose(vectors(encoder)[0], by_hand(folder, QUESTIONS, "cls"), atol=1e-5)


def test_an_older_encoder_keeps_its_identity(tmp_path):
    """A folder of before these keys has the same hash as one that says their defaults."""
    encoder = load_encoder(model_folder(tmp_path / "e", "bert"), "passage", SHORT | DEFAULTS)
    save_encoder(encoder, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    old = SHORT | {"token_types": "zeros", "pair": ""}
    (tmp_path / "old" / "encoder_inputs.json").write_text(json.dumps(old))
    hashes = {encoder_hash(load_encoder(tmp_path / name, "passage")) for name in ("old", "new")}
    assert len(hashes) == 1
    longer = load_encoder(tmp_path / "old", "passage", {"normalize": True})
    assert encoder_hash(longer) not in hashes


def test_the_scripts_with_a_described_folder(tmp_path):
    """doc2embedding.py and test_dpr.py: the vectors of by_hand; train_dpr.py starts from it."""
    world = make_world(tmp_path / "world")
    prompts = {"query": "what : ", "document": "first : "}
    folder = described(model_folder(tmp_path / "e", "distilbert"), "mean", prompts=prompts)
    rows = (world / "corpus.tsv").read_text().splitlines()[1:]
    texts = [f"first : {title} {text}" for _, text, title in (row.split("\t") for row in rows)]

    corpus = {"corpus": world / "corpus.tsv"}
    keys = {"doc_encoder": folder, "out": tmp_path / "vectors", "dtype": "float32"}
    main("doc2embedding.py", keys | corpus)
    stored = np.load(tmp_path / "vectors" / "00000.npy")
    assert np.allclose(stored, by_hand(folder, texts, "mean"), atol=1e-5)

    keys = {"questions": world / "test.jsonl", "k": 5, "embeddings": tmp_path / "vectors"}
    main("test_dpr.py", keys | corpus | {"query_encoder": folder, "out": tmp_path / "a.run"})
    asked = json.loads((world / "test.jsonl").read_text().splitlines()[0])["question"]
    scores = stored @ by_hand(folder, [f"what : {asked}"], "mean")[0]
    best = (tmp_path / "a.run").read_text().split()
    assert best[1] == str(1 + scores.argmax()) and abs(float(best[3]) - scores.max()) < 1e-5

    keys = {"pooling": "auto", "normalize": "true", "passage": "joined", "question_prefix": "auto"}
    sizes = {"batch_size": 8, "epochs": 1, "warmup": 1, "question_tokens": 16, "passage_tokens": 24}
    files = {"train": world / "train.jsonl", "dev": "", "init": folder, "run_dir": tmp_path / "run"}
    main("train_dpr.py", keys | sizes | files | corpus)
    inputs = load_encoder(tmp_path / "run" / "doc_encoder", "passage").inputs
    expected = {"pooling": "mean", "normalize": True, "passage": "joined", "question_prefix": "what : "}
    assert inputs | expected == inputs and inputs["passage_tokens"] == 24


def test_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    """A hub's folder in Hugging Face's cache: read as a folder, with its prompts and its Dense step."""
    place = tmp_path / "hub" / "models--someone--e"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    folder = model_folder(place / "snapshots" / ("0" * 40), "bert")
    described(folder, "mean", [(8, nn.Tanh)], {"query": "the "})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    by_name = load_encoder("someone/e", "question")
    assert by_name.inputs["question_prefix"] == "the " and by_name.dim == 8
    assert np.array_equal(vectors(by_name)[0], vectors(load_encoder(folder, "question"))[0])
    with pytest.raises(UserError, match="someone/else: neither a local folder nor reachable on the hub"):
        load_encoder("someone/else", "question")
    (folder / "model.safetensors").unlink()  # what lies on this disk is not to be downloaded
    with pytest.raises(UserError, match=f"{folder}: not a complete model folder") as stopped:
        load_encoder(folder, "question")
    assert "download" not in str(stopped.value)


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pools by max"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by .* . "),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves the prompt out of the vector"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "has transformer_task 'fill-mask'"),
        ("modules.json", "sentence_transformers.models.CNN", "has CNN as step 2, which is not supported"),
        ("modules.json", "someone.module.Dense", "has someone.module.Dense as step 2"),
        ("modules.json", "sentence_transformers.models.Normalize", "has Normalize as step 3"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, file, change, words):
    """A module or a setting of sentence-transformers that we lack must not be left out in silence."""
    folder = described(model_folder(tmp_path / "e", "bert"), "mean", prompts={"query": "the "})
    load_encoder(folder, "passage")
    content = json.loads((folder / file).read_text())
    if file == "modules.json":
        content.insert(2, {"idx": 2, "name": "2", "path": "2_New", "type": change})
    else:
        content |= change
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{file.removesuffix('/config.json')}.*: {words}"):
        load_encoder(folder, "passage")


@pytest.mark.parametrize(
    ("kind", "keys", "words"),
    [
        ("qwen2", {"pooling": "cls"}, "qwen2 reads from left to right.* pooling cls is wrong, last is right"),
        ("gpt2", {"pooling": "last"}, "gpt2 puts nothing between title and text; passage must be joined"),
        ("roberta", {"token_types": "segments"}, "roberta knows no second segment"),
        ("modernbert", {"token_types": "segments"}, "modernbert knows no second segment"),
        ("roberta", {"passage_tokens": 65}, "65 tokens a text, but only 64 embeddings"),
        ("bert", {"passage_tokens": 67}, "67 tokens a text, but only 66 embeddings"),
        ("t5", {}, "t5 has a decoder; a BERT-like encoder is needed"),
    ],
)
def test_what_is_not_bert_like_is_refused(tmp_path, kind, keys, words):
    """A decoder's first token has seen nothing, and a table of one segment has no second row."""
    folder = t5(tmp_path) if kind == "t5" else model_folder(tmp_path / "e", kind)
    with pytest.raises(UserError, match=words):
        load_encoder(folder, "passage", SHORT | keys)


def test_padding_that_is_a_word_too(tmp_path):
    """The mask is that of the lengths: a decoder's end of text is read, and is its padding too."""
    folder = model_folder(tmp_path / "e", "gpt2")
    encoder = load_encoder(folder, "question", SHORT | {"pooling": "last", "passage": "joined"})
    end = encoder.tokenizer.eos_token_id
    batch = collate(encoder, [[5, 6, end], [7, end]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    encoder.tokenizer.pad_token = None
    assert np.allclose(
        embed(encoder, [[5, 6, end], [7, end]], 2)[1], embed(encoder, [[7, end]], 1)[0], atol=1e-6
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_are_looked_at_when_they_are_loaded(tmp_path, number):
    folder = model_folder(tmp_path / "e", "bert")
    model = hf.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 3] = number
    model.save_pretrained(folder)
    loaders = [
        lambda: load_encoder(folder, "passage", SHORT),
        lambda: load_cross_encoder(folder, 24, new_head=True),
        lambda: load_reader(folder, {"reader_tokens": 24}, new_head=True),
    ]
    for load in loaders:
        with pytest.raises(UserError, match="e: its weights hold NaN or infinity, in .*layer.1.output"):
            load()
    folder = t5(tmp_path)
    model = hf.T5ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.decoder.block[0].layer[0].SelfAttention.q.weight[0, 0] = number
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="t5: its weights hold NaN or infinity, in decoder.block.0"):
        load_fid(folder)


def test_a_weight_without_a_place_is_named(tmp_path):
    """ANCE's embeddingHead is no part of a BertModel; the heads of other tasks are left out as ever."""
    folder = model_folder(tmp_path / "e", "bert")
    config = hf.AutoConfig.from_pretrained(folder)
    model = hf.BertForPreTraining(config)
    model.save_pretrained(folder)
    load_encoder(folder, "passage", SHORT)
    model.embeddingHead = nn.Linear(32, 8)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="2 weights have no place in a BertModel, such as embeddingHead.bias"):
        load_encoder(folder, "passage", SHORT)


# ---------------------------------------------------------------- tokenizers
def test_a_tokenizer_in_python(tmp_path):
    """ByT5's is saved and loaded with an encoder and a cross-encoder; a reader is refused at its load."""
    folder = tmp_path / "e"
    words = hf.ByT5Tokenizer()
    hf.BertModel(hf.BertConfig(vocab_size=len(words), pad_token_id=0, **SIZES)).save_pretrained(folder)
    words.save_pretrained(folder)
    assert not load_tokenizer(folder).is_fast
    encoder = load_encoder(folder, "passage", SHORT | {"passage": "joined"})
    save_encoder(encoder, tmp_path / "saved")
    again = load_encoder(tmp_path / "saved", "passage")
    assert np.array_equal(vectors(again)[1], vectors(encoder)[1])
    save_encoder(load_cross_encoder(folder, 24, new_head=True), tmp_path / "cross")
    load_cross_encoder(tmp_path / "cross")
    with pytest.raises(UserError, match="ByT5Tokenizer is written in Python .* no answer can be cut out"):
        load_reader(folder, {"reader_tokens": 24}, new_head=True)


def test_a_lone_vocab_of_capitals_is_not_lower_cased(tmp_path):
    """vocab.txt without a word on case: it has capitals, so "Paris" is a word; without them it is "paris"."""
    for case in (str.title, str.lower):
        folder = tmp_path / case.__name__
        folder.mkdir()
        words = [*SPECIAL, *map(case, CITIES), *OTHER]
        (folder / "vocab.txt").write_text("\n".join(words))
        hf.BertModel(hf.BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.tokenize("Paris is") == [case("paris"), "is"]


# ---------------------------------------------------------------- training
@pytest.mark.parametrize(
    "kind", ["distilbert", "modernbert", "roberta", "electra", "albert", "deberta", "mpnet", "gpt2"]
)
def test_a_cross_encoder_of_any_encoder(tmp_path, kind):
    """Its head is drawn where it starts, and is loaded afterwards: the same probabilities."""
    folder = model_folder(tmp_path / "e", kind)
    if kind == "gpt2":
        with pytest.raises(UserError, match="reads from left to right"):
            load_cross_encoder(folder, 24, new_head=True)
        return
    cross = load_cross_encoder(folder, 24, new_head=True)
    pairs = [(question, PASSAGES[0]) for question in QUESTIONS]
    wanted = probabilities(cross, tokenize_pairs(cross, pairs), 2)
    save_encoder(cross, tmp_path / "saved")
    with pytest.raises(UserError, match="weights are missing.* train_cross_encoder.py makes one"):
        load_cross_encoder(folder, 24)
    again = load_cross_encoder(tmp_path / "saved")
    assert np.allclose(probabilities(again, tokenize_pairs(again, pairs), 2), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_only_matrices_are_decayed(kind):
    """Norms and biases of every architecture; for BERT the same parameters, in the same order, as by name."""
    config, sizes, _ = MODELS[kind]
    model = hf.AutoModel.from_config(config(vocab_size=99, pad_token_id=0, **sizes))
    plain, decayed = parameter_groups(model.parameters(), SETTINGS)
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    vectors = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    vectors |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert {id(p) for p in plain["params"]} == vectors and plain["weight_decay"] == 0
    named = list(model.named_parameters())
    if kind == "bert":
        by_name = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
        assert list(map(id, by_name)) == list(map(id, plain["params"]))
        others = [p for _, p in named if id(p) not in vectors]
        assert list(map(id, others)) == list(map(id, decayed["params"]))


def test_a_decoder_with_a_program_of_its_own(tmp_path):
    """Its program may let it read both ways (gte-Qwen2), as is_causal does. An encoder may have one."""
    last = SHORT | {"pooling": "last", "passage": "joined"}
    for kind, inputs in (("qwen2", last), ("bert", SHORT)):
        path = model_folder(tmp_path / kind, kind) / "config.json"
        config = json.loads(path.read_text())
        load_encoder(path.parent, "passage", inputs)
        path.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.OwnConfig"}}))
        load_encoder(path.parent, "passage", inputs)
        path.write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.OwnModel"}}))
        if kind == "qwen2":
            with pytest.raises(UserError, match="is a decoder with a program of its own"):
                load_encoder(path.parent, "passage", inputs)
            said = {"auto_map": {"AutoModel": "own.OwnModel"}, "is_causal": False}
            path.write_text(json.dumps(config | said))
        load_encoder(path.parent, "passage", inputs)


def test_a_passage_without_a_title_begins_with_its_text():
    """A space in front would be a token of its own for RoBERTa."""
    spy = SimpleNamespace(inputs={"pair_tokens": 9})
    spy.tokenizer = lambda questions, passages, **_: SimpleNamespace(input_ids=passages)
    pairs = [("who?", Passage("1", "", "Bob")), ("who?", Passage("2", "Ann", "Bob"))]
    assert tokenize_pairs(spy, pairs) == ["Bob", "Ann Bob"]
