"""Every kernel launch that fastsae can make, found by letting its launchers make them.

The launchers in fastsae.kernels run on small CPU tensors, as if on each target in turn, under a driver that notes launches
down instead of making them. So what is listed is what can be launched, with the launchers' own arguments, flags, tiles and
alignments; nothing about a kernel is written here a second time.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastsae import kernels
from fastsae.kernels import backend, by_latent, threshold, tiles, update
from fastsae.kernels.deferred import Factors
from fastsae.kernels.entry_dots import entry_dots_op
from fastsae.kernels.scores import CHUNK

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: all that a compiler needs."""

    module: str
    kernel: str
    target: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]

    def flags(self) -> dict[str, Any]:
        """The tl.constexpr parameters, without arguments that only became constants (None, or an int of 1)."""
        names = list(self.signature)
        return {names[i]: v for (i,), v in self.constants.items() if names[i].isupper() and len(names[i]) > 1}

    def tile(self) -> str:
        numbers = [f"{k}={v}" for k, v in self.flags().items() if type(v) is int]
        return " ".join([*numbers, f"warps={self.options['num_warps']}"])

    def variant(self) -> str:
        types = list(self.signature.values())
        dtype = re.findall(r"bf16|fp16", " ".join(types)) or ["fp32"]
        set_flags = [str(v) if type(v) is str else k for k, v in self.flags().items() if v is True or type(v) is str]
        odd = any(not self.attributes.get((i,)) for i, t in enumerate(types) if t[0] == "*")
        d_major = self.signature.get("stride_wd") == "i32"
        halves = [f"{name}:i16" for name, t in self.signature.items() if t == "*i16"]  # bf16 as bits
        return " ".join([dtype[0], *set_flags, *["d-major"] * d_major, *["odd"] * odd, *halves])


class Recorder:
    """Stands in for the GPU driver, and for the device that tiles are chosen by."""

    def __init__(self) -> None:
        self.target = ""
        self.launches: dict[str, Launch] = {}
        self.tiles: set[int] = set()  # ids of the rows of TILES that were chosen

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)  # Triton caches specialisations by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def architecture(self, device: torch.device) -> str:
        return self.target

    def tile(self, kernel: str, device: torch.device, width: int = 0) -> tiles.Tile:
        row = tiles.tile(kernel, device, width)
        self.tiles.add(id(row))
        return row

    def note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        given = json.loads(compile["specialization_data"])["options"]
        options = {name: given[name] for name in ("num_warps", "num_stages", "maxnreg") if given.get(name) is not None}
        (attributes,) = compile["configs"]
        launch = Launch(fn.module, fn.name, self.target, compile["signature"], compile["constants"], attributes, options)
        self.launches.setdefault(repr(launch), launch)
        return True  # noted: neither compiled nor launched

    @contextmanager
    def listening(self) -> Iterator[None]:
        changes = [(triton.knobs.runtime, "jit_cache_hook", self.note), (tiles, "architecture", self.architecture)]
        changes += [(backend, "INTERPRET", True)]  # sends CPU tensors down the Triton path
        choosers = [module for module in kernel_modules() if module is not tiles and hasattr(module, "tile")]
        changes += [(module, "tile", self.tile) for module in choosers]
        triton.runtime.driver.set_active(self)  # for good: without a GPU there is none to go back to
        with ExitStack() as stack:
            for owner, name, value in changes:
                stack.enter_context(patch.object(owner, name, value))
            yield


def record() -> Recorder:
    """Run the launchers for each target and return what they would launch there."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, which leaves nothing to compile: unset it")
    recorder = Recorder()
    with recorder.listening():
        for recorder.target in TARGETS:
            run_launchers()
    return recorder


def kernel_modules() -> list[Any]:
    names = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
    return [importlib.import_module(f"fastsae.kernels.{name}") for name in names]


def unreached(recorder: Recorder) -> list[str]:
    """Kernels and rows of TILES that no recorded launch uses."""
    functions = {f.fn for m in kernel_modules() for f in vars(m).values() if isinstance(f, triton.JITFunction)}
    helpers = {name for function in functions for name in function.__code__.co_names}  # what another one calls
    seen = {launch.kernel for launch in recorder.launches.values()}
    missing = [f"kernel {name}" for name in sorted(f.__name__ for f in functions) if name not in seen | helpers]
    for kernel, by_architecture in tiles.TILES.items():
        for architecture, rows in by_architecture.items():
            missing += [f"TILES[{kernel!r}][{architecture!r}]: {row}" for row in rows if id(row) not in recorder.tiles]
    return missing


# ---------------------------------------------------------------------------------------------------- what is launched


@dataclass(frozen=True)
class Data:
    """Ones of one type. Aligned to 16 bytes or, if `odd`, one element past that; W latent-major, or `d_major`."""

    dtype: torch.dtype
    d_major: bool = False
    odd: bool = False

    def __call__(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.ones(size + 1, dtype=self.dtype)[int(self.odd) :][:size].view(shape)

    def weight(self, F: int, D: int) -> Tensor:
        return self(D, F).T if self.d_major else self(F, D)


def run_launchers() -> None:
    """Call every launcher with the types, flags, widths, layouts and alignments it tells apart, at small sizes."""
    bf16, fp16, fp32 = Data(torch.bfloat16), Data(torch.float16), Data(torch.float32)
    odd = Data(torch.float32, d_major=True, odd=True)
    others = fp16, Data(torch.bfloat16, d_major=True), Data(torch.bfloat16, odd=True)
    for data in (bf16, fp32):
        _encode(data, every_flag=True)
    with _tf32():
        _encode(fp32)
    for data in (odd, *others):
        _encode(data)
    for k in (1, 32, 128, 256, 1024, 4096, 8192):  # the number of slots
        _select(bf16, k, scaled=False, fused=False)
        _select(bf16, k, scaled=True, fused=False)

    decode = [min(row.width, 2304) for row in tiles.TILES["decode"]["any"]]
    latent = [row.width for row in tiles.TILES["latent"]["any"]]
    for data in (bf16, fp32, odd):
        for D in decode:
            _decode(data, D - data.odd, every_flag=data == bf16)
        for D in (*latent, 2 * latent[-1]):
            _latent(data, D - data.odd)
    for data in others:
        _decode(data, decode[-1] - data.odd)
        _latent(data, 2048 - data.odd)
    _latent(bf16, 2048, every_flag=True)
    for D in latent:
        for moments in (fp32, bf16):
            for data in (fp32, bf16):
                _update(data, D, moments, every_flag=D == 2048)
        _update(Data(torch.float32, odd=True), D - 1, Data(torch.float32, odd=True))
        _update(Data(torch.bfloat16, odd=True), D - 1, Data(torch.bfloat16, odd=True))


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _encode(data: Data, every_flag: bool = False) -> None:
    N, D, F = 16, 64 - data.odd, CHUNK - data.odd
    x, W, b = data(N, D), data.weight(F, D).T, data(F)
    kernels.dense_encode(x, W, b)
    threshold._fill(x, W, b, b, capacity=N)
    _select(data, 64, scaled=True, fused=True)
    _select(data, 64, scaled=True, fused=False)
    if every_flag:
        kernels.dense_encode(x, W, b, b)
        _select(data, 64, scaled=False, fused=True)
        _select(data, 64, scaled=False, fused=False)


def _select(data: Data, k: int, scaled: bool, fused: bool) -> None:
    N, D, F = 16, 64 - data.odd, max(CHUNK, k) - data.odd
    x, W, b = data(N, D), data.weight(F, D).T, data(F)
    kernels.select_topk(x, W, b, k, b if scaled else None, scaled, fused)


def _code(data: Data, D: int, per_row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, F = 48, 64
    latents = (torch.arange(N * per_row) % F).int()
    return data(N * per_row), latents, (torch.arange(N + 1) * per_row).int(), data.weight(F, D)


def _decode(data: Data, D: int, every_flag: bool = False) -> None:
    code = values, latents, offsets, W = _code(data, D, 2)
    N, bias = offsets.shape[0] - 1, data(D)
    kernels.decode(*code, bias)
    kernels.decode_loss(*code, bias, data(N // 3, D), data(W.shape[0]))  # three levels, and weights
    entry_dots_op(data(N, D), data(N), latents, offsets, W)  # a frozen decoder's gradient
    if every_flag:
        kernels.decode(*code)
        kernels.decode_loss(*code, bias, data(N, D))


def _latent(data: Data, D: int, every_flag: bool = False) -> None:
    for per_row in (2, 32):  # 32: enough entries for latents in several parts
        values, latents, offsets, W = _code(data, D, per_row)
        N, order = offsets.shape[0] - 1, kernels.sort_by_latent(latents, W.shape[0])
        decoder = {"g": data(N, D), "values": values, "W_dec": W}
        encoder = {"x": data(N, D), "direct": values}
        kernels.latent_backward(*order, latents, offsets, **decoder, **encoder, scale=data(N), jac=values)
        if every_flag:
            three_levels = {**decoder, **encoder, "x": data(N // 3, D)}
            kernels.latent_backward(*order, latents, offsets, 3, **three_levels)
            kernels.latent_backward(*order, latents, offsets, **decoder)
            kernels.latent_backward(*order, latents, offsets, **decoder, scale=data(N))
            kernels.latent_backward(*order, latents, offsets, **encoder)


def _update(data: Data, D: int, moments: Data, every_flag: bool = False) -> None:
    for per_row in (2, 32):
        values, latents, offsets, W = _code(data, D, per_row)
        rows = by_latent.bag_of_entries(offsets, latents.shape[0])
        factors = Factors(data(offsets.shape[0] - 1, D), rows, values, latents)
        order, scalars = kernels.sort_by_latent(latents, W.shape[0]), torch.ones(5)
        low = None if data.dtype == torch.float32 else data(*W.shape).view(torch.int16)
        full = {"stored": data(*W.shape), "dnorm": torch.ones(W.shape[0]), "unit_norm": True}
        m, v = moments(*W.shape), moments(*W.shape)
        for extra in (full, {}) if every_flag else (full,):
            update.gradient_squares(factors, order, W, **extra, low=low)
            update.update_rows(factors, order, W, m, v, scalars, 1e-3, (0.9, 0.999), 1e-8, **extra, low=low, seed=1)
