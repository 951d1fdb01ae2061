"""fastsae eval: the metrics of a run's SAEs, or of any SAE on data that are named."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ..config import DataConfig, TrainConfig
from ..strict_json import finite, write_json
from .parse import flags

DESCRIPTION = (
    "What an SAE does on activations, and to the language model they come from. A run's SAEs are measured on data of its kind, "
    "held out where there are such; the SAE of a folder on the data named, by the model and hooks in its files unless others "
    "are given."
)


@dataclass(frozen=True)
class Eval:
    path: Annotated[Path, tyro.conf.Positional] = Path("runs/sae")
    """Folder of a run, or of an SAE in any known format."""
    data: DataConfig = field(default_factory=DataConfig)
    batches: int = 16
    """Chunks of activations to read, of --sequences sequences each."""
    device: str = "auto"
    """cuda if there is one, else cpu, unless given."""
    json: Path | None = None
    """Write the numbers there too."""


def main(arguments: Sequence[str]) -> None:
    asked = flags(Eval, "eval", arguments, DESCRIPTION, Eval())
    if asked.batches < 1:
        raise ValueError(f"batches={asked.batches}: pass a number >= 1")

    from ..evaluation import evaluate_run, evaluate_sae, table

    if (asked.path / "config.json").is_file() and not (asked.path / "ae.pt").is_file():
        if asked.data != DataConfig():
            raise ValueError(f"{asked.path} is a run, which knows its data: name data only for the folder of an SAE")
        found = evaluate_run(asked.path, asked.device, asked.batches)
    else:
        from ..data.origin import completed
        from ..formats import load

        sae = load(asked.path)
        config = dataclasses.replace(TrainConfig(), data=completed(asked.data, sae.metadata))
        found = {"": evaluate_sae(sae, config, asked.device, asked.batches)}
    print(table(found))
    if asked.json is not None:
        write_json(asked.json, {name: finite(values) for name, values in found.items()})
