"""What is asked of a code. Each term is a function that returns a scalar, and a loss is their weighted sum:

    code = sae.encode_sparse(x)
    r = losses.reconstruct(sae, code, x)                     # or target=, prefixes=, ks=: one pass for all of it
    dead = losses.part(sae, x, dead_latents)
    loss = losses.mse(r) + 3e-2 * losses.l1(r) + losses.auxk(dead, r.error[:, -1])

Terms are means over the N rows of the call. They read what is small: error [N, P, D], sse [N, P] and l1 [N] of a
reconstruction; values, pre [E] of a code; norms |W_dec[f]| [F] where asked, detached or not as the caller has it. What revives
dead latents reads a `part` of the dictionary, in chunks that backward recomputes. Nothing of shape [N, F] is ever stored.

A gated SAE asks the same twice, of its values and of its gate:

    via_gate = losses.reconstruct(sae, losses.gate(code), x, weight=norms, frozen=True)
    loss = losses.mse(r) + losses.mse(via_gate) + coefficient * losses.l1(via_gate)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from . import functional, kernels
from .activations import JumpReLU, gather, near, over
from .functional import At, Reconstruction
from .kernels.backend import accumulator
from .kernels.take import take_rows
from .normalize import NORMALIZE
from .sae import SAE
from .sparse_code import SparseCode

# ── reconstruction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reconstruct(
    sae: SAE,
    code: SparseCode,
    x: Tensor,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
    frozen: bool = False,
) -> Reconstruction:
    """error = decode(code) (+ skip) - target, sse = |error|², l1 = Σ |value| · weight[latent], in the pass that decodes.

    `target` is x unless given. Levels: `prefixes` for Matryoshka (latents below each width), `ks` for hierarchical losses
    (each row's strongest j); the whole code is always the last. `frozen`: no gradient to the decoder.
    """
    row, scale = to_decode(sae, x, x if target is None else target)
    W_dec, b_dec = _decoder(sae, frozen)
    return _times(functional.reconstruction_loss(code, W_dec, b_dec, row, weight, prefixes, ks), scale)


def reconstruct_by_chunk(
    sae: SAE,
    x: Tensor,
    target: Tensor | None,
    activate: Callable[[Tensor, At, Tensor], Tensor],
    penalty: Callable[[Tensor, Tensor, At], Tensor] | None = None,
    frozen: bool = False,
) -> tuple[Reconstruction, Tensor]:
    """The same for a code that is not sparse, with the Σ of a penalty over each row [N] (functional.reconstruct_dense)."""
    row, scale = to_decode(sae, x, x if target is None else target)
    W_dec, b_dec = _decoder(sae, frozen)
    encoded, b_enc = sae.encoder_input(x), sae.b_enc
    if sae.apply_b_dec_to_input and not x.requires_grad and forward_ad._current_level < 0:  # type: ignore[attr-defined]
        # b_dec is all that the gradient of what is encoded is for: a vector's product instead of a GEMM
        encoded, b_enc = encoded.detach(), functional.centred_bias(b_enc, sae.b_dec, sae.W_enc)

    def of_own_bias(pre: Tensor, at: At, _: Tensor) -> Tensor:
        return activate(pre, at, sae.b_enc)

    y, cost = functional.reconstruct_dense(encoded, sae.W_enc, b_enc, W_dec, b_dec, of_own_bias, penalty)
    error = _rows(y - row)
    sse = error.to(accumulator(error.dtype)).square().sum(1)
    return _times(Reconstruction(error[:, None], sse[:, None], cost.flatten()), scale), cost.flatten()


def to_decode(sae: SAE, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the decoder is to give, and the scale [N, 1] of its error where that is not 1."""
    if sae.W_skip is not None:
        target = target - x @ sae.W_skip.T
    if sae.normalize == "none":
        return target, None
    n = NORMALIZE[sae.normalize](target)
    return n.row, n.scale.reshape(-1, 1)


def _decoder(sae: SAE, frozen: bool) -> tuple[Tensor, Tensor]:
    return (sae.W_dec.detach(), sae.b_dec.detach()) if frozen else (sae.W_dec, sae.b_dec)


def _times(r: Reconstruction, scale: Tensor | None) -> Reconstruction:
    """Errors on the input's own scale: scale · (decoded - row)."""
    if scale is None:
        return r
    return Reconstruction(r.error * scale[:, None], r.sse * scale.square().to(r.sse.dtype), r.l1)


def mse(r: Reconstruction, levels: Sequence[float] | None = None) -> Tensor:
    """Σ over levels p of levels[p] · mean_n sse[n, p], with 1 for each level where none are given."""
    return _weighted(r.sse.mean(0), levels)


def fvu(r: Reconstruction, target: Tensor, levels: Sequence[float] | None = None) -> Tensor:
    """Σ over levels p of levels[p] · mean_n sse[n, p] / variance(target): the fraction of variance unexplained."""
    return _weighted(r.sse.mean(0), levels) / variance(target)


def variance(rows: Tensor) -> Tensor:
    """mean_n |rows[n] - mean of rows|²"""
    return row_variances(rows).mean()


def row_variances(rows: Tensor) -> Tensor:
    """|rows[n] - mean of rows|² [N]"""
    rows = rows.reshape(-1, rows.shape[-1]).to(accumulator(rows.dtype))
    return (rows - rows.mean(0)).square().sum(1)


def _weighted(per_level: Tensor, levels: Sequence[float] | None) -> Tensor:
    if levels is None:
        return per_level.sum()
    if len(levels) != per_level.shape[0]:
        raise ValueError(
            f"levels={list(levels)} for {per_level.shape[0]} levels: pass one weight each; the whole code is the last level"
        )
    return torch.stack([w * level for w, level in zip(levels, per_level.unbind(), strict=True)]).sum()


# ── sparsity ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def l1(r: Reconstruction) -> Tensor:
    """mean_n Σ_e |value| · weight[latent]"""
    return r.l1.mean()


def lp(code: SparseCode, p: float, weight: Tensor | None = None, root: bool = False) -> Tensor:
    """mean_n Σ_e (|value| · weight[latent])^p, or with `root` mean_n (that sum)^(1/p). A zero entry has gradient zero."""
    if p <= 0:
        raise ValueError(f"p={p}: pass p > 0")
    size = code.values.abs()
    if weight is not None:
        size = size * gather(code)(weight)
    cost = power(size.to(accumulator(size.dtype)), p)
    return power(per_row(code, cost), 1 / p).mean() if root else _mean(code, cost)


def l0_tanh(code: SparseCode, weight: Tensor, scale: float = 4.0) -> Tensor:
    """mean_n Σ_e tanh(scale · value · weight[latent])"""
    return _mean(code, (scale * code.values * gather(code)(weight)).tanh())


def l0(code: SparseCode, jump: JumpReLU) -> Tensor:
    """L0[n] = Σ_e 1[pre > theta], how many latents fire in each row. [N]

    Straight through, with u = 1[|pre - theta| < bandwidth/2] / bandwidth: dL0/dtheta = -u, and with the activation's
    `ste_to_input` dL0/dpre = u. Its mean is the step loss.
    """
    return per_row(code, fires(_pre(code), gather(code), jump))


def fires(pre: Tensor, at: At, jump: JumpReLU) -> Tensor:
    """1[pre > theta], straight through as in `l0`."""
    return _Step.apply(pre, at(jump.theta), jump.bandwidth, jump.ste_to_input)  # type: ignore[no-any-return]


def l0_to_target(l0: Tensor, target: float) -> Tensor:
    """mean_n 2 / target · (L0[n] - target)²"""
    return 2 / target * (l0 - target).square().mean()


def mean_l0_to_target(l0: Tensor, target: float) -> Tensor:
    """(mean_n L0[n] / target - 1)²"""
    return (l0.mean() / target - 1).square()


def gate(code: SparseCode) -> SparseCode:
    """A gated SAE's code with the gate's own activations relu(pi) as values: its entries are those where pi > 0."""
    return code.with_values(_pre(code).relu())


class _Step(torch.autograd.Function):
    """1[pre > theta], straight through."""

    @staticmethod
    def forward(pre: Tensor, theta: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        return over(pre, theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
        pre, theta, ctx.bandwidth, ctx.to_input = inputs
        ctx.save_for_backward(pre, theta)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, theta = ctx.saved_tensors
        u = near(pre, theta, ctx.bandwidth) * (grad_outputs[0] / ctx.bandwidth)
        return u if ctx.to_input else None, -u, None, None


def _pre(code: SparseCode) -> Tensor:
    if code.pre is None:
        raise ValueError("this code has no pre-activations: pass one that sae.encode_sparse returned")
    return code.pre


def power(t: Tensor, p: float) -> Tensor:
    """t^p for t >= 0, with gradient 0 at 0, where for p < 1 it is infinite."""
    if p == 1:
        return t
    positive = t > 0
    return torch.where(positive, torch.where(positive, t, 1).pow(p), 0)


def per_row(code: SparseCode, cost: Tensor) -> Tensor:
    """Σ of each row's entries. [E] -> [N]"""
    cost = cost.to(accumulator(cost.dtype))
    if not cost.numel():
        return cost.new_zeros(code.offsets.shape[0] - 1)
    return torch.segment_reduce(cost, "sum", offsets=code.offsets.long(), initial=0)


def _mean(code: SparseCode, cost: Tensor) -> Tensor:
    """The mean over rows of Σ of a row's entries."""
    return cost.sum(dtype=accumulator(cost.dtype)) / (code.offsets.shape[0] - 1)


# ── dead latents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Part(NamedTuple):
    """M latents as a dictionary of their own, and what its encoder sees."""

    x: Tensor
    """[N, D]"""
    W_enc: Tensor
    """[D, M]"""
    b_enc: Tensor
    """[M]"""
    W_dec: Tensor
    """[M, D_out]"""
    select_scale: Tensor | None
    """[M] what this SAE's ranking multiplies pre-activations with, if anything"""


def part(sae: SAE, x: Tensor, latents: Tensor) -> Part:
    """The part of `sae` that these latents are. Gradients reach x's centring and the rows of W_enc, b_enc and W_dec.

    `latents` [M] int64 are given rather than a mask because counting a mask's elements is a host sync.
    """
    W_dec = take_rows(sae.W_dec, latents)
    scale = W_dec.detach().norm(dim=1) if sae.rescale_acts_by_decoder_norm else None
    W_enc = take_rows(sae.W_enc, latents, transposed=True).T
    return Part(sae.encoder_input(x).reshape(-1, sae.d_in), W_enc, sae.b_enc[latents], W_dec, scale)


def auxk(
    dead: Part, error: Tensor, k: int | None = None, relu: bool = False, magnitude: bool = False, scaled: bool = True
) -> Tensor:
    """s · mean_n |ê[n] - r[n]|²,  r = -error, detached,  ê[n] = Σ over n's k best dead f of pre[n, f] · W_dec[f].

    The M dead latents reconstruct what the living left over, each row by its k best, k = D / 2 unless given. With `scaled`
    s = min(M / k, 1), else 1. `relu`: of relu(pre). `magnitude`: the best by |pre|.
    """
    M = dead.b_enc.shape[0]
    k = max(1, error.shape[-1] // 2) if k is None else k
    if not M:
        return error.new_zeros((), dtype=accumulator(error.dtype))
    keep = _only_best(dead, k, magnitude)
    miss = _decoded(dead, lambda pre, at: keep(pre.relu() if relu else pre, at)) + _rows(error).detach()
    loss = miss.to(accumulator(miss.dtype)).square().sum(1).mean()
    return min(M / k, 1.0) * loss if scaled else loss


def auxk_normalised(dead: Part, error: Tensor, k: int | None = None) -> Tensor:
    """mean_n |ê[n] - r[n]|² / variance(r), ê of relu(pre): the share of r that is left unexplained. 0 where r is constant."""
    of_r = variance(error.detach())
    return auxk(dead, error, k, relu=True, scaled=False) / torch.where(of_r > 0, of_r, torch.inf)


def pre_act(dead: Part, theta: Tensor) -> Tensor:
    """mean_n Σ over dead f of relu(theta[f] - pre[n, f]) · |W_dec[f]|, which lifts latents to their threshold. theta [M]"""
    x, N = dead.x, dead.x.shape[0]
    norms = dead.W_dec.norm(dim=1)
    C = max(1, functional.BLOCK_ELEMENTS // max(N, 1))

    def below(W: Tensor, b: Tensor, theta: Tensor, norms: Tensor) -> Tensor:
        return ((theta - (x @ W + b)).relu() * norms).sum(dtype=accumulator(x.dtype))

    total = x.new_zeros((), dtype=accumulator(x.dtype))
    for chunk in zip(dead.W_enc.split(C, 1), dead.b_enc.split(C), theta.split(C), norms.split(C), strict=True):
        total = total + checkpoint(below, *chunk, use_reentrant=False)
    return total / N


def ghost(dead: Part, error: Tensor) -> Tensor:
    """mean_n c[n] · |a[n] · g[n] - r[n]|²,  r = -error, detached,  g[n] = Σ over dead f of exp(pre[n, f]) · W_dec[f].

    a = |r| / 2|g| gives g half of r's length and c = |r|² / |a · g - r|² makes the term as large as the squared error; both
    are constants to the gradient.
    """
    if not dead.b_enc.shape[0]:
        return error.new_zeros((), dtype=accumulator(error.dtype))
    wide = accumulator(error.dtype)
    g, r = _decoded(dead, lambda pre, at: pre.exp()).to(wide), -_rows(error).detach().to(wide)
    tiny = torch.finfo(wide).tiny
    length = r.norm(dim=1)
    a = length / (2 * g.detach().norm(dim=1)).clamp(min=tiny)
    miss = (a[:, None] * g - r).square().sum(1)
    return (length.square() / miss.detach().clamp(min=tiny) * miss).mean()


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _decoded(dead: Part, activate: Callable[[Tensor, At], Tensor]) -> Tensor:
    """activate(x W_enc + b_enc) W_dec [N, D_out] by chunks of latents: GEMMs, since a large share of the dead takes part."""
    none = dead.W_dec.new_zeros(dead.W_dec.shape[1])
    y, _ = functional.reconstruct_dense(
        dead.x, dead.W_enc, dead.b_enc, dead.W_dec, none, lambda pre, at, _: activate(pre, at)
    )
    return y


def _only_best(dead: Part, k: int, magnitude: bool) -> Callable[[Tensor, At], Tensor]:
    """What zeroes all but each row's k best in a chunk of pre-activations."""
    N, M = dead.x.shape[0], dead.b_enc.shape[0]
    if k >= M:
        return lambda pre, at: pre
    best = kernels.select_topk(dead.x, dead.W_enc, dead.b_enc, k, dead.select_scale, magnitude)[1].view(N, k)
    numbers = torch.arange(M, device=best.device)

    def keep(pre: Tensor, at: At) -> Tensor:
        C = pre.shape[1]
        here = best - at(numbers)[:1]  # columns of this chunk; what lies outside goes to a column too many
        here = torch.where((here >= 0) & (here < C), here, C)
        mask = torch.zeros(N, C + 1, dtype=torch.bool, device=pre.device).scatter_(1, here, True)
        return torch.where(mask[:, :C], pre, 0)

    return keep
