"""Sparse autoencoders as functions: encode to a SparseCode, decode it, and the losses that share the decoder's gather.

`x` may have any leading dimensions and any strides. Every function is differentiable; what is selected is not.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import kernels
from .kernels import check
from .kernels.backend import accumulator
from .kernels.scores import BLOCK_ELEMENTS, pieces
from .sparse_code import SparseCode

# Above this share of active entries gathering loses to the dense GEMM (0.38 % from bandwidth and FLOP/s of an H100).
SPARSE_BELOW = 1 / 256
# Pre-activations at a time of a code that is not sparse, on a CPU. More leave the cache between two operators, and from 32 MB
# on every temporary is fresh memory, with a page fault every 4 KB: at 2^24 a step takes 10 to 25 % longer.
CHUNK_ELEMENTS = 1 << 21
LEAST_CHUNK = 512  # latents, below which a GEMM is slow

At = Callable[[Tensor], Tensor]
"""Turns a per-latent tensor [F] into one that broadcasts against pre-activations."""


def _rows(x: Tensor) -> Tensor:
    check.tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x is a scalar: pass [..., D]")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}: pass [..., D] with D >= 1")
    return x.reshape(-1, x.shape[-1])


def _code(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, pre: Tensor, latents: Tensor, offsets: Tensor, k: int | None = None
) -> SparseCode:
    """Wrap a selection of rows of `x`, with gradients where they are wanted."""
    F = W_enc.shape[1]
    by_latent = None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, W_enc, b_enc)):
        by_latent = kernels.sort_by_latent(latents, F)
        pre = kernels.encode(_rows(x), W_enc, b_enc, pre, latents, offsets, by_latent)
    return SparseCode(pre, latents, offsets, (*x.shape[:-1], F), k, pre, by_latent)


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, select_scale: Tensor | None = None, magnitude: bool = False
) -> SparseCode:
    """Pre-activations of each row's k best latents, by pre · select_scale, or by |pre| with `magnitude`."""
    rows = _rows(x)
    pre, latents = kernels.select_topk(rows, W_enc, b_enc, k, select_scale, magnitude)
    offsets = torch.arange(0, rows.shape[0] * k + 1, k, dtype=torch.int32, device=x.device)
    return _code(x, W_enc, b_enc, pre, latents, offsets, k)


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, select_scale: Tensor | None = None, magnitude: bool = False
) -> SparseCode:
    """Pre-activations of the N·k best entries of all rows together."""
    return _code(x, W_enc, b_enc, *kernels.select_batch_topk(_rows(x), W_enc, b_enc, k, select_scale, magnitude))


@overload
def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> SparseCode: ...
@overload
def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int | None) -> SparseCode | None: ...
def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, limit: int | None = None
) -> SparseCode | None:
    """Pre-activations over theta [F]; None where there are more than `limit` of them."""
    selection = kernels.select_threshold(_rows(x), W_enc, b_enc, theta, limit)
    return None if selection is None else _code(x, W_enc, b_enc, *selection)


def encode_selected(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, select: Callable[[Tensor], SparseCode]
) -> SparseCode:
    """Pre-activations of whatever `select` picks from blocks of rows of pre-activations [R, F]. For any row-wise rule."""
    rows = _rows(x)
    check.encoder(rows, W_enc, b_enc)
    with torch.no_grad():
        parts = [_kept(select(pre), x.dtype) for *_, pre in pieces(rows, W_enc, b_enc, latents=W_enc.shape[1])]
    counts = torch.cat([torch.zeros(1, dtype=torch.int32, device=x.device), *(p.offsets.diff() for p in parts)])
    pre = torch.cat([rows.new_empty(0), *(p.values for p in parts)])
    latents = torch.cat([counts.new_empty(0), *(p.latents for p in parts)])
    return _code(x, W_enc, b_enc, pre, latents, counts.cumsum(0).int())


def _kept(code: SparseCode, dtype: torch.dtype) -> SparseCode:
    """A block's buffer is overwritten by the next block: values must not be a view of it."""
    return code.with_values(code.values.to(dtype, copy=True))


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """y [..., D_out] = Σ values · W_dec[latents] + b_dec."""
    _width(code, W_dec)
    y = kernels.decode(code.values, code.latents, code.offsets, W_dec, b_dec, code.by_latent)
    return y.view(*code.shape[:-1], W_dec.shape[1])


def _width(code: SparseCode, W_dec: Tensor) -> None:
    if not isinstance(code, SparseCode):
        raise TypeError(f"code is a {type(code).__name__}: pass a SparseCode, as encode_sparse returns it")
    if code.d_sae != W_dec.shape[0]:
        raise ValueError(f"the code has d_sae={code.d_sae} but W_dec has {W_dec.shape[0]} rows: use the SAE that made it")


def centred_bias(b_enc: Tensor, b_dec: Tensor, W_enc: Tensor) -> Tensor:
    """b_enc, with b_dec's gradient through the encoder's input: x - b_dec moves each pre-activation by -W_enc b_dec.

    So where x needs no gradient that of the input [N, D], a GEMM or a gather over W_enc, is not needed: db_dec = -W_enc db_enc.
    """
    return _Centred.apply(b_enc, b_dec, W_enc)  # type: ignore[no-any-return]


class _Centred(torch.autograd.Function):
    @staticmethod
    def forward(b_enc: Tensor, b_dec: Tensor, W_enc: Tensor) -> Tensor:
        return b_enc.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), (W_enc,) = grad_outputs, ctx.saved_tensors
        return g, -(W_enc @ g), None


class Reconstruction(NamedTuple):
    """What `reconstruction_loss` returns; P levels, the last of which is the whole code."""

    error: Tensor
    """[N, P, D] reconstruction minus target"""
    sse: Tensor
    """[N, P] squared error of each row"""
    l1: Tensor
    """[N] Σ |value| · weight[latent]"""


def reconstruction_loss(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
) -> Reconstruction:
    """Squared error against `target` and L1, in the pass that decodes. mse is `.sse.mean(0)`.

    `prefixes` adds a level for the latents below each width (Matryoshka), `ks` one for the strongest j entries of each row
    (hierarchical); ascending, and the whole code is always the last level.
    """
    _width(code, W_dec)
    if prefixes is not None and ks is not None:
        raise ValueError("prefixes and ks were both given: pass one of them")
    check.tensor("target", target)
    if target.shape[:-1] != code.shape[:-1]:
        expected = [*code.shape[:-1], W_dec.shape[1]]
        raise ValueError(f"target has shape {list(target.shape)}: expected {expected}, a row for each row of the code")
    levels = 1
    values, latents, bounds, by_latent = code.values, code.latents, code.offsets, code.by_latent
    if prefixes is not None:
        widths = _ascending("prefixes", prefixes, code.d_sae)
        levels = len(widths)
        keys = code.rows.long() * code.d_sae + latents
        firsts = torch.arange(bounds.shape[0] - 1, device=keys.device) * code.d_sae
        edges = torch.stack([firsts + width for width in widths], 1)  # a tensor of the widths would wait for the GPU
        bounds = torch.nn.functional.pad(torch.searchsorted(keys, edges.flatten(), out_int32=True), (1, 0))
    elif ks is not None:
        counts = _ascending("ks", ks, code.d_sae)
        levels = len(counts)
        strongest = values.detach().abs().sort(descending=True, stable=True).indices
        order = strongest[code.rows[strongest].sort(stable=True).indices]
        values, latents, by_latent = values[order], latents[order], None
        ends = torch.stack([torch.minimum(bounds[:-1] + count, bounds[1:]) for count in counts], 1)
        bounds = torch.nn.functional.pad(ends.flatten(), (1, 0))
    error, sse, l1 = kernels.decode_loss(values, latents, bounds, W_dec, b_dec, _rows(target), weight, by_latent)
    if not l1.shape[0]:  # without rows the kernel cannot know how many levels there are
        error, sse = error.expand(-1, levels, -1), sse.expand(-1, levels)
    return Reconstruction(error, sse, l1)


def _ascending(name: str, levels: Sequence[int], whole: int) -> list[int]:
    if not isinstance(levels, Sequence) or any(isinstance(n, bool) or not isinstance(n, int) for n in levels):
        raise TypeError(f"{name}={levels!r}: pass a list of whole numbers")
    levels = list(levels)
    if not levels or levels != sorted(set(levels)) or levels[0] < 1 or levels[-1] > whole:
        raise ValueError(f"{name}={levels}: pass ascending numbers from 1 to d_sae={whole}")
    return levels if levels[-1] == whole else [*levels, whole]


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | None = None) -> Tensor:
    """Activations [..., F]: relu, or the jump at theta, fused into the GEMM on a GPU."""
    return kernels.dense_encode(_rows(x), W_enc, b_enc, theta).view(*x.shape[:-1], W_enc.shape[1])


def reconstruct_dense(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    activate: Callable[[Tensor, At, Tensor], Tensor],
    penalty: Callable[[Tensor, Tensor, At], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [..., D_out], Σ penalty [...]) for codes that are not sparse, in chunks of latents that backward recomputes.

    `activate(pre, at, b_enc)` is the element-wise activation of pre-activations [N, C]; `penalty(pre, acts, at)` [N, C] is
    what a loss would sum over entries. Exact; at most BLOCK_ELEMENTS pre-activations exist at a time.
    """
    rows = _rows(x)
    check.encoder(rows, W_enc, b_enc)
    N, F = rows.shape[0], W_enc.shape[1]
    most, few = BLOCK_ELEMENTS // max(N, 1), CHUNK_ELEMENTS // max(N, 1)
    C = max(1, min(F, most, max(LEAST_CHUNK, few) if x.device.type == "cpu" else most))

    def chunk(first: int, W_e: Tensor, b_e: Tensor, W_d: Tensor) -> tuple[Tensor, Tensor]:
        def at(parameter: Tensor) -> Tensor:
            return parameter[first : first + C]

        pre = rows @ W_e.T + b_e
        acts = activate(pre, at, b_enc)
        cost = acts.new_zeros(N) if penalty is None else penalty(pre, acts, at).sum(1)
        return acts @ W_d, cost

    wide = accumulator(x.dtype)  # many chunks are added up
    y, cost = b_dec.to(wide).expand(N, -1), rows.new_zeros(N, dtype=wide)
    # split, not slices: its gradient is one concatenation rather than one zero-padded matrix per chunk; of latents' rows, so
    # that it is one of rows as they lie in memory
    for i, parts in enumerate(zip(W_enc.T.split(C), b_enc.split(C), W_dec.split(C), strict=True)):
        y_part, cost_part = checkpoint(chunk, i * C, *parts, use_reentrant=False)
        y, cost = y + y_part, cost + cost_part
    return y.to(x.dtype).view(*x.shape[:-1], W_dec.shape[1]), cost.view(x.shape[:-1])
