"""
Mine hard negatives: passages that a retriever ranks high and that do not answer the question (DPR, Sec. 3.2).

In:  a question file, a .run that ranks passages for it, the corpus
Out: the question file again, with "negatives" (passage ids, best first), for train_dpr.py
Run: python mine_negatives.py --config config/mine_negatives.yaml
Differs from DPR, whose miner was never released: (1) a positive is never its own negative, even when it holds
no answer string; (2) a question without any negative is kept (training then uses the batch) and counted.

A mode is one function, (question, hits, corpus, cfg) -> (positives, negatives); hits: [(pid, score), ...].
"""

import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from utils.config import UserError, choose, friendly_errors, load_config, need_file
from utils.data import Corpus, iter_run, passage_of, read_questions
from utils.files import atomic_file
from utils.text import has_answer, report_regex_failures


def topk(question, hits, corpus, cfg):
    """
    DPR's negatives: the first passages of the ranking without an answer in their text.

    Where the question has no positive and `find_positives` is set, the first passage with an answer becomes
    one (DPR's way for TriviaQA, WebQuestions and CuratedTREC, which name no gold passage; Sec. 4.2).
    """
    positives, negatives = list(question["positives"]), []
    own = {
        passage_of(p, corpus).text for p in positives
    }  # why the text: a positive may be inline, without id
    for pid, _ in hits:
        if len(negatives) == cfg.negatives and (positives or not cfg.find_positives):
            break
        text = corpus[corpus.row(pid)].text
        if text in own:
            continue
        if has_answer(text, question["answers"], cfg.match == "regex"):
            if cfg.find_positives and not positives:
                positives.append(pid)
        elif len(negatives) < cfg.negatives:
            negatives.append(pid)
    return positives, negatives


def mine(mode, questions, corpus, cfg, counts):
    """The examples of the training file, in the order of the run; `counts` says what became of the rest."""
    left = {q["qid"]: q for q in questions}
    for qid, hits in chain(iter_run(cfg.run), ((qid, []) for qid in list(left))):
        question = left.pop(qid, None)
        if question is None:  # of another file; or, in the second part, done before
            counts["rankings of other questions, ignored"] += bool(hits)
            continue
        counts["questions without a ranking"] += not hits
        positives, negatives = mode(question, hits[: cfg.depth], corpus, cfg)
        counts["positives found"] += len(positives) - len(question["positives"])
        if not positives and not cfg.keep_without_positives:
            counts["questions dropped, no positive"] += 1
            continue
        counts["questions without a negative"] += not negatives
        counts["questions with fewer than asked"] += 0 < len(negatives) < cfg.negatives
        counts["negatives"] += len(negatives)
        yield question | {"positives": positives, "negatives": negatives}


def main():
    cfg = load_config(__doc__, "config/mine_negatives.yaml")
    choose(cfg, mode=("topk",), match=("string", "regex"))
    need_file(cfg, "questions", "run", "corpus")
    if cfg.negatives < 1 or cfg.depth < cfg.negatives:
        raise UserError(f"negatives ({cfg.negatives}) must be at least 1 and at most depth ({cfg.depth})")
    if Path(cfg.out).resolve() in {Path(p).resolve() for p in (cfg.questions, cfg.run, cfg.corpus)}:
        raise UserError(f"out: {cfg.out} is an input too; name another file")
    questions, corpus = read_questions(cfg.questions), Corpus(cfg.corpus, cfg.corpus_format)
    unanswered = sum(not q["answers"] for q in questions)
    if unanswered:  # MS MARCO has none: there, whatever is not judged relevant counts as negative
        print(
            f"warning: {unanswered} questions have no answers: any passage may be their negative",
            file=sys.stderr,
        )
    counts = Counter()
    with atomic_file(cfg.out) as file:
        examples = mine({"topk": topk}[cfg.mode], questions, corpus, cfg, counts)
        for example in tqdm(examples, cfg.mode, total=len(questions), delay=5, disable=None):
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
            counts["questions written"] += 1
        if not counts["questions written"]:
            raise UserError(
                f"{cfg.out}: no question is left ({dict(counts)}); without positives, add --find_positives"
            )
    report_regex_failures()
    print(f"{cfg.out}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n))


if __name__ == "__main__":
    with friendly_errors():
        main()
