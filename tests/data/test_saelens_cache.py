"""Folders written by `datasets` in the layout of SAELens; tests/hosts/test_saelens_cache.py has some that SAELens wrote."""

import datasets
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from hypothesis import given
from hypothesis import strategies as st
from sources import assert_equal, assert_resumes

from fastsae.data import SAELensCache, Shuffle

SEQUENCES, CONTEXT, D, HOOK = 23, 5, 4, "blocks.1.hook_resid_post"
datasets.disable_progress_bars()


@pytest.fixture(scope="module", params=["float32", "float16"])
def cache(request, tmp_path_factory):
    """(folder, activations [sequences, context, D], token ids)"""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(SEQUENCES, CONTEXT, D, generator=generator).to(getattr(torch, request.param))
    tokens = torch.randint(0, 9, (SEQUENCES, CONTEXT), generator=generator, dtype=torch.int32)
    return write(tmp_path_factory.mktemp("caches") / "cache", {HOOK: acts}, tokens), acts, tokens


def write(path, acts, tokens=None):
    kinds = {name: Array2D(shape=t.shape[1:], dtype=str(t.dtype).removeprefix("torch.")) for name, t in acts.items()}
    columns = dict(acts)
    if tokens is not None:
        kinds["token_ids"] = Sequence(Value("int32"), length=tokens.shape[1])
        columns["token_ids"] = tokens
    Dataset.from_dict(columns, features=Features(kinds)).save_to_disk(path, num_shards=3)
    return path


def test_in_order_it_is_what_was_cached_bit_for_bit(cache):
    path, acts, _ = cache
    read = list(SAELensCache(path, sequences=4, shuffle=False, epochs=1))
    assert [len(x) for x in read] == [4 * CONTEXT] * 5 + [3 * CONTEXT]
    assert_equal(torch.cat(read), acts.flatten(0, 1))


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
def test_ranks_read_every_row_once(cache, sequences, world_size, seed):
    path, acts, _ = cache
    read = [
        x
        for rank in range(world_size)
        for x in SAELensCache(path, sequences=sequences, seed=seed, rank=rank, world_size=world_size, epochs=1)
    ]
    assert sorted(torch.cat(read).tolist()) == sorted(acts.flatten(0, 1).tolist())


def test_it_is_shuffled_by_its_seed(cache):
    def order(seed):
        return torch.cat(list(SAELensCache(cache[0], sequences=2, seed=seed, epochs=1)))

    assert order(1).equal(order(1))
    assert not order(1).equal(order(2))


def test_positions_of_dropped_tokens_are_left_out(cache):
    path, acts, tokens = cache
    read = torch.cat(list(SAELensCache(path, drop_tokens=[0, 7], shuffle=False, epochs=1)))
    assert_equal(read, acts[(tokens != 0) & (tokens != 7)])
    nothing = SAELensCache(path, drop_tokens=range(9), sequences=4, shuffle=False, epochs=1)
    assert [x.shape for x in nothing] == [(0, D)] * 6


@pytest.mark.parametrize("at", [0, 1, 7, 8, 15, 16])
def test_resumes_at_any_moment(cache, at):
    def make():
        return SAELensCache(cache[0], sequences=3, drop_tokens=[3], seed=2, epochs=2)

    assert_resumes(make, at)
    assert_resumes(lambda: Shuffle(make(), 40, 8), at)


def test_one_of_several_hooks_is_chosen(tmp_path):
    acts = {"a": torch.randn(3, 2, 4), "b": torch.randn(3, 2, 6)}
    path = write(tmp_path / "cache", acts)
    assert_equal(next(SAELensCache(path, hook="b", shuffle=False)), acts["b"].flatten(0, 1))
    for hook in (None, "c"):
        with pytest.raises(ValueError, match=r"\['a', 'b'\]: pass one of them"):
            SAELensCache(path, hook=hook)
    with pytest.raises(ValueError, match="no column 'token_ids'"):
        SAELensCache(path, hook="a", drop_tokens=[1])


def test_other_data_is_refused(cache, tmp_path):
    other = write(tmp_path / "cache", {HOOK: torch.randn(SEQUENCES, CONTEXT, D)})
    with pytest.raises(ValueError, match="as the saved one was"):
        SAELensCache(other).load_state_dict(SAELensCache(cache[0]).state_dict())
    with pytest.raises(FileNotFoundError, match="no folder of cached activations"):
        SAELensCache(tmp_path)
    with pytest.raises(ValueError, match="sequences >= 1"):
        SAELensCache(cache[0], sequences=0)
