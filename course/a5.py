"""
Assignment 5, the extractive reader: the points, and the drivers (a1.py says what these are).
"""

from unittest import mock

import numpy as np
from child import tasks, times

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
    return sorted([int(begin), int(end)] for begin, end in find_spans(ids, first, answers))


def pieces(rng, *parts):
    """Return the ids of `parts` in a row: letters, or a number: up to so many other ids."""
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(100, 999, rng.integers(1, part + 1)).tolist()
        else:
            ids += ["_abc".index(letter) for letter in part]
    return ids


ABC = [[1, 2, 3], [2], [1, 2]]


@times(3)
def spans_all(rng, find_spans):
    parts = ["abc", "ac", "ab", "abc", "b", 1, 2, 3]
    parts = [parts[i] for i in rng.permutation(len(parts))]
    return {"spans": spans(find_spans, pieces(rng, *parts, 4), 0, ABC)}


@times(4)
def spans_first(rng, find_spans):
    question = pieces(rng, 9, "ab", 9)
    return {"spans": spans(find_spans, question + pieces(rng, 9, "ab", 9), len(question), ABC[2:])}


@times(4)
def spans_ends(rng, find_spans):
    question = pieces(rng, 9)
    return {"spans": spans(find_spans, question + pieces(rng, "abc", 9, "abc"), len(question), ABC[:1])}


@times(4)
def spans_empty(rng, find_spans):
    # why the begin of another answer: a function that finds nothing would be right
    found = spans(find_spans, pieces(rng, 20, "ab", 9), 0, [[], ABC[2]])
    return {"begin": [begin for begin, _ in found], "of no passage": spans(find_spans, [100, 101], 2, ABC)}


# ---------------------------------------------------------------- reader_loss
def loss_of(reader_loss, start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    """Return reader_loss's two values, and the gradients of its three logits, in float64."""
    import torch

    logits = [
        torch.tensor(np.asarray(x, float), requires_grad=True) for x in (start_NL, end_NL, relevance_NM)
    ]
    places = [torch.tensor(np.asarray(x, dtype=np.int64)) for x in (begin_NA, end_NA)]
    loss, correct = reader_loss(*logits, *places, torch.tensor(np.asarray(spans_NA, dtype=bool)))
    if loss.dim():
        raise ValueError("the loss is to be a scalar")
    loss.backward()
    if logits[2].grad is None:
        raise ValueError("the loss has no gradient")
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
    n = int(rng.integers(2, 9))
    start_NL, end_NL = rng.standard_normal((2, n, 6))
    # one mention a question, and one passage
    loss, _, found = loss_of(
        reader_loss, start_NL, end_NL, np.zeros((n, 1)), [[2]] * n, [[4]] * n, [[True]] * n
    )
    return {"loss": loss} | {name: found[name] for name in ("gradient of start", "gradient of end")}


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


@times(5)
def loss_correct(rng, reader_loss):
    relevance_NM = rng.standard_normal((8, 4))
    relevance_NM[np.arange(8), rng.integers(4, size=8) * rng.integers(2, size=8)] = 5.0
    nothing = ([[0]] * 8, [[0]] * 8, [[False]] * 8)
    return {"correct": loss_of(reader_loss, *np.zeros((2, 8, 3)), relevance_NM, *nothing)[1]}


# ---------------------------------------------------------------- best_spans
# the rule: this method of transformers does a large part of the work and may not be called
THEIRS = "transformers.models.dpr.tokenization_dpr{}.CustomDPRReaderTokenizerMixin._get_best_spans"


def chosen(best_spans, start_S, end_S, continues_S=None, longest=4, top=1):
    none = np.zeros(len(start_S), bool)
    continues_S = none if continues_S is None else continues_S
    refuse = PermissionError("transformers' own method is not to be called")
    with (
        mock.patch(THEIRS.format(""), side_effect=refuse),
        mock.patch(THEIRS.format("_fast"), side_effect=refuse),
    ):
        found = best_spans(start_S, end_S, continues_S, longest, top)
    return [[int(first), int(last), round(float(score), 5)] for first, last, score in found]


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


@times(3)
def best_words(rng, best_spans):
    # the best span is first to first + 1; its word has `before` tokens more in front, and `after` behind
    first, before, after = rng.integers((4, 1, 1), (10, 4, 4))
    start_S, end_S = rng.uniform(0, 1, (2, 16))
    start_S[first] = end_S[first + 1] = 9.0
    continues_S = np.zeros(16, bool)
    continues_S[first - before + 1 : first + 1] = continues_S[first + 2 : first + 2 + after] = True
    at_ends = np.ones(16, bool)
    return {"best": [chosen(best_spans, start_S, end_S, each) for each in (continues_S, at_ends)]}


def best_ties(rng, best_spans):
    start_S, end_S = np.zeros((2, 12))
    for at in rng.permutation(range(1, 11))[:4]:
        start_S[at] = end_S[at] = 1.0
    return {"best": chosen(best_spans, start_S, end_S, longest=1, top=4)}


# ---------------------------------------------------------------- scores of answers
WORDS = "river tower bridge garden market colour stone harbour mill island castle forest".split()


def words_of(rng, count):
    return rng.permutation(WORDS)[:count].tolist()


def mixed(rng, cases):
    """Return all cases and eight of them again, in an order of the seed, so that no list is always right."""
    places = [*range(len(cases)), *rng.integers(len(cases), size=8)]
    return [cases[i] for i in rng.permutation(places)]


def em_words(rng, exact_match):
    a, b, c = words_of(rng, 3)
    cases = [(f"The {a}", a), (a.upper(), a), (f"{a}-{b}", f"{a}{b}"), (f"{a}, {b}.", f"{a} {b}"), (a, b)]
    cases += [(f"{b} {a}", f"{a} {b}"), (f"an {a} a {b}", f"{a} the {b}"), (f"{a} {b} {c}", f"{a} {b}")]
    return {"verdicts": [bool(exact_match(prediction, [answer])) for prediction, answer in mixed(rng, cases)]}


def em_answers(rng, exact_match):
    a, b, c = words_of(rng, 3)
    cases = [(b, [a, b]), (a, [a, b]), (c, [a, b]), (a, [])]
    return {"verdicts": [bool(exact_match(prediction, answers)) for prediction, answers in mixed(rng, cases)]}


def f1_counts(rng, f1):
    a, b, c, d = words_of(rng, 4)
    cases = [(f"{a} {b}", f"{a} {c} {d}"), (f"{a} {a} {b}", f"{a} {b} {b}"), (f"{a} {a} {a}", f"{a} {a}")]
    cases += [(f"the {a}", a), (f"{a} {b} {c}", f"{c} {a} {b}"), (a, b)]
    return {"f1": np.array([f1(prediction, [answer]) for prediction, answer in mixed(rng, cases)], float)}


@times(5)
def f1_answers(rng, f1):
    # the second of three answers fits best: the prediction and some words more
    common, more = rng.integers((2, 1), (5, 5))
    words = words_of(rng, 12)
    far, near, last = words[9:], words[: common + more], words[:1] + words[9:]
    answers = [" ".join(answer) for answer in (far, near, last)]
    return {"f1": float(f1(" ".join(words[:common]), answers))}


def f1_empty(rng, f1):
    (a,) = words_of(rng, 1)
    cases = [("the", ["an"]), ("", [a]), (a, ["."]), ("", [""])]
    return {"f1": np.array([f1(prediction, answers) for prediction, answers in mixed(rng, cases)], float)}


# ---------------------------------------------------------------- together
def read_and_scored(rng):
    from train_reader import reader_loss
    from utils.reader import best_spans, find_spans
    from utils.text import exact_match, f1

    words = words_of(rng, 7)
    losses, scores = [], []
    for _ in range(4):
        ids = rng.integers(0, 7, 20).tolist()
        mentions = spans(find_spans, ids, 3, [[ids[9], ids[10]]])
        start_S, end_S = rng.standard_normal((2, 20))
        begins, ends = zip(*mentions, strict=True)
        logits = (start_S[None], end_S[None], rng.standard_normal((1, 3)))
        losses.append(float(loss_of(reader_loss, *logits, [begins], [ends], [[True] * len(begins)])[0]))
        ((first, last, _),) = chosen(best_spans, start_S, end_S)
        prediction = " ".join(words[i] for i in ids[first : last + 1])
        answer = " ".join(words[i] for i in ids[9:11])
        scores.append([float(exact_match(prediction, [answer])), float(f1(prediction, [answer]))])
    return {"losses": np.array(losses), "exact match and F1": np.array(scores)}
