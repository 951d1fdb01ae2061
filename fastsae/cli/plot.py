"""fastsae plot: pictures and a table of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .parse import flags

DESCRIPTION = "Curves, a table, how often latents fire, and error against sparsity, of one run or several side by side."


@dataclass(frozen=True)
class Plot:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/sae"),)
    """Folders of runs."""
    out: Path = Path("plots")
    """Folder for the pictures."""


def main(arguments: Sequence[str]) -> None:
    asked = flags(Plot, "plot", arguments, DESCRIPTION, Plot())

    from .. import plots

    for run in asked.runs:
        plots.read_metrics(run)  # before anything is drawn
    asked.out.mkdir(parents=True, exist_ok=True)
    made = [plots.training_curves(asked.runs, asked.out / "training.png"), plots.table(asked.runs, asked.out / "runs.csv")]
    finished = {f"{run.name} {name}".strip(): path for run in asked.runs for name, path in plots.finals(run).items()}
    if finished:
        made.append(plots.sparsity_against_error(finished, asked.out / "sparsity.png"))
        made.append(plots.densities(finished, asked.out / "density.png"))
    print("\n".join(str(path) for path in made))
