"""Passes over numbered blocks of rows on disk: the order, the share of a rank, the cursor."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from .source import Batch


class Blocks(ABC):
    """A Source that yields block after block. `data` names what they are blocks of, so that a state is not loaded elsewhere.

    With `shuffle` each epoch has another random order, from the seed. Ranks deal the order out in turn: within an epoch their
    blocks are disjoint and together complete. Without `epochs` it never ends.
    """

    def __init__(
        self, blocks: int, data: str, *, seed: int, rank: int, world_size: int, shuffle: bool, epochs: int | None
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}, world_size={world_size}: pass 0 <= rank < world_size")
        if blocks < world_size:
            raise ValueError(f"{blocks} blocks for world_size={world_size}: pass smaller blocks, so that each rank has one")
        self._plan: dict[str, Any] = {
            "data": data, "blocks": blocks, "seed": seed, "rank": rank, "world_size": world_size, "shuffle": shuffle
        }  # fmt: skip
        self.epochs = epochs
        self._seek(0, 0)

    @abstractmethod
    def read(self, block: int) -> Batch:
        """The rows of a block."""

    def _deal(self, epoch: int) -> list[int]:
        blocks, seed = self._plan["blocks"], self._plan["seed"]
        order = np.random.default_rng((seed, 1 + epoch)).permutation(blocks) if self._plan["shuffle"] else np.arange(blocks)
        return order[self._plan["rank"] :: self._plan["world_size"]].tolist()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.position == len(self._order):
            self._seek(self.epoch + 1, 0)
        if self.epoch == self.epochs:
            raise StopIteration
        batch = self.read(self._order[self.position])
        self.position += 1
        return batch

    def _seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position, self._order = epoch, position, self._deal(epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "plan": dict(self._plan)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["plan"] != self._plan:
            raise ValueError(f"the saved source read {state['plan']}, this one {self._plan}: make it as the saved one was")
        self._seek(state["epoch"], state["position"])
