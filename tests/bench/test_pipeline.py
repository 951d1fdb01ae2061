"""What stands around training: who is refused and who is skipped, and what the report makes of the rows."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import patched, pipeline, report
from bench.cases import CPU_MEMORY_GB, STEP, Entry, Shape, plan
from bench.measure import memory_limit
from bench.pipeline import Work, files, measure, shards
from bench.pipeline.batches import BUFFER, DRAWS
from bench.providers import Job, Task
from bench.providers.dense import Dense
from bench.run import Results, run
from fastsae import embedded

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def spoiled(work: Work, name: str, spoil) -> Work:
    """The work with one provider whose outcome is changed."""

    def prepare(device, tiny, folder):
        prepared = work.prepare(device, tiny, folder)

        def way():
            flow = prepared.ways[name]()
            return replace(flow, observe=lambda: spoil(flow.observe()))

        return replace(prepared, ways={name: prepared.ways[name], "spoiled": way})

    return replace(work, prepare=prepare)


def off_by_one(batches):
    batches[3][5, 7] += 1
    return batches


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (off_by_one, "not what was written"),
        (lambda batches: batches[:-1], "8 batches"),
        (lambda batches: [b.half() for b in batches], "float16"),
        (lambda batches: [batches[0]] * DRAWS, "again and again"),
    ],
)
def test_wrong_rows_get_no_time(tmp_path, spoil, reason):
    right, wrong = measure(spoiled(shards.WORK, "fastsae", spoil), None, CPU, 0.0, True, tmp_path)
    assert right["status"] == "ok" and right["units_per_s"] > 0
    assert wrong["status"] == "wrong" and reason in wrong["reason"] and "median" not in wrong


@pytest.mark.parametrize("work", files.WORKS, ids=lambda work: work.name)
def test_wrong_weights_get_no_time(tmp_path, work):
    spoil = lambda found: found | {"b_enc": found["b_enc"] + 1}  # noqa: E731
    rows = measure(spoiled(work, "safetensors alone", spoil), None, CPU, 0.0, True, tmp_path)
    assert [row["status"] for row in rows] == ["ok", "wrong"] and "b_enc" in rows[1]["reason"]


@pytest.mark.parametrize("work", [shards.WORK, *files.WORKS], ids=lambda work: work.name)
def test_without_optional_packages_the_rest_is_measured(tmp_path, monkeypatch, work):
    """As on a machine with torch, numpy and safetensors only."""
    for name in ("datasets", "sae_lens", "dictionary_learning", "sparsify"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = {row["provider"]: row for row in measure(work, None, CPU, 0.0, True, tmp_path)}
    assert rows["fastsae"]["status"] == rows["safetensors alone"]["status"] == "ok"
    for name in ("sae-lens", "dictionary-learning", "sparsify"):
        assert rows[name]["status"] == "skipped" and rows[name]["reason"]


def test_without_transformers_activations_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = measure(pipeline.chosen(["activations"], smoke=True)[0], None, CPU, 0.0, True, tmp_path)
    assert {row["status"] for row in rows} == {"skipped"}
    assert "transformers" in rows[0]["reason"]


def test_activations_are_said_to_be_of_the_model_that_gives_them(tmp_path):
    pytest.importorskip("transformers")
    (row,) = measure(pipeline.chosen(["activations"], smoke=True)[0], ["fastsae"], CPU, 0.0, True, tmp_path)
    model = json.loads((embedded.path() / "config.json").read_text())
    assert f"{model['n_layer']} layers, width {model['n_embd']}, " in row["what"]
    assert row["gbs"] == pytest.approx(row["units_per_s"] * model["n_embd"] * 4 / 1e9, rel=1e-3)


def test_a_call_is_whole_cycles_of_every_buffer():
    """SAELens serves half of a buffer; dictionary_learning refills one batch short when less than half is left."""
    assert (BUFFER - BUFFER // 2) % DRAWS == 0
    left = BUFFER - 1
    draws = 0
    while left >= (BUFFER - 1) / 2:
        left, draws = left - 1, draws + 1
    assert draws == DRAWS


@pytest.mark.hosts
def test_the_libraries_give_what_they_should(tmp_path):
    """All that have such a thing pass the check of every work, the activations of the shipped model among them."""
    interpreter = ROOT / ".venv-hosts" / "bin" / "python"
    assert interpreter.exists(), "no .venv-hosts: run `make .venv-hosts`"
    out = tmp_path / "works.json"
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [interpreter, "-W", "ignore", "-m", "bench", "--smoke", "--only", "pipeline", "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {(row["case"], row["provider"]) for row in json.loads(out.read_text())["pipeline"] if row["status"] != "ok"}
    assert skipped == {("activations/shipped", "sparsify"), ("shards", "sparsify"), ("shards", "dictionary-learning")}


# ------------------------------------------------------------------------------------------------- until memory runs out


def test_the_limit_is_the_process_own_and_ends():
    with memory_limit(0.25):
        torch.empty(40 << 20).zero_()
        with pytest.raises(RuntimeError, match="allocate memory"):
            torch.empty(100 << 20)
    torch.empty(100 << 20)


class Hungry(Dense):
    name = "hungry"
    tried: list[int]

    def job(self, task: Task) -> Job:
        self.tried.append(task.shape.F)
        job = super().job(task)
        if task.shape.F >= 4096:
            torch.empty(100 << 20)
        return job


def test_a_sweep_goes_on_without_those_that_ran_out_of_memory(tmp_path):
    entries = [Entry(STEP, Shape(f"F={F}", 8, 16, F, 4), "fp32", "F", 0.25) for F in (1024, 4096, 8192)]
    hungry, results = Hungry(), Results({}, tmp_path / "out.json")
    hungry.tried = []
    run(entries, [Dense(), hungry], CPU, results, 0.0, small=True)
    status = {(row["F"], row["provider"]): row["status"] for row in results.rows}
    assert [status[F, "hungry"] for F in (1024, 4096, 8192)] == ["ok", "oom", "oom"] and 8192 not in hungry.tried
    assert [status[F, "dense torch"] for F in (1024, 4096, 8192)] == ["ok"] * 3
    assert "more than 0.25 GB" in next(r["reason"] for r in results.rows if r["status"] == "oom")


def test_the_cpu_sweep_over_F_is_limited_and_the_others_are_not():
    limits = {entry.sweep: entry.memory_gb for entry in plan("cpu")}
    assert limits["F"] == CPU_MEMORY_GB and {limits[letter] for letter in "NkD"} == {None}
    assert {entry.memory_gb for entry in plan("cuda")} == {None}


# ------------------------------------------------------------------------------------------------------- patched libraries


class Sleeper:
    """A library of one call, which patching makes do less."""

    held = 0
    patched = False

    def call(self, turn: int) -> object:
        return sum(range(1000 if self.patched else 200_000))


def test_patched_and_unpatched_are_paired_and_put_back(monkeypatch):
    monkeypatch.setattr(patched.drop_in, "patch", lambda _: setattr(Sleeper, "patched", True))
    monkeypatch.setattr(patched.drop_in, "unpatch", lambda _: setattr(Sleeper, "patched", False))
    row = patched.measure("sae_lens", lambda device: Sleeper(), CPU, 0.0)
    assert row["status"] == "ok" and row["times"] > 5 and row["stock_ms"] > row["patched_ms"]
    assert not Sleeper.patched


def test_a_missing_library_is_a_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    rows = [row for row in patched.run(CPU, 0.0) if row["host"] == "sae_lens"]
    assert rows and all(row["status"] == "skipped" and "sae_lens" in row["reason"] for row in rows)


# ------------------------------------------------------------------------------------------------------------------ pages


def test_the_report_says_rates_and_ratios():
    row = {"case": "load", "what": "an SAE", "unit": "bytes", "status": "ok", "ceiling": False, "note": "", "gbs": 2.0}
    rows = [
        row | {"provider": "fastsae", "median": 2.0, "units_per_s": 1.0},
        row | {"provider": "sae-lens", "median": 1.0, "units_per_s": 2.0},
        {"case": "load", "what": "an SAE", "unit": "bytes", "provider": "sparsify", "status": "skipped", "reason": "not here"},
    ]
    assert "| sae-lens |  | 2 | 0.50 |  |" in report.pipeline(rows) and "skipped: not here" in report.pipeline(rows)
    assert "load: sae-lens takes 0.50 of its time: its weights stay" in report.behind(rows)
    host = {
        "host": "sae_lens", "case": "step", "what": "a step", "status": "ok", "stock_ms": 9.0, "patched_ms": 3.0, "times": 3.0,
        "times_low": 2.9, "times_high": 3.1, "stock_mb": 100.0, "patched_mb": 10.0,
    }  # fmt: skip
    assert "| sae_lens | a step | 9 | 3 | 3.00 (2.90 to 3.10) | 100 | 10 |" in report.hosts([host])
