"""Dead latents start again at what the SAE reconstructs worst (Bricken et al. 2023)."""

import torch
from torch import Tensor

from . import losses
from .sae import SAE

ENCODER_SHARE = 0.2
"""Norm of a new encoder row, of the mean norm of the living."""


@torch.no_grad()
def resample(
    sae: SAE, dead: Tensor, x: Tensor, target: Tensor, sse: Tensor, generator: torch.Generator
) -> None:
    """Point each of the latents `dead` [M] at a row drawn with probability ~ squared error².

    W_dec[f] becomes the direction of that row's target at the norm of the living, W_enc[:, f] that of its input at a fifth of
    theirs, b_enc[f] zero. In place: the parameters themselves change, not a copy.
    """
    living = torch.ones(sae.d_sae, dtype=torch.bool, device=dead.device)
    living[dead] = False
    if not dead.numel() or not living.any():
        return
    chances = (sse.double().square() / sse.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)).cpu()
    if not chances.sum() > 0:  # nothing is reconstructed badly
        return
    chosen = torch.multinomial(chances, dead.numel(), replacement=True, generator=generator).to(x.device)
    inputs = sae.encoder_input(x[chosen])
    outputs = losses.to_decode(sae, x[chosen], target[chosen])[0] - sae.b_dec
    encoder_norm = sae.W_enc.norm(dim=0)[living].mean() * ENCODER_SHARE
    decoder_norm = sae.W_dec.norm(dim=1)[living].mean()
    sae.W_dec[dead] = torch.nn.functional.normalize(outputs, dim=1) * decoder_norm
    sae.W_enc[:, dead] = (torch.nn.functional.normalize(inputs, dim=1) * encoder_norm).T
    sae.b_enc[dead] = 0


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, sae: SAE, latents: Tensor) -> None:
    """Zero what the optimizer remembers of these latents."""
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, *sae.activation.parameters()):
        for value in optimizer.state.get(parameter, {}).values():  # type: ignore[call-overload]
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                value.index_fill_(1 if parameter is sae.W_enc else 0, latents, 0)
