"""What a language model loses if an SAE's reconstruction takes the place of activations."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from .data.language_model import per_token
from .data.models import Hook, LanguageModel


@torch.no_grad()
def evaluate_splice(
    model: LanguageModel,
    sae: Callable[[Tensor], Tensor],
    tokens: Iterable[Tensor],
    hook: str,
    *,
    target_hook: str | None = None,
    exclude_tokens: Iterable[int] = (),
) -> dict[str, float]:
    """Next-token losses (nats) and KL divergences from the model as it is, over batches of tokens [B, context].

    Activations at `hook` become sae(activations [B, context, D]), or zero, or their mean over all these tokens; for a
    transcoder those at `target_hook` do, which comes later. Tokens in `exclude_tokens` keep theirs next to the SAE, and count
    in no average. Names and definitions are those of SAELens' evals: ce_loss_without_sae, ce_loss_with_sae,
    ce_loss_with_ablation (zero), kl_div_with_sae, kl_div_with_ablation, and ce_loss_score, kl_div_score: (ablation - sae) /
    (ablation - clean), 1 for a perfect SAE. "mean_ablation" instead of "ablation" is the mean.
    """
    batches = list(tokens)
    excluded = torch.tensor(sorted(exclude_tokens), dtype=torch.long)
    kept = [~torch.isin(batch.cpu(), excluded) for batch in batches]
    if not any(bool(keep.any()) for keep in kept):
        raise ValueError(f"{len(batches)} batches hold no token to evaluate: pass tokens, not all of them excluded")
    replaced = target_hook or hook
    mean = _mean(model, batches, kept, replaced)

    def average(x: Tensor) -> Tensor:
        return mean.to(x).view(x.shape[2:]).expand_as(x)

    numbers: defaultdict[str, list[Tensor]] = defaultdict(list)  # of each kept token
    for batch, keep in zip(batches, kept, strict=True):
        clean = model.logits(batch)
        numbers["ce_loss_without_sae"].append(_ce(clean, batch)[keep[:, :-1]])
        for name, hooks in {
            "with_sae": _reconstruct(sae, hook, replaced, keep),
            "with_ablation": {replaced: torch.zeros_like},
            "with_mean_ablation": {replaced: average},
        }.items():
            logits = model.logits(batch, hooks)
            numbers[f"ce_loss_{name}"].append(_ce(logits, batch)[keep[:, :-1]])
            numbers[f"kl_div_{name}"].append(_kl(clean, logits)[keep])
    found = {name: float(torch.cat(of_batches).mean()) for name, of_batches in numbers.items()}
    for metric, best in (("ce_loss", found["ce_loss_without_sae"]), ("kl_div", 0.0)):
        for score, ablation in (("score", "with_ablation"), ("score_mean_ablation", "with_mean_ablation")):
            worst, spliced = found[f"{metric}_{ablation}"], found[f"{metric}_with_sae"]
            found[f"{metric}_{score}"] = (worst - spliced) / (worst - best) if worst != best else math.nan
    return found


def _mean(model: LanguageModel, batches: list[Tensor], kept: list[Tensor], hook: str) -> Tensor:
    """[D] The mean activation of all kept tokens."""
    total, count = torch.tensor(0.0), 0
    for batch, keep in zip(batches, kept, strict=True):
        x = per_token(hook, model.run(batch, [hook])[hook], batch)
        total = total + x[keep.to(x.device)].sum(0, dtype=torch.float64).cpu()
        count += int(keep.sum())
    return total / count


def _reconstruct(sae: Callable[[Tensor], Tensor], hook: str, replaced: str, keep: Tensor) -> dict[str, Hook]:
    """Hooks that put sae(activations at `hook`) in the place of those at `replaced`, for the tokens to keep."""
    weights = next(sae.parameters(), None) if isinstance(sae, nn.Module) else None
    seen: dict[str, Tensor] = {}

    def see(x: Tensor) -> Tensor:
        seen["x"] = x
        return x

    def replace(y: Tensor) -> Tensor:
        x = per_token(hook, seen.get("x", y), keep)
        y_hat = sae(x if weights is None else x.to(weights)).to(y)
        return torch.where(keep.to(y.device)[..., None], y_hat, y.flatten(2)).view(y.shape)

    return {hook: replace} if hook == replaced else {hook: see, replaced: replace}


def _ce(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, context - 1] The loss of predicting each token but the first."""
    targets = tokens.to(logits.device)[:, 1:]
    rows = [cross_entropy(_precise(x)[:-1], t, reduction="none") for x, t in zip(logits, targets, strict=True)]
    return torch.stack(rows).double().cpu()


def _kl(clean: Tensor, logits: Tensor) -> Tensor:
    """[B, context] KL(clean | logits)."""
    pairs = ((_precise(p).log_softmax(-1), _precise(q).log_softmax(-1)) for p, q in zip(clean, logits, strict=True))
    return torch.stack([kl_div(q, p, reduction="none", log_target=True).sum(-1) for p, q in pairs]).double().cpu()


def _precise(logits: Tensor) -> Tensor:
    """At least fp32; of one sequence at a time, since a batch of these is large."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
