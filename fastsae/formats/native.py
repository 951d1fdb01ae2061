"""Our own folder, for what no other library's files can hold, a TopK transcoder say: fastsae_sae.json and .safetensors."""

from pathlib import Path
from typing import Any

from ..normalize import NORMALIZE
from ..state_files import save_tensors
from ..strict_json import write_json
from .parts import ARGUMENTS, Parts
from .safe import Config, Folder, read_json, read_safetensors

CONFIG, WEIGHTS = "fastsae_sae.json", "fastsae_sae.safetensors"
FILES, RECOGNISED_BY = (CONFIG, WEIGHTS), (WEIGHTS,)


def read(folder: Folder, allow_pickle: bool = False) -> Parts:
    cfg = read_json(folder, CONFIG)
    name = cfg.choice("activation", [kind.__name__ for kind in ARGUMENTS])
    activation = next(kind for kind in ARGUMENTS if kind.__name__ == name)
    parts = Parts(
        tensors=read_safetensors(folder, WEIGHTS),
        activation=activation,
        arguments={argument: _argument(cfg, argument) for argument in ARGUMENTS[activation]},
        apply_b_dec_to_input=cfg.flag("apply_b_dec_to_input", True),
        rescale_acts_by_decoder_norm=cfg.flag("rescale_acts_by_decoder_norm", False),
        normalize=cfg.choice("normalize", ["none", *NORMALIZE]),
        transcodes=cfg.flag("transcodes", False),
        metadata=dict(cfg.section("metadata")),
    )
    parts.skeleton()
    return parts


def _argument(cfg: Config, name: str) -> Any:
    if name == "k":
        return cfg.whole(name)
    return cfg.flag(name, False) if name == "ste_to_input" else cfg.number(name)


def write(parts: Parts, path: Path) -> None:
    cfg = {
        "activation": parts.activation.__name__,
        **parts.arguments,
        "apply_b_dec_to_input": parts.apply_b_dec_to_input,
        "rescale_acts_by_decoder_norm": parts.rescale_acts_by_decoder_norm,
        "normalize": parts.normalize,
        "transcodes": parts.transcodes,
        "metadata": parts.metadata,
    }
    write_json(path / CONFIG, cfg)
    save_tensors(path / WEIGHTS, parts.tensors)
