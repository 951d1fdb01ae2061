"""Every test: a fixed seed and poisoned memory. Kernel tests: both paths, chosen by the `device` fixture."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before fastsae.kernels defines its kernels

from fastsae.kernels import backend, topk

PRETEND = os.environ.get("FASTSAE_PRETEND_GPU") == "1"  # test_pretended.py says so to the process that it starts
if PRETEND:
    import pretend_gpu

    pretend_gpu.register()

collect_ignore = ["hosts"] * (not find_spec("sae_lens"))  # test_hosts.py runs those in .venv-hosts
collect_ignore += ["pretended"] * (not PRETEND)

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
def device(request, monkeypatch) -> Iterator[str]:
    """Sends a test down one path and says where its tensors live: torch on the CPU; Triton on a GPU, or interpreted."""
    if request.param == "torch":
        yield "cpu"
        return
    assert backend.HAS_TRITON, "kernel tests need triton: pip install 'fastsae[triton]'"
    if PRETEND:
        with pretend_gpu.pretend_gpu(monkeypatch):
            yield "cuda"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        monkeypatch.setattr(backend, "INTERPRET", True)
        yield "cpu"


@pytest.fixture
def dtypes(device) -> list[torch.dtype]:
    """The 32-bit and 16-bit types that can be trusted there: the interpreter computes bf16 wrongly."""
    interpreted = backend.INTERPRET or (PRETEND and device == "cuda")
    return [torch.float32, torch.float16] + [torch.bfloat16] * (not interpreted)
