"""take_rows: rows and their gradient, both layouts, stored and deferred."""

import pytest
import torch
from helpers import check_op

from fastsae.kernels.deferred import Deferred
from fastsae.kernels.take import take_rows, take_rows_reference

IDS = [[], [3], [6, 0, 2]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ids", IDS)
def test_matches_reference(ids, transposed, dtypes, device):
    for dtype in dtypes:
        W = torch.randn(7, 5, device=device, dtype=dtype)
        latents = torch.tensor(ids, dtype=torch.int64, device=device)
        arguments = (W.T if transposed else W, latents, transposed)
        check_op(take_rows, take_rows_reference, arguments, [torch.randn(len(ids), 5, device=device)])


@pytest.mark.parametrize("transposed", [False, True])
def test_deferred(transposed):
    """The factors are the gradient, and no `.grad` is made."""
    rows = torch.randn(7, 5)
    W = (rows.T if transposed else rows).requires_grad_()
    W.deferred = Deferred()
    latents, seed = torch.tensor([6, 0, 2]), torch.randn(3, 5)
    take_rows(W, latents, transposed).backward(seed)
    assert W.grad is None
    factors = W.deferred.joined(rows)
    got = torch.zeros(7, 5).index_add(0, factors.latents, factors.coefficients[:, None] * factors.table[factors.rows])
    torch.testing.assert_close(got, torch.zeros(7, 5).index_copy(0, latents, seed))


def test_refuses():
    W = torch.randn(7, 5)
    for latents, message in [
        (torch.zeros(7, dtype=torch.bool), "int64 ids"),
        (torch.tensor([7]), "0 .. d_sae - 1 = 6"),
        (torch.zeros(1, 1, dtype=torch.int64), "expected"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            take_rows(W, latents)
