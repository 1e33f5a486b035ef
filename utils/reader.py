"""
The extractive reader: one BERT reads question and passage together. It says how likely this passage is the
right one, and where in it the answer begins and ends (Karpukhin et al. 2020, Sec. 6).

The loss is in train_reader.py. On disk a reader is a Hugging Face DPRReader, the class of
facebook/dpr-reader-*, with `encoder_inputs.json` next to the weights.

B sequences, b of one forward pass · L tokens, padded to the longest of them · S tokens of one passage
W widths of a span · M passages of a question · V words of the vocabulary · D hidden
"""

from collections import Counter
from contextlib import nullcontext

import numpy as np
import regex as re
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, DPRConfig, DPRReader

from utils.distributed import cut, gather_items, share_out, world
from utils.encoder import batches_by_length
from utils.plumbing import weights
from utils.plumbing.config import UserError
from utils.plumbing.files import read_json
from utils.text import UNSPACED, has_answer

# from: DPR README (encoder.sequence_length=350) and the June 2020 code of the released readers: segments of 0
DPR_READER = {"reader_tokens": 350, "token_types": "zeros"}
# from: DPR dpr/data/reader_data.py:220-317: positives kept where no gold page is known; ten negatives for
# each positive, within these bounds
MAX_POSITIVES = 20
FEWEST_NEGATIVES = 50
MOST_NEGATIVES = 150
BLOCK = 16  # questions that are answered together, so that passages of like length meet
READS_ALL = False  # each passage by itself: one reading tells answer.py the answers of every depth


# ---------------------------------------------------------------- text -> token ids
def word_pieces(reader, texts):
    """Return id lists without special tokens, uncut."""
    # why not verbose: the warning that some are too long for a BERT is premature
    return reader.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids


def tokenize_rows(reader, question, passages, cut=True):
    """
    Return a sequence (ids, first) for each passage: `[CLS] question [SEP] title [SEP] passage`.

    The ids are cut to reader_tokens, without a [SEP] at the end; the passage begins at ids[first] (from: DPR
    dpr/data/reader_data.py:256-272, 530-533).
    """
    titles = [passage.title for passage in passages]
    texts = [passage.text.strip() for passage in passages]
    question_ids, *ids = word_pieces(reader, [question, *titles, *texts])
    cls, sep = reader.tokenizer.cls_token_id, reader.tokenizer.sep_token_id
    length = reader.inputs["reader_tokens"] if cut else None
    sequences = []
    for title, text in zip(ids[: len(titles)], ids[len(titles) :], strict=True):
        head = [cls, *question_ids, sep, *title, sep]
        sequences.append(((head + text)[:length], len(head)))
    return sequences


def find_spans(ids, first, answers):
    """Return (begin, end), the end included, of every mention of an answer in the passage ids[first:]."""
    spans = []
    for answer in answers:
        if not answer:  # trap: an answer of no tokens would be everywhere
            continue
        size = len(answer)
        for begin in range(first, len(ids) - size + 1):
            if ids[begin] == answer[0] and ids[begin : begin + size] == answer:
                spans.append((begin, begin + size - 1))
    return spans


# ---------------------------------------------------------------- what a reader learns from
def read_gold(path):
    """Return {question: title of its gold page, in lower case} of DPR's nq-*_gold_info.json."""
    titles = {}
    try:
        for entry in read_json(path)["data"]:
            title = entry["title"].lower()
            titles |= {entry[key]: title for key in ("question", "question_tokens") if key in entry}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not DPR's gold passages, {{'data': [...]}}: {error!r}") from None
    return titles


def training_rows(example, corpus, reader, gold):
    """
    Return (status, rows of positives, rows of negatives, whether the positives are of the gold page).

    status: "kept", or why the question is dropped. A positive holds an answer as word pieces within the first
    reader_tokens of the input; if some are of the gold page, only these. A negative holds no answer at all.
    """
    length = reader.inputs["reader_tokens"]
    rows = example["rows"]
    answers = example["answers"]
    passages = [corpus[row] for row in rows.tolist()]

    # the passages that hold an answer, and the places where its mentions end
    holding = [i for i, passage in enumerate(passages) if has_answer(passage.text, answers)]
    sequences = tokenize_rows(reader, example["question"], [passages[i] for i in holding], cut=False)
    pieces = word_pieces(reader, answers) if holding else []
    ends = {}
    for i, (ids, first) in zip(holding, sequences, strict=True):
        ends[i] = [end for _, end in find_spans(ids, first, pieces)]

    # differs: a positive has an answer before the cut; DPR draws another one where the drawn one has none
    positives = [i for i in holding if min(ends[i], default=length) < length]
    page = gold.get(example["question"])
    of_gold = [i for i in positives if passages[i].title.lower() == page]
    positives = of_gold or positives[:MAX_POSITIVES]
    limit = min(max(10 * len(positives), FEWEST_NEGATIVES), MOST_NEGATIVES)
    negatives = [i for i in range(len(rows)) if i not in ends][:limit]

    # the first reason to drop the question
    status = "kept"
    if not passages:
        status = "without passages"
    elif not answers:
        status = "without answers"
    elif not holding:
        status = "with no answer in any passage"
    elif not any(ends.values()):
        status = "with no answer as word pieces in a row"
    elif not positives:
        status = f"with answers only beyond {length} tokens"
    return status, rows[positives], rows[negatives], bool(of_gold)


def find_training_rows(path, examples, corpus, reader, gold):
    """Return (the examples to learn from, with "positives" and "negatives", a report on the dropped ones)."""
    # differs: no file is prepared; the answers are found in the passages when a training starts
    rank, devices = world()
    found = {}  # each device searches its share of the examples
    for i in tqdm(range(rank, len(examples), devices), "finding answers", delay=5, disable=None):
        found[i] = training_rows(examples[i], corpus, reader, gold)
    found = gather_items(found)

    kept = []
    dropped = Counter()
    with_gold = 0
    for i, example in enumerate(examples):
        status, positives, negatives, of_gold = found[i]
        with_gold += of_gold
        if status == "kept":
            kept.append(example | {"positives": positives, "negatives": negatives})
        else:
            dropped[status] += 1

    reasons = ", ".join(f"{n} {status}" for status, n in dropped.most_common())
    report = f"{path}: {len(kept)} of {len(examples)} questions kept, dropped: {reasons or 'none'}"
    if not kept:
        raise UserError(f"{report}; nothing to learn from")
    bare = sum(not len(example["negatives"]) for example in kept)
    report += f"; {bare} kept without a negative"
    if gold:
        report += f"; {with_gold} with positives of the gold page"
    return kept, report


# ---------------------------------------------------------------- the model
class Reader(nn.Module):
    """
    model: a DPRReader. inputs: a dict with
      role            reader
      reader_tokens   maximum length of question, title and passage together, special tokens included
      token_types     zeros (DPR's released readers) | segments (question 0, title and passage 1)
    max_answer_length: tokens of an answer, before it is widened to whole words; no part of what was learned.
    """

    projection = None  # nothing on top, so utils.plumbing.weights.save_encoder writes it as it is
    max_answer_length = 10  # from: DPR conf/extractive_reader_train_cfg.yaml

    def __init__(self, model, tokenizer, inputs):
        super().__init__()
        self.model, self.tokenizer, self.inputs = model, tokenizer, inputs
        words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        # piece of the word before it; not in a script without spaces, where all of a sentence is one word
        self.continues_V = np.array([bool(re.match(f"##(?![{UNSPACED}])", word)) for word in words])

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Turn [B, L] integer tensors into logits in float32: (start_BL, end_BL, relevance_B)."""
        predictor = self.model.span_predictor
        hidden_BLD = predictor.encoder.bert_model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        start_BL, end_BL = predictor.qa_outputs(hidden_BLD).float().unbind(2)
        relevance_B1 = predictor.qa_classifier(hidden_BLD[:, 0]).float()
        return start_BL, end_BL, relevance_B1[:, 0]


def load_reader(path, inputs=None, dropout=0.0, new_head=False):
    """
    Load the reader in a folder that train_reader.py wrote, or in facebook/dpr-reader-* or a copy.

    inputs: overrides what is stored. new_head: training starts here; a plain BERT will do, and the three
    outputs are drawn from torch's generator. Otherwise no weight may be missing.
    """
    path = str(path)
    stored = weights.read_inputs(path, "reader")
    if stored.get("role", "reader") != "reader" and not new_head:
        raise UserError(f"{path}: this is a {stored['role']} encoder; a reader is needed here")
    with weights.explain_load_errors(path):
        folder = weights.local_folder(path)
        config = AutoConfig.from_pretrained(folder)
        tokenizer = weights.load_tokenizer(folder)
        model = open_model(folder, config, new_head)
    weights.set_dropout(model, dropout)
    if not tokenizer.is_fast:
        fault = f"{type(tokenizer).__name__} is written in Python and does not tell where a token stands"
        raise UserError(
            f"{path}: {fault}, so no answer can be cut out; start from a model with tokenizer.json"
        )

    # how its inputs are built: as given, else as stored, else as DPR does
    how = {"role": "reader", "pair": ""} | DPR_READER
    for key in DPR_READER:
        how[key] = stored.get(key, how[key])
    if stored.get("role") == "reader":
        how["pair"] = stored.get("pair", "")
    reader = Reader(model, tokenizer, how | (inputs or {}))
    weights.check_sizes(path, model, tokenizer, reader.inputs["reader_tokens"], "tokens a passage")
    return reader


def open_model(path, config, new_head):
    """Return the DPRReader of a folder, or with new_head one on the weights of a plain BERT."""
    if config.model_type == "dpr":
        if config.architectures and "DPRReader" not in config.architectures:
            raise UserError(f"{path}: holds a {config.architectures[0]}; a reader is a DPRReader")
        return weights.load_complete(DPRReader, path)
    if not new_head:
        raise UserError(f"{path}: {config.model_type} without the reader's outputs; train_reader.py adds")
    if config.model_type != "bert":
        raise UserError(f"{path}: a reader starts from a BERT, this is a {config.model_type}")
    bert = weights.load_complete(AutoModel, path, add_pooling_layer=False)

    # the outputs are drawn from N(0, 0.02) (from: DPR dpr/models/reader.py:31-44)
    settings = config.to_diff_dict() | {"projection_dim": 0, "initializer_range": 0.02}
    for key in ("model_type", "architectures"):
        settings.pop(key, None)
    model = DPRReader(DPRConfig(**settings))
    model.span_predictor.encoder.bert_model.load_state_dict(bert.state_dict())
    return model


# ---------------------------------------------------------------- answers
@torch.no_grad()
def read(reader, ids, batch_size, autocast=nullcontext):
    """Return (start logits, end logits, relevance) of each id list in the given order, as numpy and float."""
    was_training = reader.training
    reader.eval()
    logits = [None] * len(ids)
    for places, batch in batches_by_length(reader, ids, batch_size):
        with autocast():
            outputs = reader(**batch)
        start_bL, end_bL, relevance_b = (output.cpu().numpy() for output in outputs)
        for i, place in enumerate(places):
            size = len(ids[place])  # the rest is padding
            logits[place] = (start_bL[i, :size], end_bL[i, :size], float(relevance_b[i]))
    reader.train(was_training)
    return logits


def best_spans(start_S, end_S, continues_S, max_answer_length, top_spans):
    """
    Return up to `top_spans` answers in the tokens of one passage: [(first, last, score)], best first.

    Both ends are included. The score is start plus end logit of a span of up to max_answer_length tokens. Of
    equal scores the earlier one wins. continues_S: whether a token is a piece of the word before it.
    """
    # the score of every span, by its first token and its width
    start_S, end_S = np.asarray(start_S), np.asarray(end_S)
    size = len(start_S)
    widths = min(max_answer_length, size)
    scores_SW = np.full((size, widths), -np.inf)
    for width in range(widths):
        scores_SW[: size - width, width] = start_S[: size - width] + end_S[width:]

    chosen = []
    for cell in np.argsort(-scores_SW, axis=None, kind="stable"):
        first, width = divmod(int(cell), widths)
        last = first + width
        score = float(scores_SW[first, width])
        if len(chosen) == top_spans or score == -np.inf:
            break
        # pass over what lies inside or around a better span
        if any(first <= a and b <= last or a <= first and last <= b for a, b, _ in chosen):
            continue
        # widen to whole words
        while first and continues_S[first]:
            first -= 1
        while last + 1 < size and continues_S[last + 1]:
            last += 1
        chosen.append((first, last, score))
    return chosen


def span_text(reader, passage, sequence, logits):
    """Return the best span of one passage as {"text", "score", "relevance_score", "passage"}."""
    ids, first = sequence
    start_L, end_L, relevance = logits
    continues_S = reader.continues_V[ids[first:]]
    (span,) = best_spans(start_L[first:], end_L[first:], continues_S, reader.max_answer_length, 1)
    begin, end, score = span

    # differs: DPR decodes the tokens, so that its answers are in lower case and "U.S." reads "u. s.". Under
    # transformers 5 "don't" would even be "don ' t", which exact match counts as wrong.
    text = passage.text.strip()
    tokens = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = tokens.offset_mapping
    answer = text[offsets[begin][0] : offsets[end][1]]
    return {"text": answer, "score": score, "relevance_score": relevance, "passage": text}


def to_read(reader, question, passages):
    """Return what predict() takes of a question: {"question", "passages", "sequences"}."""
    sequences = tokenize_rows(reader, question, passages)
    return {"question": question, "passages": passages, "sequences": sequences}


def predict(reader, questions, top_docs, batch_size, autocast=nullcontext):
    """
    Return one answer for every n of top_docs to each question, from the first n of its passages.

    The passage of highest relevance is taken, then the best span in it; the two scores are never added up
    (from: DPR train_extractive_reader.py:407-472). An answer is a dict of span_text() and "passage_idx", or
    None where no passage has any text. questions: of to_read(), best passage first.
    """
    ids = [ids for question in questions for ids, _ in question["sequences"]]
    logits = iter(read(reader, ids, batch_size, autocast))
    answers = []
    for question in questions:
        sequences = question["sequences"]
        logits_M = [next(logits) for _ in sequences]
        total = sum(start_L.sum() + end_L.sum() + relevance for start_L, end_L, relevance in logits_M)
        if not np.isfinite(total):
            fault = "the reader's logits are not finite"
            cause = "its weights are damaged, or too large for fp16 (then --mixed_precision no)"
            raise UserError(f"question {question['question']!r}: {fault}; {cause}")

        # the most relevant passage of the first n, of those that have any text left
        readable = [i for i, (ids, first) in enumerate(sequences) if len(ids) > first]
        best = []
        for n in top_docs:
            first_n = [i for i in readable if i < n]
            best.append(max(first_n, key=lambda i: logits_M[i][2], default=None))

        # the best span in each of these
        spans = {None: None}  # no passage to read, no answer
        for i in {*best} - {None}:
            passage = question["passages"][i]
            span = span_text(reader, passage, sequences[i], logits_M[i])
            spans[i] = span | {"passage_idx": i}
        answers.append([spans[i] for i in best])
    return answers


def answer_all(reader, examples, corpus, depths, batch_size, accelerator):
    """
    Return predict()'s answers to all examples, one for each of depths, from the passages of their "rows".

    The same on every device; each device answers its share.
    """

    def questions_of(block):
        questions = []
        for example in (examples[i] for i in block):
            passages = [corpus[row] for row in example["rows"].tolist()]
            questions.append(to_read(reader, example["question"], passages))
        return questions

    def answers_to(questions):
        return predict(reader, questions, depths, batch_size, accelerator.autocast)

    places = range(len(examples))
    answers = share_out(cut(places, BLOCK), questions_of, answers_to, "answers")
    return [answers[i] for i in places]


def answer_line(reader, question, passages, batch_size):
    """Return the best answer as ask.py prints it; "" where no passage has room beside the question."""
    questions = [to_read(reader, question, passages)]
    ((best,),) = predict(reader, questions, [len(passages)], batch_size)
    if not best:
        return ""
    i = best["passage_idx"]
    scores = f"span {best['score']:.3f} | relevance {best['relevance_score']:.3f}"
    return f"{best['text']} | {scores} | in dense {i + 1} | {passages[i].id} | {passages[i].title}"
