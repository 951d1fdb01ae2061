"""Reading files that a stranger may have made: what is not exactly right is refused before anything is built from it.

Nothing outside the folder is opened, nothing is unpickled, and no size is believed that the file's own length does not
confirm, so a refusal costs milliseconds and no memory.
"""

import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_JSON = 2**20  # bytes, of a config and of a safetensors header; an SAE's are a few KB
MAX_TENSORS = 4096
MAX_SIZE = 2**31 - 1  # latents are numbered in int32
ZIP_TAIL = 98  # zip64 end record (56), its locator (20), end record (22)


class FormatError(ValueError):
    """A file is not what it should be, or a format cannot say what an SAE is."""


class Folder:
    """A folder of which only plain files directly inside are opened."""

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder: pass the folder that holds the SAE's files")

    def has(self, name: str) -> bool:
        return (self.path / name).exists() or (self.path / name).is_symlink()

    def file(self, name: str) -> Path:
        """The path of a plain file here, or a refusal: not a link out of the folder, nor a pipe that never ends."""
        if Path(name).name != name or name in ("", ".", ".."):
            raise FormatError(f"{name!r} is not the name of a file in {self.path}: drop the path")
        path = self.path / name
        if not self.has(name):
            raise FormatError(f"{self.path} has no {name}: the SAE is incomplete")
        try:
            target = path.resolve()
        except (OSError, RuntimeError):
            raise FormatError(f"{path} is a link to itself") from None
        if target.parent not in self._roots():
            raise FormatError(f"{path} is a link out of its folder: put the file itself there")
        if not target.is_file():
            raise FormatError(f"{path} is not a plain file")
        return target

    def _roots(self) -> list[Path]:
        """This folder; in the Hub's cache a snapshot's files are links into the `blobs` beside `snapshots`."""
        return [self.path] + [p.parent / "blobs" for p in self.path.parents if p.name == "snapshots"]


class Config(dict[str, Any]):
    """A JSON object whose fields are checked as they are read."""

    def __init__(self, fields: dict[str, Any], source: str):
        super().__init__(fields)
        self.source = source

    def _refuse(self, name: str, allowed: str) -> FormatError:
        return FormatError(f"{self.source}: {name}={repr(self.get(name))[:80]}, expected {allowed}")

    def whole(self, name: str, at_most: int = MAX_SIZE) -> int:
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():  # SAELens counts BatchTopK's k in floats
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            raise self._refuse(name, f"a whole number from 1 to {at_most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._refuse(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false")
        return value

    def choice(self, name: str, allowed: list[str], default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self._refuse(name, "one of " + ", ".join(allowed))
        return value

    def section(self, name: str) -> "Config":
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self._refuse(name, "an object")
        return Config(value, f"{self.source}: {name}")


def parse_json(text: bytes, source: str) -> Config:
    """A JSON object without duplicate keys, NaN, infinities or numbers beyond 64 bits."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise FormatError(f"{source}: a key appears twice")
        return fields

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise FormatError(f"{source}: {number[:20]} is not a finite number")
        return value

    def whole(number: str) -> int:
        if len(number) > 20:
            raise FormatError(f"{source}: a number of {len(number)} digits")
        return int(number)

    try:
        fields = json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite, parse_int=whole)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not valid JSON: {_brief(error)}") from None
    if not isinstance(fields, dict):
        raise FormatError(f"{source} holds a {type(fields).__name__}: expected an object")
    return Config(fields, source)


def read_json(folder: Folder, name: str) -> Config:
    path = folder.file(name)
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{name} has {path.stat().st_size:,} bytes: more than the {MAX_JSON:,} that a config may have")
    return parse_json(path.read_bytes(), name)


def read_safetensors(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a file, as maps of it. The library checks that its header describes exactly the bytes that follow, but
    would take seconds and gigabytes over a header of the 100 MB that it allows."""
    path = folder.file(name)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_JSON, path.stat().st_size - 8):
            raise FormatError(f"{name} is not an SAE in safetensors: no header of at most {MAX_JSON:,} bytes at its start")
        header = parse_json(file.read(length), f"header of {name}")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{name} holds {len(header)} tensors: an SAE has fewer than {MAX_TENSORS}")
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{name} is not a valid safetensors file: {_brief(error)}") from None


def read_npz(folder: Folder, name: str) -> dict[str, Tensor]:
    """The float arrays of an .npz; object arrays, which are pickles, are refused."""
    path = folder.file(name)
    try:
        _check_zip_directory(path, name)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # weights hardly compress: more than this is a bomb
            if sum(entry.file_size for entry in entries) > 4 * path.stat().st_size + 2**24:
                raise FormatError(f"{name} unpacks to many times its size")
            arrays = {entry.filename.removesuffix(".npy"): _read_npy(archive, entry, name) for entry in entries}
    except FormatError:
        raise
    except Exception as error:  # whatever a malformed archive raises
        raise FormatError(f"{name} is not a valid .npz: {_brief(error)}") from None
    if len(arrays) != len(entries):
        raise FormatError(f"{name}: an array appears twice")
    return arrays


def _check_zip_directory(path: Path, name: str) -> None:
    """zipfile reads the whole list of entries before one can look at its length: look first."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - ZIP_TAIL))
        tail = file.read().rjust(ZIP_TAIL, b"\0")
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise FormatError(f"{name} is not a complete .npz")
    zip64 = tail[-42:-38] == b"PK\6\7"
    if zip64 and tail[:4] != b"PK\6\6":
        raise FormatError(f"{name} is not a valid .npz: its directory is not where it should be")
    (length,) = struct.unpack("<Q", tail[40:48]) if zip64 else struct.unpack("<I", tail[-10:-6])
    if length > 2**16:
        raise FormatError(f"{name}: a directory of {length:,} bytes is not that of an SAE")


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> Tensor:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise FormatError(f"{name}: {entry.filename} has npy version {version}")
        shape, fortran_order, dtype = readers[version](file)
        if dtype.kind != "f" or fortran_order or dtype.itemsize > 8:
            raise FormatError(f"{name}: {entry.filename} holds {dtype}: expected C-ordered floats")
        if math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise FormatError(f"{name}: {entry.filename} has shape {shape}, which its length does not bear out")
        return torch.from_numpy(np.frombuffer(bytearray(file.read()), dtype).reshape(shape))


def read_pickle(folder: Folder, name: str, allow_pickle: bool) -> dict[str, Tensor]:
    """A state dict that torch.save wrote. Only where the caller says so, and by torch's restricted unpickler alone."""
    if not allow_pickle:
        raise FormatError(
            f"{name} is a pickle, which can hide a program: pass allow_pickle=True if you trust where it comes from, "
            "best once, to convert it into another format"
        )
    path = folder.file(name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # noqa: S614
    except Exception as error:  # whatever a malformed or refused pickle raises
        raise FormatError(f"{name} is not a state dict that torch.load(weights_only=True) accepts") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise FormatError(f"{name} holds something else than named tensors")
    return state


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
