"""Wrong calls: each is refused with an error that says what came, what is allowed and what to do, before any operator runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae import SAE, AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, SparseCode, TopK, functional, kernels

N, D, F = 4, 6, 10
NAN, INF = float("nan"), float("inf")


class NoOperator(TorchDispatchMode):
    """Fails where a fastsae operator starts, which is the only door to a kernel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "fastsae", f"{func} was reached"
        return func(*args, **(kwargs or {}))


class Given:
    """A correct call of everything: a case below changes one thing."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        randn = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
        self.x, self.W, self.b, self.theta = randn(N, D), randn(F, D).T, randn(F), torch.full((F,), 0.5)
        self.W_dec, self.b_dec = randn(F, D), randn(D)
        self.values = randn(4)
        self.latents = torch.tensor([1, 7, 0, 9], dtype=torch.int32)
        self.offsets = torch.tensor([0, 2, 2, 3, 4], dtype=torch.int32)
        self.code = SparseCode(self.values, self.latents, self.offsets, (N, F))
        self.sae = SAE(D, F, TopK(2))
        self.jump = SAE(D, F, JumpReLU())
        self.narrow = SAE(D, F - 1, TopK(2))

    def put(self, tensor, value):
        """A copy of `tensor` with one bad value."""
        bad = tensor.clone()
        bad.view(-1)[-1] = value
        return bad

    def select(self, x=None, W=None, b=None, k=2, scale=None):
        return kernels.select_topk(self.x if x is None else x, self.W if W is None else W, self.b if b is None else b, k, scale)

    def decode(self, values=None, latents=None, offsets=None, W=None, b=None):
        given = (self.values, self.latents, self.offsets, self.W_dec, self.b_dec)
        return kernels.decode(*(g if c is None else c for g, c in zip(given, (values, latents, offsets, W, b), strict=True)))

    def loss(self, target=None, bounds=None, weight=None, b=None):
        return kernels.decode_loss(
            self.values, self.latents, self.offsets if bounds is None else bounds, self.W_dec,
            self.b_dec if b is None else b, self.x if target is None else target, weight,
        )  # fmt: skip

    def encode(self, pre=None, latents=None, offsets=None):
        return kernels.encode(
            self.x, self.W, self.b, self.values if pre is None else pre, self.latents if latents is None else latents,
            self.offsets if offsets is None else offsets,
        )  # fmt: skip

    def reconstruct(self, target=None, **levels):
        return functional.reconstruction_loss(self.code, self.W_dec, self.b_dec, self.x if target is None else target, **levels)


class Int64(Activation):
    """A new activation with a common slip: ids as torch makes them."""

    def select(self, pre):
        latents = torch.zeros(pre.shape[0], dtype=torch.int64)
        return SparseCode(pre[:, 0], latents, torch.arange(pre.shape[0] + 1, dtype=torch.int32), tuple(pre.shape), 1)


class Neither(Activation):
    """An activation that forgot its rule."""


def with_theta(value):
    sae = SAE(D, F, JumpReLU()).eval()  # training sets a negative theta back to zero
    with torch.no_grad():
        sae.activation.theta[3] = value
    return sae


# (what is wrong, the call, the error, words its message must hold)
CASES = [
    # dtypes
    ("integer x", lambda g: g.select(g.x.int()), TypeError, ["x is torch.int32", "float32", "x.float()"]),
    ("boolean x", lambda g: g.select(g.x > 0), TypeError, ["x is torch.bool", "float32"]),
    ("complex x", lambda g: g.select(g.x + 0j), TypeError, ["x is torch.complex64", "float32"]),
    ("8-bit x", lambda g: g.select(g.x.to(torch.float8_e4m3fn)), TypeError, ["x is torch.float8_e4m3fn", "float32"]),
    ("half W, full x", lambda g: g.select(W=g.W.half()), TypeError, ["W_enc is torch.float16", "x is torch.float32", ".to("]),
    ("double b, full x", lambda g: g.select(b=g.b.double()), TypeError, ["b_enc is torch.float64", ".to("]),
    ("integer scale", lambda g: g.select(scale=g.b.long()), TypeError, ["select_scale is torch.int64", "float32"]),
    ("integer values", lambda g: g.decode(g.values.int()), TypeError, ["values is torch.int32", "float32"]),
    ("half b_dec", lambda g: g.decode(b=g.b_dec.half()), TypeError, ["b_dec is torch.float16", ".to("]),
    ("bfloat16 target", lambda g: g.loss(g.x.bfloat16()), TypeError, ["target is torch.bfloat16", ".to("]),
    ("pre of another dtype", lambda g: g.encode(g.values.half()), TypeError, ["pre is torch.float16", ".to("]),
    ("SAE of integers", lambda g: SAE(D, F, TopK(2), dtype=torch.int64), TypeError, ["dtype is torch.int64", "float32"]),
    ("x of another dtype than the SAE", lambda g: g.sae(g.x.double()), TypeError, ["x is torch.float64", "float32", ".to()"]),
    (
        "dense acts of another dtype",
        lambda g: g.sae.decode(torch.zeros(N, F).half()),
        TypeError,
        ["float16", "float32", ".to("],
    ),
    # no tensor at all
    ("x a list", lambda g: functional.encode_topk([[1.0] * D], g.W, g.b, 2), TypeError, ["x is a list", "torch.Tensor"]),
    ("x a list, to an op", lambda g: g.select([1.0]), TypeError, ["x is a list", "torch.Tensor"]),
    ("x a list, to an SAE", lambda g: g.sae([[1.0] * D]), TypeError, ["x is a list", "torch.Tensor"]),
    ("x a list, to encode_sparse", lambda g: g.jump.encode_sparse([1.0]), TypeError, ["x is a list", "torch.Tensor"]),
    ("x a scalar", lambda g: functional.encode_topk(torch.tensor(1.0), g.W, g.b, 2), ValueError, ["x is a scalar", "[..., D]"]),
    ("x a scalar, to an SAE", lambda g: g.sae(torch.tensor(1.0)), ValueError, ["x has shape []", "d_in=6"]),
    ("latents a list", lambda g: g.decode(latents=[1, 7, 0, 9]), TypeError, ["latents is a list", "torch.Tensor"]),
    ("a tensor for a code", lambda g: functional.decode(g.x, g.W_dec), TypeError, ["code is a Tensor", "SparseCode"]),
    ("a list for a code", lambda g: g.sae.decode([1.0]), TypeError, ["list", "SparseCode"]),
    ("a function for an activation", lambda g: SAE(D, F, torch.relu), TypeError, ["activation", "TopK(k=32)"]),
    ("a class for an activation", lambda g: SAE(D, F, ReLU), TypeError, ["activation", "ReLU", "instance"]),
    # devices
    ("W elsewhere", lambda g: g.select(W=g.W.to("meta")), ValueError, ["W_enc is on meta", "x is on cpu", ".to()"]),
    ("b_dec elsewhere", lambda g: g.decode(b=g.b_dec.to("meta")), ValueError, ["b_dec is on meta", "cpu", ".to()"]),
    ("latents elsewhere", lambda g: g.decode(latents=g.latents.to("meta")), ValueError, ["latents is on meta", "cpu", ".to()"]),
    ("x elsewhere", lambda g: g.sae(g.x.to("meta")), (TypeError, ValueError), ["on meta", "on cpu", ".to()"]),
    # shapes
    ("x of another width", lambda g: g.select(g.x[:, 1:]), ValueError, ["x has shape [4, 5]", "[N, D] = [any, 6]"]),
    ("x of another width, to an SAE", lambda g: g.sae.encode(g.x[:, 1:]), ValueError, ["[4, 5]", "d_in=6"]),
    ("x with three dimensions, to an op", lambda g: g.select(g.x[None]), ValueError, ["x has shape [1, 4, 6]", "[N, D]"]),
    ("x without columns", lambda g: functional.encode_topk(g.x[:, :0], g.W, g.b, 2), ValueError, ["[4, 0]", "D"]),
    ("W_enc transposed", lambda g: g.select(W=g.W.T), ValueError, ["x has shape [4, 6]", "[any, 10]"]),
    ("b_enc one short", lambda g: g.select(b=g.b[1:]), ValueError, ["b_enc has shape [9]", "[F] = [10]"]),
    ("scale one short", lambda g: g.select(scale=g.b[1:]), ValueError, ["select_scale has shape [9]", "[F] = [10]"]),
    ("theta a scalar", lambda g: kernels.select_threshold(g.x, g.W, g.b, g.b[0]), ValueError, ["theta has shape []", "[10]"]),
    ("values a matrix", lambda g: g.decode(g.values[None]), ValueError, ["values has shape [1, 4]", "[E]"]),
    ("more values than latents", lambda g: g.decode(torch.zeros(5)), ValueError, ["latents has shape [4]", "[5]"]),
    ("b_dec one short", lambda g: g.decode(b=g.b_dec[1:]), ValueError, ["b_dec has shape [5]", "[D] = [6]"]),
    ("W_dec a vector", lambda g: g.decode(W=g.b), ValueError, ["W_dec has shape [10]", "[F, D]"]),
    ("target of another width", lambda g: g.loss(g.x[:, 1:]), ValueError, ["target has shape [4, 5]", "[N, D] = [any, 6]"]),
    ("target with other rows", lambda g: g.reconstruct(g.x[:3]), ValueError, ["[3, 6]", "[4, 6]"]),
    ("target with other leading dimensions", lambda g: g.reconstruct(g.x.view(2, 2, D)), ValueError, ["[2, 2, 6]", "[4, 6]"]),
    ("weight one short", lambda g: g.loss(weight=g.b[1:]), ValueError, ["weight has shape [9]", "[F] = [10]"]),
    ("values that are not the code's", lambda g: g.code.with_values(g.values[1:]), ValueError, ["[3]", "4 entries"]),
    ("a code of another width", lambda g: g.narrow.decode(g.code), ValueError, ["d_sae=10", "9 rows", "the SAE that made it"]),
    ("dense acts of another width", lambda g: g.narrow.decode(torch.zeros(N, F)), ValueError, ["[4, 10]", "d_sae=9"]),
    # k
    ("k over the width", lambda g: g.select(k=F + 1), ValueError, ["k=11 exceeds d_sae=10", "k <= d_sae"]),
    ("k over the width, BatchTopK", lambda g: SAE(D, F, BatchTopK(64)), ValueError, ["k=64 exceeds d_sae=10", "k <= d_sae"]),
    ("k zero", lambda g: SAE(D, F, TopK(0)), ValueError, ["k=0 keeps nothing", "1 <= k"]),
    ("k negative", lambda g: kernels.select_batch_topk(g.x, g.W, g.b, -3), ValueError, ["k=-3 keeps nothing", "1 <= k"]),
    ("k a float", lambda g: SAE(D, F, AbsTopK(4.0)), TypeError, ["k=4.0 is a float", "whole number"]),
    ("k a string", lambda g: g.select(k="4"), TypeError, ["k='4' is a str", "whole number"]),
    ("k a bool", lambda g: g.select(k=True), TypeError, ["k=True is a bool", "whole number"]),
    # values
    ("NaN in x", lambda g: g.select(g.put(g.x, NAN)), ValueError, ["x has 1 non-finite", "of 24", "repair"]),
    ("infinity in x", lambda g: kernels.select_batch_topk(g.put(g.x, INF), g.W, g.b, 2), ValueError, ["x has 1 non-finite"]),
    ("-infinity in x", lambda g: g.sae(g.put(g.x, -INF)), ValueError, ["x has 1 non-finite", "repair"]),
    ("NaN in x, dense ReLU", lambda g: kernels.dense_encode(g.put(g.x, NAN), g.W, g.b), ValueError, ["x has 1 non-finite"]),
    ("NaN in x, dense JumpReLU", lambda g: g.jump.encode(g.put(g.x, NAN)), ValueError, ["x has 1 non-finite", "repair"]),
    (
        "negative theta",
        lambda g: kernels.dense_encode(g.x, g.W, g.b, -g.theta),
        ValueError,
        ["theta", "-0.5", ">= 0", "clamp_"],
    ),
    ("negative learned theta", lambda g: with_theta(-0.25)(g.x), ValueError, ["theta", "-0.25", ">= 0", "clamp_"]),
    ("negative learned theta, dense", lambda g: with_theta(-0.25).encode(g.x), ValueError, ["theta", "-0.25", "clamp_"]),
    ("theta that became NaN", lambda g: with_theta(NAN).train()(g.x), ValueError, ["theta", "nan", ">= 0"]),
    ("negative first theta", lambda g: JumpReLU(theta=-0.1), ValueError, ["theta=-0.1", ">= 0"]),
    ("theta a string", lambda g: JumpReLU(theta="low"), TypeError, ["theta='low'", "number"]),
    ("no bandwidth", lambda g: JumpReLU(bandwidth=0.0), ValueError, ["bandwidth=0.0", "> 0"]),
    ("negative bandwidth", lambda g: JumpReLU(bandwidth=-1.0), ValueError, ["bandwidth=-1.0", "> 0"]),
    ("endless bandwidth", lambda g: JumpReLU(bandwidth=INF), ValueError, ["bandwidth=inf", "> 0"]),
    ("negative limit", lambda g: kernels.select_threshold(g.x, g.W, g.b, g.theta, -1), ValueError, ["limit=-1", ">= 0"]),
    # entries
    ("64-bit latents", lambda g: g.decode(latents=g.latents.long()), TypeError, ["latents is torch.int64", "int32", ".int()"]),
    ("64-bit offsets", lambda g: g.decode(offsets=g.offsets.long()), TypeError, ["offsets is torch.int64", "int32", ".int()"]),
    ("64-bit latents from select", lambda g: SAE(D, F, Int64())(g.x), TypeError, ["latents is torch.int64", "int32"]),
    ("latent past the end", lambda g: g.decode(latents=g.put(g.latents, F)), ValueError, ["from 0 to 10", "= 9"]),
    ("negative latent", lambda g: g.decode(latents=g.put(g.latents, -1)), ValueError, ["from -1 to 7", "0 .."]),
    ("latent past the end, encode", lambda g: g.encode(latents=g.put(g.latents, F)), ValueError, ["from 0 to 10", "= 9"]),
    (
        "offsets that start late",
        lambda g: g.decode(offsets=(g.offsets + 1).clamp(max=4)),
        ValueError,
        ["from 1 to 4", "from 0"],
    ),
    ("offsets that end early", lambda g: g.decode(offsets=g.put(g.offsets, 3)), ValueError, ["from 0 to 3", "4 entries"]),
    (
        "offsets that fall",
        lambda g: g.decode(offsets=torch.tensor([0, 3, 2, 4, 4], dtype=torch.int32)),
        ValueError,
        ["offsets", "rise from 0 to the 4 entries"],
    ),
    ("no offsets", lambda g: g.decode(offsets=g.offsets[:0]), ValueError, ["offsets is empty", "N + 1"]),
    (
        "offsets of other rows",
        lambda g: g.encode(offsets=g.offsets[1:] * 0 + g.offsets[[0, 1, 3, 4]]),
        ValueError,
        ["offsets has shape [4]", "[N+1] = [5]"],
    ),
    ("bounds between levels", lambda g: g.loss(g.x[:3]), ValueError, ["4 bags", "N=3"]),
    # levels
    ("prefixes that fall", lambda g: g.reconstruct(prefixes=[4, 2]), ValueError, ["prefixes=[4, 2]", "ascending", "d_sae=10"]),
    ("a prefix twice", lambda g: g.reconstruct(prefixes=[2, 2]), ValueError, ["prefixes=[2, 2]", "ascending"]),
    ("prefix past the width", lambda g: g.reconstruct(prefixes=[2, 11]), ValueError, ["prefixes=[2, 11]", "d_sae=10"]),
    ("prefix zero", lambda g: g.reconstruct(prefixes=[0, 4]), ValueError, ["prefixes=[0, 4]", "from 1"]),
    ("no prefix", lambda g: g.reconstruct(prefixes=[]), ValueError, ["prefixes=[]", "from 1"]),
    ("prefix a float", lambda g: g.reconstruct(prefixes=[2.5]), TypeError, ["prefixes=[2.5]", "whole numbers"]),
    ("one prefix, bare", lambda g: g.reconstruct(prefixes=4), TypeError, ["prefixes=4", "whole numbers"]),
    ("ks that fall", lambda g: g.reconstruct(ks=[3, 1]), ValueError, ["ks=[3, 1]", "ascending"]),
    ("negative ks", lambda g: g.reconstruct(ks=[-1]), ValueError, ["ks=[-1]", "from 1"]),
    ("prefixes and ks", lambda g: g.reconstruct(prefixes=[2], ks=[1]), ValueError, ["prefixes and ks", "one of them"]),
    # restricting to some latents
    ("ids a list", lambda g: g.code.restrict([1, 2]), TypeError, ["latents is a list", "torch.Tensor"]),
    ("ids as floats", lambda g: g.code.restrict(torch.tensor([1.0])), TypeError, ["latents is torch.float32", "integer"]),
    ("ids as a mask", lambda g: g.code.restrict(torch.ones(F) > 0), TypeError, ["latents is torch.bool", "nonzero()"]),
    ("ids past the end", lambda g: g.code.restrict(torch.tensor([F])), ValueError, ["from 10 to 10", "= 9"]),
    ("negative ids", lambda g: g.code.restrict(torch.tensor([-1])), ValueError, ["from -1 to -1", "0 .."]),
    # construction
    ("d_sae zero", lambda g: SAE(D, 0, ReLU()), ValueError, ["d_sae=0", "whole number >= 1"]),
    ("d_sae negative", lambda g: SAE(D, -1, ReLU()), ValueError, ["d_sae=-1", "whole number >= 1"]),
    ("d_sae a fraction", lambda g: SAE(D, 2.5, ReLU()), (TypeError, ValueError), ["d_sae=2.5", "whole number >= 1"]),
    ("d_in a bool", lambda g: SAE(True, F, ReLU()), (TypeError, ValueError), ["d_in=True", "whole number >= 1"]),
    ("d_out zero", lambda g: SAE(D, F, ReLU(), d_out=0), ValueError, ["d_out=0", "whole number >= 1"]),
    (
        "an output bias taken from the input of a transcoder",
        lambda g: SAE(D, F, ReLU(), d_out=D + 1, apply_b_dec_to_input=True),
        ValueError,
        ["d_out == d_in", "7 and 6", "pass False"],
    ),
    ("one activation in two SAEs", lambda g: SAE(D, F, g.jump.activation), ValueError, ["JumpReLU", "another SAE"]),
    ("scale for what is not ranked", lambda g: ReLU().encode(g.x, g.W, g.b, g.b), ValueError, ["ReLU", "select_scale"]),
    ("an activation without a rule", lambda g: SAE(D, F, Neither())(g.x), NotImplementedError, ["Neither", "select"]),
]


@pytest.mark.parametrize(("call", "error", "words"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_is_refused(call, error, words):
    given = Given()
    with NoOperator(), pytest.raises(error) as raised:
        call(given)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value} does not say {missing}"


def test_the_correct_calls_are_not_refused():
    """What the cases change one thing of: without this, a case could be refused for another reason."""
    g = Given()
    g.select(), g.select(scale=g.b), g.decode(), g.loss(), g.loss(weight=g.b), g.encode()
    g.reconstruct(), g.reconstruct(prefixes=[2, 4]), g.reconstruct(ks=[1, 3]), g.code.restrict(torch.tensor([1, 2]))
    g.sae(g.x), g.jump(g.x), g.sae.decode(g.code), g.sae.decode(torch.zeros(N, F)), with_theta(0.0)(g.x)


def test_the_guard_sees_operators():
    with pytest.raises(AssertionError, match="was reached"), NoOperator():
        Given().decode()


# --------------------------------------------------------------------------------------------------------------- N = 0


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 3, D)])
@pytest.mark.parametrize(
    "activation", [TopK(2), AbsTopK(2), BatchTopK(2), ReLU(), JumpReLU(), Gated()], ids=lambda a: type(a).__name__
)
def test_no_rows_through_an_sae(activation, shape, device):
    sae = SAE(D, F, type(activation)(2) if isinstance(activation, TopK) else type(activation)(), device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    code, acts, y = sae.encode_sparse(x), sae.encode(x), sae(x)
    assert code.values.shape == code.latents.shape == (0,) and code.offsets.tolist() == [0]
    assert code.dense().shape == acts.shape == (*shape[:-1], F) and code.l0().shape == shape[:-1]
    assert y.shape == sae.decode(code).shape == sae.decode(acts).shape == shape
    (y.sum() + sae.decode(code).sum() + sae.decode(acts).sum()).backward()
    assert x.grad.shape == shape
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_no_rows_through_the_ops(device):
    x, W, b = torch.empty(0, D, device=device), torch.randn(F, D, device=device).T, torch.randn(F, device=device)
    leaves = [t.requires_grad_() for t in (x, W, b)]
    x, W, b = leaves
    none, ids = torch.empty(0, device=device, requires_grad=True), torch.empty(0, dtype=torch.int32, device=device)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    assert [t.shape for t in kernels.select_topk(x, W, b, 2)] == [(0,), (0,)]
    for pre, latents, ends in (kernels.select_batch_topk(x, W, b, 2), kernels.select_threshold(x, W, b, b, 0)):
        assert pre.shape == latents.shape == (0,) and ends.tolist() == [0]
    assert kernels.dense_encode(x, W, b).shape == (0, F)
    order, starts = kernels.sort_by_latent(ids, F)
    assert order.shape == (0,) and starts.tolist() == [0] * (F + 1)
    pre = kernels.encode(x, W, b, none, ids, offsets)
    picked = kernels.gather_latents(b, ids, order, starts)
    y = kernels.decode(none, ids, offsets, W.T)
    error, sse, l1 = kernels.decode_loss(none, ids, offsets, W.T, x.new_zeros(D), x, b.abs())
    assert pre.shape == picked.shape == l1.shape == (0,) and y.shape == (0, D) and error.numel() == sse.numel() == 0
    sum(t.sum() for t in (pre, picked, y, error, sse, l1, kernels.dense_encode(x, W, b))).backward()
    for leaf in (*leaves, none):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    dvalues, dW_dec, dW_enc, db = kernels.latent_backward(
        order, starts, ids, offsets, g=y.detach(), values=none.detach(), W_dec=W.detach().T, x=x.detach()
    )
    assert dvalues.shape == (0,) and not dW_dec.any() and not dW_enc.any() and not db.any()


@pytest.mark.parametrize("levels", [{}, {"prefixes": [2, 5]}, {"ks": [1]}])
def test_no_rows_through_the_loss(levels, device):
    sae = SAE(D, F, TopK(2), device=device)
    x = torch.empty(0, D, device=device)
    P = 1 + len(next(iter(levels.values()), []))
    error, sse, l1 = functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, **levels)
    assert error.shape == (0, P, D) and sse.shape == (0, P) and l1.shape == (0,)
    (error.sum() + sse.sum() + l1.sum()).backward()
    assert torch.equal(sae.W_dec.grad, torch.zeros_like(sae.W_dec))
