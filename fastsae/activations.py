"""Which latents fire, and with what value. An activation is one small class.

A new one needs `select` alone: given pre-activations [R, F] of some rows, return a SparseCode of the entries that fire,
with their pre-activations as values. It runs over bounded blocks of rows. Override `encode` to fuse it, and `activate`
where the value is not relu(pre).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import At
from .kernels import check
from .sparse_code import SparseCode


class Activation(nn.Module):
    """Base of all activations."""

    def attach(self, d_sae: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Called once by SAE with the width: check it, create per-latent parameters."""

    def select(self, pre: Tensor) -> SparseCode:
        """The entries of pre [R, F] that fire."""
        raise NotImplementedError(f"{type(self).__name__} defines neither select nor encode: define one")

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> SparseCode:
        """The code of pre-activations; `select_scale` [F] changes how latents are ranked."""
        _no_ranking(self, select_scale)
        return functional.encode_selected(x, W_enc, b_enc, self.select)

    def encode_within(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: int | None, select_scale: Tensor | None = None
    ) -> SparseCode | None:
        """The same, or None: more than `limit` entries, and `activate` is all there is to it, so a dense path is exact."""
        return self.encode(x, W_enc, b_enc, select_scale)

    def activate(self, pre: Tensor, at: At, b_enc: Tensor) -> Tensor:
        """Element-wise, pre-activations of firing entries to values; `at` brings a per-latent tensor to pre's shape."""
        return pre.relu()

    def observe(self, code: SparseCode, select_scale: Tensor | None = None) -> None:
        """What is learned from a training batch's activations without a gradient; a trainer calls it once a step."""

    def project(self) -> None:
        """Bring parameters that an optimizer's step took out of their range back into it."""

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> Tensor:
        """All activations [..., F]."""
        code = self.encode(x, W_enc, b_enc, select_scale)
        return code.with_values(self.activate(code.values, gather(code), b_enc)).dense()


def _no_ranking(activation: Activation, select_scale: Tensor | None) -> None:
    if select_scale is not None:
        name = type(activation).__name__
        raise ValueError(f"{name} does not rank latents: drop select_scale (of an SAE, rescale_acts_by_decoder_norm)")


def _attach_once(activation: Activation, parameter: str) -> None:
    if hasattr(activation, parameter):
        name = type(activation).__name__
        raise ValueError(f"this {name} already belongs to another SAE, with its own {parameter}: make a new {name}")


def gather(code: SparseCode) -> At:
    """`at` for the entries of a code."""
    if code.by_latent is None:
        return lambda parameter: parameter[code.latents]
    order, starts = code.by_latent
    return lambda parameter: functional.kernels.gather_latents(parameter, code.latents, order, starts)


class TopK(Activation):
    """Each row's k largest pre-activations, then relu."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def attach(self, d_sae: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        check.k_fits(self.k, d_sae)

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> SparseCode:
        return functional.encode_topk(x, W_enc, b_enc, self.k, select_scale)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class AbsTopK(TopK):
    """Each row's k largest in magnitude, signs kept."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> SparseCode:
        return functional.encode_topk(x, W_enc, b_enc, self.k, select_scale, magnitude=True)

    def activate(self, pre: Tensor, at: At, b_enc: Tensor) -> Tensor:
        return pre


class BatchTopK(TopK):
    """In training the batch's N·k largest pre-activations, then relu; the batch is all rows of the call.

    In eval every pre-activation over `threshold`, so that no row depends on the others. Both rank pre · select_scale. The
    threshold follows the least score that fired in training (`observe`) or is set by `calibrate.calibrate_threshold`; until
    then it is -1, and eval selects by batch too.
    """

    threshold: Tensor

    def __init__(self, k: int, threshold: float = -1.0, threshold_lr: float = 0.01):
        super().__init__(k)
        self.threshold_lr = threshold_lr
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))
        self._known = threshold >= 0
        self.register_load_state_dict_post_hook(BatchTopK._loaded)

    def attach(self, d_sae: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().attach(d_sae, device, dtype)
        self.threshold = self.threshold.to(device)

    @property
    def knows_threshold(self) -> bool:
        """Whether eval has a threshold to fire above. Waits for a GPU at the first eval after training has observed one."""
        if not self._known:
            self._known = bool(self.threshold >= 0)
        return self._known

    def _loaded(self, *_: object) -> None:
        self.set_threshold(self.threshold)

    def set_threshold(self, threshold: Tensor | float) -> None:
        self.threshold = torch.as_tensor(threshold, dtype=torch.float64, device=self.threshold.device)
        self._known = bool(self.threshold >= 0)

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchTopK":
        exact = self.threshold
        super()._apply(fn, recurse)  # moves it; but sae.half() means the weights, not this
        if self.threshold.dtype != exact.dtype:
            self.threshold = exact.to(self.threshold.device)
        return self

    def observe(self, code: SparseCode, select_scale: Tensor | None = None) -> None:
        values = code.values.detach()
        scores = values if select_scale is None else values * select_scale[code.latents]
        if not scores.numel():
            return
        least = torch.where(values > 0, scores, torch.inf).min().double()
        least = torch.where(self.threshold >= 0, self.threshold + self.threshold_lr * (least - self.threshold), least)
        self.threshold = torch.where(least.isfinite(), least, self.threshold.clamp(min=0))

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> SparseCode:
        if self.training or not self.knows_threshold:
            return functional.encode_batch_topk(x, W_enc, b_enc, self.k, select_scale)
        theta = self.threshold.to(b_enc.dtype) / (torch.ones_like(b_enc) if select_scale is None else select_scale)
        return functional.encode_threshold(x, W_enc, b_enc, theta)


class _Threshold(Activation):
    """Fires above a threshold per latent. How many fire is open, so a dense path stands by."""

    def threshold(self, b_enc: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> SparseCode:
        _no_ranking(self, select_scale)
        return functional.encode_threshold(x, W_enc, b_enc, self.threshold(b_enc))

    def encode_within(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, limit: int | None, select_scale: Tensor | None = None
    ) -> SparseCode | None:
        _no_ranking(self, select_scale)
        return functional.encode_threshold(x, W_enc, b_enc, self.threshold(b_enc), limit)

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> Tensor:
        _no_ranking(self, select_scale)
        check.finite("x", x)
        return self.activate(x @ W_enc + b_enc, lambda parameter: parameter, b_enc)


class ReLU(_Threshold):
    """Every positive pre-activation."""

    def threshold(self, b_enc: Tensor) -> Tensor:
        return torch.zeros_like(b_enc)

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> Tensor:
        _no_ranking(self, select_scale)
        return functional.dense_encode(x, W_enc, b_enc)


# Conditions as numbers: to add up booleans, or to multiply with them, takes a CPU two to six times as long. In place on a copy,
# since forward-mode differentiation and torch.func take no `out=`.


@torch.no_grad()
def over(pre: Tensor, theta: Tensor | float) -> Tensor:
    """1[pre > theta]"""
    return pre.clone().gt_(theta)


@torch.no_grad()
def active(acts: Tensor) -> Tensor:
    """1[acts != 0]"""
    return acts.clone().ne_(0)


@torch.no_grad()
def near(pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[|pre - theta| < bandwidth / 2]"""
    return (pre - theta).abs_().lt_(bandwidth / 2)


class _Jump(torch.autograd.Function):
    """pre · 1[pre > theta], with straight-through estimates inside a window of `bandwidth` around theta."""

    @staticmethod
    def forward(pre: Tensor, theta: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        return pre * over(pre, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
        pre, theta, ctx.bandwidth, ctx.to_input = inputs
        ctx.save_for_backward(pre, theta)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g,) = grad_outputs
        pre, theta = ctx.saved_tensors
        straight_through = near(pre, theta, ctx.bandwidth).mul_(theta / ctx.bandwidth) * g
        to_input = over(pre, theta) * g
        return to_input + straight_through if ctx.to_input else to_input, -straight_through, None, None


class JumpReLU(_Threshold):
    """Pre-activations over a learned threshold `theta` [F] >= 0, unchanged.

    In training the code also holds the entries within bandwidth/2 below theta, with value zero: they carry the
    straight-through gradient to theta, d value / d theta = -(theta / bandwidth) · 1[|pre - theta| < bandwidth/2], and with
    `ste_to_input` its opposite to pre.
    """

    theta: nn.Parameter

    def __init__(self, theta: float = 0.01, bandwidth: float = 0.05, ste_to_input: bool = False):
        super().__init__()
        for name, number in (("theta", theta), ("bandwidth", bandwidth)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}={number!r} is a {type(number).__name__}: pass a number")
        if not (math.isfinite(theta) and theta >= 0):
            raise ValueError(f"theta={theta}: pass a threshold >= 0")
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth={bandwidth}: pass a width > 0")
        self.initial_theta, self.bandwidth, self.ste_to_input = theta, bandwidth, ste_to_input

    def attach(self, d_sae: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        _attach_once(self, "theta")
        self.theta = nn.Parameter(torch.full((d_sae,), self.initial_theta, device=device, dtype=dtype))

    def threshold(self, b_enc: Tensor) -> Tensor:
        trains = self._check()
        return self.theta.detach() - self.bandwidth / 2 if trains else self.theta.detach()

    def project(self) -> None:
        self.theta.data.clamp_(min=0)  # .data, since what an earlier forward pass saved stays valid

    def _check(self) -> bool:
        """Whether this is training, where an optimizer may have stepped below zero and theta is set back."""
        trains = self.training and torch.is_grad_enabled()
        if trains:
            self.project()
        check.non_negative("theta", self.theta.detach())  # in training, that it is a number
        return trains

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, select_scale: Tensor | None = None) -> Tensor:
        _no_ranking(self, select_scale)
        self._check()
        if torch.is_grad_enabled():  # the fused GEMM keeps no pre-activations, which theta's gradient needs
            return super().dense(x, W_enc, b_enc)
        return functional.dense_encode(x, W_enc, b_enc, self.theta)

    def activate(self, pre: Tensor, at: At, b_enc: Tensor) -> Tensor:
        if not self.training:  # the code holds no entries below theta: half a window would be a wrong gradient
            return pre * over(pre, at(self.theta))
        return _Jump.apply(pre, at(self.theta), self.bandwidth, self.ste_to_input)

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}, ste_to_input={self.ste_to_input}"


class Gated(_Threshold):
    """A latent fires where its gate x W_enc + b_enc is positive; its value is relu(x W_enc · exp(r_mag) + b_mag)."""

    r_mag: nn.Parameter
    b_mag: nn.Parameter

    def attach(self, d_sae: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        _attach_once(self, "r_mag")
        self.r_mag = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))
        self.b_mag = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))

    def threshold(self, b_enc: Tensor) -> Tensor:
        return torch.zeros_like(b_enc)

    def activate(self, pre: Tensor, at: At, b_enc: Tensor) -> Tensor:
        return ((pre - at(b_enc)) * at(self.r_mag).exp() + at(self.b_mag)).relu() * over(pre, 0)
