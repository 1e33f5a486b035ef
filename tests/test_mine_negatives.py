"""Golden files of RocketQA's and ANCE-Tele's miners, and DPR's choice on a corpus that one can read."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import mine_negatives
from mine_negatives import Found, teleport
from tests.processes import command
from utils import bm25
from utils.data import Corpus, read_questions, write_run
from utils.plumbing.config import UserError

GOLDEN = Path(__file__).parent / "golden"
ROWS = [
    ("1", "Oslo is the capital of Norway.", "Oslo"),
    ("2", "The river of Oslo is the Akerselva river.", "River"),
    ("3", "Lima lies in Peru.", "Lima"),
    ("4", "Nothing here.", "Oslo"),
    ("5", "Nothing here.", "Oslo"),
    ("6", "The", "A"),
]
ALL = [("1", 6.0), ("2", 5.0), ("3", 4.0), ("4", 3.0), ("5", 2.0), ("6", 1.0)]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.tsv", {i: (title, text) for i, text, title in ROWS})


def write_corpus(path, passages):
    rows = "".join(f"{pid}\t{text}\t{title}\n" for pid, (title, text) in passages.items())
    path.write_text("id\ttext\ttitle\n" + rows)
    return Corpus(path)


def config(folder, **keys):
    """The keys of config/mine_negatives.yaml, as small as these tests."""
    values = dict(
        mode="topk", run=str(folder / "x.run"), negatives=2, depth=5, match="string", match_title=False,
        positives="given", keep_without_positives=False, exclude="", scores="", negative_below=0.1,
        positive_above=0.9, fill=False, lookahead_run="", momentum="", seed=111,
    )  # fmt: skip
    return SimpleNamespace(**(values | keys))


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(qid, positives, answers=()):
    return {"qid": qid, "question": "?", "answers": list(answers), "positives": positives}


def mined(questions, corpus, cfg):
    """(the lines that mine() yields, its counts)."""
    counts = mine_negatives.Counter()
    return list(mine_negatives.mine(questions, corpus, cfg, counts)), +counts


# ---------------------------------------------------------------- RocketQA
ROCKETQA = json.loads((GOLDEN / "rocketqa_mining.json").read_text())["cases"]


def rocketqa(case, folder, **keys):
    """Our lines for a golden case, through files: corpus, run, the run as the cross-encoder would sort it."""
    titles = case["titles"]
    corpus = write_corpus(folder / "c.tsv", {p: (titles.get(p, ""), t) for p, t in case["passages"].items()})
    gold, extra = {}, {}
    for table, rows in ((gold, case.get("qrels", [])), (extra, case.get("qrels_addition", []))):
        for qid, pid in rows:
            table.setdefault(qid, []).append(pid)
    answers = case.get("answers", {})
    questions = [question(q, gold.get(q, []), answers.get(q, [])) for q in case["queries"]]
    falling = {q: [(pid, float(-i)) for i, pid in enumerate(pids)] for q, pids in case["run"].items()}
    write_run(folder / "x.run", falling.items())
    if extra:
        rows = [{"qid": q, "question": "?", "positives": pids} for q, pids in extra.items()]
        keys["exclude"] = write_json_lines(folder / "extra.jsonl", rows)
    if "ce_scores" in case:
        scored = {q: zip(pids, case["ce_scores"][q], strict=False) for q, pids in case["run"].items()}
        ranked = [(q, sorted(hits, key=lambda hit: -hit[1])) for q, hits in scored.items()]
        write_run(folder / "scored.run", ranked)
        keys["scores"] = str(folder / "scored.run")
    return mined(questions, corpus, config(folder, **keys))[0]


def cases(script):
    return [case for case in ROCKETQA if case["script"] == script]


def rows_of(lines, order):
    """[qid, positive, negative] of every line, questions in the order that the original writes them in."""
    rows = [[line["qid"], line["positives"][0], *line["negatives"]] for line in lines]
    return sorted(rows, key=lambda row: order.index(row[0]))


@pytest.mark.parametrize("case", cases("construct_marco_train_ce.py"))
def test_rocketqa_marco_cross_encoder_file(case, tmp_path):
    """Step 2: four draws a question from the whole ranking, the very draws of Random(111)."""
    lines = rocketqa(case, tmp_path, mode="denoise", negatives=4, depth=1000)
    order = list(dict.fromkeys(qid for qid, _ in case["qrels"]))
    ours = [[q, pid, 1] for q in order for line in lines if line["qid"] == q for pid in line["positives"]]
    ours += [[line["qid"], pid, 0] for line in lines for pid in line["negatives"]]
    assert ours == case["expected_ids"]


@pytest.mark.parametrize("case", cases("construct_marco_train_de.py"))
def test_rocketqa_marco_dual_encoder_file(case, tmp_path):
    """Step 3: gate at 0.1, fill from rank 51 on, a line per positive and negative, negatives from the end."""
    lines = rocketqa(case, tmp_path, mode="denoise", negatives=4, depth=1000, fill=True)
    order = list(dict.fromkeys(qid for qid, _ in case["qrels"]))
    assert rows_of(lines, order) == case["expected_ids"]
    gold = [{pid for qid, pid in case["qrels"] if qid == line["qid"]} for line in lines]
    assert all(set(line["positives"]) == known for line, known in zip(lines, gold, strict=True))


@pytest.mark.parametrize("case", cases("construct_nq_train_de.py"))
def test_rocketqa_nq_dual_encoder_file(case, tmp_path):
    """Step 3 on NQ: the first passage with an answer, the first without one and under 0.1."""
    keys = dict(mode="denoise", negatives=1, depth=100, positives="ranking", match_title=True)
    lines = rocketqa(case, tmp_path, **keys)
    wanted = case.get("with_token_match", case)["expected_ids"]
    assert rows_of(lines, list(case["run"])) == wanted


@pytest.mark.parametrize("case", cases("construct_nq_train_ce.py"))
def test_rocketqa_nq_cross_encoder_file(case, tmp_path):
    """Step 2 on NQ: the original's draw has no seed: its positive, one of its pool; ours twice the same."""
    keys = dict(mode="denoise", negatives=1, depth=100, positives="ranking", match_title=True)
    lines, again = (rocketqa(case, tmp_path, **keys) for _ in range(2))
    wanted = case.get("with_token_match", case)
    assert {line["qid"]: line["positives"][0] for line in lines} == wanted["expected_positive"]
    assert all(line["negatives"][0] in wanted["negative_pool"][line["qid"]] for line in lines)
    assert lines == again and any(line["negatives"] for line in lines)


@pytest.mark.parametrize("case", cases("construct_unlabel_train_de.py"))
def test_rocketqa_pseudo_labels(case, tmp_path):
    """Step 4: the favourite above 0.9, the first of equals; negatives under 0.1 in the ranking's order."""
    n = {"marco": 4, "nq": 1}[case["dataset"]]
    lines = rocketqa(case, tmp_path, mode="pseudo_label", negatives=n, depth=50)
    wanted = case.get("expected_ids_without_quirk", case["expected_ids"])
    assert rows_of(lines, list(case["run"])) == wanted


def test_thresholds_are_strict_and_a_false_negative_is_stopped(corpus, tmp_path):
    """By hand: 0.1 is not below 0.1; a passage that the cross-encoder likes is no negative at any rank."""
    write_run(tmp_path / "x.run", [("q", ALL)])
    scored = [("2", 0.95), ("3", 0.1), ("4", 0.0999999), ("1", 0.05), ("5", 0.01)]
    write_run(tmp_path / "s.run", [("q", scored)])
    cfg = config(tmp_path, mode="denoise", scores=str(tmp_path / "s.run"), negatives=3)
    assert [line["negatives"] for line in mined([question("q", ["1"])], corpus, cfg)[0]] == [["5"], ["4"]]
    cfg = config(tmp_path, mode="denoise", scores=str(tmp_path / "s.run"), negatives=3, fill=True, depth=6)
    lines, _ = mined([question("q", ["1"])], corpus, cfg)
    assert [line["negatives"] for line in lines] == [["6"], ["5"], ["4"]]
    cfg = config(tmp_path, mode="pseudo_label", scores=str(tmp_path / "s.run"), positive_above=0.95)
    lines, counts = mined([question("q", [])], corpus, cfg)
    assert lines == [] and counts["questions dropped, no positive"] == 1
    cfg = config(tmp_path, mode="pseudo_label", scores=str(tmp_path / "s.run"), depth=1)
    assert mined([question("q", [])], corpus, cfg)[0] == []  # passage 2 is second in the ranking


def test_an_open_gate_takes_scored_passages_only(corpus, tmp_path):
    """Without denoising (--negative_below 2) the candidates are the same: those that were scored."""
    write_run(tmp_path / "x.run", [("q", ALL)])
    write_run(tmp_path / "s.run", [("q", [("3", 0.9), ("2", 0.8), ("1", 0.7)])])
    cfg = config(tmp_path, mode="denoise", scores=str(tmp_path / "s.run"), negative_below=2.0, negatives=3)
    assert [line["negatives"] for line in mined([question("q", ["1"])], corpus, cfg)[0]] == [["3"], ["2"]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([("b", [("2", 0.5)])], "question 'a' is missing; rescore"),
        ([("a", [("2", 0.5)]), ("b", [("77", 0.5)])], "passage '77' of question 'b' is not in"),
        ([("a", [("2", 0.5)]), ("b", [("2", 1.5)])], "question 'b': 1.5 is no probability"),
        ([("a", [("2", -3.0)]), ("b", [("2", 0.5)])], "question 'a': -3.0 is no probability"),
    ],
)
def test_scores_that_are_not_of_this_ranking_are_refused(corpus, tmp_path, scores, message):
    """A truncated, stale or foreign score file would open the gate without a word."""
    write_run(tmp_path / "x.run", [("a", ALL), ("b", ALL)])
    write_run(tmp_path / "s.run", scores)
    questions = [question(qid, ["1"]) for qid in "ab"]
    cfg = config(tmp_path, mode="denoise", scores=str(tmp_path / "s.run"))
    with pytest.raises(UserError, match=message):
        mined(questions, corpus, cfg)


def test_draw_ends_and_is_fair():
    """Where fewer are allowed than wanted the original loops for ever; here all come out, equally often."""
    rng, letters = random.Random(0), list("abcdef")
    draw, allowed = mine_negatives.draw_at_random, "ace".__contains__
    assert sorted(draw(letters, allowed, 4, rng)) == ["a", "c", "e"] and draw([], allowed, 2, rng) == []
    first = [draw(letters, allowed, 1, rng)[0] for _ in range(3000)]
    assert all(900 < first.count(letter) < 1100 for letter in "ace")


# ---------------------------------------------------------------- ANCE-Tele
ANCE_TELE = json.loads((GOLDEN / "ance_tele_mining.json").read_text())["cases"]


def ance_questions(case):
    """Questions of a golden case as ours; its inline positives stand as 'ctx:qid:i' in the golden file."""
    if case["style"] == "marco":
        return {qid: {"qid": qid, "answers": [], "positives": case["qrels"][qid]} for qid in case["queries"]}
    return {
        str(q["qid"]): {"qid": str(q["qid"]), "answers": q["answers"], "positives": q["positive_ctxs"]}
        for q in case["questions"]
    }


@pytest.mark.parametrize("case", ANCE_TELE, ids=lambda case: f"{case['style']}-{case['n_sample']}")
def test_ance_tele_golden(case, tmp_path):
    """ANN, look-ahead, both and with momentum: drop positives, cut, shuffle, cut, one generator a file."""
    bare = {pid: {"title": "", "text": f"text {pid}"} for run in ("ann_run", "lookahead_run")
            for ids in case[run].values() for pid in ids}  # fmt: skip
    passages = case.get("passages", bare)
    corpus = write_corpus(tmp_path / "c.tsv", {i: (p["title"], p["text"]) for i, p in passages.items()})
    questions = ance_questions(case)
    cfg = config(
        tmp_path, mode="teleport", depth=case["depth"], negatives=case["n_sample"], positives="find",
    )  # fmt: skip

    def pass_over(run, place, positives):
        rng, results = random.Random(case["seed"]), {}
        for qid, ids in case[run].items():
            question = questions[qid] | {"positives": positives(qid)}
            # why twice the same list for look-ahead: without any ANN negative nothing is returned
            found = Found(ids) if place == 0 else Found(ids, lookahead=ids)
            rngs = [random.Random(0), random.Random(0)]
            rngs[place] = rng
            pos, neg = teleport(question, found, corpus, cfg, rngs)
            if pos and neg:
                results[qid] = pos, neg[len(neg) // 2 :] if place else neg
        return results

    ann = pass_over("ann_run", 0, lambda qid: questions[qid]["positives"])
    ahead = pass_over("lookahead_run", 1, lambda qid: questions[qid]["positives"])
    expected, nq = case["expected"], case["style"] == "nq"

    def negatives(part):
        return {q: (v["negatives"] if nq else v) for q, v in expected[part].items()}

    assert {q: neg for q, (_, neg) in ann.items()} == negatives("ann")
    assert {q: neg for q, (_, neg) in ahead.items()} == negatives("lookahead")
    if nq:
        for qid, entry in expected["ann"].items():
            (ours,) = ann[qid][0][:1]
            assert entry["positives"][0] == (ours if isinstance(ours, str) else f"ctx:{qid}:0")
    if "reference_quirk" in case:  # MARCO's drops a question that momentum lacks
        return
    last = {q: (v["negatives"] if nq else v) for q, v in case["momentum"].items()}
    for qid, (_, neg) in ann.items():
        both = neg + (ahead[qid][1] if qid in ahead else [])
        assert both == negatives("combined")[qid]
        if qid in expected["with_momentum"]:
            new, old = both, last.get(qid, [])
            assert (new + old if nq else old + new) == negatives("with_momentum")[qid]


def test_teleport_joins_its_three_sources_through_files(tmp_path):
    """Through files: one generator each, momentum last, a question without ANN negatives left out."""
    case = ANCE_TELE[0]
    ids = sorted({p for r in ("ann_run", "lookahead_run") for v in case[r].values() for p in v}, key=int)
    corpus = write_corpus(tmp_path / "c.tsv", {p: ("", f"text {p}") for p in ids})
    order = list(case["ann_run"])
    for run in ("ann_run", "lookahead_run"):
        ranked = [(q, [(p, float(-i)) for i, p in enumerate(case[run][q])]) for q in order]
        write_run(tmp_path / f"{run}.run", ranked)
    last = [{"qid": q, "negatives": case["momentum"][q]} for q in order if q in case["momentum"]]
    cfg = config(
        tmp_path, mode="teleport", run=str(tmp_path / "ann_run.run"), depth=30, negatives=5,
        seed=case["seed"], lookahead_run=str(tmp_path / "lookahead_run.run"),
        momentum=write_json_lines(tmp_path / "last.jsonl", last),
    )  # fmt: skip
    questions = [question(qid, case["qrels"][qid]) for qid in order]
    lines, counts = mined(questions, corpus, cfg)
    assert [line["qid"] for line in lines] == order
    rng = random.Random(case["seed"])  # look-ahead has a generator of its own, which starts anew
    for line in lines:
        qid, negatives = line["qid"], line["negatives"]
        assert negatives[:5] == case["expected"]["ann"][qid]
        pool = [pid for pid in case["lookahead_run"][qid] if pid not in case["qrels"][qid]][:30]
        rng.shuffle(pool)
        assert negatives[5:10] == pool[:5]
        assert negatives[10:] == case["momentum"].get(qid, [])
    only = case["ann_run"][order[0]]
    questions[0] = questions[0] | {"positives": only}
    lines, counts = mined(questions, corpus, cfg)
    assert [line["qid"] for line in lines] == order[1:] and counts["questions dropped, no negative"] == 1


def test_a_file_in_another_order_is_refused(corpus, tmp_path):
    """Nothing is lost without a word: a second file in another order, or of other questions, is an error."""
    write_run(tmp_path / "x.run", [("a", ALL), ("b", ALL)])
    write_run(tmp_path / "l.run", [("b", ALL), ("a", ALL)])
    questions = [question(qid, ["1"]) for qid in "ab"]
    cfg = config(tmp_path, mode="teleport", lookahead_run=str(tmp_path / "l.run"))
    with pytest.raises(UserError, match="question 'a' is not in .* or not in its order"):
        mined(questions, corpus, cfg)


# ---------------------------------------------------------------- DPR
@pytest.mark.parametrize(
    ("asked", "keys", "positives", "negatives"),
    [
        ({"answers": ["norway"], "positives": ["1"]}, {}, ["1"], ["2", "3"]),
        ({"answers": ["Akerselva"], "positives": ["1"]}, {}, ["1"], ["3", "4"]),
        ({"answers": ["Oslo"], "positives": ["1"]}, {"negatives": 5}, ["1"], ["3", "4", "5"]),
        ({"answers": [], "positives": ["1", "3"]}, {}, ["1", "3"], ["2", "4"]),
        ({"answers": ["x"], "positives": ["4"]}, {"negatives": 5}, ["4"], ["1", "2", "3"]),  # 5 is its twin
        ({"answers": ["x"], "positives": [{"title": "?", "text": ROWS[1][1]}]}, {}, 0, ["1", "3"]),
        ({"answers": [], "positives": [{"title": "?", "text": ROWS[1][1]}]}, {}, 0, ["1", "3"]),
        ({"answers": ["Peru"], "positives": []}, {"positives": "find"}, ["3"], ["1", "2"]),
        ({"answers": ["Peru"], "positives": ["4"]}, {"positives": "find"}, ["4"], ["1", "2"]),
        ({"answers": ["P.ru"], "positives": []}, {"positives": "find", "match": "regex"}, ["3"], ["1", "2"]),
        ({"answers": ["Peru"], "positives": []}, {}, [], ["1", "2"]),
        ({"answers": ["xyzzy"], "positives": []}, {"positives": "find"}, [], ["1", "2"]),
    ],
)
def test_topk(corpus, tmp_path, asked, keys, positives, negatives):
    """By hand: no passage with an answer and no positive (by id or text) is a negative; ranks decide."""
    found = Found([pid for pid, _ in ALL])
    chosen = mine_negatives.topk(asked, found, corpus, config(tmp_path, **keys), None)
    assert chosen == (positives or asked["positives"], negatives)


def test_nothing_is_dropped_silently(corpus, tmp_path):
    """What does not reach the output, question or ranking, is counted; depth limits what is looked at."""
    gold = question("gold", ["3"], ["Peru"]) | {"negatives": ["old"], "own": 7}
    questions = [gold, question("none", [], ["Peru"]), question("unranked", ["3"], ["Peru"])]
    write_run(tmp_path / "x.run", [("none", ALL), ("gold", ALL), ("stranger", ALL)])

    def by_qid(**keys):
        lines, counts = mined(questions, corpus, config(tmp_path, **keys))
        return {line["qid"]: line for line in lines}, counts

    examples, counts = by_qid(depth=1)
    assert list(examples) == ["gold", "unranked"]
    assert examples["gold"]["negatives"] == ["1"] and examples["gold"]["own"] == 7
    assert counts == {
        "questions dropped, no positive": 1,
        "questions without a ranking": 1,
        "questions without a negative": 1,
        "rankings of other questions, ignored": 1,
        "questions with fewer new ones than asked": 1,
        "negatives": 1,
    }
    examples, counts = by_qid(positives="find")
    assert examples["none"]["positives"] == ["3"] and counts["positives found"] == 1
    assert list(by_qid(keep_without_positives=True)[0]) == ["none", "gold", "unranked"]


def test_mining_command(corpus, tmp_path, monkeypatch, capsys):
    """The rehearsal: BM25's ranking in, a training file out that the trainer's reader accepts."""
    asked = question("q", ["1"], ["Norway"]) | {"question": "capital of norway oslo"}
    index = bm25.build_bm25(corpus, tmp_path / "index")
    hits = bm25.search_bm25(index, [asked["question"]], 5)[0]
    write_run(tmp_path / "x.run", [("q", [(corpus[row].id, score) for row, score in hits])])
    keys = {"questions": write_json_lines(tmp_path / "q.jsonl", [asked]), "run": tmp_path / "x.run"}
    keys |= {"corpus": corpus.path, "out": tmp_path / "train.jsonl", "negatives": 2}
    monkeypatch.setattr("sys.argv", command("mine_negatives.py", keys)[1:])
    mine_negatives.main()
    (mined,) = read_questions(tmp_path / "train.jsonl", need=("positives", "negatives"))
    assert mined["negatives"] == ["4", "5"] and mined["positives"] == ["1"]
    assert "1 lines written, 2 negatives" in capsys.readouterr().out
