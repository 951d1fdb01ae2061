"""What kernel tests share: the rule by which a kernel is right, and how to run one op three ways."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_no_worse(got: Tensor, eager: Tensor, truth: Tensor, magnitude: Tensor, factor: float = 2.0) -> None:
    """Assert a kernel is as close to the fp64 truth as eager torch in the same dtype, within `factor`.

    `magnitude` is the reference run in fp64 on the absolute values of the inputs: the sum of absolute terms, which is
    what rounding scales with. Without it, results that cancel would fail correct kernels.
    """
    assert got.shape == eager.shape == truth.shape, f"shapes {got.shape}, {eager.shape}, {truth.shape}"
    if not got.numel():
        return
    limits = torch.finfo(eager.dtype)
    # below the smallest normal number rounding no longer scales with anything: its step is the smallest denormal
    floor = limits.eps * (magnitude.abs().max() + 2 * limits.smallest_normal)
    allowed = factor * (eager.double() - truth).abs().max() + floor
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, eager's {(eager.double() - truth).abs().max():.3g}, allowed {allowed:.3g}"


def values_and_gradients(f: Callable[..., Sequence[Tensor]], inputs: Sequence, seeds: Sequence[Tensor]) -> list[Tensor]:
    """f's outputs, then its gradients to every float input, for the incoming gradients `seeds`."""

    def is_float(t: object) -> bool:
        return isinstance(t, Tensor) and t.is_floating_point()

    arguments = [t.detach().clone().requires_grad_() if is_float(t) else t for t in inputs]
    outputs = f(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, [s.to(o.dtype) for s, o in zip(seeds, outputs, strict=True)])
    leaves = [t for t in arguments if is_float(t)]
    return [o.detach() for o in outputs] + [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check_op(
    op: Callable, reference: Callable, inputs: Sequence, seeds: Sequence[Tensor], squares: Sequence[int] = ()
) -> None:
    """`op` against `reference`, in the inputs' dtype and in fp64: outputs and every gradient.

    `squares`: outputs that are sums of squares of rounded terms. (e (1 + eps))² is off by 2 eps e², not by eps e².
    """

    def cast(t, f):
        return f(t) if isinstance(t, Tensor) and t.is_floating_point() else t

    got = values_and_gradients(op, inputs, seeds)
    eager = values_and_gradients(reference, inputs, seeds)
    truth = values_and_gradients(reference, [cast(t, Tensor.double) for t in inputs], seeds)
    magnitude = values_and_gradients(reference, [cast(t, lambda t: t.double().abs()) for t in inputs], [s.abs() for s in seeds])
    magnitude = [2 * m if i in squares else m for i, m in enumerate(magnitude)]
    for four in zip(got, eager, truth, magnitude, strict=True):
        assert_no_worse(*four)


def random_code(N: int, F: int, E: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(latents, offsets) of about E entries (at most N·F) in ragged rows, some of them empty; ascending within a row."""
    generator = torch.Generator().manual_seed(seed)
    row_appetite = torch.rand(N, 1, generator=generator)
    fires = torch.rand(N, F, generator=generator) < row_appetite * (2 * E / max(N * F, 1))
    offsets = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0)).int()
    return fires.nonzero()[:, 1].int().to(device), offsets.to(device)
