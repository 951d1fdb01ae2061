import gc
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import KINDS, Numbered, assert_equal, assert_resumes

from fastsae.data import NotResumable, Plain, Prefetch, Shuffle, Source, Superposition, as_source
from fastsae.data.source import batch_of, fields


class Observed(Numbered):
    """Says how far it was read, and waits or fails where it is told to."""

    fails_at = waits_at = None

    def __init__(self, rows=200):
        super().__init__(rows)
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __next__(self):
        if self.at == self.waits_at:
            self.arrived.set()
            self.go_on.wait()
        if self.at == self.fails_at:
            self.fails_at = None
            raise OSError("network")
        return super().__next__()


def stops_at(source, at):
    """The thread reads up to there, and no further."""
    deadline = time.monotonic() + 60
    while source.at < at and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.03)
    return source.at == at


def threads():
    return [t for t in threading.enumerate() if t.name == "fastsae-prefetch"]


@given(st.integers(0, 120), st.sampled_from(KINDS), st.integers(1, 5), st.integers(0, 99))
def test_yields_what_the_source_does(rows, kind, depth, seed):
    with Prefetch(Numbered(rows, kind, seed=seed), depth) as prefetch:
        for batch in Numbered(rows, kind, seed=seed):
            assert_equal(next(prefetch), batch)
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(prefetch)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(0, 25), st.integers(0, 99))
def test_resumes_at_any_moment(kind, depth, at, seed):
    assert_resumes(lambda: Prefetch(Numbered(80, kind, seed=seed), depth), at)
    assert_resumes(lambda: Prefetch(Prefetch(Superposition(4, 8, batch_size=3), depth)), at)


@pytest.mark.parametrize("at", [0, 1, 6])
def test_what_is_read_ahead_does_not_change_the_state(at):
    """Not even that of a Shuffle, whose state is its buffer itself."""
    assert_resumes(lambda: Prefetch(Shuffle(Numbered(400), 50, 8), 3), at)


@pytest.mark.parametrize("depth", [1, 3])
def test_reads_ahead_no_further_than_its_depth(depth):
    source = Observed()
    with Prefetch(source, depth) as prefetch:
        assert stops_at(source, 0)
        for i in range(1, 6):
            next(prefetch)
            assert stops_at(source, i + depth)


def test_the_state_is_that_of_what_was_consumed_not_read():
    source = Observed()
    with Prefetch(source, 4) as prefetch:
        assert prefetch.state_dict() == {"at": 0}
        for _ in range(3):
            next(prefetch)
        assert stops_at(source, 7)
        assert prefetch.state_dict() == {"at": 3}
    assert prefetch.state_dict() == {"at": 3}


def test_an_exception_comes_in_its_turn_and_reading_goes_on_after_it():
    source, expected = Observed(), Numbered(200)
    source.fails_at = 3
    with Prefetch(source, 5) as prefetch:
        for _ in range(3):
            assert_equal(next(prefetch), next(expected))
        with pytest.raises(OSError, match="network"):
            next(prefetch)
        assert prefetch.state_dict() == {"at": 3}
        for batch in expected:
            assert_equal(next(prefetch), batch)


def test_close_gives_up_what_waits_and_a_state_opens_it_again():
    before = threads()
    prefetch = Prefetch(Numbered(200), 4)
    for _ in range(3):
        next(prefetch)
    prefetch.close()
    prefetch.close()
    assert set(threads()) <= set(before)
    with pytest.raises(ValueError, match="load a state"):
        next(prefetch)
    prefetch.load_state_dict(prefetch.state_dict())
    expected = Numbered(200)
    for _ in range(3):
        next(expected)
    for batch in expected:
        assert_equal(next(prefetch), batch)


def test_a_dropped_prefetch_ends_its_thread():
    gc.collect()
    before = threads()
    prefetch = Prefetch(Superposition(4, 8))
    next(prefetch)
    (thread,) = set(threads()) - set(before)
    del prefetch
    thread.join(60)
    assert not thread.is_alive()


def test_close_waits_for_the_read_under_way():
    source = Observed()
    source.waits_at = 2
    prefetch = Prefetch(source, 4)
    next(prefetch)
    assert source.arrived.wait(60)
    closing = threading.Thread(target=prefetch.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    source.go_on.set()
    closing.join(60)
    assert not closing.is_alive()
    assert source.at <= 3


def test_refuses_no_depth():
    with pytest.raises(ValueError, match="depth >= 1"):
        Prefetch(Numbered(3), 0)


# ── source.py ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_is_the_inverse_of_fields(kind):
    batch = next(Numbered(20, kind, seed=1))
    assert_equal(batch_of(fields(batch)), batch)


def test_batches_that_cannot_be_told_apart_or_do_not_match_are_refused():
    with pytest.raises(ValueError, match="use other names"):
        fields({"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="as many of each"):
        fields((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="as many of each"):
        fields({})


@given(st.integers(1, 4), st.integers(0, 11))
def test_a_list_is_a_source_without_end_that_resumes(n, at):
    batches = [torch.full((2, 3), float(i)) for i in range(n)]
    assert_resumes(lambda: Plain(batches), at)
    source = Plain(batches)
    for i in range(3 * n):
        assert next(source) is batches[i % n]
    assert source.state_dict() == {"epoch": 2, "consumed": n}


def test_an_iterator_ends_and_says_that_it_cannot_go_back():
    source = Plain(iter([torch.zeros(2)] * 3))
    assert len(list(source)) == 3 and next(source, None) is None
    with pytest.raises(NotResumable, match="pass what can be iterated again"):
        Plain(iter([torch.zeros(2)] * 3)).load_state_dict(source.state_dict())
    Plain(iter([torch.zeros(2)])).load_state_dict({"epoch": 0, "consumed": 0})
    with pytest.raises(NotResumable, match="ends before batch 3"):
        Plain([torch.zeros(2)]).load_state_dict(source.state_dict())


def test_nothing_to_iterate_ends_at_once():
    assert list(Plain([])) == []


def test_as_source_wraps_only_what_is_none():
    assert isinstance(as_source([torch.zeros(2)]), Plain)
    assert isinstance(as_source(iter([torch.zeros(2)])), Plain)
    for source in (Numbered(3), Superposition(), Prefetch(Numbered(3))):
        assert as_source(source) is source
        assert isinstance(source, Source)
