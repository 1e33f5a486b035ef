"""
One of the two encoders (a *tower*): a BERT-like model, and how text becomes its inputs and a vector.

How inputs are built is stored next to the weights in `encoder_inputs.json` (utils/plumbing/weights.py). A
vector is only right when a text is tokenised as in training. Lengths, token types and pooling differ between
DPR, nanoDPR and RocketQA, and nothing fails when they are mixed up (transformers issue 26817).

B texts of a batch, b of a chunk · L tokens, padded to the longest of the batch · D dimensions · N texts in
all
"""

import contextlib
import inspect

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from utils.distributed import cut, prefetch, sum_over_devices, world

POOLINGS = ("cls", "mean", "last")  # how L states become one vector: Encoder.forward
TOKEN_TYPES = ("zeros", "segments")  # what marks the second text: collate
PASSAGES = ("pair", "joined")  # how a title stands before its text: tokenize_passages
# what DPR does, where encoder_inputs.json says nothing else
DEFAULTS = {"normalize": False, "question_prefix": "", "passage_prefix": "", "passage": "pair"}


class Encoder(nn.Module):
    """
    model: a BERT-like model with `last_hidden_state`. projection: a Linear, or a Sequential of them and their
    activations, on top of the pooled state; or None. inputs: a dict with
      role            question | passage | shared (one model is both towers)
      question_tokens, passage_tokens   maximum lengths, special tokens included
      pooling         cls (DPR) | mean (most of sentence-transformers) | last (decoders): the last token
      token_types     zeros (DPR) | segments (nanoDPR, RocketQA: title 0, text 1)
      normalize       whether every vector is scaled to length 1
      question_prefix, passage_prefix   what stands before every text (E5: "query: ", "passage: ")
      passage         pair: title and text with [SEP] between (DPR) | joined: one text, as BEIR gives it to
                      sentence-transformers; its questions are left as they are typed
      pair            the id of the training that made both encoders, "" where unknown. It has nothing to do
                      with the value `pair` of `passage`
    """

    def __init__(self, model, tokenizer, inputs, projection=None):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.inputs, self.projection = inputs, projection
        layers = list(projection.modules()) if projection else []
        linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.dim = linears[-1].out_features if linears else model.config.hidden_size

    def how(self, key):
        """Return inputs[key], or what DPR does where `inputs` does not say."""
        return self.inputs.get(key, DEFAULTS[key])

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Turn [B, L] integer tensors into vectors_BD in float32. attention_mask: None, where all is text."""
        hidden_BLD = run_model(self.model, input_ids, attention_mask, token_type_ids).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.inputs["pooling"] == "cls":
            vectors_BD = hidden_BLD[:, 0]
        elif self.inputs["pooling"] == "mean":  # over real tokens
            mask_BL1 = attention_mask[:, :, None].to(hidden_BLD.dtype)
            vectors_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        elif self.inputs["pooling"] == "last":
            last_B = attention_mask.sum(1) - 1
            vectors_BD = hidden_BLD[torch.arange(len(last_B)), last_B]
        if self.projection:
            vectors_BD = self.projection(vectors_BD)
        vectors_BD = vectors_BD.float()
        return normalize(vectors_BD, dim=1) if self.how("normalize") else vectors_BD


def run_model(model, input_ids, attention_mask, token_type_ids):
    """Return a model's output; token types are left out where it takes none (DistilBERT, ModernBERT)."""
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes_token_types(model):
        batch["token_type_ids"] = token_type_ids
    return model(**batch)


def takes_token_types(model):
    """Return whether a model has embeddings for token types."""
    # trap: GPT-2 takes them too, and reads type 1 as word 1 of its vocabulary
    types = getattr(model.config, "type_vocab_size", 0)
    return types > 0 and "token_type_ids" in inspect.signature(model.forward).parameters


# ---------------------------------------------------------------- text -> token ids
def tokenize_questions(encoder, questions):
    """Turn strings into id lists `[CLS] question [SEP]`, cut to question_tokens."""
    # from: DPR dpr/utils/data_utils.py:63 and nanoDPR: the typographic apostrophe is replaced, always
    # trap: the key `passage` decides this too: joined means another library's encoder, which leaves it
    if encoder.how("passage") == "pair":
        questions = [question.replace("’", "'") for question in questions]
    questions = [encoder.how("question_prefix") + question for question in questions]
    return _ids(encoder, questions, None, encoder.inputs["question_tokens"])


def tokenize_passages(encoder, passages):
    """
    Turn passages (with .title and .text) into id lists, cut to passage_tokens.

    `[CLS] title [SEP] text [SEP]`, or `[CLS] text [SEP]` without a title; the longer part is cut first (DPR
    dpr/models/hf_models.py:288-308). Texts are stripped, titles are not. `joined`: `[CLS] title text [SEP]`.
    """
    prefix = encoder.how("passage_prefix")
    pairs = []
    for passage in passages:
        title, text = passage.title, passage.text.strip()
        if encoder.how("passage") == "joined":  # from: BEIR, and sentence-transformers' own examples
            title, text = "", f"{title} {text}".strip()
        pairs.append((prefix + title, text) if title else (prefix + text, None))

    # why two calls: a tokenizer takes either pairs or single texts
    ids = [None] * len(passages)
    for titled in (True, False):
        places = [i for i, (_, text) in enumerate(pairs) if (text is not None) == titled]
        first = [pairs[i][0] for i in places]
        second = [pairs[i][1] for i in places] if titled else None
        rows = _ids(encoder, first, second, encoder.inputs["passage_tokens"])
        for place, row in zip(places, rows, strict=True):
            ids[place] = row
    return ids


def _ids(encoder, first, second, length):
    """Return the id lists of texts, or of pairs (first, second), cut to `length`."""
    if not first:
        return []
    limits = {"truncation": True, "max_length": length, "return_attention_mask": False}
    return encoder.tokenizer(first, second, **limits).input_ids


def collate(encoder, ids, lengths=()):
    """
    Pad id lists to the longest: {"input_ids", "attention_mask", "token_type_ids"}, [B, L] int64 tensors on
    the encoder's device. lengths: the values that L may have, ascending; () for any. Only torch.compile needs
    some (doc2embedding.py).
    """
    tokenizer = encoder.tokenizer
    padding = tokenizer.pad_token_id or 0  # GPT-2 and Llama have none; what is masked is not read
    L = padded_length(max(map(len, ids)), lengths)
    input_ids = np.full((len(ids), L), padding, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for i, tokens in enumerate(ids):
        input_ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1  # trap: the padding of some models is a token of the text too
    types = np.zeros_like(input_ids)
    if encoder.inputs["token_types"] == "segments":  # 1 after the first [SEP], up to the end of the sequence
        is_sep = input_ids == tokenizer.sep_token_id
        seps_before = np.cumsum(is_sep, 1) - is_sep
        types = ((seps_before > 0) & (mask == 1)).astype(np.int64)
    device = next(encoder.parameters()).device
    batch = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
    return {key: send(torch.from_numpy(array), device) for key, array in batch.items()}


def padded_length(longest, lengths):
    """Return the first of `lengths` (ascending) that is not below `longest`, or `longest`."""
    return next((length for length in lengths if length >= longest), longest)


def send(x, device):
    """Copy a tensor to a device. A GPU is at work meanwhile, and nobody waits for the copy."""
    if device.type != "cuda":
        return x.to(device)
    # why pinned: from other memory the program would wait until the GPU has done all that it was given before
    return x.pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------- rows of like length together
def by_length(ids):
    """Return the places of the id lists, the shortest first; equal lengths keep their order."""
    return sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))


def in_chunks(ids, size):
    """
    Cut id lists into chunks of `size` in order of length: (chunks, the places that restore the given order).

    The vectors of all chunks, one below the other, indexed by the places, are in the order of `ids`. why: a
    chunk costs as much as its longest row, so rows of equal length together save the padding.
    """
    order = by_length(ids)
    chunks = []
    for start in range(0, len(ids), size):
        chunks.append([ids[i] for i in order[start : start + size]])
    return chunks, torch.from_numpy(np.argsort(order))


def groups_by_length(ids, size, tokens=0, lengths=()):
    """
    Cut the places of id lists into groups, the longest first: `size` places each. tokens above 0: as many
    places as make so many tokens with their padding, at least one. lengths: as of `collate`; where some are
    given, all groups of a length have the same size, the last one filled up with its last place.
    """
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    groups = []
    start = 0
    while start < len(order):
        if tokens:
            size = max(1, tokens // padded_length(len(ids[order[start]]), lengths))
        group = order[start : start + size]
        start += size
        if lengths:
            group += [group[-1]] * (size - len(group))
        groups.append(group)
    return groups


def batches_by_length(model, ids, size, tokens=0, lengths=()):
    """
    Yield (places, what `collate` makes of them) of each of groups_by_length. Where a group has no padding,
    attention_mask is None.

    Half the cost of padding everything to 256 (tests/bench), for the same vectors to 1e-6.
    """
    groups = groups_by_length(ids, size, tokens, lengths)

    def batch_of(places):
        rows = [ids[i] for i in places]
        batch = collate(model, rows, lengths)
        # why: without a mask a GPU takes a faster attention, and nobody asks it whether one is needed
        if min(map(len, rows)) == batch["input_ids"].shape[1]:
            batch["attention_mask"] = None
        return batch

    # why prefetch: a GPU would wait while the next batch is padded
    return zip(groups, prefetch(batch_of, groups), strict=True)


# ---------------------------------------------------------------- token ids -> vectors
@torch.no_grad()
def embed(encoder, ids, size, autocast=contextlib.nullcontext, progress=None, tokens=0, lengths=()):
    """
    Turn id lists into vectors without dropout: numpy float32 [N, D] in the given order.

    size, tokens, lengths: how many go through the encoder together, see groups_by_length.
    """
    was_training = encoder.training
    encoder.eval()
    made = []
    for places, batch in batches_by_length(encoder, ids, size, tokens, lengths):
        with autocast():
            made.append((places, encoder(**batch)))
        if progress:
            progress.update(len(set(places)))
    encoder.train(was_training)

    # why only now: to fetch a vector is to wait for the GPU, which would then wait for the next batch
    vectors_ND = np.zeros((len(ids), encoder.dim), dtype=np.float32)
    for places, vectors_bD in made:
        vectors_ND[places] = vectors_bD.cpu().numpy()
    return vectors_ND


def embed_on_devices(encoder, ids, batch_size, accelerator):
    """
    Turn id lists into a tensor float32 [N, D] on every device; each device makes its share.

    The groups are the same for any number of devices, so the numbers do not depend on how many there are.
    """
    rank, devices = world()
    vectors_ND = torch.zeros(len(ids), encoder.dim, device=accelerator.device)
    for group in cut(by_length(ids), batch_size)[rank::devices]:  # `embed` has one batch of each group
        vectors_bD = embed(encoder, [ids[i] for i in group], batch_size, accelerator.autocast)
        vectors_ND[group] = torch.from_numpy(vectors_bD).to(accelerator.device)
    return sum_over_devices(vectors_ND)  # every row is zero on all devices but one


def vectors_with_graph(encoder, ids, chunk, autocast):
    """Turn id lists into a tensor [N, D] with a graph, `chunk` rows in a forward pass."""
    chunks, places_N = in_chunks(ids, chunk)
    vectors = []
    for chunk_ids in chunks:
        with autocast():
            vectors.append(encoder(**collate(encoder, chunk_ids)))
    return torch.cat(vectors)[places_N.to(vectors[0].device)]
