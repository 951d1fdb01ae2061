"""Run as a process of its own by test_checkpoint.py: what must not happen to the process that runs the tests.

`crash_worker.py kill RUN TIMES SEED` saves in a tight loop in a child and kills it at random moments;
`crash_worker.py full RUN` lets writes fail at every size of a file, by the kernel's limit.
"""

import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fastsae.checkpoint import CheckpointError, checkpoints, newest, run_lock, verify, write_checkpoint
from fastsae.state_files import load_tree, save_tree

warnings.simplefilter("error")  # newest() warns when it passes over a checkpoint: none may ever need that


def save(step: int, size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file({"W": torch.full([size], step)}, folder / "sae_weights.safetensors")  # by Rust: 0600, and not flushed
        save_tree(folder, "optimizer", {"step": step, "moments": [torch.full([size], step), torch.full([size], -step)]})
        (folder / "extra").mkdir()
        save_tree(folder / "extra", "counters", {"step": step})

    return write


def step_of(folder: Path) -> int:
    """The one step that all parts of the checkpoint agree on."""
    optimizer, counters = load_tree(folder, "optimizer"), load_tree(folder / "extra", "counters")
    parts = [optimizer["step"], counters["step"], *optimizer["moments"][0].tolist(), *(-optimizer["moments"][1]).tolist()]
    assert len(set(parts)) == 1, f"{folder} mixes the steps {sorted(set(parts))}"
    assert folder.name == f"step-{parts[0]:06d}"
    return parts[0]


def kill(run: Path, times: int, seed: int) -> None:
    moments = np.random.default_rng(seed)
    step = cut = 0
    for _ in range(times):
        child = os.fork()
        if child == 0:
            with run_lock(run):
                for later in range(step + 1, 10**6):
                    write_checkpoint(run, later, save(later, 50_000), keep=2)
        while not checkpoint_after(run, step):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut += any(run.glob(".tmp-*"))
        for folder in checkpoints(run):
            verify(folder)  # what is being pruned is whole, or gone
        assert (folder := newest(run)) is not None
        step, before = step_of(folder), step
        assert step > before
    with run_lock(run):
        assert not any(run.glob(".tmp-*"))
    print(f"{times} kills, {cut} of them within a save; {step} saves")


def checkpoint_after(run: Path, step: int) -> bool:
    return any(int(path.name[5:]) > step for path in run.glob("step-*"))


def full(run: Path) -> None:
    with run_lock(run):
        write_checkpoint(run, 1, save(1, 100))
        largest = max(path.stat().st_size for path in (run / "step-000001").rglob("*"))
        failures = 0
        for limit in range(0, largest + 40, 37):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                write_checkpoint(run, 2 + limit, save(2 + limit, 100))
                expected = 2 + limit
            except CheckpointError as error:
                failures += 1
                expected = 1
                assert all(part in str(error) for part in (f"step-{2 + limit:06d}", "needs at least 0.0", "were free")), error
                assert "File too large" in str(error), error
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            folder = newest(run)
            assert folder is not None and step_of(folder) == expected
            assert sorted(path.name for path in run.iterdir()) == sorted({".lock", "step-000001", folder.name})
            if expected > 1:
                break
    print(f"{failures} full disks, then a save")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        full(Path(sys.argv[2]))
