"""
One worked variant of each function of assignment 1: its docstring and body replace those of the solution.

Run: python course/kit.py make 1 --student ID --out FOLDER --variant course/variants/a1.py
This file is public. Variants that count are in a folder of the staff, in this form.
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    """
    Return (the mean of two losses, how many questions score highest at their positive).

    The first loss is the paper's Eq. 2: the mean over questions of -log softmax_n(q . p_n) at the positive.
    The second goes the other way: the mean over questions of -log softmax_q(q . p) of the question's positive
    over all questions. positive_Q: the column of each question's positive. excluded: [2, E], pairs (question,
    column) taken out of both softmaxes.
    """
    scores_QN = q_QD @ p_ND.T
    if excluded is not None and excluded.numel():
        scores_QN = scores_QN.index_put(tuple(excluded), scores_QN.new_tensor(-math.inf))
    there = F.cross_entropy(scores_QN, positive_Q)
    back = F.cross_entropy(scores_QN[:, positive_Q].T, torch.arange(len(q_QD)))
    correct = (scores_QN.argmax(1) == positive_Q).sum()
    return (there + back) / 2, correct


def excluded_pairs(items, entries, padding, train, cfg):
    """
    Return (the (question, column) pairs that the softmax leaves out, how many questions have a duplicate).

    Padding is left out for the question that it pads, and only for it. With mask_duplicates a question's own
    positives that another question brought are left out too; its label stays. Without mask_duplicates the
    question's own hard negatives are left out in their place.
    """
    width = 1 + cfg.negatives
    pairs = {(column // width, column) for column in padding}
    have = 0
    for row, item in enumerate(items):
        mine = {passage_key(positive) for positive in train[item]["positives"]}
        if cfg.mask_duplicates:
            columns = [
                c for c, entry in enumerate(entries) if passage_key(entry) in mine and c not in padding
            ]
            columns = [c for c in columns if c != row * width]
            have += bool(columns)
        else:
            columns = range(row * width + 1, (row + 1) * width)
        pairs |= {(row, column) for column in columns}
    return sorted(pairs), have


def gather_rows(x_BD):
    """
    Gather [B, D] of each of W devices: [W*B, D] on each, this device's own rows first, then those of the
    devices after it, in a ring: device 1 of 3 has the order 1, 2, 0.

    Only this device's own rows have a gradient.
    """
    rank, devices = world()
    if devices == 1:
        return x_BD
    rows = [torch.empty_like(x_BD, requires_grad=False) for _ in range(devices)]
    dist.all_gather(rows, x_BD.detach().contiguous())
    return torch.cat([x_BD, *rows[rank + 1 :], *rows[:rank]])


def sum_gradients(parameters):
    """Take the mean of .grad over devices, in place; a weight without a gradient is passed over."""
    devices = world()[1]
    for p in parameters:
        if devices > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= devices


def learning_rate_factor(step, warmup, total, floor):
    """
    Rise linearly over `warmup` steps, from 1 / warmup at step 0 to 1 at step warmup - 1. Then fall as half a
    cosine from 1 at step `warmup` to `floor` at step `total`, and stay there.
    """
    if step < warmup:
        return (step + 1) / warmup
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2


def positive_ranks(scores_QN, gold_Q):
    """
    Return the rank of each question's positive (column gold_Q) among N passages, from 1: float array [Q].
    Of the passages with its very score half count as above it. A NaN counts as below every number, and a
    positive whose score is NaN has rank N.
    """
    gold_Q = np.asarray(gold_Q)
    gold_Q1 = np.take_along_axis(scores_QN, gold_Q[:, None], axis=1)
    above_Q = (scores_QN > gold_Q1).sum(axis=1)
    same_Q = (scores_QN == gold_Q1).sum(axis=1) - 1
    ranks_Q = 1 + above_Q + same_Q / 2
    return np.where(np.isnan(gold_Q1[:, 0]), scores_QN.shape[1], ranks_Q)
