"""Files in and out: `load` recognises a folder by the name of its weights, `save` writes one, `convert` does both.

A format is one module: `FILES` it may read, `RECOGNISED_BY` which of them, `read(folder) -> Parts`, `write(parts, path)`.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..sae import SAE
from . import dictionary_learning, gemma_scope, native, saelens, sparsify
from .parts import Parts, put_together, take_apart
from .safe import Folder, FormatError

__all__ = ["FormatError", "convert", "load", "save"]

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "fastsae": native,
}


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> SAE:
    """The SAE in a folder of any known format, in eval mode; where it belongs stands in its `metadata`.

    `allow_pickle` lets dictionary_learning's ae.pt be read, by torch's restricted unpickler; leave it off for files of
    strangers.
    """
    return put_together(_read(path, allow_pickle), device, dtype).eval()


def save(
    sae: SAE,
    path: str | Path,
    format: str = "saelens",
    metadata: Mapping[str, Any] | None = None,
    input_scale: float = 1.0,
) -> None:
    """Write an SAE into the folder `path`.

    `metadata` (model_name, hook_name, ...) is added to the SAE's own. `input_scale` is what the data were multiplied with in
    training; it is folded into the written copy, which takes data as they are. What the format cannot say is refused.
    An SAE of the same format that is there already is replaced once the new one is whole. Its weights go first and the new ones
    come last: what stops this in between leaves no SAE rather than a mixture, and a kill the new one in a hidden folder.
    """
    writer, folder = _writer(format), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    there = recognise(entry.name for entry in folder.iterdir())
    if there not in (None, format):
        raise FileExistsError(f"{folder} holds an SAE in format {there!r}: name another folder for {format!r}, or remove it")
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as staging:
        writer(take_apart(sae, metadata, input_scale), Path(staging))
        for name in FORMATS[format].FILES:
            if name in FORMATS[format].RECOGNISED_BY or not (Path(staging) / name).exists():
                (folder / name).unlink(missing_ok=True)
        for new in sorted(Path(staging).iterdir(), key=lambda file: file.name in FORMATS[format].RECOGNISED_BY):
            new.replace(folder / new.name)


def convert(src: str | Path, dst: str | Path, to: str, allow_pickle: bool = False) -> None:
    """Write the SAE in `src` into the new folder `dst` in another format: all of it, bit for bit, or refuse and say why."""
    writer, dst = _writer(to), Path(dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists: name a new folder")
    parts = take_apart(load(src, allow_pickle=allow_pickle))
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as work:
        staging = Path(work) / "sae"
        staging.mkdir()
        writer(parts, staging)
        if lost := parts.difference(_read(staging, allow_pickle=True)):
            raise FormatError(f"{to} cannot hold all of this SAE: {lost} comes back different")
        staging.rename(dst)


def recognise(names: Iterable[str]) -> str | None:
    """Which format a folder with files of these names has."""
    there = set(names)
    return next((name for name, format in FORMATS.items() if there.intersection(format.RECOGNISED_BY)), None)


def _read(path: str | Path, allow_pickle: bool) -> Parts:
    folder = Folder(path)
    format = recognise(entry.name for entry in folder.path.iterdir())
    if format is None:
        known = "; ".join(f"{' or '.join(format.RECOGNISED_BY)} of {name}" for name, format in FORMATS.items())
        raise FormatError(f"{path} holds no SAE of a known format: looked for {known}")
    return FORMATS[format].read(folder, allow_pickle)


def _writer(format: str) -> Callable[[Parts, Path], None]:
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: pass one of {', '.join(FORMATS)}")
    return FORMATS[format].write
