"""Language models of TransformerLens and of Hugging Face behind one small interface: read at hooks, replace at hooks."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..optional import need

Hook = Callable[[Tensor], Tensor]
"""From the activations at a hook to those that the model goes on with."""


@contextmanager
def without_bars() -> Generator[None]:
    """Within it transformers draws no bars over weights that it reads; what is downloaded still has them."""
    bars, downloads = need("transformers.utils.logging", "lm"), need("huggingface_hub.utils", "lm")
    if not bars.is_progress_bar_enabled():
        yield
        return
    shown = not downloads.are_progress_bars_disabled()
    bars.disable_progress_bar()  # those of downloads with them
    if shown:
        downloads.enable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bar()
        if not shown:
            downloads.disable_progress_bars()


class _Enough(Exception):
    """Ends a forward pass."""


class LanguageModel(ABC):
    """A causal language model and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    @staticmethod
    def load(
        name: str | Path,
        backend: Literal["auto", "transformer_lens", "huggingface"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LanguageModel":
        """The model of a folder or a Hub name, its weights as they are; "auto" takes TransformerLens if that is installed."""
        if backend not in ("auto", "transformer_lens", "huggingface"):
            raise ValueError(f"backend={backend!r}: pass 'auto', 'transformer_lens' or 'huggingface'")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if backend == "huggingface" or (backend == "auto" and find_spec("transformer_lens") is None):
            transformers = need("transformers", "lm")
            model = transformers.AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype).to(device).eval()
            return HuggingFace(model, transformers.AutoTokenizer.from_pretrained(str(name)))
        lens = need("transformer_lens", "lm")
        try:
            hooked = lens.HookedTransformer  # gone since version 4, and it reads no folders
        except ImportError:
            hooked = None
        if hooked is not None and not Path(name).is_dir():
            return TransformerLens(hooked.from_pretrained_no_processing(str(name), device=device, dtype=dtype).eval())
        bridge = need("transformer_lens.model_bridge", "lm").TransformerBridge
        return TransformerLens(bridge.boot_transformers(str(name), device=device, dtype=dtype).eval())

    @staticmethod
    def wrap(model: nn.Module, tokenizer: Any = None) -> "LanguageModel":
        """A loaded model: TransformerLens' HookedTransformer or bridge, or one of Hugging Face with its tokenizer."""
        if hasattr(model, "hook_dict"):
            return TransformerLens(model, tokenizer)
        if hasattr(model, "get_input_embeddings"):
            return HuggingFace(model, tokenizer)
        raise TypeError(f"model is a {type(model).__name__}: pass a model of TransformerLens or of Hugging Face transformers")

    @property
    def device(self) -> torch.device:
        """Where tokens go: the device of the embedding, which stands first."""
        return next(self.model.parameters()).device

    @abstractmethod
    def hooked(self, hooks: Mapping[str, Hook]) -> AbstractContextManager[object]:
        """Within it, each forward pass goes through these."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, context, vocabulary] of tokens [B, context]."""

    def logits(self, tokens: Tensor, replace: Mapping[str, Hook] | None = None) -> Tensor:
        """Logits [B, context, vocabulary], with the activations at some hooks replaced."""
        with self.hooked(replace or {}):
            return self.forward(tokens.to(self.device))

    @torch.no_grad()
    def run(self, tokens: Tensor, hooks: Sequence[str], stop_early: bool = True) -> dict[str, Tensor]:
        """The activations [B, context, ...] at the hooks. With `stop_early` nothing is computed after the last of them."""
        found: dict[str, Tensor] = {}
        wanted = set(hooks)

        def keep(name: str) -> Hook:
            def hook(x: Tensor) -> Tensor:
                found[name] = x
                if stop_early and len(found) == len(wanted):
                    raise _Enough
                return x

            return hook

        try:
            self.logits(tokens, {name: keep(name) for name in wanted})
        except _Enough:
            pass
        if silent := wanted - set(found):
            raise ValueError(f"{sorted(silent)} did not fire in a forward pass: pass hooks that this model runs through")
        return {name: found[name] for name in hooks}

    def width(self, hook: str) -> int:
        """How many numbers a token has there."""
        return self.run(torch.zeros(1, 1, dtype=torch.long), [hook])[hook].flatten(2).shape[2]


class TransformerLens(LanguageModel):
    """HookedTransformer, or since version 3 the bridge; hooks are its hook points."""

    def __init__(self, model: Any, tokenizer: Any = None):
        super().__init__(model, tokenizer or model.tokenizer)
        self.options = {"use_cache": False} if hasattr(model, "original_model") else {}  # of the model in the bridge

    def hooked(self, hooks: Mapping[str, Hook]) -> AbstractContextManager[object]:
        for name in hooks:
            if name not in self.model.hook_dict:
                raise unknown(name, self.model.hook_dict)

        def adapt(replace: Hook) -> Callable[..., Tensor]:
            def at_point(x: Tensor, hook: object) -> Tensor:
                return replace(x)

            return at_point

        return self.model.hooks(fwd_hooks=[(name, adapt(replace)) for name, replace in hooks.items()])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, return_type="logits", **self.options)


class HuggingFace(LanguageModel):
    """A model of transformers. A hook is a module's dotted name, for its output (the first, if there are several), or the name
    and ".input"; or `blocks.{i}.hook_resid_pre` or `_post` as in TransformerLens, if it is plain which modules the blocks are.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    @contextmanager
    def hooked(self, hooks: Mapping[str, Hook]) -> Generator[None]:
        with ExitStack() as stack:
            for name, replace in hooks.items():
                module, wants_input = self._place(name)
                if wants_input:
                    handle = module.register_forward_pre_hook(_before(replace), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(_after(replace, name))
                stack.callback(handle.remove)
            yield

    def _place(self, hook: str) -> tuple[nn.Module, bool]:
        """The module, and whether its input is meant."""
        modules = dict(self.model.named_modules())
        if hook in modules:
            return modules[hook], False
        if hook.endswith(".input") and (name := hook.removesuffix(".input")) in modules:
            return modules[name], True
        if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook):
            blocks, i = self._blocks(modules), int(found[1])
            if i >= len(blocks):
                raise ValueError(f"hook {hook!r}: this model has {len(blocks)} blocks, from 0")
            return blocks[i], found[2] == "pre"
        raise unknown(hook, modules)

    def _blocks(self, modules: dict[str, nn.Module]) -> nn.ModuleList:
        """The one outermost list that is as long as the model is deep."""
        depth = self.model.config.get_text_config().num_hidden_layers
        lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == depth}
        outermost = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        if len(outermost) != 1:
            raise ValueError(f"the {depth} blocks could be any of {sorted(lists)}: pass a module's dotted name as the hook")
        return outermost[0]


def _before(replace: Hook) -> Callable[..., Any]:
    """A pre-hook on the first argument, which some models pass by name."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: replace(kwargs[name])}

    return hook


def _after(replace: Hook, name: str) -> Callable[..., Any]:
    """A hook on the output, or on the first of several."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return replace(output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return replace(output[0]), *output[1:]
        raise ValueError(f"hook {name!r} gives a {type(output).__name__}: pass a module that gives a tensor")

    return hook


def unknown(hook: str, names: Any) -> ValueError:
    """What to say to a hook that is not among the names."""
    near = get_close_matches(hook, names, n=3)
    return ValueError(f"this model has no hook {hook!r}: pass one of its own, for example {near or sorted(names)[:3]}")
