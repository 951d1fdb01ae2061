"""SAELens: its inference classes, its training classes, and the step of its SAETrainer."""

import importlib
import os
from functools import partial

import torch

from .base import Job, Provider, Task, Unsupported, fill, forward_job, loss_job, step_job
from .dense import scattered


class SAELens(Provider):
    name = "sae-lens"

    def missing(self, device):
        os.environ.setdefault("WANDB_MODE", "disabled")
        try:
            importlib.import_module("sae_lens")
        except ImportError as error:
            return f"not importable: {error}"
        return None

    def job(self, task: Task) -> Job:
        case = task.case
        sae = sae_lens_sae(task)
        if case.work == "encode":
            return forward_job(sae.encode, "acts")
        if case.work == "decode":
            return forward_job(sae.decode, "x_hat", prepare=lambda given: scattered(given, task.shape.F))
        if case.work == "forward":
            return forward_job(sae, "x_hat")
        return _training_job(sae, task)


def sae_lens_sae(task: Task):
    """With the task's weights."""
    sae = _training_sae(task) if task.case.trains or task.case.activation == "BatchTopK" else _inference_sae(task)
    for name, values in vars(task.weights()).items():
        fill(getattr(sae, name), values)
    if task.case.activation == "JumpReLU":
        with torch.no_grad():
            sae.threshold.fill_(task.threshold)
    return sae


def fit_step(trainer, x) -> None:
    """A step of a SAETrainer as its fit() makes it."""
    trainer.step(x)
    trainer.n_training_steps += 1


def _common(task: Task) -> dict:
    dtype = "float32" if task.case.trains or task.dtype == torch.float32 else "bfloat16"
    return {"d_in": task.shape.D, "d_sae": task.shape.F, "device": str(task.device), "dtype": dtype}


def _inference_sae(task: Task):
    import sae_lens

    common = _common(task)
    if task.case.activation == "TopK":
        return sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**common, k=task.shape.k))
    if task.case.activation == "JumpReLU":
        return sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**common))
    return sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common))


def _training_sae(task: Task):
    import sae_lens

    common = _common(task)
    if task.case.activation == "TopK":
        return sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**common, k=task.shape.k))
    if task.case.activation == "BatchTopK":
        return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**common, k=task.shape.k))
    raise Unsupported(f"its losses for {task.case.activation} are others than squared error")


def _training_job(sae, task: Task) -> Job:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.training.sae_trainer import SAETrainer

    autocast = task.precision == "bf16"
    config = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=task.shape.N, lr=1e-4, lr_end=1e-5,
        device=str(task.device), autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(()))
    sae.train()
    parameters = {name: (getattr(sae, name), False) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if task.case.work == "step":

        note = "SAETrainer.step: torch Adam, gradient clipping, firing statistics" + ", autocast bf16" * autocast
        return step_job(partial(fit_step, trainer), parameters, before_update=("clip",), note=note)

    def loss(x):
        with trainer.autocast_if_enabled:
            given = TrainStepInput(
                sae_in=x, coefficients=trainer.get_coefficients(), dead_neuron_mask=None, n_training_steps=0,
                is_logging_step=False,
            )  # fmt: skip
            return sae.training_forward_pass(step_input=given).loss

    return loss_job(loss, parameters)
