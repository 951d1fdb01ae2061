"""How well SAEs train:  .venv-hosts/bin/python -m bench.recovery [NAME ...]

A name is one of RUNS, or `throughput`; all of them without one. On synthetic data it counts which true features were found.
Where SAELens is installed its own trainer runs beside ours, from the same weights on the same batches, and both SAEs are
evaluated alike. Results are merged into bench/results/recovery.json, and docs/recovery.md comes from all that is in there.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae import SAE, DataConfig, LossConfig, OptimConfig, SAEConfig, TrainConfig
from fastsae.data.open import open_source, opened
from fastsae.data.synthetic import Superposition, matched_cosine, mean_max_cosine
from fastsae.evaluation import evaluate_sae
from fastsae.initialise import default_dead_window, learning_rate
from fastsae.member import Member

from .environment import ROOT, environment
from .hosts import D, N, saelens_topk_step
from .measure import interleave
from .providers.sae_lens import fit_step
from .table import markdown

CPU = torch.device("cpu")
RESULTS, PAGE = ROOT / "bench" / "results" / "recovery.json", ROOT / "docs" / "recovery.md"
WORSE, FASTER = 1.01, 4.0
"""Goals: an error at most this many times SAELens', steps at least this many times as fast."""


@dataclass(frozen=True)
class Run:
    config: TrainConfig
    goal: float | None = None
    """The mean max cosine similarity that the features found must have."""


def synthetic(sae: SAEConfig, loss: LossConfig, optim: OptimConfig, steps: int, batch_size: int) -> TrainConfig:
    """512 features in 64 dimensions, 5 in a row on average, and 1024 latents."""
    data = DataConfig(source="synthetic", d_in=64, features=512, active=5.0, buffer=batch_size)
    return TrainConfig(replace(sae, d_sae=1024), loss, optim, data, tokens=steps * batch_size, batch_size=batch_size)


RUNS = {
    "topk": Run(synthetic(SAEConfig(k=5), LossConfig(), OptimConfig(lr=3e-3, lr_decay=300), 1500, 1024), 0.98),
    "batchtopk": Run(
        synthetic(
            SAEConfig(activation="batchtopk", k=5),
            LossConfig(auxk=5, dead_window=10_240),  # with the default of 32 dead latents a row none of them grows up
            OptimConfig(lr=3e-3, lr_decay=800),
            steps=4000,
            batch_size=512,
        ),
        0.95,
    ),
    "jumprelu": Run(
        synthetic(
            # Unit norm, or else the term for dead latents shrinks their decoder rows to nothing: that happens to SAELens',
            # which has no such setting. Without the term and with a coefficient of 0.03 its FVU is 0.303. A window of 2
            # holds 4 of 5 entries: each latent has a gradient from the start, and steps are dense and slower than SAELens'.
            SAEConfig(activation="jumprelu", theta=0.5, bandwidth=2.0, ste_to_input=True, unit_norm=True),
            LossConfig("mse", "l0_to_target", 0.1, target_l0=5.0, dead="pre_act", dead_coefficient=0.1, dead_window=10_240),
            OptimConfig(lr=6e-3, lr_decay=4500),
            steps=6000,
            batch_size=512,
        ),
        0.95,
    ),
    "embedded-topk": Run(TrainConfig()),
    "embedded-batchtopk": Run(TrainConfig(SAEConfig(activation="batchtopk"))),
}
"""SAELens has no auxk (half the dimensions) and no unit norm to set: beside these runs its own stay."""


def run(name: str) -> dict[str, Any]:
    """Train it, SAELens beside it where that is installed, and evaluate both on data that neither has seen."""
    config = RUNS[name].config
    with opened(config, None, CPU) as batches:
        first = next(batches)
        member = Member(config, first.shape[1], None, CPU)
        steps: dict[str, Callable[[Tensor, int], object]] = {"fastsae": member.step}
        peer = saelens_trainer(config, member.sae) if find_spec("sae_lens") else None
        if peer is not None:
            steps["SAELens"] = lambda x, step: fit_step(peer, x)
        seconds = dict.fromkeys(steps, 0.0)
        for step in range(config.steps):
            x = first if step == 0 else next(batches)
            for who, call in steps.items():
                began = time.perf_counter()
                call(x, step)
                seconds[who] += time.perf_counter() - began
    saes = {"fastsae": member.finished()}
    if peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            peer.sae.save_inference_model(folder)
            saes["SAELens"] = fastsae.load(folder)
    found = {who: scores(sae, config) | {"seconds": seconds[who]} for who, sae in saes.items()}
    return {"goal": RUNS[name].goal, "steps": config.steps, "settings": asked(config), "trained": found}


def scores(sae: SAE, config: TrainConfig) -> dict[str, float]:
    found = evaluate_sae(sae, config, "cpu")
    source = open_source(config, CPU) if config.data.source == "synthetic" else None
    if isinstance(source, Superposition):
        found["mmcs"] = mean_max_cosine(sae.W_dec, source.features)
        found["matched"] = matched_cosine(sae.W_dec, source.features)
    return {name: found[name] for name in ("mmcs", "matched", "fvu", "l0", "dead", "ce_loss_score") if name in found}


def asked(config: Any, usual: Any = None) -> dict[str, Any]:
    """The settings that are not the default ones."""
    usual = usual or type(config)()
    found: dict[str, Any] = {}
    for field in fields(config):
        value, default = getattr(config, field.name), getattr(usual, field.name)
        if is_dataclass(value):
            found |= asked(value, default)
        elif value != default:
            found[field.name] = value
    return found


# ── SAELens ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def saelens_trainer(config: TrainConfig, start: SAE) -> Any:
    """Its SAETrainer with the settings of `config`, from the weights of `start`."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    training_class, config_class = get_sae_training_class(config.sae.activation)
    sae = training_class(config_class(d_in=start.d_in, d_sae=start.d_sae, **saelens_settings(config)))
    weights = {name.replace("activation.theta", "threshold"): p for name, p in start.named_parameters()}
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(weights[name])
    optim, batch = config.optim, config.batch_size
    lr, window = learning_rate(optim, start.d_sae), config.loss.dead_window or default_dead_window(config.tokens)
    settings = SAETrainerConfig(
        total_training_samples=config.steps * batch, train_batch_size_samples=batch, lr=lr, lr_end=lr,
        lr_warm_up_steps=optim.lr_warm_up, lr_decay_steps=optim.lr_decay, dead_feature_window=window // batch,
    )  # fmt: skip
    return SAETrainer(settings, sae, iter(()))


def saelens_settings(config: TrainConfig) -> dict[str, Any]:
    sae, loss = config.sae, config.loss
    if sae.activation != "jumprelu":
        return {"k": sae.k, "aux_loss_coefficient": loss.dead_coefficient}
    return {
        "jumprelu_sparsity_loss_mode": "quadratic",
        "jumprelu_bandwidth": sae.bandwidth,
        "jumprelu_ste_to_input": sae.ste_to_input,
        "target_l0": loss.target_l0,
        "l0_coefficient": loss.coefficient,
        "l0_warm_up_steps": loss.warm_up,
        "pre_act_loss_coefficient": loss.dead_coefficient,
    }


# ── a step's time ────────────────────────────────────────────────────────────────────────────────────────────────────────


def throughput(seconds: float = 60.0) -> dict[str, Any]:
    """Steps of TopK with its optimizer at N 1024, D 768, F 24,576, k 32, fp32, on two threads, in interleaved rounds."""
    torch.set_num_threads(2)
    member = Member(TrainConfig(SAEConfig(k=32, d_sae=24_576), optim=OptimConfig(lr=3e-4)), D, None, CPU)
    x = torch.randn(4, N, D)
    calls = {"fastsae": lambda i: member.step(x[i % 4], i), "SAELens": saelens_topk_step(CPU).call}
    samples = interleave(calls, CPU, seconds, least=5)
    ms = {who: statistics.median(taken) for who, taken in samples.items() if isinstance(taken, list)}
    return {"goal": FASTER, "ms": ms, "ratio": ms["SAELens"] / ms["fastsae"]}


# ── what is kept and shown ───────────────────────────────────────────────────────────────────────────────────────────────

Results = dict[str, dict[str, Any]]
"""By name of the run."""
COLUMNS = {
    "mmcs": ("mean max cosine", "{:.4f}"),
    "matched": ("matched", "{:.4f}"),
    "fvu": ("FVU", "{:.4f}"),
    "ce_loss_score": ("CE recovered", "{:.2%}"),
    "l0": ("L0", "{:.2f}"),
    "dead": ("dead", "{:.1%}"),
    "seconds": ("seconds", "{:.0f}"),
}
PAGE_HEAD = """# How well SAEs train

Made by `.venv-hosts/bin/python -m bench.recovery` from bench/results/recovery.json. Synthetic data are 512 unit features in 64
dimensions, each active with probability 5/512 and a magnitude from 0.75 to 1.25; the SAE has 1024 latents. "Mean max cosine" is
the mean over features of the best cosine similarity with a decoder row, "matched" the same where a row stands for one feature
only. Runs named embedded- are on the small language model that comes along. SAELens is its own SAETrainer with the same
settings, from the same weights, on the same batches. FVU, L0 and dead latents are of held-out rows, and CE recovered of
held-out text with the SAE spliced into the model, against zero ablation. Seconds are of steps alone, on a machine that was
shared: see `throughput` for a comparison of time.
"""


def goals(result: dict[str, Any]) -> dict[str, bool]:
    """Whether each was met."""
    if "ratio" in result:
        return {f"a step at least {FASTER:g} times as fast as SAELens': {result['ratio']:.2f}": result["ratio"] >= FASTER}
    found: dict[str, bool] = {}
    ours, theirs = result["trained"]["fastsae"], result["trained"].get("SAELens")
    if result["goal"] is not None:
        found[f"mean max cosine at least {result['goal']}"] = ours["mmcs"] >= result["goal"]
    if theirs is not None:
        found["FVU at most 1 % over SAELens'"] = ours["fvu"] <= WORSE * theirs["fvu"]
        if "ce_loss_score" in ours:
            found["CE recovered at most 1 % below SAELens'"] = ours["ce_loss_score"] >= theirs["ce_loss_score"] / WORSE
    return found


def page(results: Results) -> str:
    """docs/recovery.md"""
    parts = [PAGE_HEAD]
    for name, result in results.items():
        if "ratio" in result:
            rows = [[who, f"{ms:.0f}"] for who, ms in result["ms"].items()]
            text = [markdown(["", "ms of a step, median"], rows), str(throughput.__doc__)]
        else:
            trained = result["trained"]
            shown = {key: what for key, what in COLUMNS.items() if key in trained["fastsae"]}
            rows = [[who, *(form.format(scores[key]) for key, (_, form) in shown.items())] for who, scores in trained.items()]
            settings = ", ".join(f"{key}={value}" for key, value in result["settings"].items()) or "the default settings"
            text = [markdown(["", *(title for title, _ in shown.values())], rows), f"{result['steps']:,} steps: {settings}."]
        text.append("\n".join(f"- {goal}: {'met' if met else 'not met'}" for goal, met in goals(result).items()))
        where = result["environment"]
        commit = (where["commit"] or "unknown")[:10] + (" with changes" if where["dirty"] else "")
        text.append(f"{where['device']}, commit {commit}, {where['date']}.")
        parts.append("\n\n".join([f"## {name}", *text]) + "\n")
    return "\n".join(parts)


def main(names: list[str], results: Path = RESULTS, shown: Path = PAGE) -> int:
    known = [*RUNS, "throughput"]
    if unknown := set(names) - set(known):
        print(f"unknown {sorted(unknown)}: pass some of {', '.join(known)}", file=sys.stderr)
        return 2
    met = True
    for name in names or known:
        result = throughput() if name == "throughput" else run(name)
        result["environment"] = environment(CPU, f"python -m bench.recovery {name}")
        found: Results = json.loads(results.read_text()) if results.exists() else {}
        found[name] = result
        found = {known_name: found[known_name] for known_name in known if known_name in found}
        results.write_text(json.dumps(found, indent=1) + "\n")
        shown.write_text(page(found))
        print(name, json.dumps(result.get("trained", result.get("ms"))), *goals(result).items(), flush=True)
        met &= all(goals(result).values())
    return int(not met)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
