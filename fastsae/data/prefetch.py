"""Prefetch: a source read ahead in a background thread."""

import copy
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from .source import Batch, Source


class Prefetch:
    """The same batches; up to `depth` of them wait ready.

    Its state is the source's as of the last batch consumed, so the source is asked for its state after every batch: put
    Prefetch between a source whose state is small and Shuffle. Whatever the source raises, its end included, is raised here in
    its turn; the next call goes on as the source does. `close()`, leaving a `with`, or dropping the object ends the thread.
    """

    def __init__(self, source: Source, depth: int = 2):
        if depth < 1:
            raise ValueError(f"depth={depth}: pass depth >= 1")
        self.source, self.depth = source, depth
        self._reader: _Reader | None = None  # while it lives the source is ahead, and `_state` is where the consumer is
        self._state: dict[str, Any] = {}
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this Prefetch is closed: load a state to read on")
        if self._reader is None:
            self._state = copy.deepcopy(self.source.state_dict())
            self._reader = _Reader(self.source, self.depth)
            weakref.finalize(self, self._reader.stop)
            self._reader.start()
        came = self._reader.ready.get()
        self._reader.room.release()
        if isinstance(came, BaseException):
            self._reader = None
            raise came
        batch, self._state = came
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict() if self._reader is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.source.load_state_dict(state)
        self._reader, self._closed = None, False

    def close(self) -> None:
        """End the thread, when the read under way returns; batches that wait are given up, and are no part of the state."""
        self._closed = True
        if self._reader is not None:
            self._reader.stop()
            self._reader.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Reader(threading.Thread):
    """Puts (batch, state after it) or the exception that ended it into `ready`. Holds no reference to its Prefetch."""

    def __init__(self, source: Source, depth: int):
        super().__init__(name="fastsae-prefetch", daemon=True)
        self.source = source
        self.room = threading.Semaphore(depth)
        self.ready: queue.SimpleQueue[tuple[Batch, dict[str, Any]] | BaseException] = queue.SimpleQueue()
        self._stopped = False

    def run(self) -> None:
        while True:
            self.room.acquire()
            if self._stopped:
                return
            try:
                self.ready.put((next(self.source), copy.deepcopy(self.source.state_dict())))
            except BaseException as error:  # raised again where the batch is asked for
                self.ready.put(error)
                return

    def stop(self) -> None:
        self._stopped = True
        self.room.release()
