"""FusedAdam's state formats: the exact ones follow torch.optim.Adam, the lossy ones learn as well; all resume exactly."""

import copy
import json

import pytest
import torch
from torch import Tensor

from fastsae import SAE, JumpReLU, TopK
from fastsae.kernels.update import gradient_reference
from fastsae.optim import FusedAdam

D, F = 16, 60
FORMATS = [("fp32", "fp32"), ("split", "fp32"), ("fp32", "bf16"), ("split", "bf16")]
each_format = pytest.mark.parametrize(("master", "moments"), FORMATS)


def loss_of(sae: SAE, x: Tensor) -> Tensor:
    x = x.to(sae.W_dec.dtype)
    return (sae(x) - x).float().square().sum(1).mean()


def train(sae: SAE, optimizer: FusedAdam, steps: range) -> None:
    for i in steps:
        optimizer.zero_grad()
        loss_of(sae, torch.randn(12, D, generator=torch.Generator().manual_seed(i))).backward()
        optimizer.step()


def gradients(sae: SAE, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What autograd says, with the matrices' deferred gradients added up in fp32."""
    found = {name: p.grad.to(torch.float32, copy=True) for name, p in sae.named_parameters() if p.grad is not None}
    for name, W in (("W_enc", sae.W_enc.T), ("W_dec", sae.W_dec)):
        waiting = getattr(sae, name).deferred
        factors = waiting.joined(W)
        factors = factors._replace(table=factors.table.float(), coefficients=factors.coefficients.float())
        grad = gradient_reference(factors, whole[name].T if name == "W_enc" else whole[name])
        found[name] = found.get(name, 0) + (grad.T if name == "W_enc" else grad)
    return found


@pytest.mark.parametrize(
    ("activation", "options"), [(TopK(4), {"unit_norm": True, "weight_decay": 0.01, "max_norm": 0.5}), (JumpReLU(0.02), {})]
)
@pytest.mark.parametrize("master", ["fp32", "split"])
def test_exact_masters_follow_adam_for_200_steps(master, activation, options):
    """torch's Adam on fp32 weights, whose gradients are those of the operands that the SAE computes with."""
    sae = SAE(D, F, copy.deepcopy(activation))
    theirs = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    optimizer = FusedAdam(sae, lr=1e-3, master=master, **options)
    adam = torch.optim.Adam(theirs.values(), lr=1e-3, weight_decay=options.get("weight_decay", 0.0))
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(sae, torch.randn(12, D)).backward()
        if "activation.theta" in theirs:
            theirs["activation.theta"].data.clamp_(min=0)  # as the forward pass does
        for name, grad in gradients(sae, {k: v.detach() for k, v in theirs.items()}).items():
            theirs[name].grad = grad
        W = theirs["W_dec"]
        if "unit_norm" in options:
            W.grad -= (W.grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W.detach()
            torch.nn.utils.clip_grad_norm_(theirs.values(), options["max_norm"])
        optimizer.step()
        adam.step()
        if "unit_norm" in options:
            W.data /= W.data.norm(dim=1, keepdim=True)
    for name, ours in optimizer.master_weights().items():
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs[name].detach(), rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert optimizer.skipped == 0


def test_splitting_keeps_the_weights_exactly():
    sae = SAE(D, F, JumpReLU(0.02), skip=True, d_out=D)
    for p in sae.parameters():
        p.data.add_(torch.randn_like(p))
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    strides = {name: p.stride() for name, p in sae.named_parameters()}
    optimizer = FusedAdam(sae, master="split")
    after = optimizer.master_weights()
    for name, p in sae.named_parameters():
        assert p.dtype == torch.bfloat16 and p.stride() == strides[name]
        assert torch.equal(after[name], before[name]) and after[name].stride() == strides[name]
    optimizer.set_master_weights({name: -t for name, t in before.items()})
    assert all(torch.equal(t, -before[name]) for name, t in optimizer.master_weights().items())
    assert torch.equal(sae.W_dec, -before["W_dec"].bfloat16())
    again = FusedAdam(SAE(D, F, TopK(4), dtype=torch.bfloat16), master="split")  # nothing to keep yet
    assert not any(s["low"].any() for s in again.state.values())


def fvu_after_training(master: str, moments: str) -> float:
    """Of the exact weights, on sparse sums of 32 directions in 16 dimensions and a little noise."""
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(32, D), dim=1)

    def samples(n: int) -> Tensor:
        active = (torch.rand(n, 32) < 0.06) * (0.5 + torch.rand(n, 32))
        return active @ directions + 0.05 * torch.randn(n, D)

    sae = SAE(D, F, TopK(3), decoder_norm=1.0)
    optimizer = FusedAdam(sae, lr=3e-3, master=master, moments=moments)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - step / 150))
    for _ in range(300):
        optimizer.zero_grad()
        loss_of(sae, samples(256)).backward()
        optimizer.step()
        schedule.step()
    whole, x = SAE(D, F, TopK(3)), samples(4096)
    whole.load_state_dict(optimizer.master_weights())
    with torch.no_grad():
        return float((whole(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def test_lossy_formats_reach_the_same_fvu():
    exact, *others = (fvu_after_training(*form) for form in (("fp32", "fp32"), ("fp32", "bf16"), ("split", "bf16")))
    assert 0.1 < exact < 0.3, "the task is neither trivial nor out of reach"
    assert all(abs(fvu / exact - 1) < 0.01 for fvu in others), (exact, others)


def test_bf16_moments_keep_averaging():
    """A thousandth a step, which rounding to the nearest bf16 would leave where it was, adds up to what fp32 has."""
    averages = []
    for moments in ("fp32", "bf16"):
        sae = SAE(D, F, TopK(4))
        optimizer = FusedAdam(sae, lr=0.0, moments=moments)
        for i in range(100):
            optimizer.zero_grad()
            sae.W_dec.sum().backward()
            optimizer.step()
            if not i:
                optimizer.state[sae.W_dec]["exp_avg_sq"].fill_(0.5)
        averages.append(float(optimizer.state[sae.W_dec]["exp_avg_sq"].float().mean()))
    assert abs(averages[0] - 0.547) < 0.001 and abs(averages[1] - averages[0]) < 0.003


@each_format
def test_a_resumed_run_has_the_same_bits(master, moments):
    """The state as a checkpoint holds it: plain dicts, text for numbers, contiguous tensors."""
    sae = SAE(D, F, TopK(4))
    optimizer = FusedAdam(sae, lr=1e-2, master=master, moments=moments, seed=7)
    train(sae, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: t.clone(memory_format=torch.contiguous_format) for name, t in sae.state_dict().items()}
    tensors = {str(i): {name: t.contiguous() for name, t in s.items()} for i, s in saved["state"].items()}
    groups = json.loads(json.dumps(saved["param_groups"]))
    train(sae, optimizer, range(3, 6))

    resumed = SAE(D, F, TopK(4))
    other = FusedAdam(resumed, lr=1.0, master=master, moments=moments)
    resumed.load_state_dict(weights)
    other.load_state_dict({"state": tensors, "param_groups": groups})
    train(resumed, other, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), resumed.parameters(), strict=True))
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


@each_format
def test_bytes_per_parameter(master, moments):
    """What the table says, of W_enc and W_dec."""
    sae = SAE(D, F, TopK(4))
    optimizer = FusedAdam(sae, master=master, moments=moments)
    train(sae, optimizer, range(1))
    for W in (sae.W_enc, sae.W_dec):
        held = W.nbytes + sum(t.nbytes for name, t in optimizer.state[W].items() if name != "step")
        assert held == W.numel() * (12 if moments == "fp32" else 8)


@each_format
def test_two_runs_have_the_same_bits_and_another_seed_others(master, moments):
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        sae = SAE(D, F, TopK(4))
        optimizer = FusedAdam(sae, lr=1e-2, master=master, moments=moments, seed=seed)
        train(sae, optimizer, range(4))
        return [optimizer.state[sae.W_dec]["exp_avg"], *optimizer.master_weights().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(0), strict=True))
    assert torch.equal(run(0)[0], run(1)[0]) == (moments == "fp32")


def test_another_format_is_not_loaded():
    state = FusedAdam(SAE(D, F, TopK(4)), master="split").state_dict()
    with pytest.raises(ValueError, match="saved with master='split': pass that instead of 'fp32'"):
        FusedAdam(SAE(D, F, TopK(4))).load_state_dict(state)


@pytest.mark.parametrize(
    ("dtype", "options", "error", "words"),
    [
        (torch.bfloat16, {}, TypeError, "bfloat16: FusedAdam steps float32 weights.*master='split'"),
        (torch.float64, {"master": "split"}, TypeError, "float64: master='split' takes float32 or bfloat16"),
        (torch.float64, {"moments": "bf16"}, TypeError, "float64: moments='bf16'"),
        (torch.float32, {"master": "bf16"}, ValueError, "master='bf16': pass one of 'fp32', 'split'"),
        (torch.float32, {"moments": "int8"}, ValueError, "moments='int8'"),
        (torch.float32, {"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_impossible_formats_are_refused(dtype, options, error, words):
    with pytest.raises(error, match=words):
        FusedAdam(SAE(D, F, TopK(4), dtype=dtype), **options)
