"""The reader and its trainer against DPR's golden numbers, Hugging Face's own reader and plain autograd."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, DPRConfig, DPRReader, DPRReaderTokenizer

import utils.reader
from tests.processes import flags, main, rows
from tests.toy import ACCELERATOR, bert, close, flat_gradient, golden_file, write_lines
from train_reader import add_gradient, best_spans, draw_passages, make_batch, reader_loss
from utils.corpus import Passage
from utils.data import Corpus, read_ranking
from utils.encoder import collate
from utils.plumbing.config import UserError, load_config
from utils.plumbing.weights import load_encoder, save_encoder
from utils.reader import (
    Reader,
    answer_all,
    find_spans,
    find_training_rows,
    load_reader,
    predict,
    read_gold,
    span_text,
    tokenize_rows,
    training_rows,
    word_pieces,
)


def keys(world, run_dir, **changes):
    """The keys of a toy run. The ranking of a question is its own passage, then nine others."""
    for split in ("train", "dev"):
        lines = []
        for question in map(json.loads, (world / f"{split}.jsonl").read_text().splitlines()):
            gold = int(question["positives"][0])
            pids = [gold, *((gold + 7 * k) % 60 + 1 for k in range(1, 10))]
            lines += [f"{question['qid']}\t{pid}\t{rank}\t{20 - rank}\n" for rank, pid in enumerate(pids, 1)]
        (world / f"{split}.run").write_text("".join(lines))
    files = {"init": world / "bert", "corpus": world / "corpus.tsv", "gold": "", "run_dir": run_dir}
    for split in ("train", "dev"):
        files |= {split: world / f"{split}.jsonl", f"{split}_run": world / f"{split}.run"}
    sizes = {"reader_tokens": 40, "train_depth": 10, "passages_per_question": 5, "test_depth": 1}
    sizes |= {"batch_size": 8, "question_chunk": 3, "passage_chunk": 4}
    steps = {"epochs": 8, "learning_rate": 2e-3, "eval_every": 10, "save_every": 7, "log_every": 10}
    return files | sizes | steps | {"max_grad_norm": 1.0} | changes


def open_reader(folder, length=40, seed=42):
    torch.manual_seed(seed)
    return load_reader(folder, {"reader_tokens": length, "token_types": "zeros"}, new_head=True)


def parts(world, **changes):
    """(settings, examples to learn from, corpus, reader) of the toy run."""
    given = keys(world, world / "run", **changes)
    cfg = load_config("", "config/train_reader_nq.yaml", flags(given))
    corpus, reader = Corpus(cfg.corpus), open_reader(cfg.init).train()
    examples, _ = read_ranking(cfg.train, cfg.train_run, corpus, cfg.train_depth)
    return cfg, find_training_rows(cfg.train, examples, corpus, reader, {})[0], corpus, reader


def corpus_of(path, passages):
    """The corpus of (title, text) pairs."""
    lines = [{"_id": f"p{i}", "title": title, "text": text} for i, (title, text) in enumerate(passages)]
    return Corpus(write_lines(path, lines))


# ---------------------------------------------------------------- loss, against DPR
def test_loss_and_gradients_equal_dpr():
    """All golden cases in float64, a question without any span included; of the odd ones the closed form."""
    cases = golden_file("reader_loss")["cases"]
    assert len(cases) == 13 and sum(case.get("reference_quirk", False) for case in cases) == 4
    for case in cases:
        logits = {}
        for name in ("start", "end", "relevance"):
            logits[name] = torch.tensor(case[f"{name}_logits"], dtype=torch.float64, requires_grad=True)
        begin_NA, end_NA = (torch.tensor(case[f"{side}_positions"])[:, 0] for side in ("start", "end"))
        size = logits["start"].shape[2]
        spans_NA = torch.tensor(case["answer_mask"])[:, 0].bool() & (begin_NA < size) & (end_NA < size)
        spans = begin_NA.clamp(max=size - 1), end_NA.clamp(max=size - 1), spans_NA
        loss, _ = reader_loss(logits["start"][:, 0], logits["end"][:, 0], logits["relevance"], *spans)
        loss.backward()
        wanted = torch.tensor(case.get("closed_form_loss", case["loss"]), dtype=torch.float64)
        assert torch.isclose(loss.detach(), wanted, rtol=1e-8, atol=1e-8)
        for name in logits if "closed_form_loss" not in case else ():
            wanted = torch.tensor(case[f"grad_{name}"], dtype=torch.float64)
            assert torch.allclose(logits[name].grad, wanted, rtol=1e-8, atol=1e-8), name


# ---------------------------------------------------------------- spans and texts, against DPR
@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(golden span cases, a stand-in for a reader with their words, its vocabulary file)."""
    spans = golden_file("best_spans")
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(spans["vocab"]), encoding="utf-8")
    words = BertTokenizer(vocab=str(path), do_lower_case=True)
    continues_V = np.array([word.startswith("##") for word in spans["vocab"]])
    stub = SimpleNamespace(tokenizer=words, continues_V=continues_V, inputs={"reader_tokens": 350})
    return spans["cases"], stub, path


def text_of(stub, tokens):
    """A passage that is these tokens, written as people write; None where it would not be read as them."""
    ids = stub.tokenizer.convert_tokens_to_ids(tokens)
    text = stub.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    return text if word_pieces(stub, [text])[0] == ids else None


def test_the_answer_is_dprs_in_the_passages_own_letters(golden, monkeypatch):
    """Of each top_k passage, score, relevance and text; where all passages are empty None, not IndexError."""
    cases, stub, _ = golden
    seen, odd = 0, 0
    for case in (case for case in cases if case["kind"] == "question"):
        texts = [text_of(stub, p["tokens"][p["offset"] :]) for p in case["passages"]]
        if None in texts:
            odd += 1
            continue
        passages = [Passage("", "", text) for text in texts]
        ids_of = stub.tokenizer.convert_tokens_to_ids
        sequences = [(ids_of(p["tokens"]), p["offset"]) for p in case["passages"]]
        question = {"question": "q", "passages": passages, "sequences": sequences}
        logits = [
            (np.float32(p["start_logits"]), np.float32(p["end_logits"]), relevance)
            for p, relevance in zip(case["passages"], case["relevance_logits"], strict=False)
        ]
        monkeypatch.setattr(utils.reader, "read", lambda *_, logits=logits: logits)
        top_docs = case["thresholds"] or [len(case["relevance_logits"])]
        stub.max_answer_length = case["max_answer_length"]
        answers = predict(stub, [question], top_docs, 8)[0]
        if "error" in case:
            assert answers[0] is None
            continue
        for wanted, got in zip(case["expected"], answers, strict=True):
            assert (got["passage_idx"], got["score"]) == (wanted["passage"], wanted["score"])
            assert (got["relevance_score"], got["text"]) == (wanted["relevance"], wanted["text"])
            seen += 1
    assert seen >= 7 and odd <= 2


def test_best_spans_and_their_texts_equal_dpr(golden):
    """Every golden span in order; cut out of a passage, each is the text that DPR decodes from its tokens."""
    cases, stub, _ = golden
    cases, texts = [case for case in cases if case["kind"] == "spans"], 0
    assert len(cases) == 26 and any(not case["tokens"] for case in cases)
    for case in cases:
        continues_S = stub.continues_V[stub.tokenizer.convert_tokens_to_ids(case["tokens"])]
        logits = (np.array(case[f"{side}_logits"], dtype=np.float32) for side in ("start", "end"))
        spans = best_spans(*logits, continues_S, case["max_answer_length"], case["top_spans"])
        assert spans == [(e["start"], e["end"], e["score"]) for e in case["expected"]]
        text = text_of(stub, case["tokens"])
        if text and "u. s." not in text:  # trap: a decoder cannot know that there was no space
            offsets = stub.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = offsets.offset_mapping
            for (first, last, _), wanted in zip(spans, case["expected"], strict=True):
                assert text[offsets[first][0] : offsets[last][1]] == wanted["text"]
                texts += 1
    assert texts > 60


def test_the_letters_of_the_passage_are_kept(world):
    """An uncased tokenizer reads `Zürich’s U.S.`; the answer is spelt as in the passage, not as tokens."""
    reader = open_reader(world / "bert", 60)
    passage = Passage("1", "x", "  In Zürich’s U.S. camp — don't ask.")
    [(ids, first)] = tokenize_rows(reader, "where", [passage])
    text = passage.text.strip()
    offsets = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for wanted in ("Zürich’s U.S.", "don't", "— don"):
        begin = text.index(wanted)
        a = next(i for i, offset in enumerate(offsets) if offset[0] == begin)
        b = next(i for i, offset in enumerate(offsets) if offset[1] == begin + len(wanted))
        start_L, end_L = np.zeros((2, len(ids)), np.float32)
        start_L[first + a] = end_L[first + b] = 9
        reader.max_answer_length = 20
        got = span_text(reader, passage, (ids, first), (start_L, end_L, 0.0))
        assert got["text"] == wanted and got["score"] == 18


# ---------------------------------------------------------------- inputs, and what is learned from
def test_rows_equal_hugging_faces_reader_tokenizer(golden):
    """`[CLS] question [SEP] title [SEP] passage`, no [SEP] at the end: as facebook/dpr-reader-* reads."""
    _, stub, path = golden
    official = DPRReaderTokenizer(str(path))
    pairs = [("City", "The king of river."), ("raven", "don't"), ("a b", "")]
    passages, question = [Passage("", *pair) for pair in pairs], "What is king?"
    rows = tokenize_rows(stub, question, passages)
    columns = {"titles": [title for title, _ in pairs], "texts": [text for _, text in pairs]}
    assert [ids for ids, _ in rows] == official(questions=question, **columns)["input_ids"]
    assert [len(ids) - first for ids, first in rows] == [5, 3, 0]
    assert tokenize_rows(stub, question, [Passage("", "", "king")])[0][0][-3:] == [3, 3, rows[0][0][3]]
    assert tokenize_rows(stub, question, []) == []
    stub = SimpleNamespace(tokenizer=stub.tokenizer, inputs={"reader_tokens": 9})
    assert [len(ids) for ids, _ in tokenize_rows(stub, question, passages)] == [9, 9, 9]
    assert tokenize_rows(stub, question, passages, cut=False) == rows


def test_spans_are_those_of_the_passage(world):
    """Every mention up to the last token, none in the question or the title, none of an empty answer."""
    reader = open_reader(world / "bert")
    passage = Passage("", "red tower", "red and blue and new red")
    [(ids, begin)] = tokenize_rows(reader, "is red or new red right", [passage])
    assert ids[begin:] == word_pieces(reader, [passage.text])[0] and begin > 8
    answers = word_pieces(reader, ["red", "new red", "blue", "red new"])
    wanted = [(begin, begin), (begin + 5, begin + 5), (begin + 4, begin + 5), (begin + 2, begin + 2)]
    assert find_spans(ids, begin, answers) == wanted and find_spans(ids, begin, [[]]) == []


def test_what_is_learned_and_what_is_dropped_and_why(world, tmp_path):
    """One question of each fate; the comments and the statuses name them."""
    reader = open_reader(world / "bert")
    beyond = "the old river of rome is new and it stands in rome " * 3 + " red"
    texts = ["red and blue and red .", beyond, "nothing here", "", "“café” — red’s", "old tower", "at 5°C"]
    corpus = corpus_of(tmp_path / "edge.jsonl", [("", text) for text in texts])

    def fate(answers, rows, length=40, question="which"):
        reader.inputs["reader_tokens"] = length
        example = {"question": question, "answers": answers, "rows": np.array(rows, dtype=np.int64)}
        status, positives, negatives, _ = training_rows(example, corpus, reader, {})
        return status, positives.tolist(), negatives.tolist()

    assert fate(["red", "blue"], [2, 0, 3, 1]) == ("kept", [0], [2, 3]), "beyond the cut is no negative"
    assert fate(["red"], [1, 2]) == ("with answers only beyond 40 tokens", [], [2])
    assert fate(["red"], [1, 2], question="is it red")[0] == "with answers only beyond 40 tokens"
    assert fate(["red"], [1, 2], 60)[:2] == ("kept", [1])
    assert fate(["red"], [2, 3, 5])[0] == "with no answer in any passage"
    assert fate(["5"], [6])[0] == "with no answer as word pieces in a row"  # BERT reads one word
    assert fate([], [0])[0] == "without answers" and fate(["red"], [])[0] == "without passages"
    # has_answer finds the tokens `red`, `'s` in a row; a word-piece tokenizer may cut the passage elsewhere
    assert fate(["café"], [4])[:2] == ("kept", [4]) and fate(["red"], [4])[:2] == ("kept", [4])


def test_an_answer_across_the_cut_is_never_learned(world, tmp_path):
    """An answer of three tokens, the cut at every place: it counts only when its last token is left."""
    cfg, _, _, reader = parts(world)
    corpus = corpus_of(tmp_path / "cut.jsonl", [("", "the river of rome is new river of rome")])
    example = {"question": "which", "answers": ["river of rome"], "rows": np.array([0])}
    for length in range(4, 16):  # [CLS] which [SEP] [SEP] the: the mentions are tokens 5 to 7 and 10 to 12
        reader.inputs["reader_tokens"] = length
        status, positives, *_ = training_rows(example, corpus, reader, {})
        spans = [span for span in [(5, 7), (10, 12)] if span[1] < length]
        assert status == ("kept" if spans else f"with answers only beyond {length} tokens")
        assert positives.tolist() == [0] * bool(spans)
        if spans:
            kept = example | {"positives": positives, "negatives": positives[:0]}
            drawn = draw_passages(kept, 0, 0, corpus, reader, cfg)
            assert drawn["spans"] == spans and len(drawn["ids"][0]) == min(length, 13)


def test_a_gold_page_comes_before_other_positives(world, tmp_path):
    """With a gold file only passages of its page are positives, however many; else the first twenty."""
    path = tmp_path / "gold.json"
    entry = {"question": "which?", "question_tokens": "which ?", "title": "Oslo", "context": "a red tower"}
    path.write_text(json.dumps({"data": [entry]}))
    assert read_gold(path) == {"which?": "oslo", "which ?": "oslo"}
    passages = [("paris", "red")] * 30 + [("OSLO", "red")] * 25 + [("oslo", "no")] * 170
    corpus, reader = corpus_of(tmp_path / "c.jsonl", passages), open_reader(world / "bert")

    def learned(question, depth):
        example = {"question": question, "answers": ["red"], "rows": np.arange(depth)}
        status, positives, negatives, _ = training_rows(example, corpus, reader, read_gold(path))
        return status, positives.tolist(), len(negatives)

    assert learned("which ?", 225) == ("kept", list(range(30, 55)), 150)
    assert learned("who", 225) == ("kept", list(range(20)), 150)
    assert learned("who", 120) == ("kept", list(range(20)), 65)
    path.write_text("[1]")
    with pytest.raises(UserError, match="gold.json: not DPR's gold"):
        read_gold(path)


def test_rankings_of_other_questions_and_patterns_are_refused(world, tmp_path):
    """CuratedTREC's patterns in one line, while odd plain answers pass; a ranking of other questions."""
    path, corpus = tmp_path / "q.jsonl", Corpus(world / "corpus.tsv")
    (tmp_path / "q.run").write_text("q1\t1\t1\t1.0\n")
    (tmp_path / "other.run").write_text("nobody\t1\t1\t1.0\n")
    question = {"qid": "q1", "question": "how long"}
    for answer in ("AC\\DC", "¯\\_(ツ)_/¯", "M*A*S*H", "C++ (language)?"):
        path.write_text(json.dumps(question | {"answers": [answer]}))
        examples, note = read_ranking(path, tmp_path / "q.run", corpus, 9)
        assert examples[0]["rows"].tolist() == [0] and "fewer than the 9 asked for" in note
    with pytest.raises(UserError, match="passages for none of the questions"):
        read_ranking(path, tmp_path / "other.run", corpus, 9)
    question["answers"] = [r"1,?490\s?(km|kilometers)"]
    several = "490.*regular expressions.*a reader needs plain answers"
    for qids, message in ((["q1"], "regular expression.*490"), (["q1", "q2"], several)):
        write_lines(path, [question | {"qid": qid} for qid in qids])
        with pytest.raises(UserError, match=message):
            read_ranking(path, tmp_path / "q.run", corpus, 9)


# ---------------------------------------------------------------- batches and gradients
def test_a_batch_is_a_function_of_seed_and_step(world):
    """An epoch shows questions once, positive first, spans true; negatives and order differ by epoch."""
    cfg, train, corpus, reader = parts(world)
    orders, separator = [], reader.tokenizer.sep_token_id
    for epoch in (0, 1):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            chunks = make_batch(step, train, corpus, reader, cfg)
            assert chunks == make_batch(step, train, corpus, reader, cfg)
            assert [len(chunk) for chunk in chunks] == [3, 3, 2]
            seen += [question for chunk in chunks for question in chunk]
        for question in seen:
            positive, *negatives = question["ids"]
            [answer] = {tuple(positive[begin : end + 1]) for begin, end in question["spans"]}
            assert len(answer) == 1 and len(negatives) == 4
            assert not any(answer[0] in ids for ids in negatives)
        orders.append([question["ids"][0][: question["ids"][0].index(separator)] for question in seen])
    assert len({*map(tuple, orders[0])}) == 40
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    drawn = [draw_passages(train[0], 0, epoch, corpus, reader, cfg)["ids"] for epoch in (0, 1, 2, 3)]
    assert any(ids[1:] != drawn[0][1:] for ids in drawn)


def one_graph(chunks, reader):
    """The oracle, every question by itself: (loss, how many positives are the most relevant, gradient)."""
    reader.zero_grad()
    losses, correct = [], 0
    for question in (question for chunk in chunks for question in chunk):
        start_ML, end_ML, relevance_M = reader(**collate(reader, question["ids"]))
        size = len(question["ids"][0])
        start_L, end_L = start_ML[0, :size].log_softmax(0), end_ML[0, :size].log_softmax(0)
        spans = torch.stack([start_L[a] + end_L[b] for a, b in question["spans"]])
        losses.append(-spans.exp().sum().log() - relevance_M.log_softmax(0)[0])
        correct += relevance_M.argmax().item() == 0
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), correct, flat_gradient(reader)


def test_the_gradient_is_that_of_one_graph(world):
    """Chunks of any size give one graph's loss and gradient; questions have 4 to 12 passages."""
    for question_chunk, passage_chunk in ((99, 99), (3, 4), (1, 1)):
        sizes = {"question_chunk": question_chunk, "passage_chunk": passage_chunk}
        cfg, train, corpus, reader = parts(world, passages_per_question=12, **sizes)
        chunks = make_batch(0, train, corpus, reader, cfg)
        chunks[0][0]["ids"] = chunks[0][0]["ids"][:4]
        loss, correct = add_gradient(chunks, reader, ACCELERATOR, cfg, 0).tolist()
        got = flat_gradient(reader)
        wanted_loss, wanted_correct, wanted = one_graph(chunks, reader)
        assert close(got, wanted)
        assert abs(loss - wanted_loss) < 1e-5 and correct == wanted_correct


def test_dropout_is_a_function_of_seed_and_step(world):
    """The same step gives the same bits, another step other masks."""
    cfg, train, corpus, reader = parts(world)
    utils.reader.weights.set_dropout(reader, 0.1)
    chunks = make_batch(0, train, corpus, reader, cfg)
    gradients = []
    for step in (3, 3, 4):
        reader.zero_grad()
        torch.rand(7)  # state that a resumed run would not have
        add_gradient(chunks, reader, ACCELERATOR, cfg, step)
        gradients.append(flat_gradient(reader))
    assert torch.equal(*gradients[:2]) and not torch.allclose(*gradients[1:])


def test_logits_that_are_no_numbers_name_the_question(world):
    """A NaN in either output: one line with the question, before an answer is chosen by it."""
    for part in ("qa_outputs", "qa_classifier"):
        _, train, corpus, reader = parts(world)
        with torch.no_grad():
            getattr(reader.model.span_predictor, part).bias[0] = float("nan")
        with pytest.raises(UserError) as error:
            answer_all(reader, train[:3], corpus, [1], 8, ACCELERATOR)
        assert str(error.value).startswith(f"question {train[0]['question']!r}: the reader's logits are not")


# ---------------------------------------------------------------- weights in and out
def test_hugging_faces_reader_loads_with_every_weight(world, tmp_path):
    """facebook/dpr-reader-*, the class on random weights: the same logits as the official class."""
    words = open_reader(world / "bert").tokenizer
    settings = bert(len(words), 1, 64, 3).config.to_diff_dict() | {"max_position_embeddings": 400}
    torch.manual_seed(3)
    official = DPRReader(DPRConfig(**settings | {"initializer_range": 0.2})).eval()
    official.save_pretrained(tmp_path / "hf")
    words.save_pretrained(tmp_path / "hf")
    batch = {"input_ids": torch.tensor([[2, 7, 3, 9, 3, 11, 12], [2, 8, 3, 9, 3, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    reader = load_reader(tmp_path / "hf").eval()
    assert reader.inputs == {"role": "reader", "pair": "", "reader_tokens": 350, "token_types": "zeros"}
    with torch.no_grad():
        wanted = official(**batch)
        logits = reader(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
    for got, name in zip(logits, ("start_logits", "end_logits", "relevance_logits"), strict=True):
        assert torch.allclose(got, wanted[name], atol=1e-5), name


def test_a_saved_reader_is_the_same_and_a_hugging_face_folder(world, tmp_path):
    """save_encoder and load_reader give weights and inputs back; DPRReader opens the folder as its own."""
    reader = load_reader(world / "bert", {"reader_tokens": 40, "token_types": "segments"}, new_head=True)
    save_encoder(reader, tmp_path / "reader")
    again = load_reader(tmp_path / "reader")
    assert again.inputs == reader.inputs and all(map(torch.equal, again.parameters(), reader.parameters()))
    _, report = DPRReader.from_pretrained(tmp_path / "reader", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    heads = reader.model.span_predictor.qa_outputs
    assert 0.01 < heads.weight.std() < 0.04 and not heads.bias.any()
    stored = load_encoder(world / "query_encoder", "question").model.state_dict()
    inside = open_reader(world / "query_encoder").model.span_predictor.encoder.bert_model.state_dict()
    assert all(torch.equal(inside[key], value) for key, value in stored.items())


def test_other_models_are_refused(world, tmp_path):
    """Random weights and other models load without an exception: each is refused in one line."""
    shutil.copytree(world / "bert", tmp_path / "ernie")
    DPRReader(DPRConfig(**bert(119).config.to_diff_dict())).save_pretrained(tmp_path / "tower")
    BertTokenizer.from_pretrained(world / "bert").save_pretrained(tmp_path / "tower")
    changes = {"ernie": {"model_type": "ernie"}, "tower": {"architectures": ["DPRContextEncoder"]}}
    for folder, change in changes.items():
        file = tmp_path / folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (tmp_path / "old.cp").write_text("")
    small = {"reader_tokens": 40}
    for folder, inputs, words in (
        (tmp_path / "ernie", small, "a reader starts from a BERT, this is a ernie"),
        (tmp_path / "tower", small, "holds a DPRContextEncoder"),
        (tmp_path / "old.cp", small, "if it is a checkpoint of the original DPR, first: python -m prepare"),
        (world / "nowhere", small, "no such reader folder"),
        (world / "bert", {}, "350 tokens a passage, but only 256"),
    ):
        with pytest.raises(UserError, match=words):
            load_reader(folder, inputs, new_head=True)


def test_a_run_learns(world, tmp_path):
    """The loss falls, dev EM rises, the best checkpoint is that of the highest dev EM, the log tells all."""
    main("train_reader.py", keys(world, tmp_path / "run"))
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 40 and np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    dev = {row["step"]: row["em"] for row in rows(tmp_path / "run") if "em" in row}
    final = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [*dev] == [10, 20, 30, 40] and final["best"] == max(dev.values()) >= 0.5
    assert final["best_step"] == max(dev, key=lambda step: (dev[step], step))  # of equals the later
    log = (tmp_path / "run/log.txt").read_text()
    assert "40 of 40 questions kept, dropped: none" in log and "example answers: " in log
    reader = load_reader(tmp_path / "run/reader")
    assert reader.inputs["pair"].endswith(f"-{final['best_step']}") and reader.inputs["reader_tokens"] == 40


def test_where_a_piece_continues_a_word():
    """Not in a script without spaces: an answer in kana or Thai would grow to its whole sentence."""
    words = ["タワー", "##は", "東", "##ริง", "play", "##ing", "##ß"]

    class Tokenizer:
        def __len__(self):
            return len(words)

        def convert_ids_to_tokens(self, ids):
            return [words[i] for i in ids]

    continues_V = Reader(None, Tokenizer(), {}).continues_V
    assert continues_V.tolist() == [False, False, False, False, False, True, True]
    start_S, end_S = np.array([9.0, 0, 0, 0]), np.array([9.0, 0, 0, 0])
    assert best_spans(start_S, end_S, continues_V[:4], 3, 1) == [(0, 0, 18.0)]
