"""Propose rows for kernels/tiles.py:  python -m bench.tune --kernel NAME --minutes M

For each row that the kernel has, its candidates are timed in interleaved rounds beside the row that ships. A candidate that
computes something else, or does not compile or launch here, is out. What is printed can be pasted into TILES, with the
measurement that chose it.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fastsae.kernels import tiles
from fastsae.kernels.tiles import Tile

from .cases import SHAPES, Shape
from .environment import device_name
from .measure import Timing, interleave
from .workloads import BY_KERNEL


def candidates(kernel: str, row: Tile) -> list[Tile]:
    """What is worth trying in the place of `row`."""
    if kernel == "gemm_16":
        blocks = itertools.product((64, 128, 256), (128, 256), (32, 64, 128), (4, 8), (3, 4))
        return [
            replace(row, constants=row.constants | {"BLOCK_N": n, "BLOCK_F": f, "BLOCK_D": d}, warps=warps, stages=stages)
            for n, f, d, warps, stages in blocks
            # accumulators at most 128 registers a thread, operands within shared memory
            if n * f <= warps * 32 * 128 and 2 * (n + f) * d * stages <= 232_448
        ]
    if kernel == "latent":
        return [replace(row, warps=warps) for warps in (1, 2, 4, 8, 16) if row.constants["BLOCK_D"] >= 32 * warps]
    if kernel == "topk":
        return [replace(row, warps=warps) for warps in (1, 2, 4, 8, 16)]
    sizes = [b for b in (256, 512, 1024, 2048, 4096) if kernel == "threshold" or b <= row.constants["BLOCK_D"] * 2]
    name = "BLOCK" if kernel == "threshold" else "BLOCK_D"
    return [replace(row, constants={name: size}, warps=warps) for size, warps in itertools.product(sizes, (1, 2, 4, 8))]


def shape_of(kernel: str, row: Tile, small: bool = False) -> Shape:
    """Where a row decides: R, with its own width; what is wider than memory is cut in F."""
    base = Shape("small", 32, 64, 1024, 8) if small else SHAPES["R"]
    if row.width == 1 << 30 or small:
        return base
    if kernel == "topk":
        return replace(base, k=min(row.width, 4096), N=1024)
    return replace(base, D=row.width, F=min(base.F, (1 << 30) // row.width))


@contextmanager
def using(kernel: str, row: Tile) -> Iterator[None]:
    """Every launch of `kernel` takes this row."""
    with patch.dict(tiles.TILES, {kernel: {name: (row,) for name in tiles.TILES[kernel]}}):
        yield


@dataclass
class Outcome:
    shape: Shape
    current: Tile
    timings: list[tuple[Tile, Timing]]
    """fastest first"""
    failed: dict[str, str]

    @property
    def best(self) -> tuple[Tile, Timing]:
        return self.timings[0]

    @property
    def current_ms(self) -> float:
        return next((t.median for row, t in self.timings if row == self.current), float("nan"))


def tune(kernel: str, row: Tile, device: torch.device, seconds: float, small: bool = False) -> Outcome:
    """Time candidates for one row, the ones most like it first: half of `seconds` to compile and check, half to time."""
    began = time.perf_counter()
    shape = shape_of(kernel, row, small)
    workload = BY_KERNEL[kernel](shape, device)

    def call(candidate: Tile) -> Any:
        with using(kernel, candidate):
            return workload.call()

    expected = flatten(call(row))
    right, failed = [row], {}
    for candidate in sorted(candidates(kernel, row), key=lambda c: _differences(c, row)):
        if candidate == row:
            continue
        if time.perf_counter() - began > seconds / 2:
            failed[describe(candidate)] = "not tried: out of time"
            continue
        try:
            same(flatten(call(candidate)), expected)
            right.append(candidate)
        except Exception as error:
            failed[describe(candidate)] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    calls = {str(i): lambda _, candidate=candidate: call(candidate) for i, candidate in enumerate(right)}
    timings = []
    for candidate, taken in zip(right, interleave(calls, device, seconds / 2).values(), strict=True):
        if isinstance(taken, Exception):
            failed[describe(candidate)] = f"{type(taken).__name__}: {taken}".splitlines()[0][:120]
        else:
            timings.append((candidate, Timing.of(taken)))
    return Outcome(shape, row, sorted(timings, key=lambda pair: pair[1].median), failed)


def _differences(a: Tile, b: Tile) -> int:
    return sum(a.constants[name] != b.constants[name] for name in a.constants) + (a.warps != b.warps) + (a.stages != b.stages)


def flatten(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Up to another order of summation. A selection may differ where that decides, in few of its entries."""
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"another result: shape {list(a.shape)}, not {list(b.shape)}")
        if a.is_floating_point():
            error, size = (a - b).float().norm(), b.float().norm()
            if not error <= 1e-2 * size:
                raise ValueError(f"another result: off by {float(error / size):.2g}")
        elif (a != b).float().mean() > 1e-3:
            raise ValueError("another selection")


def describe(row: Tile) -> str:
    return f"{row.constants} warps {row.warps} stages {row.stages}"


def as_code(row: Tile, why: str) -> str:
    width = "" if row.width == 1 << 30 else f", width={row.width}"
    return f'Tile({row.constants}, warps={row.warps}, stages={row.stages}{width}, why="{why}"),'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Propose tiles for this GPU.")
    parser.add_argument("--kernel", required=True, choices=sorted(BY_KERNEL))
    parser.add_argument("--minutes", type=float, default=5.0, help="in all (default 5)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune needs a GPU: none is visible to torch", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    architecture, today = tiles.architecture(device), datetime.now(UTC).strftime("%Y-%m-%d")
    by_architecture = tiles.TILES[chosen.kernel]
    rows = by_architecture.get(architecture, by_architecture["any"])
    print(f"{chosen.kernel} on {device_name(device)}: rows for TILES[{chosen.kernel!r}][{architecture!r}]")
    for row in rows:
        outcome = tune(chosen.kernel, row, device, chosen.minutes * 60 / len(rows))
        for candidate, timing in outcome.timings[:5]:
            print(f"    # {timing.median:9.4g} ms ({timing.low:.4g} to {timing.high:.4g})  {describe(candidate)}")
        for name, reason in outcome.failed.items():
            print(f"    # {'out':>9}  {name}: {reason}")
        best, timing = outcome.best
        gain = f"{timing.median:.3g} ms, before {outcome.current_ms:.3g}"
        why = f"measured {today} on {device_name(device)}, {outcome.shape}: {gain}"
        print(f"    {as_code(best, why)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
