"""
Assignment 3, exact search and what counts as found: the points, and the drivers (a1.py says what these are).
"""

import numpy as np
from child import tasks

SHIP = ["test_dpr.py", "doc2embedding.py", "utils/bm25.py", "recipes/untrained.py", "tests/saved.py"]
# helpers that would give an answer away
DROP = ["utils/search.py:best_of_block", "utils/text.py:_probe", "utils/text.py:_token_pattern"]
DROP += ["utils/text.py:_before", "utils/text.py:answer_position"]
SHOWN = ["queries_QD = checked_queries(queries_QD, shards, k)"]  # search_index and fill_index need these
SHOWN += ["refuse_non_finite(x_nD, range(start, start + len(x_nD)))"]
TASKS = tasks("""
utils/search.py:exact_topk
   6 topk_rows        the best k rows for any shards and blocks, numbered over the corpus | the docstring
   3 topk_ties        equal scores in corpus order, also across the end of a block and of k | rescore
   2 topk_short       k larger than the corpus; no questions | the docstring
   2 topk_nan         NaN in a passage is refused | refuse_non_finite
   9 topk_memory      the scores of a block, and of the best so far; never of all passages | blocks
utils/search.py:fetch
   3 fetch_rows       the rows in the order asked for, from the right shards | the docstring
   1 fetch_type       in the stored type | the docstring
utils/search.py:as_lists
   2 lists_pairs      (row, score), best first; row 0 is a row | the docstring
   1 lists_missing    -1 means that nothing was found | the docstring
utils/text.py:has_answer
   5 answer_tokens    the answer's tokens in a row, in either case | tokenize
   3 answer_accents   accents count, however they are written | the head of the file
   2 answer_blank     a blank answer is in no text | the head of the file: DPR differs
   2 answer_any       one of the answers is enough | the docstring
   2 answer_regex     regex: patterns are searched in NFD text | _find_regex
utils/metrics.py:topk_accuracy
   2 accuracy_cut     a hit among the first k | the docstring
   2 accuracy_all     every question counts, also one without passages | the docstring
utils/metrics.py:mrr
   2 mrr_cut          1 / rank up to the cutoff, which is included | the docstring
   1 mrr_miss         rank 0 is a miss, and counts | the docstring
utils/metrics.py:ndcg
   3 ndcg_gain        the discounted grades of the first passages, over those of the ideal order | trec_eval
   2 ndcg_ideal       the ideal order has all relevant passages, found or not | the docstring
utils/metrics.py:bootstrap_interval
   2 boot_width       95 % of the means lie within | Efron 1979
   2 boot_skew        by percentiles of the drawn means, not by a normal curve | the docstring
   1 boot_seed        the same seed gives the same interval
test_dpr.py:hybrid
   3 hybrid_score     bm25 + weight * dense; a score that one list lacks is its lowest | the docstring
   2 hybrid_order     all passages of both lists, best first, equal scores by row, k of them
together
   5 evaluated        all your functions in one evaluation: two rankings, joined, and their metrics
""")

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "mrr": "Four questions have their first right passage at {a}, {b}, {c}, and nowhere. What is MRR@10?",
    "top5": "And top-5?",
    "ndcg": "A question has two relevant passages. One is at rank {b}, the other was not found. nDCG@10?",
    "interval": "A retriever is right for {r} of {n} questions. How wide is the 95 % interval, in points of "
    "percent, by 2 x 1.96 x sqrt(p (1 - p) / n)?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    n = int(rng.integers(80, 400))
    ranks = {"a": int(rng.integers(1, 5)), "b": int(rng.integers(2, 10)), "c": int(rng.integers(11, 30))}
    return ranks | {"r": int(n * rng.uniform(0.3, 0.7)), "n": n}


# ---------------------------------------------------------------- search
def vectors(rng, rows, dim=24, dtype=np.float32):
    return rng.standard_normal((rows, dim)).astype(dtype)


def cut(x_ND, size):
    return [x_ND[i : i + size] for i in range(0, len(x_ND), size)]


def found_by(exact_topk, queries_QD, x_ND, k, sizes):
    """Return the arrays of exact_topk for some (shard size, block) each."""
    found = {}
    for size, block in sizes:
        scores_Qk, rows_Qk = exact_topk(queries_QD, cut(x_ND, size), k, block)
        found |= {f"rows, shards of {size}, blocks of {block}": rows_Qk}
        found |= {f"scores, shards of {size}, blocks of {block}": scores_Qk}
    return found


def topk_rows(rng, exact_topk):
    x_ND = vectors(rng, 1003, dtype=np.float16)
    few = found_by(exact_topk, vectors(rng, 5), x_ND, 10, ((1003, 0), (1003, 64), (100, 17), (7, 500)))
    many = found_by(exact_topk, vectors(rng, 300), x_ND, 3, ((500, 200),))
    return few | {f"{name}, many questions": array for name, array in many.items()}


def topk_ties(rng, exact_topk):
    x_ND = np.repeat(vectors(rng, 10, 96, np.float16), 30, 0)[rng.permutation(300)]
    found = found_by(exact_topk, vectors(rng, 64, 96), x_ND, 10, ((300, 0), (300, 37), (11, 16)))
    return {name: array for name, array in found.items() if name.startswith("rows")}


def topk_short(rng, exact_topk):
    x_ND = vectors(rng, 12)
    found = found_by(exact_topk, vectors(rng, 3), x_ND, 50, ((12, 0), (5, 0)))
    scores_Qk, rows_Qk = exact_topk(np.zeros((0, 24), np.float32), [x_ND], 50)
    return found | {"without questions": [list(scores_Qk.shape), list(rows_Qk.shape)]}


def topk_nan(rng, exact_topk):
    from utils.plumbing.config import UserError

    refused = []
    for broken in rng.permutation([True, False] * 4):
        x_ND = vectors(rng, 500)
        row = int(rng.integers(400))  # not in the last block
        if broken:
            x_ND[row, 2] = np.nan
        try:
            exact_topk(vectors(rng, 4), [x_ND], 5, 100)
            refused.append("no")
        except UserError as error:
            refused.append("yes" if str(row) in str(error) else "without the row's number")
    return {"refused": refused}


def topk_memory(rng, exact_topk):
    import tracemalloc

    from tests.saved import Largest

    # scores that rise along the corpus: every passage is among the best so far
    queries_QD = np.eye(24, dtype=np.float32)[:6]
    x_ND = np.abs(vectors(rng, int(rng.integers(19000, 21000))))
    x_ND[:, :6] = np.sort(x_ND[:, :6], axis=0)
    exact_topk(queries_QD, [x_ND[:100]], 5, 50)  # what is imported late
    tracemalloc.start()
    with Largest() as largest:
        _, rows_Qk = exact_topk(queries_QD, [x_ND], 100, 250)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    all_scores = len(queries_QD) * len(x_ND)
    found = {"a tensor of a quarter of all scores": largest.numel > all_scores / 4}
    # why the rows too: a function that does nothing needs no memory
    return found | {"numpy's arrays are as large": peak > 6 * all_scores, "rows": rows_Qk}


def fetch_rows(rng, fetch):
    ends = np.cumsum(rng.permutation([1, 4, 7, 2, 9]))
    x_ND = vectors(rng, int(ends[-1]), 5)
    shards = np.split(x_ND, ends[:-1])
    rows = rng.permutation([*(ends - 1), *ends[:-1], 0, 0, *rng.integers(0, len(x_ND), 5)])
    return {"vectors": fetch(shards, rows)}


def fetch_type(rng, fetch):
    types = rng.choice(["f2", "f4", "f8"], 6)
    found = [fetch([vectors(rng, 6, 3, t), vectors(rng, 4, 3, t)], np.array([1, 8])) for t in types]
    return {"types": [str(np.asarray(array).dtype) for array in found]}


def lists_of(as_lists, rows_Qk, scores_Qk):
    hits = as_lists(scores_Qk, rows_Qk)
    return {"lists": [[[int(row), float(score)] for row, score in question] for question in hits]}


def lists_pairs(rng, as_lists):
    rows_Qk = np.stack([rng.permutation(40)[:6] + 1 for _ in range(4)])
    rows_Qk[1, 0] = rows_Qk[2, 3] = 0
    return lists_of(as_lists, rows_Qk, -np.sort(-rng.standard_normal((4, 6)), axis=1))


def lists_missing(rng, as_lists):
    rows_Qk = np.stack([rng.permutation(40)[:6] + 1 for _ in range(4)])
    scores_Qk = -np.sort(-rng.standard_normal((4, 6)), axis=1)
    for question, kept in enumerate((6, 4, 1, 0)):
        rows_Qk[question, kept:] = -1
        scores_Qk[question, kept:] = -np.inf
    return lists_of(as_lists, rows_Qk, scores_Qk)


# ---------------------------------------------------------------- has_answer
def verdicts(rng, has_answer, cases, regex=False):
    """Return what has_answer says of (passage, answers), some of them twice, in an order of the seed."""
    places = [*range(len(cases)), *rng.integers(len(cases), size=8)]
    cases = [cases[i] for i in rng.permutation(places)]
    return {"verdicts": [bool(has_answer(passage, answers, regex)) for passage, answers in cases]}


def answer_tokens(rng, has_answer):
    words = rng.permutation("the river rises in old norway and runs past a mill to st olaf".split()).tolist()
    text = " ".join(words)
    at = int(rng.integers(2, 8))
    one, two, three = words[at : at + 3]
    phrase = f"{one} {two} {three}"
    # also in another order, not in a row, and a part of a word
    answers = (phrase, phrase.upper(), f"{two} {one}", f"{one} {three}", one + "s")
    cases = [(text, [answer]) for answer in answers]
    cases += [(text.replace("norway", "norwegian"), [answer]) for answer in ("norway", "norw")]
    cases += [("The U.S. Navy sailed.", [answer]) for answer in ("U.S. Navy", "u . s . navy")]
    cases += [("The US Navy sailed.", ["U.S. Navy"]), ("St.  Olaf's   church", ["st. olaf's church"])]
    cases += [("It was built in 1975.", [answer]) for answer in ("197", "1975.")]
    return verdicts(rng, has_answer, cases)


def answer_accents(rng, has_answer):
    spellings = ("Dvo\u0159\xe1k", "Dvor\u030ca\u0301k", "Dvorak")  # composed, apart, without
    cases = [(f"{one} wrote it", [other]) for one in spellings for other in spellings]
    cases += [("Beyonc\xe9 sang", ["beyonce"]), ("\xc9MILE Zola", ["\xe9mile"])]
    return verdicts(rng, has_answer, cases)


def answer_blank(rng, has_answer):
    answers = ("", " ", "\u200b", "\n\t", "words", "a text", "text of")
    return verdicts(rng, has_answer, [("a text of words", [answer]) for answer in answers])


def answer_any(rng, has_answer):
    cases = [("red green blue", answers) for answers in (["pink", "green"], ["green", "pink"], ["pink"], [])]
    return verdicts(rng, has_answer, cases)


def answer_regex(rng, has_answer):
    cases = [(f"built in {year} or so", [r"19\d\d"]) for year in (1975, 1875)]
    cases += [("Dvo\u0159\xe1k wrote it", ["dvo\u0159\xe1k"]), ("the (old) mill", [r"\(old\)"])]
    cases += [("Green hills", ["^green"]), ("no such thing", ["(", "thing$"])]  # "(" does not compile
    return verdicts(rng, has_answer, cases, regex=True)


# ---------------------------------------------------------------- metrics
def accuracy_cut(rng, topk_accuracy):
    hits = (rng.random((12, 8)) < 0.12).tolist()
    hits[0] = [False, False, True, True, True, False, False, True]
    found = topk_accuracy(hits, [1, 2, 3, 5])
    return {f"top-{k}": float(found[k]) for k in (1, 2, 3, 5)}


def accuracy_all(rng, topk_accuracy):
    kinds = [[], [True], [False, False, True], [False]]
    hits = [kind for kind in kinds for _ in range(rng.integers(1, 9))]
    found = topk_accuracy(hits, [1, 4])
    return {f"top-{k}": float(found[k]) for k in (1, 4)}


def mrr_cut(rng, mrr):
    cutoff = int(rng.integers(5, 9))
    ranks = [1, cutoff, cutoff + 1, *rng.integers(1, 30, 8).tolist()]
    return {"mrr": np.float64(mrr(ranks, cutoff))}


def mrr_miss(rng, mrr):
    ranks = [0, 0, *rng.integers(1, 9, int(rng.integers(3, 9))).tolist()]
    return {"mrr": np.float64(mrr(ranks, 10)), "nothing found": np.float64(mrr([0, 0, 0], 10))}


def ndcg_gain(rng, ndcg):
    # all that is relevant is found, in another order and in part beyond the cutoff
    gains = [rng.permutation([3, 2, 1, 1, 0, 0, 0, 0]).tolist() for _ in range(4)] + [[0] * 5 + [1, 2]]
    relevant = [sorted(gain for gain in question if gain) for question in gains]
    return {"ndcg": np.array([ndcg([g], [r], 5) for g, r in zip(gains, relevant, strict=True)])}


def ndcg_ideal(rng, ndcg):
    gains, relevant = [[0, 0], [1, 0, 0]], [[2], []]
    for _ in range(4):
        gains.append(rng.permutation([1, 0, 0, rng.integers(2)]).tolist())
        high, low = rng.integers((1, 2), (4, 5))
        relevant.append([2] * high + [1] * low)
    return {"ndcg": np.array([ndcg([g], [r], 4) for g, r in zip(gains, relevant, strict=True)])}


def boot_width(rng, bootstrap_interval):
    widths = []
    for power in rng.integers(0, 40, 2):
        # values whose normal interval is a power of 1.2; draws and small samples make 3 % of difference
        values = rng.standard_normal(60)
        values *= 1.2**power / (2 * 1.96 * values.std() / 60**0.5)
        low, high = bootstrap_interval(values, samples=6000, seed=int(rng.integers(99)))
        widths.append(round(float(np.log(high - low) / np.log(1.2))))
    return {"widths, as powers of 1.2": widths}


def boot_skew(rng, bootstrap_interval):
    found = []
    # why 1, 2 and 4 of 22 to 40: no mean has a share near 2.5 %, so the interval does not depend on the draws
    for ones in (1, 2, 4):
        values = rng.permutation([1.0] * ones + [0.0] * int(rng.integers(22 - ones, 40 - ones)))
        interval = bootstrap_interval(values, samples=20000, seed=int(rng.integers(99)))
        found.append(np.round(interval, 3).tolist())
    return {"intervals": found}


def boot_seed(rng, bootstrap_interval):
    values = rng.standard_normal(50)
    seeds = rng.permutation([6, 6, 7, 7, 8, 8, 9]).tolist()
    found = [tuple(bootstrap_interval(values, samples=200, seed=seed)) for seed in seeds]
    return {"alike with": [found.index(interval) for interval in found]}


# ---------------------------------------------------------------- hybrid
def hybrid_score(rng, hybrid):
    rows = rng.permutation(100).tolist()
    dense = [*zip(rows[:8], rng.uniform(60, 80, 8).tolist(), strict=True)]
    bm25 = [*zip(rows[5:13], rng.uniform(5, 30, 8).tolist(), strict=True)]
    weight = float(rng.uniform(0.5, 2))
    scores = dict(hybrid(dense, bm25, weight, 50))
    alone = dict(hybrid(dense, [], weight, 50))
    # why by row: the order is another check
    found = {"how many": len(scores), "scores": np.array([scores[row] for row in sorted(scores)])}
    return found | {"without BM25": np.array([alone[row] for row in sorted(alone)])}


def hybrid_order(rng, hybrid):
    rows = rng.permutation(100)[:10].tolist()
    dense = [(row, float(5 - i // 3)) for i, row in enumerate(rows[:7])]
    bm25 = [(row, 2.0) for row in rows[4:]]
    return {"rows": [[row for row, _ in hybrid(dense, bm25, 1.0, k)] for k in (4, 20)]}


# ---------------------------------------------------------------- together
def evaluated(rng):
    from test_dpr import hybrid, search
    from utils.metrics import mrr, ndcg, topk_accuracy
    from utils.text import has_answer

    texts = [f"passage {i} is about the {'red' if i % 7 == 0 else 'blue'} river" for i in range(60)]
    shards = cut(vectors(rng, 60, 8), 25)
    queries_QD = vectors(rng, 9, 8)
    queries_QD[4] = np.nan  # no result for this one
    hits, ranks, gains = [], [], []
    for dense in search(queries_QD, shards, None, 12, "cpu"):
        bm25 = [(row, 9.0 - i) for i, row in enumerate(rng.permutation(60)[:9].tolist())]
        joined = hybrid(dense, bm25, 0.5, 10)
        right = [has_answer(texts[row], ["Red river"]) for row, _ in joined]
        hits.append(right)
        ranks.append(right.index(True) + 1 if any(right) else 0)
        gains.append([int(hit) for hit in right])
    found = {f"top-{k}": float(share) for k, share in topk_accuracy(hits, [1, 5, 10]).items()}
    return found | {"mrr": float(mrr(ranks, 10)), "ndcg": float(ndcg(gains, [[1] * 9] * len(gains), 10))}
