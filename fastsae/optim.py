"""FusedAdam: torch.optim.Adam on an SAE whose two large gradients are never stored.

    optimizer = FusedAdam(sae, lr=3e-4)
    loss.backward()       # W_enc and W_dec get factors instead of .grad (kernels/deferred.py)
    optimizer.step()      # row by row: gradient, projection, Adam, unit norm (kernels/update.py)

Any loss works. Several backward passes before a step add up, as they do in torch.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from .kernels.by_latent import sort_by_latent
from .kernels.deferred import Deferred
from .kernels.update import gradient_squares, update_rows
from .sae import SAE


class FusedAdam(torch.optim.Optimizer):
    """Adam as torch has it (L2 weight decay), with the decoder optionally kept at unit norm.

    `max_norm` clips the global norm of all gradients, exactly, by a second pass over the factors. `unit_norm` removes the
    part of W_dec's gradient along each row and renormalises the row after the update. A row, or a small parameter, whose
    gradient is not finite keeps its value: `skipped` counts them, on the device.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        unit_norm: bool = False,
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            came = f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            raise ValueError(f"{came}: pass lr, eps and weight_decay >= 0 and 0 <= beta < 1")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}: pass a norm > 0, or None for no clipping")
        if sae.W_dec.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the SAE is {sae.W_dec.dtype}: FusedAdam steps float32 weights; use sae.float()")
        super().__init__(sae.parameters(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.sae, self.max_norm, self.unit_norm = sae, max_norm, unit_norm
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.W_dec.device)
        for W in (sae.W_enc, sae.W_dec):
            W.deferred = Deferred()  # type: ignore[attr-defined]

    def release(self) -> None:
        """Give the matrices their `.grad` back."""
        for W in (self.sae.W_enc, self.sae.W_dec):
            del W.deferred  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for W in (self.sae.W_enc, self.sae.W_dec):
            W.deferred.clear()  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, with moments laid out like their parameters whatever layout they were saved in."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(p).copy_(state[name])

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    @overload
    def step(self, closure: None = None, finite: Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], finite: Tensor | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, finite: Tensor | None = None) -> float | None:
        """One update. `finite` (a device flag, usually loss.isfinite()) predicates all of it without being read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, sae = self.param_groups[0], self.sae
        live = torch.ones((), device=sae.W_dec.device) if finite is None else finite.to(torch.float32)
        matrices: list[_Matrix] = []
        for W, rows in ((sae.W_enc, sae.W_enc.T), (sae.W_dec, sae.W_dec)):
            if W.requires_grad and (W.deferred or W.grad is not None):  # type: ignore[attr-defined]
                matrices.append(_Matrix(W, rows, self.unit_norm and W is sae.W_dec))
        small = [p for p in group["params"] if p.grad is not None and p is not sae.W_enc and p is not sae.W_dec]

        clip = torch.ones((), device=live.device)
        if self.max_norm is not None:
            squares = [m.squares() for m in matrices] + [p.grad.square().sum() for p in small]
            clip = (self.max_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1)
        for m in matrices:
            self.skipped += m.update(self._moments(m.parameter), group, live, clip)
        for p in small:
            state = self._moments(p)
            grad = p.grad * clip
            ok = live * torch.isfinite(grad).all()
            adam(
                [p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                fused=True, found_inf=1 - ok, amsgrad=False, maximize=False, lr=group["lr"], eps=group["eps"],
                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            )  # fmt: skip
            self.skipped += (live - ok).long()
        return loss


class _Matrix:
    """W_enc or W_dec [F, D] with what has been deferred to it."""

    def __init__(self, parameter: nn.Parameter, rows: Tensor, unit_norm: bool):
        waiting: Deferred = parameter.deferred  # type: ignore[attr-defined]
        self.parameter, self.rows = parameter, rows
        self.factors = waiting.joined(rows)
        self.index = self.factors.by_latent or sort_by_latent(self.factors.latents, rows.shape[0])
        self.transposed = rows.shape != parameter.shape or rows.stride() != parameter.stride()
        self.extra: dict[str, Any] = {
            "stored": None if parameter.grad is None else self._as_rows(parameter.grad).contiguous(),
            "dnorm": waiting.dnorm,
            "unit_norm": unit_norm,
        }

    def _as_rows(self, t: Tensor) -> Tensor:
        return t.T if self.transposed else t

    def squares(self) -> Tensor:
        return gradient_squares(self.factors, self.index, self.rows, **self.extra).sum()

    def update(self, state: dict[str, Tensor], group: dict[str, Any], live: Tensor, clip: Tensor) -> Tensor:
        state["step"] += live
        t = state["step"].double()
        beta1, beta2 = group["betas"]
        scalars = torch.stack([1 - beta1**t, (1 - beta2**t).sqrt(), clip.double(), live.double(), t]).to(self.rows.dtype)
        m, v = (self._as_rows(state[name]) for name in ("exp_avg", "exp_avg_sq"))
        skipped = update_rows(
            self.factors, self.index, self.rows, m, v, scalars,
            group["lr"], group["betas"], group["eps"], group["weight_decay"], **self.extra,
        )  # fmt: skip
        return (skipped.sum() * live).long()
