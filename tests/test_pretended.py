"""tests/pretended and the kernel tests on a pretended GPU, in processes that pretend one from their start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and no need to pretend one")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "tests",
    # without what takes longest: test_properties, ties, chunking
    [["tests/pretended"], ["tests/kernels", "-k", "triton and not (ties or chunking)"]],
    ids=lambda tests: tests[0],
)
def test_pretended(tests):
    if tests[0] == "tests/kernels" and int(os.environ.get("FASTSAE_EXAMPLES", "25")) < 200:
        pytest.skip("with the counts of .ci/run: make test has run these tests without a pretended GPU")
    environment = {k: v for k, v in os.environ.items() if "PYTEST" not in k} | {"FASTSAE_PRETEND_GPU": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
