"""Where and with what a measurement was made."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
PACKAGES = ("torch", "triton", "numpy", "sae-lens", "dictionary-learning", "eai-sparsify", "transformer-lens")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU {model}, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)", "", device_name(device)).lower()).strip("-")


def environment(device: torch.device, command: str) -> dict[str, Any]:
    changed = _output("git", "status", "--porcelain", "--", "fastsae", "kernels", "bench/*.py", "bench/providers")
    return {
        "device": device_name(device),
        "driver": _output(*SMI) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "vector": None if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "commit": os.environ.get("FASTSAE_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
