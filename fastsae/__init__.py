"""fastsae: sparse autoencoders at the speed of their encoder's GEMM. Names load when they are first used."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AbsTopK": "activations",
    "Activation": "activations",
    "BatchTopK": "activations",
    "DataConfig": "config",
    "FormatError": "formats",
    "Gated": "activations",
    "JumpReLU": "activations",
    "LossConfig": "config",
    "OptimConfig": "config",
    "ReLU": "activations",
    "SAE": "sae",
    "SAEConfig": "config",
    "SparseCode": "sparse_code",
    "TopK": "activations",
    "TrainConfig": "config",
    "accelerate": "hosts",
    "evaluate": "metrics",
    "from_pretrained": "hub",
    "load": "formats",
    "patch": "hosts",
    "push_to_hub": "hub",
    "train": "trainer",
    "unpatch": "hosts",
}
_MODULES = (
    "activations", "calibrate", "config", "data", "formats", "functional", "hosts", "hub", "kernels", "losses", "metrics",
    "optim", "sae", "schedules", "sparse_code",
)  # fmt: skip


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"fastsae.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"fastsae.{name}")
    raise AttributeError(f"module 'fastsae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*_HOME, *_MODULES))
