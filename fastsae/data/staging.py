"""Copies to a GPU that do not wait for the work it has under way: through pinned memory of their own."""

import torch
from torch import Tensor


def staged(t: Tensor, device: torch.device) -> Tensor:
    """`t`, or a copy of it from which a GPU can be written while the host goes on. torch keeps its memory until then."""
    if device.type != "cuda" or t.device.type != "cpu":
        return t
    return torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t)


def put(target: Tensor, rows: Tensor) -> None:
    """target = rows, from anywhere."""
    target.copy_(staged(rows, target.device), non_blocking=target.device.type == "cuda")


def sent(t: Tensor, device: torch.device) -> Tensor:
    """`t` on the device."""
    return staged(t, device).to(device, non_blocking=device.type == "cuda")
