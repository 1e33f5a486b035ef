"""
One worked variant of each function of assignment 3 (variants/a1.py says what these are).
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def exact_topk(queries_QD, shards, k, block=0, device="cpu", resident_ND=None):
    """
    Find the k passages of the *smallest* inner product for every question, the smallest first, ties in the
    order of the corpus.

    queries_QD: numpy floats. shards: list of [n, D] numpy arrays (memory-mapped fp16 or fp32), corpus order.
    block: passages that are widened to float32 at a time; 0: BLOCK. resident_ND: a torch tensor of the same
    rows, searched where it lies instead of sending blocks to `device`. Returns (scores_Qk float32, rows_Qk
    int64), numpy, k = min(k, N): the same for any block, sharding and device, if at most SPARE passages have
    equal scores at the cut. A passage with NaN or infinity is never found. UserError for questions with NaN,
    or a dimension that does not fit.
    """
    queries_QD = -checked_queries(queries_QD, shards, k)
    N, Q = sum(map(len, shards)), len(queries_QD)
    k, K = min(k, N), min(k + SPARE, N)
    device = torch.device(device) if resident_ND is None else resident_ND.device
    q_QD = torch.from_numpy(queries_QD).to(device)
    best_QK, rows_QK = q_QD.new_empty(Q, 0), q_QD.new_empty(Q, 0, dtype=torch.long)
    for start, x_nD in blocks(shards, block or BLOCK, device, resident_ND):
        scores_Qn = q_QD @ x_nD.T
        scores_Qn[:, ~torch.isfinite(x_nD).all(1)] = -torch.inf
        scores_QM = torch.cat([best_QK, scores_Qn], 1)
        places_Qn = torch.arange(start, start + len(x_nD), device=device).expand(Q, -1)
        rows_QM = torch.cat([rows_QK, places_Qn], 1)
        best_QK, order_QK = scores_QM.topk(min(K, scores_QM.shape[1]))
        rows_QK = rows_QM.gather(1, order_QK)
    rows_QK = rows_QK.masked_fill(best_QK.isinf(), -1)
    scores_Qk, rows_Qk = rescore(queries_QD, shards, rows_QK.cpu().numpy(), k)
    return -scores_Qk, rows_Qk


def fetch(shards, rows):
    """Return the [n, D] array of these corpus rows, as float64, each divided by its length."""
    found = []
    for row in rows:
        for shard in shards:
            if row < len(shard):
                found.append(np.asarray(shard[row], np.float64))
                break
            row = row - len(shard)
    x_nD = np.stack(found)
    return x_nD / np.linalg.norm(x_nD, axis=1, keepdims=True)


def as_lists(scores_Qk, rows_Qk):
    """
    Turn the arrays of a search into a list of (row, score) a question, the worst first, without FAISS's -1.
    """
    found = []
    for scores, rows in zip(scores_Qk.tolist(), rows_Qk.tolist(), strict=True):
        hits = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        found.append(hits[::-1])
    return found


def has_answer(passage, answers, regex=False):
    """
    Return whether the passage holds *all* of the answers (list of str), each as tokens in a row. Case counts,
    accents do not. A blank answer is in every passage.

    regex: the answers are regular expressions (CuratedTREC). They are searched in the text as it is.
    """
    if regex:
        return all(_find_regex(passage, answer) is not None for answer in answers)

    def tokens(text):
        text = unicodedata.normalize("NFD", text)
        return TOKEN.findall("".join(c for c in text if not unicodedata.combining(c)))

    text = tokens(passage)
    for answer in answers:
        wanted = tokens(answer)
        if not any(text[i : i + len(wanted)] == wanted for i in range(len(text) + 1)):
            return False
    return True


def topk_accuracy(hits, ks):
    """
    Return {k: share of questions with a hit from rank 2 to rank k}, of the questions that have any passages.
    """
    hits = [passages for passages in hits if passages]
    return {k: mean([any(passages[1:k]) for passages in hits]) for k in ks}


def mrr(ranks, cutoff):
    """
    Return the mean of 1 / (1 + rank). A rank beyond the cutoff counts as the cutoff, and so does a miss (0).
    """
    return mean([1 / (1 + (rank if 0 < rank <= cutoff else cutoff)) for rank in ranks])


def ndcg(gains, all_gains, cutoff):
    """
    Return the normalised discounted cumulative gain with gains of 2 ** grade - 1 (Burges et al. 2005).

    gains: of each question the grade of its first, second ... passage, 0 where that is not relevant.
    all_gains: of each question the grades of all its relevant passages, in any order; none of them gives 1.
    """
    values = []
    for ranked, relevant in zip(gains, all_gains, strict=True):
        ideal = discounted([2**grade - 1 for grade in sorted(relevant, reverse=True)[:cutoff]])
        values.append(discounted([2**grade - 1 for grade in ranked[:cutoff]]) / ideal if ideal else 1.0)
    return mean(values)


def bootstrap_interval(values_per_question, samples=1000, seed=0):
    """
    Return (low, high): the 80 % "basic" bootstrap interval of the mean: twice the mean of the values, minus
    the upper and minus the lower percentile of the drawn means.
    """
    values = np.asarray(values_per_question, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (samples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [10, 90])
    return float(2 * values.mean() - high), float(2 * values.mean() - low)


def hybrid(dense, bm25, weight, k):
    """
    Return one list of (row, score) from two by their ranks: score = 1 / (60 + rank in bm25) + weight / (60 +
    rank in dense), ranks from 1. A list that lacks a passage adds nothing.
    """
    total = {}
    for hits, factor in ((bm25, 1.0), (dense, weight)):
        for rank, (row, _) in enumerate(hits, 1):
            total[row] = total.get(row, 0.0) + factor / (60 + rank)
    return sorted(total.items(), key=lambda hit: (-hit[1], hit[0]))[:k]
