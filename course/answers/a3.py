"""
Other right answers to the functions of assignment 3 (exact search and metrics): each must keep all points.
"""
# ruff: noqa: B905, F811, F821  (a function may stand twice; the names are those of the file it is put into)


def exact_topk(queries_QD, shards, k, block=0, device="cpu", resident_ND=None):
    """A plain product, a running list."""
    queries_QD = checked_queries(queries_QD, shards, k)
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


def fetch(shards, rows):
    """Row by row."""
    found = []
    for row in rows:
        for shard in shards:
            if row < len(shard):
                found.append(np.array(shard[row]))
                break
            row = row - len(shard)
    return np.stack(found)


def as_lists(scores_Qk, rows_Qk):
    """With a mask."""
    found = []
    for scores, rows in zip(scores_Qk, rows_Qk):
        there = rows != -1
        found.append(list(zip(rows[there].tolist(), scores[there].tolist())))
    return found


def has_answer(passage, answers, regex=False):
    """Slices of tokens."""
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


def topk_accuracy(hits, ks):
    """By the first hit."""
    first = [next((i for i, hit in enumerate(row) if hit), 10**9) for row in hits]
    return {k: sum(i < k for i in first) / len(hits) for k in ks}


def mrr(ranks, cutoff):
    """A sum over the ranks that count."""
    total = 0.0
    for rank in ranks:
        if rank and rank <= cutoff:
            total += 1.0 / rank
    return total / len(ranks)


def ndcg(gains, all_gains, cutoff):
    """With the natural logarithm, which cancels."""
    values = []
    for ranked, relevant in zip(gains, all_gains):
        weights = 1 / np.log(np.arange(2, cutoff + 2))
        best = sorted(relevant)[::-1][:cutoff]
        top = ranked[:cutoff]
        ideal = np.dot(best, weights[: len(best)])
        values.append(np.dot(top, weights[: len(top)]) / ideal if len(best) else 0.0)
    return float(np.mean(values))


def bootstrap_interval(values_per_question, samples=1000, seed=0):
    """By drawing places."""
    values = np.asarray(values_per_question, dtype=float)
    generator = np.random.default_rng(seed)
    places = generator.integers(0, len(values), (samples, len(values)))
    means = np.sort(values[places].mean(axis=1))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def hybrid(dense, bm25, weight, k):
    """Two passes over the rows."""
    floor = [min((score for _, score in hits), default=0.0) for hits in (dense, bm25)]
    total = {}
    for row in {row for row, _ in [*dense, *bm25]}:
        scores = [dict(hits).get(row, low) for hits, low in zip((dense, bm25), floor)]
        total[row] = weight * scores[0] + scores[1]
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:k]
