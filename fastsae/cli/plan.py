"""fastsae plan: what a training step needs, and what fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..plan import plan
from .parse import flags

DESCRIPTION = "Bytes of a training step by purpose, what fits into a memory, and the time that no step can be faster than."


@dataclass(frozen=True)
class PlanSettings:
    d_in: int = 768
    """Input dimensions."""
    expansion: int = 64
    """Latents per input dimension."""
    d_sae: int | None = None
    """Latents; expansion times d_in unless given."""
    batch_size: int = 4096
    """Rows of a step."""
    micro_batch: int | None = None
    """Rows of one forward and backward pass; all unless given."""
    k: int = 32
    """How many latents fire in a row."""
    activation: Literal["topk", "batchtopk"] = "topk"
    """How they are chosen."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 keeps weights as bf16 halves beside what these lack."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """How Adam's moments are kept."""
    gpu: str | None = None
    """H100, H200, A100, L4 or RTX 4090; a CPU unless given."""
    memory: float | None = None
    """Gigabytes to fit into; the GPU's unless given."""


def main(arguments: Sequence[str]) -> None:
    asked = flags(PlanSettings, "plan", arguments, DESCRIPTION, PlanSettings())
    print(
        plan(
            asked.d_in,
            asked.d_sae or asked.expansion * asked.d_in,
            asked.batch_size,
            asked.k,
            asked.activation,
            "split" if asked.compute_dtype == "bfloat16" else "fp32",
            asked.moments,
            memory_bytes=None if asked.memory is None else asked.memory * 1e9,
            gpu=asked.gpu,
            micro_batch=asked.micro_batch,
        )
    )
