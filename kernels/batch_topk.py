"""Select the batch's best entries:  the N·k largest score[n, f] of all rows together, so a row owns any number of them.

    x [N, D]    W_enc [D, F]    b_enc, scale [F]    pre [N·k], latents [N·k] int32, offsets [N+1] int32

Equal scores: the lower row wins, then the lower latent. Exact for any input, with nothing of shape [N, F].

On a CPU rows come by blocks. The N·k largest of (the entries kept so far and the block's tile maxima) are that many real
scores, so the smallest of them is a lower bound on the final threshold; only tiles whose maximum reaches it are opened.
On a GPU each row keeps its own k' = 4k best (topk.py), and the batch is cut from those. That is proven exact row by row: a
row whose worst candidate was not chosen has nothing better left outside. Rows where it was chosen are selected again
with four times the candidates; the number of such rows, nearly always zero, is the one value read on the host.
"""

import torch
from torch import Tensor

from . import check
from .backend import accumulator, op, runs_triton
from .scores import row_blocks
from .topk import CPU_TILE, FUSED, score_of, stream_topk, tile_maxima

SPARE = 4  # candidates a row keeps on a GPU, in units of k; untuned


def select_batch_topk_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None, magnitude: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: a stable descending sort of the whole flattened batch."""
    pre = x @ W_enc + b_enc
    N, F = pre.shape
    entries = score_of(pre, scale, magnitude).flatten().sort(descending=True, stable=True).indices[: N * k].sort().values
    return pre.flatten()[entries], (entries % F).int(), _offsets(entries // F, N)


def _offsets(rows: Tensor, N: int) -> Tensor:
    """Ascending row numbers -> where each row begins. [N+1]"""
    return torch.searchsorted(rows, torch.arange(N + 1, device=rows.device, dtype=rows.dtype), out_int32=True)


def _keep_best(score: Tensor, m: int) -> Tensor:
    """Mask of exactly the m largest of a flat list, earlier first among equals; no value is read on the host."""
    threshold = score.topk(m, sorted=False).values.min()
    above = score > threshold
    level = score == threshold
    return above | (level & (level.cumsum(0) <= m - above.sum()))


def _select_torch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], W_enc.shape[1]
    m = N * k
    width = CPU_TILE
    within = torch.arange(width, device=x.device)
    # the pool: entries in (row, latent) order that may still be among the m best
    entries = torch.empty(0, dtype=torch.int64, device=x.device)
    pool_pre = torch.empty(0, dtype=accumulator(x.dtype), device=x.device)
    pool_score = pool_pre.clone()
    for first, pre in row_blocks(x, W_enc, b_enc):
        score = score_of(pre, scale, magnitude)
        maxima = tile_maxima(score, width)
        known = torch.cat([pool_score, maxima.flatten()])
        bound = known.topk(m, sorted=False).values.min() if known.numel() >= m else known.new_tensor(float("-inf"))
        row, opened = (maxima >= bound).nonzero(as_tuple=True)
        latent = opened[:, None] * width + within  # [opened tiles, width]
        inside = latent < F
        candidate = score[row[:, None], latent.clamp(max=F - 1)]
        hit = (candidate >= bound) & inside
        latent, row = latent[hit], row[:, None].expand_as(hit)[hit]
        stays = pool_score >= bound
        entries = torch.cat([entries[stays], (row + first) * F + latent])
        pool_pre = torch.cat([pool_pre[stays], pre[row, latent]])
        pool_score = torch.cat([pool_score[stays], candidate[hit]])
    kept = _keep_best(pool_score, m)
    entries = entries[kept]
    return pool_pre[kept].to(x.dtype), (entries % F).int(), _offsets(entries // F, N)


def _select_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], W_enc.shape[1]
    m = N * k

    def candidates(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(score, pre, latents) of these rows' `count` best, in fp32 so that ties are the accumulator's. [R, count]"""
        pre, latents = stream_topk(rows, W_enc, b_enc, count, scale, magnitude, fused)
        score = pre if scale is None else pre * scale.float()[latents]
        return score.abs() if magnitude else score, pre, latents

    count = min(F, SPARE * k)
    score, pre, latents = candidates(x, count)
    while True:
        kept = _keep_best(score.flatten(), m).view(N, -1)
        worst = score.argmin(1, keepdim=True)
        short = kept.gather(1, worst).squeeze(1).nonzero().squeeze(1)  # rows that may own more than their candidates
        if count == F or not short.numel():
            break
        more = min(F, SPARE * count) - count
        # the other rows get slots that never win
        score = torch.nn.functional.pad(score, (0, more), value=float("-inf"))
        pre, latents = (torch.nn.functional.pad(t, (0, more)) for t in (pre, latents))
        count += more
        score[short], pre[short], latents[short] = candidates(x[short], count)
    # compaction without a read: slot m takes what is dropped
    position = torch.where(kept.flatten(), kept.flatten().cumsum(0) - 1, m)
    out_pre = pre.new_empty(m + 1).scatter_(0, position, pre.flatten())
    out_latents = latents.new_empty(m + 1).scatter_(0, position, latents.flatten())
    offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return out_pre[:m].to(x.dtype), out_latents[:m].clone(), offsets


@op
def select_batch_topk_forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.shape[0]:
        return x.new_empty(0), x.new_empty(0, dtype=torch.int32), x.new_zeros(1, dtype=torch.int32)
    if runs_triton(x):
        return _select_triton(x, W_enc, b_enc, k, scale, magnitude, fused)
    return _select_torch(x, W_enc, b_enc, k, scale, magnitude)


@select_batch_topk_forward.register_fake
def _(x, W_enc, b_enc, k, scale, magnitude, fused):
    m = x.shape[0] * k
    return x.new_empty(m), x.new_empty(m, dtype=torch.int32), x.new_empty(x.shape[0] + 1, dtype=torch.int32)


def select_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None = None,
    magnitude: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pre [N·k], latents [N·k], offsets [N+1]): exactly N·k entries over the batch. No gradient: see encode.py."""
    check.encoder(x, W_enc, b_enc, select_scale=scale)
    check.k_fits(k, W_enc.shape[1])
    scale = None if scale is None else scale.detach().contiguous()
    fused = FUSED if fused is None else fused
    return select_batch_topk_forward(x.detach(), W_enc.detach(), b_enc.detach().contiguous(), k, scale, magnitude, fused)
