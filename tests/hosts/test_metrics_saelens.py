"""Our metrics beside SAELens' evals, on the same SAE and activations."""

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.evals import get_sparsity_and_variance_metrics
from sae_lens.training.activation_scaler import ActivationScaler

from fastsae import SAE, ReLU, TopK
from fastsae.metrics import evaluate

D, F, K, BATCHES = 16, 96, 6, 3


class Model:
    """A language model of which the evals need one activation."""

    def __init__(self):
        self.table = torch.randn(50, D) + 1

    def run_with_cache(self, tokens, **_):
        return None, {"hook": self.table[tokens] * (1 + torch.arange(tokens.shape[1]))[:, None] / 8}


class Store:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def get_batch_tokens(self, n):
        return torch.randint(50, (n, 8), generator=self.generator)


@pytest.mark.parametrize("which", ["relu", "topk"])
def test_definitions(which):
    torch.manual_seed(0)
    if which == "relu":
        theirs, ours = StandardSAE(StandardSAEConfig(D, F)), SAE(D, F, ReLU())
    else:
        theirs, ours = TopKSAE(TopKSAEConfig(D, F, k=K)), SAE(D, F, TopK(K))
    theirs.cfg.metadata.hook_name = "hook"
    theirs.cfg.metadata.hook_head_index = None
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(0, 0.2)
            ours.get_parameter(name).copy_(p)
    model, store = Model(), Store()
    metrics, features = get_sparsity_and_variance_metrics(
        theirs, model, store, ActivationScaler(), n_batches=BATCHES, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, eval_batch_size_prompts=5, model_kwargs={},
    )  # fmt: skip
    again = Store()
    found = evaluate(ours, [model.run_with_cache(again.get_batch_tokens(5))[1]["hook"] for _ in range(BATCHES)])
    for name, value in metrics.items():
        assert found.scalars()[name] == pytest.approx(value, rel=1e-5), name
    assert len(metrics) == 10
    assert found.feature_density.tolist() == pytest.approx(features["feature_density"])
