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
"""

import torch

from utils.distributed import chunk_seed


def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    """
    Add d loss / d parameters to every .grad; return what loss_of returned, detached from the encoders.

    encode(chunk): returns vectors [b, D], with a graph when gradients are on. chunks: a list of what encode
    takes. loss_of(vectors): takes the list of vectors, one tensor a chunk, leaves with a gradient; returns
    (loss, ...), the scalar loss first. seed: a tuple of ints >= 0, another one for every step and device; it
    decides the dropout masks. backward: is called on a scalar (accelerate's, where a loss scaler is needed).
    cached: False keeps all graphs instead of encoding twice: the plain step, the same gradient, all
    activations alive.

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
    loss.backward()

    # (3) chunk by chunk through the encoder
    for i, leaf in enumerate(leaves):
        vectors_bD = vectors[i]
        if cached:
            vectors_bD = forward(i)
        # a scalar whose gradient is the wanted one. trap: in fp16 its value may overflow; float32 vectors
        # avoid that
        weighted_bD = vectors_bD * leaf.grad
        backward(weighted_bD.sum())
        # free this chunk's graph before the next one is built
        vectors[i] = vectors_bD = weighted_bD = None
    return loss.detach(), *rest
