"""Packages that fastsae can do without."""

from importlib import import_module
from typing import Any


def need(module: str, extra: str) -> Any:
    """The module, or one line that says which extra brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"{package} is not installed: pip install 'fastsae[{extra}]'", name=package) from None
