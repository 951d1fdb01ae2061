"""Shuffle: batches drawn at random from a buffer of rows that is allocated once."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .source import Batch, Source, batch_of, check_kinds, fields, kinds, length
from .staging import put, sent


class Shuffle:
    """Chunks of any number of rows in, batches of batch_size rows out, every row once.

    A batch takes random slots of the full buffer; the last rows move into the holes, and the end is filled up again. When the
    source ends the buffer is drained; the last batch is what is left, unless `drop_last`. The state holds the buffer. `poll` is
    called before each read of the source; if it (or the source) raises, nothing is lost, and the next call goes on.
    """

    def __init__(
        self,
        source: Source,
        rows: int,
        batch_size: int,
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        poll: Callable[[], None] | None = None,
    ):
        if not 1 <= batch_size <= rows:
            raise ValueError(f"rows={rows}, batch_size={batch_size}: pass 1 <= batch_size <= rows")
        self.source, self.device, self.drop_last, self.poll = source, torch.device(device), drop_last, poll
        self.sizes = {"rows": rows, "batch_size": batch_size}
        self.buffer: dict[str, Tensor] = {}
        """[rows, ...] by name, made when the first chunk shows what rows are; the first `filled` are in use"""
        self.filled = 0
        self._waiting: dict[str, Tensor] = {}  # what of the last chunk did not fit
        self._random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._fill()
        n = min(self.sizes["batch_size"], self.filled)
        if n == 0 or (self.drop_last and n < self.sizes["batch_size"]):
            raise StopIteration
        return self._take(n)

    @torch.no_grad()  # a source may have forgotten to
    def _fill(self) -> None:
        while (room := self.sizes["rows"] - self.filled) > 0:
            if not self._waiting:
                if self.poll is not None:
                    self.poll()
                chunk = next(self.source, None)
                if chunk is None:
                    return
                self._waiting = self._checked(fields(chunk))
            n = min(room, length(self._waiting), self.sizes["batch_size"])  # which bounds the pinned memory
            for name, rows in self._waiting.items():
                put(self.buffer[name][self.filled : self.filled + n], rows[:n])
            self.filled += n
            self._waiting = {name: rows[n:] for name, rows in self._waiting.items()} if n < length(self._waiting) else {}

    def _checked(self, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        """The chunk, which is like the buffer; the first one makes it."""
        if not self.buffer:
            self.buffer = {name: self._empty(t) for name, t in chunk.items()}
        check_kinds(chunk, kinds(self.buffer))
        return chunk

    def _empty(self, rows: Tensor) -> Tensor:
        return torch.empty(self.sizes["rows"], *rows.shape[1:], dtype=rows.dtype, device=self.device)

    def _take(self, n: int) -> Batch:
        slots = self._random.choice(self.filled, n, replace=False)  # O(n): numpy permutes all only below 50 n or 10,000
        self.filled -= n
        stays = np.ones(n, dtype=bool)  # which of the last n rows
        stays[slots[slots >= self.filled] - self.filled] = False
        moves = (slots, slots[slots < self.filled], self.filled + np.flatnonzero(stays))
        taken, holes, last = sent(torch.from_numpy(np.concatenate(moves)), self.device).split([len(i) for i in moves])
        batch: dict[str, Tensor] = {}
        for name, buffer in self.buffer.items():
            batch[name] = buffer.index_select(0, taken)
            buffer.index_copy_(0, holes, buffer.index_select(0, last))
        return batch_of(batch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "sizes": dict(self.sizes),
            "buffer": {name: t[: self.filled] for name, t in self.buffer.items()},
            "waiting": {name: t.clone(memory_format=torch.contiguous_format) for name, t in self._waiting.items()},
            "random": self._random.bit_generator.state,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sizes"] != self.sizes:
            raise ValueError(f"the saved buffer has {state['sizes']}, this one {self.sizes}: make it as the saved one was")
        self.source.load_state_dict(state["source"])
        self._random.bit_generator.state = state["random"]
        self._waiting = dict(state["waiting"])
        self.buffer = {name: self._empty(t) for name, t in state["buffer"].items()}
        self.filled = length(state["buffer"])
        for name, rows in state["buffer"].items():
            self.buffer[name][: self.filled] = rows

    def close(self) -> None:
        """End what the source runs in the background."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()
