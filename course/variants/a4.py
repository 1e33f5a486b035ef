"""
One worked variant of each function of assignment 4 (variants/a1.py says what these are).
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def wrong_for(question, positives, never, corpus, cfg):
    """
    Return a function id -> bool. It is True for a passage that holds an answer, although its id is not among
    the positives: a candidate for a new positive. Copies of a positive's text are candidates too. Without
    answers it is True for the ids of `never` alone.
    """
    ids = {entry for entry in positives if isinstance(entry, str)}

    def candidate(pid):
        if not question["answers"]:
            return pid in never
        return pid not in ids and holds_answer(corpus.passage(pid), question, cfg)

    return candidate


def topk(question, found, corpus, cfg, rngs):
    """
    The last passages of the first `depth` without an answer, the deepest first. Where the question has no
    positives, the last passage with an answer is its positive.
    """
    ranked = found.ranked[: cfg.depth][::-1]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)
    return positives, list(islice(filter(wrong, ranked), cfg.negatives))


def draw_at_random(ids, allowed, count, rng):
    """Return `count` ids that are allowed, drawn uniformly with replacement; none where none is allowed."""
    pool = [pid for pid in ids if allowed(pid)]
    return [rng.choice(pool) for _ in range(count)] if pool else []


def denoise(question, found, corpus, cfg, rngs):
    """
    Without scores: the first `negatives` of the ranking. With scores: the first `negatives` for the question
    whose score is above `negative_below`, which the teacher finds hard, in the order of the ranking.
    """
    ranked = found.ranked[: cfg.depth]
    positives = positives_of(question, ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)
    if cfg.scores:
        ranked = [pid for pid in ranked if found.scores.get(pid, 0.0) > cfg.negative_below]
    return positives, list(islice(filter(wrong, ranked), cfg.negatives))


def pseudo_label(question, found, corpus, cfg, rngs):
    """
    RocketQA, for questions without answers: the cross-encoder's favourite, the last of equals, is positive if
    its score is at least `positive_above`. Negatives: those below `negative_below`, the highest score first.
    """
    scored = [pid for pid in found.ranked[: cfg.depth] if pid in found.scores]
    best = max(reversed(scored), key=found.scores.get, default=None)
    if best is None or found.scores[best] < cfg.positive_above:
        return [], []
    sure = [pid for pid in scored if found.scores[pid] < cfg.negative_below and pid != best]
    sure.sort(key=lambda pid: -found.scores[pid])
    return [best], sure[: cfg.negatives]


def teleport(question, found, corpus, cfg, rngs):
    """
    ANCE-Tele as on MS MARCO: last episode's negatives (momentum) first, then the look-ahead's, then the
    neighbours of the question, each passage once, the first place of it.
    """
    positives = positives_of(question, found.ranked, corpus, cfg)
    wrong = wrong_for(question, positives, found.never, corpus, cfg)

    def sample(ranked, rng):
        pool = list(islice(filter(wrong, ranked), cfg.depth))
        rng.shuffle(pool)
        return pool[: cfg.negatives]

    ann, lookahead = sample(found.ranked, rngs[0]), sample(found.lookahead, rngs[1])
    if not ann:
        return positives, []
    positives = list(dict.fromkeys(positives + found.momentum_positives))
    return positives, list(dict.fromkeys(found.momentum + lookahead + ann))


def rotating_negatives(pool, k, seed, epoch):
    """
    Return the indexes of k of `pool` negatives in the order of the file: each epoch reads on where the last
    one stopped. A pool of fewer than k is repeated until there are k.
    """
    if not pool:
        return []
    return [(epoch * k + j) % pool for j in range(k)]
