"""The training loop: what a step does to weights and counters, and that a stopped run goes on bit for bit."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from fastsae import SAE
from fastsae.config import DataConfig, LossConfig, OptimConfig, SAEConfig, TrainConfig, with_values
from fastsae.interrupt import Interrupted
from fastsae.member import Member
from fastsae.state_files import load_tree
from fastsae.trainer import train

SMALL = TrainConfig(
    sae=SAEConfig(k=3, d_sae=64),
    optim=OptimConfig(lr=1e-2, lr_warm_up=2, lr_decay=4),
    data=DataConfig(source="synthetic", features=32, d_in=16, active=3, buffer=64),
    tokens=12 * 32,
    batch_size=32,
    log_every=4,
    save_every=5,
)


def small(out, **changes):
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    config = dataclasses.replace(SMALL, out=str(out), **{k: v for k, v in changes.items() if k in own})
    return with_values(config, {k: v for k, v in changes.items() if k not in own})


VARIANTS = {
    "topk": {},
    "abstopk": {"activation": "abstopk"},
    "batchtopk": {"activation": "batchtopk", "dead_window": 32},
    "jumprelu": {"activation": "jumprelu", "sparsity": "l0_to_target", "target_l0": 3.0, "dead": "pre_act", "dead_window": 32},
    "jumprelu tanh": {"activation": "jumprelu", "sparsity": "l0_tanh", "coefficient": 0.01},
    "relu": {"activation": "relu", "coefficient": 0.05, "p_end": 0.5, "warm_up": 6},
    "gated": {"activation": "gated", "coefficient": 0.05},
    "matryoshka": {"activation": "batchtopk", "prefixes": (8, 24)},
    "hierarchical": {"ks": (1, 2)},
    "ghost": {"activation": "relu", "coefficient": 0.05, "dead": "ghost", "dead_window": 32},
    "auxk_normalised, fvu": {"dead": "auxk_normalised", "dead_window": 32, "error": "fvu", "unit_norm": True},
    "resample": {"dead": "resample", "dead_window": 64},
    "scaled": {"normalize": "expected_average_only_in", "b_dec": "geometric_median"},
    "layer_norm": {"normalize": "layer_norm", "dead": "none", "b_dec": "mean"},
    "micro-batches": {"micro_batch": 8},
    "k falls": {"k_first": 12, "k_steps": 6},
    "Adam, bf16": {"optimizer": "AdamW", "compute_dtype": "bfloat16"},
    "Adam": {"optimizer": "Adam", "unit_norm": True},
    "SGD": {"optimizer": "SGD"},
    "split master": {"compute_dtype": "bfloat16", "moments": "bf16"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_stopped_run_ends_with_the_same_bits(changes, tmp_path, monkeypatch):
    """Stopped by a signal after steps 2, 5 and 9 and gone on with: weights, moments, counters and log as without."""
    whole = train(small(tmp_path / "whole", **changes), quiet=True)
    parts = small(tmp_path / "parts", **changes)
    for stop in (2, 5, 9):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Member, "step", signalling(Member.step, stop))
            train(parts, quiet=True)
        assert (tmp_path / "parts" / f"step-{stop:06d}" / "MANIFEST.json").exists()
    train(parts, quiet=True)
    assert_same(*(load_tree(tmp_path / run / "step-000012", "training") for run in ("whole", "parts")))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    moved = [not torch.equal(a, b) for a, b in zip(whole.sae.parameters(), fresh(parts).parameters(), strict=True)]
    assert any(moved)


def signalling(step, stop):
    def stepping(self, batch, number):
        step(self, batch, number)
        if number + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return stepping


def fresh(config) -> SAE:
    return Member(config, config.data.d_in, None, torch.device("cpu")).sae


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), path
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a)), path
