"""dictionary_learning: its dictionaries, and `update` and `loss` of its trainers."""

import importlib
import sys
from contextlib import nullcontext

import torch

from .base import Job, Provider, Task, fill, forward_job, loss_job, step_job
from .dense import scattered

STEP = 2000  # past its warm-ups: the threshold's running mean has begun, as in nearly all steps of a run


class DictionaryLearning(Provider):
    name = "dictionary-learning"

    def missing(self, device):
        try:
            importlib.import_module("dictionary_learning")
        except ImportError as error:
            return f"not importable: {error}"
        _undo_nnsight()
        return None

    def job(self, task: Task) -> Job:
        case = task.case
        if case.trains:
            return _training_job(task)
        ae = dictionary(task)
        if case.work == "encode":
            in_training = case.activation == "BatchTopK"  # at inference it uses a threshold instead
            return forward_job(lambda x: ae.encode(x, use_threshold=False) if in_training else ae.encode(x), "acts")
        if case.work == "decode":
            return forward_job(ae.decode, "x_hat", prepare=lambda given: scattered(given, task.shape.F))
        return forward_job(ae, "x_hat")


def dictionary(task: Task):
    """With the task's weights."""
    ae = _dictionary(task).to(task.device, task.dtype)
    _load(ae, task)
    return ae


def _undo_nnsight() -> None:
    """Its nnsight wraps torch's functions for everyone in the process, which slows them and stops torch.compile."""
    nnsight = sys.modules.get("nnsight")
    patcher = getattr(nnsight, "DEFAULT_PATCHER", None)
    while patcher is not None and patcher.patches:
        patcher.patches.pop().restore()


def _dictionary(task: Task):
    from dictionary_learning import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    D, F, k = task.shape.D, task.shape.F, task.shape.k
    if task.case.activation == "TopK":
        return AutoEncoderTopK(D, F, k)
    if task.case.activation == "BatchTopK":
        return BatchTopKSAE(D, F, k)
    if task.case.activation == "ReLU":
        return AutoEncoder(D, F)
    ae = JumpReluAutoEncoder(D, F)
    ae.apply_b_dec_to_input = True  # so that it is the same function
    return ae


def _load(ae, task: Task) -> None:
    weights = task.weights()
    if task.case.activation == "JumpReLU":
        for name, values in vars(weights).items():
            fill(getattr(ae, name), values)
        with torch.no_grad():
            ae.threshold.fill_(task.threshold)
        return
    fill(ae.encoder.weight, weights.W_enc.T)
    fill(ae.encoder.bias, weights.b_enc)
    fill(ae.decoder.weight, weights.W_dec.T)
    fill(ae.bias if task.case.activation == "ReLU" else ae.b_dec, weights.b_dec)


def _training_job(task: Task) -> Job:
    from dictionary_learning.trainers import BatchTopKTrainer, TopKTrainer

    kind = TopKTrainer if task.case.activation == "TopK" else BatchTopKTrainer
    trainer = kind(
        steps=10**6, activation_dim=task.shape.D, dict_size=task.shape.F, k=task.shape.k, layer=0, lm_name="none",
        lr=1e-4, warmup_steps=0, device=str(task.device),
    )  # fmt: skip
    ae = trainer.ae
    _load(ae, task)
    parameters = {
        "W_enc": (ae.encoder.weight, True),
        "b_enc": (ae.encoder.bias, False),
        "W_dec": (ae.decoder.weight, True),
        "b_dec": (ae.b_dec, False),
    }
    half = task.precision == "bf16"
    # as its trainSAE does around update()
    context = torch.autocast(task.device.type, dtype=torch.bfloat16) if half else nullcontext()

    def within(function):
        def run(x):
            with context:
                return function(x)

        return run

    if task.case.work == "loss":
        return loss_job(within(lambda x: trainer.loss(x, step=STEP)), parameters)
    note = f"{kind.__name__}.update: torch Adam, projection, clipping, unit norms" + ", autocast bf16" * half
    return step_job(within(lambda x: trainer.update(STEP, x)), parameters, before_update=("project", "clip"), note=note)
