"""
What an extractive reader learns from: questions, the passages that a retriever found for them, and where the
answers stand in those. No torch; nothing is stored that could go stale.
"""

import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare.convert import iter_json_list, strings
from utils.corpus import Corpus
from utils.data import blank, iter_run, read_questions
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file, need_space, read_json
from utils.text import has_answer

# from: DPR dpr/data/reader_data.py:220-317: positives kept where no gold page is known; ten negatives for
# each positive, within these bounds
MAX_POSITIVES, NEGATIVES = 20, (50, 150)
PATTERN = re.compile(r"\\[sdwb]|\.\*|\(\?:|\w\|\w|\[\^?\w-\w")  # what plain answers hardly ever hold


def word_pieces(tokenizer, texts):
    """Id lists, without special tokens, uncut; the warning that some are too long for a BERT is premature."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids


def tokenize_rows(tokenizer, question, passages, length):
    """
    [(ids, first)] of one question with each of its passages: ids are `[CLS] question [SEP] title [SEP]
    passage`, cut to `length`, without a [SEP] at the end; the passage begins at ids[first]
    (DPR dpr/data/reader_data.py:256-272, 530-533).
    """
    if not passages:
        return []
    titles = [passage.title for passage in passages]
    texts = [passage.text.strip() for passage in passages]
    ids = word_pieces(tokenizer, [question, *titles, *texts])
    cls, sep, n = [tokenizer.cls_token_id], [tokenizer.sep_token_id], len(passages)
    heads = [cls + ids[0] + sep + title + sep for title in ids[1 : 1 + n]]
    return [((head + text)[:length], len(head)) for head, text in zip(heads, ids[1 + n :], strict=True)]


def read_ranking(path, run, corpus, depth, need=()):
    """
    (examples, corpus, note): a question file with its ranking, or DPR's result json, which brings passages.
    An example is {"qid", "question", "answers", "rows"}; rows: where its first `depth` passages are in
    corpus. need: as in read_questions. The note says how deep the ranking is, and warns where not `depth`.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        is_list = file.read(4096).lstrip().startswith("[")
    if is_list:
        if run:
            raise UserError(f"{path}: DPR's result json brings its own ranking; leave out {run}")
        examples, corpus = read_result_json(path, depth, need)
    else:
        if not run or corpus is None:
            raise UserError(f"{path}: a question file needs its ranking (a .run) and the corpus too")
        examples, none = [], np.zeros(0, dtype=np.int64)
        for question in read_questions(path, need=need):
            examples.append({key: question[key] for key in ("qid", "question", "answers")} | {"rows": none})
        by_qid = {example["qid"]: example for example in examples}
        for qid, hits in iter_run(run):
            if qid in by_qid:
                by_qid[qid]["rows"] = np.array([corpus.row(pid) for pid, _ in hits[:depth]])
    without = [example["qid"] for example in examples if not len(example["rows"])]
    if len(without) == len(examples):
        raise UserError(f"{run or path}: has passages for none of the questions of {path}")
    odd = [a for example in examples for a in example["answers"][:1] if PATTERN.search(a)]
    if 20 * len(odd) > len(examples):
        raise UserError(
            f"{path}: {len(odd)} of {len(examples)} questions have a regular expression as answer, such as "
            f"{odd[0]!r} (CuratedTREC?); a reader learns, and is scored on, plain answers only"
        )
    note = f", {len(without)} of them without passages, such as {without[0]}" if without else ""
    depths = [len(example["rows"]) for example in examples if len(example["rows"])]
    note = f"{path}: {len(examples)} questions{note}; passages each: {min(depths)} or more, "
    note += f"median {np.median(depths):g}"
    if short := sum(n < depth for n in depths):
        note += (
            f"\nwarning: {run or path}: {short} questions have passages, but fewer than the {depth} asked for"
        )
    return examples, corpus, note


def read_result_json(path, depth, need=()):
    """
    (examples, corpus) of [{"question", "answers", "ctxs": [{"title", "text"}, ...]}, ...]. why a corpus: the
    result file of NQ holds gigabytes of text; they go to a temporary folder (TMPDIR), which is removed when
    the corpus goes or the process ends. After SIGKILL it stays: reader_passages_*.
    """
    folder, examples, count, blanks = tempfile.TemporaryDirectory(prefix="reader_passages_"), [], 0, 0
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each makes a folder of its own
    need_space(folder.name, os.path.getsize(path) * devices, f"the passages of {path}")
    with atomic_file(Path(folder.name) / "passages.jsonl") as file:
        for index, entry in iter_json_list(path):
            try:
                question, ctxs = entry["question"], entry["ctxs"][:depth]
                texts = [(ctx.get("title") or "", ctx["text"]) for ctx in ctxs]
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: example {index} is not of DPR's retrieval results: {error!r}; its training "
                    "files become question files by `python -m prepare.convert dpr_json`"
                ) from None
            where = f"{path}: example {index}"
            if "answers" in need and "answers" not in entry:
                raise UserError(
                    f"{where}: 'answers' is missing; this step needs it (an empty list is allowed)"
                )
            given = strings(entry.get("answers", []), where)
            if not isinstance(question, str) or not question.strip():
                raise UserError(
                    f"{where}: 'question' must be a string with something in it, got {question!r}"
                )
            for text in (text for pair in texts for text in pair):
                if not isinstance(text, str):
                    raise UserError(f"{where}: title and text of a passage must be strings, got {text!r}")
            answers = [answer for answer in given if not blank(answer)]
            blanks += len(given) - len(answers)
            rows = np.arange(count, count + len(texts))
            examples.append({"qid": str(index), "question": question, "answers": answers, "rows": rows})
            for row, (title, text) in zip(rows.tolist(), texts, strict=True):
                file.write(json.dumps({"_id": str(row), "title": title, "text": text}) + "\n")
            count += len(texts)
    if not count:
        raise UserError(f"{path}: example 0 has no passages in 'ctxs', nor has any of the {len(examples)}")
    if "answers" in need and not any(example["answers"] for example in examples):
        raise UserError(f"{path}: no question has any answers; this step needs some")
    if blanks:
        print(f"warning: {path}: {blanks} blank answers left out", file=sys.stderr)
    corpus = Corpus(Path(folder.name) / "passages.jsonl")
    corpus.folder = folder  # lives as long as it
    return examples, corpus


def read_gold(path):
    """{question: title of its gold page, in lower case} of DPR's nq-*_gold_info.json."""
    try:
        pages = [(entry, entry["title"].lower()) for entry in read_json(path)["data"]]
        return {e[key]: title for e, title in pages for key in ("question", "question_tokens") if key in e}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not DPR's gold passages, {{'data': [...]}}: {error!r}") from None


def find_spans(ids, first, answers):
    """(begin, end) of every mention of an answer, both included: its word pieces in a row, after `first`."""
    return [
        (i, i + len(answer) - 1)
        for answer in answers
        if answer  # trap: an answer of no tokens would be everywhere
        for i in range(first, len(ids) - len(answer) + 1)
        if ids[i] == answer[0] and ids[i : i + len(answer)] == answer
    ]


def training_rows(examples, corpus, tokenizer, gold, length):
    """
    For each example ("kept" or why not, rows of its positives, rows of its negatives, whether those positives
    are of the gold page). A positive holds an answer as word pieces within the first `length` tokens of the
    input; where some are of the gold page, only these count (DPR dpr/data/reader_data.py:220-317). A negative
    holds no answer at all.
    """
    found = []
    for example in examples:
        rows, answers = example["rows"].tolist(), example["answers"]
        passages = [corpus[row] for row in rows]
        holds = [i for i, passage in enumerate(passages) if has_answer(passage.text, answers)]
        inputs = tokenize_rows(tokenizer, example["question"], [passages[i] for i in holds], None)
        pieces = word_pieces(tokenizer, answers) if holds else []
        ends = {
            i: [last for _, last in find_spans(ids, first, pieces)]
            for i, (ids, first) in zip(holds, inputs, strict=True)
        }
        positives = [i for i in holds if ends[i] and min(ends[i]) < length]
        of_gold = [i for i in positives if passages[i].title.lower() == gold.get(example["question"])]
        positives = of_gold or positives[:MAX_POSITIVES]
        limit = min(max(10 * len(positives), NEGATIVES[0]), NEGATIVES[1])
        negatives = [i for i in range(len(rows)) if i not in ends][:limit]
        checks = (
            (rows, "without passages"),
            (answers, "without answers"),
            (holds, "with no answer in any passage"),
            (any(ends.values()), "with no answer as word pieces in a row"),
            (positives, f"with answers only beyond {length} tokens"),
        )
        status = next((why for there, why in checks if not there), "kept")
        chosen = (np.array([rows[i] for i in part], dtype=np.int64) for part in (positives, negatives))
        found.append((status, *chosen, bool(of_gold)))
    return found


def find_training_rows(path, examples, corpus, tokenizer, gold, cfg, world=(0, 1), gather=dict):
    """
    (the examples to learn from, with "positives" and "negatives", a report). cfg.workers: processes that
    search, over all devices; 0: none beside this one. world, gather: as in utils/distributed.py, where
    several devices share the search.
    """
    rank, devices = world
    mine = range(256 * rank, len(examples), 256 * devices)
    parts = [examples[k : k + 256] for k in mine]
    same = ([thing] * len(parts) for thing in (corpus, tokenizer, gold, cfg.reader_tokens))
    spawn = multiprocessing.get_context("spawn")  # why: a fork of a process with threads can hang
    workers = -(-cfg.workers // devices)
    pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers else None
    found = (pool.map if pool else map)(training_rows, parts, *same)
    bar = {"desc": "finding answers", "total": len(parts), "delay": 5, "disable": None}
    found = gather(dict(zip(mine, tqdm(found, **bar), strict=True)))
    if pool:
        pool.shutdown()
    found = [one for _, part in sorted(found.items()) for one in part]
    counts, kept = Counter(status for status, *_ in found), []
    for example, (status, positives, negatives, _) in zip(examples, found, strict=True):
        if status == "kept":
            kept.append(example | {"positives": positives, "negatives": negatives})
    dropped = [f"{n} {status}" for status, n in counts.most_common() if status != "kept"]
    report = f"{path}: {len(kept)} of {len(examples)} questions kept, dropped: {', '.join(dropped) or 'none'}"
    if not kept:
        raise UserError(f"{report}; nothing to learn from")
    bare = sum(not len(example["negatives"]) for example in kept)
    report += f"; {bare} kept without a negative"
    if gold:
        report += f"; {sum(of_gold for *_, of_gold in found)} with positives of the gold page"
    return kept, report
