"""
The folder format of sentence-transformers: read how such a folder builds its vectors, and say it of ours.

  modules.json                         the steps: Transformer, Pooling, perhaps Dense, perhaps Normalize
  1_Pooling/config.json                which token's state is the vector, or their mean
  2_Dense/                             a layer on top, with its activation; there may be several
  sentence_bert_config.json            the maximum length
  config_sentence_transformers.json    the prompts: what stands before every question and every passage

from: the files that sentence-transformers 2.0 to 6.2 write. Both spellings of a setting are read, and the old
one is written, which every version reads. What we cannot compute is refused by its name.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.plumbing.config import UserError
from utils.plumbing.files import read_json, write_json

# our names of the poolings -> the two spellings in 1_Pooling/config.json
POOLING = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
# settings of a Transformer that must be so; the others change no vector
TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "query_length": None,
    "document_length": None,
}
STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
DENSE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
PASSAGE_PROMPTS = ("document", "passage", "corpus")


# ---------------------------------------------------------------- read
def read_folder(folder):
    """
    Return (what the folder says about inputs, its layers on top or None, the folder of its Transformer).

    Without modules.json it says nothing: ({}, None, folder). UserError names a step or a setting that we do
    not compute. `do_lower_case` among the inputs is about the tokenizer.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        return {}, None, folder

    # the steps, in their order
    steps = []
    try:
        for module in read_json(folder / "modules.json"):
            package, _, kind = module["type"].rpartition(".")
            if not package.startswith("sentence_transformers."):
                kind = module["type"]  # code of its own
            steps.append((kind, folder / module["path"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/modules.json: not a list of modules: {error!r}") from None
    kinds = [kind for kind, _ in steps]
    for place, kind in enumerate(kinds):
        due = ("Transformer", "Pooling")[place : place + 1] or ("Dense", "Normalize")
        if kind not in due or "Normalize" in kinds[2:place]:
            refuse(folder / "modules.json", f"has {kind} as step {place}")
    if len(kinds) < 2:
        refuse(folder / "modules.json", "has no Pooling")

    # what they say
    transformer = steps[0][1]
    inputs = {"token_types": "zeros", "passage": "joined"} | read_transformer(transformer)
    inputs |= read_pooling(steps[1][1]) | read_prompts(folder)
    inputs["normalize"] = kinds[-1] == "Normalize"
    if inputs.pop("include_prompt") is False and (inputs["question_prefix"] or inputs["passage_prefix"]):
        refuse(steps[1][1], "leaves the prompt out of the vector (include_prompt: false)")
    layers = []
    for kind, place in steps[2:]:
        layers += read_dense(place) if kind == "Dense" else []
    if len(layers) < 2:  # DPR's own projection is a plain Linear
        return inputs, layers[0] if layers else None, transformer
    return inputs, nn.Sequential(*layers), transformer


def refuse(place, fault):
    raise UserError(f"{place}: {fault}, which is not supported here")


def read_transformer(place):
    """Return the lengths and do_lower_case of the Transformer step."""
    files = sorted(place.glob("sentence_*_config.json"))  # older ones are named by architecture
    settings = read_json(files[0]) if files else {}
    for key, value in settings.items():
        unlike = value != TRANSFORMER.get(key, value) or key.endswith("_kwargs")
        if value and unlike:
            refuse(files[0], f"has {key} {value!r}")
    text = settings.get("modality_config", {"text": STATES}).get("text")
    if text != STATES:
        refuse(files[0], f"has modality_config {text!r} for texts")
    inputs = {"do_lower_case": bool(settings.get("do_lower_case"))}
    if settings.get("max_seq_length"):
        inputs |= dict.fromkeys(("question_tokens", "passage_tokens"), settings["max_seq_length"])
    return inputs


def read_pooling(place):
    """Return the pooling, and whether the prompt counts in it."""
    settings = read_json(place / "config.json", {})
    modes = settings.get("pooling_mode")
    if modes is None:  # older: a switch for each
        modes = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    modes = [modes] if isinstance(modes, str) else list(modes or ["mean"])
    for pooling, names in POOLING.items():
        if len(modes) == 1 and modes[0] in names:
            return {"pooling": pooling, "include_prompt": settings.get("include_prompt", True)}
    refuse(place / "config.json", f"pools by {' + '.join(modes)}")


def read_prompts(folder):
    """Return what stands before a question and before a passage."""
    settings = read_json(folder / "config_sentence_transformers.json", {})
    prompts = settings.get("prompts") or {}
    default = settings.get("default_prompt_name")
    # why not always the default: one that is named after a tower is for this tower alone
    other = "" if default in ("query", *PASSAGE_PROMPTS) else prompts.get(default) or ""
    passage = [prompts[name] for name in PASSAGE_PROMPTS if prompts.get(name)]
    return {
        "question_prefix": prompts.get("query") or other,
        "passage_prefix": passage[0] if passage else other,
    }


def read_dense(place):
    """Return the layers of a Dense step: a Linear and its activation."""
    settings = read_json(place / "config.json", {})
    for key, due in DENSE.items():
        if settings.get(key) not in (None, due):
            refuse(place / "config.json", f"has {key} {settings[key]!r}")
    if settings.get("use_residual"):
        refuse(place / "config.json", "has use_residual")

    # the activation: a class of torch's, never a program of the folder's own
    name = settings.get("activation_function") or "torch.nn.modules.activation.Tanh"
    activation = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not isinstance(activation, type):
        refuse(place / "config.json", f"has the activation {name}")

    # the weights
    file = place / "model.safetensors"
    if file.is_file():
        weights = load_file(file)
    else:
        weights = torch.load(place / "pytorch_model.bin", map_location="cpu", weights_only=True)
    linear = nn.Linear(settings["in_features"], settings["out_features"], settings.get("bias", True))
    linear.load_state_dict({key.removeprefix("linear."): tensor for key, tensor in weights.items()})
    return [linear] if activation is nn.Identity else [linear, activation()]


# ---------------------------------------------------------------- write
def write_folder(folder, encoder):
    """
    Write beside the weights of an Encoder how sentence-transformers gets its vectors.

    A passage with a title is a pair there: `encode([(title, text)])`. differs: it has one length for both
    towers, and replaces no typographic apostrophe.
    """
    inputs = encoder.inputs
    steps = [("Transformer", ""), ("Pooling", "1_Pooling")]

    # the pooling
    switches = {name: pooling == inputs["pooling"] for pooling, (_, name) in POOLING.items()}
    size = encoder.model.config.hidden_size
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size} | switches)

    # the layers on top: each Linear, with the activation behind it
    layers = encoder.projection
    layers = list(layers) if isinstance(layers, nn.Sequential) else [layers]
    for layer, behind in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            place = f"{len(steps)}_Dense"
            steps.append(("Dense", place))
            write_dense(folder / place, layer, behind)
    if encoder.how("normalize"):
        steps.append(("Normalize", f"{len(steps)}_Normalize"))
        (folder / steps[-1][1]).mkdir()

    # the order of the steps, lengths and prompts
    modules = []
    for i, (kind, place) in enumerate(steps):
        modules.append(
            {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        )
    write_json(folder / "modules.json", modules)
    lengths = {"question": inputs["question_tokens"], "passage": inputs["passage_tokens"]}
    length = lengths.get(inputs["role"], max(lengths.values()))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    prompts = {"query": encoder.how("question_prefix"), "document": encoder.how("passage_prefix")}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "dot"}
    write_json(folder / "config_sentence_transformers.json", settings)


def write_dense(place, linear, behind):
    """Write a Linear and the activation behind it (another Linear or None: there is none)."""
    activation = nn.Identity() if behind is None or isinstance(behind, nn.Linear) else behind
    kind = type(activation)
    settings = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__qualname__}",
    }
    write_json(place / "config.json", settings)
    weights = {f"linear.{key}": tensor.contiguous() for key, tensor in linear.state_dict().items()}
    save_file(weights, place / "model.safetensors")
