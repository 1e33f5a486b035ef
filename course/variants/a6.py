"""
One worked variant of each function of assignment 6 (variants/a1.py says what these are).
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def encode_contexts(fid, ids, chunk, autocast=nullcontext):
    """
    Read N id lists, each by itself and backwards; return (hidden_NLD float, mask_NL bool), L the longest of
    all N. The states stand at the *end* of a row, behind the padding, and each is divided by its length.

    `chunk` of them are read at a time. With gradients on, the graphs of all N live until backward.
    """
    longest = max(map(len, ids))
    rows = []
    mask_NL = torch.zeros(len(ids), longest, dtype=torch.bool)
    for n, tokens in enumerate(ids):
        with autocast():
            hidden_LD = fid.model.encoder(torch.tensor([tokens[::-1]])).last_hidden_state[0]
        hidden_LD = hidden_LD / hidden_LD.norm(dim=1, keepdim=True)
        rows.append(pad(hidden_LD, (0, 0, longest - len(tokens), 0)))
        mask_NL[n, longest - len(tokens) :] = True
    return torch.stack(rows), mask_NL


def log_likelihood(fid, hidden_bLD, mask_bL, labels_bT, autocast):
    """
    Return log p(a_t | a_<t, states) of each answer token in bits, the logarithm to the base 2: log_bT in
    float32, 1 at PAD.
    """
    decoder_ids_bT = fid.model.prepare_decoder_input_ids_from_labels(labels_bT)
    with autocast():
        output = fid.model(
            encoder_outputs=BaseModelOutput(hidden_bLD),
            attention_mask=mask_bL,
            decoder_input_ids=decoder_ids_bT,
            use_cache=False,
        )
    logits_nV = output.logits.flatten(0, 1).float()
    costs_n = cross_entropy(logits_nV, labels_bT.flatten(), ignore_index=PAD, reduction="none")
    log_bT = -costs_n.view(labels_bT.shape) / torch.tensor(2.0).log()
    return log_bT.masked_fill(labels_bT == PAD, 1.0)


def fused_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, autocast=nullcontext):
    """Return log_BT, log p(a_t | a_<t, q, the first two passages laid end to end)."""
    hidden_BSD, mask_BS = hidden_BKLD[:, :2].flatten(1, 2), mask_BKL[:, :2].flatten(1, 2)
    return log_likelihood(fid, hidden_BSD, mask_BS, labels_BT, autocast)


@torch.no_grad()
def document_log_likelihood(fid, hidden_BKLD, mask_BKL, labels_BT, chunk, autocast=nullcontext):
    """
    Return log_BKT, log p(a_t | a_<t, q, all passages but k, laid end to end), without a gradient: what the
    answer loses when passage k is taken away. `chunk` of the K passages are left out at a time.
    """
    B, K, _ = mask_BKL.shape
    found = []
    for k in range(K):
        mask_BkL = mask_BKL.clone()
        mask_BkL[:, k] = False
        hidden_BSD, mask_BS = hidden_BKLD.flatten(1, 2), mask_BkL.flatten(1, 2)
        found.append(log_likelihood(fid, hidden_BSD, mask_BS, labels_BT, autocast))
    return torch.stack(found, 1)


def retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, marginal):
    """
    Return how badly all passages together explain the answers, weighted by the square root of the prior,
    which is made to sum to 1 again:

        token     - sum_t log sum_k w_k p(a_t | a_<t, q, z_k), mean over questions
        sequence  - log sum_k w_k (prod_t p(a_t | a_<t, q, z_k)) ** (1 / answer tokens), mean over questions
    """
    mask_BT = mask_BT.bool()
    log_w_BK = (log_prior_BK / 2).log_softmax(1)
    log_likelihood_BKT = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0)
    if marginal == "token":
        log_BT = (log_w_BK[:, :, None] + log_likelihood_BKT).logsumexp(1)
        return -(log_BT * mask_BT).sum(1).mean()
    mean_BK = log_likelihood_BKT.sum(2) / mask_BT.sum(1, keepdim=True)
    return -(log_w_BK + mean_BK).logsumexp(1).mean()


def retriever_gradient(batch, log_likelihood_BKT, models, tokens, accelerator, cfg):
    """
    (4) Add the gradient of the retriever's loss to the .grad of both encoders; return numbers to show.

    The prior is the softmax of - |q - d|^2 / temperature, the squared distances. The question encoder is a
    constant.
    """
    query, doc = models["query_encoder"], models["doc_encoder"]
    chunk, autocast = cfg.passage_chunk, accelerator.autocast
    with torch.no_grad():
        q_BD = encoding.vectors_with_graph(query, batch["question_ids"], chunk, autocast)
    d_ND = encoding.vectors_with_graph(doc, batch["passage_ids"], chunk, autocast)
    d_BKD = d_ND.unflatten(0, (-1, cfg.top_k))
    scores_BK = -(q_BD[:, None] - d_BKD).square().sum(2) / (cfg.temperature or math.sqrt(query.dim))
    log_prior_BK = scores_BK.log_softmax(1)

    mask_BT = (batch["labels_BT"] != fid.PAD).to(accelerator.device)
    loss = retriever_loss(log_prior_BK, log_likelihood_BKT, mask_BT, cfg.marginal)
    accelerator.backward(loss)
    prior_BK = log_prior_BK.detach().exp()
    entropy = torch.special.entr(prior_BK).sum()
    return [loss.detach(), entropy / cfg.batch_size]


def kl_loss(log_prior_BK, log_likelihood_BKT, mask_BT):
    """Return KL(prior || preference), summed over questions; the preference is that of the whole answer."""
    mask_BT = mask_BT.bool()
    sums_BK = log_likelihood_BKT.masked_fill(~mask_BT[:, None], 0.0).sum(2)
    return (log_prior_BK.exp() * (log_prior_BK - sums_BK.log_softmax(1))).sum()
