"""SAELens inference, patched or accelerated, against SAELens itself."""

import copy
import io
import pickle
import warnings

import pytest
import sae_lens
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from saelens_modules import INFERENCE, TRAINING, D, F, K, Largest, build, near, tolerance

from fastsae import functional, hosts
from fastsae.hosts.sae_lens import codes as coding

EVERY = pytest.mark.parametrize("which", INFERENCE)
BOTH = INFERENCE | {f"training {name}": entry for name, entry in TRAINING.items()}
HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")


@pytest.fixture(autouse=True)
def codes(monkeypatch):
    """All sizes take the sparse path, and say so: the codes that it made."""
    made, real = [], coding.encode

    def encode(*args):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(coding, "encode", encode)
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)
    return made


def pair(which, dtype=torch.float32, **config):
    """A module as SAELens has it, and an accelerated one with the same weights."""
    name, own = BOTH[which]
    stock, fast = (build(name, dtype, **copy.deepcopy(own | config)) for _ in range(2))
    fast.load_state_dict(stock.state_dict())
    return stock, hosts.accelerate(fast)


def all_of(sae, x):
    """Everything a user can ask: activations, both reconstructions, and the gradients of all that to everything."""
    x = x.clone().requires_grad_()
    sae.zero_grad()
    whole = sae(x)
    acts = sae.encode(x)
    acts.retain_grad()
    parts = sae.decode(acts)
    (whole.square().sum() + parts.cos().sum() + acts.sin().sum()).backward()
    return {
        "forward": whole, "encode": acts, "decode": parts, "x": x.grad, "acts": acts.grad,
        **{name: p.grad for name, p in sae.named_parameters()},
    }  # fmt: skip


def assert_same(stock, fast, x, limit):
    expected, got = all_of(stock, x), all_of(fast, x)
    assert list(expected) == list(got)
    for name in expected:
        near(got[name], expected[name], limit, name)


# ── values and gradients ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", BOTH)
def test_everything_a_module_computes(which, dtype, codes):
    stock, fast = pair(which, dtype)
    assert_same(stock, fast, torch.randn(9, D, dtype=dtype), tolerance(dtype))
    assert codes and codes[0] is not None


@EVERY
@pytest.mark.parametrize("shape", [(D,), (1, D), (2, 3, D), (2, 1, 3, D)], ids=str)
def test_leading_dimensions(which, shape):
    stock, fast = pair(which)
    assert_same(stock, fast, torch.randn(shape), 1e-5)


@EVERY
@pytest.mark.parametrize(
    "normalize", ["expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]
)
def test_normalisation(which, normalize, codes):
    stock, fast = pair(which, torch.float64, normalize_activations=normalize)
    assert_same(stock, fast, torch.randn(9, D, dtype=torch.float64), 1e-9)
    assert codes


@pytest.mark.parametrize("which", [name for name in INFERENCE if "transcoder" not in name])
def test_hook_z(which):
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.attn.hook_z")
    stock, fast = pair(which, torch.float64, reshape_activations="hook_z", metadata=metadata)
    assert_same(stock, fast, torch.randn(5, 7, 3, D // 3, dtype=torch.float64), 1e-9)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_no_worse(which, dtype):
    """Both against the same weights in fp64. Where rounding moves a latent over a threshold, rows differ by its value."""
    stock, fast = pair(which, dtype)
    x = torch.randn(64, D, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(stock).to(dtype=torch.float64)(x.double())
        theirs, ours = stock(x), fast(x)
    assert ours.dtype == theirs.dtype
    scale = exact.abs().mean()
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean() + torch.finfo(dtype).eps * scale


@EVERY
def test_autocast_keeps_types_and_is_no_worse(which):
    stock, fast = pair(which)
    x = torch.randn(64, D)
    with torch.no_grad():
        exact = stock(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = stock(x), fast(x)
            acts, fast_acts = stock.encode(x), fast.encode(x)
            back = fast.decode(acts)
    assert ours.dtype == theirs.dtype and fast_acts.dtype == acts.dtype and back.dtype == theirs.dtype
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean() + 0.01 * exact.abs().mean()


@EVERY
def test_a_code_that_is_not_sparse(which, monkeypatch):
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1e-9)
    stock, fast = pair(which, torch.float64)
    assert_same(stock, fast, torch.randn(300, D, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("which", ["standard", "jumprelu", "topk", "gated"])
def test_what_kernels_refuse_is_left_to_saelens(which):
    """NaN and infinity, no rows at all, a k larger than the dictionary."""
    stock, fast = pair(which)
    x = torch.randn(6, D)
    x[2, 3], x[4, 1] = torch.nan, torch.inf
    for bad in (x, x[:0]):
        for ask in ("__call__", "encode"):
            assert torch.equal(getattr(stock, ask)(bad).isnan(), getattr(fast, ask)(bad).isnan())
    wide = hosts.accelerate(build("TopKSAE", k=F + 1))
    with pytest.raises(RuntimeError, match="out of range"):
        wide(x[:1])


def test_negative_thresholds():
    for which in ("jumprelu", "jumprelu_transcoder", "training jumprelu step"):
        stock, fast = pair(which, torch.float64)
        for sae in (stock, fast):
            sae.threshold.data.sub_(0.3)
        assert_same(stock.eval(), fast.eval(), torch.randn(9, D, dtype=torch.float64), 1e-9)
        assert torch.equal(stock.threshold, fast.threshold) and (stock.threshold < 0).any()


def test_transforms_see_plain_torch():
    """vmap, jacobians and forward-mode derivatives of a module."""
    stock, fast = pair("jumprelu", torch.float64)
    x, v = torch.randn(2, 5, D, dtype=torch.float64)
    near(torch.func.jacrev(fast)(x[0]), torch.func.jacrev(stock)(x[0]), 1e-12)
    near(torch.func.vmap(fast)(x), stock(x), 1e-12)
    near(torch.func.jvp(fast, (x,), (v,))[1], torch.func.jvp(stock, (x,), (v,))[1], 1e-12)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["topk", "jumprelu", "jumprelu_skip_transcoder", "gated"])
def test_forward_never_holds_the_code(which, monkeypatch):
    monkeypatch.undo()  # the real share of what counts as sparse
    name, config = INFERENCE[which]
    N, wide = 2048, 8192 * 4
    sae = hosts.accelerate(build(name, d_in=32, d_sae=wide, noise=0.0, **config))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn_like(sae.W_enc) / 32**0.5)
        for bias in ("b_enc", "b_gate", "b_mag"):
            if getattr(sae, bias, None) is not None:
                getattr(sae, bias).fill_(-3.2 if which == "gated" else 0.0)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(3.2)
    heard = []
    for hook in ("hook_sae_input", "hook_sae_recons", "hook_sae_output"):  # these do not ask for the code
        getattr(sae, hook).add_hook(lambda t, hook: heard.append(hook.name))
    with torch.no_grad(), Largest() as seen:
        sae(torch.randn(N, 32))
    assert "hook_sae_recons" in heard
    assert seen.elements <= N * wide // 4, seen.by


# ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_hooks_see_the_same_and_may_change_it(which):
    stock, fast = pair(which, torch.float64)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    for edit in (False, True):
        records = []
        for sae in (stock, fast):
            seen = {}

            def look(t, hook, seen=seen, edit=edit):
                seen[hook.name] = t
                return t * 1.5 + 0.25 if edit else None

            with sae.hooks([(name, look) for name in sae.hook_dict]):
                seen["result"] = sae(x)
            records.append(seen)
        assert list(records[0]) == list(records[1])
        for name in records[0]:
            near(records[1][name], records[0][name], 1e-9, name)


@pytest.mark.parametrize("name", HOOKS)
def test_one_hook_alone(name):
    """A latent is steered through each hook point, with the others silent; and its gradient is heard."""
    for which in ("topk rescaled", "jumprelu", "gated"):
        stock, fast = pair(which, torch.float64)
        x, results = torch.randn(7, D, dtype=torch.float64), []
        for sae in (stock, fast):
            gradients = []
            sae.zero_grad()
            hook = [(name, lambda t, hook: torch.cat([t[..., :3] * 2, t[..., 3:]], -1))]
            with sae.hooks(fwd_hooks=hook, bwd_hooks=[(name, lambda g, hook, to=gradients: to.append(g.clone()))]):
                y = sae(x.clone().requires_grad_())
                y.square().sum().backward()
            results.append([y.detach(), *gradients, sae.W_enc.grad, sae.W_dec.grad])
        assert len(results[0]) == len(results[1]) == 4
        for a, b in zip(*results, strict=True):
            near(b, a, 1e-9, (which, name))


def test_run_with_cache():
    stock, fast = pair("topk", torch.float64)
    x = torch.randn(7, D, dtype=torch.float64)
    (a, theirs), (b, ours) = stock.run_with_cache(x), fast.run_with_cache(x)
    assert list(theirs) == list(ours)
    near(b, a, 1e-9)
    for name in theirs:
        near(ours[name], theirs[name], 1e-9, name)


@pytest.mark.parametrize("which", ["standard", "topk", "jumprelu", "gated", "training batchtopk"])
def test_the_error_term_takes_one_pass_unless_a_hook_interferes(which, codes):
    stock, fast = pair(which, torch.float64)
    x = torch.randn(9, D, dtype=torch.float64)
    for sae in (stock, fast):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae.use_error_term = True
    near(fast(x), stock(x), 1e-9)
    near(fast(x), x, 1e-9)
    codes.clear()
    fast(x)
    assert len(codes) == 1
    errors = []
    for sae in (stock, fast):
        keep = [("hook_sae_error", lambda t, hook: errors.append(t)), ("hook_sae_acts_post", lambda t, hook: t * 0)]
        errors.append(sae.run_with_hooks(x, fwd_hooks=keep))
    near(errors[2], errors[0], 1e-9)
    near(errors[3], errors[1], 1e-9)
    assert not torch.allclose(errors[1], x)


# ── the code that a user holds ───────────────────────────────────────────────────────────────────────────────────────────


@EVERY
def test_decode_takes_what_it_is_given(which):
    """Edited in place, edited behind autograd's back, from elsewhere, and not sparse at all."""
    stock, fast = pair(which, torch.float64)
    x = torch.randn(8, D, dtype=torch.float64)
    with torch.no_grad():
        acts = fast.encode(x)
        near(fast.decode(acts), stock.decode(stock.encode(x)), 1e-9)
        acts[:, 5] = 3.0
        near(fast.decode(acts), stock.decode(acts), 1e-9)
        acts.data[:, 7] = -2.0
        near(fast.decode(acts), stock.decode(acts), 1e-9)
        dense = torch.randn_like(acts)
        near(fast.decode(dense), stock.decode(dense), 1e-9)
    with torch.inference_mode():
        near(fast(x), stock(x), 1e-9)


def test_saebench_and_dashboard_usage():
    """SAEBench reads attributes and folds; SAEDashboard slices the encoder and encodes."""
    for which in ("standard", "jumprelu", "gated"):
        stock, fast = pair(which, torch.float64)
        x, some = torch.randn(4, 6, D, dtype=torch.float64), torch.tensor([3, 4, 90])
        for sae in (stock, fast):
            assert sae.W_enc.shape == (D, F) and sae.W_dec.shape == (F, D) and sae.cfg.to_dict()["d_sae"] == F
            sae.fold_W_dec_norm()
            assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
        assert_same(stock, fast, x, 1e-9)
        whole = stock.encode(x)[..., some]
        for sae in (stock, fast):
            sae.W_enc = torch.nn.Parameter(sae.W_enc[:, some])
            for name in ("b_enc", "b_gate", "b_mag", "r_mag", "threshold"):
                if isinstance(getattr(sae, name, None), torch.nn.Parameter):
                    setattr(sae, name, torch.nn.Parameter(getattr(sae, name)[some]))
        near(fast.encode(x), whole, 1e-9, which)
        near(fast.encode(x), stock.encode(x), 1e-9, which)


@EVERY
def test_folds(which):
    stock, fast = pair(which, torch.float64)
    x = torch.randn(9, D, dtype=torch.float64)
    foldable = which not in ("topk", "abstopk")
    for sae in (stock, fast):
        before = sae(x)
        if foldable:
            sae.fold_W_dec_norm()
            near(sae(x), before, 1e-9)
        else:
            with pytest.raises(NotImplementedError):
                sae.fold_W_dec_norm()
        if "transcoder" not in which:
            sae.fold_activation_norm_scaling_factor(0.7)
            generator = torch.Generator().manual_seed(5)
            mean, matrix = torch.randn(D + 1, D, dtype=torch.float64, generator=generator).split([1, D])
            sae.fold_activation_whitening(mean[0], matrix, matrix.inverse())
    assert_same(stock, fast, x, 1e-8)


# ── as a module ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", BOTH)
def test_it_stays_the_module_that_it_was(which):
    name, config = BOTH[which]
    sae = build(name, **config)
    before = {key: (p, p.data_ptr(), p.stride()) for key, p in sae.named_parameters()}
    keys, repr_before = list(sae.state_dict()), repr(sae)
    fast = hosts.accelerate(sae)
    assert fast is sae and isinstance(sae, getattr(sae_lens, name)) and type(sae).__name__ == name
    assert hosts.accelerate(sae) is sae
    sae(torch.randn(5, D))
    assert list(sae.state_dict()) == keys and repr(sae) == repr_before
    assert [key for key, _ in sae.named_parameters()] == list(before)
    for key, p in sae.named_parameters():
        assert p is before[key][0] and (p.data_ptr(), p.stride()) == before[key][1:]
    assert sae.W_enc.is_contiguous()
    assert hosts.restore(sae) is sae and type(sae) is getattr(sae_lens, name)


@EVERY
def test_copies_and_pickles(which):
    """SAELens' own modules hold lambdas and cannot be pickled (a documented limit); what can copy them, copies ours."""
    stock, fast = pair(which, torch.float64)
    x = torch.randn(5, D, dtype=torch.float64)
    twin = copy.deepcopy(fast)
    assert type(twin) is type(fast) and twin.W_enc.data_ptr() != fast.W_enc.data_ptr()
    near(twin(x), stock(x), 1e-9)
    with pytest.raises(AttributeError):
        pickle.dumps(stock)
    cloudpickle = pytest.importorskip("cloudpickle")
    near(pickle.loads(cloudpickle.dumps(fast))(x), stock(x), 1e-9)  # noqa: S301
    memory = io.BytesIO()
    torch.save(fast.state_dict(), memory)
    memory.seek(0)
    stock.load_state_dict(torch.load(memory, weights_only=True))


@EVERY
def test_saved_loaded_on_meta_and_moved(which, patched, tmp_path, codes):
    name, config = INFERENCE[which]
    sae = build(name, **config)
    x = torch.randn(5, D)
    sae.save_model(tmp_path)
    for cls in (sae_lens.SAE, getattr(sae_lens, name)):
        codes.clear()
        loaded = cls.load_from_disk(tmp_path)
        assert type(loaded) is getattr(sae_lens, name) and not loaded.W_enc.is_meta
        near(loaded(x), sae(x), 1e-6)
        assert len(codes) == 2
    moved = loaded.to(dtype=torch.float64)
    assert moved.dtype == torch.float64 and moved(x.double()).dtype == torch.float64
    moved.to("cpu").save_model(tmp_path / "again")


def test_parameters_that_are_transposed_views(patched):
    """What some loaders leave behind: strides are respected, and nothing is copied into them."""
    sae = build("JumpReLUSAE", torch.float64)
    expected = sae(x := torch.randn(9, D, dtype=torch.float64))
    for name in ("W_enc", "W_dec"):
        setattr(sae, name, torch.nn.Parameter(getattr(sae, name).detach().T.contiguous().T))
        assert not getattr(sae, name).is_contiguous()
    near(sae(x), expected, 1e-12)
    sae(x).square().sum().backward()
    assert sae.W_enc.stride() == (1, D) == sae.W_enc.grad.stride()


# ── patching ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def everything_patched():
    methods, others = hosts._host("sae_lens")
    return [(owner, name) for owner, by_name in methods.items() for name in by_name] + [o[:2] for o in others]


def test_patch_and_unpatch_leave_no_trace():
    before = [vars(owner).get(name, "absent") for owner, name in everything_patched()]
    registries = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    hosts.patch("sae_lens")
    hosts.patch("sae_lens")
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(everything_patched(), before, strict=True))
    hosts.unpatch("sae_lens")
    hosts.unpatch("sae_lens")
    assert before == [vars(owner).get(name, "absent") for owner, name in everything_patched()]
    assert registries == (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)


def test_modules_and_names_from_before_become_fast(codes):
    from sae_lens import TopKSAE as imported_before

    sae, x = build("TopKSAE", k=K), torch.randn(3, D)
    sae(x)
    assert not codes
    hosts.patch("sae_lens")
    try:
        near(sae(x), imported_before.forward(sae, x), 1e-6)
        assert len(codes) == 2 and type(sae) is imported_before
    finally:
        hosts.unpatch("sae_lens")
    sae(x)
    assert len(codes) == 2


def test_what_somebody_changed_is_theirs(patched, codes):
    """A subclass, a method put on an object, another activation function: SAELens' code runs."""

    class Doubled(sae_lens.JumpReLUSAE):
        def encode(self, x):
            return 2 * super().encode(x)

    x = torch.randn(4, D)
    sae = build("JumpReLUSAE")
    twice = Doubled(sae.cfg)
    twice.load_state_dict(sae.state_dict())
    near(twice(x), sae.decode(2 * sae.encode(x)), 1e-5)
    sae.encode = lambda x: torch.zeros(*x.shape[:-1], F)
    near(sae(x), sae.b_dec.expand_as(x), 1e-6)
    other = build("TopKSAE", k=K)
    other.activation_fn = torch.nn.Identity()
    near(other.encode(x), (x - other.b_dec) @ other.W_enc + other.b_enc, 1e-5)
    assert not [c for c in codes if c is not None]


def test_other_architectures_stay_stock():
    for name in ("TemporalSAE", "MatchingPursuitSAE", "MatchingPursuitTrainingSAE"):
        assert getattr(sae_lens, name) not in hosts.fast_classes("sae_lens")
    sae = sae_lens.MatchingPursuitSAE(sae_lens.MatchingPursuitSAEConfig(d_in=D, d_sae=F))
    with pytest.raises(TypeError, match="MatchingPursuitSAE has no fast version: pass a module of sae_lens: Standard"):
        hosts.accelerate(sae)
    with pytest.raises(TypeError, match="Linear has no fast version"):
        hosts.accelerate(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="host='saelens': pass one of sae_lens"):
        hosts.patch("saelens")


def test_compiled_modules_run(patched):
    sae, x = build("JumpReLUSAE", torch.float64), torch.randn(4, D, dtype=torch.float64)
    near(torch.compile(sae, backend="eager")(x), sae(x), 1e-12)
