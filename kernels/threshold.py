"""Select every latent over its threshold:  pre[n, f] = x[n] · W_enc[:, f] + b_enc[f] > θ[f].

    x [N, D]    W_enc [D, F]    b_enc, θ [F]    pre [E], latents [E] int32, offsets [N+1] int32

ReLU is θ = 0. JumpReLU asks for θ - bandwidth/2, which adds the entries inside the straight-through window. How many
entries there are, E, is only known once they are counted: this is the one value a step reads on the host.

On a GPU, chunk by chunk of latents: count per row, prefix sum, write. Entries go into a pool of `capacity`; where it turns
out too small the pass repeats with the exact size, so nothing is ever dropped. Entries of a chunk are in row order; one
stable sort by row puts the chunks together. On a CPU likewise; the mask is searched eight bytes at a time.

`limit` is for callers with a better way when the code is not sparse (see fastsae.functional): above it, nothing is
returned but the news.
"""

import torch
from torch import Tensor

from . import check
from .backend import op, runs_triton, tl, triton
from .scores import CHUNK, chunk_gemm, nonzero_at_least, nonzero_flat, pieces
from .tiles import tile


def select_threshold_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: compare the dense pre-activations."""
    pre = x @ W_enc + b_enc
    fires = pre > theta
    rows, latents = fires.nonzero(as_tuple=True)
    return pre[rows, latents], latents.int(), torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0)).int()


def _select_torch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    N = x.shape[0]
    pres, latents, rows = [x.new_empty(0)], [x.new_empty(0, dtype=torch.int32)], [x.new_empty(0, dtype=torch.int32)]
    nothing = pres[0], latents[0], torch.zeros(N + 1, dtype=torch.int32, device=x.device)
    total = 0
    for block, columns, pre in pieces(x, W_enc, b_enc):
        over = pre > theta[columns]
        if 0 <= limit < total + nonzero_at_least(over):
            return *nothing, limit + 1
        at = nonzero_flat(over)
        total += at.numel()
        if 0 <= limit < total:
            return *nothing, total
        pres.append(pre.flatten()[at].to(x.dtype))
        latents.append((at % pre.shape[1] + columns.start).int())
        rows.append((at // pre.shape[1] + block.start).int())
    row, order = torch.cat(rows).sort(stable=True)
    offsets = torch.searchsorted(row, torch.arange(N + 1, dtype=torch.int32, device=x.device), out_int32=True)
    return torch.cat(pres)[order], torch.cat(latents)[order], offsets, total


@triton.jit
def _over(chunk, bias, theta, n, c, first, C, stride_cn):
    """(pre, pre > theta) of columns c of row n of a chunk."""
    inside = c < C
    pre = tl.load(chunk + n * stride_cn + c, mask=inside, other=0.0)
    pre += tl.load(bias + first + c, mask=inside, other=0.0).to(tl.float32)
    return pre, inside & (pre > tl.load(theta + first + c, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _count_kernel(chunk, bias, theta, counts, first, C, stride_cn, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, C, BLOCK):
        _, over = _over(chunk, bias, theta, n, start + tl.arange(0, BLOCK), first, C, stride_cn)
        total += over.to(tl.int32)
    tl.store(counts + n, tl.sum(total))


@triton.jit
def _compact_kernel(
    chunk, bias, theta, starts, pre_out, latents_out, rows_out, first, C, capacity, stride_cn, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    base = tl.load(starts + n)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        pre, over = _over(chunk, bias, theta, n, c, first, C, stride_cn)
        at = base + tl.cumsum(over.to(tl.int32), 0) - 1
        fits = over & (at < capacity)
        tl.store(pre_out + at, pre, mask=fits)
        tl.store(latents_out + at, first + c, mask=fits)
        tl.store(rows_out + at, tl.zeros([BLOCK], dtype=tl.int32) + tl.program_id(0), mask=fits)
        base += tl.sum(over.to(tl.int32))


def _fill(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pre, latents, rows) in pools of `capacity`, chunk after chunk, and the number there should have been."""
    N, F = x.shape[0], W_enc.shape[1]
    chosen = tile("threshold", x.device)
    BLOCK = min(chosen.constants["BLOCK"], triton.next_power_of_2(min(CHUNK, F)))
    buffer = torch.empty(N, min(CHUNK, F), dtype=torch.float32, device=x.device)
    counts = torch.empty(N, dtype=torch.int64, device=x.device)
    pre = torch.empty(capacity, dtype=torch.float32, device=x.device)
    latents, rows = (torch.empty(capacity, dtype=torch.int32, device=x.device) for _ in range(2))
    total = counts.new_zeros(1)
    for first in range(0, F, CHUNK):
        C = min(CHUNK, F - first)
        chunk_gemm(x, W_enc[:, first : first + C], buffer[:, :C])
        _count_kernel[(N,)](buffer, b_enc, theta, counts, first, C, buffer.stride(0), BLOCK=BLOCK, num_warps=chosen.warps)
        ends = counts.cumsum(0) + total
        _compact_kernel[(N,)](
            buffer, b_enc, theta, ends - counts, pre, latents, rows, first, C, capacity, buffer.stride(0),
            BLOCK=BLOCK, num_warps=chosen.warps,
        )  # fmt: skip
        total = ends[-1:]
    return pre, latents, rows, total


def _select_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    N, F = x.shape[0], W_enc.shape[1]
    capacity = limit if limit >= 0 else max(N, N * F // 256)  # 0.4 %: where gathering stops paying
    pre, latents, rows, total = _fill(x, W_enc, b_enc, theta, capacity)
    E = int(total)  # the one read
    if 0 <= limit < E:
        return x.new_empty(0), latents[:0].clone(), torch.zeros(N + 1, dtype=torch.int32, device=x.device), E
    if E > capacity:
        pre, latents, rows, _ = _fill(x, W_enc, b_enc, theta, E)
    rows, order = rows[:E].sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(N + 1, dtype=torch.int32, device=x.device), out_int32=True)
    return pre[:E][order].to(x.dtype), latents[:E][order], offsets, E


@op
def select_threshold_forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    if not x.shape[0]:
        return x.new_empty(0), x.new_empty(0, dtype=torch.int32), x.new_zeros(1, dtype=torch.int32), 0
    pre, latents, offsets, total = (_select_triton if runs_triton(x) else _select_torch)(x, W_enc, b_enc, theta, limit)
    if total >= 2**31 and not 0 <= limit < total:
        raise ValueError(f"{total} entries exceed int32: encode fewer rows at once (here {x.shape[0]})")
    return pre, latents, offsets, total


@select_threshold_forward.register_fake
def _(x, W_enc, b_enc, theta, limit):
    E = torch.library.get_ctx().new_dynamic_size()
    total = E if limit < 0 else torch.library.get_ctx().new_dynamic_size()  # over the limit: no entries, only their number
    return x.new_empty(E), x.new_empty(E, dtype=torch.int32), x.new_empty(x.shape[0] + 1, dtype=torch.int32), total


def select_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(pre [E], latents [E], offsets [N+1]) of every latent with pre > theta; None above `limit` entries. No gradient."""
    check.encoder(x, W_enc, b_enc, theta=theta)
    if limit is not None and limit < 0:
        raise ValueError(f"limit={limit}: pass a number of entries >= 0, or None for no limit")
    pre, latents, offsets, total = select_threshold_forward(
        x.detach(), W_enc.detach(), b_enc.detach().contiguous(), theta.detach().contiguous(), -1 if limit is None else limit
    )
    return None if limit is not None and total > limit else (pre, latents, offsets)
