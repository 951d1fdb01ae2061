"""Tests beside the libraries that fastsae replaces. They run in .venv-hosts; tests/test_hosts.py starts them."""

import pytest
import tiny_lm
import torch

from fastsae import hosts

# of the largest number of each gradient: what issue 4 asks for
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture
def agree(dtype):
    """agree(ours, theirs, pairs): two losses are equal, and so are their gradients to each pair of parameters."""

    def near(a, b, what):
        assert a.shape == b.shape, what
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert a.equal(b) or error <= TOLERANCE[dtype], f"{what}: {error:.2g} relative"

    def check(ours, theirs, pairs):
        near(ours.detach().to(theirs.dtype), theirs.detach(), "loss")
        for side, loss in ((0, ours), (1, theirs)):
            for name, both in pairs.items():
                assert both[side].grad is None, f"{name} already has a gradient"
            loss.backward()
        for name, (mine, other) in pairs.items():
            a, b = (torch.zeros_like(p) if p.grad is None else p.grad for p in (mine, other))
            near(a if a.shape == b.shape else a.T, b, name)

    return check


@pytest.fixture
def patched():
    """SAELens with fast methods, until the test ends."""
    hosts.patch("sae_lens")
    yield
    hosts.unpatch("sae_lens")


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    """A tiny HookedTransformer."""
    return tiny_lm.hooked_transformer(tiny_lm.save(tmp_path_factory.mktemp("lm")))
