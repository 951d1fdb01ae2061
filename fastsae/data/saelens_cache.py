"""The folders in which SAELens caches activations, as a source."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..optional import need
from .blocks import Blocks
from .source import Batch


class SAELensCache(Blocks):
    """Rows [n, D] of what CacheActivationsRunner wrote, `sequences` neighbouring sequences at a time; Blocks has their order.

    Such a folder is a dataset with a column named after the hook, [context, D] in float32 or float16, and most often
    "token_ids". Positions of a token in `drop_tokens` are left out.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        hook: str | None = None,
        sequences: int = 16,
        drop_tokens: Iterable[int] = (),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        if sequences < 1:
            raise ValueError(f"sequences={sequences}: pass sequences >= 1")
        path = Path(path)
        if not (path / "dataset_info.json").is_file() or not (path / "state.json").is_file():
            raise FileNotFoundError(f"{path} is no folder of cached activations: dataset_info.json or state.json is missing")
        dataset: Any = need("datasets", "lm").load_from_disk(str(path))
        hooks = [name for name in dataset.column_names if len(getattr(dataset.features[name], "shape", ())) == 2]
        self.hook = hooks[0] if hook is None and len(hooks) == 1 else hook
        if self.hook not in hooks:
            raise ValueError(f"hook={hook!r}, but {path} holds activations of {hooks}: pass one of them")
        self.drop_tokens = torch.tensor(sorted(set(drop_tokens)), dtype=torch.int64)
        columns = [self.hook] + ["token_ids"] * bool(len(self.drop_tokens))
        if missing := set(columns) - set(dataset.column_names):
            raise ValueError(f"{path} has no column {missing.pop()!r}, which drop_tokens needs: pass none")
        self.sequences = sequences
        self.dtype = getattr(torch, dataset.features[self.hook].dtype)
        self._dataset = dataset.select_columns(columns).with_format("numpy")
        digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
        data = f"{self.hook} of {digest} by {sequences} sequences, without {self.drop_tokens.tolist()}"
        super().__init__(
            math.ceil(len(dataset) / sequences), data,
            seed=seed, rank=rank, world_size=world_size, shuffle=shuffle, epochs=epochs,
        )  # fmt: skip

    def read(self, block: int) -> Batch:
        rows = self._dataset[block * self.sequences : (block + 1) * self.sequences]
        # datasets gives float16 as float32
        x = torch.tensor(rows[self.hook]).to(self.dtype).flatten(0, 1)
        if not len(self.drop_tokens):
            return x
        return x[~torch.isin(torch.tensor(rows["token_ids"]).flatten(), self.drop_tokens)]
