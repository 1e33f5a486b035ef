"""
Other right answers to the functions of assignment 4 (negatives): each must keep all points.
"""
# ruff: noqa: B905, F811, F821  (a function may stand twice; the names are those of the file it is put into)


def wrong_for(question, positives, never, corpus, cfg):
    """Every passage is read."""
    names = [p for p in positives if not isinstance(p, dict)]
    texts = [passage_of(p, corpus).text for p in positives]
    exact = question["answers"] or len(names) < len(positives)

    def is_negative(pid):
        passage = corpus.passage(pid)
        if pid in names or pid in never or (exact and passage.text in texts):
            return False
        return not holds_answer(passage, question, cfg)

    return is_negative


def topk(question, found, corpus, cfg, rngs):
    """With a loop."""
    candidates = found.ranked[: cfg.depth]
    positives = positives_of(question, candidates, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    negatives = []
    for pid in candidates:
        if len(negatives) < cfg.negatives and is_wrong(pid):
            negatives.append(pid)
    return positives, negatives


def draw_at_random(ids, allowed, count, rng):
    """A shuffle."""
    pool = [pid for pid in ids if allowed(pid)]
    rng.shuffle(pool)
    return pool[:count]


def denoise(question, found, corpus, cfg, rngs):
    """With lists."""
    candidates = found.ranked[: cfg.depth]
    positives = positives_of(question, candidates, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    if not cfg.scores:
        good = [pid for pid in candidates if is_wrong(pid)]
        return positives, rngs[0].sample(good, min(cfg.negatives, len(good)))
    most = cfg.negatives * len(positives)
    negatives = []
    for pid in candidates:
        score = found.scores.get(pid, 1.0)
        if score < cfg.negative_below and is_wrong(pid) and len(negatives) < most:
            negatives.append(pid)
    if cfg.fill:
        rest = [pid for pid in candidates if pid not in found.scores and is_wrong(pid)]
        negatives += rngs[0].sample(rest, min(len(rest), most - len(negatives)))
    negatives.reverse()
    return positives, negatives


def pseudo_label(question, found, corpus, cfg, rngs):
    """Sorted by score."""
    candidates = [pid for pid in found.ranked[: cfg.depth] if pid in found.scores]
    by_score = sorted(candidates, key=lambda pid: -found.scores[pid])
    if not by_score or not found.scores[by_score[0]] > cfg.positive_above:
        return [], []
    rest = [p for p in candidates if p != by_score[0] and found.scores[p] < cfg.negative_below]
    return by_score[:1], rest[: cfg.negatives]


def teleport(question, found, corpus, cfg, rngs):
    """With random.sample."""
    positives = positives_of(question, found.ranked, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    parts = []
    for ranking, rng in zip((found.ranked, found.lookahead), rngs):
        pool = [pid for pid in ranking if is_wrong(pid)][: cfg.depth]
        parts.append(rng.sample(pool, min(len(pool), cfg.negatives)))
    if not parts[0]:
        return positives, []
    more = positives_of(question, found.lookahead, corpus, cfg) if parts[1] else []
    known = list(dict.fromkeys([*positives, *more, *found.momentum_positives]))
    return known, [*parts[0], *parts[1], *found.momentum]


def rotating_negatives(pool, k, seed, epoch):
    """With numpy."""
    if not pool:
        return []
    order = np.random.default_rng([seed, 5]).permutation(pool)
    places = (epoch * k + np.arange(min(k, pool))) % pool
    return [int(i) for i in order[places]]
