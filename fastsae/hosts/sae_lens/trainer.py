"""SAETrainer: fused Adam where memory layouts agree, with gradient clipping inside its pass.

Adam and clipping are the same numbers in fewer passes over [F, D]. The optimizer's state is what torch's Adam has, in the
same order, so `trainer_state.pt` loads both ways.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam


def replacements() -> list[tuple[object, str, Any]]:
    trainer: Any = import_module("sae_lens.training.sae_trainer")
    step = _train_step(trainer.SAETrainer._train_step)
    return [(trainer, "Adam", LayoutAwareAdam), (trainer.SAETrainer, "_train_step", step)]


class LayoutAwareAdam(Adam):
    """torch.optim.Adam, fused in each step where parameters, gradients and moments are laid out alike.

    torch's fused Adam walks memory and never asks for strides: where they differ it computes something else.
    """

    max_norm: float | None = None
    """What the next step clips the norm of all gradients to"""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            group["fused"] = None
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            state["step"] = state["step"].to(p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.empty_like(p).copy_(state[name])

    def _alike(self, p: Tensor) -> bool:
        moments = (self.state[p][name] for name in ("exp_avg", "exp_avg_sq") if self.state[p])
        return p.device.type in ("cpu", "cuda") and all(t.stride() == p.stride() for t in (p.grad, *moments) if t is not None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        fused = all(self._alike(p) for p in parameters)
        for group in self.param_groups:
            group["fused"] = fused
        if self.max_norm is not None:
            if fused and all(p.dtype != torch.float64 for p in parameters):  # the scale below is fp32
                total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                self.grad_scale = ((total.float() + 1e-6) / self.max_norm).clamp(min=1)  # clip_grad_norm_'s factor, inverted
            else:
                torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        try:
            return super().step(closure)
        finally:
            self.grad_scale = self.max_norm = None


def _train_step(stock: Callable[..., Any]) -> Callable[..., Any]:
    step_input: Any = import_module("sae_lens.saes.sae").TrainStepInput

    @wraps(stock)
    def train_step(self: Any, sae: Any, sae_in: Tensor) -> Any:
        if type(self.optimizer) is not LayoutAwareAdam:
            return stock(self, sae, sae_in)
        sae.train()
        with self.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                step_input=step_input(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                )
            )
        with torch.no_grad():
            fired = output.feature_acts.bool().float().sum(0)
            fired = fired.to_dense() if fired.is_sparse else fired
            self.n_forward_passes_since_fired += 1
            self.n_forward_passes_since_fired.masked_fill_(fired.bool(), 0)
            self.act_freq_scores += fired
            self.n_frac_active_samples += self.cfg.train_batch_size_samples
        output.loss.backward()
        self.optimizer.max_norm = 1.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    return train_step
