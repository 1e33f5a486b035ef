"""
The cross-encoder: one BERT reads question and passage together and says whether the passage is relevant.

It is exact and slow (a forward pass a pair, nothing can be stored), so it teaches and rescores what a dual
encoder has found; it is RocketQA's teacher (Qu et al. 2021). On disk: a sequence-classification folder that
loads in any Hugging Face code, with `encoder_inputs.json` beside the weights (role cross, pair_tokens).

B pairs · L tokens, padded to the longest of the batch · 2 labels: not relevant, relevant
"""

import contextlib
import json
import sys

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from utils.distributed import world
from utils.encoder import batches_by_length
from utils.plumbing.config import UserError
from utils.plumbing.weights import check_sizes, explain_load_errors, read_inputs, set_dropout

HEAD = ("classifier.", "pooler.")  # what a plain BERT does not bring: labels, and perhaps the layer before


class CrossEncoder(nn.Module):
    """
    model: a sequence classifier with 2 labels, the second of them relevant, or with 1. inputs: dict with
      role            cross
      pair_tokens     maximum length of question and passage together, special tokens included
      token_types     segments (question 0, passage 1), or zeros where the model knows only one segment
    """

    projection = None  # nothing on top, so utils.plumbing.weights.save_encoder writes it as it is

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs

    def forward(self, input_ids, attention_mask, token_type_ids):
        """[B, L] integer tensors -> logits_B2 in float32; one label l is [0, l], whose softmax is sigmoid."""
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).logits.float()
        return nn.functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits


def tokenize_pairs(cross, pairs):
    """
    List of (question, Passage) -> list of id lists `[CLS] question [SEP] title text [SEP]`: no separator
    between title and text, the longer of question and passage cut first (RocketQA reader_ce.py:125-178).
    """
    if not pairs:
        return []
    questions = [question for question, _ in pairs]
    passages = [f"{passage.title} {passage.text}" for _, passage in pairs]
    length = cross.inputs["pair_tokens"]
    return cross.tokenizer(
        questions, passages, truncation=True, max_length=length, return_attention_mask=False
    ).input_ids


@torch.no_grad()
def probabilities(cross, ids, batch_size, autocast=contextlib.nullcontext, progress=None):
    """Id lists of pairs -> numpy float64 [N], P(relevant) of each, in the given order."""
    was_training = cross.training
    cross.eval()
    found_N = np.zeros(len(ids))
    for rows, batch in batches_by_length(cross, ids, batch_size):
        with autocast():
            logits_b2 = cross(**batch)
        # why float64: in float32 every pair that is sure enough would have 1.0, and no order among them
        found_N[rows] = logits_b2.cpu().double().softmax(1)[:, 1].numpy()
        if progress:
            progress.update(len(rows))
    cross.train(was_training)
    return found_N


def load_cross_encoder(path, pair_tokens=0, dropout=0.0, new_head=False, layer_norm_epsilon=0.0):
    """
    The cross-encoder in a folder that train_cross_encoder.py wrote, or in a Hugging Face sequence classifier
    with one or two labels. pair_tokens: maximum length of a pair; 0: as stored in encoder_inputs.json.
    new_head: training starts here, so the classifier may be missing and is drawn from torch's generator, as
    is the pooler, with a warning. layer_norm_epsilon above 0 overrides what is stored. UserError for any
    other missing weight, a wrong kind of folder, or a path that is not reachable.
    """
    path, known = str(path), read_inputs(path, "cross-encoder")
    role = known.get("role", "cross")
    if role != "cross" and not new_head:
        raise UserError(f"{path}: this is a {role} encoder; a cross-encoder is needed here")
    with explain_load_errors(path):
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if config.num_labels not in (1, 2):
            raise UserError(f"{path}: a classifier of {config.num_labels} labels; a cross-encoder has 1 or 2")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, output_loading_info=True, dtype=torch.float32
        )
    pair_tokens = pair_tokens or known.get("pair_tokens", 0)
    if not pair_tokens:
        raise UserError(
            f"{path}: no encoder_inputs.json, so the length of a pair is unknown; write one there, such as "
            f"{json.dumps({'role': 'cross', 'pair_tokens': 160})}"
        )
    missing = [key for key in found["missing_keys"] if "position_ids" not in key]
    inner = f"{model.base_model_prefix}."
    lost = [key for key in missing if not (new_head and key.removeprefix(inner).startswith(HEAD))]
    if lost:
        raise UserError(
            f"{path}: {len(lost)} weights are missing, such as {lost[0]}: not a cross-encoder; "
            "train_cross_encoder.py makes one"
        )
    if any("pooler." in key for key in missing) and world()[0] == 0:
        print(f"warning: {path}: no pooler in it, so one is trained from random weights", file=sys.stderr)
    set_dropout(model, dropout, layer_norm_epsilon)
    check_sizes(path, model, tokenizer, pair_tokens, "tokens a pair")
    types = "segments" if getattr(config, "type_vocab_size", 2) > 1 else "zeros"  # RoBERTa has one segment
    return CrossEncoder(
        model,
        tokenizer,
        {"role": "cross", "pair_tokens": pair_tokens, "token_types": types, "pair": known.get("pair", "")},
    )
