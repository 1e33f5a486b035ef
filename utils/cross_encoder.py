"""
The cross-encoder: one BERT reads question and passage together and says whether the passage is relevant.

It is exact and slow: every pair costs a forward pass, and nothing can be stored. It rescores what a dual
encoder has found, and it is RocketQA's teacher (Qu et al. 2021).

B pairs · L tokens, padded to the longest of the batch · 2 labels: not relevant, relevant
"""

import contextlib
import sys

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from utils.distributed import world
from utils.encoder import batches_by_length, run_model
from utils.plumbing import weights
from utils.plumbing.config import UserError


class CrossEncoder(nn.Module):
    """
    model: a sequence classifier with 2 labels, the second of them relevant, or with 1. inputs: a dict with
      role            cross
      pair_tokens     maximum length of question and passage together, special tokens included
      token_types     segments (question 0, passage 1), or zeros where the model knows only one segment
    """

    projection = None  # nothing on top: save_encoder (utils/plumbing/weights.py) writes it as it is

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Turn [B, L] integer tensors into logits_B2 in float32."""
        logits = run_model(self.model, input_ids, attention_mask, token_type_ids).logits.float()
        if logits.shape[1] == 1:  # one label l is [0, l]: its softmax is the sigmoid of l
            logits = nn.functional.pad(logits, (1, 0))
        return logits


def tokenize_pairs(cross, pairs):
    """Turn (question, Passage) pairs into id lists `[CLS] question [SEP] title text [SEP]`."""
    # from: RocketQA reader_ce.py:125-178. The longer of question and passage is cut first
    if not pairs:
        return []
    questions = [question for question, _ in pairs]
    # trap: a space in front of a text is a token of its own for RoBERTa
    passages = [f"{passage.title} {passage.text}".strip() for _, passage in pairs]
    cut = {"truncation": True, "max_length": cross.inputs["pair_tokens"], "return_attention_mask": False}
    return cross.tokenizer(questions, passages, **cut).input_ids


@torch.no_grad()
def probabilities(cross, ids, batch_size, autocast=contextlib.nullcontext, progress=None):
    """Turn id lists of pairs into P(relevant) of each: numpy float64 [N] in the given order."""
    was_training = cross.training
    cross.eval()
    p_N = np.zeros(len(ids))
    for places, batch in batches_by_length(cross, ids, batch_size):
        with autocast():
            logits_b2 = cross(**batch)
        # why float64: in float32 every pair that is sure enough would have 1.0, and no order among them
        p_b2 = logits_b2.cpu().double().softmax(1)
        p_N[places] = p_b2[:, 1].numpy()
        if progress:
            progress.update(len(places))
    cross.train(was_training)
    return p_N


def load_cross_encoder(path, pair_tokens=0, dropout=0.0, new_head=False, layer_norm_epsilon=0.0):
    """
    Load a folder of train_cross_encoder.py, or a Hugging Face sequence classifier with one or two labels.

    pair_tokens: maximum length of a pair; 0: as stored. new_head: training starts here, and what a plain BERT
    lacks may be missing (the labels, and the layer before them); torch's generator draws it.
    layer_norm_epsilon above 0 overrides what is stored.
    """
    path = str(path)
    stored = weights.read_inputs(path, "cross-encoder")
    if stored.get("role", "cross") != "cross" and not new_head:
        raise UserError(f"{path}: this is a {stored['role']} encoder; a cross-encoder is needed here")
    with weights.explain_load_errors(path):
        folder = weights.local_folder(path)
        config = AutoConfig.from_pretrained(folder)
        tokenizer = weights.load_tokenizer(folder)
        if config.num_labels not in (1, 2):
            raise UserError(f"{path}: a classifier of {config.num_labels} labels; a cross-encoder has 1 or 2")
        options = {"config": config, "output_loading_info": True, "dtype": torch.float32}
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, **options)

    length = pair_tokens or stored.get("pair_tokens", 0)
    if not length:
        fault = "no encoder_inputs.json, so the length of a pair is unknown"
        fix = 'write one there, such as {"role": "cross", "pair_tokens": 160}'
        raise UserError(f"{path}: {fault}; {fix}")
    missing = report["missing_keys"]
    if new_head:  # only the model below the head must be whole, and of that not the pooler
        body = f"{model.base_model_prefix}."
        missing = [key for key in missing if key.startswith(body) and not key.startswith(f"{body}pooler.")]
    what = "this architecture" if new_head else "a cross-encoder; train_cross_encoder.py makes one"
    weights.check_complete(path, missing, (), what)
    weights.check_sound(path, model, report["unexpected_keys"])
    if any("pooler." in key for key in report["missing_keys"]) and world()[0] == 0:
        print(f"warning: {path}: no pooler in it, so one is trained from random weights", file=sys.stderr)
    weights.set_dropout(model, dropout, layer_norm_epsilon)
    weights.check_sizes(path, model, tokenizer, length, "tokens a pair")
    if weights.is_causal(model.base_model):
        raise UserError(
            f"{path}: {config.model_type} reads from left to right; a cross-encoder reads both ways"
        )

    types = "segments" if weights.knows_segments(model, tokenizer) else "zeros"  # RoBERTa has one segment
    inputs = {"role": "cross", "pair_tokens": length, "token_types": types, "pair": stored.get("pair", "")}
    return CrossEncoder(model, tokenizer, inputs)
