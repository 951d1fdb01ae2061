"""Select each row's k best latents:  the k largest score[n, f],  pre = x[n] · W_enc[:, f] + b_enc[f].

N rows, D model width, F latents; score = pre, |pre|, or pre · scale[f] (returned are raw pre-activations):

    x [N, D]    W_enc [D, F]    b_enc, scale [F]    pre [N·k], latents [N·k] int32, ascending within a row

Equal scores: the lower latent wins, on every path. Exact: by the fp32 accumulator, for any input.

[N, F] never exists. On a GPU the scores come by chunks of CHUNK latents in one reused buffer, and one program per row
keeps the k best keys seen so far. A key packs (score, latent) into 64 bits, larger is better, so ties need no extra code.
Of a chunk the program reads the maxima of its 128-wide tiles first and opens only tiles that can still change the result:
about k (1 + ln(F / CHUNK)) of them a row. On a CPU a row keeps the k tiles with the largest maxima, piece after piece, and only
these are searched: they hold the k largest, since an element outside them is beaten by k tile maxima.
"""

import torch
from torch import Tensor

from . import check
from .backend import accumulator, op, runs_triton, tl, triton
from .dense_encode import gemm
from .score_tiles import CPU_TILE, at_once, content_score, score_of, tile_content, tile_maxima
from .scores import CHUNK, chunk_gemm, nonzero_flat, pieces
from .tiles import tile

MOST_SLOTS = 8192  # keys a program can keep in registers
FEW_SCORES = 1 << 17  # so few are searched at once: finding tiles first is ten small steps, each with cold caches


def select_topk_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None, magnitude: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition: a stable descending sort of each whole row."""
    pre = x @ W_enc + b_enc
    order = score_of(pre, scale, magnitude).sort(dim=-1, descending=True, stable=True).indices
    latents = order[:, :k].sort(-1).values
    return pre.gather(1, latents).flatten(), latents.flatten().int()


# ---------------------------------------------------------------------------------------------------------- torch path


def _best(score: Tensor, k: int, ids: Tensor | None = None) -> Tensor:
    """Indices of the k largest of each row in any order, lower index (or id) first among equals. [R, k]"""
    if k == score.shape[1]:
        return torch.arange(k, device=score.device).expand(score.shape[0], k)
    # torch.topk breaks ties as it likes: one more element shows whether a tie crosses the boundary
    values, indices = score.topk(k + 1, dim=-1)
    indices = indices[:, :k]
    torn = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
    if torn.numel():
        score, order = score[torn], None if ids is None else ids[torn].sort(-1).indices
        best = (score if order is None else score.gather(1, order)).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        indices[torn] = best if order is None else order.gather(1, best)
    return indices


class _Tiles:
    """The k tiles of each row with the largest maxima, of the latents seen so far, in any order."""

    numbers: Tensor  # [R, k]
    maxima: Tensor  # [R, k] of scores
    content: Tensor  # [R, k, width] pre-activations

    def __init__(self, k: int, scale: Tensor | None, magnitude: bool):
        self.k, self.scale, self.magnitude, self.width = k, scale, magnitude, CPU_TILE

    def add(self, pre: Tensor, first: int) -> None:
        """Latents `first`, `first` + 1, ... of all rows: pre [R, C]."""
        scale = None if self.scale is None else self.scale[first : first + pre.shape[1]]
        maxima = tile_maxima(pre, scale, self.magnitude, self.width)
        if first == 0:
            self.numbers = _best(maxima, self.k)
            self.maxima = maxima.gather(1, self.numbers)
            rows = torch.arange(pre.shape[0], device=pre.device).repeat_interleave(self.k)
            self.content = tile_content(pre, rows, self.numbers.flatten(), self.width).view(*self.numbers.shape, -1)
            return
        numbers = torch.arange(maxima.shape[1], device=pre.device).expand_as(maxima) + first // self.width
        known, ids = torch.cat([self.maxima, maxima], 1), torch.cat([self.numbers, numbers], 1)
        stays = torch.zeros_like(known, dtype=torch.bool).scatter_(1, _best(known, self.k, ids), True)
        row, place = (~stays[:, : self.k]).nonzero(as_tuple=True)
        _, entering = stays[:, self.k :].nonzero(as_tuple=True)  # as many in each row
        self.content[row, place] = tile_content(pre, row, entering, self.width)
        self.numbers[row, place], self.maxima[row, place] = numbers[row, entering], maxima[row, entering]

    def best(self, F: int) -> tuple[Tensor, Tensor]:
        """(pre, latents) of each row's k best of F latents, latents ascending. [R, k]"""
        rows = at_once(self.content, self.k * self.width)
        found = [self._best_of(slice(n, n + rows), F) for n in range(0, self.numbers.shape[0], rows)]
        pre, latents = zip(*found, strict=True)
        return torch.cat(pre), torch.cat(latents)

    def _best_of(self, rows: slice, F: int) -> tuple[Tensor, Tensor]:
        k, width, content, numbers = self.k, self.width, self.content[rows], self.numbers[rows]
        R = content.shape[0]
        score = content_score(content, numbers, self.scale, self.magnitude)
        if F % width:
            row, place = (numbers == F // width).nonzero(as_tuple=True)
            score[row, place, F % width :] = float("-inf")
        # k scores of a row reach the least of its maxima, and hardly more than k do
        at = nonzero_flat(~(score.flatten(1) < self.maxima[rows].amin(1, keepdim=True)))
        row = at // (k * width)
        counts = torch.bincount(row, minlength=R)
        slot = torch.arange(at.shape[0], device=at.device) - (counts.cumsum(0) - counts)[row]
        finalists = score.new_full((R, int(counts.max())), float("-inf"))
        finalists[row, slot] = score.flatten()[at]
        pre, latents = torch.zeros_like(finalists), torch.full(finalists.shape, F, device=at.device)
        pre[row, slot] = content.flatten()[at]
        latents[row, slot] = numbers.flatten()[at // width] * width + at % width
        best = _best(finalists, k, latents)
        latents, order = latents.gather(1, best).sort(-1)
        return pre.gather(1, best).gather(1, order), latents


def block_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool
) -> tuple[Tensor, Tensor]:
    """(pre [N, k] in fp32 or fp64, latents [N, k]), piece by piece."""
    F, tiles = W_enc.shape[1], _Tiles(k, scale, magnitude)
    pre_out = torch.empty(x.shape[0], k, dtype=accumulator(x.dtype), device=x.device)
    latents_out = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)
    for rows, columns, pre in pieces(x, W_enc, b_enc, latents=4 * k * CPU_TILE):  # so that most tiles are left out
        if pre.shape[1] == F and (2 * k * CPU_TILE >= F or pre.numel() <= FEW_SCORES):
            best = [_best(score_of(some, scale, magnitude), k) for some in pre.split(at_once(pre, F))]
            latents_out[rows] = latents = torch.cat(best).sort(-1).values
            pre_out[rows] = pre.gather(1, latents)
            continue
        tiles.add(pre, columns.start)
        if columns.stop == F:
            pre_out[rows], latents_out[rows] = tiles.best(F)
    return pre_out, latents_out


# -------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _ordered(score):
    """fp32 -> int32 in the same order; -0 equals +0."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _topk_kernel(
    chunk, maxima, bias, scale, keys, pre, K, first, C, stride_cn, stride_mn,
    HAS_MAXIMA: tl.constexpr, HAS_SCALE: tl.constexpr, MAGNITUDE: tl.constexpr,
    SLOTS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, TILE)
    row = chunk + n * stride_cn
    LOWEST: tl.constexpr = -(2**63)
    DONE: tl.constexpr = -(2**31)

    # slots past K hold the highest key, so that they are never the worst
    best = tl.load(keys + n * K + slot, mask=slot < K, other=2**63 - 1)
    best_pre = tl.load(pre + n * K + slot, mask=slot < K, other=0.0)
    worst = tl.min(best)

    t = tl.arange(0, TILES)
    if HAS_MAXIMA:
        highest = tl.load(maxima + n * stride_mn + t, mask=t * TILE < C, other=float("-inf"))
    else:
        # names of their own: a variable of the loop below may not change its shape
        all_at = t[:, None] * TILE + column[None, :]
        in_chunk = all_at < C
        scores = tl.load(row + all_at, mask=in_chunk, other=0.0)
        scores += tl.load(bias + first + all_at, mask=in_chunk, other=0.0).to(tl.float32)
        if HAS_SCALE:
            scores = scores * tl.load(scale + first + all_at, mask=in_chunk, other=0.0).to(tl.float32)
        if MAGNITUDE:
            scores = tl.abs(scores)
        highest = tl.max(tl.where(in_chunk, scores, float("-inf")), axis=1)
    remaining = tl.where(t * TILE < C, _ordered(highest), DONE)  # tiles not opened yet
    top = tl.max(remaining)

    # ">=": among equal scores a lower latent of an unopened tile still wins
    while (top > DONE) & (top.to(tl.int64) >= (worst >> 32)):
        opened = tl.min(tl.where(remaining == top, t, TILES))
        at = opened * TILE + column
        p = tl.load(row + at, mask=at < C, other=0.0)
        if not HAS_MAXIMA:
            p += tl.load(bias + first + at, mask=at < C, other=0.0).to(tl.float32)
        score = p
        if HAS_SCALE:
            score = p * tl.load(scale + first + at, mask=at < C, other=0.0).to(tl.float32)
        if MAGNITUDE:
            score = tl.abs(score)
        low = 4294967295 - (first + at).to(tl.int64)  # lower latent, larger key
        candidates = tl.where(at < C, (_ordered(score).to(tl.int64) << 32) | low, LOWEST)
        key = tl.max(candidates)
        while key > worst:
            entering = tl.sum(tl.where(candidates == key, p, 0.0))
            best_pre = tl.where(best == worst, entering, best_pre)
            best = tl.where(best == worst, key, best)
            candidates = tl.where(candidates == key, LOWEST, candidates)
            worst = tl.min(best)
            key = tl.max(candidates)
        remaining = tl.where(t == opened, DONE, remaining)
        top = tl.max(remaining)

    tl.store(keys + n * K + slot, best, mask=slot < K)
    tl.store(pre + n * K + slot, best_pre, mask=slot < K)


def stream_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """(pre [N, k] in fp32, latents [N, k]), chunk by chunk on a GPU."""
    N, F = x.shape[0], W_enc.shape[1]
    width = min(CHUNK, F)
    gemm_tile = tile("gemm_32" if x.dtype == torch.float32 else "gemm_16", x.device)
    TILE = gemm_tile.constants["BLOCK_F"]
    tiles = triton.cdiv(width, TILE)
    buffer = torch.empty(N, width, dtype=torch.float32, device=x.device)
    maxima = torch.empty(N, tiles, dtype=torch.float32, device=x.device) if fused else None
    # unfilled slots: distinct keys below every real one
    keys = (torch.iinfo(torch.int64).min + torch.arange(k, device=x.device)).repeat(N, 1)
    pre = torch.zeros(N, k, dtype=torch.float32, device=x.device)
    for first in range(0, F, CHUNK):
        C = min(CHUNK, F - first)
        columns = slice(first, first + C)
        if fused:
            gemm(
                x, W_enc[:, columns].T, b_enc[columns], buffer[:, :C],
                scale=None if scale is None else scale[columns], maxima=maxima, magnitude=magnitude,
            )  # fmt: skip
        else:
            chunk_gemm(x, W_enc[:, columns], buffer[:, :C])
        _topk_kernel[(N,)](
            buffer, maxima, b_enc, scale, keys, pre, k, first, C, buffer.stride(0), 0 if maxima is None else maxima.stride(0),
            HAS_MAXIMA=fused, HAS_SCALE=scale is not None, MAGNITUDE=magnitude,
            SLOTS=triton.next_power_of_2(k), TILES=triton.next_power_of_2(tiles), TILE=TILE,
            num_warps=tile("topk", x.device, k).warps,
        )  # fmt: skip
    latents, order = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).sort(-1)
    return pre.gather(1, order), latents.int()


# Which GEMM feeds the row top-k on a GPU: the vendor's, or ours with tile maxima in its epilogue. Untuned.
FUSED = False


@op
def select_topk_forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None, magnitude: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    if not x.shape[0]:
        return x.new_empty(0), torch.empty(0, dtype=torch.int32, device=x.device)
    if runs_triton(x) and k <= MOST_SLOTS:
        pre, latents = stream_topk(x, W_enc, b_enc, k, scale, magnitude, fused)
    else:
        pre, latents = block_topk(x, W_enc, b_enc, k, scale, magnitude)
    return pre.flatten().to(x.dtype), latents.flatten()


@select_topk_forward.register_fake
def _(x, W_enc, b_enc, k, scale, magnitude, fused):
    return x.new_empty(x.shape[0] * k), x.new_empty(x.shape[0] * k, dtype=torch.int32)


def select_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    scale: Tensor | None = None,
    magnitude: bool = False,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(pre [N·k], latents [N·k]) of each row's k best latents, latents ascending. No gradient: see encode.py.

    `fused` picks the GEMM on a GPU: None for the one that measures faster, True for tile maxima in its epilogue.
    """
    check.encoder(x, W_enc, b_enc, select_scale=scale)
    check.k_fits(k, W_enc.shape[1])
    scale = None if scale is None else scale.detach().contiguous()
    fused = FUSED if fused is None else fused
    return select_topk_forward(x.detach(), W_enc.detach(), b_enc.detach().contiguous(), k, scale, magnitude, fused)
