"""EMDR2 against its golden numbers, plain enumeration, Hugging Face's RAG and plain T5."""

import itertools
import math
import os
import signal
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from tests.processes import ENVIRONMENT, begin, flags, kill_tree, main, on_devices
from tests.processes import rows as rows_of
from tests.saved import Saved
from tests.test_live_index import make_embeddings, make_run
from tests.toy import ACCELERATOR, CITIES, COLOURS, THINGS, close, golden_file, make_world, write_lines
from tests.toy_t5 import t5
from train_emdr2 import add_gradient, draw_questions, evaluate, kl_loss, load_questions, retriever_loss
from utils.corpus import Passage
from utils.data import Corpus
from utils.encoder import collate, tokenize_passages, tokenize_questions, vectors_with_graph
from utils.fid import encode_contexts, fused_log_likelihood, load_fid, tokenize_answers, tokenize_contexts
from utils.live_index import LiveIndex
from utils.plumbing.config import ROOT, UserError, load_config
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import read_json
from utils.plumbing.weights import TOWERS, load_encoder, pair_id, save_encoder


# ---------------------------------------------------------------- a world in which reading needs finding
def keys(world, run_dir, **changes):
    """The command-line keys of a toy run; the world has a T5 in t5/ and vectors in embeddings/."""
    files = {key: world / f"{key}.jsonl" for key in ("train", "dev")} | {"corpus": world / "corpus.tsv"}
    files |= {key: world / key for key in ("query_encoder", "doc_encoder", "embeddings")}
    files |= {"reader": world / "t5", "run_dir": run_dir}
    sizes = {"top_k": 4, "reader_tokens": 48, "answer_tokens": 6, "batch_size": 6, "question_chunk": 4}
    sizes |= {"passage_chunk": 5, "score_chunk": 3, "encoding_batch_size": 7, "eval_batch_size": 8}
    steps = {"epochs": 24, "learning_rate": 3e-5, "retriever_lr_scale": 30, "refresh_every": 10}
    steps |= {"eval_every": 24, "save_every": 7, "log_every": 1, "temperature": 0.0}
    return files | sizes | steps | {"mixed_precision": "no", "gradient_checkpointing": False} | changes


def warm_reader(path, out):
    """A T5 that copies the colour out of a passage about anything, so that it knows no fact by heart."""
    fid = load_fid(path, {"reader_tokens": 48, "answer_tokens": 4})
    optimizer, draws = torch.optim.Adam(fid.parameters(), 3e-3), np.random.default_rng(0)
    for _ in range(110):
        ids, answers = [], []
        drawn = (draws.choice(words, 16) for words in (THINGS, CITIES, COLOURS))
        for thing, city, colour in zip(*drawn, strict=True):
            passage = Passage("", city, f"the {thing} of {city} is {colour} and it stands in {city}.")
            ids += tokenize_contexts(fid, f"which colour has the {thing} of {city}", [passage])
            answers.append(str(colour))
        labels_BT = tokenize_answers(fid, answers)
        hidden_NLD, mask_NL = encode_contexts(fid, ids, 99)
        (-fused_log_likelihood(fid, hidden_NLD[:, None], mask_NL[:, None], labels_BT).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_encoder(fid, out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """
    Three passages about each of twelve cities, one of them tells a colour, and a question asks for it.

    t5 reads. query_encoder, doc_encoder: the right passage is among the first, seldom first. random_*: not.
    """
    folder = make_world(tmp_path_factory.mktemp("world"))
    rows, questions = [], []
    for i, city in enumerate(CITIES):
        for j in range(3):
            if j == i % 3:
                thing, colour = THINGS[i % 5], COLOURS[i % 5]
                rows.append((city, f"the {thing} of {city} is {colour} and it stands in {city}."))
                asked = f"which colour has the {thing} of {city}"
                question = {"qid": f"q{i}", "question": asked, "answers": [colour]}
                questions.append(question | {"positives": [str(len(rows))]})
            else:
                first, second = THINGS[(i + j + 1) % 5], THINGS[(i + 2 * j + 2) % 5]
                rows.append((city, f"it was the {first} of {city} and it has a new {second}."))
    lines = "".join(f"{n}\t{text}\t{city}\n" for n, (city, text) in enumerate(rows, 1))
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + lines)
    for name in ("train", "dev"):
        write_lines(folder / f"{name}.jsonl", questions)
    corpus = Corpus(folder / "corpus.tsv")
    warm_reader(t5(folder, name="random_t5"), folder / "t5")

    encoders = {}
    for name, role in TOWERS.items():
        (folder / name).rename(folder / f"random_{name}")
        encoders[name] = load_encoder(folder / f"random_{name}", role)
    query, doc = encoders.values()
    question_ids = tokenize_questions(query, [question["question"] for question in questions])
    passage_ids = tokenize_passages(doc, list(corpus))
    gold_Q = torch.tensor([corpus.row(question["positives"][0]) for question in questions])
    weights = [*query.parameters(), *doc.parameters()]
    optimizer = torch.optim.Adam(weights, 3e-3)
    for _ in range(22):
        q_QD = vectors_with_graph(query, question_ids, 99, nullcontext)
        p_ND = vectors_with_graph(doc, passage_ids, 99, nullcontext)
        cross_entropy(q_QD @ p_ND.T / math.sqrt(32), gold_Q).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, encoder in encoders.items():
        encoder.inputs["pair"] = "warm"
        save_encoder(encoder, folder / name)
    make_embeddings(folder / "doc_encoder", folder / "corpus.tsv", folder / "embeddings")
    return folder


def parts(world, **changes):
    """(cfg, training questions, corpus, models, index) as main() has them before the first step."""
    cfg = load_config("", "config/train_emdr2_nq.yaml", flags(keys(world, world / "run", **changes)))
    corpus = Corpus(cfg.corpus)
    lengths = {"reader_tokens": cfg.reader_tokens, "answer_tokens": cfg.answer_tokens}
    models = {"reader": load_fid(cfg.reader, lengths, cfg.dropout).train()}
    for name, role in TOWERS.items():
        models[name] = load_encoder(getattr(cfg, name), role, dropout=cfg.dropout).train()
    train, _ = load_questions(cfg.train, corpus)
    return cfg, train, corpus, models, LiveIndex(corpus, make_run(world / "run"), cfg)


# ---------------------------------------------------------------- the loss
def random_case(seed=0, B=3, K=4, T=3, V=2):
    """(scores_BK with a gradient, log-probabilities_BKTV, labels_BT, mask_BT), float64; some tokens pads."""
    torch.manual_seed(seed)
    scores_BK = torch.randn(B, K, dtype=torch.float64, requires_grad=True)
    log_BKTV = (2 * torch.randn(B, K, T, V, dtype=torch.float64)).log_softmax(3)
    labels_BT = torch.randint(V, (B, T))
    mask_BT = torch.arange(T) < torch.tensor([T, 1, 2])[:B, None]
    return scores_BK, log_BKTV, labels_BT, mask_BT


def of_labels(log_BKTV, labels_BT):
    """log p of the labels, log_BKT."""
    return log_BKTV.gather(3, labels_BT[:, None, :, None].expand(-1, log_BKTV.shape[1], -1, -1))[..., 0]


def test_losses_and_gradients_equal_the_reference():
    """All golden cases: token (released code), sequence (the paper), kl; pads hold what they like."""
    cases = golden_file("emdr2_loss")["cases"]
    assert len(cases) == 6
    for case in cases:
        for name in ("token", "sequence", "kl"):
            scores_BK = torch.tensor(case["scores"], dtype=torch.float64, requires_grad=True)
            log_BKT = torch.tensor(case["log_likelihood"], dtype=torch.float64)
            mask_BT = torch.tensor(case["mask"])
            prior_BK = scores_BK.log_softmax(1)
            if name == "kl":
                loss = kl_loss(prior_BK, log_BKT, mask_BT)
                mean_BK = (log_BKT * mask_BT[:, None]).sum(2) / mask_BT.sum(1, keepdim=True)
                wanted_BK = (prior_BK.exp() - mean_BK.softmax(1)) / len(mean_BK)  # of a cross-entropy
            else:
                loss = retriever_loss(prior_BK, log_BKT, mask_BT, name)
                wanted_BK = torch.tensor(case[f"grad_scores_{name}"], dtype=torch.float64)
            assert abs(loss.item() - case[f"loss_{name}"]) < 1e-5, name
            loss.backward()
            assert torch.allclose(scores_BK.grad, wanted_BK, atol=1e-5), name


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_marginal_is_the_probability_of_the_answer(marginal):
    """
    Plain loops over passages and tokens; and summed over all answers that there are, the probabilities are 1.
    """
    scores_BK, log_BKTV, labels_BT, mask_BT = random_case()
    prior_BK, p_BKTV, log_prior_BK = scores_BK.softmax(1), log_BKTV.exp(), scores_BK.log_softmax(1)

    def probability(b, answer):
        if marginal == "sequence":
            by_passage = []
            for k in range(4):
                by_token = [p_BKTV[b, k, t, a] for t, a in enumerate(answer)]
                by_passage.append(prior_BK[b, k] * math.prod(by_token))
            return sum(by_passage)
        tokens = [sum(prior_BK[b, k] * p_BKTV[b, k, t, a] for k in range(4)) for t, a in enumerate(answer)]
        return math.prod(tokens)

    answers = [labels_BT[b, : mask_BT[b].sum()].tolist() for b in range(3)]
    wanted = -sum(math.log(float(probability(b, answer).detach())) for b, answer in enumerate(answers))
    wanted /= 6 if marginal == "token" else 3
    got = retriever_loss(log_prior_BK, of_labels(log_BKTV, labels_BT), mask_BT, marginal)
    assert abs(got.item() - wanted) < 1e-9
    total = 0.0
    for answer in itertools.product(range(2), repeat=3):
        log_BKT = of_labels(log_BKTV[:1], torch.tensor([answer]))
        cost = retriever_loss(log_prior_BK[:1], log_BKT, torch.ones(1, 3), marginal).item()
        total += math.exp(-cost * (3 if marginal == "token" else 1))
    assert abs(total - 1) < 1e-9


def test_the_gradient_is_prior_minus_posterior():
    """The identity that the method is about; the token form averages the posteriors of the tokens."""
    for seed in range(20):
        scores_BK, log_BKTV, labels_BT, mask_BT = random_case(seed)
        log_BKT = of_labels(log_BKTV, labels_BT) * mask_BT[:, None]
        prior_BK, log_prior_BK = scores_BK.softmax(1).detach(), scores_BK.log_softmax(1)
        by_token_BKT = (log_prior_BK[:, :, None] + log_BKT).softmax(1)
        means_BK = (by_token_BKT * mask_BT[:, None]).sum(2) / mask_BT.sum(1, keepdim=True)
        posteriors = {"sequence": (log_prior_BK + log_BKT.sum(2)).softmax(1), "token": means_BK}
        shares = {"sequence": 1 / 3, "token": mask_BT.sum(1, keepdim=True) / mask_BT.sum()}
        for marginal, posterior_BK in posteriors.items():
            loss = retriever_loss(log_prior_BK, log_BKT, mask_BT, marginal)
            (got_BK,) = torch.autograd.grad(loss, scores_BK, retain_graph=True)
            assert torch.allclose(got_BK, (prior_BK - posterior_BK) * shares[marginal], atol=1e-12)


def test_the_marginals_are_those_of_hugging_faces_rag():
    """RagTokenForGeneration.marginalize and RagSequenceForGeneration.get_nll, called on the same logits."""
    scores_BK, log_BKTV, labels_BT, _ = random_case(5, B=2, V=7)
    labels_BT, pad = labels_BT % 5 + 1, 0
    mask_BT = torch.tensor([[True] * 3, [True, True, False]])  # get_nll scores documents at the second target
    flat_NTV = log_BKTV.flatten(0, 1)
    generator = SimpleNamespace(pad_token_id=pad, bos_token_id=None)
    rag = SimpleNamespace(config=SimpleNamespace(n_docs=4, bos_token_id=None, generator=generator))
    log_BKT, log_prior_BK = of_labels(log_BKTV, labels_BT), scores_BK.log_softmax(1)

    log_BTV = RagTokenForGeneration.marginalize(rag, flat_NTV, scores_BK)
    wanted = -log_BTV.gather(2, labels_BT[:, :, None])[..., 0][mask_BT].mean()
    assert torch.isclose(retriever_loss(log_prior_BK, log_BKT, mask_BT, "token"), wanted, atol=1e-9)

    # get_nll shifts the targets by one (decoder inputs start with a start token) and knows pads by their id
    targets_BT = torch.cat([torch.full((2, 1), 9), labels_BT.masked_fill(~mask_BT, pad)], 1)
    with_end_NTV = torch.cat([flat_NTV, flat_NTV[:, :1]], 1)  # a fourth token, a pad for every answer
    nll_B = RagSequenceForGeneration.get_nll(rag, with_end_NTV, scores_BK, targets_BT)
    got = retriever_loss(log_prior_BK, log_BKT, mask_BT, "sequence")
    assert torch.isclose(got, nll_B.mean(), atol=1e-9)


def test_impossible_passages_and_pads_leave_the_loss_finite():
    """A passage by which the answer cannot be (-inf), and NaN at a pad: finite loss, finite gradient."""
    scores_BK, log_BKTV, labels_BT, mask_BT = random_case()
    log_BKT = of_labels(log_BKTV, labels_BT)
    log_BKT[0, 1] = -torch.inf
    log_BKT[1, :, 2] = torch.nan
    for form in ("token", "sequence", "kl"):
        given = scores_BK.log_softmax(1), log_BKT, mask_BT
        loss = kl_loss(*given) if form == "kl" else retriever_loss(*given, form)
        (got_BK,) = torch.autograd.grad(loss, scores_BK)
        assert torch.isfinite(loss) and torch.isfinite(got_BK).all() and got_BK[0, 1] > 0


# ---------------------------------------------------------------- batches
def test_a_batch_is_a_function_of_seed_and_step(world):
    """An epoch shows every question once; order and drawn answers differ by epoch."""
    cfg, train, *_ = parts(world)
    train = [question | {"answers": ["red", "blue", "green"]} for question in train]
    epochs = []
    for epoch in (0, 1):
        drawn = [draw_questions(step, train, cfg) for step in (2 * epoch, 2 * epoch + 1)]
        assert drawn == [draw_questions(step, train, cfg) for step in (2 * epoch, 2 * epoch + 1)]
        pairs = [(question["qid"], question["answer"]) for batch in drawn for question in batch]
        assert sorted(qid for qid, _ in pairs) == sorted(question["qid"] for question in train)
        assert {answer for _, answer in pairs} == {"red", "blue", "green"}
        epochs.append(pairs)
    assert epochs[0] != epochs[1] and sorted(epochs[0]) != sorted(epochs[1])


def test_the_search_is_exact_and_without_dropout(world):
    """The best by plain inner products of vectors without dropout; no random number is drawn for it."""
    _, train, _, models, index = parts(world, dropout=0.3)
    query = models["query_encoder"]
    before = torch.get_rng_state()
    retrieved = index.retrieve(train, query, 5)
    assert torch.equal(before, torch.get_rng_state()) and query.training
    query.eval()
    with torch.no_grad():
        ids = tokenize_questions(query, [question["question"] for question in train])
        q_QD = torch.cat([query(**collate(query, [tokens])) for tokens in ids]).numpy()
    scores_QN = q_QD @ np.concatenate(open_embeddings(world / "embeddings")[0]).astype(np.float32).T
    assert [example["rows"] for example in retrieved] == np.argsort(-scores_QN, 1)[:, :5].tolist()


def masked_file(world, folder):
    """The training questions as sentences with a mask, each naming its passage; returns the path."""
    path = folder / "masked.jsonl"
    path.write_text((world / "train.jsonl").read_text().replace("which colour", "[MASK]"))
    return path


def test_a_masked_sentence_never_sees_its_own_passage(world, tmp_path):
    """Its source is dropped, the order of the rest stays, K are left; a question keeps its passages."""
    _, _, corpus, models, index = parts(world)
    masked, _ = load_questions(masked_file(world, tmp_path), corpus)
    plain = [sentence | {"own": set()} for sentence in masked]
    plain = index.retrieve(plain, models["query_encoder"], 36)
    for k in (4, 35):
        for sentence, other in zip(index.retrieve(masked, models["query_encoder"], k), plain, strict=True):
            own = int(sentence["positives"][0]) - 1
            assert len(sentence["rows"]) == k and sentence["own"] == {own}
            assert sentence["rows"] == [row for row in other["rows"] if row != own][:k]
    questions, _ = load_questions(world / "train.jsonl", corpus)
    assert all(question["own"] == set() for question in questions)


# ---------------------------------------------------------------- gradients
ANSWERS = ["red", "old new bridge", "white", "the blue", "green", "black and white and red"]


def one_step(world, **changes):
    """The gradients {model: [one a parameter]} and logged numbers of the first batch, and its ingredients."""
    cfg, train, corpus, models, index = parts(world, **changes)
    if cfg.gradient_checkpointing:
        for model in models.values():
            model.model.activation_checkpointing_enable()
    examples = index.retrieve(train[: cfg.batch_size], models["query_encoder"], cfg.top_k)
    for example, answer in zip(examples, itertools.cycle(ANSWERS), strict=False):
        example["answer"] = answer
    shown = add_gradient(examples, corpus, models, ACCELERATOR, cfg, 3)
    gradients = {name: [p.grad for p in model.parameters()] for name, model in models.items()}
    return gradients, shown, (cfg, examples, corpus, models)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def text_book(cfg, example, corpus, models):
    """(T5's loss summed over tokens, prior_K, p_KT by each passage alone), without padding and logarithms."""
    fid, query, doc = models["reader"], models["query_encoder"], models["doc_encoder"]
    passages = [corpus[row] for row in example["rows"]]
    labels_1T = tokenize_answers(fid, [example["answer"]])
    contexts = [torch.tensor([ids]) for ids in tokenize_contexts(fid, example["question"], passages)]
    states = [fid.model.encoder(input_ids=ids).last_hidden_state for ids in contexts]
    loss = fid.model(encoder_outputs=(torch.cat(states, 1),), labels=labels_1T).loss * labels_1T.numel()
    with torch.no_grad():
        logits = [fid.model(input_ids=ids, labels=labels_1T).logits for ids in contexts]
        p_KT = torch.cat([x.softmax(2).gather(2, labels_1T[:, :, None])[..., 0] for x in logits])
    q_D = query(**collate(query, tokenize_questions(query, [example["question"]])))[0]
    d_KD = torch.cat([doc(**collate(doc, tokenize_passages(doc, [passage]))) for passage in passages])
    prior_K = (d_KD @ q_D / (cfg.temperature or math.sqrt(32))).softmax(0)
    return loss, prior_K, p_KT


@pytest.mark.parametrize(
    "changes",
    [
        {"question_chunk": 6, "passage_chunk": 99, "score_chunk": 99},
        {"question_chunk": 4, "passage_chunk": 5, "score_chunk": 3, "gradient_checkpointing": True},
        {"question_chunk": 1, "passage_chunk": 1, "score_chunk": 1, "marginal": "sequence"},
        {"retriever_loss": "kl", "temperature": 1.0},
    ],
    ids=["one chunk", "chunks", "sequence", "kl"],
)
def test_the_gradient_is_that_of_the_text_book(world, changes):
    """Chunks of any size, answers of two to six tokens: the gradients of three models, and what is logged."""
    got, shown, (cfg, examples, corpus, models) = one_step(world, dropout=0.0, **changes)
    for model in models.values():
        model.zero_grad()
    tokens = sum(tokenize_answers(models["reader"], [example["answer"]]).numel() for example in examples)
    total, has, entropy = 0.0, [], []
    for example in examples:
        loss, prior_K, p_KT = text_book(cfg, example, corpus, models)
        if cfg.retriever_loss == "kl":
            drawn_to_K = p_KT.log().mean(1).softmax(0)
            ret = (drawn_to_K * (drawn_to_K / prior_K).log()).sum() / len(examples)
        elif cfg.marginal == "token":
            ret = -(prior_K @ p_KT).log().sum() / tokens
        else:
            ret = -(prior_K @ p_KT.prod(1)).log() / len(examples)
        total = total + loss / tokens + ret
        has += [example["answers"][0] in corpus[row].text.split() for row in example["rows"]]
        entropy.append(-(prior_K * prior_K.log()).sum().item())
    total.backward()
    assert abs(shown["loss"] + shown["ret"] - total.item()) < 1e-4
    for name, model in models.items():
        assert close(flat(got[name]), flat(p.grad for p in model.parameters()), 2e-5), name
    assert 0 < np.mean(has) < 1 and abs(shown["has"] - np.mean(has)) < 1e-6
    assert abs(shown["entropy"] - np.mean(entropy)) < 1e-4


def test_nobody_learns_from_the_others_loss(world):
    """With dropout on, T5's gradient is the same to the last bit with and without the retriever's loss."""
    alone, shown, _ = one_step(world, retriever_loss="none", dropout=0.1)
    assert set(shown) == {"loss", "has"}
    assert all(g is None for name in TOWERS for g in alone[name])
    for changes in ({}, {"marginal": "sequence"}, {"retriever_loss": "kl"}):
        both, _, _ = one_step(world, dropout=0.1, **changes)
        assert all(map(torch.equal, alone["reader"], both["reader"]))
        assert all(g is not None for name in TOWERS for g in both[name])
        assert all(flat(both[name]).abs().max() > 0 for name in TOWERS)


def device_step(folder, world):
    """On each of W processes: the gradients and logged numbers of one step, and the dev metrics."""
    rank = dist.get_rank() if dist.is_initialized() else "alone"
    gradients, shown, (cfg, examples, corpus, models) = one_step(world, dropout=0.0, question_chunk=2)
    index = LiveIndex(corpus, make_run(world / "run"), cfg)
    index.make_rows(models["doc_encoder"], 7)
    dev = evaluate(examples, corpus, index, models, ACCELERATOR, cfg)
    torch.save({"gradients": gradients, "shown": shown, "dev": dev}, f"{folder}/{rank}.pt")


def test_two_devices_give_the_gradient_and_the_metrics_of_one(world, tmp_path):
    """Devices with unequal numbers of answer tokens: gradient, losses, EM and hits of a single device."""
    on_devices(2, device_step, str(tmp_path), world)
    device_step(str(tmp_path), world)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", 0, 1))
    for name, gradient in alone["gradients"].items():
        assert torch.equal(flat(first["gradients"][name]), flat(second["gradients"][name]))
        assert close(flat(first["gradients"][name]), flat(gradient), 2e-5)
    for device in (first, second):
        assert device["shown"] == pytest.approx(alone["shown"], abs=1e-5) and device["dev"] == alone["dev"]


# ---------------------------------------------------------------- memory
def test_activations_are_those_of_one_chunk_and_of_one_loss(world):
    """Twice the batch keeps no more alive, checkpointing keeps less, and the two losses never add up."""

    def peak(**changes):
        with Saved() as saved:
            one_step(world, dropout=0.0, **{"question_chunk": 2, "batch_size": 6} | changes)
        return saved.peak

    alone = peak(retriever_loss="none")
    both = peak()
    assert peak(batch_size=12) <= 1.2 * both < 1.2 * 1.6 * alone
    assert peak(gradient_checkpointing=True) < 0.6 * both
    assert peak(question_chunk=6) > 2 * both


# ---------------------------------------------------------------- the command, as its user meets it
def test_reader_and_retriever_learn_from_each_other(world, tmp_path):
    """From questions and answers alone EM and hit@1 both rise by 0.2 or more, to 0.75 or more."""
    changes = {"dropout": 0.0, "learning_rate": 5e-4, "retriever_lr_scale": 2, "epochs": 40}
    cfg, train, corpus, models, index = parts(world, **changes)
    before = evaluate(train, corpus, index, models, ACCELERATOR, cfg)
    main("train_emdr2.py", keys(world, tmp_path / "run", eval_every=40, **changes))
    written = rows_of(tmp_path / "run")
    after = written[-1]
    assert [row["step"] for row in written if "em" in row] == [40, 80]
    assert after["em"] >= max(0.75, before["em"] + 0.2), (before, after)
    assert after["hit@1"] >= max(0.75, before["hit@1"] + 0.2), (before, after)
    shown = [row for row in written if "loss" in row]
    assert len(shown) == 80 and shown[-1]["lr"] == pytest.approx(0.02 * 5e-4)
    wanted = {"step", "loss", "ret", "entropy", "has", "lr", "grad_norm", "index_age"}
    assert all(set(row) == wanted for row in shown)
    assert [row["index_age"] for row in shown] == [step % 10 for step in range(80)]
    for key, rises in (("loss", False), ("ret", False), ("has", True)):
        first, last = (np.mean([row[key] for row in some]) for some in (shown[:8], shown[-8:]))
        assert (last > first) == rises, key
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "example context: question: which colour" in log and "entropy of the prior: " in log


def test_plain_fid_leaves_the_retriever_alone(world, tmp_path):
    """retriever_loss none: the given encoders and vectors serve throughout, only the reader is trained."""
    changes = {"retriever_loss": "none", "stop_after": 4, "refresh_every": 2}
    main("train_emdr2.py", keys(world, tmp_path / "fid", **changes))
    steps = [row for row in rows_of(tmp_path / "fid") if "loss" in row]
    assert len(steps) == 4 and not {"ret", "index_age"} & {*steps[0]}
    folders = sorted(path.name for path in (tmp_path / "fid").iterdir() if path.is_dir())
    assert folders == ["checkpoints", "reader"]
    start, end = (load_fid(path).state_dict() for path in (world / "t5", tmp_path / "fid" / "reader"))
    assert not torch.equal(start["model.shared.weight"], end["model.shared.weight"])


def test_the_question_encoder_learns_alone(world, tmp_path):
    """Also after a resume the passage encoder is as it began: the first vectors still serve its partner."""
    frozen = {"train_doc_encoder": False, "refresh": "none", "keep": "last", "dropout": 0.1, "eval_every": 2}
    main("train_emdr2.py", keys(world, tmp_path / "run", stop_after=2, **frozen))
    main("train_emdr2.py", keys(world, tmp_path / "run", stop_after=6, resume="changed", **frozen))
    final = read_json(tmp_path / "run" / "metrics.json")
    assert final["step"] == final["best_step"] == 6  # `keep last`: the end counts, not the best EM
    assert len({row["em"] for row in rows_of(tmp_path / "run") if "em" in row}) > 1  # a choice could differ
    for name, role in TOWERS.items():
        start, end = (load_encoder(path / name, role).state_dict() for path in (world, tmp_path / "run"))
        moved = any(not torch.equal(start[weight], end[weight]) for weight in start)
        assert moved == (name == "query_encoder")
    corpus = Corpus(world / "corpus.tsv")
    query = tmp_path / "run" / "query_encoder"
    assert pair_id(query).startswith("warm+")
    open_embeddings(world / "embeddings", corpus.sha256, rows=len(corpus), query_encoder=query)


def test_training_takes_vectors_from_a_live_worker(world, tmp_path, python):
    """They are never newer than the step; a run that SIGTERM stopped resumes with them; the worker ends."""
    folder = tmp_path / "run"
    changes = {"refresh": "async", "dev": "", "epochs": 1500, "refresh_every": 20, "log_every": 20}
    argv = keys(world, folder, learning_rate=1e-6, save_every=1000, **changes)
    command = ["bash", "recipes/emdr2_worker.sh", str(folder), "--corpus", str(world / "corpus.tsv")]
    environment = ENVIRONMENT | {"LAUNCH": f"{python}/python", "SECONDS_BETWEEN": "0.2"}
    worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        process = begin("train_emdr2.py", argv)
        line = next(line for line in process.stdout if "are in use" in line)
        kill_tree(process, signal.SIGTERM)
        process.communicate()
        step, used = int(line.split()[1].rstrip(":")), int(line.split("of step ")[1].split()[0])
        state = read_json(max((folder / "checkpoints").glob("step_*")) / "state.json")
        assert state["index_step"] == used <= step <= state["step"] and used % 20 == 0
        last = state["step"] + 2
        main("train_emdr2.py", argv | {"resume": "changed", "stop_after": last})
        assert worker.wait(60) == 0 and "training has finished, so has its worker" in worker.stdout.read()
    finally:
        kill_tree(worker, signal.SIGKILL)
    rows = rows_of(folder)
    assert len(rows) == last and rows[-1]["index_age"] == last - 1 - used
    for row in rows:
        made = 0 if row["step"] <= step else used
        assert row["index_age"] == row["step"] - 1 - made


def test_a_worker_that_fails_ends_and_one_whose_encoder_is_gone_goes_on(tmp_path):
    """What went wrong is on the screen, and the training run is not touched."""
    (tmp_path / "refresh" / "step_00000005" / "doc_encoder").mkdir(parents=True)
    command = ["bash", "recipes/emdr2_worker.sh", str(tmp_path)]
    gone = f"rm -r {tmp_path}/refresh/step*; touch {tmp_path}/metrics.json"
    for script, code in (("exit 3", 1), (gone, 0)):
        (tmp_path / "launch.sh").write_text(f"echo $* >>{tmp_path}/arguments\n{script}\nexit 3\n")
        environment = os.environ | {"LAUNCH": f"sh {tmp_path}/launch.sh", "SECONDS_BETWEEN": "0.1"}
        assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60).returncode == code
    said = (tmp_path / "arguments").read_text()
    assert said.count("doc2embedding.py --doc_encoder") == 2 and "step_00000005/.embeddings" in said


def test_mistakes_end_in_one_line(world, tmp_path):
    (tmp_path / "none.jsonl").write_text('{"qid": "q0", "question": "who"}\n')
    (tmp_path / "bare.jsonl").write_text('{"qid": "q0", "question": "[MASK] is", "answers": ["red"]}\n')
    masked = masked_file(world, tmp_path)
    for changes, message in (
        ({"query_encoder": world / "random_query_encoder"}, "was not trained with the passage encoder"),
        ({"embeddings": tmp_path / "nowhere"}, "no finished embeddings"),
        ({"query_encoder": world / "doc_encoder"}, "this is a passage encoder"),
        ({"top_k": 37}, "top_k 37.*36 passages"),
        ({"top_k": 36, "train": masked}, "top_k 36.*1 may be dropped"),
        ({"top_k": 36, "dev": masked}, "top_k 36.*1 may be dropped"),
        ({"train": tmp_path / "none.jsonl"}, "none.jsonl:1.*'answers' is missing"),
        ({"train": tmp_path / "bare.jsonl"}, "bare.jsonl: q0.*needs the id of its own passage"),
        ({"train": ""}, "train: give a path"),
        ({"marginal": "tokens"}, "marginal must be one of token, sequence"),
        ({"refresh": "always"}, "refresh must be one of"),
        ({"train_doc_encoder": False}, "no vector changes, so --refresh none"),
        ({"keep": "first"}, "keep must be one of best, last"),
        ({"eval_hits": "[]"}, "eval_hits must name depths"),
    ):
        with pytest.raises(UserError, match=message):
            main("train_emdr2.py", keys(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_an_even_prior_is_warned_of(world, tmp_path, capsys):
    """Scores divided by far too much: the share of log K is printed, and what to do."""
    for temperature, warned in ((1e4, True), (0.1, False)):
        changes = {"temperature": temperature, "stop_after": 1, "dev": ""}
        main("train_emdr2.py", keys(world, tmp_path / str(warned), **changes))
        printed = capsys.readouterr().out
        assert ("warning: the prior hardly tells" in printed) == warned
        assert ("1.00 of the log of top_k" in printed) == warned


def test_the_configs_have_the_papers_numbers():
    for name, numbers in (("nq", (10, 64, 500)), ("trivia", (10, 64, 250)), ("webq", (20, 16, 500))):
        config = f"config/train_emdr2_{name}.yaml"
        cfg = load_config("", "config/train_emdr2_nq.yaml", ["--config", str(ROOT / config)])
        assert (cfg.epochs, cfg.batch_size, cfg.eval_every) == numbers, name
