"""fastsae.patch("sparsify"): SparseCoder from sparse codes, its trainer unchanged.

No [N, F] is made: `encode` computes `pre_acts` when somebody reads them. AuxK and multi-TopK reach the encoder, which the
host's fused encoder keeps from them: it ignores the gradient of `pre_acts`. Nothing needs a GPU or Triton.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, losses
from ..sparse_code import SparseCode
from . import Methods
from .coding import centred, dead_part, encoded
from .stand_in import stand_in

CLASSES = ("SparseCoder",)


def methods() -> dict[type[nn.Module], Methods]:
    SparseCoder = import_module("sparsify.sparse_coder").SparseCoder
    fast: dict[str, Callable[..., Any]] = {
        "encode": encode,
        "decode": decode,
        "forward": forward,
        "remove_gradient_parallel_to_decoder_directions": remove_parallel,
    }
    return {SparseCoder: {name: stand_in(f, SparseCoder, name) for name, f in fast.items()}}


def others() -> Iterable[tuple[object, str, Any]]:
    return ()


# ── codes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encoder_input(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the encoder sees of x, its bias)."""
    if self.cfg.transcode:
        return x, self.encoder.bias
    return centred(x, self.b_dec, self.encoder.bias, self.encoder.weight.T)


def code_of(self: Any, x: Tensor, b_enc: Tensor, k: int, activation: str | None = None) -> SparseCode:
    """relu of each row's k chosen latents; x as the encoder sees it."""
    W_enc, activation = self.encoder.weight.T, activation or self.cfg.activation
    if activation == "topk":
        code = encoded(functional.encode_topk, x, W_enc, b_enc, k)
    elif activation == "groupmax":
        code = encoded(functional.encode_selected, x, W_enc, b_enc, partial(group_max, k=k))
    else:
        raise ValueError(f"activation={activation!r}: pass 'topk' or 'groupmax'")
    return replace(code, values=code.values.relu(), k=k)


def group_max(pre: Tensor, k: int) -> SparseCode:
    """The largest of each of k groups of neighbours."""
    R, F = pre.shape
    values, within = pre.unflatten(1, (k, -1)).max(-1)
    latents = within + torch.arange(0, F, F // k, device=pre.device)
    offsets = torch.arange(0, R * k + 1, k, dtype=torch.int32, device=pre.device)
    return SparseCode(values.flatten(), latents.flatten().int(), offsets, (R, F), k)


def top(code: SparseCode) -> tuple[Tensor, Tensor]:
    """The familiar pair. [..., k], the indices int64"""
    shape = (*code.shape[:-1], code.k or 0)
    return code.values.view(shape), code.latents.long().view(shape)


@cache
def _lazy_output() -> type:
    EncoderOutput: Any = import_module("sparsify.fused_encoder").EncoderOutput

    class LazyEncoderOutput(EncoderOutput):
        """The host's EncoderOutput, whose third field is computed when it is first read."""

        def __new__(cls, top_acts: Tensor, top_indices: Tensor, pre_acts: Callable[[], Tensor]) -> Any:
            self = super().__new__(cls, top_acts, top_indices, None)
            self._pre_acts = cache(pre_acts)
            return self

        @property
        def pre_acts(self) -> Tensor:
            return self._pre_acts()

        def __iter__(self) -> Any:
            yield self.top_acts
            yield self.top_indices
            yield self.pre_acts

        def __getitem__(self, index: Any) -> Any:
            # not tuple(self)[index], which would compute the third for the sake of the first
            return tuple.__getitem__(self, index) if index in (0, 1, -3, -2) else tuple(iter(self))[index]

        @classmethod
        def _make(cls, iterable: Any) -> Any:  # what _replace calls
            return EncoderOutput(*iterable)

        def __reduce__(self) -> Any:
            return EncoderOutput, tuple(iter(self))

    return LazyEncoderOutput


# ── methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(self: Any, x: Tensor) -> Any:
    seen, b_enc = encoder_input(self, x)
    code = code_of(self, seen, b_enc, self.cfg.k)

    def pre_acts() -> Tensor:
        return nn.functional.linear(seen, self.encoder.weight, b_enc).relu()

    return _lazy_output()(*top(code), pre_acts)


def decode(self: Any, top_acts: Tensor, top_indices: Tensor) -> Any:
    if self.W_dec is None:
        return NotImplemented
    k = top_acts.shape[-1]
    offsets = torch.arange(0, top_acts.numel() + 1, k, dtype=torch.int32, device=top_acts.device)
    shape = (*top_acts.shape[:-1], self.num_latents)
    code = SparseCode(top_acts.to(self.dtype).flatten(), top_indices.int().flatten(), offsets, shape, k)
    return functional.decode(code, self.W_dec, self.b_dec)


def forward(
    self: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    dead_mask: Tensor | None = None,
    total_variance: Tensor | None = None,
) -> Any:
    if self.W_dec is None or x.dim() != 2:
        return NotImplemented
    on_gpu = x.is_cuda and torch.cuda.is_bf16_supported()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):  # as the host's is
        return _forward(self, x, x if y is None else y, dead_mask, total_variance)


def _forward(self: Any, x: Tensor, y: Tensor, dead_mask: Tensor | None, total_variance: Tensor | None) -> Any:
    ForwardOutput = import_module("sparsify.sparse_coder").ForwardOutput
    k, multi = self.cfg.k, self.cfg.multi_topk
    nested = multi and self.cfg.activation == "topk"  # then the k are among the 4k, and one gather serves both
    seen, b_enc = encoder_input(self, x)
    code = code_of(self, seen, b_enc, 4 * k if nested else k)
    skip = 0 if self.W_skip is None else x.to(self.dtype) @ self.W_skip.mT
    target = (y - skip).to(self.dtype)
    r = functional.reconstruction_loss(code, self.W_dec, self.b_dec, target, ks=[k] if nested else None)
    error, sse = r.error[:, 0], r.sse[:, 0].sum()
    if total_variance is None:
        total_variance = (y - y.mean(0)).pow(2).sum()

    sae_out = error + y
    auxk_loss = multi_topk_fvu = sae_out.new_zeros(())
    if dead_mask is not None and dead_mask.any():
        part = dead_part(seen, self.encoder.weight.T, b_enc, self.W_dec, dead_mask)
        with torch.autocast(x.device.type, enabled=False):
            auxk_loss = losses.auxk(part, error, relu=True) * x.shape[0] / total_variance
    if multi:
        if not nested:
            code = code_of(self, seen, b_enc, 4 * k, "topk")
            r = functional.reconstruction_loss(code, self.W_dec, self.b_dec, target)
        sae_out = r.error[:, -1] + target  # the host leaves the skip term out here
        multi_topk_fvu = (r.sse[:, -1].sum() if self.W_skip is None else (sae_out - y).pow(2).sum()) / total_variance
    return ForwardOutput(sae_out, *top(code), sse / total_variance, auxk_loss, multi_topk_fvu)


def remove_parallel(self: Any) -> None:
    """W_dec's gradient without its component along each row, in place: rows have unit norm."""
    with torch.no_grad():
        W, grad = self.W_dec, self.W_dec.grad
        grad.addcmul_(W, (grad * W).sum(1, keepdim=True), value=-1)
