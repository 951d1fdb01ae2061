"""What SAELens' documentation shows, with `fastsae.patch("sae_lens")` above it, beside the same without; and where ours differs
on purpose."""

import copy

import pytest
import sae_lens
import tiny_lm
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    SAETrainingRunner,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from saelens_modules import build, near
from transformer_lens import HookedTransformerConfig

from fastsae import functional, hosts
from fastsae.hosts.sae_lens import codes, training

HOOK, WIDTH, F = "blocks.1.hook_resid_pre", 32, 256
TRAINS = {
    "topk": ("TopKTrainingSAE", {"k": 8}),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": 8}),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", {"k": 8, "matryoshka_widths": [64, F]}),
    "jumprelu": ("JumpReLUTrainingSAE", {"l0_coefficient": 0.1}),
    "standard": ("StandardTrainingSAE", {"l1_coefficient": 0.5}),
    "gated": ("GatedTrainingSAE", {"l1_coefficient": 0.5}),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often the sparse path ran: codes made, and training steps."""
    count = {"codes": 0, "steps": 0}

    def counted(module, name, what):
        real = getattr(module, name)

        def call(*args):
            result = real(*args)
            count[what] += result is not None
            return result

        monkeypatch.setattr(module, name, call)

    counted(codes, "encode", "codes")
    counted(training, "_sparse", "steps")
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)
    yield count
    hosts.unpatch("sae_lens")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm.save(tmp_path_factory.mktemp("lm")))
    config = HookedTransformerConfig(
        n_layers=2, d_model=WIDTH, n_ctx=32, d_head=8, n_heads=4, d_mlp=64, act_fn="gelu", d_vocab=len(tokenizer), seed=0
    )
    return HookedSAETransformer(config, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tokens(model):
    return model.to_tokens(tiny_lm.TEXTS[:4])[:, :16]


def an_sae(name="JumpReLUSAE", hook=HOOK, d_in=WIDTH, noise=0.2, **config):
    sae = build(name, d_in=d_in, d_sae=F, noise=noise, metadata=SAEMetadata(hook_name=hook, prepend_bos=True), **config)
    if hasattr(sae, "threshold"):
        sae.threshold.data.fill_(0.5)
    return sae


def twice(what):
    """what() without and with the patch."""
    hosts.unpatch("sae_lens")
    stock = what()
    hosts.patch("sae_lens")
    return stock, what()


def assert_alike(a, b, limit=1e-5):
    assert list(a) == list(b)
    for name in a:
        near(b[name], a[name], limit, name)


# ── load and analyse ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_and_analyse(model, tokens, tmp_path, calls):
    """Load, cache the residual stream, encode, find the strongest latents, reconstruct."""
    an_sae().save_model(tmp_path)

    def analyse():
        sae = SAE.load_from_disk(tmp_path, device="cpu")
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=HOOK)
            acts = sae.encode(cache[HOOK])
            values, strongest = acts.sum((0, 1)).topk(5)
            return {"values": values, "ids": strongest.float(), "out": sae.decode(acts), "forward": sae(cache[HOOK])}

    assert_alike(*twice(analyse))
    assert calls["codes"]


# ── HookedSAETransformer ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", ["JumpReLUSAE", "TopKSAE", "GatedSAE", "StandardSAE"])
def test_run_with_saes_and_caches(model, tokens, name, error, grad, calls):
    sae = an_sae(name)

    def run():
        with torch.set_grad_enabled(grad):
            logits = model.run_with_saes(tokens, saes=[sae], use_error_term=error)
            masked = model.run_with_saes(tokens, saes=[sae], use_error_term=error, exclude_special_tokens=[0, 5])
            cached, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=error)
        found = {k: v for k, v in cache.items() if "sae" in k}
        assert len(found) == 5 + error and not model.acts_to_saes
        return {"logits": logits, "masked": masked, "cached": cached, **found}

    stock, fast = twice(run)
    assert_alike(stock, fast, 1e-4)
    assert calls["codes"]
    if error:
        near(fast["logits"], model(tokens), 1e-4)


def test_hook_z_saes(model, tokens):
    def run():
        torch.manual_seed(0)
        sae = an_sae("StandardSAE", "blocks.0.attn.hook_z", reshape_activations="hook_z")
        return dict(zip("ab", (model.run_with_saes(tokens, saes=[sae], use_error_term=e) for e in (False, True)), strict=True))

    assert_alike(*twice(run))


def test_one_pass_serves_the_error_term(model, tokens, calls):
    sae = an_sae()
    hosts.patch("sae_lens")
    with torch.no_grad():
        model.run_with_saes(tokens, saes=[sae], use_error_term=True)
        assert calls["codes"] == 1
        hooks = [(f"{HOOK}.hook_sae_acts_post", lambda t, hook: t * 2)]
        model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=hooks)


def test_steering_and_ablation(model, tokens):
    """A direction of the decoder added to the residual stream, and a latent set inside the SAE."""
    sae = an_sae()

    def run():
        def steer(t, hook):
            return t + 4 * sae.W_dec[7]

        def ablate(t, hook):
            t[:, :, 3] = 0
            return t

        sae.eval()
        with torch.no_grad():
            return {
                "steered": model.run_with_hooks(tokens, fwd_hooks=[(HOOK, steer)]),
                "ablated": model.run_with_hooks_with_saes(
                    tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", ablate)]
                ),
            }

    assert_alike(*twice(run))


def test_attribution(model, tokens):
    """Gradient times activation at the latents, those included that are silent."""
    sae = an_sae()

    def run():
        kept = {}

        def forward(t, hook):
            t.retain_grad()
            kept["acts"] = t

        def backward(g, hook):
            kept["hook"] = g.clone()

        point = f"{HOOK}.hook_sae_acts_post"
        hooks = model.hooks(fwd_hooks=[(point, forward)], bwd_hooks=[(point, backward)])
        with model.saes(saes=[sae], use_error_term=True), hooks:
            logits = model(tokens)
            (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward()
        model.zero_grad()
        acts = kept["acts"]
        assert acts.grad[acts == 0].any()
        return {"attribution": acts * acts.grad, "grad": acts.grad, "hook": kept["hook"]}

    assert_alike(*twice(run), 1e-4)


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_dataset():
    return Dataset.from_dict({"text": tiny_lm.TEXTS * 8})


def a_store(model, **options):
    defaults = {
        "dataset": a_dataset(), "streaming": False, "hook_name": HOOK, "hook_head_index": None, "d_in": WIDTH,
        "context_size": 16, "n_batches_in_buffer": 2, "total_training_tokens": 10**6, "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 64, "prepend_bos": True, "normalize_activations": "none",
        "device": torch.device("cpu"), "dtype": "float32",
    }  # fmt: skip
    return ActivationsStore(model, **(defaults | options))


def test_evals(model, calls):
    sae = an_sae("TopKSAE")
    config = EvalConfig(
        batch_size_prompts=4, n_eval_reconstruction_batches=2, compute_kl=True, compute_ce_loss=True,
        n_eval_sparsity_variance_batches=2, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
    )  # fmt: skip

    def run():
        torch.manual_seed(0)
        metrics, features = run_evals(sae, a_store(model), model, ActivationScaler(), config)
        flat = {f"{part}/{name}": value for part, values in metrics.items() for name, value in values.items()}
        return {name: torch.tensor(value, dtype=torch.float64).nan_to_num(-1) for name, value in {**flat, **features}.items()}

    assert_alike(*twice(run), 1e-4)
    assert calls["codes"]


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_run(model, which, tmp_path, **options):
    name, config = TRAINS[which]
    sae = getattr(sae_lens, f"{name}Config")(d_in=WIDTH, d_sae=F, **copy.deepcopy(config))
    defaults = {
        "sae": sae, "model_name": "tiny", "dataset_path": "", "hook_name": HOOK, "context_size": 16, "lr": 1e-3,
        "train_batch_size_tokens": 64, "training_tokens": 64 * 12, "n_batches_in_buffer": 8, "store_batch_size_prompts": 4,
        "dead_feature_window": 3, "feature_sampling_window": 5, "n_checkpoints": 1, "checkpoint_path": str(tmp_path / which),
        "output_path": str(tmp_path / f"{which}-out"), "logger": LoggingConfig(log_to_wandb=False), "device": "cpu",
        "save_final_checkpoint": True,
    }  # fmt: skip
    cfg = LanguageModelSAERunnerConfig(**(defaults | options))
    torch.manual_seed(0)
    return SAETrainingRunner(cfg, override_model=model, override_dataset=a_dataset())


def a_step(sae):
    return TrainStepInput(torch.randn(8, sae.cfg.d_in), {}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)


@pytest.mark.parametrize("which", TRAINS)
def test_train_with_the_runner(model, which, tmp_path, calls):
    """Unchanged code trains, checkpoints and saves what SAELens itself loads, and learns what it learns there."""
    stock = a_run(model, which, tmp_path).run()
    assert not calls["steps"]
    hosts.patch("sae_lens")
    fast = a_run(model, which, tmp_path / "fast").run()
    assert calls["steps"] == 12 and type(fast) is type(stock)
    for (key, p), q in zip(fast.state_dict().items(), stock.state_dict().values(), strict=True):
        assert (p - q).norm() <= 0.02 * q.norm() + 1e-6, key
    hosts.unpatch("sae_lens")
    (final,) = (tmp_path / "fast" / which).glob("*/final_*")
    for folder, load in ((final, sae_lens.TrainingSAE), (tmp_path / "fast" / f"{which}-out", SAE)):
        sae = load.load_from_disk(folder)
        x = torch.randn(5, WIDTH)
        near(hosts.accelerate(sae)(x), hosts.restore(sae)(x), 1e-5)
    assert {p.name for p in final.iterdir()} == {p.name for p in next((tmp_path / which).glob("*/final_*")).iterdir()}


def test_resume_what_saelens_began(model, tmp_path, calls):
    a_run(model, "topk", tmp_path, n_checkpoints=1).run()
    checkpoint = sorted((tmp_path / "topk").glob("*/[0-9]*"))[0]
    hosts.patch("sae_lens")
    a_run(model, "topk", tmp_path / "again", resume_from_checkpoint=str(checkpoint)).run()
    assert 0 < calls["steps"] < 12


def test_compiled_training_is_the_sparse_step(calls):
    """What `compile_sae=True` does."""
    hosts.patch("sae_lens")
    sae = build("TopKTrainingSAE", k=4)
    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="eager")
    sae.training_forward_pass(step_input=a_step(sae)).loss.backward()
    assert calls["steps"] == 1 and sae.W_enc.grad.any()


# ── where ours differs: documented defects of SAELens 6.54 ───────────────────────────────────────────────────────────────


def test_defect_the_skip_term_is_dropped_in_a_model(model, tokens):
    """WRONG in SAELens: HookedSAETransformer calls encode and decode, and the skip term is in neither. Ours keeps it."""
    for name in ("SkipTranscoder", "JumpReLUSkipTranscoder"):
        sae = an_sae(name, "blocks.0.hook_mlp_out", d_out=WIDTH, apply_b_dec_to_input=False)
        x = torch.randn(2, 3, WIDTH)

        def in_model(sae=sae):
            kept = []
            hooks = [("blocks.0.hook_mlp_out.hook_sae_output", lambda t, hook: kept.append(t))]
            model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=hooks)
            return kept[0]

        with torch.no_grad():
            stock, fast = twice(in_model)
            hosts.unpatch("sae_lens")
            mlp_out = model.run_with_cache(tokens)[1]["blocks.0.hook_mlp_out"]
            near(fast, sae(mlp_out), 1e-5)
            near(fast - stock, mlp_out @ sae.W_skip.T, 1e-4)
            assert sae.W_skip.any() and not torch.allclose(sae(x), sae.decode(sae.encode(x)))


def test_defect_sparse_activations_have_no_backward():
    """WRONG in SAELens: `use_sparse_activations` with the default rescaling fails in backward. Ours trains."""
    sae = build("TopKTrainingSAE", k=4, use_sparse_activations=True)
    given = a_step(sae)
    with pytest.raises((NotImplementedError, RuntimeError)):
        sae.training_forward_pass(step_input=given).loss.backward()
    sae.zero_grad()
    hosts.accelerate(sae).training_forward_pass(step_input=given).loss.backward()
    assert sae.W_enc.grad.any()
    assert sae.encode(given.sae_in).is_sparse  # what was asked for


def test_defect_a_module_cannot_be_pickled_and_a_copied_hook_z_module_cannot_run():
    """WRONG in SAELens, and the same in ours: closures and lambdas on the module belong to the module they were made for."""
    sae = build("StandardSAE", reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"))
    for module in (sae, hosts.accelerate(copy.deepcopy(sae))):
        with pytest.raises(AttributeError, match="d_head"):
            copy.deepcopy(module)(torch.randn(2, 3, 4))
