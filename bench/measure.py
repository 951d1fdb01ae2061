"""Time, memory and what this machine can do at most. CUDA events on a GPU, the performance counter on a CPU.

Providers are timed in interleaved rounds, every second one backwards, so that a drift of the machine meets all of them
alike; inputs rotate through more bytes than the last cache holds. What is reported is the median with its quartiles.
"""

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Failure = Exception


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    low: float
    """first quartile"""
    high: float
    """third quartile"""
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Time of one call, averaged over `calls` of them in a row."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) * 1e3 / calls


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 50,
    warm: Mapping[str, float] | None = None,
) -> dict[str, list[float] | Failure]:
    """Samples of each call in rounds over all of them. A call that fails leaves the rounds; the others go on.

    Each call gets the number of its round, to pick an input by. Rounds end after `seconds`, but not before `least`.
    `warm` says how many milliseconds calls took that were made already; long ones need no further warm-up.
    """
    samples: dict[str, list[float] | Failure] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        try:
            once = (warm or {}).get(name, 0.0)
            if once < 100:  # warm-up: compilation, caches, allocator
                once = milliseconds(lambda call=call: call(0), device)
            if once < 100:
                once = milliseconds(lambda call=call: call(1), device)
            repeats[name] = max(1, min(200, int(2 / max(once, 1e-3))))  # a sample of two milliseconds at least
            samples[name] = []
        except Exception as failure:
            samples[name] = failure
    began, done = time.perf_counter(), 0
    while done < most and (done < least or time.perf_counter() - began < seconds):
        alive = [name for name, so_far in samples.items() if isinstance(so_far, list)]
        for name in alive if done % 2 == 0 else reversed(alive):
            turn = iter(range(done * repeats[name], (done + 1) * repeats[name]))
            try:
                taken = milliseconds(lambda name=name, turn=turn: calls[name](next(turn)), device, repeats[name])
                samples[name].append(taken)
            except Exception as failure:
                samples[name] = failure
        done += 1
    return samples


# --------------------------------------------------------------------------------------------------------------- memory


_MARKS = ("prepare inputs", "second call")


def peak_memory(
    build: Callable[[], Any],
    call: Callable[[Any], object],
    device: torch.device,
    prepare: Callable[[Any], object] = lambda made: None,
) -> tuple[Any, int]:
    """(what `build` made, bytes): the most that was alive during a second call, with parameters and optimizer state.

    What `prepare` keeps is not counted, which are inputs; nor what libraries take by malloc rather than through torch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        made = build()
        built = torch.cuda.memory_allocated(device)
        prepare(made)
        before += torch.cuda.memory_allocated(device) - built
        call(made)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call(made)
        torch.cuda.synchronize(device)
        return made, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it reports every start and stop on stderr
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        made = build()
        with record_function("prepare inputs"):
            prepare(made)
        call(made)
        with record_function("second call"):
            call(made)
    events = recorded.profiler.kineto_results.events()
    at = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in _MARKS}
    inputs = alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        before, alive = alive, alive + event.nbytes()
        if at["prepare inputs"][0] <= event.start_ns() <= at["prepare inputs"][1]:
            inputs += event.nbytes()
        if event.start_ns() >= at["second call"][0]:
            peak = max(peak, before, alive)
    return made, max(peak, alive) - inputs


@contextmanager
def memory_limit(gigabytes: float | None) -> Generator[None]:
    """Within it this process can allocate so much more host memory; beyond, allocation fails as on a machine without it."""
    if gigabytes is None:
        yield
        return
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(gigabytes * 1e9), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@cache
def cache_bytes(device: torch.device) -> int:
    """The last cache, as the machine states it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(text[:-1]) * units[text[-1]] for text in (p.read_text().strip() for p in sizes) if text[-1] in units]
    return max(found, default=32 << 20)


# ------------------------------------------------------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run."""

    copy_gbs: float
    """GB/s of a large copy, bytes read and bytes written"""
    gemm_tflops: dict[str, float]
    """TFLOP/s of a large square product, by precision (see PRECISIONS)"""

    def floor_ms(self, phases: Sequence[tuple[float, float]], precision: str) -> float:
        """Least time for phases of (FLOPs, bytes), one after the other."""
        rate, bandwidth = self.gemm_tflops[precision] * 1e12, self.copy_gbs * 1e9
        return sum(max(flops / rate, moved / bandwidth) for flops, moved in phases) * 1e3


# precision -> (type of parameters and activations, torch.set_float32_matmul_precision)
PRECISIONS = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}


def ceilings(device: torch.device, precisions: Sequence[str], small: bool = False) -> Ceilings:
    gpu = device.type == "cuda"
    size = (1 << 24 if small else 1 << 30) if gpu else (1 << 24 if small else max(1 << 28, 2 * cache_bytes(device)))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda _, to=target, of=source: to.copy_(of)}, device, 1.0, least=5)["copy"]
    assert isinstance(copies, list), copies
    bandwidth = 2 * size / min(copies) / 1e6
    del source, target
    rates = {}
    edge = (1024 if small else 8192) if gpu else (512 if small else 2048)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in precisions:
            dtype, mode = PRECISIONS[precision]
            torch.set_float32_matmul_precision(mode)
            a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            times = interleave({"gemm": lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out)}, device, 1.0, least=5)["gemm"]
            assert isinstance(times, list), times
            rates[precision] = 2 * edge**3 / min(times) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return Ceilings(bandwidth, rates)


def reads(matrix: Tensor) -> dict[str, Callable[[int], object]]:
    """Ways in which torch reads a matrix once and stores next to nothing, to be timed: the fastest is one read of it."""
    flat = matrix.T if matrix.stride(0) == 1 else matrix
    vector = torch.ones(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return {"sum": lambda _: flat.sum(), "amax": lambda _: flat.amax(), "product": lambda _: torch.mv(flat, vector)}
