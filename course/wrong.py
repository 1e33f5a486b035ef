"""
What the grader is proved with: wrong answers, other right answers, and the key of the predictions.

WRONG   {task: [(what it is, a piece of the solution, what stands there instead, the checks that it loses)]}
        It must lose these checks and no other, at every sealed seed. "What it is" is also what a student
        reads after "comes out when". From answers/a1.txt: checks: what it is, "-" old lines, "+" new lines
RIGHT   {task: [(what it is, a function that must keep all points)]}, from answers/a1.py
PREDICT {assignment: a function from the numbers of a student to {question: answer}}

This file and answers/ stay with the staff: they show most of the solution.
"""

import ast
import math
from pathlib import Path

from child import parts

WRONG, RIGHT = {}, {}


def read_wrong(text):
    """Return what WRONG says above, of one file."""
    found = {}
    for block in text.split("\n\n"):
        head, *lines = block.rstrip("\n").split("\n")
        if head.startswith("== "):
            task = found[head.removeprefix("== ")] = []
            continue
        checks, _, what = head.partition(": ")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        task.append((what, old, new, checks.split()))
    return found


def read_right(text):
    """Return {function: [(its docstring, its text)]} of one file."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
            found.setdefault(node.name, []).append((ast.get_docstring(node), "\n".join(lines)))
    return found


for path in sorted((Path(__file__).resolve().parent / "answers").glob("a?.txt")):
    tasks = read_wrong(path.read_text(encoding="utf-8"))
    rights = read_right(path.with_suffix(".py").read_text(encoding="utf-8"))
    WRONG |= tasks
    RIGHT |= {task: rights[parts(task)[1]] for task in tasks}


# ---------------------------------------------------------------- the key of the predictions
def a1(n, m, b, h, above, ties):
    columns = b * (1 + h)
    found = {"lowest_loss": m * math.log(m) / n, "negatives": columns - 1}
    return found | {"even": math.log(columns), "rank": above + ties + 1}


def a2(q, p, c):
    chunks = math.ceil(q / c) + math.ceil(p / c)
    return {"plain": chunks, "cached": 2 * chunks, "rows": c, "accumulated": c - 1}


def a3(a, b, c, r, n):
    ideal = 1 + 1 / math.log2(3)
    found = {"mrr": (1 / a + 1 / b) / 4, "top5": ((a <= 5) + (b <= 5)) / 4}
    found["ndcg"] = 1 / math.log2(b + 1) / ideal
    share = r / n
    return found | {"interval": 100 * 2 * 1.96 * (share * (1 - share) / n) ** 0.5}


def a4(a, b, n, t, pool, k):
    scores = {rank: 0.95 - 0.1 * (rank - 1) for rank in range(1, 11)}
    taken = sum(score < t for rank, score in scores.items() if rank not in (a, b))
    labelled = sum(score > t for score in scores.values())
    return {"topk": n + 2, "denoise": taken, "pseudo": labelled, "epochs": pool // k + 1}


def a5(s0, s1, s2, e0, e1, e2, r, p, g, c):
    span = -math.log(s0 * e1 + s2 * e2)
    pairs = [(s0, e0), (s0, e1), (s1, e1), (s1, e2), (s2, e2)]
    best = max(start * end for start, end in pairs)
    return {"span": span, "whole": span - math.log(r), "best": best, "f1": 2 * c / (p + g)}


def a6(p1, p2, p3, l1, l2, l3):
    evidence = p1 * l1 + p2 * l2 + p3 * l3
    found = {"slope_1": p1 - p1 * l1 / evidence, "slope_3": p3 - p3 * l3 / evidence}
    return found | {"loss": -math.log(evidence), "even": 0.0}


PREDICT = {key.__name__: key for key in (a1, a2, a3, a4, a5, a6)}
