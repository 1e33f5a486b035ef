"""
Turn checkpoints of the original DPR code (`.cp`) into folders that every stage reads; export our encoders.

Run: python -m prepare.checkpoints from_cp FILE.cp OUT_FOLDER --role question|passage|reader
     python -m prepare.checkpoints to_hf_dpr ENCODER_FOLDER OUT_FOLDER
     python -m prepare.checkpoints to_cp RUN_FOLDER OUT_FOLDER

from_cp and to_hf_dpr write what facebook/dpr-* is on the hub, and encoder_inputs.json. to_cp writes both
towers as dpr.cp, and a config and a tokenizer beside it. What a `.cp` does not tell is looked for in this
order:
  heads        --heads N, else as the config says; refused where nothing tells them
  config       --config FOLDER_OR_NAME; config.json next to the file; the folder or the hub name that the file
               has as pretrained_model_cfg (bert-base-*, bert-large-* and no name at all are known)
  tokenizer    the same places; it lower-cases where the file has do_lower_case
  lengths      --tokens N; sequence_length in the file; else DPR's own: 256 tokens, 350 for a reader
  token types  zeros, as in DPR until May 2021; edit encoder_inputs.json where a model learned with segments
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder, DPRReader

from utils.encoder import DEFAULTS
from utils.plumbing.config import UserError, first_line, friendly_errors, memory_is_full
from utils.plumbing.files import atomic_folder, read_json, write_json
from utils.plumbing.weights import (
    TOWERS,
    check_complete,
    check_sizes,
    load_encoder,
    read_inputs,
    save_words,
)

# role -> Hugging Face's class, the prefix of the weights in a .cp, their prefix in the class
MODELS = {
    "question": (DPRQuestionEncoder, "question_model.", "question_encoder."),
    "passage": (DPRContextEncoder, "ctx_model.", "ctx_encoder."),
    "reader": (DPRReader, "encoder.", "span_predictor.encoder."),
}
TOWER_NAMES = tuple(prefix for _, prefix, _ in MODELS.values())
BERT_HEADS = {768: 12, 1024: 16}  # attention heads of BERT base and large, by hidden size
BERT_NAMES = re.compile(r"(google-bert/)?bert-(base|large)-[a-z-]+")  # their names on the hub
# what a config.json says beside the sizes, which are those of the weights
SETTINGS = ("hidden_act", "layer_norm_eps", "pad_token_id", "initializer_range")
SETTINGS += ("hidden_dropout_prob", "attention_probs_dropout_prob")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("max_position_embeddings", "type_vocab_size")
LIKE_BERT = ("bert", "dpr", "ernie")  # model types that compute what DPR's BertModel does
# what the DPR classes and a .cp can hold of an encoder's inputs: nothing but these
DPR_WAY = {"pooling": "cls", "token_types": "zeros"} | DEFAULTS
DEAD = ("pooler.", "embeddings.position_ids")  # in every .cp, and of no use
# a .cp is a pickle, which could run any code; these are the only names in it that are looked up
SAFE_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch", "HalfStorage"),
    ("torch", "BFloat16Storage"),
    ("torch", "LongStorage"),
}


# ---------------------------------------------------------------- a pickle as data
class Inert(dict):
    """
    Stands for every class that is not in SAFE_NAMES (omegaconf's, argparse's, an attacker's).

    state: the data that the pickle holds for the object, never used but as data.
    """

    def __init__(self, *_):
        super().__init__()
        self.state = {}

    def __call__(self, *_):
        return self

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}


def plain(value):
    """Return the values of omegaconf's objects, in which DPR of 2021 keeps its settings."""
    if not isinstance(value, Inert):
        return value
    content = getattr(value, "state", {}).get("_content")
    if isinstance(content, dict):
        return {key: plain(node) for key, node in content.items()}
    return getattr(value, "state", {}).get("_val")


class RestrictedPickle:
    """Stands for the pickle module, as torch.load takes one: the same format, but only SAFE_NAMES."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module, name) if (module, name) in SAFE_NAMES else Inert

    @classmethod
    def load(cls, file, **options):
        return cls.Unpickler(file, **options).load()


def read_cp(path):
    """Return (the weights, the settings of their encoder) of a `.cp`, two dicts; nothing in it can run."""
    try:
        # why not weights_only: DPR's 2021 files hold an omegaconf object, which torch's own loader refuses
        saved = torch.load(path, map_location="cpu", weights_only=False, pickle_module=RestrictedPickle)
        weights = {key.removeprefix("module."): tensor for key, tensor in saved["model_dict"].items()}
        settings = plain(saved.get("encoder_params")) or {}
        settings = {key: plain(value) for key, value in settings.items()}
        # DPR of 2020 has the settings side by side, that of 2021 below "encoder"
        return weights, settings | dict(settings.get("encoder") or {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        if memory_is_full(error):
            raise
        raise UserError(f"{path}: not a DPR checkpoint, or truncated: {first_line(error)}") from None


# ---------------------------------------------------------------- import
def from_cp(path, out, role, heads=0, config="", tokens=0):
    """
    Write one model of a `.cp` into a new folder; role: question | passage | reader.

    config: a folder or a hub name. heads, tokens: 0 means as the config and the file say.
    """
    weights, settings = read_cp(path)
    model_class, prefix, inner = MODELS[role]
    if f"{prefix}embeddings.word_embeddings.weight" not in weights:
        kind = "reader" if role == "reader" else "bi-encoder"
        other = settings.get("encoder_model_type") or "hf_bert"
        why = f"; its encoder is {other}, and only hf_bert can be read" if other != "hf_bert" else ""
        raise UserError(f"{path}: no weights under {prefix}embeddings.*: not a {kind} checkpoint{why}")

    # the weights, under the names of Hugging Face's class
    named = {}
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        if name.startswith("qa_"):  # the outputs of a reader
            named[f"span_predictor.{name}"] = value
        elif name.startswith("encode_proj."):
            named[f"{inner}{name}"] = value
        elif key.startswith(prefix):
            named[f"{inner}bert_model.{name}"] = value
        elif not key.startswith(TOWER_NAMES):
            raise UserError(f"{path}: DPR knows no weight {key}; without it the vectors would be others")
    places = config_places(path, settings, config)
    model = model_class(cp_config(path, named, inner, places, heads))
    try:
        report = model.load_state_dict(named, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights are damaged (get it again): {first_line(error)}") from error
    check_complete(path, report.missing_keys)
    for key in report.unexpected_keys:
        if not key.removeprefix(f"{inner}bert_model.").startswith(DEAD):
            raise UserError(f"{path}: a BERT has no place for {key}; without it the vectors would be others")

    # how its inputs are built
    length = tokens or settings.get("sequence_length") or (350 if role == "reader" else 256)
    inputs = {"role": role, "pair": "", "token_types": "zeros"}
    if role == "reader":
        inputs["reader_tokens"] = length
    else:
        inputs |= {"question_tokens": length, "passage_tokens": length, "pooling": "cls"}
    tokenizer = cp_tokenizer(path, settings, places)
    check_sizes(path, model, tokenizer, length, "tokens a text")
    write_folder(out, model, tokenizer, inputs)


def config_places(path, settings, config):
    """Return the folders and the hub name, best first, where the config and the tokenizer may lie."""
    if config and not Path(config).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config):
        raise UserError(f"--config {config}: no such folder, and no name of the hub")
    named = settings.get("pretrained_model_cfg") or "bert-base-uncased"
    return [str(place) for place in (config, Path(path).parent, named) if place]


def find_file(place, name):
    """Return the file `name` of a folder or of a hub's model, None where there is none."""
    file = Path(place, name)
    if file.is_file():
        return file
    if Path(place).exists() or Path(place).is_absolute():
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(place, name, etag_timeout=5))
    except (OSError, ValueError):  # no such model, no such file, or no network
        return None


def cp_config(path, named, inner, places, heads):
    """Return the DPRConfig of a `.cp`: sizes from its weights, the rest from a config.json."""
    bert = f"{inner}bert_model."
    vocabulary, hidden = named[f"{bert}embeddings.word_embeddings.weight"].shape
    stored = {}
    for place in places:
        if BERT_NAMES.fullmatch(place) and not Path(place).exists():
            # why not looked up: what else BERT's own config says is what a DPRConfig says
            stored = {"num_attention_heads": BERT_HEADS[hidden]} if hidden in BERT_HEADS else {}
        elif file := find_file(place, "config.json"):
            stored = read_json(file)
        if stored:
            break

    # trap: no weight tells the number of heads, and another number gives other vectors without an error
    cure = "add --heads N, or --config FOLDER_OR_NAME of the model that it started from"
    if stored.get("model_type", "bert") not in LIKE_BERT:
        raise UserError(f"{path}: {place} is a {stored['model_type']}, and DPR's models are BERTs; {cure}")
    heads = heads or stored.get("num_attention_heads")
    if not heads:
        fault = f"nothing tells how many attention heads share its {hidden} dimensions"
        looked = f"config.json was looked for in {', '.join(places)}"
        raise UserError(f"{path}: {fault}; {cure} ({looked})")
    if hidden % heads or stored.get("hidden_size", hidden) != hidden:
        raise UserError(f"{path}: {heads} attention heads or config.json do not fit its {hidden} dimensions")

    layers = [int(key.split(".layer.")[1].split(".")[0]) for key in named if ".layer." in key]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": heads,
        "intermediate_size": len(named[f"{bert}encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(named[f"{bert}embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(named[f"{bert}embeddings.token_type_embeddings.weight"]),
        "projection_dim": len(named.get(f"{inner}encode_proj.weight", [])),
    }
    return DPRConfig(**{key: stored[key] for key in SETTINGS if key in stored} | sizes)


def cp_tokenizer(path, settings, places):
    """Return the tokenizer in the first of the places that has one, lower-casing as the `.cp` says."""
    folder = places[-1]
    for place in places[:-1]:
        if find_file(place, "tokenizer.json") or find_file(place, "vocab.txt"):
            folder = place
            break
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        looked = "tokenizer.json is looked for next to it, then on the hub under the name that it gives"
        raise UserError(f"{path}: its tokenizer cannot be loaded ({looked}): {first_line(error)}") from error

    # from: DPR dpr/models/hf_models.py: the stored switch goes to BertTokenizer, whatever that has itself
    lower = settings.get("do_lower_case")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bert = backend is not None and isinstance(backend.normalizer, normalizers.BertNormalizer)
    if is_bert and isinstance(lower, bool) and lower != lower_cases(tokenizer):
        print(f"{path}: do_lower_case is {lower} in it, other than in {folder}: words are read so")
        backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
        tokenizer.do_lower_case = tokenizer.init_kwargs["do_lower_case"] = lower
    return tokenizer


def lower_cases(tokenizer):
    """Return whether capitals are read as small letters."""
    return tokenizer.tokenize("A") == tokenizer.tokenize("a")


# ---------------------------------------------------------------- export
def to_hf_dpr(folder, out, role=None):
    """Write one of our encoders as a class of facebook/dpr-*; a folder that is both towers needs a role."""
    role = role or read_inputs(folder, "encoder").get("role", "shared")
    if role not in ("question", "passage"):
        raise UserError(f"{folder}: its role is {role}; add --role question or --role passage")
    config = Path(folder, "config.json")
    if config.is_file() and read_json(config).get("model_type") == "dpr":
        raise UserError(f"{folder}: is one of the DPR classes already")
    encoder = load_fitting(folder, role, "the DPR classes")
    model_class, _, inner = MODELS[role]
    size = encoder.dim if encoder.projection else 0
    model = model_class(DPRConfig(**bert_settings(encoder) | {"projection_dim": size}))
    tower = getattr(model, inner.rstrip("."))
    tower.bert_model.load_state_dict(encoder.model.state_dict())
    if encoder.projection:
        tower.encode_proj.load_state_dict(encoder.projection.state_dict())
    encoder.tokenizer.model_max_length = encoder.inputs[f"{role}_tokens"]  # other programs cut there
    write_folder(out, model, encoder.tokenizer, encoder.inputs | {"role": role})


def to_cp(folder, out, config="", tokens=0):
    """
    Write both towers of a run, or one that is both, as `out`/dpr.cp with its config and its tokenizer.

    config: the hub name to store as pretrained_model_cfg, "" for the folder `out`. tokens: the one length
    that a `.cp` holds, 0 where both towers have the same.
    """
    folder, out = Path(folder), Path(out)
    inside = (folder / "query_encoder").exists()
    encoders = {}
    for name, role in TOWERS.items():
        encoders[role] = load_fitting(folder / name if inside else folder, role, "a .cp")
    question, passage = encoders.values()
    if bert_settings(question) != bert_settings(passage) or question.dim != passage.dim:
        raise UserError(f"{folder}: its two encoders differ in size; a .cp holds two of one kind")
    lengths = (question.inputs["question_tokens"], passage.inputs["passage_tokens"])
    if not tokens and lengths[0] != lengths[1]:
        fault = f"questions are cut at {lengths[0]} tokens and passages at {lengths[1]}"
        cure = f"add --tokens {max(lengths)}, then longer questions than before count"
        raise UserError(f"{folder}: {fault}, but a .cp holds one length; {cure}")

    # the weights, under DPR's names, and what DPR's own BertModel has besides
    weights = {}
    for role, encoder in encoders.items():
        prefix = MODELS[role][1]
        weights |= {f"{prefix}{key}": value for key, value in encoder.model.state_dict().items()}
        if encoder.projection:
            for key, value in encoder.projection.state_dict().items():
                weights[f"{prefix}encode_proj.{key}"] = value
        size = encoder.model.config.hidden_size
        weights[f"{prefix}pooler.dense.weight"] = torch.zeros(size, size)
        weights[f"{prefix}pooler.dense.bias"] = torch.zeros(size)
        places = torch.arange(encoder.model.config.max_position_embeddings)
        weights[f"{prefix}embeddings.position_ids"] = places[None]
    settings = {
        "do_lower_case": lower_cases(passage.tokenizer),
        "pretrained_model_cfg": config or str(out.resolve()),
        "encoder_model_type": "hf_bert",
        "pretrained_file": None,
        "projection_dim": passage.dim if passage.projection else 0,
        "sequence_length": tokens or lengths[0],
    }
    state = {"model_dict": weights, "optimizer_dict": {}, "scheduler_dict": {}, "offset": 0, "epoch": 0}
    with atomic_folder(out) as temporary:
        # why the old format: the torch of DPR's time knows no other
        file = temporary / "dpr.cp"
        torch.save(state | {"encoder_params": settings}, file, _use_new_zipfile_serialization=False)
        transformers.BertConfig(**bert_settings(passage)).save_pretrained(temporary)
        save_words(temporary, passage.tokenizer)
    print(f"{out}: dpr.cp, {settings}")


def load_fitting(folder, role, form):
    """Load an encoder. UserError where `form` cannot hold how its vectors are made."""
    encoder = load_encoder(folder, role)
    kind = encoder.model.config.model_type
    if kind not in LIKE_BERT or getattr(encoder.model.config, "use_task_id", False):
        raise UserError(f"{folder}: is a {kind}; {form} can hold only a BERT")
    for key, value in DPR_WAY.items():
        if encoder.inputs.get(key, value) != value:
            fault = f"know only pooling cls with token_types zeros, not {key} {encoder.inputs[key]!r}"
            raise UserError(f"{folder}: {form} {fault}")
    if encoder.projection and not isinstance(encoder.projection, torch.nn.Linear):
        raise UserError(f"{folder}: {form} can hold one linear layer on top, not {encoder.projection}")
    return encoder


def bert_settings(encoder):
    """Return what makes the BERT of an encoder."""
    return {key: getattr(encoder.model.config, key) for key in (*SIZES, *SETTINGS)}


def write_folder(out, model, tokenizer, inputs):
    """Write a model, its tokenizer and encoder_inputs.json into the new folder `out`."""
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        save_words(temporary, tokenizer)
        write_json(temporary / "encoder_inputs.json", inputs)
    print(f"{out}: {model.config.num_attention_heads} attention heads, {inputs}")


def main():
    parser = argparse.ArgumentParser("python -m prepare.checkpoints", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("from_cp", "to_hf_dpr", "to_cp"))
    parser.add_argument("source", help="a .cp file, the folder of an encoder, or of a run")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--role", choices=MODELS)
    parser.add_argument("--config", default="", help="a folder or a hub name")
    parser.add_argument("--heads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0, help="the length that a text is cut to")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if len(sys.argv) == 1:
        return parser.print_help()
    args = parser.parse_args()
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; name a new folder")
    if args.command == "to_hf_dpr":
        to_hf_dpr(args.source, args.out, args.role)
    elif args.command == "to_cp":
        to_cp(args.source, args.out, args.config, args.tokens)
    elif args.role:
        from_cp(args.source, args.out, args.role, args.heads, args.config, args.tokens)
    else:
        raise UserError("from_cp needs --role question, --role passage or --role reader")


if __name__ == "__main__":
    with friendly_errors():
        main()
