"""What is lost with a reconstruction in the place of activations, against the same thing done by hand in transformers."""

import pytest
import tiny_lm
import torch
from tiny_lm import TEXTS
from torch.nn.functional import cross_entropy

from fastsae import SAE, TopK
from fastsae.data.models import LanguageModel
from fastsae.data.tokens import Tokens
from fastsae.splice import evaluate_splice

BOS = 0
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tiny_lm.save(tmp_path_factory.mktemp("lm"))
    return {name: LanguageModel.load(folder, name, device="cpu") for name in ("huggingface", "transformer_lens")}


@pytest.fixture(params=["huggingface", "transformer_lens"])
def model(models, request):
    return models[request.param]


@pytest.fixture(scope="session")
def tokens(models):
    return list(Tokens(TEXTS, models["huggingface"].tokenizer, 16, 40, repeat=False))


def half(x):
    """Not only shorter: the layer norms of the model would not see that."""
    return 0.5 * x.flip(-1)


@torch.no_grad()
def by_hand(model, tokens, layer, change, excluded):
    """Loss and KL of a GPT-2 whose residual stream after a block is changed, computed in fp64."""
    clean = model(tokens).logits.double()
    handle = model.transformer.h[layer].register_forward_hook(lambda module, args, output: change(output))
    logits = model(tokens).logits.double()
    handle.remove()
    keep = ~torch.isin(tokens, torch.tensor(excluded))
    loss = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")[keep[:, :-1]].mean()
    p, q = clean.log_softmax(-1), logits.log_softmax(-1)
    return float(loss), float((p.exp() * (p - q)).sum(-1)[keep].mean())


@pytest.mark.parametrize("excluded", [[], [BOS]])
def test_losses_and_divergences_are_those_computed_by_hand(model, models, tokens, excluded):
    got = evaluate_splice(model, half, tokens, HOOK, exclude_tokens=excluded)
    inner, all_tokens = models["huggingface"].model, torch.cat(tokens)
    special = torch.isin(all_tokens, torch.tensor(excluded))[..., None]
    with torch.no_grad():
        x = inner(all_tokens, output_hidden_states=True).hidden_states[2]
    mean = x[~special[..., 0]].mean(0)
    changes = {
        "with_sae": lambda x: torch.where(special, x, half(x)),
        "with_ablation": torch.zeros_like,
        "with_mean_ablation": lambda x: mean.expand_as(x),
    }
    for name, change in changes.items():
        loss, divergence = by_hand(inner, all_tokens, 1, change, excluded)
        assert got[f"ce_loss_{name}"] == pytest.approx(loss, rel=1e-5)
        assert got[f"kl_div_{name}"] == pytest.approx(divergence, rel=1e-5)
    clean, _ = by_hand(inner, all_tokens, 1, lambda x: x, excluded)
    assert got["ce_loss_without_sae"] == pytest.approx(clean, rel=1e-5)
    for metric, best in (("ce_loss", clean), ("kl_div", 0.0)):
        for end in ("", "_mean_ablation"):
            worst = got[f"{metric}_with{end or '_ablation'}"]
            score = (worst - got[f"{metric}_with_sae"]) / (worst - best)
            assert got[f"{metric}_score{end}"] == pytest.approx(score, rel=1e-4)
    assert len(got) == 11


def test_a_perfect_sae_scores_one_and_a_zero_one_scores_zero(model, tokens):
    perfect = evaluate_splice(model, lambda x: x, tokens, HOOK)
    assert perfect["ce_loss_with_sae"] == perfect["ce_loss_without_sae"] and perfect["kl_div_with_sae"] == 0
    assert perfect["ce_loss_score"] == perfect["kl_div_score"] == perfect["ce_loss_score_mean_ablation"] == 1
    zero = evaluate_splice(model, torch.zeros_like, tokens, HOOK)
    assert zero["ce_loss_score"] == zero["kl_div_score"] == 0


def test_batches_weigh_by_their_tokens(model, tokens):
    whole = evaluate_splice(model, half, tokens, HOOK)
    parts = evaluate_splice(model, half, [t for batch in tokens for t in batch.split([5, len(batch) - 5])], HOOK)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_an_sae_sees_its_own_dtype_and_the_model_gets_its_own_back(model, tokens):
    sae = SAE(32, 64, TopK(8), dtype=torch.float64)
    got = evaluate_splice(model, sae, tokens[:1], HOOK)
    want = evaluate_splice(model, sae.float(), tokens[:1], HOOK)
    assert got == pytest.approx(want, rel=1e-4)
    assert got["ce_loss_without_sae"] != got["ce_loss_with_sae"]


def test_heads_are_laid_side_by_side_for_the_sae(models, tokens):
    model, shapes = models["transformer_lens"], []

    def sae(x):
        shapes.append(tuple(x.shape))
        return x

    got = evaluate_splice(model, sae, tokens[:1], "blocks.1.attn.hook_z")
    assert shapes == [(40, 16, 32)] and got["kl_div_with_sae"] == 0 and got["kl_div_with_mean_ablation"] > 0


def test_a_transcoder_takes_the_place_of_what_it_computes(models, tokens):
    model = models["huggingface"]
    mlp = model.model.transformer.h[1].mlp
    exact = {"hook": "transformer.h.1.mlp.input", "target_hook": "transformer.h.1.mlp"}
    got = evaluate_splice(model, lambda x: mlp.c_proj(mlp.act(mlp.c_fc(x))), tokens[:1], **exact)
    assert got["kl_div_with_sae"] == pytest.approx(0, abs=1e-9) and got["kl_div_with_ablation"] > 1e-3
    zeroed = evaluate_splice(model, torch.zeros_like, tokens[:1], "transformer.h.1.mlp")
    assert zeroed["ce_loss_with_ablation"] == got["ce_loss_with_ablation"]


def test_nothing_to_evaluate_is_refused(model):
    for tokens in ([], [torch.full((2, 16), BOS)]):
        with pytest.raises(ValueError, match="hold no token to evaluate: pass tokens, not all of them excluded"):
            evaluate_splice(model, half, tokens, HOOK, exclude_tokens=[BOS])
