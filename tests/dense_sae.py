"""Every SAE written out dense, in plain torch and fp64: what loss terms are checked against."""

import torch
from torch import Tensor

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, TopK

N, D, F, K = 9, 6, 40, 5
DEAD = torch.tensor([3, 38, 7, 8, 20, 21, 22, 39])  # not in order, and more than D / 2


def make(activation, **options) -> SAE:
    sae = SAE(D, F, activation, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
        sae.W_dec *= torch.rand(F, 1).double() + 0.5  # norms that matter
        if isinstance(activation, JumpReLU):
            activation.theta.abs_()
    return sae


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64)


def check(sae: SAE, ours: Tensor, dense: Tensor) -> None:
    """The same value, and the same gradient of every parameter."""
    torch.testing.assert_close(ours, dense, rtol=1e-11, atol=0, check_dtype=True)
    parameters = dict(sae.named_parameters())
    got = torch.autograd.grad(ours, list(parameters.values()), allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad(dense, list(parameters.values()), allow_unused=True, retain_graph=True)
    for (name, p), a, b in zip(parameters.items(), got, expected, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        assert (a - b).abs().max() <= 1e-11 * max(1.0, b.abs().max().item()), name


def preact(sae: SAE, x: Tensor) -> Tensor:
    return (x - sae.b_dec if sae.apply_b_dec_to_input else x) @ sae.W_enc + sae.b_enc


def best(score: Tensor, k: int) -> Tensor:
    """Mask of each row's k largest."""
    return torch.zeros_like(score).scatter(1, score.detach().topk(k).indices, 1.0)


def straight(value: Tensor, slope: Tensor, *inputs: Tensor) -> Tensor:
    """`value` without gradient of its own; the gradient `slope` to inputs[0] and its opposite to a second one."""
    line = slope.detach() * (inputs[0] - inputs[1] if len(inputs) == 2 else inputs[0])
    return value.detach() + line - line.detach()


def window(pre: Tensor, jump: JumpReLU) -> Tensor:
    return ((pre - jump.theta).abs() < jump.bandwidth / 2).to(pre.dtype) / jump.bandwidth


def towards(pre: Tensor, jump: JumpReLU) -> tuple[Tensor, ...]:
    return (-jump.theta, -pre) if jump.ste_to_input else (-jump.theta,)


def activations(sae: SAE, x: Tensor) -> Tensor:
    """Dense activations [N, F]."""
    pre, a = preact(sae, x), sae.activation
    score = pre * sae.W_dec.norm(dim=1) if sae.rescale_acts_by_decoder_norm else pre
    if isinstance(a, JumpReLU):
        fires = pre > a.theta
        return pre * fires + straight(torch.zeros_like(pre), window(pre, a) * a.theta, *towards(pre, a))
    if isinstance(a, Gated):
        return ((pre - sae.b_enc) * a.r_mag.exp() + a.b_mag).relu() * (pre > 0)
    if isinstance(a, AbsTopK):
        return pre * best(score.abs(), K)
    if isinstance(a, BatchTopK):
        return pre.relu() * best(score.view(1, -1), N * K).view(N, F)
    return pre.relu() * best(score, K) if isinstance(a, TopK) else pre.relu()


def squares(rows: Tensor) -> Tensor:
    return rows.square().sum(-1).mean()
