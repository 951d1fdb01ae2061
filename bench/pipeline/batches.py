"""Drawing shuffled batches, the same way for each library.

Buffers are refilled in cycles, and a call draws whole ones: SAELens' mixing buffer of 18 batches serves 9 and then refills;
dictionary_learning's of 17 refills when 9 are drawn. fastsae's is as large as the larger one and refills at each batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DRAWS = 9
"""Batches a call."""
BUFFER = 2 * DRAWS
"""Batches in a buffer."""


def draw(source: Iterator[Tensor]) -> list[Tensor]:
    return [next(source) for _ in range(DRAWS)]


def distinct(rows: Tensor) -> float:
    """The share of rows that no other equals; `rows` are numbers of rows."""
    return len(torch.unique(rows)) / len(rows)
