"""
Gradient cache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
Sec. 3).

An in-batch loss couples all rows of the batch, so accumulating over small batches is a *different* loss. But
the rows are coupled only through their vectors. So:

    (1) encode all chunks without a graph
    (2) take the loss and its gradient with respect to the vectors; this needs no encoder
    (3) encode each chunk again, with a graph, and push its share of that gradient through it

By the chain rule the sum over chunks is exactly the gradient of the big batch:

    d loss / d theta  =  sum over chunks c of  (d vectors_c / d theta)^T  (d loss / d vectors_c)

The price is a second forward pass. The gain is that only one chunk's activations are alive at a time.

b rows of a chunk · D dimensions
"""

import torch

from utils.distributed import chunk_seed


def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    """
    Add d loss / d parameters to every .grad; return the tuple of loss_of, the loss in it without a graph.

    encode(chunk): returns vectors [b, D]; it builds a graph only where torch's gradients are on. chunks: a
    list; encode takes one. loss_of(vectors): takes the vectors of all chunks, a list of tensors without an
    encoder behind them; returns (loss, ...), a scalar first. seed: ints >= 0 that no other step or device
    has; they fix the dropout masks. backward: called in the place of scalar.backward() (accelerate's, for
    fp16's loss scaler). cached: False is the plain step: every graph stays; the same masks and gradient, more
    memory.

    Side effect: re-seeds torch's global generators (CPU and all CUDA devices).
    """

    def forward(i):
        # Dropout must fall on the same units in both passes. differs: GradCache snapshots and restores the
        # generators. A mask that is a function of (seed, chunk) leaves no state to lose in a checkpoint, and
        # cannot be captured wrongly (GradCache's functional API forgets the GPU's state).
        torch.manual_seed(chunk_seed(seed, i))
        return encode(chunks[i])

    # (1) all vectors
    with torch.set_grad_enabled(not cached):
        vectors = [forward(i) for i in range(len(chunks))]

    # (2) the loss, and its gradient with respect to the vectors
    leaves = [vectors_bD.detach().requires_grad_() for vectors_bD in vectors]
    loss, *rest = loss_of(leaves)
    loss.backward()  # not scaled: the loss scaler acts once, in (3)

    # (3) chunk by chunk through the encoder
    for i, leaf in enumerate(leaves):
        vectors_bD = vectors[i]
        if cached:
            vectors_bD = forward(i)
        # the gradient of this sum with respect to the vectors is leaf.grad. why a sum: fp16's loss scaler
        # takes a scalar. trap: it may overflow in fp16, so encode must return float32
        weighted_bD = vectors_bD * leaf.grad
        backward(weighted_bD.sum())
        # free this chunk's graph before the next one is built
        vectors[i] = vectors_bD = weighted_bD = None
    return loss.detach(), *rest
