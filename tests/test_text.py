"""Text: the same verdicts as DPR's own matcher, golden and on random unicode, blank answers excepted."""

import random
import time
import unicodedata

import pytest
import regex

from tests.toy import golden_file
from utils import text
from utils.text import answer_position, exact_match, f1, has_answer, tokenize

FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE

# Characters that a careless short cut gets wrong: İ, Kelvin's K and ſ change length or alphabet with case;
# Angstrom's Å, é, ≠ and 한 are written otherwise in NFD; Σ has two lower cases; then white space that is not
# ASCII, invisible characters, lone accents, numbers that are not digits, and half of a surrogate pair.
ODD = "İiıI\u212akſsßẞ\u212båéÉe\u0301\u0338\u0323\u0345=≠≮<;\u037e`\u1fefΣσςΌόⅣⅳⒶⓐ²½٣１🚀👍🏽"
ODD += "\u00a0\u3000\u2028\u200b\u00ad\u0085\n\t\x00\ufeff\ud800.,'-_$()aA bB "


def plain_tokens(string):
    """The definition: cut NFD text with DPR's two classes, then lower every token on its own."""
    pattern = regex.compile(r"(?P<word>[\p{L}\p{N}\p{M}]+)|(?P<sign>[^\p{Z}\p{C}])", FLAGS)
    return [match.group().lower() for match in pattern.finditer(unicodedata.normalize("NFD", string))]


def plain_has_answer(passage, answers):
    """The definition: the tokens of an answer are a slice of the passage's; a blank answer is in nothing."""
    tokens = plain_tokens(passage)
    for wanted in map(plain_tokens, answers):
        slices = (tokens[i : i + len(wanted)] for i in range(len(tokens)))
        if wanted and wanted in slices:
            return True
    return False


def random_case(rng):
    """A passage of odd characters and words, and answers: slices of it in another case or form, or others."""
    words = ["the", "St. Olaf's", "Łódź", "Dvořák", "ΟΔΟΣ", "ΟΔΟΣ's", "x_y", "U.S.A.", "İzmir", "10th"]

    def piece():
        return rng.choice(words) if rng.random() < 0.4 else "".join(rng.choices(ODD, k=rng.randint(1, 4)))

    passage = "".join(piece() + rng.choice(["", " "]) for _ in range(rng.randint(0, 12)))
    answers = []
    for _ in range(rng.randint(0, 3)):
        start = rng.randint(0, len(passage))
        cut = passage[start : start + rng.randint(0, 8)] if rng.random() < 0.7 else piece()
        form = rng.choice(["NFC", "NFD", None])
        cut = unicodedata.normalize(form, cut) if form else cut
        answers.append(rng.choice([str.upper, str.lower, str.strip, str.swapcase])(cut))
    return passage, answers


@pytest.mark.parametrize("mode", ["string", "regex"])
def test_has_answer_golden(mode):
    """DPR's own verdicts; `regex` are CuratedTREC's patterns, with their flags and their broken ones."""
    cases = [case for case in golden_file("has_answer")["cases"] if case["mode"] == mode]
    assert len(cases) > 100
    for case in cases:
        expected = case.get("expected_without_empty_answers", case["expected"])
        assert has_answer(case["passage"], case["answers"], mode == "regex") == expected, ascii(case)


def test_tokens_golden():
    for case in golden_file("tokens")["cases"]:
        assert tokenize(case["text"]) == case["tokens"], ascii(case)


def test_exact_match_golden():
    """DPR's own reader score; accents are not normalised here. F1 forgives more, never less."""
    for case in golden_file("exact_match")["cases"]:
        assert exact_match(case["prediction"], case["answers"]) == case["expected"], ascii(case)
        score = f1(case["prediction"], case["answers"])
        assert 0 <= score <= 1 and (score == 1 or not case["expected"]), ascii(case)


def test_every_character_is_tokenised_as_defined():
    """Lowering first and cutting then gives the tokens of cutting first, for each character of unicode."""
    for with_sigma in (False, True):  # why: a text with a capital sigma takes another path
        string = " ".join(chr(code) for code in range(0x110000) if with_sigma or chr(code) != "Σ")
        assert tokenize(string) == plain_tokens(string)


def test_every_character_with_ascii_in_it_is_found():
    """Whatever NFD and case make of a character beside letters, the short cut does not miss it."""
    forms = [(chr(code), unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)]
    some = [char for char, form in forms if any(c.isascii() for c in form.lower())]
    assert len(some) > 300
    for char in some:
        for passage in (f"ab{char}cd", f"{char}cd", f"ab{char}", f"kk{char}kk"):
            for answer in [passage, " ".join(plain_tokens(passage)), *plain_tokens(passage)]:
                assert has_answer(passage, [answer]), ascii((passage, answer))


def test_has_answer_is_the_plain_definition():
    """20,000 hard unicode cases: no short cut changes a verdict, and the position agrees with the verdict."""
    rng = random.Random(0)
    verdicts = []
    for _ in range(20_000):
        passage, answers = random_case(rng)
        verdicts.append(plain_has_answer(passage, answers))
        assert has_answer(passage, answers) == verdicts[-1], ascii((passage, answers))
        position = answer_position(passage, answers)
        assert (position is not None) == verdicts[-1], ascii((passage, answers))
        if position:
            shown = passage[slice(*position)]
            assert plain_has_answer(shown, answers), ascii((passage, answers, shown))
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8  # why: a test of one verdict only could not fail


@pytest.mark.parametrize(
    "passage, answer, expected",
    [
        ("born in the U. S.A.", "u.s.a.", True),  # white space between tokens does not count
        ("a category of", "cat", False),  # only whole words
        ("x_y", "x", True),  # an underscore is a sign, not a letter
        ("at the Cafe\u0301", "CAFÉ", True),  # two ways to write é
        ("at the cafe\u0301", "cafe", False),  # and it is not e
        ("200 \u212a", "200 k", True),  # Kelvin's sign is a K
        ("a ≠ b", "=", True),  # NFD takes the stroke off the equals sign
        ("ΟΔΟΣ's", "οδος", True),  # Σ at the end of a token is ς, though the text goes on
        ("a' Σ", "ς", False),  # alone it is σ
    ],
)
def test_has_answer_by_hand(passage, answer, expected):
    """What counts as the same token."""
    assert has_answer(passage, ["nothing", answer]) is expected


@pytest.mark.parametrize("blank", ["", " \t", "\u200b", "\u00ad\u00a0"])
def test_a_blank_answer_matches_nothing(blank):
    """In the reference codes a blank answer is a free hit for every passage."""
    assert not has_answer("any passage", [blank])
    assert answer_position("any passage", [blank]) is None
    assert has_answer("any passage", [blank, "passage"])
    assert not has_answer("any passage", ["", "  "], regex=True)


def test_failing_patterns_are_misses_and_counted(monkeypatch):
    """A regular expression that hangs or does not compile costs TIMEOUT seconds, not the run."""
    monkeypatch.setattr(text, "TIMEOUT", 0.05)
    monkeypatch.setattr(text, "regex_failures", type(text.regex_failures)())
    hangs, broken, start = "(a|aa)+$", "(unclosed", time.process_time()
    assert not has_answer("a" * 60 + "!", [hangs, broken], regex=True)
    assert has_answer("a" * 60 + "! 1984", [hangs, broken, r"\d{4}"], regex=True)
    assert text.regex_failures == {(hangs, "timed out"): 2, (broken, "does not compile"): 2}
    assert time.process_time() - start < 2


def test_answer_position_by_hand():
    """The leftmost answer, the longest of those that start there, in characters of the passage as it is."""
    passage = "Ångström: the Cafe\u0301 de Flore, café"
    start, end = answer_position(passage, ["flore", "café", "CAFÉ de"])
    assert passage[start:end] == "Cafe\u0301 de"
    assert answer_position("Åé한", ["åé한"]) == (0, 3)


def test_exact_match_by_hand():
    """An article leaves a blank behind; only a whole word is an article."""
    assert exact_match("The  U.S. Navy.", ["army", "us navy"])
    assert exact_match("1914–the–1918", ["1914– –1918"]) and not exact_match("1914–the–1918", ["1914––1918"])
    assert not exact_match("theatre", ["atre"]) and not exact_match("navy", [])


def test_f1_by_hand():
    """Overlap counts words as often as they occur; articles, case and punctuation do not count."""
    assert f1("The U.S. Navy!", ["us navy"]) == 1.0
    assert f1("navy seals", ["the navy", "army"]) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert f1("a b b", ["b c"]) == pytest.approx(1 / 2)  # `a` is an article; one b of two is right
    assert f1("army", ["navy"]) == 0.0
    assert f1("army", []) == 0.0
    assert f1("the", ["navy"]) == 0.0 and f1("the", ["a"]) == 1.0  # nothing left on one side, on both
