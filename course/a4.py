"""
Assignment 4, where negatives come from: the points, and the drivers (a1.py says what these are).
"""

import random
from types import SimpleNamespace

from child import tasks, times

SHIP = ["mine_negatives.py", "train_dpr.py", "test_dpr.py", "doc2embedding.py", "utils/bm25.py"]
DROP = []
SHOWN = ["holds_answer(passage, question, cfg)", "positives_of(question, ranked, corpus, cfg)"]
TASKS = tasks("""
mine_negatives.py:wrong_for
   4 wrong_ids        no positive of the question is a negative, nor one that another file knows
   4 wrong_texts      nor a passage with the very text of a positive | the corpus may hold it twice
   4 wrong_answers    nor a passage with an answer | holds_answer
mine_negatives.py:topk
   4 topk_first       the first `negatives` passages that are wrong | the docstring
   2 topk_depth       among the first `depth` of the ranking | config/mine_negatives.yaml
   1 topk_positives   the positives as cfg.positives says | positives_of
mine_negatives.py:draw_at_random
   2 draw_different   `count` different ids that are allowed | the docstring
   1 draw_ends        fewer where there are fewer | the docstring
   2 draw_fair        each as likely as the others | the docstring: uniformly
mine_negatives.py:denoise
   3 denoise_draw     without scores: a draw from the whole ranking | the docstring
   4 denoise_gate     with scores: below `negative_below`, which is excluded | the docstring
   3 denoise_wrong    a passage with an answer is no negative, whatever its score | wrong_for
   2 denoise_count    `negatives` for each positive | config/mine_negatives.yaml
   1 denoise_order    handed out from the end
   2 denoise_fill     fill: topped up with passages that have no score | config/mine_negatives.yaml
mine_negatives.py:pseudo_label
   4 pseudo_best      the positive is the passage of the highest score, the first of equals
   3 pseudo_sure      only if its score is above `positive_above` | config/mine_negatives.yaml
   2 pseudo_negatives the first ones below `negative_below`, without the positive
mine_negatives.py:teleport
   5 tele_sources     neighbours, then look-ahead, then momentum, nothing made unique | the docstring
   3 tele_draws       `negatives` of the first `depth` that are wrong; rngs[0], rngs[1] | mine
   2 tele_positives   the positives of all three, each once, the newest first
   2 tele_dropped     no negatives where no neighbour is wrong | mine
train_dpr.py:rotating_negatives
   3 rotate_all       every negative once before any comes back, in an order by the seed
   2 rotate_small     a pool of fewer than k is taken once | the docstring: differs
together
   5 mined            all your functions: the training lines of three modes
""")

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "topk": "A ranking has 10 passages. Those at rank {a} and {b} hold an answer. How deep must one read for "
    "{n} negatives?",
    "denoise": "A cross-encoder gives these passages the scores 0.95, 0.85, ... 0.05 from rank 1 to 10. How "
    "many of the others does denoise take with negative_below {t}, if many are asked for?",
    "pseudo": "Ten questions have the best scores 0.95, 0.85, ... 0.05. How many does pseudo_label label "
    "with positive_above {t}?",
    "epochs": "A question has {pool} negatives, and {k} are taken each epoch in turn. In which epoch, "
    "counted from 1, does the first one come back?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    a, b = sorted((rng.permutation(5)[:2] + 1).tolist())
    found = {"a": a, "b": b, "n": int(rng.integers(4, 8)), "t": float(rng.choice([0.3, 0.5, 0.7]))}
    return found | {"pool": int(rng.integers(20, 60)), "k": int(rng.integers(3, 8))}


# ---------------------------------------------------------------- a corpus of 40 passages
def world(rng, positives=(0,), holding=(3, 8, 11), answers=("amber",)):
    """Return (question, corpus, ids in the order of a ranking); "amber" stands at the places `holding`."""
    from utils.data import Passage

    ids = [f"p{number}" for number in rng.permutation(40)]
    passages = {}
    for place, pid in enumerate(ids):
        colour = "amber" if place in holding else "grey"
        passages[pid] = Passage(pid, "title", f"passage {pid} is about {colour} stones")
    question = {"qid": "q", "question": "which stones", "answers": [*answers], "negatives": []}
    question["positives"] = [ids[place] for place in positives]
    return question, SimpleNamespace(passage=passages.__getitem__, passages=passages), ids


def settings(**changes):
    keys = {"negatives": 5, "depth": 30, "positives": "given", "match": "string", "match_title": False}
    keys |= {"scores": "", "negative_below": 0.3, "positive_above": 0.9, "fill": False}
    return SimpleNamespace(**keys | changes)


def mine(mode, question, corpus, ids, more=(), rngs=None, **changes):
    """Return (positives, negatives) of a mode; more: what Found holds next to the ranking."""
    rngs = rngs or [random.Random(0), random.Random(0)]
    from mine_negatives import Found

    lists = {"lookahead": [], "momentum": [], "momentum_positives": []}
    question = question | {"positives": [*question["positives"]]}
    return mode(question, Found(ids, **lists | dict(more)), corpus, settings(**changes), rngs)


# ---------------------------------------------------------------- wrong_for
def judged(wrong_for, question, corpus, never=frozenset(), **changes):
    """Return what wrong_for says of every passage."""
    wrong = wrong_for(question, question["positives"], never, corpus, settings(**changes))
    return [bool(wrong(pid)) for pid in sorted(corpus.passages)]


def wrong_ids(rng, wrong_for):
    question, corpus, ids = world(rng, positives=(2, 20), answers=())
    return {"wrong": judged(wrong_for, question, corpus, frozenset({ids[5], ids[31]}))}


def wrong_texts(rng, wrong_for):
    question, corpus, ids = world(rng, positives=(1,), holding=())
    corpus.passages[ids[7]] = corpus.passages[ids[1]]._replace(id=ids[7])
    found = {"with answers": judged(wrong_for, question, corpus)}
    question, corpus, ids = world(rng, positives=(9,), answers=())
    question["positives"].insert(0, {"title": "t", "text": corpus.passages[ids[4]].text})
    return found | {"an inline positive, no answers": judged(wrong_for, question, corpus)}


def wrong_answers(rng, wrong_for):
    question, corpus, ids = world(rng, answers=("pink", "amber"))
    corpus.passages[ids[6]] = corpus.passages[ids[6]]._replace(title="amber")
    titles = judged(wrong_for, question, corpus, match_title=True)
    return {"wrong": judged(wrong_for, question, corpus), "titles too": titles}


# ---------------------------------------------------------------- topk
def topk_first(rng, topk):
    question, corpus, ids = world(rng, positives=(1,), holding=(0, 3, 4))
    positives, negatives = mine(topk, question, corpus, ids, {"never": frozenset({ids[6]})})
    return {"positives": positives, "negatives": negatives}


def topk_depth(rng, topk):
    _, negatives = mine(topk, *world(rng, positives=(4,), holding=(5, 6)), depth=7, negatives=6)
    return {"negatives": sorted(negatives)}


def topk_positives(rng, topk):
    return {"positives": mine(topk, *world(rng, positives=()), positives="find")[0]}


# ---------------------------------------------------------------- draw_at_random
def draws(rng, draw_at_random, counts, ids=12, forbidden=4):
    """Return (so many draws of some ids, the ids, those that are allowed: the first and some others)."""
    names = [f"p{i}" for i in rng.permutation(100)[:ids]]
    allowed = {*names} - {*rng.permutation(names[1:])[:forbidden].tolist()}
    source = random.Random(int(rng.integers(10**6)))
    return [draw_at_random(names, allowed.__contains__, count, source) for count in counts], names, allowed


def draw_different(rng, draw_at_random):
    drawn, _, allowed = draws(rng, draw_at_random, rng.integers(2, 8, 20).tolist())
    twice = any(len({*ids}) < len(ids) for ids in drawn)
    return {"how many": [*map(len, drawn)], "twice": twice, "allowed": allowed.issuperset(sum(drawn, []))}


def draw_ends(rng, draw_at_random):
    drawn, *_ = draws(rng, draw_at_random, [9] * 8, forbidden=9)
    return {"all that are allowed": [sorted(ids) for ids in drawn]}


def draw_fair(rng, draw_at_random):
    drawn, names, _ = draws(rng, draw_at_random, [2] * 3000, ids=9)
    shares = [[round(sum(ids[i] == pid for ids in drawn) / 3000, 1) for pid in names] for i in (0, 1)]
    return {"share as the first, as the second": shares}


# ---------------------------------------------------------------- denoise
LOW = (1, 2, 3, 5, 6, 9)  # places of low scores


def scored(rng, positives=(0,), holding=(3, 8, 11)):
    """Return (question, corpus, ids, {"scores": those of the first 20 passages}); two of them are 0.3."""
    question, corpus, ids = world(rng, positives, holding)
    scores = dict(zip(ids, rng.uniform(0, 1, 20).tolist(), strict=False))
    scores |= {ids[place]: float(rng.uniform(0.01, 0.2)) for place in LOW}
    scores |= {ids[4]: 0.3, ids[7]: 0.3, ids[0]: 0.9}
    return question, corpus, ids, {"scores": scores}


def denoised(rng, denoise, positives=(0,), holding=(), unscored=(), **changes):
    """Return (places of the negatives in the ranking, places without a score)."""
    question, corpus, ids, more = scored(rng, positives, holding)
    for place in unscored:
        del more["scores"][ids[place]]
    _, negatives = mine(denoise, question, corpus, ids, more, scores="x.run", **changes)
    without = [place for place, pid in enumerate(ids[:30]) if pid not in more["scores"]]
    return [ids.index(pid) for pid in negatives], without


def denoise_draw(rng, denoise):
    question, corpus, ids = world(rng, holding=(2, 9))
    found, late = [], 0
    for seed, count in enumerate(rng.integers(3, 8, 20).tolist()):
        _, drawn = mine(denoise, question, corpus, ids, rngs=[random.Random(seed)], depth=25, negatives=count)
        places = {ids.index(pid) for pid in drawn}
        found.append([len(drawn), len(places), bool(places & {0, 2, 9}), max(places) < 25])
        late += max(places) >= 12
    return {"drawn, different, right ones, within the depth": found, "some from far down": late > 0}


def denoise_gate(rng, denoise):
    return {"places": sorted(denoised(rng, denoise, negatives=30)[0])}


@times(3)
def denoise_wrong(rng, denoise):
    places, _ = denoised(rng, denoise, holding=rng.permutation(LOW)[:3], negatives=30)
    return {"those without an answer": [place in places for place in LOW]}


@times(5)
def denoise_count(rng, denoise):
    positives, negatives = rng.integers((2, 1), (4, 3)).tolist()
    places, _ = denoised(rng, denoise, positives=(0, 39, 38)[:positives], negatives=negatives)
    return {"how many": len(places)}


@times(3)
def denoise_order(rng, denoise):
    places, _ = denoised(rng, denoise, unscored=rng.permutation(LOW)[:3], negatives=30)
    return {"three of them": [place for place in places if place in LOW]}


def denoise_fill(rng, denoise):
    places, without = denoised(rng, denoise, unscored=rng.permutation(20)[:6], negatives=30, fill=True)
    return {"no score": sorted({*without} & {*places}), "each once": len(places) == len({*places})}


# ---------------------------------------------------------------- pseudo_label
def labelled(rng, pseudo_label, scores, **changes):
    """Return (places of the positives, of the negatives); scores: {place: score}."""
    question, corpus, ids = world(rng, positives=(), answers=())
    more = {"scores": {ids[place]: score for place, score in scores.items()}}
    found = mine(pseudo_label, question, corpus, ids, more, **changes)
    return [[ids.index(pid) for pid in entries] for entries in found]


@times(4)
def pseudo_best(rng, pseudo_label):
    scores = dict(enumerate(rng.uniform(0.4, 0.9, 12).tolist()))
    first, second = (1 + rng.permutation(11)[:2]).tolist()
    more = {first: 0.97, second: 0.97, 35: 0.99}  # the last is beyond the depth
    return {"positives": labelled(rng, pseudo_label, scores | more)[0]}


def pseudo_sure(rng, pseudo_label):
    found = []
    for best in rng.permutation([0.9, 0.9, 0.95, 0.91, 0.5, 0.0]).tolist():
        scores = {0: best} | dict.fromkeys(range(1, rng.integers(2, 6)), 0.1)
        found.append([*map(len, labelled(rng, pseudo_label, scores if best else {}))])
    return {"how many": found}


@times(3)
def pseudo_negatives(rng, pseudo_label):
    best, edge = rng.permutation(6)[:2].tolist()
    scores = dict(enumerate(rng.uniform(0, 0.25, 15).tolist())) | {best: 0.99, edge: 0.3}
    found = {"negatives": labelled(rng, pseudo_label, scores)[1]}
    crossed = dict(enumerate(rng.permutation([0.5, 0.6, 0.8]).tolist()))  # all below negative_below
    _, negatives = labelled(rng, pseudo_label, crossed, positive_above=0.4, negative_below=0.9)
    return found | {"thresholds that cross": negatives}


# ---------------------------------------------------------------- teleport
def tele_sources(rng, teleport):
    question, corpus, ids = world(rng, holding=(1, 4))
    more = {"lookahead": [ids[i] for i in (0, 2, 20, 21, 1, 22, 23)]}
    more["momentum"] = [ids[2], ids[30], ids[31]]
    _, negatives = mine(teleport, question, corpus, ids, more, depth=4, negatives=4)
    found = {"neighbours": sorted(negatives[:4]), "look-ahead": sorted(negatives[4:8])}
    return found | {"momentum": negatives[8:]}


def tele_draws(rng, teleport):
    question, corpus, ids = world(rng, positives=(39,), holding=())
    good, late, alike = [], 0, []
    for seed, count in enumerate(rng.integers(3, 8, 15).tolist()):
        neighbours = []
        for end in (24, 38):
            rngs = [random.Random(seed), random.Random(seed)]
            for _ in range(2):
                more = {"lookahead": ids[20:end]}
                _, negatives = mine(teleport, question, corpus, ids, more, rngs, depth=16, negatives=count)
            neighbours.append(negatives[:count])
        places = {ids.index(pid) for pid in negatives[:count]}
        good.append([len(places), max(places) < 16])
        late += max(places) >= 8
        alike.append(neighbours[0] == neighbours[1])
    return {"of the first 16": good, "some from far down": late > 0, "whatever the look-ahead": alike}


def tele_positives(rng, teleport):
    question, corpus, ids = world(rng, positives=(3,), holding=())
    more = {"momentum_positives": [ids[7], ids[3], ids[9]], "lookahead": ids[10:30]}
    return {"positives": mine(teleport, question, corpus, ids, more)[0]}


@times(12)
def tele_dropped(rng, teleport):
    question, corpus, ids = world(rng, holding=range(30) if rng.random() < 0.5 else ())
    more = {"lookahead": ids[20:], "momentum": ids[35:]}
    _, negatives = mine(teleport, question, corpus, ids[:20], more, depth=10)
    return {"there are negatives": len(negatives) > 0}


# ---------------------------------------------------------------- rotating_negatives
@times(4)
def rotate_all(rng, rotating_negatives):
    pool, k, seed = rng.integers((9, 3, 0), (60, 9, 10**6)).tolist()
    epochs = [[int(i) for i in rotating_negatives(pool, k, seed, epoch)] for epoch in range(3 * pool // k)]
    order = [i for epoch in epochs for i in epoch]
    rounds = [sorted(order[at : at + pool]) for at in range(0, len(order) - pool + 1, pool)]
    found = {"each once a round": [r == [*range(pool)] for r in rounds], "an epoch": [*map(len, epochs)]}
    return found | {"in the order of the file": order[:pool] == [*range(pool)]}


@times(5)
def rotate_small(rng, rotating_negatives):
    pool, more, seed = rng.integers((0, 1, 0), (7, 9, 10**6)).tolist()
    return {"taken": sorted(map(int, rotating_negatives(pool, pool + more, seed, 2)))}


# ---------------------------------------------------------------- together
def mined(rng):
    from mine_negatives import MODES, training_lines

    lines = []
    for mode in ["topk", "denoise", "pseudo_label"] * 3:
        question, corpus, ids, more = scored(rng)
        if mode == "pseudo_label":
            more["scores"][ids[10]] = 0.95
        changes = {"scores": "" if mode == "topk" else "x.run", "negatives": 3}
        positives, negatives = mine(MODES[mode], question, corpus, ids, more, **changes)
        question |= {"positives": positives, "negatives": negatives}
        lines += training_lines(question, settings(**changes))
    return {"lines": lines}
