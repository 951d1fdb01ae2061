"""Pre-activations x W_enc + b_enc in bounded pieces, in one buffer that each piece overwrites.

Selections read pieces and keep entries; [N, F] never exists. A piece is some latents of many rows, so that W_enc is read, and
packed by the GEMM library of a CPU, as seldom as can be.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .backend import accumulator, exactly

CHUNK = 4096  # latents per GEMM: 134 MB of fp32 scores at N = 8192 on a GPU
BLOCK_ELEMENTS = 1 << 24  # scores per piece on a CPU: 64 MB
PANEL = 64  # latents per small product where there are few rows
STRIP = 1 << 14  # latents per convolution there: 4 MB of scores at most, and 2 % from one convolution's speed


# The last buffer of `pieces` on a CPU, by dtype. Fresh memory costs a page fault every 4 KB, 10 % of a training step.
_spare: dict[torch.dtype, Tensor] = {}


def pieces(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, latents: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, latents, their pre-activations [R, C] in fp32 or fp64), all latents of some rows before the next rows.

    A piece has at least `latents` (CHUNK) latents, or all that are left: with F, rows are whole. It overwrites the one before.
    """
    N, F = x.shape[0], W_enc.shape[1]
    least = min(CHUNK if latents is None else latents, F)
    passes = max(1, -(-N // max(1, BLOCK_ELEMENTS // least)))
    rows = max(1, -(-N // passes))
    width = min(F, max(least, BLOCK_ELEMENTS // rows // PANEL * PANEL))
    wide = accumulator(x.dtype)
    # taken out while in use, so that another thread, or a selection that encodes, gets its own
    flat = _spare.pop(wide, None) if _keeps(x) else None
    if flat is None or flat.numel() < rows * width:
        flat = torch.empty(rows * width, dtype=wide, device=x.device)
    try:
        for n in range(0, N, rows):
            part = x[n : n + rows]
            for f in range(0, F, width):
                W, b = W_enc[:, f : f + width], b_enc[f : f + width]
                pre = flat[: part.shape[0] * W.shape[1]].view(-1, W.shape[1])
                with exactly(x):
                    _scores(part, W, b, pre)
                yield slice(n, n + part.shape[0]), slice(f, f + W.shape[1]), pre
    finally:
        if _keeps(x) and flat.numel() <= BLOCK_ELEMENTS and not flat.is_inference():
            _spare[wide] = flat


def _keeps(x: Tensor) -> bool:
    return x.device.type == "cpu" and type(x) is Tensor  # a subclass, such as a fake one, makes buffers of its own kind


def _scores(x: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor) -> None:
    """out = x W_enc + b_enc in out's dtype."""
    if x.dtype == out.dtype and (few_rows := _few_rows_way(x, W_enc)):
        return few_rows(x, W_enc.T, b_enc, out)
    x = x.to(out.dtype)  # 16 bits are widened, of W_enc chunk by chunk, since a 16-bit GEMM would round before selection
    for f in range(0, W_enc.shape[1], CHUNK):
        columns = slice(f, f + CHUNK)
        # addmm would copy the bias into the piece, which the GEMM then reads: 5 % slower
        torch.mm(x, W_enc[:, columns].to(out.dtype), out=out[:, columns]).add_(b_enc[columns])


def _few_rows_way(x: Tensor, W_enc: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    """What is faster than a GEMM for a handful of rows on a CPU, bound by reading W_enc once.

    The GEMM library packs W_enc as if it would use it often; these read it where it lies. Times: docs/log.md, "Few rows".
    """
    N = x.shape[0]
    if x.is_cuda or not W_enc.T.is_contiguous():
        return None
    if 4 < N <= 64 and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return _by_convolution
    return _by_panels if 2 < N <= 8 else None


def _by_convolution(x: Tensor, W: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = x W^T + bias: latents are pixels, and rows the filters of oneDNN's 1x1 convolution."""
    N, D = x.shape
    filters = torch.nn.functional.pad(x, (0, 0, 0, -N % 16))[:, :, None, None]  # it computes 16 of them at a time anyway
    for f in range(0, W.shape[0], STRIP):
        columns = slice(f, f + STRIP)
        latents = W[columns]
        pixels = PANEL if latents.shape[0] % PANEL == 0 else latents.shape[0]  # a single thread is slow on a large image
        images = torch.nn.functional.conv2d(latents.view(-1, pixels, 1, D).permute(0, 3, 1, 2), filters)
        out[:, columns].copy_(images.permute(0, 2, 3, 1).reshape(-1, filters.shape[0])[:, :N].T).add_(bias[columns])


def _by_panels(x: Tensor, W: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = x W^T + bias by small products with panels of W."""
    (N, D), F = x.shape, W.shape[0]
    panels = F // PANEL
    whole = panels * PANEL
    tiles = W[:whole].view(panels, PANEL, D)
    product = torch.bmm(x.contiguous().expand(panels, N, D), tiles.transpose(1, 2))  # [panels, N, PANEL]
    out[:, :whole].unflatten(1, (panels, PANEL)).copy_(product.transpose(0, 1))
    out[:, :whole] += bias[:whole]
    if whole < F:
        torch.addmm(bias[whole:], x, W[whole:].T, out=out[:, whole:])


def nonzero_at_least(mask: Tensor) -> int:
    """How many of a contiguous mask are True at least, in a hundredth of the time of listing half of them."""
    flat = mask.flatten()
    return int(flat[: flat.numel() // 8 * 8].view(torch.int64).count_nonzero())


def nonzero_flat(mask: Tensor) -> Tensor:
    """Flat positions of True in a contiguous mask, ascending; most bytes are False, so look at eight at a time."""
    flat = mask.flatten()
    whole = flat.numel() // 8 * 8
    if whole < 1 << 16:
        return flat.nonzero().squeeze(1)
    words = flat[:whole].view(torch.int64).nonzero().squeeze(1)
    bytes_ = words[:, None] * 8 + torch.arange(8, device=mask.device)
    found = bytes_[flat[:whole].view(-1, 8)[words]]
    return torch.cat([found, flat[whole:].nonzero().squeeze(1) + whole])


def chunk_gemm(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out = x @ W in fp32, by the vendor's GEMM."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, W, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), W.float(), out=out)
