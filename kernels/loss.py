"""Squared error and L1 of a decoded code, in the pass that decodes it, at one or several levels:

    error[n, p] = b_dec + Σ over levels q <= p, e in bag (n, q), of values[e] · W_dec[latents[e]]  -  target[n]
    sse[n, p]   = |error[n, p]|²            l1[n] = Σ over e of row n of |values[e]| · weight[latents[e]]

    values [E]    latents [E]    bounds [N·P+1]    W_dec [F, D]    weight [F]    target [N, D]    error [N, P, D]

Bag (n, p) owns the entries bounds[n·P+p] : bounds[n·P+p+1]. One level is the plain loss, with bounds = offsets. Matryoshka
prefixes cut a row by latent, hierarchical losses by strength: each level adds its own entries to the sum of the levels
before, so all of them cost one gather.

The error is the only [N, P, D] tensor: the gradient of sse with respect to the decoded rows is 2 · dsse · error, which the
backward pass applies as a scale per bag while it reads. With several levels an entry of level p counts in every level
from p on, so its gradient row is the suffix sum over levels.
"""

import torch
from torch import Tensor

from . import check
from .backend import accumulator, exactly, op, runs_triton, tl, triton
from .by_latent import bag_of_entries, segment_rows, segment_sums, segment_sums_sorted, sort_by_latent
from .latent_backward import decoder_backward
from .tiles import tile


def decode_loss_reference(
    values: Tensor, latents: Tensor, bounds: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, with one [E, D] temporary."""
    N, D = target.shape
    bags = bag_of_entries(bounds, latents.shape[0])
    parts = W_dec.new_zeros(bounds.shape[0] - 1, D).index_add(0, bags, values[:, None] * W_dec[latents])
    levels = max(parts.shape[0] // max(N, 1), 1)
    error = parts.view(N, levels, D).cumsum(1) + b_dec - target[:, None]
    cost = values.abs() if weight is None else values.abs() * weight[latents]
    l1 = values.new_zeros(N).index_add(0, bags // levels, cost)
    return error, error.square().sum(-1), l1


@triton.jit
def _decode_loss_kernel(
    values, latents, bounds, W, bias, target, weight, error, sse, l1, P, D, stride_wf, stride_wd, stride_t,
    HAS_WEIGHT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    # a whole row per program: its squared error needs no second pass over other programs' sums
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        acc = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        acc -= tl.load(target + n * stride_t + d, mask=inside, other=0.0).to(tl.float32)
        for p in range(P):
            bag = n * P + p
            for e in range(tl.load(bounds + bag), tl.load(bounds + bag + 1)):
                f = tl.load(latents + e).to(tl.int64)
                row = tl.load(W + f * stride_wf + d.to(tl.int64) * stride_wd, mask=inside, other=0.0)
                acc += tl.load(values + e).to(tl.float32) * row.to(tl.float32)
            tl.store(error + bag * D + d, acc.to(error.dtype.element_ty), mask=inside)
            so_far = tl.load(sse + bag, mask=start > 0, other=0.0)
            tl.store(sse + bag, so_far + tl.sum(tl.where(inside, acc * acc, 0.0)))
    cost = 0.0
    for e in range(tl.load(bounds + n * P), tl.load(bounds + n * P + P)):
        v = tl.abs(tl.load(values + e).to(tl.float32))
        if HAS_WEIGHT:
            v *= tl.load(weight + tl.load(latents + e)).to(tl.float32)
        cost += v
    tl.store(l1 + n, cost)


def _torch_path(values, latents, bounds, W_dec, b_dec, target, weight):
    N, D = target.shape
    levels = max((bounds.shape[0] - 1) // max(N, 1), 1)
    wide = accumulator(values.dtype)
    error = segment_rows(W_dec.contiguous(), latents, values, bounds).view(N, levels, D)
    for p in range(1, levels):
        error[:, p] += error[:, p - 1]
    error += (b_dec - target)[:, None]
    sse = torch.linalg.vecdot(error.to(wide), error.to(wide))
    cost = values.abs().to(wide)
    if weight is not None:
        cost = cost * weight[latents].to(wide)
    return error, sse, segment_sums_sorted(cost, bounds[::levels])


@op
def decode_loss_forward(
    values: Tensor, latents: Tensor, bounds: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, weight: Tensor | None,
    order: Tensor | None, starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not runs_triton(values):
        return _torch_path(values, latents, bounds, W_dec, b_dec, target, weight)
    N, D = target.shape
    levels = max((bounds.shape[0] - 1) // max(N, 1), 1)
    error = values.new_empty(N, levels, D)
    sse = torch.empty(N, levels, dtype=torch.float32, device=values.device)
    l1 = torch.empty(N, dtype=torch.float32, device=values.device)
    target = target if target.stride(1) == 1 else target.contiguous()
    chosen = tile("decode", values.device, D)
    BLOCK_D = min(chosen.constants["BLOCK_D"], triton.next_power_of_2(D))
    if N:
        _decode_loss_kernel[(N,)](
            values, latents, bounds, W_dec, b_dec, target, weight, error, sse, l1, levels, D, *W_dec.stride(), target.stride(0),
            HAS_WEIGHT=weight is not None, BLOCK_D=BLOCK_D, num_warps=chosen.warps,
        )  # fmt: skip
    return error, sse, l1


@decode_loss_forward.register_fake
def _(values, latents, bounds, W_dec, b_dec, target, weight, order, starts):
    N, D = target.shape
    levels = max((bounds.shape[0] - 1) // max(N, 1), 1)
    wide = accumulator(values.dtype)
    return values.new_empty(N, levels, D), values.new_empty(N, levels, dtype=wide), values.new_empty(N, dtype=wide)


def _setup(ctx, inputs, output):
    values, latents, bounds, W_dec, _, _, weight, order, starts = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, latents, bounds, W_dec, weight, order, starts, output[0])


def _backward(ctx, g_error, g_sse, g_l1):
    values, latents, bounds, W_dec, weight, order, starts, error = ctx.saved_tensors
    needs = ctx.needs_input_grad
    N, levels, D = error.shape
    scale = None
    if g_error is None and levels == 1:
        # the usual case: no gradient tensor, the error itself is read with a scale per row
        g = error.view(N, D)
        scale = (2 * g_sse).view(N).to(error.dtype) if g_sse is not None else error.new_zeros(N)
        by_row = g * scale[:, None] if needs[5] else None
        with exactly(g):
            db = scale @ g if needs[4] else None
    else:
        g = torch.zeros_like(error) if g_error is None else g_error
        if g_sse is not None:
            g = g + (2 * g_sse)[:, :, None].to(error.dtype) * error
        g = g.clone() if levels > 1 else g
        for p in range(levels - 2, -1, -1):  # the suffix sum; cumsum is not deterministic on a GPU
            g[:, p] += g[:, p + 1]
        g = g.reshape(N * levels, D)
        by_row = g.view(N, levels, D)[:, 0]
        db = by_row.sum(0) if needs[4] else None
    dvalues, dW = decoder_backward(g, scale, values, latents, bounds, W_dec, levels, (order, starts), needs[3])
    dweight = None
    if g_l1 is not None:
        rows = bag_of_entries(bounds, latents.shape[0]) // levels
        slope = g_l1.to(values.dtype)[rows]
        dvalues = dvalues + slope * values.sign() * (1 if weight is None else weight[latents])
        if weight is not None and needs[6]:
            if order is None:
                order, starts = sort_by_latent(latents, W_dec.shape[0])
            dweight = segment_sums(slope * values.abs(), order, starts)
    return (
        dvalues, None, None, dW, db, -by_row if needs[5] else None, dweight, None, None,
    )  # fmt: skip


decode_loss_forward.register_autograd(_backward, setup_context=_setup)


def decode_loss(
    values: Tensor,
    latents: Tensor,
    bounds: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    by_latent: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(error [N, P, D], sse [N, P], l1 [N]); the sums are fp32 for fp32 and less. All three have gradients."""
    check.floating(values=values, W_dec=W_dec, b_dec=b_dec, target=target, weight=weight)
    check.entries(values, latents, bounds)
    check.shape("W_dec", W_dec, (None, None), "[F, D]")
    F, D = W_dec.shape
    check.latents_in_range(latents, F)
    check.shape("b_dec", b_dec, (D,), "[D]")
    check.shape("target", target, (None, D), "[N, D]")
    if weight is not None:
        check.shape("weight", weight, (F,), "[F]")
        weight = weight.contiguous()
    N, bags = target.shape[0], bounds.shape[0] - 1
    if bags != 0 if N == 0 else (bags == 0 or bags % N):
        raise ValueError(f"bounds describes {bags} bags for N={N} rows: pass N times the number of levels, plus one")
    values, latents, bounds, b_dec = (t.contiguous() for t in (values, latents, bounds, b_dec))
    return decode_loss_forward(values, latents, bounds, W_dec, b_dec, target, weight, *(by_latent or (None, None)))
