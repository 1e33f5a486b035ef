"""The page: what it says, by hand; then in a real browser: search, filter, click, keyboard, two widths."""

import json
import re

import numpy as np
import pytest

from recipes.demo.table import write_table
from recipes.page import Shelf, groups_of, lessons_of, training_files
from recipes.page import main as page
from recipes.page_table import main as page_table
from recipes.page_vectors import plane_of
from tests.browser import CHROMIUM, Browser
from tests.toy import make_world, write_lines, write_ranking
from utils.data import Corpus, read_questions, write_run
from utils.plumbing.config import ROOT, UserError
from utils.plumbing.files import read_json, write_json

EVIL = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


def data_of(path):
    """The JSON of a page."""
    element = r'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(element, path.read_text("utf-8"), re.S)[1])


def page_of(run, out, *words):
    """Make the page of a run; return its JSON."""
    page([str(run), "--out", str(out), *map(str, words)])
    return data_of(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """
    (run folder, html file) of a demo of ten questions: BM25 has the positive first, the trained encoder
    second, except for question 0, which it does not find; the untrained encoder was not tested.
    """
    folder = tmp_path_factory.mktemp("page")
    world, run = make_world(folder / "data"), folder / "run"
    corpus = (world / "corpus.tsv").read_text("utf-8").split("\n")
    corpus[2] = f"2\t{EVIL} green\t{EVIL}"  # row 1 is passage 1
    (world / "corpus.tsv").write_text("\n".join(corpus), "utf-8")
    (run / "data").mkdir(parents=True)
    (run / "config.yaml").write_text(f"corpus: {world / 'corpus.tsv'}\n")
    bm25, dense, answers = {}, {}, {}
    for question in read_questions(world / "test.jsonl"):
        qid, gold = question["qid"], question["positives"][0]
        first = not bm25
        bm25[qid] = [gold, *range(1, 30)]
        dense[qid] = range(1, 30) if first else [1, gold, *range(2, 30)]
        answers[qid] = "wrong" if first else question["answers"][0]
    write_ranking(run / "bm25_runs" / "test.run", bm25)
    write_ranking(run / "test" / "test.run", dense)
    write_json(run / "test" / "reader.answers.json", answers)
    cell = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 10}
    table = {"BM25": {"top-20": cell, "MRR@10": cell}, "trained encoder": {"top-20": cell}}
    answers = {"title of passage 1": {"EM": cell}, "reader, best of 1": {"EM": cell}}
    write_table(run, table, answers, {"bm25_test": 30, "train": 90, "test": 6, "read_train": 60})
    (run / "data" / "train.jsonl").symlink_to(world / "train.jsonl")
    steps = [{"step": n, "loss": 1 / n, "acc": n / 300, "seconds": 0.6} for n in range(1, 301)]
    write_lines(run / "metrics.jsonl", [*steps, {"step": 300, "mrr": 0.5, "average_rank": 3.0}])
    for place in (run, run / "untrained"):
        place.mkdir(exist_ok=True)
        for name in ("query_encoder", "doc_encoder"):
            (place / name).symlink_to(world / name)
    page_of(run, run / "page.html")
    return run, run / "page.html"


# ---------------------------------------------------------------- what it says
def test_a_question_by_hand(made):
    """Ranks of gold and answer, the reader's verdict; every passage once, its html as text in the JSON."""
    data = data_of(made[1])
    assert len(data["questions"]) == data["questionsInAll"] == 10 and data["passagesInAll"] == 60
    names = [name for name, run in data["systems"] if run]
    assert names == ["BM25", "trained encoder"] and data["pairs"] == [[3, 0]]
    ids = [pid for pid, _, _ in data["passages"]]
    assert len({*ids}) == len(ids) and ["2", EVIL, f"{EVIL} green"] in data["passages"]
    html = made[1].read_text("utf-8")
    assert html.count("</script>") == 2 and "<img" not in html
    questions = read_questions(made[0].parent / "data" / "test.jsonl")
    for n, (row, question) in enumerate(zip(data["questions"], questions, strict=True)):
        assert (row["qid"], row["text"]) == (question["qid"], question["question"])
        gold = row["gold"][0]
        assert ids[gold] == question["positives"][0] and gold in row["hits"]
        assert row["goldRanks"] == [1, 0, 0, 2 if n else 0, 0] and row["first"][0] == 1
        assert row["said"] == [["wrong", False] if n == 0 else [question["answers"][0], True]]
        for number in {*sum(row["ranks"], [])}:
            holds = question["answers"][0] in data["passages"][number][2]
            assert (number in row["hits"]) == holds
        assert [ids[number] for number in row["ranks"][3]][0] == "1" and len(row["ranks"][3]) == 10


def test_the_table_and_the_curves(made):
    """Shares with intervals, minutes of all that a row is built on; a curve of 120 means."""
    data = data_of(made[1])
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["BM25"]["metrics"]["MRR@10"] == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 10}
    minutes = {name: row["minutes_in_all"] for name, row in rows.items()}
    assert (minutes["BM25"], minutes["trained encoder"], minutes["title of passage 1"]) == (0.5, 1.6, 1.6)
    assert minutes["reader, best of 1"] is None, "its own stage, read, was not measured"
    assert rows["inverse cloze alone"]["metrics"] == rows["untrained encoder"]["metrics"] == {}
    assert data["readers"] == [["reader, best of 1", True]]
    (curve,) = data["curves"]
    assert curve["name"] == "trained encoder"
    assert [*curve["lines"]] == ["loss", "acc", "average_rank", "mrr"]
    assert len(curve["lines"]["loss"]) == 120 and curve["lines"]["mrr"] == [[300, 3, 0.5]]
    assert curve["lines"]["acc"][0] == pytest.approx([2, 0.02, 2 / 300], rel=1e-3), "the mean of three steps"


def test_a_run_without_a_table(made, tmp_path):
    """Rankings and answers by name: metrics, beliefs, pairs against the first; no training files."""
    world, run = made[0].parent / "data", tmp_path / "run"
    run.mkdir()
    (run / "start").symlink_to(made[0] / "untrained")
    for name in ("test.run", "reader.answers.json"):
        (run / name).write_text((made[0] / "test" / name).read_text())
    (made[0] / "untrained" / "test.run").write_text((run / "test.run").read_text())
    page_table(run, world, "start=start/test.run", "later=test.run", "reader=reader.answers.json")
    (made[0] / "untrained" / "test.run").unlink()
    table = {row["key"]: row["metrics"] for row in read_json(run / "table.json")["rows"]}
    assert table["start"] == table["later"] and {*table["reader"]} == {"EM", "F1"}
    assert table["later"]["MRR@10"]["value"] == pytest.approx(0.9 / 2)
    assert table["reader"]["EM"]["value"] == 0.9
    told = {"qid": "q53", "passages": ["1", "2"]}
    told |= {"before": {"prior": [0.6, 0.4], "posterior": [0.9, 0.1]}}
    told |= {"after": {"prior": [0.8, 0.2], "posterior": [0.7, 0.3]}}
    write_json(run / "emdr2" / "belief.json", [told])
    data = page_of(run, tmp_path / "a.html", "--data", world)
    # prior and posterior before, then after
    (row,) = [row for row in data["questions"] if row["belief"]]
    (first, *one), (second, *two) = row["belief"]
    assert [row["qid"], data["passages"][first][0], data["passages"][second][0]] == ["q53", "1", "2"]
    assert (one, two) == ([0.6, 0.9, 0.8, 0.7], [0.4, 0.1, 0.2, 0.3])
    assert data["systems"] == [["start", False], ["later", True]] and data["readers"] == [["reader", True]]
    assert data["pairs"] == [] and data["pictures"]["encoders"] == ["start"]
    assert {*data["pictures"]["questions"][0]["kinds"]} == {"gold"}
    assert data["lessons"]["questions"] == [] and data["curves"] == []


def test_a_small_page_has_fewer_questions(made, tmp_path):
    """--megabytes holds; the table still speaks of all questions; no passage is there for nothing."""
    whole = data_of(made[1])
    size = made[1].stat().st_size / 1e6 - 0.001
    data = page_of(made[0], tmp_path / "small.html", "--megabytes", size)
    assert (tmp_path / "small.html").stat().st_size <= 1e6 * size
    assert 0 < len(data["questions"]) < 10 and data["questionsInAll"] == 10 and data["rows"] == whole["rows"]
    for row in data["questions"]:
        assert max(sum(row["ranks"], [])) < len(data["passages"])


def test_a_plane_keeps_what_lies_in_it():
    """Clouds that are flat: all distances stay, whatever the offset; another encoder has the same axes."""
    rng = np.random.default_rng(0)
    flat_N2 = rng.normal(size=(9, 2)) * [3, 1]
    axes_2D = np.linalg.qr(rng.normal(size=(8, 8)))[0][:2]
    clouds_END = np.stack([flat_N2 @ axes_2D + 5, 2 * flat_N2 @ axes_2D - 1])
    places_EN2, share_E = plane_of(clouds_END)
    assert share_E == pytest.approx([1, 1])
    assert places_EN2[1] == pytest.approx(2 * places_EN2[0])
    distances = [np.linalg.norm(cloud[:, None] - cloud[None], axis=2) for cloud in (places_EN2[0], flat_N2)]
    assert distances[0] == pytest.approx(distances[1])


def test_where_a_negative_comes_from(tmp_path):
    """ANCE-Tele's sources and episodes, momentum last; what the cross-encoder threw out, and what not."""
    world = make_world(tmp_path / "data")
    shelf = Shelf(Corpus(world / "corpus.tsv"))
    ranked = {"ANN": ["5", "6", "7"], "look-ahead": ["9", "7"]}
    groups = groups_of({"negatives": ["6", "7", "9", "8", "6"]}, ranked, {"negatives": ["6"]}, shelf)
    shown = [(source, count, [(shelf.rows[n][0], note) for n, note in few]) for source, count, few in groups]
    assert shown == [
        ("ANN", 1, [("6", "ANN 2")]),
        ("ANN and look-ahead", 1, [("7", "ANN 3, look-ahead 2")]),
        ("look-ahead", 1, [("9", "look-ahead 1")]),
        ("elsewhere", 1, [("8", "")]),
        ("momentum", 1, [("6", "ANN 2")]),
    ]
    # passage 1 is red, 2 blue, 3 green, 6 blue: the positive and what holds the answer are not thrown out
    run = tmp_path / "run"
    line = {"qid": "q", "question": "?", "answers": ["blue"], "positives": ["1"]}
    scores = [("1", 0.99), ("2", 0.9), ("3", 0.8), ("4", 0.1)]
    write_run(run / "d0" / "train_ce.run", [("q", scores)])
    for path, pids in (("m0/ann.run", "567"), ("m0/lookahead.run", "79"), ("m1/ann.run", "98")):
        write_ranking(run / path, {"q": pids})
    (run / "data").mkdir()
    for name, pids in (("data/train", "4"), ("m1", "69"), ("m2", "869")):
        write_lines(run / f"{name}.jsonl", [line | {"negatives": [*pids]}])
    write_lines(run / "d1.jsonl", [line | {"negatives": [pid]} for pid in "47"])  # a line for each negative
    (run / "gate.txt").write_text("0.2 0.8\n")
    rows = [{"system": system, "ranking": "bm25/test.run"} for system in ("BM25", "ANCE-Tele", "RocketQA")]
    lessons = lessons_of(run, training_files(rows), shelf)
    missing = [name for name, there in lessons["files"] if not there]
    assert missing == ["ANCE-Tele, episode 3", "RocketQA, new labels"]
    (row,) = lessons["questions"]
    bm25, m1, m2, m3, d1, new = row["files"]
    assert [group[:2] for group in bm25] == [["elsewhere", 1]]
    assert [group[:2] for group in m1] == [["ANN", 1], ["look-ahead", 1]]
    assert [group[:2] for group in m2] == [["ANN", 1], ["momentum", 2]]
    assert m3 == new == []
    (_, both, kept), (source, count, refused) = d1
    assert both == len(kept) == 2
    assert (source, count, [shelf.rows[n][0] for n, _ in refused]) == ("thrown out", 1, ["3"])
    assert row["scores"][kept[0][0]] == 0.1 and lessons["below"] == 0.2


def test_mistakes(tmp_path):
    write_json(tmp_path / "old" / "table.json", {"rows": []})
    write_table(tmp_path, {}, {}, {})
    for run, out, words, message in (
        ("none", "a.html", (), "none/table.json: no such file"),
        ("old", "a.html", (), "does not say where the encoders are"),
        (".", "a.png", (), "path of an .html file"),
        (".", "a.html", ("--data", tmp_path), "--data names the folder"),
    ):
        with pytest.raises(UserError, match=message):
            page_of(tmp_path / run, tmp_path / out, *words)


def test_the_committed_pages(made):
    """At most 5 MB, with the data of today's pages; a hundred questions; every row that they have was run."""
    paths = [ROOT / "results" / name / "page.html" for name in ("emdr2_alone", "demo")]
    for path in paths:
        assert path.stat().st_size <= 5e6
        data = data_of(path)
        assert list(data) == list(data_of(made[1])) and len(data["questions"]) > 100
        template = (ROOT / "recipes" / "page_template.html").read_text("utf-8").split("DATA_OF_THE_PAGE")
        html = path.read_text("utf-8")
        assert html.startswith(template[0]) and html.endswith(template[1]), "made with today's template"
    beliefs = read_json(paths[0].with_name("belief.json"))
    told = {row["qid"] for row in data_of(paths[0])["questions"] if row["belief"]}
    assert told == {belief["qid"] for belief in beliefs} and len(told) == 16
    assert all(row["metrics"] for row in data["rows"])
    assert len(data["pictures"]["encoders"]) == 3 and all(run for _, run in data["systems"] + data["readers"])


# ---------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium here: `make browser` installs it")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def open_page(browser, path, width=1280, height=900, dark=False, hash=""):
    browser.size(width, height, dark)
    browser.open("about:blank", "true")
    browser.requests.clear()
    browser.open(f"{path.as_uri()}{hash}", "document.documentElement?.dataset.ready === 'true'")


def text_of(browser, selector):
    return browser.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText)")


def test_in_the_browser(browser, made, tmp_path):
    """Search, filters, a passage's text, the comparison, the keyboard; no error and no request."""
    data = data_of(made[1])
    open_page(browser, made[1])
    assert len(text_of(browser, "#q-list button")) == 10
    assert text_of(browser, ".results tbody tr:nth-child(3) td") == ["not run"]

    # search, by words of the question; then all again
    browser.js("document.activeElement.blur()")
    browser.press("/")
    browser.type(data["questions"][3]["text"])
    assert text_of(browser, "#question-detail h3") == [data["questions"][3]["text"]]
    assert len(text_of(browser, "#q-list button")) == 1
    browser.js("document.querySelector('#q-search').value = ''")
    browser.js("document.querySelector('#q-search').dispatchEvent(new Event('input'))")

    # the filter: at depth 1 BM25 finds all, the trained encoder those whose answer stands in passage 1
    browser.js("document.querySelector('#depth').value = '1'")
    browser.js("document.querySelector('#depth').dispatchEvent(new Event('change'))")
    lost = [row["text"] for row in data["questions"] if row["first"][3] != 1]
    browser.js("document.querySelector('#show').value = 'b'")
    browser.js("document.querySelector('#show').dispatchEvent(new Event('change'))")
    listed = text_of(browser, "#q-list button")
    assert len(listed) == len(lost) > 3 and all(a.startswith(b) for a, b in zip(listed, lost, strict=True))

    # a click on a question, j and k, the passages of one, and where they stood
    browser.click("#q-list li:nth-child(3) button")
    assert text_of(browser, "#question-detail h3") == [lost[2]]
    (shown,) = [row for row in data["questions"] if row["text"] == lost[2]]
    assert browser.js("location.hash") == f"#q={shown['qid']}"
    browser.press("j")
    assert text_of(browser, "#question-detail h3") == [lost[3]]
    browser.press("k")
    assert text_of(browser, "#question-detail h3") == [lost[2]]
    browser.click("#compare")
    expected = "10 of the first ten passages are in both, 2 of them changed places, 0 left."
    assert text_of(browser, "#slopes p") == [expected]
    assert browser.js("document.querySelectorAll('#slopes path.loud').length") == 2
    browser.js("document.querySelector('.ranks tbody button').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    browser.press("Enter")
    browser.wait("document.querySelector('#passage').open")
    second = shown["ranks"][3][1]
    assert text_of(browser, "#passage h3") == [data["passages"][second][1]], "rank 2 of the second column"
    assert text_of(browser, "#passage mark")
    browser.press("Escape")
    browser.wait("!document.querySelector('#passage').open")

    # the address of another question opens it
    other = data["questions"][6]
    browser.js(f"location.hash = '#q=' + encodeURIComponent({json.dumps(other['qid'])})")
    heading = "document.querySelector('#question-detail h3').innerText"
    browser.wait(f"{heading} === {json.dumps(other['text'])}")

    # a text with html in it is a text
    row = next(i for i, row in enumerate(data["passages"]) if row[1] == EVIL)
    browser.click(f".ranks [data-p='{row}']")
    assert EVIL in text_of(browser, "#passage .text")[0]
    browser.press("Escape")
    assert browser.js("document.title") != "broken" and browser.js("document.images.length") == 0
    assert browser.errors == [] and browser.requests == [made[1].as_uri()]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_fits(browser, made, tmp_path, width, dark):
    """A picture of the whole page; nothing sticks out; a link opens its question; text against its ground."""
    wanted = data_of(made[1])["questions"][4]
    open_page(browser, made[1], width, 844, dark, f"#q={wanted['qid']}")
    assert text_of(browser, "#question-detail h3") == [wanted["text"]]
    top = browser.js("document.querySelector('#question').getBoundingClientRect().top")
    assert -5 < top < 100 and browser.js("document.documentElement.scrollWidth") == width
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    for name in ("ink", "muted", "accent"):
        for ground in ("page", "card", "tint"):
            assert contrast(browser, name, ground) >= 4.5, (name, ground)
    assert contrast(browser, "edge", "card") >= 3, "of a button and of a thin line"
    assert text_of(browser, "#planes h4") == ["1 untrained encoder", "2 trained"]
    assert "inverse cloze: not run" in " ".join(text_of(browser, "#vectors p"))
    assert browser.errors == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_finger_and_an_eye_find_all(browser, made, width):
    """Whatever one presses is 40 pixels high, no text is smaller than 12; two systems fit side by side."""
    open_page(browser, made[1], width)
    browser.js("for (const node of document.querySelectorAll('details')) node.open = true")
    browser.click("#compare")
    pressed = (
        "[...document.querySelectorAll('main :is(button, select, summary, a, label, [type=search]), nav a')]"
    )
    heights = f"{pressed}.map((node) => [node.getBoundingClientRect().height, node.outerHTML.slice(0, 80)])"
    heights = browser.js(heights)
    assert len(heights) > 60 and [row for row in heights if row[0] < 40] == []
    sizes = browser.js(
        "[...document.querySelectorAll('body *')].map((n) => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 12
    assert len(text_of(browser, ".ranks thead th")) == 3
    assert browser.js("document.querySelector('.ranks').parentNode.scrollWidth") <= width
    assert browser.js("document.documentElement.scrollWidth") == width


def test_it_says_what_it_shows_and_what_was_not_run(browser, made, tmp_path):
    """Which questions are on the page; a row that was not run, in the table, columns, choices and curves."""
    run = tmp_path / "run"
    run.mkdir()
    for path in made[0].iterdir():
        (run / path.name).symlink_to(path)
    belief = {time: {"prior": [1.0], "posterior": [1.0]} for time in ("before", "after")}
    (run / "cloze").mkdir()
    write_lines(run / "cloze" / "metrics.jsonl", [{"step": 1, "loss": 0.5}])  # its training was begun
    write_json(run / "belief.json", [{"qid": "q53", "passages": ["1"]} | belief])
    size = made[1].stat().st_size / 1e6 - 0.001
    data = page_of(run, tmp_path / "page.html", "--megabytes", size)
    open_page(browser, tmp_path / "page.html")
    (about,) = text_of(browser, "#about")
    shown = f"{len(data['questions'])} of the questions are on this page"
    assert about.endswith(f" {shown}: the 1 with EMDR2's beliefs, the others drawn at random.")
    missing = ["untrained encoder", "inverse cloze alone", "trained + BM25"]
    for section in ("results", "question", "training"):
        assert f"{', '.join(missing)}: not run." in text_of(browser, f"#{section} p"), section
    for selector in ("#system-a option:disabled", "#columns label:has(:disabled)"):
        assert browser.js(
            f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)"
        ) == [f"{name}: not run" for name in missing]
    curves = text_of(browser, "#training option")
    assert curves == ["inverse cloze alone: not run to its end", "trained encoder", "steps", "minutes"]
    assert text_of(browser, ".results thead th")[-2:] == ["minutes in all", "seeds"]
    assert "of everything that the row is built on, each once" in browser.js("document.body.textContent")


def test_a_choice_stays_where_the_hand_is(browser, made):
    """A button that is drawn anew keeps the focus; another A than that of a pair leaves no pair chosen."""
    open_page(browser, made[1])
    for selector in ("#next", "#compare"):
        browser.js(f"document.querySelector('{selector}').focus()")
        browser.press("Enter")
        assert f"#{browser.js('document.activeElement.id')}" == selector
    assert browser.js("document.querySelector('#pair').value") == "0"
    browser.js("document.querySelector('#system-a').value = '0'")
    browser.js("document.querySelector('#system-a').dispatchEvent(new Event('change'))")
    assert browser.js("document.querySelector('#pair').value") == ""


def contrast(browser, name, ground):
    """WCAG's contrast of a colour of the page with a ground."""
    lights = []
    for variable in (name, ground):
        style = "getComputedStyle(document.documentElement)"
        colour = browser.js(f"{style}.getPropertyValue('--{variable}').trim()")
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_an_empty_folder(browser, made, tmp_path):
    """A run that has just begun: every part says so, and nothing breaks."""
    write_table(tmp_path / "run", {}, {}, {})
    page_of(tmp_path / "run", tmp_path / "empty.html", "--data", made[0].parent / "data")
    open_page(browser, tmp_path / "empty.html")
    for section in ("results", "question", "lessons", "training", "vectors"):
        assert "not run" in text_of(browser, f"#{section}")[0], section
    assert browser.errors == []
