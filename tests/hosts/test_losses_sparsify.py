"""FVU, AuxK and multi-TopK against sparsify, whose encoder does not learn from the last two."""

import os

import pytest
import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from sparsify import SparseCoder, SparseCoderConfig

from fastsae import SAE, TopK, losses

N, D, F, K = 40, 12, 96, 4


@pytest.mark.parametrize("dead", [4, 30])
def test_fvu_auxk_and_multi_topk(dead, dtype, agree):
    config = SparseCoderConfig(num_latents=F, k=K, multi_topk=True, normalize_decoder=False)
    theirs = SparseCoder(D, config, dtype=dtype)
    ours = SAE(D, F, TopK(4 * K), dtype=dtype)
    names = {"encoder.weight": ours.W_enc, "encoder.bias": ours.b_enc, "W_dec": ours.W_dec, "b_dec": ours.b_dec}
    parameters = {name: (names[name], p) for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for a, b in parameters.values():
            b += torch.randn_like(b) * 0.3
            a.copy_(b if a.shape == b.shape else b.T)
    x, mask = torch.randn(N, D, dtype=dtype), torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F)[:dead]] = True
    ids = mask.nonzero().squeeze(1)

    def out():
        return theirs(x, dead_mask=mask)

    def level_and_whole():
        """fvu of each row's strongest K, and of all 4K."""
        r = losses.reconstruct(ours, ours.encode_sparse(x), x, ks=[K])
        return r, losses.fvu(r, x, [1, 0]), losses.fvu(r, x, [0, 1])

    def clear():
        ours.zero_grad()
        theirs.zero_grad()

    r, first, whole = level_and_whole()
    agree(first, out().fvu, parameters)

    # WRONG in theirs: the encoder gets no gradient from either term. Values and the decoder's gradient are equal, and ours
    # is the gradient of the definition.
    decoder = {"W_dec": parameters["W_dec"]}
    pre = (x - ours.b_dec) @ ours.W_enc + ours.b_enc
    r, _, whole = level_and_whole()
    f = torch.zeros_like(pre).scatter(1, pre.topk(4 * K).indices, 1.0) * pre.relu()
    dense = (f @ ours.W_dec + ours.b_dec - x).square().sum() / (x - x.mean(0)).square().sum()
    check(agree, clear, whole, out().multi_topk_fvu, dense, ours, theirs, decoder)

    aux = losses.auxk(losses.part(ours, x, ids), r.error[:, 0].detach(), relu=True) / losses.variance(x)
    k = min(D // 2, dead)
    f = torch.zeros(N, dead, dtype=dtype).scatter(1, pre[:, ids].topk(k).indices, 1.0) * pre[:, ids].relu()
    miss = (f @ ours.W_dec[ids] + r.error[:, 0].detach()).square().sum()
    dense = min(dead / (D // 2), 1) * miss / (x - x.mean(0)).square().sum()
    check(agree, clear, aux, out().auxk_loss, dense, ours, theirs, decoder)


def check(agree, clear, term, peers, dense, ours, theirs, decoder):
    clear()
    agree(term, peers, decoder)
    assert theirs.encoder.weight.grad is None or not theirs.encoder.weight.grad.any()
    got = [ours.W_enc.grad, ours.b_enc.grad, ours.b_dec.grad]
    expected = torch.autograd.grad(dense, [ours.W_enc, ours.b_enc, ours.b_dec], retain_graph=True)
    assert ours.W_enc.grad.any()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
