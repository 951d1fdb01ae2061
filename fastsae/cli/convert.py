"""fastsae convert: an SAE in another library's format, all of it or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .parse import flags

DESCRIPTION = "Write an SAE in another library's format: all of it, bit for bit, or refuse and say why."


@dataclass(frozen=True)
class Convert:
    src: Annotated[Path, tyro.conf.Positional]
    """Folder of an SAE in any known format."""
    dst: Annotated[Path, tyro.conf.Positional]
    """New folder."""
    to: Literal["saelens", "dictionary_learning", "sparsify", "fastsae"]
    """Its format."""
    allow_pickle: bool = False
    """Read dictionary_learning's ae.pt, with torch's restricted unpickler. Not for files of strangers."""


def main(arguments: Sequence[str]) -> None:
    asked = flags(Convert, "convert", arguments, DESCRIPTION)

    from ..formats import convert

    convert(asked.src, asked.dst, asked.to, asked.allow_pickle)
    print(f"written to {asked.dst}")
