"""The gradients of decoding and encoding, latent by latent over the sorted entries (by_latent.py).

Entry e belongs to latent f(e) and to row n(e); a bag is a row, or a row's part at one level (see loss.py). With g the
gradient of the decoded bags, v the values, s an optional scale per bag:

    dvalues[e] = s[bag(e)] · g[bag(e)] · W_dec[f(e)]
    dW_dec[f]  = Σ over e with f(e) = f of  v[e] · s[bag(e)] · g[bag(e)]
    dpre[e]    = jac[e] · (dvalues[e] + direct[e])
    dW_enc[f]  = Σ dpre[e] · x[n(e)]          db_enc[f] = Σ dpre[e]

One program per latent keeps its decoder row and both gradient rows in registers, walks its segment once and stores. No
atomics: the same bits every run. Segments longer than SPLIT go to several programs that write partial sums, which a second
kernel adds in order. Either half can be asked for alone. This is the plain mode, which stores gradients for any optimizer;
update.py walks the same segments and updates the row instead.

On a CPU the sums are torch's `embedding_bag` over the transposed lists (bags are latents, the table is g or x) and dvalues
are `sampled_addmm`.
"""

import torch
from torch import Tensor

from . import by_latent
from .backend import op, runs_triton, tl, triton
from .by_latent import bag_of_entries, segment_rows, segment_sums_sorted, sort_by_latent, work_items
from .deferred import Factors, deferred
from .entry_dots import dots_torch, dots_triton, entry_dots_op
from .tiles import tile


def latent_backward_reference(
    latents: Tensor, offsets: Tensor, F: int, levels: int = 1,
    g: Tensor | None = None, scale: Tensor | None = None, values: Tensor | None = None, W_dec: Tensor | None = None,
    x: Tensor | None = None, direct: Tensor | None = None, jac: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The definition, with one [E, D] temporary per half."""
    bags = bag_of_entries(offsets, latents.shape[0])
    dvalues = dW_dec = dW_enc = db_enc = None
    if g is not None:
        rows = g[bags] if scale is None else g[bags] * scale[bags, None]
        dvalues = (rows * W_dec[latents]).sum(1)
        dW_dec = g.new_zeros(F, g.shape[1]).index_add(0, latents, values[:, None] * rows)
    if x is not None:
        dpre = direct if dvalues is None else dvalues if direct is None else dvalues + direct
        dpre = dpre if jac is None else dpre * jac
        dW_enc = x.new_zeros(F, x.shape[1]).index_add(0, latents, dpre[:, None] * x[bags // levels])
        db_enc = x.new_zeros(F).index_add(0, latents, dpre)
    return dvalues, dW_dec, dW_enc, db_enc


# ---------------------------------------------------------------------------------------------------------- torch path


def _torch_path(order, starts, latents, offsets, levels, g, scale, values, W_dec, x, direct, jac):
    bags = bag_of_entries(offsets, latents.shape[0])
    sorted_bags = bags[order]
    dvalues = dW_dec = dW_enc = db_enc = None
    if g is not None:
        dvalues = dots_torch(g, bags, latents, offsets, W_dec)
        weights = values
        if scale is not None:
            dvalues *= scale[bags]
            weights = values * scale[bags]
        dW_dec = segment_rows(g, sorted_bags, weights[order], starts)
    if x is not None:
        dpre = direct if dvalues is None else dvalues if direct is None else dvalues + direct
        dpre = (dpre if jac is None else dpre * jac)[order]
        dW_enc = segment_rows(x, sorted_bags if levels == 1 else sorted_bags // levels, dpre, starts)
        db_enc = segment_sums_sorted(dpre, starts)
    return dvalues, dW_dec, dW_enc, db_enc


# -------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _finish_row(gradient, f, D, d, inside, row):
    """Store latent f's finished gradient row."""
    tl.store(gradient + f * D + d, row.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _latent_kernel(
    order, starts, latent_of, part_of, slot_of, bags, g, scale, values, W_dec, x, direct, jac,
    dvalues, dW_dec, dW_enc, db_enc, partial_dec, partial_enc, partial_b,
    F, D_out, D_in, levels, stride_g, stride_wf, stride_wd, stride_x,
    DECODER: tl.constexpr, ENCODER: tl.constexpr, DOT: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_DIRECT: tl.constexpr, HAS_JAC: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if SPLITS:
        latent, part = tl.load(latent_of + item), tl.load(part_of + item)
        if latent >= F:  # the grid has room for the most items there can be
            return
    else:
        latent, part = item, 0
    f = latent.to(tl.int64)
    begin, end = tl.load(starts + f), tl.load(starts + f + 1)
    low = begin + part * SPLIT
    high = tl.minimum(end, low + SPLIT) if SPLITS else end
    whole = end - begin <= SPLIT if SPLITS else True

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_out, in_in = d < D_out, d < D_in
    first_slice = tl.program_id(1) == 0
    dec = tl.zeros([BLOCK_D], dtype=tl.float32)
    enc = tl.zeros([BLOCK_D], dtype=tl.float32)
    b = 0.0
    if DOT:
        w = tl.load(W_dec + f * stride_wf + d.to(tl.int64) * stride_wd, mask=in_out, other=0.0).to(tl.float32)
    for i in range(low, high):
        e = tl.load(order + i)
        bag = tl.load(bags + e).to(tl.int64)
        c = 0.0
        if DECODER:
            row = tl.load(g + bag * stride_g + d, mask=in_out, other=0.0).to(tl.float32)
            if HAS_SCALE:
                row *= tl.load(scale + bag).to(tl.float32)
            dec += tl.load(values + e).to(tl.float32) * row
            if DOT:
                c = tl.sum(row * w)
                tl.store(dvalues + e, c.to(dvalues.dtype.element_ty))
            else:
                c = tl.load(dvalues + e).to(tl.float32)
        if ENCODER:
            if HAS_DIRECT:
                c += tl.load(direct + e).to(tl.float32)
            if HAS_JAC:
                c *= tl.load(jac + e).to(tl.float32)
            enc += c * tl.load(x + bag // levels * stride_x + d, mask=in_in, other=0.0).to(tl.float32)
            b += c

    if SPLITS:
        slot = tl.load(slot_of + f).to(tl.int64) + part
        if DECODER:
            tl.store(partial_dec + slot * D_out + d, dec, mask=in_out & (whole == 0))
        if ENCODER:
            tl.store(partial_enc + slot * D_in + d, enc, mask=in_in & (whole == 0))
            tl.store(partial_b + slot, b, mask=first_slice & (whole == 0))
    if DECODER:
        _finish_row(dW_dec, f, D_out, d, in_out & whole, dec)
    if ENCODER:
        _finish_row(dW_enc, f, D_in, d, in_in & whole, enc)
        tl.store(db_enc + f, b.to(db_enc.dtype.element_ty), mask=first_slice & whole)


@triton.jit
def _add_parts_kernel(
    split_latents, parts, slot_of, partial_dec, partial_enc, partial_b, dW_dec, dW_enc, db_enc, D_out, D_in,
    DECODER: tl.constexpr, ENCODER: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    f = tl.load(split_latents + tl.program_id(0)).to(tl.int64)
    count = tl.load(parts + f)
    if count == 1:
        return
    first = tl.load(slot_of + f).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_out, in_in = d < D_out, d < D_in
    dec = tl.zeros([BLOCK_D], dtype=tl.float32)
    enc = tl.zeros([BLOCK_D], dtype=tl.float32)
    b = 0.0
    for part in range(count):
        slot = first + part
        if DECODER:
            dec += tl.load(partial_dec + slot * D_out + d, mask=in_out, other=0.0)
        if ENCODER:
            enc += tl.load(partial_enc + slot * D_in + d, mask=in_in, other=0.0)
            b += tl.load(partial_b + slot)
    if DECODER:
        _finish_row(dW_dec, f, D_out, d, in_out, dec)
    if ENCODER:
        _finish_row(dW_enc, f, D_in, d, in_in, enc)
        tl.store(db_enc + f, b.to(db_enc.dtype.element_ty), mask=tl.program_id(1) == 0)


def _triton_path(order, starts, latents, offsets, levels, g, scale, values, W_dec, x, direct, jac):
    E, F = latents.shape[0], starts.shape[0] - 1
    decoder, encoder = g is not None, x is not None
    like = g if decoder else x
    bags = bag_of_entries(offsets, E)
    # rows must be contiguous; [N, D] copies at most
    g, x = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (g, x))
    D_out, D_in = (0 if t is None else t.shape[1] for t in (g, x))
    dvalues = like.new_empty(E) if decoder else None
    dW_dec = like.new_empty(F, D_out) if decoder else None
    dW_enc = like.new_empty(F, D_in) if encoder else None
    db_enc = like.new_empty(F) if encoder else None

    widest = max(D_out, D_in, 1)
    chosen = tile("latent", like.device, widest)
    BLOCK_D = min(chosen.constants["BLOCK_D"], triton.next_power_of_2(widest))
    slices = triton.cdiv(widest, BLOCK_D)
    stride_g, stride_x = (0 if t is None else t.stride(0) for t in (g, x))
    stride_wf, stride_wd = W_dec.stride() if decoder else (0, 0)
    if decoder and slices > 1:  # a row no longer fits one program: dot products first
        dots_triton(g, scale, bags, latents, W_dec, dvalues)

    SPLIT = by_latent.SPLIT
    splits = E > SPLIT
    latent_of = part_of = slot_of = parts = longest = None
    partial_dec = partial_enc = partial_b = None
    if splits:
        latent_of, part_of, slot_of, parts, longest = work_items(starts, E)
        slots = 2 * (E // SPLIT)
        partial_dec, partial_enc, partial_b = (
            torch.empty(slots, n, dtype=torch.float32, device=like.device) for n in (D_out, D_in, 1)
        )
    _latent_kernel[(F + E // SPLIT if splits else F, slices)](
        order, starts, latent_of, part_of, slot_of, bags, g, scale, values, W_dec, x, direct, jac,
        dvalues, dW_dec, dW_enc, db_enc, partial_dec, partial_enc, partial_b,
        F, D_out, D_in, levels, stride_g, stride_wf, stride_wd, stride_x,
        DECODER=decoder, ENCODER=encoder, DOT=decoder and slices == 1,
        HAS_SCALE=scale is not None, HAS_DIRECT=direct is not None, HAS_JAC=jac is not None,
        SPLITS=splits, SPLIT=SPLIT, BLOCK_D=BLOCK_D, num_warps=chosen.warps,
    )  # fmt: skip
    if splits:
        adding = tile("decode", like.device, widest)  # plain sums need not hold whole rows, which spills at 8192
        BLOCK_D = min(adding.constants["BLOCK_D"], triton.next_power_of_2(widest))
        _add_parts_kernel[(longest.shape[0], triton.cdiv(widest, BLOCK_D))](
            longest, parts, slot_of, partial_dec, partial_enc, partial_b, dW_dec, dW_enc, db_enc, D_out, D_in,
            DECODER=decoder, ENCODER=encoder, BLOCK_D=BLOCK_D, num_warps=adding.warps,
        )  # fmt: skip
    return dvalues, dW_dec, dW_enc, db_enc


# ----------------------------------------------------------------------------------------------------------- operators


@op
def latent_backward_op(
    order: Tensor, starts: Tensor, latents: Tensor, offsets: Tensor, levels: int,
    g: Tensor | None, scale: Tensor | None, values: Tensor | None, W_dec: Tensor | None,
    x: Tensor | None, direct: Tensor | None, jac: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = values if values is not None else direct
    path = _triton_path if runs_triton(like) else _torch_path
    dvalues, dW_dec, dW_enc, db_enc = path(order, starts, latents, offsets, levels, g, scale, values, W_dec, x, direct, jac)

    def some(t: Tensor | None) -> Tensor:  # an operator returns tensors: the half that was not asked for is empty
        return like.new_empty(0) if t is None else t

    return some(dvalues), some(dW_dec), some(dW_enc), some(db_enc)


@latent_backward_op.register_fake
def _(order, starts, latents, offsets, levels, g, scale, values, W_dec, x, direct, jac):
    new, F, E = (values if values is not None else direct).new_empty, starts.shape[0] - 1, latents.shape[0]
    decoder = (new(0), new(0)) if g is None else (new(E), new(F, g.shape[1]))
    encoder = (new(0), new(0)) if x is None else (new(F, x.shape[1]), new(F))
    return *decoder, *encoder


def latent_backward(
    order: Tensor, starts: Tensor, latents: Tensor, offsets: Tensor, levels: int = 1,
    g: Tensor | None = None, scale: Tensor | None = None, values: Tensor | None = None, W_dec: Tensor | None = None,
    x: Tensor | None = None, direct: Tensor | None = None, jac: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dvalues [E], dW_dec [F, D_out], dW_enc [F, D_in], db_enc [F]); the half that was not asked for is None."""
    dvalues, dW_dec, dW_enc, db_enc = latent_backward_op(
        order, starts, latents, offsets, levels, g, scale, values, W_dec, x, direct, jac
    )
    if g is None:
        return None, None, dW_enc, db_enc
    return (dvalues, dW_dec, None, None) if x is None else (dvalues, dW_dec, dW_enc, db_enc)


def decoder_backward(
    g: Tensor, scale: Tensor | None, values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, levels: int,
    by_latent: tuple[Tensor | None, Tensor | None], needs_weights: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dvalues, dW_dec or None). With frozen or deferred weights nothing is sorted and nothing has the shape [F, D]."""
    waiting = deferred(W_dec)
    if waiting is not None and needs_weights:
        bags = bag_of_entries(offsets, latents.shape[0])
        weights = values if scale is None else values * scale[bags]
        waiting.append(Factors(g, bags, weights, latents, None if by_latent[0] is None else by_latent))
    if not needs_weights or waiting is not None:
        return entry_dots_op(g, scale, latents, offsets, W_dec), None
    order, starts = by_latent
    if order is None or starts is None:
        order, starts = sort_by_latent(latents, W_dec.shape[0])
    dvalues, dW_dec, _, _ = latent_backward_op(
        order, starts, latents, offsets, levels, g, scale, values, W_dec, None, None, None
    )
    return dvalues, dW_dec
