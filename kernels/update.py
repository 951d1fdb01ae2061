"""Update a latent-major matrix row by row from a gradient that is never stored.

A sparse code's gradient is a sum of outer products,  dW[f] = Σ over e with f(e) = f of  c[e] · table[row(e)],  so its factors
(the code and an [R, D] table) say all of it in E + R·D numbers instead of F·D. One program per latent adds up the row in
registers, and in the same breath

    dW[f] += dnorm[f] · w / |w|        the gradient through decoder norms, where a loss asks for them (0 for a zero row)
    dW[f] -= (dW[f] · w) w / |w|²      if the decoder is kept at unit norm: only the part along the sphere moves it
    Adam: m, v, bias correction, eps and (L2) weight decay as torch.optim.Adam has them
    w      = w / |w|                   if the decoder is kept at unit norm

and writes w, m and v. Per parameter 24 bytes move (28 with a stored gradient, plus 8 to make it). Rows that no token
touched have dW = 0 and move exactly as dense Adam moves them. A row whose gradient, on a CPU clipped, is not finite, or a zero
row that should have unit norm, stays as it was and is counted; `scalars` holds what the whole step depends on, on the device,
so that nothing is read: the bias corrections, the clipping factor, and whether to step at all.

W may be the bf16 half of a split number, with the other half in `low`, and m and v may be bf16, rounded at random (halves.py):
16 bytes per parameter then. All arithmetic is fp32. Another format of the moments is another branch where they are loaded and
where they are stored.

Segments longer than SPLIT are summed in parts first, in a fixed order: the same bits every run. A CPU goes through slices
of SLICE parameters, so that one slice's gradient is all there ever is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from . import by_latent
from .backend import accumulator, device_of, keep_freed_memory, runs_triton, tl, triton
from .by_latent import segment_rows
from .deferred import Factors, norm_slope
from .halves import as_fp32, bits, high_half, join_halves, joined, low_half, round_randomly, rounded_randomly, split
from .noise import random_bits, random_bits_of_row
from .tiles import TILES, limits, tile

WIDEST = TILES["update"]["any"][-1].width  # rows up to here stay whole in registers
SLICE = 1 << 20  # parameters per slice on a CPU: 4 MB for the gradient and for each fp32 copy beside it; 2^19 is no faster


def gradient_reference(
    factors: Factors, W: Tensor, stored: Tensor | None = None, dnorm: Tensor | None = None, project: bool = False
) -> Tensor:
    """The gradient that the update acts on, stored. [F, D]"""
    dW = torch.zeros_like(W) if stored is None else stored.clone()
    dW.index_add_(0, factors.latents, factors.coefficients[:, None] * factors.table[factors.rows])
    if dnorm is not None:
        dW += torch.nn.functional.normalize(W, dim=1, eps=1e-38) * dnorm[:, None]
    if project:
        dW -= (dW * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
    return dW


@triton.jit
def _parts_kernel(
    order, starts, slot_of, parts, latent_of_slot, rows, table, coefficients, partial, D, stride_t,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    f = tl.load(latent_of_slot + slot).to(tl.int64)
    if f < 0:
        return
    part = slot - tl.load(slot_of + f)
    d = tl.arange(0, BLOCK_D)
    low = tl.load(starts + f) + part * SPLIT
    high = tl.minimum(tl.load(starts + f + 1), low + SPLIT)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(low, high):
        e = tl.load(order + i)
        r = tl.load(rows + e).to(tl.int64)
        row = as_fp32(tl.load(table + r * stride_t + d, mask=d < D, other=0))
        acc += as_fp32(tl.load(coefficients + e)) * row
    tl.store(partial + slot * D + d, acc, mask=d < D)


@triton.jit(do_not_specialize=["seed"])
def _update_kernel(
    order, starts, slot_of, parts, partial, rows, table, coefficients, stored, dnorm, W, low_bits, m, v, scalars,
    skipped, squares, D, stride_t, seed, lr, beta1, beta2, eps, weight_decay,
    HAS_STORED: tl.constexpr, HAS_DNORM: tl.constexpr, HAS_LOW: tl.constexpr, UNIT_NORM: tl.constexpr,
    NORM_ONLY: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    if HAS_STORED:
        grad = as_fp32(tl.load(stored + f * D + d, mask=inside, other=0))
    else:
        grad = tl.zeros([BLOCK_D], dtype=tl.float32)
    low, high = tl.load(starts + f), tl.load(starts + f + 1)
    if SPLITS:
        count = tl.load(parts + f)
        first = tl.load(slot_of + f).to(tl.int64) * (count > 1)
        for part in range(tl.where(count > 1, count, 0)):
            grad += tl.load(partial + (first + part) * D + d, mask=inside, other=0.0)
        low = tl.where(count > 1, high, low)
    for i in range(low, high):
        e = tl.load(order + i)
        r = tl.load(rows + e).to(tl.int64)
        row = as_fp32(tl.load(table + r * stride_t + d, mask=inside, other=0))
        grad += as_fp32(tl.load(coefficients + e)) * row
    w = tl.load(W + f * D + d, mask=inside, other=0)
    if HAS_LOW:
        w = join_halves(w, tl.load(low_bits + f * D + d, mask=inside, other=0))
    if HAS_DNORM:
        square = tl.sum(w * w)
        grad += tl.where(square > 0.0, tl.load(dnorm + f) / tl.sqrt(square), 0.0) * w
    if NORM_ONLY:
        along = 0.0
        if UNIT_NORM:  # Pythagoras, without building the projected row
            dot = tl.sum(grad * w)
            along = dot * dot / tl.maximum(tl.sum(w * w), 1e-37)
        tl.store(squares + f, tl.maximum(tl.sum(grad * grad) - along, 0.0))
    else:
        if UNIT_NORM:
            grad -= tl.sum(grad * w) / tl.sum(w * w) * w
        correction1, correction2_root, step = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 4)
        grad *= tl.load(scalars + 2)
        bad = tl.where(tl.sum(grad * 0.0) == 0.0, 0, 1)  # inf · 0 and NaN · 0 are NaN
        tl.store(skipped + f, bad)
        write = inside & (bad < tl.load(scalars + 3).to(tl.int32))
        grad += weight_decay * w
        m_new = as_fp32(tl.load(m + f * D + d, mask=inside, other=0))
        v_new = as_fp32(tl.load(v + f * D + d, mask=inside, other=0))
        m_new += (1 - beta1) * (grad - m_new)
        v_new = beta2 * v_new + (1 - beta2) * grad * grad
        w -= lr / correction1 * m_new / (tl.sqrt(v_new) / correction2_root + eps)
        if m.dtype.element_ty == tl.int16:
            noise = random_bits_of_row(seed, step, f, d)
            tl.store(m + f * D + d, rounded_randomly(m_new, (noise >> 16) & 0xFFFF), mask=write)
            tl.store(v + f * D + d, rounded_randomly(v_new, noise & 0xFFFF), mask=write)
        else:
            tl.store(m + f * D + d, m_new, mask=write)
            tl.store(v + f * D + d, v_new, mask=write)
        if UNIT_NORM:
            w /= tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0)))
        if HAS_LOW:
            top = high_half(w)
            tl.store(low_bits + f * D + d, low_half(w, top), mask=write)
            tl.store(W + f * D + d, top, mask=write)
        else:
            tl.store(W + f * D + d, w, mask=write)


class _Parts(NamedTuple):
    """Where long segments are summed before the update: see by_latent.py, whose cutting this shares."""

    slot_of: Tensor | None = None
    parts: Tensor | None = None
    partial: Tensor | None = None


def _sum_parts(factors: Factors, order: Tensor, starts: Tensor, D: int, BLOCK_D: int, warps: int) -> _Parts:
    E, SPLIT = factors.latents.shape[0], by_latent.SPLIT
    if E <= SPLIT:
        return _Parts()
    latent_of, part_of, slot_of, parts, _ = by_latent.work_items(starts, E)
    slots = 2 * (E // SPLIT)
    # slot -> latent; items of whole segments and items past the last all write to one slot more, which is not launched
    f = latent_of.clamp(max=starts.shape[0] - 2).long()
    real = (latent_of < starts.shape[0] - 1) & (parts[f] > 1)
    slot = torch.where(real, slot_of[f] + part_of, slots).long()
    latent_of_slot = torch.full((slots + 1,), -1, dtype=torch.int32, device=starts.device).scatter_(0, slot, latent_of)
    partial = torch.empty(slots, D, dtype=torch.float32, device=starts.device)
    _parts_kernel[(slots,)](
        order, starts, slot_of, parts, latent_of_slot, factors.rows, bits(factors.table), bits(factors.coefficients), partial,
        D, factors.table.stride(0), SPLIT=SPLIT, BLOCK_D=BLOCK_D, num_warps=warps,
    )  # fmt: skip
    return _Parts(slot_of, parts, partial)


def _triton_path(
    factors: Factors, order: Tensor, starts: Tensor, stored: Tensor | None, dnorm: Tensor | None,
    W: Tensor, low: Tensor | None, m: Tensor | None, v: Tensor | None, scalars: Tensor | None, seed: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, unit_norm: bool, norm_only: bool,
) -> Tensor:  # fmt: skip
    F, D = W.shape
    sixteen = low is not None or (m is not None and m.dtype == torch.bfloat16)
    chosen = tile("update_16" if sixteen else "update", W.device, D)
    BLOCK_D = triton.next_power_of_2(D)
    long = _sum_parts(factors, order, starts, D, BLOCK_D, chosen.warps)
    result = torch.empty(F, dtype=torch.float32 if norm_only else torch.int32, device=W.device)
    _update_kernel[(F,)](
        order, starts, *long, factors.rows, bits(factors.table), bits(factors.coefficients), bits(stored), dnorm,
        bits(W), low, bits(m), bits(v), scalars,
        None if norm_only else result, result if norm_only else None, D, factors.table.stride(0), seed,
        lr, beta1, beta2, eps, weight_decay,
        HAS_STORED=stored is not None, HAS_DNORM=dnorm is not None, HAS_LOW=low is not None,
        UNIT_NORM=unit_norm, NORM_ONLY=norm_only, SPLITS=long.partial is not None, BLOCK_D=BLOCK_D,
        num_warps=chosen.warps, **limits(chosen, W.device),
    )  # fmt: skip
    return result


def _slices(factors, order, starts, stored, dnorm, W, low, unit_norm, clip):
    """(slice of latents, its weights, its clipped gradient), one after the other; weights are W's own memory, if not split."""
    F, D = W.shape
    wide = accumulator(W.dtype)
    table, coefficients, rows = factors.table.to(wide), factors.coefficients[order].to(wide) * clip, factors.rows[order]
    latents = max(1, SLICE // D)
    keep_freed_memory()
    for f in range(0, F, latents):
        part = slice(f, f + latents)
        bounds = starts[f : f + latents + 1]
        begin, end = bounds[[0, -1]].tolist()
        if begin == end and stored is not None:
            grad = stored[part].to(wide) * clip
        else:
            grad = segment_rows(table, rows[begin:end], coefficients[begin:end], bounds - begin)
            if stored is not None:
                grad.add_(stored[part], alpha=clip)
        w = W[part] if low is None else joined(W[part], low[part])
        if dnorm is not None:
            grad += norm_slope(dnorm[part] * clip, w.norm(dim=1))[:, None] * w
        if unit_norm:
            grad -= norm_slope(torch.linalg.vecdot(grad, w), w.norm(dim=1).square())[:, None] * w
        yield part, w, grad


def _bound(factors: Factors) -> float:
    """No sum of these factors is larger: where it is finite, nobody has to look for NaN or infinity in the sums."""
    bound = float(factors.coefficients.shape[0])
    for t in (factors.coefficients, factors.table):
        if t.numel():
            bound *= max(abs(float(end)) for end in t.aminmax())
    return bound


def _torch_path(
    factors: Factors, order: Tensor, starts: Tensor, stored: Tensor | None, dnorm: Tensor | None,
    W: Tensor, low: Tensor | None, m: Tensor | None, v: Tensor | None, scalars: Tensor | None, seed: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, unit_norm: bool, norm_only: bool,
) -> Tensor:  # fmt: skip
    gradient = (factors, order, starts, stored, dnorm, W, low, unit_norm)
    if norm_only:
        return torch.cat([g.norm(dim=1) for _, _, g in _slices(*gradient, clip=1.0)]).square()
    skipped = torch.zeros(W.shape[0], dtype=torch.int32, device=W.device)
    clip, live, step = scalars[2:].tolist()
    if not live:
        return skipped
    certain = not unit_norm and stored is None and dnorm is None and _bound(factors) < 1e38
    for part, w, grad in _slices(*gradient, clip=clip):
        state = [t[part] for t in (W, low, m, v) if t is not None]
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        if not certain:
            bad = ~torch.isfinite(grad.sum(1))
            if unit_norm:
                bad |= ~w.any(1)
            skipped[part] = bad
            rows = bad.nonzero().squeeze(1)
            kept = [(t, rows, t[rows]) for t in state]
        moments = [t[part].to(w.dtype) for t in (m, v)]
        before = torch.tensor(step - 1, dtype=torch.float32, device=w.device)  # adam adds one to it
        adam(
            [w], [grad], [moments[0]], [moments[1]], [], [before], fused=True, amsgrad=False, maximize=False,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip
        if unit_norm:
            w /= w.norm(dim=1, keepdim=True)
        if low is not None:
            split(w, W[part], low[part])
        if m.dtype == torch.bfloat16:
            noise = random_bits(seed, scalars[4], part.start, *w.shape)
            round_randomly(moments[0], (noise >> 16).bitwise_and_(0xFFFF), m[part])
            round_randomly(moments[1], noise.bitwise_and_(0xFFFF), v[part])
        for t, rows, values in kept:
            t[rows] = values
    return skipped


def _apply(
    factors: Factors, index: tuple[Tensor, Tensor], stored: Tensor | None, dnorm: Tensor | None, W: Tensor, low: Tensor | None,
    m: Tensor | None, v: Tensor | None, *rest: Any, unit_norm: bool, norm_only: bool,
) -> Tensor:  # fmt: skip
    laid_out = all(t.is_contiguous() for t in (W, low, m, v) if t is not None)
    exact = W.dtype in (torch.float32, torch.float64) if low is None else W.dtype == torch.bfloat16
    if not exact or factors.table.dtype != W.dtype or not laid_out:
        raise TypeError(
            f"the matrix is {W.dtype} with strides {W.stride()} and its gradient's table {factors.table.dtype}: row updates "
            "take a contiguous float32 [F, D], or bfloat16 with low bits, moments laid out alike, and factors of its dtype"
        )
    if factors.table.stride(1) != 1:
        factors = factors._replace(table=factors.table.contiguous())
    # a row too wide for one program goes through slices on a GPU too
    path = _triton_path if runs_triton(W) and W.shape[1] <= WIDEST else _torch_path
    # the gradient through a row's norm lies along the row, and at unit norm that part is removed
    dnorm = None if unit_norm or dnorm is None else dnorm.to(accumulator(W.dtype))
    with device_of(W):
        return path(factors, *index, stored, dnorm, W, low, m, v, *rest, unit_norm=unit_norm, norm_only=norm_only)


def gradient_squares(
    factors: Factors, index: tuple[Tensor, Tensor], W: Tensor, stored: Tensor | None = None, dnorm: Tensor | None = None,
    unit_norm: bool = False, low: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """|dW[f]|² [F] of the gradient that `update_rows` would apply: what clipping by a global norm asks first."""
    unused = (None,) * 3 + (0,) + (0.0,) * 5  # moments, scalars, seed, hyperparameters
    return _apply(factors, index, stored, dnorm, W, low, *unused, unit_norm=unit_norm, norm_only=True)


def update_rows(
    factors: Factors, index: tuple[Tensor, Tensor], W: Tensor, m: Tensor, v: Tensor, scalars: Tensor,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0,
    stored: Tensor | None = None, dnorm: Tensor | None = None, unit_norm: bool = False,
    low: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """One Adam step on W [F, D] with moments m and v, in place. Returns which rows were skipped [F].

    `index` is sort_by_latent of the factors' latents. `scalars` [5] in fp32 (fp64 for an fp64 W) on W's device: 1 - beta1^t,
    (1 - beta2^t)^½, the clipping factor, whether to step (0 or 1), and t. `low` [F, D] int16 says that W is the high half
    of split numbers. Moments in bf16 are rounded at random: `seed`, an int32, t, row and column say how.
    """
    hyper = (seed, lr, *betas, eps, weight_decay)
    return _apply(factors, index, stored, dnorm, W, low, m, v, scalars, *hyper, unit_norm=unit_norm, norm_only=False)
