"""
FiD, the reader that writes: T5's encoder reads every passage by itself, beside the question; its decoder
looks at all of them at once and writes the answer (Izacard and Grave 2021, Sec. 3).

    "question: q title: t context: c"  x K  --encoder, each alone-->  hidden [K, L, D]
                                            --laid end to end------>  [K*L, D]  --decoder-->  answer

The encoder's cost grows with K, not with K squared, and the decoder weighs evidence across passages. No class
of its own is needed for that: a T5 takes any encoder states, so it is given K passages as one long input.
Cross-attention knows no positions, so the order of the passages cannot matter.

The same states read one passage at a time give log p(answer | question, passage), which teaches the retriever
of EMDR2 (Singh et al. 2021; specs: emdr2.md, 1.1). On disk a Fid is a plain T5 folder with
`encoder_inputs.json` beside the weights. Shared by train_emdr2.py and ask.py; the losses are in the former.

B questions · K passages each · N contexts, B*K · L tokens of a context · T answer tokens · D hidden · V words
"""

from contextlib import nullcontext
from itertools import takewhile

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from prepare.checkpoints import check_complete
from utils.distributed import gather_items, prefetch, world
from utils.encoder import batches_by_length
from utils.plumbing.config import UserError
from utils.plumbing.weights import check_sizes, explain_load_errors, read_inputs, set_dropout

# from: the paper reads 250 word pieces a passage (Sec. 4), EMDR2 writes 32 (tasks/openqa/e2eqa/
# train_data_utils.py:53-79). A T5 has no segments: "zeros" is what utils.encoder.collate wants to hear.
FID = {"reader_tokens": 256, "answer_tokens": 32, "neighbors": False, "token_types": "zeros"}
PAD = -100  # the label that counts nowhere (torch's cross_entropy)


class Fid(nn.Module):
    """
    model: a T5ForConditionalGeneration; `model.activation_checkpointing_enable()` keeps less in memory for
    more time, and changes no number beyond rounding. inputs: dict with
      role            fid
      reader_tokens   maximum length of a context: question, title and passage together, </s> included
      answer_tokens   maximum length of an answer, </s> included
      neighbors       whether a passage is read with the text around it (see extend)
    """

    projection = None  # nothing on top, so utils.plumbing.weights.save_encoder writes it as it is

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs


# ------------------------------------------------------------------------------------------------ words
def word_pieces(fid, texts):
    """Id lists without </s>, uncut; the warning that some are too long is premature."""
    return fid.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids


def with_eos(fid, ids, length):
    """Ids cut to `length`, </s> included, which is never cut away."""
    # why not the tokenizer's own truncation: its length is a state of the tokenizer, which threads share
    return ids[: length - 1] + [fid.tokenizer.eos_token_id]


def prompt(question, title):
    """What stands before a passage's text; the masked span of a sentence is what T5 calls <extra_id_0>."""
    return f"question: {question.replace('[MASK]', '<extra_id_0>')} title: {title} context:"


def tokenize_contexts(fid, question, passages):
    """
    One id list a passage: `question: q title: t context: c </s>` (FiD src/data.py:13-17), the end of the text
    cut so that reader_tokens hold it. The question stands first, so it is cut only where it alone is longer.
    """
    texts = [f"{prompt(question, passage.title)} {passage.text}" for passage in passages]
    return (
        [with_eos(fid, ids, fid.inputs["reader_tokens"]) for ids in word_pieces(fid, texts)] if texts else []
    )


def tokenize_answers(fid, answers):
    """
    List of B strings -> labels_BT int64 on the CPU: the answer, </s>, then PAD. An answer that is too long is
    cut to answer_tokens - 1 and </s> (EMDR2 tasks/openqa/e2eqa/train_data_utils.py:53-79).
    """
    rows = [
        torch.tensor(with_eos(fid, ids, fid.inputs["answer_tokens"])) for ids in word_pieces(fid, answers)
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def text_budget(fid, question, title):
    """How many of the reader_tokens a passage's text may fill beside this question and title."""
    return fid.inputs["reader_tokens"] - 1 - len(word_pieces(fid, [prompt(question, title)])[0])


def words_of(fid, text):
    """[(begin, end, tokens)] of every word: its place in the text, and how many pieces it has."""
    found = fid.tokenizer(text, add_special_tokens=False, verbose=False)
    words = [(found.word_to_chars(word), found.word_to_tokens(word)) for word in sorted({*found.word_ids()})]
    return [(chars.start, chars.end, tokens.end - tokens.start) for chars, tokens in words]


def extend(corpus, row, fid, budget):
    """
    The passage corpus[row] with the text around it in its article, up to `budget` tokens (see text_budget).
    So EMDR2 fills its reader, while the retriever sees bare passages (megatron/model/emdr2_model.py:278-359).

      first of its article    text, then the beginning of the two that follow
      last of its article     the end of the two before, then text
      in between              the end of the one before, text, the beginning of the one after

    The article: the rows next to this one that have its title, where it has one. What comes before has
    priority: it takes all that it can, and what follows gets the rest. Words are taken whole, as many as fit,
    because half a word has other pieces. A text that fills the budget by itself stays as it is.

    differs: the reference gives the second of two paragraphs nothing of the first, and fills one token less
    than it could (specs: emdr2.md, 2.3).
    """
    passage = corpus[row]

    def inside(i):
        return 0 <= i < len(corpus) and passage.title and corpus[i].title == passage.title

    before, after = (
        [corpus[i].text for i in takewhile(inside, rows)] for rows in ((row - 1, row - 2), (row + 1, row + 2))
    )
    if before and after:
        before, after = before[:1], after[:1]
    left, right = " ".join(reversed(before)), " ".join(after)
    room = budget - len(word_pieces(fid, [passage.text])[0])
    begin, end = len(left), 0
    for place, _, tokens in reversed(words_of(fid, left)):
        if tokens > room:
            break
        begin, room = place, room - tokens
    for _, place, tokens in words_of(fid, right):
        if tokens > room:
            break
        end, room = place, room - tokens
    parts = left[begin:], passage.text, right[:end]
    return passage._replace(text=" ".join(part for part in parts if part))


def contexts_of(question, passages, rows, corpus, fid):
    """What this reader reads of a question: tokenize_contexts of the passages, corpus[row] of rows each."""
    if fid.inputs["neighbors"]:
        budgets = [text_budget(fid, question, passage.title) for passage in passages]
        passages = [extend(corpus, row, fid, budget) for row, budget in zip(rows, budgets, strict=True)]
    return tokenize_contexts(fid, question, passages)


# ------------------------------------------------------------------------------------------------ states
def encode_contexts(fid, ids, chunk, autocast=nullcontext):
    """
    N id lists, not all empty -> (hidden_NLD float, mask_NL bool) on the reader's device, L the longest of all
    N. An empty list stands for a passage that is not there: it is not read, and all of its row is masked.

    `chunk` contexts are read at a time, those of like length together (a batch costs as much as its longest),
    and put back in order. With gradients on, the graphs of all N live until backward.
    """
    there = [i for i in range(len(ids)) if ids[i]]
    hidden, longest = [None] * len(ids), max(map(len, ids))
    for rows, batch in batches_by_length(fid, [ids[i] for i in there], chunk):
        with autocast():
            hidden_bLD = fid.model.encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
        hidden_bLD = pad(hidden_bLD, (0, 0, 0, longest - hidden_bLD.shape[1]))
        for i, row_LD in zip(rows, hidden_bLD.unbind(0), strict=True):
            hidden[there[i]] = row_LD
    nothing_LD = torch.zeros_like(hidden[there[0]])
    hidden_NLD = torch.stack([nothing_LD if row is None else row for row in hidden])
    sizes_N1 = torch.tensor([[len(one)] for one in ids], device=hidden_NLD.device)
    return hidden_NLD, torch.arange(longest, device=hidden_NLD.device) < sizes_N1


def log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast):
    """log p(a_t | a_<t, states) of each answer token, log_bT in float32, 0 at PAD."""
    # why not labels=: T5 would take the loss too, with one more [b, T, V] tensor
    decoder_ids_bT = fid.model.prepare_decoder_input_ids_from_labels(labels_bT)
    with autocast():
        logits_bTV = fid.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden_bLD),
            attention_mask=mask_bL,
            decoder_input_ids=decoder_ids_bT,
            use_cache=False,
        ).logits
    costs = cross_entropy(
        logits_bTV.flatten(0, 1).float(), labels_bT.flatten(), ignore_index=PAD, reduction="none"
    )
    return -costs.view(labels_bT.shape)


def fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast=nullcontext):
    """
    log p(a_t | a_<t, q, all K passages), log_BT in float32, 0 at PAD: what FiD learns from. One pass of the
    decoder over the states of a question's passages laid end to end.
    """
    return log_likelihood(fid, hidden_BKLD.flatten(1, 2), mask_BKL.flatten(1, 2), labels_BT, autocast)


@torch.no_grad()
def document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk, autocast=nullcontext):
    """
    log p(a_t | a_<t, q, passage k) of each passage alone, log_BKT in float32 without a gradient, 0 at PAD and
    for a passage that is not there, which needs a prior of 0 therefore (log -inf).

    why in chunks: the logits of all are B*K*T*V numbers, gigabytes at 50 passages. Here `chunk` passages are
    scored at a time, [chunk, T, V], those of like length together, and only B*K*T numbers stay.

    differs: EMDR2 encodes every passage once more for this (emdr2_model.py:187-210). Of bare passages the
    states are those that FiD has just made, dropout and all, so these serve again, at half the cost.
    """
    B, K, _ = mask_BKL.shape
    hidden_NLD, mask_NL = hidden_BKLD.detach().flatten(0, 1), mask_BKL.flatten(0, 1)
    log_NT = torch.zeros(B * K, labels_BT.shape[1], device=hidden_NLD.device)
    sizes = mask_NL.sum(1).tolist()
    order = sorted((n for n in range(B * K) if sizes[n]), key=lambda n: (-sizes[n], n))
    for start in range(0, len(order), chunk):
        rows = torch.tensor(order[start : start + chunk], device=hidden_NLD.device)
        longest = sizes[order[start]]
        part = hidden_NLD[rows, :longest], mask_NL[rows, :longest], labels_BT[rows // K]
        log_NT[rows] = log_likelihood(fid, *part, autocast)
    return log_NT.view(B, K, -1)


@torch.no_grad()
def generate(fid, hidden_BKLD, mask_BKL, autocast=nullcontext):
    """
    The B answers, as strings, that the decoder writes from all K passages: the likeliest token each time (as
    EMDR2 and FiD do), until </s> or answer_tokens of them. Without dropout, whatever mode the reader is in.
    """
    was_training = fid.training
    fid.eval()
    with autocast():
        ids_BT = fid.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden_BKLD.flatten(1, 2)),
            attention_mask=mask_BKL.flatten(1, 2),
            max_new_tokens=fid.inputs["answer_tokens"],
        )
    fid.train(was_training)
    return [text.strip() for text in fid.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


@torch.no_grad()
def answer(fid, rows, chunk, autocast=nullcontext):
    """
    The generated answer of each question, without dropout. rows: of each question the id lists of its
    contexts, at least one, not necessarily as many as another has; chunk: as in encode_contexts.
    """
    was_training = fid.training
    fid.eval()
    most = max(map(len, rows))
    ids = [ids for one in rows for ids in [*one, *[[]] * (most - len(one))]]
    hidden_NLD, mask_NL = encode_contexts(fid, ids, chunk, autocast)
    answers = generate(fid, hidden_NLD.unflatten(0, (-1, most)), mask_NL.unflatten(0, (-1, most)), autocast)
    fid.train(was_training)
    return answers


def answer_all(fid, examples, rows, corpus, chunk, accelerator):
    """
    The answer to every example from the passages corpus[row] of its rows, on every device, each having
    written its share: [{"text": answer}], or [None] without passages (see utils/predictions.py). chunk:
    contexts in one forward pass.
    """
    (rank, devices), answers = world(), {}
    known = [i for i, own in enumerate(rows) if len(own)]
    width = max(1, chunk // max(1, *map(len, rows)))
    mine = [known[k : k + width] for k in range(0, len(known), width)][rank::devices]

    def tokenized(block):
        passages = {i: [corpus[row] for row in rows[i]] for i in block}
        return [contexts_of(examples[i]["question"], passages[i], rows[i], corpus, fid) for i in block]

    bar = tqdm(total=sum(map(len, mine)), desc="answers", delay=5, leave=False, disable=None)
    with bar:
        for block, contexts in zip(mine, prefetch(tokenized, mine), strict=True):
            texts = answer(fid, contexts, chunk, accelerator.autocast)
            answers |= {i: {"text": text} for i, text in zip(block, texts, strict=True)}
            bar.update(len(block))
    answers = gather_items(answers)
    return [[answers.get(i)] for i in range(len(examples))]


# ------------------------------------------------------------------------------------------------ disk
def load_fid(path, inputs=None, dropout=0.0):
    """
    The FiD reader in a folder that train_emdr2.py wrote, or any T5 as its start: a Hugging Face folder or hub
    name (t5-base, google/t5-v1_1-base, google/flan-t5-small). inputs: overrides what is stored. UserError
    where the path is not reachable, is something else, or a weight is missing.
    """
    path, known = str(path), read_inputs(path, "reader")
    if known.get("role", "fid") != "fid":
        raise UserError(f"{path}: this is a {known['role']} encoder; a FiD reader (a T5) is needed here")
    with explain_load_errors(path):
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "t5":
            raise UserError(f"{path}: FiD reads with a T5, this is a {config.model_type}")
        tokenizer = AutoTokenizer.from_pretrained(path)
        # transformers warns of a v1.1 or Flan-T5 that it will NOT tie two weights: that is right, they differ
        model, found = T5ForConditionalGeneration.from_pretrained(
            path, output_loading_info=True, dtype=torch.float32
        )
    check_complete(path, found["missing_keys"])
    set_dropout(model, dropout)
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    ends = {name: getattr(config, name, None) for name in names}
    if None in ends.values():
        raise UserError(f"{path}: config.json lacks one of {', '.join(names)}; T5's are 0, 1, 0")
    model.generation_config = GenerationConfig(**ends)  # why: a folder may ask for beams or for samples
    fid = Fid(model, tokenizer, {"role": "fid", "pair": ""} | FID | known | (inputs or {}))
    check_sizes(path, model, tokenizer, fid.inputs["reader_tokens"], "tokens a context")
    return fid
