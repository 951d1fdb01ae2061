"""JSON that says one thing only: no key twice, no NaN or infinity, no more than a few megabytes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT = 4 << 20  # bytes; parsed, a file may take some ten times that


def read_json(path: Path) -> Any:
    """The content of `path`. Raises ValueError, naming the file, where it is not strict JSON."""
    with open(path, "rb") as file:
        text = file.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise ValueError(f"{path} is larger than {LIMIT} bytes: JSON holds small things here, tensors go to safetensors")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """What read_json reads: refuses NaN, and more than the limit, before anything is written."""
    text = json.dumps(content, indent=1, allow_nan=False).encode()
    if len(text) > LIMIT:
        raise ValueError(f"{path} would have {len(text)} bytes, more than {LIMIT}: put long lists into tensors")
    with open(path, "wb") as file:
        file.write(text)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """None for what JSON has no number for."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a float")
    return number
