"""Activations in superposition whose true features are known, and how well a dictionary found them."""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .source import Batch


class Superposition:
    """Batches x = code @ features: `n_features` unit vectors in `d_in` dimensions, of which `active` fire in a row on average.

    A feature that fires has a magnitude uniform in `magnitudes`. Features stand in groups of `group_size`; groups are
    independent, and within a group firing depends on one of
    - `correlation`: the correlation coefficient of two features' firing (0 or 1);
    - `child_probability`: the first feature is the parent of the others, which fire only where it does, and there with this
      probability.
    Streams of one seed share the features and differ in the rows: for ranks, and for held-out data.
    """

    def __init__(
        self,
        d_in: int = 64,
        n_features: int = 512,
        active: float = 5.0,
        magnitudes: tuple[float, float] = (0.75, 1.25),
        *,
        batch_size: int = 1024,
        group_size: int = 1,
        correlation: float = 0.0,
        child_probability: float | None = None,
        seed: int = 0,
        stream: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if group_size < 1 or n_features % group_size:
            raise ValueError(f"n_features={n_features}, group_size={group_size}: pass a group size that divides n_features")
        if not 0 <= correlation <= 1:
            raise ValueError(f"correlation={correlation}: pass a number from 0 to 1")
        if correlation and child_probability is not None:
            raise ValueError("correlation and child_probability: pass one of them")
        self.correlation, self.hierarchical = correlation, child_probability is not None
        relative = torch.ones(group_size)  # how often a feature fires, next to the first of its group
        relative[1:] = 1.0 if child_probability is None else child_probability
        first = active / (n_features / group_size * float(relative.sum()))
        if not 0 < first <= 1 or relative.max() > 1 or relative.min() < 0:
            raise ValueError(
                f"active={active} of n_features={n_features}, child_probability={child_probability}: "
                f"the first feature of a group would fire with probability {first:.3g}; pass what makes probabilities"
            )
        # the coin of a child is tossed where its parent fires
        coins = torch.cat([torch.tensor([first]), relative[1:] if self.hierarchical else first * relative[1:]])
        self.coins, self.magnitudes, self.batch_size, self.dtype = coins.to(device), magnitudes, batch_size, dtype
        features = torch.randn(n_features, d_in, generator=_generator("cpu", seed, 0))
        self.features = normalize(features, dim=1).to(device)
        """[n_features, d_in] unit norm"""
        self._generator = _generator(device, seed, 1 + stream)

    def codes(self, n: int) -> Tensor:
        """The next n true codes [n, n_features]."""
        shape = (n, self.features.shape[0] // len(self.coins), len(self.coins))
        toss = self._uniform(*shape)
        if self.correlation:  # a feature follows its group's toss with probability sqrt(correlation): two do with correlation
            follows = self._uniform(*shape) < sqrt(self.correlation)
            toss = torch.where(follows, self._uniform(n, shape[1], 1), toss)
        fires = toss < self.coins
        if self.hierarchical:
            fires[..., 1:] &= fires[..., :1]
        low, high = self.magnitudes
        return (fires * (low + (high - low) * self._uniform(*shape))).flatten(1)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n rows [n, d_in] and their codes."""
        codes = self.codes(n)
        return (codes @ self.features).to(self.dtype), codes

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.features.device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.sample(self.batch_size)[0]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])


def _generator(device: torch.device | str, *entropy: int) -> torch.Generator:
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


@torch.no_grad()
def mean_max_cosine(W_dec: Tensor, features: Tensor) -> float:
    """Mean over features [n, D] of the best cosine similarity that a latent, a row of W_dec [F, D], has with it."""
    features = normalize(features.float(), dim=1)
    best = features.new_full((len(features),), -1.0)
    for latents in W_dec.split(8192):  # bounds what is held at once
        best = best.maximum((normalize(latents.float(), dim=1) @ features.T).amax(0))
    return best.mean().item()


@torch.no_grad()
def matched_cosine(W_dec: Tensor, features: Tensor) -> float:
    """mean_max_cosine where a latent stands for one feature only, in the best such matching; unmatched features count 0.

    Holds [n, F] numbers, and takes the time of n shortest paths.
    """
    cosines = (normalize(features.double(), dim=1) @ normalize(W_dec.double(), dim=1).T).cpu().numpy()
    n, F = cosines.shape
    if n > F:
        cosines = cosines.T
    return float(cosines[np.arange(min(n, F)), _assignment(-cosines)].sum() / n)


def _assignment(cost: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The column of each row such that the sum of their costs [n, m], n <= m, is smallest (shortest augmenting paths)."""
    n, m = cost.shape
    u, v = np.zeros(n), np.zeros(m)  # cost - u - v is never negative, and 0 where matched
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    for start in range(n):
        distance, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        row, reached = start, 0.0
        while True:  # Dijkstra: to a column at its reduced cost, from a matched column to its row at none
            through = reached + cost[row] - u[row] - v
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], row
            column = int(np.where(done, np.inf, distance).argmin())
            reached = distance[column]
            if row_of[column] < 0:
                break
            done[column], row = True, row_of[column]
        u[start] += reached
        u[row_of[done]] += reached - distance[done]
        v[done] -= reached - distance[done]
        while True:  # along the path, each row leaves its column for the next
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
            if row == start:
                break
    return column_of
