"""A promise of a dense tensor: what a training step hands out as `feature_acts` and `hidden_pre`.

SAETrainer asks its activations one thing, how often each latent fired and how many did in each row, and that is known
without them. Whoever asks anything else gets the dense tensor, made at that moment and kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_tensor: Any = Tensor
_PROPERTIES = ("shape", "dtype", "device", "layout", "is_sparse", "is_cuda", "ndim")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}


def lazy(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[[], Tensor],
    fired: tuple[Tensor, Tensor] | None = None,
) -> "LazyTensor":
    """make() when somebody needs it."""
    promise: LazyTensor = _tensor._make_wrapper_subclass(LazyTensor, shape, dtype=dtype, device=device)
    promise.make, promise.fired = make, fired
    return promise


class LazyTensor(Tensor):
    """What `lazy` makes: has a shape and a type, and becomes the whole tensor when anything else is asked."""

    make: Callable[[], Tensor]
    fired: tuple[Tensor, Tensor] | None
    """How many entries are not zero: for each latent [F] and in each row [N]"""
    made: Tensor | None = None
    is_firing = False
    """Every entry is 1 or 0, by whether it fired"""

    def whole(self) -> Tensor:
        """The tensor itself."""
        if self.made is None:
            self.made, self.fired = self.make(), None  # what is done to it in place is not counted
        return self.made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        asked = args[0] if args else None
        if isinstance(asked, LazyTensor) and asked.fired is not None and not kwargs:
            if func is Tensor.bool and len(args) == 1:
                return asked._firing(torch.bool)
            if func is Tensor.float and len(args) == 1 and asked.is_firing:
                return asked._firing(torch.float32)
            if func is Tensor.sum and len(args) == 2 and asked.is_firing and args[1] in (0, -2, 1, -1):
                return asked.fired[args[1] % 2]
        return func(*_whole(args), **_whole(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_whole(args), **_whole(kwargs or {}))

    def _firing(self, dtype: torch.dtype) -> "LazyTensor":
        """1 where this is not zero."""
        firing = lazy(tuple(self.shape), dtype, self.device, lambda: self.whole().bool().to(dtype), self.fired)
        firing.is_firing = True
        return firing


def _whole(tree: Any) -> Any:
    return tree_map_only(LazyTensor, LazyTensor.whole, tree)
