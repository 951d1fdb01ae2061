"""tests/hosts runs in the environment of the libraries that fastsae replaces; this starts it there."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


FILES = sorted(path.name for path in (ROOT / "tests" / "hosts").glob("test_*.py"))
PARTS = 4  # so that workers share them; more would import the libraries more often


@pytest.mark.hosts
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_hosts(part):
    python = ROOT / ".venv-hosts" / "bin" / "python"
    assert python.exists(), "no .venv-hosts: run `make .venv-hosts`"
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "SPARSIFY_DISABLE_TRITON": "1"}
    # neither the triton interpreter nor pytest-xdist's settings of this process
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH") and "PYTEST" not in k}
    done = subprocess.run(
        [python, "-m", "pytest", *(f"tests/hosts/{name}" for name in FILES[part::PARTS]), "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=clean | offline, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
