"""sparsify: its SparseCoder, and the step that its Trainer.fit makes around one, which needs a language model to call."""

import contextlib
import importlib
import io
import os

import torch

from .base import Job, Provider, Task, Unsupported, fill, forward_job, loss_job, step_job
from .dense import scattered


class Sparsify(Provider):
    name = "sparsify"

    def missing(self, device):
        if device.type != "cuda":
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints which decoder it took
                importlib.import_module("sparsify")
        except ImportError as error:
            return f"not importable: {error}"
        return None

    def job(self, task: Task) -> Job:
        case = task.case
        if case.activation != "TopK":
            raise Unsupported(f"has no {case.activation}")
        if task.device.type == "cuda" and task.precision != "bf16" and case.work != "decode":
            raise Unsupported("always computes in bf16 on a GPU")
        coder = sparse_coder(task)
        if case.work == "encode":
            return forward_job(coder.encode, "acts", lambda out: scattered((out.top_acts, out.top_indices), task.shape.F))
        if case.work == "decode":
            return forward_job(lambda pair: coder.decode(*pair), "x_hat")
        if case.work == "forward":
            return forward_job(coder, "x_hat", lambda out: out.sae_out)
        return _training_job(coder, task)


def sparse_coder(task: Task):
    """With the task's weights."""
    from sparsify import SparseCoder, SparseCoderConfig

    # it keeps parameters in fp32 and trains under its own autocast
    dtype = torch.float32 if task.case.trains else task.dtype
    config = SparseCoderConfig(num_latents=task.shape.F, k=task.shape.k)
    coder = SparseCoder(task.shape.D, config, device=task.device, dtype=dtype)
    weights = task.weights()
    fill(coder.encoder.weight, weights.W_enc.T)
    fill(coder.encoder.bias, weights.b_enc)
    fill(coder.W_dec, weights.W_dec)
    fill(coder.b_dec, weights.b_dec)
    return coder


def _variance(x: torch.Tensor) -> float:
    """Its loss is the squared error's share of the batch's variance; this is that unit per row."""
    return float((x.double() - x.double().mean(0)).pow(2).sum()) / x.shape[0]


def _training_job(coder, task: Task) -> Job:
    parameters = {
        "W_enc": (coder.encoder.weight, True),
        "b_enc": (coder.encoder.bias, False),
        "W_dec": (coder.W_dec, False),
        "b_dec": (coder.b_dec, False),
    }
    if task.case.work == "loss":
        return loss_job(lambda x: coder(x).fvu, parameters, unit=_variance)

    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=1e-4), momentum=0.95)
    optimizer.train()
    fired = torch.zeros(task.shape.F, device=task.device, dtype=torch.bool)
    since_fired = torch.zeros(task.shape.F, device=task.device, dtype=torch.long)

    def step(x):
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it logs every step
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(x.shape[0])
        since_fired[fired] = 0
        fired.zero_()

    note = "the step of Trainer.fit: its default optimizer (schedule-free sign SGD), projection, unit norms"
    return step_job(step, parameters, before_update=("project",), unit=_variance, note=note)
