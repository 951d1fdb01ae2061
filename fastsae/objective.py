"""The loss that a config describes, of one batch:

    loss = error + coefficient · sparsity + dead_coefficient · dead

Two ways lead to it. A code that is sparse goes entry by entry. One that is not (ReLU near initialisation is half full) goes
by chunks of latents, as GEMMs. Both are exact, and neither holds [N, F].
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import functional, losses, schedules
from .activations import JumpReLU, active, gather
from .config import TrainConfig
from .dead import DeadLatents, without_padding
from .functional import At
from .kernels.deferred import row_norms
from .normalize import NORMALIZE
from .sae import SAE

DEFAULT_SPARSITY = {"relu": "lp", "gated": "lp", "jumprelu": "l0"}
DEFAULT_DEAD = {"topk": "auxk", "abstopk": "auxk", "batchtopk": "auxk"}
NAMES = {
    "lp": "l1_loss",
    "l0": "l0_loss",
    "l0_to_target": "l0_loss",
    "l0_tanh": "l0_loss",
    "auxk": "auxiliary_reconstruction_loss",
    "auxk_normalised": "auxiliary_reconstruction_loss",
    "ghost": "ghost_grad_loss",
    "pre_act": "pre_act_loss",
}
"""SAELens' names of the terms."""


class Outcome(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]
    """The parts of the loss, detached, under SAELens' names."""
    fired: Tensor
    """[F] how often each latent fired."""
    sse: Tensor
    """[N] squared error of each row, detached."""


class Objective:
    def __init__(self, config: TrainConfig):
        self.activation, self.settings, self.steps = config.sae.activation, config.loss, config.steps
        self.sparsity, self.dead = self.settings.sparsity, self.settings.dead
        if self.sparsity == "auto":
            self.sparsity = DEFAULT_SPARSITY.get(self.activation, "none")
        if self.dead == "auto":
            self.dead = DEFAULT_DEAD.get(self.activation, "none")
        self.was_dense = False
        """Whether the last code was not sparse. It belongs to a run's state: the next one is then asked for in fewer rows."""
        needs_theta = self.sparsity.startswith("l0") and self.sparsity != "l0_tanh" or self.dead == "pre_act"
        if needs_theta and self.activation != "jumprelu":
            raise ValueError(
                f"sparsity={self.sparsity!r}, dead={self.dead!r} with activation={self.activation!r}: l0, l0_to_target and "
                "pre_act need jumprelu's thresholds; pass activation='jumprelu' or another term"
            )
        if self.activation == "gated" and self.sparsity not in ("lp", "none"):
            raise ValueError(f"sparsity={self.sparsity!r} with activation='gated': pass lp, which is of the gate, or none")
        if config.sae.normalize in NORMALIZE and self.dead in ("auxk", "auxk_normalised", "ghost"):
            raise ValueError(
                f"dead={self.dead!r} with normalize={config.sae.normalize!r}: the error is on another scale than the dead "
                "latents; pass dead='none' or 'resample', or normalize='expected_average_only_in'"
            )

    def __call__(self, sae: SAE, x: Tensor, target: Tensor, dead: DeadLatents | None, step: int) -> Outcome:
        """Of rows x [N, D] and their targets; `dead` are the latents to revive."""
        norms = row_norms(sae.W_dec) if self._uses_norms() else None
        found = self._by_entry(sae, x, target, norms, step) or self._by_chunk(sae, x, target, norms, step)
        mse = found.sse.mean(0).sum()
        loss = mse / losses.variance(target) if self.settings.error == "fvu" else mse
        terms = {"mse_loss": found.sse[:, -1].mean()}
        if found.gate_sse is not None:
            terms["auxiliary_reconstruction_loss"] = found.gate_sse.mean()
            loss = loss + terms["auxiliary_reconstruction_loss"]
        if found.cost is not None:
            terms[NAMES[self.sparsity]] = self.coefficient(step) * self._of_rows(found.cost, step)
            loss = loss + terms[NAMES[self.sparsity]]
        if dead is not None and self.dead in NAMES:
            terms[NAMES[self.dead]] = self.settings.dead_coefficient * self._revive(sae, x, found.error, dead)
            loss = loss + terms[NAMES[self.dead]]
        terms = {"overall_loss": loss, **terms}
        return Outcome(loss, {name: t.detach() for name, t in terms.items()}, found.fired, found.sse[:, -1].detach())

    def coefficient(self, step: int) -> float:
        """The weight of the sparsity term."""
        return self.settings.coefficient * schedules.warm_up(step, self.settings.warm_up)

    def coefficients(self, step: int) -> dict[str, float]:
        """The same under SAELens' name; nothing where there is no such term."""
        if self.sparsity == "none":
            return {}
        return {NAMES[self.sparsity].replace("loss", "coefficient"): self.coefficient(step)}

    def _by_entry(self, sae: SAE, x: Tensor, target: Tensor, norms: Tensor | None, step: int) -> "_Found | None":
        """None where the code is not sparse."""
        by_entry_only = bool(self.settings.prefixes or self.settings.ks)
        a_row, some = sae.d_sae * functional.SPARSE_BELOW, x[::8]
        if self.was_dense and not by_entry_only and sae.encode_sparse_within(some, int(some.shape[0] * a_row)) is None:
            return None
        code = sae.encode_sparse_within(x, None if by_entry_only else int(x.shape[0] * a_row), observe=True)
        self.was_dense = code is None
        if code is None:
            return None
        r = losses.reconstruct(sae, code, x, target, prefixes=self.settings.prefixes or None, ks=self.settings.ks or None)
        cost, gate_sse = None, None
        if self.sparsity != "none":
            cost = losses.per_row(code, self._cost(cast(Tensor, code.pre), code.values, gather(code), sae, norms, step))
        if self.activation == "gated":
            gate_sse = losses.reconstruct(sae, losses.gate(code), x, target, frozen=True).sse[:, -1]
        fires = (code.values.detach() != 0).to(torch.float32)
        fired = torch.zeros(sae.d_sae, device=x.device).index_add_(0, code.latents, fires)
        return _Found(r.error[:, -1], r.sse, cost, gate_sse, fired)

    def _by_chunk(self, sae: SAE, x: Tensor, target: Tensor, norms: Tensor | None, step: int) -> "_Found":
        fired, counting = torch.zeros(sae.d_sae, device=x.device), True

        def penalty(pre: Tensor, acts: Tensor, at: At) -> Tensor:
            if counting:  # backward comes by again
                at(fired).copy_(active(acts).sum(0, dtype=torch.float32))
            return torch.zeros_like(acts) if self.sparsity == "none" else self._cost(pre, acts, at, sae, norms, step)

        y, cost = losses.reconstruct_by_chunk(sae, x, target, sae.activation.activate, penalty)
        counting = False
        gate_sse = None
        if self.activation == "gated":
            via_gate, _ = losses.reconstruct_by_chunk(sae, x, target, lambda pre, at, b_enc: pre.relu(), frozen=True)
            gate_sse = via_gate.sse[:, -1]
        return _Found(y.error[:, -1], y.sse, None if self.sparsity == "none" else cost, gate_sse, fired)

    # ── sparsity: what an entry costs, and what is made of the sums over rows ────────────────────────────────────────────

    def _uses_norms(self) -> bool:
        return self.sparsity == "l0_tanh" or self.sparsity == "lp" and self.settings.weigh_by_norm

    def _p(self, step: int) -> float:
        first, last = self.settings.p, self.settings.p_end
        return first if last is None else schedules.anneal(step, 0, self.steps, first, last)

    def _cost(self, pre: Tensor, acts: Tensor, at: At, sae: SAE, norms: Tensor | None, step: int) -> Tensor:
        if self.sparsity in ("l0", "l0_to_target"):
            return losses.fires(pre, at, cast(JumpReLU, sae.activation))
        size = pre.relu() if self.activation == "gated" else acts
        if norms is not None:
            size = size * at(norms)
        if self.sparsity == "l0_tanh":
            return (self.settings.tanh_scale * size).tanh()
        return losses.power(size.abs(), self._p(step))

    def _of_rows(self, cost: Tensor, step: int) -> Tensor:
        if self.sparsity == "l0_to_target":
            return losses.l0_to_target(cost, cast(float, self.settings.target_l0))
        return (losses.power(cost, 1 / self._p(step)) if self.sparsity == "lp" else cost).mean()

    # ── dead latents ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _revive(self, sae: SAE, x: Tensor, error: Tensor, dead: DeadLatents) -> Tensor:
        part = losses.part(sae, x, dead.latents)
        magnitude = self.activation == "abstopk"
        if dead.padded:
            W_enc, b_enc, W_dec = without_padding(part.W_enc, part.b_enc, part.W_dec, dead.valid, magnitude)
            part = part._replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
        if self.dead == "auxk":
            k = self.settings.auxk or max(1, error.shape[-1] // 2)
            return dead.share(k, error.dtype) * losses.auxk(part, error, k, magnitude=magnitude, scaled=False)
        if self.dead == "auxk_normalised":
            return losses.auxk_normalised(part, error, self.settings.auxk)
        if self.dead == "ghost":
            return losses.ghost(part, error)
        return losses.pre_act(part, cast(JumpReLU, sae.activation).theta[dead.latents])


class _Found(NamedTuple):
    error: Tensor  # [N, D]
    sse: Tensor  # [N, P]
    cost: Tensor | None  # [N] a row's share of the sparsity term
    gate_sse: Tensor | None  # [N] squared error of the reconstruction from the gate
    fired: Tensor  # [F]
