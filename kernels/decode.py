"""Decode a sparse code:  y[n] = Σ over e of row n of  values[e] · W_dec[latents[e]]  + b_dec.

N rows, E entries, F latents, D output width:

    values [E]    latents [E] int32    offsets [N+1] int32    W_dec [F, D]    b_dec [D]    y [N, D]

A dense matmul reads all F rows of W_dec per block of rows; this reads E. Rows are ragged: row n owns the entries
offsets[n] : offsets[n+1]. Backward is latent_backward.py's decoder half, without an [N, F] tensor and without atomics.
"""

from torch import Tensor

from . import check
from .backend import op, runs_triton, tl, triton
from .by_latent import bag_of_entries, segment_rows
from .latent_backward import decoder_backward
from .tiles import tile


def decode_reference(values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """The definition, with one [E, D] temporary."""
    rows = bag_of_entries(offsets, latents.shape[0])
    y = W_dec.new_zeros(offsets.shape[0] - 1, W_dec.shape[1]).index_add(0, rows, values[:, None] * W_dec[latents])
    return y if b_dec is None else y + b_dec


@triton.jit
def _decode_kernel(
    values, latents, offsets, W, bias, y, D, stride_wf, stride_wd, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for e in range(tl.load(offsets + n), tl.load(offsets + n + 1)):
        f = tl.load(latents + e).to(tl.int64)
        row = tl.load(W + f * stride_wf + d.to(tl.int64) * stride_wd, mask=inside, other=0.0)
        acc += tl.load(values + e).to(tl.float32) * row.to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + n * D + d, acc.to(y.dtype.element_ty), mask=inside)


@op
def decode_forward(
    values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None,
    order: Tensor | None, starts: Tensor | None,
) -> Tensor:  # fmt: skip
    N, D = offsets.shape[0] - 1, W_dec.shape[1]
    if not runs_triton(values):
        # embedding_bag wants latent-major rows: a transposed copy only where the caller stores them the other way
        y = segment_rows(W_dec.contiguous(), latents, values, offsets)
        return y if b_dec is None else y.add_(b_dec)
    y = values.new_empty(N, D)
    chosen = tile("decode", values.device, D)
    BLOCK_D = min(chosen.constants["BLOCK_D"], triton.next_power_of_2(D))
    if N:
        _decode_kernel[(N, triton.cdiv(D, BLOCK_D))](
            values, latents, offsets, W_dec, b_dec, y, D, *W_dec.stride(),
            HAS_BIAS=b_dec is not None, BLOCK_D=BLOCK_D, num_warps=chosen.warps,
        )  # fmt: skip
    return y


@decode_forward.register_fake
def _(values, latents, offsets, W_dec, b_dec, order, starts):
    return values.new_empty(offsets.shape[0] - 1, W_dec.shape[1])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *inputs[5:])


def _backward(ctx, g):
    values, latents, offsets, W_dec, order, starts = ctx.saved_tensors
    needs_values, _, _, needs_W, needs_b, _, _ = ctx.needs_input_grad
    dvalues = dW = None
    if needs_values or needs_W:
        by_latent = (order, starts)
        dvalues, dW = decoder_backward(g.contiguous(), None, values, latents, offsets, W_dec, 1, by_latent, needs_W)
    return (
        dvalues if needs_values else None, None, None, dW, g.sum(0) if needs_b else None, None, None,
    )  # fmt: skip


decode_forward.register_autograd(_backward, setup_context=_setup)


def decode(
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    by_latent: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y [N, D]. `by_latent` (from sort_by_latent) saves the backward pass its sort."""
    check.floating(values=values, W_dec=W_dec, b_dec=b_dec)
    check.entries(values, latents, offsets)
    check.shape("W_dec", W_dec, (None, None), "[F, D]")
    check.latents_in_range(latents, W_dec.shape[0])
    if b_dec is not None:
        check.shape("b_dec", b_dec, (W_dec.shape[1],), "[D]")
        b_dec = b_dec.contiguous()
    values, latents, offsets = values.contiguous(), latents.contiguous(), offsets.contiguous()
    return decode_forward(values, latents, offsets, W_dec, b_dec, *(by_latent or (None, None)))
