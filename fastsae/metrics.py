"""What an SAE does on activations, by SAELens' definitions and names: sparsity, error, and how often each latent fires.

Sums run over batches in fp64, every row counts once, and nothing of shape [N, F] exists.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sae import SAE

HISTOGRAM = tuple(range(-10, 1))
"""Edges of the density histogram, powers of ten."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the rows of all batches, unless it says otherwise."""

    rows: int
    l0: float
    """Latents that fire."""
    l1: float
    """Σ |activation|"""
    mse: float
    """|x - x̂|²"""
    explained_variance: float
    """1 - mean |x - x̂|² / mean |x - mean x|²"""
    explained_variance_legacy: float
    """mean of 1 - |x - x̂|² / |x - mean of its batch|², as SAELens had it before"""
    cossim: float
    """cosine of x and x̂"""
    l2_norm_in: float
    l2_norm_out: float
    l2_ratio: float
    """|x̂| / |x|"""
    relative_reconstruction_bias: float
    """mean |x̂|² / mean x·x̂, of each batch"""
    feature_density: Tensor
    """[F] share of rows in which each latent fires"""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return 1 - self.explained_variance

    @property
    def dead(self) -> float:
        """Share of latents that never fired on these rows."""
        return float((self.feature_density == 0).double().mean())

    @property
    def dense(self) -> float:
        """Share of latents that fire in more than a tenth of rows."""
        return float((self.feature_density > 0.1).double().mean())

    def density_histogram(self) -> dict[str, int]:
        """Latents by log10 of their density; "never" are those that did not fire."""
        alive = self.feature_density[self.feature_density > 0].double().log10()
        counts = torch.histogram(alive.cpu(), torch.tensor(HISTOGRAM, dtype=torch.float64)).hist.int().tolist()
        names = [f"{low} to {low + 1}" for low in HISTOGRAM[:-1]]
        return {"never": int((self.feature_density == 0).sum()), **dict(zip(names, counts, strict=True))}

    def scalars(self) -> dict[str, float]:
        """All but the densities."""
        names = [name for name in self.__annotations__ if name != "feature_density"]
        return {**{n: float(getattr(self, n)) for n in names}, "fvu": self.fvu, "dead": self.dead, "dense": self.dense}


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Evaluation:
    """Of activations, or of (input, target) pairs for a transcoder, as the SAE is in eval mode."""
    training = sae.training
    sae.eval()
    try:
        return _evaluate(sae, batches)
    finally:
        sae.train(training)


def _evaluate(sae: SAE, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> Evaluation:
    rows = 0
    sums: dict[str, Tensor | float] = {}
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
    biases: list[Tensor] = []
    total: Tensor | float = 0.0  # [D] Σ target

    def add(**values: Tensor) -> None:
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum(dtype=torch.float64)

    for batch in batches:
        x, target = batch if isinstance(batch, tuple) else (batch, batch)
        x, target = x.reshape(-1, x.shape[-1]), target.reshape(-1, target.shape[-1])
        code = sae.encode_sparse(x)
        y = sae.decode(code, like=x)
        if sae.W_skip is not None:
            y = y + x @ sae.W_skip.T
        t, y = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (target, y))
        squared_error = (t - y).square().sum(1)
        norm_in, norm_out, dot = t.norm(dim=1), y.norm(dim=1), (t * y).sum(1)
        fires = code.values != 0
        add(
            l0=fires,
            l1=code.values.abs(),
            mse=squared_error,
            square=t.square(),
            explained_variance_legacy=1 - squared_error / (t - t.mean(0)).square().sum(1),
            cossim=dot / (norm_in * norm_out).clamp(min=torch.finfo(dot.dtype).tiny),
            l2_norm_in=norm_in,
            l2_norm_out=norm_out,
            l2_ratio=norm_out / torch.where(norm_in < 1e-4, 1, norm_in),
        )
        biases.append(norm_out.square().mean() / dot.mean())
        total = total + t.sum(0, dtype=torch.float64)
        fired.index_add_(0, code.latents, fires.long())
        rows += x.shape[0]

    if not rows:
        raise ValueError("there were no rows to evaluate: pass batches of activations [N, d_in]")
    means = {name: float(value) / rows for name, value in sums.items()}
    variance = means.pop("square") - float(torch.as_tensor(total).div(rows).square().sum())
    explained = 1 - means["mse"] / variance if variance > 1e-10 else float(means["mse"] < 1e-10)
    return Evaluation(
        rows=rows,
        explained_variance=explained,
        relative_reconstruction_bias=float(torch.stack(biases).mean()),
        feature_density=fired / rows,
        **means,
    )
