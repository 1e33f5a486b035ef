"""
One tower of the dual encoder: a BERT-like model, and how text becomes its inputs and a vector.

How inputs are built is stored beside the weights in `encoder_inputs.json` (utils/plumbing/weights.py), because a
vector is only right when the questions are tokenised as in training: lengths, token types and pooling differ
between DPR, nanoDPR and RocketQA and nothing fails when they are mixed up (specs: transformers issue 26817).

B sequences · L tokens, padded to the longest of the batch · D hidden
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from utils.distributed import prefetch, world


class Encoder(nn.Module):
    """
    model: a BERT-like model with `last_hidden_state`. inputs: dict with
      role            question | passage | shared (one model is both towers)
      question_tokens, passage_tokens   maximum lengths, special tokens included
      pooling         cls (DPR) | mean (sentence-transformers)
      token_types     zeros (DPR) | segments (nanoDPR, RocketQA: title 0, text 1) | zeros_sep (DPR since March
      2021:
                      always padded to the full length, the last position overwritten by [SEP]; DPR issue 210)
      pair            an id that a question encoder shares with the passage encoder it was trained with, or ""
    """

    def __init__(self, model, tokenizer, inputs, projection=None):
        super().__init__()
        self.model, self.tokenizer, self.inputs, self.projection = model, tokenizer, inputs, projection
        self.dim = projection.out_features if projection else model.config.hidden_size

    def forward(self, input_ids, attention_mask, token_type_ids):
        """[B, L] integer tensors -> vectors_BD in float32."""
        hidden_BLD = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        if self.inputs["pooling"] == "cls":
            vectors_BD = hidden_BLD[:, 0]
        else:
            mask_BL1 = attention_mask[:, :, None].to(hidden_BLD.dtype)
            vectors_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        return (self.projection(vectors_BD) if self.projection else vectors_BD).float()


def tokenize_questions(encoder, questions):
    """List of strings -> list of id lists `[CLS] question [SEP]`, cut to question_tokens."""
    # from: DPR dpr/utils/data_utils.py:63 and nanoDPR: the typographic apostrophe is replaced, in training
    # and test
    questions = [question.replace("’", "'") for question in questions]
    return _ids(encoder, questions, None, encoder.inputs["question_tokens"])


def tokenize_passages(encoder, passages):
    """
    List of (title, text) -> list of id lists `[CLS] title [SEP] text [SEP]`, or `[CLS] text [SEP]` without a
    title, the longer part cut first (DPR dpr/models/hf_models.py:288-308). Texts are stripped, titles are
    not.
    """
    ids = [None] * len(passages)
    for titled in (True, False):
        where = [i for i, (title, _) in enumerate(passages) if bool(title) == titled]
        texts = [passages[i][1].strip() for i in where]
        first, second = ([passages[i][0] for i in where], texts) if titled else (texts, None)
        for i, row in zip(where, _ids(encoder, first, second, encoder.inputs["passage_tokens"]), strict=True):
            ids[i] = row
    return ids


def _ids(encoder, first, second, length):
    if not first:
        return []
    return encoder.tokenizer(
        first, second, truncation=True, max_length=length, return_attention_mask=False
    ).input_ids


def collate(encoder, ids, length=0):
    """
    Id lists -> {"input_ids", "attention_mask", "token_type_ids"} as [B, L] int64 tensors on the encoder's
    device, L the longest of the batch, or `length` when given (the full length, for token_types zeros_sep).
    """
    tokenizer, kind = encoder.tokenizer, encoder.inputs["token_types"]
    longest = length or max(map(len, ids))
    input_ids = np.full((len(ids), longest), tokenizer.pad_token_id, dtype=np.int64)
    for row, tokens in zip(input_ids, ids, strict=True):
        row[: len(tokens)] = tokens
    if kind == "zeros_sep":
        input_ids[:, -1] = tokenizer.sep_token_id
    mask = (input_ids != tokenizer.pad_token_id).astype(np.int64)
    types = np.zeros_like(input_ids)
    if kind == "segments":  # 1 after the first [SEP], up to the end of the sequence
        is_sep = input_ids == tokenizer.sep_token_id
        types = ((np.cumsum(is_sep, 1) - is_sep > 0) & (mask == 1)).astype(np.int64)
    device = next(encoder.parameters()).device
    batch = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
    return {key: torch.from_numpy(array).to(device) for key, array in batch.items()}


def full_length(encoder, kind):
    """
    The length to which a batch of `kind` (question | passage) must be padded: 0 means the longest of the
    batch.
    """
    return encoder.inputs[f"{kind}_tokens"] if encoder.inputs["token_types"] == "zeros_sep" else 0


def batches_by_length(model, ids, size, length=0):
    """
    Yield (rows, what `collate` makes of them) for `size` id lists at a time, the longest first. why sorted by
    length: a batch is as expensive as its longest row, so equal lengths together cost half of padding
    everything to 256 (tests/bench), for the same vectors to 1e-6.
    """
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    # why ahead: a GPU would wait while the next batch is padded
    collated = prefetch(lambda rows: collate(model, [ids[i] for i in rows], length), groups)
    return zip(groups, collated, strict=True)


@torch.no_grad()
def embed(encoder, ids, batch_size, kind, autocast=contextlib.nullcontext, progress=None):
    """Id lists -> numpy float32 [N, D] in the given order."""
    was_training = encoder.training
    encoder.eval()
    vectors_ND = np.zeros((len(ids), encoder.dim), dtype=np.float32)
    for rows, batch in batches_by_length(encoder, ids, batch_size, full_length(encoder, kind)):
        with autocast():
            vectors_bD = encoder(**batch)
        vectors_ND[rows] = vectors_bD.cpu().numpy()
        if progress:
            progress.update(len(rows))
    encoder.train(was_training)
    return vectors_ND


def vectors_of(encoder, ids, kind, chunk, autocast):
    """Id lists -> tensor [N, D] with a graph, `chunk` rows in a forward pass; rows of like length meet."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    parts = []
    for k in range(0, len(order), chunk):
        part = [ids[i] for i in order[k : k + chunk]]
        with autocast():
            parts.append(encoder(**collate(encoder, part, full_length(encoder, kind))))
    return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(parts[0].device)]


def embed_on_devices(encoder, ids, batch_size, kind, accelerator):
    """
    Id lists -> tensor float32 [N, D] on every device, each having made its share. The groups are the same for
    any number of devices, so the numbers do not depend on how many there are.
    """
    (rank, devices), vectors_ND = world(), torch.zeros(len(ids), encoder.dim, device=accelerator.device)
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    for start in range(rank * batch_size, len(ids), devices * batch_size):
        group = order[start : start + batch_size]
        found_nD = embed(encoder, [ids[i] for i in group], batch_size, kind, accelerator.autocast)
        vectors_ND[group] = torch.from_numpy(found_nD).to(accelerator.device)
    if devices > 1:
        dist.all_reduce(vectors_ND)  # every row is zero on all devices but one
    return vectors_ND
