"""Losses with an SAE spliced in are those of SAELens' evals, on the same model, SAE and tokens."""

import copy

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.evals import EvalConfig, get_downstream_reconstruction_metrics, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from tiny_lm import TEXTS

from fastsae.data.models import LanguageModel
from fastsae.data.tokens import Tokens, special_token_ids
from fastsae.splice import evaluate_splice

HOOKS = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]


def sae_for(hook, dtype="float32"):
    torch.manual_seed(1)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=96, dtype=dtype))
    sae.cfg.metadata.hook_name = hook
    with torch.no_grad():
        sae.b_enc.fill_(-0.05)
        sae.W_dec *= 0.5
    return sae


class Store:
    """What their evals ask of an activation store: batches of tokens."""

    context_size = 16

    def __init__(self, batches):
        self.batches, self.next = batches, 0
        self.store_batch_size_prompts = len(batches[0])

    def get_batch_tokens(self, size):
        self.next += 1
        return self.batches[self.next - 1]

    def reset_input_dataset(self):
        self.next = 0


@pytest.fixture(scope="module")
def batches(lens):
    return list(Tokens(TEXTS, lens.tokenizer, 16, 10, repeat=False))[:4]


def same(ours, theirs, rel):
    assert len(theirs) == 7
    for name, number in theirs.items():
        assert ours[name] == pytest.approx(number, rel=rel), name


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_metrics_in_fp64_are_those_of_their_downstream_reconstruction(lens, batches, hook, excluding):
    """In fp32 a score may differ more: it divides by the difference of two losses, which a random model has close together."""
    lens = copy.deepcopy(lens).to(torch.float64)
    sae, excluded = sae_for(hook, "float64"), special_token_ids(lens.tokenizer) if excluding else []
    theirs = get_downstream_reconstruction_metrics(
        sae, lens, Store(batches), ActivationScaler(), True, True, len(batches), len(batches[0]), ignore_tokens=excluded
    )
    same(evaluate_splice(LanguageModel.wrap(lens), sae, batches, hook, exclude_tokens=excluded), theirs, 1e-9)


def test_metrics_in_fp32_are_those_of_their_run_evals(lens, batches):
    sae: SAE = sae_for(HOOKS[0])
    config = EvalConfig(n_eval_reconstruction_batches=len(batches), compute_kl=True, compute_ce_loss=True)
    found, _ = run_evals(sae, Store(batches), lens, ActivationScaler(), config)
    theirs = found["model_behavior_preservation"] | found["model_performance_preservation"]
    excluded = special_token_ids(lens.tokenizer)
    same(evaluate_splice(LanguageModel.wrap(lens), sae, batches, HOOKS[0], exclude_tokens=excluded), theirs, 1e-5)


def test_metrics_of_a_scaled_sae_are_theirs(lens, batches):
    sae, scale = sae_for(HOOKS[0]), 1.7
    theirs = get_downstream_reconstruction_metrics(
        sae, lens, Store(batches), ActivationScaler(scale), True, True, len(batches), len(batches[0])
    )
    same(evaluate_splice(LanguageModel.wrap(lens), lambda x: sae(x * scale) / scale, batches, HOOKS[0]), theirs, 1e-5)
