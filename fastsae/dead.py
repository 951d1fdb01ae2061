"""Which dead latents a step asks to reconstruct, in a number of slots that the host knows and a number that it does not.

How many latents are dead is known on the device alone, and reading it is a host sync. So a step has `slots` for them: more
dead ones than slots are drawn from at random, anew for each seed; what they leave over is padded with living latents, each
at most once, which `without_padding` makes worth nothing. A term over the padded part, and every gradient of it, then equals
the term over the dead latents alone, and its cost is bounded by the slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.noise import mixed


class DeadLatents(NamedTuple):
    """Slots for dead latents, ascending."""

    latents: Tensor
    """[slots] int64, each latent at most once"""
    valid: Tensor
    """[slots] bool: dead; the others are padding"""
    padded: bool = True
    """Whether there may be padding at all, as far as the host knows."""

    def share(self, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """min(M / k, 1) for the M dead latents in the slots: the scale of the auxk term."""
        return (self.valid.sum(dtype=dtype) / k).clamp(max=1)


def dead_latents(since_fired: Tensor, window: int, slots: int, seed: int) -> DeadLatents:
    """Latents with since_fired [F] >= window: all of them, or a random `slots` of them. The same for the same seed."""
    F, device = since_fired.shape[0], since_fired.device
    if not 0 <= slots <= F:
        raise ValueError(f"slots={slots}: pass a number from 0 to d_sae={F}")
    dead = since_fired >= window
    ids = torch.arange(F, dtype=torch.int32, device=device)
    lot = mixed(ids ^ mixed(torch.full((), seed, dtype=torch.int32, device=device)))  # a permutation: no two are equal
    key = torch.where(dead, lot.long() + 2**32, -ids.long())
    latents = key.topk(slots).indices.sort().values
    return DeadLatents(latents, dead[latents])


def slots_for(dead: int, cap: int) -> int:
    """Slots where `dead` latents were counted last: a power of two with room for twice as many, at most `cap`; 0 for none.

    The count is read where the host stops anyway, to log. Powers of two, so that few shapes occur.
    """
    return min(cap, 1 << (2 * dead - 1).bit_length()) if dead else 0


def without_padding(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, valid: Tensor, magnitude: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc [D, M], b_enc [M] and W_dec [M, D_out] in which padding never adds anything, and ranks behind what is valid.

    Its pre-activation is the lowest number (with `magnitude`, where ranks go by |pre|, zero), its decoder row zero.
    """
    lowest = 0.0 if magnitude else torch.finfo(b_enc.dtype).min / 2
    return (
        torch.where(valid, W_enc, 0),
        torch.where(valid, b_enc, lowest),
        torch.where(valid[:, None], W_dec, 0),
    )
