"""When a fast method of dictionary_learning or sparsify stands in for the host's.

A fast method covers the host's class as the host wrote it, fed with numbers. A subclass, or somebody who put a method on the
object, may have changed any of the steps that it takes in one go; somebody may listen to a submodule or have replaced it;
torch.compile cannot branch on how sparse a code is, and torch.func and forward-mode differentiation need rules that operators
of ours do not have. Then the host's own method runs. So it does where a fast method returns NotImplemented.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..kernels import check
from . import stock_class

STEPS = {"encode", "decode", "forward", "loss", "update_threshold", "get_auxiliary_loss"}
"""What fast methods take in one go."""


def is_stock(thing: object, cls: type) -> bool:
    """Whether `thing` (accelerated or not) is a `cls` as the host has it, and autograd is all that looks on."""
    if stock_class(type(thing)) is not cls or STEPS & vars(thing).keys():
        return False
    parts = vars(thing).get("_modules", {})
    return (
        all(_is_plain(parts[name]) for name in ("encoder", "decoder") if name in parts)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]
        and forward_ad._current_level < 0  # type: ignore[attr-defined]
    )


def _is_plain(part: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(part) is nn.Linear and not any(getattr(part, name) for name in hooks)


def _is_numbers(value: object) -> bool:
    """Not a tensor with a NaN or an infinity, where looking costs no host sync."""
    if not isinstance(value, Tensor) or value.is_cuda or not value.is_floating_point():
        return True
    return check.all_finite(value.detach())


def stand_in(fast: Callable[..., Any], cls: type, name: str) -> Callable[..., Any]:
    """`fast` in place of cls.name, which runs where `fast` does not apply."""
    stock = vars(cls)[name]

    @wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        usual = is_stock(self, cls) and all(map(_is_numbers, (*args, *kwargs.values())))
        result = fast(self, *args, **kwargs) if usual else NotImplemented
        return stock(self, *args, **kwargs) if result is NotImplemented else result

    return method
