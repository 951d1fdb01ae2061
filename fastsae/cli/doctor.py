"""fastsae doctor: what this machine and its packages can do, and what is known to break."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from .parse import flags

DESCRIPTION = "What this machine and its packages can do, and what is known to break. Exits with 2 if something does."

PACKAGES = {
    "torch": "",
    "triton": "kernels on a GPU",
    "numpy": "",
    "safetensors": "",
    "transformers": "language models",
    "transformer-lens": "language models",
    "datasets": "data sets",
    "sae-lens": "fastsae.patch",
    "dictionary-learning": "fastsae.patch",
    "eai-sparsify": "fastsae.patch",
    "matplotlib": "pictures",
}


@dataclass(frozen=True)
class Doctor:
    pass


def main(arguments: Sequence[str]) -> None:
    flags(Doctor, "doctor", arguments, DESCRIPTION)
    found = {name: _version(name) for name in PACKAGES}
    for name, use in PACKAGES.items():
        print(f"{name:20} {found[name] or 'not installed' + (f' ({use})' if use else '')}")
    print(f"{'python':20} {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    import torch

    from ..kernels import backend

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"{f'GPU {i}':20} {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        print(f"{'GPU':20} none that torch can use")
    print(f"{'path':20} {backend.describe('cuda' if torch.cuda.is_available() else 'cpu')}")
    problems = faults(found, torch.cuda.is_available(), torch.version.cuda is not None)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise SystemExit(2)
    print("no known problem")


def faults(versions: dict[str, str | None], has_gpu: bool, built_for_cuda: bool) -> list[str]:
    """What is known not to work together."""

    def at_least(name: str, *numbers: int) -> bool:
        return _numbers(versions.get(name) or "0") >= numbers

    found: list[str] = []
    if not at_least("torch", 2, 10):
        found.append(f"torch {versions['torch']} is too old: pip install 'torch>=2.10'")
    if versions.get("triton") and not at_least("triton", 3, 7) and at_least("numpy", 2, 4):
        found.append(
            f"triton {versions['triton']} with numpy {versions['numpy']} cannot interpret kernels (TRITON_INTERPRET=1): "
            "pip install 'numpy<2.4', or triton 3.7"
        )
    if has_gpu and not versions.get("triton"):
        found.append("there is a GPU but no triton, so the kernels cannot run: pip install 'fastsae[triton]'")
    if built_for_cuda and not has_gpu:
        found.append("torch is built for CUDA but finds no GPU: look at nvidia-smi, and whether the driver fits")
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    digits: list[int] = []
    for part in text.split(".")[:2]:
        number = "".join(c for c in part if c.isdigit())
        digits.append(int(number or 0))
    return tuple(digits)
