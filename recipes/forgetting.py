"""
What a retriever forgets from episode to episode, of a run of recipes/claim_ance_tele.sh.

In:  RUN/ance/ARM_seedN/mE/{ann,test}.run of arms and episodes; RUN/data/{corpus.tsv,train.jsonl,test.jsonl}
Out: RUN/episodes.json, which recipes/plot.py draws; also printed. RUN/ance/ranks.json, a number a question of
     each arm and episode ("all_m3_seed1"), for recipes/claims.py
Run: python recipes/forgetting.py runs/claim_rocketqa

known      of the training questions, those whose positive is among the 20 best passages
forgotten  of all training questions, those that were known after the last episode and are not after this one
learned    the other way round
top-k, MRR@10: of the test questions; a passage is right if it holds an answer, whoever labelled it

All with n and a 95 % bootstrap interval over the questions; gains are paired by question.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.claims import write_rows  # noqa: E402
from recipes.compare import first_ranks, metrics_of_ranks, within  # noqa: E402
from utils.data import Corpus, read_questions  # noqa: E402
from utils.metrics import print_table, with_intervals  # noqa: E402
from utils.plumbing.config import UserError, friendly_errors  # noqa: E402
from utils.plumbing.files import read_json, write_json  # noqa: E402

BEST = 20
KEPT = ("known", "forgotten", "top-20", "MRR@10")  # in ranks.json


def by_answer(path, questions, corpus):
    """Return {"top-k", "MRR@10": array [Q]} of a .run, both of the first passage with an answer."""
    ranks = first_ranks(path, questions, corpus)
    metrics = metrics_of_ranks(ranks | {"right": ranks["answer"]})
    return {name: values for name, values in metrics.items() if not name.startswith("hit")}


def known(path, questions):
    """Return bool [Q]: whether a positive of the question is among the BEST first passages of a .run."""
    without_answers = [question | {"answers": []} for question in questions]
    ranks = first_ranks(path, without_answers, corpus=None)["right"]
    return within(np.array(ranks), BEST) > 0


def episodes_of(folder, train, test, corpus):
    """Return [{metric: array [Q]}] of the episodes of an arm, the start first."""
    episodes = []
    while (folder / f"m{len(episodes)}" / "test.run").is_file():
        model = folder / f"m{len(episodes)}"
        now = known(model / "ann.run", train)
        values = {"known": now}
        if episodes:
            before = episodes[-1]["known"]
            values |= {"forgotten": before & ~now, "learned": now & ~before}
        episodes.append(values | by_answer(model / "test.run", test, corpus))
    return [{name: numbers.astype(float) for name, numbers in values.items()} for values in episodes]


def table(arms):
    """Return {"rows", "gains"} of {ARM_seedN: its episodes}: a row an arm and episode."""
    rows, gains = [], []
    for name, episodes in arms.items():
        for number, values in enumerate(episodes):
            metrics = with_intervals(values)
            print_table(metrics, f"{name}, episode {number}")
            rows.append({"row": f"{name} m{number}", "arm": name, "episode": number, "metrics": metrics})
            # over the two outer arms of the same seed, and over the arm itself with seed 1
            arm, seed = name.split("_seed")
            for over in dict.fromkeys((f"ann_seed{seed}", f"all_seed{seed}", f"{arm}_seed1")):
                if number and over != name and number < len(arms.get(over, [])):
                    theirs = arms[over][number]
                    gain = with_intervals({metric: values[metric] - theirs[metric] for metric in values})
                    gains.append({"row": f"{name} m{number}", "over": f"{over} m{number}", "metrics": gain})
    return {"rows": rows, "gains": gains}


def say_steps(folders):
    """Print a warning where two arms took unequally many steps in an episode."""
    # why: a question that mining drops is missing in the file of one arm, not in that of another
    steps = {}
    for path in (path for folder in folders for path in sorted(folder.glob("m[1-9]/metrics.json"))):
        steps.setdefault(path.parent.name, {})[path.parent.parent.name] = read_json(path)["step"]
    for episode, taken in steps.items():
        if len({*taken.values()}) > 1:
            print(f"warning: {episode}: the arms took unequally many steps: {taken}")


def main(run):
    """Write episodes.json and ranks.json."""
    run = Path(run)
    train, test = (read_questions(run / "data" / f"{name}.jsonl") for name in ("train", "test"))
    corpus = Corpus(run / "data" / "corpus.tsv")
    folders = sorted(path for path in (run / "ance").glob("*_seed*") if (path / "m1/test.run").is_file())
    if not folders:
        raise UserError(
            f"{run}/ance: no arm in it with a first episode; run recipes/claim_ance_tele.sh first"
        )
    arms = {folder.name: episodes_of(folder, train, test, corpus) for folder in folders}
    say_steps(folders)
    write_json(run / "episodes.json", {"passages": len(corpus)} | table(arms))
    kept = {}
    for name, episodes in arms.items():
        arm, seed = name.split("_seed")
        for number, values in enumerate(episodes):
            kept[f"{arm}_m{number}_seed{seed}"] = {
                metric: values[metric].round(4).tolist() for metric in KEPT if metric in values
            }
    write_rows(run / "ance" / "ranks.json", kept)


if __name__ == "__main__":
    with friendly_errors():
        if len(sys.argv) != 2:
            raise UserError("usage: python recipes/forgetting.py RUN")
        main(sys.argv[1])
