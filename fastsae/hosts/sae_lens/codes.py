"""When a SAELens module can take the sparse path, and its code there: what inference.py and training.py share."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ... import functional
from ...activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK, gather
from ...kernels import check
from ...sparse_code import SparseCode
from .. import stock_class

Module = Any
"""A SAELens SAE: its package is not installed where this is type-checked."""


# ── when ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

METHODS = {"forward", "encode", "decode", "process_sae_in", "encode_with_hidden_pre", "calculate_aux_loss"}


def applies(sae: Module, cls: type[nn.Module], x: Tensor) -> bool:
    """Whether this module computes what `cls` does, on something that the kernels take.

    Not where somebody changed it: a subclass, a method or an activation function put on the object. Nor inside
    torch.compile, torch.func and forward-mode differentiation, which want plain torch operations.
    """
    W_enc, W_dec = sae.W_enc, sae.W_dec
    return (
        stock_class(type(sae)) is cls
        and not METHODS & vars(sae).keys()
        and type(sae.activation_fn) is type(sae.get_activation_fn())
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and sae.dtype == W_enc.dtype == W_dec.dtype
        and W_enc.dtype in check.DTYPES
        and x.device == W_enc.device
        and x.device.type in ("cpu", "cuda")
        and getattr(sae.activation_fn, "k", 1) <= W_enc.shape[1]
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]
        and forward_ad._current_level < 0  # type: ignore[attr-defined]
    )


def listens(hook: Any) -> bool:
    """Whether anything hangs on a hook point, or something else stands in its place."""
    everywhere: Any = torch.nn.modules.module
    is_silent = type(hook).__name__ in ("HookPoint", "SparseHookPoint", "Identity") and not everywhere._has_any_global_hook()
    return not is_silent or any((hook._forward_hooks, hook._forward_pre_hooks, hook._backward_hooks, hook._backward_pre_hooks))


def heard(sae: Module) -> bool:
    """Whether anybody listens to what happens between input and reconstruction."""
    inner = (sae.hook_sae_input, sae.hook_sae_acts_pre, sae.hook_sae_acts_post, sae.hook_sae_recons)
    return any(listens(hook) for hook in inner)


# ── what ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def activation_of(sae: Module, dtype: torch.dtype) -> Activation:
    """This module's activation, over its own parameters as `dtype`."""
    return _ACTIVATIONS[sae.cfg.architecture()](sae, dtype)


def _jump(sae: Module, dtype: torch.dtype) -> JumpReLU:
    jump: Any = JumpReLU()
    if hasattr(sae, "bandwidth"):
        jump = JumpReLU(bandwidth=sae.bandwidth, ste_to_input=sae.cfg.jumprelu_ste_to_input)
        jump.theta = sae.threshold.to(dtype)
        return jump
    jump.theta = sae.threshold.detach().clamp(min=0).to(dtype)  # relu comes first here: below zero is zero
    return jump.eval()


def _gated(sae: Module, dtype: torch.dtype) -> Gated:
    gated: Any = Gated()
    gated.r_mag, gated.b_mag = sae.r_mag.to(dtype), sae.b_mag.to(dtype)
    return gated


_ACTIVATIONS: dict[str, Callable[[Module, torch.dtype], Activation]] = {
    "standard": lambda sae, _: ReLU(),
    "transcoder": lambda sae, _: ReLU(),
    "skip_transcoder": lambda sae, _: ReLU(),
    "jumprelu": _jump,
    "jumprelu_transcoder": _jump,
    "jumprelu_skip_transcoder": _jump,
    "gated": _gated,
    "topk": lambda sae, _: TopK(sae.activation_fn.k),
    "abstopk": lambda sae, _: AbsTopK(sae.activation_fn.k),
    # k may be a fraction: `_trim` takes the surplus out
    "batchtopk": lambda sae, _: BatchTopK(math.ceil(sae.activation_fn.k)),
    "matryoshka_batchtopk": lambda sae, _: BatchTopK(math.ceil(sae.activation_fn.k)),
}


class Operands(NamedTuple):
    """The tensors of a pass. In an autocast region GEMMs and gathers compute in its type, all else in the parameters' own."""

    x: Tensor
    """[..., D] what the encoder sees"""
    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor
    """[F] the encoder's, in its own type"""
    norms: Tensor | None
    """[F] |W_dec[f]| where latents rank and are reported times it. In what is decoded it cancels."""

    @property
    def b_enc(self) -> Tensor:
        return self.bias.to(self.x.dtype)

    @property
    def scale(self) -> Tensor | None:
        """The norms, to rank by."""
        return None if self.norms is None else self.norms.detach().to(self.x.dtype)


def encoder_bias(sae: Module) -> Tensor:
    return sae.b_gate if sae.cfg.architecture() == "gated" else sae.b_enc


def operands(sae: Module, x: Tensor, bias: Tensor) -> Operands:
    """As autocast would cast them."""
    norms = sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else None
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return Operands(x.to(dtype), sae.W_enc.to(dtype), sae.W_dec.to(dtype), bias, norms)


def plain(x: Tensor) -> torch.autocast:
    """Operands are cast already: autocast off."""
    return torch.autocast(x.device.type, enabled=False)


def encode(sae: Module, o: Operands) -> SparseCode | None:
    """The code, in the parameters' type, or None where it is not sparse."""
    selects = activation_of(sae, o.x.dtype)
    code = _select(selects, o)
    if code is None:
        return None
    activation, at, pre = selects, gather(code), code.values
    if pre.dtype != sae.dtype:  # the bias's gradient is a long sum: not in 16 bits
        activation = activation_of(sae, sae.dtype)
        pre = pre.to(sae.dtype) + at(o.bias - o.bias.detach())
        code = replace(code, pre=pre)
    return _trim(sae, code.with_values(activation.activate(pre, at, encoder_bias(sae))), o)


def _select(activation: Activation, o: Operands) -> SparseCode | None:
    b_enc = o.b_enc if o.bias.dtype == o.x.dtype else o.b_enc.detach()  # then `encode` brings its gradient

    def within(x: Tensor, share: float) -> SparseCode | None:
        limit = int(x.numel() // x.shape[-1] * o.W_enc.shape[1] * share)
        return activation.encode_within(x, o.W_enc, b_enc, limit, o.scale)

    rows = o.x.reshape(-1, o.x.shape[-1])
    if not isinstance(activation, TopK) and rows.shape[0] >= 256:  # ask some rows first: they say no for a fraction
        with torch.no_grad():
            if within(rows[:: rows.shape[0] // 16], 2 * functional.SPARSE_BELOW) is None:
                return None
    return within(o.x, functional.SPARSE_BELOW)


def _trim(sae: Module, code: SparseCode, o: Operands) -> SparseCode:
    """Zero the weakest entries, where a batch's k is no whole number."""
    k, rows = getattr(sae.activation_fn, "k", 0), code.offsets.shape[0] - 1
    total = int(k * rows)
    if code.k is not None or not k or total == code.values.shape[0]:
        return code
    score = reported(code, o).values.detach()
    best = score.sort(descending=True, stable=True).indices[:total]
    return code.with_values(code.values * torch.zeros_like(score).index_fill_(0, best, 1))


def reported(code: SparseCode, o: Operands) -> SparseCode:
    """The code as SAELens shows it."""
    return code if o.norms is None else code.with_values(code.values * gather(code)(o.norms))


def decode(code: SparseCode, o: Operands) -> Tensor:
    """Without the bias."""
    return functional.decode(code.with_values(code.values.to(o.W_dec.dtype)), o.W_dec)


def encoder_input(sae: Module, x: Tensor) -> Tensor | None:
    """`process_sae_in`, or None where our value checks would refuse what SAELens lets through."""
    sae_in = sae.process_sae_in(x)
    return sae_in if sae_in.is_cuda or check.all_finite(sae_in.detach()) else None
