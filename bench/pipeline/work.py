"""What stands around training: a work is prepared once, and each provider does it in its own way.

A call does a fixed amount of it, whatever buffers a library has: many batches, whole passes over a file. `observe` makes one
such call and returns what `check` of the work looks at, before anything is timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Flow:
    """One provider's way."""

    call: Callable[[], Any]
    observe: Callable[[], Any]
    note: str = ""
    ceiling: bool = False
    """a bound on what anyone can reach, not a competitor"""


@dataclass(frozen=True)
class Prepared:
    """A work on this machine: its data are there."""

    amount: int
    """units a call"""
    bytes: int
    """bytes a call, of what comes out"""
    said: str
    """the work in a sentence"""
    ways: Mapping[str, Callable[[], Flow]]
    """by provider; raises Unsupported or ImportError where there is none"""
    check: Callable[[Any], None]
    """raises Wrong"""


@dataclass(frozen=True)
class Work:
    name: str
    """as for --cases"""
    unit: str
    prepare: Callable[[torch.device, bool, Path], Prepared]
    """(device, whether tiny, an empty folder)"""
    smoke: bool = True
    """whether a smoke run has it"""
