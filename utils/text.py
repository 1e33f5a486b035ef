"""
Words of questions, passages and answers: does a passage hold an answer, exact match, F1. No torch.

`has_answer` decides what a retriever found: NFD, lower case, the answer's tokens in a row among the passage's
(DPR, dpr/data/qa_validation.py). Accents count: "Beyonce" is not in "Beyoncé". `exact_match` and `f1` score a
reader (SQuAD): ASCII punctuation and articles are deleted, no unicode normalisation.

Differs from DPR: (1) a blank answer matches nothing; there it matches every passage. (2) An answer that is a
regular expression (CuratedTREC) is given TIMEOUT seconds per passage. (3) Passages are not tokenised, which
gives the same results (tests/test_text.py) many times faster (tests/bench/bench_answer_matching.py).
"""

import string
import unicodedata
from collections import Counter
from functools import lru_cache

import regex as re  # trap: the standard re has no \p{...}, no timeout, and other word borders

WORD = r"[\p{L}\p{N}\p{M}]"  # letters, digits, accents
GAP = r"[\p{Z}\p{C}]"  # white space, invisible characters
TOKEN = re.compile(WORD + r"+|[^\p{Z}\p{C}]")  # a word, or one sign
ARTICLE = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
TIMEOUT = 1.0  # seconds; an ordinary search takes microseconds, `(a|aa)+$` can take years

# {(pattern, "does not compile" | "timed out"): searches} since the start, for the caller to report
regex_failures = Counter()


def report_regex_failures():
    """
    Print a warning for every regex answer that did not compile or took too long, each counted as not found.
    """
    for (pattern, why), times in regex_failures.items():
        print(f"warning: the regex answer {pattern!r} {why} ({times} times); counted as not found")


def _normalise(text):
    """NFD and lower case. Word characters stay word characters, so tokens can be cut before or after."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFD", text)
    # trap: the lower case of a capital sigma depends on its neighbours, across the borders of its token
    return TOKEN.sub(lambda token: token[0].lower(), text) if "Σ" in text else text.lower()


def tokenize(text):
    """Lower-case NFD tokens, DPR's classes: tokenize("St. Olaf's") is ["st", ".", "olaf", "'", "s"]."""
    return TOKEN.findall(_normalise(text))


@lru_cache(1 << 12)
def _probe(answer):
    """
    Bytes that every passage with the answer contains, in lower-case UTF-8; b"" when there are none to name.

    _probe("Dvořák, Antonín") is b"anton". Why it is safe: a run of ASCII letters and digits with no accent
    after it can only come from just these characters, in either case. (Test: all of unicode.)
    """
    # trap: Kelvin's sign, U+212A, is one k; all else that turns into ASCII letters turns into letter + accent
    runs = [run for token in tokenize(answer) for run in re.findall("[a-jl-z0-9]+(?![^a-z0-9])", token)]
    return max(runs, key=len, default="").encode()


@lru_cache(1 << 12)
def _token_pattern(answer):
    """
    Compiled pattern that finds the answer's tokens in a row, whole, in normalised text.

    "u.s. navy" -> u GAP* . GAP* s GAP* . GAP* navy; with no word character before the u and after the y.
    """
    tokens = tokenize(answer)
    if not tokens:
        return re.compile("(?!)")  # why: a blank answer matches nothing, not everything
    is_word = [re.match(WORD, token) is not None for token in tokens]
    pattern = f"(?<!{WORD})" if is_word[0] else ""
    for i, token in enumerate(tokens):
        if i:
            pattern += GAP + ("+" if is_word[i - 1] and is_word[i] else "*")
        pattern += re.escape(token)
    return re.compile(pattern + (f"(?!{WORD})" if is_word[-1] else ""))


@lru_cache(1 << 12)
def _compiled(pattern):
    """The regular expression, compiled with DPR's flags; None when it is not one."""
    try:
        return re.compile(unicodedata.normalize("NFD", pattern), re.IGNORECASE | re.UNICODE | re.MULTILINE)
    except (re.error, RecursionError):
        return None


def _find_regex(text, pattern):
    """Match of a regular expression in NFD text, or None; failures are counted in regex_failures."""
    if not pattern.strip():
        return None
    compiled = _compiled(pattern)
    if compiled is None:
        regex_failures[pattern, "does not compile"] += 1
        return None
    try:
        return compiled.search(text, timeout=TIMEOUT)
    except TimeoutError:
        regex_failures[pattern, "timed out"] += 1
        return None


def has_answer(passage, answers, regex=False):
    """
    True when the passage holds one of the answers (list of str), as tokens in a row.

    regex: the answers are regular expressions (CuratedTREC), searched in NFD text regardless of case.
    """
    if regex:
        text = unicodedata.normalize("NFD", passage)
        return any(_find_regex(text, answer) is not None for answer in answers)
    # why: most passages hold no answer, which a look at the bytes proves before any NFD or pattern
    raw = passage.encode("utf-8", "surrogatepass").lower()  # why bytes: lower() is then ASCII's
    return any(_probe(a) in raw and _token_pattern(a).search(_normalise(passage)) for a in answers)


def answer_position(passage, answers):
    """(start, end) of the leftmost answer: passage[start:end]. None exactly when not has_answer()."""
    text = _normalise(passage)
    spans = [match.span() for answer in answers if (match := _token_pattern(answer).search(text))]
    if not spans:
        return None
    start, end = min(spans, key=lambda span: (span[0], -span[1]))
    # why: NFD writes é as two characters; origin[i] is the one of the passage that the i-th came from
    origin = [i for i, char in enumerate(passage) for _ in unicodedata.normalize("NFD", char)]
    return origin[start], origin[end - 1] + 1


def _squad_words(text):
    """Words without case, ASCII punctuation and articles: "The U.S. Navy" -> ["us", "navy"]."""
    return ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def exact_match(prediction, answers):
    """True when the prediction has the same words as one of the answers (list of str)."""
    return any(_squad_words(prediction) == _squad_words(answer) for answer in answers)


def f1(prediction, answers):
    """Harmonic mean of word precision and recall, 0 to 1, against the answer that fits best (SQuAD)."""
    best, predicted = 0.0, _squad_words(prediction)
    for gold in map(_squad_words, answers):
        if not predicted or not gold:
            best = max(best, float(predicted == gold))  # from: SQuAD 2.0; so an exact match is always 1
        else:
            common = (Counter(predicted) & Counter(gold)).total()
            best = max(best, 2 * common / (len(predicted) + len(gold)))
    return best
