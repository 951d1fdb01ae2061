import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import KINDS, Numbered, assert_equal, assert_resumes, numbers

from fastsae.data import Plain, Prefetch, Shuffle, Superposition

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@st.composite
def sizes(draw):
    """(rows of the source, rows of the buffer, rows of a batch)"""
    buffer = draw(st.integers(1, 40))
    return draw(st.integers(0, 120)), buffer, draw(st.integers(1, buffer))


@given(sizes(), st.sampled_from(KINDS), st.sampled_from(DTYPES), st.integers(0, 99))
def test_every_row_comes_out_once(sizes, kind, dtype, seed):
    total, rows, batch_size = sizes
    found = [numbers(batch) for batch in Shuffle(Numbered(total, kind, dtype, seed), rows, batch_size, seed)]
    assert sorted(sum(found, [])) == list(range(total))
    assert [len(f) for f in found[:-1]] == [batch_size] * (len(found) - 1)


@given(sizes(), st.integers(0, 99))
def test_drop_last_leaves_out_only_the_short_batch(sizes, seed):
    total, rows, batch_size = sizes
    whole = [numbers(b) for b in Shuffle(Numbered(total), rows, batch_size, seed)]
    dropped = [numbers(b) for b in Shuffle(Numbered(total), rows, batch_size, seed, drop_last=True)]
    assert dropped == [f for f in whole if len(f) == batch_size]


@given(sizes(), st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 30))
def test_resumes_at_any_moment(sizes, kind, seed, at):
    total, rows, batch_size = sizes

    def source():
        return Numbered(total, kind, torch.bfloat16, seed)

    assert_resumes(lambda: Shuffle(source(), rows, batch_size, seed), at)
    assert_resumes(lambda: Shuffle(Prefetch(source()), rows, batch_size, seed), at)
    assert_resumes(lambda: Shuffle(Prefetch(Shuffle(source(), 7, 3, seed), 3), rows, batch_size, seed), at)


def test_resumes_over_an_endless_source():
    for at in (0, 1, 7):
        assert_resumes(lambda: Shuffle(Prefetch(Superposition(8, 16, batch_size=10)), 64, 16), at)
        assert_resumes(lambda: Shuffle(Plain([torch.randn(5, 3, generator=torch.Generator().manual_seed(1))]), 64, 16), at)


def test_a_seed_gives_an_order_and_another_seed_another():
    def order(seed):
        return [numbers(b) for b in Shuffle(Numbered(500), 100, 20, seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_every_slot_is_as_likely():
    rows = torch.arange(50)
    drawn = torch.cat([next(Shuffle(Plain([rows]), 50, 5, seed)) for seed in range(2000)]).bincount(minlength=50)
    assert (drawn - 200).abs().max() < 4.5 * 13.4  # standard deviations


def test_a_row_stays_as_long_as_the_buffer_is_large():
    """Rows of a full buffer leave at random: on average after rows / batch_size batches, half of them after ln 2 times that."""
    found = [numbers(b) for b in Shuffle(Numbered(60_000), 1000, 50)]
    stayed = np.array([i * 50 + 1000 - n for i, batch in enumerate(found[:1100]) for n in batch if n >= 1000])
    assert abs(stayed.mean() / 1000 - 1) < 0.05
    assert abs(np.median(stayed) / 1000 - np.log(2)) < 0.05


def test_the_buffer_is_the_only_large_memory_and_is_made_once():
    """While it runs, no allocation comes near the buffer's 16 MB: only batches and chunks are made."""
    shuffle = Shuffle(Superposition(256, 16, batch_size=64), 16384, 64)
    next(shuffle)
    where = shuffle.buffer["x"].data_ptr()
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(20):
            next(shuffle)
    largest = max(abs(e.nbytes()) for e in memory_events(profile))
    assert 64 * 256 * 4 <= largest <= 64 * 256 * 4 * 2
    assert shuffle.buffer["x"].data_ptr() == where


def memory_events(profile):
    return [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


def test_reading_may_be_interrupted_at_any_poll():
    """What poll raises passes through; whoever saves then, or just goes on, misses nothing."""
    polls = 0

    def poll():
        nonlocal polls
        polls += 1
        if polls % 3 == 0:
            raise InterruptedError

    shuffle, expected = Shuffle(Numbered(300), 50, 8, poll=poll), Shuffle(Numbered(300), 50, 8)
    for batch in expected:
        while True:
            try:
                assert_equal(next(shuffle), batch)
                break
            except InterruptedError:
                again = Shuffle(Numbered(300), 50, 8, poll=poll)
                again.load_state_dict(shuffle.state_dict())
                shuffle = again
    assert polls > 30


def test_what_the_source_raises_loses_nothing():
    class Flaky(Numbered):
        failed = False

        def __next__(self):
            self.failed = not self.failed
            if self.failed:
                raise OSError("network")
            return super().__next__()

    found, shuffle = [], Shuffle(Flaky(100), 20, 4)
    while len(found) < 100:
        try:
            found += numbers(next(shuffle))
        except OSError:
            pass
    assert sorted(found) == list(range(100))


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="pass 1 <= batch_size <= rows"):
        Shuffle(Numbered(9), 4, 5)
    rows = torch.zeros(2, 2)
    for other in (torch.zeros(2, 3), rows.double(), {"a": rows}, (rows, rows)):
        with pytest.raises(ValueError, match="yield the same always"):
            next(Shuffle(Plain([rows, other]), 4, 2))
    saved = Shuffle(Numbered(9), 4, 2).state_dict()
    with pytest.raises(ValueError, match="as the saved one was"):
        Shuffle(Numbered(9), 5, 2).load_state_dict(saved)


def test_the_source_is_closed_with_it():
    prefetch = Prefetch(Numbered(100))
    shuffle = Shuffle(prefetch, 10, 2)
    next(shuffle)
    shuffle.close()
    with pytest.raises(ValueError, match="closed"):
        next(prefetch)
    Shuffle(Numbered(9), 4, 2).close()
