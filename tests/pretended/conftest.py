"""Tests on a pretended GPU (tests/pretend_gpu.py). test_pretended.py runs them, in a process of their own."""

import os
from functools import partial

import pytest

if os.environ.get("FASTSAE_PRETEND_GPU") == "1":
    import pretend_gpu

    pretend_gpu.register()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def gpu(monkeypatch):
    """`with gpu() as waits:` there is one; `waits` counts what the host waited for."""
    return partial(pretend_gpu.pretend_gpu, monkeypatch)
