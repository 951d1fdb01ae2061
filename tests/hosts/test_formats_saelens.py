"""SAELens folders: what we write it loads, what it writes we load, with the same function and the same bits."""

import json

import pytest
import torch
from sae_lens import SAE as TheirSAE
from sae_lens import HookedSAETransformer, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig

import fastsae.formats
from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.formats import FormatError

D, F, OUT, K = 8, 20, 6, 3
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))

# name -> activation, options, the architecture that SAELens sees
OURS = {
    "standard": (ReLU, {}, "standard"),
    "topk": (lambda: TopK(K), {}, "topk"),
    "topk by norm": (lambda: TopK(K), {"rescale_acts_by_decoder_norm": True}, "topk"),
    "abstopk": (lambda: AbsTopK(K), {}, "abstopk"),
    "abstopk by norm": (lambda: AbsTopK(K), {"rescale_acts_by_decoder_norm": True}, "abstopk"),
    "batchtopk": (lambda: BatchTopK(K, threshold=0.3), {}, "jumprelu"),
    "batchtopk by norm": (lambda: BatchTopK(K, threshold=0.3), {"rescale_acts_by_decoder_norm": True}, "jumprelu"),
    "jumprelu": (lambda: JumpReLU(bandwidth=0.2, ste_to_input=True), {}, "jumprelu"),
    "gated": (Gated, {}, "gated"),
    "without b_dec": (ReLU, {"apply_b_dec_to_input": False}, "standard"),
    "constant norm": (ReLU, {"normalize": "constant_norm_rescale"}, "standard"),
    "layer norm": (lambda: TopK(K), {"normalize": "layer_norm"}, "topk"),
    "transcoder": (ReLU, {"d_out": OUT}, "transcoder"),
    "transcoder of equal widths": (ReLU, {"d_out": D}, "transcoder"),
    "skip transcoder": (ReLU, {"d_out": OUT, "skip": True}, "skip_transcoder"),
    "jumprelu transcoder": (JumpReLU, {"d_out": OUT}, "jumprelu_transcoder"),
    "jumprelu skip transcoder": (JumpReLU, {"d_out": OUT, "skip": True}, "jumprelu_skip_transcoder"),
    "batchtopk skip transcoder": (
        lambda: BatchTopK(K, threshold=0.3),
        {"d_out": OUT, "skip": True},
        "jumprelu_skip_transcoder",
    ),
}
INFERENCE = ["standard", "gated", "topk", "abstopk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder"]
INFERENCE.append("jumprelu_skip_transcoder")
TRAINING = ["standard", "gated", "topk", "abstopk", "jumprelu", "batchtopk", "matryoshka_batchtopk"]


def scrambled(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn_like(p) * 0.4)
            if "thre" in name or "theta" in name:
                p.abs_()
        module.W_dec *= torch.rand(F, 1).to(module.W_dec) + 0.5
    return module.eval()


def make(name, **more):
    activation, options, _ = OURS[name]
    return scrambled(SAE(D, F, activation(), **options, **more))


def near(a, b, tolerance=1e-6):
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.abs().max()) <= tolerance


@torch.no_grad()
def same_function(ours, theirs):
    x = X.to(ours.W_enc.dtype)
    acts, by_norm = theirs.encode(x), getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False)
    assert (acts != 0).any()
    near(ours.encode(x), acts / ours.W_dec.norm(dim=1) if by_norm else acts)  # SAELens hands its rescaled scores out
    near(ours(x), theirs(x))


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_what_we_write_saelens_loads_and_we_load_again(tmp_path, name, dtype):
    sae = make(name, dtype=dtype)
    fastsae.formats.save(sae, tmp_path, metadata={"hook_name": "blocks.0.hook_resid_post", "context_size": 16})
    theirs = TheirSAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == OURS[name][2] and theirs.W_enc.dtype == dtype
    assert theirs.cfg.metadata.hook_name == "blocks.0.hook_resid_post" and theirs.cfg.metadata.context_size == 16
    for tensor in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(theirs, tensor), getattr(sae, tensor)) and getattr(theirs, tensor).is_contiguous()
    if dtype != torch.bfloat16:  # there the two round after different operations
        same_function(sae, theirs)

    again = fastsae.formats.load(tmp_path)
    same_bits(again.state_dict(), sae.state_dict())
    assert repr(again) == repr(sae) and vars(again)["metadata"]["context_size"] == 16
    for flag in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize", "transcodes"):
        assert getattr(again, flag) == getattr(sae, flag)
    assert torch.equal(again(X.to(dtype)), sae(X.to(dtype)))


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", INFERENCE)
def test_inference_saes_of_saelens(tmp_path, architecture, normalize):
    cls, config = get_sae_class(architecture)
    options = {"d_out": OUT, "apply_b_dec_to_input": False} if "transcoder" in architecture else {}
    if "topk" in architecture:
        options |= {"k": K, "rescale_acts_by_decoder_norm": True}
    theirs = scrambled(cls(config(d_in=D, d_sae=F, normalize_activations=normalize, **options)))
    theirs.cfg.metadata.hook_name = "blocks.1.hook_mlp_out"
    theirs.save_model(tmp_path / "theirs")
    if "transcoder" in architecture and normalize != "none":
        with pytest.raises(FormatError, match="normalize"):
            fastsae.formats.load(tmp_path / "theirs")
        return
    ours = fastsae.formats.load(tmp_path / "theirs")
    same_function(ours, theirs)
    fastsae.formats.save(ours, tmp_path / "ours")
    same_bits(load_file(tmp_path / "ours/sae_weights.safetensors"), load_file(tmp_path / "theirs/sae_weights.safetensors"))
    before, after = (json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("theirs", "ours"))
    assert {**after, "metadata": None} == {**before, "metadata": None}
    assert after["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"


def training_sae(architecture, **options):
    cls, config = get_sae_training_class(architecture)
    if "topk" in architecture:
        options["k"] = K
    if "matryoshka" in architecture:
        options["matryoshka_widths"] = [5, 10]
    sae = scrambled(cls(config(d_in=D, d_sae=F, **options)))
    if "batchtopk" in architecture:
        sae.topk_threshold.fill_(0.3)
    return sae


@pytest.mark.parametrize("architecture", TRAINING)
def test_training_checkpoints_of_saelens(tmp_path, architecture):
    """They are what SAELens itself makes of them for inference, and go back as that."""
    theirs = training_sae(architecture)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    ours = fastsae.formats.load(tmp_path / "training")
    with torch.no_grad():
        near(ours(X), TheirSAE.load_from_disk(tmp_path / "inference")(X))
        near(ours(X), fastsae.formats.load(tmp_path / "inference")(X))
    fastsae.formats.save(ours, tmp_path / "ours")
    mine, before = (load_file(tmp_path / who / "sae_weights.safetensors") for who in ("ours", "training"))
    for name in mine.keys() & before.keys():
        assert torch.equal(mine[name], before[name]), name
    same_bits(fastsae.formats.load(tmp_path / "ours").state_dict(), ours.state_dict())
    assert ("batchtopk" in architecture) == isinstance(ours.activation, BatchTopK)


def test_a_training_checkpoint_that_saw_scaled_data_is_folded_as_saelens_folds_it(tmp_path):
    theirs = training_sae("batchtopk", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.7, "has_whitening": False}))
    ours = fastsae.formats.load(tmp_path)
    theirs.fold_activation_norm_scaling_factor(1.7)
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.get_buffer("activation.threshold") == theirs.topk_threshold

    (tmp_path / "activation_scaler.json").unlink()
    with pytest.warns(UserWarning, match="data scaled by"):
        fastsae.formats.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["topk by norm", "batchtopk by norm", "batchtopk", "jumprelu", "gated", "jumprelu skip transcoder"]
)
def test_input_scale_is_folded_into_the_written_copy(tmp_path, name):
    sae, s = make(name, dtype=torch.float64), 0.37
    untouched = {k: t.clone() for k, t in sae.state_dict().items()}
    fastsae.formats.save(sae, tmp_path, input_scale=s)
    x = X.double()
    with torch.no_grad():
        truth = sae(x * s) / s
        near(TheirSAE.load_from_disk(tmp_path)(x), truth, 1e-12)
        near(fastsae.formats.load(tmp_path)(x), truth, 1e-12)
    same_bits(sae.state_dict(), untouched)


def test_configs_of_saelens_5(tmp_path):
    theirs = scrambled(TheirSAE.from_dict({"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "device": "cpu"}))
    theirs.save_model(tmp_path)
    old = {
        "d_in": D,
        "d_sae": F,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "hook_point": "blocks.3.attn.hook_z",
        "model_name": "some-model",
        "dtype": "torch.float32",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    theirs, ours = TheirSAE.load_from_disk(tmp_path), fastsae.formats.load(tmp_path)
    assert theirs.hook_z_reshaping_mode
    theirs.turn_off_forward_pass_hook_z_reshaping()
    same_function(ours, theirs)
    assert vars(ours)["metadata"] == {
        "hook_name": "blocks.3.attn.hook_z",
        "model_name": "some-model",
        "reshape_activations": "hook_z",
    }


def test_hook_z_goes_through(tmp_path):
    sae = make("standard")
    fastsae.formats.save(sae, tmp_path, metadata={"hook_name": "blocks.0.attn.hook_z", "reshape_activations": "hook_z"})
    theirs = TheirSAE.load_from_disk(tmp_path)
    with torch.no_grad():
        near(theirs(X.view(-1, 2, D // 2)).flatten(1), sae(X))
    fastsae.formats.save(fastsae.formats.load(tmp_path), tmp_path / "again")
    assert TheirSAE.load_from_disk(tmp_path / "again").cfg.reshape_activations == "hook_z"


def test_saelens_may_fold_norms_and_write_over_what_we_wrote(tmp_path):
    sae = make("batchtopk by norm")
    fastsae.formats.save(sae, tmp_path)
    theirs = TheirSAE.load_from_disk(tmp_path)
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path)
    with torch.no_grad():
        near(fastsae.formats.load(tmp_path)(X), sae(X))


def test_training_saelens_loads_the_weights_again(tmp_path):
    theirs = training_sae("topk")
    theirs.save_model(tmp_path / "theirs")
    fastsae.formats.save(fastsae.formats.load(tmp_path / "theirs"), tmp_path / "ours")
    again = TrainingSAE.load_from_disk(tmp_path / "ours")
    same_bits(again.state_dict(), theirs.state_dict())


def test_saelens_transformer_runs_what_we_write(tmp_path):
    model = HookedSAETransformer(HookedTransformerConfig(n_layers=1, d_model=D, n_ctx=6, d_head=4, d_vocab=11, act_fn="relu"))
    sae = make("batchtopk by norm")
    fastsae.formats.save(sae, tmp_path, metadata={"hook_name": "blocks.0.hook_resid_post"})
    tokens = torch.randint(11, (2, 6))
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=[TheirSAE.load_from_disk(tmp_path)])
        _, clean = model.run_with_cache(tokens)
        near(cache["blocks.0.hook_resid_post.hook_sae_acts_post"], sae.encode(clean["blocks.0.hook_resid_post"]))
