"""A per-latent parameter at the entries of a code:  out[e] = parameter[latents[e]].

    parameter [F]    latents [E]    out [E]

Its gradient is summed latent by latent, over the segments that the backward pass of the code walks anyway: no atomics, the
same bits every run. Thresholds, gates and decoder norms reach the entries this way.
"""

from torch import Tensor

from .backend import op
from .by_latent import segment_sums


def gather_latents_reference(parameter: Tensor, latents: Tensor) -> Tensor:
    """The definition."""
    return parameter[latents]


@op
def gather_latents_forward(parameter: Tensor, latents: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return parameter[latents]


@gather_latents_forward.register_fake
def _(parameter, latents, order, starts):
    return parameter.new_empty(latents.shape[0])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, g):
    return segment_sums(g, *ctx.saved_tensors), None, None, None


gather_latents_forward.register_autograd(_backward, setup_context=_setup)


def gather_latents(parameter: Tensor, latents: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """parameter[latents]; (order, starts) as sort_by_latent returns them."""
    return gather_latents_forward(parameter, latents, order, starts)
