"""The comparison itself: who is refused, who is skipped, what an interruption leaves, and what the report makes of it."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import base, questions, report, tune
from bench.__main__ import main
from bench.cases import CHECKED, Case, Entry, Shape, phases, plan
from bench.measure import Ceilings, Timing, peak_memory
from bench.providers import PROVIDERS, Job, Provider, SAELens, Task, Unsupported
from bench.providers.dense import Dense, dense_job, dense_sae
from bench.run import Results, measure, run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Shape("tiny", 16, 16, 128, 4)
LIMITS = Ceilings(10.0, {"fp32": 0.1})


def rows(case: Case, *providers: Provider, shape: Shape = TINY) -> list[dict]:
    return measure(Entry(case, shape, "fp32"), providers, CPU, LIMITS, 0.0, {})


# ---------------------------------------------------------------------------------------------------- who gets a time


class Forgetful(Dense):
    """Drops the gradient of one parameter."""

    def __init__(self, parameter: str):
        self.parameter, self.name = parameter, f"forgets {parameter}"

    def job(self, task: Task) -> Job:
        sae = dense_sae(task)
        getattr(sae, self.parameter).register_hook(torch.zeros_like)
        return dense_job(sae, task)


@pytest.mark.parametrize("work", ["loss", "step"])
@pytest.mark.parametrize("parameter", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_dropped_gradient_is_refused(work, parameter):
    right, wrong = rows(Case(work, "TopK"), Dense(), Forgetful(parameter))
    assert right["status"] == "ok" and right["median"] > 0
    assert wrong["status"] == "wrong" and f"d{parameter}" in wrong["reason"]
    assert "median" not in wrong


class Rounded(Dense):
    """Answers in bf16 where fp32 was asked for: every number is nearly right."""

    name = "rounded"

    def job(self, task: Task) -> Job:
        job = super().job(task)
        observe = job.observe
        job.observe = lambda x: {name: t.bfloat16().float() for name, t in observe(x).items()}
        return job


@pytest.mark.parametrize("work", ["encode", "decode", "forward", "loss"])
def test_lower_precision_is_refused(work):
    right, wrong = rows(Case(work, "TopK"), Dense(), Rounded())
    assert (right["status"], wrong["status"]) == ("ok", "wrong"), (right, wrong)


@pytest.mark.parametrize("case", list(dict.fromkeys(e.case for e in plan("cpu", smoke=True))), ids=lambda case: case.name)
def test_ours_is_right(case):
    """Every way of using fastsae that runs here passes the check that it is timed behind."""
    for row in rows(case, *(p for p in PROVIDERS if p.name.startswith("fastsae"))):
        assert row["status"] in ("ok", "skipped"), row


class Broken(Dense):
    def __init__(self, name: str, error: Exception):
        self.name, self.error = name, error

    def job(self, task: Task) -> Job:
        job = super().job(task)
        if task.shape != CHECKED:

            def call(x):
                raise self.error

            job.call = call
        return job


def test_failures_are_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # importing it raises ModuleNotFoundError
    failing = [
        SAELens(),
        Broken("raises", RuntimeError("it broke\nin two lines")),
        Broken("memory", torch.OutOfMemoryError("CUDA out of memory")),
        Broken("has none", Unsupported("has no TopK")),
    ]
    missing, raised, memory, none, dense = rows(Case("loss", "TopK"), *failing, Dense())
    assert missing["status"] == "skipped" and "sae_lens" in missing["reason"]
    assert (raised["status"], raised["reason"]) == ("error", "RuntimeError: it broke")
    assert memory["status"] == "oom"
    assert (none["status"], none["reason"]) == ("skipped", "has no TopK")
    assert dense["status"] == "ok"


class Interrupted(Dense):
    """The user presses Ctrl-C in the second group."""

    name = "interrupted"

    def job(self, task: Task) -> Job:
        if task.case.work == "decode":
            raise KeyboardInterrupt
        return super().job(task)


def test_an_interruption_keeps_what_was_measured(tmp_path):
    entries = [Entry(Case(work, "TopK"), TINY, "fp32") for work in ("encode", "decode", "forward")]
    results = Results({"device": "test"}, tmp_path / "out.json")
    with pytest.raises(KeyboardInterrupt):
        run(entries, [Interrupted()], CPU, results, 0.0, small=True)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["case"] for row in saved["rows"]] == ["encode/TopK"] and saved["complete"] is False
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


# ------------------------------------------------------------------------------------------------------- measurements


def test_peak_memory_counts_what_is_alive():
    made, peak = peak_memory(lambda: torch.zeros(1 << 20), lambda kept: (kept + 1).sum(), CPU)
    assert made.shape == (1 << 20,)
    assert 8 << 20 <= peak < 9 << 20  # what was built, and one temporary of its size


def test_quartiles():
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_floor_is_the_gemm_and_adams_traffic():
    """At R on an H100: 22.0 ms and 17.2 ms, and gathers that do not add a tenth."""
    shape = Shape("R", 8192, 4096, 262_144, 64)
    floor = Ceilings(3000.0, {"bf16": 798.0}).floor_ms(phases(Case("step", "TopK"), shape, 2), "bf16")
    assert 22.0 + 17.1 < floor < 43


# ------------------------------------------------------------------------------------------------------------- a run


def test_smoke_without_a_network(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = tmp_path / "smoke.json"
    assert main(["--smoke", "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["complete"] and saved["environment"]["commit"]
    statuses = {row["provider"]: set() for row in saved["rows"]}
    for row in saved["rows"]:
        statuses[row["provider"]].add(row["status"])
    assert "ok" in statuses["fastsae"] and "ok" in statuses["dense torch"]
    assert statuses["torch.compile"] == {"skipped"}
    assert "fastsae" in capsys.readouterr().out


@pytest.mark.hosts
def test_peers_are_right(tmp_path):
    """All three libraries pass the check in every case that they have."""
    interpreter = ROOT / ".venv-hosts" / "bin" / "python"
    assert interpreter.exists(), "no .venv-hosts: run `make .venv-hosts`"
    out = tmp_path / "peers.json"
    peers = ["sae-lens", "dictionary-learning", "sparsify"]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [interpreter, "-m", "bench", "--smoke", "--only", *peers, "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in peers:
        found = {row["case"]: row["status"] for row in json.loads(out.read_text())["rows"] if row["provider"] == name}
        assert found["step/TopK"] == found["loss/TopK"] == found["encode/TopK"] == found["decode/TopK"] == "ok", found


def test_base_is_refused_while_the_kernels_are_red(monkeypatch, capsys):
    monkeypatch.setattr(base, "tests_are_green", lambda device: False)
    assert base.compare("HEAD", plan("cpu", smoke=True), CPU, 0.0) == 2
    assert "refused" in capsys.readouterr().err


def test_a_worker_of_base_checks_before_it_times(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with base.worker(ROOT) as worker:
        worker.ask(prepare=base._as_json(Entry(Case("step", "TopK"), TINY, "fp32")))
        assert worker.ask(time=0)["ms"] > 0
        with pytest.raises(RuntimeError, match="k=256 exceeds"):
            worker.ask(prepare=base._as_json(Entry(Case("encode", "TopK"), replace(TINY, k=256), "fp32")))
        assert worker.ask(prepare=base._as_json(Entry(Case("encode", "TopK"), TINY, "fp32")))["ready"]


def test_unknown_names_are_told():
    with pytest.raises(SystemExit):
        main(["--only", "nobody"])
    with pytest.raises(SystemExit):
        main(["--cases", "nothing"])


# ------------------------------------------------------------------------------------------------------------- pages


def results(tmp_path: Path) -> Path:
    """Two groups and a sweep, as a run would have saved them."""
    environment = {
        "device": "CPU Test, 2 threads", "driver": None, "platform": "Linux", "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef", "dirty": False, "command": "python -m bench", "date": "2026-11-21 10:00 UTC",
    }  # fmt: skip
    timed = {"low": 1.0, "high": 3.0, "rounds": 9, "percent_of_floor": 50.0, "tflops": 0.1, "gbs": 5.0, "peak_mb": 100.0}
    shape = {"N": 1024, "D": 768, "F": 24_576, "k": 32, "precision": "fp32", "note": "", "ceiling": False}

    def row(case, provider, median, sweep=None, **more):
        of = {"case": case, "provider": provider, "shape": "F=1" if sweep else "C", "sweep": sweep}
        return shape | timed | of | {"median": median, "status": "ok"} | more

    found = [
        row("step/TopK", "fastsae", 2.0),
        row("step/TopK", "sae-lens", 9.0),
        row("step/TopK", "sparsify", 1.5),
        row("step/TopK", "torch.compile", 0, status="skipped", reason="no compiler"),
        row("encode/TopK", "fastsae", 2.0),
        row("encode/TopK", "sae-lens", 0, status="oom", reason="too much"),
        row("step/TopK", "fastsae", 2.0, "F"),
        row("step/TopK", "sae-lens", 4.0, "F"),
    ]
    ceilings = {"copy_gbs": 20.0, "gemm_tflops": {"fp32": 0.3}}
    body = {"environment": environment, "ceilings": ceilings, "complete": True, "rows": found}
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cpu.json").write_text(json.dumps(body))
    tiny = {"environment": environment, "tiny": True, "answers": {"cublas": {"ms": 1.0}}}
    (folder / "gpu-questions.json").write_text(json.dumps(tiny))
    return folder


def test_report_is_generated_and_only_between_the_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    begin, end = report.MARKERS
    (tmp_path / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["--results", str(results(tmp_path)), "--root", str(tmp_path), "--no-charts"]
    written = [tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md", tmp_path / "docs" / "gpu.md"]
    assert report.main(arguments) == 0
    first = [path.read_text() for path in written]
    assert report.main(arguments) == 0
    assert [path.read_text() for path in written] == first

    readme, benchmarks, gpu = first
    assert readme.startswith(f"before\n{begin}\n") and readme.endswith(f"\n{end}\nafter\n") and "old" not in readme
    assert "| sae-lens | 9 | 4.50 | 100 |" in readme and "not yet measured" in readme
    assert report.NO_GPU in benchmarks and "sparsify takes 0.75 of its time" in benchmarks
    assert "oom: too much" in benchmarks and "torch.compile: no compiler" in benchmarks
    assert gpu.count("not yet measured") == len(questions.QUESTIONS)  # what was tried at tiny sizes answers nothing


def test_gpu_page_is_the_generated_one():
    _, answers = report.load(ROOT / "bench" / "results")
    assert (ROOT / "docs" / "gpu.md").read_text() == questions.page(answers), "run python -m bench.report"


def test_tune_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--kernel", "latent"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", sorted(tune.BY_KERNEL))
def test_tune_ranks_candidates_with_the_row_that_ships(kernel):
    row = tune.tiles.tile(kernel, CPU, 512)
    outcome = tune.tune(kernel, row, CPU, 0.1, small=True)
    assert any(candidate == row for candidate, _ in outcome.timings)
    medians = [timing.median for _, timing in outcome.timings]
    assert medians == sorted(medians)
    assert eval(tune.as_code(*outcome.best[:1], "why").rstrip(","), {"Tile": tune.Tile}).why == "why"  # noqa: S307
