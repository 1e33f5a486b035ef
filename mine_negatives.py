"""
Make the next training file from a ranking. RocketQA and ANCE-Tele train DPR's dual encoder again and again
from the same starting weights; what they add to it is in the four functions below, and nothing else.

topk          DPR (Karpukhin et al. 2020, Sec. 3.2): the best passages without the answer
denoise       RocketQA (Qu et al. 2021), steps 2 and 3: negatives that a cross-encoder agrees with
pseudo_label  RocketQA, step 4: questions without answers, labelled by the cross-encoder
teleport      ANCE-Tele (Sun et al. 2022): neighbours of the question, of its positive, and last episode's

In:  a question file, a .run that ranks passages for it, the corpus; scores, lookahead_run, momentum by mode
Out: a training file: "positives" and "negatives" (passage ids) for train_dpr.py or train_cross_encoder.py
Run: python mine_negatives.py --config config/mine_negatives.yaml
     python mine_negatives.py --mode teleport --run runs/x/ann.run --lookahead_run runs/x/lookahead.run
Next: train_dpr.py, train_cross_encoder.py

Differs: (1) DPR's miner was never released: a positive is never its own negative, even when it holds no
answer. (2) The originals keep all rankings in memory; here one question's, so all files are in the order of
--run. (3) An answer is found by DPR's tokens; RocketQA deletes all spaces, so that "ti" is in "the art is".
(4) RocketQA's file for unlabelled questions skips ids that are part of the positive's id ("12" beside
"5123"); its NQ draw and all of ANCE-Tele's are unseeded. (5) Momentum comes last in the list, as ANCE-Tele
has it on NQ (first on MARCO), positives are not repeated, and a question that momentum lacks is kept. Else
the files are theirs (tests/test_mine_negatives.py).
"""

import json
import random
import sys
from collections import Counter
from functools import cache
from itertools import chain, islice
from typing import NamedTuple

from tqdm import tqdm

from utils.data import Corpus, aligned_reader, check_passage, iter_jsonl, iter_run, passage_of, read_questions
from utils.plumbing.config import (
    UserError,
    at_least,
    friendly_errors,
    load_config,
    must_be_one_of,
    need_file,
    need_out,
)
from utils.plumbing.files import atomic_file
from utils.text import has_answer, report_regex_failures


class Found(NamedTuple):
    """What the files beside the question file know of one question; passages are corpus ids, best first."""

    ranked: list  # the retriever's ranking, cut to `depth` where a mode says so
    scores: dict = {}  # id -> the cross-encoder's probability, for the first passages of the ranking
    lookahead: list = []  # the ranking for its positive passage
    momentum: list = []  # its negatives of the last episode
    never: frozenset = frozenset()  # known positives beside the question's own


# ------------------------------------------------------------------------------------------ the two questions
def holds_answer(passage, question, cfg):
    """
    Does the passage answer it? The text decides; the title too where `match_title` is set (RocketQA on NQ).
    """
    titled = cfg.match_title and has_answer(passage.title, question["answers"], cfg.match == "regex")
    return titled or has_answer(passage.text, question["answers"], cfg.match == "regex")


def positives_of(question, ranked, corpus, cfg):
    """
    The positives: those given, or (`find`, where none is given; `ranking`, always) the first with an answer.
    """
    if cfg.positives == "given" or (cfg.positives == "find" and question["positives"]):
        return list(question["positives"])
    hits = (pid for pid in ranked if holds_answer(corpus[corpus.row(pid)], question, cfg))
    return list(islice(hits, 1))


def wrong_for(question, positives, never, corpus, cfg):
    """
    A function id -> bool: True for what every method calls a negative, no positive and without an answer.
    """
    ids = never | {p for p in positives if isinstance(p, str)}
    # why: an inline positive has no id, a corpus may hold a passage twice; MARCO has no answers to look for
    read = bool(question["answers"]) or any(isinstance(p, dict) for p in positives)
    texts = {passage_of(p, corpus).text for p in positives} if read else set()

    @cache
    def wrong(pid):
        if pid in ids or not read:
            return pid not in ids
        passage = corpus[corpus.row(pid)]
        return passage.text not in texts and not holds_answer(passage, question, cfg)

    return wrong


def draw_at_random(ids, allowed, count, rng):
    """
    Up to `count` different ids, drawn uniformly; one that is not allowed is drawn anew (as in RocketQA).
    """
    drawn, tried = [], set()
    while len(drawn) < count and len(tried) < len(ids):
        pid = rng.choice(ids)
        if pid not in tried and allowed(pid):
            drawn.append(pid)
        tried.add(pid)
    return drawn


# ------------------------------------------------ the modes: (question, Found, ...) -> (positives, negatives)
def topk(question, found, corpus, cfg, rngs):
    """DPR: the first passages of the ranking that hold no answer. Some give it in other words: false ones."""
    ranked = found.ranked[: cfg.depth]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)
    return positives, list(islice(filter(wrong, ranked), cfg.negatives))


def denoise(question, found, corpus, cfg, rngs):
    """
    RocketQA. Without scores, what the cross-encoder learns from: negatives drawn from the whole ranking, most
    of them truly wrong. With scores, what the dual encoder learns from: the best-ranked passages to which the
    cross-encoder gives less than `negative_below`; it knows most of the false negatives that the rank brings
    up. `negatives` are meant per positive; `fill` tops up with a draw from below the scored ones, which no
    one checked.
    """
    ranked = found.ranked[: cfg.depth]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)
    if not cfg.scores:
        # from: RQ construct_marco_train_ce.py:19-28, construct_nq_train_ce.py:17-31: so many per question
        return positives, draw_at_random(ranked, wrong, cfg.negatives, rngs[0])
    wanted = cfg.negatives * len(positives)
    scored = (pid for pid in ranked if pid in found.scores)
    sure = (pid for pid in scored if found.scores[pid] < cfg.negative_below and wrong(pid))
    negatives = list(islice(sure, wanted))
    if cfg.fill:  # from: RQ construct_marco_train_de.py:38-42
        unseen = [pid for pid in ranked if pid not in found.scores]
        negatives += draw_at_random(unseen, wrong, wanted - len(negatives), rngs[0])
    return positives, negatives[::-1]  # from: :46-54 hands them out from the end


def pseudo_label(question, found, corpus, cfg, rngs):
    """
    RocketQA: the cross-encoder's favourite is the positive if it is sure enough (`positive_above`), the first
    passages below `negative_below` are the negatives; a question of which it is not sure is dropped.
    """
    scored = [pid for pid in found.ranked[: cfg.depth] if pid in found.scores]
    best = max(scored, key=found.scores.get, default=None)  # the first of equals
    if best is None or found.scores[best] <= cfg.positive_above:
        return [], []
    sure = (pid for pid in scored if found.scores[pid] < cfg.negative_below and pid != best)
    return [best], list(islice(sure, cfg.negatives))


def teleport(question, found, corpus, cfg, rngs):
    """
    ANCE-Tele: `negatives` out of the nearest `depth` of the question (ANN), as many out of those of its
    positive (look-ahead: where the question will be, once it is learnt), and the last episode's file
    (momentum: what was learnt shall not be forgotten). Lists are joined, nothing is weighted or made unique:
    equal lengths are the paper's alpha = beta = 0.5, and what several sources bring counts more often.
    """
    positives = positives_of(question, found.ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)

    def sample(ranked, rng):  # from: AT build_train_hn.py:11-35: drop the positives, cut, shuffle, cut
        pool = list(islice(filter(wrong, ranked), cfg.depth))
        rng.shuffle(pool)
        return pool[: cfg.negatives]

    ann, lookahead = sample(found.ranked, rngs[0]), sample(found.lookahead, rngs[1])
    # from: AT build_train_em_hn.py:163: where all neighbours answer the question it is left out
    return positives, ann + lookahead + found.momentum if ann else []


MODES = {"topk": topk, "denoise": denoise, "pseudo_label": pseudo_label, "teleport": teleport}


# ---------------------------------------------------------------------------------- one question at a time
def iter_negatives(path):
    """(qid, negatives) of every line of a training file."""
    for number, example in iter_jsonl(path):
        negatives = example.get("negatives")
        if not isinstance(negatives, list) or not all(map(check_passage, negatives)):
            raise UserError(f"{path}:{number}: 'negatives' must be a list of passages; not a training file")
        yield example.get("qid"), negatives


def check_scores(qid, scores, ranked, cfg):
    """UserError unless `scores` are probabilities of passages of this ranking."""
    if scores is None:
        raise UserError(f"{cfg.scores}: question {qid!r} is missing; rescore {cfg.run} again (rerank.py)")
    for pid, p in scores:
        if pid not in ranked:
            raise UserError(f"{cfg.scores}: passage {pid!r} of question {qid!r} is not in {cfg.run}")
        if not 0 <= p <= 1:
            raise UserError(f"{cfg.scores}: question {qid!r}: {p} is no probability; rerank.py gives some")


def mine(questions, corpus, cfg, counts):
    """The examples of the training file, in the order of the run; `counts` says what became of the rest."""
    left, never = {q["qid"]: q for q in questions}, {}
    if cfg.exclude:
        for q in read_questions(cfg.exclude):
            never[q["qid"]] = frozenset(p for p in q["positives"] if isinstance(p, str))
    files = ((cfg.scores, iter_run), (cfg.lookahead_run, iter_run), (cfg.momentum, iter_negatives))
    files = [aligned_reader(path, read(path) if path else iter(()), cfg.run) for path, read in files]
    rngs = [random.Random(cfg.seed) for _ in range(2)]  # why two: the originals mine file by file
    for qid, hits in chain(iter_run(cfg.run), ((qid, []) for qid in list(left))):
        scores, lookahead, last = (take(qid) if hits else None for take, _ in files)
        question, ranked = left.pop(qid, None), [pid for pid, _ in hits]
        if question is None:  # of another file; or, in the second part, done before
            counts["rankings of other questions, ignored"] += bool(hits)
            continue
        counts["questions without a ranking"] += not hits
        counts["questions without look-ahead"] += bool(cfg.lookahead_run) and not lookahead
        counts["questions without momentum"] += bool(cfg.momentum) and not last
        if cfg.scores and hits:
            check_scores(qid, scores, set(ranked), cfg)
        ahead = [pid for pid, _ in lookahead or []]
        found = Found(ranked, dict(scores or []), ahead, last or [], never.get(qid, frozenset()))
        positives, negatives = MODES[cfg.mode](question, found, corpus, cfg, rngs)
        counts["positives found"] += bool(positives) and positives != question["positives"]
        if not positives and not cfg.keep_without_positives:
            counts["questions dropped, no positive"] += 1
        elif not negatives and (cfg.scores or cfg.mode == "teleport"):
            counts["questions dropped, no negative"] += 1
        else:
            for pid in chain(positives, negatives):
                if isinstance(pid, str):
                    corpus.row(pid)  # UserError for a ranking of another corpus
            lists = len(positives) if cfg.mode == "denoise" and cfg.scores else 1 + bool(cfg.lookahead_run)
            counts["questions without a negative"] += not negatives
            new = len(negatives) - len(found.momentum)
            counts["questions with fewer new ones than asked"] += 0 < new < lists * cfg.negatives
            counts["negatives"] += len(negatives)
            yield from examples(question | {"positives": positives, "negatives": negatives}, cfg)
    if counts["questions without a ranking"] == len(questions):
        raise UserError(f"{cfg.run}: has none of the questions of {cfg.questions}")
    for _, check in files:
        check()


def examples(example, cfg):
    """
    The lines of a question: one; or, as RocketQA counts its epochs, one for each pair of a positive (first of
    its list) and a negative, the positives taking turns.
    """
    if not cfg.scores:
        return [example]
    positives, lines = example["positives"], []
    for i, negative in enumerate(example["negatives"]):
        first = positives[i % len(positives)]
        others = [p for p in positives if p != first]  # so that the trainer masks them
        lines.append(example | {"positives": [first, *others], "negatives": [negative]})
    return lines


def main():
    cfg = load_config(__doc__, "config/mine_negatives.yaml")
    must_be_one_of(cfg, mode=tuple(MODES), match=("string", "regex"), positives=("given", "find", "ranking"))
    inputs, others = ("questions", "run", "corpus"), ("scores", "lookahead_run", "momentum", "exclude")
    need_file(cfg, *inputs, optional=others)
    need_out(cfg, "out", *inputs, *others)
    at_least(cfg, 1, "negatives")
    if cfg.depth < cfg.negatives:
        raise UserError(f"negatives ({cfg.negatives}) must be at most depth ({cfg.depth})")
    if cfg.mode == "pseudo_label" and not cfg.scores:
        raise UserError("mode pseudo_label labels by the cross-encoder: give --scores, a .run of rerank.py")
    if cfg.fill and not cfg.scores:
        raise UserError("fill tops up what the scores leave: give --scores too")
    for key, modes in {
        "scores": ("denoise", "pseudo_label"), "fill": ("denoise",), "lookahead_run": ("teleport",),
        "momentum": ("teleport",), "exclude": ("topk", "denoise", "teleport"),
    }.items():  # fmt: skip
        if getattr(cfg, key) and cfg.mode not in modes:
            raise UserError(f"{key} is for mode {' or '.join(modes)}, not {cfg.mode}: it would be ignored")
    questions, corpus = read_questions(cfg.questions), Corpus(cfg.corpus, cfg.corpus_format)
    unanswered = sum(not q["answers"] for q in questions)
    if unanswered and cfg.mode != "pseudo_label":  # MARCO: what is not judged is negative
        print(
            f"warning: {unanswered} questions have no answers: any passage may be their negative",
            file=sys.stderr,
        )
    counts = Counter()
    with atomic_file(cfg.out) as file:
        often = 0.1 if sys.stderr.isatty() else 30
        lines = tqdm(
            mine(questions, corpus, cfg, counts), cfg.mode, delay=5, mininterval=often, unit=" lines"
        )
        for example in lines:
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
            counts["lines written"] += 1
        if not counts["lines written"]:
            cure = "without positives, add --positives find"
            if cfg.scores:  # a cross-encoder that has not learned much is never sure
                cure = "look at the scores: do negative_below and positive_above lie among them?"
            raise UserError(f"{cfg.out}: no question is left ({dict(counts)}); {cure}")
    report_regex_failures()
    print(f"{cfg.out}: " + ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()) if n))


if __name__ == "__main__":
    with friendly_errors():
        main()
