"""One row of results as JSON, as a line of text, and in Markdown."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .cases import Case, Entry, phases
from .measure import PRECISIONS, Ceilings, Timing

Row = dict[str, Any]


def identity(entry: Entry, provider: str) -> Row:
    shape = entry.shape
    return {
        "case": entry.case.name, "shape": shape.name, "precision": entry.precision, "sweep": entry.sweep,
        "N": shape.N, "D": shape.D, "F": shape.F, "k": shape.k, "provider": provider,
        "memory_gb": entry.memory_gb,
    }  # fmt: skip


def ok(
    entry: Entry, provider: str, timing: Timing, peak: int, ceilings: Ceilings, note: str = "", ceiling: bool = False
) -> Row:
    element = PRECISIONS[entry.precision][0].itemsize
    # a ceiling is a GEMM, whatever case it stands in
    costs = phases(Case("encode", "") if ceiling else entry.case, entry.shape, element)
    floor = ceilings.floor_ms(costs, entry.precision)
    flops, moved = (sum(cost[i] for cost in costs) for i in (0, 1))
    numbers = {
        "floor_ms": floor,
        "percent_of_floor": 100 * floor / timing.median,
        "rows_per_s": entry.shape.N / timing.median * 1e3,
        "tflops": flops / timing.median / 1e9,
        "gbs": moved / timing.median / 1e6,
        "peak_mb": peak / 1e6,
    }
    row = identity(entry, provider) | {"status": "ok", "ceiling": ceiling, "note": note}
    return row | rounded(asdict(timing) | numbers) | {"rounds": timing.rounds}


def rounded(numbers: Mapping[str, float]) -> Row:
    """Five digits are more than any measurement here has."""
    return {name: float(f"{value:.5g}") for name, value in numbers.items()}


def without_time(entry: Entry, provider: str, status: str, reason: str) -> Row:
    """Statuses: skipped, error, oom, wrong."""
    return identity(entry, provider) | {"status": status, "reason": reason}


HEADER = f"{'case':<22}{'shape':>8} {'':4} {'provider':<31}{'median ms':>10}  {'quartiles':<17}{'of floor':>9}{'peak MB':>9}"


def line(row: Row) -> str:
    start = f"{row['case']:<22}{row['shape']:>8} {row['precision']} {row['provider']:<31}"
    if row["status"] != "ok":
        return f"{start}{row['status']}: {row['reason']}"
    quartiles = f"{row['low']:.4g} to {row['high']:.4g}"
    return f"{start}{row['median']:>10.4g}  {quartiles:<17}{row['percent_of_floor']:>8.0f}%{row['peak_mb']:>9.0f}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
