"""
Gradient cache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", Sec. 3).

An in-batch loss couples all rows of the batch, so accumulating over small batches is a *different* loss. But
it couples them only through their vectors. So: (1) encode all chunks without a graph, (2) take the loss and
its gradient with respect to the vectors, which needs no encoder, (3) encode each chunk again, with a graph,
and push its share of that gradient through it. By the chain rule the sum over chunks is exactly the gradient
of the big batch:

    d loss / d theta  =  sum over chunks c of  (d vectors_c / d theta)^T  (d loss / d vectors_c)

The price is a second forward pass; the gain is that only one chunk's activations are alive at a time.
"""

import numpy as np
import torch


def grad_cache_step(encode, chunks, loss_of, seed, backward=torch.Tensor.backward, cached=True):
    """
    Add d loss / d parameters to every .grad; return whatever loss_of returned, detached from the encoders.

    encode(chunk) -> vectors [b, D], a graph attached when gradients are on. chunks: list of anything encode
    takes. loss_of(vectors) -> (loss, ...): the list of vectors, one tensor a chunk, leaves with a gradient ->
    scalar loss first.
    seed: tuple of ints >= 0 that is different for every step and device; it decides the dropout masks.
    backward: called on a scalar to backpropagate (accelerate's, where a loss scaler is needed).
    cached: False keeps all graphs instead of encoding twice: the plain step, the same gradient, all
    activations alive.

    Side effect: re-seeds torch's global generators (CPU and all CUDA devices).
    """

    def forward(i):
        # Dropout must fall on the same units in both passes. why not snapshot and restore the generators, as
        # the original does: a mask that is a function of (seed, chunk) leaves no state to lose in a
        # checkpoint, and cannot be captured wrongly (GradCache's functional API forgets the GPU's state).
        torch.manual_seed(chunk_seed(seed, i))
        return encode(chunks[i])

    with torch.set_grad_enabled(not cached):
        vectors = [forward(i) for i in range(len(chunks))]
    leaves = [v.detach().requires_grad_() for v in vectors]
    loss, *rest = loss_of(leaves)
    loss.backward()
    for i, leaf in enumerate(leaves):
        vectors_bD = forward(i) if cached else vectors[i]
        # A scalar whose gradient is the wanted one. trap: in fp16 its value may overflow; float32 vectors
        # avoid that.
        backward((vectors_bD * leaf.grad).sum())
        vectors[i] = vectors_bD = None  # frees this chunk's graph before the next is built
    return loss.detach(), *rest


def chunk_seed(seed, i):
    """A 63-bit seed for chunk i of the step `seed`: independent streams from numpy's SeedSequence."""
    return int(np.random.SeedSequence([*seed, i]).generate_state(1, np.uint64)[0] >> 1)
