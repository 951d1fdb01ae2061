"""fp32 numbers in 16 bits, or in twice 16.

A split number is  bits(w) = bits(high) · 2^16 + low  with high a bf16 and low an int16. `high` is w rounded to the nearest
bf16, which is what a GEMM should multiply with (cutting the bits off is twice as wrong, and always towards zero), so `low` is
signed. Ties go away from zero, where torch has them go to even: with those, low = ±2^15 would both occur. Every number comes
back exactly, also where rounding carries into the exponent. Somebody who writes to the high half alone (a threshold clamped, a
latent set anew) gets what they wrote, to within the rounding; `low` is left out where it would make a NaN of their zero.

A rounded number is a bf16 that is right on average: of the two neighbours of x the farther one is taken with the probability
that makes the mean x. A moving average that moves by less than half a step a time then still moves.

Kernels read and write bf16 as its bits (int16): exact everywhere, where Triton's interpreter gets bf16 arithmetic wrong.
"""

import torch
from torch import Tensor

from .backend import tl, triton


def split(w: Tensor, high: Tensor, low: Tensor) -> None:
    """high, low = w: fp32 into bf16 and int16 of the same shape."""
    bits = w.view(torch.int32)
    top = (bits + 0x8000).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(top)
    low.copy_(torch.sub(bits, top.bitwise_left_shift_(16), out=top))


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 that was split."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(torch.where(high == 0, low.clamp(min=0), low)).view(torch.float32)


def round_randomly(x: Tensor, noise: Tensor, out: Tensor) -> None:
    """out = x: fp32 into bf16, right on average; noise int32 from 0 to 2^16 - 1, which is overwritten."""
    out.view(torch.int16).copy_(noise.add_(x.view(torch.int32)).bitwise_right_shift_(16))


def bits(t: Tensor | None) -> Tensor | None:
    """What a kernel is passed for t: a bf16 tensor's int16."""
    return t.view(torch.int16) if t is not None and t.dtype == torch.bfloat16 else t


@triton.jit
def as_fp32(x):
    """A float, or the int16 of a bf16."""
    if x.dtype == tl.int16:
        wide = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def join_halves(high, low):
    """`joined`, of int16 and int16."""
    low = tl.where((high & 0x7FFF) == 0, tl.maximum(low, 0), low)
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def high_half(w):
    """`split`, high as int16."""
    return ((w.to(tl.int32, bitcast=True) + 0x8000) >> 16).to(tl.int16)


@triton.jit
def low_half(w, high):
    """`split`, low; high as high_half has it."""
    return (w.to(tl.int32, bitcast=True) - (high.to(tl.int32) << 16)).to(tl.int16)


@triton.jit
def rounded_randomly(x, noise):
    """`round_randomly`, as int16."""
    return ((x.to(tl.int32, bitcast=True) + noise) >> 16).to(tl.int16)
