"""Pictures of runs: curves, and what sparsity costs. Files only, no display."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from .optional import need

CURVES = {
    "losses/overall_loss": "loss",
    "metrics/explained_variance": "explained variance",
    "metrics/l0": "L0",
    "sparsity/dead_features": "dead latents",
}
POINTS = 2000
"""Points of a curve: more cannot be seen."""


def read_metrics(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl, by SAE of its sweep."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: pass the folder of a run, the one that fastsae train wrote")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values.pop("sae", ""), []).append(values)
    return found


def training_curves(runs: Sequence[Path], path: Path) -> Path:
    """Loss, explained variance, L0 and dead latents over tokens."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for run in runs:
        for name, rows in read_metrics(run).items():
            rows = rows[:: max(1, len(rows) // POINTS)]
            for axis, (key, title) in zip(axes.flat, CURVES.items(), strict=True):
                points = [(row["details/n_training_samples"], row[key]) for row in rows if row.get(key) is not None]
                axis.plot([p[0] for p in points], [p[1] for p in points], label=" ".join(filter(None, [run.name, name])))
                axis.set_title(title)
    for axis in axes[1]:
        axis.set_xlabel("tokens")
    if len(axes[0, 0].lines) > 1:
        axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def finals(run: Path) -> dict[str, Path]:
    """The folders of a run's finished SAEs that were evaluated, by name in the sweep."""
    folders = [path.parent for path in run.glob("final/**/evaluation.json")]
    return {str(folder.relative_to(run / "final")).strip("."): folder for folder in folders}


def sparsity_against_error(finished: dict[str, Path], path: Path) -> Path:
    """L0 and FVU of finished SAEs, by name."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, folder in finished.items():
        values = json.loads((folder / "evaluation.json").read_text())
        axis.scatter([values["l0"]], [values["fvu"]])
        axis.annotate(name, (values["l0"], values["fvu"]), fontsize="small", xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="L0", ylabel="fraction of variance unexplained")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def densities(finished: dict[str, Path], path: Path) -> Path:
    """In what share of rows latents fire, as a histogram of its log10."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    for name, folder in finished.items():
        sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
        alive = sparsity[sparsity > -9.5].tolist()
        axis.hist(alive, bins=60, histtype="step", label=f"{name}, {len(sparsity) - len(alive)} never fired")
    axis.set(xlabel="log10 of the share of rows", ylabel="latents")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def table(runs: Sequence[Path], path: Path) -> Path:
    """The last line of every SAE's metrics as CSV."""
    rows = [{"run": str(run), "sae": name, **lines[-1]} for run in runs for name, lines in read_metrics(run).items()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _pyplot() -> Any:
    need("matplotlib", "plot").use("Agg")
    return need("matplotlib.pyplot", "plot")
