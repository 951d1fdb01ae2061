"""What every source of activations promises, and `Plain`, which makes any iterator one."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Batch = Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]
"""Rows [n, D] or [n, L, D]; or (x, target), n rows each; or rows by hook name."""


@runtime_checkable
class Source(Protocol):
    """An iterator of batches that can say where it is and go there.

    A state is a nested dict of numbers, strings, None, lists of those, and tensors. Its tensors may be the live ones, as in
    torch: write or copy them before the next batch.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Afterwards the source yields exactly what the one that was saved would have yielded next."""
        ...


class NotResumable(TypeError):
    """The source cannot go back to where it was."""


def fields(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name: rows are "x", a target is "target", a dict is itself. `batch_of` is the inverse."""
    if isinstance(batch, Tensor):
        return {"x": batch}
    if isinstance(batch, tuple):
        x, target = batch
        named = {"x": x, "target": target}
    elif set(batch) in ({"x"}, {"x", "target"}):
        raise ValueError(f"a batch names its tensors {sorted(batch)}: yield x or (x, target), or use other names")
    else:
        named = batch
    lengths = {name: len(t) for name, t in named.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"a batch has {lengths} rows: yield as many of each")
    return named


def batch_of(fields: dict[str, Tensor]) -> Batch:
    """The batch whose `fields` these are."""
    if set(fields) == {"x"}:
        return fields["x"]
    if set(fields) == {"x", "target"}:
        return fields["x"], fields["target"]
    return fields


def length(fields: dict[str, Tensor]) -> int:
    """How many rows there are."""
    return len(next(iter(fields.values()), ()))


def kinds(fields: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Shape of a row, and dtype, of each field."""
    return {name: {"shape": list(t.shape[1:]), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in fields.items()}


def check_kinds(rows: dict[str, Tensor], expected: dict[str, dict[str, Any]]) -> None:
    """Copying into a buffer would cast and repeat without a word."""
    if kinds(rows) != expected:
        raise ValueError(f"rows of the source were {expected} and are {kinds(rows)}: yield the same always")


def as_source(batches: Iterable[Batch]) -> Source:
    """Itself if it is a Source, else `Plain`."""
    return batches if isinstance(batches, Source) else Plain(batches)


class Plain:
    """Any iterable of batches as a Source.

    What can be iterated again (a list, a DataLoader) starts again at its end, and resumes by skipping what was consumed: that
    is exact if it yields the same in every epoch. An iterator ends where it ends, and cannot resume.
    """

    def __init__(self, batches: Iterable[Batch]):
        self.batches = batches
        self.epoch = self.consumed = 0
        self._iterator = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator, None)
        if batch is None:
            if self._iterator is self.batches or not self.consumed:
                raise StopIteration
            self.epoch, self.consumed, self._iterator = self.epoch + 1, 0, iter(self.batches)
            return next(self)
        self.consumed += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        name, consumed = type(self.batches).__name__, state["consumed"]
        if self._iterator is self.batches:
            if consumed != self.consumed:
                raise NotResumable(
                    f"this source is a plain {name}, which cannot go to its batch {consumed}: to resume exactly, pass what can "
                    "be iterated again, or an object with state_dict and load_state_dict"
                )
            return
        self._iterator = iter(self.batches)
        if sum(1 for _ in islice(self._iterator, consumed)) < consumed:
            raise NotResumable(f"this {name} ends before batch {consumed}, where the saved one was: pass the data it had")
        self.epoch, self.consumed = state["epoch"], consumed
