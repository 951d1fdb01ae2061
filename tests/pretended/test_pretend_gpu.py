"""The pretended GPU itself: it refuses what CUDA refuses, and sees what waits."""

import pytest
import torch

from fastsae import SAE, TopK
from fastsae.kernels import backend, topk


def test_tensors_of_two_devices_are_refused(gpu):
    with gpu():
        x = torch.randn(4, device="cuda")
        assert x.is_cuda and x.device == torch.device("cuda", 0) and type(x.cpu()) is torch.Tensor
        assert torch.equal((x * 2 + torch.tensor(1.0)).cpu(), x.cpu() * 2 + 1)  # a number may come from the CPU
        assert torch.equal(x[torch.tensor([3, 0])].cpu(), x.cpu()[[3, 0]])  # and so may indices, which waits
        for mixed in (lambda: x + torch.ones(4), lambda: torch.cat([x, torch.ones(4)]), lambda: torch.ones(4).mul_(x)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()


def test_a_kernel_is_given_no_tensor_on_the_cpu(gpu):
    with gpu(), pytest.raises(ValueError, match="kernel was given a tensor on the CPU"):
        topk.select_topk_forward(
            torch.randn(3, 4, device="cuda"), torch.randn(12, 4, device="cuda").T, torch.zeros(12), 2, None, False, False
        )


WAITS = {
    "_local_scalar_dense": lambda x: float(x[0]),
    "index": lambda x: x[x > 0],
    "index ": lambda x: x[torch.tensor([1, 2])],
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: torch.where(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(5, device="cuda").long()),
    "_unique2": lambda x: x.unique(),
    "_to_copy": lambda x: x.cpu(),
    "copy_": lambda x: x.copy_(torch.ones(5), non_blocking=True),  # not pinned
    "_to_copy ": lambda x: torch.tensor([1, 2], device="cuda"),
}
WAITS_NOT = [
    lambda x: x.copy_(torch.empty(5, pin_memory=True), non_blocking=True),
    lambda x: x.repeat_interleave(2),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: x.topk(2).values.sum(),
]


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name, gpu):
    with gpu() as waits:
        x = torch.randn(5, device="cuda")
        assert not waits
        WAITS[name](x)
        assert any(where.startswith(name.strip()) for where in waits), waits


@pytest.mark.parametrize("call", WAITS_NOT)
def test_what_does_not_wait_is_not(call, gpu):
    with gpu() as waits:
        call(torch.randn(5, device="cuda"))
        assert not waits


def test_operators_are_looked_into(gpu, monkeypatch):
    real = backend.IMPLEMENTATIONS["select_topk_forward"]
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "select_topk_forward", lambda x, *a: (float(x.sum()), real(x, *a))[1])
    with gpu() as waits:
        SAE(4, 12, TopK(2), device="cuda").encode_sparse(torch.randn(3, 4, device="cuda"))
        assert "_local_scalar_dense" in " ".join(waits)
