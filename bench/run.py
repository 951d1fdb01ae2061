"""Measure a plan: check every provider, time those that are right side by side, write each group of rows as it is done."""

import gc
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import table
from .cases import Entry
from .check import Wrong, check
from .measure import (
    PRECISIONS,
    Ceilings,
    Timing,
    cache_bytes,
    ceilings,
    free_memory,
    interleave,
    memory_limit,
    milliseconds,
    peak_memory,
)
from .providers import Job, Provider, Task, Unsupported
from .table import Row

SHARE = 0.8  # of the free memory, that providers may fill together


@dataclass
class Results:
    """What was measured so far; on disk after every group, so that an interruption loses one group at most."""

    environment: dict[str, Any]
    path: Path
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    """the cases of cases.py"""
    pipeline: list[Row] = field(default_factory=list)
    """the works of pipeline/"""
    hosts: list[Row] = field(default_factory=list)
    """the libraries with fastsae.patch and without, of hosts.py"""
    complete: bool = False

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "environment": self.environment,
            "ceilings": self.ceilings and asdict(self.ceilings),
            "complete": self.complete,
            "rows": self.rows,
            "pipeline": self.pipeline,
            "hosts": self.hosts,
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(temporary, self.path)


def run(
    plan: Sequence[Entry], providers: Sequence[Provider], device: torch.device, results: Results, seconds: float, small: bool
) -> None:
    """Fill `results`. `seconds` is how long the rounds of one group last, where three of them take no longer."""
    precisions = list(dict.fromkeys(entry.precision for entry in plan))
    results.ceilings = ceilings(device, precisions, small)
    rates = ", ".join(f"{rate:.3g} TFLOP/s {name}" for name, rate in results.ceilings.gemm_tflops.items())
    print(f"this machine: copies {results.ceilings.copy_gbs:.3g} GB/s, multiplies {rates}\n{table.HEADER}", flush=True)
    results.save()
    checked: dict[tuple, tuple[str, str]] = {}
    narrower: dict[str, Row] = {}  # rows of the sweep over F that ran out of memory: what does not fit is not tried wider
    for entry in plan:
        failed = narrower if entry.sweep == "F" else {}
        tried = [provider for provider in providers if provider.name not in failed]
        rows = measure(entry, tried, device, results.ceilings, seconds, checked)
        for name, row in failed.items():
            rows.append(table.without_time(entry, name, "oom", f"not tried: out of memory at {row['shape']}"))
        if entry.sweep == "F":
            narrower |= {row["provider"]: row for row in rows if row["status"] == "oom" and row["provider"] not in narrower}
        results.rows += rows
        results.save()
        for row in rows:
            # a provider that is not there is said once
            if row["status"] != "skipped" or entry is plan[0]:
                print(table.line(row), flush=True)


def measure(
    entry: Entry, providers: Sequence[Provider], device: torch.device, limits: Ceilings, seconds: float, checked: dict
) -> list[Row]:
    """One row per provider."""
    task = Task(entry.case, entry.shape, entry.precision, device, brief=entry.sweep is not None or entry.shape.name == "smoke")
    rows: dict[str, Row] = {}
    ready: list[Provider] = []
    with precision(task):
        for provider in providers:
            status, reason = _verdict(provider, task, checked)
            if status == "ok":
                ready.append(provider)
            else:
                rows[provider.name] = table.without_time(entry, provider.name, status, reason)
        for name, outcome in _timed(task, ready, seconds, entry.memory_gb).items():
            if isinstance(outcome, Exception):
                status, reason = failure(outcome)
                limited = f"more than {entry.memory_gb:g} GB: " if status == "oom" and entry.memory_gb else ""
                rows[name] = table.without_time(entry, name, status, limited + reason)
            else:
                timing, peak, note = outcome
                ceiling = next(p.ceiling for p in ready if p.name == name)
                rows[name] = table.ok(entry, name, timing, peak, limits, note, ceiling)
    return [rows[provider.name] for provider in providers]


def _verdict(provider: Provider, task: Task, checked: dict) -> tuple[str, str]:
    """Whether a provider may be timed: ("ok", "") or a status with its reason."""
    if reason := provider.missing(task.device):
        return "skipped", reason
    # what a check depends on: not the shape, since it brings its own
    key = (provider.name, task.case.work, task.case.activation, task.precision, task.brief)
    if key not in checked:
        try:
            if not provider.ceiling:
                check(provider, task)
            checked[key] = "ok", ""
        except Wrong as error:
            checked[key] = "wrong", str(error)
        except Exception as error:
            checked[key] = failure(error)
    return checked[key]


def _timed(
    task: Task, providers: Sequence[Provider], seconds: float, memory_gb: float | None
) -> dict[str, Exception | tuple[Timing, int, str]]:
    """By provider: (timing, peak bytes, note), or what it failed with."""
    inputs = task.inputs(_how_many(task))
    outcomes: dict[str, Any] = {}
    jobs: dict[str, Job] = {}
    given: dict[str, list] = {}
    peaks: dict[str, int] = {}
    notes: dict[str, str] = {}
    warm: dict[str, float] = {}
    samples: dict[str, list[float] | Exception] = {}
    limit = SHARE * free_memory(task.device)

    def build(provider: Provider) -> None:
        prepared: list = []

        def prepare(job: Job) -> None:
            prepared.extend(map(job.prepare, inputs))

        def call(job: Job) -> None:
            warm[provider.name] = milliseconds(lambda: job.call(prepared[0]), task.device)

        with grad(task), memory_limit(memory_gb if task.device.type == "cpu" else None):
            if provider.name in peaks:
                job = provider.job(task)
                prepare(job)
            else:
                job, peak = peak_memory(lambda: provider.job(task), call, task.device, prepare)
                if memory_gb and peak > memory_gb * 1e9:  # what the allocator had kept is beyond the limit's reach
                    raise torch.OutOfMemoryError(f"a step needs {peak / 1e9:.3g} GB")
                peaks[provider.name] = peak
        jobs[provider.name], given[provider.name], notes[provider.name] = job, prepared, job.note

    def alone(provider: Provider, seconds: float) -> None:
        taken = _rounds(task, jobs, given, seconds, warm)[provider.name]
        so_far = samples.get(provider.name, [])
        samples[provider.name] = taken if isinstance(taken, Exception) or isinstance(so_far, Exception) else so_far + taken

    def release() -> None:
        jobs.clear()
        given.clear()
        gc.collect()
        free_memory(task.device)

    together = True
    for provider in providers:
        try:
            if together and sum(peaks.values()) + max(peaks.values(), default=0) > limit:
                together = False
                release()
            build(provider)
            if not together and task.brief:
                alone(provider, seconds / 4)
        except Exception as error:
            outcomes[provider.name] = error.with_traceback(None)
            jobs.pop(provider.name, None)
        if not together:
            release()
    if together:
        samples = _rounds(task, jobs, given, seconds, warm)
    else:
        # too large to stand side by side: each alone, there and back again, so that a steady drift still cancels; in a sweep
        # once, where building them again would take longer than measuring
        built = [provider for provider in providers if provider.name in peaks]
        left = [provider for provider in built if provider.name not in samples]
        for provider in left if task.brief else [*built, *reversed(built)]:
            try:
                build(provider)
                alone(provider, seconds / (4 if task.brief else 2))
            except Exception as error:
                samples[provider.name] = error.with_traceback(None)
            release()
    for name, taken in samples.items():
        outcomes[name] = taken if isinstance(taken, Exception) else (Timing.of(taken), peaks[name], notes[name])
    return outcomes


def _rounds(
    task: Task, jobs: dict[str, Job], given: dict[str, list], seconds: float, warm: dict[str, float]
) -> dict[str, list[float] | Exception]:
    def caller(name: str) -> Callable[[int], object]:
        job, inputs = jobs[name], given[name]
        return lambda turn: job.call(inputs[turn % len(inputs)])

    with grad(task):
        return interleave({name: caller(name) for name in jobs}, task.device, seconds, warm=warm)


def _how_many(task: Task) -> int:
    """Enough inputs to rotate through more than the last cache, within a gigabyte."""
    size = max(1, task.input_bytes())
    return max(1, min(128, 2 + cache_bytes(task.device) // size, (1 << 30) // size))


def failure(error: Exception) -> tuple[str, str]:
    if isinstance(error, Unsupported):
        return "skipped", str(error)
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    return ("oom" if out_of_memory else "error"), text.replace(str(Path.cwd()), ".")


def failed(error: Exception) -> Row:
    """The same, for a row."""
    status, reason = failure(error)
    return {"status": status, "reason": reason}


def grad(task: Task):
    return torch.set_grad_enabled(task.case.trains)


@contextmanager
def precision(task: Task):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[task.precision][1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peers say is theirs
            yield
    finally:
        torch.set_float32_matmul_precision(before)
