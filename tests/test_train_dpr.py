"""The trainer against the original codes' numbers, one big graph, and hand-made batches."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel

from tests.processes import flags, main, on_devices, rows
from tests.saved import Saved
from tests.toy import ACCELERATOR, close, flat_gradient, golden_file
from train_dpr import (
    add_gradient,
    draw_batch,
    draw_passages,
    in_batch_loss,
    learning_rate_factor,
    make_batch,
    rotating_negatives,
)
from utils.data import Corpus, passage_of, read_questions
from utils.distributed import chunk_seed
from utils.encoder import collate, tokenize_passages, tokenize_questions
from utils.plumbing.checks import notes_on_negatives
from utils.plumbing.config import UserError, load_config
from utils.plumbing.run import parameter_groups
from utils.plumbing.weights import TOWERS, load_encoder, load_towers, save_encoder


def keys(world, run_dir="unused", **changes):
    """The command line of a toy run: 40 questions in 4 epochs of 5 steps."""
    paths = {"init": world / "bert", "run_dir": run_dir, "corpus": world / "corpus.tsv"}
    paths |= {"train": world / "train.jsonl", "dev": world / "dev.jsonl"}
    sizes = {"question_tokens": 16, "passage_tokens": 32, "batch_size": 8, "question_chunk": 3}
    sizes |= {"passage_chunk": 4, "epochs": 4, "save_every": 3}
    learning = {"learning_rate": 1e-3, "warmup": 0.1, "gradient_scale": 1.0}
    return paths | sizes | learning | changes


def settings(world, **changes):
    return load_config("", "config/train_dpr_nq.yaml", flags(keys(world, **changes)))


def load(world, **changes):
    """(settings, questions, corpus, towers) of a toy run."""
    cfg = settings(world, **changes)
    return cfg, read_questions(cfg.train), Corpus(cfg.corpus), towers_of(cfg)


def towers_of(cfg):
    return load_towers(dict.fromkeys(TOWERS, cfg.init), cfg, "cpu")


def texts_of(batch, towers, kind):
    """The decoded texts of a batch in the order that its places restore."""
    tower = towers["query_encoder" if kind == "question" else "doc_encoder"]
    rows = [ids for chunk in batch[f"{kind}_chunks"] for ids in chunk]
    return [tower.tokenizer.decode(rows[place]) for place in batch[f"{kind}_places"]]


def fact(text):
    """The thing and the city that a toy question or passage is about."""
    return re.search(r"(river|bridge|tower|market|garden)(?: of|,) (\w+)", text).groups()


# ---------------------------------------------------------------- loss, schedule
def test_loss_equals_the_original_codes():
    """Loss, number correct and both gradients equal DPR's BiEncoderNllLoss in float64."""
    for case in golden_file("in_batch_loss")["cases"]:
        q, p = (torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ("q", "p"))
        loss, correct = in_batch_loss(q, p, case["positive_idx"])  # a list, as DPR has it
        loss = loss * case.get("loss_scale", 1)
        loss.backward()
        assert abs(loss.item() - case["loss"]) < 1e-8 * max(1, abs(case["loss"]))
        assert correct == case["correct"]
        for got, wanted in ((q.grad, case["grad_q"]), (p.grad, case["grad_p"])):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            assert (got - wanted).abs().max() <= 1e-8 * max(1, wanted.abs().max())


def test_schedule_equals_the_original_codes():
    """Linear up and down; only the floor differs between DPR (1e-7) and GC-DPR (0); step 0 has factor 0."""
    for case in golden_file("lr_schedule")["cases"]:
        floors = {"factor_dpr": 1e-7, "factor_gc_dpr": 0.0}
        for key, floor in ((key, floor) for key, floor in floors.items() if key in case):
            steps = [k + case.get("steps_shift", 0) for k in case["steps"]]
            got = [learning_rate_factor(k, case["warmup"], case["total"], floor) for k in steps]
            assert np.allclose(got, case[key], rtol=0, atol=1e-9)


def test_an_excluded_pair_is_a_question_and_a_column():
    """Against a plain loop, with pairs that are not symmetric; what is left out beats nobody."""
    rng = np.random.default_rng(0)
    q_QD, p_ND = rng.standard_normal((3, 4)), rng.standard_normal((6, 4))
    pairs = [(0, 3), (2, 1), (2, 5)]
    losses = []
    for row in range(3):
        scores = {column: q_QD[row] @ p_ND[column] for column in range(6) if (row, column) not in pairs}
        losses.append(np.log(sum(map(np.exp, scores.values()))) - scores[2 * row])
    excluded = torch.tensor(pairs).T
    loss, _ = in_batch_loss(torch.tensor(q_QD), torch.tensor(p_ND), torch.tensor([0, 2, 4]), excluded)
    assert abs(loss.item() - np.mean(losses)) < 1e-12
    vectors = torch.eye(3)[[0, 1, 2, 2]] * 30  # two questions with the same gold passage
    loss, correct = in_batch_loss(vectors, vectors, torch.arange(4), torch.tensor([[2, 3], [3, 2]]))
    assert loss < 1e-4 and correct == 4


# ---------------------------------------------------------------- batches
def test_a_batch_is_a_function_of_seed_and_step(world):
    """Every question once an epoch; rows of like length are together."""
    cfg, train, corpus, towers = load(world)
    seen = []
    for step in range(5):
        batch = make_batch(step, train, corpus, towers, cfg)
        assert str(batch) == str(make_batch(step, train, corpus, towers, cfg))
        lengths = [len(ids) for chunk in batch["passage_chunks"] for ids in chunk]
        assert lengths == sorted(lengths) and len(set(lengths)) > 2
        seen += map(fact, texts_of(batch, towers, "question"))
    assert len(set(seen)) == 40


@pytest.mark.parametrize(
    ("batch_size", "negatives", "own", "words"),
    [
        (1, 0, {}, "refused"),
        (1, 1, {"negatives": []}, "refused"),
        (1, 1, {"positives": ["1"], "negatives": ["1"]}, "refused"),
        (8, 0, {"positives": ["1"]}, "refused"),
        (8, 2, {"positives": ["1"], "negatives": []}, "refused"),
        (8, 2, {"positives": ["1"]}, "all questions have the same positive"),
        (1, 1, {}, "1.0 negatives of its own for a question on average, 1 asked"),
        (8, 9, {}, "no question has more than 2 .* use --negatives 2"),
    ],
)
def test_negatives_are_counted_and_none_at_all_is_refused(world, batch_size, negatives, own, words):
    """A batch without a wrong passage has the loss 0 to the end; padding is encoded and teaches nothing."""
    cfg = settings(world, batch_size=batch_size, negatives=negatives)
    train = [example | own for example in read_questions(cfg.train)]
    if words == "refused":
        with pytest.raises(UserError, match="no question meets a wrong passage.* nothing to tell apart"):
            notes_on_negatives(cfg, train)
    else:
        assert re.search(words, "\n".join(notes_on_negatives(cfg, train)))


def test_padding_and_duplicates_are_excluded_and_counted(world):
    """Nobody sees a padding column; a question does not see what others bring of its positives."""
    cfg, train, corpus, towers = load(world, batch_size=4)
    two = dict(train[0], positives=train[0]["positives"] + train[2]["positives"])
    train = [two, dict(train[0]), dict(train[1], negatives=[]), dict(train[2])]
    batch = make_batch(0, train, corpus, towers, cfg)
    pairs = {tuple(pair) for pair in batch["excluded"].T.tolist()}
    row = {item: place for place, item in enumerate(np.random.default_rng([cfg.seed, 0]).permutation(4))}
    padded = {(question, 2 * row[2] + 1) for question in range(4)}
    duplicates = {(row[0], 2 * row[1]), (row[1], 2 * row[0]), (row[0], 2 * row[3])}
    assert padded <= pairs and duplicates <= pairs
    assert {(question, 2 * question) for question in range(4)}.isdisjoint(pairs), "no label is excluded"
    assert batch["duplicates"] == len(pairs) - 4 and (row[3], 2 * row[0]) not in pairs
    cfg.mask_duplicates = False
    off = make_batch(0, train, corpus, towers, cfg)
    assert off["duplicates"] == 0 and {tuple(pair) for pair in off["excluded"].T.tolist()} == padded


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("negatives", [0, 1, 11])
def test_the_label_is_right_for_any_number_of_negatives(world, negatives, rotate):
    """Of one-hot vectors every label scores highest, also where questions have 0, 2 or 11 negatives."""
    cfg, train, corpus, towers = load(world, negatives=negatives, rotate_negatives=rotate)
    ids = [pid for example in train for pid in example["positives"]]
    for n, example in enumerate(train):
        example["negatives"] = [ids[(n + 1 + j) % 40] for j in range((0, 2, 11)[n % 3])]
    for step in (0, 7):
        batch = make_batch(step, train, corpus, towers, cfg)
        facts = {kind: [*map(fact, texts_of(batch, towers, kind))] for kind in ("question", "passage")}
        assert len(facts["passage"]) == 8 * (1 + negatives)
        place = {name: i for i, name in enumerate(sorted(set(facts["passage"])))}
        q_QD, p_ND = (30.0 * torch.eye(len(place))[[place[name] for name in facts[kind]]] for kind in facts)
        loss, correct = in_batch_loss(q_QD, p_ND, batch["positive_Q"], batch["excluded"])
        assert correct == 8 and loss < 1e-6


def test_rotating_negatives_equal_ance_teles():
    """The passages of the original DenseTrainDataset; where it draws some of too few twice, each once."""
    exact = short = 0
    for case in golden_file("train_sampling")["cases"]:
        if case["negative_passage_no_shuffle"]:  # no published recipe sets it
            continue
        cfg = SimpleNamespace(seed=case["seed"], rotate_negatives=True)
        cfg.negatives = case["train_n_passages"] - 1
        cfg.shuffle_positives = not case["positive_passage_no_shuffle"]
        pool = {"positives": [*range(case["n_positives"])], "negatives": [*range(case["n_negatives"])]}
        positive, *negatives = draw_passages(pool, case["item"], int(case["epoch"]), cfg)
        assert positive == case["positive"], case
        if case["n_negatives"] < cfg.negatives:
            assert sorted(negatives) == pool["negatives"] and len(case["negatives"]) == cfg.negatives
            short += 1
        else:
            assert negatives == case["negatives"], case
            exact += 1
    assert (exact, short) == (95, 6)


def test_no_negative_comes_back_before_all_were_seen():
    """
    MS MARCO, episode 3: in 3 epochs a question meets 93 different ones of its 180 negatives; drawn anew each
    epoch, as DPR does, some would be met twice. Five epochs of 2 of 5 show each exactly twice.
    """
    seen = [i for epoch in range(3) for i in rotating_negatives(180, 31, 42, epoch)]
    assert len(set(seen)) == len(seen) == 93
    fresh = SimpleNamespace(seed=42, negatives=31, shuffle_positives=False, rotate_negatives=False)
    pool = {"positives": ["gold"], "negatives": [*range(180)]}
    assert len({i for epoch in range(3) for i in draw_passages(pool, 0, epoch, fresh)[1:]}) < 93
    counts = np.bincount([i for epoch in range(5) for i in rotating_negatives(5, 2, 42, epoch)])
    assert counts.tolist() == [2] * 5
    assert rotating_negatives(0, 3, 42, 1) == rotating_negatives(3, 0, 42, 1) == []


# ---------------------------------------------------------------- gradients
def one_graph(step, train, corpus, towers, excluded, cfg):
    """The oracle: the texts as they were drawn, a padded batch a tower, one graph; no chunks, no devices."""
    items, entries, _ = draw_batch(step, train, cfg)
    questions = tokenize_questions(towers["query_encoder"], [train[item]["question"] for item in items])
    passages = tokenize_passages(towers["doc_encoder"], [passage_of(entry, corpus) for entry in entries])
    q_QD = towers["query_encoder"](**collate(towers["query_encoder"], questions))
    p_ND = towers["doc_encoder"](**collate(towers["doc_encoder"], passages))
    positive_Q = torch.arange(len(items)) * (1 + cfg.negatives)
    loss, _ = in_batch_loss(q_QD, p_ND, positive_Q, excluded)
    (loss * cfg.gradient_scale).backward()
    return loss


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_gradient_equals_one_graph(world, shared, cache):
    """Chunks of any size, cached or not, separate or shared towers: the gradient of the plain batch."""
    for question_chunk, passage_chunk in ((1, 1), (3, 5), (99, 99)):
        changes = {"question_chunk": question_chunk, "passage_chunk": passage_chunk, "grad_cache": cache}
        changes |= {"shared_encoder": shared, "gradient_scale": 0.125, "dropout": 0.0}
        cfg, train, corpus, towers = load(world, **changes)
        batch = make_batch(0, train, corpus, towers, cfg)
        wanted_loss = one_graph(0, train, corpus, towers, batch["excluded"], cfg)
        wanted = flat_gradient(*towers.values())
        torch.nn.ModuleDict(towers).zero_grad()
        loss, _ = add_gradient(batch, towers, ACCELERATOR, cfg, 0)
        assert abs(loss - wanted_loss) < 1e-5 and not loss.requires_grad
        assert close(flat_gradient(*towers.values()), wanted)


def device_gradient(folder, cfg):
    """On each of W processes: one cached step; every rank writes loss, gradient and its batch."""
    rank = dist.get_rank()
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": rank})
    towers = towers_of(cfg)
    batch = make_batch(0, read_questions(cfg.train), Corpus(cfg.corpus), towers, cfg)
    loss, _ = add_gradient(batch, towers, accelerator, cfg, 0)
    found = {"loss": loss, "gradient": flat_gradient(*towers.values()), "batch": batch}
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_devices_give_the_gradient_of_one(world, tmp_path, dropout):
    """Without dropout it is that of one device; with it, that of one graph over the same chunks and masks."""
    cfg, train, corpus, towers = load(world, dropout=dropout, grad_cache=True)
    on_devices(2, device_gradient, str(tmp_path), cfg)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"]), "devices must hold the same gradient"
    batch = make_batch(0, train, corpus, towers, cfg)
    if not dropout:
        wanted_loss = one_graph(0, train, corpus, towers, batch["excluded"], cfg)
    else:  # one graph over both devices' chunks, each chunk with the seed that its device gave it
        vectors = {"question": [], "passage": []}
        for rank, found in enumerate(ranks):
            rows, i = {"question": [], "passage": []}, 0
            for kind, name in (("question", "query_encoder"), ("passage", "doc_encoder")):
                for ids in found["batch"][f"{kind}_chunks"]:
                    torch.manual_seed(chunk_seed((cfg.seed, 0, rank), i))
                    rows[kind].append(towers[name](**collate(towers[name], ids)))
                    i += 1
                vectors[kind].append(torch.cat(rows[kind])[found["batch"][f"{kind}_places"]])
        q_QD, p_ND = (torch.cat(vectors[kind]) for kind in ("question", "passage"))
        wanted_loss, _ = in_batch_loss(q_QD, p_ND, batch["positive_Q"], batch["excluded"])
        wanted_loss.backward()
    wanted = flat_gradient(*towers.values())
    assert abs(ranks[0]["loss"] - wanted_loss) < 1e-5
    assert close(ranks[0]["gradient"], wanted)


def test_bf16_gives_the_cached_gradient_too(world):
    """Under bf16 autocast, cached and uncached gradients point the same way (spec: cosine at least 0.999)."""
    gradients = []
    for cache in (False, True):
        cfg, train, corpus, towers = load(world, grad_cache=cache)
        accelerator = SimpleNamespace(**vars(ACCELERATOR))
        accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        add_gradient(make_batch(0, train, corpus, towers, cfg), towers, accelerator, cfg, 0)
        gradients.append(flat_gradient(*towers.values()))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_a_big_batch_needs_the_memory_of_one_chunk(world):
    """128 questions, 256 passages: the cached step keeps the activations of one chunk of 16, not of all."""
    gradient, peak = {}, {}
    for name, cache in (("plain", False), ("cached", True)):
        sizes = {"batch_size": 128, "question_chunk": 16, "passage_chunk": 16, "token_types": "segments"}
        cfg, train, corpus, towers = load(world, grad_cache=cache, layer_norm_epsilon=1e-5, **sizes)
        batch = make_batch(0, train * 4, corpus, towers, cfg)
        with Saved() as saved:
            add_gradient(batch, towers, ACCELERATOR, cfg, 0)
        gradient[name], peak[name] = flat_gradient(*towers.values()), saved.peak
    with Saved() as one:  # the longest rows come last
        towers["doc_encoder"](**collate(towers["doc_encoder"], batch["passage_chunks"][-1]))
    assert peak["cached"] < 1.1 * one.peak and peak["plain"] > 12 * peak["cached"], (peak, one.peak)
    assert close(gradient["cached"], gradient["plain"])


# ---------------------------------------------------------------- weights
def test_a_shared_encoder_is_optimized_once(world):
    """Two groups, every weight of a shared encoder once; biases and layer norms are not decayed."""
    cfg, _, _, towers = load(world, weight_decay=0.1, shared_encoder=True)
    groups = parameter_groups(torch.nn.ModuleDict(towers).parameters(), cfg)
    sizes = {group["weight_decay"]: len(group["params"]) for group in groups}
    total = len(list(towers["query_encoder"].parameters()))
    assert sizes[0.1] + sizes[0.0] == total and sizes[0.0] > sizes[0.1] > 0


def test_layer_norm_epsilon_is_kept_with_the_weights(world, tmp_path):
    """1e-5 in the place of BERT's 1e-12: in training and, without a word, when it is loaded again."""
    for epsilon in (0.0, 1e-5):
        tower = towers_of(settings(world, layer_norm_epsilon=epsilon))["doc_encoder"]
        save_encoder(tower, tmp_path / str(epsilon))
        for encoder in (tower, load_encoder(tmp_path / str(epsilon), "passage")):
            norms = [module for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)]
            assert {norm.eps for norm in norms} == {epsilon or 1e-12}


def test_a_half_precision_start_is_trained_in_full(world, tmp_path):
    """Weights stored as float16 are trained in float32: transformers 5 would keep the type of the file."""
    AutoModel.from_pretrained(world / "bert", add_pooling_layer=False).half().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((world / "bert" / name).read_bytes())
    towers = towers_of(settings(world, init=tmp_path))
    assert {p.dtype for p in torch.nn.ModuleDict(towers).parameters()} == {torch.float32}


def test_an_early_stop_keeps_the_schedule(world, tmp_path):
    """An ANCE-Tele episode in small: stopped after 4 steps, the learning rates are those of all 20."""
    early = {"dev": "", "stop_after": 4, "rotate_negatives": True, "shuffle_positives": True}
    early |= {"grad_cache": True, "layer_norm_epsilon": 1e-5, "min_lr_ratio": 0.0, "shared_encoder": True}
    main("train_dpr.py", keys(world, tmp_path / "run", **early))
    assert [row["lr"] for row in rows(tmp_path / "run")] == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 17 / 18])
    assert not (tmp_path / "run" / "doc_encoder").is_symlink()
