"""
Doors to and from the original DPR: facebook/dpr-* on the hub, the `.cp` files of the released code, and the
export.

Weights of others are data, not programs: a `.cp` file is a pickle, which could run any code, so it is read by
an unpickler that knows six harmless names and turns everything else into an inert object.
"""

import pickle
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    DPRReader,
)

from utils.plumbing.config import UserError, friendly_errors, memory_is_full
from utils.plumbing.files import atomic_folder


def check_complete(path, missing):
    missing = [key for key in missing if "position_ids" not in key and not key.startswith("pooler.")]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} weights are missing, such as {missing[0]}: not this architecture"
        )


def from_hf_dpr(path, role, config):
    """
    facebook/dpr-* -> (BertModel, projection or None). The two towers have different class and key names.
    """
    wanted, name = {
        "question": (DPRQuestionEncoder, "question_encoder"),
        "passage": (DPRContextEncoder, "ctx_encoder"),
    }[role]
    if config.architectures and wanted.__name__ not in config.architectures:
        raise UserError(f"{path}: holds a {config.architectures[0]}; a {role} encoder is a {wanted.__name__}")
    model, found = wanted.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    check_complete(path, found["missing_keys"])
    inner = getattr(model, name)
    skipped = ("model_type", "architectures", "projection_dim")
    plain = BertConfig(**{k: v for k, v in config.to_diff_dict().items() if k not in skipped})
    # trap: putting the new config on the old BertModel switches its attention mask off without a word
    bert = BertModel(plain, add_pooling_layer=False)
    bert.load_state_dict(inner.bert_model.state_dict())
    return bert, inner.encode_proj if config.projection_dim else None


# The only names that a DPR checkpoint needs; anything else becomes an inert object, so that nothing in it can
# run.
SAFE_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch", "HalfStorage"),
    ("torch", "LongStorage"),
}


class _Inert(dict):
    """
    Stands for every class that the restricted unpickler does not know (omegaconf's, argparse's, an
    attacker's).
    """

    def __init__(self, *_):
        super().__init__()

    def __call__(self, *_):
        return self

    def __setstate__(self, _):
        pass


class _RestrictedPickle:
    """
    A stand-in for the pickle module, as torch.load takes one: same format, but only SAFE_NAMES are looked up.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module, name) if (module, name) in SAFE_NAMES else _Inert

    @classmethod
    def load(cls, file, **options):
        return cls.Unpickler(file, **options).load()


def read_cp(path):
    """What torch.save wrote, as a dict with "model_dict"; nothing in the file can run."""
    try:
        # why not weights_only: DPR's 2021 files hold an omegaconf object, which torch's own safe loader
        # refuses
        saved = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RestrictedPickle)
        return saved | {"model_dict": saved["model_dict"]}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        if memory_is_full(error):
            raise
        raise UserError(f"{path}: not a DPR checkpoint, or truncated: {error}") from None


def sizes(weights):
    """The settings of a BERT, from the shapes of its weights."""
    words_VD = weights["embeddings.word_embeddings.weight"]
    return {
        "vocab_size": words_VD.shape[0],
        "hidden_size": words_VD.shape[1],
        "num_hidden_layers": 1
        + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer.")),
        "num_attention_heads": max(1, words_VD.shape[1] // 64),  # 64 a head, as in every released BERT
        "intermediate_size": weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": weights["embeddings.position_embeddings.weight"].shape[0],
    }


def cp_tokenizer(path, saved):
    """The tokenizer beside a checkpoint, or the one that it names."""
    parameters = saved.get("encoder_params") or {}
    here = Path(path).parent
    named = here if (here / "tokenizer.json").is_file() else parameters.get("pretrained_model_cfg")
    return AutoTokenizer.from_pretrained(str(named or "bert-base-uncased"))


def from_cp(path, role):
    """
    A checkpoint of the original DPR code -> (BertModel, tokenizer, projection or None); sizes from the
    weights.
    """
    saved, prefix = read_cp(path), {"question": "question_model.", "passage": "ctx_model."}[role]
    weights = {k[len(prefix) :]: v for k, v in saved["model_dict"].items() if k.startswith(prefix)}
    if not weights:
        raise UserError(f"{path}: no weights under {prefix}*: not a bi-encoder checkpoint")
    model, projection = BertModel(BertConfig(**sizes(weights)), add_pooling_layer=False), None
    if "encode_proj.weight" in weights:
        projection = nn.Linear(model.config.hidden_size, weights["encode_proj.weight"].shape[0])
        projection.load_state_dict({k: weights.pop(f"encode_proj.{k}") for k in ("weight", "bias")})
    check_complete(path, model.load_state_dict(weights, strict=False).missing_keys)
    return model, cp_tokenizer(path, saved), projection


def reader_from_cp(path):
    """A reader checkpoint of the original DPR code -> (DPRReader, tokenizer); sizes from the weights."""
    saved = read_cp(path)
    weights, bert = saved["model_dict"], "span_predictor.encoder.bert_model."
    inner = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    if "embeddings.word_embeddings.weight" not in inner:
        raise UserError(f"{path}: no weights under encoder.embeddings.*: not a reader checkpoint")
    named = {f"{bert}{k}": v for k, v in inner.items()}
    named |= {f"span_predictor.{k}": v for k, v in weights.items() if k.startswith("qa_")}
    model = DPRReader(DPRConfig(**sizes(inner) | {"projection_dim": 0}))
    check_complete(path, model.load_state_dict(named, strict=False).missing_keys)
    return model, cp_tokenizer(path, saved)


def export_hf_dpr(folder, role, out):
    """Write our tower as DPRQuestionEncoder / DPRContextEncoder, for code that expects facebook/dpr-*."""
    from utils.plumbing.weights import load_encoder  # not at the top: weights.py imports this file

    encoder = load_encoder(folder, role)
    if encoder.inputs["pooling"] != "cls" or encoder.inputs["token_types"] != "zeros":
        raise UserError(f"{folder}: the DPR classes know only pooling cls with token_types zeros")
    config = DPRConfig(**encoder.model.config.to_diff_dict() | {"projection_dim": 0})
    model = {"question": DPRQuestionEncoder, "passage": DPRContextEncoder}[role](config)
    getattr(model, "question_encoder" if role == "question" else "ctx_encoder").bert_model = encoder.model
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        encoder.tokenizer.save_pretrained(temporary)


if __name__ == "__main__":  # python -m prepare.checkpoints runs/demo/doc_encoder passage runs/demo/hf_dpr_ctx
    with friendly_errors():
        if len(sys.argv) != 4 or sys.argv[2] not in ("question", "passage"):
            raise UserError(
                "usage: python -m prepare.checkpoints FOLDER question|passage OUT (writes Hugging Face DPR)"
            )
        export_hf_dpr(*sys.argv[1:])
