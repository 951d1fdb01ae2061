import itertools

import numpy as np
import pytest
import torch
from sources import assert_equal, assert_resumes

from fastsae.data import Superposition
from fastsae.data.synthetic import _assignment, matched_cosine, mean_max_cosine

N = 60_000


def firing(**options):
    """Which of the features fire in N rows; and the probability of each."""
    source = Superposition(8, 24, 3.0, batch_size=8, **options)
    fires = source.codes(N) > 0
    return fires.double(), fires.double().mean(0)


def within(mean, expected, sigmas=5.0):
    """A frequency over N rows is as near to a probability as chance lets it."""
    return bool(((mean - expected).abs() <= sigmas * (torch.as_tensor(expected) * (1 - expected) / N).sqrt()).all())


def test_the_task_of_the_issue_is_the_default():
    source = Superposition()
    x, codes = source.sample(20_000)
    assert x.shape == (20_000, 64) and codes.shape == (20_000, 512) and source.features.shape == (512, 64)
    assert torch.allclose(source.features.norm(dim=1), torch.ones(512))
    magnitudes = codes[codes > 0]
    assert 0.75 <= magnitudes.min() < 0.751 and 1.249 < magnitudes.max() <= 1.25
    assert abs(magnitudes.mean() - 1) < 0.002
    assert abs(len(magnitudes) / 20_000 - 5) < 5 * (5 / 20_000) ** 0.5
    assert_equal(x, codes @ source.features)
    assert next(source).shape == (1024, 64)


def test_features_fire_alone_by_default():
    fires, each = firing()
    assert within(each, torch.tensor(3 / 24))
    correlation = torch.corrcoef(fires.T) - torch.eye(24)
    assert correlation.abs().max() < 5 / N**0.5


@pytest.mark.parametrize("correlation", [0.3, 1.0])
def test_correlation_is_the_coefficient_within_a_group(correlation):
    fires, each = firing(group_size=4, correlation=correlation)
    assert within(each, torch.tensor(3 / 24))
    groups = torch.arange(24) // 4
    expected = torch.where(groups[:, None] == groups, correlation, 0.0).fill_diagonal_(1)
    assert (torch.corrcoef(fires.T) - expected).abs().max() < 0.03


def test_a_child_fires_only_with_its_parent_and_then_with_its_probability():
    fires, each = firing(group_size=3, child_probability=0.4)
    groups = fires.view(N, 8, 3)
    parents, children = groups[..., :1], groups[..., 1:]
    assert (children <= parents).all()
    share = children.sum(0) / parents.sum(0)
    assert (share - 0.4).abs().max() < 5 * (0.24 / parents.sum(0).min()) ** 0.5
    assert abs(fires.sum(1).mean() - 3) < 0.05
    siblings = (children[..., 0] * children[..., 1]).sum(0) / parents[..., 0].sum(0)
    assert (siblings - 0.16).abs().max() < 0.03


def test_streams_share_features_and_seeds_do_not():
    one, other, same, another = (Superposition(seed=s, stream=t) for s, t in ((1, 0), (1, 1), (1, 0), (2, 0)))
    assert one.features.equal(other.features) and not one.features.equal(another.features)
    x = next(one)
    assert x.equal(next(same))
    assert not x.equal(next(other)) and not x.equal(next(another))


def test_resumes_at_any_moment():
    for at in (0, 1, 5):
        assert_resumes(lambda: Superposition(8, 16, batch_size=4, dtype=torch.bfloat16), at)
        assert_resumes(lambda: Superposition(8, 16, batch_size=4, group_size=4, correlation=0.5), at)
        assert_resumes(lambda: Superposition(8, 16, batch_size=4, group_size=4, child_probability=0.5), at)


def test_what_gives_no_probabilities_is_refused():
    refused = [
        ({"group_size": 3}, "divides n_features"),
        ({"correlation": 1.5}, "from 0 to 1"),
        ({"correlation": 0.5, "child_probability": 0.5}, "one of them"),
        ({"active": 600.0}, "probabilities"),
        ({"active": 0.0}, "probabilities"),
        ({"group_size": 2, "child_probability": 1.2}, "probabilities"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            Superposition(**options)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_true_dictionary_scores_one_whatever_its_order_and_scale():
    features = Superposition().features
    W_dec = torch.cat([features[torch.randperm(512)] * torch.rand(512, 1), torch.randn(500, 64)])
    assert mean_max_cosine(W_dec, features) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(W_dec, features) == pytest.approx(1, abs=1e-6)
    assert mean_max_cosine(-features, features) < 0.6


def test_mean_max_cosine_is_its_definition_over_many_blocks():
    features, W_dec = torch.randn(7, 5), torch.randn(20_000, 5)
    expected = torch.nn.functional.cosine_similarity(features[:, None].double(), W_dec.double(), dim=2).amax(1).mean().item()
    assert mean_max_cosine(W_dec, features) == pytest.approx(expected, abs=1e-6)


def test_one_latent_stands_for_one_feature_only():
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert mean_max_cosine(W_dec, features) == pytest.approx(0.9)
    assert matched_cosine(W_dec, features) == pytest.approx(0.8)
    assert matched_cosine(W_dec[:1], features) == pytest.approx(0.5)  # the other one is found by none


@pytest.mark.parametrize("n, m", [(1, 1), (1, 4), (3, 3), (4, 6), (5, 5)])
def test_the_assignment_is_the_best_of_all(n, m):
    random = np.random.default_rng(n * m)
    for i in range(40):
        cost = random.standard_normal((n, m)) if i % 2 else random.integers(-2, 3, (n, m)).astype(float)  # ties
        columns = _assignment(cost)
        assert len(set(columns)) == n
        best = min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(m), n))
        assert cost[np.arange(n), columns].sum() == pytest.approx(best)
