"""
FiD, the reader that writes: T5's encoder reads every passage by itself, together with the question. Its
decoder looks at all of them at once and writes the answer (Izacard and Grave 2021, Sec. 3).

    "question: q title: t context: c"  x K  --encoder, each alone-->  hidden [K, L, D]
                                            --laid end to end------>  [K*L, D]  --decoder-->  answer

Such a line of question and passage is a *context*. The encoder's cost grows with K, not with K squared. A T5
takes any encoder states, so it is given K passages as one long input. Cross-attention knows no positions, so
the order of the passages cannot matter.

The same states, one passage at a time, give log p(answer | question, passage). That teaches the retriever of
EMDR2 (Singh et al. 2021, Sec. 2). The losses are in train_emdr2.py.

B questions · K passages each · N contexts, B*K · b contexts of a chunk · L tokens of a context · T answer
tokens · S all tokens of a question's contexts · D hidden · V words
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, GenerationConfig, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from utils.distributed import cut, share_out
from utils.encoder import batches_by_length
from utils.plumbing.config import UserError
from utils.plumbing.weights import (
    check_sizes,
    explain_load_errors,
    load_complete,
    load_tokenizer,
    local_folder,
    read_inputs,
    set_dropout,
)

PAD = -100  # the label that counts nowhere (torch's cross_entropy)
READS_ALL = True  # all passages at once. answer.py: for answers from fewer of them it reads again
INPUTS = {
    "role": "fid",
    "pair": "",
    "reader_tokens": 256,  # differs: FiD reads 250 (Sec. 4)
    "answer_tokens": 32,  # from: EMDR2 tasks/openqa/e2eqa/train_data_utils.py:53-79
    "token_types": "zeros",  # a T5 has none; this is what utils.encoder.collate asks for
}


class Fid(nn.Module):
    """
    model: a T5ForConditionalGeneration. inputs: what encoder_inputs.json next to the weights says, a dict:
      reader_tokens   maximum length of a context: question, title and passage together, </s> included
      answer_tokens   maximum length of an answer, </s> included
      role, pair      fid, and the id that it shares with the two encoders trained with it
    """

    projection = None  # save_encoder asks: there is no layer on top

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs


# ---------------------------------------------------------------- text -> token ids
def word_pieces(fid, texts):
    """Return the id list of each text, without </s> and uncut."""
    # verbose: no warning of a length that is still to be cut
    words = fid.tokenizer(texts, add_special_tokens=False, verbose=False)
    return words.input_ids


def with_eos(fid, ids, length):
    """Cut the ids to `length` tokens, the last of which is </s>."""
    # why not the tokenizer's own truncation: its length is a state of the tokenizer, which threads share
    return ids[: length - 1] + [fid.tokenizer.eos_token_id]


def prompt(question, title):
    """Return what stands before a passage's text (from: FiD src/data.py:13-17)."""
    question = question.replace("[MASK]", "<extra_id_0>")  # T5's name for a masked span
    return f"question: {question} title: {title} context:"


def tokenize_contexts(fid, question, passages):
    """Return one id list a passage, `question: q title: t context: c </s>`, cut to reader_tokens."""
    texts = [f"{prompt(question, passage.title)} {passage.text}" for passage in passages]
    if not texts:
        return []
    length = fid.inputs["reader_tokens"]
    return [with_eos(fid, ids, length) for ids in word_pieces(fid, texts)]


def example_context(fid, example, corpus):
    """Return what FiD reads of a question's first passage, as text, to be shown once."""
    (ids,) = tokenize_contexts(fid, example["question"], [corpus[example["rows"][0]]])
    return fid.tokenizer.decode(ids)


def text_budget(fid, question, title):
    """Return how many tokens of a passage's text fit next to this question and title."""
    (ids,) = word_pieces(fid, [prompt(question, title)])
    return fid.inputs["reader_tokens"] - 1 - len(ids)


def tokenize_answers(fid, answers):
    """Turn B strings into labels_BT, int64 on the CPU: the answer, cut, then </s>, then PAD."""
    length = fid.inputs["answer_tokens"]
    rows = [torch.tensor(with_eos(fid, ids, length)) for ids in word_pieces(fid, answers)]
    return pad_sequence(rows, batch_first=True, padding_value=PAD)


# ---------------------------------------------------------------- token ids -> states -> likelihoods
def encode_contexts(fid, ids, chunk, autocast=nullcontext):
    """
    Read N id lists, each by itself; return (hidden_NLD float, mask_NL bool), L the longest of all N.

    `chunk` of them are read at a time. With gradients on, the graphs of all N live until backward.
    """
    longest = max(map(len, ids))
    rows = [None] * len(ids)
    for places, batch in batches_by_length(fid, ids, chunk):
        with autocast():
            states = fid.model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
        hidden_bLD = states.last_hidden_state
        hidden_bLD = pad(hidden_bLD, (0, 0, 0, longest - hidden_bLD.shape[1]))
        for place, hidden_LD in zip(places, hidden_bLD, strict=True):
            rows[place] = hidden_LD
    hidden_NLD = torch.stack(rows)
    lengths_N1 = torch.tensor([[len(tokens)] for tokens in ids], device=hidden_NLD.device)
    mask_NL = torch.arange(longest, device=hidden_NLD.device) < lengths_N1
    return hidden_NLD, mask_NL


def log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast):
    """Return log p(a_t | a_<t, states) of each answer token: log_bT in float32, 0 at PAD."""
    # the decoder sees the answer shifted by one: at place t it knows the tokens before t
    # why not labels=: T5 would take the loss too, with one more [b, T, V] tensor
    decoder_ids_bT = fid.model.prepare_decoder_input_ids_from_labels(labels_bT)
    with autocast():
        output = fid.model(
            encoder_outputs=BaseModelOutput(hidden_bLD),
            attention_mask=mask_bL,
            decoder_input_ids=decoder_ids_bT,
            use_cache=False,
        )
    logits_nV = output.logits.flatten(0, 1).float()
    costs_n = cross_entropy(logits_nV, labels_bT.flatten(), ignore_index=PAD, reduction="none")
    return -costs_n.view(labels_bT.shape)


def fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast=nullcontext):
    """Return log_BT, log p(a_t | a_<t, q, all K passages laid end to end): what FiD learns from."""
    return log_likelihood(fid, hidden_BKLD.flatten(1, 2), mask_BKL.flatten(1, 2), labels_BT, autocast)


@torch.no_grad()
def document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk, autocast=nullcontext):
    """Return log_BKT, log p(a_t | a_<t, q, passage k) from each passage alone, without a gradient."""
    # why in chunks, those of like length together: all logits are B*K*T*V numbers, gigabytes at 50 passages
    # differs: EMDR2 encodes every passage once more for this, without its neighbours in the article
    # (megatron/model/emdr2_model.py:187-210). Here the states that FiD has just made serve again, dropout and
    # all, which halves the cost
    B, K, _ = mask_BKL.shape
    hidden_NLD = hidden_BKLD.flatten(0, 1)
    mask_NL = mask_BKL.flatten(0, 1)
    lengths = mask_NL.sum(1).tolist()
    order = sorted(range(B * K), key=lambda n: (-lengths[n], n))

    log_NT = torch.zeros(B * K, labels_BT.shape[1], device=hidden_NLD.device)
    for start in range(0, B * K, chunk):
        rows_b = torch.tensor(order[start : start + chunk], device=hidden_NLD.device)
        longest = lengths[order[start]]
        hidden_bLD = hidden_NLD[rows_b, :longest]
        mask_bL = mask_NL[rows_b, :longest]
        labels_bT = labels_BT[rows_b // K]  # context n belongs to question n // K
        log_NT[rows_b] = log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast)
    return log_NT.view(B, K, -1)


# ---------------------------------------------------------------- answers
@torch.no_grad()
def answer(fid, contexts, chunk, autocast=nullcontext):
    """
    Write the answer to each question: the likeliest token each time, as EMDR2 and FiD do, without dropout.

    contexts: of each question the id lists of its passages, one or more. chunk: contexts in a forward pass.
    """
    was_training = fid.training
    fid.eval()
    all_ids = [ids for question in contexts for ids in question]
    hidden_NLD, mask_NL = encode_contexts(fid, all_ids, chunk, autocast)

    # lay the contexts of each question end to end; questions may have different numbers of them
    counts = [len(question) for question in contexts]
    hidden_BSD = pad_sequence([x_KLD.flatten(0, 1) for x_KLD in hidden_NLD.split(counts)], batch_first=True)
    mask_BS = pad_sequence([x_KL.flatten() for x_KL in mask_NL.split(counts)], batch_first=True)
    with autocast():
        ids_BT = fid.model.generate(
            encoder_outputs=BaseModelOutput(hidden_BSD),
            attention_mask=mask_BS,
            max_new_tokens=fid.inputs["answer_tokens"],
        )
    fid.train(was_training)
    texts = fid.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_all(fid, examples, corpus, depths, chunk, accelerator):
    """
    Answer every example from the passages corpus[row] of the first depths[-1] of its "rows".

    Each device writes its share. Return on every device [{"text": answer}] of each example, or [None] where
    it has no passages.
    """
    # groups of questions whose contexts fill a chunk
    rows = [list(example["rows"][: depths[-1]]) for example in examples]
    readable = [i for i, rows_of_i in enumerate(rows) if rows_of_i]
    width = max(1, chunk // max(1, *map(len, rows)))

    def tokenize(group):
        contexts = []
        for i in group:
            passages = [corpus[row] for row in rows[i]]
            contexts.append(tokenize_contexts(fid, examples[i]["question"], passages))
        return contexts

    def write(contexts):
        return [{"text": text} for text in answer(fid, contexts, chunk, accelerator.autocast)]

    answers = share_out(cut(readable, width), tokenize, write, "answers")
    return [[answers.get(i)] for i in range(len(examples))]


def answer_line(fid, question, passages, chunk):
    """Return the answer from all passages as ask.py prints it; "" where none has room beside the question."""
    budgets = [text_budget(fid, question, passage.title) for passage in passages]
    if max(budgets) < 1:
        return ""
    contexts = tokenize_contexts(fid, question, passages)
    (text,) = answer(fid, [contexts], chunk)
    return f"{text or 'none, the reader wrote an empty text'} | FiD over {len(passages)} passages"


# ---------------------------------------------------------------- disk
def load_fid(path, inputs=None, dropout=0.0):
    """
    Load the FiD reader that train_emdr2.py wrote, or any T5 as its start (t5-base, google/flan-t5-small).

    path: a folder or a hub name. inputs: lengths that prevail over the stored ones.
    """
    path = str(path)
    stored = read_inputs(path, "reader")
    if stored.get("role", "fid") != "fid":
        raise UserError(f"{path}: this is a {stored['role']} encoder; a FiD reader (a T5) is needed here")
    with explain_load_errors(path):
        folder = local_folder(path)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "t5":
            raise UserError(f"{path}: FiD reads with a T5, this is a {config.model_type}")
        tokenizer = load_tokenizer(folder)
        # transformers warns of a v1.1 or Flan-T5 that it will NOT tie two weights: that is right, they differ
        model = load_complete(T5ForConditionalGeneration, folder)
    set_dropout(model, dropout)

    # write greedily, whatever generation_config.json in the folder asks (beams, samples)
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(config, name, None) for name in names}
    if None in tokens.values():
        raise UserError(f"{path}: config.json lacks one of {', '.join(names)}; T5's are 0, 1, 0")
    model.generation_config = GenerationConfig(**tokens)

    fid = Fid(model, tokenizer, INPUTS | stored | (inputs or {}))
    check_sizes(path, model, tokenizer, fid.inputs["reader_tokens"], "tokens a context")
    return fid
