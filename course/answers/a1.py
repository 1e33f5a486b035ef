"""
Other right answers to the functions of assignment 1 (in-batch negatives): each must keep all points.
"""
# ruff: noqa: B905, F811, F821  (a function may stand twice; the names are those of the file it is put into)


def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    """By logsumexp, question by question."""
    losses, count = [], 0
    for row, label in enumerate(positive_Q.tolist()):
        out = set()
        if excluded is not None:
            out = {column for question, column in excluded.T.tolist() if question == row}
        kept = [column for column in range(len(p_ND)) if column not in out]
        scores = p_ND[kept] @ q_QD[row]
        losses.append(scores.logsumexp(0) - p_ND[label] @ q_QD[row])
        count += kept[int(scores.argmax())] == label
    return torch.stack(losses).mean(), torch.tensor(count)


def in_batch_loss(q_QD, p_ND, positive_Q, excluded=None):
    """With a mask of the shape of the scores."""
    scores = torch.einsum("qd,nd->qn", q_QD, p_ND)
    if excluded is not None:
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[excluded[0], excluded[1]] = True
        scores = scores.masked_fill(mask, float("-inf"))
    log = torch.log_softmax(scores, dim=1)
    return -log.gather(1, positive_Q[:, None]).mean(), (log.argmax(1) == positive_Q).sum()


def excluded_pairs(items, entries, padding, train, cfg):
    """Every pair is looked at."""
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


def gather_rows(x_BD):
    """The constants plus a difference that is zero."""
    rank, devices = world()
    if devices == 1:
        return x_BD
    parts = [torch.zeros_like(x_BD) for _ in range(devices)]
    dist.all_gather(parts, x_BD.detach())
    size = len(x_BD)
    before, after = torch.cat(parts)[: rank * size], torch.cat(parts)[(rank + 1) * size :]
    return torch.cat([before, x_BD, after], dim=0)


def sum_gradients(parameters):
    """All gradients in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if world()[1] == 1 or not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    parts = joined.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def learning_rate_factor(step, warmup, total, floor):
    """The smaller of two lines."""
    rise = step / warmup if warmup else 1.0
    fall = (total - step) / (total - warmup) if total > warmup else float(total - step)
    return rise if step < warmup else max(fall, floor)


def positive_ranks(scores_QN, gold_Q):
    """Counted passage by passage."""
    ranks = []
    for scores, gold in zip(scores_QN, gold_Q):
        ranks.append(sum(1 for score in scores if not score < scores[gold]))
    return np.array(ranks)
