"""What a provider is given and what it gives back.

Every provider gets the same weights, which it copies into its own class, and the same inputs. `Job.call` is what is
timed. `Job.observe` makes one such call and returns what it computed under common names and layouts, for check.py.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..cases import Case, Shape
from ..measure import PRECISIONS


class Unsupported(Exception):
    """The provider has no such thing: a skipped row, with the message as its reason."""


@dataclass
class Weights:
    """Rows of W_dec are unit-norm and W_enc is its transpose, as all libraries start."""

    W_enc: Tensor
    """[D, F], in memory latent by latent"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, D]"""
    b_dec: Tensor
    """[D]"""


@dataclass(frozen=True)
class Task:
    case: Case
    shape: Shape
    precision: str
    device: torch.device
    brief: bool = False
    """part of a sweep or a smoke run: nothing that takes longer to prepare than to measure"""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def threshold(self) -> float:
        """Over which k of F standard normal pre-activations lie."""
        return math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * self.shape.k / self.shape.F, dtype=torch.float64)))

    def weights(self) -> Weights:
        """Drawn anew by each caller, the same values every time: no second copy stays in memory."""
        generator = torch.Generator(self.device).manual_seed(0)
        D, F = self.shape.D, self.shape.F

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype)

        W = nn.functional.normalize(normal(F, D))
        # a bias that leaves k latents of a ReLU code alive; elsewhere a small one, so that forgetting it shows
        b_enc = normal(F) * 0.05 - (self.threshold if self.case.activation == "ReLU" else 0.0)
        return Weights(W.T, b_enc, W, normal(D) * 0.1)

    def inputs(self, count: int) -> list[Any]:
        """Rows x [N, D], or for decode (values [N, k], latents [N, k] ascending)."""
        generator = torch.Generator(self.device).manual_seed(1)
        N, D, F, k = self.shape.N, self.shape.D, self.shape.F, self.shape.k

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype)

        if self.case.work != "decode":
            return [normal(N, D) for _ in range(count)]
        # one latent from each of k equal ranges: distinct, ascending and spread over all of them
        low = torch.arange(k, device=self.device) * (F // k)
        draw = [torch.randint(F // k, (N, k), generator=generator, device=self.device) + low for _ in range(count)]
        return [(normal(N, k).abs(), latents) for latents in draw]

    def input_bytes(self) -> int:
        # for decode, what a dense library is given
        width = self.shape.F if self.case.work == "decode" else self.shape.D
        return self.shape.N * width * self.dtype.itemsize


@dataclass
class Job:
    call: Callable[[Any], Any]
    observe: Callable[[Any], dict[str, Tensor]]
    prepare: Callable[[Any], Any] = lambda given: given
    """from a task's input to what `call` takes; not timed"""
    before_update: tuple[str, ...] = ()
    """what a training step does to gradients before the optimizer sees them: "project", "clip", in this order"""
    note: str = ""


class Provider:
    name: str
    ceiling = False
    """a bound on what anyone can reach, not a competitor"""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        return None

    def job(self, task: Task) -> Job:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------ building blocks

Gradients = Mapping[str, tuple[nn.Parameter, bool]]
"""common name -> (parameter, whether the common layout is its transpose)"""


def forward_job(call: Callable[[Any], Any], name: str, dense: Callable[[Any], Tensor] = lambda y: y, **more: Any) -> Job:
    prepare = more.get("prepare", lambda given: given)
    return Job(call, lambda given: {name: dense(call(prepare(given)))}, **more)


def loss_job(loss: Callable[[Tensor], Tensor], parameters: Gradients, unit: Callable[[Tensor], float] = lambda x: 1.0) -> Job:
    """Forward and backward from clean gradients. `unit` is one unit of this library's loss in mean squared errors."""

    def call(x: Tensor) -> Tensor:
        for parameter, _ in parameters.values():
            parameter.grad = None
        value = loss(x)
        value.backward()
        return value

    def observe(x: Tensor) -> dict[str, Tensor]:
        value = call(x).detach()
        found = {"loss": value} | _in_common(parameters, {name: p.grad for name, (p, _) in parameters.items()})
        return {name: t * unit(x) for name, t in found.items()}

    return Job(call, observe)


def step_job(
    call: Callable[[Tensor], Any], parameters: Gradients, before_update: tuple[str, ...] = (),
    unit: Callable[[Tensor], float] = lambda x: 1.0, note: str = "",
) -> Job:  # fmt: skip
    """A whole training step. Observed are the gradients that its optimizer gets, and whether every parameter moved."""

    def observe(x: Tensor) -> dict[str, Tensor]:
        before = {name: p.detach().clone() for name, (p, _) in parameters.items()}
        with gradients_at_step() as seen:
            call(x)
        found = _in_common(parameters, {name: seen.get(id(p)) for name, (p, _) in parameters.items()})
        found = {name: t * unit(x) for name, t in found.items()}
        for name, (p, _) in parameters.items():
            found[f"{name} moved"] = (p.detach() != before[name]).any().double()
        return found

    return Job(call, observe, before_update=before_update, note=note)


def _in_common(parameters: Gradients, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    found = {}
    for name, (parameter, transposed) in parameters.items():
        gradient = gradients[name]
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        found[f"d{name}"] = gradient.T if transposed else gradient
    return found


@contextmanager
def gradients_at_step():
    """Gradients by id(parameter), as they are when any torch optimizer begins its step."""
    seen: dict[int, Tensor] = {}

    def note(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            seen.update((id(p), p.grad.detach().clone()) for p in group["params"] if p.grad is not None)

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    assert parameter.shape == values.shape, f"{parameter.shape} is not {values.shape}"
    parameter.copy_(values)
