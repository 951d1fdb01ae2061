"""Activations on disk: safetensors shards, and an index that says what they hold.

    write_shards(source, "acts", rows=10_000_000, metadata={"model": "gpt2", "hook": "blocks.8.hook_resid_pre"})
    source = Shuffle(Shards("acts", seed=1), rows=1 << 18, batch_size=4096)

    acts/index.json   acts/shard-00000.safetensors   acts/shard-00001.safetensors ...
"""

import bisect
import copy
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import checkpoints, newest, run_lock, write_checkpoint
from ..state_files import HEADER_LIMIT, load_tree, save_tensors, save_tree
from ..strict_json import read_json, write_json
from .blocks import Blocks
from .source import Batch, Source, batch_of, check_kinds, fields, kinds, length

FORMAT, VERSION, INDEX = "fastsae-shards", 1, "index.json"


class ShardError(ValueError):
    """A set of shards is not what was written."""


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Shards(Blocks):
    """The rows that write_shards wrote, bit for bit, in chunks of `block_rows` neighbours; Blocks has their order.

    `field` picks one of several fields, or a pair to read as (x, target). That every file is there and as long as it should be
    is checked at once; `verify` reads them all.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        block_rows: int = 1024,
        field: str | tuple[str, str] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        if block_rows < 1:
            raise ValueError(f"block_rows={block_rows}: pass block_rows >= 1")
        self.path, self.block_rows, self.field = Path(path), block_rows, field
        self.index = _read_index(self.path)
        """index.json: "rows", "fields", "shards", "metadata" """
        self._names: list[str] = [field] if isinstance(field, str) else list(field or self.index["fields"])
        if unknown := sorted(set(self._names) - set(self.index["fields"])):
            raise ValueError(f"{self.path} has no field {unknown[0]!r}: pass one of {sorted(self.index['fields'])}")
        self._shards: list[dict[str, Any]] = self.index["shards"]
        self._first = [0, *accumulate(math.ceil(shard["rows"] / block_rows) for shard in self._shards)]
        self._open: dict[int, Any] = {}
        digest = hashlib.sha256((self.path / INDEX).read_bytes()).hexdigest()
        data = f"{self._names} of {digest} by {block_rows} rows"
        super().__init__(
            self._first[-1], data, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle, epochs=epochs
        )

    def read(self, block: int) -> Batch:
        shard = bisect.bisect_right(self._first, block) - 1
        if shard not in self._open:
            self._open[shard] = self._mapped(self._shards[shard])
        start = (block - self._first[shard]) * self.block_rows
        stop = min(start + self.block_rows, self._shards[shard]["rows"])
        # a copy, so that it is read here (in the thread of a Prefetch), and not when somebody looks at it
        rows = [self._open[shard].get_slice(name)[start:stop].clone() for name in self._names]
        if isinstance(self.field, str):
            return rows[0]
        return (rows[0], rows[1]) if self.field else batch_of(dict(zip(self._names, rows, strict=True)))

    def _mapped(self, shard: dict[str, Any]) -> Any:
        file = self.path / shard["file"]
        try:
            opened: Any = safe_open(file, "pt")  # by memory map
            found = {name: opened.get_slice(name) for name in self.index["fields"]}
            if any(s.get_shape()[0] != shard["rows"] for s in found.values()):
                raise ShardError(f"{file} does not have the {shard['rows']} rows that {INDEX} says: write the shards again")
            if kinds({name: s[:0] for name, s in found.items()}) != self.index["fields"]:
                raise ShardError(f"{file} does not hold the fields that {INDEX} says: write the shards again")
            return opened
        except (SafetensorError, IndexError) as error:
            raise ShardError(f"{file} is damaged: {error}") from error

    def verify(self) -> None:
        """Every shard has the checksum that it was written with."""
        for shard in self._shards:
            with open(self.path / shard["file"], "rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != shard["sha256"]:
                raise ShardError(f"{self.path / shard['file']} is damaged: sha256 {got}, {INDEX} says {shard['sha256']}")


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: pass a folder that write_shards has finished")
    try:
        index = read_json(file)
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {index['format']!r} {index['version']!r}, and this fastsae reads {FORMAT!r} {VERSION}")
        row_bytes = _row_bytes(index["fields"])
        for shard in index["shards"]:
            _check_shard(path, row_bytes, **shard)
        if index["rows"] != sum(shard["rows"] for shard in index["shards"]) or not index["rows"]:
            raise ValueError(f"rows={index['rows']!r} is not the number of rows of its shards")
        return index
    except ShardError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ShardError(f"{file} does not describe a set of shards: {error}") from error


def _check_shard(path: Path, row_bytes: int, file: str, rows: int, bytes: int, sha256: str) -> None:
    where = path / file
    if Path(file).name != file or where.resolve().parent != path.resolve():
        raise ShardError(f"{INDEX} of {path} lists {file!r}: a shard is a file in the folder itself, and no link out of it")
    if not where.is_file():
        raise ShardError(f"{where} is missing: copy it again")
    if where.stat().st_size != bytes:
        raise ShardError(f"{where} has {where.stat().st_size} bytes, {INDEX} says {bytes}: copy it again")
    if type(rows) is not int or rows < 1 or not 8 <= bytes - rows * row_bytes <= HEADER_LIMIT:
        raise ShardError(f"{where} has {bytes} bytes, which are not {rows} rows of {row_bytes} bytes and a header")


def _row_bytes(kinds: dict[str, dict[str, Any]]) -> int:
    return sum(math.prod(k["shape"]) * getattr(torch, k["dtype"]).itemsize for k in kinds.values())


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_shards(
    source: Source,
    path: str | Path,
    rows: int | None = None,
    *,
    shard_bytes: int = 1 << 30,
    metadata: Mapping[str, Any] | None = None,
    poll: Callable[[], None] | None = None,
) -> None:
    """Write the next `rows` rows of the source, or all until it ends, to a new folder.

    `metadata` is what JSON can say. SAEs trained on the shards keep the model, hook, target_hook, dataset and context of it.

    The index is written last, and a folder without one is not read. After a crash, or when `poll` (called before each read)
    raised, the same call goes on after the last whole shard, from the state that the source had there.
    """
    path = Path(path)
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows}: pass rows >= 1, or None for all")
    if (path / INDEX).exists():
        raise FileExistsError(f"{path} holds a finished set of shards: pass a new folder")
    with run_lock(path):
        reader, saved = _Reader(source, poll), newest(path)
        progress: dict[str, Any]
        if saved is not None:
            progress = load_tree(saved, "progress")
            reader.load_state_dict(progress["reader"])
        elif any(file.name != ".lock" for file in path.iterdir()):
            raise FileExistsError(f"{path} is neither empty nor a set of shards that was begun: pass a new folder")
        elif not (first := reader.ahead()):
            raise ValueError("the source has no rows: pass one that has")
        else:
            progress = {"fields": kinds(first), "shards": []}
            _save(path, progress, reader)
        shards: list[dict[str, Any]] = progress["shards"]
        written, row_bytes = sum(shard["rows"] for shard in shards), _row_bytes(progress["fields"])
        per_shard = max(1, shard_bytes // max(1, row_bytes))
        while rows is None or written < rows:
            n = per_shard if rows is None else min(per_shard, rows - written)
            tensors = reader.take(n, progress["fields"])
            if rows is not None and length(tensors) < n:
                raise ValueError(f"the source ended after {written + length(tensors)} of {rows} rows: pass rows=None for all")
            if not length(tensors):
                break
            shards.append(_write_shard(path, f"shard-{len(shards):05d}.safetensors", tensors))
            written += length(tensors)
            _save(path, progress, reader)
        if rows is not None and written > rows:
            raise ValueError(f"{path} holds {written} rows of an earlier call: pass rows >= {written}")
        index = {"format": FORMAT, "version": VERSION, "rows": written, "fields": progress["fields"], "shards": shards}
        write_json(path / f"{INDEX}.part", index | {"metadata": dict(metadata or {})})
        _publish(path / f"{INDEX}.part", path / INDEX)
        for folder in checkpoints(path):
            shutil.rmtree(folder)


def _save(path: Path, progress: dict[str, Any], reader: "_Reader") -> None:
    tree = progress | {"reader": reader.state_dict()}
    write_checkpoint(path, len(progress["shards"]), lambda folder: save_tree(folder, "progress", tree), keep=1)


def _write_shard(path: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Its entry in the index."""
    part = path / f"{name}.part"
    need, free = sum(t.nbytes for t in tensors.values()) + HEADER_LIMIT, shutil.disk_usage(path).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{need} bytes are needed and {free} are free: free some space and call again", str(part))
    save_tensors(part, tensors)
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {"file": name, "rows": length(tensors), "bytes": part.stat().st_size, "sha256": digest}
    _publish(part, path / name)
    return entry


def _publish(part: Path, file: Path) -> None:
    """Give a file its name once it is on the disk."""
    with open(part, "rb") as content:
        os.fsync(content.fileno())
    os.replace(part, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Reader:
    """Any number of rows at a time. Its state is the source's before the chunk under way, and how much of that is used."""

    def __init__(self, source: Source, poll: Callable[[], None] | None):
        self.source, self.poll = source, poll
        self._before = copy.deepcopy(source.state_dict())
        self._chunk: dict[str, Tensor] = {}
        self._used = 0

    def ahead(self) -> dict[str, Tensor]:
        """What is left of the chunk under way, or the next one; nothing at the end."""
        while self._used == length(self._chunk):
            if self.poll is not None:
                self.poll()
            self._before, self._chunk, self._used = copy.deepcopy(self.source.state_dict()), {}, 0
            batch = next(self.source, None)
            if batch is None:
                break
            self._chunk = fields(batch)
        return {name: t[self._used :] for name, t in self._chunk.items()}

    def take(self, n: int, expected: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
        """The next n rows, or fewer at the end."""
        rows = {name: torch.empty(n, *k["shape"], dtype=getattr(torch, k["dtype"])) for name, k in expected.items()}
        taken = 0
        while taken < n and (ahead := self.ahead()):
            check_kinds(ahead, expected)
            m = min(n - taken, length(ahead))
            for name, t in ahead.items():
                rows[name][taken : taken + m] = t[:m]
            taken, self._used = taken + m, self._used + m
        return {name: t[:taken] for name, t in rows.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"source": self._before, "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self._before, self._chunk, self._used = copy.deepcopy(state["source"]), {}, 0
        if state["used"]:
            self.ahead()
            self._used = state["used"]
