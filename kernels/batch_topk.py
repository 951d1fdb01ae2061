"""Select the batch's best entries:  the N·k largest score[n, f] of all rows together, so a row owns any number of them.

    x [N, D]    W_enc [D, F]    b_enc, scale [F]    pre [N·k], latents [N·k] int32, offsets [N+1] int32

Equal scores: the lower row wins, then the lower latent. Exact for any input, with nothing of shape [N, F].

On a CPU scores come by pieces. The N·k largest of (the entries kept so far and the piece's tile maxima) are that many real
scores, so the smallest of them is a lower bound on the final threshold; only tiles whose maximum reaches it are opened.
On a GPU each row keeps its own k' = 4k best (topk.py), and the batch is cut from those. That is proven exact row by row: a
row with a candidate that was not chosen has nothing better left outside. Rows where all were chosen are selected again
with four times the candidates; the number of such rows, nearly always zero, is the one value read on the host.
"""

import torch
from torch import Tensor

from . import check
from .backend import accumulator, op, runs_triton
from .score_tiles import CPU_TILE, at_once, content_score, score_of, tile_content, tile_maxima
from .scores import nonzero_flat, pieces
from .topk import FUSED, MOST_SLOTS, block_topk, stream_topk

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
    """Mask of exactly the m largest of a flat list, earlier first among equals; no value is read on the host.

    NaN, which a GPU lets in, comes last: it must not leave the mask with fewer than m, whose places nothing would write.
    """
    score = score.masked_fill(score.isnan(), float("-inf"))
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
    # the pool: entries, as row · F + latent, that may still be among the m best
    entries = torch.empty(0, dtype=torch.int64, device=x.device)
    pool_pre = torch.empty(0, dtype=accumulator(x.dtype), device=x.device)
    pool_score = pool_pre.clone()
    for rows, columns, pre in pieces(x, W_enc, b_enc):
        ranked = None if scale is None else scale[columns]
        maxima = tile_maxima(pre, ranked, magnitude, width)
        known = torch.cat([pool_score, maxima.flatten()])
        known.masked_fill_(known.isnan(), float("-inf"))
        bound = known.topk(m, sorted=False).values.min() if known.numel() >= m else known.new_tensor(float("-inf"))
        stays = ~(pool_score < bound)
        pool = [(entries[stays], pool_pre[stays], pool_score[stays])]
        tiles = (~(maxima < bound)).nonzero()
        for row, opened in (some.unbind(1) for some in tiles.split(at_once(pre, width))):
            content = tile_content(pre, row, opened, width)  # [tiles, width]
            candidate = content_score(content, opened, ranked, magnitude)
            hit = ~(candidate < bound)
            if pre.shape[1] % width:
                hit &= opened[:, None] * width + within < pre.shape[1]
            at = nonzero_flat(hit)
            tile = at // width
            latent = opened[tile] * width + at % width + columns.start
            pool.append(((row[tile] + rows.start) * F + latent, content.flatten()[at], candidate.flatten()[at]))
        entries, pool_pre, pool_score = (torch.cat(parts) for parts in zip(*pool, strict=True))
        if entries.numel() > 2 * m:  # many equal scores: cut now, or the pool might grow to N·F
            entries, order = _first_best(entries, pool_score, m)
            pool_pre, pool_score = pool_pre[order], pool_score[order]
    entries, order = _first_best(entries, pool_score, m)
    return pool_pre[order].to(x.dtype), (entries % F).int(), _offsets(entries // F, N)


def _first_best(entries: Tensor, score: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m best entries, ascending, the earlier first among equal scores; and where they were."""
    entries, order = entries.sort()
    kept = _keep_best(score[order], min(m, entries.numel()))
    return entries[kept], order[kept]


def _select_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, F = x.shape[0], W_enc.shape[1]
    m = N * k

    def candidates(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(row, latent, pre, score) of these rows' `count` best; in fp32, so that ties are the accumulator's. [R·count]"""
        if count <= MOST_SLOTS:
            pre, latents = stream_topk(x[rows], W_enc, b_enc, count, scale, magnitude, fused)
        else:
            pre, latents = block_topk(x[rows], W_enc, b_enc, count, scale, magnitude)
        score = score_of(pre, None if scale is None else scale.to(pre.dtype)[latents], magnitude)
        return rows.repeat_interleave(count), latents.flatten(), pre.flatten(), score.flatten()

    count = min(F, SPARE * k)
    row, latent, pre, score = candidates(torch.arange(N, device=x.device), count)
    while True:
        kept = _keep_best(score, m)
        owned = torch.zeros(N, dtype=torch.int64, device=x.device).index_add_(0, row, kept.long())
        short = (owned == count).nonzero().squeeze(1)  # every candidate was chosen: there may be more
        if count == F or not short.numel():
            break
        # rows that were proven stay proven, since the bar only rises; these rows own `count` each, so the pool stays
        # below 2 · SPARE · N·k entries
        count = min(F, SPARE * count)
        others = ~torch.isin(row, short)
        pool = zip((row, latent, pre, score), candidates(short, count), strict=True)
        row, latent, pre, score = (torch.cat([old[others], new]) for old, new in pool)
        row, order = row.sort(stable=True)
        latent, pre, score = latent[order], pre[order], score[order]
    # compaction without a read: slot m takes what is dropped
    position = torch.where(kept, kept.cumsum(0) - 1, m)
    out_pre = pre.new_empty(m + 1).scatter_(0, position, pre)
    out_latents = latent.new_empty(m + 1).scatter_(0, position, latent)
    return out_pre[:m].to(x.dtype), out_latents[:m].clone(), torch.nn.functional.pad(owned.cumsum(0), (1, 0)).int()


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
