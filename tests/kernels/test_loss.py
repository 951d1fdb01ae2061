"""decode_loss: error, squared error and L1 at one and several levels, both paths, values and gradients."""

import pytest
import torch
from helpers import check_op, random_code, values_and_gradients

from fastsae import kernels

SHAPES = [  # N, P, D, F, E
    (1, 1, 1, 1, 1),
    (5, 1, 257, 30, 40),
    (4, 3, 33, 7, 40),  # three levels, some of them empty
    (3, 2, 1100, 9, 12),  # a row over the widest block
]


def inputs(N, P, D, F, E, dtype, device):
    bags, bounds = random_code(N * P, F, E, device)  # a bag is a row at one level
    make = lambda *size: torch.randn(*size, device=device, dtype=dtype)  # noqa: E731
    return make(len(bags)), bags, bounds, make(F, D), make(D), make(N, D), make(F).abs()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("N", "P", "D", "F", "E"), SHAPES)
def test_matches_reference(N, P, D, F, E, weighted, device, dtypes):
    for dtype in dtypes:
        given = inputs(N, P, D, F, E, dtype, device)
        seeds = [torch.randn(N, P, D, device=device), torch.rand(N, P, device=device), torch.rand(N, device=device)]
        arguments = given if weighted else (*given[:-1], None)
        check_op(kernels.decode_loss, kernels.decode_loss_reference, arguments, seeds)


def test_the_usual_backward_reads_the_error_itself(device):
    """Only sse and l1 have gradients: the fused route, which builds no gradient of the rows."""
    given = inputs(6, 1, 40, 12, 20, torch.float32, device)
    seeds = [torch.rand(6, 1, device=device), torch.rand(6, device=device)]
    got = values_and_gradients(lambda *a: kernels.decode_loss(*a)[1:], given, seeds)
    expected = values_and_gradients(lambda *a: kernels.decode_loss_reference(*a)[1:], given, seeds)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_no_rows(device):
    e = torch.empty(0, device=device)
    W = torch.randn(4, 8, device=device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    error, sse, l1 = kernels.decode_loss(e, e.int(), zero, W, W[0], torch.empty(0, 8, device=device))
    assert error.numel() == sse.numel() == l1.numel() == 0


def test_backward_inside_an_autocast_region_is_the_same():
    given = inputs(40, 1, 33, 30, 90, torch.float32, "cpu")
    seeds = [torch.rand(40, 1), torch.rand(40)]
    expected = values_and_gradients(lambda *a: kernels.decode_loss(*a)[1:], given, seeds)
    with torch.autocast("cpu", torch.bfloat16):
        got = values_and_gradients(lambda *a: kernels.decode_loss(*a)[1:], given, seeds)
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(got)
