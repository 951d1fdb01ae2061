"""forward and encode of dictionary_learning's classes, from sparse codes.

Its linear layers store a latent as a column, and so do their gradients: what kernels read row by row is copied once a
step, and gradients are brought back into the parameter's own layout.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from ...activations import gather
from ...kernels.scores import BLOCK_ELEMENTS, nonzero_flat
from ...sparse_code import SparseCode
from ..coding import centred, encoded

# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Weights(NamedTuple):
    """A dictionary's parameters in one notation."""

    W_enc: Tensor
    """[D, F] in any layout"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, D] in any layout"""
    b_dec: Tensor
    """[D]"""


def of_layers(ae: Any) -> Weights:
    """AutoEncoderTopK and BatchTopKSAE."""
    return _of_layers(ae, ae.encoder.bias, ae.b_dec)


def of_auto_encoder(ae: Any) -> Weights:
    return _of_layers(ae, ae.encoder.bias, ae.bias)


def of_gated(ae: Any) -> Weights:
    """b_enc is zero: gate and magnitude add theirs to the same x W_enc."""
    return _of_layers(ae, torch.zeros_like(ae.gate_bias), ae.decoder_bias)


def _of_layers(ae: Any, b_enc: Tensor, b_dec: Tensor) -> Weights:
    return Weights(in_layout_of(ae.encoder.weight).T, b_enc, ae.decoder.weight.T, b_dec)


def of_matrices(ae: Any) -> Weights:
    """JumpReluAutoEncoder and MatryoshkaBatchTopKSAE."""
    return Weights(in_layout_of(ae.W_enc.T).T, ae.b_enc, ae.W_dec, ae.b_dec)


class _Rows(torch.autograd.Function):
    """rows [F, D] of a weight, latent by latent in memory with `copy`; the gradient comes in the layout they came in."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, copy: bool) -> Tensor:
        ctx.columns = rows.stride(0) == 1 < rows.stride(1)
        return rows.contiguous() if copy and ctx.columns else rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # here and not in autograd's accumulation, whose strided copy takes twice as long on a CPU (measured)
        return grad_outputs[0].T.contiguous().T if ctx.columns else grad_outputs[0], None


def in_layout_of(rows: Tensor) -> Tensor:
    """The same rows, whose gradient is laid out like them."""
    return _Rows.apply(rows, False)  # type: ignore[return-value]


def by_rows(W_dec: Tensor) -> Tensor:
    """W_dec [F, D] with each latent's row in one piece."""
    return _Rows.apply(W_dec, True)  # type: ignore[return-value]


# ── codes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encoder_of(x: Tensor, w: Weights) -> tuple[Tensor, Weights]:
    """(x - b_dec, weights) to encode with."""
    x, b_enc = centred(x, w.b_dec, w.b_enc, w.W_enc)
    return x, w._replace(b_enc=b_enc)


def relu(code: SparseCode) -> SparseCode:
    return code.with_values(code.values.relu())


def row_code(x: Tensor, w: Weights, k: int) -> SparseCode:
    """Each row's k best; x as the encoder sees it."""
    return relu(encoded(functional.encode_topk, x, w.W_enc, w.b_enc, k))


def batch_code(x: Tensor, w: Weights, k: int) -> SparseCode:
    """The batch's k · N best."""
    return relu(encoded(functional.encode_batch_topk, x, w.W_enc, w.b_enc, k))


_encode_above: Callable[..., SparseCode | None] = functional.encode_threshold


def above(x: Tensor, w: Weights, theta: Tensor) -> SparseCode | None:
    """Pre-activations over theta, unless they are too many for a sparse code to pay."""
    rows, per_row = x.reshape(-1, x.shape[-1]), w.b_enc.shape[0] * functional.SPARSE_BELOW
    probe = min(64, rows.shape[0] // 16)  # a few rows tell a code that is far from sparse before a whole GEMM is spent on it
    if probe:
        with torch.no_grad():
            few = encoded(_encode_above, rows[:probe], w.W_enc, w.b_enc, theta, int(2 * probe * per_row))
        if few is None:
            return None
    return encoded(_encode_above, x, w.W_enc, w.b_enc, theta, int(rows.shape[0] * per_row))


Coder = Callable[[Any, Tensor, Weights], SparseCode | None]
"""(dictionary, x, weights) -> the code of x, or None where it is not sparse."""


def auto_encoder(ae: Any, x: Tensor, w: Weights) -> SparseCode | None:
    return above(*encoder_of(x, w), torch.zeros_like(w.b_enc))


def top_k(ae: Any, x: Tensor, w: Weights) -> SparseCode:
    return row_code(*encoder_of(x, w), int(ae.k))


def over_threshold(ae: Any, x: Tensor, w: Weights) -> SparseCode | None:
    """BatchTopK and Matryoshka at inference."""
    if not has_all_groups(ae):
        return None
    return above(*encoder_of(x, w), ae.threshold.to(w.b_enc.dtype).clamp(min=0).expand_as(w.b_enc))


def has_all_groups(ae: Any) -> bool:
    """Not so for a Matryoshka dictionary that was told to use its first few."""
    return not hasattr(ae, "active_groups") or ae.active_groups == len(ae.group_sizes)


def jump_relu(ae: Any, x: Tensor, w: Weights) -> SparseCode | None:
    return above(*(encoder_of(x, w) if ae.apply_b_dec_to_input else (x, w)), ae.threshold.detach().clamp(min=0))


def gates(ae: Any, x: Tensor, w: Weights) -> tuple[SparseCode, SparseCode] | None:
    """(the code, the gate's own activations)."""
    code = above(*encoder_of(x, w), -ae.gate_bias.detach())
    if code is None:
        return None
    at, x_enc = gather(code), code.values
    magnitude = at(ae.r_mag.exp()) * x_enc + at(ae.mag_bias)
    return relu(code.with_values(magnitude)), relu(code.with_values(x_enc + at(ae.gate_bias)))


def gated(ae: Any, x: Tensor, w: Weights) -> SparseCode | None:
    both = gates(ae, x, w)
    return None if both is None else both[0]


def of_features(features: Tensor) -> SparseCode | None:
    """The code whose `dense()` is `features`, or None where that is not sparse."""
    F = features.shape[-1]
    fires = features.reshape(-1, F) != 0
    if int(fires.count_nonzero()) > int(fires.numel() * functional.SPARSE_BELOW):
        return None
    at = nonzero_flat(fires)
    offsets = nn.functional.pad(torch.bincount(at // F, minlength=fires.shape[0]).cumsum(0), (1, 0)).int()
    return SparseCode(features.flatten()[at], (at % F).int(), offsets, tuple(features.shape))


# ── methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def decoded(code: SparseCode, w: Weights) -> Tensor:
    """Reconstruction; where W_dec does not train, of a copy of no more rows than are used."""
    code = code.with_values(code.values.to(w.W_dec.dtype))
    trains = torch.is_grad_enabled() and w.W_dec.requires_grad
    if trains or w.W_dec.stride(1) == 1:
        return functional.decode(code, by_rows(w.W_dec), w.b_dec)
    used, latents = code.latents.unique(return_inverse=True)
    code = replace(code, latents=latents.int(), shape=(*code.shape[:-1], used.shape[0]), by_latent=None)
    return functional.decode(code, w.W_dec[used], w.b_dec)


def forward(weights: Callable[[Any], Weights], coder: Coder, via_features: bool = True) -> Callable[..., Any]:
    """The host's forward, over the code that `coder` makes.

    With `via_features` inference of few rows takes the host's features, which are bounded then: nothing is computed twice
    where they turn out not to be sparse.
    """

    def fast(self: Any, x: Tensor, output_features: bool = False, *unusual: Any, **others: Any) -> Any:
        if unusual or others:  # ghost gradients, features times decoder norms
            return NotImplemented
        trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        few = x.numel() * self.dict_size <= BLOCK_ELEMENTS * x.shape[-1]
        features = self.encode(x) if via_features and few and not trains else None
        w = weights(self)
        code = coder(self, x, w) if features is None else of_features(features)
        if code is not None:
            x_hat = decoded(code, w)
            features = code.dense() if output_features and features is None else features
        elif features is not None:
            x_hat = self.decode(features)
        else:
            return NotImplemented
        return (x_hat, features) if output_features else x_hat

    return fast


def encode_top_k(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
    return NotImplemented if return_topk or use_threshold else top_k(self, x, of_layers(self)).dense()


def encode_batch_top_k(weights: Callable[[Any], Weights]) -> Callable[..., Any]:
    """Of the two classes that choose over a batch; with the threshold theirs is a GEMM and a mask, and stays."""

    def fast(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if use_threshold or return_active or x.dim() != 2 or not has_all_groups(self):
            return NotImplemented
        return batch_code(*encoder_of(x, weights(self)), int(self.k)).dense()

    return fast
