"""Entries sorted by latent: segments cut into parts, and a parameter gathered at the entries."""

import torch
from helpers import check_op, random_code

from fastsae import kernels
from fastsae.kernels import by_latent


def test_work_items_cover_every_segment_once():
    """Cutting is arithmetic on the device: for any counts, the parts tile the segments and scratch slots do not overlap."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        F = int(torch.randint(1, 9, (1,), generator=generator))
        counts = torch.randint(0, 5000, (F,), generator=generator) * torch.randint(0, 2, (F,), generator=generator)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        E = int(starts[-1])
        if E <= by_latent.SPLIT:
            continue
        latent_of, part_of, slot_of, parts, longest = by_latent.work_items(starts, E)
        work = [(f, p) for f, p in zip(latent_of.tolist(), part_of.tolist(), strict=True) if f < F]
        assert work == [(f, p) for f in range(F) for p in range(max(1, -(-int(counts[f]) // by_latent.SPLIT)))]
        slots = [slot_of[f] + p for f in range(F) if parts[f] > 1 for p in range(parts[f])]
        assert sorted(slots) == list(range(len(slots))) and len(slots) <= 2 * (E // by_latent.SPLIT)
        assert {f for f in range(F) if parts[f] > 1} <= set(longest.tolist())


def test_gather_latents(device, dtypes):
    latents, _ = random_code(20, 6, 60, device)
    order, starts = kernels.sort_by_latent(latents, 6)
    for dtype in dtypes:
        parameter = torch.randn(6, device=device, dtype=dtype)
        seed = torch.randn(len(latents), device=device)
        check_op(
            lambda p: kernels.gather_latents(p, latents, order, starts),
            lambda p: kernels.gather_latents_reference(p, latents),
            [parameter],
            [seed],
        )
