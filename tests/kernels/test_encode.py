"""encode: gradients of selected pre-activations; dense_encode: the fused GEMM."""

import pytest
import torch
from helpers import check_op, random_code

from fastsae import kernels


@pytest.mark.parametrize(("N", "D", "F", "E"), [(1, 1, 1, 1), (5, 257, 9, 30), (4, 16, 50, 3), (3, 9000, 4, 6)])
@pytest.mark.parametrize("latent_major", [True, False])
def test_gradients_match_reference(N, D, F, E, latent_major, device, dtypes):
    latents, offsets = random_code(N, F, E, device)
    for dtype in dtypes:
        x = torch.randn(N, D, device=device, dtype=dtype)
        W = torch.randn(F, D, device=device, dtype=dtype).T
        W = W if latent_major else W.contiguous()
        b = torch.randn(F, device=device, dtype=dtype)
        selected = kernels.encode_reference(x, W, b, latents, offsets)
        check_op(
            lambda x, W, b, s=selected: kernels.encode(x, W, b, s, latents, offsets),
            lambda x, W, b: kernels.encode_reference(x, W, b, latents, offsets),
            (x, W, b),
            [torch.randn(len(latents), device=device)],
        )


@pytest.mark.parametrize(("N", "D", "F"), [(1, 1, 1), (129, 16, 130), (17, 65, 300), (5, 8, 128)])
@pytest.mark.parametrize("jump", [False, True])
def test_dense_encode_matches_reference(N, D, F, jump, device, dtypes):
    for dtype in dtypes:
        x = torch.randn(N, D, device=device, dtype=dtype)
        W = torch.randn(F, D, device=device, dtype=dtype).T
        b = torch.randn(F, device=device, dtype=dtype)
        theta = torch.full((F,), 0.5, device=device, dtype=dtype) if jump else None

        # a pre-activation within rounding of the threshold may fall on either side: leave those latents out of g
        pre = x.double() @ W.double() + b.double()
        clear = ((pre - (0.5 if jump else 0.0)).abs() > 0.01 * D**0.5).double()
        check_op(
            lambda x, W, b, t=theta, c=clear: kernels.dense_encode(x, W, b, t) * c.to(x.dtype),
            lambda x, W, b, t=theta, c=clear: (
                kernels.dense_encode_reference(x, W, b, None if t is None else t.to(x.dtype)) * c.to(x.dtype)
            ),
            (x, W, b),
            [torch.randn(N, F, device=device)],
        )


def test_dense_encode_at_the_threshold(device):
    """The jump is strict: a pre-activation equal to theta does not fire."""
    x, W = torch.ones(1, 1, device=device), torch.tensor([[1.0, 2.0, 3.0]], device=device)
    theta = torch.full((3,), 2.0, device=device)
    assert kernels.dense_encode(x, W, torch.zeros(3, device=device), theta).tolist() == [[0.0, 0.0, 3.0]]
