"""
What the grader is proved with: wrong answers, other right answers, and the key of the predictions.

WRONG   {task: [(what it is, a piece of the solution, what stands there instead, the checks that it loses)]}
        It must lose these checks and no other, at every sealed seed. "What it is" is also what a student
        reads after "comes out when".
RIGHT   {task: [(what it is, a function that must keep all points)]}
PREDICT {assignment: a function from the numbers of a student to {question: answer}}

This file stays with the staff: it shows most of the solution.
"""

import math

WRONG, RIGHT, PREDICT = {}, {}, {}


# ---------------------------------------------------------------- 1, in-batch negatives
WRONG["train_dpr.py:in_batch_loss"] = [
    (
        "the loss is summed over the questions",
        "F.cross_entropy(scores_QN, positive_Q)",
        'F.cross_entropy(scores_QN, positive_Q, reduction="sum")',
        "loss_value loss_mask",
    ),
    ("`excluded` is not used", "if excluded is not None and excluded.numel():", "if False:", "loss_mask"),
    (
        "the vectors are cut to length 1 (cosine)",
        "scores_QN = q_QD @ p_ND.T",
        "scores_QN = F.normalize(q_QD, dim=1) @ F.normalize(p_ND, dim=1).T",
        "loss_value loss_mask",
    ),
    (
        "the pairs of `excluded` are taken as (column, question)",
        "tuple(excluded)",
        "tuple(excluded.flip(0) % len(q_QD))",
        "loss_mask",
    ),
    (
        "a left-out score becomes 0, which takes part",
        "scores_QN.new_tensor(-math.inf)",
        "scores_QN.new_tensor(0.0)",
        "loss_mask",
    ),
    (
        "the scores are divided by a temperature",
        "q_QD @ p_ND.T",
        "q_QD @ p_ND.T / 20",
        "loss_value loss_mask",
    ),
    (
        "the second value is the share of the right questions",
        "(scores_QN.argmax(1) == positive_Q).sum()",
        "(scores_QN.argmax(1) == positive_Q).float().mean()",
        "loss_count",
    ),
    (
        "the label of question i is taken to be column i",
        "    loss = F",
        "    positive_Q = torch.arange(len(q_QD))\n    loss = F",
        "loss_value loss_mask loss_count",
    ),
]
RIGHT["train_dpr.py:in_batch_loss"] = [
    (
        "by logsumexp, question by question",
        """
def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    losses, count = [], 0
    for row, label in enumerate(positive_Q.tolist()):
        out = set()
        if excluded is not None:
            out = {column for question, column in excluded.T.tolist() if question == row}
        kept = [column for column in range(len(p_ND)) if column not in out]
        scores = p_ND[kept] @ q_QD[row]
        losses.append(scores.logsumexp(0) - p_ND[label] @ q_QD[row])
        count += kept[int(scores.argmax())] == label
    return torch.stack(losses).mean(), count
""",
    ),
    (
        "with a mask of the shape of the scores",
        """
def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    scores = torch.einsum("qd,nd->qn", q_QD, p_ND)
    if excluded is not None:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[excluded[0], excluded[1]] = True
        scores = scores.masked_fill(mask, float("-inf"))
    log = torch.log_softmax(scores, dim=1)
    return -log.gather(1, positive_Q[:, None]).mean(), (log.argmax(1) == positive_Q).sum().item()
""",
    ),
]
WRONG["train_dpr.py:excluded_pairs"] = [
    (
        "a question's own label is left out",
        "        duplicates.discard((row, row * width))  # its own label stays\n",
        "",
        "own twins",
    ),
    (
        "the label of question i is taken to be column i",
        "duplicates.discard((row, row * width))",
        "duplicates.discard((row, row))",
        "own twins",
    ),
    (
        "padding is a negative of every question",
        "set(itertools.product(range(len(items)), padding))",
        "set()",
        "padding",
    ),
    (
        "padding is left out for its own question only",
        "set(itertools.product(range(len(items)), padding))",
        "{(column // width, column) for column in padding}",
        "padding",
    ),
    ("padding is counted as a duplicate", " and column not in padding:", ":", "twins"),
    (
        "only the first positive of a question is looked for",
        'in train[item]["positives"]:',
        'in train[item]["positives"][:1]:',
        "twins",
    ),
    (
        "mask_duplicates is not read",
        "if cfg.mask_duplicates and column not in padding:",
        "if column not in padding:",
        "switch",
    ),
]
RIGHT["train_dpr.py:excluded_pairs"] = [
    (
        "every pair is looked at",
        """
def excluded_pairs(items, entries, padding, train, cfg):
    pairs, count = [], 0
    for row, item in enumerate(items):
        mine = [passage_key(entry) for entry in train[item]["positives"]]
        for column, entry in enumerate(entries):
            if column in padding:
                pairs.append((row, column))
            elif cfg.mask_duplicates and passage_key(entry) in mine and column != row * (1 + cfg.negatives):
                pairs.append((row, column))
                count += 1
    return pairs, count
""",
    )
]
WRONG["utils/distributed.py:gather_rows"] = [
    (
        "the gathered rows are constants: all_gather has no gradient",
        "    rows[rank] = x_BD",
        "    #",
        "gather_gradient",
    ),
    (
        "the own rows come first on every device",
        "torch.cat(rows)",
        "torch.cat([rows[rank], *rows[:rank], *rows[rank + 1 :]])",
        "gather_order gather_gradient",
    ),
    (
        "the gradient of the other devices' losses is added too",
        "    rows = [torch.empty_like(x_BD, requires_grad=False) for _ in range(devices)]",
        "    from torch.distributed.nn.functional import all_gather\n\n"
        "    return torch.cat(all_gather(x_BD))\n    rows = []",
        "gather_gradient",
    ),
    (
        "the own rows stand in every device's place",
        "dist.all_gather(rows, x_BD.detach().contiguous())",
        "rows = [x_BD.detach()] * devices",
        "gather_order",
    ),
    (
        "the gradient is divided by the number of devices",
        "    rows[rank] = x_BD",
        "    rows[rank] = x_BD / devices + x_BD.detach() * (1 - 1 / devices)",
        "gather_gradient",
    ),
]
RIGHT["utils/distributed.py:gather_rows"] = [
    (
        "the constants plus a difference that is zero",
        """
def gather_rows(x_BD):
    rank, devices = world()
    if devices == 1:
        return x_BD
    parts = [torch.zeros_like(x_BD) for _ in range(devices)]
    dist.all_gather(parts, x_BD.detach())
    size = len(x_BD)
    before, after = torch.cat(parts)[: rank * size], torch.cat(parts)[(rank + 1) * size :]
    return torch.cat([before, x_BD, after], dim=0)
""",
    )
]
WRONG["utils/distributed.py:sum_gradients"] = [
    (
        "the mean over the devices is taken, as DistributedDataParallel does",
        "dist.all_reduce(p.grad, async_op=True)",
        "dist.all_reduce(p.grad.div_(world()[1]), async_op=True)",
        "sum_value",
    ),
    ("a weight without a gradient is not passed over", " if p.grad is not None", "", "sum_frozen"),
    (
        "the largest gradient is taken",
        "dist.all_reduce(p.grad, async_op=True)",
        "dist.all_reduce(p.grad, dist.ReduceOp.MAX, async_op=True)",
        "sum_value",
    ),
    (
        "only the first weight is summed",
        "for p in parameters if",
        "for p in [*parameters][:1] if",
        "sum_value",
    ),
    (
        "a weight without a gradient gets one of zeros",
        "    pending = [",
        "    parameters = [*parameters]\n    for p in parameters:\n"
        "        p.grad = torch.zeros_like(p) if p.grad is None else p.grad\n    pending = [",
        "sum_frozen",
    ),
]
RIGHT["utils/distributed.py:sum_gradients"] = [
    (
        "all gradients in one message",
        """
def sum_gradients(parameters):
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world()[1] == 1 or not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    parts = joined.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
""",
    )
]
WRONG["train_dpr.py:learning_rate_factor"] = [
    ("the first step has 1 / warmup", "return step / warmup", "return (step + 1) / warmup", "rate_rise"),
    (
        "the fall does not end at `floor`",
        "max(floor, (total - step) / max(1, total - warmup))",
        "(total - step) / max(1, total - warmup)",
        "rate_fall",
    ),
    ("the fall begins at step 0", "/ max(1, total - warmup)", "/ max(1, total)", "rate_fall"),
    ("a training without warm-up divides by 0", "if step < warmup:", "if step <= warmup:", "rate_fall"),
    (
        "`floor` is added",
        "max(floor, (total - step) / max(1, total - warmup))",
        "floor + max(0, (total - step) / max(1, total - warmup))",
        "rate_fall",
    ),
]
RIGHT["train_dpr.py:learning_rate_factor"] = [
    (
        "the smaller of two lines",
        """
def learning_rate_factor(step, warmup, total, floor):
    rise = step / warmup if warmup else 1.0
    fall = (total - step) / (total - warmup) if total > warmup else float(total - step)
    return rise if step < warmup else max(fall, floor)
""",
    )
]
WRONG["utils/metrics.py:positive_ranks"] = [
    (
        "a passage of the same score counts as below",
        "(~below_QN).sum(axis=1)",
        "1 + (scores_QN > gold_Q1).sum(axis=1)",
        "rank_ties rank_nan",
    ),
    (
        "ranks begin at 0",
        "(~below_QN).sum(axis=1)",
        "(~below_QN).sum(axis=1) - 1",
        "rank_value rank_ties rank_nan",
    ),
    (
        "NaN counts as below",
        "(~below_QN).sum(axis=1)",
        "(scores_QN >= gold_Q1).sum(axis=1)",
        "rank_nan",
    ),
    (
        "the smallest score is ranked first",
        "scores_QN < gold_Q1",
        "scores_QN > gold_Q1",
        "rank_value rank_ties rank_nan",
    ),
    (
        "of the passages of the same score half count as above",
        "(~below_QN).sum(axis=1)",
        "1 + (scores_QN > gold_Q1).sum(axis=1) + ((scores_QN == gold_Q1).sum(axis=1) - 1) // 2",
        "rank_ties rank_nan",
    ),
]
RIGHT["utils/metrics.py:positive_ranks"] = [
    (
        "counted passage by passage",
        """
def positive_ranks(scores_QN, gold_Q):
    ranks = []
    for scores, gold in zip(scores_QN, gold_Q):
        ranks.append(sum(1 for score in scores if not score < scores[gold]))
    return np.array(ranks)
""",
    )
]
PREDICT["a1"] = lambda n, m, b, h, above, ties: {
    "lowest_loss": m * math.log(m) / n,
    "negatives": b * (1 + h) - 1,
    "even": math.log(b * (1 + h)),
    "rank": above + ties + 1,
}
