"""Where an op runs, and how a Python function becomes a torch operator.

Triton runs on a GPU (and anywhere under TRITON_INTERPRET=1); everything else runs the op's torch path. Each public op
is one `torch.library` operator, so that torch.compile sees it whole.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
    # tests flip this to send one process through both paths
    INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
except ImportError:  # a CPU machine, macOS, Windows: kernels stay defined but cannot be launched

    class _Absent:
        """Stands in for triton where it is not installed: decorating and annotating with it does nothing."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
            return self

    triton = tl = TensorDescriptor = _Absent()  # type: ignore[assignment]
    HAS_TRITON = False
    INTERPRET = False


def runs_triton(x: Tensor) -> bool:
    """Whether ops on `x` run the Triton kernels. A GPU tensor without triton installed runs the torch path."""
    # fp64 is for proofs: tensor cores and tiles are chosen for 32 bits and less
    return HAS_TRITON and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def describe(device: torch.device | str = "cpu") -> str:
    """One line: which path an op on `device` takes, and why."""
    device = torch.device(device)
    if device.type == "cuda" and HAS_TRITON:
        return f"Triton {triton.__version__} kernels on {torch.cuda.get_device_name(device)}"
    if device.type == "cuda":
        return "torch's own sparse primitives on the GPU: triton is not installed (pip install 'fastsae[triton]')"
    if INTERPRET:
        return f"Triton {triton.__version__} kernels in the interpreter (TRITON_INTERPRET=1): for tests, very slow"
    return f"torch's own sparse primitives on {device.type}: Triton kernels need a GPU"


# The Python behind each operator, for tests that look inside one (torch hides what an operator allocates).
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def op(fn: Callable[..., Any]) -> Any:
    """Register `fn` as the operator fastsae::<its name>. It computes in the dtypes that it is given, autocast or not."""
    IMPLEMENTATIONS[fn.__name__] = fn

    @functools.wraps(fn)
    def on_its_device(*args: Any) -> Any:
        with device_of(*args), exactly(*args):
            return fn(*args)

    return torch.library.custom_op(f"fastsae::{fn.__name__}", on_its_device, mutates_args=())


def device_of(*args: Any) -> Any:
    """A context in which Triton launches on the GPU of the first tensor, not on the current one; nothing on a CPU."""
    return torch.cuda.device_of(next((t for t in args if isinstance(t, Tensor)), None))


def exactly(*args: Any) -> Any:
    """A context in which an autocast region that the caller may be in does nothing."""
    return torch.autocast(next((t.device.type for t in args if isinstance(t, Tensor)), "cpu"), enabled=False)


@functools.cache
def keep_freed_memory() -> None:
    """Let a loop on a CPU use its temporaries' memory again, instead of a page fault every 4 KB.

    glibc returns freed memory to the kernel above a size that it learns from the largest block it saw freed, of up to 32 MB.
    One is shown to it here, once, and never touched.
    """
    bytes(31 << 20)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: fp32 for fp32, bf16 and fp16; fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision, following torch.set_float32_matmul_precision."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or torch.version.hip is not None:
        return "ieee"
    return "tf32"
