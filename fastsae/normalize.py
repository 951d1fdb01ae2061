"""Each row of the input on a scale of its own, and the way back: x[n] = scale[n] · row[n] + shift[n].

A table of SAELens' run-time normalisations, under its names. An encoder sees `row`, a decoder gives back `row`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Normalized(NamedTuple):
    encoded: Tensor
    """[..., D] what the encoder sees"""
    row: Tensor
    """[..., D] what the decoder is to give back, (x - shift) / scale"""
    scale: Tensor
    """[..., 1]"""
    shift: Tensor
    """[..., 1]"""


def constant_norm_rescale(x: Tensor) -> Normalized:
    """Every row at norm √D."""
    scale = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / x.shape[-1] ** 0.5
    row = x / scale
    return Normalized(row, row, scale, torch.zeros_like(scale))


def layer_norm(x: Tensor) -> Normalized:
    """Every row at mean 0 and variance 1; the encoder divides by std + 1e-5, the way back multiplies by std."""
    shift = x.mean(dim=-1, keepdim=True)
    centred = x - shift
    std = x.std(dim=-1, keepdim=True)
    scale = std.clamp(min=torch.finfo(x.dtype).tiny)
    return Normalized(centred / (std + 1e-5), centred / scale, scale, shift)


NORMALIZE: dict[str, Callable[[Tensor], Normalized]] = {
    "constant_norm_rescale": constant_norm_rescale,
    "layer_norm": layer_norm,
}
