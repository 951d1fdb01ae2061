"""FusedAdam against torch.optim.Adam on the same SAE, loss by loss; and what it does with bad gradients."""

import copy
import io

import pytest
import torch
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, functional
from fastsae.kernels import update
from fastsae.kernels.deferred import row_norms
from fastsae.optim import FusedAdam

D, F = 16, 60
LR = 1e-2


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    """A CPU goes through these few parameters slice by slice too."""
    monkeypatch.setattr(update, "SLICE", 400)


def plain(sae: SAE, x: Tensor) -> Tensor:
    return (sae(x) - x).square().sum(-1).mean()


def one_pass(sae: SAE, x: Tensor) -> Tensor:
    """Squared error, L1 weighted by decoder norms, and Matryoshka prefixes."""
    norms = row_norms(sae.W_dec)
    loss = functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, weight=norms, prefixes=[10, 25])
    return loss.sse.sum(1).mean() + 0.1 * loss.l1.mean()


def two_decodes_and_a_direct_use(sae: SAE, x: Tensor) -> Tensor:
    code = sae.encode_sparse(x)
    return plain(sae, x) + sae.decode(code).sin().mean() + 0.01 * sae.W_dec.square().sum() + 0.01 * sae.W_enc.sin().sum()


def adam_step(sae: SAE, adam: torch.optim.Adam, unit_norm: bool, max_norm: float | None) -> None:
    W = sae.W_dec
    if unit_norm:
        W.grad -= (W.grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W.detach()
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm)
    adam.step()
    if unit_norm:
        W.data /= W.data.norm(dim=1, keepdim=True)


def test_any_default_device_will_do():
    sae = SAE(D, F, TopK(3))
    optimizer = FusedAdam(sae, lr=LR)
    plain(sae, torch.randn(8, D)).backward()
    with torch.device("meta"):
        optimizer.step()


@pytest.mark.parametrize("loss", [plain, one_pass, two_decodes_and_a_direct_use])
@pytest.mark.parametrize("options", [{}, {"unit_norm": True}, {"unit_norm": True, "max_norm": 0.5, "weight_decay": 0.01}])
@pytest.mark.parametrize("activation", [TopK(4), AbsTopK(4), BatchTopK(3), ReLU(), JumpReLU(0.02), Gated()])
def test_follows_adam(activation, options, loss):
    torch.manual_seed(0)
    ours = SAE(D, F, copy.deepcopy(activation), dtype=torch.float64)
    theirs = copy.deepcopy(ours)
    fused = FusedAdam(ours, lr=LR, **options)
    adam = torch.optim.Adam(theirs.parameters(), lr=LR, weight_decay=options.get("weight_decay", 0.0))
    for _ in range(4):
        x = torch.randn(12, D, dtype=torch.float64)
        fused.zero_grad()
        loss(ours, x).backward()
        fused.step()
        adam.zero_grad()
        loss(theirs, x).backward()
        adam_step(theirs, adam, options.get("unit_norm", False), options.get("max_norm"))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert fused.skipped == 0


def test_no_gradient_of_the_matrices_is_stored():
    sae = SAE(D, F, TopK(4))
    optimizer = FusedAdam(sae)
    one_pass(sae, torch.randn(5, D)).backward()
    assert sae.W_enc.grad is None and sae.W_dec.grad is None and sae.b_enc.grad is not None
    optimizer.release()
    one_pass(sae, torch.randn(5, D)).backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None


def test_two_backward_passes_add_up():
    sae = SAE(D, F, TopK(4))
    twice = copy.deepcopy(sae)
    x = torch.randn(8, D)
    one, two = FusedAdam(sae, lr=LR), FusedAdam(twice, lr=LR)
    (sae(x) - x).square().sum().backward()
    for half in x.split(4):
        (twice(half) - half).square().sum().backward()
    one.step()
    two.step()
    for p, q in zip(sae.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["x", "loss"])
def test_what_is_not_finite_never_reaches_a_parameter(where):
    sae = SAE(D, F, TopK(4))
    optimizer = FusedAdam(sae, lr=LR)
    before = [p.detach().clone() for p in sae.parameters()]
    loss = plain(sae, torch.randn(8, D)) * float("nan")
    loss.backward()
    optimizer.step(finite=loss.isfinite() if where == "loss" else None)
    assert all(torch.isfinite(p).all() for p in sae.parameters())
    if where == "loss":
        assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True))
        assert optimizer.state[sae.W_dec]["step"] == 0  # a step that did not happen does not count
    else:
        assert optimizer.skipped > 0


def test_state_survives_a_round_trip_and_schedulers_work():
    torch.manual_seed(0)
    x = torch.randn(8, D)
    sae = SAE(D, F, TopK(4))

    def train(sae, optimizer, steps):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(steps):
            optimizer.zero_grad()
            plain(sae, x).backward()
            optimizer.step()
            schedule.step()

    optimizer = FusedAdam(sae, lr=LR)
    train(sae, optimizer, 3)
    resumed = copy.deepcopy(sae)
    other = FusedAdam(resumed, lr=LR)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, state in ((optimizer, sae), (other, resumed)):
        for g in group.param_groups:
            g["lr"] = g["initial_lr"] = LR
        train(state, group, 2)
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "beta < 1"),
        ({"max_norm": 0.0}, "norm > 0"),
        ({"eps": -1.0}, "eps=-1.0"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FusedAdam(SAE(D, F, TopK(4)), **options)


def test_layouts_do_not_matter():
    """Transposed and expanded inputs, and an expanded gradient to the norms, give the same step as contiguous ones."""
    x = torch.randn(D, 8)
    sae = SAE(D, F, TopK(4))
    other = copy.deepcopy(sae)
    for model, rows in ((sae, x.T), (other, x.T.contiguous())):
        optimizer = FusedAdam(model, lr=LR)
        (plain(model, rows) + row_norms(model.W_dec).sum()).backward()
        assert model.W_dec.deferred.dnorm.is_contiguous()
        optimizer.step()
    for p, q in zip(sae.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_moments_of_another_layout_are_laid_out_anew():
    sae = SAE(D, F, TopK(4))
    optimizer, x = FusedAdam(sae, lr=LR), torch.randn(8, D)
    plain(sae, x).backward()
    optimizer.step()
    twin = copy.deepcopy(sae)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()  # as a file has it
    loaded = FusedAdam(twin, lr=LR)
    loaded.load_state_dict(saved)
    for model, o in ((sae, optimizer), (twin, loaded)):
        o.zero_grad()
        plain(model, x).backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), twin.parameters(), strict=True))


def test_clipping_by_a_norm_that_is_not_finite_moves_nothing():
    sae = SAE(D, F, TopK(4))
    optimizer = FusedAdam(sae, lr=LR, max_norm=1.0)
    plain(sae, torch.randn(8, D)).backward()
    sae.W_dec.deferred.factors[0].coefficients[0] = float("nan")
    sae.W_dec.deferred.versions.clear()
    before = [p.detach().clone() for p in sae.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), before, strict=True)) and not optimizer.updated
    assert optimizer.state[sae.W_dec]["step"] == 0 and not optimizer.state[sae.b_dec]["exp_avg"].any()


def test_a_zero_decoder_row_does_not_spoil_the_norm():
    sae = SAE(D, F, TopK(4))
    sae.W_dec.data[3] = 0
    optimizer = FusedAdam(sae, lr=LR, max_norm=1.0, unit_norm=True)
    plain(sae, torch.randn(8, D)).backward()
    optimizer.step()
    assert torch.isfinite(sae.b_dec).all() and sae.b_dec.any()
    assert not sae.W_dec[3].any() and optimizer.skipped == 1  # it has no direction to keep


def test_the_models_zero_grad_forgets_factors():
    sae = SAE(D, F, TopK(4))
    FusedAdam(sae)
    for _ in range(2):
        plain(sae, torch.randn(8, D)).backward()
        sae.zero_grad()
    assert not sae.W_enc.deferred and not sae.W_dec.deferred


def test_inputs_changed_before_the_step_are_noticed():
    sae = SAE(D, F, TopK(4), apply_b_dec_to_input=False)
    optimizer, x = FusedAdam(sae), torch.randn(8, D)
    plain(sae, x).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place between backward"):
        optimizer.step()


def test_a_pickled_model_has_gradients_again():
    sae = SAE(D, F, TopK(4))
    FusedAdam(sae)
    plain(sae, torch.randn(8, D)).backward()
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    plain(loaded, torch.randn(8, D)).backward()
    assert loaded.W_dec.grad is not None and loaded.W_enc.grad is not None


def test_no_gradient_no_step():
    sae = SAE(D, F, TopK(4))
    optimizer, before = FusedAdam(sae, weight_decay=0.1), sae.W_dec.detach().clone()
    plain(sae, torch.randn(8, D)).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(sae.W_dec, before)


def test_16_bit_weights_are_refused():
    with pytest.raises(TypeError, match="bfloat16: FusedAdam steps float32"):
        FusedAdam(SAE(D, F, TopK(4), dtype=torch.bfloat16))
