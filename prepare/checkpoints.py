"""
Turn checkpoints of the original DPR code (`.cp`) into folders that every stage reads; export our encoders.

Run: python -m prepare.checkpoints from_cp FILE.cp OUT_FOLDER --role question|passage|reader
     python -m prepare.checkpoints to_hf_dpr ENCODER_FOLDER OUT_FOLDER

Both write what facebook/dpr-* is on the hub, and encoder_inputs.json. A `.cp` does not tell everything:
  heads        attention heads: --heads N, else config.json next to the file or in the folder that it names
  tokenizer    tokenizer.json next to the file, else what the file names (a folder, a hub name)
  lengths      sequence_length where the file has it, else DPR's own: 256 tokens, 350 for a reader
  token types  zeros, as in DPR until May 2021; edit encoder_inputs.json where a model learned with segments
"""

import argparse
import pickle
from pathlib import Path

import torch
from transformers import AutoTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder, DPRReader

from utils.plumbing.config import UserError, friendly_errors, memory_is_full
from utils.plumbing.files import atomic_folder, read_json, write_json
from utils.plumbing.weights import check_complete, check_sizes, load_encoder, read_inputs

# role -> Hugging Face's class, the prefix of the weights in a .cp, their prefix in the class
MODELS = {
    "question": (DPRQuestionEncoder, "question_model.", "question_encoder."),
    "passage": (DPRContextEncoder, "ctx_model.", "ctx_encoder."),
    "reader": (DPRReader, "encoder.", "span_predictor.encoder."),
}
BERT_HEADS = {768: 12, 1024: 16}  # attention heads of BERT base and large, by hidden size
# a .cp is a pickle, which could run any code; these are the only names in it that are looked up
SAFE_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch", "HalfStorage"),
    ("torch", "LongStorage"),
}


# ---------------------------------------------------------------- a pickle as data
class Inert(dict):
    """Stands for every class that is not in SAFE_NAMES (omegaconf's, argparse's, an attacker's)."""

    def __init__(self, *_):
        super().__init__()

    def __call__(self, *_):
        return self

    def __setstate__(self, _):
        pass


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
        return dict(saved["model_dict"]), dict(saved.get("encoder_params") or {})
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:
        if memory_is_full(error):
            raise
        raise UserError(f"{path}: not a DPR checkpoint, or truncated: {first_line(error)}") from None


def first_line(error):
    return str(error).strip().partition("\n")[0]


# ---------------------------------------------------------------- the two commands
def from_cp(path, out, role, heads=0):
    """Write one model of a `.cp` into a new folder; role: question | passage | reader."""
    weights, settings = read_cp(path)
    model_class, prefix, inner = MODELS[role]
    if f"{prefix}embeddings.word_embeddings.weight" not in weights:
        kind = "reader" if role == "reader" else "bi-encoder"
        raise UserError(f"{path}: no weights under {prefix}embeddings.*: not a {kind} checkpoint")

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
    model = model_class(cp_config(path, named, inner, settings, heads))
    try:
        report = model.load_state_dict(named, strict=False)  # position_ids and a pooler are left over
    except RuntimeError as error:
        raise UserError(f"{path}: its weights are damaged (get it again): {first_line(error)}") from error
    check_complete(path, report.missing_keys)

    # how its inputs are built
    length = settings.get("sequence_length") or (350 if role == "reader" else 256)
    inputs = {"role": role, "pair": "", "token_types": "zeros"}
    if role == "reader":
        inputs["reader_tokens"] = length
    else:
        inputs |= {"question_tokens": length, "passage_tokens": length, "pooling": "cls"}
    tokenizer = cp_tokenizer(path, settings)
    check_sizes(path, model, tokenizer, length, "tokens a text")
    write_folder(out, model, tokenizer, inputs)


def to_hf_dpr(folder, out, role=None):
    """Write one of our encoders as a class of facebook/dpr-*; a folder that is both towers needs a role."""
    role = role or read_inputs(folder, "encoder").get("role", "shared")
    if role not in ("question", "passage"):
        raise UserError(f"{folder}: its role is {role}; add --role question or --role passage")
    encoder = load_encoder(folder, role)
    if encoder.projection:
        raise UserError(f"{folder}: is one of the DPR classes already")
    if encoder.inputs["pooling"] != "cls" or encoder.inputs["token_types"] != "zeros":
        raise UserError(f"{folder}: the DPR classes know only pooling cls with token_types zeros")
    model_class, _, inner = MODELS[role]
    settings = encoder.model.config.to_diff_dict()
    model = model_class(DPRConfig(**settings | {"projection_dim": 0}))
    getattr(model, inner.rstrip(".")).bert_model = encoder.model
    write_folder(out, model, encoder.tokenizer, encoder.inputs | {"role": role})


def cp_config(path, named, inner, settings, heads):
    """Return the DPRConfig of a `.cp`: sizes from its weights, the rest from a config.json."""
    stored = {}
    for folder in (settings.get("pretrained_model_cfg"), Path(path).parent):
        file = Path(folder or path, "config.json")
        if file.is_file():
            stored = read_json(file)

    # trap: no weight tells the number of heads, and another number gives other vectors without an error
    bert = f"{inner}bert_model."
    vocabulary, hidden = named[f"{bert}embeddings.word_embeddings.weight"].shape
    heads = heads or stored.get("num_attention_heads") or BERT_HEADS.get(hidden)
    if not heads:
        fault = f"nothing tells how many attention heads share its {hidden} dimensions"
        raise UserError(f"{path}: {fault}; add --heads N, or put its config.json next to it")
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
        "projection_dim": len(named.get(f"{inner}encode_proj.weight", [])),
    }
    return DPRConfig(**stored | sizes)


def cp_tokenizer(path, settings):
    """Return the tokenizer next to a `.cp`, else the one that it names."""
    name = settings.get("pretrained_model_cfg") or "bert-base-uncased"
    folder = Path(path).parent
    if (folder / "tokenizer.json").is_file():
        name = folder
    try:
        return AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        places = "tokenizer.json is looked for next to it, then on the hub under the name that it gives"
        raise UserError(f"{path}: its tokenizer cannot be loaded ({places}): {first_line(error)}") from error


def write_folder(out, model, tokenizer, inputs):
    """Write a model, its tokenizer and encoder_inputs.json into the new folder `out`."""
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "encoder_inputs.json", inputs)
    print(f"{out}: {model.config.num_attention_heads} attention heads, {inputs}")


def main():
    parser = argparse.ArgumentParser("python -m prepare.checkpoints", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("from_cp", "to_hf_dpr"))
    parser.add_argument("source", help="a .cp file, or the folder of an encoder")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--role", choices=MODELS)
    parser.add_argument("--heads", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise UserError(f"{args.out}: is there already; name a new folder")
    if args.command == "to_hf_dpr":
        to_hf_dpr(args.source, args.out, args.role)
    elif args.role:
        from_cp(args.source, args.out, args.role, args.heads)
    else:
        raise UserError("from_cp needs --role question, --role passage or --role reader")


if __name__ == "__main__":
    with friendly_errors():
        main()
