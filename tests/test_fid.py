"""FiD is plain T5 on each passage; its memory, its answers, its inputs, its folders."""

import json
from functools import partial

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
    document_log_likelihood,
    encode_contexts,
    fused_log_likelihood,
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return t5(tmp_path_factory.mktemp("fid"))


@pytest.fixture(scope="module")
def fid(folder):
    return load_fid(folder, {"reader_tokens": 48, "answer_tokens": 8}).eval()


def contexts(fid):
    """Of each question the id lists of its passages."""
    return [tokenize_contexts(fid, *pair) for pair in zip(QUESTIONS, PASSAGES, strict=True)]


def states(fid, rows, chunk=64, **how):
    """(hidden_BKLD, mask_BKL) of as many contexts for each question."""
    hidden_NLD, mask_NL = encode_contexts(fid, [ids for row in rows for ids in row], chunk, **how)
    return hidden_NLD.unflatten(0, (len(rows), -1)), mask_NL.unflatten(0, (len(rows), -1))


def gradients(fid, loss):
    fid.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in fid.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- likelihoods, against plain T5
@pytest.mark.parametrize("chunk", [1, 2])
def test_one_passage_is_plain_t5(fid, chunk):
    """K = 1, read alone or padded: the same loss as T5's own, and the same gradient of every weight."""
    labels_BT = tokenize_answers(fid, ANSWERS)
    rows = [row[:1] for row in contexts(fid)]
    log_BT = fused_log_likelihood(fid, *states(fid, rows, chunk), labels_BT)
    size = max(len(row[0]) for row in rows)
    ids = torch.tensor([row[0] + [0] * (size - len(row[0])) for row in rows])
    wanted = fid.model(input_ids=ids, attention_mask=ids != 0, labels=labels_BT).loss
    loss = -log_BT.sum() / (labels_BT != PAD).sum()
    assert log_BT.dtype == torch.float32 and torch.isclose(loss, wanted, atol=1e-5)
    ours, theirs = gradients(fid, loss), gradients(fid, wanted)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert ours.keys() == {name for name, _ in fid.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in ours.values()), "a weight that learns nothing"


def test_the_order_of_the_passages_does_not_matter(fid):
    """Turned round, the same likelihood; with another passage in one's place, another."""
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    log_BT = fused_log_likelihood(fid, *states(fid, rows), labels_BT)
    turned_BT = fused_log_likelihood(fid, *states(fid, [row[::-1] for row in rows]), labels_BT)
    other_BT = fused_log_likelihood(fid, *states(fid, [[row[0]] * 3 for row in rows]), labels_BT)
    assert torch.allclose(log_BT, turned_BT, atol=1e-5) and not torch.allclose(log_BT, other_BT, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 6, 100])
def test_each_passage_alone_is_plain_t5_without_padding(fid, chunk):
    """log_BKT, read and scored in chunks of any size: T5 on that context; 0 at PAD; no gradient."""
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    log_BKT = document_log_likelihood(fid, *states(fid, rows, chunk), labels_BT, chunk)
    assert log_BKT.shape == (2, 3, labels_BT.shape[1]) and log_BKT.dtype == torch.float32
    assert not log_BKT.requires_grad
    for b, row in enumerate(rows):
        real = labels_BT[b] != PAD
        assert (log_BKT[b][:, ~real] == 0).all()
        labels_1T = labels_BT[b : b + 1, real]
        logits = [fid.model(input_ids=torch.tensor([ids]), labels=labels_1T).logits for ids in row]
        wanted_KT = torch.cat([x.log_softmax(2).gather(2, labels_1T[:, :, None])[..., 0] for x in logits])
        assert torch.allclose(log_BKT[b][:, real], wanted_KT, atol=1e-4)
        assert wanted_KT.sum(1).unique().numel() == 3, "three passages must say three things"


# ---------------------------------------------------------------- memory and precision
def test_no_tensor_of_all_logits(tmp_path):
    """Only those of `chunk` passages exist at a time; backward keeps the softmax of [B, T, V], once."""
    fid = load_fid(t5(tmp_path, vocab_size=4096), {"reader_tokens": 24, "answer_tokens": 8})
    labels_BT, rows = tokenize_answers(fid, ["red " * 9, "the old bridge of oslo has a tower"]), contexts(fid)
    (B, T), V = labels_BT.shape, 4096
    assert (B, T) == (2, 8) and fid.model.config.d_model == 32  # all logits, 48 V, are more than any weight
    hidden_BKLD, mask_BKL = states(fid, rows, 2)
    for chunk, largest in ((1, 32 * V), (4, 32 * V), (5, 40 * V), (6, 48 * V)):
        with Largest() as seen:
            document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk)
        assert seen.numel == largest, f"{chunk} passages: the larger of the logits and the word embeddings"
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.add((x.data_ptr(), x.numel())) or x, lambda x: x
    ):
        fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT)
    assert [size for _, size in kept].count(B * T * V) == 1, "T5's own loss in addition would keep two"


def test_activation_checkpointing_changes_no_number(folder):
    """The same loss and gradients, with dropout and a pass without gradients before backward."""
    fid, results = load_fid(folder, {"reader_tokens": 48, "answer_tokens": 8}, 0.3).train(), []
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    for switched_on in (False, True):
        if switched_on:
            fid.model.activation_checkpointing_enable()
        torch.manual_seed(3)
        hidden_BKLD, mask_BKL = states(fid, rows, 2)
        loss = -fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT).sum()
        log_BKT = document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, 2)
        results.append((loss.detach(), log_BKT, gradients(fid, loss)))
    (loss, log_BKT, grads), (loss_too, log_too, grads_too) = results
    assert torch.equal(loss, loss_too) and torch.equal(log_BKT, log_too)
    assert all(torch.allclose(grads[name], grads_too[name], atol=1e-5) for name in grads)


def test_bf16_is_near_float32(fid):
    """Autocast on a CPU: float32 numbers come back, near those without it; the answers too are text."""
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    labels_BT, rows = tokenize_answers(fid, ANSWERS), contexts(fid)
    exact, rough = states(fid, rows), states(fid, rows, autocast=bf16)
    for score, chunk in ((fused_log_likelihood, []), (document_log_likelihood, [2])):
        wanted = score(fid, *exact, labels_BT, *chunk)
        got = score(fid, *rough, labels_BT, *chunk, autocast=bf16)
        assert got.dtype == torch.float32 and torch.allclose(got, wanted, atol=0.1)
        assert not torch.equal(got, wanted)
    assert all(isinstance(text, str) for text in answer(fid, rows, 2, bf16))


# ---------------------------------------------------------------- answers
def greedy(fid, rows):
    """The likeliest next token, one after the other, the whole decoder run again for each."""
    hidden_1KLD, mask_1KL = states(fid, [rows])
    seen = {"encoder_hidden_states": hidden_1KLD.flatten(1, 2)}
    seen["encoder_attention_mask"] = mask_1KL.flatten(1, 2)
    ids_1T = torch.full((1, 1), fid.model.config.decoder_start_token_id)
    for _ in range(fid.inputs["answer_tokens"]):
        hidden_1TD = fid.model.decoder(input_ids=ids_1T, **seen).last_hidden_state
        best_11 = fid.model.lm_head(hidden_1TD[:, -1:]).argmax(2)  # the scale of the output moves no maximum
        ids_1T = torch.cat([ids_1T, best_11], 1)
    ids = ids_1T[0, 1:].tolist()
    end = ids.index(1) if 1 in ids else len(ids)
    return fid.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def test_generated_answers_are_greedy(folder, tmp_path):
    """Whatever generation_config.json asks, whatever the mode, for questions with 1 and 3 passages."""
    fid = load_fid(folder, {"reader_tokens": 48, "answer_tokens": 6})
    torch.manual_seed(0)  # a random T5 repeats one word: another output, and more of what it reads, help
    fid.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(fid.model.lm_head.weight))
    for block in fid.model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4
    path = tmp_path / "talks"
    save_encoder(fid, path)
    asks = {"num_beams": 4, "do_sample": True, "min_new_tokens": 7, "max_length": 3}
    asks["repetition_penalty"] = 9.0
    config = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(config | asks))
    fid = load_fid(path, dropout=0.5)
    rows = [row[:n] for row, n in zip(contexts(fid), (3, 1), strict=True)]
    fid.eval()
    with torch.no_grad():
        first, second, alone = greedy(fid, rows[0]), greedy(fid, rows[1]), greedy(fid, rows[0][:1])
    fid.train()
    before = torch.get_rng_state()
    assert answer(fid, rows, 2) == [first, second] and fid.training
    assert answer(fid, [rows[0][:1], *rows], 9) == [alone, first, second]
    assert torch.equal(before, torch.get_rng_state()), "dropout was on"
    assert len({first, second, alone, ""}) == 4, "too little is said for a comparison"


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


# ---------------------------------------------------------------- disk
def test_what_is_written_is_read_again(tmp_path):
    """A T5 v1.1: its output is not its embedding, and tied again in silence it would be another reader."""
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


def test_lengths_and_dropout_are_those_asked_for(folder):
    """What is given prevails over the folder, everywhere: T5's attention keeps its rate as a plain number."""
    lengths = {"reader_tokens": 256, "answer_tokens": 32}
    plain = {"role": "fid", "pair": "", "token_types": "zeros"} | lengths
    assert load_fid(folder).inputs == plain
    assert load_fid(folder, {"reader_tokens": 99}).inputs == plain | {"reader_tokens": 99}
    for rate in (0.0, 0.5):
        fid = load_fid(folder, dropout=rate).train()
        rates = [getattr(m, "dropout", None) for m in fid.model.modules()]
        assert rates.count(rate) == 2 * 3, "the attention of two encoder and two decoder layers"
        rows = contexts(fid)
        assert torch.equal(states(fid, rows)[0], states(fid, rows)[0]) == (rate == 0.0)
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
        (tmp_path / "empty", "empty: not a complete model folder"),
        (world / "query_encoder", "query_encoder: this is a question encoder; a FiD reader .a T5. is needed"),
        (world / "bert", "bert: FiD reads with a T5, this is a bert"),
        (tmp_path / "half", r"half: \d+ weights are missing, such as decoder"),
        (tmp_path / "endless", "endless: config.json lacks one of decoder_start_token_id"),
        (tmp_path / "small", "small: 136 words in its tokenizer, but only 50 embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            load_fid(path)
