"""Flags, and YAML under them, as one of our frozen dataclasses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
import yaml

from ..config import TrainConfig
from ..settings import from_dict, to_dict

T = TypeVar("T")


def flags(kind: type[T], command: str, arguments: Sequence[str], description: str, default: T | None = None) -> T:
    """Names have no prefixes: --k, not --sae.k. Exits with 2 and the nearest flag's name on a mistake."""
    found: T | None = tyro.cli(
        kind,
        prog=f"fastsae {command}",
        description=description,
        args=list(arguments),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return cast(T, found)


def train_config(arguments: Sequence[str], description: str) -> TrainConfig:
    """--config FILE.yaml first, if it is there, then flags on top of it."""
    arguments, default = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])], None
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ValueError("--config without a file: pass --config FILE.yaml")
        default = read_yaml(Path(arguments[place + 1]))
        del arguments[place : place + 2]
    return flags(TrainConfig, "train", arguments, description, default)


def read_yaml(path: Path) -> TrainConfig:
    try:
        values: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: pass --config with a YAML file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    try:
        return from_dict(values or {}, TrainConfig)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_yaml(config: TrainConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
