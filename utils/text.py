"""
Words of questions, passages and answers: does a passage hold an answer, exact match, F1. No torch.

`has_answer` decides what a retriever found: NFD, lower case, the answer's tokens in a row among the passage's
(DPR, dpr/data/qa_validation.py). Accents count: "Beyonce" is not in "Beyoncé". `exact_match` and `f1` score a
reader (SQuAD): ASCII punctuation and articles are deleted, without any unicode normalisation.

Chinese, Japanese, Thai, Lao, Khmer and Burmese write no spaces, and Korean ties particles to its words. DPR's
tokens are whole runs of letters, so it finds hardly an answer there. Here an answer may begin and end inside
such a run (Korean: only end), but not inside a syllable. BM25 indexes such runs by pairs of characters.
"""

import re as standard_re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

import regex as re  # trap: the standard re has no \p{...}, no timeout, and other word borders

WORD = r"[\p{L}\p{N}\p{M}]"  # letters, digits, accents
# scripts whose words stand without spaces, and the signs that kana share
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ーｰ\u3099\u309A"
SPACED = rf"(?:(?![{UNSPACED}]){WORD})"  # a word character of the other scripts
CLOSED = rf"(?:(?!\p{{Hangul}}){SPACED})"  # also not Korean, which ties particles to the end of a word
# what goes on with a syllable: marks, Korean vowels and last consonants, Thai and Lao vowels, small kana
GOES_ON = r"[\p{M}\u1160-\u11FFะาำๅະາຳぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮー]"
LEADING_VOWEL = "[เแโใไເແໂໃໄ]"  # Thai and Lao write it before the consonant with which its syllable begins
GAP = r"[\p{Z}\p{C}]"  # white space, invisible characters
TOKEN = re.compile(WORD + r"+|[^\p{Z}\p{C}]")  # a word, or one sign
ARTICLE = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# differs: DPR has no limit. A search takes microseconds, but one for `(a|aa)+$` can take years
TIMEOUT = 1.0  # seconds for an answer and a passage

# the words of BM25: bm25s's pattern, c++ and c#; RUN for text with the scripts and signs of PAIRED (`words`)
USUAL_WORD = standard_re.compile(r"\b\w\w+\b|\b[a-z](?:\+\+|#)(?!\w)")
PAIRED = rf"[{UNSPACED}\p{{Hangul}}]"
PAIRED_OR_MARK = re.compile(rf"{PAIRED}|\p{{M}}")
RUN = re.compile(
    rf"(?P<pairs>(?:{PAIRED}\p{{M}}*)+)"
    rf"|(?:(?!{PAIRED})[\p{{L}}\p{{N}}\p{{M}}_]){{2,}}"
    rf"|(?<!{WORD})[a-z](?:\+\+|#)(?!{WORD})"
)

# {(pattern, "does not compile" or "timed out"): how many searches}, for the caller to report
regex_failures = Counter()


def report_regex_failures():
    """Print a warning for every regex answer that did not compile or took too long."""
    for (pattern, why), times in regex_failures.items():
        print(f"warning: the regex answer {pattern!r} {why} ({times} times); counted as not found")


def _normalise(text):
    """Return a text in NFD and lower case. Its tokens are those of the text, each in lower case."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFD", text)
    # trap: the lower case of a capital sigma depends on its neighbours, even on those of another token
    return TOKEN.sub(lambda token: token[0].lower(), text) if "Σ" in text else text.lower()


def tokenize(text):
    """Return DPR's tokens, lower-case NFD: tokenize("St. Olaf's") is ["st", ".", "olaf", "'", "s"]."""
    return TOKEN.findall(_normalise(text))


def words(text):
    """
    Return the words that BM25 counts, in lower case: "Ada's C++ 北京大学" -> [ada, c++, 北京, 京大, 大学].

    A word is a run of two or more letters, digits and accents; "c++" and "c#" are words too. Of a run without
    spaces and of a Korean word each pair of neighbouring characters counts (as in Lucene's CJKAnalyzer).
    """
    text = unicodedata.normalize("NFC", text.lower())
    if text.isascii() or not PAIRED_OR_MARK.search(text):
        return USUAL_WORD.findall(text)
    found = []
    for match in RUN.finditer(text):
        if not match["pairs"]:
            found.append(match[0])
            continue
        characters = re.findall(r"\X", match[0])  # with their marks
        pairs = [first + second for first, second in zip(characters, characters[1:], strict=False)]
        found += pairs or characters
    return found


@lru_cache(1 << 12)
def _probe(answer):
    """
    Return bytes that every passage with the answer contains, in lower-case UTF-8; b"" if none are certain.

    _probe("Dvořák, Antonín") is b"anton". why it is safe: a run of ASCII letters and digits without an accent
    after it can only come from these characters themselves, in either case. (A test tries all of unicode.)
    """
    # trap: Kelvin's sign, U+212A, becomes a k; all else that becomes an ASCII letter has an accent after it
    runs = [run for token in tokenize(answer) for run in re.findall("[a-jl-z0-9]+(?![^a-z0-9])", token)]
    return max(runs, key=len, default="").encode()


@lru_cache(1 << 12)
def _token_pattern(answer):
    """
    Return the compiled pattern that finds the answer's tokens in a row in a normalised text.

    "u.s. navy" -> u GAP* . GAP* s GAP* . GAP* navy, with no word character before the u and after the y.
    """
    tokens = tokenize(answer)
    if not tokens:
        return re.compile("(?!)")  # differs: matches nothing; in DPR a blank answer matches every passage

    # differs: in DPR a word ends only where its run of letters does, in every script
    # why not one character alone: 北 in 北京 is hardly ever the word that is meant
    inside = len(re.findall(r"\X", "".join(tokens))) > 1
    pattern = ""
    if re.match(WORD, tokens[0]):
        pattern = f"(?<!{_before(tokens[0]) if inside else WORD})"
    for before, token in zip(["", *tokens], tokens, strict=False):
        if before:
            two_words = re.match(CLOSED, before[-1]) and re.match(CLOSED, token)
            pattern += GAP + ("+" if two_words else "*")
        pattern += re.escape(token)
    last = tokens[-1][-1]
    if re.match(PAIRED, last):
        pattern += f"(?!{GOES_ON if inside else WORD})"
    elif re.match(WORD, last):
        pattern += f"(?!{CLOSED})"
    return re.compile(pattern)


def _before(token):
    """Return the pattern of the characters that cannot stand before the first word of an answer."""
    if re.match(r"\p{Hangul}", token):
        return r"\p{Hangul}"
    return SPACED if re.match(SPACED, token) else LEADING_VOWEL


@lru_cache(1 << 12)
def _compiled(pattern):
    """Return the regular expression, compiled with DPR's flags; None if it is not one."""
    try:
        return re.compile(unicodedata.normalize("NFD", pattern), re.IGNORECASE | re.UNICODE | re.MULTILINE)
    except (re.error, RecursionError):
        return None


def _find_regex(text, pattern):
    """Return the match of a regular expression in an NFD text, or None. Failures go to regex_failures."""
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
    Return whether the passage holds one of the answers (list of str), as tokens in a row.

    regex: the answers are regular expressions (CuratedTREC). They are searched in NFD text in either case.
    """
    if regex:
        text = unicodedata.normalize("NFD", passage)
        return any(_find_regex(text, answer) is not None for answer in answers)
    # differs: DPR tokenises every passage. Most hold no answer, which a look at their bytes proves many times
    # faster (results/bench/answers.txt). The verdicts are the same (tests/test_text.py).
    raw = passage.encode("utf-8", "surrogatepass").lower()  # why bytes: lower() is then ASCII's
    return any(_probe(a) in raw and _token_pattern(a).search(_normalise(passage)) for a in answers)


def answer_position(passage, answers):
    """Return (start, end) of the leftmost answer, passage[start:end]; None exactly when not has_answer()."""
    text = _normalise(passage)
    spans = [match.span() for answer in answers if (match := _token_pattern(answer).search(text))]
    if not spans:
        return None
    start, end = min(spans, key=lambda span: (span[0], -span[1]))
    # why: NFD writes é as two characters; origin[i] is the character of the passage that the i-th came from
    origin = [i for i, char in enumerate(passage) for _ in unicodedata.normalize("NFD", char)]
    return origin[start], origin[end - 1] + 1


def _squad_words(text):
    """Return the words without case, ASCII punctuation and articles: "The U.S. Navy" -> ["us", "navy"]."""
    return ARTICLE.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def exact_match(prediction, answers):
    """Return whether the prediction has the same words as one of the answers (list of str)."""
    return any(_squad_words(prediction) == _squad_words(answer) for answer in answers)


def f1(prediction, answers):
    """
    Return the harmonic mean of word precision and recall, 0 to 1, of the answer that fits best (SQuAD).

    As in SQuAD words stand between spaces: a Chinese answer is one word, right or wrong.
    """
    best = 0.0
    predicted = _squad_words(prediction)
    for gold in map(_squad_words, answers):
        if not predicted or not gold:
            best = max(best, float(predicted == gold))  # from: SQuAD 2.0. So an exact match is always 1
        else:
            common = (Counter(predicted) & Counter(gold)).total()
            best = max(best, 2 * common / (len(predicted) + len(gold)))
    return best
