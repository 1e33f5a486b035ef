"""The reader and its trainer against DPR's golden numbers, plain autograd and an unbroken run."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BertTokenizer, DPRConfig, DPRReader, DPRReaderTokenizer

import utils.reader
from tests.processes import ENVIRONMENT, begin, kill_tree, on_devices, run
from tests.test_encoder import Attack
from tests.toy import bert, make_world
from train_reader import (
    add_gradient,
    answer_all,
    draw_passages,
    evaluate,
    main,
    make_batch,
    reader_loss,
)
from utils.corpus import Passage
from utils.data import Corpus, write_dpr_json
from utils.encoder import collate
from utils.grad_cache import chunk_seed
from utils.plumbing.checkpoint import make_optimizer
from utils.plumbing.config import ROOT, UserError, load_config
from utils.plumbing.weights import load_encoder, save_encoder
from utils.predictions import answer_scores
from utils.reader import best_spans, load_reader, predict, read
from utils.reader_data import (
    find_spans,
    find_training_rows,
    read_gold,
    read_ranking,
    tokenize_rows,
    training_rows,
    word_pieces,
)

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)
ENVIRONMENT.setdefault("OMP_NUM_THREADS", "1")  # why: threads of a toy model spin where cores are busy
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), process_index=0, backward=torch.Tensor.backward, autocast=nullcontext
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world; of each question the ranking is its passage, then nine others."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for name in ("train", "dev"):
        lines = []
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            question = json.loads(line)
            gold = int(question["positives"][0])
            hits = [gold, *((gold + 7 * k) % 60 + 1 for k in range(1, 10))]
            lines += [f"{question['qid']}\t{pid}\t{r}\t{20 - r}\n" for r, pid in enumerate(hits, 1)]
        (folder / f"{name}.run").write_text("".join(lines))
    return folder


def config(world, **changes):
    """The settings of the toy runs, with changes: (as a namespace, as keys)."""
    keys = {
        "init": world / "bert",
        "train": world / "train.jsonl",
        "train_run": world / "train.run",
        "dev": world / "dev.jsonl",
        "dev_run": world / "dev.run",
        "gold": "",
        "corpus": world / "corpus.tsv",
        "reader_tokens": 40,
        "train_depth": 10,
        "passages_per_question": 5,
        "test_depth": 1,
        "eval_top_docs": "[1, 3]",
        "batch_size": 8,
        "question_chunk": 3,
        "passage_chunk": 4,
        "learning_rate": 2e-3,
        "max_grad_norm": 1.0,
        "epochs": 8,
        "eval_every": 10,
        "save_every": 7,
        "workers": 0,
        "log_every": 10,
    } | changes
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return load_config("", "config/train_reader_nq.yaml", argv), keys


def parts(world, **changes):
    """(cfg, examples to learn from, corpus, reader)."""
    cfg, _ = config(world, **changes)
    torch.manual_seed(cfg.seed)
    how = {key: getattr(cfg, key) for key in ("reader_tokens", "token_types")}
    reader = load_reader(cfg.init, how, cfg.dropout, new_head=True).train()
    examples, corpus, _ = read_ranking(cfg.train, cfg.train_run, Corpus(cfg.corpus), cfg.train_depth)
    return cfg, find_training_rows(cfg.train, examples, corpus, reader.tokenizer, {}, cfg)[0], corpus, reader


# ---------------------------------------------------------------- loss, against DPR
def golden_loss(case):
    """Our loss on a golden case, float64, with the gradients of all inputs: [loss, start, end, relevance]."""
    named = [case[f"{name}_logits"] for name in ("start", "end", "relevance")]
    start_NML, end_NML, relevance_NM = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in named
    )
    begin_NA, end_NA = (torch.tensor(case[f"{side}_positions"])[:, 0] for side in ("start", "end"))
    size = start_NML.shape[2]
    spans_NA = torch.tensor(case["answer_mask"])[:, 0].bool() & (begin_NA < size) & (end_NA < size)
    clamped = begin_NA.clamp(max=size - 1), end_NA.clamp(max=size - 1)
    loss, _ = reader_loss(start_NML[:, 0], end_NML[:, 0], relevance_NM, *clamped, spans_NA)
    loss.backward()
    return loss.detach(), start_NML.grad, end_NML.grad, relevance_NM.grad


def test_loss_and_gradients_equal_dpr():
    """All golden cases in float64, a question without any span included; of the odd ones the closed form."""
    cases = json.loads((GOLDEN / "reader_loss.json").read_text())["cases"]
    assert len(cases) == 13 and sum(case.get("reference_quirk", False) for case in cases) == 4
    for case in cases:
        loss, *gradients = golden_loss(case)
        wanted = torch.tensor(case.get("closed_form_loss", case["loss"]), dtype=torch.float64)
        assert torch.isclose(loss, wanted, rtol=1e-8, atol=1e-8)
        if "closed_form_loss" not in case:
            for name, got in zip(("start", "end", "relevance"), gradients, strict=True):
                wanted = torch.tensor(case[f"grad_{name}"], dtype=torch.float64)
                assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-8), name


def test_loss_by_hand_and_without_padding():
    """
    Two even tokens, one span over both ends, two even passages: 2 log 2 for the span, log 2 for the passage.
    A -inf column is no token and no passage; a logit of 0 in its place is one, and costs.
    """
    span = torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[True]])
    for extra, cost in ((-torch.inf, 0.0), (0.0, 3 * np.log(3 / 2))):
        logits = [torch.tensor([[0.0, 0.0, extra]], requires_grad=True) for _ in range(3)]
        loss, correct = reader_loss(*logits, *span)
        loss.backward()
        assert abs(loss.item() - 3 * np.log(2) - cost) < 1e-6 and correct == 1
        assert all(torch.isfinite(x.grad).all() for x in logits)


# ---------------------------------------------------------------- spans and texts, against DPR
@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(golden span cases, a tokenizer of their words, which tokens continue a word)."""
    spans = json.loads((GOLDEN / "best_spans.json").read_text())
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(spans["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    return spans["cases"], words, np.array([word.startswith("##") for word in spans["vocab"]]), path


def test_best_spans_equal_dpr(golden):
    """Every span of all golden cases, in order: ends after widening, score; ties, length 1, empty passage."""
    cases, words, continues_V, _ = golden
    cases = [case for case in cases if case["kind"] == "spans"]
    assert len(cases) == 26 and any(not case["tokens"] for case in cases)
    for case in cases:
        ids = words.convert_tokens_to_ids(case["tokens"])
        logits = (np.array(case[f"{side}_logits"], dtype=np.float32) for side in ("start", "end"))
        found = best_spans(*logits, continues_V[ids], case["max_answer_length"], case["top_spans"])
        assert found == [(e["start"], e["end"], e["score"]) for e in case["expected"]]


def text_of(words, tokens):
    """A passage that is these tokens, written as people write; None where it would not be read as them."""
    ids = words.convert_tokens_to_ids(tokens)
    text = words.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    return text if word_pieces(words, [text])[0] == ids else None


def test_the_answer_is_dprs_in_the_passages_own_letters(golden, monkeypatch):
    """
    predict() on the golden questions: passage, score and relevance for each top_k, and the sliced text equals
    DPR's decoded one. Empty passages are passed over; where there is nothing else, None, not IndexError.
    """
    cases, words, continues_V, _ = golden
    stub, seen, odd = SimpleNamespace(tokenizer=words, continues_V=continues_V), 0, []
    for case in cases:
        if case["kind"] != "question":
            continue
        rows = [(words.convert_tokens_to_ids(p["tokens"]), p["offset"]) for p in case["passages"]]
        texts = [text_of(words, p["tokens"][p["offset"] :]) for p in case["passages"]]
        if None in texts:
            odd.append(texts)
            continue
        logits = [
            (np.float32(p["start_logits"]), np.float32(p["end_logits"]), relevance)
            for p, relevance in zip(case["passages"], case["relevance_logits"], strict=False)
        ]
        monkeypatch.setattr(utils.reader, "read", lambda *_, found=logits: found)
        top_docs = case["thresholds"] or [len(case["relevance_logits"])]
        passages = [Passage("", "", text) for text in texts]
        answers = predict(stub, [passages], [rows], top_docs, case["max_answer_length"], 8)[0]
        if "error" in case:
            assert answers[0] is None
            continue
        for wanted, got in zip(case["expected"], answers, strict=True):
            assert (got["passage_idx"], got["score"]) == (wanted["passage"], wanted["score"])
            assert (got["relevance_score"], got["text"]) == (wanted["relevance"], wanted["text"])
            seen += 1
    assert seen >= 7 and len(odd) <= 2


def test_sliced_text_equals_decoded_text_on_ordinary_passages(golden):
    """The golden texts of all spans, contractions as transformers 4 wrote them: don't, not don ' t."""
    cases, words, _, _ = golden
    seen, joined = 0, 0
    cases = [case for case in cases if case["kind"] == "spans"]
    for tokens, start, wanted in (  # by hand: the golden cases with a contraction hold [UNK] or u. s.
        ("the king don ' t was first", 2, "don't"),
        ("the river ' s city", 1, "river's"),
    ):
        span = {"start": start, "end": start + 2, "text": wanted, "text_without_cleanup": "apart"}
        cases.append({"tokens": tokens.split(), "expected": [span]})
    for case in cases:
        text = text_of(words, case["tokens"])
        if text is None:
            continue
        offsets = words(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        for span in case["expected"]:
            sliced = text[offsets[span["start"]][0] : offsets[span["end"]][1]]
            if "u. s." not in text:  # trap: a decoder cannot know that there was no space
                assert sliced == span["text"]
                seen, joined = seen + 1, joined + ("text_without_cleanup" in span)
    assert seen > 60 and joined >= 2


def test_the_letters_of_the_passage_are_kept(world):
    """An uncased tokenizer reads `Zürich’s U.S.`; the answer is spelt as in the passage, not as tokens."""
    reader = load_reader(world / "bert", {"reader_tokens": 60}, new_head=True)
    passage = Passage("1", "x", "  In Zürich’s U.S. camp — don't ask.")
    rows = tokenize_rows(reader.tokenizer, "where", [passage], 60)
    ids, first = rows[0]
    starts = {}
    text = passage.text.strip()
    offsets = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for wanted in ("Zürich’s U.S.", "don't", "— don"):
        starts[wanted] = (text.index(wanted), text.index(wanted) + len(wanted))
        a, b = (next(i for i, o in enumerate(offsets) if o[side] == starts[wanted][side]) for side in (0, 1))
        start_L, end_L = np.zeros((2, len(ids)), np.float32)
        start_L[first + a] = end_L[first + b] = 9
        got = utils.reader.span_text(reader, passage, ids, first, start_L, end_L, 0.0, 20)
        assert got["text"] == wanted and got["score"] == 18


# ---------------------------------------------------------------- inputs
def test_rows_equal_hugging_faces_reader_tokenizer(golden):
    """`[CLS] question [SEP] title [SEP] passage`, no [SEP] at the end: as facebook/dpr-reader-* reads."""
    _, words, _, path = golden
    official = DPRReaderTokenizer(str(path))
    passages = [
        Passage("", "City", "The king of river."),
        Passage("", "raven", "don't"),
        Passage("", "a b", ""),
    ]
    question = "What is king?"
    rows = tokenize_rows(words, question, passages, 350)
    columns = {"titles": [p.title for p in passages], "texts": [p.text for p in passages]}
    assert [ids for ids, _ in rows] == official(questions=question, **columns)["input_ids"]
    assert [len(ids) - first for ids, first in rows] == [5, 3, 0]
    assert [len(ids) for ids, _ in tokenize_rows(words, question, passages, 9)] == [9, 9, 9]
    assert tokenize_rows(words, question, [Passage("", "", "king")], 350)[0][0][-3:] == [3, 3, rows[0][0][3]]
    assert tokenize_rows(words, question, [], 9) == []


def test_what_is_learned_and_what_is_dropped_and_why(world):
    """
    One question of each fate: several mentions of two answers; the only answer beyond the cut; inside a word
    for the word pieces; in no passage; blank answers; nothing retrieved; accents and unicode punctuation.
    """
    reader = load_reader(world / "bert", {"reader_tokens": 40}, new_head=True)
    long = "the old river of rome is new and it stands in rome " * 3
    texts = [
        "red and blue and red .",  # 0
        f"{long} red",  # 1: beyond the cut
        "nothing here",  # 2
        "",  # 3: a passage of no tokens
        "“café” — red’s",  # 4: typographic quotes and a dash
        "the old tower",  # 5
    ]
    path = world / "edge.jsonl"
    path.write_text(
        "".join(json.dumps({"_id": f"p{i}", "title": "", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    corpus = Corpus(path)

    def fate(answers, rows, length=40):
        example = {"question": "which", "answers": answers, "rows": np.array(rows, dtype=np.int64)}
        status, positives, negatives, _ = training_rows([example], corpus, reader.tokenizer, {}, length)[0]
        return status, positives.tolist(), negatives.tolist()

    assert fate(["red", "blue"], [2, 0, 3, 1]) == ("kept", [0], [2, 3]), (
        "beyond the cut is no negative either"
    )
    assert fate(["red"], [1, 2]) == ("with answers only beyond 40 tokens", [], [2])
    assert fate(["red"], [1, 2], 60)[:2] == ("kept", [1])
    assert fate(["red"], [2, 3, 5])[0] == "with no answer in any passage"
    assert fate([], [0])[0] == "without answers" and fate(["red"], [])[0] == "without passages"
    assert fate(["café"], [4])[:2] == ("kept", [4]) and fate(["red"], [4])[:2] == ("kept", [4])
    # has_answer finds the tokens `red`, `'s` in a row; a word-piece tokenizer may cut the passage elsewhere
    ids = tokenize_rows(reader.tokenizer, "which", [Passage("", "", texts[0])], 40)[0]
    assert find_spans(*ids, word_pieces(reader.tokenizer, ["red", "blue", "red"])) == [
        (4, 4), (8, 8), (6, 6), (4, 4), (8, 8)
    ]  # fmt: skip
    assert find_spans(*ids, [[]]) == [], "an answer of no tokens is nowhere"


def test_an_answer_across_the_cut_is_never_learned(world):
    """An answer of three tokens, the cut at every place: it counts only when its last token is left."""
    cfg, _, _, reader = parts(world)
    path = world / "cut.jsonl"
    path.write_text(json.dumps({"_id": "p", "title": "", "text": "the river of rome is new river of rome"}))
    corpus, pieces = Corpus(path), word_pieces(reader.tokenizer, ["river of rome"])
    assert len(pieces[0]) == 3
    example = {"question": "which", "answers": ["river of rome"], "rows": np.array([0])}
    for length in range(4, 16):  # [CLS] which [SEP] [SEP] the: the mentions are tokens 5 to 7 and 10 to 12
        status, positives, *_ = training_rows([example], corpus, reader.tokenizer, {}, length)[0]
        spans = [span for span in [(5, 7), (10, 12)] if span[1] < length]
        assert status == ("kept" if spans else f"with answers only beyond {length} tokens")
        assert positives.tolist() == [0] * bool(spans)
        if spans:
            reader.inputs["reader_tokens"] = length
            kept = example | {"positives": positives, "negatives": positives[:0]}
            drawn = draw_passages(kept, 0, 0, corpus, reader, cfg)
            assert drawn["spans"] == spans and len(drawn["ids"][0]) == min(length, 13)


def test_a_gold_page_comes_before_other_positives(world, tmp_path):
    """With a gold file only passages of its page are positives, however many; else the first twenty."""
    path = tmp_path / "gold.json"
    entry = {"question": "which?", "question_tokens": "which ?", "title": "Oslo", "context": "a red tower"}
    path.write_text(json.dumps({"data": [entry]}))
    assert read_gold(path) == {"which?": "oslo", "which ?": "oslo"}
    rows = [("paris", "red")] * 30 + [("OSLO", "red")] * 25 + [("oslo", "no")] * 170
    lines = [json.dumps({"_id": f"p{i}", "title": t, "text": x}) for i, (t, x) in enumerate(rows)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    corpus, words = Corpus(tmp_path / "c.jsonl"), load_reader(world / "bert", {"reader_tokens": 40}, 0, True)

    def learned(question, depth):
        example = {"question": question, "answers": ["red"], "rows": np.arange(depth)}
        status, positives, negatives, _ = training_rows(
            [example], corpus, words.tokenizer, read_gold(path), 40
        )[0]
        return status, positives.tolist(), len(negatives)

    assert learned("which ?", 225) == ("kept", list(range(30, 55)), 150)
    assert learned("who", 225) == ("kept", list(range(20)), 150)
    assert learned("who", 120) == ("kept", list(range(20)), 65)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match="bad.json: not DPR's gold"):
        read_gold(tmp_path / "bad.json")


def test_dprs_result_json_is_the_run_with_its_passages(world, tmp_path, monkeypatch):
    """The same questions, answers and passages from a .run with a corpus and from DPR's own result file."""
    from utils.data import read_questions, read_run

    questions, corpus = read_questions(world / "dev.jsonl"), Corpus(world / "corpus.tsv")
    ranking = list(read_run(world / "dev.run").items())
    write_dpr_json(tmp_path / "r.json", questions, ranking, corpus, [[True] * 10] * len(ranking))
    ours, _, _ = read_ranking(world / "dev.jsonl", world / "dev.run", corpus, 4)
    theirs, brought, note = read_ranking(tmp_path / "r.json", "", None, 4)
    assert [one["qid"] for one in theirs] == [str(i) for i in range(10)] and "10 questions" in note
    for a, b in zip(ours, theirs, strict=True):
        assert (a["question"], a["answers"], len(b["rows"])) == (b["question"], b["answers"], 4)
        assert [corpus[r][1:] for r in a["rows"]] == [brought[r][1:] for r in b["rows"]]
    path = brought.path
    del brought
    assert not path.exists(), "the passages' file goes with the corpus"
    monkeypatch.setattr("utils.plumbing.files.free_space", lambda _: 10)
    with pytest.raises(UserError, match="r.json needs .* GB in"):
        read_ranking(tmp_path / "r.json", "", None, 4)


def test_training_reads_dprs_result_json_too(world, tmp_path):
    """The same steps from DPR's own file as from the .run and the corpus: the same losses, bit by bit."""
    from utils.data import read_questions, read_run

    corpus = Corpus(world / "corpus.tsv")
    for name in ("train", "dev"):
        questions, ranking = read_questions(world / f"{name}.jsonl"), read_run(world / f"{name}.run")
        hits = [[True] * 10] * len(ranking)
        write_dpr_json(tmp_path / f"{name}.json", questions, list(ranking.items()), corpus, hits)
    losses = []
    for i, more in enumerate(({}, {"train": tmp_path / "train.json", "dev": tmp_path / "dev.json"})):
        if more:
            more |= {"train_run": "", "dev_run": "", "corpus": ""}
        _, keys = config(world, stop_after=2, **more)
        done = run("train_reader.py", keys | {"run_dir": tmp_path / f"run{i}"})
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([row["loss"] for row in rows(tmp_path / f"run{i}") if "loss" in row])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_regex_answers_and_wrong_files_are_refused(world, tmp_path):
    """CuratedTREC's patterns, a json that holds no results, a question file alone: one line each."""
    trec = [
        {
            "question": "how long",
            "answers": [r"1,?490\s?(km|kilometers)"],
            "ctxs": [{"title": "a", "text": "b"}],
        }
    ]
    (tmp_path / "trec.json").write_text(json.dumps(trec))
    (tmp_path / "odd.json").write_text(json.dumps([{"question": "q", "positive_ctxs": []}]))
    plain = [
        trec[0] | {"answers": [answer]} for answer in ("AC\\DC", "¯\\_(ツ)_/¯", "M*A*S*H", "C++ (language)?")
    ]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    corpus = Corpus(world / "corpus.tsv")
    assert len(read_ranking(tmp_path / "plain.json", "", None, 9)[0]) == 4
    (tmp_path / "other.run").write_text("nobody\t1\t1\t1.0\n")
    for path, ranking, words in (
        (tmp_path / "trec.json", "", "regular expression.*490"),
        (tmp_path / "odd.json", "", "example 0 is not of DPR's retrieval results"),
        (tmp_path / "plain.json", world / "dev.run", "brings its own ranking"),
        (world / "dev.jsonl", "", "needs its ranking"),
        (world / "dev.jsonl", tmp_path / "other.run", "passages for none of the questions"),
    ):
        with pytest.raises(UserError, match=words):
            read_ranking(path, ranking, corpus, 9)


def test_odd_result_json_is_refused_by_its_example(tmp_path, capsys):
    """null, half a character, no passages, no answers where they are needed: the example is named."""
    good = {"question": "who", "answers": ["red", " "], "ctxs": [{"title": "a", "text": "red"}]}
    path = tmp_path / "odd.json"
    for odd, words in (
        ({"question": None}, "example 1: 'question' must be a string .* None"),
        ({"ctxs": [{"title": "a", "text": None}]}, "example 1: title and text .* None"),
        ({"question": "\ud800"}, "example 1: holds half a character"),
        ({"answers": ["\ud800"]}, "example 1: holds half a character"),
        ({"ctxs": [{"title": "a", "text": "\ud800"}]}, "example 1: holds half a character"),
    ):
        path.write_text(json.dumps([good, good | odd]))
        with pytest.raises(UserError, match="odd.json: " + words):
            read_ranking(path, "", None, 9)
    path.write_text(json.dumps([good | {"ctxs": []}] * 2))
    with pytest.raises(UserError, match="odd.json: example 0 has no passages"):
        read_ranking(path, "", None, 9)
    silent = {key: value for key, value in good.items() if key != "answers"}
    for entries, words in (
        ([good, silent], "example 1: 'answers' is missing"),
        ([good | {"answers": [" "]}], "no question has any answers"),
    ):
        path.write_text(json.dumps(entries))
        assert len(read_ranking(path, "", None, 9)[0]) == len(entries), "without need they may be absent"
        with pytest.raises(UserError, match=words):
            read_ranking(path, "", None, 9, ("answers",))
    capsys.readouterr()
    path.write_text(json.dumps([good, good | {"ctxs": good["ctxs"] * 3}, good]))
    examples, _, note = read_ranking(path, "", None, 2, ("answers",))
    assert [example["answers"] for example in examples] == [["red"]] * 3
    assert capsys.readouterr().err == f"warning: {path}: 3 blank answers left out\n"
    assert "passages each: 1 or more, median 1\nwarning" in note and "2 questions have passages, but" in note
    assert "warning" not in read_ranking(path, "", None, 1)[2]


def test_worker_processes_find_the_same(world):
    """Two processes and this one give the same report, positives and negatives."""
    found = [parts(world, workers=workers)[1] for workers in (0, 2)]
    assert len(found[0]) == 40 and [set(one) for one in found[0]] == [set(one) for one in found[1]]
    for a, b in zip(*found, strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)


def test_devices_share_the_search_for_answers(world):
    """Three devices search a third each; what they gather is what one finds alone, with the same report."""
    cfg, train, corpus, reader = parts(world)
    many, gold = train * 20, {train[0]["question"]: corpus[train[0]["positives"][0]].title}
    shares, alone = {}, find_training_rows("x", many, corpus, reader.tokenizer, gold, cfg)

    def collect(mine):
        assert shares.keys().isdisjoint(mine)
        shares.update(mine)
        return dict(shares)

    for rank in (2, 0):
        with pytest.raises(ValueError):  # the others' shares are missing
            find_training_rows("x", many, corpus, reader.tokenizer, gold, cfg, (rank, 3), collect)
    kept, report = find_training_rows("x", many, corpus, reader.tokenizer, gold, cfg, (1, 3), collect)
    assert len(shares) == 4 and report == alone[1] and "; 20 with positives of the gold page" in report
    for a, b in zip(kept, alone[0], strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- batches and gradients
def test_a_batch_is_a_function_of_seed_and_step(world):
    """An epoch shows questions once, positive first, spans true; negatives and order differ by epoch."""
    cfg, train, corpus, reader = parts(world)
    epochs = []
    for epoch in (0, 1):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            chunks = make_batch(step, train, corpus, reader, cfg)
            assert chunks == make_batch(step, train, corpus, reader, cfg)
            assert [len(chunk) for chunk in chunks] == [3, 3, 2]
            seen += [question for chunk in chunks for question in chunk]
        for question in seen:
            assert len(question["ids"]) == 5
            inputs = [reader.tokenizer.decode(ids) for ids in question["ids"]]
            answers = {inputs[0].split()[a] for a, b in question["spans"]}
            assert len(answers) == 1 and not any(
                f" {answer} " in text for answer in answers for text in inputs[1:]
            )
        epochs.append(sorted(question["ids"][0] for question in seen))
        assert len({tuple(ids) for ids in epochs[-1]}) == 40
    one = draw_passages(train[0], 0, 0, corpus, reader, cfg)
    assert any(
        draw_passages(train[0], 0, epoch, corpus, reader, cfg)["ids"][1:] != one["ids"][1:]
        for epoch in (1, 2, 3)
    )


def flat_gradient(reader):
    return torch.cat([p.grad.flatten() for p in reader.parameters()])


def close(got, wanted):
    return (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def one_graph(chunks, reader, full, width):
    """
    The oracle: every question by itself, plain autograd; with `full` all rows of that length, and as many of
    pure padding as fill up `width` (the reference's way).
    """
    reader.zero_grad()
    losses = []
    for question in (question for chunk in chunks for question in chunk):
        rows = question["ids"] + [[]] * (width - len(question["ids"]) if full else 0)
        start_ML, end_ML, relevance_M = reader(**collate(reader, rows, full))
        size = full or len(rows[0])
        start_L, end_L = start_ML[0, :size].log_softmax(0), end_ML[0, :size].log_softmax(0)
        spans = torch.stack([start_L[a] + end_L[b] for a, b in question["spans"]])
        losses.append(-spans.exp().sum().log() - relevance_M.log_softmax(0)[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), flat_gradient(reader)


def test_gradient_does_not_depend_on_the_chunks(world):
    """
    Chunks of any size give one graph's gradient, with padding in the softmaxes (then twelve rows of full
    length a question, two of them padding) and without.
    """
    for padding in (False, True):
        for question_chunk, passage_chunk in ((99, 99), (3, 4), (1, 1)):
            changes = {"question_chunk": question_chunk, "passage_chunk": passage_chunk, "dropout": 0.0}
            changes |= {"padding_takes_part": padding, "passages_per_question": 12}
            cfg, train, corpus, reader = parts(world, **changes)
            chunks = make_batch(0, train, corpus, reader, cfg)
            chunks[0][0]["ids"][0] = chunks[0][0]["ids"][0][:-3]  # positives of several lengths
            loss, correct = add_gradient(chunks, reader, ACCELERATOR, cfg, 0).tolist()
            got = flat_gradient(reader)
            wanted_loss, wanted = one_graph(chunks, reader, 40 if padding else 0, 12)
            assert close(got, wanted) and abs(loss - wanted_loss) < 1e-5 and 0 <= correct <= 8
        assert max(len(q["ids"]) for chunk in chunks for q in chunk) < 12, "some rows must be padding"


def test_dropout_is_a_function_of_seed_and_step(world):
    """The same step gives the same bits, another step other masks."""
    cfg, train, corpus, reader = parts(world, dropout=0.1)
    chunks, gradients = make_batch(0, train, corpus, reader, cfg), []
    for step in (3, 3, 4):
        reader.zero_grad()
        torch.rand(7)  # state that a resumed run would not have
        add_gradient(chunks, reader, ACCELERATOR, cfg, step)
        gradients.append(flat_gradient(reader))
    assert torch.equal(gradients[0], gradients[1]) and not close(gradients[0], gradients[2])
    assert chunk_seed((42, 3, 0), 0) != chunk_seed((42, 3, 0), 1)


def device_gradient(folder, world):
    """On each of W processes: one step, the dev metrics and the answers."""
    accelerator = SimpleNamespace(**vars(ACCELERATOR) | {"process_index": dist.get_rank()})
    cfg, train, corpus, reader = parts(world, dropout=0.0, question_chunk=1)
    totals = add_gradient(make_batch(0, train, corpus, reader, cfg), reader, accelerator, cfg, 0)
    answers = answer_all(train, corpus, reader, accelerator, cfg, [1, 6])
    found = (totals, flat_gradient(reader), evaluate(train, corpus, reader, accelerator, cfg), answers)
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")


def test_two_devices_give_the_gradient_and_the_metric_of_one(world, tmp_path):
    """Two gloo processes: loss and gradient of a single device, EM over all questions on both."""
    on_devices(2, device_gradient, str(tmp_path), world)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert torch.equal(both[0][1], both[1][1]), "devices must hold the same gradient"
    cfg, train, corpus, reader = parts(world, dropout=0.0, question_chunk=1)
    totals = add_gradient(make_batch(0, train, corpus, reader, cfg), reader, ACCELERATOR, cfg, 0)
    assert close(both[0][1], flat_gradient(reader)) and torch.allclose(totals, both[0][0])
    alone = answer_all(train, corpus, reader, ACCELERATOR, cfg, [1, 6])
    texts = [[answer["text"] for answer in one] for one in alone]
    for _, _, metrics, answers in both:
        assert [[answer["text"] for answer in one] for one in answers] == texts
        assert metrics == evaluate(train, corpus, reader, ACCELERATOR, cfg)


def test_biases_and_layer_norms_are_not_decayed(world):
    """DPR's two groups: matrices are decayed, biases and layer norms are not."""
    cfg, _, _, reader = parts(world, weight_decay=0.1)
    names = {p: name for name, p in reader.named_parameters()}
    for group in make_optimizer(reader.named_parameters(), cfg).param_groups:
        plain = [names[p].endswith("bias") or "LayerNorm" in names[p] for p in group["params"]]
        assert set(plain) == {group["weight_decay"] == 0.0}


# ---------------------------------------------------------------- evaluation
def test_reading_in_batches_changes_nothing(world):
    """Any batch size gives the logits of a passage by itself, in the given order, without its padding."""
    cfg, train, corpus, reader = parts(world)
    ids = [
        ids for ids, _ in tokenize_rows(reader.tokenizer, "which is red", [corpus[i] for i in range(5)], 40)
    ]
    ids[2] = ids[2][:12]
    one, four = (read(reader, ids, size) for size in (1, 4))
    for row, a, b in zip(ids, one, four, strict=True):
        assert len(a[0]) == len(b[0]) == len(row) and np.allclose(a[0], b[0], atol=1e-5)
        assert np.allclose(a[1], b[1], atol=1e-5) and abs(a[2] - b[2]) < 1e-5
    assert reader.training, "the mode is given back"


def test_logits_that_are_no_numbers_name_the_question(world):
    """A NaN in either output: one line with the question, before an answer is chosen by it."""
    for part in ("qa_outputs", "qa_classifier"):
        cfg, train, corpus, reader = parts(world)
        with torch.no_grad():
            getattr(reader.model.span_predictor, part).bias[0] = float("nan")
        words = reader.tokenizer.decode(word_pieces(reader.tokenizer, [train[0]["question"]])[0])
        with pytest.raises(UserError) as error:
            answer_all(train[:3], corpus, reader, ACCELERATOR, cfg, [1])
        assert str(error.value).startswith(f"question {words!r}: the reader's logits are not finite")


def test_scores_by_hand():
    """EM and F1 per n; a question without a prediction counts 0, one without answers is not counted."""
    examples = [{"answers": answers} for answers in (["The Beatles"], ["new york"], ["the"], [])]
    answers = [[{"text": "beatles!"}] * 2, [None, {"text": "york"}], [None, None], [{"text": "x"}] * 2]
    values = answer_scores(examples, answers, [1, 5])
    assert values["EM@1"] == [1, 0, 0] and values["EM@5"] == [1, 0, 0]
    assert values["F1@1"] == [1, 0, 0] and values["F1@5"] == [1, pytest.approx(2 / 3), 0]


# ---------------------------------------------------------------- doors
def test_dprs_readers_load_with_every_weight(world, tmp_path):
    """
    facebook/dpr-reader-* (the class, on random weights) and a reader .cp of the original code, whose names
    are encoder.*, qa_outputs.*, qa_classifier.*: the same logits as the official class; nothing in it runs.
    """
    words = load_reader(world / "bert", new_head=True, inputs={"reader_tokens": 40}).tokenizer
    settings = bert(len(words), 1, 64, 3).config.to_diff_dict() | {
        "num_attention_heads": 1,
        "max_position_embeddings": 400,
    }
    torch.manual_seed(3)
    official = DPRReader(DPRConfig(**settings | {"initializer_range": 0.2})).eval()
    official.save_pretrained(tmp_path / "hf")
    words.save_pretrained(tmp_path / "hf")
    words.save_pretrained(tmp_path)
    inner = official.span_predictor
    weights = {f"encoder.{k}": v for k, v in inner.encoder.bert_model.state_dict().items()}
    weights |= {f"qa_outputs.{k}": v for k, v in inner.qa_outputs.state_dict().items()}
    weights |= {f"qa_classifier.{k}": v for k, v in inner.qa_classifier.state_dict().items()}
    dead = {
        "encoder.pooler.dense.weight": torch.zeros(64, 64),
        "encoder.embeddings.position_ids": torch.arange(400),
    }
    saved = {"model_dict": weights | dead, "encoder_params": Attack(tmp_path / "owned")}
    torch.save(saved, tmp_path / "reader.cp")
    batch = {"input_ids": torch.tensor([[2, 7, 3, 9, 3, 11, 12], [2, 8, 3, 9, 3, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with torch.no_grad():
        wanted = official(**batch)
        for source in (tmp_path / "hf", tmp_path / "reader.cp"):
            reader = load_reader(source).eval()
            assert reader.inputs == {
                "role": "reader",
                "pair": "",
                "reader_tokens": 350,
                "token_types": "zeros",
            }
            start_BL, end_BL, relevance_B = reader(
                **batch, token_type_ids=torch.zeros_like(batch["input_ids"])
            )
            assert torch.allclose(start_BL, wanted.start_logits, atol=1e-5)
            assert torch.allclose(end_BL, wanted.end_logits, atol=1e-5)
            assert torch.allclose(relevance_B, wanted.relevance_logits, atol=1e-5)
    assert not (tmp_path / "owned").exists()
    for name in ("qa_classifier.bias", "encoder.encoder.layer.1.output.dense.weight"):
        less = {k: v for k, v in weights.items() if k != name}
        torch.save({"model_dict": less}, tmp_path / "less.cp")
        with pytest.raises(UserError, match=r"1 weights are missing, such as .*" + name.split(".")[-2]):
            load_reader(tmp_path / "less.cp")
    torch.save({"model_dict": {"ctx_model.x": torch.zeros(1)}}, tmp_path / "other.cp")
    with pytest.raises(UserError, match="not a reader checkpoint"):
        load_reader(tmp_path / "other.cp")


def test_a_saved_reader_is_the_same_and_a_hugging_face_folder(world, tmp_path):
    """save_encoder and load_reader give weights and inputs back; DPRReader opens the folder as its own."""
    reader = load_reader(world / "bert", {"reader_tokens": 40, "token_types": "segments"}, new_head=True)
    save_encoder(reader, tmp_path / "reader")
    again = load_reader(tmp_path / "reader")
    assert again.inputs == reader.inputs and all(map(torch.equal, again.parameters(), reader.parameters()))
    model, found = DPRReader.from_pretrained(tmp_path / "reader", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    heads = reader.model.span_predictor.qa_outputs
    assert 0.01 < heads.weight.std() < 0.04 and not heads.bias.any()
    stored = load_encoder(world / "query_encoder", "question").model.state_dict()
    start = load_reader(world / "query_encoder", {"reader_tokens": 40}, new_head=True)
    inside = start.model.span_predictor.encoder.bert_model.state_dict()
    assert all(torch.equal(inside[key], value) for key, value in stored.items())


def test_wrong_doors_are_refused(world, tmp_path):
    """Random weights and other models load without an exception: each is refused in one line."""
    shutil.copytree(world / "bert", tmp_path / "ernie")
    settings = json.loads((tmp_path / "ernie" / "config.json").read_text())
    (tmp_path / "ernie" / "config.json").write_text(json.dumps(settings | {"model_type": "ernie"}))
    DPRReader(DPRConfig(**bert(119).config.to_diff_dict())).save_pretrained(tmp_path / "tower")
    BertTokenizer.from_pretrained(world / "bert").save_pretrained(tmp_path / "tower")
    settings = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps(settings | {"architectures": ["DPRContextEncoder"]})
    )
    small = {"reader_tokens": 40}
    for folder, head, inputs, words in (
        (world / "bert", False, small, "without the reader's outputs"),
        (world / "query_encoder", False, small, "this is a question encoder"),
        (tmp_path / "ernie", True, small, "a reader starts from a BERT, this is a ernie"),
        (tmp_path / "tower", True, small, "holds a DPRContextEncoder"),
        (world / "nowhere", True, small, "no such reader folder"),
        (world / "bert", True, {}, "350 tokens a passage, but only 256"),
    ):
        with pytest.raises(UserError, match=words):
            load_reader(folder, inputs, new_head=head)


# ---------------------------------------------------------------- the command, as its user meets it
def rows(run_dir):
    """metrics.jsonl without what differs between two runs: the time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run of 40 steps: (its keys, its folder)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _, keys = config(world)
    done = run("train_reader.py", keys | {"run_dir": folder})
    assert done.returncode == 0, done.stderr[-2000:]
    return keys, folder


def test_a_finished_run_has_learned(whole):
    """The loss falls, the best checkpoint is that of the highest dev EM, the log tells what was dropped."""
    keys, folder = whole
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert len(losses) == 40 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    final = json.loads((folder / "metrics.json").read_text())
    dev = [(row["em"], row["step"]) for row in rows(folder) if "em" in row]
    assert [step for _, step in dev] == [10, 20, 30, 40]
    best = max(em for em, _ in dev)
    assert final["best"] == best and final["best_step"] == next(step for em, step in dev if em == best)
    log = (folder / "log.txt").read_text()
    assert "40 of 40 questions kept, dropped: none" in log and "example answers: " in log
    reader = load_reader(folder / "reader")
    assert reader.inputs["pair"].endswith(f"-{final['best_step']}") and reader.inputs["reader_tokens"] == 40


def test_killed_it_resumes_to_the_same_bits(whole, tmp_path):
    """SIGKILL in the middle, on again: every loss, every dev number and the weights are bit-equal."""
    keys, folder = whole
    keys = keys | {"run_dir": tmp_path / "run", "resume": "exact"}
    process = begin("train_reader.py", keys)
    shown = next(line for line in process.stdout if line.startswith("step     1"))  # step 10 or later
    kill_tree(process, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and "/40" in shown
    assert not (tmp_path / "run" / "metrics.json").exists(), "the kill must have hit a running process"
    done = run("train_reader.py", keys)
    assert done.returncode == 0, done.stderr[-2000:]
    assert rows(tmp_path / "run") == rows(folder)
    name = "reader/model.safetensors"
    a, b = load_file(tmp_path / "run" / name), load_file(folder / name)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def call(keys, monkeypatch):
    """main() in this process, without its signal handlers."""
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr("sys.argv", ["train_reader.py", *argv])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    main()


def test_it_answers_a_file_of_questions(whole, world, tmp_path, monkeypatch, capsys):
    """
    Predictions in DPR's layout for n = 1, 3 and 6, {qid: answer} beside it, EM and F1 with n and interval;
    a question that the .run does not have counts as wrong; the reader's own length is used.
    """
    lines = [line for line in (world / "dev.run").read_text().splitlines() if not line.startswith("q40\t")]
    (tmp_path / "test.run").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.json"
    keys = config(world, train="", test=world / "dev.jsonl", test_run=tmp_path / "test.run", out=out)[1]
    call(keys | {"test_depth": 6} | {"init": whole[1] / "reader", "reader_tokens": 200}, monkeypatch)
    printed = capsys.readouterr().out
    found, short = json.loads(out.read_text()), json.loads((tmp_path / "out.answers.json").read_text())
    metrics = json.loads((tmp_path / "out.metrics.json").read_text())
    assert list(metrics) == [f"{name}@{n}" for n in (1, 3, 6) for name in ("EM", "F1")]
    assert "1 of them without passages, such as q40" in printed and "EM@6" in printed
    assert found[0]["predictions"] == [] and short["q40"] == "" and len(short) == 10
    reader, corpus = load_reader(whole[1] / "reader"), Corpus(world / "corpus.tsv")
    examples, _, _ = read_ranking(world / "dev.jsonl", tmp_path / "test.run", corpus, 6)
    right = {n: 0 for n in (1, 3, 6)}
    for example, one in zip(examples[1:], found[1:], strict=True):
        inputs = tokenize_rows(
            reader.tokenizer, example["question"], [corpus[r] for r in example["rows"]], 40
        )
        logits = [read(reader, [ids], 1)[0] for ids, _ in inputs]
        for n, prediction in zip((1, 3, 6), one["predictions"], strict=True):
            best = int(np.argmax([relevance for _, _, relevance in logits[:n]]))
            assert prediction["top_k"] == n and prediction["prediction"]["passage_idx"] == best
            assert set(prediction["prediction"]) == {
                "text",
                "score",
                "relevance_score",
                "passage_idx",
                "passage",
            }
            assert prediction["prediction"]["passage"] == corpus[example["rows"][best]].text
            assert prediction["prediction"]["text"] in prediction["prediction"]["passage"]
            right[n] += prediction["prediction"]["text"] == example["answers"][0]
        assert short[example["qid"]] == prediction["prediction"]["text"]
    assert all(metrics[f"EM@{n}"]["value"] == right[n] / 10 and metrics[f"EM@{n}"]["n"] == 10 for n in right)
    assert metrics["EM@1"]["value"] >= 0.5, "40 steps teach it where a colour stands"
    m = metrics["F1@1"]
    assert 0 <= m["low"] <= m["value"] <= m["high"] <= 1


def test_mistakes_end_in_one_line(whole, world, tmp_path, monkeypatch):
    """One sentence with the file or key, before any training."""
    (tmp_path / "far.jsonl").write_text('{"qid": "q0", "question": "who", "answers": ["nowhere"]}\n')
    (tmp_path / "none.jsonl").write_text('{"qid": "q0", "question": "who"}\n')
    for changes, words in (
        ({"train": tmp_path / "far.jsonl"}, ["0 of 1 questions kept", "1 with no answer in any passage"]),
        ({"train": tmp_path / "none.jsonl"}, ["none.jsonl:1", "'answers' is missing"]),
        ({"batch_size": 64}, ["40 questions", "64"]),
        ({"corpus": ""}, ["needs its ranking (a .run) and the corpus"]),
        ({"train_run": "nowhere.run"}, ["train_run", "nowhere.run"]),
        ({"init": world / "nowhere"}, ["nowhere"]),
        ({"passages_per_question": 1}, ["passages_per_question must be at least 2"]),
        ({"train": ""}, ["give either train, or test"]),
        ({"test": world / "dev.jsonl"}, ["give either train, or test"]),
        ({"run_dir": whole[1]}, ["--resume exact"]),
        ({"run_dir": whole[1], "resume": "exact", "passage_chunk": 5}, ["passage_chunk: 4 then, 5 now"]),
        ({"train": "", "test": world / "dev.jsonl", "out": "x.txt"}, ["must be the path of a .json"]),
    ):
        _, keys = config(world, **{"run_dir": tmp_path / "run"} | changes)
        with pytest.raises(UserError) as error:
            call(keys, monkeypatch)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


def test_no_output_replaces_an_input(world, tmp_path, monkeypatch):
    """Neither out nor the two files beside it may be what is read; refused before a reader is opened."""
    for test, out in (("out.json", "out.json"), ("out.answers.json", "out.json"), ("a", "out.json")):
        ranking = "out.metrics.json" if test == "a" else "r.run"
        for name in (test, ranking):
            shutil.copy(world / "dev.jsonl", tmp_path / name)
        keys = config(
            world,
            train="",
            init=tmp_path / "nowhere",
            test=tmp_path / test,
            test_run=tmp_path / ranking,
            out=tmp_path / out,
        )[1]
        with pytest.raises(UserError, match=r"is an input too \(test"):
            call(keys, monkeypatch)
        assert (tmp_path / test).read_text() == (world / "dev.jsonl").read_text()
        (tmp_path / test).unlink()


def test_a_loss_that_is_not_a_number_stops_before_the_weights_change(world, tmp_path, monkeypatch):
    """A NaN in the starting weights: step, loss and norm are named, no checkpoint is written."""
    *_, reader = parts(world)
    with torch.no_grad():
        reader.model.span_predictor.qa_outputs.bias[0] = float("nan")
    save_encoder(reader, tmp_path / "nan")
    _, keys = config(world, init=tmp_path / "nan", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="step 1: loss nan"):
        call(keys, monkeypatch)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dry_runs_write_nothing(whole, world, tmp_path, monkeypatch, capsys):
    """Parameters, memory, disk and minutes of training and of answering are printed; nothing appears."""
    answering = {
        "train": "",
        "init": whole[1] / "reader",
        "test": world / "dev.jsonl",
        "test_run": world / "dev.run",
    }
    for changes in ({}, answering | {"out": tmp_path / "run" / "out.json"}):
        call(config(world, run_dir=tmp_path / "run", dry_run=True, **changes)[1], monkeypatch)
        printed = capsys.readouterr().out
        assert all(word in printed for word in ("parameters", "memory", "disk", "minutes"))
    assert not (tmp_path / "run").exists()


def test_all_configs_of_the_reader_have_its_keys_in_its_order():
    """`diff` of two configs teaches only when both have the same keys in the same order."""
    import yaml

    schema = ROOT / "config" / "train_reader_nq.yaml"
    others = list((ROOT / "config").glob("train_reader_*.yaml"))
    assert len(others) == 3
    for other in others:
        load_config("", "config/train_reader_nq.yaml", ["--config", str(other)])
        assert list(yaml.safe_load(other.read_text())) == list(yaml.safe_load(schema.read_text()))
