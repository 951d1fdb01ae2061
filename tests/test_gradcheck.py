"""fp64: every reference and every public op against finite differences. What has no true gradient (the jump's
straight-through estimates) is held to its formula in test_activations.py."""

import pytest
import torch
from torch.autograd import gradcheck

from fastsae import SAE, AbsTopK, BatchTopK, Gated, ReLU, TopK, functional, kernels

N, D, F = 4, 5, 9


def randn(*size):
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


def code(bags=N):
    """(values away from 0, where |value| has a kink; latents; offsets), with an empty row and collisions."""
    fires = torch.rand(bags, F) < 0.4
    fires[1] = False
    fires[0, :2] = fires[2, :2] = True
    latents, offsets = fires.nonzero()[:, 1].int(), torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0)).int()
    values = torch.randn(len(latents), dtype=torch.float64)
    return (values + values.sign() * 0.1).requires_grad_(), latents, offsets


def dense_inputs():
    """x, W, b whose pre-activations all keep away from the kinks at 0 and at theta."""
    x, W, b = randn(N, D), randn(F, D).detach().T.requires_grad_(), randn(F)
    theta = torch.full((F,), 0.5, dtype=torch.float64)
    pre = x @ W + b
    assert pre.abs().min() > 1e-3 and (pre - theta).abs().min() > 1e-3
    return x, W, b, theta


@pytest.mark.parametrize("decode", [kernels.decode_reference, kernels.decode])
@pytest.mark.parametrize("bias", [True, False])
def test_decode(decode, bias):
    values, latents, offsets = code()
    b = [randn(D)] if bias else []
    assert gradcheck(lambda v, W, *b: decode(v, latents, offsets, W, *b), (values, randn(F, D), *b))


@pytest.mark.parametrize("loss", [kernels.decode_loss_reference, kernels.decode_loss])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_decode_loss(loss, levels, weighted):
    values, latents, bounds = code(N * levels)
    weight = [randn(F)] if weighted else []
    inputs = (values, randn(F, D), randn(D), randn(N, D), *weight)
    assert gradcheck(lambda v, W, b, t, *w: loss(v, latents, bounds, W, b, t, *w), inputs)
    # and alone, as the usual loss uses it: no gradient tensor for the error
    assert gradcheck(lambda v, W, b, t, *w: loss(v, latents, bounds, W, b, t, *w)[1:], inputs)


def test_encode_reference():
    _, latents, offsets = code()
    assert gradcheck(lambda x, W, b: kernels.encode_reference(x, W, b, latents, offsets), (randn(N, D), randn(D, F), randn(F)))


@pytest.mark.parametrize("layout", ["latent-major", "row-major"])
def test_encode(layout):
    """Finite differences need the values to follow the inputs: they come from the reference without its graph."""
    _, latents, offsets = code()

    def encode(x, W, b):
        with torch.no_grad():
            pre = kernels.encode_reference(x, W, b, latents, offsets)
        return kernels.encode(x, W, b, pre, latents, offsets)

    W = randn(F, D).detach().T
    W = (W if layout == "latent-major" else W.contiguous()).requires_grad_()
    assert gradcheck(encode, (randn(N, D), W, randn(F)))


@pytest.mark.parametrize("encode", [kernels.dense_encode_reference, kernels.dense_encode])
@pytest.mark.parametrize("jump", [False, True])
def test_dense_encode(encode, jump):
    *inputs, theta = dense_inputs()
    assert gradcheck(lambda x, W, b: encode(x, W, b, theta if jump else None), inputs)


def test_gather_latents():
    _, latents, _ = code()
    order, starts = kernels.sort_by_latent(latents, F)
    assert gradcheck(lambda p: kernels.gather_latents(p, latents, order, starts), randn(F))
    assert gradcheck(lambda p: kernels.gather_latents_reference(p, latents), randn(F))


@pytest.mark.parametrize("function", ["reference", "torch path"])
@pytest.mark.parametrize("levels", [1, 2])
def test_latent_backward(function, levels):
    """Autograd of encode, any function of pre, decode: with jac its slope and direct a gradient from elsewhere."""
    _, latents, offsets = code(N * levels)
    rows = offsets[::levels]
    x, W_enc, b_enc, W_dec, scale = randn(N, D), randn(D, F), randn(F), randn(F, D + 2), randn(N * levels).detach()
    pre = kernels.encode_reference(x, W_enc, b_enc, latents, rows)
    values = pre.tanh()
    values.retain_grad()
    y = kernels.decode_reference(values, latents, offsets, W_dec)
    g, extra = torch.randn_like(y), torch.randn_like(values)
    torch.autograd.backward([y, values], [g * scale[:, None], extra])

    given = dict(
        g=g, scale=scale, values=values.detach(), W_dec=W_dec.detach(), x=x.detach(), direct=extra, jac=1 - values.detach() ** 2
    )
    if function == "reference":
        dvalues, dW_dec, dW_enc, db_enc = kernels.latent_backward_reference(latents, offsets, F, levels, **given)
    else:
        dvalues, dW_dec, dW_enc, db_enc = kernels.latent_backward(
            *kernels.sort_by_latent(latents, F), latents, offsets, levels, **given
        )
    for got, expected in ((dvalues + extra, values.grad), (dW_dec, W_dec.grad), (dW_enc.T, W_enc.grad), (db_enc, b_enc.grad)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ from x to the loss


def parameters(sae):
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p))
    return [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in sae.parameters()]


@pytest.mark.parametrize("activation", [TopK, AbsTopK, BatchTopK, ReLU, Gated])
@pytest.mark.parametrize("dense", [False, True])
def test_sae(activation, dense, monkeypatch):
    """Every activation that has a true gradient. Differences of 1e-6 do not change what is selected."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 0.0 if dense else 1.0)
    sae = SAE(D, F, activation(3) if issubclass(activation, TopK) else activation(), skip=True, dtype=torch.float64)
    names = [name for name, _ in sae.named_parameters()]
    leaves = parameters(sae)
    assert gradcheck(
        lambda x, *p: torch.func.functional_call(sae, dict(zip(names, p, strict=True)), (x,)), (randn(2, 2, D), *leaves)
    )


@pytest.mark.parametrize("levels", [{}, {"prefixes": [2, 5]}, {"ks": [1, 2]}], ids=str)
def test_reconstruction_loss(levels):
    def loss(x, W_enc, b_enc, W_dec, b_dec, weight):
        code = functional.encode_topk(x, W_enc, b_enc, 3)
        return functional.reconstruction_loss(code.with_values(code.values.tanh()), W_dec, b_dec, x, weight, **levels)

    assert gradcheck(loss, (randn(N, D), randn(D, F), randn(F), randn(F, D), randn(D), randn(F)))


def test_dense_path_with_penalty(monkeypatch):
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 3 * N)
    *inputs, _ = dense_inputs()
    assert gradcheck(
        lambda x, W, b, W_dec, b_dec, weight: functional.reconstruct_dense(
            x, W, b, W_dec, b_dec, lambda pre, at, _: pre.relu() * at(weight), lambda pre, acts, at: acts * at(weight)
        ),
        (*inputs, randn(F, D), randn(D), randn(F)),
    )
