"""The batches that a config asks for."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

from ..config import DataConfig, TrainConfig
from .documents import open_dataset
from .language_model import Activations
from .models import LanguageModel, without_bars
from .prefetch import Prefetch
from .saelens_cache import SAELensCache
from .shards import Shards
from .shuffle import Shuffle
from .source import Source
from .synthetic import Superposition
from .tokens import Tokens, special_token_ids


def chosen_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: pass auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}, but torch finds no GPU: pass device=cpu, or see `fastsae doctor`")
    return device


def load_model(data: DataConfig, device: torch.device | str) -> LanguageModel:
    """The language model whose activations are read."""
    name: Any = data.model
    if name == "embedded":
        from .. import embedded

        name = embedded.path()
    with without_bars():
        return LanguageModel.load(name, data.backend, data.model_device or device, getattr(torch, data.model_dtype))


Load = Callable[[DataConfig, torch.device], LanguageModel]
"""load_model, or one that remembers."""


@contextmanager
def opened(
    config: TrainConfig,
    source: Source | None,
    device: torch.device,
    poll: Callable[[], None] | None = None,
    load: Load = load_model,
) -> Generator[Shuffle]:
    """Shuffled batches of exactly batch_size rows: of `source`, or else of what the config names. `poll` may interrupt."""
    raw = source
    if raw is None:
        model = load(config.data, device) if config.data.source == "model" else None
        raw = open_source(config, device, model=model)
    ahead = config.data.prefetch if source is None and config.data.source != "synthetic" else 0
    read = Prefetch(raw, ahead) if ahead else raw
    try:
        yield Shuffle(read, config.data.buffer, config.batch_size, config.seed, device=device, drop_last=True, poll=poll)
    finally:
        if isinstance(read, Prefetch):
            read.close()


def open_source(
    config: TrainConfig, device: torch.device, held_out: bool = False, model: LanguageModel | None = None
) -> Source:
    """The activations themselves, in chunks of any number of rows.

    `held_out`: other ones than in training, if the data `have_held_out`: other synthetic rows, other texts of the embedded
    data set, once. `model` is the language model if it is there already.
    """
    data, seed = config.data, config.seed
    if data.source == "given":
        raise ValueError("source='given': the batches were passed in Python; fastsae.evaluate(sae, batches) measures on such")
    if data.source == "synthetic":
        return Superposition(
            data.d_in, data.features, data.active,
            batch_size=config.batch_size, seed=seed, stream=int(held_out), device=device,
        )  # fmt: skip
    if data.source == "shards":
        return Shards(str(data.path), seed=seed)
    if data.source == "saelens_cache":
        return SAELensCache(str(data.path), hook=data.hook, seed=seed)
    hooks = hook_names(config)
    model = model or load_model(data, device)
    return Activations(
        model, open_tokens(config, model, held_out), hooks[0] if len(hooks) == 1 else hooks,
        device=device, exclude_tokens=excluded(data, model), max_norm_multiple=data.max_norm_multiple,
    )  # fmt: skip


def have_held_out(data: DataConfig) -> bool:
    """Whether such data have rows that training does not read."""
    return data.source == "synthetic" or (data.source == "model" and data.dataset == "embedded")


def excluded(data: DataConfig, model: LanguageModel) -> list[int]:
    """Tokens whose activations are left out."""
    return [] if data.keep_special_tokens else special_token_ids(model.tokenizer)


def hook_names(config: TrainConfig) -> list[str]:
    """Where activations are read, for all SAEs of the run together."""
    names: list[str] = []
    for member in config.members().values():
        names += [member.data.hook, *([member.data.target_hook] if member.data.target_hook else [])]
    return list(dict.fromkeys(names))


def open_tokens(config: TrainConfig, model: LanguageModel, held_out: bool = False) -> Tokens:
    """Tokens of the data set without end, or those to evaluate on once."""
    data = config.data
    dataset: str | Iterable[Any] = data.dataset
    if dataset == "embedded":
        from .. import embedded

        dataset = embedded.texts("held_out" if held_out else "train")
    else:
        dataset = open_dataset(data.dataset, split=data.split, stream=data.streaming)
    seed = None if held_out else config.seed
    return Tokens(dataset, model.tokenizer, data.context, data.sequences, column=data.column, seed=seed, repeat=not held_out)
