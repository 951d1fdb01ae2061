"""Where an SAE belongs: the model, the hook and the data that its activations came from, under SAELens' names, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DataConfig
from .shards import Shards

NAMES = {
    "model": "model_name",
    "hook": "hook_name",
    "target_hook": "hook_name_out",
    "dataset": "dataset_path",
    "context": "context_size",
    "prepend_bos": "prepend_bos",
}
"""Fields of DataConfig, which are also the names for the metadata of shards, and SAELens' for them."""


def origin(data: DataConfig) -> dict[str, Any]:
    """As far as it is known: of a live model, and of what is on disk as it says itself."""
    said: dict[str, Any] = {}
    if data.source == "model":
        said = {**vars(data), "prepend_bos": True}
    elif data.source == "saelens_cache":
        said = {"hook": data.hook}
    elif data.source == "shards":
        index = Shards(str(data.path)).index
        said = {**index.get("metadata", {})}
        if data.hook in index["fields"]:
            said |= {"hook": data.hook, "target_hook": data.target_hook}
    theirs = {NAMES.get(name, name): value for name, value in said.items() if value is not None}
    return {name: value for name, value in theirs.items() if name in NAMES.values()}


def completed(data: DataConfig, metadata: Mapping[str, Any]) -> DataConfig:
    """`data` in which the model, hooks and context that are left at their defaults are those of an SAE's metadata."""
    default, found = DataConfig(), {name: metadata.get(NAMES[name]) for name in ("model", "hook", "target_hook", "context")}
    is_open = {name for name in found if getattr(data, name) == getattr(default, name)}
    return replace(data, **{name: value for name, value in found.items() if name in is_open and value is not None})
