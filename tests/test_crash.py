"""A training run in a process of its own, killed and stopped at random moments: it ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae.checkpoint import newest
from fastsae.config import DataConfig, OptimConfig, SAEConfig, TrainConfig
from fastsae.settings import to_dict
from fastsae.state_files import load_tree
from fastsae.trainer import train

EXAMPLES = int(os.environ.get("FASTSAE_EXAMPLES", "25"))
KILLS = {25: 3, 200: 10}.get(EXAMPLES, max(3, EXAMPLES // 20))
STOPS = max(2, EXAMPLES // 25) if EXAMPLES < 1000 else 50

CONFIG = TrainConfig(
    sae=SAEConfig(activation="batchtopk", k=3, d_sae=64, normalize="expected_average_only_in"),
    optim=OptimConfig(lr=1e-2),
    data=DataConfig(source="synthetic", features=32, d_in=16, active=3, buffer=2048),
    tokens=600 * 32,
    batch_size=32,
    log_every=10,
    save_every=2,  # most of the time is spent in saving
)
# says when it begins; exits as the command line does
WORKER = """
import json, sys
print("begun", flush=True)
from fastsae.config import TrainConfig
from fastsae.interrupt import Interrupted, exit_code
from fastsae.settings import from_dict
from fastsae.trainer import train
print("imported", flush=True)
try:
    train(from_dict(json.loads(sys.argv[1]), TrainConfig), quiet=True)
except Interrupted as stop:
    sys.exit(exit_code(stop.signum))
"""


def start(out: Path) -> subprocess.Popen:
    config = to_dict(CONFIG) | {"out": str(out)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    while b"imported" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read().decode()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The final state and how long a run takes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    begun = time.perf_counter()
    process = start(out)
    assert process.wait(timeout=280) == 0, process.stderr.read().decode()
    return load_tree(out / f"step-{CONFIG.steps:06d}", "training"), time.perf_counter() - begun


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.timeout(900)
def test_kill_9_at_random_moments(undisturbed, tmp_path):
    """Whenever it comes, saves included, what is on the disk verifies; and the run ends with the same bits."""
    expected, seconds = undisturbed
    chance = np.random.default_rng(0)
    for _ in range(KILLS):
        process = start(tmp_path)
        time.sleep(chance.uniform(0, seconds / max(KILLS, 4)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = newest(tmp_path)
        if found is not None and load_tree(found, "run")["members"]:
            assert load_tree(found, "training")["weights"]["sae"]["W_dec"].isfinite().all()
    process = start(tmp_path)
    assert process.wait(timeout=280) == 0, process.stderr.read().decode()
    assert same(load_tree(tmp_path / f"step-{CONFIG.steps:06d}", "training"), expected)
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(signum, undisturbed, tmp_path):
    """At random moments, while data are still being collected too: exit code 143 or 130, and the newest one verifies."""
    expected, seconds = undisturbed
    chance = np.random.default_rng(int(signum))
    for i in range(-(-STOPS // 2)):
        process = start(tmp_path)
        time.sleep(0 if i == 0 else chance.uniform(0, seconds / max(STOPS, 4)))
        process.send_signal(signum)
        code = process.wait(timeout=60)
        if code == 0:  # it was faster
            break
        assert code == 128 + signum or code == -signum, process.stderr.read().decode()
        if code == 128 + signum:  # -signum: before the run had begun to listen
            assert newest(tmp_path) is not None
    process = start(tmp_path)
    assert process.wait(timeout=280) == 0, process.stderr.read().decode()
    assert same(load_tree(tmp_path / f"step-{CONFIG.steps:06d}", "training"), expected)


def test_the_run_in_this_process_is_the_same(undisturbed, tmp_path):
    expected, _ = undisturbed
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(TrainConfig(**{**vars(CONFIG), "out": str(tmp_path / "run")}), quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert same(load_tree(tmp_path / "run" / f"step-{CONFIG.steps:06d}", "training"), expected)


@pytest.mark.timeout(900)
def test_a_second_run_on_a_folder_is_refused_at_once(tmp_path):
    process = start(tmp_path)
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)  # or it may be done before the second one asks
        second = start(tmp_path)
        assert second.wait(timeout=200) == 1
        said = second.stderr.read().decode()
        assert str(tmp_path) in said and str(process.pid) in said
    finally:
        process.kill()
