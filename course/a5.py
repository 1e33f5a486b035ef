"""
Assignment 5, the extractive reader: the points, and the drivers (a1.py says what these are).
"""

import numpy as np
from child import tasks

SHIP = ["train_reader.py", "answer.py", "utils/bm25.py", "config/train_reader_demo.yaml"]
DROP = []
SHOWN = []
TASKS = tasks("""
utils/reader.py:find_spans
   4 spans_all        every mention of every answer, all of its tokens | the docstring
   2 spans_first      in the passage only, which begins at ids[first] | tokenize_rows
   2 spans_ends       also at the very end; the end is included | the docstring
   2 spans_empty      an answer of no tokens is nowhere
train_reader.py:reader_loss
   9 loss_marginal    the sum over mentions of P(start) P(end), inside the logarithm | paper, Eq. 3-5
   4 loss_sum         the sum over questions | the docstring
   5 loss_no_span     a question without a mention adds its relevance alone, and no NaN | the docstring
   4 loss_relevance   - log of the positive's share of all passages; -inf takes no part | the docstring
   3 loss_correct     how many positives have the highest relevance | the docstring
utils/reader.py:best_spans
   6 best_score       start plus end logit; the best first | the docstring
   4 best_length      of up to max_answer_length tokens | the docstring
   4 best_overlap     none inside or around a better one | paper, Sec. 6.1
   4 best_words       widened to whole words on both sides | continues_S
   2 best_ties        of equal scores the earlier one | the docstring
utils/text.py:exact_match
   3 em_words         the same words, without case, articles and punctuation | _squad_words
   1 em_answers       as one of the answers | the docstring
utils/text.py:f1
   3 f1_counts        precision and recall of words, each as often as it stands there | the docstring
   1 f1_answers       of the answer that fits best | the docstring
   2 f1_empty         without words: 1 if both have none, else 0 | the head of the file
together
   5 read_and_scored  all your functions: spans, loss, answers and their scores
""")

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "span": "A passage has three tokens. The start probabilities are {s0}, {s1}, {s2}, the end probabilities "
    "{e0}, {e1}, {e2}. The answer is at tokens 0 to 1 and at token 2. What is the loss of the span?",
    "whole": "The passage is the positive, and its relevance has probability {r}. What is reader_loss?",
    "best": "Which probability has the best span of at most two tokens?",
    "f1": "A prediction has {p} words, the answer {g}, and {c} are common. F1?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    found = {}
    for letter in "se":
        shares = rng.permutation([0.1, 0.2, 0.7] if rng.random() < 0.5 else [0.1, 0.3, 0.6])
        found |= {f"{letter}{i}": float(share) for i, share in enumerate(shares)}
    found |= {"r": round(float(rng.uniform(0.2, 0.9)), 2), "c": int(rng.integers(1, 4))}
    return found | {"p": found["c"] + int(rng.integers(1, 5)), "g": found["c"] + int(rng.integers(0, 3))}


# ---------------------------------------------------------------- find_spans
def spans(find_spans, ids, first, answers):
    return {"spans": sorted([int(begin), int(end)] for begin, end in find_spans(ids, first, answers))}


def spans_all(rng, find_spans):
    a, b, c, d, *rest = rng.permutation(range(10, 99)).tolist()
    ids = [1, d, 2, a, b, c, rest[0], a, c, a, b, rest[1], a, b, c, rest[2], b, rest[3]]
    return spans(find_spans, ids, 3, [[a, b, c], [b], [a, b]])


def spans_first(rng, find_spans):
    a, b, *rest = rng.permutation(range(10, 99)).tolist()
    ids = [1, a, b, 2, rest[0], rest[1], a, b, rest[2]]
    return spans(find_spans, ids, 4, [[a, b]])


def spans_ends(rng, find_spans):
    a, b, *rest = rng.permutation(range(10, 99)).tolist()
    return spans(find_spans, [1, rest[0], 2, a, b, rest[1], rest[2], a, b], 3, [[a, b]])


def spans_empty(rng, find_spans):
    a, *rest = rng.permutation(range(10, 99)).tolist()
    ids = [1, rest[0], 2, a, rest[1]]
    found = spans(find_spans, ids, 3, [[], [rest[2]]])["spans"]
    return {"spans": found, "of no passage": spans(find_spans, [1, 2], 2, [[a]])["spans"]}


# ---------------------------------------------------------------- reader_loss
def loss_of(reader_loss, start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    """Return reader_loss's two values, and the gradients of its three logits, in float64."""
    import torch

    logits = [
        torch.tensor(np.asarray(x, float), requires_grad=True) for x in (start_NL, end_NL, relevance_NM)
    ]
    places = [torch.tensor(np.asarray(x, dtype=np.int64)) for x in (begin_NA, end_NA)]
    loss, correct = reader_loss(*logits, *places, torch.tensor(np.asarray(spans_NA, dtype=bool)))
    loss.backward()
    names = ("start", "end", "relevance")
    found = {
        f"gradient of {name}": x.grad for name, x in zip(names, logits, strict=True) if x.grad is not None
    }
    return loss.detach(), int(correct), found


def loss_marginal(rng, reader_loss):
    start_NL, end_NL = rng.standard_normal((2, 3, 8))
    start_NL[1, 6:] = end_NL[1, 6:] = -np.inf  # padding
    begin_NA = [[0, 2, 5], [1, 0, 0], [4, 4, 7]]
    end_NA = [[1, 2, 7], [3, 0, 0], [4, 6, 7]]
    there_NA = [[True] * 3, [True, False, False], [True] * 3]
    # one passage a question: its relevance costs nothing
    loss, _, gradients = loss_of(reader_loss, start_NL, end_NL, np.zeros((3, 1)), begin_NA, end_NA, there_NA)
    found = {name: gradients[name] for name in ("gradient of start", "gradient of end")}
    return {"loss": loss} | found


def loss_sum(rng, reader_loss):
    start_L, end_L = rng.standard_normal((2, 6))
    losses = []
    for n in (1, 3):
        shapes = (np.tile(start_L, (n, 1)), np.tile(end_L, (n, 1)), np.zeros((n, 1)))
        losses.append(loss_of(reader_loss, *shapes, [[2]] * n, [[4]] * n, [[True]] * n)[0])
    return {"three times the loss of one": round(float(losses[1] / losses[0]), 6)}


def loss_no_span(rng, reader_loss):
    start_NL, end_NL = rng.standard_normal((2, 2, 5))
    logits = (start_NL, end_NL, np.zeros((2, 1)))
    loss, _, found = loss_of(reader_loss, *logits, [[1], [0]], [[2], [0]], [[True], [False]])
    return {"loss": loss} | {name: found[name] for name in ("gradient of start", "gradient of end")}


def loss_relevance(rng, reader_loss):
    relevance_NM = rng.standard_normal((4, 5))
    relevance_NM[1, 3:] = -np.inf
    # passages of one token, which is the mention: the span costs nothing
    mention = ([[0]] * 4, [[0]] * 4, [[True]] * 4)
    loss, _, found = loss_of(reader_loss, *np.zeros((2, 4, 1)), relevance_NM, *mention)
    return {"loss": loss, "gradient": found["gradient of relevance"]}


def loss_correct(rng, reader_loss):
    relevance_NM = rng.standard_normal((6, 4))
    for row in range(6):
        best = 0 if row < int(rng.integers(2, 5)) else 1 + row % 3
        relevance_NM[row, best] = 5.0
    nothing = ([[0]] * 6, [[0]] * 6, [[False]] * 6)
    return {"correct": loss_of(reader_loss, *np.zeros((2, 6, 3)), relevance_NM, *nothing)[1]}


# ---------------------------------------------------------------- best_spans
def chosen(best_spans, start_S, end_S, continues_S=None, longest=4, top=1):
    none = np.zeros(len(start_S), bool)
    found = best_spans(start_S, end_S, none if continues_S is None else continues_S, longest, top)
    return [[int(first), int(last), round(float(score), 9)] for first, last, score in found]


def best_score(rng, best_spans):
    return {"best": [chosen(best_spans, *rng.standard_normal((2, 15)), longest=15) for _ in range(6)]}


def best_length(rng, best_spans):
    found = []
    for longest in (1, 2, 3):
        # the best start and the best end are one token too far from each other
        start_S, end_S = rng.uniform(0, 1, (2, 12))
        start_S[4] = end_S[4 + longest] = 9.0
        found.append(chosen(best_spans, start_S, end_S, longest=longest))
    return {"best": found}


def best_overlap(rng, best_spans):
    start_S, end_S = rng.uniform(0, 1, (2, 14))
    start_S[3] = end_S[5] = 9.0
    start_S[2] = end_S[4] = end_S[6] = 7.0  # inside and around it
    return {"top five": [span[:2] for span in chosen(best_spans, start_S, end_S, longest=14, top=5)]}


def best_words(rng, best_spans):
    start_S, end_S = rng.uniform(0, 1, (2, 12))
    start_S[5] = end_S[6] = 9.0
    continues_S = np.zeros(12, bool)
    continues_S[[4, 5, 7, 8]] = True
    at_ends = np.ones(12, bool)
    return {"best": [chosen(best_spans, start_S, end_S, each) for each in (continues_S, at_ends)]}


def best_ties(rng, best_spans):
    start_S, end_S = np.zeros((2, 12))
    for at in rng.permutation(range(1, 11))[:4]:
        start_S[at] = end_S[at] = 1.0
    return {"best": chosen(best_spans, start_S, end_S, longest=1, top=4)}


# ---------------------------------------------------------------- scores of answers
def words_of(rng, count):
    return rng.permutation("river tower bridge garden market colour stone".split())[:count].tolist()


def em_words(rng, exact_match):
    a, b, c = words_of(rng, 3)
    cases = [(f"The {a}", a), (a.upper(), a), (f"{a}-{b}", f"{a}{b}"), (f"{a}, {b}.", f"{a} {b}"), (a, b)]
    cases += [(f"{b} {a}", f"{a} {b}"), (f"an {a} a {b}", f"{a} the {b}"), (f"{a} {b} {c}", f"{a} {b}")]
    return {"verdicts": [bool(exact_match(prediction, [answer])) for prediction, answer in cases]}


def em_answers(rng, exact_match):
    a, b, c = words_of(rng, 3)
    cases = [(b, [a, b]), (a, [a, b]), (c, [a, b]), (a, [])]
    return {"verdicts": [bool(exact_match(prediction, answers)) for prediction, answers in cases]}


def f1_counts(rng, f1):
    a, b, c, d = words_of(rng, 4)
    cases = [(f"{a} {b}", f"{a} {c} {d}"), (f"{a} {a} {b}", f"{a} {b} {b}"), (f"{a} {a} {a}", f"{a} {a}")]
    cases += [(f"the {a}", a), (f"{a} {b} {c}", f"{c} {a} {b}"), (a, b)]
    return {"f1": np.array([f1(prediction, [answer]) for prediction, answer in cases], float)}


def f1_answers(rng, f1):
    a, b, c, d = words_of(rng, 4)
    cases = [(f"{a} {b}", [f"{c} {d}", a, f"{a} {c}"]), (a, [b, a])]
    return {"f1": np.array([f1(prediction, answers) for prediction, answers in cases], float)}


def f1_empty(rng, f1):
    (a,) = words_of(rng, 1)
    cases = [("the", ["an"]), ("", [a]), (a, ["."]), ("", [""])]
    return {"f1": np.array([f1(prediction, answers) for prediction, answers in cases], float)}


# ---------------------------------------------------------------- together
def read_and_scored(rng):
    from train_reader import reader_loss
    from utils.reader import best_spans, find_spans
    from utils.text import exact_match, f1

    words = words_of(rng, 7)
    losses, scores = [], []
    for _ in range(4):
        ids = rng.integers(0, 7, 20).tolist()
        mentions = spans(find_spans, ids, 3, [[ids[9], ids[10]]])["spans"]
        start_S, end_S = rng.standard_normal((2, 20))
        begins, ends = zip(*mentions, strict=True)
        logits = (start_S[None], end_S[None], rng.standard_normal((1, 3)))
        losses.append(float(loss_of(reader_loss, *logits, [begins], [ends], [[True] * len(begins)])[0]))
        ((first, last, _),) = chosen(best_spans, start_S, end_S)
        prediction = " ".join(words[i] for i in ids[first : last + 1])
        answer = " ".join(words[i] for i in ids[9:11])
        scores.append([float(exact_match(prediction, [answer])), float(f1(prediction, [answer]))])
    return {"losses": np.array(losses), "exact match and F1": np.array(scores)}
