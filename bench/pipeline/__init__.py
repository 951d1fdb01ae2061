"""What stands around training, by provider: a language model's activations, shards on disk, saving and loading.

Each work is another module of this package. It is checked, then timed in the same interleaved rounds as everything else; rows
say how many units a second come out.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..check import Wrong
from ..measure import Timing, interleave, milliseconds
from ..run import failed
from ..table import Row, rounded
from . import activations, files, shards
from .work import Flow, Prepared, Work

WORKS: tuple[Work, ...] = (*activations.WORKS, shards.WORK, *files.WORKS)
PROVIDERS = ("fastsae TransformerLens", "fastsae SAELens cache", "forward pass alone", "safetensors alone")
"""Those beside the ones of bench/providers."""


def chosen(names: Sequence[str] | None, smoke: bool) -> list[Work]:
    """The works that begin with one of the names."""
    works = [work for work in WORKS if work.smoke or not smoke]
    return [work for work in works if names is None or any(work.name.startswith(name) for name in names)]


def run(
    works: Sequence[Work], only: Sequence[str] | None, device: torch.device, seconds: float, tiny: bool
) -> Iterator[list[Row]]:
    """The rows of each work; `only` are the providers wanted, if not all."""
    for work in works:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            yield measure(work, only, device, seconds, tiny, Path(folder))


def measure(
    work: Work, only: Sequence[str] | None, device: torch.device, seconds: float, tiny: bool, folder: Path
) -> list[Row]:
    """One row per provider."""
    prepared = work.prepare(device, tiny, folder)
    wanted = [name for name in prepared.ways if only is None or name in only]
    same = {"case": work.name, "what": prepared.said, "tiny": tiny, "unit": work.unit}
    rows: dict[str, Row] = {}
    flows: dict[str, Flow] = {}
    warm: dict[str, float] = {}
    for name in wanted:
        try:
            flows[name], warm[name] = _checked(prepared, name, device)
        except Wrong as error:
            rows[name] = {"status": "wrong", "reason": str(error)}
        except ImportError as error:
            rows[name] = {"status": "skipped", "reason": f"not importable: {error}"}
        except Exception as error:
            rows[name] = failed(error)
    calls = {name: lambda _, flow=flow: flow.call() for name, flow in flows.items()}
    for name, taken in interleave(calls, device, seconds, warm=warm).items():
        if isinstance(taken, Exception):
            rows[name] = failed(taken)
        else:
            rows[name] = _ok(prepared, flows[name], Timing.of(taken))
    return [same | {"provider": name} | rows[name] for name in wanted]


def _checked(prepared: Prepared, name: str, device: torch.device) -> tuple[Flow, float]:
    """The flow, and the milliseconds of its first call."""
    with contextlib.redirect_stdout(io.StringIO()):  # TransformerLens says where it moves a model
        flow = prepared.ways[name]()
        outcomes: list[Any] = []
        ms = milliseconds(lambda: outcomes.append(flow.observe()), device)
        prepared.check(outcomes[0])
    return flow, ms


def _ok(prepared: Prepared, flow: Flow, timing: Timing) -> Row:
    numbers = {
        "median": timing.median,
        "low": timing.low,
        "high": timing.high,
        "units_per_s": prepared.amount / timing.median * 1e3,
        "gbs": prepared.bytes / timing.median / 1e6,
    }
    return {"status": "ok", "ceiling": flow.ceiling, "note": flow.note, "rounds": timing.rounds} | rounded(numbers)


def line(row: Row) -> str:
    start = f"{row['case']:<22}{row['provider']:<26}"
    if row["status"] != "ok":
        return f"{start}{row['status']}: {row['reason']}"
    rate = f"{row['units_per_s']:.4g} {row['unit']}/s" if row["unit"] != "bytes" else ""
    return f"{start}{rate:>20} {row['gbs']:>10.3g} GB/s"
