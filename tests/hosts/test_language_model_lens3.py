"""Models of TransformerLens 3: HookedTransformer, which 4 no longer has, and the bridge."""

import json

import pytest
import tiny_lm
import torch
import transformer_lens

from fastsae.data.models import LanguageModel, TransformerLens

TOKENS = torch.arange(3, 75).view(4, 18)
HOOKS = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    return LanguageModel.load(tiny_lm.save(tmp_path_factory.mktemp("lm")), "transformer_lens", device="cpu")


@pytest.fixture(params=["hooked_transformer", "bridge"])
def model(request, lens, bridge):
    return LanguageModel.wrap(lens) if request.param == "hooked_transformer" else bridge


def test_activations_are_those_of_run_with_cache(model):
    with torch.no_grad():
        logits, cache = model.model.run_with_cache(TOKENS)
    found = model.run(TOKENS, HOOKS)
    for hook in HOOKS:
        assert found[hook].equal(cache[hook]), hook
    torch.testing.assert_close(model.logits(TOKENS), logits, rtol=1e-5, atol=1e-5)


def test_both_are_the_same_model_to_1e_5(lens, bridge):
    ours, theirs = LanguageModel.wrap(lens).run(TOKENS, HOOKS), bridge.run(TOKENS, HOOKS)
    for hook in HOOKS:
        torch.testing.assert_close(ours[hook], theirs[hook], rtol=1e-5, atol=1e-5)


def test_nothing_is_computed_after_the_last_wanted_hook(model):
    fired = []
    watch = [(f"blocks.{i}.mlp.hook_post", lambda x, hook: fired.append(hook.name)) for i in range(3)]
    with model.model.hooks(fwd_hooks=watch):
        model.run(TOKENS, ["blocks.1.attn.hook_z", "blocks.0.hook_resid_post"])
    assert len(fired) == 1


def test_what_a_hook_returns_is_what_the_model_goes_on_with_and_then_it_is_gone(model):
    before = model.logits(TOKENS)
    with torch.no_grad():
        want = model.model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)])
    got = model.logits(TOKENS, {"blocks.1.hook_resid_post": lambda x: 0.5 * x})
    torch.testing.assert_close(got, want)
    assert not got.equal(before) and model.logits(TOKENS).equal(before)


def test_unknown_hooks_are_refused_with_the_nearest_names(model):
    with pytest.raises(ValueError, match=r"no hook 'blocks.1.hook_resid_pst': pass one .*'blocks.1.hook_resid_post'"):
        model.run(TOKENS, ["blocks.1.hook_resid_pst"])


def test_a_name_of_the_hub_is_loaded_as_hooked_transformer(tmp_path, monkeypatch):
    """The tiny model stands where a download of gpt2 would."""
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    config = json.loads((tiny_lm.save(snapshot) / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"n_ctx": config["n_positions"]}))
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("0")
    for constant in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE"):
        monkeypatch.setattr(constant, str(tmp_path), raising=False)
    model = LanguageModel.load("gpt2", device="cpu", dtype=torch.bfloat16)
    assert isinstance(model, TransformerLens) and isinstance(model.model, transformer_lens.HookedTransformer)
    found = model.run(TOKENS, HOOKS)
    assert all(x.dtype == torch.bfloat16 for x in found.values())
