"""What a finished SAE does on activations, held-out ones where the data have such, and to the model they come from."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from . import formats
from .config import TrainConfig
from .data.models import LanguageModel
from .data.open import Load, chosen_device, excluded, have_held_out, load_model, open_source, open_tokens
from .data.source import Batch, fields
from .interrupt import poll
from .metrics import evaluate
from .sae import SAE
from .settings import from_dict
from .splice import evaluate_splice

SHOWN = {
    "fvu": ("FVU", "{:.4f}"),
    "l0": ("L0", "{:.1f}"),
    "cossim": ("cosine", "{:.4f}"),
    "dead": ("dead", "{:.1%}"),
    "dense": ("dense", "{:.1%}"),
    "ce_loss_without_sae": ("CE loss", "{:.3f}"),
    "ce_loss_with_sae": ("with SAE", "{:.3f}"),
    "ce_loss_score": ("CE recovered", "{:.1%}"),
    "kl_div_with_sae": ("KL", "{:.4f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}


def read_config(run: Path) -> TrainConfig:
    """What a run's folder was asked for."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: pass the folder of a run, the one that fastsae train wrote")
    return from_dict(json.loads(path.read_text()), TrainConfig)


def finished_saes(run: Path) -> dict[str, Path]:
    """The folders of a run's finished SAEs by their names in the sweep."""
    final = run / "final"
    found = {name: final / (name or ".") for name in read_config(run).members()}
    missing = [str(path) for path in found.values() if not formats.recognise(p.name for p in path.glob("*"))]
    if missing:
        raise FileNotFoundError(f"{missing[0]} holds no finished SAE: let the run finish, `fastsae train --out {run}`")
    return found


def evaluate_run(
    run: Path, device: str = "auto", batches: int = 16, load: Load = load_model
) -> dict[str, dict[str, float]]:
    """The metrics of each SAE of a run, on data of its kind; "held_out" says whether it has not seen them."""
    config = read_config(run)
    members, folders = config.members(), finished_saes(run)
    model = _model(config, device, load)  # a sweep shares it
    return {
        name: evaluate_sae(formats.load(folder), members[name], device, batches, model)
        | {"held_out": float(have_held_out(config.data))}
        for name, folder in folders.items()
    }


def _model(config: TrainConfig, device: str, load: Load = load_model) -> LanguageModel | None:
    return load(config.data, chosen_device(device)) if config.data.source == "model" else None


def evaluate_sae(
    sae: SAE, config: TrainConfig, device: str = "auto", batches: int = 16, model: LanguageModel | None = None
) -> dict[str, float]:
    """`batches` of the config's data: activations, and where they are a live model's what splicing the SAE in costs.

    `model` is the language model if it is there already.
    """
    place = chosen_device(device)
    sae, data = sae.to(place).eval(), config.data
    model = model or _model(config, device)
    source = open_source(replace(config, sweep=()), place, held_out=True, model=model)
    found = evaluate(sae, _rows(islice(source, batches), config, sae)).scalars()
    if model is not None:
        tokens = islice(open_tokens(config, model, held_out=True), batches)
        excluded_tokens = excluded(data, model)
        found |= evaluate_splice(model, sae, tokens, data.hook, target_hook=data.target_hook, exclude_tokens=excluded_tokens)
    return found


def _rows(batches: Iterable[Batch], config: TrainConfig, sae: SAE) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, target) as the SAE takes them."""
    for batch in batches:
        poll()
        by_name = fields(batch)
        x = by_name["x"] if "x" in by_name else by_name[config.data.hook]
        target = by_name.get(config.data.target_hook or "target", x)
        x, target = (t.to(sae.W_dec.device, sae.W_dec.dtype).flatten(1) for t in (x, target))
        yield x, target


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """One row for each SAE, and whether the data were open to training."""
    shown = {key: what for key, what in SHOWN.items() if any(key in values for values in found.values())}
    rows = [["", *(title for title, _ in shown.values())]]
    for name, values in found.items():
        rows.append([name, *(form.format(values[key]) if key in values else "" for key, (_, form) in shown.items())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if not all(values.get("held_out", True) for values in found.values()):
        lines.append("on data that training read too: they have no held-out part")
    return "\n".join(lines)
