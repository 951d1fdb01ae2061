"""Metrics that SAELens does not have, and that nothing of shape [N, F] is made for them. (Theirs: tests/hosts.)"""

import pytest
import torch

from fastsae import SAE, BatchTopK, ReLU, TopK
from fastsae.metrics import evaluate

D, F = 8, 40


def test_dead_dense_and_histogram():
    sae = SAE(D, 5, ReLU())
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[0] = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
        sae.b_enc.copy_(torch.tensor([0.0, -1.0, -899.5, -999.0, 0.0]))
    x = torch.zeros(1000, D)
    x[:, 0] = torch.arange(1000)
    found = evaluate(sae, x.split(300))
    assert found.feature_density.tolist() == pytest.approx([0.999, 0.998, 0.1, 0, 0])
    assert (found.dead, found.dense) == (2 / 5, 2 / 5)
    assert found.density_histogram()["never"] == 2 and found.density_histogram()["-1 to 0"] == 3
    assert found.rows == 1000 and found.fvu == 1 - found.explained_variance


def test_batches_do_not_matter():
    sae, x = SAE(D, F, TopK(3)), torch.randn(64, D)
    whole, parts = evaluate(sae, [x]).scalars(), evaluate(sae, x.split(10)).scalars()
    for name in whole.keys() - {"explained_variance_legacy", "relative_reconstruction_bias"}:  # SAELens has these by batch
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_it_is_the_sae_of_eval():
    sae, x = SAE(D, F, BatchTopK(3)).train(), torch.randn(64, D)
    sae.activation.set_threshold(1e9)
    assert evaluate(sae, [x]).l0 == 0 and sae.training


def test_transcoder_is_measured_against_its_target():
    sae = SAE(D, F, TopK(3), d_out=5, skip=True)
    x, target = torch.randn(64, D), torch.randn(64, 5)
    with torch.no_grad():
        sae.W_skip.normal_()
        expected = (sae(x) - target).square().sum(1).mean()
    assert evaluate(sae, [(x, target)]).mse == pytest.approx(float(expected), rel=1e-5)


def test_a_perfect_and_a_constant_reconstruction():
    sae = SAE(D, 2 * D, ReLU())
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)], 1))
        sae.W_dec.copy_(sae.W_enc.T)
    x = torch.randn(64, D)
    assert evaluate(sae, [x]).explained_variance == pytest.approx(1) and evaluate(sae, [x]).cossim == pytest.approx(1)
    assert evaluate(sae, [torch.zeros(3, D)]).explained_variance == 1, "no variance, no error"


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="no rows"):
        evaluate(SAE(D, F, TopK(3)), [])
