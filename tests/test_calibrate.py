"""One threshold for all rows: exact, used in eval, and turned into a JumpReLU."""

import pytest
import torch

from fastsae import SAE, AbsTopK, BatchTopK, JumpReLU, ReLU, TopK
from fastsae.calibrate import calibrate_threshold, find_threshold, to_jumprelu
from fastsae.kernels import scores as kernel_scores

N, D, F, K = 200, 12, 60, 5


def make(activation, rescale=False, dtype=torch.float32):
    sae = SAE(D, F, activation, rescale_acts_by_decoder_norm=rescale, dtype=dtype)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(F, 1) + 0.5)
        sae.b_enc.normal_(0, 0.05)
    return sae


@pytest.mark.parametrize("rescale", [False, True])
def test_mean_l0_is_exactly_k(rescale, monkeypatch):
    monkeypatch.setattr(kernel_scores, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(kernel_scores, "CHUNK", 16)
    sae, x = make(BatchTopK(K), rescale), torch.randn(N, D)
    t = calibrate_threshold(sae, list(x.split(64)))
    scores = (x @ sae.W_enc + sae.b_enc - sae.b_dec @ sae.W_enc) * (sae.W_dec.norm(dim=1) if rescale else 1)
    by_sorting = scores.flatten().sort(descending=True).values[N * K]
    assert t == pytest.approx(float(by_sorting), rel=1e-5)
    assert (scores > t).sum() == N * K
    code = sae.eval().encode_sparse(x)
    assert abs(len(code.values) - N * K) <= (1 if rescale else 0)  # pre · scale > t and pre > t / scale round differently


def test_a_bit_pattern_at_every_edge_of_the_bins():
    """Scores that are whole numbers and powers of two, ties included: those at the threshold stay off."""
    sae = SAE(1, 6, BatchTopK(2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 2.0, 4.0, 4.0, 4.0, -1.0]]))
    x = torch.ones(1, 1)
    found = {k: find_threshold(sae, x, k) for k in (0, 1, 3, 4, 5, 6)}
    assert found == {0: 4.0, 1: 4.0, 3: 2.0, 4: 1.0, 5: 0.0, 6: 0.0}
    tiny = SAE(1, 3, BatchTopK(1))
    with torch.no_grad():
        tiny.W_enc.copy_(torch.tensor([[1.0, 1 + 2**-23, 1 - 2**-24]]))
    assert find_threshold(tiny, x, 1) == 1.0 and find_threshold(tiny, x, 2) == 1 - 2**-24


def test_eval_does_not_depend_on_the_other_rows():
    sae, x = make(BatchTopK(K)), torch.randn(N, D)
    with torch.no_grad():
        assert sae.eval().encode_sparse(x).values.numel() == N * K, "without a threshold eval selects by batch"
        calibrate_threshold(sae, x)
        whole = sae.encode(x)
        torch.testing.assert_close(torch.cat([sae.encode(row) for row in x.split(1)]), whole)
        assert sae.train().encode_sparse(x[:7]).values.numel() == 7 * K


def test_observe_follows_the_least_score_that_fires():
    sae = make(BatchTopK(K, threshold_lr=0.25), rescale=True)
    expected = None
    for _ in range(3):
        code = sae.encode_sparse(torch.randn(N, D))
        sae.activation.observe(code, sae.select_scale())
        scores = code.values * sae.W_dec.norm(dim=1)[code.latents]
        least = float(scores[code.values > 0].min())
        expected = least if expected is None else expected + 0.25 * (least - expected)
        assert float(sae.activation.threshold) == pytest.approx(expected, rel=1e-6)
    before = sae.activation.threshold.clone()
    nothing = sae.encode_sparse(torch.randn(N, D))
    sae.activation.observe(nothing.with_values(torch.zeros_like(nothing.values)))
    assert torch.equal(sae.activation.threshold, before), "a batch in which nothing fires teaches nothing"


def test_the_threshold_travels_and_stays_exact():
    sae = make(BatchTopK(K))
    sae.activation.set_threshold(1 / 3)
    assert sae.half().activation.threshold.dtype == torch.float64
    assert float(sae.activation.threshold) == 1 / 3
    other = make(BatchTopK(K)).eval()
    other.load_state_dict(sae.state_dict())
    assert other.activation.knows_threshold and float(other.activation.threshold) == 1 / 3


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("activation", [TopK, BatchTopK])
def test_to_jumprelu_fires_where_the_threshold_says(activation, rescale):
    sae, x = make(activation(K), rescale).eval(), torch.randn(N, D)
    jump = to_jumprelu(sae, x)
    assert abs(jump.encode_sparse(x).values.numel() - N * K) <= 1
    if activation is BatchTopK:
        calibrate_threshold(sae, x)
        torch.testing.assert_close(to_jumprelu(sae)(x), sae(x))
    assert jump.W_enc.data_ptr() != sae.W_enc.data_ptr()


def test_mistakes():
    x = torch.randn(3, D)
    with pytest.raises(TypeError, match="only BatchTopK keeps a threshold"):
        calibrate_threshold(make(TopK(K)), x)
    with pytest.raises(ValueError, match="no rows"):
        calibrate_threshold(make(BatchTopK(K)), x[:0])
    with pytest.raises(ValueError, match="pass data"):
        to_jumprelu(make(BatchTopK(K)))
    for activation in (AbsTopK(K), JumpReLU(), ReLU()):
        with pytest.raises(TypeError, match=type(activation).__name__):
            to_jumprelu(make(activation), x)
