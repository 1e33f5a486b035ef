"""
The extractive reader: one BERT reads question and passage together, says how likely the answer is in this
passage, and where it begins and ends (Karpukhin et al. 2020, Sec. 6).

On disk it is a Hugging Face DPRReader, the class of facebook/dpr-reader-*, with `encoder_inputs.json` beside
the weights. Shared by train_reader.py and ask.py; the loss and the choice of passages to learn from are in
train_reader.py.

B sequences · L tokens, padded to the longest of the batch · S tokens of one passage
"""

from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, DPRConfig, DPRReader

from prepare.checkpoints import check_complete, reader_from_cp
from utils.encoder import batches_by_length
from utils.plumbing.config import UserError
from utils.plumbing.weights import check_sizes, explain_load_errors, read_inputs, set_dropout

# from: DPR README (encoder.sequence_length=350) and the June 2020 code of the released readers: segments of 0
DPR_READER = {"reader_tokens": 350, "token_types": "zeros"}


class Reader(nn.Module):
    """
    model: a DPRReader. inputs: dict with
      role            reader
      reader_tokens   maximum length of question, title and passage together, special tokens included
      token_types     zeros (DPR's released readers) | segments (question 0, title and passage 1)
    """

    projection = None  # nothing on top, so utils.plumbing.weights.save_encoder writes it as it is

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs
        words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.continues_V = np.array([word.startswith("##") for word in words])  # piece of the word before it

    def forward(self, input_ids, attention_mask, token_type_ids):
        """[B, L] integer tensors -> (start_BL, end_BL, relevance_B) logits in float32, padding included."""
        parts = self.model.span_predictor
        hidden_BLD = parts.encoder.bert_model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        start_BL, end_BL = parts.qa_outputs(hidden_BLD).float().unbind(2)
        return start_BL, end_BL, parts.qa_classifier(hidden_BLD[:, 0]).float()[:, 0]


@torch.no_grad()
def read(reader, ids, batch_size, autocast=nullcontext):
    """Id lists -> [(start logits, end logits, relevance)] as numpy and float, in the given order."""
    was_training, found = reader.training, [None] * len(ids)
    reader.eval()
    for rows, batch in batches_by_length(reader, ids, batch_size):
        with autocast():
            logits = reader(**batch)
        for i, *one in zip(rows, *(part.cpu().numpy() for part in logits), strict=True):
            found[i] = one[0][: len(ids[i])], one[1][: len(ids[i])], float(one[2])
    reader.train(was_training)
    return found


def best_spans(start_S, end_S, continues_S, max_answer_length, top_spans):
    """
    [(first, last, score)] of up to `top_spans` answers in the tokens of one passage, best first, both ends
    included. score = start + end logit of a span of up to max_answer_length tokens; it is then widened to
    whole words. A span inside or around one already chosen is passed over; equal scores: the earlier one.

    continues_S: whether a token is a piece of the word before it.
    """
    size, widths = len(start_S), min(max_answer_length, len(start_S))
    scores_SW = np.full((size, widths), -np.inf)
    for width in range(widths):
        scores_SW[: size - width, width] = start_S[: size - width] + end_S[width:]
    chosen = []
    for cell in np.argsort(-scores_SW, axis=None, kind="stable"):
        first, width = divmod(int(cell), widths)
        last, score = first + width, float(scores_SW[first, width])
        if len(chosen) == top_spans or score == -np.inf:
            break
        if any(first <= a and b <= last or a <= first and last <= b for a, b, _ in chosen):
            continue
        while first and continues_S[first]:
            first -= 1
        while last + 1 < size and continues_S[last + 1]:
            last += 1
        chosen.append((first, last, score))
    return chosen


def predict(reader, passages, rows, top_docs, max_answer_length, batch_size, autocast=nullcontext):
    """
    For each question one answer per n of top_docs: the best span of the passage of highest relevance among
    the first n, as the dict {"text", "score", "relevance_score", "passage_idx", "passage"} of DPR's
    prediction files; None where no passage has any text. The two scores are never added up (DPR
    train_extractive_reader.py:407-472). passages: of each question, best first; rows: their tokenize_rows().
    UserError that names the question where a logit is not finite.
    """
    found = iter(read(reader, [ids for one in rows for ids, _ in one], batch_size, autocast))
    answers = []
    for texts, one in zip(passages, rows, strict=True):
        logits = [next(found) for _ in one]
        for (ids, first), parts in zip(one, logits, strict=True):
            if not all(np.isfinite(part).all() for part in parts):
                question = reader.tokenizer.decode(ids[1:first]).split(reader.tokenizer.sep_token)[0].strip()
                raise UserError(
                    f"question {question!r}: the reader's logits are not finite; its weights are damaged, or "
                    "too large for fp16 (then --mixed_precision no)"
                )
        usable = [i for i, (ids, first) in enumerate(one) if len(ids) > first]
        best = [max((i for i in usable if i < n), key=lambda i: logits[i][2], default=None) for n in top_docs]
        spans = {
            i: span_text(reader, texts[i], *one[i], *logits[i], max_answer_length) for i in {*best} - {None}
        }
        answers.append([spans[i] | {"passage_idx": i} if i is not None else None for i in best])
    return answers


def span_text(reader, passage, ids, first, start_L, end_L, relevance, max_answer_length):
    """The best span of one passage, its text sliced from the passage."""
    continues_S = reader.continues_V[ids[first:]]
    a, b, score = best_spans(start_L[first:], end_L[first:], continues_S, max_answer_length, 1)[0]
    text = passage.text.strip()
    # differs: DPR decodes the tokens, so that its answers are in lower case and "U.S." reads "u. s.". Under
    # transformers 5 "don't" would even be "don ' t", which exact match counts as wrong.
    how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    offsets = reader.tokenizer(text, **how).offset_mapping
    answer = text[offsets[a][0] : offsets[b][1]]
    return {"text": answer, "score": score, "relevance_score": relevance, "passage": text}


def load_reader(path, inputs=None, dropout=0.0, new_head=False):
    """
    The reader in a folder that train_reader.py wrote, in facebook/dpr-reader-* or a copy, or in a reader
    `.cp` of the original DPR. new_head: training starts here, so a plain BERT will do, and the three outputs
    are drawn from torch's generator; otherwise no weight may be missing. inputs: overrides what is stored.
    """
    path, known = str(path), read_inputs(path, "reader")
    if known.get("role", "reader") != "reader" and not new_head:
        raise UserError(f"{path}: this is a {known['role']} encoder; a reader is needed here")
    with explain_load_errors(path):
        if path.endswith(".cp"):
            model, tokenizer = reader_from_cp(path)
        else:
            config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
            if config.model_type == "dpr":
                if config.architectures and "DPRReader" not in config.architectures:
                    raise UserError(f"{path}: holds a {config.architectures[0]}; a reader is a DPRReader")
                model, found = DPRReader.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
                check_complete(path, found["missing_keys"])
            else:
                model = from_bert(path, config, new_head)
    set_dropout(model, dropout)
    kept = {key: known[key] for key in DPR_READER if key in known}
    if known.get("role") == "reader":
        kept["pair"] = known.get("pair", "")
    reader = Reader(model, tokenizer, {"role": "reader", "pair": ""} | DPR_READER | kept | (inputs or {}))
    check_sizes(path, model, tokenizer, reader.inputs["reader_tokens"], "tokens a passage")
    return reader


def from_bert(path, config, new_head):
    """A DPRReader on the weights of a plain BERT, its outputs drawn from N(0, 0.02) (DPR reader.py:31-44)."""
    if not new_head:
        raise UserError(
            f"{path}: a {config.model_type} without the reader's outputs; train_reader.py adds them"
        )
    if config.model_type != "bert":
        raise UserError(f"{path}: a reader starts from a BERT, this is a {config.model_type}")
    bert, found = AutoModel.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, add_pooling_layer=False
    )
    check_complete(path, found["missing_keys"])
    same = {k: v for k, v in config.to_diff_dict().items() if k not in ("model_type", "architectures")}
    model = DPRReader(DPRConfig(**same | {"projection_dim": 0, "initializer_range": 0.02}))
    model.span_predictor.encoder.bert_model.load_state_dict(bert.state_dict())
    return model
