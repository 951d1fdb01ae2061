"""Random bits: the same on both paths, a function of their place, and as random as rounding needs."""

import torch
import triton
import triton.language as tl

from fastsae.kernels.noise import random_bits, random_bits_of_row


@triton.jit
def _fill(out, steps, seed, first, D, BLOCK_D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK_D)
    noise = random_bits_of_row(seed, tl.load(steps), first + row, d)
    tl.store(out + row * D + d, noise, mask=d < D)


def bits(seed=0, step=1, first=0, rows=512, D=512):
    return random_bits(seed, torch.tensor(float(step)), first, rows, D)


def test_kernel_and_torch_agree():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed, step, first in [(0, 1, 0), (2**31 - 1, 2**24, 10**6)]:
        out = torch.empty(5, 37, dtype=torch.int32, device=device)
        _fill[(5,)](out, torch.tensor([float(step)], device=device), seed, first, 37, BLOCK_D=64)
        assert torch.equal(out, random_bits(seed, torch.tensor(float(step), device=device), first, 5, 37))


def test_bits_belong_to_their_place():
    assert torch.equal(bits()[100:200], bits(first=100, rows=100))
    assert torch.equal(bits()[:, :99], bits(D=99))


def halves(noise):
    return [(noise >> 16) & 0xFFFF, noise & 0xFFFF]


def test_every_value_is_equally_likely():
    """Each half in 256 bins: chi-squared has mean 255 and deviation 23."""
    for step in range(1, 4):
        for half in halves(bits(step=step)):
            for values in (half >> 8, half & 0xFF):
                counts = torch.bincount(values.flatten(), minlength=256).double()
                expected = values.numel() / 256
                assert 150 < float(((counts - expected) ** 2 / expected).sum()) < 400


def test_neighbours_are_not_alike():
    """Correlations of 2^18 pairs have a deviation of 0.002."""
    here = bits()
    others = [bits(first=1), bits(step=2), bits(seed=1), bits(seed=2), here.roll(1, 1), here.roll(256, 1), here.roll(16, 0)]
    for other in others:
        for a in halves(here):
            for b in halves(other):
                assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])) < 0.012
    assert abs(float(torch.corrcoef(torch.stack([h.flatten() for h in halves(here)]).double())[0, 1])) < 0.012
    # and no pattern of rows and columns: differences of differences are as spread as those of independent numbers
    for half in halves(here):
        u = half.double() / 65536 - 0.5
        crossed = u[1:, 1:] - u[:-1, 1:] - u[1:, :-1] + u[:-1, :-1]
        assert abs(float(crossed.square().mean()) - 4 / 12) < 0.01
