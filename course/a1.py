"""
Assignment 1, in-batch negatives: the points, and the drivers that draw numbers and call one function each.

TASKS: under each file:function the points, a driver, what is asked | where to read. A driver takes a numpy
Generator and the function, and returns {name: array, number or list}. Nothing that is expected stands here.
"""

from types import SimpleNamespace

import numpy as np
from child import tasks, times

SHIP = ["train_dpr.py", "doc2embedding.py", "test_dpr.py", "recipes/untrained.py", "tests/toy.py"]
DROP = []
SHOWN = []  # pieces that stay in sight, because other code needs them
TASKS = tasks("""
train_dpr.py:in_batch_loss
   8 loss_value       the mean over questions of -log softmax of plain inner products | paper, Eq. 2
   6 loss_mask        pairs in `excluded` take no part: (question, column) | the docstring
   4 loss_count       how many questions score highest at their positive, a tensor | training_step
train_dpr.py:excluded_pairs
   3 own              the label of a question is never left out | README, part 2
   4 padding          padding is left out for every question | draw_batch
   4 twins            any positive of a question that another question brought is left out, and counted
   3 switch           without mask_duplicates only padding is left out | config/train_dpr_nq.yaml
utils/distributed.py:gather_rows
   5 gather_order     the rows of all devices, in the order of the devices, on each of them
   9 gather_gradient  the own rows have a gradient, all others have none | the file's docstring
utils/distributed.py:sum_gradients
   3 sum_value        every device holds the sum of the gradients | the file's docstring
   2 sum_frozen       a weight without a gradient is passed over
train_dpr.py:learning_rate_factor
   2 rate_rise        a linear rise from 0 | the docstring
   3 rate_fall        a linear fall from 1 at the end of the rise to `floor` | the docstring
utils/metrics.py:positive_ranks
   3 rank_value       ranks from 1 | the docstring
   3 rank_ties        a passage of the same score counts as above | the docstring
   3 rank_nan         so does NaN | the docstring
together
   5 twelve_steps     all your functions in one training: the losses and weights of 12 steps
""")

# ---------------------------------------------------------------- predict
QUESTIONS = {
    "lowest_loss": "A batch has {n} questions. {m} of them have the same gold passage, so it stands there "
    "{m} times. Nothing is masked, there are no hard negatives. What is the lowest mean loss that an encoder "
    "can reach?",
    "negatives": "A batch has {b} questions with {h} hard negatives each. How many negatives has a question?",
    "even": "Every vector of that batch is the same. What is the loss?",
    "rank": "{above} passages score higher than the positive, {ties} others score the same. Its rank?",
}


def numbers(rng):
    """Return the numbers of a student's questions."""
    return {
        "n": int(rng.integers(8, 33)),
        "m": int(rng.integers(2, 6)),
        "b": int(rng.integers(10, 99)),
        "h": int(rng.integers(1, 4)),
        "above": int(rng.integers(2, 9)),
        "ties": int(rng.integers(2, 9)),
    }


# ---------------------------------------------------------------- in_batch_loss
def some_batch(rng, questions, width):
    """Return (q, p, the columns of the positives) in float64, with gradients."""
    import torch

    q_QD = torch.tensor(rng.standard_normal((questions, 7)) * 0.7, requires_grad=True)
    p_ND = torch.tensor(rng.standard_normal((questions * width, 7)) * 0.7, requires_grad=True)
    return q_QD, p_ND, torch.arange(questions) * width


def loss_value(rng, in_batch_loss):
    q_QD, p_ND, positive_Q = some_batch(rng, 5, int(rng.integers(2, 5)))
    loss, _ = in_batch_loss(q_QD, p_ND, positive_Q)
    loss.backward()
    return {"loss": loss, "gradient of q": q_QD.grad, "gradient of p": p_ND.grad}


def loss_mask(rng, in_batch_loss):
    import torch

    q_QD, p_ND, positive_Q = some_batch(rng, 4, 3)
    pairs = [(0, 5), (3, 1), (2, 11), (1, 2), (1, 0)]
    loss, _ = in_batch_loss(q_QD, p_ND, positive_Q, torch.tensor(pairs).T)
    loss.backward()
    empty, _ = in_batch_loss(q_QD, p_ND, positive_Q, torch.zeros(2, 0, dtype=torch.long))
    return {"loss": loss, "gradient of q": q_QD.grad, "gradient of p": p_ND.grad, "without pairs": empty}


@times(5)
def loss_count(rng, in_batch_loss):
    import torch

    # every question points at one passage of length 1: at its positive, or at a passage after the first Q
    questions, width = 6, 2
    p_ND = torch.nn.functional.normalize(torch.tensor(rng.standard_normal((12, 16))), dim=1)
    positive_Q = torch.arange(questions) * width
    right = rng.permutation(questions)[: int(rng.integers(1, questions))]
    target_Q = (positive_Q + 1).clamp(min=7)
    target_Q[right] = positive_Q[right]
    _, count = in_batch_loss(3 * p_ND[target_Q], p_ND, positive_Q)
    return {"count": count.detach()}


# ---------------------------------------------------------------- excluded_pairs
def pairs_of(rng, excluded_pairs, mask=True):
    """Return (pairs, how many are duplicates, width, columns of padding, two questions of one passage)."""
    width = int(rng.integers(2, 5))
    questions = 7
    ids = [str(i) for i in rng.permutation(1000)[: questions * 8]]
    inline = {"title": "t", "text": "x"}
    train = []
    for i in range(questions):
        some = ids[i * 8 : i * 8 + 8]
        train.append({"positives": some[:1], "negatives": some[4 : 3 + width]})
    train[3]["positives"] = train[0]["positives"]  # the same gold passage
    train[1]["positives"] = [ids[9], *train[4]["positives"]]  # its second positive is another's gold passage
    train[5]["negatives"][0] = train[2]["positives"][0]  # a hard negative is another's gold passage
    train[2]["positives"] = train[2]["positives"] + [inline]
    train[6]["negatives"][0] = dict(inline)  # and an inline passage
    items = rng.permutation(questions).tolist()

    # the last column of two questions is padding: their positive again
    entries, padding = [], set()
    for row, item in enumerate(items):
        entries += [train[item]["positives"][0], *train[item]["negatives"]]
        if item in (0, 6) and width > 2:
            entries[-1] = train[item]["positives"][0]
            padding.add(row * width + width - 1)
    if not padding:
        row = items.index(4)
        entries[row * width + 1] = train[4]["positives"][0]
        padding.add(row * width + 1)
    cfg = SimpleNamespace(negatives=width - 1, mask_duplicates=mask)
    pairs, duplicates = excluded_pairs(items, entries, padding, train, cfg)
    pairs = sorted([int(row), int(column)] for row, column in pairs)
    return pairs, int(duplicates), width, padding, (items.index(0), items.index(3))


def own(rng, excluded_pairs):
    pairs, _, width, _, (one, other) = pairs_of(rng, excluded_pairs)
    labels = [[row, column] for row, column in pairs if column == row * width]
    # of two questions with one passage each leaves out the other's label
    crossed = [pair for pair in ([one, other * width], [other, one * width]) if pair in pairs]
    return {"labels that are left out": labels, "labels of the same passage": crossed}


@times(3)
def padding(rng, excluded_pairs):
    pairs, _, _, columns, _ = pairs_of(rng, excluded_pairs)
    return {"pairs of padding": [pair for pair in pairs if pair[1] in columns]}


def twins(rng, excluded_pairs):
    pairs, duplicates, width, columns, _ = pairs_of(rng, excluded_pairs)
    others = [pair for pair in pairs if pair[1] not in columns and pair[1] != pair[0] * width]
    return {"duplicates that are left out": others, "their number": duplicates}


@times(3)
def switch(rng, excluded_pairs):
    pairs, duplicates, *_ = pairs_of(rng, excluded_pairs, mask=False)
    return {"left out": pairs, "number of duplicates": duplicates}


# ---------------------------------------------------------------- devices
def gathered(rng, gather_rows, weights=None):
    """Return what each of two devices gathers, and the gradient of its own rows where weights are given."""
    import torch
    from toys import two_devices

    rows = rng.standard_normal((2, 3, 4))
    weights_ND = torch.tensor(rng.standard_normal((6, 4)))

    def work(rank):
        x_BD = torch.tensor(rows[rank], requires_grad=True)
        all_ND = gather_rows(x_BD)
        if weights is None:
            return {"rows": all_ND}
        (all_ND * weights_ND).sum().backward()
        return {"gradient": x_BD.grad}

    found = two_devices(work)
    return {f"{name} on device {rank}": found[rank][name] for rank in (0, 1) for name in found[rank]}


def gather_order(rng, gather_rows):
    return gathered(rng, gather_rows)


def gather_gradient(rng, gather_rows):
    return gathered(rng, gather_rows, weights=True)


def summed(rng, sum_gradients, frozen):
    """Return what two devices hold after sum_gradients; `frozen` of nine weights have no gradient."""
    import torch
    from toys import two_devices

    gradients = rng.standard_normal((2, 9, 5))
    without = rng.permutation(9)[:frozen]

    def work(rank):
        weights = [torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(9)]
        for i, weight in enumerate(weights):
            weight.grad = None if i in without else torch.tensor(gradients[rank, i])
        sum_gradients(iter(weights))
        if not frozen:
            return {"gradients": torch.stack([weight.grad for weight in weights])}
        none = [weight.grad is None for weight in weights]
        # why these too: a function that does nothing leaves all as it is
        same = [not none[i] and gradients[rank, i, 0] == weights[i].grad[0].item() for i in range(9)]
        return {"without a gradient": torch.tensor(none), "not changed": torch.tensor(same)}

    found = two_devices(work)
    return {f"{name} on device {rank}": found[rank][name] for rank in (0, 1) for name in found[rank]}


def sum_value(rng, sum_gradients):
    return summed(rng, sum_gradients, frozen=0)


def sum_frozen(rng, sum_gradients):
    return summed(rng, sum_gradients, frozen=4)


# ---------------------------------------------------------------- learning rate
def factors(rng, learning_rate_factor, rising):
    found = []
    for warmup in (0, int(rng.integers(2, 9)), int(rng.integers(10, 20))):
        total = warmup + int(rng.integers(5, 30))
        floor = float(rng.uniform(0.05, 0.2))
        steps = range(warmup) if rising else range(warmup, total + 3)
        found += [float(learning_rate_factor(step, warmup, total, floor)) for step in steps]
    return {"factors": np.array(found)}


def rate_rise(rng, learning_rate_factor):
    return factors(rng, learning_rate_factor, rising=True)


def rate_fall(rng, learning_rate_factor):
    return factors(rng, learning_rate_factor, rising=False)


# ---------------------------------------------------------------- ranks
def some_scores(rng):
    """Return (scores of 9 passages for 6 questions, the column of each question's positive)."""
    return rng.standard_normal((6, 9)), rng.integers(0, 9, 6)


def rank_value(rng, positive_ranks):
    scores_QN, gold_Q = some_scores(rng)
    return {"ranks": positive_ranks(scores_QN, gold_Q)}


def rank_ties(rng, positive_ranks):
    scores_QN, gold_Q = some_scores(rng)
    for row, gold in enumerate(gold_Q):
        others = [column for column in range(9) if column != gold]
        same = rng.permutation(others)[: 1 + row % 3]
        scores_QN[row, same] = scores_QN[row, gold]
    scores_QN[5] = 0.5  # a collapsed encoder
    return {"ranks": positive_ranks(scores_QN, gold_Q)}


def rank_nan(rng, positive_ranks):
    scores_QN, gold_Q = some_scores(rng)
    for row, gold in enumerate(gold_Q[:4]):
        others = [column for column in range(9) if column != gold]
        scores_QN[row, rng.permutation(others)[: 1 + row % 3]] = np.nan
    scores_QN[5] = np.nan
    return {"ranks": positive_ranks(scores_QN, gold_Q)}


# ---------------------------------------------------------------- together
def twelve_steps(rng):
    from toys import train

    return train(12, seed=int(rng.integers(1000)))
