"""What each value of a code gets from the gradient of the decoded bags:  dvalues[e] = s[bag(e)] · g[bag(e)] · W_dec[f(e)].

    g [bags, D]    scale s [bags] or None    latents [E], offsets [bags+1]    W_dec [F, D]    dvalues [E]

Alone, where nobody asks for the gradient of W_dec, or where it is deferred: nothing is sorted then, and nothing has W's size.
"""

import warnings

import torch
from torch import Tensor

from .backend import accumulator, op, runs_triton, tl, triton
from .by_latent import bag_of_entries
from .tiles import tile


def dots_torch(g: Tensor, bags: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    E = latents.shape[0]
    if not E:
        return g.new_empty(0)
    if g.dtype in (torch.float32, torch.float64) and not g.is_cuda:
        with torch.sparse.check_sparse_tensor_invariants(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            pattern = torch.sparse_csr_tensor(offsets, latents, g.new_zeros(E), size=(g.shape[0], W_dec.shape[0]))
            return torch.sparse.sampled_addmm(pattern, g, W_dec.T, beta=0).values()
    # elsewhere: gather a bounded number of rows at a time
    wide = accumulator(g.dtype)
    step = max(1, (1 << 20) // g.shape[1])
    parts = [
        torch.linalg.vecdot(g[bags[e : e + step]].to(wide), W_dec[latents[e : e + step]].to(wide)) for e in range(0, E, step)
    ]
    return torch.cat(parts).to(g.dtype)


@triton.jit
def _dots_kernel(
    g, scale, bags, latents, W_dec, dvalues, D, stride_g, stride_wf, stride_wd, HAS_SCALE: tl.constexpr, BLOCK_D: tl.constexpr
):
    e = tl.program_id(0).to(tl.int64)
    bag, f = tl.load(bags + e).to(tl.int64), tl.load(latents + e).to(tl.int64)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w = tl.load(W_dec + f * stride_wf + d.to(tl.int64) * stride_wd, mask=d < D, other=0.0).to(tl.float32)
        total += w * tl.load(g + bag * stride_g + d, mask=d < D, other=0.0).to(tl.float32)
    dot = tl.sum(total)
    if HAS_SCALE:
        dot *= tl.load(scale + bag).to(tl.float32)
    tl.store(dvalues + e, dot.to(dvalues.dtype.element_ty))


def dots_triton(g: Tensor, scale: Tensor | None, bags: Tensor, latents: Tensor, W_dec: Tensor, dvalues: Tensor) -> None:
    D = g.shape[1]
    chosen = tile("decode", g.device, D)
    if dvalues.shape[0]:
        _dots_kernel[(dvalues.shape[0],)](
            g, scale, bags, latents, W_dec, dvalues, D, g.stride(0), *W_dec.stride(), HAS_SCALE=scale is not None,
            BLOCK_D=min(chosen.constants["BLOCK_D"], triton.next_power_of_2(D)), num_warps=chosen.warps,
        )  # fmt: skip


@op
def entry_dots_op(g: Tensor, scale: Tensor | None, latents: Tensor, offsets: Tensor, W_dec: Tensor) -> Tensor:
    bags = bag_of_entries(offsets, latents.shape[0])
    if runs_triton(g):
        dvalues = g.new_empty(latents.shape[0])
        dots_triton(g if g.stride(1) == 1 else g.contiguous(), scale, bags, latents, W_dec, dvalues)
        return dvalues
    dvalues = dots_torch(g, bags, latents, offsets, W_dec)
    return dvalues if scale is None else dvalues * scale[bags]


@entry_dots_op.register_fake
def _(g, scale, latents, offsets, W_dec):
    return g.new_empty(latents.shape[0])
