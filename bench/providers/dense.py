"""The dense step in plain torch: the reference that others are checked against, eager and compiled; and its GEMM alone."""

import shutil

import torch
from torch import Tensor, nn

from ..cases import STEP
from .base import Job, Provider, Task, Unsupported, forward_job, loss_job, step_job


class DenseSAE(nn.Module):
    """As one would write it in ten lines: every latent's activation exists."""

    def __init__(self, activation: str, k: int, theta: float, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor):
        super().__init__()
        self.activation, self.k, self.theta = activation, k, theta
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (nn.Parameter(t) for t in (W_enc, b_enc, W_dec, b_dec))

    def pre(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre(x)
        if self.activation == "TopK":
            values, latents = pre.topk(self.k, sorted=False)
            return torch.zeros_like(pre).scatter(1, latents, values.relu())
        if self.activation == "BatchTopK":
            flat = pre.flatten()
            values, entries = flat.topk(self.k * x.shape[0], sorted=False)
            return torch.zeros_like(flat).scatter(0, entries, values.relu()).view_as(pre)
        if self.activation == "JumpReLU":
            return pre * (pre > self.theta)
        return pre.relu()

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        return (self(x) - x).square().sum(-1).mean()


def dense_sae(task: Task, dtype: torch.dtype | None = None) -> DenseSAE:
    """With the task's weights; `dtype` widens them after they were rounded to the task's type."""
    weights = task.weights()
    tensors = {name: t.to(dtype or task.dtype).contiguous().clone() for name, t in vars(weights).items()}
    return DenseSAE(task.case.activation, task.shape.k, task.threshold, **tensors)


def scattered(given: tuple[Tensor, Tensor], F: int) -> Tensor:
    """(values, latents) -> a dense code, what dense libraries decode."""
    values, latents = given
    return values.new_zeros(values.shape[0], F).scatter(1, latents, values)


class Dense(Provider):
    name = "dense torch"

    def job(self, task: Task) -> Job:
        return dense_job(dense_sae(task), task)


def dense_job(sae: DenseSAE, task: Task, compiled: bool = False) -> Job:
    def maybe_compiled(function):
        return torch.compile(function, dynamic=False) if compiled else function

    case = task.case
    if case.trains:
        parameters = {name: (p, False) for name, p in sae.named_parameters()}
        loss = maybe_compiled(sae.loss)
        if case.work == "loss":
            return loss_job(loss, parameters)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

        def step(x):
            loss(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step_job(step, parameters, note="torch Adam(fused=True)")
    if case.work == "encode":
        return forward_job(maybe_compiled(sae.encode), "acts")
    if case.work == "decode":
        return forward_job(maybe_compiled(sae.decode), "x_hat", prepare=lambda given: scattered(given, task.shape.F))
    return forward_job(maybe_compiled(sae), "x_hat")


class Compiled(Provider):
    name = "torch.compile"

    def missing(self, device):
        if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler on a CPU"
        return None

    def job(self, task: Task) -> Job:
        if task.brief or (task.device.type == "cpu" and task.case != STEP):
            raise Unsupported("compiling takes longer than this measurement")
        torch._dynamo.reset()
        return dense_job(dense_sae(task), task, compiled=True)


class EncoderGemm(Provider):
    """x W_enc + b_enc into a buffer: what no exact encoder can do without."""

    name = "encoder GEMM"
    ceiling = True

    def job(self, task: Task) -> Job:
        if task.case.work == "decode":
            raise Unsupported("no encoder in it")
        weights = task.weights()
        W, b = weights.W_enc, weights.b_enc
        buffer = torch.empty(task.shape.N, task.shape.F, dtype=task.dtype, device=task.device)
        return forward_job(lambda x: torch.addmm(b, x, W, out=buffer), "pre")
