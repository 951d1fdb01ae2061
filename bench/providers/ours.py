"""fastsae, in each way that a user can choose."""

from contextlib import ExitStack
from unittest.mock import patch

import torch

from fastsae import SAE, BatchTopK, JumpReLU, ReLU, SparseCode, TopK, functional
from fastsae.kernels import batch_topk, topk

from .base import Gradients, Job, Provider, Task, Unsupported, fill, forward_job, loss_job, step_job


class Fastsae(Provider):
    """Plainly: torch's optimizer, the fused loss and the selection that ships. Each flag chooses one other thing."""

    def __init__(
        self, fused_adam: bool = False, bf16_moments: bool = False,
        autograd_loss: bool = False, dense: bool = False, tile_maxima: bool = False,
    ):  # fmt: skip
        self.fused_adam, self.bf16_moments = fused_adam, bf16_moments
        self.autograd_loss, self.dense, self.tile_maxima = autograd_loss, dense, tile_maxima
        flags = {
            "FusedAdam": fused_adam, "bf16 moments": bf16_moments,
            "sae(x)": autograd_loss, "dense": dense, "tile maxima": tile_maxima,
        }  # fmt: skip
        self.name = " ".join(["fastsae", *(flag for flag, given in flags.items() if given)])

    def missing(self, device):
        return "Triton kernels need a GPU" if self.tile_maxima and device.type != "cuda" else None

    def job(self, task: Task) -> Job:
        case, shape = task.case, task.shape
        if self.autograd_loss and (task.brief or not case.trains):
            raise Unsupported("differs from fastsae only in its loss")
        if self.fused_adam and case.work != "step":
            raise Unsupported("differs from fastsae only in its optimizer")
        if self.dense and case.work != "encode":
            raise Unsupported("differs from fastsae only in what encode returns")
        if self.tile_maxima and ("TopK" not in case.activation or case.work == "decode"):
            raise Unsupported("differs from fastsae only in how TopK selects")
        sae = sae_of(task)
        if case.trains:
            parameters = {name: (p, False) for name, p in sae.named_parameters() if "." not in name}
            loss = _plain_loss if self.autograd_loss else _fused_loss
            job = loss_job(lambda x: loss(sae, x), parameters)
            if case.work == "step":
                job = self._fused_adam(sae, loss) if self.fused_adam else _torch_adam(sae, loss, parameters)
        elif self.dense:
            job = forward_job(sae.encode, "acts", note="a dense tensor, as the other libraries return")
        elif case.work == "encode":
            job = forward_job(sae.encode_sparse, "acts", SparseCode.dense, note="a SparseCode")
        elif case.work == "decode":
            job = forward_job(sae.decode, "x_hat", prepare=lambda given: _code(*given, d_sae=shape.F))
        else:
            job = forward_job(sae, "x_hat")
        if self.tile_maxima:
            job.call = _with_tile_maxima(job.call)
        return job

    def _fused_adam(self, sae: SAE, loss) -> Job:
        from fastsae.optim import FusedAdam  # here, so that --base reaches back before there was one

        # bf16 weights are halves of fp32 ones: the others' trainers keep fp32 weights too, under autocast
        formats = {"master": "split"} if sae.W_dec.dtype == torch.bfloat16 else {}
        formats |= {"moments": "bf16"} if self.bf16_moments else {}
        optimizer = FusedAdam(sae, lr=1e-4, **formats)

        def step(x):
            loss(sae, x).backward()
            optimizer.step()
            optimizer.zero_grad()

        def observe(x):
            """Its gradients are never stored, but the first moment of a first step is one of them, scaled."""
            named = {name: p for name, p in sae.named_parameters() if "." not in name}
            before = {name: p.detach().clone() for name, p in named.items()}
            loss(sae, x).backward()
            found = {f"d{name}": _gradient(p) for name, p in named.items()} if self.bf16_moments else {}
            optimizer.step()
            optimizer.zero_grad()
            if not found:
                scale = 1 - optimizer.param_groups[0]["betas"][0]
                found = {f"d{name}": optimizer.state[p]["exp_avg"] / scale for name, p in named.items()}
            return found | {f"{name} moved": (p.detach() != before[name]).any().double() for name, p in named.items()}

        said = ", ".join([*(f"{name} {value}" for name, value in formats.items()), "gradients never stored"])
        return Job(step, observe, note=f"FusedAdam, {said}")


def sae_of(task: Task) -> SAE:
    k = task.shape.k
    activation = {
        "TopK": lambda: TopK(k),
        "BatchTopK": lambda: BatchTopK(k),
        "ReLU": ReLU,
        "JumpReLU": lambda: JumpReLU(task.threshold),
    }
    chosen = activation[task.case.activation]()
    sae = SAE(task.shape.D, task.shape.F, chosen, device=task.device, dtype=task.dtype).train(task.case.trains)
    for name, values in vars(task.weights()).items():
        fill(getattr(sae, name), values)
    return sae


def _torch_adam(sae: SAE, loss, parameters: Gradients) -> Job:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)

    def step(x):
        loss(sae, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step_job(step, parameters, note="torch Adam(fused=True), gradients stored")


def _gradient(p: torch.Tensor) -> torch.Tensor:
    """What the optimizer makes of the factors, where its moments are too coarse to see it."""
    if not hasattr(p, "deferred"):
        return p.grad.clone()
    rows = p.T if p.stride(0) == 1 else p  # latent by latent
    table, at, coefficients, latents, _ = p.deferred.joined(rows)
    dense = torch.zeros_like(rows).index_add_(0, latents, coefficients[:, None] * table[at])
    return dense if rows is p else dense.T


def _plain_loss(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return (sae(x) - x).square().sum(-1).mean()


def _fused_loss(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    return functional.reconstruction_loss(sae.encode_sparse(x), sae.W_dec, sae.b_dec, x).sse.mean()


def _code(values: torch.Tensor, latents: torch.Tensor, d_sae: int) -> SparseCode:
    N, k = latents.shape
    offsets = torch.arange(0, N * k + 1, k, dtype=torch.int32, device=latents.device)
    return SparseCode(values.flatten(), latents.flatten().int(), offsets, (N, d_sae), k)


def _with_tile_maxima(call):
    """Which GEMM selection uses is a constant of the kernels."""

    def run(given):
        with ExitStack() as stack:
            for module in (topk, batch_topk):
                stack.enter_context(patch.object(module, "FUSED", True))
            return call(given)

    return run
