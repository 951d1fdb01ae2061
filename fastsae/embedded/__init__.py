"""The small language model that fastsae ships, and the text that it was trained on: see pydoc-gpt2/README.md."""

import json
import lzma
from pathlib import Path
from typing import Literal


def path() -> Path:
    """A Hugging Face GPT-2 folder, which transformers and TransformerLens load as it is."""
    return Path(__file__).parent / "pydoc-gpt2"


def texts(split: Literal["train", "held_out"]) -> list[str]:
    """The passages of one side of the split."""
    passages: dict[str, list[str]] = json.loads(lzma.decompress((path() / "texts.json.xz").read_bytes()))
    if split not in passages:
        raise ValueError(f"split={split!r} is not a split of the embedded text: pass one of {sorted(passages)}")
    return passages[split]
