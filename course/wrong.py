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
    return torch.stack(losses).mean(), torch.tensor(count)
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
    return -log.gather(1, positive_Q[:, None]).mean(), (log.argmax(1) == positive_Q).sum()
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


# ---------------------------------------------------------------- 2, the gradient cache
WRONG["utils/grad_cache.py:grad_cache_step"] = [
    (
        "the random state is not set again before the second pass",
        "torch.manual_seed(chunk_seed(seed, i))",
        "pass",
        "cache_replay cache_masks",
    ),
    (
        "all chunks have the masks of the first",
        "chunk_seed(seed, i)",
        "chunk_seed(seed, 0)",
        "cache_masks",
    ),
    (
        "the masks depend on the chunk alone",
        "torch.manual_seed(chunk_seed(seed, i))",
        "torch.manual_seed(i)",
        "cache_masks",
    ),
    (
        "the mean over chunks is taken",
        "backward(weighted_bD.sum())",
        "backward(weighted_bD.sum() / len(chunks))",
        "cache_gradient cache_replay",
    ),
    (
        "the mean over the entries of a chunk is taken",
        "weighted_bD.sum()",
        "weighted_bD.mean()",
        "cache_gradient cache_replay",
    ),
    (
        "the first pass builds graphs and keeps them",
        "torch.set_grad_enabled(not cached)",
        "torch.set_grad_enabled(True)",
        "cache_memory",
    ),
    (
        "the graph of the last chunk lives while the next is read",
        "vectors[i] = vectors_bD = weighted_bD = None",
        "vectors[i] = vectors_bD",
        "cache_memory",
    ),
    (
        "the loss that is returned has a graph",
        "return loss.detach(), *rest",
        "return loss, *rest",
        "cache_values",
    ),
    (
        "each chunk has a loss of its own (gradient accumulation)",
        "    loss, *rest = loss_of(leaves)\n    loss.backward()",
        "    for leaf in leaves:\n        loss, *rest = loss_of([leaf])\n        loss.backward()",
        "cache_gradient cache_replay cache_masks cache_values",
    ),
    (
        "`backward` is not called",
        "backward(weighted_bD.sum())",
        "weighted_bD.sum().backward()",
        "cache_backward",
    ),
    ("`backward` is called for the loss too", "    loss.backward()", "    backward(loss)", "cache_backward"),
]
RIGHT["utils/grad_cache.py:grad_cache_step"] = [
    (
        "the random state of every chunk is kept",
        """
def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    torch.manual_seed(chunk_seed(seed, 0))
    states, vectors = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state())
        with torch.set_grad_enabled(not cached):
            vectors.append(encode(chunk))
    leaves = [x.detach().clone().requires_grad_(True) for x in vectors]
    outcome = loss_of(leaves)
    slopes = torch.autograd.grad(outcome[0], leaves)
    for i in range(len(chunks)):
        x, vectors[i] = vectors[i], None
        if cached:
            torch.set_rng_state(states[i])
            x = encode(chunks[i])
        backward((x * slopes[i]).sum())
        del x
    return (outcome[0].detach(), *outcome[1:])
""",
    ),
    (
        "the second pass goes backwards",
        """
def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    def run(i):
        torch.manual_seed(chunk_seed(seed, i))
        return encode(chunks[i])

    if cached:
        with torch.no_grad():
            vectors = [run(i) for i in range(len(chunks))]
    else:
        vectors = [run(i) for i in range(len(chunks))]
    leaves = [x.detach().requires_grad_() for x in vectors]
    loss, *rest = loss_of(leaves)
    loss.backward()
    for i in reversed(range(len(chunks))):
        backward(torch.sum((run(i) if cached else vectors[i]) * leaves[i].grad))
    return (loss.detach(), *rest)
""",
    ),
]
WRONG["utils/distributed.py:chunk_seed"] = [
    ("the parts are added up", "    state = ", "    return sum(seed) + i\n    state = ", "seeds_differ"),
    ("the chunk is forgotten", "[*seed, i]", "[*seed]", "seeds_differ"),
    ("all 64 bits are kept", "state[0] >> 1", "state[0]", "seeds_fit"),
    (
        "the parts are the digits of a number in base 10",
        "    state = ",
        "    return sum(part * 10**n for n, part in enumerate([*seed, i]))\n    state = ",
        "seeds_differ",
    ),
]
RIGHT["utils/distributed.py:chunk_seed"] = [
    (
        "by sha256",
        """
import hashlib


def chunk_seed(seed, i):
    digest = hashlib.sha256(repr((*seed, i)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
""",
    )
]
WRONG["utils/encoder.py:in_chunks"] = [
    (
        "the places are the order of the chunks, not its inverse",
        "torch.from_numpy(np.argsort(order))",
        "torch.tensor(order)",
        "chunks_order",
    ),
    ("the rows stay in the given order", "by_length(ids)", "[*range(len(ids))]", "chunks_padding"),
    (
        "the rows are sorted by their ids",
        "by_length(ids)",
        "sorted(range(len(ids)), key=lambda i: ids[i])",
        "chunks_padding",
    ),
    (
        "the last chunk is lost where it is not full",
        "range(0, len(ids), size)",
        "range(0, len(ids) - size + 1, size)",
        "chunks_order chunks_size",
    ),
    (
        "neighbouring chunks share a row",
        "order[start : start + size]",
        "order[start : start + size + 1]",
        "chunks_order chunks_size chunks_padding",
    ),
]
RIGHT["utils/encoder.py:in_chunks"] = [
    (
        "with numpy, the inverse by assignment",
        """
def in_chunks(ids, size):
    order = np.argsort([len(row) for row in ids], kind="stable")
    places = torch.empty(len(ids), dtype=torch.long)
    places[torch.from_numpy(order)] = torch.arange(len(ids))
    rows = [ids[i] for i in order]
    return [rows[i : i + size] for i in range(0, len(rows), size)], places
""",
    )
]
WRONG["train_dpr.py:add_gradient"] = [
    (
        "the passages stay in the order of their chunks",
        'p_PD = p_PD[batch["passage_places"].to(device)]',
        "pass",
        "wire_gradient",
    ),
    (
        "the questions stay in the order of their chunks",
        'q_BD = q_BD[batch["question_places"].to(device)]',
        "pass",
        "wire_gradient",
    ),
    (
        "gradient_scale is not used",
        "return loss * cfg.gradient_scale, loss.detach(), correct",
        "return loss, loss.detach(), correct",
        "wire_gradient wire_scale",
    ),
    (
        "the loss that is returned is multiplied by gradient_scale too",
        "loss * cfg.gradient_scale, loss.detach(), correct",
        "loss * cfg.gradient_scale, loss.detach() * cfg.gradient_scale, correct",
        "wire_shown",
    ),
    (
        "the loss that is returned has a graph",
        "loss * cfg.gradient_scale, loss.detach(), correct",
        "loss * cfg.gradient_scale, loss, correct",
        "wire_shown",
    ),
    (
        "`excluded` does not reach the loss",
        "in_batch_loss(q_QD, p_ND, positive_Q, excluded)",
        "in_batch_loss(q_QD, p_ND, positive_Q)",
        "wire_mask",
    ),
    (
        "the device is no part of the seed",
        "(cfg.seed, step, accelerator.process_index)",
        "(cfg.seed, step)",
        "wire_seed",
    ),
    (
        "the step is no part of the seed",
        "(cfg.seed, step, accelerator.process_index)",
        "(cfg.seed, accelerator.process_index)",
        "wire_seed",
    ),
]
RIGHT["train_dpr.py:add_gradient"] = [
    (
        "questions and passages by their numbers",
        """
def add_gradient(batch, encoders, accelerator, cfg, step):
    rows = batch["question_chunks"] + batch["passage_chunks"]
    first = len(batch["question_chunks"])

    def encode(i):
        tower = encoders["query_encoder" if i < first else "doc_encoder"]
        with accelerator.autocast():
            return tower(**encoding.collate(tower, rows[i]))

    def loss_of(vectors):
        q = torch.cat(vectors[:first]).index_select(0, batch["question_places"])
        p = torch.cat(vectors[first:]).index_select(0, batch["passage_places"])
        loss, right = in_batch_loss(gather_rows(q), gather_rows(p), batch["positive_Q"], batch["excluded"])
        return cfg.gradient_scale * loss, loss.detach(), right

    seed = (step, cfg.seed, accelerator.process_index)
    chunks = list(range(len(rows)))
    found = grad_cache_step(encode, chunks, loss_of, seed, accelerator.backward, cfg.grad_cache)
    sum_gradients(torch.nn.ModuleDict(encoders).parameters())
    return found[1], found[2]
""",
    )
]
PREDICT["a2"] = lambda q, p, c: {
    "plain": math.ceil(q / c) + math.ceil(p / c),
    "cached": 2 * (math.ceil(q / c) + math.ceil(p / c)),
    "rows": c,
    "accumulated": c - 1,
}


# ---------------------------------------------------------------- 3, search and metrics
WRONG["utils/search.py:exact_topk"] = [
    (
        "row numbers begin anew in every block",
        "places_Qk + start",
        "places_Qk",
        "topk_rows topk_ties topk_short topk_memory",
    ),
    (
        "the last block is forgotten",
        "        refuse_non_finite(",
        "        if start and start + len(x_nD) == N:\n            continue\n        refuse_non_finite(",
        "topk_rows topk_short topk_memory",
    ),
    ("no candidates are kept beyond k", "min(k + SPARE, N)", "min(k, N)", "topk_ties"),
    (
        "the order is that of float32 scores",
        "rescore(queries_QD, shards, rows_QK.cpu().numpy(), k)",
        "(best_QK[:, :k].cpu().numpy(), rows_QK[:, :k].cpu().numpy())",
        "topk_ties",
    ),
    (
        "a block has more passages than are kept",
        "scores_QM.topk(min(K, scores_QM.shape[1]))",
        "scores_QM.topk(K)",
        "topk_rows topk_ties topk_short",
    ),
    (
        "all passages are multiplied at once",
        "blocks(shards, block or BLOCK, device, resident_ND)",
        "blocks(shards, N, device, resident_ND)",
        "topk_memory",
    ),
    (
        "every score is kept until the end",
        "        best_QK, order_QK = scores_QM.topk(min(K, scores_QM.shape[1]))\n"
        "        rows_QK = rows_QM.gather(1, order_QK)\n",
        "        best_QK, rows_QK = scores_QM, rows_QM\n",
        "topk_memory",
    ),
    (
        "the smallest scores are kept",
        "topk(min(K, scores_QM.shape[1]))",
        "topk(min(K, scores_QM.shape[1]), largest=False)",
        "topk_rows topk_ties topk_memory",
    ),
    (
        "a passage with NaN is left out without a word",
        "        refuse_non_finite(x_nD, range(start, start + len(x_nD)))\n",
        "",
        "topk_nan",
    ),
    (
        "without questions the arrays are wider than the corpus",
        "np.zeros((0, min(k, N)), np.float32)",
        "np.zeros((0, k), np.float32)",
        "topk_short",
    ),
]
RIGHT["utils/search.py:exact_topk"] = [
    (
        "a plain product, a running list",
        """
def exact_topk(queries_QD, shards, k, block=0, device="cpu", resident_ND=None):
    queries_QD = check(queries_QD, shards, k)
    total = sum(len(shard) for shard in shards)
    k = min(k, total)
    if len(queries_QD) == 0:
        return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
    place = torch.device(device) if resident_ND is None else resident_ND.device
    q = torch.from_numpy(queries_QD).to(place)
    scores, rows = torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
    for start, x in blocks(shards, block or BLOCK, place, resident_ND):
        refuse_non_finite(x, range(start, start + len(x)))
        numbers = torch.arange(start, start + len(x), device=place).expand(len(q), -1)
        scores = torch.cat([scores.to(place), q @ x.T], dim=1)
        rows = torch.cat([rows.to(place), numbers], dim=1)
        scores, best = torch.sort(scores, dim=1, descending=True)
        scores, best = scores[:, : k + SPARE], best[:, : k + SPARE]
        rows = torch.take_along_dim(rows, best, dim=1)
    return rescore(queries_QD, shards, rows.cpu().numpy(), k)
""",
    )
]
WRONG["utils/search.py:fetch"] = [
    (
        "the first row of a shard is looked for in the shard before",
        'side="right"',
        'side="left"',
        "fetch_rows",
    ),
    (
        "the rows come in the order of the corpus",
        "    ends = np.cumsum(",
        "    rows = np.sort(rows)\n    ends = np.cumsum(",
        "fetch_rows",
    ),
    (
        "the vectors are widened to float32",
        "np.empty((len(rows), shards[0].shape[1]), shards[0].dtype)",
        "np.empty((len(rows), shards[0].shape[1]), np.float32)",
        "fetch_type",
    ),
    (
        "the row is counted from the start of the corpus",
        "rows[home == i] - begin",
        "rows[home == i] % len(shards[i])",
        "fetch_rows",
    ),
]
RIGHT["utils/search.py:fetch"] = [
    (
        "row by row",
        """
def fetch(shards, rows):
    found = []
    for row in rows:
        for shard in shards:
            if row < len(shard):
                found.append(np.array(shard[row]))
                break
            row = row - len(shard)
    return np.stack(found)
""",
    )
]
WRONG["utils/search.py:as_lists"] = [
    ("-1 is kept", " if row >= 0])", "])", "lists_missing"),
    ("row 0 is dropped", "if row >= 0]", "if row > 0]", "lists_pairs"),
    ("row and score are swapped", "[(row, score) for", "[(score, row) for", "lists_pairs lists_missing"),
    (
        "a list ends before the first row 0",
        "        results.append(",
        "        rows = rows[: rows.index(0)] if 0 in rows else rows\n"
        "        scores = scores[: len(rows)]\n        results.append(",
        "lists_pairs",
    ),
]
RIGHT["utils/search.py:as_lists"] = [
    (
        "with a mask",
        """
def as_lists(scores_Qk, rows_Qk):
    found = []
    for scores, rows in zip(scores_Qk, rows_Qk):
        there = rows != -1
        found.append(list(zip(rows[there].tolist(), scores[there].tolist())))
    return found
""",
    )
]
LAST = "return any(_probe(a) in raw and _token_pattern(a).search(_normalise(passage)) for a in answers)"
WRONG["utils/text.py:has_answer"] = [
    (
        "an answer may be any part of the text",
        LAST,
        "return any(a.lower() in passage.lower() for a in answers)",
        "answer_tokens answer_accents answer_blank",
    ),
    (
        "the words of the answer may stand anywhere",
        LAST,
        "return any(tokenize(a) and set(tokenize(a)) <= set(tokenize(passage)) for a in answers)",
        "answer_tokens",
    ),
    (
        "accents are deleted",
        LAST,
        "def bare(text):\n"
        "        return re.sub(r'\\p{M}', '', unicodedata.normalize('NFD', text))\n\n"
        "    return any(_token_pattern(bare(a)).search(_normalise(bare(passage))) for a in answers)",
        "answer_accents",
    ),
    (
        "the text is not normalised to NFD",
        LAST,
        "return any(_token_pattern(a).search(passage.lower()) for a in answers)",
        "answer_accents",
    ),
    (
        "an answer without tokens is in every text",
        "_token_pattern(a).search",
        "not tokenize(a) or _token_pattern(a).search",
        "answer_blank",
    ),
    ("only the first answer is looked for", "for a in answers)", "for a in answers[:1])", "answer_any"),
    ("all answers must be there", "return any(_probe", "return all(_probe", "answer_any"),
    (
        "case counts",
        LAST,
        "def cut(text):\n        return TOKEN.findall(unicodedata.normalize('NFD', text))\n\n"
        "    text = cut(passage)\n    return any(cut(a) and cut(a) == text[i : i + len(cut(a))]"
        " for a in answers for i in range(len(text)))",
        "answer_tokens answer_accents",
    ),
    ("regex is not read", "if regex:", "if False:", "answer_regex"),
    (
        "patterns are searched in the text as it is",
        'text = unicodedata.normalize("NFD", passage)',
        "text = passage",
        "answer_regex",
    ),
]
RIGHT["utils/text.py:has_answer"] = [
    (
        "slices of tokens",
        """
def has_answer(passage, answers, regex=False):
    if regex:
        plain = unicodedata.normalize("NFD", passage)
        return any(_find_regex(plain, pattern) for pattern in answers)
    tokens = tokenize(passage)
    for answer in answers:
        wanted = tokenize(answer)
        for start in range(len(tokens) if wanted else 0):
            if tokens[start : start + len(wanted)] == wanted:
                return True
    return False
""",
    )
]
WRONG["utils/metrics.py:topk_accuracy"] = [
    ("the first k + 1 are looked at", "any(passages[:k])", "any(passages[: k + 1])", "accuracy_cut"),
    (
        "questions without passages are left out",
        "for passages in hits]",
        "for passages in hits if passages]",
        "accuracy_all",
    ),
    (
        "the share of the passages is counted, not of the questions",
        "any(passages[:k])",
        "sum(passages[:k]) / k",
        "accuracy_cut accuracy_all",
    ),
    (
        "only rank k is looked at",
        "any(passages[:k])",
        "any(passages[k - 1 : k])",
        "accuracy_cut accuracy_all",
    ),
]
RIGHT["utils/metrics.py:topk_accuracy"] = [
    (
        "by the first hit",
        """
def topk_accuracy(hits, ks):
    first = [next((i for i, hit in enumerate(row) if hit), 10**9) for row in hits]
    return {k: sum(i < k for i in first) / len(hits) for k in ks}
""",
    )
]
WRONG["utils/metrics.py:mrr"] = [
    ("the cutoff itself does not count", "0 < rank <= cutoff", "0 < rank < cutoff", "mrr_cut"),
    ("the cutoff is not used", "0 < rank <= cutoff", "0 < rank", "mrr_cut"),
    (
        "misses are left out of the mean",
        "    return mean(reciprocal)",
        "    return mean([value for value in reciprocal if value] or [0.0])",
        "mrr_cut mrr_miss",
    ),
    ("rank 0 counts as rank 1", "for rank in ranks]", "for rank in [max(1, r) for r in ranks]]", "mrr_miss"),
]
RIGHT["utils/metrics.py:mrr"] = [
    (
        "a sum over the ranks that count",
        """
def mrr(ranks, cutoff):
    total = 0.0
    for rank in ranks:
        if rank and rank <= cutoff:
            total += 1.0 / rank
    return total / len(ranks)
""",
    )
]
WRONG["utils/metrics.py:ndcg"] = [
    (
        "the ideal order has only what was found",
        "sorted(relevant, reverse=True)",
        "sorted(ranked, reverse=True)",
        "ndcg_ideal",
    ),
    ("passages beyond the cutoff count", "discounted(ranked[:cutoff])", "discounted(ranked)", "ndcg_gain"),
    (
        "a grade counts as yes or no",
        "        ideal = ",
        "        ranked, relevant = ([int(g > 0) for g in x] for x in (ranked, relevant))\n        ideal = ",
        "ndcg_gain ndcg_ideal",
    ),
    (
        "a question without relevant passages counts 1",
        "if ideal else 0.0",
        "if ideal else 1.0",
        "ndcg_ideal",
    ),
    (
        "the ideal order is that of the file",
        "sorted(relevant, reverse=True)",
        "list(relevant)",
        "ndcg_gain",
    ),
]
RIGHT["utils/metrics.py:ndcg"] = [
    (
        "with the natural logarithm, which cancels",
        """
def ndcg(gains, all_gains, cutoff):
    values = []
    for ranked, relevant in zip(gains, all_gains):
        weights = 1 / np.log(np.arange(2, cutoff + 2))
        best = sorted(relevant)[::-1][:cutoff]
        top = ranked[:cutoff]
        ideal = np.dot(best, weights[: len(best)])
        values.append(np.dot(top, weights[: len(top)]) / ideal if len(best) else 0.0)
    return float(np.mean(values))
""",
    )
]
WRONG["utils/metrics.py:bootstrap_interval"] = [
    ("90 % lie within", "[2.5, 97.5]", "[5, 95]", "boot_width"),
    (
        "the questions are drawn without replacement",
        "drawn = rng.multinomial(n, counts / n, size=samples)",
        "drawn = np.tile(counts, (samples, 1))",
        "boot_width boot_skew boot_seed",
    ),
    (
        "a normal curve is taken",
        "low, high = np.percentile(means, [2.5, 97.5])",
        "low, high = means.mean() - 1.96 * means.std(), means.mean() + 1.96 * means.std()",
        "boot_skew",
    ),
    ("the seed is not used", "np.random.default_rng(seed)", "np.random.default_rng()", "boot_seed"),
    (
        "single values are resampled, not means",
        "means = drawn @ values / n",
        "means = rng.choice(values, p=counts / n, size=samples)",
        "boot_width boot_skew",
    ),
]
RIGHT["utils/metrics.py:bootstrap_interval"] = [
    (
        "by drawing places",
        """
def bootstrap_interval(values_per_question, samples=1000, seed=0):
    values = np.asarray(values_per_question, dtype=float)
    generator = np.random.default_rng(seed)
    places = generator.integers(0, len(values), (samples, len(values)))
    means = np.sort(values[places].mean(axis=1))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
""",
    )
]
WRONG["test_dpr.py:hybrid"] = [
    ("a score that is missing counts as 0", "low_bm25)", "0.0)", "hybrid_score hybrid_order"),
    (
        "the weight is on BM25's score",
        "bm25.get(row, low_bm25) + weight * dense.get(row, low_dense)",
        "weight * bm25.get(row, low_bm25) + dense.get(row, low_dense)",
        "hybrid_score",
    ),
    (
        "only what both lists have is kept",
        "for row in dense | bm25:",
        "for row in dense.keys() & bm25:",
        "hybrid_score hybrid_order",
    ),
    (
        "the lists are joined one behind the other",
        "    hits.sort(key=lambda hit: (-hit[1], hit[0]))",
        "    #",
        "hybrid_order",
    ),
    ("equal scores stand in the order of the dense list", "(-hit[1], hit[0])", "-hit[1]", "hybrid_order"),
]
RIGHT["test_dpr.py:hybrid"] = [
    (
        "two passes over the rows",
        """
def hybrid(dense, bm25, weight, k):
    floor = [min((score for _, score in hits), default=0.0) for hits in (dense, bm25)]
    total = {}
    for row in {row for row, _ in [*dense, *bm25]}:
        scores = [dict(hits).get(row, low) for hits, low in zip((dense, bm25), floor)]
        total[row] = weight * scores[0] + scores[1]
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:k]
""",
    )
]
PREDICT["a3"] = lambda a, b, c, r, n: {
    "mrr": (1 / a + 1 / b) / 4,
    "top5": ((a <= 5) + (b <= 5)) / 4,
    "ndcg": (1 / math.log2(b + 1)) / (1 + 1 / math.log2(3)),
    "interval": 100 * 2 * 1.96 * (r / n * (1 - r / n) / n) ** 0.5,
}


# ---------------------------------------------------------------- 4, negatives
WRONG["mine_negatives.py:wrong_for"] = [
    (
        "the question's own positives are negatives",
        "never | {entry for entry in positives if isinstance(entry, str)}",
        "never",
        "wrong_ids",
    ),
    ("what another file knows is not left out", "never | {entry for", "{entry for", "wrong_ids"),
    (
        "a second copy of a positive is a negative",
        "passage.text not in texts and not holds_answer(passage, question, cfg)",
        "not holds_answer(passage, question, cfg)",
        "wrong_texts",
    ),
    (
        "the text of an inline positive is not compared",
        'bool(question["answers"]) or inline',
        'bool(question["answers"])',
        "wrong_texts",
    ),
    (
        "answers are not looked for",
        "passage.text not in texts and not holds_answer(passage, question, cfg)",
        "passage.text not in texts",
        "wrong_answers",
    ),
]
RIGHT["mine_negatives.py:wrong_for"] = [
    (
        "every passage is read",
        """
def wrong_for(question, positives, never, corpus, cfg):
    names = [p for p in positives if not isinstance(p, dict)]
    texts = [passage_of(p, corpus).text for p in positives]
    exact = question["answers"] or len(names) < len(positives)

    def is_negative(pid):
        passage = corpus.passage(pid)
        if pid in names or pid in never or (exact and passage.text in texts):
            return False
        return not holds_answer(passage, question, cfg)

    return is_negative
""",
    )
]
WRONG["mine_negatives.py:topk"] = [
    (
        "answers are not looked for",
        "list(islice(filter(wrong, ranked), cfg.negatives))",
        "[pid for pid in ranked if pid not in positives][: cfg.negatives]",
        "topk_first topk_depth",
    ),
    (
        "the ranking is cut before right passages are taken out",
        "list(islice(filter(wrong, ranked), cfg.negatives))",
        "list(filter(wrong, ranked[: cfg.negatives]))",
        "topk_first",
    ),
    ("depth is not used", "found.ranked[: cfg.depth]", "found.ranked", "topk_depth"),
    (
        "cfg.positives is not read",
        "positives_of(question, ranked, corpus, cfg)",
        'list(question["positives"])',
        "topk_positives",
    ),
    ("what another file knows is not left out", "found.never", "frozenset()", "topk_first"),
]
RIGHT["mine_negatives.py:topk"] = [
    (
        "with a loop",
        """
def topk(question, found, corpus, cfg, rngs):
    candidates = found.ranked[: cfg.depth]
    positives = positives_of(question, candidates, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    negatives = []
    for pid in candidates:
        if len(negatives) < cfg.negatives and is_wrong(pid):
            negatives.append(pid)
    return positives, negatives
""",
    )
]
WRONG["mine_negatives.py:draw_at_random"] = [
    (
        "an id may come twice",
        "pid not in tried and allowed(pid)",
        "allowed(pid)",
        "draw_different draw_ends",
    ),
    (
        "an id that is not allowed is not drawn anew",
        "while len(drawn) < count and len(tried) < len(ids):",
        "for _ in range(count):",
        "draw_different draw_ends draw_fair",
    ),
    (
        "the first that are allowed are taken",
        "    drawn = []",
        "    return [pid for pid in ids if allowed(pid)][:count]\n    drawn = []",
        "draw_fair",
    ),
    ("the first ids are likelier", "rng.choice(ids)", "ids[int(rng.random() ** 2 * len(ids))]", "draw_fair"),
]
RIGHT["mine_negatives.py:draw_at_random"] = [
    (
        "a shuffle",
        """
def draw_at_random(ids, allowed, count, rng):
    pool = [pid for pid in ids if allowed(pid)]
    rng.shuffle(pool)
    return pool[:count]
""",
    )
]
WRONG["mine_negatives.py:denoise"] = [
    (
        "a score of exactly negative_below counts",
        "found.scores[pid] < cfg.negative_below",
        "found.scores[pid] <= cfg.negative_below",
        "denoise_gate",
    ),
    (
        "the scores are not used",
        "found.scores[pid] < cfg.negative_below and wrong(pid)",
        "wrong(pid)",
        "denoise_gate denoise_fill",
    ),
    (
        "answers are not looked for where there are scores",
        "found.scores[pid] < cfg.negative_below and wrong(pid)",
        "found.scores[pid] < cfg.negative_below",
        "denoise_wrong",
    ),
    ("`negatives` for a question", "cfg.negatives * len(positives)", "cfg.negatives", "denoise_count"),
    ("in the order of the ranking", "negatives[::-1]", "negatives", "denoise_order"),
    ("fill is not read", "if cfg.fill:", "if False:", "denoise_fill"),
    (
        "filled up with passages that have a score",
        "[pid for pid in ranked if pid not in found.scores]",
        "ranked",
        "denoise_fill",
    ),
    (
        "without scores the first ones are taken",
        "draw_at_random(ranked, wrong, cfg.negatives, rngs[0])",
        "list(islice(filter(wrong, ranked), cfg.negatives))",
        "denoise_draw",
    ),
]
RIGHT["mine_negatives.py:denoise"] = [
    (
        "with lists",
        """
def denoise(question, found, corpus, cfg, rngs):
    candidates = found.ranked[: cfg.depth]
    positives = positives_of(question, candidates, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    if not cfg.scores:
        good = [pid for pid in candidates if is_wrong(pid)]
        return positives, rngs[0].sample(good, min(cfg.negatives, len(good)))
    most = cfg.negatives * len(positives)
    negatives = []
    for pid in candidates:
        score = found.scores.get(pid, 1.0)
        if score < cfg.negative_below and is_wrong(pid) and len(negatives) < most:
            negatives.append(pid)
    if cfg.fill:
        rest = [pid for pid in candidates if pid not in found.scores and is_wrong(pid)]
        negatives += rngs[0].sample(rest, min(len(rest), most - len(negatives)))
    negatives.reverse()
    return positives, negatives
""",
    )
]
WRONG["mine_negatives.py:pseudo_label"] = [
    (
        "a score of exactly positive_above is sure",
        "found.scores[best] <= cfg.positive_above",
        "found.scores[best] < cfg.positive_above",
        "pseudo_sure",
    ),
    (
        "the first of the ranking is the positive",
        "max(scored, key=found.scores.get, default=None)",
        "next(iter(scored), None)",
        "pseudo_best pseudo_negatives",
    ),
    ("the last of equal scores is the positive", "max(scored,", "max(reversed(scored),", "pseudo_best"),
    ("depth is not used", "found.ranked[: cfg.depth]", "found.ranked", "pseudo_best"),
    ("the positive may be a negative too", " and pid != best", "", "pseudo_negatives"),
    (
        "a score of exactly negative_below counts",
        "found.scores[pid] < cfg.negative_below",
        "found.scores[pid] <= cfg.negative_below",
        "pseudo_negatives",
    ),
]
RIGHT["mine_negatives.py:pseudo_label"] = [
    (
        "sorted by score",
        """
def pseudo_label(question, found, corpus, cfg, rngs):
    candidates = [pid for pid in found.ranked[: cfg.depth] if pid in found.scores]
    by_score = sorted(candidates, key=lambda pid: -found.scores[pid])
    if not by_score or not found.scores[by_score[0]] > cfg.positive_above:
        return [], []
    rest = [p for p in candidates if p != by_score[0] and found.scores[p] < cfg.negative_below]
    return by_score[:1], rest[: cfg.negatives]
""",
    )
]
WRONG["mine_negatives.py:teleport"] = [
    (
        "the last episode's negatives are forgotten",
        "ann + lookahead + found.momentum",
        "ann + lookahead",
        "tele_sources",
    ),
    (
        "both draws come from one generator",
        "sample(found.lookahead, rngs[1])",
        "sample(found.lookahead, rngs[0])",
        "tele_draws",
    ),
    (
        "a ranking is cut before right passages are taken out",
        "list(islice(filter(wrong, ranked), cfg.depth))",
        "list(filter(wrong, ranked[: cfg.depth]))",
        "tele_sources",
    ),
    (
        "the negatives are made unique",
        "ann + lookahead + found.momentum",
        "list(dict.fromkeys(ann + lookahead + found.momentum))",
        "tele_sources",
    ),
    ("a question without neighbours is kept", "if not ann:", "if False:", "tele_dropped"),
    ("the first ones are taken, without a draw", "rng.shuffle(pool)", "pass", "tele_draws"),
    (
        "the positives of the last episode are forgotten",
        "for positive in more + found.momentum_positives:",
        "for positive in more:",
        "tele_positives",
    ),
    ("a positive may stand twice", "if positive not in positives:", "if True:", "tele_positives"),
]
RIGHT["mine_negatives.py:teleport"] = [
    (
        "with random.sample",
        """
def teleport(question, found, corpus, cfg, rngs):
    positives = positives_of(question, found.ranked, corpus, cfg)
    is_wrong = wrong_for(question, positives, found.never, corpus, cfg)
    parts = []
    for ranking, rng in zip((found.ranked, found.lookahead), rngs):
        pool = [pid for pid in ranking if is_wrong(pid)][: cfg.depth]
        parts.append(rng.sample(pool, min(len(pool), cfg.negatives)))
    if not parts[0]:
        return positives, []
    more = positives_of(question, found.lookahead, corpus, cfg) if parts[1] else []
    known = list(dict.fromkeys([*positives, *more, *found.momentum_positives]))
    return known, [*parts[0], *parts[1], *found.momentum]
""",
    )
]
WRONG["train_dpr.py:rotating_negatives"] = [
    ("every epoch begins with the first one", "begin = epoch * k", "begin = 0", "rotate_all"),
    (
        "the order is shuffled anew every epoch",
        "random.Random(seed)",
        "random.Random(seed + epoch)",
        "rotate_all",
    ),
    ("a small pool is taken more than once", "min(k, pool)", "k", "rotate_small"),
    (
        "the order is that of the file",
        "random.Random(seed).shuffle(order)",
        "pass",
        "rotate_all",
    ),
]
RIGHT["train_dpr.py:rotating_negatives"] = [
    (
        "with numpy",
        """
def rotating_negatives(pool, k, seed, epoch):
    if not pool:
        return []
    order = np.random.default_rng([seed, 5]).permutation(pool)
    places = (epoch * k + np.arange(min(k, pool))) % pool
    return [int(i) for i in order[places]]
""",
    )
]


def _a4(a, b, n, t, pool, k):
    scores = {rank: 0.95 - 0.1 * (rank - 1) for rank in range(1, 11)}
    found = {"topk": n + 2, "denoise": sum(score < t for rank, score in scores.items() if rank not in (a, b))}
    return found | {"pseudo": sum(score > t for score in scores.values()), "epochs": pool // k + 1}


PREDICT["a4"] = _a4


# ---------------------------------------------------------------- 5, the reader
WRONG["utils/reader.py:find_spans"] = [
    (
        "the end is the place after the last token",
        "(begin, begin + size - 1)",
        "(begin, begin + size)",
        "spans_all spans_first spans_ends",
    ),
    ("the question is searched too", "range(first, len(ids)", "range(0, len(ids)", "spans_first"),
    ("the last place is not looked at", "len(ids) - size + 1", "len(ids) - size", "spans_ends"),
    (
        "only the first mention of an answer is found",
        "spans.append((begin, begin + size - 1))",
        "spans.append((begin, begin + size - 1))\n                break",
        "spans_all spans_ends",
    ),
    (
        "only the first token is compared",
        "ids[begin] == answer[0] and ids[begin : begin + size] == answer",
        "ids[begin] == answer[0]",
        "spans_all",
    ),
    ("an answer without tokens is looked for", "if not answer:", "if False:", "spans_empty"),
]
RIGHT["utils/reader.py:find_spans"] = [
    (
        "place by place",
        """
def find_spans(ids, first, answers):
    found = []
    for begin in range(first, len(ids)):
        for end in range(begin, len(ids)):
            if ids[begin : end + 1] in answers:
                found.append((begin, end))
    return found
""",
    )
]
WRONG["train_reader.py:reader_loss"] = [
    (
        "every mention must be found: the sum of logarithms",
        "-log_nA.logsumexp(1).sum()",
        "-log_nA.masked_fill(log_nA.isinf(), 0.0).sum()",
        "loss_marginal",
    ),
    (
        "the mean over questions is taken",
        "-log_nA.logsumexp(1).sum()",
        "-log_nA.logsumexp(1).mean()",
        "loss_marginal loss_sum",
    ),
    (
        "only the likeliest mention counts",
        "-log_nA.logsumexp(1).sum()",
        "-log_nA.amax(1).sum()",
        "loss_marginal",
    ),
    (
        "mentions that are padding count",
        "log_NA.masked_fill(~spans_NA, -torch.inf)",
        "log_NA.clone()",
        "loss_marginal",
    ),
    (
        "a question without a mention is not left out",
        "log_nA = log_NA[has_span_N]",
        "log_nA = log_NA",
        "loss_no_span",
    ),
    (
        "the mean of the relevance is taken",
        "-log_NM[:, 0].sum()",
        "-log_NM[:, 0].mean()",
        "loss_relevance",
    ),
    (
        "each passage is judged alone, by a sigmoid",
        "-log_NM[:, 0].sum()",
        "-torch.nn.functional.logsigmoid(relevance_NM[:, 0]).sum()",
        "loss_marginal loss_no_span loss_relevance",
    ),
    (
        "the second value is a share",
        "(relevance_NM.argmax(1) == 0).sum()",
        "(relevance_NM.argmax(1) == 0).float().mean()",
        "loss_correct",
    ),
]
RIGHT["train_reader.py:reader_loss"] = [
    (
        "question by question, with probabilities",
        """
def reader_loss(start_NL, end_NL, relevance_NM, begin_NA, end_NA, spans_NA):
    total, count = relevance_NM.new_zeros(()), 0
    start, end = torch.softmax(start_NL, dim=1), torch.softmax(end_NL, dim=1)
    for n in range(len(start_NL)):
        places = [(b, e) for b, e, ok in zip(begin_NA[n].tolist(), end_NA[n].tolist(), spans_NA[n]) if ok]
        if places:
            total = total - torch.log(sum(start[n, b] * end[n, e] for b, e in places))
        total = total + torch.logsumexp(relevance_NM[n], 0) - relevance_NM[n, 0]
        count += int(relevance_NM[n].argmax() == 0)
    return total, torch.tensor(count)
""",
    )
]
WRONG["utils/reader.py:best_spans"] = [
    (
        "a span may be one token longer",
        "min(max_answer_length, size)",
        "min(max_answer_length + 1, size)",
        "best_length",
    ),
    (
        "a span inside or around a better one is kept",
        "if any(first <= a and b <= last or a <= first and last <= b for a, b, _ in chosen):",
        "if False:",
        "best_overlap",
    ),
    (
        "only a span around a better one is passed over",
        "first <= a and b <= last or a <= first and last <= b for",
        "first <= a and b <= last for",
        "best_overlap",
    ),
    ("a span may begin within a word", "while first and continues_S[first]:", "while False:", "best_words"),
    (
        "a span may end within a word",
        "while last + 1 < size and continues_S[last + 1]:",
        "while False:",
        "best_words",
    ),
    (
        "of equal scores the later one comes first",
        'np.argsort(-scores_SW, axis=None, kind="stable")',
        'scores_SW.size - 1 - np.argsort(-scores_SW.ravel()[::-1], kind="stable")',
        "best_ties",
    ),
    (
        "the length of the end is added, not its logit",
        "start_S[: size - width] + end_S[width:]",
        "start_S[: size - width] + width",
        "best_score best_length best_overlap best_words best_ties",
    ),
]
RIGHT["utils/reader.py:best_spans"] = [
    (
        "a sorted list",
        """
def best_spans(start_S, end_S, continues_S, max_answer_length, top_spans):
    spans = []
    for first in range(len(start_S)):
        for last in range(first, min(len(start_S), first + max_answer_length)):
            spans.append((-(start_S[first] + end_S[last]), first, last))
    chosen = []
    for cost, first, last in sorted(spans):
        inside = [(a, b) for a, b, _ in chosen if a <= first and last <= b or first <= a and b <= last]
        if inside or len(chosen) == top_spans:
            continue
        while first > 0 and continues_S[first]:
            first = first - 1
        while last < len(start_S) - 1 and continues_S[last + 1]:
            last = last + 1
        chosen.append((first, last, float(-cost)))
    return chosen
""",
    )
]
WRONG["utils/text.py:exact_match"] = [
    (
        "articles and punctuation count",
        "_squad_words(prediction) == _squad_words(answer)",
        "prediction.lower().split() == answer.lower().split()",
        "em_words",
    ),
    (
        "only the first answer is compared",
        "for answer in answers)",
        "for answer in answers[:1])",
        "em_answers",
    ),
    (
        "the words may stand in any order",
        "_squad_words(prediction) == _squad_words(answer)",
        "sorted(_squad_words(prediction)) == sorted(_squad_words(answer))",
        "em_words",
    ),
    (
        "the answer may be a part of the prediction",
        "_squad_words(prediction) == _squad_words(answer)",
        '" ".join(_squad_words(answer)) in " ".join(_squad_words(prediction))',
        "em_words",
    ),
]
RIGHT["utils/text.py:exact_match"] = [
    (
        "with a list of lists",
        """
def exact_match(prediction, answers):
    return _squad_words(prediction) in [_squad_words(answer) for answer in answers]
""",
    )
]
WRONG["utils/text.py:f1"] = [
    (
        "a word counts once, however often it stands there",
        "(Counter(predicted) & Counter(gold)).total()",
        "len({*predicted} & {*gold})",
        "f1_counts",
    ),
    (
        "only the first answer is compared",
        "map(_squad_words, answers)",
        "map(_squad_words, answers[:1])",
        "f1_answers",
    ),
    ("two answers without words score 0", "float(predicted == gold)", "0.0", "f1_empty"),
    (
        "the precision is taken",
        "2 * common / (len(predicted) + len(gold))",
        "common / len(predicted)",
        "f1_counts f1_answers",
    ),
    ("the last answer counts", "best = max(best, 2 * common", "best = max(0.0, 2 * common", "f1_answers"),
]
RIGHT["utils/text.py:f1"] = [
    (
        "from precision and recall",
        """
def f1(prediction, answers):
    scores = [0.0]
    mine = _squad_words(prediction)
    for answer in answers:
        theirs = _squad_words(answer)
        left = list(theirs)
        common = 0
        for word in mine:
            if word in left:
                left.remove(word)
                common += 1
        if not mine or not theirs:
            scores.append(1.0 if mine == theirs else 0.0)
        elif common:
            precision, recall = common / len(mine), common / len(theirs)
            scores.append(2 * precision * recall / (precision + recall))
    return max(scores)
""",
    )
]


def _a5(s0, s1, s2, e0, e1, e2, r, p, g, c):
    span = -math.log(s0 * e1 + s2 * e2)
    starts, ends = (s0, s1, s2), (e0, e1, e2)
    best = max(starts[i] * ends[j] for i in range(3) for j in range(i, min(3, i + 2)))
    return {"span": span, "whole": span - math.log(r), "best": best, "f1": 2 * c / (p + g)}


PREDICT["a5"] = _a5


# ---------------------------------------------------------------- 6, EMDR2
WRONG["utils/fid.py:encode_contexts"] = [
    (
        "the states stay in the order of the chunks",
        "rows[place] = hidden_LD",
        "rows[sum(row is not None for row in rows)] = hidden_LD",
        "context_states context_chunks",
    ),
    (
        "padding is read as words",
        'batch["input_ids"], attention_mask=batch["attention_mask"]',
        'batch["input_ids"]',
        "context_states context_chunks",
    ),
    (
        "the mask has one token too many",
        "device=hidden_NLD.device) < lengths_N1",
        "device=hidden_NLD.device) <= lengths_N1",
        "context_mask",
    ),
    (
        "the mask is true at padding",
        "device=hidden_NLD.device) < lengths_N1",
        "device=hidden_NLD.device) >= lengths_N1",
        "context_mask",
    ),
]
RIGHT["utils/fid.py:encode_contexts"] = [
    (
        "one context at a time",
        """
def encode_contexts(fid, ids, chunk, autocast=nullcontext):
    longest = max(len(tokens) for tokens in ids)
    hidden, mask = [], torch.zeros(len(ids), longest, dtype=torch.bool)
    for n, tokens in enumerate(ids):
        mask[n, : len(tokens)] = True
        with autocast():
            found = fid.model.encoder(torch.tensor([tokens])).last_hidden_state[0]
        hidden.append(pad(found, (0, 0, 0, longest - len(tokens))))
    return torch.stack(hidden), mask
""",
    )
]
WRONG["utils/fid.py:log_likelihood"] = [
    (
        "the decoder sees the token that it predicts",
        "fid.model.prepare_decoder_input_ids_from_labels(labels_bT)",
        "labels_bT.masked_fill(labels_bT == PAD, 0)",
        "token_value token_mask",
    ),
    (
        "padding is a word of the answer",
        "labels_bT.flatten(), ignore_index=PAD",
        "labels_bT.flatten().clamp(min=0), ignore_index=-1",
        "token_pads",
    ),
    ("the costs are returned", "-costs_n", "costs_n", "token_value token_mask"),
    ("the mask of the states is not used", "attention_mask=mask_bL", "attention_mask=None", "token_mask"),
    (
        "the mean over the answer is returned",
        "-costs_n.view(labels_bT.shape)",
        "-costs_n.view(labels_bT.shape).mean(1, keepdim=True).expand(labels_bT.shape)",
        "token_value token_mask token_pads",
    ),
]
RIGHT["utils/fid.py:log_likelihood"] = [
    (
        "by log_softmax and gather",
        """
def log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast):
    known = labels_bT.clone()
    known[known == PAD] = fid.model.config.pad_token_id
    start = torch.full_like(known[:, :1], fid.model.config.decoder_start_token_id)
    with autocast():
        logits = fid.model(
            encoder_outputs=(hidden_bLD,),
            attention_mask=mask_bL.long(),
            decoder_input_ids=torch.cat([start, known[:, :-1]], dim=1),
        ).logits
    log = logits.float().log_softmax(2).gather(2, known[:, :, None])[:, :, 0]
    return torch.where(labels_bT == PAD, torch.zeros_like(log), log)
""",
    )
]
ALONE = "log_likelihood(fid, hidden_BKLD[:, k], mask_BKL[:, k], labels_BT, autocast)"
WRONG["utils/fid.py:fused_log_likelihood"] = [
    (
        "the mean over passages that are read alone",
        "log_likelihood(fid, hidden_BKLD.flatten(1, 2), mask_BKL.flatten(1, 2), labels_BT, autocast)",
        f"sum({ALONE} for k in range(hidden_BKLD.shape[1])) / hidden_BKLD.shape[1]",
        "fused_value",
    ),
    (
        "only the first passage is read",
        "log_likelihood(fid, hidden_BKLD.flatten(1, 2), mask_BKL.flatten(1, 2), labels_BT, autocast)",
        "log_likelihood(fid, hidden_BKLD[:, 0], mask_BKL[:, 0], labels_BT, autocast)",
        "fused_value fused_order",
    ),
    ("padding is read", "mask_BKL.flatten(1, 2)", "torch.ones_like(mask_BKL.flatten(1, 2))", "fused_value"),
]
RIGHT["utils/fid.py:fused_log_likelihood"] = [
    (
        "with reshape",
        """
def fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast=nullcontext):
    B, K, L, D = hidden_BKLD.shape
    joined = hidden_BKLD.reshape(B, K * L, D)
    return log_likelihood(fid, joined, mask_BKL.reshape(B, K * L), labels_BT, autocast)
""",
    )
]
WRONG["utils/fid.py:document_log_likelihood"] = [
    (
        "a passage is asked for another question's answer",
        "labels_BT[rows_b // K]",
        "labels_BT[rows_b % B]",
        "each_value",
    ),
    (
        "the passages stay in the order of their lengths",
        "log_NT[rows_b] = ",
        "log_NT[start : start + chunk] = ",
        "each_value",
    ),
    (
        "padding is read",
        "mask_bL = mask_NL[rows_b, :longest]",
        "mask_bL = torch.ones_like(mask_NL[rows_b, :longest])",
        "each_value each_chunks",
    ),
    (
        "the chunk is cut to its shortest passage",
        "longest = lengths[order[start]]",
        "longest = lengths[order[min(start + chunk, B * K) - 1]]",
        "each_value each_chunks",
    ),
    (
        "all passages are read at once",
        "    log_NT = torch.zeros(",
        "    chunk = B * K\n    log_NT = torch.zeros(",
        "each_memory",
    ),
]
RIGHT["utils/fid.py:document_log_likelihood"] = [
    (
        "question by question, in the given order",
        """
def document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk, autocast=nullcontext):
    questions = []
    for hidden, mask, labels in zip(hidden_BKLD, mask_BKL, labels_BT):
        parts = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            answers = labels.expand(len(hidden[part]), -1)
            parts.append(log_likelihood(fid, hidden[part], mask[part], answers, autocast))
        questions.append(torch.cat(parts))
    return torch.stack(questions)
""",
    )
]
SUM = "(log_prior_BK[:, :, None] + log_likelihood_BKT).logsumexp(1)"
WRONG["train_emdr2.py:retriever_loss"] = [
    (
        "the mean of logarithms is taken, not the logarithm of the mean",
        SUM,
        "(log_prior_BK.exp()[:, :, None] * log_likelihood_BKT).sum(1)",
        "marginal_token",
    ),
    ("the prior is forgotten", SUM, "log_likelihood_BKT.logsumexp(1)", "marginal_token"),
    (
        "the mean over tokens is taken for each question",
        "-log_BT[mask_BT].sum() / mask_BT.sum()",
        "-((log_BT * mask_BT).sum(1) / mask_BT.sum(1)).mean()",
        "marginal_mean",
    ),
    (
        "padding is a part of the answer",
        "log_likelihood_BKT = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0)",
        "pass",
        "marginal_pads",
    ),
    ("the sum over questions is taken", ".logsumexp(1).mean()", ".logsumexp(1).sum()", "marginal_mean"),
    (
        "the mean over the answer's tokens stands for their product",
        "log_likelihood_BKT.sum(2)",
        "log_likelihood_BKT.mean(2)",
        "marginal_sequence marginal_mean",
    ),
    (
        "token and sequence are exchanged",
        'if marginal == "token":',
        'if marginal == "sequence":',
        "marginal_token marginal_sequence marginal_mean",
    ),
]
RIGHT["train_emdr2.py:retriever_loss"] = [
    (
        "question by question, with probabilities",
        """
def retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, marginal):
    total, count = 0.0, 0
    for log_prior, log_likelihood, mask in zip(log_prior_BK, log_likelihood_BKT, mask_BT.bool()):
        log = log_likelihood[:, mask]
        if marginal == "token":
            total = total - torch.log((log_prior.exp()[:, None] * log.exp()).sum(0)).sum()
            count += int(mask.sum())
        else:
            total = total - torch.log((log_prior.exp() * log.sum(1).exp()).sum())
            count += 1
    return total / count
""",
    )
]
WRONG["train_emdr2.py:kl_loss"] = [
    (
        "the divergence is taken the other way round",
        "(negentropy_BK - preference_BK * log_prior_BK)",
        "(log_prior_BK.exp() * (log_prior_BK - preference_BK.log()))",
        "kl_value",
    ),
    (
        "the sum over the answer is taken, not the mean",
        "(sums_BK / mask_BT.sum(1, keepdim=True))",
        "sums_BK",
        "kl_value kl_zero",
    ),
    (
        "the entropy of the preference is left out",
        "(negentropy_BK - preference_BK * log_prior_BK)",
        "(-preference_BK * log_prior_BK)",
        "kl_value kl_zero",
    ),
    (
        "padding is a part of the answer",
        "log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0).sum(2)",
        "log_likelihood_BKT.sum(2)",
        "kl_pads",
    ),
]
RIGHT["train_emdr2.py:kl_loss"] = [
    (
        "by torch's own divergence",
        """
def kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT):
    mask = mask_BT.to(log_likelihood_BKT.dtype)
    kept = torch.where(mask_BT.bool()[:, None], log_likelihood_BKT, torch.zeros_like(log_likelihood_BKT))
    wish = (kept.sum(2) / mask.sum(1)[:, None]).softmax(dim=1)
    return torch.nn.functional.kl_div(log_prior_BK, wish, reduction="batchmean")
""",
    )
]


def _a6(p1, p2, p3, l1, l2, l3):
    evidence = p1 * l1 + p2 * l2 + p3 * l3
    found = {"slope_1": p1 - p1 * l1 / evidence, "slope_3": p3 - p3 * l3 / evidence}
    return found | {"loss": -math.log(evidence), "even": 0.0}


PREDICT["a6"] = _a6
