"""fastsae.patch("dictionary_learning"): its dictionaries and trainers from sparse codes."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from torch import nn

from .. import Methods
from ..stand_in import stand_in
from . import dictionaries as fast
from . import trainers

CLASSES = (
    "AutoEncoder",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def _host(module: str) -> Any:
    return import_module(f"dictionary_learning.{module}")


def _classes() -> dict[str, type[nn.Module]]:
    # utils.py, which has them all, asks for nnsight and datasets
    homes = [_host(f"trainers.{name}") for name in ("top_k", "batch_top_k", "matryoshka_batch_top_k")]
    homes.append(_host("dictionary"))
    return {name: next(vars(home)[name] for home in homes if name in vars(home)) for name in CLASSES}


def methods() -> dict[type[nn.Module], Methods]:
    by_name: dict[str, dict[str, Callable[..., Any]]] = {
        "AutoEncoder": {"forward": fast.forward(fast.of_auto_encoder, fast.auto_encoder)},
        "GatedAutoEncoder": {"forward": fast.forward(fast.of_gated, fast.gated)},
        "JumpReluAutoEncoder": {"forward": fast.forward(fast.of_matrices, fast.jump_relu)},
        "AutoEncoderTopK": {
            "forward": fast.forward(fast.of_layers, fast.top_k, via_features=False),
            "encode": fast.encode_top_k,
        },
        "BatchTopKSAE": {
            "forward": fast.forward(fast.of_layers, fast.over_threshold),
            "encode": fast.encode_batch_top_k(fast.of_layers),
        },
        "MatryoshkaBatchTopKSAE": {
            "forward": fast.forward(fast.of_matrices, fast.over_threshold),
            "encode": fast.encode_batch_top_k(fast.of_matrices),
        },
    }
    classes = _classes()
    return {
        classes[name]: {method: stand_in(f, classes[name], method) for method, f in fasts.items()}
        for name, fasts in by_name.items()
    }


def others() -> Iterable[tuple[object, str, Any]]:
    names = ("top_k", "batch_top_k", "matryoshka_batch_top_k", "jumprelu", "standard", "gdm")
    top_k, batch_top_k, matryoshka, jumprelu, standard, gdm = (_host(f"trainers.{name}") for name in names)
    of = _classes()
    losses = {
        top_k.TopKTrainer: trainers.top_k_loss(of["AutoEncoderTopK"], fast.of_layers, per_row=True),
        batch_top_k.BatchTopKTrainer: trainers.top_k_loss(of["BatchTopKSAE"], fast.of_layers, per_row=False),
        matryoshka.MatryoshkaBatchTopKTrainer: trainers.top_k_loss(
            of["MatryoshkaBatchTopKSAE"], fast.of_matrices, per_row=False
        ),
        jumprelu.JumpReluTrainer: trainers.jump_relu_loss(
            of["JumpReluAutoEncoder"], jumprelu.JumpReLUFunction.apply, jumprelu.StepFunction.apply
        ),
        standard.StandardTrainer: trainers.l1_loss(of["AutoEncoder"], by_norm=False),
        standard.StandardTrainerAprilUpdate: trainers.l1_loss(of["AutoEncoder"], by_norm=True),
        gdm.GatedSAETrainer: trainers.gated_loss(of["GatedAutoEncoder"]),
    }
    for cls, loss in losses.items():
        yield cls, "loss", stand_in(loss, cls, "loss")
        yield cls, "update", stand_in(trainers.with_fused_adam(vars(cls)["update"]), cls, "update")
    for home in (top_k, batch_top_k, matryoshka, jumprelu):
        yield home, "remove_gradient_parallel_to_decoder_directions", trainers.remove_parallel
