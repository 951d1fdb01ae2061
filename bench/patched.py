"""The cases of hosts.py, each with fastsae.patch and without in one interleaved run, as rows for the JSON.

That a patched library computes what it computed before is for tests/hosts to show; here it is timed. Memory is what is
allocated above parameters, gradients and optimizer state.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastsae import hosts as drop_in

from . import hosts
from .measure import Timing, interleave, peak_memory
from .providers import DictionaryLearning, SAELens, Sparsify
from .run import failed
from .table import Row, rounded

LIBRARIES = {"sae_lens": SAELens(), "dictionary_learning": DictionaryLearning(), "sparsify": Sparsify()}


def run(device: torch.device, seconds: float) -> Iterator[Row]:
    for library, cases in hosts.CASES.items():
        for case in cases:
            row = {"host": library, "case": case.__name__, "what": (case.__doc__ or "").strip()}
            try:
                missing = LIBRARIES[library].missing(device)
                yield row | ({"status": "skipped", "reason": missing} if missing else measure(library, case, device, seconds))
            except Exception as error:
                yield row | failed(error)


def measure(library: str, case: Callable[[torch.device], Any], device: torch.device, seconds: float) -> Row:
    def switch(patched: bool) -> None:
        (drop_in.patch if patched else drop_in.unpatch)(library)

    def caller(built: Any, patched: bool) -> Callable[[int], object]:
        def call(turn: int) -> object:
            switch(patched)
            return built.call(turn)

        return call

    calls: dict[str, Callable[[int], object]] = {}
    above: dict[str, float] = {}
    try:
        for name, patched in (("stock", False), ("patched", True)):
            switch(patched)
            torch.manual_seed(0)
            built, peak = peak_memory(lambda: case(device), lambda made: made.call(0), device)
            above[name] = max(peak - built.held, 0) / 1e6
            calls[name] = caller(built, patched)
        samples = interleave(calls, device, seconds)
    finally:
        switch(False)
    for taken in samples.values():
        if isinstance(taken, Exception):
            raise taken
    stock, patched = (samples[name] for name in ("stock", "patched"))
    times = Timing.of([before / after for before, after in zip(stock, patched, strict=True)])  # type: ignore[arg-type]
    numbers = {
        "stock_ms": Timing.of(stock).median,  # type: ignore[arg-type]
        "patched_ms": Timing.of(patched).median,  # type: ignore[arg-type]
        "times": times.median, "times_low": times.low, "times_high": times.high,
        "stock_mb": above["stock"], "patched_mb": above["patched"],
    }  # fmt: skip
    return {"status": "ok", "rounds": times.rounds} | rounded(numbers)


def line(row: Row) -> str:
    start = f"{row['host']}, {row['what']}: "
    if row["status"] != "ok":
        return f"{start}{row['status']}: {row['reason']}"
    return (
        f"{start}{row['stock_ms']:.4g} ms, patched {row['patched_ms']:.4g} ms: {row['times']:.2f} times as fast; "
        f"{row['stock_mb']:.0f} MB above what has to be there, patched {row['patched_mb']:.0f} MB"
    )
