"""Input scales: the output is on the input's own, the loss is of that scale, and gradients are autograd's."""

import pytest
import torch

from fastsae import SAE, TopK, losses
from fastsae.formats.parts import put_together, take_apart
from fastsae.initialise import geometric_median, input_scale, set_b_dec

N, D, F, K = 30, 8, 40, 4


def make(normalize, dtype=torch.float64):
    sae = SAE(D, F, TopK(K), normalize=normalize, dtype=dtype)
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(0, 0.1)
    return sae, torch.randn(N, D, dtype=dtype) * torch.rand(N, 1, dtype=dtype) * 5 + 1


def plain(sae, x):
    """The same in dense torch, from SAELens' definitions."""
    if sae.normalize == "constant_norm_rescale":
        c = D**0.5 / x.norm(dim=-1, keepdim=True)
        seen, back = x * c, lambda y: y / c
    else:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        seen, back = (x - mean) / (std + 1e-5), lambda y: y * std + mean
    pre = (seen - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1)
    return back((pre * kept).relu() @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_forward_and_loss(normalize):
    sae, x = make(normalize)
    expected = plain(sae, x)
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x), like=x), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), expected)
    r = losses.reconstruct(sae, sae.encode_sparse(x), x)
    torch.testing.assert_close(r.error[:, 0], expected - x)
    got = torch.autograd.grad(losses.mse(r), list(sae.parameters()))
    want = torch.autograd.grad((plain(sae, x) - x).square().sum(1).mean(), list(sae.parameters()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_a_row_without_a_scale_comes_back_finite(normalize):
    sae, x = make(normalize)
    x[3] = 0 if normalize == "constant_norm_rescale" else 2.5
    assert sae(x).isfinite().all()
    loss = losses.mse(losses.reconstruct(sae, sae.encode_sparse(x), x))
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, list(sae.parameters())))


def test_mistakes():
    sae, x = make("layer_norm")
    with pytest.raises(ValueError, match="decode\\(code, like=x\\)"):
        sae.decode(sae.encode_sparse(x))
    with pytest.raises(ValueError, match="layer_nrom"):
        SAE(D, F, TopK(K), normalize="layer_nrom")
    with pytest.raises(ValueError, match="a transcoder"):
        SAE(D, F, TopK(K), d_out=D, normalize="layer_norm")


def test_a_scale_folds_into_the_weights():
    sae, x = make("none")
    s = input_scale([x[:10], x[10:]])
    assert (x * s).norm(dim=1).mean() == pytest.approx(D**0.5)
    folded = put_together(take_apart(sae, input_scale=s))
    torch.testing.assert_close(folded(x), sae(x * s) / s)
    assert not torch.equal(folded.W_dec, sae.W_dec)


def test_b_dec_from_data():
    sae, x = make("none")
    set_b_dec(sae, "mean", [x[:10], x[10:]])
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))
    set_b_dec(sae, "geometric_median", [x])
    with torch.no_grad():
        pull = torch.nn.functional.normalize(x - sae.b_dec, dim=1).sum(0)
    assert pull.norm() < 1e-3, "unit vectors from the median to the rows cancel"
    outlier = torch.cat([x, torch.full((1, D), 1e6, dtype=x.dtype)])
    assert (geometric_median(outlier) - geometric_median(x)).norm() < 1
