"""The cross-encoder and its trainer against RocketQA's token ids, plain autograd and numbers by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

import train_cross_encoder as trainer
from tests.processes import flags, main, rows
from tests.toy import ACCELERATOR, close, flat_gradient, golden_file, write_lines
from utils.corpus import Passage
from utils.cross_encoder import CrossEncoder, load_cross_encoder, probabilities, tokenize_pairs
from utils.data import Corpus
from utils.distributed import chunk_seed
from utils.encoder import collate
from utils.plumbing.config import UserError, load_config
from utils.plumbing.weights import load_encoder, save_encoder


def keys(world, run_dir, **changes):
    """The command-line keys of a toy run in a world of tests/toy.py, with changes."""
    files = {"init": world / "bert", "run_dir": run_dir, "corpus": world / "corpus.tsv"}
    files |= {"train": world / "train.jsonl", "dev": world / "dev.jsonl"}
    sizes = {"pair_tokens": 32, "layer_norm_epsilon": 0.0, "batch_size": 16, "chunk": 6}
    return files | sizes | {"learning_rate": 1e-3, "epochs": 6, "save_every": 5} | changes


def parts(world, **changes):
    """What one step needs: (settings, pairs, corpus, model)."""
    argv = flags(keys(world, world / "run", **changes))
    cfg = load_config("", "config/train_cross_encoder_nq.yaml", argv)
    torch.manual_seed(cfg.seed)
    cross = load_cross_encoder(cfg.init, cfg.pair_tokens, cfg.dropout, new_head=True).train()
    corpus = Corpus(cfg.corpus)
    _, pairs, _ = trainer.read_pairs(cfg.train, corpus)
    return cfg, pairs, corpus, cross


# ---------------------------------------------------------------- input and output of the model
def test_token_ids_equal_rocketqa(tmp_path):
    """`[CLS] question [SEP] title text [SEP]` and its segments, in all golden cases of RocketQA."""
    path = tmp_path / "vocab.txt"
    golden = golden_file("tokenize_pair")
    path.write_text("\n".join(golden["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    cases = [case for case in golden["cases"] if case["mode"] == "rocketqa_cross"]
    assert len(cases) == 21 and any(len(case["ids"]) == case["max_length"] for case in cases)
    for case in cases:
        inputs = {"role": "cross", "pair_tokens": case["max_length"], "token_types": "segments"}
        cross = CrossEncoder(torch.nn.Linear(1, 1), words, inputs)
        ids = tokenize_pairs(cross, [(case["query"], Passage("1", case["title"], case["text"]))])
        assert ids == [case["ids"]]
        assert collate(cross, ids)["token_type_ids"].tolist() == [case["token_type_ids"]]
    assert tokenize_pairs(cross, []) == []


def test_probabilities_are_float64_and_without_dropout(world):
    """Surer pairs stay apart: in float32 each of them would be 1.0."""
    *_, cross = parts(world, dropout=0.5)
    ids = [[2, 7, 3, 9, 3]]
    assert probabilities(cross, ids, 1) == probabilities(cross, ids, 1) and cross.training
    with torch.no_grad():
        cross.model.classifier.weight.zero_()
        cross.model.classifier.bias.copy_(torch.tensor([-14.0, 14.0]))
    sure = probabilities(cross, ids, 1)[0]
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


def test_other_models_are_refused(world, tmp_path, capsys):
    """Random weights and other models load without an exception: each is refused, a new pooler is told."""
    cross = load_cross_encoder(world / "bert", 32, new_head=True, layer_norm_epsilon=1e-5)
    assert "no pooler" in capsys.readouterr().err
    save_encoder(cross, tmp_path / "cross")
    again = load_cross_encoder(tmp_path / "cross")
    assert again.inputs == cross.inputs and "no pooler" not in capsys.readouterr().err
    assert all(map(torch.equal, again.parameters(), cross.parameters()))
    # ERNIE's epsilon is not BERT's, and no weight tells: it is set everywhere, saved and loaded
    norms = [module for module in again.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}

    weights = load_file(tmp_path / "cross" / "model.safetensors")
    part = {key: value for key, value in weights.items() if "layer.1" not in key}
    cross.model.save_pretrained(tmp_path / "part", state_dict=part)
    cross.tokenizer.save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match="cross encoder"):
        load_encoder(tmp_path / "cross", "question")
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


# ---------------------------------------------------------------- batches and gradients
def test_a_batch_is_a_function_of_seed_and_step(world):
    """An epoch shows each pair once, but for those that fill no batch; another epoch has another order."""
    cfg, pairs, corpus, cross = parts(world)
    assert len(pairs) == 120 and sum(label for _, _, label in pairs) == 40
    ids = trainer.tokenize(pairs, corpus, cross)
    epochs = []
    for epoch in (0, 1):
        seen = []
        for step in range(7 * epoch, 7 * epoch + 7):
            chunks = trainer.make_batch(step, pairs, corpus, cross, cfg)
            assert chunks == trainer.make_batch(step, pairs, corpus, cross, cfg)
            assert [len(rows) for rows, _ in chunks] == [6, 6, 4]
            lengths = [len(row) for rows, _ in chunks for row in rows]
            assert lengths == sorted(lengths) and len({*lengths}) > 1
            for chunk_rows, labels in chunks:
                seen += zip(chunk_rows, labels, strict=True)
        left = [(row, pair[2]) for row, pair in zip(ids, pairs, strict=True)]
        for pair in seen:
            left.remove(pair)  # raises where a pair comes more often than it is there
        assert len(left) == 8
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def one_graph(chunks, cross):
    """The oracle: one padded batch, plain autograd -> (loss, how many are right, gradient)."""
    ids = [row for rows, _ in chunks for row in rows]
    labels = torch.tensor([label for _, labels in chunks for label in labels])
    cross.zero_grad()
    logits = cross(**collate(cross, ids))
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss.item(), (logits.argmax(1) == labels).sum().item(), flat_gradient(cross)


@pytest.mark.parametrize("chunk", [99, 6, 1])
def test_gradient_does_not_depend_on_the_chunks(world, chunk):
    """Without the adversarial step: the loss, what is right and the gradient of one padded batch."""
    cfg, pairs, corpus, cross = parts(world, dropout=0.0, chunk=chunk, adversarial_epsilon=0.0)
    chunks = trainer.make_batch(0, pairs, corpus, cross, cfg)
    loss, correct = trainer.add_gradient(chunks, cross, ACCELERATOR, cfg, 0).tolist()
    gradient = flat_gradient(cross)
    wanted_loss, wanted_correct, wanted = one_graph(chunks, cross)
    assert abs(loss - wanted_loss) < 1e-5 and correct == wanted_correct
    assert close(gradient, wanted)


def test_adversarial_step_equals_its_formula(world):
    """By plain autograd: the step without dropout, then the gradient of a model that was moved by hand."""
    cfg, pairs, corpus, cross = parts(world, dropout=0.1, adversarial_epsilon=0.5)
    *_, other = parts(world, dropout=0.1)
    chunks = trainer.make_batch(0, pairs, corpus, cross, cfg)
    before = cross.model.get_input_embeddings().weight.detach().clone()
    step = trainer.adversarial_step(chunks, cross, ACCELERATOR, cfg)
    assert all(parameter.grad is None for parameter in cross.parameters()) and cross.training
    one_graph(chunks, other.eval())
    weight = other.model.bert.embeddings.word_embeddings.weight
    g = weight.grad.double()
    wanted = 0.5 * g / torch.sqrt((g * g).sum() + 1e-8)
    assert close(step, wanted.float()) and abs(step.norm() - 0.5) < 1e-3

    trainer.add_gradient(chunks, cross, ACCELERATOR, cfg, 0)
    assert torch.equal(cross.model.get_input_embeddings().weight, before)
    other.train().zero_grad()
    with torch.no_grad():
        weight += step
    loss = 0
    for i, (ids, labels) in enumerate(chunks):
        torch.manual_seed(chunk_seed((cfg.seed, 0, 0), i))
        logits = other(**collate(other, ids))
        loss += F.cross_entropy(logits, torch.tensor(labels), reduction="sum") / 16
    loss.backward()
    assert close(flat_gradient(cross), flat_gradient(other))


def test_dev_metrics_by_hand():
    """A tie counts against the positive, the better of two positives counts, no negatives give no rank."""
    sizes = [(1, 1), (1, 1), (2, 2), (1, 0)]
    examples = [{"positives": ["p"] * n, "negatives": ["n"] * m} for n, m in sizes]
    p_N = np.array([0.9, 0.1, 0.5, 0.5, 0.6, 0.3, 0.7, 0.4, 0.8])  # ranks 1, 2, 2; wrong: 0.5, 0.3, 0.7
    metrics = trainer.dev_metrics(examples, p_N)
    assert metrics == {"accuracy": pytest.approx(6 / 9), "mrr": pytest.approx((1 + 1 / 2 + 1 / 2) / 3)}
    assert trainer.dev_metrics(examples[:1], np.array([0.9, np.nan])) == {"accuracy": 0.5, "mrr": 0.5}


def test_a_run_learns(world, tmp_path):
    """Red passages are relevant: every one comes to the top. The rate rises, then it is constant."""
    corpus = Corpus(world / "corpus.tsv")
    rng = np.random.default_rng(0)
    for name, questions, ids in (("train", 60, range(1, 41)), ("dev", 20, range(41, 61))):
        texts = {str(i): corpus.passage(str(i)).text for i in ids}
        red = [pid for pid in texts if " red" in texts[pid]]
        other = [pid for pid in texts if pid not in red]
        lines = []
        for i in range(questions):
            line = {"qid": f"q{i}", "question": "which is red", "positives": [str(rng.choice(red))]}
            lines.append(line | {"negatives": rng.choice(other, 2, replace=False).tolist()})
        write_lines(tmp_path / f"{name}.jsonl", lines)

    files = {"train": tmp_path / "train.jsonl", "dev": tmp_path / "dev.jsonl"}
    main("train_cross_encoder.py", keys(world, tmp_path / "run", warmup=4, **files))
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    losses = [row["loss"] for row in steps]
    rates = [row["lr"] for row in steps]
    assert len(losses) == 66 and np.mean(losses[-10:]) < 0.3 < 0.5 < np.mean(losses[:10])
    assert rates == pytest.approx([0.0, 2.5e-4, 5e-4, 7.5e-4] + [1e-3] * 62)
    final = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert final["best"] == 1.0 and "4 pairs left over" in (tmp_path / "run" / "log.txt").read_text()
    cross = load_cross_encoder(tmp_path / "run" / "cross_encoder")
    assert cross.inputs["pair"].endswith(f"-{final['best_step']}") and cross.inputs["pair_tokens"] == 32
