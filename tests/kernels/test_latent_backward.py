"""The gradients of decoding and encoding: both halves, alone and together, whole and split segments, both paths."""

import pytest
import torch
from helpers import assert_no_worse, random_code

from fastsae import kernels
from fastsae.kernels import by_latent

HALVES = ["decoder", "encoder", "both"]


def arguments(N, D_out, D_in, F, E, levels, half, dtype, device):
    latents, offsets = random_code(N * levels, F, E, device)
    make = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
    M = len(latents)
    given = dict(
        g=make(N * levels, D_out), scale=make(N * levels), values=make(M), W_dec=make(F, D_out),
        x=make(N, D_in), direct=make(M), jac=make(M),
    )  # fmt: skip
    keep = {"decoder": ("g", "scale", "values", "W_dec"), "encoder": ("x", "direct"), "both": tuple(given)}[half]
    return latents, offsets, {name: t for name, t in given.items() if name in keep}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("split", [3, 1024])  # 3: nearly every segment is cut, some into one part more than it fills
@pytest.mark.parametrize(
    ("N", "D_out", "D_in", "F", "E", "levels"),
    [(1, 1, 1, 1, 1, 1), (9, 257, 16, 4, 30, 1), (6, 24, 300, 5, 40, 2), (5, 9001, 3, 3, 9, 1)],
)
def test_matches_reference(N, D_out, D_in, F, E, levels, half, split, device, dtypes, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", split)
    for dtype in dtypes:
        latents, offsets, given = arguments(N, D_out, D_in, F, E, levels, half, dtype, device)
        order, starts = kernels.sort_by_latent(latents, F)
        got = kernels.latent_backward(order, starts, latents, offsets, levels, **given)
        double = {name: t.double() for name, t in given.items()}
        eager = kernels.latent_backward_reference(latents, offsets, F, levels, **given)
        truth = kernels.latent_backward_reference(latents, offsets, F, levels, **double)
        size = kernels.latent_backward_reference(latents, offsets, F, levels, **{n: t.abs() for n, t in double.items()})
        for four in zip(got, eager, truth, size, strict=True):
            if four[1] is None:
                assert four[0] is None
            else:
                assert_no_worse(*four)


@pytest.mark.parametrize("split", [3, 1024])
def test_the_same_bits_twice(split, device, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", split)
    latents, offsets, given = arguments(30, 65, 33, 4, 60, 1, "both", torch.float32, device)
    order, starts = kernels.sort_by_latent(latents, 4)
    runs = [kernels.latent_backward(order, starts, latents, offsets, **given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
