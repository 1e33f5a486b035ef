"""Rehearsals: every recipe on sixty passages, from its first to its last command, then with nothing to do."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT
from tests.toy import make_world, write_lines
from tests.toy_t5 import t5
from utils.data import Corpus, iter_jsonl, iter_run, read_run
from utils.plumbing.config import ROOT, read_yaml
from utils.plumbing.files import folder_hash, read_json
from utils.text import has_answer

SMALL = "--mixed_precision no --batch_size 8 --epochs 1 --question_chunk 8 --passage_chunk 16"
COMMON = {
    "LAUNCH": "python", "ENCODE_FLAGS": "", "ANSWER_FLAGS": "",
    "TRAIN_FLAGS": f"{SMALL} --question_tokens 16 --passage_tokens 32",
    "PATH": f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}",
}  # fmt: skip
RESCORE = {
    "CROSS_FLAGS": "--chunk 16 --pair_tokens 48 --batch_size 8 --epochs 1 --learning_rate 1e-3",
    "SCORED": 10, "UNLABELLED_DEPTH": 10, "ABOVE": 0,
}  # fmt: skip
CLOZE = "--batch_size 8 --stop_after 2 --question_chunk 8 --passage_chunk 8"
RECIPES = {  # recipe: its variables; the longest first, because two run at a time
    "rocketqa_nq": RESCORE | {"DEPTH": 20, "ABLATION": "true"},
    "rocketqa_marco": RESCORE | {"DEPTH": 60},
    "own_data": {
        "FLAGS": "--batch_size 8 --stop_after 4 --dev_negatives 2 --question_chunk 4 --passage_chunk 4",
        "READER_FLAGS": "--reader_tokens 48 --stop_after 3",
    },
    "dpr_nq": {"GOLD": "", "READER_FLAGS": "--reader_tokens 48 --batch_size 4 --stop_after 3"},
    "emdr2_nq": {
        "TRAIN_FLAGS": "--mixed_precision no --batch_size 8 --question_chunk 4 --top_k 4 --reader_tokens 48 "
        "--answer_tokens 8 --encoding_batch_size 32 --refresh_every 2 --stop_after 3 --warmup 0",
        "SPAN_FLAGS": "--model rules --passages 30 --workers 0",
        "MSS": "true", "BASELINE": "true", "DEPTH": 20, "READ": 4,
    },
    "claim_emdr2": {
        "TRAIN_FLAGS": "--reader_tokens 48 --answer_tokens 8 --question_chunk 4 --eval_every 2 --warmup 0",
        "BATCH": 8, "READ": 4, "FIRST": 2, "STEPS": 3, "DEPTH": 20, "SEEDS": "1 2", "CLOZE_FLAGS": CLOZE,
        "ARMS": "token shuffled longer none sync plain",
    },
    "claim_dpr": {
        "BATCH": 8, "GC_BATCH": 16, "UPDATES": 2, "DEPTH": 20, "SEEDS": 1, "CLOZE_FLAGS": CLOZE,
        "FLAGS": "--dev_negatives 2 --question_chunk 4 --passage_chunk 4",
    },
    "ance_tele_nq": {"EPISODES": "1 2", "NEGATIVES": "2 3", "STOP_AFTER": "3 0", "DEPTH": 20, "SAMPLE": 5},
    "ance_tele_trivia": {"EPISODES": "1", "DEPTH": 20, "SAMPLE": 5},
    "ance_tele_marco": {"EPISODES": "1", "DEPTH": 20, "SAMPLE": 5},
}  # fmt: skip
GATES = {"rocketqa_nq": "d0/train_ce.run", "rocketqa_marco": "d1/unlabelled_ce.run"}
PAPERS = {  # recipe: the numbers of the papers' code (RocketQA run_nq.sh, run_marco.sh; ANCE-Tele shells/)
    "rocketqa_nq": "DEPTH=100 SCORED=100 UNLABELLED_DEPTH=50 BELOW=0.1 ABOVE=0.9 POSITIVES=ranking",
    "rocketqa_marco": "DEPTH=1000 SCORED=50 UNLABELLED_DEPTH=50 BELOW=0.1 ABOVE=0.9",
    "ance_tele_nq": "NEGATIVES=3,7,11 STOP_AFTER=2000,2000,0 DEPTH=200 SAMPLE=80 EPISODES=1,2,3",
    "ance_tele_marco": "NEGATIVES=15,31,31 STOP_AFTER=20000,20000,0 SAMPLE=30 TEST_DEPTH=1000",
    "ance_tele_trivia": "TEST_TOKENS=64",
    "emdr2_nq": "READ=50",
}


def lines(path):
    return [row for _, row in iter_jsonl(path)]


def add_sentence(corpus, sentence):
    corpus.write_text(re.sub(r"\.\t", f". {sentence}\t", corpus.read_text()))


def shell(*command, cwd=ROOT, **variables):
    environment = ENVIRONMENT | {key: str(value) for key, value in variables.items()}
    return subprocess.run(["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True)


def snapshot(folder):
    """What a second run may not touch: names and times of all files."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changes_nothing(bash, folder):
    """Run a recipe that has nothing to do, and return its process."""
    before, again = snapshot(folder), bash()
    assert again.returncode == 0 and "==" not in again.stdout, again.stdout + again.stderr
    assert snapshot(folder) == before
    return again


def make_data(recipe, folder):
    """The toy world as the recipe expects its DATA; ten of its questions are unlabelled."""
    world = make_world(folder)
    train = lines(world / "train.jsonl")
    dev = lines(world / "dev.jsonl")
    unlabelled = [{"qid": f"u{i}", "question": row["question"]} for i, row in enumerate(dev)]
    if recipe == "own_data":  # one file of questions, some without a passage; the cloze takes a sentence out
        add_sentence(world / "corpus.tsv", "It was named first.")
        rows = [row | {"positives": []} for row in train] + dev + lines(world / "test.jsonl")
        write_lines(world / "questions.jsonl", rows)
        for name in ("train", "dev", "test"):
            (world / f"{name}.jsonl").unlink()
    if recipe == "rocketqa_nq":
        write_lines(world / "unlabelled.jsonl", unlabelled)
    if recipe == "emdr2_nq":  # a year to mask, a trained retriever, a T5, and DPR's other file names
        add_sentence(world / "corpus.tsv", "It was named by an old town in 1889.")
        (world / "dpr").mkdir()
        for name in ("query_encoder", "doc_encoder"):
            (world / name).rename(world / "dpr" / name)
        (world / "dev.jsonl").rename(world / "dev_qa.jsonl")
        t5(world)
    if recipe.startswith("claim"):  # the cloze takes a sentence out
        add_sentence(world / "corpus.tsv", "It was named first.")
        t5(world)
    if recipe == "ance_tele_trivia":  # DPR names no passage for some questions
        write_lines(world / "train.jsonl", [row | {"positives": []} for row in train[:10]] + train[10:])
    if recipe.endswith("marco"):  # RocketQA's files: text and title apart, no answers, extra positives
        passages = list(Corpus(world / "corpus.tsv"))
        (world / "para.txt").write_text("".join(f"{p.id}\t{p.text}\n" for p in passages))
        (world / "para.title.txt").write_text("".join(f"{p.id}\t{p.title}\n" for p in passages[1:]))
        (world / "corpus.tsv").unlink()
        for name in ("train", "test"):
            rows = lines(world / f"{name}.jsonl")
            keys = ("qid", "question", "positives")
            write_lines(world / f"{name}.jsonl", [{key: row[key] for key in keys} for row in rows])
        questions = "".join(f"{row['qid']}\t{row['question']}\n" for row in unlabelled)
        (world / "orcas_yahoo_nq.query.txt").write_text(questions)
        (world / "msmarco").mkdir()
        (world / "msmarco" / "queries.train.tsv").write_text("q0\twhich colour\nq1\twhich colour\n")
        (world / "qrels.train.addition.tsv").write_text("".join(f"q0\t{pid}\n" for pid in range(2, 31)))
    return world


def gate(ranking, share=0.75):
    """A toy teacher is sure of nothing: BELOW is a quantile of its scores."""
    scores = sorted(score for _, hits in iter_run(ranking) for _, score in hits)
    return scores[int(share * len(scores))]


def stopped_by_the_gate(bash, ranking, share=0.75):
    """Run a recipe until its gate lets nothing pass, and return a gate with which it can go on."""
    stopped = bash(BELOW=0)
    assert stopped.returncode == 2 and "no question is left" in stopped.stderr, stopped.stderr[-2000:]
    return gate(ranking, share)


def planned(command, stages, variables, cwd=ROOT):
    """The stages that a recipe writes to a file in its dry pass, as (name, `done` or `open`)."""
    stages.write_text("")
    shell(*command, cwd=cwd, **variables, STAGES=stages, DRY=1)
    return [tuple(line.split("\t")) for line in stages.read_text().splitlines()]


def run_and_count(command, stages, variables, cwd=ROOT):
    """Run a recipe, and compare the stages that it began with its plan; the process returned has the plan."""
    plan = planned(command, stages, variables, cwd)
    begun = stages.with_name(f"{stages.name}.begun")
    begun.write_text("")
    done = shell(*command, cwd=cwd, **variables, STAGES=stages)
    names = begun.read_text().splitlines()
    assert len(names) == len(plan) or done.returncode, done.stderr[-2000:]
    assert names == [name for name, _ in plan[: len(names)]]
    counts = [(int(n), int(total)) for n, total in re.findall(r"^== (\d+) of (\d+) \|", done.stdout, re.M)]
    assert counts == sorted(counts) and all(n <= total == len(plan) for n, total in counts)
    done.plan = plan
    return done


def rehearse(recipe, folder, python):
    """(DATA, RUN, output) of a rehearsal that succeeded. python: the folder of a warm one."""
    data = "my data" if recipe == "own_data" else "data"
    world, run, arguments = make_data(recipe, folder / data), folder / "run", []
    variables = COMMON | {"DATA": world, "TRAIN": world / "train.jsonl", "RUN": run}
    variables |= dict.fromkeys(("START", "CROSS_START", "INIT", "READER_INIT"), world / "bert")
    variables |= {"RETRIEVER": world / "dpr", "READER": world / "t5", "T5": world / "t5"} | RECIPES[recipe]
    variables["PATH"] = f"{python}:{COMMON['PATH']}"
    place = ROOT
    if recipe == "own_data":  # started from elsewhere, with relative paths
        place, arguments, variables["RUN"] = folder, [data], "run"

    def bash(**changes):
        command = [ROOT / "recipes" / f"{recipe}.sh", *arguments]
        stages = folder.with_name(f"{folder.name}_stages")
        return run_and_count(command, stages, variables | changes, place)

    if recipe in GATES:
        variables["BELOW"] = stopped_by_the_gate(bash, run / GATES[recipe])
    done = bash()
    assert done.returncode == 0, f"{recipe}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "train_cross_encoder.py" not in done.stdout, "it goes on"
    if recipe not in ("own_data", "dpr_nq"):  # whose short stages are repeated
        again = changes_nothing(bash, folder)
        assert again.plan == [(name, "done") for name, _ in done.plan]
    return world, run, done.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, request, python):
    """A function: recipe -> what rehearse returns, or its failure; only selected tests start theirs."""
    wanted = [name for name in RECIPES if any(item.name == f"test_{name}" for item in request.session.items)]
    with ThreadPoolExecutor(2) as pool:
        started = {}
        for name in wanted:
            started[name] = pool.submit(rehearse, name, tmp_path_factory.mktemp(name), python)
        yield lambda name: started[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_numbers_of_the_papers(recipe):
    """What a rehearsal makes smaller is the papers' number when nobody sets it."""
    text = (ROOT / "recipes" / f"{recipe}.sh").read_text()
    for name, number in (pair.split("=") for pair in PAPERS[recipe].split()):
        default = re.search(rf"\b{name}=\(?\$\{{{name}:-([^}}]*)\}}", text)
        assert default and default[1] == number.replace(",", " "), f"{recipe}: {name}"
    if recipe == "rocketqa_marco":  # epochs: 40, and 10 from step 3 on (run_marco.sh:13,54,88)
        assert re.findall(r"^train (d\d) (\d+)$", text, re.M) == [("d0", "40"), ("d1", "10"), ("d2", "10")]


FAKE = """#!/usr/bin/env bash
echo "$@" >>$LOG
[ "$1" != recipes/demo/inverse_cloze.py ] || touch $3
[ "$2" != prepare.convert ] || touch ${!#}
while [ $# -gt 0 ]; do
    case $1 in
    --run_dir) mkdir -p $2/doc_encoder $2/reader && touch $2/metrics.json ;;
    --out)
        case $2 in
        *embeddings) mkdir -p $2 && echo '{"complete": true}' >$2/manifest.json ;;
        *) touch $2 ${2%.*}.metrics.json ;;
        esac
        ;;
    esac
    shift
done
"""


def commands_of(folder, recipe, **variables):
    """The commands of a recipe in folder/run, on a python that only makes what it is asked for."""
    fake = folder / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    variables |= {"RUN": folder / "run", "LOG": folder / "log"}
    variables |= {"PATH": f"{fake.parent}:{ENVIRONMENT['PATH']}"}
    done = shell(f"recipes/{recipe}.sh", **variables)
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(
    ("recipe", "given", "variables", "trained", "files"),
    [
        ("rocketqa_nq", "d1.jsonl", {"FROM": "3"}, ["d1"], "nq-test.qa.csv"),
        ("rocketqa_nq", "d2.jsonl", {"FROM": "4"}, ["d2"], "nq-test.qa.csv"),
        ("ance_tele_nq", "m3.jsonl", {"EPISODES": "3"}, ["m3"], "biencoder-nq-train.json nq-test.qa.csv"),
        ("emdr2_trivia", "", {"CLOZE": "true", "BASELINE": "true", "READER_FIRST": "true"},
         ["cloze", "fid", "run"], "trivia-train.qa.csv trivia-dev.qa.csv trivia-test.qa.csv"),
        ("emdr2_webq", "", {}, ["run"],
         "biencoder-webquestions-train.json biencoder-webquestions-dev.json webquestions-test.qa.csv"),
    ],
)  # fmt: skip
def test_where_a_recipe_begins(tmp_path, recipe, given, variables, trained, files):
    """A published training file, another data set, no labels: what is downloaded and trained, on what."""
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    run.mkdir()
    for name in ("corpus.tsv", "psgs_w100.tsv.source.json"):  # it is DPR's
        (data / name).touch()
    for name in (given, "compare.txt", "compare_answers.txt", "curves.png"):
        (run / name).touch()
    places = {"DATA": data, "RETRIEVER": tmp_path / "r"}
    commands = commands_of(tmp_path, recipe, LAUNCH="python", **places | variables)
    downloads = [line.split()[2] for line in commands if line.startswith("-m prepare.download")]
    trainings = [line for line in commands if line.startswith("train_")]
    assert downloads == files.split()
    assert [re.search(r"--run_dir (\S+)", line)[1].rpartition("/")[2] for line in trainings] == trained
    if given:
        assert f"--train {run}/{given} " in trainings[0]
        assert not any(line.startswith(("mine_", "rerank")) for line in commands)
    else:
        assert f"--config config/train_{recipe}.yaml" in trainings[-1]
        retriever = run / "cloze" if "CLOZE" in variables else tmp_path / "r"
        assert f"--doc_encoder {retriever}/doc_encoder" in trainings[-1]
        reader = f"{run}/fid/reader" if "READER_FIRST" in variables else "t5-base"
        assert f"--reader {reader} " in trainings[-1]


@pytest.mark.parametrize("recipe", ["emdr2_nq", "dpr_nq", "ance_tele_nq"])
def test_no_questions_of_others_for_a_corpus_of_ones_own(tmp_path, recipe):
    """Natural Questions are not downloaded beside somebody's own passages; the missing file is named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "corpus.tsv").touch()
    with pytest.raises(
        AssertionError, match=r"data has a corpus of its own, but no \w+\.jsonl; put it there"
    ):
        commands_of(tmp_path, recipe, LAUNCH="python", DATA=tmp_path / "data", RETRIEVER=tmp_path / "r")
    log = tmp_path / "log"
    assert not log.exists() or "prepare.download" not in log.read_text()


def test_the_arms_of_ance_tele(tmp_path):
    """Four arms, a second seed of one, three episodes: what each mines from; what is trained once only."""
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    made = "source.tsv corpus.tsv bm25_train.run bm25_test.run train_answers.jsonl test.jsonl".split()
    for name in made:
        (run / "data" / name).touch()
    commands = commands_of(tmp_path, "claim_ance_tele", START="bert", MEASURE="")
    trained = re.findall(r"^train_dpr.py .*?ance/(\w+/m\d) .* --seed (\d)", "\n".join(commands), re.M)
    expected = [f"{arm}_seed1/m{i}" for arm in ("ann", "lookahead") for i in (1, 2, 3)]
    expected += [f"{arm}_seed1/m{i}" for arm in ("momentum", "all") for i in (2, 3)]
    assert trained == [(name, "1") for name in expected] + [(f"all_seed2/m{i}", "2") for i in (1, 2, 3)]
    for line in commands:
        if line.startswith("mine_negatives.py"):
            arm, episode = re.search(r"--out \S+/ance/(\w+)_seed\d/m(\d).jsonl", line).groups()
            assert ("--lookahead_run" in line) == (arm in ("lookahead", "all")), line
            assert ("--momentum" in line) == (arm in ("momentum", "all") and episode != "1"), line
            assert f"--questions {run}/data/train_answers.jsonl" in line
            assert "--negatives 10 --depth 20" in line
    for arm in ("ann_seed1", "lookahead_seed1", "momentum_seed1", "all_seed1", "all_seed2"):
        for episode in range(4):
            for name in ("ann", "test"):
                assert (run / "ance" / arm / f"m{episode}" / f"{name}.run").is_file(), (arm, episode)


def test_a_stage_runs_once(tmp_path):
    """Not again where its output is; again where a manifest is incomplete; a failure ends the recipe."""
    (tmp_path / "done").write_text("1\n")
    (tmp_path / "more").write_text("2\n")

    def bash(script):
        text = f"DATA=d RUN={tmp_path} FORMAT=auto; . recipes/stage.sh; cd {tmp_path}; {script}; echo end"
        return shell("-c", text)

    for complete, output in (("false", "\n== echo ran\nran\nend\n"), ("true", "end\n")):
        (tmp_path / "manifest.json").write_text(f'{{"complete": {complete}}}')
        assert bash("stage manifest.json echo ran").stdout == output
    assert bash("stage done echo ran").stdout == "end\n"
    failed, idle = bash("stage other false"), bash("stage other true")
    assert failed.returncode == 1 and "end" not in failed.stdout
    assert idle.returncode == 1 and "other is not there after: true" in idle.stderr
    assert bash("stage both write both cat done more").returncode == 0
    assert (tmp_path / "both").read_text() == "1\n2\n"
    assert not bash("stage both write both cat done more").stderr
    other = bash("stage both write both cat more")
    assert other.stdout == "end\n"
    assert "both is there, made by another command: write both cat done more" in other.stderr
    assert bash("stage half write half cat done missing").returncode and not (tmp_path / "half").exists()


RECIPE = """
set -euo pipefail
DATA=${DATA:-d} LAUNCH= FORMAT=auto ENCODE_FLAGS=
. RECIPES/stage.sh
make() { stage $RUN/$1 write $RUN/$1 seq 3; }
make a
[ "${INNER:-}" ] || INNER=1 RUN=$RUN/inner bash $0
make b
[ $(lines_of $RUN/b) -ge 3 ] && there $RUN/b && ! there $RUN/other && make c
python -c "open('$RUN/log', 'a').write('x')"
FOR=$RUN/b make only_for_b
[ "${STOP:-}" != "$RUN" ] || [ "$DRY" ] || exit 3
make d
"""


def test_which_of_how_many(tmp_path):
    """
    The dry pass does nothing but count, in a recipe within a recipe too; a resumed run goes on in the same
    count; where an earlier run is stored, its minutes. Stages of the inner recipe are 2 to 6 of 10.
    """
    (tmp_path / "r.sh").write_text(RECIPE.replace("RECIPES", str(ROOT / "recipes")))
    run = tmp_path / "ladder_small"
    (run / "inner").mkdir(parents=True)
    variables = {"RUN": run, "PATH": COMMON["PATH"], "TMPDIR": tmp_path / "t"}
    (tmp_path / "t").mkdir()

    def bash(**changes):
        done = shell(tmp_path / "r.sh", cwd=tmp_path, **variables, **changes)
        assert not list((tmp_path / "t").iterdir()), "the list of stages is taken away"
        return done.returncode, re.findall(r"^== (.*?) \| ", done.stdout, re.M)

    plan = planned([tmp_path / "r.sh"], tmp_path / "s", variables)
    inner = ["inner/a", "inner/b", "inner/c", "inner/only_for_b", "inner/d"]
    assert plan == [(name, "open") for name in ["a", *inner, "b", "c", "only_for_b", "d"]]
    assert not (run / "log").exists() and not (run / "a").exists()
    assert bash(STOP=run) == (3, [f"{n} of 10" for n in (1, 2, 3, 4, 6, 7, 8)])
    assert bash() == (0, ["10 of 10"])
    assert (run / "log").read_text() == (run / "inner/log").read_text() == "xx"
    assert bash() == (0, [])

    # how long the stages took once, as results/ of the same name have it
    (run / "b").unlink()
    (run / "d0").mkdir()
    d0 = "d0/metrics.json\topen"
    plan = ["a\tdone", "b\topen", "b\topen", d0, "e\topen", d0, "gc/metrics.json\tdone"]
    (tmp_path / "s").write_text("\n".join(plan) + "\n")
    times = [line.split("\t") for line in (ROOT / "results/ladder_small/peaks.tsv").read_text().splitlines()]
    (seconds,) = [float(time) for name, _, time, _ in times if name == "d0/metrics.json"]
    minutes = f"{seconds / 60:.1f}"
    left = f"{minutes} to the end (results/ladder_small)"
    for begun, stage, told in (
        ("a\n", "b", f"2 of 7 | {left}"),
        ("a\nb\nb\n", "d0/metrics.json", f"4 of 7 | {minutes} minutes, {left}"),
        ("a\nb\nb\nd0\n", "e", "5 of 7"),
    ):
        (tmp_path / "s.begun").write_text(begun)
        script = f"DATA=d FORMAT=auto; . recipes/stage.sh; stage $RUN/{stage} touch $RUN/{stage}"
        done = shell("-c", script, RUN=run, STAGES=tmp_path / "s")
        assert done.stdout.startswith(f"\n== {told} | touch"), done.stdout + done.stderr


def test_the_plan_of_an_arm_with_a_worker(tmp_path):
    """The dry pass of `async` leaves the file that it counts in, and plans its stages."""
    stages = tmp_path / "stages"
    stages.touch()
    variables = {"DATA": tmp_path, "RUN": tmp_path / "run", "ARMS": "async", "SEEDS": 1}
    done = shell("recipes/claim_emdr2.sh", **variables, STAGES=stages, DRY=1)
    assert done.returncode == 0, done.stderr
    assert "async_seed1/metrics.json\topen" in stages.read_text()


def metrics_of(run, *names):
    """The metrics that all of some models have on the test questions."""
    return set.intersection(*({*read_json(run / name / "test.metrics.json")} for name in names))


def test_rocketqa_nq(rehearsal):
    """Every step starts from START; M_C decides about step 3's negatives, M_D2 learns from its labels too."""
    world, run, _ = rehearsal("rocketqa_nq")
    models = ("d0", "d1", "d2", "d1_raw")
    assert {"top-5", "top-20", "MRR@10", "hit@20"} <= metrics_of(run, *models)
    for name in models:
        assert read_yaml(run / name / "config.yaml")["init"] == str(world / "bert")
        assert {*read_json(run / name / "test_ce.metrics.json")} == {"before", "after"}
    corpus, below = Corpus(world / "corpus.tsv"), gate(run / "d0/train_ce.run")
    scores = read_run(run / "d0" / "train_ce.run")
    for name in ("c", "d1", "d1_raw"):
        rows = lines(run / f"{name}.jsonl")
        for row in rows:
            texts = [corpus.passage(row[key][0]).text for key in ("positives", "negatives")]
            assert [has_answer(text, row["answers"]) for text in texts] == [True, False]
        negatives = [dict(scores[row["qid"]]).get(row["negatives"][0], 9) for row in rows]
        assert all(score < below for score in negatives) == (name == "d1")
    pseudo, scores = lines(run / "pseudo.jsonl"), read_run(run / "d1" / "unlabelled_ce.run")
    assert pseudo and lines(run / "d2.jsonl") == lines(run / "d1.jsonl") + pseudo
    assert all(row["positives"] == [scores[row["qid"]][0][0]] for row in pseudo)


def test_rocketqa_marco(rehearsal):
    """Four random passages for a positive, then four of a ranking that M_C did not score (the gate is 0)."""
    world, run, _ = rehearsal("rocketqa_marco")
    corpus = Corpus(world / "corpus.tsv", "marco")
    assert [corpus[0].title, corpus[1].title] == ["-", "paris"] and "river of paris" in corpus[0].text
    assert "hit@50" in metrics_of(run, "d0", "d1", "d2")
    scored, extra = read_run(run / "d0" / "train_ce.run"), {str(pid) for pid in range(2, 31)}
    for name in ("d0", "d1"):
        rows = lines(run / f"{name}.jsonl")
        assert len({(row["qid"], *row["positives"], *row["negatives"]) for row in rows}) == len(rows) == 160
        assert not any(row["negatives"][0] in row["positives"] for row in rows)
    for row in rows:  # d1's; extra positives are never drawn
        assert row["negatives"][0] not in dict(scored[row["qid"]])
        assert row["qid"] != "q0" or row["negatives"][0] not in extra
    assert lines(run / "d2.jsonl") == lines(run / "d1.jsonl") + lines(run / "pseudo.jsonl")


def test_ance_tele_nq(rehearsal):
    """Five negatives near the question, five near the positive, then the old ones; always from START."""
    world, run, _ = rehearsal("ance_tele_nq")
    last = {row["qid"]: row["negatives"] for row in lines(run / "m1.jsonl")}
    assert len(last) == 40 and {len(negatives) for negatives in last.values()} == {10}
    ann, lookahead = (dict(iter_run(run / "m1" / f"{name}.run")) for name in ("ann", "lookahead"))
    rows = lines(run / "m2.jsonl")
    for row in rows:
        near, beside, old = row["negatives"][:5], row["negatives"][5:10], row["negatives"][10:]
        assert {*near} <= {*dict(ann[row["qid"]])} and {*beside} <= {*dict(lookahead[row["qid"]])}
        assert old == last[row["qid"]] and lookahead[row["qid"]][0][0] == row["positives"][0]
    assert any(row["negatives"][:10] != last[row["qid"]] for row in rows)
    assert "top-20" in metrics_of(run, "m1", "m2")
    for episode, negatives, steps in ((1, 2, 3), (2, 3, 5)):
        config = read_yaml(run / f"m{episode}" / "config.yaml")
        assert config["init"] == str(world / "bert") and config["negatives"] == negatives
        assert read_json(run / f"m{episode}" / "metrics.json")["step"] == steps


def test_ance_tele_trivia(rehearsal):
    """A question without a positive takes the first passage with its answer, and looks ahead from there."""
    world, run, output = rehearsal("ance_tele_trivia")
    corpus, rows = Corpus(world / "corpus.tsv"), lines(run / "m1.jsonl")
    without = [row for row in rows if int(row["qid"][1:]) < 10]
    assert without and len(rows) >= 30
    for row in without:
        assert has_answer(corpus.passage(row["positives"][0]).text, row["answers"])
    assert "--question_tokens 64" in output and "top-20" in metrics_of(run, "m1")


def test_ance_tele_marco(rehearsal):
    """One encoder is both towers, and the file has MS MARCO's metrics."""
    _, run, _ = rehearsal("ance_tele_marco")
    towers = [folder_hash(run / "m1" / name) for name in ("query_encoder", "doc_encoder")]
    assert towers[0] == towers[1] and not (run / "m1" / "doc_encoder").is_symlink()
    assert not (run / "m0" / "questions.jsonl").exists()
    assert {"MRR@10", "hit@1000"} <= metrics_of(run, "m1")


def test_emdr2_nq(rehearsal):
    """Masked sentences, then questions: EMDR2 and plain FiD both start from what the sentences taught."""
    world, run, output = rehearsal("emdr2_nq")
    masked = lines(run / "mss.jsonl")
    assert len(masked) == 30 and all(row["answers"] == ["1889"] for row in masked)
    mss, fid, emdr2 = (read_yaml(run / name / "config.yaml") for name in ("mss", "fid", "."))
    assert mss["query_encoder"] == f"{world}/dpr/query_encoder" and not mss["dev"]
    for config in (fid, emdr2):
        keys = ("doc_encoder", "reader", "embeddings")
        assert [config[key] for key in keys] == [f"{run}/mss/{key}" for key in keys]
    assert (fid["retriever_loss"], emdr2["retriever_loss"], emdr2["refresh"]) == ("none", "emdr2", "sync")
    for name in ("fid", "."):
        assert read_json(run / name / "metrics.json")["step"] == 3
        assert read_json(run / name / "answers.metrics.json")["EM@4"]["n"] == 10
    assert {"top-5", "top-20"} <= metrics_of(run, ".") and (run / "curves.png").is_file()
    assert f"{run}/test.run" in (run / "compare.txt").read_text() and "n = 10 questions" in output
    assert re.search(r"EM .*\n +F1 ", (run / "compare_answers.txt").read_text())
    index_age = [row["index_age"] for row in lines(run / "metrics.jsonl") if "index_age" in row]
    assert index_age == [0, 1, 0], "the passages are encoded anew after two steps"


def test_claim_emdr2(rehearsal):
    """The question encoders learn alone from what plain FiD left; the control's answers belong to others."""
    world, run, _ = rehearsal("claim_emdr2")
    for name in ("token_seed1", "token_seed2", "shuffled_seed1"):
        config = read_yaml(run / name / "config.yaml")
        assert config["reader"] == f"{run}/fid/reader" and not config["train_doc_encoder"]
        assert config["embeddings"] == f"{run}/start/embeddings" and config["refresh"] == "none"
        assert read_json(run / name / "metrics.json")["best_step"] == 3
        assert {"top-5", "top-20"} <= metrics_of(run, name)
    mine, others = lines(world / "train.jsonl"), lines(run / "shuffled.jsonl")
    assert [row["qid"] for row in mine] == [row["qid"] for row in others]
    answers = [[row["answers"] for row in rows] for rows in (mine, others)]
    assert answers[0] != answers[1] and sorted(answers[0]) == sorted(answers[1])
    for name in ("longer", "none", "sync"):
        config = read_yaml(run / f"{name}_seed1" / "config.yaml")
        assert config["query_encoder"] == f"{run}/token_seed1/query_encoder"
        assert config["reader"] == f"{run}/token_seed1/reader"
        assert config["train_doc_encoder"] == (name != "longer")
        assert config["refresh"] == ("sync" if name == "sync" else "none")
    for name in ("fid_on_start", "fid_on_token", "token_on_token", "plain_on_start"):
        assert read_json(run / f"{name}.metrics.json")["EM@4"]["n"] == 10


def test_claim_dpr(rehearsal):
    """As many updates as inbatch, or as many questions as gc: 16 x 2 are 8 x 4."""
    _, run, _ = rehearsal("claim_dpr")
    arms = {"inbatch": (2, 8, 0), "hard": (2, 8, 1), "gc": (2, 16, 0), "more": (4, 8, 0)}
    assert "top-20" in metrics_of(run, *(f"{name}_seed1" for name in arms))
    for name, (steps, batch, negatives) in arms.items():
        config = read_yaml(run / f"{name}_seed1" / "config.yaml")
        assert (config["batch_size"], config["negatives"], config["keep"]) == (batch, negatives, "last")
        assert read_json(run / f"{name}_seed1" / "metrics.json")["step"] == steps
        assert config["init"] == f"{run}/start/query_encoder"


def test_dpr_nq(rehearsal):
    _, run, output = rehearsal("dpr_nq")
    assert len(read_json(run / "test" / "reader.json")) == 10
    assert read_json(run / "test" / "reader.metrics.json")["EM@100"]["n"] == 10 and "test.run" in output


def test_own_data(rehearsal):
    """corpus.tsv and questions.jsonl in a folder: a report first, a table and the command that asks last."""
    world, run, output = rehearsal("own_data")
    assert [len(lines(world / f"{name}.jsonl")) for name in ("train", "dev", "test")] == [48, 6, 6]
    assert "questions.jsonl is split into" in output and "are cut at 128 tokens" in output
    table = {row["name"]: row["metrics"] for row in read_json(run / "table.json")["rows"]}
    retrieval = {"BM25", "untrained encoder", "inverse cloze alone", "trained encoder", "trained + BM25"}
    assert set(table) == retrieval | {"title of passage 1", *(f"reader, best of {n}" for n in (1, 2, 3))}
    assert table["reader, best of 3"]["EM"]["n"] == 6
    assert table["trained encoder"]["top-100"]["value"] == 1  # sixty passages
    assert table["inverse cloze alone"] or "left out: fewer than 64 sentences" in output
    assert "n = 6 questions, 60 passages" in output
    place, command = re.search(r"Ask your own questions, in (.*):\n    (.*)\n$", output).groups()
    question = "which colour has the river of paris"
    asked = shell("-c", f"{command} {question}", cwd=place, PATH=COMMON["PATH"])
    assert re.search(r"^answer: .* \| span .* \| in dense \d", asked.stdout, re.M), asked.stderr


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        ("own_data.sh my", {}, "/my/corpus.tsv: no such file"),
        ("own_data.sh", {}, "usage: bash recipes/own_data.sh FOLDER"),
        ("claim_dpr.sh", {"ARMS": "inbatch hart"}, "ARMS: hart is none of inbatch hard gc more"),
        ("claim_emdr2.sh", {"ARMS": "tokens"}, "ARMS: tokens is none of"),
        ("claim_rocketqa.sh", {"ARMS": "ann"}, "ARMS: ann is none of"),
        ("claim_rocketqa.sh", {"PARTS": "share"}, "PARTS: share is none of"),
        ("claim_ance_tele.sh", {"ARMS": "an"}, "ARMS: an is none of"),
        ("claim_ance_tele.sh", {"FLOOR": "everything"}, "FLOOR: everything is none of"),
        ("ladder.sh", {"RUNGS": "dpr rocketqa"}, "RUNGS: rocketqa is none of"),
    ],
)
def test_a_mistake_is_told_at_once(tmp_path, command, variables, message):
    """Before anything is made."""
    script, *arguments = command.split()
    places = {"DATA": tmp_path / "data", "RUN": tmp_path / "run"}
    done = shell(ROOT / "recipes" / script, *arguments, cwd=tmp_path, **places | variables)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


REFUSES = """#!/usr/bin/env bash
echo "$@" >>$LOG
[ "$1" != train_reader.py ] || exit $CODE
[ "$1" != recipes/hybrid_weight.py ] || echo 1.0
"""


@pytest.mark.parametrize(("code", "table"), [(2, True), (130, False)])
def test_a_start_that_makes_no_reader_still_has_its_table(tmp_path, code, table):
    """What train_reader.py refuses costs the reader alone; Ctrl-C ends the recipe."""
    data, fake = tmp_path / "my", tmp_path / "bin" / "python"
    data.mkdir()
    fake.parent.mkdir()
    fake.write_text(REFUSES)
    fake.chmod(0o755)
    (data / "corpus.tsv").touch()
    for name in ("train", "dev", "test"):
        (data / f"{name}.jsonl").write_text('{"answers": ["x"]}\n')
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "inverse_cloze.jsonl").touch()
    (tmp_path / "run" / "test").mkdir()
    variables = {"RUN": tmp_path / "run", "LOG": tmp_path / "log", "CODE": code, "START": tmp_path}
    variables |= {"PATH": f"{fake.parent}:{ENVIRONMENT['PATH']}"}
    done = shell("recipes/own_data.sh", str(data), **variables)
    called = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert (done.returncode == 0) is table and "answer.py" not in called
    assert ("recipes/demo/table.py" in called) is table and ("recipes/page.py" in called) is table
    assert ("READER_START names other weights" in done.stdout) is table


@pytest.mark.parametrize(
    ("corpus_format", "text", "expected"),
    [
        ("auto", "id\ttext\ttitle\n1\ta\tA\n", "id\ttext\ttitle\n1\ta\t\n"),
        ("auto", "id\ttitle\ttext\n1\tA\ta\n", "id\ttitle\ttext\n1\t\ta\n"),
        ("marco", "1\tA\ta\n2\tB\tb\n", "1\t\ta\n2\t\tb\n"),
    ],
)
def test_titles_are_blanked_wherever_they_stand(tmp_path, corpus_format, text, expected):
    """The texts stay, also where the title comes first."""
    (tmp_path / "corpus.tsv").write_text(text)
    variables = {
        "DATA": tmp_path,
        "RUN": tmp_path / "run",
        "FORMAT": corpus_format,
        "LAUNCH": "",
        "ENCODE_FLAGS": "",
    }
    done = shell("-c", f". recipes/stage.sh && DRY= && blank_titles {tmp_path}", **variables | {"DRY": ""})
    assert done.stdout == expected, done.stderr
