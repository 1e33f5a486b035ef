"""
One worked variant of each function of assignment 2 (variants/a1.py says what these are).
"""
# ruff: noqa: F821  (the names are those of the file that a function is put into)


def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    """
    Add the gradient of `loss / N` to every .grad, where N is the number of rows of all chunks; return
    (loss / N, what else loss_of returned), detached from the encoders.

    encode(chunk): returns vectors [b, D]; it builds a graph only where torch's gradients are on. chunks: a
    list; encode takes one. loss_of(vectors): takes the vectors of all chunks, a list of tensors without an
    encoder behind them; returns (loss, ...), a scalar first. seed: ints >= 0 that no other step or device
    has; they fix the dropout masks. backward: called in the place of scalar.backward() (accelerate's, for
    fp16's loss scaler). cached: False is the plain step: every graph stays, the same gradient, more memory.
    """

    def forward(i):
        torch.manual_seed(chunk_seed(seed, i))
        return encode(chunks[i])

    with torch.set_grad_enabled(not cached):
        vectors = [forward(i) for i in range(len(chunks))]
    leaves = [vectors_bD.detach().requires_grad_() for vectors_bD in vectors]
    N = sum(map(len, leaves))
    loss, *rest = loss_of(leaves)
    loss = loss / N
    loss.backward()
    for i, leaf in enumerate(leaves):
        vectors_bD = forward(i) if cached else vectors[i]
        backward((vectors_bD * leaf.grad).sum())
        vectors[i] = vectors_bD = None
    return loss.detach(), *rest


def chunk_seed(seed, i):
    """
    Return a 63-bit seed for chunk i of the step `seed` (a tuple): independent streams by numpy's
    SeedSequence. The last number of the tuple, the device, has no influence: all devices share their masks.
    """
    state = np.random.SeedSequence([*seed[:-1], i]).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def in_chunks(ids, size):
    """
    Cut id lists into chunks of `size` in order of length, the chunk that is not full first: (chunks, places).

    places: int64, the place in `ids` of each row of the chunks, one chunk below the other.
    """
    order = by_length(ids)
    first = len(ids) % size
    starts = [*([0] if first else []), *range(first, len(ids), size)]
    chunks = []
    for start in starts:
        end = first if start < first else start + size
        chunks.append([ids[i] for i in order[start:end]])
    return chunks, torch.tensor(order)


def add_gradient(batch, encoders, accelerator, cfg, step):
    """
    Add the batch's gradient / gradient_scale to .grad; return (loss / gradient_scale, correct). In a step all
    devices drop the same units.
    """
    questions = len(batch["question_chunks"])
    chunks = [("query_encoder", ids) for ids in batch["question_chunks"]]
    chunks += [("doc_encoder", ids) for ids in batch["passage_chunks"]]

    def encode(chunk):
        name, ids = chunk
        with accelerator.autocast():
            return encoders[name](**encoding.collate(encoders[name], ids))

    def loss_of(vectors):
        q_BD = torch.cat(vectors[:questions])[batch["question_places"]]
        p_PD = torch.cat(vectors[questions:])[batch["passage_places"]]
        rows = gather_rows(q_BD), gather_rows(p_PD)
        loss, correct = in_batch_loss(*rows, batch["positive_Q"], batch["excluded"])
        loss = loss / cfg.gradient_scale
        return loss, loss.detach(), correct

    seed = (cfg.seed, step)
    _, loss, correct = grad_cache_step(encode, chunks, loss_of, seed, accelerator.backward, cfg.grad_cache)
    sum_gradients(torch.nn.ModuleDict(encoders).parameters())
    return loss, correct
