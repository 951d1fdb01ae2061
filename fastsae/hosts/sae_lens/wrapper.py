"""What attaches an SAE to a model (HookedSAETransformer, SAETransformerBridge).

The wrapper of SAELens calls `encode`, then `decode`, and both again for the error term. With nobody listening one pass without
[N, F] is all of it. The skip term of a skip transcoder, which SAELens leaves out here, is part of what it reconstructs.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import fast_classes, stock_class
from .codes import heard
from .inference import reconstruction


def replacements() -> list[tuple[object, str, Any]]:
    cls: Any = import_module("sae_lens.analysis.hooked_sae_transformer")._SAEWrapper
    return [(cls, "forward", _forward(cls.forward))]


def _forward(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    disable_hooks = import_module("sae_lens.saes.sae")._disable_hooks

    @wraps(stock)
    def forward(self: Any, original_output: Tensor) -> Tensor:
        cls = stock_class(type(self.sae))
        if cls not in fast_classes("sae_lens"):
            return stock(self, original_output)
        x = original_output if self._captured_input is None else self._captured_input
        mask = self._token_mask
        if mask is not None:
            mask = mask.reshape(mask.shape + (1,) * (original_output.dim() - mask.dim()))
        try:
            y = reconstruction(self.sae, cls, x)
            if self.use_error_term:
                with torch.no_grad():
                    clean = y
                    if heard(self.sae):
                        with disable_hooks(self.sae):
                            clean = reconstruction(self.sae, cls, x)
                    error = original_output - clean
                    if mask is not None:
                        error = error.masked_fill(mask, 0)
                    error = self.hook_sae_error(error)
                y = y + error
            return self.hook_sae_output(y if mask is None else torch.where(mask, original_output, y))
        finally:
            self._captured_input = None

    return forward
