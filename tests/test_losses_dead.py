"""Terms about dead latents, each against its plain dense definition in fp64; beside the fused update; in bounded memory."""

import pytest
import torch
from dense_sae import DEAD, D, F, K, N, best, check, inputs, make, preact, squares
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae import SAE, JumpReLU, TopK, functional, losses
from fastsae.kernels import scores
from fastsae.optim import FusedAdam


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """One chunk, and chunks of two latents."""
    if request.param == "chunks":
        monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 2 * N)


def dead_part(sae: SAE, x: Tensor, ids: Tensor = DEAD) -> tuple[losses.Part, Tensor, Tensor]:
    """(the part, ours; the error, ours; the dead latents' pre-activations, dense)"""
    error = losses.reconstruct(sae, sae.encode_sparse(x), x).error[:, -1]
    return losses.part(sae, x, ids), error, preact(sae, x)[:, ids]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("k", [None, 1, 8, 20])
@pytest.mark.parametrize("variant", ["signed", "relu", "magnitude", "unscaled"])
def test_auxk(variant, k, rescale, chunks):
    sae, x = make(TopK(K), rescale_acts_by_decoder_norm=rescale), inputs()
    dead, error, pre = dead_part(sae, x)
    options = {} if variant == "signed" else {"scaled": False} if variant == "unscaled" else {variant: True}
    ours = losses.auxk(dead, error, k, **options)
    keeps = k or D // 2
    score = pre * sae.W_dec[DEAD].norm(dim=1) if rescale else pre
    kept = best(score.abs() if variant == "magnitude" else score, min(keeps, len(DEAD)))
    acts = (pre.relu() if variant == "relu" else pre) * kept
    dense = squares(acts @ sae.W_dec[DEAD] + error.detach())
    check(sae, ours, dense if variant == "unscaled" else min(len(DEAD) / keeps, 1) * dense)


def test_auxk_normalised(chunks):
    sae, x = make(TopK(K)), inputs()
    dead, error, pre = dead_part(sae, x)
    r = -error.detach()
    dense = squares((pre.relu() * best(pre, 3)) @ sae.W_dec[DEAD] - r) / squares(r - r.mean(0))
    check(sae, losses.auxk_normalised(dead, error), dense)
    constant = losses.auxk_normalised(losses.part(sae, x, DEAD), torch.ones_like(error))
    gradients = torch.autograd.grad(constant, [sae.W_enc, sae.W_dec])
    assert constant == 0 and all((g == 0).all() for g in gradients)


def test_pre_act(chunks):
    sae, x = make(JumpReLU(theta=0.3)), inputs()
    dead, _, pre = dead_part(sae, x)
    theta = sae.activation.theta
    dense = ((theta[DEAD] - pre).relu() * sae.W_dec[DEAD].norm(dim=1)).sum(1).mean()
    check(sae, losses.pre_act(dead, theta[DEAD]), dense)


def test_ghost(chunks):
    sae, x = make(TopK(K)), inputs()
    dead, error, pre = dead_part(sae, x)
    r, g = -error.detach(), pre.exp() @ sae.W_dec[DEAD]
    miss = (g * (r.norm(dim=1) / 2 / g.norm(dim=1)).detach()[:, None] - r).square().sum(1)
    check(sae, losses.ghost(dead, error), ((r.square().sum(1) / miss).detach() * miss).mean())


def test_ties_go_to_the_lower_latent():
    """Two dead latents with the same encoder: only one of them is asked."""
    sae, x = make(TopK(K)), inputs()
    with torch.no_grad():
        sae.W_enc[:] = sae.W_enc[:, :1]
        sae.b_enc.zero_()
    dead, error, _ = dead_part(sae, x, torch.tensor([30, 10, 20]))
    losses.auxk(dead, error, k=1).backward()
    assert (sae.W_enc.grad != 0).any(0).nonzero().squeeze(1).tolist() == [30]  # the lower number within the part


def test_nothing_dead():
    sae, x = make(JumpReLU()), inputs()
    dead, error, _ = dead_part(sae, x, torch.tensor([], dtype=torch.int64))
    theta = sae.activation.theta[:0]
    assert losses.pre_act(dead, theta) == 0
    for term in (losses.auxk, losses.auxk_normalised, losses.ghost):
        assert term(dead, error) == 0


def test_refuses():
    sae, x = make(TopK(K)), inputs()
    code = sae.encode_sparse(x)
    with pytest.raises(ValueError, match="no pre-activations"):
        losses.gate(functional.SparseCode(code.values, code.latents, code.offsets, code.shape))
    with pytest.raises(ValueError, match="p > 0"):
        losses.lp(code, 0)
    with pytest.raises(TypeError, match="int64 ids"):
        losses.part(sae, x, torch.zeros(F, dtype=torch.bool))


def test_leading_dimensions_and_16_bits():
    sae = SAE(D, F, JumpReLU(), dtype=torch.bfloat16)
    x = torch.randn(3, 4, D, dtype=torch.bfloat16)
    code = sae.encode_sparse(x)
    r = losses.reconstruct(sae, code, x)
    dead = losses.part(sae, x, DEAD)
    error, theta = r.error[:, -1], sae.activation.theta
    terms = [losses.mse(r), losses.fvu(r, x), losses.l1(r), losses.lp(code, 0.5), losses.l0(code, sae.activation).mean()]
    terms += [losses.l0_tanh(code, sae.W_dec.norm(dim=1)), losses.pre_act(dead, theta[DEAD])]
    terms += [term(dead, error) for term in (losses.auxk, losses.auxk_normalised, losses.ghost)]
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms)
    sum(terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())


# ── beside the fused update ──────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_stored_under_the_fused_update():
    """FusedAdam gives the weights no `.grad`, and takes the same steps as torch's Adam."""
    stock, fused = make(JumpReLU(bandwidth=0.3)), SAE(D, F, JumpReLU(bandwidth=0.3), dtype=torch.float64)
    fused.load_state_dict(stock.state_dict())
    optimizers = [torch.optim.Adam(stock.parameters(), lr=0.01), FusedAdam(fused, lr=0.01)]
    for _ in range(3):
        x = inputs()
        for sae, optimizer in zip((stock, fused), optimizers, strict=True):
            optimizer.zero_grad()
            code, dead = sae.encode_sparse(x), losses.part(sae, x, DEAD)
            r = losses.reconstruct(sae, code, x)
            loss = losses.mse(r) + losses.lp(code, 0.5) + losses.l0(code, sae.activation).mean()
            loss += losses.auxk(dead, r.error[:, -1]) + losses.pre_act(dead, sae.activation.theta[DEAD])
            loss.backward()
            optimizer.step()
        assert fused.W_enc.grad is None and fused.W_dec.grad is None
    for (name, a), b in zip(stock.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Largest(TorchDispatchMode):
    """The most elements any result has, in forward and backward passes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("term", ["auxk", "pre_act", "ghost"])
def test_dead_latents_stay_in_chunks(term, monkeypatch):
    n, width, M, block = 64, 8, 3000, 1 << 13
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", block)
    sae = SAE(width, 4000, JumpReLU(theta=0.5))
    x, ids = torch.randn(n, width), torch.randperm(4000)[:M]
    with Largest() as largest:
        dead = losses.part(sae, x, ids)
        call = {"pre_act": lambda: losses.pre_act(dead, sae.activation.theta[ids])}
        call.get(term, lambda: getattr(losses, term)(dead, torch.ones(n, width)))().backward()
    parameters = 4000 * width
    assert sae.W_enc.grad.any() and largest.elements <= max(parameters, 2 * block) < n * M / 3
