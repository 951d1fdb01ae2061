"""What a SAELens module computes, by the sparse path.

SAELens writes [N, F] several times to reconstruct; `forward` here never does. Hooks still see everything: whoever listens to
the activations gets them dense, and all other hook points fire as they always did.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...activations import TopK
from ...kernels.scores import nonzero_flat
from ...sparse_code import SparseCode
from . import codes
from .codes import Module, Operands, listens


def methods(cls: type[nn.Module]) -> dict[str, Callable[..., Tensor]]:
    """`cls` with these three is fast."""
    return {"forward": _forward(cls), "encode": _encode(cls), "decode": _decode(cls)}


def _is_transcoder(sae: Module) -> bool:
    return hasattr(sae.cfg, "d_out")


def finish(sae: Module, y: Tensor) -> Tensor:
    """From the decoder's sum to what `decode` returns."""
    y = sae.hook_sae_recons(y + sae.b_dec)
    return y if _is_transcoder(sae) else sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(y), sae.d_head)


def _before_projection(sae: Module) -> bool:
    """Whether an optimizer's step left thresholds below zero, which the next training step projects."""
    return hasattr(sae, "bandwidth") and bool((sae.threshold < 0).any())


def reconstruction(sae: Module, cls: type[nn.Module], x: Tensor) -> Tensor:
    """decode(encode(x)), and the skip term of a transcoder that has one."""
    listened = listens(sae.hook_sae_acts_pre) or listens(sae.hook_sae_acts_post)
    if listened or not codes.applies(sae, cls, x) or _before_projection(sae) or (sae_in := codes.encoder_input(sae, x)) is None:
        y = sae.decode(sae.encode(x))
    else:
        y = finish(sae, _through(sae, sae_in))
    return y if getattr(sae, "W_skip", None) is None else y + x @ sae.W_skip.T.to(x.device)


def _through(sae: Module, sae_in: Tensor) -> Tensor:
    o = codes.operands(sae, sae_in, codes.encoder_bias(sae))
    with codes.plain(o.x):
        code = codes.encode(sae, o)
        if code is not None:
            return codes.decode(code, o)
        none, activation = o.W_dec.new_zeros(o.W_dec.shape[1]), codes.activation_of(sae, o.x.dtype)
        return functional.reconstruct_dense(o.x, o.W_enc, o.b_enc, o.W_dec, none, activation.activate)[0]


def _forward(cls: type[nn.Module]) -> Callable[..., Tensor]:
    stock = cls.forward

    @wraps(stock)
    def forward(self: Module, x: Tensor) -> Tensor:
        if not codes.applies(self, cls, x):
            return stock(self, x)
        y = reconstruction(self, cls, x)
        if _is_transcoder(self):
            return y
        if self.use_error_term:
            y = y + _error_term(self, cls, x, y)
        return self.hook_sae_output(y)

    return forward


def _error_term(sae: Module, cls: type[nn.Module], x: Tensor, y: Tensor) -> Tensor:
    """x minus what it reconstructs to where no hook interferes: y itself, unless somebody listens."""
    with torch.no_grad():
        if codes.heard(sae):
            with import_module("sae_lens.saes.sae")._disable_hooks(sae):
                y = reconstruction(sae, cls, x)
        return sae.hook_sae_error(x - y)


def _encode(cls: Any) -> Callable[..., Tensor]:
    stock = cls.encode

    @wraps(stock)
    def encode_dense(self: Module, x: Tensor) -> Tensor:
        wants_coo = getattr(self.cfg, "use_sparse_activations", False)
        if wants_coo or not codes.applies(self, cls, x) or listens(self.hook_sae_acts_pre) or _before_projection(self):
            return stock(self, x)
        if (sae_in := codes.encoder_input(self, x)) is None:
            return stock(self, x)
        o = codes.operands(self, sae_in, codes.encoder_bias(self))
        with codes.plain(o.x):
            acts = _dense_activations(self, o)
        return self.hook_sae_acts_post(acts)

    return encode_dense


def _dense_activations(sae: Module, o: Operands) -> Tensor:
    activation = codes.activation_of(sae, o.x.dtype)
    if isinstance(activation, TopK) and (code := codes.encode(sae, o)) is not None:
        return codes.reported(code, o).dense()
    return activation.dense(o.x, o.W_enc, o.b_enc).to(sae.dtype)


def _decode(cls: Any) -> Callable[..., Tensor]:
    stock = cls.decode

    @wraps(stock)
    def decode_dense(self: Module, feature_acts: Tensor) -> Tensor:
        y = None
        if codes.applies(self, cls, feature_acts) and feature_acts.dtype == self.dtype and not _in_autocast(feature_acts):
            y = _gathered(feature_acts, self.W_dec, getattr(self.cfg, "rescale_acts_by_decoder_norm", False))
        return stock(self, feature_acts) if y is None else finish(self, y)

    return decode_dense


def _in_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _gathered(acts: Tensor, W_dec: Tensor, rescale: bool) -> Tensor | None:
    """acts W_dec from what is not zero, or None where too much is not."""
    rows = acts.detach().reshape(-1, acts.shape[-1])
    fires = rows != 0
    if rows.shape[1] != W_dec.shape[0] or fires.count_nonzero() > fires.numel() * functional.SPARSE_BELOW:
        return None
    at = nonzero_flat(fires)
    ends = torch.arange(rows.shape[0] + 1, device=at.device) * rows.shape[1]
    code = SparseCode(
        rows.flatten()[at], (at % rows.shape[1]).int(), torch.searchsorted(at, ends, out_int32=True), tuple(acts.shape)
    )
    if acts.requires_grad and torch.is_grad_enabled():
        return None if rescale else _Decode.apply(acts, W_dec, code)  # type: ignore[no-any-return]
    if rescale:
        code = code.with_values(code.values / W_dec.norm(dim=-1)[code.latents])
    return functional.decode(code, W_dec)


class _Decode(torch.autograd.Function):
    """acts W_dec, forward from the entries; backward dense, since a latent that is silent has a gradient too."""

    @staticmethod
    def forward(acts: Tensor, W_dec: Tensor, code: SparseCode) -> Tensor:
        return functional.decode(code, W_dec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, SparseCode], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,), (acts, W_dec) = grad_outputs, ctx.saved_tensors
        needs_acts, needs_W, _ = ctx.needs_input_grad
        return (
            g @ W_dec.T if needs_acts else None,
            acts.reshape(-1, W_dec.shape[0]).T @ g.reshape(-1, W_dec.shape[1]) if needs_W else None,
            None,
        )
