"""tests/hosts runs in the environment of the libraries that fastsae replaces; this starts it there."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.hosts
def test_hosts():
    python = ROOT / ".venv-hosts" / "bin" / "python"
    assert python.exists(), "no .venv-hosts: run `make .venv-hosts`"
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "SPARSIFY_DISABLE_TRITON": "1"}
    # neither the triton interpreter nor pytest-xdist's settings of this process
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH") and "PYTEST" not in k}
    done = subprocess.run(
        [python, "-m", "pytest", "tests/hosts", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=clean | offline, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
