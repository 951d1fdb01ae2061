"""The one command for a GPU machine, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would measure for nine minutes")


def gpu_sh(*arguments: str | Path, **more: str) -> str:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | more
    command = ["bash", "bench/gpu.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    assert "no GPU is visible to torch" in gpu_sh(tmp_path)
    assert "no GPU" in (tmp_path / "gpu-status.txt").read_text()


def test_nothing_begins_after_its_time(tmp_path):
    said = gpu_sh(tmp_path, "--dry-run", GPU_MINUTES="0")
    assert said.count("not started, out of time") >= 4


def test_dry_run_goes_through_every_part(tmp_path):
    said = gpu_sh(tmp_path, "--dry-run", FASTSAE_COMMIT="abc")
    status = (tmp_path / "gpu-status.txt").read_text()
    assert status in said and status.startswith("commit abc,")
    parts = dict(line.split(": ", 1) for line in status.splitlines()[1:])
    assert set(parts) == {"kernel tests", "ceilings and questions", "peers", "small shapes"}
    assert all(outcome.startswith("ok, ") for outcome in parts.values()), status
    files = sorted(tmp_path.iterdir())
    assert len(files) <= 6 and all(file.is_file() for file in files), files
    answers = json.loads((tmp_path / "gpu-questions.json").read_text())
    assert answers["tiny"] and not [a for a in answers["answers"].values() if "failed" in a or "not asked" in a], answers
    assert "passed" in (tmp_path / "gpu-tests.txt").read_text()
