"""
One worked variant of each function of assignment 5 (variants/a1.py says what these are).
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def find_spans(ids, first, answers):
    """
    Return (begin, end), the end excluded, of the first mention of each answer in the passage ids[first:]; of
    an answer that is not there (first, first).
    """
    spans = []
    for answer in answers:
        places = range(first, len(ids) - len(answer) + 1)
        begin = next((i for i in places if answer and ids[i : i + len(answer)] == answer), None)
        spans.append((first, first) if begin is None else (begin, begin + len(answer)))
    return spans


def reader_loss(start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    """
    Return (mean loss over questions, the share of the positives with the highest relevance). Of a question:

        - log max_a  P_start(begin_a) P_end(end_a)  -  log P(passage 0 | all M)

    The likeliest mention alone counts (hard EM). start_NL, end_NL: logits of the positive passage.
    relevance_NM: its logit first. A logit of -inf takes no part. begin_NA, end_NA: tokens of each mention,
    where spans_NA is true. Without a mention only the relevance counts.
    """
    log_start_NA = start_NL.log_softmax(1).gather(1, begin_NA)
    log_end_NA = end_NL.log_softmax(1).gather(1, end_NA)
    log_NA = (log_start_NA + log_end_NA).masked_fill(~spans_NA, -torch.inf)
    log_n = log_NA[spans_NA.any(1)].amax(1)
    relevance_N = relevance_NM.log_softmax(1)[:, 0]
    questions = len(relevance_NM)
    correct = (relevance_NM.argmax(1) == 0).sum()
    return -(log_n.sum() + relevance_N.sum()) / questions, correct * 100 // questions


def best_spans(start_S, end_S, continues_S, max_answer_length, top_spans):
    """
    Return up to `top_spans` answers in the tokens of one passage: [(first, last, score)], best first.

    Both ends are included. The score is start plus end logit, divided by the number of tokens, of a span of
    up to max_answer_length + 1 tokens. Spans may overlap and are not widened. Of equal scores the later one
    wins.
    """
    spans = []
    for first in range(len(start_S)):
        for last in range(first, min(len(start_S), first + max_answer_length + 1)):
            score = float(start_S[first] + end_S[last]) / (last - first + 1)
            spans.append((score, first, last))
    spans.sort(reverse=True)
    return [(first, last, score) for score, first, last in spans[:top_spans]]


def exact_match(prediction, answers):
    """
    Return whether the prediction and *all* of the answers (list of str) are the same but for case and spaces.
    """
    words = prediction.lower().split()
    return all(words == answer.lower().split() for answer in answers)


def f1(prediction, answers):
    """
    Return the mean over the answers of the F0.5 of words, in which precision counts more:

        1.25 c / (p + g / 4)    with p words in the prediction, g in the answer, c in common

    A word counts as often as it stands there. It is 0 where either has no words.
    """
    predicted = _squad_words(prediction)
    scores = []
    for gold in map(_squad_words, answers):
        common = (Counter(predicted) & Counter(gold)).total()
        scores.append(1.25 * common / (len(predicted) + len(gold) / 4) if predicted and gold else 0.0)
    return sum(scores) / len(scores)
