"""fastsae: sparse autoencoders at the speed of their encoder's GEMM. Names load when they are first used."""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "AbsTopK": "activations",
    "Activation": "activations",
    "BatchTopK": "activations",
    "Gated": "activations",
    "JumpReLU": "activations",
    "ReLU": "activations",
    "SAE": "sae",
    "SparseCode": "sparse_code",
    "TopK": "activations",
}
_MODULES = ("activations", "functional", "kernels", "losses", "sae", "schedules", "sparse_code")



def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"fastsae.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"fastsae.{name}")
    raise AttributeError(f"module 'fastsae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*_HOME, *_MODULES))
