"""A TopK step with FusedAdam asks the device for nothing: no value is read, and no shape depends on one.

Held against the Python that launches the kernels, which are interpreted here: the checks of values that eager CPU tensors get
are off, as they are on a GPU. What a C++ operator does inside is out of sight. On a CPU's own path there is no device to wait
for, and it does read: the bounds of segments, how many rows were skipped, where ties are torn.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from fastsae import SAE, AbsTopK, BatchTopK, TopK, losses
from fastsae.config import DataConfig, LossConfig, OptimConfig, SAEConfig, TrainConfig
from fastsae.dead import dead_latents, without_padding
from fastsae.kernels import backend, check
from fastsae.member import Member
from fastsae.optim import FusedAdam

D, F, N = 4, 12, 3
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2", "bincount"}


class NoReads(TorchDispatchMode):
    """Fails at any torch operator that reads a value on the host; looks into ours (see test_memory.py)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsae":
            with self:
                return backend.IMPLEMENTATIONS[func._opname](*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or by_mask or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            raise AssertionError(f"{name} reads a value on the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRET", True)
    monkeypatch.setattr(check, "_values_can_be_read", lambda t: False)
    launch = interpreter.GridExecutor.__call__

    def unseen(*args, **kwargs):  # the kernel itself, which on a GPU runs on the device
        with _disable_current_modes():
            return launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", unseen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize(
    ("activation", "options"),
    [
        (AbsTopK(2), {}),
        (TopK(2), {"unit_norm": True, "max_norm": 1.0, "weight_decay": 0.1}),
        (TopK(2), {"master": "split", "moments": "bf16", "unit_norm": True, "max_norm": 1.0}),
    ],
)
def test_a_step_reads_nothing(activation, options, as_on_a_gpu):
    sae = SAE(D, F, activation, decoder_norm=1.0)
    optimizer = FusedAdam(sae, **options)
    since_fired = torch.randint(0, 20, (F,))
    before = optimizer.master_weights()["W_dec"].clone()
    for step in range(2):
        x = torch.randn(N, D).to(sae.W_dec.dtype)
        with NoReads():
            optimizer.zero_grad()
            code = sae.encode_sparse(x)
            r = losses.reconstruct(sae, code, x)
            dead = dead_latents(since_fired, 10, 6, step)
            part = losses.part(sae, x, dead.latents)
            W_enc, b_enc, W_dec = without_padding(part.W_enc, part.b_enc, part.W_dec, dead.valid)
            part = part._replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
            loss = losses.mse(r) + dead.share(2) * losses.auxk(part, r.error[:, -1], 2, scaled=False)
            loss.backward()
            optimizer.step(finite=loss.isfinite())
    assert optimizer.skipped == 0 and not torch.equal(optimizer.master_weights()["W_dec"], before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_a_member_reads_nothing_between_log_steps(as_on_a_gpu):
    """Guards and counters too."""
    config = TrainConfig(
        sae=SAEConfig(k=2, d_sae=F),
        loss=LossConfig(dead_window=2, auxk=2),
        optim=OptimConfig(spike=2.0),
        data=DataConfig(buffer=N),
        tokens=9 * N,
        batch_size=N,
    )
    member = Member(config, D, None, torch.device("cpu"))
    member.device, member.view = SimpleNamespace(type="cuda"), lambda batch: (batch, batch)
    member.step(torch.randn(N, D), 0)
    member.slots = 3
    with NoReads():
        for step in range(1, 3):
            member.step(torch.randn(N, D) * 100 ** (step - 1), step)
    assert int(member.skipped) == 1


def test_a_threshold_follows_without_being_read():
    sae = SAE(D, F, BatchTopK(2))
    code = sae.encode_sparse(torch.randn(N, D))
    with NoReads():
        for _ in range(2):
            sae.activation.observe(code)
    assert sae.activation.knows_threshold


def test_the_guard_sees_reads():
    x = torch.randn(5)
    reads = [
        lambda: float(x[0]), lambda: bool(x.sum() > 0), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.masked_select(x > 0),
        lambda: torch.where(x > 0), lambda: x.repeat_interleave(torch.ones(5).long()), lambda: x.unique(),
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(AssertionError, match="reads a value"), NoReads():
            read()


def test_the_guard_looks_into_operators(as_on_a_gpu, monkeypatch):
    real = backend.IMPLEMENTATIONS["select_topk_forward"]
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "select_topk_forward", lambda x, *a: (float(x.sum()), real(x, *a))[1])
    with pytest.raises(AssertionError, match="item reads a value"), NoReads():
        SAE(D, F, TopK(2)).encode_sparse(torch.randn(N, D))
