"""Training on a GPU: the numbers of a CPU, and a host that does not wait between log steps."""

import os

import pytest
import torch
from test_trainer import VARIANTS, lines, small

from fastsae import functional
from fastsae.data.shards import write_shards
from fastsae.data.source import as_source
from fastsae.member import Member
from fastsae.trainer import train

TINY = {"d_sae": 12, "features": 16, "d_in": 6, "batch_size": 6, "tokens": 12, "log_every": 1, "save_every": 2, "dead": "none"}
FITTED = {"dead_window": 1, "micro_batch": 3, "k_steps": 1, "prefixes": (4, 12)}


def tiny(out, device, **changes):
    fitted = {name: FITTED.get(name, value) for name, value in changes.items()}
    return small(out, **TINY | fitted, device=device)


FEW = ("topk", "batchtopk", "jumprelu", "gated", "ghost", "resample", "split master")
NAMES = VARIANTS if int(os.environ.get("FASTSAE_EXAMPLES", "25")) >= 200 else FEW  # all with the counts of .ci/run


@pytest.mark.parametrize("changes", [VARIANTS[name] for name in NAMES], ids=NAMES)
def test_numbers_of_a_cpu(changes, tmp_path, gpu):
    train(tiny(tmp_path / "cpu", "cpu", **changes), quiet=True)
    with gpu():
        trained = train(tiny(tmp_path / "gpu", "cuda", **changes), quiet=True)
        assert all(p.is_cuda and p.isfinite().all() for p in trained.sae.parameters())
    if "compute_dtype" in changes:
        return  # the interpreter computes bf16 wrongly
    on_cpu, on_gpu = lines(tmp_path / "cpu"), lines(tmp_path / "gpu")
    for expected, found in zip(on_cpu, on_gpu, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    if "dead_window" in changes:  # the second step has dead latents to work on, unless the first gave them new directions
        assert (on_gpu[0]["sparsity/dead_features"] > 0) == (changes.get("dead") != "resample")


BATCHES = [torch.randn(6, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]


def test_batches_read_ahead(tmp_path, gpu):
    """From shards, by a thread of their own."""
    write_shards(as_source(BATCHES), tmp_path / "shards", rows=48)
    changes = {"source": "shards", "path": str(tmp_path / "shards")}
    on_cpu = train(tiny(tmp_path / "cpu", "cpu", **changes), quiet=True)
    with gpu():
        on_gpu = train(tiny(tmp_path / "gpu", "cuda", **changes), quiet=True)
        torch.testing.assert_close(on_gpu.sae.W_dec.cpu(), on_cpu.sae.W_dec)


FINITE = "_local_scalar_dense at steppers.py"
ENOUGH = "nonzero at kernels/batch_topk.py"
COUNT = "_local_scalar_dense at kernels/threshold.py"
STEPS = {  # what they train, and what a step waits for
    "auxk": ({"dead": "auxk", "dead_window": 6}, []),
    "abstopk, decay, spikes": ({"activation": "abstopk", "weight_decay": 0.1, "spike": 2.0}, []),
    "split master, unit norm, clipped": (
        {"compute_dtype": "bfloat16", "moments": "bf16", "unit_norm": True, "max_norm": 1.0, "dead": "auxk_normalised"}, [],
    ),
    "matryoshka": ({"prefixes": (4, 12)}, []),
    "hierarchical": ({"ks": (1, 2)}, []),
    "batchtopk": ({"activation": "batchtopk"}, [ENOUGH]),  # were the candidates enough?
    "jumprelu": ({"activation": "jumprelu", "sparsity": "l0_tanh", "coefficient": 0.01}, [COUNT]),  # how many entries?
    "torch's optimizer": ({"optimizer": "Adam"}, [FINITE]),  # is the gradient, and may it step?
}


@pytest.mark.parametrize(("changes", "expected"), STEPS.values(), ids=STEPS)
def test_the_host_waits_for_nothing(changes, expected, tmp_path, gpu, monkeypatch):
    """Between log steps, batches from the CPU included; but for what is named."""
    step, seen = Member.step, []

    def stepping(self, batch, number):
        self.slots, self.since_fired = 3, self.since_fired + 5  # as a log step would have found: some are dead
        if number == 1:
            waits.clear()
        step(self, batch, number)
        if number == 3:
            seen.append(dict(waits))

    monkeypatch.setattr(Member, "step", stepping)
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)  # JumpReLU goes the sparse way
    with gpu() as waits:
        changes = {"source": "given", "tokens": 24, "log_every": 8, "save_every": 8, "buffer": 16} | changes
        train(tiny(tmp_path, "cuda", **changes), source=iter(BATCHES), quiet=True)
    (counts,) = seen  # of steps 1 to 3
    assert sorted((where.partition(":")[0], count) for where, count in counts.items()) == [(where, 3) for where in expected]
