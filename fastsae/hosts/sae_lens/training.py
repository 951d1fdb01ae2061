"""SAELens' training step: the same loss, parts and gradients, from what is small.

Each function below is one architecture's loss as SAELens defines it; `training_forward_pass` puts them together the way
TrainingSAE does. The activations it hands out are a promise (lazy.py).
"""

from collections.abc import Callable
from functools import reduce, wraps
from importlib import import_module
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional, losses
from ...activations import Activation, BatchTopK, Gated, JumpReLU, TopK, active
from ...functional import At
from ...kernels.by_latent import segment_sums, sort_by_latent
from ...kernels.scores import BLOCK_ELEMENTS
from ...kernels.take import take_rows
from ...sparse_code import SparseCode
from . import codes
from .codes import Module, Operands
from .lazy import LazyTensor, lazy

Losses = dict[str, Tensor]


def training_forward_pass(cls: type[nn.Module]) -> Callable[..., Any]:
    """TrainingSAE.training_forward_pass of `cls`."""
    stock: Callable[..., Any] = cls.training_forward_pass  # type: ignore[assignment]

    @wraps(stock)
    @torch.compiler.disable
    def step(self: Module, step_input: Any) -> Any:
        output = _step(self, step_input) if _applies(self, cls, step_input.sae_in) else None
        return stock(self, step_input=step_input) if output is None else output

    return step


def _applies(sae: Module, cls: type[nn.Module], x: Tensor) -> bool:
    """Losses ask for rows, and for gradients to parameters alone. A hook sees activations only densely."""
    return (
        codes.applies(sae, cls, x)
        and x.dim() == 2
        and not x.requires_grad
        and not codes.heard(sae)
        and sae.mse_loss_fn is import_module("sae_lens.saes.sae").mse_loss
        and 0 < getattr(sae.cfg, "lp_norm", 1) < float("inf")
        and sae.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
    )


def _step(sae: Module, given: Any) -> Any:
    """The whole of TrainingSAE.training_forward_pass, or None where a dense step is as good."""
    if hasattr(sae, "bandwidth"):
        sae.threshold.data.clamp_(min=0.0)
    sae_in = codes.encoder_input(sae, given.sae_in)
    if sae_in is None:
        return None
    bias = codes.encoder_bias(sae)
    if sae.cfg.apply_b_dec_to_input:
        bias = functional.centred_bias(bias, sae.b_dec, sae.W_enc)
    o = codes.operands(sae, sae_in.detach(), bias)
    with codes.plain(o.x):
        code = codes.encode(sae, o)
        if code is not None:
            return _sparse(sae, given, o, code)
        return _dense(sae, given, o) if o.x.shape[0] * o.W_enc.shape[1] > BLOCK_ELEMENTS else None


def _output(sae: Module, given: Any, sae_out: Tensor, parts: Losses, acts: LazyTensor, hidden_pre: LazyTensor) -> Any:
    return import_module("sae_lens.saes.sae").TrainStepOutput(
        sae_in=given.sae_in, sae_out=sae_out, feature_acts=acts, hidden_pre=hidden_pre,
        loss=reduce(add, parts.values()), losses=parts,
    )  # fmt: skip


def _mse(error: Tensor) -> Tensor:
    """mean_n |error|², of each level where there are some."""
    return error.square().sum(-1).mean(0)


# ── from entries ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sparse(sae: Module, given: Any, o: Operands, code: SparseCode) -> Any:
    activation = codes.activation_of(sae, sae.dtype)
    widths: list[int] | None = getattr(sae.cfg, "matryoshka_widths", None)
    levels = _decoded(o, code, widths) + sae.b_dec  # [N, P, D]
    error = levels - given.sae_in[:, None]
    per_level = _mse(error)
    parts: Losses = {"mse_loss": per_level[-1], **_auxiliary(sae, given, o, activation, code, error)}
    for width, mse in zip((widths or [])[:-1], per_level, strict=False):
        parts[f"inner_mse_loss_{width}"] = mse
    shown = codes.reported(code, o)
    order = shown.by_latent or sort_by_latent(shown.latents, shown.d_sae)
    fired = segment_sums((shown.values != 0).float(), *order), shown.l0().float()
    acts = lazy(shown.shape, shown.values.dtype, o.x.device, shown.dense, fired)
    output = _output(sae, given, levels[:, -1], parts, acts, _promise(sae, given, 1))
    if isinstance(activation, BatchTopK):
        _update_threshold(sae, shown)
        output.metrics["topk_threshold"] = sae.topk_threshold
    return output


def _decoded(o: Operands, code: SparseCode, widths: list[int] | None) -> Tensor:
    """Without the bias, from the latents below each width. [N, P, D]"""
    if widths is None:
        return codes.decode(code, o)[:, None]
    narrow, zero = code.with_values(code.values.to(o.x.dtype)), o.W_dec.new_zeros(o.W_dec.shape[1])
    return functional.reconstruction_loss(narrow, o.W_dec, zero, torch.zeros_like(o.x), prefixes=widths).error


def _auxiliary(sae: Module, given: Any, o: Operands, activation: Activation, code: SparseCode, error: Tensor) -> Losses:
    """calculate_aux_loss."""
    if isinstance(activation, TopK):
        return {"auxiliary_reconstruction_loss": _auxk(sae, given, o, error)}
    norms = sae.W_dec.norm(dim=1)
    if isinstance(activation, JumpReLU):
        if sae.cfg.jumprelu_sparsity_loss_mode == "tanh":
            sparsity = losses.l0_tanh(code, norms, sae.cfg.jumprelu_tanh_scale)
        else:
            sparsity = _of_l0(sae, losses.l0(code, activation))
        return {"l0_loss": given.coefficients["l0"] * sparsity, **_pre_act(sae, given, o, activation)}
    if isinstance(activation, Gated):
        gate = losses.gate(code)
        via_gate = codes.decode(gate, o) + sae.b_dec
        return {
            "l1_loss": given.coefficients["l1"] * losses.lp(gate, 1.0, norms),
            "auxiliary_reconstruction_loss": _mse(via_gate - given.sae_in),
        }
    return {"l1_loss": given.coefficients["l1"] * losses.lp(code, sae.cfg.lp_norm, norms, root=True)}


def _dead(given: Any) -> Tensor:
    """[M] ids"""
    mask = given.dead_neuron_mask
    if mask is None:
        return torch.empty(0, dtype=torch.int64, device=given.sae_in.device)
    return mask.nonzero().squeeze(1)


def _part(o: Operands, latents: Tensor) -> losses.Part:
    W_enc = take_rows(o.W_enc, latents, transposed=True).T
    scale = None if o.scale is None else o.scale[latents]
    return losses.Part(o.x, W_enc, o.b_enc[latents], take_rows(o.W_dec, latents), scale)


def _auxk(sae: Module, given: Any, o: Operands, error: Tensor) -> Tensor:
    """calculate_topk_aux_loss, its counterpart by magnitude, and with `use_matryoshka_aux_loss` one for each level."""
    dead, magnitude = _dead(given), sae.cfg.architecture() == "abstopk"
    groups = [(dead, error[:, -1])]
    if getattr(sae.cfg, "use_matryoshka_aux_loss", False):
        ends = torch.tensor(sae.cfg.matryoshka_widths, device=dead.device)
        level = torch.bucketize(dead, ends, right=True)
        groups = [(dead[level == p], error[:, p]) for p in range(error.shape[1])]
    terms = [losses.auxk(_part(o, ids), miss, magnitude=magnitude) for ids, miss in groups if ids.shape[0]]
    return sae.cfg.aux_loss_coefficient * torch.stack(terms).sum() if terms else error.new_zeros(())


def _of_l0(sae: Module, l0: Tensor) -> Tensor:
    return losses.l0_to_target(l0, sae.cfg.target_l0) if sae.cfg.jumprelu_sparsity_loss_mode == "quadratic" else l0.mean()


def _pre_act(sae: Module, given: Any, o: Operands, jump: JumpReLU) -> Losses:
    if sae.cfg.pre_act_loss_coefficient is None:
        return {}
    dead = _dead(given)
    loss = losses.pre_act(_part(o, dead), jump.theta[dead]) if dead.shape[0] else o.x.new_zeros(())
    return {"pre_act_loss": sae.cfg.pre_act_loss_coefficient * loss}


@torch.no_grad()
def _update_threshold(sae: Module, shown: SparseCode) -> None:
    """update_topk_threshold, without waiting for the device."""
    old, lr = sae.topk_threshold, sae.cfg.topk_threshold_lr
    least = torch.where(shown.values > 0, shown.values, torch.inf).min().to(old.dtype)
    sae.topk_threshold = torch.where(least.isfinite(), (1 - lr) * old + lr * least, old)


# ── where the code is not sparse ─────────────────────────────────────────────────────────────────────────────────────────


class _Chunks:
    """What `reconstruct_dense` calls for each chunk of latents, and what it saw fire on the way forward."""

    def __init__(self, activation: Activation, bias: Tensor, o: Operands):
        self.activation, self.bias, self.counting = activation, bias, True
        self.numbers = torch.arange(bias.shape[0], device=o.x.device)
        self.per_latent = torch.zeros(bias.shape[0], device=o.x.device)
        self.per_row = torch.zeros(o.x.shape[0], device=o.x.device)

    def activate(self, pre: Tensor, at: At, b_enc: Tensor) -> Tensor:
        acts = self.activation.activate(pre, at, self.bias)
        if self.counting:  # backward comes by again
            fires = active(acts)
            self.per_latent[at(self.numbers)] = fires.sum(0, dtype=torch.float32)
            self.per_row += fires.sum(1, dtype=torch.float32)
        return acts


def _dense(sae: Module, given: Any, o: Operands) -> Any:
    """Standard, gated and JumpReLU before they are sparse: chunks of latents, which backward recomputes."""
    norms, none = sae.W_dec.norm(dim=1), o.W_dec.new_zeros(o.W_dec.shape[1])
    activation = codes.activation_of(sae, o.x.dtype)
    # the bias itself: o.bias carries b_dec's gradient, of which a gate takes its own part out
    chunks = _Chunks(activation, codes.encoder_bias(sae).to(o.x.dtype), o)

    def reconstruct(
        activate: Callable[[Tensor, At, Tensor], Tensor], penalty: Callable[[Tensor, Tensor, At], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        y, cost = functional.reconstruct_dense(o.x, o.W_enc, o.b_enc, o.W_dec, none, activate, penalty)
        return y + sae.b_dec, cost

    if isinstance(activation, JumpReLU):
        tanh = sae.cfg.jumprelu_sparsity_loss_mode == "tanh"

        def sparsity(pre: Tensor, acts: Tensor, at: At) -> Tensor:
            if tanh:
                return (sae.cfg.jumprelu_tanh_scale * acts * at(norms)).tanh()
            return losses.fires(pre, at, activation)

        y, cost = reconstruct(chunks.activate, sparsity)
        parts = {
            "mse_loss": _mse(y - given.sae_in),
            "l0_loss": given.coefficients["l0"] * (cost.mean() if tanh else _of_l0(sae, cost)),
            **_pre_act(sae, given, o, activation),
        }
    elif isinstance(activation, Gated):
        y, _ = reconstruct(chunks.activate, None)
        via_gate, cost = reconstruct(lambda pre, at, b: pre.relu(), lambda pre, acts, at: acts * at(norms))
        parts = {
            "mse_loss": _mse(y - given.sae_in),
            "l1_loss": given.coefficients["l1"] * cost.mean(),
            "auxiliary_reconstruction_loss": _mse(via_gate - given.sae_in),
        }
    else:
        p = sae.cfg.lp_norm
        y, cost = reconstruct(chunks.activate, lambda pre, acts, at: losses.power(acts * at(norms), p))
        parts = {"mse_loss": _mse(y - given.sae_in), "l1_loss": given.coefficients["l1"] * losses.power(cost, 1 / p).mean()}
    chunks.counting = False
    acts = _promise(sae, given, 0)
    acts.fired = chunks.per_latent, chunks.per_row
    return _output(sae, given, y, parts, acts, _promise(sae, given, 1))


# ── on demand ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _promise(sae: Module, given: Any, part: int) -> LazyTensor:
    """(feature_acts, hidden_pre)[part] of this step, from SAELens itself, as long as the weights are those of this step."""
    versions = [p._version for p in sae.parameters()]

    def now() -> Tensor:
        if versions != [p._version for p in sae.parameters()]:
            raise RuntimeError("the weights changed since this step: read its dense activations before the optimizer steps")
        return sae.encode_with_hidden_pre(given.sae_in)[part]

    return lazy((given.sae_in.shape[0], sae.W_enc.shape[1]), sae.dtype, given.sae_in.device, now)
