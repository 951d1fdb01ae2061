"""SAELens: which classes become fast, and what else `patch` changes.

    forward                  the sparse path: no [N, F] unless a hook listens to it or the code is not sparse
    encode                   dense, as its users expect
    decode                   gathers what is not zero
    training_forward_pass    the loss, its parts and its gradients, with activations as a promise (lazy.py)

`temporal` and `matching_pursuit` stay as they are.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn

from . import inference, trainer, training, wrapper

INFERENCE = (
    "StandardSAE", "TopKSAE", "AbsTopKSAE", "JumpReLUSAE", "GatedSAE",
    "Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder",
)  # fmt: skip
TRAINING = (
    "StandardTrainingSAE", "GatedTrainingSAE", "TopKTrainingSAE", "AbsTopKTrainingSAE", "BatchTopKTrainingSAE",
    "MatryoshkaBatchTopKTrainingSAE", "JumpReLUTrainingSAE",
)  # fmt: skip
CLASSES = (*INFERENCE, *TRAINING)


def methods() -> dict[type[nn.Module], dict[str, Any]]:
    """Each class with its fast methods."""
    library = import_module("sae_lens")
    table = {getattr(library, name): inference.methods(getattr(library, name)) for name in CLASSES}
    for name in TRAINING:
        cls = getattr(library, name)
        table[cls]["training_forward_pass"] = training.training_forward_pass(cls)
    return table


def others() -> Iterable[tuple[object, str, Any]]:
    """The wrapper that attaches an SAE to a model, the trainer's optimizer and its step."""
    return [*wrapper.replacements(), *trainer.replacements()]
