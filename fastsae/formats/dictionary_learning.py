"""dictionary_learning folders: config.json, whose trainer.dict_class says what ae.pt is the state dict of.

ae.pt is a pickle: it is read only where the caller allows that, and written because that library reads nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from ..strict_json import write_json
from .parts import Parts
from .safe import Folder, FormatError, read_json, read_pickle

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES, RECOGNISED_BY = (CONFIG, WEIGHTS), (WEIGHTS,)

OWN = "dictionary_learning"  # in the metadata: what only this format knows


@dataclass(frozen=True)
class Class:
    """One of the library's classes: what it is here, and ours for its names of tensors. A nn.Linear's weight is transposed."""

    activation: type[Activation]
    apply_b_dec_to_input: bool
    names: dict[str, str]


LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
THRESHOLD = {"threshold": "activation.threshold"}
GATED = {"gate_bias": "b_enc", "r_mag": "activation.r_mag", "mag_bias": "activation.b_mag", "decoder_bias": "b_dec"}

CLASSES = {
    "AutoEncoder": Class(ReLU, True, {**LINEAR, "encoder.bias": "b_enc", "bias": "b_dec"}),
    "AutoEncoderNew": Class(ReLU, False, {**LINEAR, "encoder.bias": "b_enc", "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": Class(Gated, True, {**LINEAR, **GATED}),
    "JumpReluAutoEncoder": Class(JumpReLU, False, {**PLAIN, "threshold": "activation.theta"}),
    "AutoEncoderTopK": Class(TopK, True, {**LINEAR, "encoder.bias": "b_enc", "b_dec": "b_dec"}),
    "BatchTopKSAE": Class(BatchTopK, True, {**LINEAR, **THRESHOLD, "encoder.bias": "b_enc", "b_dec": "b_dec"}),
    "MatryoshkaBatchTopKSAE": Class(BatchTopK, True, {**PLAIN, **THRESHOLD}),
}


def read(folder: Folder, allow_pickle: bool = False) -> Parts:
    config = read_json(folder, CONFIG)
    metadata = config.section("metadata")
    config.pop("metadata", None)
    trainer = config.section("trainer")
    name = trainer.choice("dict_class", list(CLASSES))
    kind, state = CLASSES[name], read_pickle(folder, WEIGHTS, allow_pickle)
    arguments: dict[str, Any] = {}
    if issubclass(kind.activation, TopK):
        arguments["k"] = trainer.whole("k")
        if "k" in state and not (state["k"] == arguments["k"]).all():
            raise FormatError(f"{CONFIG} says k={arguments['k']}, {WEIGHTS} says another")
    # k stands in the config; a TopK's threshold is for another way to encode, groups are for the loss
    buffers = {
        theirs: state.pop(theirs).tolist()
        for theirs in ("k", "threshold", "group_sizes")
        if theirs in state and theirs not in kind.names
    }
    return Parts(
        tensors={kind.names.get(theirs, theirs): _turned(theirs, t) for theirs, t in state.items()},
        activation=kind.activation,
        arguments=arguments,
        apply_b_dec_to_input=kind.apply_b_dec_to_input,
        metadata={**metadata, OWN: {"config": dict(config), "buffers": buffers}},
    )


def write(parts: Parts, path: Path) -> None:
    metadata = dict(parts.metadata)
    own = metadata.pop(OWN, {})
    buffers = own.get("buffers", {})
    name = _class(parts, grouped="group_sizes" in buffers)
    ours = {here: theirs for theirs, here in CLASSES[name].names.items()}
    state = {ours[here]: _turned(ours[here], t).contiguous() for here, t in parts.tensors.items()}
    if issubclass(parts.activation, TopK):
        state["k"] = torch.tensor(parts.arguments["k"], dtype=torch.int32)
        threshold = parts.tensors.get("activation.threshold", torch.tensor(buffers.get("threshold", -1.0)))
        state["threshold"] = threshold.float()
    if "group_sizes" in buffers:
        state["group_sizes"] = torch.tensor(buffers["group_sizes"])
    config = own.get("config", {})
    trainer = {**config.get("trainer", {}), "dict_class": name, "activation_dim": parts.d_in, "dict_size": parts.d_sae}
    if "k" in state:
        trainer["k"] = parts.arguments["k"]
    write_json(path / CONFIG, {**config, "trainer": trainer, "metadata": metadata})
    torch.save(state, path / WEIGHTS)


def _turned(theirs: str, t: Tensor) -> Tensor:
    return t.T if theirs in LINEAR else t


def _class(parts: Parts, grouped: bool) -> str:
    parts.refuse_beyond_plain("dictionary_learning")
    for name, kind in CLASSES.items():
        if (kind.activation, kind.apply_b_dec_to_input) == (parts.activation, parts.apply_b_dec_to_input):
            return "MatryoshkaBatchTopKSAE" if grouped else name
    raise FormatError(
        f"dictionary_learning has no class for {parts.activation.__name__} with "
        f"apply_b_dec_to_input={parts.apply_b_dec_to_input}: it has {', '.join(CLASSES)}"
    )
