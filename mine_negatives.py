"""
Make the next training file from a ranking. What RocketQA and ANCE-Tele add to DPR are the modes below.

topk          DPR (Karpukhin et al. 2020, Sec. 3.2): the best passages without an answer
denoise       RocketQA (Qu et al. 2021), steps 2 and 3: negatives that a cross-encoder agrees with
pseudo_label  RocketQA, step 4: questions without answers, labelled by the cross-encoder
teleport      ANCE-Tele (Sun et al. 2022): neighbours of the question, of its positive, and last episode's

In:   a question file, a .run that ranks passages for it, the corpus; by mode scores, lookahead_run, momentum
Out:  a training file: "positives" and "negatives" (passage ids) for train_dpr.py or train_cross_encoder.py
Run:  python mine_negatives.py --config config/mine_negatives.yaml
      python mine_negatives.py --mode teleport --run runs/x/ann.run --lookahead_run runs/x/lookahead.run \
          --out runs/x/train.jsonl    (lookahead.run: test_dpr.py --lookahead true)
Next: train_dpr.py, train_cross_encoder.py
RQ, AT: files of the RocketQA and ANCE-Tele code
"""

import json
import random
import sys
from collections import Counter
from functools import cache, partial
from itertools import islice
from typing import NamedTuple

from tqdm import tqdm

from utils.data import Corpus, aligned_reader, is_itself, iter_lists, iter_run, passage_of, read_questions
from utils.metrics import gold_ids
from utils.plumbing import config
from utils.plumbing.checks import check_ids, check_scores, note_on_own_ids, refuse_strange_answers
from utils.plumbing.config import UserError
from utils.plumbing.files import atomic_file
from utils.text import has_answer, report_regex_failures


class Found(NamedTuple):
    """What the other files say about one question. Passages are corpus ids, best first."""

    ranked: list  # the retriever's ranking
    scores: dict = {}  # id -> the cross-encoder's probability, for the first passages of the ranking
    lookahead: list = []  # the retriever's ranking for the question's positive passage
    momentum: list = []  # the question's negatives in the last episode
    momentum_positives: list = []  # and its positives there
    never: frozenset = frozenset()  # positives that another question file (`exclude`) knows


# ---------------------------------------------------------------- positives and negatives of a question
def holds_answer(passage, question, cfg):
    """Return whether the text of a passage holds an answer; with `match_title` the title counts too."""
    # differs: RocketQA deletes all spaces first, so that "ti" is in "the art is"; here tokens must match
    texts = [passage.title, passage.text] if cfg.match_title else [passage.text]
    return any(has_answer(text, question["answers"], cfg.match == "regex") for text in texts)


def positives_of(question, ranked, corpus, cfg):
    """Return the given positives, or the first of `ranked` with an answer, as cfg.positives says."""
    if cfg.positives == "given" or (cfg.positives == "find" and question["positives"]):
        return list(question["positives"])
    for pid in ranked:
        if holds_answer(corpus.passage(pid), question, cfg):
            return [pid]
    return []


def wrong_for(question, positives, never, corpus, cfg):
    """Return a function id -> bool. It is True for a negative: no positive, and without an answer."""
    # differs: DPR never released its mining code. Here a positive is no negative, even if it holds no answer
    ids = never | {entry for entry in positives if isinstance(entry, str)}

    # why texts too: an inline positive has no id, and a corpus may hold a passage twice
    # why not always: reading costs, and MARCO has neither answers nor inline positives
    inline = any(isinstance(entry, dict) for entry in positives)
    read = bool(question["answers"]) or inline
    texts = {passage_of(entry, corpus).text for entry in positives} if read else set()

    @cache
    def wrong(pid):
        if pid in ids:
            return False
        if not read:
            return True
        passage = corpus.passage(pid)
        return passage.text not in texts and not holds_answer(passage, question, cfg)

    return wrong


def draw_at_random(ids, allowed, count, rng):
    """Return up to `count` different ids of those allowed, drawn uniformly, one by one as in RocketQA."""
    drawn = []
    tried = set()
    while len(drawn) < count and len(tried) < len(ids):
        pid = rng.choice(ids)
        if pid not in tried and allowed(pid):
            drawn.append(pid)
        tried.add(pid)
    return drawn


# ---------------------------------------------------------------- the modes, each: -> (positives, negatives)
def topk(question, found, corpus, cfg, rngs):
    """DPR: the first passages of the ranking without an answer. Some do answer, in words not listed."""
    ranked = found.ranked[: cfg.depth]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)
    return positives, list(islice(filter(wrong, ranked), cfg.negatives))


def denoise(question, found, corpus, cfg, rngs):
    """
    RocketQA. Without scores, for the cross-encoder: a draw from the whole ranking. With its scores, for the
    dual encoder: the first passages under `negative_below`, which leaves out most false negatives.
    """
    ranked = found.ranked[: cfg.depth]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)

    # from: RQ construct_marco_train_ce.py:19-28, construct_nq_train_ce.py:17-31: `negatives` per question
    if not cfg.scores:
        return positives, draw_at_random(ranked, wrong, cfg.negatives, rngs[0])

    # from: RQ construct_marco_train_de.py:13-36: `negatives` per positive
    wanted = cfg.negatives * len(positives)
    scored = (pid for pid in ranked if pid in found.scores)
    sure = (pid for pid in scored if found.scores[pid] < cfg.negative_below and wrong(pid))
    negatives = list(islice(sure, wanted))

    # from: RQ construct_marco_train_de.py:38-42: top up from further down, where nothing was checked
    if cfg.fill:
        unseen = [pid for pid in ranked if pid not in found.scores]
        negatives += draw_at_random(unseen, wrong, wanted - len(negatives), rngs[0])
    return positives, negatives[::-1]  # last first: RocketQA takes them from the end of its list (:46-54)


def pseudo_label(question, found, corpus, cfg, rngs):
    """RocketQA, for questions without answers: the highest score, if above `positive_above`, is positive."""
    scored = [pid for pid in found.ranked[: cfg.depth] if pid in found.scores]
    best = max(scored, key=found.scores.get, default=None)  # the first of equals
    if best is None or found.scores[best] <= cfg.positive_above:
        return [], []
    # differs: RocketQA also skips every id that is a part of the positive's id, "12" next to "5123"
    sure = (pid for pid in scored if found.scores[pid] < cfg.negative_below and pid != best)
    return [best], list(islice(sure, cfg.negatives))


def teleport(question, found, corpus, cfg, rngs):
    """
    ANCE-Tele: the neighbours of the question (ANN) and of its positive (look-ahead), and last episode's
    negatives (momentum). ANN and look-ahead give up to `negatives` each. Momentum is the whole last file:
    with full lists half of all in episode 2, two thirds in episode 3. The paper's weights alpha and beta are
    not in its code.
    """
    positives = positives_of(question, found.ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)

    # from: AT build_train_hn.py:11-35: drop the positives, cut, shuffle, cut
    def sample(ranked, rng):
        pool = list(islice(filter(wrong, ranked), cfg.depth))
        rng.shuffle(pool)
        return pool[: cfg.negatives]

    ann = sample(found.ranked, rngs[0])
    lookahead = sample(found.lookahead, rngs[1])
    if not ann:  # from: AT build_train_em_hn.py:163: a question is left out if all its neighbours answer it
        return positives, []
    # from: AT combine_nq_triviaqa_negative.py:55-70: the positives are joined too; the newest stays first
    # differs: there a positive that all three have stands three times
    more = positives_of(question, found.lookahead, corpus, cfg) if lookahead else []
    for positive in more + found.momentum_positives:
        if positive not in positives:
            positives.append(positive)
    # differs: on MARCO ANCE-Tele has momentum first; on NQ as here
    return positives, ann + lookahead + found.momentum


MODES = {"topk": topk, "denoise": denoise, "pseudo_label": pseudo_label, "teleport": teleport}


# ---------------------------------------------------------------- reading, question by question
def read_found(questions, cfg, counts):
    """Yield (question, Found): in the order of the run, then the questions that the run does not rank."""
    others = read_questions(cfg.exclude) if cfg.exclude else []
    never = {question["qid"]: frozenset(gold_ids(question)) for question in others}

    # differs: the originals keep all rankings in memory; here all files must be in one order
    def beside_the_run(path, read):
        items = read(path) if path else iter(())
        return aligned_reader(path, items, cfg.run)

    take_scores, end_scores = beside_the_run(cfg.scores, iter_run)
    take_lookahead, end_lookahead = beside_the_run(cfg.lookahead_run, iter_run)
    take_momentum, end_momentum = beside_the_run(cfg.momentum, iter_lists)

    waiting = {question["qid"]: question for question in questions}
    for qid, hits in iter_run(cfg.run):
        scores = take_scores(qid) or []
        neighbours = [pid for pid, _ in take_lookahead(qid) or []]
        momentum, momentum_positives = take_momentum(qid) or ([], [])
        question = waiting.pop(qid, None)
        if question is None:
            counts["rankings of other questions, ignored"] += 1
            continue
        ranked = [pid for pid, _ in hits]
        counts["questions that find their own id first"] += is_itself(question, ranked[0])
        if cfg.scores:
            check_scores(qid, scores, set(ranked), cfg)
        if cfg.ignore_identical_ids and qid not in question["positives"]:  # so it is the question itself
            ranked = [pid for pid in ranked if pid != qid]
            neighbours = [pid for pid in neighbours if pid != qid]
        excluded = never.get(qid, frozenset())
        yield question, Found(ranked, dict(scores), neighbours, momentum, momentum_positives, excluded)
    for question in waiting.values():
        yield question, Found([])
    share = note_on_own_ids(counts["questions that find their own id first"], len(questions))
    if share and not cfg.ignore_identical_ids:
        raise UserError(f"{cfg.run}: {share}, it is the question itself; add --ignore_identical_ids true")
    if len(waiting) == len(questions):
        raise UserError(f"{cfg.run}: has none of the questions of {cfg.questions}")
    end_scores()
    end_lookahead()
    end_momentum()


# ---------------------------------------------------------------- choosing
def mine(questions, corpus, cfg, counts):
    """Yield the lines of the training file, and count in `counts` what became of the questions."""
    # rngs[0] draws from the ranking, rngs[1] from the look-ahead, so that neither changes the other's draws
    # differs: RocketQA's draw on NQ and ANCE-Tele's have no seed
    rngs = [random.Random(cfg.seed), random.Random(cfg.seed)]
    rankings = " or ".join(str(path) for path in (cfg.run, cfg.lookahead_run, cfg.momentum) if path)
    for question, found in read_found(questions, cfg, counts):
        try:
            positives, negatives = MODES[cfg.mode](question, found, corpus, cfg, rngs)
            # an id that the corpus lacks must not get into the file; main() has looked up the given positives
            for entry in positives + negatives:
                if isinstance(entry, str) and entry not in question["positives"]:
                    corpus.row(entry)
        except UserError as error:
            raise UserError(f"{rankings}: question {question['qid']!r}: {error}") from None
        counts["questions without a ranking"] += not found.ranked
        counts["questions without look-ahead"] += bool(cfg.lookahead_run) and not found.lookahead
        counts["questions without momentum"] += bool(cfg.momentum) and not found.momentum
        counts["positives found"] += bool(positives) and positives != question["positives"]

        # drop a question from which nothing can be learned
        if not positives and not cfg.keep_without_positives:
            counts["questions dropped, no positive"] += 1
            continue
        if not negatives and (cfg.scores or cfg.mode == "teleport"):
            counts["questions dropped, no negative"] += 1
            continue

        count_negatives(found, positives, negatives, cfg, counts)
        question.pop("grades", None)  # why: they grade the positives of before
        yield from training_lines(question | {"positives": positives, "negatives": negatives}, cfg)


def count_negatives(found, positives, negatives, cfg, counts):
    """Count the negatives of a question that is kept, and whether fewer are new than were asked for."""
    lists = 1 + bool(cfg.lookahead_run)
    if cfg.mode == "denoise" and cfg.scores:
        lists = len(positives)
    new = len(negatives) - len(found.momentum)
    counts["questions with fewer new ones than asked"] += 0 < new < lists * cfg.negatives
    counts["questions without a negative"] += not negatives
    counts["negatives"] += len(negatives)


def training_lines(example, cfg):
    """Yield the lines of a question: one, or with scores one for each pair of a positive and a negative."""
    if not cfg.scores:
        yield example
        return
    # why pairs: RocketQA counts its epochs so. The positives take turns: the first of a list is trained on
    positives = example["positives"]
    for i, negative in enumerate(example["negatives"]):
        first = positives[i % len(positives)]
        others = [positive for positive in positives if positive != first]  # listed so that they are masked
        yield example | {"positives": [first, *others], "negatives": [negative]}


# ---------------------------------------------------------------- main
def check_settings(cfg):
    """UserError for every mistake that can be seen without reading a file."""
    config.must_be_one_of(cfg, mode=tuple(MODES), match=("string", "regex"))
    config.must_be_one_of(cfg, positives=("given", "find", "ranking"))
    config.need_file(cfg, "questions", "run", "corpus")
    config.need_file(cfg, optional=("scores", "lookahead_run", "momentum", "exclude"))
    config.need_out(cfg, "out")
    config.at_least(cfg, 1, "negatives")
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


def main():
    cfg = config.load_config(__doc__, "config/mine_negatives.yaml")
    check_settings(cfg)
    match = "" if cfg.mode == "pseudo_label" else cfg.match
    questions = read_questions(cfg.questions, match=match)
    corpus = Corpus(cfg.corpus, cfg.corpus_format)
    check_ids(cfg.questions, questions, corpus, "positives")
    bare = sum(not question["answers"] for question in questions)
    if bare and match:  # MARCO: what is not judged is negative
        print(f"warning: {bare} questions have no answers: any passage may be a negative", file=sys.stderr)
    if match:
        refuse_strange_answers(cfg.questions, questions, corpus, partial(holds_answer, cfg=cfg))

    # mine and write, line by line
    counts = Counter()
    often = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines in a log file
    with atomic_file(cfg.out) as file:
        lines = mine(questions, corpus, cfg, counts)
        for line in tqdm(lines, cfg.mode, delay=5, mininterval=often, unit=" lines"):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            counts["lines written"] += 1
        if not counts["lines written"]:
            cure = "without positives, add --positives find; with it, a ranked passage must hold an answer"
            if cfg.scores:  # a cross-encoder that has not learned much is never sure
                cure = "look at the scores: do negative_below and positive_above lie among them?"
            raise UserError(f"{cfg.out}: no question is left ({dict(+counts)}); {cure}")

    report_regex_failures()
    print(f"{cfg.out}: " + ", ".join(f"{n:,} {event}" for event, n in sorted(counts.items()) if n))


if __name__ == "__main__":
    with config.friendly_errors():
        main()
