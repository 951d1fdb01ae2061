"""A tree of state <-> name.safetensors + name.json, exactly and without pickle.

    save_tree(folder, "optimizer", optimizer.state_dict())
    optimizer.load_state_dict(load_tree(folder, "optimizer"))

A tree is a dict of int, float, str, bool, None, Tensor, and lists, tuples and dicts (keys: str or int) of those. Tensors go to
the safetensors file under their path, "/state/0/exp_avg"; the JSON holds the rest. What JSON cannot say is an object with one
key that starts with "$":

    {"$tensor": path}    {"$tuple": [...]}    {"$float": "nan"}    {"$items": [[key, value], ...]}  a dict with other keys
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .host_memory import fill
from .strict_json import read_json, write_json

HEADER_LIMIT = 1 << 20  # bytes, about ten thousand tensors; the parser would take seconds over the 100 MB it allows itself
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def save_tree(folder: Path, name: str, tree: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    content = _encode(tree, "", tensors)
    save_tensors(folder / f"{name}.safetensors", tensors)
    write_json(folder / f"{name}.json", content)


def load_tree(folder: Path, name: str) -> dict[str, Any]:
    """The tree that was saved, on the CPU. Tensors are contiguous, own their memory and require no gradient."""
    tensors = load_tensors(folder / f"{name}.safetensors")
    path = folder / f"{name}.json"
    content = read_json(path)
    try:
        tree = _decode(content, tensors)
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved tree: {error!r}") from error
    if tensors or not isinstance(tree, dict):
        raise ValueError(f"{path} is not the tree that {name}.safetensors belongs to: it does not use {sorted(tensors)[:3]}")
    return tree


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written tensor by tensor: of what lies on a GPU or is transposed, one is copied at a time.

    (safetensors.torch.save_file wants all of them contiguous and in host memory at once.)
    """
    # wide types first, as the library does it, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        t = tensors[name]
        if t.dtype not in _DTYPES or t.layout != torch.strided or t.device.type == "meta":
            raise TypeError(f"{name} is {t.dtype}, {t.layout} on {t.device}: only dense tensors of real numbers can be saved")
        start, end = end, end + t.numel() * t.dtype.itemsize
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"{path}: {len(tensors)} tensors need a header of {len(text)} bytes, more than {HEADER_LIMIT}")
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            host = tensors[name].detach().cpu()
            if not host.is_contiguous():
                host = fill(torch.empty(host.shape, dtype=host.dtype), host)
            file.write(host.view(-1).view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"{path} says that its header has {length} bytes: at most {HEADER_LIMIT} are read")
    try:
        with safe_open(path, "pt") as file:
            # a clone, because what get_tensor returns is a map of the file
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not iterable)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # {"a/b": t, "a": {"b": t}}
            path += "'"
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, Mapping):
        if bad := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{path or 'the tree'} has the key {bad[0]!r}: keys of a state must be str or int")
        items = [(key, _encode(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$items": items}
    # exact types from here on: a numpy.float64 is a float too, and would come back as another type
    kind = type(value)
    if kind in (list, tuple):
        elements = [_encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return elements if kind is list else {"$tuple": elements}
    if kind is float and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or kind in (bool, int, float, str):
        return value
    raise TypeError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}: a state holds int, float, str, bool, None, Tensor, "
        "and lists, tuples and dicts of those; convert it"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse. Takes each tensor out of `tensors`, so that none is used twice or left over."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _decode(item, tensors) for key, item in value.items()}
    [content] = value.values()
    match tag:
        case "$tensor":
            return tensors.pop(content)
        case "$tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "$float":
            return float(content)
        case "$items":
            return {key: _decode(item, tensors) for key, item in content}
        case _:
            raise ValueError(f"unknown mark {tag!r}")
