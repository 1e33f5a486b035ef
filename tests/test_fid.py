"""
FiD: a T5 that reads many passages is that T5 on one of them, on none of the padding, and in any order; what
it costs in memory; its inputs, letter by letter; and every door that could fail silently.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel, T5ForConditionalGeneration

from tests.saved import Largest
from tests.toy import make_world
from tests.toy_t5 import t5
from utils.corpus import Passage
from utils.fid import (
    PAD,
    answer,
    contexts_of,
    document_log_likelihood,
    encode_contexts,
    extend,
    fused_log_likelihood,
    generate,
    load_fid,
    text_budget,
    tokenize_answers,
    tokenize_contexts,
)
from utils.plumbing.config import UserError
from utils.plumbing.weights import encoder_hash, save_encoder

QUESTIONS = ["which colour has the river of paris", "where is the tower"]
PASSAGES = [
    [
        Passage("1", "paris", "the old river is red."),
        Passage("2", "", "it stands in oslo and in rome and was named the tower first"),
        Passage("3", "lima", ""),
    ],
    [
        Passage("4", "oslo", "green"),
        Passage("5", "rome", "the market , the garden"),
        Passage("6", "riga", "a bridge"),
    ],
]
ANSWERS = ["red", "in oslo and rome"]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5(tmp_path_factory.mktemp("fid"))


@pytest.fixture(scope="module")
def fid(folder):
    return load_fid(folder, {"reader_tokens": 48, "answer_tokens": 8}).eval()


def contexts(fid, questions=QUESTIONS, passages=PASSAGES):
    """Of each question the id lists of its passages."""
    return [tokenize_contexts(fid, *pair) for pair in zip(questions, passages, strict=True)]


def states(fid, rows, chunk=64, **how):
    """(hidden_BKLD, mask_BKL) of as many contexts for each question."""
    hidden_NLD, mask_NL = encode_contexts(fid, [ids for row in rows for ids in row], chunk, **how)
    return hidden_NLD.unflatten(0, (len(rows), -1)), mask_NL.unflatten(0, (len(rows), -1))


def log_by_t5(fid, ids, answer_ids):
    """log p of each answer token by a plain T5 on one context, nothing padded."""
    labels = torch.tensor([answer_ids])
    logits_1TV = fid.model(input_ids=torch.tensor([ids]), labels=labels).logits
    return logits_1TV.log_softmax(2).gather(2, labels[:, :, None])[0, :, 0]


def gradients(fid, loss):
    fid.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in fid.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- likelihoods, against plain T5
def test_one_passage_is_plain_t5(fid):
    """K = 1: the same loss as T5's own, and the same gradient of every weight."""
    labels_BT = tokenize_answers(fid, ANSWERS)
    rows = [row[:1] for row in contexts(fid)]
    mine = fused_log_likelihood(fid, *states(fid, rows, 1), labels_BT)
    size = max(len(row[0]) for row in rows)
    ids = torch.tensor([row[0] + [0] * (size - len(row[0])) for row in rows])
    wanted = fid.model(input_ids=ids, attention_mask=ids != 0, labels=labels_BT).loss
    loss = -mine.sum() / (labels_BT != PAD).sum()
    assert mine.dtype == torch.float32 and torch.isclose(loss, wanted, atol=1e-5)
    mine, theirs = gradients(fid, loss), gradients(fid, wanted)
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in theirs)
    assert mine.keys() == {name for name, _ in fid.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in mine.values()), "a weight that learns nothing"


def test_the_order_of_the_passages_does_not_matter(fid):
    """Turned round, the same likelihood; with another passage in one's place, another."""
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    one = fused_log_likelihood(fid, *states(fid, rows), labels_BT)
    turned = fused_log_likelihood(fid, *states(fid, [row[::-1] for row in rows]), labels_BT)
    other = fused_log_likelihood(fid, *states(fid, [[row[0]] * 3 for row in rows]), labels_BT)
    assert torch.allclose(one, turned, atol=1e-5) and not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 6, 100])
def test_each_passage_alone_is_plain_t5_without_padding(fid, chunk):
    """log_BKT, in chunks of any size: T5 on that context; 0 at PAD; no gradient."""
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    log_BKT = document_log_likelihood(fid, *states(fid, rows), labels_BT, chunk)
    assert log_BKT.shape == (2, 3, labels_BT.shape[1]) and log_BKT.dtype == torch.float32
    assert not log_BKT.requires_grad
    for b, row in enumerate(rows):
        real = labels_BT[b] != PAD
        assert (log_BKT[b][:, ~real] == 0).all()
        wanted_KT = torch.stack([log_by_t5(fid, ids, labels_BT[b, real].tolist()) for ids in row])
        assert torch.allclose(log_BKT[b][:, real], wanted_KT, atol=1e-4)
        assert wanted_KT.sum(1).unique().numel() == 3, "three passages must say three things"


@pytest.mark.parametrize("autocast", [None, bf16])
def test_a_passage_that_is_not_there_changes_nothing(fid, autocast):
    """
    An empty list in the place of a context: likelihoods, answer and gradient are those without it, nothing is
    NaN, and its own likelihood is 0.
    """
    how, close = ({"autocast": autocast}, 0.05) if autocast else ({}, 1e-5)
    labels_BT, rows = tokenize_answers(fid, ANSWERS), [row[:2] for row in contexts(fid)]
    padded = [[row[0], [], row[1], []] for row in rows]
    found = []
    for some in (rows, padded):
        hidden_BKLD, mask_BKL = states(fid, some, **how)
        fused_BT = fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, **how)
        log_BKT = document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, 2, **how)
        text = generate(fid, hidden_BKLD, mask_BKL, **how)
        found.append((fused_BT, log_BKT, text, gradients(fid, -fused_BT.sum())))
    (fused, log, text, grads), (fused_too, log_too, text_too, grads_too) = found
    assert torch.allclose(fused, fused_too, atol=close) and text == text_too
    assert torch.allclose(log, log_too[:, [0, 2]], atol=close) and (log_too[:, [1, 3]] == 0).all()
    for name, grad in grads.items():
        assert torch.isfinite(grad).all() and torch.allclose(grad, grads_too[name], atol=10 * close), name


def test_a_question_without_any_passage_is_finite(fid):
    """Nothing to look at is no reason for NaN beside questions that have passages."""
    rows = [contexts(fid)[0], [[], [], []]]
    hidden_BKLD, mask_BKL = states(fid, rows)
    labels_BT = tokenize_answers(fid, ANSWERS)
    fused_BT = fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)
    alone_1T = fused_log_likelihood(fid, hidden_BKLD[:1], mask_BKL[:1], labels_BT[:1])
    assert torch.isfinite(fused_BT).all() and torch.allclose(fused_BT[:1], alone_1T, atol=1e-5)
    assert all(torch.isfinite(grad).all() for grad in gradients(fid, fused_BT.sum()).values())
    assert len(generate(fid, hidden_BKLD, mask_BKL)) == 2


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_states_and_gradients_for_any_chunk(fid, chunk):
    """Read in sorted chunks and put back: the states of each context read alone, and the same gradient."""
    ids = [ids for row in contexts(fid) for ids in row] + [[]]
    hidden_NLD, mask_NL = encode_contexts(fid, ids, chunk)
    assert mask_NL.sum(1).tolist() == [len(one) for one in ids] and mask_NL.shape[1] == max(map(len, ids))
    for one, hidden_LD in zip(ids[:-1], hidden_NLD, strict=False):
        wanted_LD = fid.model.encoder(input_ids=torch.tensor([one])).last_hidden_state[0]
        assert torch.allclose(hidden_LD[: len(one)], wanted_LD, atol=1e-5)
    real_NLD = mask_NL[:, :, None] * torch.randn(hidden_NLD.shape, generator=torch.manual_seed(0))
    whole_NLD, _ = encode_contexts(fid, ids, len(ids))
    mine, wanted = (gradients(fid, (real_NLD * x_NLD).sum()) for x_NLD in (hidden_NLD, whole_NLD))
    assert len(mine) == len(wanted) == len([*fid.model.encoder.parameters()])
    for name in mine:
        assert torch.allclose(mine[name], wanted[name], atol=1e-4), name


# ---------------------------------------------------------------- memory and precision
def test_no_tensor_of_all_logits(tmp_path):
    """
    B*K*T*V logits, 1.6 GB in EMDR2 as it was published, are nowhere while a step is taken: `chunk` passages'
    are the largest. Scored all at once they would be there, and this test would see it.
    """
    fid = load_fid(t5(tmp_path, vocab_size=8192), {"reader_tokens": 24, "answer_tokens": 8})
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    (B, T), K, V = labels_BT.shape, 3, 8192
    for chunk, wanted in ((1, B * T * V), (2, B * T * V), (B * K, B * K * T * V)):
        with Largest() as seen:
            hidden_BKLD, mask_BKL = states(fid, rows, 2)
            fused_BT = fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)
            document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk)
            if chunk < B * K:
                fused_BT.sum().backward()
        weights = V * fid.model.config.d_model
        assert seen.numel == max(wanted, weights), (chunk, seen.numel)


def test_the_loss_needs_one_copy_of_the_logits(tmp_path):
    """What backward keeps: the softmax of [B, T, V], once; T5's own loss beside ours would keep two."""
    fid = load_fid(t5(tmp_path, vocab_size=8192), {"reader_tokens": 24, "answer_tokens": 8})
    labels_BT = tokenize_answers(fid, ANSWERS)
    hidden_BKLD, mask_BKL = states(fid, contexts(fid))
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.add((x.data_ptr(), x.numel())) or x, lambda x: x
    ):
        fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)
    assert [size for _, size in kept].count(labels_BT.numel() * 8192) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_number(folder, dropout):
    """The same loss and gradients, also with dropout, and with a pass without gradients before backward."""
    fid, found = load_fid(folder, {"reader_tokens": 48, "answer_tokens": 8}, dropout).train(), []
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    for switched_on in (False, True):
        if switched_on:
            fid.model.activation_checkpointing_enable()
        torch.manual_seed(3)
        hidden_BKLD, mask_BKL = states(fid, rows, 2)
        loss = -fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT).sum()
        log_BKT = document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, 2)
        found.append((loss.detach(), log_BKT, gradients(fid, loss)))
    (loss, log_BKT, grads), (loss_too, log_too, grads_too) = found
    assert torch.equal(loss, loss_too) and torch.equal(log_BKT, log_too)
    # without dropout, another kernel of attention may compute the backward pass
    assert all(torch.allclose(grads[name], grads_too[name], atol=1e-5) for name in grads)


def test_bf16_is_near_float32(fid):
    """Autocast on a CPU: float32 numbers come back, near those without it; the answers too are text."""
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    exact, rough = states(fid, rows), states(fid, rows, autocast=bf16)
    wanted = fused_log_likelihood(fid, *exact, labels_BT)
    got = fused_log_likelihood(fid, *rough, labels_BT, autocast=bf16)
    assert (
        got.dtype == torch.float32 and torch.allclose(got, wanted, atol=0.1) and not torch.equal(got, wanted)
    )
    wanted = document_log_likelihood(fid, *exact, labels_BT, 2)
    got = document_log_likelihood(fid, *rough, labels_BT, 2, autocast=bf16)
    assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=0.1)
    assert all(isinstance(text, str) for text in answer(fid, rows, 2, bf16))


# ---------------------------------------------------------------- answers
def greedy(fid, hidden_BKLD, mask_BKL):
    """Ids of the likeliest next token, one after the other, the whole decoder run again for each."""
    ids_BT = torch.full((len(hidden_BKLD), 1), fid.model.config.decoder_start_token_id)
    for _ in range(fid.inputs["answer_tokens"]):
        hidden_BTD = fid.model.decoder(
            input_ids=ids_BT,
            encoder_hidden_states=hidden_BKLD.flatten(1, 2),
            encoder_attention_mask=mask_BKL.flatten(1, 2),
        ).last_hidden_state
        best_B1 = fid.model.lm_head(hidden_BTD[:, -1:]).argmax(2)  # the scale of the output moves no maximum
        ids_BT = torch.cat([ids_BT, best_B1], 1)
    texts = []
    for ids in ids_BT[:, 1:].tolist():
        end = ids.index(1) if 1 in ids else len(ids)
        texts.append(fid.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
    return texts


def test_generated_answers_are_greedy(folder, tmp_path):
    """
    Token by token the likeliest, of all passages at once, whatever a folder's generation_config.json asks,
    whatever the mode, and for questions of different numbers of passages.
    """
    fid = load_fid(folder, {"reader_tokens": 48, "answer_tokens": 6})
    torch.manual_seed(0)  # a random T5 repeats one word: another output, and more of what it reads, help
    fid.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(fid.model.lm_head.weight))
    for block in fid.model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4
    path = tmp_path / "talks"
    save_encoder(fid, path)
    asks = {
        "num_beams": 4,
        "do_sample": True,
        "min_new_tokens": 7,
        "max_length": 3,
        "repetition_penalty": 9.0,
    }
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | asks))
    fid = load_fid(path, dropout=0.5)
    rows = [row[:n] for row, n in zip(contexts(fid), (3, 1), strict=True)]
    fid.eval()
    with torch.no_grad():
        read = [states(fid, [row]) for row in (*rows, rows[0][:1])]
        first, second, alone = (greedy(fid, *one) for one in read)
    fid.train()
    before = torch.get_rng_state()
    assert generate(fid, *read[0]) == first and fid.training
    assert answer(fid, rows, 2) == first + second and fid.training
    assert torch.equal(before, torch.get_rng_state()), "dropout was on"
    assert len({*first, *second, *alone, ""}) == 4, "too little is said for a comparison"


# ---------------------------------------------------------------- inputs
def test_contexts_letter_by_letter(fid):
    """FiD's layout, </s> at the end; an empty title, an empty text, and the mask of a salient span."""
    rows = tokenize_contexts(fid, "who [MASK] in paris", PASSAGES[0])
    assert [fid.tokenizer.convert_ids_to_tokens(ids) for ids in rows[:3:2]] == [
        f"▁question: ▁ w h o <extra_id_0> ▁in ▁paris {rest} </s>".split()
        for rest in ("▁title: ▁paris ▁context: ▁the ▁old ▁river ▁is ▁red .", "▁title: ▁lima ▁context:")
    ]
    bare = tokenize_contexts(fid, "the garden", [Passage("", "", "  new  river ")])
    wanted = "▁question: ▁the ▁garden ▁title: ▁context: ▁new ▁river </s>".split()
    assert fid.tokenizer.convert_ids_to_tokens(bare[0]) == wanted
    assert tokenize_contexts(fid, "the garden", []) == []


@pytest.mark.parametrize("length", [3, 7, 8, 9, 15, 16, 40])
def test_the_end_of_the_text_is_cut_and_the_question_is_not(folder, length):
    """The first tokens of the whole input, then </s>, in no more than reader_tokens."""
    fid, whole = (load_fid(folder, {"reader_tokens": size}) for size in (length, 400))
    pair = "where in oslo", [Passage("", "rome", "the tower . the bridge of the market")]
    (ids,), (full,) = tokenize_contexts(fid, *pair), tokenize_contexts(whole, *pair)
    assert len(full) == 16 and ids[-1] == full[-1] == 1
    assert len(ids) == min(length, len(full)) and ids[:-1] == full[: len(ids) - 1]
    room = text_budget(fid, pair[0], "rome")
    assert room == length - 1 - full.index(fid.tokenizer.convert_tokens_to_ids("▁context:")) - 1


def test_a_question_longer_than_the_reader_is_cut_and_read(fid):
    """500 words: the first that fit, </s>, an answer; nothing is left for the text."""
    question = "the river " * 250
    rows = tokenize_contexts(fid, question, PASSAGES[0])
    assert [len(ids) for ids in rows] == [48] * 3 and len({*map(tuple, rows)}) == 1
    assert text_budget(fid, question, "") < 0 and len(answer(fid, [rows], 2)) == 1


def test_answers_as_labels(fid):
    """</s> counts, PAD does not; what is too long keeps answer_tokens - 1 and </s>; an empty one is </s>."""
    labels_BT = tokenize_answers(fid, ["red", "red " * 30, "", "the old bridge of oslo has a tower"])
    red, end = fid.tokenizer.convert_tokens_to_ids("▁red"), fid.tokenizer.eos_token_id
    assert labels_BT.dtype == torch.int64 and labels_BT.shape == (4, 8)
    assert labels_BT[0].tolist() == [red, end, *[PAD] * 6] and labels_BT[1].tolist() == [red] * 7 + [end]
    assert labels_BT[2].tolist() == [end, *[PAD] * 7]
    assert fid.tokenizer.decode(labels_BT[3].tolist()) == "the old bridge of oslo has a</s>"
    row = contexts(fid)[:1] * 4
    log_BT = fused_log_likelihood(fid, *states(fid, row), labels_BT)
    assert (log_BT[labels_BT == PAD] == 0).all() and (log_BT[labels_BT != PAD] < 0).all()
    for b in (0, 2):  # a pad behind must not change what stands before it
        alone = fused_log_likelihood(fid, *states(fid, row[:1]), labels_BT[b : b + 1, : 2 - b // 2])
        assert torch.allclose(log_BT[b, : 2 - b // 2], alone[0], atol=1e-5)


# ---------------------------------------------------------------- neighbours
def article(*texts, title="paris"):
    return [Passage(str(i), title, text) for i, text in enumerate(texts)]


ONE, TWO, THREE, FOUR = (
    "the river is red",
    "the tower is old and green",
    "a bridge in oslo",
    "it was named rome",
)


@pytest.mark.parametrize(
    "corpus, row, budget, wanted",
    [
        # the first: text, then the beginning of the two that follow
        (article(ONE, TWO, THREE), 0, 6, "the river is red the tower"),
        (article(ONE, TWO, THREE), 0, 12, "the river is red the tower is old and green a bridge"),
        (article(ONE, TWO, THREE), 0, 99, f"{ONE} {TWO} {THREE}"),
        (article(ONE, TWO, THREE, FOUR), 0, 99, f"{ONE} {TWO} {THREE}"),
        # the last: the end of the two before, then text
        (article(ONE, TWO, THREE), 2, 6, "and green a bridge in oslo"),
        (article(ONE, TWO, THREE), 2, 12, "is red the tower is old and green a bridge in oslo"),
        (article(ONE, TWO, THREE, FOUR), 3, 99, f"{TWO} {THREE} {FOUR}"),
        # in between: what comes before has priority, what follows gets the rest
        (article(ONE, TWO, THREE), 1, 8, "is red the tower is old and green"),
        (article(ONE, TWO, THREE), 1, 10, "the river is red the tower is old and green"),
        (article(ONE, TWO, THREE), 1, 12, "the river is red the tower is old and green a bridge"),
        (article(ONE, TWO, THREE, FOUR), 2, 99, f"{TWO} {THREE} {FOUR}"),
        # two paragraphs: each has the other (the reference gives the second nothing)
        (article(ONE, TWO), 0, 6, "the river is red the tower"),
        (article(ONE, TWO), 1, 8, "is red the tower is old and green"),
        # alone in its article, or its neighbours are of another, or there are no titles
        (article(ONE), 0, 99, ONE),
        (article(ONE) + article(TWO, title="rome") + article(THREE), 1, 99, TWO),
        (article(ONE) + article(TWO, title="rome") + article(THREE), 2, 99, THREE),
        (article(ONE, TWO, THREE, title=""), 1, 99, TWO),
        # full, or more than full
        (article(ONE, TWO, THREE), 1, 6, TWO),
        (article(ONE, TWO, THREE), 1, 2, TWO),
        (article(ONE, TWO, THREE), 1, -3, TWO),
        # a word of nine pieces is taken whole or not at all; what it leaves is for what follows
        (article("red zanzibar", TWO, THREE), 1, 14, f"{TWO} {THREE}"),
        (article("red zanzibar", TWO, THREE), 1, 15, f"zanzibar {TWO}"),
        (article("zanzibar red", TWO, THREE), 1, 9, f"red {TWO} a bridge"),
        (article("", ONE, ""), 1, 99, ONE),
    ],
)
def test_extended_by_hand(fid, corpus, row, budget, wanted):
    """Every place in an article, every budget: the text, and nothing else of the passage, changes."""
    assert extend(corpus, row, fid, budget) == corpus[row]._replace(text=wanted)


def test_extended_fills_the_reader_to_the_last_token(folder):
    """
    Random articles in letters and words: beside question and title not a token too many, and not a word too
    few: the text is a piece of the article, and the next word on either side would not fit.
    """
    rng, words = np.random.default_rng(0), "the red tower zanzibar xy , of oslo q".split()
    fid, full = load_fid(folder, {"reader_tokens": 48}), 0

    def count(text):
        return len(fid.tokenizer(text, add_special_tokens=False).input_ids)

    for _ in range(60):
        texts = [" ".join(rng.choice(words, rng.integers(1, 13))) for _ in range(rng.integers(1, 6))]
        corpus, row = article(*texts), int(rng.integers(len(texts)))
        question = " ".join(rng.choice(words, rng.integers(1, 6)))
        budget = text_budget(fid, question, "paris")
        got = extend(corpus, row, fid, budget)
        (ids,) = tokenize_contexts(fid, question, [got])
        assert len(ids) == min(48, 48 - budget + count(got.text))
        begin, end = row - (2 if row == len(texts) - 1 else 1), row + (3 if row == 0 else 2)
        before = " ".join(texts[max(0, begin) : row]).split()
        after = " ".join(texts[row + 1 : end]).split()
        taken = next(
            (a, b)
            for a in range(len(before) + 1)
            for b in range(len(after), -1, -1)
            if " ".join([*before[a:], texts[row], *after[:b]]) == got.text
        )
        assert taken[0] == 0 or count(" ".join([*before[taken[0] - 1 :], texts[row]])) > budget
        assert taken[1] == len(after) or count(f"{got.text} {after[taken[1]]}") > budget
        full += count(got.text) == budget
    assert full > 5, "the budget was never the limit"


@pytest.mark.parametrize("neighbors", [False, True])
def test_a_reader_of_neighbors_says_so_itself(folder, neighbors):
    """contexts_of extends each passage by its own budget, or not at all, as encoder_inputs.json says."""
    fid = load_fid(folder, {"reader_tokens": 24, "neighbors": neighbors})
    corpus = article(ONE, TWO, THREE) + article(FOUR, title="the market of rome")
    rows = [2, 0, 3]
    texts = [
        f"river is red {TWO} {THREE}" if neighbors else THREE,
        f"{ONE} {TWO} a bridge in" if neighbors else ONE,
        FOUR,
    ]
    wanted = [corpus[row]._replace(text=text) for row, text in zip(rows, texts, strict=True)]
    got = contexts_of("where is the garden in tokyo", [corpus[row] for row in rows], rows, corpus, fid)
    assert got == tokenize_contexts(fid, "where is the garden in tokyo", wanted)


# ---------------------------------------------------------------- disk
def test_what_is_written_is_read_again(tmp_path):
    """
    Weights, tokenizer and lengths of a T5 v1.1 (gated, its output not the embedding): the same reader after
    save and load, twice, and the same plain T5 for Hugging Face. One tied again in silence would be another.
    """
    path = t5(tmp_path, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    fid = load_fid(path, {"reader_tokens": 30, "answer_tokens": 5})
    torch.manual_seed(1)
    fid.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(fid.model.lm_head.weight))
    fid.inputs["pair"] = "abc-7"
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    wanted = fused_log_likelihood(fid, *states(fid, rows), labels_BT)
    again = fid
    for name in ("once", "twice"):
        save_encoder(again, tmp_path / name)
        again = load_fid(tmp_path / name)
        assert again.inputs == fid.inputs and encoder_hash(again) == encoder_hash(fid)
        assert torch.equal(fused_log_likelihood(again, *states(again, rows), labels_BT), wanted)
        assert contexts(again) == rows and answer(again, rows, 2) == answer(fid, rows, 2)
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "twice")
    ids = AutoTokenizer.from_pretrained(tmp_path / "twice")(["the old river"], return_tensors="pt").input_ids
    assert ids.tolist()[0][-1] == 1
    assert torch.equal(plain(ids, labels=labels_BT[:1]).loss, fid.model(ids, labels=labels_BT[:1]).loss)


def test_lengths_of_a_plain_t5_and_their_override(folder):
    """A folder without encoder_inputs.json has EMDR2's lengths; what is given prevails."""
    known = {"role": "fid", "pair": "", "reader_tokens": 256, "answer_tokens": 32, "neighbors": False}
    known["token_types"] = "zeros"
    assert load_fid(folder).inputs == known
    assert load_fid(folder, {"reader_tokens": 99}).inputs == known | {"reader_tokens": 99}


def test_dropout_is_that_asked_for(folder):
    """0 although the folder says 0.1, and 0.5 everywhere: T5's attention keeps its rate as a plain number."""
    for rate in (0.0, 0.5):
        fid = load_fid(folder, dropout=rate).train()
        rates = [getattr(m, "dropout", None) for m in fid.model.modules()]
        assert rates.count(rate) == 2 * 3, "the attention of two encoder and two decoder layers"
        rows = contexts(fid)
        one, two = states(fid, rows)[0], states(fid, rows)[0]
        assert torch.equal(one, two) == (rate == 0.0)
    for module in fid.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(states(fid, rows)[0], states(fid, rows)[0]), "none in the attention"


def test_mistakes_are_one_line(folder, tmp_path):
    """Each names the path, what is wrong there, and what belongs there."""
    world = make_world(tmp_path / "world")
    t5(tmp_path, name="small", vocab_size=50)
    T5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "half")
    endless = t5(tmp_path, name="endless") / "config.json"
    endless.write_text(endless.read_text().replace('"decoder_start_token_id": 0,', ""))
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "no", "no: no such reader folder"),
        (tmp_path / "empty", "empty: neither a complete local folder nor reachable"),
        (world / "query_encoder", "query_encoder: this is a question encoder; a FiD reader .a T5. is needed"),
        (world / "bert", "bert: FiD reads with a T5, this is a bert"),
        (tmp_path / "half", r"half: \d+ weights are missing, such as decoder"),
        (tmp_path / "endless", "endless: config.json lacks one of decoder_start_token_id"),
        (tmp_path / "small", "small: 136 words in its tokenizer, but only 50 embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            load_fid(path)
