"""Gradients that are kept as factors, because an optimizer will use them row by row (update.py) and nothing else needs them.

A latent-major matrix whose owner sets `W.deferred = Deferred()` gets no `.grad` from decode, decode_loss, encode and
row_norms: their backward passes append what the gradient is made of. Anything else that uses W still makes a `.grad`, and
the update adds it in. So every loss works, and the ones built from these ops store nothing of W's size.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import op


class Factors(NamedTuple):
    """dW[f] = Σ coefficients[e] · table[rows[e]] over the entries of latent f."""

    table: Tensor  # [R, D]
    rows: Tensor  # [E] int32
    coefficients: Tensor  # [E]
    latents: Tensor  # [E] int32
    by_latent: tuple[Tensor, Tensor] | None = None  # the entries sorted, where somebody has already done that


@dataclass
class Deferred:
    """What has been asked of a matrix since the last update."""

    factors: list[Factors] = field(default_factory=list)
    dnorm: Tensor | None = None  # [F] the gradient to each row's norm
    versions: list[tuple[int, int]] = field(default_factory=list)

    def append(self, factors: Factors) -> None:
        self.factors.append(factors)
        self.versions.append((factors.table._version, factors.coefficients._version))

    def clear(self) -> None:
        self.factors.clear()
        self.versions.clear()
        self.dnorm = None

    def __bool__(self) -> bool:
        return bool(self.factors) or self.dnorm is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a matrix that is pickled without its optimizer gets its `.grad` back

    def joined(self, W: Tensor) -> Factors:
        """The factors of the sum; W [F, D] says what none at all look like."""
        if self.versions and self.versions != [(f.table._version, f.coefficients._version) for f in self.factors]:
            raise RuntimeError(
                "an input or an error that a deferred gradient is made of was modified in place between backward() and step(): "
                "clone it before, or step first"
            )
        if not self.factors:
            none = torch.empty(0, dtype=torch.int32, device=W.device)
            return Factors(W.new_zeros(1, W.shape[1]), none, W.new_empty(0), none)
        if len(self.factors) == 1:
            return self.factors[0]
        rows, first = [], 0
        for f in self.factors:
            rows.append(f.rows + first)
            first += f.table.shape[0]
        tables, _, coefficients, latents, _ = zip(*self.factors, strict=True)
        return Factors(torch.cat(tables), torch.cat(rows), torch.cat(coefficients), torch.cat(latents))


def deferred(W: Tensor) -> Deferred | None:
    """Where W's gradients go instead of `.grad`, if anywhere."""
    return None if torch.compiler.is_compiling() else getattr(W, "deferred", None)


@op
def row_norms_op(W: Tensor) -> Tensor:
    return torch.linalg.vector_norm(W, dim=1)


@row_norms_op.register_fake
def _(W):
    return W.new_empty(W.shape[0])


def norm_slope(g: Tensor, norms: Tensor) -> Tensor:
    """g / |w|, and 0 for a zero row, as torch has it."""
    return torch.where(norms > 0, g / norms, 0)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, g):
    W, norms = ctx.saved_tensors
    waiting = deferred(W)
    if waiting is None:
        return norm_slope(g, norms)[:, None] * W
    waiting.dnorm = g.contiguous() if waiting.dnorm is None else waiting.dnorm + g
    return None


row_norms_op.register_autograd(_backward, setup_context=_setup)


def row_norms(W: Tensor) -> Tensor:
    """|W[f]| [F], with a gradient that needs nothing of W's size where W is deferred."""
    return row_norms_op(W)
