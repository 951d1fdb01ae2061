"""One SAE in training: what a step does with a batch, what is counted, and what must be saved to go on.

A batch becomes (x, target), the objective a loss, the loss an update. On a GPU nothing is read back between log steps with
fused_adam: whether a loss was finite, which latents are dead and what was skipped stays on the device. (A code whose length
depends on the data costs one read, and so do resampling and stopping at what is not finite.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import losses, schedules
from .activations import BatchTopK, TopK
from .config import TrainConfig
from .data.origin import origin
from .data.source import Batch
from .dead import DeadLatents, dead_latents, slots_for
from .formats.parts import put_together, take_apart
from .initialise import build, default_dead_window, input_scale, learning_rate, set_b_dec
from .kernels import check
from .objective import Objective, Outcome
from .resample import resample
from .sae import SAE
from .steppers import stepper

MEMORY = 0.99
"""Of the running mean that a spike is measured against."""


class NonFinite(ArithmeticError):
    """A loss or gradient was not finite and the config says to stop."""


class Member:
    """`config` describes one SAE, without a sweep."""

    def __init__(self, config: TrainConfig, d_in: int, d_out: int | None, device: torch.device):
        self.config, self.device = config, device
        self.objective = Objective(config)
        self.origin = origin(config.data)
        self.stepper = stepper(config, build(config.sae, d_in, d_out, device, config.seed))
        self.sae = self.stepper.sae
        self.dead_window = config.loss.dead_window or default_dead_window(config.tokens)
        self.scale = 1.0
        """What the data are multiplied with (expected_average_only_in)."""
        F = self.sae.d_sae
        self.since_fired = torch.zeros(F, dtype=torch.int64, device=device)
        """[F] rows since each latent last fired."""
        self.mean_loss = torch.full((), torch.nan, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that a loss or gradient that is not finite, or a spike, made no update."""
        self.random = torch.Generator().manual_seed(config.seed)
        self.slots = 0
        """For dead latents, in a step."""
        self._window_fired = torch.zeros(F, dtype=torch.float64, device=device)
        self._window_rows = torch.zeros((), dtype=torch.int64, device=device)
        self._last: tuple[Outcome, Tensor] | None = None

    # ── a batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def view(self, batch: Batch, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(x, target) [N, D] of a batch for this SAE, layers side by side; in the dtype that it computes in unless given."""
        if isinstance(batch, dict):
            x = batch[self.config.data.hook]
            target = batch[self.config.data.target_hook] if self.config.data.target_hook else x
        else:
            x, target = batch if isinstance(batch, tuple) else (batch, batch)
        rows = x.to(self.device, dtype or self.stepper.dtype, non_blocking=True).flatten(1)
        return rows, rows if target is x else target.to(rows.device, rows.dtype, non_blocking=True).flatten(1)

    def start(self, batches: Sequence[Batch]) -> None:
        """Take from the first batches what the config takes from data."""
        if self.config.sae.normalize == "expected_average_only_in":
            self.scale = input_scale([self.view(b)[0] for b in batches])
        with self.stepper.edit() as sae:
            set_b_dec(sae, self.config.sae.b_dec, [self.view(b)[1] * self.scale for b in batches])

    def needs_start(self) -> bool:
        return self.config.sae.normalize == "expected_average_only_in" or self.config.sae.b_dec != "zero"

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, batch: Batch, step: int) -> None:
        x, target = self.view(batch)
        if self.scale != 1:
            x, target = x * self.scale, x * self.scale if target is x else target * self.scale
        sae = self.sae.train()
        self._set_k(step)
        if self.device.type == "cpu" and not (check.all_finite(sae.encoder_input(x)) and check.all_finite(target)):
            self._refuse(step)  # a GPU says so by its loss
            return
        dead = self._dead(step)
        observed = [buffer.clone() for buffer in sae.activation.buffers()]
        outcomes: list[Outcome] = []
        size = self.config.optim.micro_batch or x.shape[0]
        for rows, goal in zip(x.split(size), target.split(size), strict=True):
            outcome = self.objective(sae, rows, goal, dead, step)
            (outcome.loss * (rows.shape[0] / x.shape[0])).backward()
            outcomes.append(outcome)
        self._last = outcomes[-1], target[-outcomes[-1].sse.shape[0] :]

        loss = torch.stack([o.loss.detach().double() for o in outcomes]).mean()
        fine = loss.isfinite()
        if (spike := self.config.optim.spike) is not None:  # without a mean, NaN, nothing is one
            fine = fine & ~(loss > spike * self.mean_loss)
        stop = self.config.optim.on_nonfinite == "stop"
        if stop and not loss.isfinite():
            raise NonFinite(f"the loss of step {step} is {float(loss)}: the weights stay as they were; lower lr")
        updated = self.stepper.step(fine, self._lr(step))
        if stop and (fine & ~updated or self.stepper.skipped_rows() > 0):
            raise NonFinite(f"a gradient of step {step} is not finite: no weight has seen it; lower lr")
        self._remember(loss)
        for buffer, before in zip(sae.activation.buffers(), observed, strict=True):
            buffer.copy_(torch.where(updated, buffer, before))
        self._count(outcomes, x.shape[0], updated)
        self._resample(step, x, target, outcomes, updated)

    def _remember(self, loss: Tensor) -> None:
        """A spike counts as the least one, so that what stays is soon none."""
        spike, mean = self.config.optim.spike, self.mean_loss
        after = MEMORY * mean + (1 - MEMORY) * (loss if spike is None else loss.minimum(spike * mean))
        self.mean_loss = torch.where(loss.isfinite(), torch.where(mean.isnan(), loss, after), mean)

    def _refuse(self, step: int) -> None:
        if self.config.optim.on_nonfinite == "stop":
            raise NonFinite(f"the activations of step {step} are not finite: the weights stay as they were; look at the data")
        self.skipped += 1

    def _lr(self, step: int) -> float:
        o, total = self.config.optim, self.config.steps
        factor = schedules.warm_up(step + 1, o.lr_warm_up) * schedules.decay(step, max(0, total - o.lr_decay), total)
        return learning_rate(o, self.sae.d_sae) * factor

    def _set_k(self, step: int) -> None:
        o = self.config.optim
        if o.k_first is not None and isinstance(self.sae.activation, TopK):
            self.sae.activation.k = round(schedules.anneal(step, 0, o.k_steps, o.k_first, self.config.sae.k))

    @property
    def _is_dead(self) -> Tensor:
        """[F] bool"""
        return self.since_fired > self.dead_window

    def _dead(self, step: int) -> DeadLatents | None:
        if self.objective.dead in ("none", "resample"):
            return None
        if self.device.type == "cpu":  # counting costs nothing; on a GPU the count of the last log step must do
            self.slots = min(int(self._is_dead.sum()), self.config.loss.dead_cap)
        found = dead_latents(self.since_fired, self.dead_window + 1, min(self.slots, self.sae.d_sae), step)
        return found._replace(padded=self.device.type != "cpu")

    @torch.no_grad()
    def _count(self, outcomes: Sequence[Outcome], rows: int, updated: Tensor) -> None:
        """A batch that made no update is counted as skipped and nowhere else."""
        fired = torch.stack([o.fired for o in outcomes]).sum(0)
        since_fired = torch.where(fired > 0, 0, self.since_fired + rows)
        self.since_fired = torch.where(updated, since_fired, self.since_fired)
        self._window_fired += fired * updated
        self._window_rows += rows * updated
        self.skipped += ~updated

    def _resample(self, step: int, x: Tensor, target: Tensor, outcomes: Sequence[Outcome], updated: Tensor) -> None:
        if self.objective.dead != "resample":
            return
        every = self.config.loss.resample_every or self.dead_window
        batch = self.config.batch_size
        if (step + 1) * batch // every == step * batch // every or not updated:
            return
        dead = self._is_dead.nonzero().squeeze(1)[: self.config.loss.dead_cap]
        sse = torch.cat([o.sse for o in outcomes])
        with self.stepper.edit() as sae:
            resample(sae, dead, x.to(sae.W_dec.dtype), target.to(sae.W_dec.dtype), sse, self.random)
        self.stepper.forget(dead)
        self.since_fired[dead] = 0

    # ── what is said and what is kept ────────────────────────────────────────────────────────────────────────────────────

    def measure(self, step: int) -> dict[str, float]:
        """After `step` steps, under SAELens' names: losses of the last batch, L0 and frequencies since this was last called.

        Learning rate and coefficients are, as there, those of the step to come. Reads the device.
        """
        if self._last is None:
            return {"sparsity/skipped_steps": float(self.skipped)}
        outcome, target = self._last
        variances = losses.row_variances(target)
        explained = 1 - outcome.sse / variances
        frequency = self._window_fired / self._window_rows.clamp(min=1)
        found = {f"losses/{name}": float(value) for name, value in outcome.terms.items()}
        found |= {
            "metrics/explained_variance": 1 - float(outcome.sse.mean()) / max(float(variances.mean()), 1e-30),
            "metrics/explained_variance_legacy": float(explained.mean()),
            "metrics/explained_variance_legacy_std": float(explained.std()),
            "metrics/l0": float(frequency.sum()),
            "metrics/mean_log10_feature_sparsity": float((frequency + 1e-10).log10().mean()),
            "sparsity/mean_passes_since_fired": float(self.since_fired.double().mean()) / self.config.batch_size,
            "sparsity/dead_features": float(self._is_dead.sum()),
            "sparsity/below_1e-5": float((frequency < 1e-5).sum()),
            "sparsity/below_1e-6": float((frequency < 1e-6).sum()),
            "sparsity/skipped_steps": float(self.skipped),
            "sparsity/skipped_rows": float(self.stepper.skipped_rows()),
            "details/current_learning_rate": self._lr(step),
            "details/n_training_samples": float(step * self.config.batch_size),
        }
        found |= {f"details/{name}": value for name, value in self.objective.coefficients(step).items()}
        if isinstance(self.sae.activation, BatchTopK):
            found["metrics/topk_threshold"] = float(self.sae.activation.threshold)
        self.slots = slots_for(int(found["sparsity/dead_features"]), self.config.loss.dead_cap)
        self._window_fired.zero_()
        self._window_rows.zero_()
        return found

    def finished(self) -> SAE:
        """The SAE with its exact weights, taking activations as they are: a scale of the input is folded in."""
        sae = self.stepper.exact()
        return sae if self.scale == 1 else put_together(take_apart(sae, input_scale=self.scale), self.device)

    def metadata(self, step: int) -> dict[str, Any]:
        """Where the SAE belongs, under SAELens' names."""
        return {"training_step": step, **self.origin}

    def state_dict(self) -> dict[str, Any]:
        return {
            "d_in": self.sae.d_in,
            "d_out": self.sae.d_out if self.sae.transcodes else None,
            "weights": self.stepper.state_dict(),
            "scale": self.scale,
            "since_fired": self.since_fired,
            "mean_loss": self.mean_loss,
            "skipped": self.skipped,
            "slots": self.slots,
            "was_dense": self.objective.was_dense,
            "random": self.random.get_state(),
            "window_fired": self._window_fired,
            "window_rows": int(self._window_rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stepper.load_state_dict(state["weights"])
        self.scale, self.slots = state["scale"], state["slots"]
        self.objective.was_dense = state.get("was_dense", False)  # not in checkpoints before it mattered
        for name in ("since_fired", "mean_loss", "skipped"):
            setattr(self, name, state[name].to(self.device))
        self.random.set_state(state["random"])
        self._window_fired = state["window_fired"].to(self.device)
        self._window_rows.fill_(state["window_rows"])
