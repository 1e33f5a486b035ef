"""Rescoring a ranking: the probability of every pair, in order, once, however the work was cut or killed."""

import json
import random
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rerank
from test_dpr import retrieval_metrics
from tests.processes import ENVIRONMENT, run
from tests.toy import make_world, tokenizer
from utils.cross_encoder import CrossEncoder, load_cross_encoder
from utils.data import Corpus, iter_run, read_questions, read_run, write_run
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.weights import save_encoder

torch.set_num_threads(1)  # why: threads that wait for each other take seconds on a busy machine
SMALL = {"depth": 7, "batch_size": 5, "block": 3}


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


def arguments(world, out, keys):
    files = {"questions": "test.jsonl", "ranking": "test.run", "corpus": "corpus.tsv"}
    files = {key: world / name for key, name in (files | {"cross_encoder": "cross_encoder"}).items()}
    return files | SMALL | {"out": out} | keys


@pytest.fixture
def call(world, tmp_path, monkeypatch):
    """call(out="a.run", key=value ...) runs the script in this process and returns the file it wrote."""

    def call(out="a.run", **keys):
        keys = arguments(world, tmp_path / out, keys)
        flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["rerank.py", *flags])
        AcceleratorState._reset_state(True)  # why: it keeps the first mixed_precision of a process for ever
        rerank.main()
        return keys["out"]

    return call


def scores_of(path):
    return {(qid, pid): score for qid, hits in iter_run(path) for pid, score in hits}


# ------------------------------------------------------------------------------------------ scores
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
            _, title, text = corpus[corpus.row(pid)]
            pair = words(
                questions[qid], f"{title} {text}", truncation=True, max_length=24, return_tensors="pt"
            )
            cut += pair.input_ids.shape[1] == 24
            with torch.no_grad():
                alone = model(**pair).logits.double().softmax(1)[0, 1].item()
            assert abs(score - alone) < 1e-6
    assert cut > 5 and len({round(score, 3) for score in scores_of(call()).values()}) > 40


def test_order_ties_and_the_last_bit(world, call, monkeypatch):
    """Ties keep the given order, and 1 - 1e-15 stays under 1: the file reads back to the same float64."""
    made = [0.25, 1 - 1e-15, 0.25, 1.0, 1e-300, 0.25, 1 - 1e-15]
    monkeypatch.setattr(
        rerank,
        "probabilities",
        lambda cross, ids, *rest: torch.tensor(made * (len(ids) // 7), dtype=torch.float64).numpy(),
    )
    out = call()
    for qid, given in read_run(world / "test.run").items():
        pids = [pid for pid, _ in given]
        expected = [(pids[i], made[i]) for i in (3, 1, 6, 0, 2, 5, 4)]
        assert read_run(out)[qid] == expected


@pytest.mark.parametrize("keys", [{"block": 1}, {"block": 99}, {"batch_size": 1}, {"batch_size": 64}])
def test_blocks_and_batches_do_not_matter(call, keys):
    """However the pairs are cut, each keeps its probability to 1e-6."""
    one, other = scores_of(call("a.run")), scores_of(call("b.run", **keys))
    assert one.keys() == other.keys() and all(abs(one[pair] - other[pair]) < 1e-6 for pair in one)


def test_bf16_is_near_and_not_the_same(call):
    """mixed_precision reaches the model: other numbers, a hundredth away."""
    one, other = scores_of(call("a.run")), scores_of(call("b.run", mixed_precision="bf16"))
    assert 1e-5 < max(abs(one[pair] - other[pair]) for pair in one) < 0.05


def test_two_processes_write_the_same_bytes_as_one(world, call, tmp_path):
    """Block i belongs to process i modulo W and no batch crosses a block, so nothing differs."""
    keys = yaml.safe_load((ROOT / "config/rerank.yaml").read_text())
    keys |= {
        k: v if isinstance(v, int) else str(v) for k, v in arguments(world, tmp_path / "two.run", {}).items()
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(keys))
    done = run("rerank.py", {"config": tmp_path / "two.yaml"}, processes=2)
    (tmp_path / "two.yaml").unlink()
    assert done.returncode == 0, done.stderr
    assert "42/42" in done.stderr and "70 pairs scored" in done.stdout  # the first has blocks 0 and 2 of 4
    one = call("one.run")
    assert (tmp_path / "two.run").read_bytes() == one.read_bytes()
    metrics = [tmp_path / f"{name}.metrics.json" for name in ("one", "two")]
    assert metrics[0].read_text() == metrics[1].read_text()
    assert {file.name for file in tmp_path.iterdir()} == {f.name for f in metrics} | {"one.run", "two.run"}


def test_the_run_is_never_in_memory(world, call, monkeypatch):
    """When the first block comes out, the third is not yet read: two blocks, whatever the run's length."""
    read = []

    def counted(path):
        for one in iter_run(path):
            read.append(one[0])
            yield one

    monkeypatch.setattr(rerank, "iter_run", counted)
    seen, score = [], rerank.probabilities

    def watched(*args):
        seen.append(len(read) - 10)  # the first pass, which checks, read ten
        return score(*args)

    monkeypatch.setattr(rerank, "probabilities", watched)
    call(block=2)
    assert seen == [4, 6, 8, 10, 10]


# ----------------------------------------------------------------------------------------- crashes
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


def count_pairs(monkeypatch):
    """A list that gets the number of pairs of every call of `probabilities`."""
    pairs, score = [], rerank.probabilities

    def counted(cross, ids, *rest):
        pairs.append(len(ids))
        return score(cross, ids, *rest)

    monkeypatch.setattr(rerank, "probabilities", counted)
    return pairs


def test_killed_while_writing_a_part(world, call, tmp_path, monkeypatch, capsys):
    """SIGKILL in the third of four blocks: two are kept and not scored again, the end is the same."""
    out = tmp_path / "a.run"
    flags = [part for key, value in arguments(world, out, {}).items() for part in (f"--{key}", str(value))]
    argv = [sys.executable, "-c", DIE, *flags]
    one_thread = ENVIRONMENT | {
        "OMP_NUM_THREADS": "1"
    }  # why: another number of threads changes the last bits
    killed = subprocess.run(argv, cwd=ROOT, env=one_thread, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    assert [part.name for part in sorted((tmp_path / "a.run.parts").glob("*.run"))] == [
        "00000.run",
        "00001.run",
    ]
    pairs = count_pairs(monkeypatch)
    call()
    assert pairs == [21, 7] and "70 pairs, 42 of them done before" in capsys.readouterr().out
    assert out.read_bytes() == call("whole.run").read_bytes()
    assert not (tmp_path / "a.run.parts").exists()


def test_a_crash_in_the_metrics_costs_no_score(call, tmp_path, monkeypatch):
    """The parts go last: when the metrics fail, the next call scores nothing and ends."""

    def crash(*args):
        raise UserError("no metrics today")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no metrics"):
        patch.setattr(rerank, "measure", crash)
        call()
    pairs = count_pairs(monkeypatch)
    first = call().read_bytes()
    assert not pairs and first == call("b.run").read_bytes()
    assert (tmp_path / "a.metrics.json").read_text() == (tmp_path / "b.metrics.json").read_text()


def test_parts_of_another_job_are_refused(world, call, tmp_path, monkeypatch):
    """Another depth, model, ranking, question or corpus: both values are named, and nothing is mixed."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rerank, "measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        call()
    save_cross(tmp_path / "other", tokenizer(tmp_path), seed=1)
    altered = {}
    for name, old, new in (("test.run", "\t9.0\n", "\t9.5\n"), ("test.jsonl", "which", "what")):
        altered[name] = tmp_path / name
        altered[name].write_text((world / name).read_text().replace(old, new))
    (tmp_path / "corpus.tsv").write_text((world / "corpus.tsv").read_text().replace("old", "new"))
    for keys, message in (
        ({"depth": 6}, "depth was 7 there and is 6 now; name another --out, or delete that folder"),
        ({"block": 4}, "block was 3 there and is 4 now"),
        ({"mixed_precision": "bf16"}, "mixed_precision was 'no' there and is 'bf16' now"),
        ({"cross_encoder": tmp_path / "other"}, "cross_encoder was '[0-9a-f]*' there"),
        ({"ranking": altered["test.run"]}, "ranking was '[0-9a-f]*' there"),
        ({"questions": altered["test.jsonl"]}, "questions was '[0-9a-f]*' there"),
        ({"corpus": tmp_path / "corpus.tsv"}, "corpus was '[0-9a-f]*' there"),
    ):
        with pytest.raises(UserError, match=message):
            call(**keys)
    (tmp_path / "b.run.parts").mkdir()
    (tmp_path / "b.run.parts" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="b.run.parts is not from this job"):
        call("b.run")
    assert (tmp_path / "b.run.parts" / "notes.txt").exists()


# ----------------------------------------------------------------------------------------- metrics
def test_metrics_before_and_after(world, call, tmp_path, capsys):
    """Those of test_dpr.py on the ranking cut at `depth`, and on the file written; only k <= depth."""
    out = call()
    questions, corpus = read_questions(world / "test.jsonl"), Corpus(world / "corpus.tsv")
    cut = {qid: hits[:7] for qid, hits in iter_run(world / "test.run")}
    expected = [retrieval_metrics(questions, run, corpus, [1, 5])[0] for run in (cut, read_run(out))]
    metrics = json.loads((tmp_path / "a.metrics.json").read_text())
    assert [metrics["before"], metrics["after"]] == expected and expected[0] != expected[1]
    assert list(expected[0]) == ["top-1", "top-5", "hit@1", "hit@5"]
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("hit@5")).split()
    assert line[1] == f"{100 * expected[0]['hit@5']['value']:.1f}"
    assert line[5] == f"{100 * expected[1]['hit@5']['value']:.1f}" and line[-1] == "10"
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
    questions, corpus = read_questions(world / "test.jsonl"), Corpus(world / "corpus.tsv")
    expected = retrieval_metrics(questions, found, corpus, [1, 5])[0]
    metrics = json.loads((tmp_path / "a.metrics.json").read_text())["after"]
    assert all(metrics[name]["value"] == pytest.approx(expected[name]["value"]) for name in expected)
    assert metrics["hit@5"]["n"] == 10


def test_unlabelled_questions(world, call, tmp_path, capsys):
    """RocketQA's step 4: neither answers nor positives, so no metrics, and the ranking all the same."""
    lines = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    bare = [json.dumps({key: line[key] for key in ("qid", "question")}) + "\n" for line in lines]
    (tmp_path / "bare.jsonl").write_text("".join(bare))
    out = call(questions=tmp_path / "bare.jsonl")
    assert "has neither answers nor positives: only the ranking is written" in capsys.readouterr().out
    assert out.read_bytes() == call("b.run").read_bytes()
    assert json.loads((tmp_path / "a.metrics.json").read_text()) == {"before": {}, "after": {}}


# ---------------------------------------------------------------------------------------- refusals
def test_bad_inputs_are_named_before_the_model_loads(world, call, tmp_path, monkeypatch):
    """One sentence each, no model read, and nothing written."""
    monkeypatch.setattr(rerank, "load_cross_encoder", None)
    files = {
        "ghost.run": "q50\t1\t1\t2.0\nq50\t999\t2\t1.0\n",
        "order.run": "q50\t1\t1\t2.0\nq50\t2\t2\t3.0\n",
        "none.run": "x\t1\t1\t2.0\n",
        "lost.jsonl": '{"qid": "q50", "question": "who", "positives": ["999"]}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for keys, message in (
        ({"out": "x.tsv"}, "out must be the path of a .run file"),
        ({"out": world / "test.run"}, "is an input too .ranking."),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"ranking": tmp_path / "absent.run"}, "ranking: .*absent.run: no such file"),
        ({"ranking": tmp_path / "ghost.run"}, "no passage has the id '999'"),
        (
            {"ranking": tmp_path / "order.run"},
            "order.run:2: score 3.0 under rank 2 is not in descending order",
        ),
        ({"ranking": tmp_path / "none.run"}, "has none of the questions of"),
        ({"questions": tmp_path / "lost.jsonl"}, "no passage has the id '999'"),
    ):
        with pytest.raises(UserError, match=message):
            call(**keys)
    assert {file.name for file in tmp_path.iterdir()} == set(files)


def test_bad_models_are_named(world, call, tmp_path):
    """A dual encoder, a folder that does not say its lengths, and weights with NaN: a sentence each."""
    with pytest.raises(UserError, match="a cross-encoder is needed"):
        call(cross_encoder=world / "doc_encoder")
    cross = load_cross_encoder(world / "cross_encoder")
    cross.model.save_pretrained(tmp_path / "foreign")
    cross.tokenizer.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UserError, match="no encoder_inputs.json.*write one there"):
        call(cross_encoder=tmp_path / "foreign")
    oslo = cross.tokenizer.convert_tokens_to_ids("oslo")
    cross.model.bert.embeddings.word_embeddings.weight.data[oslo] = float("nan")
    save_encoder(cross, tmp_path / "nan")
    qid, pid = next(
        (q, p) for q, hits in iter_run(world / "test.run") for p, _ in hits[:7] if 16 <= int(p) < 21
    )
    with pytest.raises(UserError, match=f"question '{qid}', passage '{pid}': the score is NaN; the weights"):
        call(cross_encoder=tmp_path / "nan")


def test_dry_run_writes_nothing(call, tmp_path, capsys):
    """It says what the job would cost, and leaves nothing behind."""
    call(dry_run="true")
    said = capsys.readouterr().out
    assert "dry run: rescoring" in said and "70 pairs on this device" in said
    assert not list(tmp_path.iterdir())
