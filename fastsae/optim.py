"""FusedAdam: torch.optim.Adam on an SAE whose two large gradients are never stored.

    optimizer = FusedAdam(sae, lr=3e-4)
    loss.backward()       # W_enc and W_dec get factors instead of .grad (kernels/deferred.py)
    optimizer.step()      # row by row: gradient, projection, Adam, unit norm (kernels/update.py)

Any loss works. Several backward passes before a step add up, as they do in torch. Where a weight and its two moments are kept:

    master    moments    bytes per parameter    the step
    "fp32"    "fp32"     12 = 4 + 4 + 4         torch.optim.Adam's
    "split"   "fp32"     12 = 2 + 2 + 4 + 4     torch.optim.Adam's on fp32 weights, of which the SAE computes with the bf16
                                                halves: operands for a bf16 GEMM, at no bytes of their own
    "fp32"    "bf16"      8 = 4 + 2 + 2         moments rounded at random, so right on average: the same loss, other bits
    "split"   "bf16"      8 = 2 + 2 + 2 + 2     both

"fp32" means fp64 where the SAE is fp64. Everything but the two matrices has fp32 moments.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from .kernels.backend import accumulator
from .kernels.by_latent import sort_by_latent
from .kernels.deferred import Deferred
from .kernels.halves import joined, split
from .kernels.update import gradient_squares, update_rows
from .sae import SAE

MOMENTS = ("exp_avg", "exp_avg_sq")


class FusedAdam(torch.optim.Optimizer):
    """Adam as torch has it (L2 weight decay), with the decoder optionally kept at unit norm.

    `max_norm` clips the global norm of all gradients, exactly, by a second pass over the factors. `unit_norm` removes the
    part of W_dec's gradient along each row and renormalises the row after the update.

    A gradient that is not finite moves no weight. Where `max_norm` asks for the norm of them all, the whole step is left out:
    `updated`, on the device, says whether the last one was made. Otherwise the row, or the small parameter, that it belongs to
    keeps its value: `skipped` counts them, on the device.

    With `master="split"` the SAE becomes bf16, in place, and what rounding takes from its parameters is kept here.
    `seed` is for the rounding of bf16 moments, which is a function of it, the step, row and column.
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
        master: Literal["fp32", "split"] = "fp32",
        moments: Literal["fp32", "bf16"] = "fp32",
        seed: int = 0,
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            came = f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            raise ValueError(f"{came}: pass lr, eps and weight_decay >= 0 and 0 <= beta < 1")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm}: pass a norm > 0, or None for no clipping")
        for name, choice, choices in (("master", master, ("fp32", "split")), ("moments", moments, ("fp32", "bf16"))):
            if choice not in choices:
                raise ValueError(f"{name}={choice!r}: pass one of {', '.join(map(repr, choices))}")
        if not 0 <= seed < 2**30:
            raise ValueError(f"seed={seed}: pass a whole number from 0 to 2^30 - 1")
        dtype = sae.W_dec.dtype
        if master == "fp32" and dtype not in (torch.float32, torch.float64):
            raise TypeError(f"the SAE is {dtype}: FusedAdam steps float32 weights; use sae.float(), or pass master='split'")
        if master == "split" and dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"the SAE is {dtype}: master='split' takes float32 or bfloat16; use sae.float()")
        if moments == "bf16" and dtype == torch.float64:
            raise TypeError("the SAE is torch.float64: moments='bf16' takes float32 or bfloat16; use sae.float()")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(sae.parameters(), {**options, "master": master, "moments": moments, "seed": seed})
        self.sae, self.max_norm, self.unit_norm = sae, max_norm, unit_norm
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.W_dec.device)
        self.updated = torch.zeros((), dtype=torch.bool, device=sae.W_dec.device)
        if master == "split":
            for p in sae.parameters():
                whole = p.data
                p.data = torch.empty_like(whole, dtype=torch.bfloat16)
                self.state[p]["low"] = torch.empty_like(whole, dtype=torch.int16)
                self._set(p, whole)
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

    def master_weights(self) -> dict[str, Tensor]:
        """The SAE's parameters by name, exactly: what to save. Split ones are joined, others are the parameters' own memory."""
        return {name: self._whole(p) for name, p in self.sae.named_parameters()}

    @torch.no_grad()
    def set_master_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The opposite: these parameters become exactly that."""
        for name, p in self.sae.named_parameters():
            if name in weights:
                self._set(p, weights[name].detach())

    def _set(self, p: Tensor, whole: Tensor) -> None:
        state = self.state.get(p, {})
        if "low" in state:
            split(whole.float(), p.data, state["low"])
        else:
            p.data.copy_(whole)

    def _whole(self, p: Tensor) -> Tensor:
        state = self.state.get(p, {})
        return joined(p.detach(), state["low"]) if "low" in state else p.detach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but of the same formats only, and laid out like the parameters whatever layout it was saved in."""
        group, saved = self.param_groups[0], state_dict["param_groups"][0]
        for name in ("master", "moments"):
            if saved[name] != group[name]:
                raise ValueError(f"the state was saved with {name}={saved[name]!r}: pass that instead of {group[name]!r}")
        super().load_state_dict({**state_dict, "state": {}})  # torch's would round it all to the parameters' dtype
        for number, state in state_dict["state"].items():
            p = self.param_groups[0]["params"][int(number)]
            for name, t in state.items():
                like = t.new_empty((), device=p.device) if name == "step" else torch.empty_like(p, dtype=t.dtype)
                self.state[p][name] = like.copy_(t)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """p's state, which starts at the first step."""
        state = self.state[p]
        if "step" not in state:
            narrow = self.param_groups[0]["moments"] == "bf16" and (p is self.sae.W_enc or p is self.sae.W_dec)
            dtype = torch.bfloat16 if narrow else accumulator(p.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state.update({name: torch.zeros_like(p, dtype=dtype) for name in MOMENTS})
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
                matrices.append(_Matrix(W, rows, self._state(W), self.unit_norm and W is sae.W_dec))
        small = [p for p in group["params"] if p.grad is not None and p is not sae.W_enc and p is not sae.W_dec]

        clip = torch.ones((), device=live.device, dtype=accumulator(sae.W_dec.dtype))
        if self.max_norm is not None:
            squares = [m.squares() for m in matrices] + [p.grad.to(clip.dtype).square().sum() for p in small]
            norm = torch.stack(squares).sum().sqrt()
            live = live * norm.isfinite()
            clip = (self.max_norm / (norm + 1e-6)).clamp(max=1)
        self.updated = live.bool()
        for i, m in enumerate(matrices):
            self.skipped += m.update(group, 2 * group["seed"] + i, live, clip)
        for p in small:
            self.skipped += self._update_small(p, group, live, clip)
        return loss

    def _update_small(self, p: Tensor, group: dict[str, Any], live: Tensor, clip: Tensor) -> Tensor:
        state, whole = self._state(p), self._whole(p)
        grad = p.grad.to(whole.dtype) * clip  # type: ignore[union-attr]
        ok = live * torch.isfinite(grad).all()
        adam(
            [whole], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, found_inf=1 - ok, amsgrad=False, maximize=False, lr=group["lr"], eps=group["eps"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
        )  # fmt: skip
        if "low" in state:
            self._set(p, whole)
        return (live - ok).long()


class _Matrix:
    """W_enc or W_dec [F, D] with its state and what has been deferred to it."""

    def __init__(self, parameter: nn.Parameter, rows: Tensor, state: dict[str, Tensor], unit_norm: bool):
        waiting: Deferred = parameter.deferred  # type: ignore[attr-defined]
        self.rows, self.state = rows, state
        self.factors = waiting.joined(rows)
        self.index = self.factors.by_latent or sort_by_latent(self.factors.latents, rows.shape[0])
        self.transposed = rows.shape != parameter.shape or rows.stride() != parameter.stride()
        self.extra: dict[str, Any] = {
            "stored": None if parameter.grad is None else self._as_rows(parameter.grad).contiguous(),
            "dnorm": waiting.dnorm,
            "unit_norm": unit_norm,
            "low": self._as_rows(state["low"]) if "low" in state else None,
        }

    def _as_rows(self, t: Tensor) -> Tensor:
        return t.T if self.transposed else t

    def squares(self) -> Tensor:
        return gradient_squares(self.factors, self.index, self.rows, **self.extra).sum()

    def update(self, group: dict[str, Any], seed: int, live: Tensor, clip: Tensor) -> Tensor:
        self.state["step"] += live
        t = self.state["step"].double()
        beta1, beta2 = group["betas"]
        scalars = torch.stack([1 - beta1**t, (1 - beta2**t).sqrt(), clip.double(), live.double(), t])
        m, v = (self._as_rows(self.state[name]) for name in MOMENTS)
        skipped = update_rows(
            self.factors, self.index, self.rows, m, v, scalars.to(accumulator(self.rows.dtype)),
            group["lr"], group["betas"], group["eps"], group["weight_decay"], **self.extra, seed=seed,
        )  # fmt: skip
        return (skipped.sum() * live).long()
