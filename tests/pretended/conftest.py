"""Tests on a pretended GPU (tests/pretend_gpu.py). test_pretended.py runs them, in a process of their own."""

from functools import partial

import pytest
from pretend_gpu import pretend_gpu


@pytest.fixture
def gpu(monkeypatch):
    """`with gpu() as waits:` there is one; `waits` counts what the host waited for."""
    return partial(pretend_gpu, monkeypatch)
