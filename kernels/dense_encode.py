"""Encode to a dense activation matrix:  acts[n, f] = φ(x[n] · W_enc[:, f] + b_enc[f]).

N rows, D model width, F latents, φ = relu, or the jump  pre · 1[pre > θ[f]]:

    x [N, D]    W_enc [D, F] (any layout)    b_enc, θ [F]    acts [N, F]

One GEMM whose epilogue applies bias and φ to the accumulator, so that pre-activations are never written. For those who
want [N, F]; training and `sae(x)` never call it. The same kernel with another epilogue feeds the row top-k of topk.py:
it writes a chunk of pre-activations together with the maximum score of each 128-wide tile of each row.

Gradient: for relu, dpre = g · 1[acts > 0]; for the jump, dpre = g · 1[pre > θ], which for θ >= 0 is again
g · 1[acts > 0]. The jump's gradient to θ (a straight-through estimate) belongs to activations.py.
"""

import torch
from torch import Tensor

from . import check
from .backend import TensorDescriptor, dot_precision, op, runs_triton, tl, triton
from .tiles import has_tma, tile


def dense_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | None = None) -> Tensor:
    """The definition: relu(x W + b), or the jump at `theta` where it is given."""
    pre = x @ W_enc + b_enc
    return pre.relu() if theta is None else pre * (pre > theta)


@triton.jit
def _gemm_kernel(
    x, W, bias, theta, scale, out, maxima, N, F, D, stride_xn, stride_xd, stride_wf, stride_wd, stride_on, stride_mn,
    MAXIMA: tl.constexpr, HAS_THETA: tl.constexpr, HAS_SCALE: tl.constexpr, MAGNITUDE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    # programs walk GROUP_N row blocks per panel of latents, so that both operands stay in L2
    tiles_n, tiles_f = tl.cdiv(N, BLOCK_N), tl.cdiv(F, BLOCK_F)
    group = tl.program_id(0) // (GROUP_N * tiles_f)
    rows_in_group = tl.minimum(tiles_n - group * GROUP_N, GROUP_N)
    within = tl.program_id(0) % (GROUP_N * tiles_f)
    n_tile = group * GROUP_N + within % rows_in_group
    f_tile = within // rows_in_group

    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    f = f_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if TMA:  # out-of-range elements arrive as zeros
            a = x.load([n_tile * BLOCK_N, start])  # [BLOCK_N, BLOCK_D]
            w = W.load([f_tile * BLOCK_F, start])  # [BLOCK_F, BLOCK_D]
        else:
            d = (start + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
            in_x, in_w = (n < N)[:, None] & (d < D), (f < F)[:, None] & (d < D)
            a = tl.load(x + n.to(tl.int64)[:, None] * stride_xn + d * stride_xd, mask=in_x, other=0.0)
            w = tl.load(W + f.to(tl.int64)[:, None] * stride_wf + d * stride_wd, mask=in_w, other=0.0)
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION)

    live = (n < N)[:, None] & (f < F)[None, :]
    pre = acc + tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    at = out + n.to(tl.int64)[:, None] * stride_on + f[None, :]
    if MAXIMA:
        score = pre
        if HAS_SCALE:
            score = pre * tl.load(scale + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if MAGNITUDE:
            score = tl.abs(score)
        best = tl.max(tl.where(live, score, float("-inf")), axis=1)  # [BLOCK_N]
        tl.store(maxima + n.to(tl.int64) * stride_mn + f_tile, best, mask=n < N)
        tl.store(at, pre, mask=live)
    else:
        if HAS_THETA:
            acts = tl.where(pre > tl.load(theta + f, mask=f < F, other=0.0).to(tl.float32)[None, :], pre, 0.0)
        else:
            acts = tl.maximum(pre, 0.0)
        tl.store(at, acts.to(out.dtype.element_ty), mask=live)


def gemm(
    x: Tensor,
    W: Tensor,
    bias: Tensor,
    out: Tensor,
    theta: Tensor | None = None,
    scale: Tensor | None = None,
    maxima: Tensor | None = None,
    magnitude: bool = False,
) -> None:
    """Fill out [N, F] from x [N, D] and latent-major W [F, D]: activations, or (with `maxima`) raw pre and tile maxima."""
    (N, D), F = x.shape, W.shape[0]
    chosen = tile("gemm_32" if x.dtype == torch.float32 else "gemm_16", x.device)
    blocks = chosen.constants
    precision = dot_precision(x.dtype)
    # the copy engine wants rows that are contiguous and 16-byte aligned; what it brings is laid out for tensor cores, and
    # exact fp32 products, which have none, read it with 255 registers and spills on sm_90 (121 and none without it)
    tma = (
        has_tma(x.device)
        and (x.dtype != torch.float32 or precision == "tf32")
        and all(t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, W))
    )
    _gemm_kernel[(triton.cdiv(N, blocks["BLOCK_N"]) * triton.cdiv(F, blocks["BLOCK_F"]),)](
        TensorDescriptor.from_tensor(x, [blocks["BLOCK_N"], blocks["BLOCK_D"]]) if tma else x,
        TensorDescriptor.from_tensor(W, [blocks["BLOCK_F"], blocks["BLOCK_D"]]) if tma else W,
        bias, theta, scale, out, maxima, N, F, D,
        *x.stride(), *W.stride(), out.stride(0), 0 if maxima is None else maxima.stride(0),
        MAXIMA=maxima is not None, HAS_THETA=theta is not None, HAS_SCALE=scale is not None, MAGNITUDE=magnitude,
        TMA=tma, PRECISION=precision, **blocks, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


@op
def dense_encode_forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | None) -> Tensor:
    if not runs_triton(x):
        return dense_encode_reference(x, W_enc, b_enc, theta)
    acts = x.new_empty(x.shape[0], W_enc.shape[1])
    if acts.numel():
        gemm(x, W_enc.T, b_enc, acts, theta)
    return acts


@dense_encode_forward.register_fake
def _(x, W_enc, b_enc, theta):
    return x.new_empty(x.shape[0], W_enc.shape[1])


def _setup(ctx, inputs, output):
    x, W_enc, _, _ = inputs
    ctx.save_for_backward(x, W_enc, output)


def _backward(ctx, g):
    x, W_enc, acts = ctx.saved_tensors
    dpre = g * (acts > 0)
    needs_x, needs_W, needs_b, _ = ctx.needs_input_grad
    return (
        dpre @ W_enc.T if needs_x else None,
        x.T @ dpre if needs_W else None,
        dpre.sum(0) if needs_b else None,
        None,
    )


dense_encode_forward.register_autograd(_backward, setup_context=_setup)


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor | None = None) -> Tensor:
    """acts [N, F] = relu(x W_enc + b_enc), or the jump at theta [F] >= 0, which gets no gradient here."""
    check.encoder(x, W_enc, b_enc, theta=theta)
    if theta is not None:
        check.non_negative("theta", theta)
    return dense_encode_forward(x, W_enc, b_enc.contiguous(), None if theta is None else theta.detach().contiguous())
