"""
Load and save the weights of every model in this repository.

A model is a Hugging Face folder with `encoder_inputs.json`, which says how the inputs of these weights are
built (utils/encoder.py). `python -m prepare.checkpoints` makes such folders of the original DPR's files.
"""

import contextlib
import copy
import hashlib
import json
import pickle
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from utils.encoder import POOLINGS, TOKEN_TYPES, Encoder
from utils.plumbing.config import UserError, memory_is_full, model_fault, nearest
from utils.plumbing.files import atomic_folder, read_json, write_json

# the folders of a dual encoder, and their roles
TOWERS = {"query_encoder": "question", "doc_encoder": "passage"}
# the inputs of the original DPR, right for facebook/dpr-*: 256 tokens, CLS, zero segment ids
# from: GC-DPR dpr/models/hf_models.py:127-159 (the June 2020 snapshot of DPR)
DPR_INPUTS = {"question_tokens": 256, "passage_tokens": 256, "pooling": "cls", "token_types": "zeros"}
# what encoder_inputs.json may say; the lengths are numbers, `pair` is a text
CHOICES = {
    "role": ("question", "passage", "shared", "cross", "reader", "fid"),
    "pooling": POOLINGS,
    "token_types": TOKEN_TYPES,
}
LENGTHS = ("question_tokens", "passage_tokens", "pair_tokens", "reader_tokens", "answer_tokens")
HAVE_POOLER = ("bert", "ernie", "roberta", "xlm-roberta")
transformers.utils.logging.disable_progress_bar()  # two bars for every small file drown the log


# ---------------------------------------------------------------- load
def load_encoder(path, role, inputs=None, dropout=0.0, layer_norm_epsilon=0.0):
    """
    Load the tower `role` (question | passage) as an Encoder.

    path: a folder that save_encoder wrote, facebook/dpr-* or a copy of it, or any BERT-like Hugging Face
    folder or hub name (then `inputs` must say how inputs are built). inputs overrides what is stored, and so
    does layer_norm_epsilon above 0. UserError when the path is the other tower, incomplete, or not reachable.
    """
    path = str(path)
    stored = read_inputs(path, "encoder")
    if stored.get("role", "shared") not in (role, "shared") and not inputs:
        raise UserError(f"{path}: this is a {stored['role']} encoder; a {role} encoder is needed here")

    # the weights
    projection = None
    with explain_load_errors(path):
        config = transformers.AutoConfig.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if config.model_type == "dpr":
            model, projection = from_hf_dpr(path, role, config)
            stored = DPR_INPUTS | stored
        else:
            # the pooler is BERT's head for next-sentence prediction: DPR takes the plain CLS
            options = {"add_pooling_layer": False} if config.model_type in HAVE_POOLER else {}
            model = load_complete(transformers.AutoModel, path, **options)
    set_dropout(model, dropout, layer_norm_epsilon)

    # how their inputs are built
    stored |= inputs or {}
    absent = ", ".join(sorted({*DPR_INPUTS} - {*stored}))
    if absent:
        example = json.dumps({"role": "shared", **DPR_INPUTS, "pair": ""})
        fix = f"write it there, such as {example}"
        raise UserError(f"{path}: encoder_inputs.json does not say {absent}; {fix}")
    longest = max(stored["question_tokens"], stored["passage_tokens"])
    check_sizes(path, model, tokenizer, longest, "tokens a text")
    return Encoder(model, tokenizer, {"role": role, "pair": ""} | stored, projection)


def load_towers(sources, cfg, device):
    """Load {"query_encoder": ..., "doc_encoder": ...} from {name: path}; a shared one has both names."""
    keys = ("question_tokens", "passage_tokens", "pooling", "token_types")
    inputs = {key: getattr(cfg, key) for key in keys}
    encoders = {}
    for name, role in TOWERS.items():
        if name == "doc_encoder" and cfg.shared_encoder:
            encoders[name] = encoders["query_encoder"]
            continue
        stored = inputs | {"role": "shared" if cfg.shared_encoder else role}
        encoder = load_encoder(sources[name], role, stored, cfg.dropout, cfg.layer_norm_epsilon)
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
    return model


# ---------------------------------------------------------------- checks
def read_inputs(path, what="model"):
    """
    Return what encoder_inputs.json in the folder of a model says, {} where there is none.

    UserError where `path` cannot be a model, or where the file, which may be written by hand, is wrong.
    """
    if fault := model_fault(path, what):
        raise UserError(f"{path}: {fault}")
    file = Path(path) / "encoder_inputs.json"
    stored = read_json(file) if file.is_file() else {}
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
        return "" if value in CHOICES[key] else f"must be one of {', '.join(CHOICES[key])}"
    if key in LENGTHS:
        return "" if type(value) is int and value > 1 else "must be a number of at least 2"
    if key == "pair":
        return "" if isinstance(value, str) else "must be a text"
    return nearest(key, [*CHOICES, *LENGTHS, "pair"])


def check_complete(path, missing, optional=("pooler.",), what="this architecture"):
    """UserError where a key is missing that does not begin with one of `optional`."""
    lost = [key for key in missing if "position_ids" not in key and not key.startswith(optional)]
    if lost:
        raise UserError(f"{path}: {len(lost)} weights are missing, such as {lost[0]}: not {what}")


@contextlib.contextmanager
def explain_load_errors(path):
    """UserError, with the first line of why, where Hugging Face cannot load the model of `path`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if memory_is_full(error):
            raise
        fault = "its weights are damaged, or of another shape than in config.json (get it again)"
        if isinstance(error, OSError | ValueError):
            fault = "neither a complete local folder nor reachable on the hub"
            fault += f" (with a network, `hf download {path}` fetches it)"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: {fault}: {reason}") from error


def check_sizes(path, model, tokenizer, tokens, what):
    """UserError where there is no tokenizer, or no embedding for a word or for one of `tokens` places."""
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:
        # trap: transformers 5 makes an empty tokenizer of nothing, which reads every word as [UNK]
        raise UserError(f"{path}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    words = len(tokenizer)
    known = model.config.vocab_size
    if words > known:
        raise UserError(f"{path}: {words} words in its tokenizer, but only {known} embeddings for them")
    places = getattr(model.config, "max_position_embeddings", tokens)  # T5 learns distances, not places
    if tokens > places:
        raise UserError(f"{path}: {tokens} {what}, but only {places} embeddings for them")


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
    """Write weights, tokenizer and encoder_inputs.json atomically; any Hugging Face code loads the folder."""
    if encoder.projection:
        raise UserError("an encoder with a projection layer cannot be saved as a plain BERT folder")
    with atomic_folder(folder) as temporary:
        encoder.model.save_pretrained(temporary)
        words = copy.deepcopy(encoder.tokenizer)  # another thread may be using the original
        words.backend_tokenizer.no_truncation()  # the last length used is no part of a tokenizer
        words.save_pretrained(temporary)
        if encoder.inputs["token_types"] == "segments":
            # why: other libraries pass on only the inputs that are named here
            config = read_json(temporary / "tokenizer_config.json")
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            write_json(temporary / "tokenizer_config.json", config)
        write_json(temporary / "encoder_inputs.json", encoder.inputs)


def encoder_hash(encoder):
    """Return the hex sha256 of every weight and of how inputs are built: the identity of its vectors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    inputs = {key: value for key, value in encoder.inputs.items() if key not in ("pair", "role")}
    digest.update(json.dumps(inputs, sort_keys=True).encode())
    return digest.hexdigest()


def pair_id(path):
    """Return the `pair` stored in an encoder folder, "" where there is none; no weights are read."""
    return read_inputs(path).get("pair", "")
