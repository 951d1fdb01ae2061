"""The same work, or no time: a provider's outputs and gradients against the dense reference in fp64.

Compared are, on a small shape of the same case: codes, reconstructions, the loss and the gradient of every parameter; for a
training step the gradients that the optimizer gets, after the projection or clipping that the library does, and that every
parameter moved. A provider may be twice as far from the truth as dense torch in the same type is, plus 16 roundings of the
largest element: as much as another order of summation makes, while a dropped term or gradient is off by its whole size.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cases import CHECKED
from .providers.base import Job, Provider, Task
from .providers.dense import DenseSAE, dense_job, dense_sae

ROUNDINGS = 16


class Wrong(Exception):
    """What is wrong, by how much."""


def check(provider: Provider, task: Task) -> None:
    """Raise Wrong unless `provider` does the task's work, on a small shape."""
    task = replace(task, shape=CHECKED)
    job = provider.job(task)
    given = _given(task)
    truth = _expected(dense_sae(task, torch.float64), task, job, given, torch.float64)
    eager = _expected(dense_sae(task), task, job, given, task.dtype)
    # 16-bit operands anywhere in the library, such as under its autocast, round like 16-bit operands
    eps = torch.finfo(torch.bfloat16 if task.precision == "bf16" else task.dtype).eps
    if task.precision == "tf32":
        eps = 2**-10
    with torch.set_grad_enabled(task.case.trains):
        got = job.observe(given)
    compare(got, eager, truth, eps)


def compare(got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], eps: float) -> None:
    for name, true in truth.items():
        if name not in got:
            raise Wrong(f"{name} is missing")
        if got[name].shape != true.shape:
            raise Wrong(f"{name} has shape {list(got[name].shape)}, not {list(true.shape)}")
        error = (got[name].double() - true).abs().max()
        allowed = 2 * (eager[name].double() - true).abs().max() + ROUNDINGS * eps * true.abs().max()
        if not error <= allowed:  # also where it is NaN
            raise Wrong(f"{name} is off by {float(error):.3g}, allowed are {float(allowed):.3g}")


def _expected(sae: DenseSAE, task: Task, job: Job, given: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    case = task.case
    given = tuple(t.to(dtype) if t.is_floating_point() else t for t in given) if case.work == "decode" else given.to(dtype)
    if case.work != "step":
        with torch.set_grad_enabled(case.trains):
            return dense_job(sae, task).observe(given)
    loss = dense_job(sae, replace(task, case=replace(case, work="loss"))).observe(given)
    found = {name: t for name, t in loss.items() if name != "loss"}
    if "project" in job.before_update:
        W, dW = sae.W_dec.detach(), found["dW_dec"]
        direction = W / W.norm(dim=1, keepdim=True)
        found["dW_dec"] = dW - (dW * direction).sum(1, keepdim=True) * direction
    if "clip" in job.before_update:
        norm = torch.stack([t.double().norm() for t in found.values()]).norm()
        found = {name: t * float(1 / norm.clamp(min=1)) for name, t in found.items()}
    return found | {f"{name[1:]} moved": torch.ones((), dtype=torch.float64) for name in found}


def _given(task: Task) -> Any:
    """Inputs on which nobody's rounding decides what fires: the rows with the clearest selection of many."""
    if task.case.work == "decode":
        return task.inputs(1)[0]
    shape = task.shape
    sae = dense_sae(task, torch.float64)
    x = replace(task, shape=replace(shape, N=shape.N * 32)).inputs(1)[0]
    with torch.no_grad():
        pre = sae.pre(x.double())
        if task.case.activation == "TopK":
            best = pre.topk(shape.k + 1).values
            clarity = best[:, -2] - best[:, -1]
        elif task.case.activation == "BatchTopK":
            x, pre = x.view(32, shape.N, -1), pre.view(32, shape.N, -1)
            best = pre.flatten(1).topk(shape.N * shape.k + 1).values
            return x[int((best[:, -2] - best[:, -1]).argmax())].contiguous()
        else:
            threshold = task.threshold if task.case.activation == "JumpReLU" else 0.0
            clarity = (pre - threshold).abs().amin(1)
    return x[clarity.topk(shape.N).indices].contiguous()
