"""update_rows: the gradient from factors, projection, Adam and unit norm against torch.optim.Adam on stored gradients."""

import pytest
import torch
from helpers import random_code

from fastsae import kernels
from fastsae.kernels import by_latent
from fastsae.kernels.by_latent import bag_of_entries
from fastsae.kernels.deferred import Deferred, Factors, row_norms
from fastsae.kernels.update import gradient_reference, gradient_squares, update_rows

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-2


def factors_of(N, D, F, E, device, seed=0):
    latents, offsets = random_code(N, F, E, device, seed)
    rows = bag_of_entries(offsets, len(latents))
    return Factors(torch.randn(N, D, device=device), rows, torch.randn(len(latents), device=device), latents)


def scalars_at(t, device, clip=1.0, live=1.0):
    return torch.tensor([1 - BETAS[0] ** t, (1 - BETAS[1] ** t) ** 0.5, clip, live, t], device=device)


def state(F, D, device):
    return torch.randn(F, D, device=device), torch.zeros(F, D, device=device), torch.zeros(F, D, device=device)


@pytest.mark.parametrize("split", [3, 1024])  # 3: empty, single and split segments all occur
@pytest.mark.parametrize(("unit_norm", "extras", "decay"), [(False, False, 0.0), (True, False, 0.0), (True, True, 0.1)])
@pytest.mark.parametrize(("N", "D", "F", "E"), [(1, 1, 1, 1), (9, 33, 6, 20), (6, 257, 4, 12)])
def test_follows_adam(N, D, F, E, unit_norm, extras, decay, split, device, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", split)
    W, m, v = state(F, D, device)
    expected = W.clone().requires_grad_()
    adam = torch.optim.Adam([expected], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    for t in range(1, 5):
        factors = factors_of(N, D, F, E, device, seed=t)
        stored = torch.randn(F, D, device=device) if extras else None
        dnorm = torch.randn(F, device=device) if extras else None
        index = kernels.sort_by_latent(factors.latents, F)
        expected.grad = gradient_reference(factors, expected.detach(), stored, dnorm, project=unit_norm)
        squares = gradient_squares(factors, index, W, stored, dnorm, unit_norm)
        torch.testing.assert_close(squares, expected.grad.square().sum(1), rtol=1e-4, atol=1e-5)
        skipped = update_rows(factors, index, W, m, v, scalars_at(t, device), LR, BETAS, EPS, decay, stored, dnorm, unit_norm)
        adam.step()
        if unit_norm:
            expected.data /= expected.data.norm(dim=1, keepdim=True)
        assert not skipped.any()
    # D = 1 at unit norm projects to rounding noise, which Adam blows up to a full step: only the norm is defined there
    if not (unit_norm and D == 1):
        torch.testing.assert_close(W, expected.detach(), rtol=0, atol=1e-6)


def test_a_zero_row_has_no_gradient_through_its_norm(device):
    """As torch has it; a division would make the row NaN."""
    W, m, v = state(4, 10, device)
    W[1] = 0
    leaf = W.clone().requires_grad_()
    row_norms(leaf).sum().backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[1].any()
    factors = Deferred().joined(W)
    index = kernels.sort_by_latent(factors.latents, 4)
    dnorm = torch.ones(4, device=device)
    assert not update_rows(factors, index, W, m, v, scalars_at(1, device), LR, BETAS, EPS, dnorm=dnorm).any()
    assert torch.isfinite(W).all() and not W[1].any() and m[0].any()


def test_the_same_bits_twice(device, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", 3)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        W, m, v = state(5, 40, device)
        factors = factors_of(8, 40, 5, 25, device)
        index = kernels.sort_by_latent(factors.latents, 5)
        update_rows(factors, index, W, m, v, scalars_at(1, device), LR, BETAS, EPS, unit_norm=True)
        runs.append((W, m, v))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_whose_gradient_is_not_finite_stays(value, device):
    W, m, v = state(6, 20, device)
    before = [t.clone() for t in (W, m, v)]
    factors = factors_of(5, 20, 6, 15, device)
    hit = factors.rows == factors.rows[0]
    factors.table[factors.rows[0], 3] = value
    touched = torch.zeros(6, dtype=torch.bool, device=device).index_fill(0, factors.latents[hit].long(), True)
    skipped = update_rows(
        factors, kernels.sort_by_latent(factors.latents, 6), W, m, v, scalars_at(1, device), LR, BETAS, EPS
    )
    assert torch.equal(skipped.bool(), touched) and touched.any()
    for now, then in zip((W, m, v), before, strict=True):
        assert torch.equal(now[touched], then[touched]) and torch.isfinite(now).all()
    moved = torch.zeros(6, dtype=torch.bool, device=device).index_fill(0, factors.latents[~hit].long(), True) & ~touched
    assert (W != before[0]).any(1)[moved].all()


def test_nothing_moves_when_the_step_is_off(device):
    W, m, v = state(4, 10, device)
    before = [t.clone() for t in (W, m, v)]
    factors = factors_of(5, 10, 4, 9, device)
    index = kernels.sort_by_latent(factors.latents, 4)
    update_rows(factors, index, W, m, v, scalars_at(1, device, live=0.0), LR, BETAS, EPS, unit_norm=True)
    assert all(torch.equal(a, b) for a, b in zip((W, m, v), before, strict=True))


def test_joined_factors_add_up(device):
    parts = [factors_of(3, 7, 5, 8, device, seed=s) for s in range(3)]
    W = torch.randn(5, 7, device=device)
    got = gradient_reference(Deferred(parts).joined(W), W)
    torch.testing.assert_close(got, sum(gradient_reference(p, W) for p in parts))
    assert not gradient_reference(Deferred().joined(W), W).any()
