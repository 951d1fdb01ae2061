"""Pre-activations x W_enc + b_enc in bounded pieces, in one buffer that each piece overwrites.

Selections read pieces and keep entries; [N, F] never exists. A CPU takes blocks of rows, so that each row is searched whole;
a GPU takes chunks of latents, so that W_enc is read once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .backend import accumulator

CHUNK = 4096  # latents per chunk on a GPU: 134 MB of fp32 scores at N = 8192
BLOCK_ELEMENTS = 1 << 24  # scores per block of rows on a CPU: 64 MB, so that the GEMM sees some hundred rows
PANEL = 64  # latents per small product where there are few rows


def row_blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, pre-activations [R, F] in fp32 or fp64) by blocks of rows, in one buffer that each step overwrites."""
    N, F = x.shape[0], W_enc.shape[1]
    blocks = max(1, -(-N * F // BLOCK_ELEMENTS))
    rows = min(max(1, -(-N // blocks)), max(1, BLOCK_ELEMENTS // F))
    wide = accumulator(x.dtype)
    buffer = torch.empty(min(rows, N), F, dtype=wide, device=x.device)
    for first in range(0, N, rows):
        part = x[first : first + rows]
        pre = buffer[: part.shape[0]]
        if x.dtype != wide:  # 16 bits: widen the operands chunk by chunk, since a 16-bit GEMM would round before selection
            for f in range(0, F, CHUNK):
                columns = slice(f, f + CHUNK)
                torch.addmm(b_enc[columns].to(wide), part.to(wide), W_enc[:, columns].to(wide), out=pre[:, columns])
        elif 2 < part.shape[0] <= 32 and W_enc.T.is_contiguous() and not x.is_cuda:
            _few_rows(part, W_enc.T, b_enc, pre)
        else:
            torch.addmm(b_enc, part, W_enc, out=pre)
        yield first, pre


def _few_rows(x: Tensor, W: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = x W^T + bias for a handful of rows, bound by reading W [F, D] once.

    The GEMM library packs W as if it would use it often. Small products over panels of W do not: measured at F 65,536,
    D 768, 2 threads, in units of one read of W: 8 rows 1.2 instead of 3.4, 16 rows 1.6 (2.1), 32 rows 2.1 (2.6).
    """
    (N, D), F = x.shape, W.shape[0]
    panels = F // PANEL
    whole = panels * PANEL
    tiles = W[:whole].view(panels, PANEL, D)
    if N <= 8:
        product = torch.bmm(x.contiguous().expand(panels, N, D), tiles.transpose(1, 2))  # [panels, N, PANEL]
        out[:, :whole].unflatten(1, (panels, PANEL)).copy_(product.transpose(0, 1))
    else:
        product = torch.bmm(tiles, x.T.contiguous().expand(panels, D, N))  # [panels, PANEL, N]
        out[:, :whole].copy_(product.view(whole, N).T)
    out[:, :whole] += bias[:whole]
    if whole < F:
        torch.addmm(bias[whole:], x, W[whole:].T, out=out[:, whole:])


def chunk_gemm(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out = x @ W in fp32, by the vendor's GEMM."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, W, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), W.float(), out=out)
