"""Scores, which latents are ranked by, and tiles of them: CPU_TILE neighbouring latents of one row.

A selection on a CPU looks at the maxima of tiles first, and opens those that may hold an entry. Scores that are not the
pre-activations themselves are made a strip at a time, and forgotten.
"""

import torch
from torch import Tensor

from .scores import BLOCK_ELEMENTS

CPU_TILE = 64  # 32, 64, 128 measured within noise at F 24,576, k 32; divides scores.PANEL, so that pieces hold whole tiles
SCORES_AT_ONCE = 1 << 19  # on a CPU: 2 MB, in L2; with half or twice as many the maxima take 5 to 13 % longer


def at_once(scores: Tensor, each: int) -> int:
    """How many rows or tiles of `each` scores to look at together."""
    return max(1, (SCORES_AT_ONCE if scores.device.type == "cpu" else BLOCK_ELEMENTS) // each)


def score_of(pre: Tensor, scale: Tensor | None, magnitude: bool) -> Tensor:
    """What latents are ranked by."""
    if scale is not None:
        pre = pre * scale
    return pre.abs() if magnitude else pre


def tile_maxima(pre: Tensor, scale: Tensor | None, magnitude: bool, width: int) -> Tensor:
    """Of the scores of pre [R, F]. [R, ceil(F / width)], the last tile ragged."""
    R, F = pre.shape
    whole = F // width
    maxima = pre.new_empty(R, -(-F // width))
    rows = at_once(pre, F)
    for n in range(0, R, rows):
        score = score_of(pre[n : n + rows], scale, magnitude)
        torch.amax(score[:, : whole * width].unflatten(1, (whole, width)), -1, out=maxima[n : n + rows, :whole])
        if whole * width < F:
            torch.amax(score[:, whole * width :], -1, out=maxima[n : n + rows, whole])
    return maxima


def tile_content(pre: Tensor, row: Tensor, number: Tensor, width: int) -> Tensor:
    """Tiles of pre [R, C]; past the last latent, anything. [tiles, width]"""
    C = pre.shape[1]
    if C % width == 0:
        return pre.view(-1, width).index_select(0, row * (C // width) + number)
    columns = number[:, None] * width + torch.arange(width, device=pre.device)
    return pre[row[:, None], columns.clamp_(max=C - 1)]


def content_score(content: Tensor, number: Tensor, scale: Tensor | None, magnitude: bool) -> Tensor:
    """Scores of the tiles [..., width] with these numbers [...]."""
    if scale is None:
        return score_of(content, None, magnitude)
    width = content.shape[-1]
    by_tile = torch.nn.functional.pad(scale.to(content.dtype), (0, -scale.shape[0] % width)).view(-1, width)
    score = by_tile[number].mul_(content)
    return score.abs_() if magnitude else score
