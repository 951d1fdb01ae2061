"""Activations that SAELens' own runner cached, read back beside what its store reads and what the model computes."""

import pytest
import sae_lens.cache_activations_runner as runner
import tiny_lm
import torch
from datasets import Dataset
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from fastsae.data import SAELensCache

HOOK, CONTEXT, D, SEQUENCES, BATCH = "blocks.1.hook_resid_post", 16, 32, 24, 4


@pytest.fixture(scope="module", params=["float32", "float16"])
def cache(request, lens, tmp_path_factory):
    """(folder, dtype), of several shards"""
    folder = tmp_path_factory.mktemp("cache")
    one_batch = BATCH * CONTEXT * D * getattr(torch, request.param).itemsize
    config = CacheActivationsRunnerConfig(
        dataset_path="", model_name="tiny", model_batch_size=BATCH, hook_name=HOOK, d_in=D, context_size=CONTEXT,
        training_tokens=SEQUENCES * CONTEXT, new_cached_activations_path=str(folder), dtype=request.param, device="cpu",
        buffer_size_gb=2 * one_batch / 1e9, shuffle=False,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "load_model", lambda **_: lens)
        dataset = runner.CacheActivationsRunner(config, Dataset.from_dict({"text": tiny_lm.TEXTS})).run()
    assert len(dataset) == SEQUENCES and len(list(folder.glob("*.arrow"))) == 3
    return folder, request.param


def test_reads_what_their_store_reads(cache, lens):
    folder, dtype = cache
    store = ActivationsStore(
        lens, None, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=CONTEXT, d_in=D, n_batches_in_buffer=2,
        total_training_tokens=10, store_batch_size_prompts=BATCH, train_batch_size_tokens=8, prepend_bos=True,
        normalize_activations="none", device=torch.device("cpu"), dtype=dtype, cached_activations_path=str(folder),
    )  # fmt: skip
    ours = list(SAELensCache(folder, sequences=BATCH, shuffle=False, epochs=1))
    assert len(ours) == SEQUENCES // BATCH
    for x in ours:
        theirs, _ = store.get_raw_llm_batch()
        assert x.dtype == getattr(torch, dtype) and x.equal(theirs.to(x.dtype))


def test_rows_are_the_activations_of_their_tokens(cache, lens):
    folder, dtype = cache
    tokens = torch.tensor(Dataset.load_from_disk(folder)["token_ids"][:])
    _, activations = lens.run_with_cache(tokens, names_filter=HOOK)
    bos = lens.tokenizer.bos_token_id
    x = torch.cat(list(SAELensCache(folder, drop_tokens=[bos], shuffle=False, epochs=1)))
    expected = activations[HOOK][tokens != bos]
    assert 0 < (tokens == bos).sum() and x.shape == expected.shape
    assert torch.allclose(x.float(), expected, atol=1e-5 if dtype == "float32" else 2e-2)
