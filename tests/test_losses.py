"""Each term against its plain dense definition in fp64, values and gradients; schedules. Dead latents: test_losses_dead.py."""

import math

import pytest
import torch
from dense_sae import D, F, K, N, activations, best, check, inputs, make, preact, squares, straight, towards, window

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, losses, schedules

# ── reconstruction ───────────────────────────────────────────────────────────────────────────────────────────────────────

ACTIVATIONS = {
    "relu": ReLU,
    "topk": lambda: TopK(K),
    "abstopk": lambda: AbsTopK(K),
    "batchtopk": lambda: BatchTopK(K),
    "jumprelu": lambda: JumpReLU(bandwidth=0.3),
    "jumprelu to input": lambda: JumpReLU(bandwidth=0.3, ste_to_input=True),
    "gated": Gated,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mse_and_l1(name):
    sae, x = make(ACTIVATIONS[name]()), inputs()
    norms = sae.W_dec.norm(dim=1)
    r = losses.reconstruct(sae, sae.encode_sparse(x), x, weight=norms)
    f = activations(sae, x)
    y = f @ sae.W_dec + sae.b_dec
    check(sae, losses.mse(r) + 0.3 * losses.l1(r), squares(y - x) + 0.3 * (f.abs() * norms).sum(1).mean())
    r = losses.reconstruct(sae, sae.encode_sparse(x), x)
    check(sae, losses.fvu(r, x), (y - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["topk", "batchtopk", "abstopk"])
def test_selection_by_decoder_norm(name):
    sae, x = make(ACTIVATIONS[name](), rescale_acts_by_decoder_norm=True), inputs()
    f = activations(sae, x)
    assert not torch.equal(f != 0, activations(make_like(sae), x) != 0)  # the norms change what is selected
    check(sae, losses.mse(losses.reconstruct(sae, sae.encode_sparse(x), x)), squares(f @ sae.W_dec + sae.b_dec - x))
    for got in (sae.encode(x), sae.encode_sparse(x).dense()):
        torch.testing.assert_close(got, f)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec)


def make_like(sae: SAE) -> SAE:
    other = SAE(D, F, type(sae.activation)(K), dtype=torch.float64)
    other.load_state_dict(sae.state_dict())
    return other


def test_selection_by_decoder_norm_needs_a_ranking():
    for activation in (ReLU(), JumpReLU(), Gated()):
        sae = SAE(D, F, activation, rescale_acts_by_decoder_norm=True)
        for call in (sae, sae.encode, sae.encode_sparse):
            with pytest.raises(ValueError, match="does not rank latents"):
                call(torch.randn(2, D))


@pytest.mark.parametrize("levels", [None, [0.5, 2.0, 1.0]])
def test_levels(levels):
    w = levels or [1.0, 1.0, 1.0]
    sae, x = make(BatchTopK(K)), inputs()
    f, code = activations(sae, x), sae.encode_sparse(x)
    dense = sum(c * squares(f[:, :p] @ sae.W_dec[:p] + sae.b_dec - x) for c, p in zip(w, (4, 25, F), strict=True))
    r = losses.reconstruct(sae, code, x, prefixes=[4, 25])
    check(sae, losses.mse(r, levels), dense)
    code = sae.encode_sparse(x)
    check(sae, losses.fvu(losses.reconstruct(sae, code, x, prefixes=[4, 25]), x, levels), dense / losses.variance(x))
    sae = make(TopK(K))
    f = activations(sae, x)
    dense = sum(c * squares((f * best(f, j)) @ sae.W_dec + sae.b_dec - x) for c, j in zip(w, (1, 3, K), strict=True))
    check(sae, losses.mse(losses.reconstruct(sae, sae.encode_sparse(x), x, ks=[1, 3]), levels), dense)
    with pytest.raises(ValueError, match="pass one weight each"):
        losses.mse(r, [1.0])


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder(skip):
    sae, x = make(TopK(K), d_out=4, skip=skip), inputs()
    target = torch.randn(N, 4, dtype=torch.float64)
    y = activations(sae, x) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    r = losses.reconstruct(sae, sae.encode_sparse(x), x, target)
    torch.testing.assert_close(r.error[:, -1], y - target)
    check(sae, losses.mse(r), squares(y - target))


# ── sparsity ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("p", [0.4, 1, 2])
def test_lp(p, root):
    sae, x = make(ReLU()), inputs()
    x[0] = sae.b_dec.detach() - 1e3 * sae.W_enc.detach().sum(1)  # most of its latents are off
    cost = (activations(sae, x) * sae.W_dec.norm(dim=1)).clamp(min=1e-300) ** p  # 0^p has no gradient
    dense = (cost.sum(1) ** (1 / p) if root else cost.sum(1)).mean()
    check(sae, losses.lp(sae.encode_sparse(x), p, sae.W_dec.norm(dim=1), root), dense)


def test_a_zero_entry_has_no_gradient():
    """Zero values are legal entries, and |v|^p is steep there."""
    sae, x = make(TopK(F)), inputs()  # half of the entries are zero
    for root in (False, True):
        losses.lp(sae.encode_sparse(x), 0.5, root=root).backward()
    zeros = torch.zeros(N * F, dtype=torch.float64, requires_grad=True)
    losses.lp(sae.encode_sparse(x).with_values(zeros), 2, root=True).backward()
    assert not zeros.grad.any() and all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("to_input", [False, True])
def test_l0(to_input):
    sae, x = make(JumpReLU(bandwidth=0.5, ste_to_input=to_input)), inputs()
    a = sae.activation
    pre = preact(sae, x)
    l0 = straight((pre > a.theta).double(), window(pre, a), *towards(pre, a)).sum(1)
    for ours, dense in [
        (torch.mean, l0.mean()),
        (lambda n: losses.l0_to_target(n, 7), (2 / 7 * (l0 - 7) ** 2).mean()),
        (lambda n: losses.mean_l0_to_target(n, 7), (l0.mean() / 7 - 1) ** 2),
    ]:
        code = sae.encode_sparse(x)
        assert torch.equal(losses.l0(code, a), code.l0())
        check(sae, ours(losses.l0(code, a)), dense)
    norms = sae.W_dec.norm(dim=1)
    check(sae, losses.l0_tanh(sae.encode_sparse(x), norms, 3.0), (3 * activations(sae, x) * norms).tanh().sum(1).mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_gated(frozen):
    sae, x = make(Gated()), inputs()
    code = sae.encode_sparse(x)
    via_gate = losses.reconstruct(sae, losses.gate(code), x, weight=sae.W_dec.norm(dim=1), frozen=frozen)
    ours = losses.mse(losses.reconstruct(sae, code, x)) + losses.mse(via_gate) + 0.1 * losses.l1(via_gate)
    gate = preact(sae, x).relu()
    W, b = (sae.W_dec.detach(), sae.b_dec.detach()) if frozen else (sae.W_dec, sae.b_dec)
    dense = squares(activations(sae, x) @ sae.W_dec + sae.b_dec - x) + squares(gate @ W + b - x)
    check(sae, ours, dense + 0.1 * (gate * sae.W_dec.norm(dim=1)).sum(1).mean())


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_schedules():
    assert [schedules.warm_up(t, 4) for t in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert schedules.warm_up(0, 0) == 1
    assert [schedules.decay(t, 6, 10) for t in (0, 6, 7, 10, 12)] == [1, 1, 0.75, 0, 0]
    assert schedules.decay(10, 10, 10) == 1
    assert [schedules.anneal(t, 2, 4, 128, 32) for t in (0, 2, 3, 4, 9)] == [128, 128, 80, 32, 32]
    assert schedules.cosine(0, 2, 6) == 1 and schedules.cosine(6, 2, 6, 0.1) == pytest.approx(0.1)
    assert schedules.cosine(3, 2, 6, 0.2) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    with pytest.raises(ValueError, match="pass start <= end"):
        schedules.decay(1, 5, 3)
