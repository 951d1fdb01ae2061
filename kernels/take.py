"""Some rows of a matrix as a matrix of their own:  out[m] = W[latents[m]],  for latents that each stand once.

    W [F, D], or its transpose [D, F] with latent-major memory    latents [M]    out [M, D]

What a term about dead latents starts from. The gradient is the rows' own gradient, put back: where W is deferred
(deferred.py) nothing of W's size is made.
"""

import torch
from torch import Tensor

from . import check
from .backend import op
from .deferred import Factors, deferred


def take_rows_reference(W: Tensor, latents: Tensor, transposed: bool = False) -> Tensor:
    """The definition."""
    return (W.T if transposed else W)[latents]


@op
def take_rows_forward(W: Tensor, latents: Tensor, transposed: bool) -> Tensor:
    return (W.T if transposed else W).index_select(0, latents)


@take_rows_forward.register_fake
def _(W, latents, transposed):
    return W.new_empty(latents.shape[0], W.shape[0 if transposed else 1])


def _setup(ctx, inputs, output):
    W, latents, ctx.transposed = inputs
    ctx.save_for_backward(W, latents)


def _backward(ctx, g):
    W, latents = ctx.saved_tensors
    waiting = deferred(W)
    if waiting is not None:
        rows = torch.arange(latents.shape[0], dtype=torch.int32, device=latents.device)
        waiting.append(Factors(g.contiguous(), rows, g.new_ones(latents.shape[0]), latents.int()))
        return None, None, None
    F = W.shape[1 if ctx.transposed else 0]
    dW = g.new_zeros(F, g.shape[1]).index_copy_(0, latents, g)
    return dW.T if ctx.transposed else dW, None, None


take_rows_forward.register_autograd(_backward, setup_context=_setup)


def take_rows(W: Tensor, latents: Tensor, transposed: bool = False) -> Tensor:
    """W[latents] [M, D], or with `transposed` W.T[latents]; latents int64, each at most once."""
    check.floating(W=W)
    check.shape("W", W, (None, None), "[D, F]" if transposed else "[F, D]")
    check.shape("latents", latents, (None,), "[M]")
    if latents.dtype != torch.int64:
        raise TypeError(f"latents is {latents.dtype}: pass int64 ids, for a mask [F] mask.nonzero().squeeze(1)")
    check.latents_in_range(latents, W.shape[1 if transposed else 0])
    return take_rows_forward(W, latents, transposed)
