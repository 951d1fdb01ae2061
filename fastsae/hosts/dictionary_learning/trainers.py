"""The losses and steps of dictionary_learning's trainers, from sparse codes.

Each loss keeps the host's sums, counters and order of side effects, so that `update` stays the host's, around them.
Where a code is not sparse (JumpReLU and ReLU start so), JumpReLU goes through latents in chunks and the rest is the host's.
"""

from collections import namedtuple
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ... import functional, losses
from ...activations import gather
from ...functional import At, Reconstruction
from ...sparse_code import SparseCode
from ..coding import dead_part
from ..stand_in import is_stock
from .dictionaries import (
    Weights,
    above,
    auto_encoder,
    batch_code,
    by_rows,
    encoder_of,
    gates,
    has_all_groups,
    of_auto_encoder,
    of_gated,
    of_matrices,
    row_code,
)


def reconstruct(code: SparseCode, w: Weights, x: Tensor, **levels: Any) -> Reconstruction:
    return functional.reconstruction_loss(code, by_rows(w.W_dec), w.b_dec, x.to(w.W_dec.dtype), **levels)


def per_latent(code: SparseCode, weights: Tensor) -> Tensor:
    """Σ over the entries of each latent of `weights` [E]. [F], no gradient"""
    return weights.new_zeros(code.d_sae).index_add_(0, code.latents, weights.detach())


def fired(code: SparseCode) -> Tensor:
    """Whether each latent has a value over zero in any row. [F]"""
    return per_latent(code, (code.values > 0).float()) > 0


def log(names: str, x: Tensor, r: Reconstruction, code: SparseCode, terms: dict[str, Tensor]) -> Any:
    """What the host returns with logging=True: the code as a matrix, and numbers."""
    values = {name: float(term) for name, term in terms.items()}
    return namedtuple("LossLog", names)(x, r.error[:, -1] + x, code.dense(), values)  # type: ignore[misc]


# ── TopK, BatchTopK, Matryoshka ──────────────────────────────────────────────────────────────────────────────────────────


def auxiliary(trainer: Any, x: Tensor, w: Weights, error: Tensor) -> Tensor:
    """mean_n |ê - r|² / variance(r), ê of the best k of those that have been silent too long; x as the encoder sees it."""
    dead = trainer.num_tokens_since_fired >= trainer.dead_feature_threshold
    trainer.dead_features = int(dead.sum())
    if not trainer.dead_features:
        trainer.pre_norm_auxk_loss = -1
        return error.new_zeros(())
    part = dead_part(x, w.W_enc, w.b_enc, w.W_dec, dead)
    with torch.autocast(x.device.type, enabled=False):
        unexplained = losses.auxk(part, error, k=trainer.top_k_aux, relu=True, scaled=False)
        trainer.pre_norm_auxk_loss = unexplained.detach()
        return (unexplained / losses.variance(error.detach())).nan_to_num(0.0)


def count_tokens(trainer: Any, did_fire: Tensor, tokens: int) -> None:
    trainer.num_tokens_since_fired += tokens
    trainer.num_tokens_since_fired.masked_fill_(did_fire, 0)


def top_k_loss(ae_class: type, weights: Callable[[Any], Weights], per_row: bool) -> Callable[..., Any]:
    """Of TopK (`per_row`), of BatchTopK, and of Matryoshka, where there are groups."""

    def loss(self: Any, x: Tensor, step: int, logging: bool = False) -> Any:
        groups = getattr(self, "group_sizes", [])
        if not is_stock(self.ae, ae_class) or x.dim() != 2 or not has_all_groups(self.ae):
            return NotImplemented
        seen, w = encoder_of(x, weights(self.ae))
        code = (row_code if per_row else batch_code)(seen, w, int(self.ae.k))
        if step > self.threshold_start_step:
            values = code.values.detach()
            self.update_threshold(values.view(x.shape[0], -1) if per_row else values)
        self.effective_l0 = code.k or self.k
        count_tokens(self, fired(code), x.shape[0])
        r = reconstruct(code, w, x, prefixes=list(accumulate(groups)) or None)
        per_level = r.sse.mean(0)
        if groups:
            per_level = per_level * per_level.new_tensor(self.group_weights)
        l2 = per_level.mean()  # with groups, of what is weighted already: so the host has it
        wanted = self.auxk_alpha > 0 or not per_row  # the host's BatchTopK counts the dead in any case
        aux = auxiliary(self, seen, w, r.error[:, -1]) if wanted else l2.new_zeros(())
        total = l2 + self.auxk_alpha * aux
        if not logging:
            return total
        ends = {"min_l2_loss": per_level.min(), "max_l2_loss": per_level.max()} if groups else {}
        return log("x x_hat f losses", x, r, code, {"l2_loss": l2, "auxk_loss": aux, "loss": total, **ends})

    return loss


# ── JumpReLU ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


StraightThrough = Callable[[Tensor, Tensor, float], Tensor]


def jump_relu_loss(ae_class: type, jump: StraightThrough, step_of: StraightThrough) -> Callable[..., Any]:
    """`jump` and `step_of` are the host's functions of (x, theta, bandwidth): element-wise, so entries are all they need."""

    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        ae, bandwidth = self.ae, self.bandwidth
        if not is_stock(ae, ae_class) or x.dim() != 2:
            return NotImplemented
        w = of_matrices(ae)
        x, theta, N = x.to(w.W_enc.dtype), ae.threshold, x.shape[0]
        # more than the window, by what a threshold may lose in bf16: what lies outside has value and gradient zero
        low = theta.detach() - 0.501 * bandwidth - theta.detach().abs() / 128
        code, r = above(x, w, low), None
        if code is None and (logging or N * theta.shape[0] <= functional.BLOCK_ELEMENTS):
            return NotImplemented  # theirs keeps what chunks compute twice
        if code is None:
            y, l0, total = by_chunks(x, w, theta, bandwidth)
            recon = (x - y).square().sum(1).mean()
        else:
            theta_of = gather(code)(theta)
            code = code.with_values(jump(code.values, theta_of, bandwidth))
            total = per_latent(code, code.values)
            r = reconstruct(code, w, x)
            recon = losses.mse(r)
            # to the host's step a silent latent is an activation of zero, which may lie in the window around its threshold
            silent = N - per_latent(code, torch.ones_like(code.values))
            of_silent = step_of(torch.zeros_like(theta), theta, bandwidth)
            l0 = (step_of(code.values, theta_of, bandwidth).sum() + (silent * of_silent).sum()) / N
        count_tokens(self, total > 0, N)
        self.dead_features = int((self.num_tokens_since_fired > self.dead_feature_threshold).sum())
        sparsity = self.sparsity_coefficient * (l0 / self.target_l0 - 1).square() * self.sparsity_warmup_fn(step)
        whole = recon + sparsity
        if code is None or r is None or not logging:
            return whole
        return log("x recon f losses", x, r, code, {"l2_loss": recon, "loss": whole})

    def by_chunks(x: Tensor, w: Weights, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, mean L0, Σ_n activations [F]), in chunks of latents."""
        total = torch.zeros_like(theta)

        def activate(pre: Tensor, at: At, _: Tensor) -> Tensor:
            acts = jump(pre, at(theta), bandwidth)
            at(total).copy_(acts.detach().sum(0))  # again when backward recomputes, to the same
            return acts

        def steps(_: Tensor, acts: Tensor, at: At) -> Tensor:
            return step_of(acts, at(theta), bandwidth)

        y, l0 = functional.reconstruct_dense(x, w.W_enc, w.b_enc, w.W_dec, w.b_dec, activate, steps)
        return y, l0.mean(), total

    return loss


# ── L1 and Gated ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def l1_loss(ae_class: type, by_norm: bool) -> Callable[..., Any]:
    """Of StandardTrainer, and `by_norm` of its April update, which weighs activations with decoder norms."""

    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        if not is_stock(self.ae, ae_class) or x.dim() != 2:
            return NotImplemented
        w = of_auto_encoder(self.ae)
        code = auto_encoder(self.ae, x, w)
        if code is None:
            return NotImplemented
        r = reconstruct(code, w, x, weight=w.W_dec.norm(dim=1) if by_norm else None)
        recon, l1 = losses.mse(r), losses.l1(r)
        if getattr(self, "steps_since_active", None) is not None:
            self.steps_since_active += 1
            self.steps_since_active.masked_fill_(fired(code), 0)
        total = recon + self.l1_penalty * self.sparsity_warmup_fn(step) * l1
        if not logging:
            return total
        l2 = r.sse[:, -1].sqrt().mean()
        return log("x x_hat f losses", x, r, code, {"l2_loss": l2, "mse_loss": recon, "sparsity_loss": l1, "loss": total})

    return loss


def gated_loss(ae_class: type) -> Callable[..., Any]:
    def loss(self: Any, x: Tensor, step: int, logging: bool = False, **_: Any) -> Any:
        if not is_stock(self.ae, ae_class) or x.dim() != 2:
            return NotImplemented
        w = of_gated(self.ae)
        both = gates(self.ae, x, w)
        if both is None:
            return NotImplemented
        code, gate = both
        r = reconstruct(code, w, x)
        via_gate = reconstruct(gate, w._replace(W_dec=w.W_dec.detach(), b_dec=w.b_dec.detach()), x)
        recon, aux, sparse = losses.mse(r), losses.mse(via_gate), losses.l1(via_gate)
        total = recon + self.l1_penalty * sparse * self.sparsity_warmup_fn(step) + aux
        if not logging:
            return total
        return log(
            "x x_hat f losses", x, r, code,
            {"mse_loss": recon, "sparsity_loss": sparse, "aux_loss": aux, "loss": total},
        )  # fmt: skip

    return loss


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_fused_adam(update: Callable[..., Any]) -> Callable[..., Any]:
    """The host's update, its Adam in one pass. The step it takes is the same to rounding."""

    def fast(self: Any, step: int, activations: Tensor) -> Any:
        for group in self.optimizer.param_groups if isinstance(self.optimizer, torch.optim.Adam) else ():
            states = [(p, self.optimizer.state[p]) for p in group["params"] if p in self.optimizer.state]
            # fused Adam walks memory, whatever the strides say
            if all(state[name].stride() == p.stride() for p, state in states for name in ("exp_avg", "exp_avg_sq")):
                group["fused"], group["foreach"] = True, False
                for p, state in states:
                    state["step"] = state["step"].to(p.device)
        return update(self, step, activations)

    return fast


@torch.no_grad()
def remove_parallel(W_dec_DF: Tensor, W_dec_DF_grad: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """The gradient minus its component along each column, in place. The host's einsum is a batched product of F vectors."""
    if W_dec_DF.shape != (activation_dim, d_sae):
        raise ValueError(f"W_dec has shape {list(W_dec_DF.shape)}: expected [D, F] = {[activation_dim, d_sae]}")
    parallel = (W_dec_DF_grad * W_dec_DF).sum(0) / (W_dec_DF.norm(dim=0) + 1e-6).square()
    return W_dec_DF_grad.addcmul_(W_dec_DF, -parallel)
