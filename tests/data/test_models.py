"""Language models behind one interface: the activations are the model's own, and a forward pass ends where it may."""

import sys

import pytest
import tiny_lm
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastsae.data.models import HuggingFace, LanguageModel, TransformerLens

BACKENDS = ("huggingface", "transformer_lens")
TOKENS = torch.arange(3, 75).view(4, 18)
POST = [f"blocks.{i}.hook_resid_post" for i in range(3)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def models(folder):
    return {backend: LanguageModel.load(folder, backend, device="cpu") for backend in BACKENDS}


@pytest.fixture(params=BACKENDS)
def model(models, request):
    return models[request.param]


@pytest.fixture(scope="session")
def reference(folder):
    """The hidden states and logits of transformers, with the attention that TransformerLens uses."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS, output_hidden_states=True)


def test_activations_are_the_models_hidden_states(model, reference):
    found = model.run(TOKENS, ["blocks.0.hook_resid_pre", *POST])
    assert found["blocks.0.hook_resid_pre"].equal(reference.hidden_states[0])
    for i in range(2):  # the last hidden state of transformers comes after the final norm
        torch.testing.assert_close(found[POST[i]], reference.hidden_states[i + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.logits(TOKENS), reference.logits, rtol=1e-5, atol=1e-4)


def test_activations_are_those_of_run_with_cache(models):
    model = models["transformer_lens"]
    hooks = [
        "hook_embed",
        "blocks.1.attn.hook_z",
        "blocks.1.mlp.hook_post",
        "blocks.2.hook_mlp_out",
        "ln_final.hook_normalized",
    ]
    with torch.no_grad():
        _, cache = model.model.run_with_cache(TOKENS)
    found = model.run(TOKENS, hooks)
    assert list(found) == hooks
    for hook in hooks:
        assert found[hook].equal(cache[hook]), hook
    assert found["blocks.1.attn.hook_z"].shape == (4, 18, 4, 8)


def test_both_packages_agree(models):
    first, second = (model.run(TOKENS, [*POST, "blocks.2.hook_resid_pre"]) for model in models.values())
    for hook in first:
        torch.testing.assert_close(first[hook], second[hook], rtol=1e-5, atol=1e-5)
    theirs = models["transformer_lens"].run(TOKENS, ["blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in"])
    ours = models["huggingface"].run(TOKENS, ["transformer.h.1.mlp", "transformer.h.1.mlp.input"])
    for a, b in zip(theirs.values(), ours.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_several_hooks_are_the_same_as_one_by_one(model):
    together = model.run(TOKENS, POST)
    for hook in POST:
        assert together[hook].equal(model.run(TOKENS, [hook])[hook])


def test_bfloat16_stays_bfloat16_bit_for_bit(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    found = LanguageModel.load(folder, "huggingface", device="cpu", dtype=torch.bfloat16).run(TOKENS, POST)
    for i in range(2):
        assert found[POST[i]].dtype == torch.bfloat16 and found[POST[i]].equal(states[i + 1])
    lens = LanguageModel.load(folder, "transformer_lens", device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        _, cache = lens.model.run_with_cache(TOKENS)
    assert lens.run(TOKENS, POST[:1])[POST[0]].equal(cache[POST[0]]) and cache[POST[0]].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hooks", "calls"), [([POST[0]], 1), ([POST[2], POST[0]], 3), (["blocks.1.hook_resid_pre"], 1), (POST[:2], 2)]
)
def test_nothing_is_computed_after_the_last_wanted_hook(model, hooks, calls):
    inner = model.model if isinstance(model, HuggingFace) else model.model.original_model
    count = []
    handles = [m.register_forward_hook(lambda *_: count.append(0)) for m in (b.mlp for b in inner.transformer.h)]
    handles.append(inner.lm_head.register_forward_hook(lambda *_: count.append(10)))
    try:
        early = model.run(TOKENS, hooks)
        assert count == [0] * calls
        count.clear()
        late = model.run(TOKENS, hooks, stop_early=False)
        assert count == [0, 0, 0, 10]
    finally:
        for handle in handles:
            handle.remove()
    assert all(early[hook].equal(late[hook]) for hook in hooks)


def test_hooks_are_gone_afterwards(model):
    before = model.logits(TOKENS)
    model.run(TOKENS, POST[:1])
    model.logits(TOKENS, {POST[1]: torch.zeros_like})
    with pytest.raises(RuntimeError, match="on purpose"):
        model.logits(TOKENS, {POST[1]: fail})
    assert model.logits(TOKENS).equal(before)


def fail(x):
    raise RuntimeError("on purpose")


def test_what_a_hook_returns_is_what_the_model_goes_on_with(model):
    seen = model.run(TOKENS, POST)
    after = model.run(TOKENS, [POST[2]])[POST[2]]
    with model.hooked({POST[1]: lambda x: x + 1.0}):
        changed = model.run(TOKENS, POST)
    assert changed[POST[0]].equal(seen[POST[0]]) and not changed[POST[2]].equal(after)
    same = model.logits(TOKENS, {"blocks.2.hook_resid_pre": lambda x: seen[POST[1]] + 1.0})
    torch.testing.assert_close(model.logits(TOKENS, {POST[1]: lambda x: x + 1.0}), same)


def test_gradients_reach_through_logits(model):
    x = torch.zeros(32, requires_grad=True)
    model.logits(TOKENS, {POST[1]: lambda y: y + x}).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_an_activation_never_asks_for_a_gradient(model):
    assert not model.run(TOKENS, POST[:1])[POST[0]].requires_grad


def test_the_width_of_a_hook(models):
    assert models["huggingface"].width("transformer.h.0.mlp.c_fc") == 128
    assert models["transformer_lens"].width("blocks.0.attn.hook_z") == 32


def test_blocks_of_other_architectures_are_found():
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    llama = LlamaForCausalLM(config).eval()
    model = LanguageModel.wrap(llama)
    with torch.no_grad():
        states = llama(TOKENS, output_hidden_states=True).hidden_states
    found = model.run(
        TOKENS, ["blocks.0.hook_resid_pre", POST[0], "model.layers.1.self_attn.input", "model.layers.1.self_attn"]
    )
    assert found["blocks.0.hook_resid_pre"].equal(states[0]) and found[POST[0]].equal(states[1])
    norm = llama.model.layers[1].input_layernorm(states[1])
    assert found["model.layers.1.self_attn.input"].equal(norm)  # which llama passes by name
    attention = found["model.layers.1.self_attn"]  # a tuple's first
    assert attention.shape == norm.shape
    zeroed = model.logits(TOKENS, {"model.layers.1.self_attn": torch.zeros_like})
    assert not zeroed.equal(model.logits(TOKENS))
    by_input = model.logits(TOKENS, {"model.layers.1.self_attn.input": torch.zeros_like})
    torch.testing.assert_close(by_input, zeroed)  # no biases


def test_a_list_inside_a_block_is_not_taken_for_the_blocks(models):
    model = GPT2LMHeadModel(models["huggingface"].model.config).eval()
    model.transformer.h[1].experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    wrapped = LanguageModel.wrap(model)
    assert wrapped.run(TOKENS, [POST[1]])[POST[1]].equal(wrapped.run(TOKENS, ["transformer.h.1"])["transformer.h.1"])


def test_a_loaded_model_is_wrapped(models):
    bridge, huggingface = models["transformer_lens"].model, models["huggingface"].model
    wrapped = LanguageModel.wrap(bridge)
    assert isinstance(wrapped, TransformerLens) and wrapped.tokenizer is bridge.tokenizer
    assert isinstance(LanguageModel.wrap(huggingface), HuggingFace)
    with pytest.raises(TypeError, match="model is a Linear: pass a model of TransformerLens or of Hugging Face transformers"):
        LanguageModel.wrap(torch.nn.Linear(1, 1))


def test_auto_takes_transformer_lens_if_it_is_installed(folder, monkeypatch):
    assert isinstance(LanguageModel.load(folder, device="cpu"), TransformerLens)
    monkeypatch.setattr("fastsae.data.models.find_spec", lambda name: None)
    assert isinstance(LanguageModel.load(folder, device="cpu"), HuggingFace)


# Errors


def test_unknown_hooks_are_refused_with_the_nearest_names(models):
    with pytest.raises(ValueError, match=r"no hook 'blocks.1.hook_resid_pst': pass one .*'blocks.1.hook_resid_post'"):
        models["transformer_lens"].run(TOKENS, ["blocks.1.hook_resid_pst"])
    with pytest.raises(ValueError, match=r"no hook 'transformer.h.1.mpl': pass one .*'transformer.h.1.mlp'"):
        models["huggingface"].run(TOKENS, ["transformer.h.1.mpl"])
    with pytest.raises(ValueError, match=r"hook 'blocks.3.hook_resid_post': this model has 3 blocks, from 0"):
        models["huggingface"].run(TOKENS, ["blocks.3.hook_resid_post"])


def test_a_hook_that_does_not_fire_or_gives_no_tensor_is_refused(models):
    model = models["huggingface"]
    with pytest.raises(ValueError, match=r"\['transformer.h'\] did not fire"):
        model.run(TOKENS, ["transformer.h"])
    with pytest.raises(ValueError, match="hook 'transformer' gives a BaseModelOutput.*: pass a module that gives a tensor"):
        model.run(TOKENS, ["transformer"])


def test_ambiguous_blocks_are_refused(models):
    model = GPT2LMHeadModel(models["huggingface"].model.config)
    model.other = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(
        ValueError, match=r"the 3 blocks could be any of \['other', 'transformer.h'\]: pass a module's dotted name"
    ):
        LanguageModel.wrap(model).run(TOKENS, POST)


def test_an_unknown_backend_is_refused(folder):
    with pytest.raises(ValueError, match="backend='nnsight': pass 'auto', 'transformer_lens' or 'huggingface'"):
        LanguageModel.load(folder, "nnsight")


@pytest.mark.parametrize(("backend", "package"), [("huggingface", "transformers"), ("transformer_lens", "transformer_lens")])
def test_a_missing_package_is_named_with_its_extra(backend, package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^{package} is not installed: pip install 'fastsae\[lm\]'$"):
        LanguageModel.load(folder, backend)
