"""The cross-encoder and its trainer against RocketQA's token ids, plain autograd and an unbroken run."""

import json
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from tests.processes import begin, kill_tree, on_devices, run
from tests.toy import make_world
from train_cross_encoder import (
    add_gradient,
    adversarial_step,
    dev_metrics,
    evaluate,
    main,
    make_batch,
    read_pairs,
    tokenize,
)
from utils.corpus import Passage
from utils.cross_encoder import CrossEncoder, load_cross_encoder, probabilities, tokenize_pairs
from utils.data import Corpus
from utils.encoder import collate
from utils.grad_cache import chunk_seed
from utils.plumbing.checkpoint import make_optimizer
from utils.plumbing.config import UserError, load_config
from utils.plumbing.weights import load_encoder, save_encoder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenize_pair.json").read_text())
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    process_index=0,
    backward=torch.Tensor.backward,
    autocast=nullcontext,
    scaler=None,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world and two files of its passages in which the red ones are relevant: easy to learn."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    rng, corpus = np.random.default_rng(0), Corpus(folder / "corpus.tsv")
    red = [str(i) for i in range(1, 61) if " red " in corpus[corpus.row(str(i))].text]
    other = [str(i) for i in range(1, 61) if str(i) not in red]
    for name, n, part in (("red_train", 60, slice(0, 40)), ("red_dev", 20, slice(40, 60))):
        here = {str(i + 1) for i in range(60)[part]}
        lines = [
            {
                "qid": f"q{i}",
                "question": "which is red",
                "positives": [str(rng.choice([pid for pid in red if pid in here]))],
                "negatives": rng.choice([pid for pid in other if pid in here], 2, replace=False).tolist(),
            }
            for i in range(n)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config(world, **changes):
    """The settings of the toy runs, with changes: (as a namespace, as keys)."""
    keys = {
        "init": world / "bert",
        "train": world / "red_train.jsonl",
        "dev": world / "red_dev.jsonl",
        "corpus": world / "corpus.tsv",
        "pair_tokens": 32,
        "layer_norm_epsilon": 0.0,
        "batch_size": 16,
        "chunk": 6,
        "learning_rate": 1e-3,
        "epochs": 6,
        "save_every": 5,
    } | changes
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return load_config("", "config/train_cross_encoder_nq.yaml", argv), keys


def parts(world, **changes):
    cfg, _ = config(world, **changes)
    torch.manual_seed(cfg.seed)
    cross = load_cross_encoder(cfg.init, cfg.pair_tokens, cfg.dropout, new_head=True).train()
    corpus = Corpus(cfg.corpus)
    return cfg, read_pairs(cfg.train, corpus)[1], corpus, cross


# ---------------------------------------------------------------- input and output of the model
def test_token_ids_equal_rocketqa(tmp_path):
    """`[CLS] question [SEP] title text [SEP]` and its segments, in all golden cases of RocketQA."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(GOLDEN["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    cases = [case for case in GOLDEN["cases"] if case["mode"] == "rocketqa_cross"]
    assert len(cases) == 21 and any(len(case["ids"]) == case["max_length"] for case in cases)
    for case in cases:
        inputs = {"role": "cross", "pair_tokens": case["max_length"], "token_types": "segments"}
        cross = CrossEncoder(torch.nn.Linear(1, 1), words, inputs)
        ids = tokenize_pairs(cross, [(case["query"], Passage("1", case["title"], case["text"]))])
        assert ids == [case["ids"]]
        assert collate(cross, ids)["token_type_ids"].tolist() == [case["token_type_ids"]]


def test_input_is_the_plain_tokenizer_call(world):
    """Nothing but `tokenizer(question, title + " " + text, truncation, 160)`, also where a part is empty."""
    cross = load_cross_encoder(world / "bert", 160, new_head=True)
    long = "the old river of paris is red " * 30
    for question, title, text in (("who’s it", "oslo", "a b"), (long, "", long), ("?", "x", "")):
        wanted = cross.tokenizer(question, title + " " + text, truncation=True, max_length=160).input_ids
        assert tokenize_pairs(cross, [(question, Passage("1", title, text))]) == [wanted]
    assert tokenize_pairs(cross, []) == []


def test_probabilities_keep_order_and_precision(world):
    """Any batch size gives softmax(logits)[1] in the given order; surer pairs stay apart beyond float32."""
    cfg, pairs, corpus, cross = parts(world)
    whole = tokenize(pairs[:7], corpus, cross)
    ids = [row[:length] for row, length in zip(whole, (9, 20, 5, 17, 9, 15, 12), strict=True)]
    by_one, by_four = (probabilities(cross, ids, size) for size in (1, 4))
    cross.eval()
    wanted = [cross(**collate(cross, [row])).softmax(1)[0, 1].item() for row in ids]
    assert np.allclose(by_one, wanted, atol=1e-6) and np.allclose(by_four, wanted, atol=1e-6)
    with torch.no_grad():
        cross.model.classifier.weight.zero_()
        cross.model.classifier.bias.copy_(torch.tensor([-14.0, 14.0]))
    sure = probabilities(cross, ids[:1], 1)[0]
    assert sure.dtype == np.float64 and 0 < 1 - sure < 1e-11


def test_a_classifier_of_one_label_is_a_sigmoid(world, tmp_path):
    """Foreign cross-encoders have one logit l: P = 1 / (1 + exp(-l)); three labels are refused."""
    for labels in (1, 3):
        model = AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=labels)
        model.save_pretrained(tmp_path / str(labels))
        AutoTokenizer.from_pretrained(world / "bert").save_pretrained(tmp_path / str(labels))
    cross = load_cross_encoder(tmp_path / "1", 32)
    ids = [[2, 7, 3, 9, 3]]
    logit = cross.eval().model(**collate(cross, ids)).logits.item()
    assert abs(probabilities(cross, ids, 1)[0] - 1 / (1 + np.exp(-logit))) < 1e-7
    with pytest.raises(UserError, match="3 labels"):
        load_cross_encoder(tmp_path / "3", 32)


def test_wrong_doors_are_refused(world, tmp_path, capsys):
    """Random weights and other models load without an exception: each is refused, a new pooler is told."""
    cross = load_cross_encoder(world / "bert", 32, new_head=True)
    assert "no pooler" in capsys.readouterr().err
    save_encoder(cross, tmp_path / "cross")
    again = load_cross_encoder(tmp_path / "cross")
    assert again.inputs == cross.inputs and "no pooler" not in capsys.readouterr().err
    assert all(map(torch.equal, again.parameters(), cross.parameters()))
    with pytest.raises(UserError, match="cross encoder"):
        load_encoder(tmp_path / "cross", "question")
    weights = load_file(tmp_path / "cross" / "model.safetensors")
    cross.model.save_pretrained(
        tmp_path / "part", state_dict={k: v for k, v in weights.items() if "layer.1" not in k}
    )
    AutoTokenizer.from_pretrained(world / "bert").save_pretrained(tmp_path / "part")
    for folder, length, head, words in (
        (world / "bert", 32, False, "4 weights are missing"),
        (tmp_path / "part", 32, True, "16 weights are missing"),
        (world / "query_encoder", 32, False, "this is a question encoder"),
        (world / "nowhere", 32, True, "no such cross-encoder folder"),
        (world / "bert", 0, True, "the length of a pair is unknown"),
        (world / "bert", 500, True, "500 tokens a pair, but only 256"),
    ):
        with pytest.raises(UserError, match=words):
            load_cross_encoder(folder, length, new_head=head)


def test_layer_norm_epsilon_is_kept_with_the_weights(world, tmp_path):
    """ERNIE's 1e-5 is not BERT's 1e-12, and no weight tells: it is set everywhere, saved and loaded."""
    cross = load_cross_encoder(world / "bert", 32, new_head=True, layer_norm_epsilon=1e-5)
    save_encoder(cross, tmp_path / "cross")
    for one in (cross, load_cross_encoder(tmp_path / "cross")):
        assert {m.eps for m in one.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


# ---------------------------------------------------------------- batches and gradients
def test_a_batch_is_a_function_of_seed_and_step(world):
    """An epoch shows pairs once, but for those that fill no batch; another epoch has another order."""
    cfg, pairs, corpus, cross = parts(world)
    assert len(pairs) == 180 and sum(label for _, _, label in pairs) == 60
    every = sorted(
        (tuple(ids), pair[2]) for ids, pair in zip(tokenize(pairs, corpus, cross), pairs, strict=True)
    )
    epochs = []
    for epoch in (0, 1):
        seen = []
        for step in range(11 * epoch, 11 * epoch + 11):
            chunks = make_batch(step, pairs, corpus, cross, cfg)
            assert chunks == make_batch(step, pairs, corpus, cross, cfg)
            assert [len(ids) for ids, _ in chunks] == [6, 6, 4]
            seen += [
                (tuple(i), label) for ids, labels in chunks for i, label in zip(ids, labels, strict=True)
            ]
        for pair in sorted(seen):  # raises where a pair comes more often than it is there
            every.remove(pair)
        assert len(every) == 4
        every += seen
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def flat_gradient(cross):
    return torch.cat([p.grad.flatten() for p in cross.parameters()])


def one_graph(chunks, cross, moved=0.0):
    """The oracle: one padded batch, plain autograd; `moved` is added to the word embeddings beforehand."""
    ids, labels = [i for ids, _ in chunks for i in ids], [k for _, labels in chunks for k in labels]
    with torch.no_grad():
        cross.model.bert.embeddings.word_embeddings.weight += moved
    cross.zero_grad()
    F.cross_entropy(cross(**collate(cross, ids)), torch.tensor(labels)).backward()
    return flat_gradient(cross)


def close(got, wanted):
    return (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_gradient_does_not_depend_on_the_chunks(world):
    """Chunks of 1, 6 or 99: with and without the adversarial step the gradient is that of the full batch."""
    for epsilon in (0.0, 0.5):
        wanted = None
        for chunk in (99, 6, 1):
            cfg, pairs, corpus, cross = parts(world, dropout=0.0, chunk=chunk, adversarial_epsilon=epsilon)
            chunks = make_batch(0, pairs, corpus, cross, cfg)
            loss, correct = add_gradient(chunks, cross, ACCELERATOR, cfg, 0).tolist()
            got = flat_gradient(cross)
            if wanted is None:
                first, wanted = (loss, correct), got
                plain = one_graph(chunks, cross)
            assert close(got, wanted) and abs(loss - first[0]) < 1e-5 and correct == first[1]
        assert close(wanted, plain) == (epsilon == 0.0), "the step must be seen, and only where it is on"


def test_adversarial_step_equals_its_formula(world):
    """
    RocketQA's four steps by plain autograd: delta from the gradient without dropout, the final gradient that
    of a model moved by hand with the same dropout masks, the embeddings back to the bit, no .grad before.
    """
    cfg, pairs, corpus, cross = parts(world, dropout=0.1, adversarial_epsilon=0.5)
    *_, other = parts(world, dropout=0.1)
    chunks = make_batch(0, pairs, corpus, cross, cfg)
    before = cross.model.get_input_embeddings().weight.detach().clone()
    delta = adversarial_step(chunks, cross, ACCELERATOR, cfg)
    assert all(p.grad is None for p in cross.parameters()) and cross.training
    one_graph(chunks, other.eval())
    g = other.model.bert.embeddings.word_embeddings.weight.grad.double()
    wanted = 0.5 * g / torch.sqrt((g * g).sum() + 1e-8)
    assert close(delta, wanted.float()) and abs(delta.norm() - 0.5) < 1e-3

    add_gradient(chunks, cross, ACCELERATOR, cfg, 0)
    assert torch.equal(cross.model.get_input_embeddings().weight, before)
    other.train().zero_grad()
    with torch.no_grad():
        other.model.bert.embeddings.word_embeddings.weight += delta
    loss = 0
    for i, (ids, labels) in enumerate(chunks):
        torch.manual_seed(chunk_seed((cfg.seed, 0, 0), i))
        logits = other(**collate(other, ids))
        loss += F.cross_entropy(logits, torch.tensor(labels), reduction="sum") / 16
    loss.backward()
    assert close(flat_gradient(cross), flat_gradient(other))


def device_gradient(folder, world):
    """On each of W processes: one step and the dev metrics."""
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": dist.get_rank()})
    cfg, pairs, corpus, cross = parts(world, dropout=0.0, adversarial_epsilon=0.5, eval_batch_size=3)
    totals = add_gradient(make_batch(0, pairs, corpus, cross, cfg), cross, accelerator, cfg, 0)
    dev, dev_pairs, _ = read_pairs(cfg.dev, corpus)
    metrics = evaluate(dev, tokenize(dev_pairs, corpus, cross), cross, accelerator, cfg)
    torch.save((totals, flat_gradient(cross), metrics), f"{folder}/{dist.get_rank()}.pt")


def test_two_devices_give_the_gradient_of_one(world, tmp_path):
    """Two gloo processes, adversarial step included: gradient, loss and dev metrics of a single device."""
    on_devices(2, device_gradient, str(tmp_path), world)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert torch.equal(both[0][1], both[1][1]), "devices must hold the same gradient"
    cfg, pairs, corpus, cross = parts(world, dropout=0.0, adversarial_epsilon=0.5, eval_batch_size=3)
    totals = add_gradient(make_batch(0, pairs, corpus, cross, cfg), cross, ACCELERATOR, cfg, 0)
    assert close(both[0][1], flat_gradient(cross)) and torch.allclose(totals, both[0][0])
    dev, dev_pairs, _ = read_pairs(cfg.dev, corpus)
    assert both[0][2] == evaluate(dev, tokenize(dev_pairs, corpus, cross), cross, ACCELERATOR, cfg)


def test_biases_and_layer_norms_are_not_decayed(world):
    """RocketQA's two groups: matrices are decayed, `_bias` and `layer_norm` are not."""
    *_, cross = parts(world)
    names = {p: name for name, p in cross.named_parameters()}
    decayed, plain = (
        [names[p] for p in group["params"]]
        for wanted in (0.01, 0.0)
        for group in make_optimizer(cross.named_parameters(), config(world)[0]).param_groups
        if group["weight_decay"] == wanted
    )
    assert len(decayed) + len(plain) == len(names)
    assert all(name.endswith("bias") or "LayerNorm" in name for name in plain)
    assert not any("LayerNorm" in name or "bias" in name for name in decayed)


def test_dev_metrics_by_hand():
    """
    Ranks 1, 2 (a tie counts against the positive) and 2 (the better of two positives); the question without
    negatives has no rank; right are 0.9, 0.1 · none · 0.6, 0.2 · 0.8.
    """
    sizes = [(1, 1), (1, 1), (2, 2), (1, 0)]
    examples = [{"positives": ["p"] * n, "negatives": ["n"] * m} for n, m in sizes]
    p_N = np.array([0.9, 0.1, 0.5, 0.5, 0.6, 0.3, 0.7, 0.2, 0.8])
    metrics = dev_metrics(examples, p_N)
    assert metrics == {"accuracy": pytest.approx(6 / 9), "mrr": pytest.approx((1 + 1 / 2 + 1 / 2) / 3)}
    assert dev_metrics(examples[:1], np.array([0.9, np.nan])) == {"accuracy": 0.5, "mrr": 0.5}


# ---------------------------------------------------------------- the command, as its user meets it
def rows(run_dir):
    """metrics.jsonl without what differs between two runs: the time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run of 66 steps: (its keys, its folder)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _, keys = config(world)
    done = run("train_cross_encoder.py", keys | {"run_dir": folder})
    assert done.returncode == 0, done.stderr[-2000:]
    return keys, folder


def test_a_finished_run_has_learned(whole):
    """From chance (loss 0.64, MRR 0.61) to every red passage before every other; the best is published."""
    keys, folder = whole
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert len(losses) == 66 and np.mean(losses[-10:]) < 0.3 < 0.5 < np.mean(losses[:10])
    final = json.loads((folder / "metrics.json").read_text())
    assert final["best"] == 1.0 and "4 pairs left over" in (folder / "log.txt").read_text()
    cross = load_cross_encoder(folder / "cross_encoder")
    assert cross.inputs["pair"].endswith(f"-{final['best_step']}") and cross.inputs["pair_tokens"] == 32


def test_killed_it_resumes_to_the_same_bits(whole, tmp_path):
    """SIGKILL in the middle, on again: every loss, every dev number and the weights are bit-equal."""
    keys, folder = whole
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact"}
    process = begin("train_cross_encoder.py", keys)
    next(line for line in process.stdout if line.startswith("step     1"))  # step 10
    kill_tree(process, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists(), "the kill must have hit a running process"
    done = run("train_cross_encoder.py", keys)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows(tmp_path / "run") == rows(folder)
    name = "cross_encoder/model.safetensors"
    a, b = load_file(tmp_path / "run" / name), load_file(folder / name)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def call(keys, monkeypatch):
    """main() in this process, without its signal handlers."""
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_cross_encoder.py", *argv])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    main()


def test_mistakes_end_in_one_line(whole, world, tmp_path, monkeypatch):
    """One sentence with the file or key, before any training."""
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"qid": "1", "question": "which is red", "positives": ["1"]}\n')
    for changes, words in (
        ({"train": lone}, [str(lone), "no question has any negatives"]),
        ({"dev": lone}, [str(lone), "no question has any negatives"]),
        ({"batch_size": 256}, ["180 pairs", "256"]),
        ({"corpus": ""}, ["corpus is empty"]),
        ({"train": "nowhere.jsonl"}, ["train", "nowhere.jsonl"]),
        ({"init": world / "nowhere"}, ["nowhere"]),
        ({"chunk": 0}, ["chunk must be at least 1"]),
        ({"run_dir": whole[1]}, ["--resume exact"]),
        ({"run_dir": whole[1], "resume": "exact", "chunk": 5}, ["chunk: 6 then, 5 now"]),
    ):
        _, keys = config(world, **{"run_dir": tmp_path / "run"} | changes)
        with pytest.raises(UserError) as error:
            call(keys, monkeypatch)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(world, tmp_path, monkeypatch):
    """A NaN in the starting weights: step, loss and norm are named, no checkpoint is written."""
    *_, cross = parts(world)
    with torch.no_grad():
        cross.model.bert.embeddings.LayerNorm.weight[0] = float("nan")
    save_encoder(cross, tmp_path / "nan")
    _, keys = config(world, init=tmp_path / "nan", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="step 1: loss nan"):
        call(keys, monkeypatch)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dry_run_writes_nothing(world, tmp_path, monkeypatch, capsys):
    """Parameters, memory, disk and minutes are printed; no folder appears."""
    call(config(world, run_dir=tmp_path / "run", dry_run=True)[1], monkeypatch)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "memory", "disk", "minutes"))
    assert not (tmp_path / "run").exists()


def test_the_rate_is_constant_after_its_rise_and_stop_after_stops(world, whole, tmp_path, monkeypatch):
    """No decay (RocketQA's optimization.py:70): a rise over `warmup` steps, then the peak to the end."""
    assert {row["lr"] for row in rows(whole[1]) if "lr" in row} == {float(whole[0]["learning_rate"])}
    keys = {
        "run_dir": tmp_path / "run",
        "warmup": 4,
        "stop_after": 6,
        "learning_rate": 1e-3,
        "adversarial_epsilon": 0,
    }
    call(config(world, **keys)[1], monkeypatch)
    rates = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert rates == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
