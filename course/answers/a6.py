"""
Other right answers to the functions of assignment 6 (EMDR2): each must keep all points.
"""
# ruff: noqa: B905, F811, F821  (a function may stand twice; the names are those of the file it is put into)


def encode_contexts(fid, ids, chunk, autocast=nullcontext):
    """One context at a time."""
    longest = max(len(tokens) for tokens in ids)
    hidden, mask = [], torch.zeros(len(ids), longest, dtype=torch.bool)
    for n, tokens in enumerate(ids):
        mask[n, : len(tokens)] = True
        with autocast():
            found = fid.model.encoder(torch.tensor([tokens])).last_hidden_state[0]
        hidden.append(pad(found, (0, 0, 0, longest - len(tokens))))
    return torch.stack(hidden), mask


def log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast):
    """By log_softmax and gather."""
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


def fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast=nullcontext):
    """With reshape."""
    B, K, L, D = hidden_BKLD.shape
    joined = hidden_BKLD.reshape(B, K * L, D)
    return log_likelihood(fid, joined, mask_BKL.reshape(B, K * L), labels_BT, autocast)


def document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk, autocast=nullcontext):
    """Question by question, in the given order."""
    questions = []
    for hidden, mask, labels in zip(hidden_BKLD, mask_BKL, labels_BT):
        parts = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            answers = labels.expand(len(hidden[part]), -1)
            parts.append(log_likelihood(fid, hidden[part], mask[part], answers, autocast))
        questions.append(torch.cat(parts))
    return torch.stack(questions)


def retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, marginal):
    """Question by question, with probabilities."""
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


def kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT):
    """By torch's own divergence."""
    mask = mask_BT.to(log_likelihood_BKT.dtype)
    kept = torch.where(mask_BT.bool()[:, None], log_likelihood_BKT, torch.zeros_like(log_likelihood_BKT))
    wish = (kept.sum(2) / mask.sum(1)[:, None]).softmax(dim=1)
    return torch.nn.functional.kl_div(log_prior_BK, wish, reduction="batchmean")


def retriever_gradient(batch, log_likelihood_BKT, models, tokens, accelerator, cfg):
    """Question by question; the softmax by logsumexp."""
    query, doc = models["query_encoder"], models["doc_encoder"]
    chunk, autocast = cfg.passage_chunk, accelerator.autocast
    root = cfg.temperature if cfg.temperature else query.dim**0.5
    q_BD = encoding.vectors_with_graph(query, batch["question_ids"], chunk, autocast) / root
    d_ND = encoding.vectors_with_graph(doc, batch["passage_ids"], chunk, autocast)
    scores = []
    for i, q_D in enumerate(q_BD):
        scores.append(d_ND[i * cfg.top_k : (i + 1) * cfg.top_k] @ q_D)
    scores_BK = torch.stack(scores)
    log_prior_BK = scores_BK - scores_BK.logsumexp(1, keepdim=True)

    mask_BT = (batch["labels_BT"] != fid.PAD).to(accelerator.device)
    share = len(mask_BT) / cfg.batch_size
    if cfg.retriever_loss == "kl":
        loss = kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT)
    else:
        loss = retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, cfg.marginal)
        if cfg.marginal == "token":
            share = mask_BT.sum() / tokens
    loss = loss * share
    accelerator.backward(loss)
    prior_BK = log_prior_BK.detach().exp()
    entropy = torch.special.entr(prior_BK).sum()
    return [loss.detach(), entropy / cfg.batch_size]
