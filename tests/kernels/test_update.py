"""update_rows: the gradient from factors, projection, Adam and unit norm against torch.optim.Adam on stored gradients."""

from typing import NamedTuple

import pytest
import torch
from helpers import random_code
from torch import Tensor

from fastsae import kernels
from fastsae.kernels import by_latent, update
from fastsae.kernels.by_latent import bag_of_entries
from fastsae.kernels.deferred import Deferred, Factors, row_norms
from fastsae.kernels.halves import joined, split
from fastsae.kernels.update import gradient_reference, gradient_squares, update_rows

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-2
HYPER = (LR, BETAS, EPS)
FORMATS = ["fp32", "split", "fp32, bf16 moments", "split, bf16 moments"]


@pytest.fixture(autouse=True)
def several_slices(monkeypatch):
    """A CPU goes through these few parameters slice by slice too."""
    monkeypatch.setattr(update, "SLICE", 200)


class State(NamedTuple):
    """What a matrix consists of."""

    W: Tensor
    m: Tensor
    v: Tensor
    low: Tensor | None

    def whole(self) -> Tensor:
        return self.W.clone() if self.low is None else joined(self.W, self.low)

    def copies(self) -> list[Tensor]:
        return [t.clone() for t in self if t is not None]

    def equals(self, copies: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip((t for t in self if t is not None), copies, strict=True))


def state(F, D, device, form="fp32") -> State:
    W, low = torch.randn(F, D, device=device), None
    if form.startswith("split"):
        whole, low = W, torch.empty(F, D, dtype=torch.int16, device=device)
        W = torch.empty(F, D, dtype=torch.bfloat16, device=device)
        split(whole, W, low)
    m, v = (torch.zeros(F, D, device=device, dtype=torch.bfloat16 if "moments" in form else torch.float32) for _ in "mv")
    return State(W, m, v, low)


def factors_of(N, D, F, E, device, seed=0, dtype=torch.float32):
    latents, offsets = random_code(N, F, E, device, seed)
    rows = bag_of_entries(offsets, len(latents))
    table, coefficients = torch.randn(N, D, device=device), torch.randn(len(latents), device=device)
    return Factors(table.to(dtype), rows, coefficients.to(dtype), latents)


def widened(factors: Factors) -> Factors:
    return factors._replace(table=factors.table.float(), coefficients=factors.coefficients.float())


def scalars_at(t, device, clip=1.0, live=1.0):
    return torch.tensor([1 - BETAS[0] ** t, (1 - BETAS[1] ** t) ** 0.5, clip, live, t], device=device)


def step(s: State, factors: Factors, t=1, live=1.0, **options) -> Tensor:
    index = kernels.sort_by_latent(factors.latents, len(s.W))
    scalars = scalars_at(t, s.W.device, live=live)
    return update_rows(factors, index, s.W, s.m, s.v, scalars, *HYPER, low=s.low, **options)


@pytest.mark.parametrize(("unit_norm", "extras", "decay"), [(False, False, 0.0), (True, False, 0.0), (True, True, 0.1)])
@pytest.mark.parametrize(("N", "D", "F", "E"), [(1, 1, 1, 1), (9, 33, 6, 20), (6, 257, 4, 12)])
# 3: empty, single and split segments all occur
@pytest.mark.parametrize(("form", "split_at"), [("fp32", 3), ("fp32", 1024), ("split", 3)])
def test_follows_adam(form, N, D, F, E, unit_norm, extras, decay, split_at, device, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", split_at)
    s = state(F, D, device, form)
    expected = s.whole().requires_grad_()
    adam = torch.optim.Adam([expected], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    for t in range(1, 5):
        factors = factors_of(N, D, F, E, device, t, s.W.dtype)
        stored = torch.randn(F, D, device=device).to(s.W.dtype) if extras else None
        dnorm = torch.randn(F, device=device) if extras else None
        options = {"stored": stored, "dnorm": dnorm, "unit_norm": unit_norm}
        wide = None if stored is None else stored.float()
        expected.grad = gradient_reference(widened(factors), expected.detach(), wide, dnorm, project=unit_norm)
        index = kernels.sort_by_latent(factors.latents, F)
        squares = gradient_squares(factors, index, s.W, **options, low=s.low)
        torch.testing.assert_close(squares, expected.grad.square().sum(1), rtol=1e-4, atol=1e-5)
        skipped = step(s, factors, t, **options, weight_decay=decay)
        adam.step()
        if unit_norm:
            expected.data /= expected.data.norm(dim=1, keepdim=True)
        assert not skipped.any()
    # D = 1 at unit norm projects to rounding noise, which Adam blows up to a full step: only the norm is defined there
    if not (unit_norm and D == 1):
        torch.testing.assert_close(s.whole(), expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["fp32, bf16 moments", "split, bf16 moments"])
def test_bf16_moments_are_adams_rounded_to_a_neighbour(form, device):
    """Each step: fp32 Adam from the moments as they are, which then go to one of the two bf16 next to the result."""
    s = state(6, 100, device, form)
    for t in range(1, 5):
        m, v, w = s.m.float(), s.v.float(), s.whole()
        factors = factors_of(9, 100, 6, 20, device, t, s.W.dtype)
        grad = gradient_reference(widened(factors), w)
        step(s, factors, t, seed=3)
        m.lerp_(grad, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        scalars = scalars_at(t, device)
        w -= LR / scalars[0] * m / (v.sqrt() / scalars[1] + EPS)
        torch.testing.assert_close(s.whole(), w, rtol=0, atol=1e-6)
        for ours, exact in ((s.m, m), (s.v, v)):
            away = (ours.float() - exact).abs() / exact.abs().clamp(min=1e-30)
            assert 0.001 < float(away.mean()) and float(away.max()) < 2**-7 + 1e-5
            up = ours.float().abs() > exact.abs()
            assert 0.35 < float(up[exact != 0].float().mean()) < 0.65


def test_both_paths_round_alike(device, monkeypatch):
    """Within what fp32 sums differ by: the same random bits at the same places, however the CPU is sliced."""
    results = []
    for path in ("torch", "this"):
        torch.manual_seed(0)
        s = state(6, 100, device, "split, bf16 moments")
        factors = factors_of(9, 100, 6, 20, device, dtype=torch.bfloat16)
        with monkeypatch.context() as m:
            if path == "torch":
                m.setattr(update, "runs_triton", lambda t: False)
                m.setattr(update, "SLICE", 400)
            step(s, factors, 7, seed=5)
        results.append(s)
    for a, b in zip(results[0][1:3], results[1][1:3], strict=True):
        assert float((a != b).float().mean()) < 0.02
    other = state(6, 100, device, "split, bf16 moments")
    step(other, factors, 8, seed=5)
    assert float((other.m != results[0].m).float().mean()) > 0.3


def test_a_zero_row_has_no_gradient_through_its_norm(device):
    """As torch has it; a division would make the row NaN."""
    s = state(4, 10, device)
    s.W[1] = 0
    leaf = s.W.clone().requires_grad_()
    row_norms(leaf).sum().backward()
    assert torch.isfinite(leaf.grad).all() and not leaf.grad[1].any()
    assert not step(s, Deferred().joined(s.W), dnorm=torch.ones(4, device=device)).any()
    assert torch.isfinite(s.W).all() and not s.W[1].any() and s.m[0].any()


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_bits_twice(form, device, monkeypatch):
    monkeypatch.setattr(by_latent, "SPLIT", 3)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        s = state(5, 40, device, form)
        step(s, factors_of(8, 40, 5, 25, device, dtype=s.W.dtype), unit_norm=True)
        runs.append(s)
    assert runs[0].equals(runs[1].copies())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_whose_gradient_is_not_finite_stays(value, form, device):
    s = state(6, 20, device, form)
    factors = factors_of(5, 20, 6, 15, device, dtype=s.W.dtype)
    step(s, factors)  # moments that are not zero
    before = s.copies()
    hit = factors.rows == factors.rows[0]
    factors.table[factors.rows[0], 3] = value
    touched = torch.zeros(6, dtype=torch.bool, device=device).index_fill(0, factors.latents[hit].long(), True)
    skipped = step(s, factors, 2)
    assert torch.equal(skipped.bool(), touched) and touched.any()
    for now, then in zip((t for t in s if t is not None), before, strict=True):
        assert torch.equal(now[touched], then[touched]) and torch.isfinite(now.float()).all()
    moved = torch.zeros(6, dtype=torch.bool, device=device).index_fill(0, factors.latents[~hit].long(), True) & ~touched
    assert (s.W != before[0]).any(1)[moved].all()


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_moves_when_the_step_is_off(form, device):
    s = state(4, 10, device, form)
    factors = factors_of(5, 10, 4, 9, device, dtype=s.W.dtype)
    step(s, factors)
    before = s.copies()
    step(s, factors, 2, live=0.0, unit_norm=True)
    assert s.equals(before)


def test_joined_factors_add_up(device):
    parts = [factors_of(3, 7, 5, 8, device, seed=s) for s in range(3)]
    W = torch.randn(5, 7, device=device)
    got = gradient_reference(Deferred(parts).joined(W), W)
    torch.testing.assert_close(got, sum(gradient_reference(p, W) for p in parts))
    assert not gradient_reference(Deferred().joined(W), W).any()
