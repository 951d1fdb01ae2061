"""Pre-activations of selected entries:  pre[e] = x[n(e)] · W_enc[:, f(e)] + b_enc[f(e)],  with gradients.

    x [N, D]    W_enc [D, F]    b_enc [F]    pre [E], latents [E], offsets [N+1], order [E], starts [F+1]

Which entries there are is decided by a selection (topk.py, batch_topk.py, threshold.py), which already knows their
pre-activations and has no gradient. This op puts them on the tape, once for every selection there is or will be:

    dW_enc[:, f] = Σ over e with f(e) = f of g[e] · x[n(e)]      db_enc[f] = Σ g[e]      latent_backward.py
    dx[n]        = Σ over e of row n of g[e] · W_enc[:, f(e)]                            a decode
"""

import torch
from torch import Tensor

from . import check
from .backend import op
from .by_latent import bag_of_entries, segment_sums, sort_by_latent
from .decode import decode_forward
from .deferred import Factors, deferred
from .latent_backward import latent_backward


def encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, latents: Tensor, offsets: Tensor) -> Tensor:
    """The definition, with two [E, D] temporaries."""
    rows = bag_of_entries(offsets, latents.shape[0])
    return (x[rows] * W_enc.T[latents]).sum(1) + b_enc[latents]


@op
def encode_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, latents: Tensor, offsets: Tensor, order: Tensor, starts: Tensor
) -> Tensor:
    return pre.clone()


@encode_entries.register_fake
def _(x, W_enc, b_enc, pre, latents, offsets, order, starts):
    return torch.empty_like(pre)


def _setup(ctx, inputs, output):
    x, W_enc, _, _, latents, offsets, order, starts = inputs
    ctx.save_for_backward(x, W_enc, latents, offsets, order, starts)


def _backward(ctx, g):
    x, W_enc, latents, offsets, order, starts = ctx.saved_tensors
    g = g.contiguous()
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    dx = dW = db = None
    if needs_x:
        dx = decode_forward(g, latents, offsets, W_enc.T, None, None, None)
    waiting = deferred(W_enc)
    if waiting is not None and needs_W:
        waiting.append(Factors(x, bag_of_entries(offsets, latents.shape[0]), g, latents, (order, starts)))
        db = segment_sums(g, order, starts)
    elif needs_W or needs_b:
        _, _, dW, db = latent_backward(order, starts, latents, offsets, x=x, direct=g)
    return dx, dW.T if needs_W and dW is not None else None, db if needs_b else None, None, None, None, None, None


encode_entries.register_autograd(_backward, setup_context=_setup)


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre: Tensor,
    latents: Tensor,
    offsets: Tensor,
    by_latent: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The selection's `pre`, now with gradients to x, W_enc and b_enc. `by_latent` as sort_by_latent returns it."""
    check.encoder(x, W_enc, b_enc)
    check.floating(x=x, pre=pre)
    check.entries(pre, latents, offsets)
    check.shape("offsets", offsets, (x.shape[0] + 1,), "[N+1]")
    check.latents_in_range(latents, W_enc.shape[1])
    latents, offsets = latents.contiguous(), offsets.contiguous()
    order, starts = by_latent or sort_by_latent(latents, W_enc.shape[1])
    return encode_entries(x, W_enc, b_enc, pre.detach(), latents, offsets, order, starts)
