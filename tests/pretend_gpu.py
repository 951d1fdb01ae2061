"""A GPU for machines without one: tensors that say cuda:0 and keep their numbers in a CPU tensor.

What fastsae does for a GPU runs as it would there, with the kernels interpreted. A tensor on the wrong device is refused as
CUDA refuses it, and each operator that would make the host wait for the device is counted, with the line that called it. Speed,
streams, memory and compiled kernels are out of sight.

C++ takes these tensors for a backend written in Python, since a torch without CUDA has no autograd for that; `register` must
have run before the first backward of the process, which is why tests/pretended runs in a process of its own.
"""

import contextlib
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

import fastsae
from fastsae.kernels import backend, tiles

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PROPERTIES = SimpleNamespace(name="a pretended GPU", total_memory=1 << 34, L2_cache_size=1 << 20, multi_processor_count=4)
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by indices that may lie on the CPU
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}

waits: Counter[str] = Counter()


def register() -> None:
    module: Any = _DummyBackendModule()
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    _setup_privateuseone_for_python_backend("pretended", backend_module=module)


class OnGpu(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        beneath = torch.device("pretended", 0)
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=beneath
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "OnGpu") -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, how: str) -> str:
        return format(self.cpu(), how)

    def __repr__(self) -> str:
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One torch operator on the CPU tensors, its result on the device where CUDA would leave it."""
    if func.namespace == "fastsae":
        with Dispatch():
            return backend.IMPLEMENTATIONS[func._opname](*args, **kwargs)
    with Dispatch():  # what is made of other operators, below autograd, and would hide them
        if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
            return made
    name = func._schema.name.removeprefix("aten::")
    if kwargs.get("pin_memory"):
        pinned = func(*args, **kwargs | {"pin_memory": None})
        pinned.is_pretended_pinned = True
        return pinned
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    from_gpu = any(isinstance(t, OnGpu) for t in tensors)
    asked = kwargs.get("device")
    to_gpu = from_gpu if asked is None else torch.device(asked).type != "cpu"
    if not (from_gpu or to_gpu):
        return func(*args, **kwargs)
    if from_gpu:
        _refuse_strangers(name, args, tensors)
    if _waits(name, args, kwargs, tensors, to_gpu):
        waits[f"{name} at {_caller()}"] += 1
    inner_args, inner_kwargs = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = CPU
    if func is torch.ops.aten.mm.dtype_out:  # not there on a CPU
        inner_kwargs["out"].copy_(inner_args[0].float() @ inner_args[1].float())
        return kwargs["out"]
    out = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and out is inner_args[0]:
        out = out.clone()
    if not to_gpu:
        return out
    out = tree_map_only(Tensor, OnGpu, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if from_gpu else out


def _refuse_strangers(name: str, args: Any, tensors: list[Tensor]) -> None:
    indices = args[1] if name in INDEXING else ()
    for t in tensors:
        stranger = not isinstance(t, OnGpu) and t.ndim > 0 and not any(t is i for i in indices)
        if stranger and name not in COPIES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {list(t.shape)} on the CPU")


def _waits(name: str, args: Any, kwargs: Any, tensors: list[Tensor], to_gpu: bool) -> bool:
    """Whether the host waits for the device: it reads a value, a shape depends on one, or pageable memory is copied."""
    if name in COPIES:
        source = args[0] if name == "_to_copy" else args[1]
        to_gpu = to_gpu if name == "_to_copy" else isinstance(args[0], OnGpu)
        at_once = kwargs.get("non_blocking") or args[2:3] == (True,)
        return isinstance(source, OnGpu) != to_gpu and not (at_once and (to_gpu and hasattr(source, "is_pretended_pinned")))
    if name in INDEXING:
        return any(i is not None and (i.dtype in (torch.bool, torch.uint8) or not isinstance(i, OnGpu)) for i in args[1])
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and "output_size" not in kwargs
    return name in READS


def _caller() -> str:
    """The innermost line of fastsae."""
    package = f"{Path(fastsae.__file__).parent}{os.sep}"
    frame = next((f for f in reversed(traceback.extract_stack()) if f.filename.startswith(package)), None)
    return "elsewhere" if frame is None else f"{frame.filename.removeprefix(package)}: {frame.line}"


class Dispatch(TorchDispatchMode):
    """Sends tensors made on a GPU, or copied to it, to OnGpu."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What C++ would do without asking Dispatch: find out which GPU "cuda" is, make a tensor like another."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        first = lambda a: CUDA if isinstance(a, str | torch.device) and str(a) == "cuda" else a  # noqa: E731
        args, kwargs = tree_map(first, (args, kwargs or {}))
        if func is Tensor.new_tensor and isinstance(args[0], OnGpu):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, "device": CUDA} | kwargs)
        return func(*args, **kwargs)


class Generator(torch.Generator):
    """torch.Generator("cuda")."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


class Event:
    """torch.cuda.Event, by the clock of the CPU."""

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


@contextlib.contextmanager
def modes() -> Iterator[None]:
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy that Dispatch sees
    try:
        with Functions(), Dispatch():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextlib.contextmanager
def pretend_gpu(monkeypatch: Any) -> Iterator[Counter[str]]:
    """Within, "cuda" is there. Yields how often the host waited for it, by operator and line."""
    launch = interpreter.GridExecutor.__call__

    def unwrapped(a: Any) -> Any:
        if isinstance(a, TensorDescriptor):
            return TensorDescriptor(unwrapped(a.base), a.shape, a.strides, a.block_shape, a.padding)
        if isinstance(a, Tensor) and not isinstance(a, OnGpu):
            raise ValueError(f"a kernel was given a tensor on the CPU: {list(a.shape)}")
        return a.inner if isinstance(a, OnGpu) else a

    def launching(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(self, *map(unwrapped, args), **{name: unwrapped(a) for name, a in kwargs.items()})

    start = threading.Thread.start

    def starting(self: threading.Thread) -> None:
        self.run = modes()(self.run)  # type: ignore[method-assign]
        start(self)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launching)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(threading.Thread, "start", starting)
    for name, stand_in in {
        "Event": Event,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "device_of": lambda t: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
        "memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    waits.clear()
    with modes():
        yield waits
