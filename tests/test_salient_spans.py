"""Masked salient spans: hand-made sentences, the corpus they were cut from, a pipeline of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import spacy
from spacy.training import Example

from prepare import salient_spans
from prepare.salient_spans import mask, pipeline
from tests.processes import ENVIRONMENT, flags, main
from tests.toy import CITIES, THINGS
from utils.data import Corpus, read_questions
from utils.plumbing.config import ROOT, UserError, read_yaml
from utils.text import has_answer

DEFAULTS = read_yaml(ROOT / "config/salient_spans.yaml")


def text_of(number):
    """Three sentences: names, a place and a year; a place said twice, which leaves the year; a short one."""
    city, thing = CITIES[number % 12].title(), THINGS[number % 5].title()
    first = f"The {thing} Bridge of {city} was built by Anna {city}son in {1800 + number} as they say."
    second = f"In {city} they say that {city} itself was named in {1900 + number}, much later."
    return f"{first} {second} Nobody knows."


def write_corpus(path, rows=40):
    """Passages in csv quoting, one of them without text, one with white space of several kinds."""
    lines = [f"p{i}\t{text_of(i)}\t{CITIES[i % 12]}\n" for i in range(rows)]
    lines[3] = "p3\t\tno text\n"
    lines[4] = f'p4\t"He  said\u2028""{text_of(4)}"""\tquotes\n'
    path.write_text("id\ttext\ttitle\n" + "".join(lines), encoding="utf-8", newline="")


@pytest.fixture
def make(tmp_path):
    """Runs the script in this process on the corpus of this file; returns the bytes of its `out`."""

    def run(out="mss.jsonl", **keys):
        write_corpus(tmp_path / "corpus.tsv")
        given = {"corpus": tmp_path / "corpus.tsv", "model": "rules", "workers": 0, "out": tmp_path / out}
        main("prepare.salient_spans", given | keys)
        return (tmp_path / out).read_bytes()

    return run


def rows_of(content):
    return [json.loads(line) for line in content.decode().splitlines()]


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("He met J. S. Bach in Eisenach.", ["NAME J. S. Bach", "NAME Eisenach"]),
        ("Paris lies far from the Bank of the West.", ["NAME Bank of the West"]),
        ("Charles de Gaulle spoke. Then Gaulle left.", ["NAME Charles de Gaulle", "NAME Gaulle"]),
        ("It is Österreich where I and He and The live.", ["NAME Österreich"]),
        ("Born on 31 March 1685 or in May 1997.", ["DATE 31 March 1685", "DATE May 1997"]),
        ("On March 12, 1999, and March 3, they left.", ["DATE March 12, 1999", "DATE March 3"]),
        ("It may rain on Monday in June.", []),
        ("In 1066, the 1990s and the 19th century.", ["DATE 1066", "DATE 1990s", "DATE 19th century"]),
        ("About 1500 metres or 3000 people.", ["QUANTITY 1500 metres"]),
        ("They paid $ 3.2 million, 5% of it.", ["MONEY $ 3.2 million", "PERCENT 5%"]),
    ],
)
def test_the_rules(text, spans):
    """Dates of every form are one span, months and days no names, nor is the first word of a sentence."""
    assert [f"{span.label_} {span.text}" for span in pipeline("rules")(text).ents] == spans


def masked(text, seed=0, **keys):
    (sentence,) = pipeline("rules")(text).sents
    return mask(sentence, np.random.default_rng(seed), SimpleNamespace(**DEFAULTS | keys))


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ("Built in 1889 by several men.", {}, ("shorter than 8 words", "", "")),
        ("Built in 1889 by men.", {"min_words": 5}, ("DATE", "Built in [MASK] by men.", "1889")),
        ("The tower was built in 1889 by several men.", {"max_words": 8}, ("longer than 8 words", "", "")),
        ("The tower was built by several men last year.", {}, ("without an entity", "", "")),
        ("The tower has 300 metres and as many visitors.", {}, ("without an entity", "", "")),
        ("The tower was built in 1889 or before 1889.", {}, ("whose entities are all said twice", "", "")),
        ("All say the PARIS of today was Paris then.", {}, ("whose entities are all said twice", "", "")),
        ("What [MASK] hid was built in 1889 by men.", {}, ("with a [MASK] of its own", "", "")),
        (
            "The tower was built in 1889 by Gustave Eiffel.",
            {"labels": ["NAME"]},
            ("NAME", "The tower was built in 1889 by [MASK].", "Gustave Eiffel"),
        ),
    ],
)
def test_a_sentence(text, keys, expected):
    assert masked(text, **keys) == expected


def test_every_entity_has_its_turn():
    """Three entities, drawn uniformly: 600 seeds; within 4 standard deviations (11.5)."""
    text = "In 1889 they went from Paris by way of London."
    drawn = Counter(masked(text, seed)[2] for seed in range(600))
    assert set(drawn) == {"1889", "Paris", "London"} and all(abs(n - 200) < 46 for n in drawn.values())


def test_the_file(make, tmp_path, capsys):
    """Filling the gap restores a sentence of the passage named, and the report counts what is in the file."""
    rows, corpus = rows_of(make()), Corpus(tmp_path / "corpus.tsv")
    assert [row["qid"] for row in read_questions(tmp_path / "mss.jsonl")] == [row["qid"] for row in rows]
    for row in rows:
        (answer,), (pid,) = row["answers"], row["positives"]
        passage = " ".join(corpus.passage(pid).text.split())
        assert set(row) == {"qid", "question", "answers", "positives"}
        assert row["question"].count("[MASK]") == 1
        assert row["question"].replace("[MASK]", answer) in passage
        assert not has_answer(row["question"], [answer])
        assert 8 <= len(row["question"].split()) <= 60
    assert Counter(row["positives"][0] for row in rows) == {f"p{i}": 2 for i in range(40) if i != 3}
    second = [row for row in rows if "itself was named" in row["question"]]
    assert len(second) == 39 and all(row["answers"][0].startswith("19") for row in second)
    out = capsys.readouterr().out
    labels = Counter("DATE" if row["answers"][0].isdigit() else "NAME" for row in rows)
    assert "78 questions of 40 passages" in out and min(labels.values()) > 5
    assert all(f"{n} {label}" in out for label, n in labels.items())
    assert "sentences dropped: 39 shorter than 8 words\n" in out


def test_samples_and_processes(make, monkeypatch):
    """A sample is a part of the whole file, in its order; processes and blocks change nothing."""
    monkeypatch.setattr(salient_spans, "BLOCK", 7)
    whole = make("whole.jsonl", passages=99)
    monkeypatch.setattr(salient_spans, "BLOCK", 10)
    assert make("two.jsonl", workers=2) == whole
    order = [row["positives"][0] for row in rows_of(whole)]
    draws = [rows_of(make(f"{i}.jsonl", passages=9, seed=seed)) for i, seed in enumerate((1234, 1234, 1))]
    for rows in draws:
        pids = list(dict.fromkeys(row["positives"][0] for row in rows))
        assert 8 <= len(pids) <= 9 and pids == sorted(pids, key=order.index)
    assert draws[0] == draws[1] != draws[2]
    assert all(row in rows_of(whole) for row in draws[0])
    assert not all(row in rows_of(whole) for row in draws[2])  # another seed draws other spans too


@pytest.mark.parametrize("end", ["Ctrl-C", "a dead worker"])
def test_a_run_that_ends_early(tmp_path, end):
    """Ctrl-C, or a worker that the kernel killed for its memory: one line, no file, no process that stays."""
    write_corpus(tmp_path / "corpus.tsv", 20_000)
    keys = {"corpus": tmp_path / "corpus.tsv", "model": "rules", "workers": 1, "out": tmp_path / "mss.jsonl"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # trap: what a shell starts in the background ignores Ctrl-C, and so do its children's children
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", "prepare.salient_spans", *flags(keys)]
    job = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)
    parent, stop = psutil.Process(job.pid), time.time() + 120
    workers = []
    while not any(worker.cpu_times().user > 3 for worker in workers):  # past its imports
        assert job.poll() is None and time.time() < stop
        workers = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
        time.sleep(0.05)
    if end == "Ctrl-C":
        os.killpg(job.pid, signal.SIGINT)
    else:
        workers[0].kill()
    error = job.communicate(timeout=60)[1].strip()
    assert (job.returncode, error) == {
        "Ctrl-C": (130, "stopped by Ctrl-C"),
        "a dead worker": (2, "error: a worker was killed, by lack of memory perhaps: try fewer --workers"),
    }[end]
    assert not psutil.wait_procs(workers, timeout=30)[1] and not (tmp_path / "mss.jsonl").exists()


def test_a_trained_pipeline(make, tmp_path, capsys):
    """Its entities are masked, not those of the rules; its own sentence splitter, or full stops, split."""
    # a real NER that has learnt cities by heart, its sentence splitter switched off as in en_core_web_sm
    nlp, examples = spacy.blank("en", meta={"name": "cities", "version": "7"}), []
    nlp.add_pipe("ner")
    nlp.add_pipe("senter")
    for i in range(0, 40, 2):
        doc = nlp.make_doc(text_of(i))
        cities = [(word.idx, word.idx + len(word), "GPE") for word in doc if word.text.lower() in CITIES]
        starts = [1 if k == 0 or doc[k - 1].text == "." else -1 for k in range(len(doc))]
        examples.append(Example.from_dict(doc, {"entities": cities, "sent_starts": starts}))
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer, drop=0.1)
    nlp.disable_pipe("senter")
    trained = tmp_path / "cities"
    nlp.to_disk(trained)
    capsys.readouterr()

    rows, out = rows_of(make(model=trained)), capsys.readouterr()
    assert "pipeline en_cities 7, entities GPE" in out.out and "warning" not in out.err
    assert [row["positives"][0] for row in rows] == [f"p{i}" for i in range(40) if i != 3]
    for row in rows:
        city = CITIES[int(row["positives"][0][1:]) % 12].title()
        assert row["answers"] == [city] and f"of [MASK] was built by Anna {city}son" in row["question"]
        assert row["question"].endswith("as they say."), "two sentences in one"
    assert pipeline(str(trained)).pipe_names == ["ner", "senter"]
    spacy.load(trained, exclude=["senter"]).to_disk(tmp_path / "ner")
    sentences = pipeline(str(tmp_path / "ner"))("It rains. It pours.").sents
    assert [sentence.text for sentence in sentences] == ["It rains.", "It pours."]
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="finds no entities"):
        pipeline(str(tmp_path / "blank"))


def test_mistakes_are_one_line(make, tmp_path, monkeypatch, capsys):
    """Each with the fix, and nothing is written. Rules take the place of a pipeline that is not installed."""
    make("other.jsonl", model="rules")
    assert capsys.readouterr().err == ""
    make("rules.jsonl", model="en_core_web_zz")
    out = capsys.readouterr()
    assert "pipeline en_rules" in out.out and "entities DATE, NAME" in out.out
    assert "en_core_web_zz is not installed (python -m spacy download en_core_web_zz): rules" in out.err
    (tmp_path / "broken").mkdir()
    (tmp_path / "done.jsonl").write_text("the work of an hour")
    for keys, message in (
        ({"model": f"{tmp_path}/none"}, "no such folder"),
        ({"model": tmp_path / "broken"}, "spaCy cannot load it"),
        ({"labels": "[GPE, ORG]"}, r"en_rules .* has none of .*GPE.*; it has DATE, MONEY, NAME"),
        ({"corpus": ""}, "corpus: give a path"),
        ({"max_words": 7}, "max_words must be at least 8"),
        ({"out": "corpus.tsv"}, "is an input too"),
        ({"out": "done.jsonl"}, "is there already; delete it first"),
        ({"min_words": 40}, r"no sentence has an entity to mask: \{.*shorter than 40 words.*; try other"),
    ):
        with pytest.raises(UserError, match=message):
            make(**keys)
    assert not (tmp_path / "mss.jsonl").exists()
    pipeline.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="pip install spacy==") as error:
        make("without.jsonl")
    assert f"\n{str(error.value).split()[-1]} " in (ROOT / "requirements.txt").read_text()
