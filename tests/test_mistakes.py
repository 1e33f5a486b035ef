"""
The mistakes of users, as one table: (script, the keys that are wrong, words of the one line on the screen).

All paths are in the folder of the fixture `mistakes`; ` ... ` stands for any letters.
"""

import io
import shutil
from pathlib import Path

import pytest

from tests import test_train_cross_encoder, test_train_dpr, test_train_reader
from tests.processes import main
from tests.test_rerank import save_cross
from tests.toy import make_world, tokenizer
from utils.data import Corpus, write_run
from utils.plumbing.config import friendly_errors
from utils.plumbing.files import read_json, write_json

TRAINERS = {
    "train_cross_encoder": test_train_cross_encoder,
    "train_dpr": test_train_dpr,
    "train_reader": test_train_reader,
}
ASKED = {"questions": "test.jsonl"}
VECTORS = {"embeddings": "embeddings", "query_encoder": "query_encoder"}
TOWERS = VECTORS | {"doc_encoder": "doc_encoder"}
CORRECT = {
    "answer": ASKED | {"ranking": "test.run", "reader": "bert", "out": "new.json", "depth": 2},
    "ask": {"run": "."},
    "doc2embedding": {"doc_encoder": "doc_encoder", "out": "new", "shard_size": 25},
    "mine_negatives": ASKED | {"run": "test.run", "out": "new/x.jsonl", "negatives": 2},
    "rerank": ASKED | {"ranking": "test.run", "cross_encoder": "cross_encoder", "out": "new/x.run"},
    "test_dpr": ASKED | VECTORS | {"out": "new/x.run"},
    "train_emdr2": TOWERS | {"train": "train.jsonl", "dev": "", "run_dir": "new"},
}
MISTAKES = [
    *(
        ("answer", {"out": "o.json", key: f"o{suffix}"}, f"is an input too ({key})")
        for key in ("questions", "ranking", "corpus")
        for suffix in (".json", ".answers.json", ".metrics.json")
    ),
    ("answer", {"out": "x.txt"}, "out must be the path of a .json file"),
    ("answer", {"depth": 0}, "depth must be at least 1"),
    ("answer", {"ranking": ""}, "ranking: give a path"),
    ("answer", {"reader": "query_encoder"}, "this is a question encoder; a reader is needed here"),
    ("answer", {"reader": "bert"}, "without the reader's outputs"),
    ("ask", {"run": "no"}, "no such folder"),
    ("ask", {"run": "half"}, "has no embeddings/manifest.json; doc2embedding.py writes it"),
    ("ask", {"corpus": "no.tsv"}, "no.tsv: no such file"),
    ("ask", {"k": 0}, "k must be at least 1"),
    ("ask", {"questions": "number.jsonl"}, "number.jsonl:1: 'question' must be a string"),
    ("ask", {"reader": "half/reader"}, "reader: ... no such model folder"),
    ("ask", {"reader": "half"}, "reader: ... is no model, but the folder of reading"),
    ("ask", {"kk": 3}, "unknown key --kk; did you mean 'k'"),
    ("doc2embedding", {"doc_encoder": "query_encoder"}, "a question encoder; a passage encoder is needed"),
    ("doc2embedding", {"corpus": "none.tsv"}, "corpus: none.tsv: no such file"),
    ("doc2embedding", {"out": "test.run/e"}, "test.run is a file, not a folder"),
    ("doc2embedding", {"mixed_precision": "fp16"}, "mixed_precision fp16 needs a GPU"),
    ("doc2embedding", {"compile": "true"}, "compile: a CPU gains too little"),
    ("doc2embedding", {"server": 3, "servers": 3}, "server must be one of 0 to 2, got 3"),
    ("doc2embedding", {"out": "embeddings", "dtype": "float32"}, "dtype was 'float16' there and is"),
    ("doc2embedding", {"out": "embeddings", "shard_size": 8}, "shard_size was 25 there and is 8 now"),
    ("doc2embedding", {"out": "embeddings", "mixed_precision": "bf16"}, "mixed_precision was 'no' there"),
    ("doc2embedding", {"out": "embeddings", "corpus": "short.tsv"}, "rows was 60 there and is 1 now; corpus"),
    ("doc2embedding", {"out": "embeddings", "doc_encoder": "other_encoder"}, "encoder was '"),
    ("doc2embedding", {"out": "stray"}, "00003.npy is not from this job"),
    ("doc2embedding", {"out": "noteless"}, "00002.npy is not from this job"),
    ("doc2embedding", {"out": "unnamed"}, "00000.npy is not from this job"),
    ("mine_negatives", {"out": ""}, "out: give a path, it is empty"),
    ("mine_negatives", {"run": ""}, "run: give a path, it is empty"),
    ("mine_negatives", {"out": "test.jsonl/x.jsonl"}, "is a file, not a folder"),
    ("mine_negatives", {"out": "test.jsonl"}, "is an input too (questions)"),
    ("mine_negatives", {"negatives": 9, "depth": 5}, "negatives (9) must be at most depth (5)"),
    ("mine_negatives", {"run": "other.run"}, "other.run: has none of the questions of"),
    ("mine_negatives", {"questions": "ghost.jsonl"}, "ghost.jsonl:1: ... no passage has the id '999'"),
    ("mine_negatives", {"run": "ghost.run"}, "ghost.run: question 'q50': ... no passage has the id '999'"),
    ("mine_negatives", {"questions": "bare.jsonl"}, "no question is left"),
    ("mine_negatives", {"mode": "pseudo_label"}, "give --scores, a .run of rerank.py"),
    ("mine_negatives", {"scores": "test.run"}, "scores is for mode denoise or pseudo_label, not topk"),
    ("mine_negatives", {"lookahead_run": "test.run", "mode": "denoise"}, "lookahead_run is for mode tele"),
    ("mine_negatives", {"mode": "denoise", "fill": "true"}, "fill tops up what the scores leave"),
    ("mine_negatives", {"mode": "teleport", "momentum": "test.run"}, "test.run: is a table, not json lines"),
    ("mine_negatives", {"mode": "teleport", "momentum": "bare.jsonl"}, "bare.jsonl:1: 'negatives' must be"),
    ("rerank", {"out": "x.tsv"}, "out must be the path of a .run file"),
    ("rerank", {"depth": 0}, "depth must be at least 1"),
    ("rerank", {"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
    ("rerank", {"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    ("rerank", {"ranking": "absent.run"}, "ranking: absent.run: no such file"),
    ("rerank", {"ranking": "ghost.run"}, "no passage has the id '999' that ghost.run names"),
    ("rerank", {"ranking": "other.run"}, "has none of the questions of"),
    ("rerank", {"questions": "ghost.jsonl"}, "ghost.jsonl:1: ... no passage has the id '999'"),
    ("rerank", {"cross_encoder": "doc_encoder"}, "a cross-encoder is needed"),
    ("test_dpr", {"embeddings": "damaged"}, "00001.npy has another sha256"),
    ("test_dpr", {"corpus": "pink.tsv"}, "another corpus"),
    ("test_dpr", {"query_encoder": "stranger"}, "stranger (pair another) was not trained with the passage"),
    ("test_dpr", {"questions": "ghost.jsonl"}, "ghost.jsonl:1: ... no passage has the id '999'"),
    ("test_dpr", {"embeddings": "blank"}, "blank/manifest.json: not valid json ... delete it and repeat"),
    ("test_dpr", {"embeddings": "listed"}, "listed: manifest.json is damaged; repeat doc2embedding.py"),
    ("train_dpr", {"train": "second.jsonl"}, "second.jsonl:2: ... no passage has the id '999'"),
    ("train_cross_encoder", {"dev": "second.jsonl"}, "second.jsonl:2: ... no passage has the id '999'"),
    ("train_dpr", {"train": "same.jsonl", "negatives": 0}, "nothing to tell apart"),
    ("train_emdr2", {"top_k": 1}, "top_k must be at least 2, got 1"),
    ("train_reader", {"train": "everywhere.jsonl"}, "every passage holds an answer ... raise train_depth"),
    ("test_dpr", {"questions": "missing.jsonl"}, "questions: missing.jsonl: no such file"),
    ("test_dpr", {"bm25_run": "ghost.run"}, "no passage has the id '999' that ghost.run names"),
    ("answer", {"ranking": "ghost.run"}, "no passage has the id '999' that ghost.run names"),
    ("test_dpr", {"questions": "o.json", "question_vectors": "o.npy"}, "o.json is an input too (questions)"),
    ("test_dpr", {"bm25_run": "other.run"}, "other.run: has none of the questions of test.jsonl"),
    ("test_dpr", {"bm25_run": "none.run"}, "bm25_run: none.run: no such file"),
    ("test_dpr", {"bm25_run": "test.run", "lookahead": "true"}, "leave out bm25_run"),
    ("test_dpr", {"lookahead": "true", "questions": "bare.jsonl"}, "bare.jsonl: 1 of 1 questions have no"),
    ("test_dpr", {"k": 0}, "k must be at least 1"),
    ("test_dpr", {"match": "fuzzy"}, "match must be one of string, regex"),
    ("test_dpr", {"out": "x.txt"}, "out must be the path of a .run file"),
    *(
        (name, {"questions": "o.metrics.json", "out": "o.run"}, "o.metrics.json is an input too (questions)")
        for name in ("test_dpr", "rerank")
    ),
    ("test_dpr", {"question_tokens": 2}, "question_tokens must be at least 4, got 2"),
    ("train_cross_encoder", {"train": "lone.jsonl"}, "lone.jsonl: no question has any negatives"),
    ("train_cross_encoder", {"dev": "lone.jsonl"}, "lone.jsonl: no question has any negatives"),
    ("train_cross_encoder", {"batch_size": 256}, "120 pairs do not fill one batch of 256"),
    ("train_cross_encoder", {"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
    ("train_cross_encoder", {"pair_tokens": 3}, "pair_tokens must be at least 4"),
    ("train_dpr", {"train": "nowhere.jsonl"}, "train: nowhere.jsonl: no such file"),
    ("train_dpr", {"batch_size": 64}, "40 questions ... 64"),
    ("train_dpr", {"batch_size": 1, "negatives": 0}, "nothing to tell apart"),
    ("train_dpr", {"corpus": ""}, "names passage '1', but corpus is empty"),
    ("train_dpr", {"question_tokens": 0}, "question_tokens must be at least 4, got 0"),
    ("train_dpr", {"dropout": 1.5}, "dropout must be below 1, got 1.5"),
    ("train_dpr", {"pooling": "max"}, "pooling ... cls, mean ... 'max'"),
    ("train_reader", {"train": "far.jsonl"}, "0 of 1 questions kept ... 1 with no answer in any passage"),
    ("train_reader", {"train": "bare.jsonl"}, "bare.jsonl:1 ... 'answers' is missing"),
    ("train_reader", {"corpus": ""}, "corpus: give a path"),
    ("train_reader", {"dev_run": ""}, "dev_run: give a path"),
    ("train_reader", {"passages_per_question": 1}, "passages_per_question must be at least 2"),
]
FOLDERS = [  # why before the corpus is read: the index of 21M passages takes minutes
    *((name, {"run_dir": "o.json"}, "run_dir: o.json: ... is a file, not a folder") for name in TRAINERS),
    *((name, {"init": "./no"}, "init: ./no: no such model folder") for name in TRAINERS),
    ("train_emdr2", {"run_dir": "o.json"}, "run_dir: o.json: ... is a file, not a folder"),
    ("train_emdr2", {"reader": "./no"}, "reader: ./no: no such model folder"),
    ("train_emdr2", {"doc_encoder": "./no"}, "doc_encoder: ./no: no such model folder"),
    ("train_emdr2", {"embeddings": ""}, "embeddings: give a path, it is empty"),
    ("test_dpr", {"embeddings": ""}, "embeddings: give a path, it is empty"),
    ("test_dpr", {"query_encoder": "./no"}, "query_encoder: ./no: no such model folder"),
    ("doc2embedding", {"doc_encoder": "./no"}, "doc_encoder: ./no: no such model folder"),
    ("rerank", {"cross_encoder": "./no"}, "cross_encoder: ./no: no such model folder"),
    ("answer", {"reader": "./no"}, "reader: ./no: no such model folder"),
]
LOADS = {  # what loads a model; a mistake of another key must be found before
    "answer.load_model": "reader",
    "ask.load": "",
    "rerank.load_cross_encoder": "cross_encoder",
    "test_dpr.load_encoder": "",
}


def change_json(path, keys):
    write_json(path, read_json(path) | keys)


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """The toy world, its vectors, a ranking and models, and everything that can be wrong."""
    folder = make_world(tmp_path_factory.mktemp("mistakes") / "world")
    shards = {"corpus": folder / "corpus.tsv", "doc_encoder": folder / "doc_encoder", "shard_size": 25}
    main("doc2embedding.py", shards | {"out": folder / "embeddings"})
    save_cross(folder / "cross_encoder", tokenizer(folder))
    write_run(folder / "test.run", [("q50", [("51", 2.0), ("1", 1.0)])])

    # folders of vectors
    for name in ("damaged", "stray", "noteless"):
        shutil.copytree(folder / "embeddings", folder / name)
    content = bytearray((folder / "damaged/00001.npy").read_bytes())
    content[-1] ^= 1
    (folder / "damaged/00001.npy").write_bytes(content)
    shutil.copy(folder / "stray/00000.npy", folder / "stray/00003.npy")
    shutil.copy(folder / "stray/00000.json", folder / "stray/00003.json")
    (folder / "noteless/00002.json").unlink()
    for name in ("unnamed", "stranger", "half/query_encoder"):
        (folder / name).mkdir(parents=True)
    shutil.copy(folder / "embeddings/00000.npy", folder / "unnamed")
    for name, note in (("blank", ""), ("listed", "[]")):
        shutil.copytree(folder / "embeddings", folder / name)
        (folder / name / "manifest.json").write_text(note)

    # models
    write_json(folder / "half/reading/config.json", {})
    write_json(folder / "stranger/encoder_inputs.json", {"role": "question", "pair": "another"})
    shutil.copytree(folder / "doc_encoder", folder / "other_encoder")
    change_json(folder / "other_encoder/encoder_inputs.json", {"passage_tokens": 31})

    # text files
    question = '"qid": "q50", "question": "who"'
    texts = {
        "short.tsv": "1\tthe old river\tparis\n",
        "pink.tsv": (folder / "corpus.tsv").read_text().replace("red", "pink"),
        "bare.jsonl": f"{{{question}}}\n",
        "far.jsonl": '{"qid": "q0", "question": "who", "answers": ["nowhere"]}\n',
        "second.jsonl": '{"qid": "q", "question": "who", "positives": ["1"], "negatives": ["2"]}\n'
        f'{{{question}, "positives": ["1"], "negatives": ["999"]}}\n',
        "same.jsonl": f'{{{question}, "positives": ["1"]}}\n' * 40,
        "everywhere.jsonl": '{"qid": "q0", "question": "who", "answers": ["the"], "positives": ["1"]}\n',
        "ghost.jsonl": f'{{{question}, "answers": ["x"], "positives": ["999"]}}\n',
        "lone.jsonl": f'{{{question}, "positives": ["1"]}}\n',
        "number.jsonl": '{"qid": "1", "question": 5}\n',
        "ghost.run": "q50\t1\t1\t2.0\nq50\t999\t2\t1.0\n",
        "other.run": "x\t1\t1\t2.0\n",
    }
    texts |= dict.fromkeys(("o.json", "o.answers.json", "o.metrics.json"), "")
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("short.tsv", "pink.tsv"):
        Corpus(folder / name)  # why: their index is no file that the scripts below may be blamed for
    return folder


def content_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("script", "keys", "words"), MISTAKES + FOLDERS)
def test_a_mistake_is_one_line_before_any_work(script, keys, words, mistakes, monkeypatch, capsys):
    """Exit code 2, one line on stderr, nothing written, and no model was loaded to find it."""
    monkeypatch.chdir(mistakes)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # why: ask.py sets its encoding
    for load, key in LOADS.items():
        if key not in keys:
            monkeypatch.setattr(load, None)
    if (script, keys, words) in FOLDERS:
        opener = "utils.plumbing.run" if script.startswith("train") else script
        monkeypatch.setattr(f"{opener}.Corpus", None)
    correct = TRAINERS[script].keys(Path(), "new") if script in TRAINERS else CORRECT[script]
    before = content_of(mistakes)
    with pytest.raises(SystemExit) as stopped, friendly_errors():
        main(f"{script}.py", {"corpus": "corpus.tsv"} | correct | keys)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("error: ")
    assert all(word in line for word in words.split(" ... ")), line
    assert content_of(mistakes) == before
