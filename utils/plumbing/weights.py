"""
Load and save the weights of every model in this repository.

A model is a Hugging Face folder with `encoder_inputs.json`, which says how the inputs of these weights are
built (utils/encoder.py). `python -m prepare.checkpoints` makes such folders of the original DPR's files. A
folder of sentence-transformers says it in files of its own. Of any other, the keys of a script say it.
"""

import contextlib
import copy
import functools
import hashlib
import json
import pickle
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import models, normalizers
from torch import nn
from transformers.models.auto import modeling_auto

from utils.distributed import world
from utils.encoder import DEFAULTS, PASSAGES, POOLINGS, TOKEN_TYPES, Encoder, takes_token_types
from utils.plumbing import sentence_transformers
from utils.plumbing.config import UserError, first_line, memory_is_full, model_fault, nearest
from utils.plumbing.files import atomic_folder, read_json, write_json

# the folders of a dual encoder, and their roles
TOWERS = {"query_encoder": "question", "doc_encoder": "passage"}
# the inputs of the original DPR, right for facebook/dpr-*: 256 tokens, CLS, zero segment ids
# from: GC-DPR dpr/models/hf_models.py:127-159 (the June 2020 snapshot of DPR)
DPR_INPUTS = {"question_tokens": 256, "passage_tokens": 256, "pooling": "cls", "token_types": "zeros"}
# what encoder_inputs.json may say; the lengths are numbers
CHOICES = {
    "role": ("question", "passage", "shared", "cross", "reader", "fid"),
    "pooling": POOLINGS,
    "token_types": TOKEN_TYPES,
    "passage": PASSAGES,
    "normalize": (False, True),
}
LENGTHS = ("question_tokens", "passage_tokens", "pair_tokens", "reader_tokens", "answer_tokens")
TEXTS = ("pair", "question_prefix", "passage_prefix")
KEYS = (*DPR_INPUTS, *DEFAULTS)  # those of an encoder that a script has as keys
# model types that can be loaded without their pooler
HAVE_POOLER = ("bert", "ernie", "roberta", "xlm-roberta", "albert", "camembert", "mpnet")
# heads of other tasks: an encoder has no place for them. Any other weight that finds no place is a fault
HEADS = tuple(
    """
    position_ids cls. pooler. lm_head. classifier. pre_classifier. qa_outputs. score. vocab_transform.
    vocab_layer_norm. vocab_projector. predictions. sop_classifier. discriminator_predictions. generator_
    lm_predictions. mask_predictions. head. decoder.
    """.split()
)
# of a hub's folder: the small files, and the weights in one of two formats
SMALL = ("*.json", "*.txt", "*.model", "*.codes", "*.spm", "*.safetensors")
OTHER_FORMATS = ("onnx/*", "openvino/*", "coreml/*", "original/*")
transformers.utils.logging.disable_progress_bar()  # two bars for every small file drown the log


# ---------------------------------------------------------------- load
def load_encoder(path, role, inputs=None, dropout=0.0, layer_norm_epsilon=0.0):
    """
    Load the tower `role` (question | passage) as an Encoder.

    path: a folder that save_encoder wrote, facebook/dpr-* or a copy of it, a folder of sentence-transformers,
    or any BERT-like Hugging Face folder (then `inputs` must name the pooling); or the hub name of one. inputs
    overrides what is stored, and so does layer_norm_epsilon above 0. UserError when the path is the other
    tower (where inputs names no role), incomplete, not reachable, or not BERT-like.
    """
    path, inputs = str(path), inputs or {}
    stored = read_inputs(path, "encoder")
    if stored.get("role", "shared") not in (role, "shared") and "role" not in inputs:
        raise UserError(f"{path}: this is a {stored['role']} encoder; a {role} encoder is needed here")

    # the weights
    with explain_load_errors(path):
        described, projection, folder = sentence_transformers.read_folder(local_folder(path))
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(folder, described.pop("do_lower_case", False))
        if config.model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise UserError(f"{path}: {config.model_type} has a decoder; a BERT-like encoder is needed here")
        if config.model_type == "dpr":
            model, projection = from_hf_dpr(folder, role, config)
            described = dict(DPR_INPUTS)
        else:
            # the pooler is BERT's head for next-sentence prediction: DPR takes the plain CLS
            options = {"add_pooling_layer": False} if config.model_type in HAVE_POOLER else {}
            model = load_complete(transformers.AutoModel, folder, **options)
    for key in described.keys() & {"question_tokens", "passage_tokens"}:
        described[key] = min(described[key], places_of(model) or described[key])
    set_dropout(model, dropout, layer_norm_epsilon)

    # how their inputs are built: by the keys, else by encoder_inputs.json, else by the folder's other files
    if not stored or config.model_type == "dpr":
        stored = described | stored
    for key in sorted({"token_types", "pooling", *DEFAULTS} & inputs.keys() & stored.keys()):
        if stored[key] != inputs[key] and world()[0] == 0:
            said = f"{key} {stored[key]!r} is stored with these weights, {inputs[key]!r} is asked for"
            print(f"warning: {path}: {said}", file=sys.stderr)
    if "pooling" not in stored | inputs:
        raise UserError(f"{path}: {what_is_missing(path, role, stored | inputs)}")
    most = min(tokenizer.model_max_length, places_of(model) or 512)
    how = {"role": role, "pair": "", "token_types": "zeros", "question_tokens": most, "passage_tokens": most}
    how |= stored | inputs
    longest = max(how["question_tokens"], how["passage_tokens"])
    check_sizes(path, model, tokenizer, longest, "tokens a text")
    encoder = Encoder(model, tokenizer, how, projection)
    check_bert_like(path, encoder)
    return encoder


def what_is_missing(path, role, known):
    """Return what nothing says of how an encoder's inputs are built, and two ways to say it."""
    absent = ", ".join(sorted({*DPR_INPUTS} - {*known}))
    command = "test_dpr.py --query_encoder" if role == "question" else "doc2embedding.py --doc_encoder"
    keys = "--pooling cls|mean|last --normalize true|false --token_types zeros|segments --passage pair|joined"
    lengths = f"--{role}_tokens 256 --{role}_prefix ''"
    example = json.dumps({"role": "shared", **DPR_INPUTS, "pair": ""})
    return (
        f"encoder_inputs.json does not say {absent}; write it there, such as {example}; or give the keys: "
        f"python {command} {path} {keys} {lengths}"
    )


def given_inputs(cfg):
    """Return {key: value} of the keys of a script about an encoder's inputs, without "auto" and 0."""
    given = {}
    for key in KEYS:
        value = getattr(cfg, key, "auto")
        if key == "normalize":
            value = {"true": True, "false": False}.get(str(value).lower(), value)
        if value == "auto" or type(value) is int and value == 0:
            continue
        if fault := input_fault(key, value):
            raise UserError(f"{key}: {value!r}: {fault}")
        given[key] = value
    return given


def load_towers(sources, cfg, device):
    """Load {"query_encoder": ..., "doc_encoder": ...} from {name: path}; a shared one has both names."""
    inputs = given_inputs(cfg)
    encoders = {}
    for name, role in TOWERS.items():
        if name == "doc_encoder" and cfg.shared_encoder:
            encoders[name] = encoders["query_encoder"]
            continue
        wanted = inputs | {"role": "shared" if cfg.shared_encoder else role}
        encoder = load_encoder(sources[name], role, wanted, cfg.dropout, cfg.layer_norm_epsilon)
        encoders[name] = encoder.to(device).train()
    return encoders


def from_hf_dpr(path, role, config):
    """Load facebook/dpr-*: (BertModel, projection or None). The two towers differ in class and key names."""
    if role == "question":
        wanted, name = transformers.DPRQuestionEncoder, "question_encoder"
    else:
        wanted, name = transformers.DPRContextEncoder, "ctx_encoder"
    if config.architectures and wanted.__name__ not in config.architectures:
        raise UserError(f"{path}: holds a {config.architectures[0]}; a {role} encoder is a {wanted.__name__}")
    inner = getattr(load_complete(wanted, path), name)

    # trap: putting a new config on the old BertModel switches its attention mask off without a word
    skipped = ("model_type", "architectures", "projection_dim")
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in skipped}
    plain = transformers.BertConfig(**settings)
    bert = transformers.BertModel(plain, add_pooling_layer=False)
    bert.load_state_dict(inner.bert_model.state_dict())
    return bert, inner.encode_proj if config.projection_dim else None


def load_complete(model_class, path, **options):
    """Return model_class.from_pretrained(path) in float32. UserError where a weight is missing."""
    # trap: Hugging Face draws a missing weight at random, without an exception
    options |= {"output_loading_info": True, "dtype": torch.float32}
    model, report = model_class.from_pretrained(path, **options)
    check_complete(path, report["missing_keys"])
    check_sound(path, model, report["unexpected_keys"])
    return model


@functools.cache
def local_folder(path):
    """Return the folder of a model: `path` itself, or the copy of a hub's folder that is fetched first."""
    # why one copy first: all files of it are one version, and what loads them does not ask the network again,
    # which would wait a minute where there is none
    if Path(path).is_dir():
        return str(path)
    if world()[0] == 0:
        print(f"{path}: no folder here, looked up on the hub ...", file=sys.stderr, flush=True)
    with explain_load_errors(path):
        fetch = functools.partial(huggingface_hub.snapshot_download, path, etag_timeout=5)
        folder = Path(fetch(allow_patterns=SMALL, ignore_patterns=OTHER_FORMATS))
        steps = [folder, *folder.glob("*_Dense"), *folder.glob("*_Transformer")]
        models_in_it = [step for step in steps if (step / "config.json").is_file()]
        if any(not list(step.glob("*.safetensors")) for step in models_in_it):
            fetch(allow_patterns="*pytorch_model*.bin")  # of before safetensors
    return str(folder)


def width_of(path):
    """Return how many hidden numbers a model has of one token: its layers times its hidden size."""
    folder = Path(local_folder(path))
    inside = [*folder.glob("*_Transformer/config.json"), folder / "config.json"]  # sentence-transformers'
    config = transformers.AutoConfig.from_pretrained(inside[0].parent)
    return config.num_hidden_layers * config.hidden_size


def load_tokenizer(folder, lower=False):
    """Load the tokenizer of a folder. lower: it is to lower-case, whatever its own files say."""
    folder = Path(folder)
    options = {}
    if (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").is_file():
        settings = read_json(folder / "tokenizer_config.json", {})
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        cased = sum(word != word.lower() for word in words if not word.startswith("["))
        if "do_lower_case" not in settings and cased > len(words) / 100:
            # trap: a lone vocab.txt is lower-cased by default, and every name becomes [UNK]
            options["do_lower_case"] = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    if lower and tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        steps = [step for step in [backend.normalizer] if step]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    elif lower:
        tokenizer.do_lower_case = True
    return tokenizer


# ---------------------------------------------------------------- checks
def read_inputs(path, what="model"):
    """
    Return what encoder_inputs.json in the folder of a model says, {} where there is none.

    UserError where `path` cannot be a model, or where the file, which may be written by hand, is wrong.
    """
    if fault := model_fault(path, what):
        raise UserError(f"{path}: {fault}")
    file = Path(local_folder(str(path))) / "encoder_inputs.json"
    stored = read_json(file, {})
    if not isinstance(stored, dict):
        raise UserError(f"{file}: expected a json object")
    if stored.get("neighbors") is False:  # readers of before December 2026 have this key
        del stored["neighbors"]
    for key, value in stored.items():
        if fault := input_fault(key, value):
            raise UserError(f"{file}: {key!r}: {value!r}: {fault}")
    return stored


def input_fault(key, value):
    """Return what is wrong with an entry of encoder_inputs.json, or ""."""
    if key in CHOICES:
        known = ", ".join(map(str, CHOICES[key])).lower()
        return "" if value in CHOICES[key] else f"must be one of {known}"
    if key in LENGTHS:
        return "" if type(value) is int and value > 1 else "must be a number of at least 2"
    if key in TEXTS:
        return "" if isinstance(value, str) else "must be a text"
    return nearest(key, [*CHOICES, *LENGTHS, *TEXTS])


def check_complete(path, missing, optional=("pooler.",), what="this architecture"):
    """UserError where a key is missing that does not begin with one of `optional`."""
    lost = [key for key in missing if "position_ids" not in key and not key.startswith(optional)]
    if lost:
        raise UserError(f"{path}: {len(lost)} weights are missing, such as {lost[0]}: not {what}")


def check_sound(path, model, unexpected=()):
    """UserError for weights that find no place in the model, or that hold NaN or infinity."""
    lost = [key for key in sorted(unexpected) if not any(f".{name}" in f".{key}" for name in HEADS)]
    if lost:
        fault = f"{len(lost)} weights have no place in a {type(model).__name__}, such as {lost[0]}"
        raise UserError(f"{path}: {fault}: they would be left out, and its vectors would be others")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{path}: its weights hold NaN or infinity, in {name}; get or train it again")


def check_bert_like(path, encoder):
    """UserError where a model cannot make a vector in the way that its inputs ask for."""
    inputs = encoder.inputs
    tokenizer = encoder.tokenizer
    config = encoder.model.config
    kind = config.model_type
    # why decoders alone: where the weights of an encoder fit, transformers has its program. is_causal in
    # config.json says the same without a program, and transformers minds it
    programs = getattr(config, "auto_map", None) or {}
    brings_one = any(name.startswith("AutoModel") for name in programs) and not hasattr(config, "is_causal")
    if brings_one and is_causal(encoder.model):
        fault = "is a decoder with a program of its own (auto_map in config.json), which is not run here"
        raise UserError(f"{path}: {fault}; without it its vectors may be others. Take another model")
    if inputs["pooling"] != "last" and is_causal(encoder.model):
        fault = f"{kind} reads from left to right, so only its last token has seen the whole text"
        raise UserError(f"{path}: {fault}; pooling {inputs['pooling']} is wrong, last is right")
    if inputs["token_types"] == "segments" and not knows_segments(encoder.model, tokenizer):
        raise UserError(f"{path}: {kind} knows no second segment; token_types must be zeros")
    separators = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add()
    if encoder.how("passage") == "pair" and separators < 1:
        raise UserError(f"{path}: {kind} puts nothing between title and text; passage must be joined")


def knows_segments(model, tokenizer):
    """Return whether a model tells a second segment from the first."""
    known = takes_token_types(model) and tokenizer.sep_token_id is not None
    return known and model.config.type_vocab_size > 1


@torch.no_grad()
def is_causal(model):
    """Return whether the state of a token is the same for every token that may follow it."""
    # why tried: no entry of config.json says it of all architectures
    was_training = model.training
    model.eval()
    words_VD = model.get_input_embeddings().weight
    other = (words_VD - words_VD[0]).abs().sum(1).argmax().item()
    states = []
    for second in (0, other):
        ids = torch.tensor([[0, second]], device=words_VD.device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        states.append(output.last_hidden_state[0, 0])
    model.train(was_training)
    return torch.equal(*states)


@contextlib.contextmanager
def explain_load_errors(path):
    """UserError, with the first line of why, where Hugging Face cannot load the model of `path`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if memory_is_full(error):
            raise
        fault = "its weights are damaged, or of another shape than in config.json (get it again)"
        if isinstance(error, OSError | ValueError) and Path(path).is_dir():
            fault = "not a complete model folder, or not one that transformers knows (copy all of its files)"
        elif isinstance(error, OSError | ValueError):
            fault = "neither a local folder nor reachable on the hub"
            fault += f" (with a network, `hf download {path}` fetches it)"
        raise UserError(f"{path}: {fault}: {first_line(error)}") from error


def check_sizes(path, model, tokenizer, tokens, what):
    """UserError where there is no tokenizer, or no embedding for a word or for one of `tokens` places."""
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:
        # trap: transformers 5 makes an empty tokenizer of nothing, which reads every word as [UNK]
        raise UserError(f"{path}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    words = len(tokenizer)
    known = getattr(model.config, "vocab_size", 0)
    if words > known:
        raise UserError(f"{path}: {words} words in its tokenizer, but only {known} embeddings for them")
    places = places_of(model)
    if places and tokens > places:
        raise UserError(f"{path}: {tokens} {what}, but only {places} embeddings for them")


def places_of(model):
    """Return how many tokens a model has places for, 0 where there is no limit (T5 learns distances)."""
    places = max(0, getattr(model.config, "max_position_embeddings", 0))
    for name, module in model.named_modules():
        # trap: RoBERTa's first place is padding_idx + 1, so 514 embeddings are 512 places
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            places = len(module.weight) - module.padding_idx - 1
    return places


def set_dropout(model, dropout, layer_norm_epsilon=0.0):
    """Give a loaded model memory of its own, this dropout, and this epsilon where it is above 0."""
    if dropout >= 1:
        raise UserError(f"dropout must be below 1, got {dropout}")
    for parameter in model.parameters():
        # why: weights lie in the mapped file as they come, and a product may add in another order where
        # they are not aligned: the last bit would depend on the file that a run was resumed from
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif isinstance(getattr(module, "dropout", None), int | float):
            module.dropout = dropout  # trap: T5's attention keeps its rate as a number, not as a module
        if isinstance(module, nn.LayerNorm) and layer_norm_epsilon:
            # why: no weight tells it, and BERT's 1e-12 in the place of ERNIE's 1e-5 is a wrong model that
            # still runs (ERNIE issue 75). It is saved with the config, so every later load computes the same.
            module.eps = layer_norm_epsilon
            model.config.layer_norm_eps = layer_norm_epsilon


# ---------------------------------------------------------------- save
def save_encoder(encoder, folder):
    """
    Write weights, tokenizer and encoder_inputs.json atomically; any Hugging Face code loads the folder.

    Of an encoder of texts, sentence-transformers loads it too, and gives the same vectors.
    """
    with atomic_folder(folder) as temporary:
        encoder.model.save_pretrained(temporary)
        words = copy.deepcopy(encoder.tokenizer)  # another thread may be using the original
        if words.is_fast:
            words.backend_tokenizer.no_truncation()  # the last length used is no part of a tokenizer
        save_words(temporary, words, encoder.inputs["token_types"])
        if encoder.inputs.get("pooling") in sentence_transformers.POOLING:  # not one of your own
            sentence_transformers.write_folder(temporary, encoder)
        write_json(temporary / "encoder_inputs.json", encoder.inputs)


def save_words(folder, tokenizer, token_types="zeros"):
    """Write a tokenizer for programs of every age: names of before transformers 5, vocab.txt of a BERT's."""
    tokenizer.save_pretrained(folder)
    file = Path(folder, "tokenizer_config.json")
    config = read_json(file)
    if config["tokenizer_class"] == "TokenizersBackend":  # which transformers 4 does not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # why: other libraries pass on only the inputs that are named here; a BERT would get types 0 and 1
    types = ["token_type_ids"] if token_types == "segments" else []
    config["model_input_names"] = ["input_ids", *types, "attention_mask"]
    write_json(file, config)
    if tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, models.WordPiece):
        known = tokenizer.get_vocab()
        text = "".join(f"{word}\n" for word in sorted(known, key=known.get))
        Path(folder, "vocab.txt").write_text(text, encoding="utf-8")


def encoder_hash(encoder):
    """Return the hex sha256 of every weight and of how inputs are built: the identity of its vectors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    # why not DEFAULTS: an encoder of before they could be said has the same vectors
    inputs = {key: value for key, value in encoder.inputs.items() if key not in ("pair", "role")}
    inputs = {key: value for key, value in inputs.items() if value != DEFAULTS.get(key)}
    digest.update(json.dumps(inputs, sort_keys=True).encode())
    if isinstance(encoder.projection, nn.Sequential):
        digest.update(str(encoder.projection).encode())  # an activation has no weights
    return digest.hexdigest()


def pair_id(path):
    """Return the `pair` stored in an encoder folder, "" where there is none; no weights are read."""
    return read_inputs(path).get("pair", "")
