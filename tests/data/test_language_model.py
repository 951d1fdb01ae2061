"""Activations of a live language model: which rows come, in which order, and the same after resuming."""

import pytest
import tiny_lm
import torch
from tiny_lm import TEXTS

from fastsae.data.language_model import Activations
from fastsae.data.models import LanguageModel
from fastsae.data.source import Source
from fastsae.data.tokens import Tokens, special_token_ids

BOS = 0
HOOK, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "transformer.h.1.mlp.input", "transformer.h.1.mlp"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def model(folder):
    return LanguageModel.load(folder, "huggingface", device="cpu")


@pytest.fixture
def tokens(model):
    return lambda **kwargs: Tokens(TEXTS, model.tokenizer, 16, 4, **kwargs)


def test_each_token_is_a_row_in_order(model, tokens):
    source = Activations(model, tokens(), HOOK)
    assert isinstance(source, Source)
    reading = tokens()
    for _ in range(3):
        assert next(source).equal(model.run(next(reading), [HOOK])[HOOK].view(64, 32))


def test_several_hooks_come_by_name_and_are_the_same_as_one_by_one(model, tokens):
    hooks = [HOOK, MLP_OUT]
    together, alone = Activations(model, tokens(), hooks), [Activations(model, tokens(), hook) for hook in hooks]
    for _ in range(3):
        batch = next(together)
        assert list(batch) == hooks
        assert all(batch[hook].equal(next(one)) for hook, one in zip(hooks, alone, strict=True))


def test_a_target_comes_from_the_same_rows(model, tokens):
    x, target = next(Activations(model, tokens(), MLP_IN, target_hook=MLP_OUT, exclude_tokens=[BOS]))
    assert x.shape == target.shape and len(x) < 64
    torch.testing.assert_close(model.model.transformer.h[1].mlp(x), target)


def test_heads_lie_side_by_side(folder, tokens):
    lens = LanguageModel.load(folder, "transformer_lens", device="cpu")
    z = next(Activations(lens, tokens(), "blocks.1.attn.hook_z"))
    x = lens.run(next(tokens()), ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
    assert x.shape == (4, 16, 4, 8) and z.equal(x.view(64, 32))


def test_bfloat16_comes_out_as_it_is(folder, tokens):
    model = LanguageModel.load(folder, "huggingface", device="cpu", dtype=torch.bfloat16)
    x = next(Activations(model, tokens(), HOOK))
    assert x.dtype == torch.bfloat16 and x.equal(model.run(next(tokens()), [HOOK])[HOOK].view(64, 32))


def test_special_tokens_are_left_out(model, tokens):
    batch = next(tokens())
    excluded = special_token_ids(model.tokenizer)
    x = next(Activations(model, tokens(), HOOK, exclude_tokens=excluded))
    want = model.run(batch, [HOOK])[HOOK][(batch != BOS)]
    assert BOS in batch and x.equal(want)


def test_rows_over_so_many_running_medians_are_left_out(model, tokens):
    source, reading, median = Activations(model, tokens(), HOOK, exclude_tokens=[BOS], max_norm_multiple=1.1), tokens(), 0.0
    dropped = 0
    for passes in range(1, 5):
        batch = next(reading)
        rows = model.run(batch, [HOOK])[HOOK][batch != BOS]
        norms = rows.norm(dim=1)
        median += (norms.median() - median) / passes
        assert next(source).equal(rows[norms <= 1.1 * median])
        dropped += int((norms > 1.1 * median).sum())
    assert dropped > 20


def test_a_row_is_left_out_everywhere_if_its_norm_is_high_anywhere(model, tokens):
    hooks = [HOOK, MLP_OUT]
    both = next(Activations(model, tokens(), hooks, max_norm_multiple=1.1))
    found = {hook: x.flatten(0, 1) for hook, x in model.run(next(tokens()), hooks).items()}
    keep = [x.norm(dim=1) <= 1.1 * x.norm(dim=1).median() for x in found.values()]
    assert 0 < (keep[0] & keep[1]).sum() < min(keep[0].sum(), keep[1].sum())
    assert all(both[hook].equal(found[hook][keep[0] & keep[1]]) for hook in hooks)


def test_a_batch_of_nothing_but_excluded_tokens_has_no_rows(model):
    tokens = Tokens([[BOS] * 16], None, 16, 2)
    with pytest.warns(UserWarning, match="starts again"):
        x = next(Activations(model, tokens, HOOK, exclude_tokens=[BOS], max_norm_multiple=2.0))
    assert x.shape == (0, 32)


@pytest.mark.filterwarnings("ignore:the data set has ended")
def test_a_resumed_source_yields_identical_rows(model, tokens):
    def make():
        return Activations(model, tokens(seed=1), [HOOK, MLP_OUT], exclude_tokens=[BOS], max_norm_multiple=1.3)

    whole = make()
    batches = [next(whole) for _ in range(30)]
    for at in (0, 1, 7, 19):
        saved = make()
        for _ in range(at):
            next(saved)
        state = saved.state_dict()
        next(saved)
        resumed = make()
        resumed.load_state_dict(state)
        for want in batches[at:]:
            got = next(resumed)
            assert all(got[hook].equal(want[hook]) for hook in want)


def test_it_ends_with_its_tokens(model, tokens):
    x = torch.cat(list(Activations(model, tokens(repeat=False), HOOK)))
    assert len(x) == sum(batch.numel() for batch in tokens(repeat=False))


def test_impossible_arguments_are_refused(model, tokens):
    with pytest.raises(TypeError, match=r"hooks=\['a'\] with target_hook='b': pass one hook, as a str"):
        Activations(model, tokens(), ["a"], target_hook="b")
    with pytest.raises(ValueError, match="max_norm_multiple=1.0: pass a number > 1, or None"):
        Activations(model, tokens(), HOOK, max_norm_multiple=1.0)
    with pytest.raises(ValueError, match=r"gives \[4, 4, 16, 16\] for tokens \[4, 16\]: pass one with a row for each"):
        lens = LanguageModel.load(model.model.name_or_path, "transformer_lens", device="cpu")
        next(Activations(lens, tokens(), "blocks.0.attn.hook_pattern"))
