"""Rescoring a ranking: the probability of every pair, in order, once, however the work was cut or killed."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rerank
import utils.data
from tests.processes import main, run
from tests.toy import make_world, tokenizer, write_lines
from utils.cross_encoder import CrossEncoder, load_cross_encoder
from utils.data import Corpus, iter_run, read_questions, read_run, write_run
from utils.metrics import one_question_at_a_time, retrieval_metrics
from utils.plumbing.config import UserError
from utils.plumbing.files import read_json
from utils.plumbing.weights import save_encoder


def save_cross(folder, words, seed=0):
    """A random cross-encoder whose probabilities differ from pair to pair."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(words), initializer_range=0.2, num_labels=2, **size)
    inputs = {"role": "cross", "pair_tokens": 24, "token_types": "segments"}
    save_encoder(CrossEncoder(BertForSequenceClassification(config), words, inputs), folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world, a cross-encoder, and test.run: nine passages for each of the ten test questions."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    save_cross(folder / "cross_encoder", tokenizer(folder))
    draw, ranking = random.Random(0), []
    for question in read_questions(folder / "test.jsonl"):
        pids = [*question["positives"], *draw.sample([str(i) for i in range(1, 51)], 8)]
        draw.shuffle(pids)
        ranking.append((question["qid"], [(pid, 9.0 - i // 2) for i, pid in enumerate(pids)]))
    write_run(folder / "test.run", ranking)
    return folder


@pytest.fixture
def keys(world):
    files = {"questions": world / "test.jsonl", "ranking": world / "test.run"}
    files |= {"corpus": world / "corpus.tsv", "cross_encoder": world / "cross_encoder"}
    return files | {"depth": 7, "batch_size": 5, "block": 3}


@pytest.fixture
def call(keys, tmp_path):
    """call(out="a.run", key=value ...) runs the script in this process and returns the file it wrote."""

    def call(out="a.run", **changes):
        main("rerank.py", keys | {"out": tmp_path / out} | changes)
        return tmp_path / out

    return call


@pytest.fixture
def pairs(monkeypatch):
    """A list that gets the number of pairs of every call of `probabilities`."""
    counts, score = [], rerank.probabilities

    def counted(cross, ids, *rest):
        counts.append(len(ids))
        return score(cross, ids, *rest)

    monkeypatch.setattr(rerank, "probabilities", counted)
    return counts


def scores_of(path):
    return {(qid, pid): score for qid, hits in iter_run(path) for pid, score in hits}


def test_a_score_is_the_probability_of_the_pair_alone(world, call):
    """Each of the first `depth` pairs through transformers alone, without padding: the same P to 1e-6."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "cross_encoder").eval()
    words = load_cross_encoder(world / "cross_encoder").tokenizer
    corpus, given = Corpus(world / "corpus.tsv"), read_run(world / "test.run")
    questions = {q["qid"]: q["question"] for q in read_questions(world / "test.jsonl")}
    found, cut = read_run(call()), 0
    assert list(found) == list(given)
    for qid, hits in found.items():
        assert {pid for pid, _ in hits} == {pid for pid, _ in given[qid][:7]}
        assert hits == sorted(hits, key=lambda hit: -hit[1])
        for pid, score in hits:
            passage = corpus.passage(pid)
            texts = questions[qid], f"{passage.title} {passage.text}"
            pair = words(*texts, truncation=True, max_length=24, return_tensors="pt")
            cut += pair.input_ids.shape[1] == 24
            with torch.no_grad():
                alone = model(**pair).logits.double().softmax(1)[0, 1].item()
            assert abs(score - alone) < 1e-6
    assert cut > 5 and len({round(score, 3) for hits in found.values() for _, score in hits}) > 40


def test_order_ties_and_the_last_bit(world, call, monkeypatch):
    """Ties keep the given order, and 1 - 1e-15 stays under 1: the file reads back to the same float64."""
    made = [0.25, 1 - 1e-15, 0.25, 1.0, 1e-300, 0.25, 1 - 1e-15]
    monkeypatch.setattr(rerank, "probabilities", lambda _, ids, *rest: np.array(made * (len(ids) // 7)))
    out = call()
    for qid, given in read_run(world / "test.run").items():
        pids = [pid for pid, _ in given]
        expected = [(pids[i], made[i]) for i in (3, 1, 6, 0, 2, 5, 4)]
        assert read_run(out)[qid] == expected


def test_blocks_batches_and_precision(call):
    """However the pairs are cut, each keeps its probability to 1e-6; bf16 gives others, a hundredth away."""
    one = scores_of(call("a.run"))
    for keys in ({"block": 1}, {"block": 99}, {"batch_size": 1}, {"batch_size": 64}):
        other = scores_of(call("b.run", **keys))
        assert one.keys() == other.keys() and all(abs(one[pair] - other[pair]) < 1e-6 for pair in one)
    half = scores_of(call("b.run", mixed_precision="bf16"))
    assert 1e-5 < max(abs(one[pair] - half[pair]) for pair in one) < 0.05


def test_two_processes_write_the_same_bytes_as_one(keys, call, tmp_path):
    """Block i belongs to process i modulo W and no batch crosses a block, so nothing differs."""
    done = run("rerank.py", keys | {"out": tmp_path / "two.run"}, processes=2)
    assert done.returncode == 0, done.stderr
    assert "42/42" in done.stderr and "70 pairs scored" in done.stdout  # the first has blocks 0 and 2 of 4
    call("one.run")
    for suffix in ("run", "metrics.json"):
        assert (tmp_path / f"two.{suffix}").read_bytes() == (tmp_path / f"one.{suffix}").read_bytes()
    assert len([*tmp_path.iterdir()]) == 4, "only the ranking and the metrics of each are left"


def test_the_run_is_never_in_memory(world, call, monkeypatch):
    """When the first block comes out, the third is not yet read: two blocks, whatever the run's length."""
    read = []

    def counted(path):
        for qid, hits in iter_run(path):
            read.append(qid)
            yield qid, hits

    for module in (rerank, utils.data):
        monkeypatch.setattr(module, "iter_run", counted)
    seen, score = [], rerank.probabilities

    def watched(*args):
        seen.append(len(read) - 10)  # the first pass, which checks, read ten
        return score(*args)

    monkeypatch.setattr(rerank, "probabilities", watched)
    call(block=2)
    assert seen == [4, 6, 8, 10, 10]


DIE = """
import os, rerank
write, calls = rerank.write_run, []
def half(path, results):
    calls.append(path)
    if len(calls) == 3:
        path.with_name(f".{path.name}.1.tmp").write_text("half a part"); os.kill(os.getpid(), 9)
    write(path, results)
rerank.write_run = half
rerank.main()
"""


def test_killed_while_writing_a_part(keys, call, tmp_path, pairs, capsys, monkeypatch):
    """SIGKILL in the third of four blocks: two are kept; on another device the batches stay as they were."""
    out = tmp_path / "a.run"
    (tmp_path / "die.py").write_text(DIE)
    killed = run(str(tmp_path / "die.py"), keys | {"out": out, "batch_size": 0})
    assert killed.returncode == -9, killed.stderr
    parts = sorted(part.name for part in (tmp_path / "a.run.parts").glob("*.run"))
    assert parts == ["00000.run", "00001.run"] and not out.exists()
    monkeypatch.setattr(rerank, "rows_that_fit", lambda *_: 2)
    call(batch_size=0)
    said = capsys.readouterr().out
    assert pairs == [21, 7] and "70 pairs, 42 of them done before" in said and "batches of 128" in said
    assert out.read_bytes() == call("whole.run", batch_size=128).read_bytes()
    assert "batches of 128" in capsys.readouterr().out, "a number that is given prevails"
    assert not (tmp_path / "a.run.parts").exists()


def test_a_crash_in_the_metrics_costs_no_score(call, tmp_path, monkeypatch, pairs):
    """The parts go last: the next call scores nothing and ends. Until then they belong to this job alone."""

    def crash(*args):
        raise UserError("no metrics today")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no metrics"):
        patch.setattr(rerank, "measure", crash)
        call()
    with pytest.raises(UserError, match="depth was 7 there and is 6 now; name another --out, or delete that"):
        call(depth=6)
    (tmp_path / "b.run.parts").mkdir()
    (tmp_path / "b.run.parts" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="b.run.parts is not from this job"):
        call("b.run")
    keys = {"depth", "block", "mixed_precision", "ranking", "questions", "corpus", "corpus_format"}
    assert read_json(tmp_path / "a.run.parts/manifest.json").keys() == keys | {"cross_encoder", "batch_size"}
    assert sum(pairs) == 70
    first = call().read_bytes()
    assert sum(pairs) == 70 and first == call("c.run").read_bytes()
    assert (tmp_path / "a.metrics.json").read_text() == (tmp_path / "c.metrics.json").read_text()


def measured(world, path, depth):
    """The metrics of a run cut at `depth`; its questions may be in any order."""
    ranking = {qid: hits[:depth] for qid, hits in iter_run(path)}
    questions = read_questions(world / "test.jsonl")
    hits = ((q["qid"], ranking[q["qid"]]) for q in questions if q["qid"] in ranking)
    ranked = one_question_at_a_time(questions, hits)
    return retrieval_metrics(ranked, Corpus(world / "corpus.tsv"), [1, 5])


def test_metrics_before_and_after(world, call, tmp_path, capsys):
    """Those of test_dpr.py on the ranking cut at `depth`, and on the file written; only k <= depth."""
    out = call()
    expected = [measured(world, world / "test.run", 7), measured(world, out, 7)]
    metrics = read_json(tmp_path / "a.metrics.json")
    assert [metrics["before"], metrics["after"]] == expected and expected[0] != expected[1]
    assert list(expected[0]) == ["top-1", "top-5", "hit@1", "hit@5"]
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines() if line.startswith("hit@5")]
    assert [line[1] for line in lines] == [f"{100 * table['hit@5']['value']:.1f}" for table in expected]
    assert [line[-1] for line in lines] == ["10", "10"]
    assert "first pair: [CLS]" in said and "70 pairs scored" in said and "pairs/s" in said


def test_other_orders_and_other_questions(world, call, tmp_path, capsys):
    """A run in its own order, with a stranger and without two: said, left out, and a miss in the metrics."""
    ranking = list(iter_run(world / "test.run"))[::-1][:8]
    ranking.insert(2, ("stranger", [("1", 1.0)]))
    write_run(tmp_path / "mixed.run", ranking)
    found = read_run(call(ranking=tmp_path / "mixed.run"))
    assert list(found) == [qid for qid, _ in ranking if qid != "stranger"]
    said = capsys.readouterr().out
    assert "1 rankings left out" in said and "lacks 2 questions, such as q50" in said
    expected = measured(world, tmp_path / "a.run", 7)
    metrics = read_json(tmp_path / "a.metrics.json")["after"]
    assert all(metrics[name]["value"] == pytest.approx(expected[name]["value"]) for name in expected)
    assert metrics["hit@5"]["n"] == 10


def test_unlabelled_questions(world, call, tmp_path, capsys):
    """RocketQA's step 4: neither answers nor positives, so no metrics, and the ranking all the same."""
    questions = read_questions(world / "test.jsonl")
    bare = [{key: question[key] for key in ("qid", "question")} for question in questions]
    out = call(questions=write_lines(tmp_path / "bare.jsonl", bare))
    assert (
        "has neither answers nor passage ids as positives: only the ranking is written"
        in capsys.readouterr().out
    )
    assert out.read_bytes() == call("b.run").read_bytes()
    assert read_json(tmp_path / "a.metrics.json") == {"before": {}, "after": {}}


def test_bad_models_are_named(world, call, tmp_path):
    """A folder that does not say its lengths, and weights with NaN: a sentence each."""
    cross = load_cross_encoder(world / "cross_encoder")
    cross.model.save_pretrained(tmp_path / "foreign")
    cross.tokenizer.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UserError, match="no encoder_inputs.json.*write one there"):
        call(cross_encoder=tmp_path / "foreign")
    oslo = cross.tokenizer.convert_tokens_to_ids("oslo")
    cross.model.bert.embeddings.word_embeddings.weight.data[oslo] = 3e38
    save_encoder(cross, tmp_path / "nan")
    hits = [(qid, pid) for qid, hits in iter_run(world / "test.run") for pid, _ in hits[:7]]
    qid, pid = next((qid, pid) for qid, pid in hits if 16 <= int(pid) < 21)  # the passages about oslo
    with pytest.raises(UserError, match=f"question '{qid}', passage '{pid}': the score is NaN; the weights"):
        call(cross_encoder=tmp_path / "nan")
