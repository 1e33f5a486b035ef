"""Asking: its passages are those of the search, and nothing that a person may type breaks it."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import ask
from tests.processes import ENVIRONMENT, main
from tests.test_answer import talkative_fid
from tests.test_train_reader import open_reader
from tests.toy import make_world
from utils.bm25 import build_bm25, search_bm25
from utils.data import Corpus
from utils.encoder import embed, tokenize_questions
from utils.fid import answer, tokenize_contexts
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.embeddings import open_embeddings
from utils.plumbing.weights import load_encoder, save_encoder
from utils.reader import predict, to_read

QUESTION = "which colour has the tower of oslo"
PASSAGE = r"^dense (\d+) \| BM25 (\S+) \| (\S+) \| (\S+) \| (\w+)\n +(.*)"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    files = {"doc_encoder": folder / "doc_encoder", "corpus": folder / "corpus.tsv"}
    main("doc2embedding.py", files | {"out": folder / "embeddings"})
    return folder


@pytest.fixture
def say(world, monkeypatch, capsys):
    """A function that runs ask.py in this process on the toy run, and returns what it prints."""

    def run(*question, stdin="", **keys):
        keys = {"run": world, "corpus": world / "corpus.tsv", "k": 4} | keys
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        main("ask.py", keys, *question)
        return capsys.readouterr().out

    return run


def test_what_it_prints_is_what_search_finds(world, say):
    """Ids and scores are the largest inner products by brute force; BM25 ranks are those of utils/bm25.py."""
    printed = say(QUESTION)
    encoder, corpus = load_encoder(world / "query_encoder", "question"), Corpus(world / "corpus.tsv")
    q_D = embed(encoder, tokenize_questions(encoder, [QUESTION]), 1)[0]
    scores_N = np.concatenate(open_embeddings(world / "embeddings")[0]).astype(np.float64) @ q_D
    ranked = search_bm25(build_bm25(corpus, world / "bm25"), [QUESTION], 1000)[0]
    bm25 = {row: str(rank) for rank, (row, _) in enumerate(ranked, 1)}
    wanted = []
    for rank, row in enumerate(np.argsort(-scores_N)[:4], 1):
        pid, title, text = corpus[row]
        wanted.append((str(rank), bm25.get(row, "-"), f"{scores_N[row]:.3f}", pid, title, text))
    assert re.findall(PASSAGE, printed, re.M) == wanted
    assert re.search(r"\nencode \d+ ms \| search \d+ ms \| BM25 \d+ ms\n\n$", printed)


def test_the_page_of_the_question(world, tmp_path, say):
    """Beside the run, or beside its ladder: the address of a question that stands in it; else no line."""
    questions = [{"qid": "test 3/ä", "text": "Which colour has the tower of Oslo?"}]
    html = f'<script type="application/json" id="data">{json.dumps({"questions": questions})}</script>'
    run = tmp_path / "ladder" / "d 0"
    shutil.copytree(world, run)
    for page in (run.parent / "page.html", run / "page.html"):
        page.write_text(html + "<p></p>", encoding="utf-8")
        link = f"all systems on this question: {page.as_uri()}#q=test%203%2F%C3%A4\n"
        assert link in say(QUESTION, run=run)
    assert "all systems" not in say("which colour has the tower", run=run)
    page.write_text("<p>another page</p>", encoding="utf-8")
    assert "all systems" not in say(QUESTION, run=run)


def test_the_readers_answer_stands_first(world, tmp_path, say):
    """--reader: the best span of the most relevant of the k passages, both scores, and where it stands."""
    reader, corpus = open_reader(world / "bert"), Corpus(world / "corpus.tsv")
    save_encoder(reader, tmp_path / "reader")
    printed = say(QUESTION, reader=tmp_path / "reader")
    pids = [hit[3] for hit in re.findall(PASSAGE, printed, re.M)]
    passages = [corpus.passage(pid) for pid in pids]
    wanted = predict(reader, [to_read(reader, QUESTION, passages)], [4], 1)[0][0]
    i = wanted["passage_idx"]
    assert printed.startswith(f"answer: {wanted['text']} | span ") and wanted["text"] in passages[i].text
    assert f"| in dense {i + 1} | {pids[i]} | {passages[i].title}\n" in printed
    assert re.search(r"\| read \d+ ms\n", printed)
    scores = [float(x) for x in re.findall(r"(?:span|relevance) (\S+)", printed)]
    assert np.allclose(scores, [wanted["score"], wanted["relevance_score"]], atol=2e-3)
    long = say("oslo " * 99, reader=tmp_path / "reader")
    assert long.startswith("answer: none, no text of a passage fits")
    with pytest.raises(UserError, match="this is a question encoder; a reader is needed"):
        say(QUESTION, reader=world / "query_encoder")


def test_fid_writes_its_answer_from_all_passages(world, tmp_path, say):
    """--reader with role fid: what it generates from the k passages shown, or that it wrote nothing."""
    fid, corpus, written = talkative_fid(tmp_path), Corpus(world / "corpus.tsv"), set()
    save_encoder(fid, tmp_path / "fid")
    for question in (QUESTION, "green market", "who is it ?"):
        printed = say(question, reader=tmp_path / "fid")
        passages = [corpus[corpus.row(hit[3])] for hit in re.findall(PASSAGE, printed, re.M)]
        wanted = answer(fid, [tokenize_contexts(fid, question, passages)], 1)[0]
        assert len(passages) == 4 and printed.startswith(f"answer: {wanted} | FiD over 4 passages\n")
        assert re.search(r"\| read \d+ ms\n", printed)
        written.add(wanted)
    assert len(written - {""}) > 1
    long = say("oslo " * 99, reader=tmp_path / "fid")
    assert long.startswith("answer: none, no text of a passage fits")
    fid.model.lm_head.weight.data.zero_()
    fid.model.lm_head.weight.data[0], fid.model.lm_head.weight.data[1] = 1, -1  # <pad> or </s> is likeliest
    save_encoder(fid, tmp_path / "mute")
    mute = say(QUESTION, reader=tmp_path / "mute")
    assert mute.startswith("answer: none, the reader wrote an empty text | FiD over 4")


def test_typing_questions_until_ctrl_d(world, say):
    """
    An empty line gets a hint; code, an emoji and 10,000 letters are questions; what the file knows is marked.
    """
    odd = ["", "  ", "rm -rf / `id` $(id) {0} %s", "?", "🦜 שלום", "oslo" * 2500, "the bridge , MINSK?"]
    printed = say(stdin="\n".join(odd), questions=world / "test.jsonl", k=60)
    assert printed.startswith("60 passages. Type") and printed.endswith("question> \n")
    assert printed.count("that was empty") == 2 and printed.count("dense 1 |") == 5
    assert "| the question fills all 16 tokens, its end may be cut\n" in printed
    assert "known answers: green\ndense 1" in printed and printed.count(" | holds the answer\n") == 12


def test_the_question_on_the_command_line():
    """The words after the last flag and its value are the question."""
    for flags, words, question in (
        ([], ["who is it"], "who is it"),
        ([], ["who", "is", "it"], "who is it"),
        (["--k", "3"], [], None),
        (["--k", "3"], ["who"], "who"),
        (["--k=3"], ["who"], "who"),
        (["--debug"], ["who"], "who"),
        (["--k", "3"], [""], ""),
        ([], [], None),
    ):
        assert ask.split_question(flags + words) == (flags, question)


def test_bold_words_and_no_commands_to_the_terminal():
    """Whole words of the question become bold, a known answer reversed; escape sequences are taken out."""
    assert ask.embolden("Oslo and Oslofjord", {"oslo": 0}, []) == "\033[1mOslo\033[0m and Oslofjord"
    marked = "\033[7mNew\033[0m \033[7mYork\033[0m, \033[1mnew\033[0m"
    assert ask.embolden("New York, new", {"new": 0}, ["new york"]) == marked
    assert ask.plain("a\033[2Jb\nc\u202e") == "a [2Jb c"


def test_what_would_give_nonsense_is_refused(world, tmp_path, say):
    """An empty question, vectors of another corpus, a question encoder of another run, a flipped bit."""
    with pytest.raises(UserError, match="the question is empty"):
        say(" ")
    (tmp_path / "c.tsv").write_text("1\tthe old river\tparis\n", encoding="utf-8")
    with pytest.raises(UserError, match="another corpus"):
        say(QUESTION, corpus=tmp_path / "c.tsv")
    for part in ("embeddings", "query_encoder"):
        shutil.copytree(world / part, tmp_path / "run" / part)
    stored = tmp_path / "run/query_encoder/encoder_inputs.json"
    inputs = stored.read_text()
    stored.write_text(inputs.replace('"toy"', '"another"'))
    with pytest.raises(UserError, match="pair another.*pair toy"):
        say(QUESTION, run=tmp_path / "run")
    stored.write_text(inputs)
    shard = tmp_path / "run/embeddings/00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="00000.npy has another sha256"):
        say(QUESTION, run=tmp_path / "run")


def test_a_terminal_without_utf8_and_a_quick_refusal(world):
    """An ascii terminal shows `?` for other letters; a wrong folder is refused before torch is imported."""
    ascii = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    how = {"cwd": ROOT, "env": ENVIRONMENT | ascii, "capture_output": True, "timeout": 300}
    command = [sys.executable, "ask.py", "--corpus", str(world / "corpus.tsv")]
    done = subprocess.run([*command, "--run", str(world)], input=b"caf\xe9 \xff?\n", **how)
    assert done.returncode == 0 and b"dense 1 |" in done.stdout, done.stderr
    done = subprocess.run([*command, "--run", "no", "who"], **how)
    assert done.returncode == 2
    assert done.stderr == b"error: run: no: no such folder; name the run_dir of train_dpr.py\n"
    light = "import sys, ask; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], **how).returncode == 0, "heavy import"
