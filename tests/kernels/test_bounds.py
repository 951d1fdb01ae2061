"""Kernels write only into their outputs and let nothing that lies beside their inputs into a result.

Every tensor an operator makes gets a border that must still be whole afterwards; every input stands among NaN. A mask that
was forgotten would be heap corruption on a GPU, and the rows it clobbers are often overwritten in time for a comparison of
results to pass.
"""

import pytest
import torch
from helpers import random_code
from torch import Tensor

from fastsae import kernels
from fastsae.kernels import backend, by_latent, threshold, topk

BORDER = 4096  # elements: more than any block reaches past the end
N, D, F, E, K = 3, 17, 11, 12, 3  # one over a power of two in each direction


@pytest.fixture
def borders(monkeypatch):
    """The buffers of all tensors made since, each with what its border should be."""
    made = []

    def bordered(empty):
        def make(*args, **kwargs):
            inner = empty(*args, **kwargs)
            outer = torch.full((inner.numel() + 2 * BORDER,), 77, dtype=inner.dtype, device=inner.device)
            made.append((outer, inner.numel()))
            return outer[BORDER : BORDER + inner.numel()].view(inner.shape)

        return make

    monkeypatch.setattr(torch, "empty", bordered(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", bordered(Tensor.new_empty))
    return made


def assert_whole(borders, result):
    assert borders or not backend.runs_triton(result), "no tensor was made"  # torch makes its own tensors
    for outer, size in borders:
        assert (outer[:BORDER] == 77).all() and (outer[BORDER + size :] == 77).all(), f"written outside {size} elements"


def among_nan(t: Tensor) -> Tensor:
    """The same values, with NaN after every row and after the end."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 1100), float("nan"))
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def inputs(device, *sizes):
    return [among_nan(torch.randn(size, device=device)) for size in sizes]


def check(got, expected, borders):
    assert_whole(borders, got[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("chunk", [4, 4096])
def test_selections(chunk, fused, device, borders, monkeypatch):
    for module in (topk, threshold):
        monkeypatch.setattr(module, "CHUNK", chunk)
    x, W, b, scale = inputs(device, (N, D), (F, D), (F,), (F,))
    given = (x, W.T, b)
    check(kernels.select_topk(*given, K, scale, fused=fused), kernels.select_topk_reference(*given, K, scale), borders)
    check(kernels.select_batch_topk(*given, K, fused=fused), kernels.select_batch_topk_reference(*given, K), borders)
    check(kernels.select_threshold(*given, scale), kernels.select_threshold_reference(*given, scale), borders)


def test_dense_encode(device, borders):
    x, W, b, theta = inputs(device, (N, D), (F, D), (F,), (F,))
    theta = among_nan(theta.abs())
    for t in (None, theta):
        check([kernels.dense_encode(x, W.T, b, t)], [kernels.dense_encode_reference(x, W.T, b, t)], borders)


def test_decode(device, borders):
    latents, offsets = random_code(N, F, E, device)
    values, W, b = inputs(device, (len(latents),), (F, D), (D,))
    check([kernels.decode(values, latents, offsets, W, b)], [kernels.decode_reference(values, latents, offsets, W, b)], borders)


def test_decode_loss(device, borders):
    latents, bounds = random_code(2 * N, F, E, device)
    values, W, b, target, weight = inputs(device, (len(latents),), (F, D), (D,), (N, D), (F,))
    given = (values, latents, bounds, W, b, target, weight)
    check(kernels.decode_loss(*given), kernels.decode_loss_reference(*given), borders)


@pytest.mark.parametrize("split", [2, 1024])
@pytest.mark.parametrize("D_out", [D, 9001])
def test_latent_backward(D_out, split, device, borders, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", split)
    latents, offsets = random_code(2 * N, 4, E, device)
    M = len(latents)
    g, scale, values, W_dec, x, direct, jac = inputs(device, (2 * N, D_out), (2 * N,), (M,), (4, D_out), (N, D + 4), (M,), (M,))
    given = dict(g=g, scale=scale, values=values, W_dec=W_dec, x=x, direct=direct, jac=jac)
    order, starts = kernels.sort_by_latent(latents, 4)
    got = kernels.latent_backward(order, starts, latents, offsets, 2, **given)
    expected = kernels.latent_backward_reference(latents, offsets, 4, 2, **given)
    assert_whole(borders, got[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_written_border_is_seen(borders):
    t = torch.empty(3)
    t.as_strided((4,), (1,))[3] = 0.0
    with pytest.raises(AssertionError, match="written outside"):
        assert_whole(borders, t)
