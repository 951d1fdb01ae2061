"""fastsae train: config in, a run's folder out, and a table of what came of it."""

from collections.abc import Sequence
from pathlib import Path

from .parse import train_config

DESCRIPTION = (
    "Train an SAE. Without arguments: 64x TopK on the small language model that comes along, in about two minutes on a CPU. "
    "--config FILE.yaml reads settings first; flags go on top. The same command again goes on where it was stopped."
)


def main(arguments: Sequence[str]) -> None:
    config = train_config(arguments, DESCRIPTION)

    from functools import cache

    from ..data.open import load_model
    from ..evaluation import evaluate_run, table
    from ..trainer import train

    load = cache(load_model)
    run = train(config, load=load)
    found = evaluate_run(run.path, device=config.device, load=load)
    for values in found.values():
        values["tokens_per_second"] = run.tokens_per_second
    print(table(found))
    print(f"written to {run.path}: final/ is a SAELens folder, metrics.jsonl has the curves")
    picture = _plot(run.path)
    if picture is not None:
        print(f"curves: {picture}")
    print(f"next: fastsae eval {run.path}")


def _plot(run: Path) -> Path | None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        print("curves: pip install 'fastsae[plot]' for a picture")
        return None
    from ..plots import training_curves

    return training_curves([run], run / "training.png")
