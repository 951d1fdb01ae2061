"""Random bits that are a function of where they are used:  bits = hash(seed, step, row, column), 32 of them.

No state: the same on every device and path, whatever is computed first, in one run or in two with a resume between. Rows
and columns are hashed apart, so that the [R, D] part is one xor, one product and one shift. Not for cryptography.

int32 throughout: products wrap around, and what a shift copies of the sign is masked off.
"""

import torch
from torch import Tensor

from .backend import tl, triton


def mixed(x: Tensor) -> Tensor:
    """A fixed permutation of all int32 in which every bit of x moves every bit of the result."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x2C1B3C6D
    x = (x ^ (x >> 12 & 0xFFFFF)) * 0x297A2D39
    return x ^ (x >> 15 & 0x1FFFF)


def random_bits(seed: int, step: Tensor, first_row: int, rows: int, D: int) -> Tensor:
    """[rows, D] int32 for rows first_row and following; `step` is a scalar tensor, which is not read."""
    key = mixed(mixed(step.int()) ^ seed)
    r = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=step.device)
    d = torch.arange(D, dtype=torch.int32, device=step.device)
    columns = (d ^ key) * 0x7FEB352D
    x = mixed(r ^ key)[:, None] ^ (columns ^ columns >> 15 & 0x1FFFF)
    x *= 0x2C1B3C6D
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x2C1B3C6D
    x = (x ^ (x >> 12 & 0xFFFFF)) * 0x297A2D39
    return x ^ (x >> 15 & 0x1FFFF)


@triton.jit
def random_bits_of_row(seed, step, row, d):
    """The same for one row, with columns d."""
    key = _mixed(_mixed(step.to(tl.int32)) ^ seed)
    columns = (d ^ key) * 0x7FEB352D
    x = (_mixed(row.to(tl.int32) ^ key) ^ (columns ^ columns >> 15 & 0x1FFFF)) * 0x2C1B3C6D
    return x ^ (x >> 16 & 0xFFFF)
