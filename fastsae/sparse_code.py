"""SparseCode: the one value that flows from encode to decode."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .kernels import check


@dataclass(frozen=True)
class SparseCode:
    """Active entries of a batch, row by row.

    Row n owns the entries offsets[n] : offsets[n+1]; within a row latents ascend and each stands once. A zero value is a
    legal entry and does not count as fired.
    """

    values: Tensor
    """[E] activations"""
    latents: Tensor
    """[E] int32"""
    offsets: Tensor
    """[N+1] int32"""
    shape: tuple[int, ...]
    """(leading dimensions of the input, d_sae): the shape of `dense()`"""
    k: int | None = None
    """entries per row where every row has as many; then `values.view(N, k)` is the familiar pair with `latents`"""
    pre: Tensor | None = field(default=None, repr=False)
    """[E] pre-activations, for losses that need them"""
    by_latent: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """(order [E], starts [d_sae+1]): entries order[starts[f]:starts[f+1]] belong to latent f; what backward passes walk"""

    @property
    def d_sae(self) -> int:
        """Width of the dictionary."""
        return self.shape[-1]

    @property
    def rows(self) -> Tensor:
        """The row each entry belongs to. [E] int32"""
        rows = torch.arange(self.offsets.shape[0] - 1, dtype=torch.int32, device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.values.shape[0])

    def with_values(self, values: Tensor) -> "SparseCode":
        """The same entries with other values [E]."""
        check.tensor("values", values)
        if values.shape != self.latents.shape:
            raise ValueError(f"values has shape {list(values.shape)}: this code has {self.latents.shape[0]} entries")
        return replace(self, values=values)

    def dense(self) -> Tensor:
        """The activations as a matrix [..., d_sae]. Differentiable."""
        flat = self.rows.long() * self.d_sae + self.latents
        zeros = self.values.new_zeros((self.offsets.shape[0] - 1) * self.d_sae)
        return zeros.index_put((flat,), self.values).view(self.shape)

    def l0(self) -> Tensor:
        """How many latents fired in each row. [leading dimensions]"""
        fired = torch.nn.functional.pad((self.values != 0).cumsum(0), (1, 0))
        return fired[self.offsets.long()].diff().view(self.shape[:-1])

    def restrict(self, latents: Tensor) -> "SparseCode":
        """Only the entries of these latents; ids stay those of the whole dictionary."""
        check.tensor("latents", latents)
        if latents.dtype == torch.bool:
            raise TypeError("latents is torch.bool: pass the ids themselves, mask.nonzero()")
        if latents.is_floating_point() or latents.is_complex():
            raise TypeError(f"latents is {latents.dtype}: pass integer ids")
        check.latents_in_range(latents, self.d_sae)
        wanted = torch.zeros(self.d_sae, dtype=torch.bool, device=self.latents.device)
        wanted[latents.long()] = True
        kept = wanted[self.latents]
        offsets = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[self.offsets.long()].int()
        pre = None if self.pre is None else self.pre[kept]
        return SparseCode(self.values[kept], self.latents[kept], offsets, self.shape, pre=pre)
