"""What dictionary_learning and sparsify encode with: precision under autocast, centring, and the dead latents' part."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import kernels, losses
from ..kernels.take import take_rows
from ..sparse_code import SparseCode

Code = TypeVar("Code", SparseCode, SparseCode | None)


def encoded(select: Callable[..., Code], x: Tensor, W_enc: Tensor, b_enc: Tensor, *rest: Any) -> Code:
    """select(x, W_enc, b_enc, *rest), chosen from the operands that a GEMM under autocast takes; the rest in W_enc's dtype."""
    narrow = as_autocast(x, W_enc, b_enc, *rest)
    if narrow[1].dtype == W_enc.dtype:
        return select(x, W_enc, b_enc, *rest)
    with torch.no_grad():
        code = select(*narrow)
    if code is None:
        return code
    by_latent = kernels.sort_by_latent(code.latents, code.d_sae)
    pre, rows = code.values.to(W_enc.dtype), x.to(W_enc.dtype).reshape(-1, x.shape[-1])
    pre = kernels.encode(rows, W_enc, b_enc, pre, code.latents, code.offsets, by_latent)
    return replace(code, values=pre, pre=pre, by_latent=by_latent)


def as_autocast(*operands: Any) -> tuple[Any, ...]:
    """The tensors among `operands` in the type that autocast has chosen, if it is on."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    narrow = torch.get_autocast_dtype(device)
    return tuple(t.to(narrow) if isinstance(t, Tensor) else t for t in operands)


def dead_part(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor) -> losses.Part:
    """The latents of the mask `dead` [F] as a dictionary of their own; x [N, D] as the encoder sees it."""
    ids = dead.nonzero().squeeze(1)
    W_enc, W_dec = take_rows(W_enc, ids, transposed=True).T, take_rows(W_dec, ids)
    x, W_enc, b_enc, W_dec = as_autocast(x, W_enc, b_enc[ids], W_dec)
    return losses.Part(x, W_enc, b_enc, W_dec, None)


def centred(x: Tensor, b_dec: Tensor, b_enc: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor]:
    """(x - b_dec, b_enc) to encode with. Where x is data, b_dec learns through the bias instead of through every row."""
    if x.requires_grad:
        return x - b_dec, b_enc
    return x - b_dec.detach(), _BiasOfCentred.apply(b_enc, b_dec, W_enc)  # type: ignore[return-value]


class _BiasOfCentred(torch.autograd.Function):
    """b_enc, carrying b_dec's gradient through x - b_dec: - Σ_n dpre[n] W_encᵀ = - W_enc db_enc, one matrix times a vector."""

    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, b_dec: Tensor, W_enc: Tensor) -> Tensor:
        ctx.save_for_backward(W_enc)
        return b_enc.view_as(b_enc)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (W_enc,), (g,) = ctx.saved_tensors, grad_outputs
        with torch.autocast(g.device.type, enabled=False):
            return g, -(W_enc @ g), None
