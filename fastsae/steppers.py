"""How gradients move an SAE's weights, two ways with one face:

    Fused     FusedAdam: no gradient is stored; with compute_dtype bfloat16 its weights are split, bf16 and what that lacks
    Stored    any optimizer of torch.optim on ordinary gradients; with a compute_dtype a copy computes and the original moves
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .optim import FusedAdam
from .resample import forget
from .sae import SAE
from .settings import unknown

UNFIT = {"Optimizer", "LBFGS", "SparseAdam", "Adafactor", "Muon"}
"""Of torch.optim, those that want a closure, sparse gradients, or other arguments than the rest."""


class Stepper(ABC):
    sae: SAE
    """What computes losses."""
    optimizer: torch.optim.Optimizer
    says: str
    """One line: how weights are updated, and why so."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.sae.W_dec.dtype

    @abstractmethod
    def step(self, fine: Tensor, lr: float) -> Tensor:
        """One update from the gradients that have come together, which are forgotten; none where `fine` [] is false.

        Returns whether there was one.
        """

    @abstractmethod
    def exact(self) -> SAE:
        """The SAE in the precision that the optimizer keeps."""

    @abstractmethod
    def edit(self) -> AbstractContextManager[SAE]:
        """`with stepper.edit() as sae:` changes weights by hand, in their full precision."""

    def release(self) -> None:
        """Leave the SAE to its new owner, with ordinary gradients."""
        self.optimizer.zero_grad()

    def forget(self, latents: Tensor) -> None:
        """Zero the moments of these latents."""
        forget(self.optimizer, self.moved(), latents)

    def moved(self) -> SAE:
        """The SAE whose parameters the optimizer holds."""
        return self.sae

    def skipped_rows(self) -> Tensor | int:
        """How many rows of a matrix kept their value because their own gradient was not finite."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"sae": self.moved().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moved().load_state_dict(state["sae"])
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class Fused(Stepper):
    def __init__(self, config: TrainConfig, sae: SAE):
        o = config.optim
        if o.compute_dtype not in (None, "bfloat16", config.sae.dtype):
            raise ValueError(
                f"compute_dtype={o.compute_dtype!r} with fused_adam: pass bfloat16, or none for the weights' own "
                f"{config.sae.dtype}, or another optimizer"
            )
        self.sae, self.split = sae, o.compute_dtype == "bfloat16"
        kept = "split into bf16 and what that lacks" if self.split else config.sae.dtype
        self.says = f"fused updates: no gradient of W_enc and W_dec is stored; weights {kept}, moments {o.moments}"
        self.optimizer = self.adam = FusedAdam(
            sae, 0.0, o.betas, o.eps, o.weight_decay, o.max_norm, config.sae.unit_norm,
            master="split" if self.split else "fp32", moments=o.moments, seed=config.seed,
        )  # fmt: skip

    def step(self, fine: Tensor, lr: float) -> Tensor:
        self._set_lr(lr)
        self.adam.step(finite=fine)
        self.adam.zero_grad()
        self.sae.activation.project()
        return self.adam.updated

    def release(self) -> None:
        self.adam.release()

    def skipped_rows(self) -> Tensor:
        return self.adam.skipped

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"skipped_rows": self.adam.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.adam.skipped.copy_(state["skipped_rows"])

    def exact(self) -> SAE:
        if not self.split:
            return self.sae
        whole = copy.deepcopy(self.sae).float()
        whole.load_state_dict({**whole.state_dict(), **self.adam.master_weights()})
        return whole

    @contextmanager
    def edit(self) -> Generator[SAE]:
        whole = self.exact()
        yield whole
        if self.split:
            self.adam.set_master_weights(dict(whole.named_parameters()))


class Stored(Stepper):
    def __init__(self, config: TrainConfig, sae: SAE):
        o = config.optim
        kinds = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
        kinds = {name: kind for name, kind in kinds.items() if name not in UNFIT}
        if o.optimizer not in kinds:
            raise ValueError(unknown(f"optimizer={o.optimizer}", o.optimizer, ["fused_adam", *sorted(kinds)]))
        kind = kinds[o.optimizer]
        self.says = f"stored gradients: torch.optim.{o.optimizer} needs them, optimizer=fused_adam does not"
        takes = inspect.signature(kind).parameters
        options: dict[str, Any] = {"lr": 0.0, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
        self.original, self.max_norm, self.unit_norm = sae, o.max_norm, config.sae.unit_norm
        self.optimizer = kind(sae.parameters(), **{name: v for name, v in options.items() if name in takes})
        narrow = None if o.compute_dtype is None else getattr(torch, o.compute_dtype)
        self.sae = sae if narrow in (None, sae.W_dec.dtype) else copy.deepcopy(sae).to(narrow)

    @torch.no_grad()
    def step(self, fine: Tensor, lr: float) -> Tensor:
        self._set_lr(lr)
        grads = self._gradients()
        if self.unit_norm and (g := self.original.W_dec.grad) is not None:
            W = self.original.W_dec
            g -= (g * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
        norm = torch.nn.utils.get_total_norm(grads)
        fine = fine & norm.isfinite()
        if fine:
            if self.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.original.parameters(), self.max_norm, norm)
            self.optimizer.step()
            if self.unit_norm:
                self.original.W_dec.div_(self.original.W_dec.norm(dim=1, keepdim=True))
            self.original.activation.project()
        self.original.zero_grad()
        self.sae.zero_grad()
        self._copy()
        return fine

    def _gradients(self) -> list[Tensor]:
        if self.sae is not self.original:
            for p, narrow in zip(self.original.parameters(), self.sae.parameters(), strict=True):
                p.grad = None if narrow.grad is None else torch.empty_like(p).copy_(narrow.grad)
        return [p.grad for p in self.original.parameters() if p.grad is not None]

    @torch.no_grad()
    def _copy(self) -> None:
        if self.sae is not self.original:
            for p, narrow in zip(self.original.parameters(), self.sae.parameters(), strict=True):
                narrow.copy_(p)

    def moved(self) -> SAE:
        return self.original

    def exact(self) -> SAE:
        if self.sae is not self.original:
            self.original.load_state_dict(dict(self.sae.named_buffers()), strict=False)  # what an activation observed
        return self.original

    @contextmanager
    def edit(self) -> Generator[SAE]:
        yield self.original
        self._copy()

    def state_dict(self) -> dict[str, Any]:
        self.exact()
        return super().state_dict()


def stepper(config: TrainConfig, sae: SAE) -> Stepper:
    return Fused(config, sae) if config.optim.optimizer == "fused_adam" else Stored(config, sae)
