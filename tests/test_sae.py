"""SAE, SparseCode and the functions under them: layout, leading dimensions, strides, dtypes, losses."""

import copy

import pytest
import torch
from helpers import assert_no_worse
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, SparseCode, TopK, functional

N, D, F, K = 6, 12, 50, 4


def random_sae(activation, dtype=torch.float64, device="cpu", d_sae=F, **options) -> SAE:
    sae = SAE(D, d_sae, activation, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn_like(p) / 2)
            if name.endswith("theta"):
                p.abs_()
    return sae


# ---------------------------------------------------------------------------------------------------------------- layout


def assert_latent_major(sae: SAE):
    assert sae.W_enc.shape == (D, F) and sae.W_enc.T.is_contiguous() and sae.W_dec.is_contiguous()
    assert isinstance(sae.W_enc, torch.nn.Parameter) and sae.W_enc.is_leaf
    sae.zero_grad()
    x = torch.randn(N, D, dtype=sae.W_enc.dtype)
    (sae(x).sum() + sae.decode(sae.encode(x)).sum()).backward()  # through the sparse and the dense path, added up
    assert sae.W_enc.grad.stride() == sae.W_enc.stride() and sae.W_dec.grad.stride() == sae.W_dec.stride()


def loaded(sae: SAE, assign: bool, row_major: bool) -> SAE:
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in sae.state_dict().items()}
    if not row_major:
        state["W_enc"] = state["W_enc"].T.contiguous().T
    assert state["W_enc"].is_contiguous() == row_major
    other = SAE(D, F, TopK(K))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.W_enc, sae.W_enc)
    return other


def nested(sae: SAE) -> SAE:
    model = torch.nn.ModuleDict({"sae": SAE(D, F, TopK(K))})
    model.load_state_dict({f"sae.{n}": t.contiguous() for n, t in sae.state_dict().items()}, assign=True)
    return model["sae"]


def from_meta(sae: SAE) -> SAE:
    state = sae.state_dict()
    empty = SAE(D, F, TopK(K), device="meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return empty


@pytest.mark.parametrize(
    "change",
    [
        lambda sae: sae,
        lambda sae: sae.to(torch.float16).to(torch.float64),
        lambda sae: sae.bfloat16(),
        copy.deepcopy,
        lambda sae: loaded(sae, assign=False, row_major=True),
        lambda sae: loaded(sae, assign=False, row_major=False),
        lambda sae: loaded(sae, assign=True, row_major=True),
        lambda sae: loaded(sae, assign=True, row_major=False),
        nested,
        from_meta,
    ],
    ids=["built", "to", "bf16", "deepcopy", "copied rows", "copied", "assigned rows", "assigned", "nested", "from meta"],
)
def test_memory_is_latent_major_whatever_happens(change):
    assert_latent_major(change(SAE(D, F, TopK(K))))


def test_transcoder_encoder_is_latent_major():
    sae = SAE(D, F, TopK(K), d_out=D + 3)
    assert sae.W_enc.shape == (D, F) and sae.W_enc.T.is_contiguous() and sae.W_dec.shape == (F, D + 3)


def test_frozen_parameters_stay_frozen_when_assigned():
    sae = SAE(D, F, TopK(K)).requires_grad_(False)
    sae.load_state_dict({n: t.contiguous() for n, t in sae.state_dict().items()}, assign=True)
    assert not any(p.requires_grad for p in sae.parameters()) and sae.W_enc.T.is_contiguous()


def test_at_construction():
    """Decoder rows have the asked norm, the encoder is the decoder, biases and the skip are zero."""
    sae = SAE(D, F, JumpReLU(theta=0.25), decoder_norm=0.5, skip=True, dtype=torch.float64)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), 0.5).double())
    assert torch.equal(sae.W_enc.T, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_dec.any() and not sae.W_skip.any()
    assert torch.equal(sae.activation.theta, torch.full((F,), 0.25).double())
    assert sorted(sae.state_dict()) == ["W_dec", "W_enc", "W_skip", "activation.theta", "b_dec", "b_enc"]


def test_row_major_weights_give_the_same_numbers(device):
    x, W, b, W_dec = (torch.randint(-2, 3, s, device=device).float() for s in ((N, D), (F, D), (F,), (F, D)))
    results = []
    for layout in (W.T, W.T.contiguous()):
        leaf = layout.clone(memory_format=torch.preserve_format).requires_grad_()
        assert leaf.stride() == layout.stride()
        decoder = (W_dec if layout is not W.T else W_dec.T.contiguous().T).requires_grad_()
        code = functional.encode_topk(x, leaf, b, K)
        y = functional.decode(code, decoder)
        y.square().sum().backward()
        assert leaf.grad.stride() == leaf.stride()
        results.append([code.values, code.latents, y, leaf.grad, decoder.grad])
        W_dec = W_dec.detach().clone()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------- leading dimensions, strides, dtypes

VIEWS = {
    "a vector": lambda x: x[0],
    "three dimensions": lambda x: x.view(2, 3, D),
    "transposed": lambda x: x.T.contiguous().T,
    "transposed leading dimensions": lambda x: x.view(2, 3, D).transpose(0, 1),
    "sliced columns": lambda x: torch.cat([x, x], 1)[:, 3 : 3 + D],
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row, expanded": lambda x: x[:1].expand(N, D),
    "one column, expanded": lambda x: x[:, :1].expand(N, D),
    "one number, expanded": lambda x: x[:1, :1].expand(2, 3, D),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "activation", [lambda: TopK(2), lambda: BatchTopK(2), lambda: JumpReLU(0.5)], ids=["TopK", "Batch", "Jump"]
)
def test_any_shape_and_strides(activation, view, device, monkeypatch):
    """The same entries as for a contiguous matrix of the same rows."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)
    sae = random_sae(activation(), torch.float32, device, d_sae=14)
    results = []
    for make in (VIEWS[view], lambda x: VIEWS[view](x).reshape(-1, D).clone()):
        base = torch.randn(N, D, device=device, generator=torch.Generator(device).manual_seed(1)).requires_grad_()
        x = make(base)
        code, y = sae.encode_sparse(x), sae(x)
        assert y.shape == x.shape and code.shape == (*x.shape[:-1], 14) and code.l0().shape == x.shape[:-1]
        assert sae.encode(x).shape == code.dense().shape == code.shape
        sae.zero_grad()
        y.backward(torch.arange(D, device=device).float().expand(y.shape))  # stride 0 on the way back too
        results.append([y.flatten(), code.values, code.latents, base.grad, *(p.grad for p in sae.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a GEMM's rounding may depend on strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rounds_no_worse_than_dense_torch(dtype):
    """sae(x) on the torch path, against its definition in the same dtype and in fp64 on the same selection."""
    sae, x = random_sae(TopK(K), dtype), torch.randn(N, D).to(dtype)
    latents = sae.encode_sparse(x).latents.view(N, K).long()

    def define(sae, x, kept, values=torch.relu):
        pre = values((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        return torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept)) @ sae.W_dec + sae.b_dec

    wide = copy.deepcopy(sae).double()
    absolute = copy.deepcopy(wide)
    with torch.no_grad():
        for p in absolute.parameters():
            p.abs_()
        absolute.b_dec.neg_()  # x - b_dec in absolute terms
        magnitude = define(absolute, x.double().abs(), latents)
    got = sae(x)
    assert got.dtype == dtype
    assert_no_worse(got, define(sae, x, latents), define(wide, x.double(), latents), magnitude)


# ---------------------------------------------------------------------------------------------------- transcoder and skip


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [None, D, D - 5])
def test_transcoder_and_skip(d_out, skip):
    sae = random_sae(TopK(K), d_out=d_out, skip=skip)
    assert sae.apply_b_dec_to_input == (d_out is None)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    pre = (x - sae.b_dec if d_out is None else x) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(pre).scatter(-1, pre.topk(K).indices, 1.0)
    expected = (pre.relu() * kept) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    y = sae(x)
    torch.testing.assert_close(y, expected)
    assert y.shape == (2, 3, d_out or D)
    g = torch.randn_like(y)
    leaves = [x, *sae.parameters()]
    for a, b in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


def test_input_bias_can_be_left_out():
    sae = random_sae(TopK(K), apply_b_dec_to_input=False)
    x = torch.randn(N, D).double()
    torch.testing.assert_close(sae.encode(x).sum(1), (x @ sae.W_enc + sae.b_enc).topk(K).values.relu().sum(1))


# ------------------------------------------------------------------------------------------------------------ SparseCode


def small_code(**changes) -> SparseCode:
    """Rows {0: 1.5, 3: 0}, {}, {3: -2} of four latents."""
    given = dict(
        values=torch.tensor([1.5, 0.0, -2.0]), latents=torch.tensor([0, 3, 3], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 2, 3], dtype=torch.int32), shape=(3, 4), pre=torch.tensor([1.5, -1.0, -2.0]),
    )  # fmt: skip
    return SparseCode(**given | changes)


def test_dense_rows_and_l0():
    code = small_code()
    assert code.dense().tolist() == [[1.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, -2]]
    assert code.rows.tolist() == [0, 0, 2] and code.rows.dtype == torch.int32
    assert code.l0().tolist() == [1, 0, 1]  # a zero value is an entry and has not fired
    assert code.d_sae == 4
    folded = small_code(shape=(3, 1, 4))
    assert folded.dense().shape == (3, 1, 4) and folded.l0().shape == (3, 1)


def test_dense_has_a_gradient():
    values = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: small_code().with_values(v).dense(), values)


def test_with_values_keeps_everything_else():
    code = small_code()
    other = code.with_values(code.values * 2)
    assert other.latents is code.latents and other.offsets is code.offsets and other.pre is code.pre
    assert other.values.tolist() == [3.0, 0.0, -4.0] and code.values.tolist() == [1.5, 0.0, -2.0]


@pytest.mark.parametrize("ids", [torch.tensor([3]), torch.tensor([3, 3, 1], dtype=torch.int32), torch.tensor([[3], [2]])])
def test_restrict(ids):
    some = small_code(k=1).restrict(ids)
    assert some.values.tolist() == [0.0, -2.0] and some.pre.tolist() == [-1.0, -2.0]
    assert some.latents.tolist() == [3, 3] and some.offsets.tolist() == [0, 1, 1, 2] and some.offsets.dtype == torch.int32
    assert some.shape == (3, 4) and some.k is None
    nothing = small_code().restrict(torch.tensor([], dtype=torch.int64))
    assert nothing.values.shape == (0,) and nothing.offsets.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("activation", [TopK, AbsTopK, BatchTopK, ReLU, JumpReLU, Gated])
def test_encode_sparse_of_some_latents(activation, device):
    """The whole code, cut: selection saw every latent; gradients flow as through the cut dense activations."""
    sae = random_sae(activation(K) if issubclass(activation, TopK) else activation(), torch.float32, device)
    x, ids = torch.randn(2, 3, D, device=device), torch.tensor([7, 3, 41], device=device)
    code = sae.encode_sparse(x, latents=ids)
    mask = torch.zeros(F, device=device).index_fill(0, ids, 1.0)
    full = sae.encode_sparse(x).dense() * mask
    assert torch.equal(code.dense(), full) and full.any()
    leaves = [sae.W_enc, sae.b_enc, sae.W_dec]
    y = [sae.decode(code).square().sum(), (full @ sae.W_dec + sae.b_dec).square().sum()]
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_fixed_k_gives_the_familiar_pair():
    sae, x = random_sae(TopK(K)), torch.randn(2, 3, D).double()
    code = sae.encode_sparse(x)
    assert code.k == K and code.offsets.tolist() == list(range(0, 6 * K + 1, K))
    values, latents = code.values.view(6, K), code.latents.view(6, K)
    assert (latents.diff(dim=1) > 0).all()
    torch.testing.assert_close(code.dense().view(6, F).gather(1, latents.long()), values)
    best = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).view(6, F).topk(K)
    assert torch.equal(latents.long(), best.indices.sort(1).values)
    assert sae.encode_sparse(x).pre.view(6, K).sort(1, descending=True).values.allclose(best.values)


def test_batch_topk_rows_are_ragged():
    sae, x = random_sae(BatchTopK(K)), torch.randn(N, D).double() * torch.tensor([[5.0]] + [[1.0]] * (N - 1)).double()
    code = sae.encode_sparse(x)
    assert code.k is None and code.values.shape == (N * K,) and code.offsets.diff().unique().numel() > 1


# ---------------------------------------------------------------------------------------------- the dense path that stands by


def test_relu_at_initialisation_takes_the_dense_path(monkeypatch):
    """Half of all latents fire: gathering would lose. The numbers are those of the sparse path."""
    calls = []
    dense = functional.reconstruct_dense
    monkeypatch.setattr(functional, "reconstruct_dense", lambda *a, **k: calls.append(1) or dense(*a, **k))
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 80)  # chunks of 13 latents of 50
    sae, x = SAE(D, F, ReLU(), dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    assert sae.encode_sparse(x).values.numel() > N * F / 3
    results = []
    for below in (functional.SPARSE_BELOW, 1.0):
        monkeypatch.setattr(functional, "SPARSE_BELOW", below)
        leaf = x.clone().requires_grad_()
        y = sae(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *sae.parameters()])])
    assert calls == [1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sparse_relu_stays_sparse(monkeypatch):
    monkeypatch.setattr(functional, "reconstruct_dense", None)
    sae = SAE(D, F, ReLU())
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)[7] = -1e-6
    x = torch.zeros(200, D)
    x[:30] = sae.W_enc.detach()[:, 7]  # 30 of 10,000 entries fire: 0.3 %
    assert torch.equal(sae.encode_sparse(x).latents, torch.full((30,), 7, dtype=torch.int32))
    assert sae(x)[:30].all() and not sae(x)[30:].any()


@pytest.mark.parametrize("activation", [ReLU, lambda: JumpReLU(0.3), Gated], ids=["ReLU", "JumpReLU", "Gated"])
def test_penalty_of_the_dense_path(activation, monkeypatch):
    """Σ penalty over all latents, with gradients to the acts and to what the penalty itself is made of."""
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 80)
    sae = random_sae(activation())
    x, weight = torch.randn(2, 3, D, dtype=torch.float64), torch.rand(F, dtype=torch.float64, requires_grad=True)
    y, cost = functional.reconstruct_dense(
        x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.activation.activate, lambda pre, acts, at: acts.abs() * at(weight)
    )
    acts = sae.activation.activate(x @ sae.W_enc + sae.b_enc, lambda t: t, sae.b_enc)
    expected_y, expected_cost = acts @ sae.W_dec + sae.b_dec, (acts.abs() * weight).sum(-1)
    assert cost.shape == (2, 3)
    torch.testing.assert_close((y, cost), (expected_y, expected_cost))
    leaves, seed = [weight, *sae.parameters()], torch.randn(2, 3).double()
    got = torch.autograd.grad((y.square().sum(-1) * seed + cost * seed).sum(), leaves)
    expected = torch.autograd.grad((expected_y.square().sum(-1) * seed + expected_cost * seed).sum(), leaves)
    torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------------ reconstruction_loss


def levels_of(acts: Tensor, prefixes, ks) -> list[Tensor]:
    """The activations that each level may use."""
    if prefixes:
        return [acts * (torch.arange(F) < p) for p in prefixes] + [acts] * (prefixes[-1] != F)
    if ks:
        rank = acts.detach().abs().sort(dim=1, descending=True, stable=True).indices.argsort(1)
        return [acts * (rank < j) for j in ks] + [acts] * (ks[-1] != F)
    return [acts]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "levels",
    [{}, {"prefixes": [1, 7, 30]}, {"prefixes": [10, F]}, {"prefixes": [F]}, {"ks": [1, 2]}, {"ks": [1, 3, 40, F]}],
    ids=str,
)
@pytest.mark.parametrize(
    "activation", [lambda: TopK(K), lambda: AbsTopK(K), lambda: JumpReLU(0.6)], ids=["TopK", "Abs", "Jump"]
)
def test_reconstruction_loss(activation, levels, weighted):
    """Error, squared error and L1 of every level, and all gradients, for gradients that come in through all three."""
    sae = random_sae(activation())
    x, target = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(F, dtype=torch.float64, requires_grad=True) if weighted else None
    got = functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, target, weight, **levels)

    acts = sae.encode(x).view(N, F)
    parts = levels_of(acts, levels.get("prefixes"), levels.get("ks"))
    error = torch.stack([a @ sae.W_dec + sae.b_dec - target.view(N, D) for a in parts], 1)
    expected = (error, error.square().sum(-1), (acts.abs() * (1 if weight is None else weight)).sum(1))
    torch.testing.assert_close(tuple(got), expected)

    for among in ((0, 1, 2), (1,), (0,), (2,), (1, 2)):  # which of the three a loss uses
        seeds = [torch.randn_like(expected[i]) for i in among]
        for name, leaf in {**dict(sae.named_parameters()), "target": target, "weight": weight}.items():
            if leaf is not None:
                a, b = (
                    torch.autograd.grad([t[i] for i in among], leaf, seeds, retain_graph=True, materialize_grads=True)[0]
                    for t in (got, expected)
                )
                torch.testing.assert_close(a, b, msg=lambda m, name=name, among=among: f"{name} {among}: {m}")
