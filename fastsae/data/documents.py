"""Data sets of documents: opening one, and reading it so that the place can be saved."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..optional import need
from .source import NotResumable

WINDOW = 256
"""Rows that are read at a time, and that a stream is shuffled within. Saved places count in it: it stays what it is."""

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def open_dataset(name: str | Path, *, split: str = "train", config: str | None = None, stream: bool = False) -> Iterable[Any]:
    """A `datasets` data set: of a folder written by save_to_disk; of a file, or a folder of files, of one format (each line of
    a text file is a document); or by its name on the Hugging Face Hub. With `stream` nothing is converted or downloaded ahead.
    """
    datasets = need("datasets", "lm")
    path = Path(name)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"split={split!r} is not in {path}, which has {sorted(saved)}: pass one of these")
            saved = saved[split]
        return saved.to_iterable_dataset() if stream else saved
    if path.exists() or _format(path) or path.is_absolute():
        files = sorted(file for file in path.rglob("*") if _format(file)) if path.is_dir() else [path]
        formats = {_format(file) for file in files}
        if not path.exists() or not formats or None in formats:
            raise FileNotFoundError(f"{path} is no data set: pass a file or folder of {', '.join(FORMATS)}, or of save_to_disk")
        if len(formats) > 1:
            raise ValueError(f"{path} has files of the formats {sorted(map(str, formats))}: pass a folder of one format")
        return datasets.load_dataset(formats.pop(), data_files=[str(f) for f in files], split="train", streaming=stream)
    return datasets.load_dataset(str(name), config, split=split, streaming=stream)


def _format(file: Path) -> str | None:
    return FORMATS.get(Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix)


class Documents:
    """The rows of a data set, epoch after epoch.

    With a seed each epoch has another random order: of all rows if the data set has a length and indices, else within windows
    of WINDOW rows. An iterator has one epoch. A stream of `datasets` resumes from its own state (which leaves out a shuffle
    buffer of its own: shuffle here instead); any other iterable by skipping what was read.
    """

    def __init__(self, dataset: Iterable[Any], seed: int | None = None, repeat: bool = True):
        self.dataset: Any = dataset
        self.seed, self.repeat = seed, repeat
        self.epoch = self.window = self.taken = 0
        """The next row is number `taken` of the window `window` of the epoch."""
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        self._length: int | None = len(self.dataset) if indexed else None
        self._once = isinstance(dataset, Iterator)
        self._has_state = "datasets" in sys.modules and isinstance(dataset, sys.modules["datasets"].IterableDataset)
        self._start: Any = None  # the state of a stream of `datasets` where the window starts,
        self._end: Any = None  # and where it ends
        self._rows: list[Any] | None = None  # of the window
        self._stream: Iterator[Any] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, n: int) -> list[Any]:
        """The next rows, at most n; none only if there are no more."""
        if self._rows is None:
            self._rows = self._read()
        if not self._rows:
            return self.take(n) if self._begin_epoch() else []
        rows = self._rows[self.taken : self.taken + n]
        self.taken += len(rows)
        if self.taken == len(self._rows):
            self._go_to(self.epoch, self.window + 1, 0, self._end)
        return rows

    def _begin_epoch(self) -> bool:
        if self.window == 0:
            raise ValueError("the data set has no rows: pass another one")
        if not self.repeat or self._once:
            return False
        if self.epoch == 0:
            warnings.warn("the data set has ended and starts again: from here on, rows are seen more than once", stacklevel=5)
        self._go_to(self.epoch + 1, 0, 0, None)
        self._stream = None
        return True

    def _go_to(self, epoch: int, window: int, taken: int, start: Any) -> None:
        self.epoch, self.window, self.taken, self._start, self._rows = epoch, window, taken, start, None

    def _read(self) -> list[Any]:
        """The rows of the window, in the order in which they are given out."""
        if self._length is not None:
            return self._at(self._permutation(self._length)[self.window * WINDOW : (self.window + 1) * WINDOW].tolist())
        stream, self._stream = self._stream or self._open(), None  # if reading fails, it is opened here again
        rows = list(islice(stream, WINDOW))
        self._stream = stream
        self._end = self.dataset.state_dict() if self._has_state else None
        if self.seed is None:
            return rows
        return [rows[i] for i in np.random.default_rng((self.seed, self.epoch, self.window)).permutation(len(rows))]

    def _open(self) -> Iterator[Any]:
        if self._has_state:
            self.dataset.load_state_dict(self._start)  # None: at the beginning
        skip = 0 if self._has_state or self._once else self.window * WINDOW
        return islice(iter(self.dataset), skip, None)

    def _permutation(self, n: int) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            order = np.arange(n) if self.seed is None else np.random.default_rng((self.seed, self.epoch)).permutation(n)
            self._order = self.epoch, order
        return self._order[1]

    def _at(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):  # `datasets` reads several rows at once much faster
            return self.dataset.__getitems__(indices) if indices else []
        return [self.dataset[i] for i in indices]

    def state_dict(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "window": self.window, "taken": self.taken}
        return {**place, "stream": self._start, "length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        place = (state["epoch"], state["window"], state["taken"])
        if self._once and place != (self.epoch, self.window, self.taken):
            name = type(self.dataset).__name__
            raise NotResumable(f"the data set is a plain {name}, which cannot go back: pass one that can be iterated again")
        if state["length"] != self._length:
            raise ValueError(f"the saved data set has length {state['length']}, this one {self._length}: pass the same one")
        self._go_to(*place, state["stream"])
        self._stream = None
