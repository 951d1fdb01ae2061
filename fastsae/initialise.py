"""How a run's SAE starts: from its config, and what of it is taken from data."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from .config import OptimConfig, SAEConfig
from .normalize import NORMALIZE
from .sae import SAE

ACTIVATIONS: dict[str, Callable[[SAEConfig], Activation]] = {
    "topk": lambda c: TopK(c.k),
    "abstopk": lambda c: AbsTopK(c.k),
    "batchtopk": lambda c: BatchTopK(c.k),
    "jumprelu": lambda c: JumpReLU(c.theta, c.bandwidth, c.ste_to_input),
    "relu": lambda c: ReLU(),
    "gated": lambda c: Gated(),
}


def build(config: SAEConfig, d_in: int, d_out: int | None, device: torch.device, seed: int) -> SAE:
    """A new SAE; the seed alone decides its weights, and no generator of anybody else's moves."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        sae = SAE(
            d_in,
            config.d_sae or config.expansion * d_in,
            ACTIVATIONS[config.activation](config),
            d_out=d_out,
            skip=config.skip,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            decoder_norm=1.0 if config.unit_norm else config.decoder_norm,
            rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm and config.activation.endswith("topk"),
            normalize=config.normalize if config.normalize in NORMALIZE else "none",
            device=device,
            dtype=getattr(torch, config.dtype),
        )
    return sae


def default_lr(d_sae: int) -> float:
    """2e-3 at 16,384 latents, and falling with the root of the width. Batches of 1,024 rows chose it (docs/log.md)."""
    return 2e-3 / math.sqrt(d_sae / 16384)


def learning_rate(config: OptimConfig, d_sae: int) -> float:
    return default_lr(d_sae) if config.lr is None else config.lr


def default_dead_window(tokens: int) -> int:
    """Tokens without firing after which a latent counts as dead: 10,000,000, but a tenth of a short run."""
    return max(1, min(10_000_000, tokens // 10))


def geometric_median(rows: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to rows [N, D], by Weiszfeld's iteration."""
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(steps):
        weights = 1 / (rows - point).norm(dim=1).clamp(min=1e-12)
        last, point = point, weights @ rows / weights.sum()
        if (point - last).norm() <= tolerance * point.norm():
            break
    return point


def set_b_dec(sae: SAE, how: str, targets: Sequence[Tensor]) -> None:
    """b_dec := mean or geometric median of what the decoder is to give, as the first batches show it."""
    if how == "zero":
        return
    rows = torch.cat([t.reshape(-1, t.shape[-1]) for t in targets])
    if sae.normalize != "none":
        rows = NORMALIZE[sae.normalize](rows).row
    point = rows.double().mean(0) if how == "mean" else geometric_median(rows)
    with torch.no_grad():
        sae.b_dec.copy_(point)


def input_scale(batches: Sequence[Tensor]) -> float:
    """√D / mean |x|, which brings the average norm to √D (SAELens' expected_average_only_in)."""
    norms = torch.cat([x.reshape(-1, x.shape[-1]).double().norm(dim=1) for x in batches])
    return batches[0].shape[-1] ** 0.5 / float(norms.mean())
