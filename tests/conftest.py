"""Every test: a fixed seed and poisoned memory. Kernel tests: both paths, chosen by the `path` fixture."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before fastsae.kernels defines its kernels

from fastsae.kernels import backend, topk

collect_ignore = [] if find_spec("sae_lens") else ["hosts"]  # test_hosts.py runs those in .venv-hosts

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # kernel tests also run where only torch and pytest are
    pass
else:
    settings.register_profile(
        "fastsae",
        max_examples=int(os.environ.get("FASTSAE_EXAMPLES", "25")),
        derandomize=True,
        deadline=None,  # the interpreter is slow
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # `device` holds for all examples
    )
    settings.load_profile("fastsae")


@pytest.fixture(autouse=True)
def seeded_and_poisoned(monkeypatch):
    """Seed everything; fill torch.empty with NaN, so that a kernel that leaves an output unwritten fails."""
    monkeypatch.setattr(backend, "INTERPRET", False)  # the torch path, unless a test asks for the kernels
    monkeypatch.setattr(topk, "FEW_SCORES", 0)  # the few rows of a test are searched as many are
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch) -> str:
    """Sends a test down one path and says where its tensors live: torch on the CPU; Triton on a GPU, or interpreted."""
    if request.param == "torch":
        return "cpu"
    assert backend.HAS_TRITON, "kernel tests need triton: pip install 'fastsae[triton]'"
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(backend, "INTERPRET", True)
    return "cpu"


@pytest.fixture
def dtypes(device) -> list[torch.dtype]:
    """The 32-bit and 16-bit types that can be trusted there: the interpreter computes bf16 wrongly."""
    interpreted = backend.INTERPRET and device == "cpu"
    return [torch.float32, torch.float16] + [torch.bfloat16] * (not interpreted)
