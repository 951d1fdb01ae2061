"""What tests of data share: a source whose rows can be told apart, and the proof that a source resumes."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.source import Batch, Source, fields
from fastsae.state_files import load_tree, save_tree

KINDS = ("x", "pair", "dict")


class Numbered:
    """Rows 0 .. rows-1 in chunks of random sizes, empty ones too. A row holds its number as bits, so any dtype is exact."""

    def __init__(self, rows: int, kind: str = "x", dtype: torch.dtype = torch.float32, seed: int = 0):
        random = np.random.default_rng(seed)
        self.cuts = [0]
        while self.cuts[-1] < rows:
            self.cuts.append(min(rows, self.cuts[-1] + int(random.integers(0, 12))))
        self.kind, self.dtype, self.at = kind, dtype, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.at == len(self.cuts) - 1:
            raise StopIteration
        numbers = torch.arange(*self.cuts[self.at : self.at + 2])
        self.at += 1
        x = torch.stack([numbers, numbers], 1).view(self.dtype)  # 16 bytes a row
        layers = x.unflatten(1, (2, x.shape[1] // 2))
        if self.kind == "x":
            return x
        return (x, layers) if self.kind == "pair" else {"blocks.0": layers[:, 0], "blocks.1": x}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def numbers(batch: Batch) -> list[int]:
    """Of the rows of a Numbered. Every field says the same."""
    said = [t.flatten(1).contiguous().view(torch.int64)[:, 0].tolist() for t in fields(batch).values()]
    assert all(s == said[0] for s in said)
    return said[0]


def assert_equal(a: Batch | None, b: Batch | None) -> None:
    """Bit by bit."""
    assert type(a) is type(b)
    if a is None or b is None:
        return
    a, b = fields(a), fields(b)
    assert list(a) == list(b)
    for s, t in zip(a.values(), b.values(), strict=True):
        assert s.dtype == t.dtype and s.shape == t.shape and bits(s).equal(bits(t))


def bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def assert_resumes(make: Callable[[], Source], at: int, more: int = 6) -> None:
    """A new source, given the state after `at` batches as a checkpoint keeps it, yields what the first goes on with."""
    first, second = make(), make()
    for _ in range(at):
        next(first, None)
    with tempfile.TemporaryDirectory() as folder:
        save_tree(Path(folder), "state", first.state_dict())
        second.load_state_dict(load_tree(Path(folder), "state"))
    for _ in range(more):
        assert_equal(next(first, None), next(second, None))
    for source in (first, second):
        getattr(source, "close", lambda: None)()
