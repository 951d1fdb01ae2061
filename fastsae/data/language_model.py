"""A source of activations: a language model reading tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .models import LanguageModel
from .source import Batch
from .staging import sent
from .tokens import Tokens

MEMORY = 100
"""Forward passes that the running median remembers."""


class Activations:
    """The activations of a language model at one hook, [n, D]; at a list of them, by name; or with `target_hook` (x, target).

    Rows are tokens: all hooks have the same ones, from one forward pass per batch of tokens. Heads are laid side by side. The
    dtype is the model's. Left out are the tokens `exclude_tokens` (see `special_token_ids`), and with `max_norm_multiple` those
    whose norm at any of the hooks is over so many running medians of the norm there.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tokens,
        hooks: str | Sequence[str],
        *,
        target_hook: str | None = None,
        device: torch.device | str | None = None,
        exclude_tokens: Iterable[int] = (),
        max_norm_multiple: float | None = None,
    ):
        if target_hook is not None and not isinstance(hooks, str):
            raise TypeError(f"hooks={list(hooks)} with target_hook={target_hook!r}: pass one hook, as a str")
        if max_norm_multiple is not None and not max_norm_multiple > 1:
            raise ValueError(f"max_norm_multiple={max_norm_multiple}: pass a number > 1, or None")
        self.model, self.tokens, self.hooks, self.target_hook = model, tokens, hooks, target_hook
        self.device = model.device if device is None else torch.device(device)
        self.max_norm_multiple = max_norm_multiple
        self._wanted = [hooks] if isinstance(hooks, str) else list(hooks)
        if target_hook is not None:
            self._wanted.append(target_hook)
        self._excluded = torch.tensor(sorted(exclude_tokens), dtype=torch.long)
        self._passes = 0
        self._medians: dict[str, Tensor] = {}  # by hook

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        tokens = next(self.tokens)
        found = self.model.run(tokens, self._wanted)
        rows = {hook: per_token(hook, x, tokens).flatten(0, 1) for hook, x in found.items()}
        keep = self._kept(tokens.flatten(), rows)
        if keep is not None:
            at = keep.nonzero().squeeze(1)  # here, on the CPU: on a GPU it would wait for the model
            rows = {hook: x.index_select(0, sent(at, x.device)) for hook, x in rows.items()}
        rows = {hook: x.to(self.device) for hook, x in rows.items()}
        if isinstance(self.hooks, str):
            x = rows[self.hooks]
            return x if self.target_hook is None else (x, rows[self.target_hook])
        return rows

    def _kept(self, tokens: Tensor, rows: dict[str, Tensor]) -> Tensor | None:
        """Which rows [n] pass the filters; None if there are none."""
        keep = ~torch.isin(tokens, self._excluded) if len(self._excluded) else None
        if self.max_norm_multiple is None:
            return keep
        if keep is None:
            keep = torch.ones(len(tokens), dtype=torch.bool)
        normal = keep
        self._passes += bool(keep.any())
        for hook, x in rows.items():
            norms = x.float().norm(dim=1).cpu()
            if keep.any():
                median, before = norms[keep].median(), self._medians.get(hook, torch.tensor(0.0))
                self._medians[hook] = before + (median - before) / min(self._passes, MEMORY)
                normal = normal & (norms <= self.max_norm_multiple * self._medians[hook])
        return normal

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens.state_dict(), "passes": self._passes, "medians": dict(self._medians)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens.load_state_dict(state["tokens"])
        self._passes, self._medians = state["passes"], dict(state["medians"])


def per_token(hook: str, x: Tensor, tokens: Tensor) -> Tensor:
    """The activations of tokens [B, context] at a hook as [B, context, D], heads side by side."""
    if x.shape[:2] != tokens.shape or x.dim() < 3:
        raise ValueError(f"hook {hook!r} gives {list(x.shape)} for tokens {list(tokens.shape)}: pass one with a row for each")
    return x.flatten(2)
