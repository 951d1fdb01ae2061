"""decode: both paths against the reference and fp64, values and gradients."""

import pytest
import torch
from helpers import check_op, random_code

from fastsae import kernels

SHAPES = [  # N, D, F, E
    (1, 1, 1, 1),
    (4, 256, 64, 40),
    (5, 257, 7, 20),  # one over a block; collisions: more entries than latents
    (7, 1031, 50, 60),  # a prime over the widest block
    (3, 24, 100, 2),  # empty rows
    (2, 9000, 6, 5),  # a row too wide for one program of the backward pass
]


@pytest.mark.parametrize(("N", "D", "F", "E"), SHAPES)
def test_matches_reference(N, D, F, E, device, dtypes):
    latents, offsets = random_code(N, F, E, device)
    for dtype in dtypes:
        values = torch.randn(len(latents), device=device, dtype=dtype)
        W = torch.randn(F, D, device=device, dtype=dtype)
        b = torch.randn(D, device=device, dtype=dtype)
        check_op(kernels.decode, kernels.decode_reference, (values, latents, offsets, W, b), [torch.randn(N, D, device=device)])


@pytest.mark.parametrize(("N", "D", "F", "E"), [(5, 257, 7, 20), (3, 1100, 9, 12)])
def test_frozen_weights_get_no_gradient_and_values_do(N, D, F, E, device, dtypes):
    latents, offsets = random_code(N, F, E, device)
    for dtype in dtypes:
        W = torch.randn(F, D, device=device, dtype=dtype)
        check_op(
            lambda v, W=W: kernels.decode(v, latents, offsets, W.to(v.dtype)),
            lambda v, W=W: kernels.decode_reference(v, latents, offsets, W.to(v.dtype)),
            [torch.randn(len(latents), device=device, dtype=dtype)],
            [torch.randn(N, D, device=device)],
        )


def test_no_rows_and_no_entries(device):
    W = torch.randn(6, 8, device=device, requires_grad=True)
    none = torch.empty(0, device=device)
    for N in (0, 3):
        y = kernels.decode(none, none.int(), torch.zeros(N + 1, dtype=torch.int32, device=device), W, W.detach()[0])
        assert torch.equal(y, W[0].expand(N, -1))
        y.sum().backward()
    assert torch.equal(W.grad, torch.zeros_like(W))


def test_zero_valued_entries_do_nothing(device):
    W = torch.randn(10, 32, device=device)
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=device)
    values = torch.tensor([2.0, 0.0], device=device)
    a, b = (kernels.decode(values, torch.tensor([3, i], dtype=torch.int32, device=device), offsets, W) for i in (5, 9))
    assert torch.equal(a, b)


def test_any_layout_of_weights_and_gradient(device):
    latents, offsets = random_code(4, 9, 12, device)
    values = torch.randn(len(latents), device=device)
    W = torch.randn(9, 40, device=device)
    for view in (W.T.contiguous().T, torch.cat([W, W], 1)[:, :40], W.repeat_interleave(2, 0)[::2]):
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        y = kernels.decode(values, latents, offsets, leaf)
        y.backward(torch.ones(1, device=device).expand(4, 40))  # stride 0
        torch.testing.assert_close(y, kernels.decode_reference(values, latents, offsets, W))
        expected = W.clone().requires_grad_()
        kernels.decode_reference(values, latents, offsets, expected).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad)


def test_backward_gives_the_same_bits_twice(device):
    latents, offsets = random_code(40, 5, 100, device)
    values, g = torch.randn(len(latents), device=device), torch.randn(40, 64, device=device)
    runs = []
    for _ in range(2):
        W = torch.ones(5, 64, device=device).requires_grad_()
        kernels.decode(values, latents, offsets, W).backward(g)
        runs.append(W.grad)
    assert torch.equal(*runs)
