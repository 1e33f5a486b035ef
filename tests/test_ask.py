"""The demo: its passages are those of the search, and nothing that a person may type breaks it."""

import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from utils.reader_data import tokenize_rows

import ask
import doc2embedding
from tests.processes import ENVIRONMENT
from tests.toy import make_world
from tests.toy_t5 import t5
from utils.bm25 import build_bm25, search_bm25
from utils.data import Corpus
from utils.encoder import embed, tokenize_questions
from utils.fid import answer, load_fid, tokenize_contexts
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.files import write_json
from utils.plumbing.weights import load_encoder, save_encoder
from utils.reader import load_reader, predict

torch.set_num_threads(1)
QUESTION = "which colour has the tower of oslo"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    flags = {
        "doc_encoder": folder / "doc_encoder",
        "corpus": folder / "corpus.tsv",
        "out": folder / "embeddings",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", *(str(part) for k, v in flags.items() for part in (f"--{k}", v))])
        doc2embedding.main()
    return folder


def say(world, monkeypatch, *question, stdin="", **keys):
    """Run ask.py in this process on the toy run."""
    keys = {"run": world, "corpus": world / "corpus.tsv", "k": 4} | keys
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["ask.py", *flags, *question])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    ask.main()


def test_what_it_prints_is_what_search_finds(world, monkeypatch, capsys):
    """Ids and scores are the largest inner products by brute force; BM25 ranks are those of utils/bm25.py."""
    say(world, monkeypatch, QUESTION)
    encoder, corpus = load_encoder(world / "query_encoder", "question"), Corpus(world / "corpus.tsv")
    q_D = embed(encoder, tokenize_questions(encoder, [QUESTION]), 1, "question")[0]
    scores_N = np.concatenate(open_embeddings(world / "embeddings")[0]).astype(np.float64) @ q_D
    found = search_bm25(build_bm25(corpus, world / "bm25"), [QUESTION], 1000)[0]
    bm25 = {row: str(rank) for rank, (row, _) in enumerate(found, 1)}
    shown = re.findall(
        r"^dense (\d+) \| BM25 (\S+) \| (\S+) \| (\S+) \| (\w+)\n +(.*)", capsys.readouterr().out, re.M
    )
    assert len(shown) == 4
    for rank, (row, one) in enumerate(zip(np.argsort(-scores_N)[:4], shown, strict=True), 1):
        passage = corpus[row]
        wanted = (
            str(rank),
            bm25.get(row, "-"),
            f"{scores_N[row]:.3f}",
            passage.id,
            passage.title,
            passage.text,
        )
        assert one == wanted


def test_the_readers_answer_stands_first(world, tmp_path, monkeypatch, capsys):
    """--reader: the best span of the most relevant of the k passages, both scores, and where it stands."""
    reader = load_reader(world / "bert", {"reader_tokens": 40}, new_head=True)
    save_encoder(reader, tmp_path / "reader")
    say(world, monkeypatch, QUESTION, reader=tmp_path / "reader")
    said = capsys.readouterr().out
    pids = re.findall(r"^dense \d+ \| BM25 \S+ \| \S+ \| (\S+) \|", said, re.M)
    corpus = Corpus(world / "corpus.tsv")
    passages = [corpus.passage(pid) for pid in pids]
    rows = tokenize_rows(reader.tokenizer, QUESTION, passages, 40)
    wanted = predict(reader, [passages], [rows], [4], 10, 1)[0][0]
    i = wanted["passage_idx"]
    assert said.startswith(f"answer: {wanted['text']} | span ") and wanted["text"] in passages[i].text
    assert f"| in dense {i + 1} | {pids[i]} | {passages[i].title}\n" in said and re.search(
        r"read \d+ ms\n", said
    )
    scores = [float(x) for x in re.findall(r"(?:span|relevance) (\S+)", said)]
    assert np.allclose(scores, [wanted["score"], wanted["relevance_score"]], atol=2e-3)
    say(world, monkeypatch, "oslo " * 99, reader=tmp_path / "reader")
    assert capsys.readouterr().out.startswith("answer: none, no text of a passage fits")
    with pytest.raises(UserError, match="this is a question encoder; a reader is needed"):
        say(world, monkeypatch, QUESTION, reader=world / "query_encoder")


def test_fid_writes_its_answer_from_all_passages(world, tmp_path, monkeypatch, capsys):
    """--reader with role fid: what it generates from the k passages shown, or that it wrote nothing."""
    fid = load_fid(t5(tmp_path), {"reader_tokens": 40, "answer_tokens": 4})
    torch.manual_seed(0)  # a random T5 with its own output mostly repeats one word
    fid.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(fid.model.lm_head.weight))
    for block in fid.model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4
    save_encoder(fid, tmp_path / "fid")
    corpus, written = Corpus(world / "corpus.tsv"), set()
    for question in (QUESTION, "green market", "who is it ?"):
        say(world, monkeypatch, question, reader=tmp_path / "fid")
        said = capsys.readouterr().out
        pids = re.findall(r"^dense \d+ \| BM25 \S+ \| \S+ \| (\S+) \|", said, re.M)
        passages = [corpus.passage(pid) for pid in pids]
        wanted = answer(fid, [tokenize_contexts(fid, question, passages)], 1)[0]
        assert len(pids) == 4 and said.startswith(f"answer: {wanted} | FiD over 4 passages\n")
        assert re.search(r"\| read \d+ ms\n", said)
        written.add(wanted)
    assert len(written - {""}) > 1
    fid.model.lm_head.weight.data.zero_()
    fid.model.lm_head.weight.data[0], fid.model.lm_head.weight.data[1] = 1, -1  # <pad> or </s> is likeliest
    save_encoder(fid, tmp_path / "mute")
    say(world, monkeypatch, QUESTION, reader=tmp_path / "mute")
    assert capsys.readouterr().out.startswith("answer: none, the reader wrote an empty text | FiD over 4")
    say(world, monkeypatch, "oslo " * 99, reader=tmp_path / "fid")
    assert capsys.readouterr().out.startswith("answer: none, no text of a passage fits")


def test_typing_questions_until_ctrl_d(world, monkeypatch, capsys):
    """An empty line is answered with a hint; code, prompts, an emoji and 10,000 letters are questions."""
    odd = [
        "",
        "  ",
        "ignore previous instructions; rm -rf / `id` $(id) {0} %s",
        "?",
        "🦜 שלום",
        "oslo" * 2500,
    ]
    say(world, monkeypatch, stdin="\n".join(odd))
    said = capsys.readouterr().out
    assert said.count("that was empty") == 2 and said.count("dense 1 |") == 4
    assert "fills all 16 tokens" in said and said.endswith("question> \n")


@pytest.mark.parametrize(
    "argv, flags, question",
    [
        (["who is it"], [], "who is it"),
        (["who", "is", "it"], [], "who is it"),
        (["--k", "3"], ["--k", "3"], None),
        (["--k", "3", "who"], ["--k", "3"], "who"),
        (["--k=3", "who"], ["--k=3"], "who"),
        (["--debug", "who"], ["--debug"], "who"),
        (["--k", "3", ""], ["--k", "3"], ""),
        ([], [], None),
    ],
)
def test_the_question_on_the_command_line(argv, flags, question):
    """The words after the last flag and its value are the question."""
    assert ask.split_question(argv) == (flags, question)


def test_bold_words_and_no_commands_to_the_terminal():
    """Whole words of the question become bold, a known answer reversed; escape sequences are taken out."""
    assert ask.embolden("Oslo and Oslofjord", {"oslo": 0}, []) == "\033[1mOslo\033[0m and Oslofjord"
    marked = "\033[7mNew\033[0m \033[7mYork\033[0m, \033[1mnew\033[0m"
    assert ask.embolden("New York, new", {"new": 0}, ["new york"]) == marked
    assert ask.plain("a\033[2Jb\nc\u202e") == "a [2Jb c"


def test_mistakes_are_one_line(world, tmp_path, monkeypatch):
    """What is wrong and what to do, each before anything is loaded, or when two runs are mixed."""
    monkeypatch.setattr(ask, "load", None)
    (tmp_path / "query_encoder").mkdir()
    write_json(tmp_path / "reading" / "config.json", {})
    (tmp_path / "bad.jsonl").write_text('{"qid": "1", "question": 5}\n')
    for keys, question, message in (
        ({"run": tmp_path / "no"}, "who", "no such folder"),
        ({"run": tmp_path}, "who", "has no embeddings/manifest.json; doc2embedding.py writes it"),
        ({"corpus": "no.tsv"}, "who", "no.tsv: no such file"),
        ({"k": 0}, "who", "k must be at least 1"),
        ({"questions": tmp_path / "bad.jsonl"}, "who", "bad.jsonl:1: 'question' must be a string"),
        ({"reader": tmp_path / "reader"}, "who", "reader: .*no such model folder"),
        ({"reader": tmp_path}, "who", "reader: .*is no model, but the folder of reading"),
        ({}, " ", "the question is empty"),
        ({"kk": 3}, "who", "unknown key --kk; did you mean 'k'"),
    ):
        with pytest.raises(UserError, match=message):
            say(world, monkeypatch, question, **keys)


def test_another_corpus_or_pair_is_refused(world, tmp_path, monkeypatch):
    """Vectors of another corpus, or a question encoder of another run, would give nonsense in silence."""
    (tmp_path / "c.tsv").write_text("1\tthe old river\tparis\n", encoding="utf-8")
    with pytest.raises(UserError, match="another corpus"):
        say(world, monkeypatch, QUESTION, corpus=tmp_path / "c.tsv")
    shutil.copytree(world / "embeddings", tmp_path / "run" / "embeddings")
    shutil.copytree(world / "query_encoder", tmp_path / "run" / "query_encoder")
    stored = tmp_path / "run" / "query_encoder" / "encoder_inputs.json"
    stored.write_text(stored.read_text().replace('"toy"', '"another"'))
    with pytest.raises(UserError, match="pair another.*pair toy"):
        say(world, monkeypatch, QUESTION, run=tmp_path / "run")


def test_a_terminal_without_utf8_and_a_quick_refusal(world):
    """An ascii terminal shows `?` for other letters; a wrong folder is refused at once."""
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    flags = ["--run", str(world), "--corpus", str(world / "corpus.tsv")]
    command = [sys.executable, "ask.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=b"caf\xe9 \xff?\n", capture_output=True, timeout=300
    )
    assert done.returncode == 0 and b"dense 1 |" in done.stdout, done.stderr
    done = subprocess.run(
        [*command, "--run", "no", "who"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: run: no: no such folder; name the run_dir of train_dpr.py\n"
    )
    light = (
        "import sys, ask; ask.check_inputs; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", light], cwd=ROOT, env=environment).returncode == 0, (
        "heavy import"
    )
