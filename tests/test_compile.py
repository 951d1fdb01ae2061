"""torch.compile takes encode, decode and loss whole: one graph, no break, nothing rebuilt per batch size; and torch's own
check of every operator (schema, fake tensors, autograd registration, dynamic shapes)."""

import copy
import importlib
import pkgutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, functional, kernels
from fastsae.kernels import backend

for module in pkgutil.iter_modules(kernels.__path__):  # so that every operator is registered
    importlib.import_module(f"fastsae.kernels.{module.name}")

D, F, K = 8, 64, 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiles(function, sae):
    """One graph for batches of 4, 5, 6 and 9 rows (the first is traced as it is, the second finds out that sizes vary), with
    eager's values and gradients."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = torch.compile(function, fullgraph=True, backend=counter), function
    other = copy.deepcopy(sae)
    for N in (4, 5, 6, 9):
        x = torch.randn(N, D)
        results = []
        for model, f in ((sae, compiled), (other, eager)):
            leaf = x.clone().requires_grad_()
            model.zero_grad()
            outputs = f(model, leaf)
            sum(t.square().sum() for t in outputs if t.is_floating_point()).backward()
            results.append([*outputs, leaf.grad, *(p.grad for p in model.parameters())])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


def forward(sae, x):
    return [sae(x)]


def codes(sae, x):
    code = sae.encode_sparse(x)
    return [code.values, code.latents, code.offsets]


def round_trip(sae, x):
    return [sae.decode(sae.encode_sparse(x))]


def dense(sae, x):
    return [sae.decode(sae.encode(x))]


def loss(sae, x):
    return functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, sae.W_dec.norm(dim=1))


def matryoshka(sae, x):
    return functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, prefixes=[5, 30])


def hierarchical(sae, x):
    return functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, ks=[1, 3])


FUNCTIONS = [forward, codes, round_trip, dense, loss, matryoshka, hierarchical]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("activation", [TopK, BatchTopK])
def test_a_known_number_of_entries(activation, function):
    assert_compiles(function, SAE(D, F, activation(K)))


def test_a_threshold_that_is_known_from_the_start():
    """Nothing is read to decide whether there is one, which no graph could hold."""
    sae, x = SAE(D, F, BatchTopK(K, threshold=0.05)).eval(), torch.randn(5, D)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(torch.compile(sae, fullgraph=True, backend="aot_eager")(x), sae(x))


def test_by_magnitude():
    assert_compiles(forward, SAE(D, F, AbsTopK(K)))


@pytest.mark.parametrize("function", [forward, codes, loss, matryoshka])
def test_a_number_of_entries_that_depends_on_the_data(function):
    """JumpReLU: torch is told that sizes may come from data; the graph then holds E as a symbol."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles(function, SAE(D, F, JumpReLU(theta=0.05, bandwidth=0.1)))


@pytest.mark.parametrize("activation", [ReLU, Gated])
def test_other_thresholds(activation):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_compiles(forward, SAE(D, F, activation()))


# ------------------------------------------------------------------------------------------------ torch.library.opcheck


def operator_arguments() -> dict[str, list[tuple]]:
    """Representative arguments of every operator: with and without what is optional."""
    N = 5
    x, W, b = torch.randn(N, D), torch.randn(F, D).T, torch.randn(F)
    W_dec, b_dec, target, scale, theta = torch.randn(F, D), torch.randn(D), torch.randn(N, D), torch.rand(F), torch.rand(F)
    values, latents, offsets = kernels.select_batch_topk(x, W, b, K)
    order, starts = kernels.sort_by_latent(latents, F)
    E = len(latents)
    with_gradient = [
        t.requires_grad_() for t in (x.clone(), W.clone(), b.clone(), W_dec.clone(), b_dec.clone(), values.clone())
    ]
    gx, gW, gb, gW_dec, gb_dec, gvalues = with_gradient
    sorted_ = (order, starts)
    return {
        "select_topk_forward": [(x, W, b, K, None, False, False), (x, W, b, F, scale, True, False)],
        "select_batch_topk_forward": [(x, W, b, K, None, False, False), (x, W, b, 1, scale, True, False)],
        "select_threshold_forward": [(x, W, b, theta, -1), (x, W, b, theta, 3)],
        "encode_entries": [(gx, gW, gb, values, latents, offsets, *sorted_)],
        "dense_encode_forward": [(gx, gW, gb, None), (gx, gW, gb, theta)],
        "decode_forward": [
            (gvalues, latents, offsets, gW_dec, gb_dec, *sorted_),
            (gvalues, latents, offsets, W_dec, None, None, None),
        ],
        "decode_loss_forward": [
            (gvalues, latents, offsets, gW_dec, gb_dec, target, scale, *sorted_),
            (values, latents, offsets, gW_dec, b_dec, target, None, None, None),
        ],
        "latent_backward_op": [
            (*sorted_, latents, offsets, 1, target, torch.randn(N), values, W_dec, x, torch.randn(E), torch.randn(E)),
            (*sorted_, latents, offsets, 1, target, None, values, W_dec, None, None, None),
            (*sorted_, latents, offsets, 1, None, None, None, None, x, values, None),
        ],
        "entry_dots_op": [(target, None, latents, offsets, W_dec), (target, torch.randn(N), latents, offsets, W_dec)],
        "gather_latents_forward": [(gb, latents, *sorted_)],
        "segment_sums": [(values, *sorted_)],
        "row_norms_op": [(gW_dec,)],
        "take_rows_forward": [(gW_dec, torch.tensor([3, 1]), False), (gW, torch.tensor([3, 1]), True)],
    }


OPERATORS = sorted(operator_arguments())


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    for arguments in operator_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.fastsae, name).default, arguments)


def test_every_operator_is_checked():
    missing = set(backend.IMPLEMENTATIONS) - set(OPERATORS)
    assert not missing, f"new operators: give operator_arguments() what {missing} take"
