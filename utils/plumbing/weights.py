"""
The doors through which weights come in, for every model here, and how they go out: a Hugging Face folder with
`encoder_inputs.json`, which says how the inputs of these weights are built (utils/encoder.py).
"""

import contextlib
import copy
import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from prepare.checkpoints import check_complete, from_cp, from_hf_dpr
from utils.encoder import Encoder
from utils.plumbing.config import UserError, memory_is_full, model_fault, nearest
from utils.plumbing.files import atomic_folder, read_json, write_json

# The input conventions of the original DPR (June 2020), right for facebook/dpr-* and its .cp files.
# from: GC-DPR dpr/models/hf_models.py:127-159 (the June 2020 snapshot of DPR): zero segment ids, CLS, 256
# tokens
DPR_INPUTS = {"question_tokens": 256, "passage_tokens": 256, "pooling": "cls", "token_types": "zeros"}
TOWERS = {
    "query_encoder": "question",
    "doc_encoder": "passage",
}  # the folders of a dual encoder, and their roles
CHOICES = {  # of encoder_inputs.json, beside the lengths and `pair`
    "role": ("question", "passage", "shared", "cross", "reader", "fid"),
    "pooling": ("cls", "mean"),
    "token_types": ("zeros", "segments"),
}
LENGTHS = ("question_tokens", "passage_tokens", "pair_tokens", "reader_tokens", "answer_tokens")
HAVE_POOLER = ("bert", "ernie", "roberta", "xlm-roberta")
transformers_logging.disable_progress_bar()  # two bars for every small file drown the log


def load_encoder(path, role, inputs=None, dropout=0.0, layer_norm_epsilon=0.0):
    """
    The tower `role` (question | passage) from one of four doors: (a) a folder that save_encoder wrote, (b) a
    BERT-like Hugging Face folder or hub name (then `inputs` must say how inputs are built), (c)
    facebook/dpr-* or a copy, (d) a DPR `.cp` checkpoint. No weight may be missing: random weights without an
    exception are the classic silent failure. `inputs` overrides what is stored, and so does
    layer_norm_epsilon above 0. UserError when the path is the other tower, incomplete, or not reachable.
    """
    path, known = str(path), read_inputs(path, "encoder")
    if known.get("role", "shared") not in (role, "shared") and not inputs:
        raise UserError(f"{path}: this is a {known['role']} encoder; a {role} encoder is needed here")
    projection = None
    with explain_load_errors(path):
        if path.endswith(".cp"):
            model, tokenizer, projection = from_cp(path, role)
            known = DPR_INPUTS
        else:
            config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
            if config.model_type == "dpr":
                model, projection = from_hf_dpr(path, role, config)
                known = DPR_INPUTS | known
            else:
                # the pooler is BERT's head for next-sentence prediction: DPR takes the plain CLS
                headless = {"add_pooling_layer": False} if config.model_type in HAVE_POOLER else {}
                model, found = AutoModel.from_pretrained(
                    path, output_loading_info=True, dtype=torch.float32, **headless
                )
                check_complete(path, found["missing_keys"])
    known = known | (inputs or {})
    absent = sorted({*DPR_INPUTS} - {*known})
    if absent:
        raise UserError(
            f"{path}: encoder_inputs.json does not say {', '.join(absent)}; write it there, "
            f"such as {json.dumps({'role': 'shared', **DPR_INPUTS, 'pair': ''})}"
        )
    set_dropout(model, dropout, layer_norm_epsilon)
    encoder = Encoder(model, tokenizer, {"role": role, "pair": ""} | known, projection)
    longest = max(encoder.inputs["question_tokens"], encoder.inputs["passage_tokens"])
    check_sizes(path, model, tokenizer, longest, "tokens a text")
    return encoder


def load_towers(sources, cfg, device):
    """
    Load {"query_encoder": ..., "doc_encoder": ...} from {name: path}; a shared one stands under both names.
    """
    inputs = {
        key: getattr(cfg, key) for key in ("question_tokens", "passage_tokens", "pooling", "token_types")
    }
    encoders = {}
    for name, role in TOWERS.items():
        if name == "doc_encoder" and cfg.shared_encoder:
            encoders[name] = encoders["query_encoder"]
            continue
        stored = inputs | {"role": "shared" if cfg.shared_encoder else role}
        encoder = load_encoder(sources[name], role, stored, cfg.dropout, cfg.layer_norm_epsilon)
        encoders[name] = encoder.to(device).train()
    return encoders


def read_inputs(path, what="model"):
    """
    What encoder_inputs.json in the folder of a model says, {} where there is none. UserError where it, which
    may be written by hand, says what no encoder knows, and where `path` cannot be a model.
    """
    if fault := model_fault(path, what):
        raise UserError(f"{path}: {fault}")
    file = Path(path) / "encoder_inputs.json"
    known = read_json(file) if file.is_file() else {}
    if not isinstance(known, dict):
        raise UserError(f"{file}: expected a json object")
    for key, value in known.items():
        if key in CHOICES:
            fits, fault = value in CHOICES[key], f"must be one of {', '.join(map(str, CHOICES[key]))}"
        elif key in LENGTHS:
            fits, fault = type(value) is int and value > 1, "must be a number of at least 2"
        else:
            fits = key == "pair" and isinstance(value, str)
            fault = "must be a text" if key == "pair" else nearest(key, [*CHOICES, *LENGTHS, "pair"])
        if not fits:
            raise UserError(f"{file}: {key!r}: {value!r}: {fault}")
    return known


@contextlib.contextmanager
def explain_load_errors(path):
    """UserError where Hugging Face cannot load the model of `path`; the first line of why is enough."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if memory_is_full(error):
            raise
        fault = "neither a complete local folder nor reachable on the hub"
        fix = f"with a network, `hf download {path}` fetches it"
        if path.endswith(".cp"):  # of its own reading read_cp has told
            fault = "its tokenizer cannot be loaded"
            fix = "tokenizer.json is looked for beside it, then on the hub under the name that it gives"
        if not isinstance(error, OSError | ValueError):
            fault, fix = "its weights are damaged", "get it again"
            fault += "" if path.endswith(".cp") else ", or of another shape than in config.json"
        raise UserError(f"{path}: {fault} ({fix}): {str(error).strip().split(chr(10))[0]}") from error


def set_dropout(model, dropout, layer_norm_epsilon=0.0):
    """What every loaded model needs: memory of its own, this dropout; epsilon above 0 where given."""
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
            # still runs (ERNIE issue 75); in the config it is saved, so every later load computes the same
            module.eps = model.config.layer_norm_eps = layer_norm_epsilon


def check_sizes(path, model, tokenizer, tokens, what):
    """
    UserError where there is no tokenizer, or the model has no embedding for a word or for a place; what: such
    as "tokens a text".
    """
    if len(tokenizer) - len(tokenizer.all_special_tokens) < 2:
        # trap: transformers 5 makes an empty tokenizer of nothing, which reads every word as [UNK]
        raise UserError(f"{path}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")
    for kind, needed, there in (
        ("words in its tokenizer", len(tokenizer), model.config.vocab_size),
        # T5 has none to run out of: it learns distances, not places
        (what, tokens, getattr(model.config, "max_position_embeddings", tokens)),
    ):
        if needed > there:
            raise UserError(f"{path}: {needed} {kind}, but only {there} embeddings for them")


def save_encoder(encoder, folder):
    """
    Write weights, tokenizer and encoder_inputs.json into `folder` atomically; loads in any Hugging Face code.
    """
    if encoder.projection:
        raise UserError(
            "an encoder with a projection layer cannot be saved as a plain BERT folder; use `export`"
        )
    with atomic_folder(folder) as temporary:
        encoder.model.save_pretrained(temporary)
        words = copy.deepcopy(encoder.tokenizer)  # another thread may be using the original
        words.backend_tokenizer.no_truncation()  # the last length used is no part of a tokenizer
        words.save_pretrained(temporary)
        if encoder.inputs["token_types"] == "segments":  # why: others pass on only what is named
            config = read_json(temporary / "tokenizer_config.json")
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            write_json(temporary / "tokenizer_config.json", config)
        write_json(temporary / "encoder_inputs.json", encoder.inputs)


def encoder_hash(encoder):
    """
    Hex sha256 of every weight and of how inputs are built (not of `pair`): the identity of the vectors it
    makes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    inputs = {key: value for key, value in encoder.inputs.items() if key not in ("pair", "role")}
    digest.update(json.dumps(inputs, sort_keys=True).encode())
    return digest.hexdigest()


def pair_id(path):
    """The `pair` stored in an encoder folder, "" where none is known; reads no weights."""
    return read_inputs(path).get("pair", "")
