"""fastsae.patch("dictionary_learning") beside the library itself: values, gradients, trainers step by step, and what stays."""

import copy
import io
import json
from contextlib import contextmanager

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from test_memory import Largest

from fastsae import functional, hosts
from fastsae.kernels import scores

N, D, F, K = 40, 12, 96, 4
HOST = "dictionary_learning"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GROUPS = [0.125, 0.375, 0.5]

DICTIONARIES = {
    "AutoEncoder": lambda: AutoEncoder(D, F),
    "GatedAutoEncoder": lambda: GatedAutoEncoder(D, F),
    "JumpReluAutoEncoder": lambda: JumpReluAutoEncoder(D, F),
    "JumpReluAutoEncoder centred": lambda: _centred(JumpReluAutoEncoder(D, F)),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D, F, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D, F, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, F, K, [12, 36, 48]),
}
TRAINERS = {
    "Standard": (StandardTrainer, {"sparsity_warmup_steps": 5}),
    "April": (StandardTrainerAprilUpdate, {"sparsity_warmup_steps": 5}),
    "Gated": (GatedSAETrainer, {"sparsity_warmup_steps": 5}),
    "JumpReLU": (JumpReluTrainer, {"sparsity_warmup_steps": 5, "bandwidth": 0.25, "target_l0": 9.0}),
    "TopK": (TopKTrainer, {"k": K}),
    "BatchTopK": (BatchTopKTrainer, {"k": K}),
    "Matryoshka": (MatryoshkaBatchTopKTrainer, {"k": K, "group_fractions": GROUPS, "group_weights": [0.2, 0.3, 0.5]}),
}


def _centred(ae):
    ae.apply_b_dec_to_input = True
    return ae


@contextmanager
def patched():
    hosts.patch(HOST)
    try:
        yield
    finally:
        hosts.unpatch(HOST)


@pytest.fixture(autouse=True)
def sparse(monkeypatch):
    """Codes of this size are never sparse enough to pay; here every one is."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)


@pytest.fixture
def in_fp64(dtype, monkeypatch):
    """Their auxiliary loss asks for .float(): where all is fp64, it stays fp64."""
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", lambda t: t.double())


class Operators(Largest):
    """Which operators of ours ran, and the largest tensor."""


def near(a, b, dtype, what):
    assert a.shape == b.shape, what
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
    assert a.equal(b) or error <= TOLERANCE[dtype], f"{what}: {error:.2g} relative"


def dictionary(name, dtype):
    ae = DICTIONARIES[name]().to(dtype)
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter += torch.randn_like(parameter) * 0.3
        if isinstance(ae, JumpReluAutoEncoder):
            ae.threshold -= 0.1  # some below zero
        elif hasattr(ae, "threshold"):
            ae.threshold.fill_(0.4)
    return ae


def run(ae, x, **options):
    """Outputs of forward, and the gradients of parameters and of x where it asks for one."""
    ae.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(x.requires_grad)
    out = ae(x, **options)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    gradients = {name: p.grad.clone() for name, p in ae.named_parameters() if p.grad is not None}
    return [o.detach() for o in outputs], gradients | ({} if x.grad is None else {"x": x.grad})


# ── dictionaries ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["patch", "accelerate"])
@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", DICTIONARIES)
def test_forward_and_every_gradient_are_the_hosts(name, features, x_learns, way, dtype):
    ae = dictionary(name, dtype)
    x = torch.randn(5, 8, D, dtype=dtype, requires_grad=x_learns)
    expected, its_gradients = run(ae, x, output_features=features)
    with Operators() as seen:
        if way == "patch":
            with patched():
                got, gradients = run(ae, x, output_features=features)
        else:
            got, gradients = run(hosts.accelerate(ae), x, output_features=features)
    assert {"decode_forward", "encode_entries"} <= seen.operators
    for a, b in zip(got, expected, strict=True):
        near(a, b, dtype, "output")
    assert gradients.keys() == its_gradients.keys()
    for parameter, gradient in gradients.items():
        near(gradient, its_gradients[parameter], dtype, parameter)
        if parameter != "x":
            assert gradient.stride() == ae.get_parameter(parameter).stride()


@pytest.mark.parametrize("rows", [1, 40])  # few entries gather columns of the decoder, many copy it
@pytest.mark.parametrize("name", DICTIONARIES)
def test_inference_is_the_hosts(name, rows, dtype):
    ae, x = dictionary(name, dtype), torch.randn(rows, D, dtype=dtype)
    with torch.no_grad():
        expected = ae(x), ae.encode(x), ae.decode(ae.encode(x))
        with patched(), Operators() as seen:
            got = ae(x), ae.encode(x), ae.decode(ae.encode(x))
    assert "decode_forward" in seen.operators and "encode_entries" not in seen.operators
    for a, b in zip(got, expected, strict=True):
        near(a, b, dtype, "output")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AutoEncoderTopK", {"return_topk": True}),
        ("AutoEncoderTopK", {"use_threshold": True}),
        ("BatchTopKSAE", {"use_threshold": False}),
        ("BatchTopKSAE", {"use_threshold": False, "return_active": True}),
        ("MatryoshkaBatchTopKSAE", {"use_threshold": False}),
        ("JumpReluAutoEncoder", {"output_pre_jump": True}),
        ("GatedAutoEncoder", {"return_gate": True, "normalize_decoder": True}),
    ],
)
def test_encode_with_options_is_the_hosts(name, options, dtype):
    ae, x = dictionary(name, dtype), torch.randn(N, D, dtype=dtype)
    expected = ae.encode(x, **options)
    with patched():
        got = ae.encode(x, **options)
    for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (got, expected)), strict=True):
        near(a.to(dtype), b.to(dtype), dtype, "output")


def test_other_modes_of_forward_are_the_hosts():
    ae, gated, x = dictionary("AutoEncoder", torch.float32), dictionary("GatedAutoEncoder", torch.float32), torch.randn(N, D)
    matryoshka = dictionary("MatryoshkaBatchTopKSAE", torch.float32)
    matryoshka.active_groups = 1
    ghost = torch.rand(F) < 0.3

    def outputs():
        return *ae(x, True, ghost), *gated(x, True, normalize_decoder=True), matryoshka(x), matryoshka.encode(x)

    expected = outputs()
    with patched():
        assert all(a.equal(b) for a, b in zip(outputs(), expected, strict=True))


@pytest.mark.parametrize("name", ["AutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE"])
def test_a_code_that_is_not_sparse_takes_the_hosts_path(name, monkeypatch):
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1 / 256)
    ae, x = dictionary(name, torch.float32), torch.randn(N, D)
    expected = ae(x)
    with patched(), Operators() as seen:
        assert ae(x).equal(expected)
    assert seen.operators == {"select_threshold_forward"}


# ── trainers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def trainer(name, dtype):
    cls, config = TRAINERS[name]
    made = cls(
        steps=1000, warmup_steps=2, lr=1e-3, activation_dim=D, dict_size=F, layer=0, lm_name="none", device="cpu", **config
    )
    made.ae.to(dtype)
    for attribute in ("threshold_start_step",):
        if hasattr(made, attribute):
            setattr(made, attribute, 3)
    if hasattr(made, "dead_feature_threshold"):
        made.dead_feature_threshold = 5 * N
    return made


STATE = ("num_tokens_since_fired", "effective_l0", "dead_features", "pre_norm_auxk_loss", "steps_since_active")


def follow(fast, stock):
    """Put `fast` where `stock` is: weights, moments, counters."""
    fast.ae.load_state_dict(stock.ae.state_dict())
    fast.optimizer.load_state_dict(copy.deepcopy(stock.optimizer.state_dict()))
    for name in STATE:
        if hasattr(stock, name):
            value = getattr(stock, name)
            setattr(fast, name, value.detach().clone() if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize(("name", "dense"), [*((name, False) for name in TRAINERS), ("JumpReLU", True)])
def test_twenty_updates_are_the_hosts_step_by_step(name, dense, dtype, in_fp64, monkeypatch):
    """Each from the stock trainer's weights. Latents die on the way, so that the auxiliary loss takes part."""
    if dense:
        monkeypatch.setattr(functional, "SPARSE_BELOW", 0.0)
        monkeypatch.setattr(functional, "BLOCK_ELEMENTS", N * F // 3)
    stock, fast = trainer(name, dtype), trainer(name, dtype)
    if name == "JumpReLU":
        with torch.no_grad():
            stock.ae.threshold += torch.linspace(-0.05, 0.3, F)
            stock.ae.threshold[:5] = 100.0
    died = 0
    data = torch.randn(20, N, D, dtype=dtype) @ torch.randn(D, D, dtype=dtype) / 3
    for step, x in enumerate(data):
        follow(fast, stock)
        with patched(), Operators() as seen:
            ours = fast.update(step, x.clone())
        theirs = stock.update(step, x.clone())
        assert "decode_loss_forward" in seen.operators or dense
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert isinstance(ours, float) and ours == pytest.approx(theirs, rel=TOLERANCE[dtype])
        for key, value in stock.ae.named_buffers():
            near(fast.ae.get_buffer(key).to(dtype), value.to(dtype), dtype, f"step {step}: {key}")
        for key, value in stock.ae.named_parameters():
            parameter = fast.ae.get_parameter(key)
            mine, other = fast.optimizer.state[parameter], stock.optimizer.state[value]
            assert mine["step"] == other["step"]
            for moment in ("exp_avg", "exp_avg_sq"):  # which are the gradient
                near(mine[moment], other[moment], dtype, f"step {step}: {moment} of {key}")
            # Adam divides by the gradient's size: in fp32 a gradient that is rounding noise moves its weight by anything
            size = other["exp_avg_sq"].sqrt()
            sure = size > (1e-2 if dtype == torch.float32 else 1e-7) * size.max()
            error = (parameter - value)[sure].abs().max() / value.abs().max().clamp(min=100 * stock.lr)
            assert error <= TOLERANCE[dtype], f"step {step}: {key}: {error:.2g} relative"
        for attribute in STATE:
            if hasattr(stock, attribute) and getattr(stock, attribute) is not None:
                a, b = (torch.as_tensor(getattr(t, attribute)).double() for t in (fast, stock))
                near(a, b, dtype, f"step {step}: {attribute}")
        died += int(getattr(stock, "dead_features", 0))
    assert died or name in ("Standard", "April", "Gated")
    assert fast.get_logging_parameters().keys() == stock.get_logging_parameters().keys() and fast.config == stock.config


@pytest.mark.parametrize("name", TRAINERS)
def test_logging_returns_what_the_host_returns_and_counts_twice_as_it_does(name, dtype, in_fp64):
    """WRONG in theirs, and kept: loss(logging=True) moves counters and the threshold, as the step itself does again."""
    stock, fast = trainer(name, dtype), trainer(name, dtype)
    for attribute in ("num_tokens_since_fired",):
        if hasattr(stock, attribute):
            getattr(stock, attribute)[::3] = 10 * N
    if name == "JumpReLU":
        stock.ae.threshold.data[::5] = 100.0
    follow(fast, stock)
    x = torch.randn(N, D, dtype=dtype)
    with torch.no_grad():
        theirs = stock.loss(x, step=5, logging=True)
        with patched():
            ours = fast.loss(x, step=5, logging=True)
    assert ours._fields == theirs._fields and type(ours).__name__ == type(theirs).__name__
    for field in ours._fields[:3]:
        near(getattr(ours, field), getattr(theirs, field), dtype, field)
    assert ours.losses == pytest.approx(theirs.losses, rel=TOLERANCE[dtype])
    assert all(isinstance(v, float) for v in ours.losses.values())
    if hasattr(stock, "num_tokens_since_fired"):
        assert fast.num_tokens_since_fired.equal(stock.num_tokens_since_fired) and stock.num_tokens_since_fired.any()
    if hasattr(stock, "threshold_start_step"):
        assert stock.ae.threshold > 0 and fast.ae.threshold == pytest.approx(float(stock.ae.threshold), rel=1e-5)


def test_a_pick_of_value_zero_has_not_fired():
    """WRONG in theirs, and not kept: which latents top-k picks among equal zeros is its whim, and they count as fired."""
    stock, fast = trainer("TopK", torch.float32), trainer("TopK", torch.float32)
    x = torch.randn(N, D)
    for t in (stock, fast):
        t.num_tokens_since_fired[:] = 5
        t.ae.encoder.bias.data.fill_(-100.0)  # nothing is positive: every pick is zero
    follow(fast, stock)
    stock.loss(x, step=0)
    with patched():
        fast.loss(x, step=0)
    assert (stock.num_tokens_since_fired == 0).any() and (fast.num_tokens_since_fired == 5 + N).all()


def test_p_anneal_runs_over_the_fast_dictionary_and_its_resampling_still_does_nothing():
    """WRONG in theirs, and kept: weight[dead][:n] = ... assigns to a copy."""
    config = {"anneal_start": 4, "anneal_end": 9, "n_sparsity_updates": 2, "sparsity_warmup_steps": None}
    config |= {"steps": 100, "warmup_steps": 1, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none"}
    torch.manual_seed(3)
    stock, fast = (PAnnealTrainer(device="cpu", resample_steps=50, **config) for _ in range(2))
    fast.ae.load_state_dict(stock.ae.state_dict())
    for step in range(4):
        x = torch.randn(N, D)
        stock.update(step, x)
        with patched(), Operators() as seen:
            fast.update(step, x)
        assert "decode_forward" in seen.operators
    for key, value in stock.ae.state_dict().items():
        near(fast.ae.state_dict()[key], value, torch.float32, key)
    before = fast.ae.encoder.weight.detach().clone()
    fast.resample_neurons(torch.arange(F) < 9, x)
    assert fast.ae.encoder.weight.equal(before)


@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "Matryoshka", "JumpReLU", "JumpReLU dense"])
def test_an_update_holds_less_than_a_quarter_of_the_code(name, monkeypatch):
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1 / 256)
    rows, d, f = 1024, 16, 4096
    limit = rows * f // 4
    for module in (functional, scores):  # what is bounded is bounded by this
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", limit)
    cls, config = TRAINERS[name.split()[0]]
    made = cls(
        steps=10, warmup_steps=1, activation_dim=d, dict_size=f, layer=0, lm_name="none", device="cpu",
        **config | {"sparsity_warmup_steps": 5} if name.startswith("J") else config,
    )  # fmt: skip
    made.num_tokens_since_fired[: f // 100] = 10_000_000  # of which some stay silent
    if name == "JumpReLU":
        made.ae.threshold.data += 3.0
        made.bandwidth = 0.01
    with patched(), Operators() as seen:
        made.update(1, torch.randn(rows, d))
    assert any("select" in operator for operator in seen.operators)
    assert ("latent_backward_op" in seen.operators) == (name != "JumpReLU dense")
    assert f * d <= seen.elements <= limit, f"{seen.by} made {seen.elements} elements of {limit} allowed"


# ── what stays the host's ────────────────────────────────────────────────────────────────────────────────────────────────


def test_unpatch_leaves_every_class_and_function_as_it_was():
    from dictionary_learning import trainers

    owners = [*(type(make()) for make in DICTIONARIES.values()), *(cls for cls, _ in TRAINERS.values())]
    owners += [trainers.top_k, trainers.batch_top_k, trainers.matryoshka_batch_top_k, trainers.jumprelu]
    before = [dict(vars(owner)) for owner in owners]
    with patched():
        assert all(dict(vars(owner)) != old for owner, old in zip(owners, before, strict=True))
    assert [dict(vars(owner)) for owner in owners] == before


def test_a_subclass_and_a_listener_get_the_hosts_steps():
    class Doubled(AutoEncoderTopK):
        def encode(self, x, **options):
            return 2 * super().encode(x, **options)

    x = torch.randn(N, D)
    doubled, listened = Doubled(D, F, K), AutoEncoderTopK(D, F, K)
    heard = []
    listened.encoder.register_forward_hook(lambda module, args, out: heard.append(out.shape))
    expected = doubled(x), listened(x)
    with patched():
        assert doubled(x).equal(expected[0]) and listened(x).equal(expected[1])
    assert heard == [(N, F)] * 2


def test_nan_a_method_on_the_object_and_torch_func_get_the_hosts_steps():
    ae, x = dictionary("AutoEncoderTopK", torch.float32), torch.randn(N, D)
    broken = x.clone()
    broken[3, 2] = torch.nan

    def results():
        jacobian = torch.func.jacrev(ae)(x[0])
        nan = ae(broken)
        ae.encode = lambda x: torch.ones(len(x), F)
        constant = ae(x)
        del ae.encode
        return jacobian, nan.nan_to_num(7.0), constant

    expected = results()
    with patched():
        assert all(a.equal(b) for a, b in zip(results(), expected, strict=True))
    assert (expected[1] == 7).any()


def test_a_trainer_of_another_dictionary_keeps_the_hosts_loss():
    class Other(AutoEncoderTopK):
        pass

    config = {"steps": 10, "warmup_steps": 1, "activation_dim": D, "dict_size": F, "k": K, "layer": 0, "lm_name": "none"}
    made = TopKTrainer(dict_class=Other, device="cpu", **config)
    x = torch.randn(N, D)
    expected = made.loss(x, step=0)
    with patched():
        assert made.loss(x, step=0).equal(expected)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_files_and_biases_go_through_the_host(name, tmp_path):
    ae, x = dictionary(name.split()[0], torch.float32), torch.randn(N, D)
    with patched():
        ae.scale_biases(1.5)
        torch.save(ae.state_dict(), tmp_path / "ae.pt")
        options = {"normalize_decoder": False} if isinstance(ae, AutoEncoder) else {}
        loaded = type(ae).from_pretrained(tmp_path / "ae.pt", **options)
        got = loaded(x)
    assert loaded.state_dict().keys() == ae.state_dict().keys()
    near(got, ae(x), torch.float32, "output")


def test_a_copy_and_a_pickle_of_an_accelerated_module_are_the_hosts_and_fast():
    ae, x = hosts.accelerate(dictionary("BatchTopKSAE", torch.float32)), torch.randn(N, D)
    buffer = io.BytesIO()
    torch.save(ae, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ae), torch.load(buffer, weights_only=False)):
        assert isinstance(other, BatchTopKSAE)
        with Operators() as seen:
            assert other(x).equal(ae(x))
        assert "decode_forward" in seen.operators


def test_the_hosts_training_loop_evaluates_saves_and_loads(tmp_path):
    from dictionary_learning.evaluation import evaluate
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    torch.manual_seed(0)
    batches = list(torch.randn(8, 64, D))
    shared = {"steps": 6, "warmup_steps": 1, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none"}
    shared["device"] = "cpu"

    def train(folder):
        configs = [
            {"trainer": TopKTrainer, "k": K, "seed": 0, "lr": 1e-3, **shared},
            {"trainer": MatryoshkaBatchTopKTrainer, "k": K, "seed": 0, "lr": 1e-3, "group_fractions": GROUPS, **shared},
        ]
        trainSAE(  # which divides its batches in place
            [x.clone() for x in batches], configs, steps=6, save_dir=str(folder), save_steps=[3], log_steps=2, verbose=True,
            normalize_activations=True, device="cpu",
        )  # fmt: skip
        loaded = [load_dictionary(str(folder / f"trainer_{i}"), "cpu") for i in range(2)]
        return loaded, [evaluate(ae, iter(batches), n_batches=2) for ae, _ in loaded]

    stock, its_numbers = train(tmp_path / "stock")
    with patched():
        fast, numbers = train(tmp_path / "fast")
    for (ae, config), (other, its_config) in zip(fast, stock, strict=True):
        assert json.dumps(config) == json.dumps(its_config)
        for key, value in other.state_dict().items():
            torch.testing.assert_close(ae.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(numbers, its_numbers, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_autocast_is_no_worse_than_the_hosts(name):
    """Against the same loss in fp32, where bf16's own rounding decides."""
    fast, stock, exact = (trainer(name, torch.float32) for _ in range(3))
    for t in (fast, stock, exact):
        follow(t, exact)
        if name == "JumpReLU":
            t.ae.threshold.data += 0.3
        if hasattr(t, "num_tokens_since_fired"):
            t.num_tokens_since_fired[::2] = 10 * N
    x = torch.randn(512, D)

    def loss_and_gradients(made, narrow):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss = made.loss(x.to(torch.bfloat16) if narrow else x, step=5)
        loss.backward()
        return loss.detach().float(), {n: p.grad.float() for n, p in made.ae.named_parameters()}

    truth, gradients = loss_and_gradients(exact, False)
    theirs, its_gradients = loss_and_gradients(stock, True)
    with patched(), Operators() as seen:
        ours, our_gradients = loss_and_gradients(fast, True)
    assert "decode_loss_forward" in seen.operators
    assert (ours - truth).abs() <= 2 * (theirs - truth).abs() + 4e-3 * truth.abs()
    for parameter, gradient in gradients.items():
        ours, theirs = ((g[parameter] - gradient).norm() / gradient.norm() for g in (our_gradients, its_gradients))
        assert ours <= 1.5 * theirs + 4e-3, f"{parameter}: {ours:.2g}, theirs {theirs:.2g}"
