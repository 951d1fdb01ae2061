"""Every activation, through every way an SAE has of using it, against its plain dense definition: values and all gradients."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsae import SAE, AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, SparseCode, TopK, functional, losses
from fastsae.kernels import scores

N, D, F, K = 7, 8, 40, 3
BANDWIDTH = 4.0


# ------------------------------------------------------------------------------------------------- definitions [N, F] -> [N, F]


def strongest(score: Tensor, k: int) -> Tensor:
    """Mask of the k largest of each row; the lower index among equals."""
    order = score.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(score).scatter(-1, order, 1.0)


def topk(sae, pre):
    return pre.relu() * strongest(pre, K)


def abs_topk(sae, pre):
    return pre * strongest(pre.abs(), K)


def batch_topk(sae, pre):
    return pre.relu() * strongest(pre.flatten(), len(pre) * K).view_as(pre)


def relu(sae, pre):
    return pre.relu()


def jump(sae, pre):
    """hosts.md B1: f = h · 1[h > θ];  ∂f/∂θ = -(θ/ε) rect((h - θ)/ε),  ∂f/∂h = 1[h > θ] (+ (θ/ε) rect with ste_to_input)."""
    theta, width = sae.activation.theta, sae.activation.bandwidth
    h, t = pre.detach(), theta.detach()
    rect = ((h - t) / width).abs() < 0.5
    slope = (h > t) + (t / width * rect if sae.activation.ste_to_input else 0.0)
    return h * (h > t) + (pre - h) * slope - (theta - t) * (t / width * rect)


def gated(sae, pre):
    """hosts.md B1: 1[x̃ W + b_gate > 0] · relu(x̃ (W · e^r_mag) + b_mag)."""
    centred = pre - sae.b_enc
    return (pre > 0) * (centred * sae.activation.r_mag.exp() + sae.activation.b_mag).relu()


class TopTwoOfEachHalf(Activation):
    """What adding an activation takes: `select` alone."""

    def select(self, pre: Tensor) -> SparseCode:
        (R, F), half = pre.shape, pre.shape[1] // 2
        best = torch.cat([h.sort(descending=True, stable=True).indices[:, :2] for h in pre.split(half, 1)], 1)
        latents = best.add(torch.tensor([0, 0, half, half], device=pre.device)).sort(1).values
        offsets = torch.arange(0, 4 * R + 1, 4, dtype=torch.int32, device=pre.device)
        return SparseCode(pre.gather(1, latents).flatten(), latents.int().flatten(), offsets, (R, F))


def top_two_of_each_half(sae, pre):
    return torch.cat([h.relu() * strongest(h, 2) for h in pre.split(pre.shape[1] // 2, 1)], 1)


class AlwaysTheFirst(Activation):
    """Returns a view of the block it was shown, which the next block overwrites."""

    def select(self, pre: Tensor) -> SparseCode:
        zeros = torch.zeros(len(pre), dtype=torch.int32, device=pre.device)
        offsets = torch.arange(len(pre) + 1, dtype=torch.int32, device=pre.device)
        return SparseCode(pre[:, 0], zeros, offsets, tuple(pre.shape))


def always_the_first(sae, pre):
    return pre.relu() * (torch.arange(pre.shape[1], device=pre.device) == 0)


CASES = {
    "TopK": (lambda: TopK(K), topk),
    "AbsTopK": (lambda: AbsTopK(K), abs_topk),
    "BatchTopK": (lambda: BatchTopK(K), batch_topk),
    "ReLU": (ReLU, relu),
    "JumpReLU": (lambda: JumpReLU(bandwidth=BANDWIDTH), jump),
    "JumpReLU, ste_to_input": (lambda: JumpReLU(bandwidth=BANDWIDTH, ste_to_input=True), jump),
    "Gated": (Gated, gated),
    "a new one": (TopTwoOfEachHalf, top_two_of_each_half),
    "a new one with views": (AlwaysTheFirst, always_the_first),
}
THRESHOLDS = ["ReLU", "JumpReLU", "JumpReLU, ste_to_input", "Gated"]

# the ways from x to the reconstruction; the sparse limit decides which path a forward pass takes
WAYS = {
    "forward": (lambda sae, x: sae(x), 1.0),
    "forward, dense": (lambda sae, x: sae(x), 0.0),
    "sparse code": (lambda sae, x: sae.decode(sae.encode_sparse(x)), None),
    "dense code": (lambda sae, x: sae.decode(sae.encode(x)), None),
    "sparse code made dense": (lambda sae, x: sae.decode(sae.encode_sparse(x).dense()), None),
}


def make(name: str, integers: bool, device: str, dtype: torch.dtype) -> tuple[SAE, Tensor, Tensor]:
    """(sae, x, incoming gradient). Small integers make every sum exact in every dtype, and ties and thresholds frequent."""
    sae = SAE(D, F, CASES[name][0]())
    generator = torch.Generator().manual_seed(len(name))

    def draw(t: Tensor) -> Tensor:
        if integers:
            return torch.randint(-1, 2, t.shape, generator=generator).to(t.dtype)
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) / 2

    sae.double()
    with torch.no_grad():
        for parameter_name, p in sae.named_parameters():
            p.copy_(draw(p))
            if parameter_name == "b_enc":
                p -= 3 if integers else 1  # not most of the latents
            if parameter_name.endswith("theta"):
                p.copy_(p.abs() + 1)
            if parameter_name.endswith("r_mag") and integers:
                p.zero_()  # exp(1) is not a whole number
    x, g = (draw(torch.empty(N, D)) for _ in range(2))
    return sae.to(device, dtype), x.to(device, dtype), g.to(device, dtype)


def gradients(sae: SAE, y: Tensor, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    x.grad = None
    y.backward(g)
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in sae.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | found


def define(name: str, sae: SAE, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The same from the dense definition in fp64."""
    sae, x = make(name, True, "cpu", torch.float64)[0], x.detach().cpu().double().requires_grad_()
    return gradients(sae, _defined(name, sae, x), x, g.cpu().double())


def _defined(name: str, sae: SAE, x: Tensor) -> Tensor:
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return CASES[name][1](sae, pre) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition_in_fp64(name, way, monkeypatch):
    if way == "forward, dense" and name not in THRESHOLDS:
        pytest.skip("the number of entries is known: there is no dense path")
    run, below = WAYS[way]
    if below is not None:
        monkeypatch.setattr(functional, "SPARSE_BELOW", below)
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 90)  # the dense path in several chunks, the last one ragged
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 90)  # selections by blocks of two rows
    sae, x, g = make(name, False, "cpu", torch.float64)
    x.requires_grad_()
    got = gradients(sae, run(sae, x), x, g)
    expected = gradients(sae, _defined(name, sae, x), x, g)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-12, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        assert key != "W_dec" or expected[key].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_is_exact_on_whole_numbers_in_every_dtype(name, way, device, dtypes, monkeypatch):
    """Both paths, fp32 and 16 bits, bit for bit: ties go to the lower latent, a threshold that is just met does not fire."""
    if way == "forward, dense" and name not in THRESHOLDS:
        pytest.skip("the number of entries is known: there is no dense path")
    run, below = WAYS[way]
    if below is not None:
        monkeypatch.setattr(functional, "SPARSE_BELOW", below)
    for dtype in dtypes:
        sae, x, g = make(name, True, device, dtype)
        x.requires_grad_()
        got = gradients(sae, run(sae, x), x, g)
        expected = define(name, sae, x, g)
        for key in expected:
            assert got[key].dtype == dtype
            assert torch.equal(got[key].cpu().double(), expected[key]), (key, dtype)


def test_whole_numbers_hold_ties_and_thresholds():
    """What the test above is about is in its data."""
    sae, x, _ = make("TopK", True, "cpu", torch.float64)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).sort(1, descending=True).values
    assert (pre[:, K - 1] == pre[:, K]).any()
    sae, x, _ = make("JumpReLU", True, "cpu", torch.float64)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    theta = sae.activation.theta
    assert (pre == theta).any() and ((pre - theta).abs() < BANDWIDTH / 2).any() and (pre == theta - BANDWIDTH / 2).any()


def test_no_pseudo_gradient_where_nothing_trains():
    """Evaluation and no_grad hold no entries of the window: what fires is all there is."""
    sae, x, _ = make("JumpReLU", True, "cpu", torch.float64)
    training = sae.encode_sparse(x)
    with torch.no_grad():
        plain = sae.encode_sparse(x)
    evaluating = sae.eval().encode_sparse(x)
    assert (training.values == 0).any() and plain.values.all() and evaluating.values.all()
    assert torch.equal(training.l0(), plain.l0())
    for code in (plain, evaluating):
        assert torch.equal(code.dense(), training.dense())
    for y in (sae.decode(evaluating), sae.decode(sae.encode(x))):  # not half a window's either
        (theta_grad,) = torch.autograd.grad(y.sum(), sae.activation.theta, materialize_grads=True, allow_unused=True)
        assert not theta_grad.any()


def test_training_sets_a_negative_theta_back_to_zero():
    sae, x, _ = make("JumpReLU", True, "cpu", torch.float64)
    with torch.no_grad():
        sae.activation.theta[:5] = -1.0
    a, b = sae(x), sae.decode(sae.encode(x))
    assert torch.equal(sae.activation.theta[:5], torch.zeros(5).double()) and torch.allclose(a, b)


def test_dense_without_gradients_is_the_fused_gemm(device):
    """JumpReLU keeps pre-activations for theta's gradient only where there is one."""
    sae, x, _ = make("JumpReLU", True, device, torch.float32)
    acts = sae.encode(x)
    with torch.no_grad():
        assert torch.equal(sae.encode(x), acts) and acts.any()


@pytest.mark.parametrize("name", ["TopK", "AbsTopK", "BatchTopK"])
def test_select_scale_changes_the_ranking_and_nothing_else(name, device):
    sae, x, _ = make(name, True, device, torch.float32)
    scale = torch.randint(1, 4, (F,), device=device).float()
    code = sae.activation.encode(x, sae.W_enc, sae.b_enc, scale)
    pre = x @ sae.W_enc + sae.b_enc
    score = pre * scale
    score = score.abs() if name == "AbsTopK" else score
    kept = strongest(score.flatten(), N * K).view(N, F) if name == "BatchTopK" else strongest(score, K)
    assert torch.equal(code.dense(), (pre * kept).detach())
    code.values.sum().backward()
    assert torch.equal(sae.b_enc.grad, kept.sum(0))


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("activation", [JumpReLU, Gated])
def test_forward_mode_and_batched_gradients(activation, trains):
    """As far as torch's own operators carry them."""
    torch.manual_seed(0)
    sae = SAE(4, 9, activation(), dtype=torch.float64).train(trains)
    x, direction = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(sae.encode, x)
    assert jacobian.any()
    torch.testing.assert_close(torch.autograd.functional.jacobian(sae.encode, x, vectorize=True), jacobian)
    if activation is Gated or not trains:  # a straight-through estimate goes one way
        _, tangent = torch.func.jvp(sae.encode, (x,), (direction,))
        torch.testing.assert_close(tangent, torch.einsum("nfmd,md->nf", jacobian, direction))


def test_forward_mode_through_chunks():
    """Where x has a tangent the encoder's input must keep it."""
    torch.manual_seed(0)
    sae = SAE(4, 9, ReLU(), dtype=torch.float64)
    x, direction = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def loss(x):
        target = torch.zeros(3, 4, dtype=torch.float64)
        return losses.reconstruct_by_chunk(sae, x, target, sae.activation.activate)[0].sse.sum()

    gradient = torch.autograd.functional.jacobian(loss, x)
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum())


def test_chunks_add_the_bias_in_its_own_type():
    seen = []
    sae, x = SAE(4, 9, ReLU()), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        functional.reconstruct_dense(
            x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, lambda pre, at, b: seen.append(pre.dtype) or pre.relu()
        )
    assert seen == [torch.float32]
