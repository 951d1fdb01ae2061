"""One call of each kernel at a shape, with what it costs at least. For open questions (questions.py) and tiles (tune.py).

`python -m bench.workloads` makes each call once at small shapes, for tools that watch a process: compute-sanitizer.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae import functional, kernels
from fastsae.kernels.dense_encode import gemm
from fastsae.kernels.tiles import tile

from .cases import Case, Shape, phases
from .providers import Fastsae, Task


@dataclass(frozen=True)
class Workload:
    call: Callable[[], Any]
    flops: float
    moved: float
    """bytes"""


def task_of(shape: Shape, device: torch.device, work: str = "encode", activation: str = "TopK") -> Task:
    return Task(Case(work, activation), shape, "bf16" if device.type == "cuda" else "fp32", device)


def encoder_gemm(shape: Shape, device: torch.device) -> Workload:
    """Ours, writing fp32 pre-activations and the maximum of each tile, as selection uses it. On a CPU torch's product."""
    task = task_of(shape, device)
    weights, x = task.weights(), task.inputs(1)[0]
    W, b = weights.W_enc.T, weights.b_enc
    out = torch.empty(shape.N, shape.F, dtype=torch.float32, device=device)
    if device.type != "cuda":
        call = lambda: torch.addmm(b, x, W.T, out=out)  # noqa: E731
    else:

        def call() -> Tensor:
            block = tile(f"gemm_{8 * x.itemsize}", device).constants["BLOCK_F"]
            gemm(x, W, b, out, maxima=torch.empty(shape.N, -(-shape.F // block), dtype=torch.float32, device=device))
            return out

    flops, moved = phases(task.case, shape, x.itemsize)[0]
    return Workload(call, flops, moved + 4 * shape.N * shape.F)


def select_topk(shape: Shape, device: torch.device, fused: bool = False) -> Workload:
    task = task_of(shape, device)
    weights, x = task.weights(), task.inputs(1)[0]
    call = lambda: kernels.select_topk(x, weights.W_enc, weights.b_enc, shape.k, fused=fused)  # noqa: E731
    return Workload(call, *phases(task.case, shape, x.itemsize)[0])


def select_batch_topk(shape: Shape, device: torch.device) -> Workload:
    task = task_of(shape, device)
    weights, x = task.weights(), task.inputs(1)[0]
    call = lambda: kernels.select_batch_topk(x, weights.W_enc, weights.b_enc, shape.k)  # noqa: E731
    return Workload(call, *phases(task.case, shape, x.itemsize)[0])


def select_threshold(shape: Shape, device: torch.device) -> Workload:
    task = task_of(shape, device, activation="JumpReLU")
    weights, x = task.weights(), task.inputs(1)[0]
    theta = torch.full_like(weights.b_enc, task.threshold)
    call = lambda: kernels.select_threshold(x, weights.W_enc, weights.b_enc, theta)  # noqa: E731
    return Workload(call, *phases(task.case, shape, x.itemsize)[0])


@dataclass(frozen=True)
class Code:
    """A code in parts, and its entries by latent."""

    values: Tensor
    latents: Tensor
    offsets: Tensor
    by_latent: tuple[Tensor, Tensor]


def code(shape: Shape, device: torch.device, everywhere: int = 0) -> Code:
    """Uniform latents, but the first `everywhere` entries of each row are latents that all rows share."""
    values, latents = task_of(shape, device, "decode").inputs(1)[0]
    latents[:, :everywhere] = torch.arange(everywhere, device=device)
    latents = latents.sort(1).values.flatten().int()
    offsets = torch.arange(0, shape.N * shape.k + 1, shape.k, dtype=torch.int32, device=device)
    return Code(values.flatten(), latents, offsets, kernels.sort_by_latent(latents, shape.F))


def decode(shape: Shape, device: torch.device) -> Workload:
    task, c = task_of(shape, device, "decode"), code(shape, device)
    W, b = task.weights().W_dec, task.weights().b_dec
    call = lambda: kernels.decode(c.values, c.latents, c.offsets, W, b)  # noqa: E731
    return Workload(call, *phases(task.case, shape, W.itemsize)[0])


def latent_backward(shape: Shape, device: torch.device, everywhere: int = 0) -> Workload:
    task, c = task_of(shape, device, "loss"), code(shape, device, everywhere)
    W = task.weights().W_dec
    g, x = task.inputs(2)
    call = lambda: kernels.latent_backward(  # noqa: E731
        *c.by_latent, c.latents, c.offsets, g=g, values=c.values, W_dec=W, x=x, direct=c.values
    )
    return Workload(call, *phases(task.case, shape, W.itemsize)[2])


def torch_topk(shape: Shape, device: torch.device, dtype: torch.dtype) -> Workload:
    """What peers call on a stored [N, F]."""
    scores = torch.randn(shape.N, shape.F, device=device, dtype=dtype)
    return Workload(lambda: scores.topk(shape.k, sorted=False), 0, scores.nbytes)


def loss(shape: Shape, device: torch.device) -> Workload:
    """Forward and backward of everything a step has but its optimizer."""
    task = task_of(shape, device, "loss")
    job, x = Fastsae().job(task), task.inputs(1)[0]
    costs = phases(task.case, shape, x.itemsize)
    return Workload(lambda: job.call(x), *(sum(cost[i] for cost in costs) for i in (0, 1)))


def step(shape: Shape, device: torch.device) -> Workload:
    """With the fused update, whose parameters are fp32."""
    task = Task(Case("step", "TopK"), shape, "fp32", device)
    job, x = Fastsae(fused_adam=True).job(task), task.inputs(1)[0]
    costs = phases(task.case, shape, x.itemsize)
    return Workload(lambda: job.call(x), *(sum(cost[i] for cost in costs) for i in (0, 1)))


def dense_encode(shape: Shape, device: torch.device) -> Workload:
    task = task_of(shape, device)
    weights, x = task.weights(), task.inputs(1)[0]
    flops, moved = phases(task.case, shape, x.itemsize)[0]
    call = lambda: functional.dense_encode(x, weights.W_enc, weights.b_enc)  # noqa: E731
    return Workload(call, flops, moved + shape.N * shape.F * x.itemsize)


# kernel in TILES -> a workload in which its tile decides
BY_KERNEL: dict[str, Callable[[Shape, torch.device], Workload]] = {
    "gemm_16": encoder_gemm,
    "topk": select_topk,
    "threshold": select_threshold,
    "decode": decode,
    "latent": latent_backward,
}


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape("small", 48, 72, 5000, 8)  # ragged blocks, a second chunk
    everything = (
        encoder_gemm, select_topk, select_batch_topk, select_threshold, dense_encode, decode, latent_backward, loss, step,
    )  # fmt: skip
    for make in everything:
        make(shape, device).call()
        print(make.__name__, flush=True)
    with_maxima = select_topk(shape, device, fused=True)
    shared = latent_backward(Shape("split", 1100, 72, 64, 4), device, everywhere=2)  # segments in several parts
    for workload in (with_maxima, shared):
        workload.call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
