"""Gemma Scope folders, read only: JumpReLU SAEs and transcoders, in params.npz or, since the second, params.safetensors.

A folder says nothing of the model and hook it belongs to: SAELens' list of releases does (hub.from_pretrained).
"""

from pathlib import Path

from ..activations import JumpReLU
from .parts import Parts
from .safe import Folder, FormatError, read_npz, read_safetensors

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
FILES = RECOGNISED_BY = (NPZ, SAFETENSORS)
NAMES = {name.lower(): name for name in ("W_enc", "W_dec")} | {"threshold": "activation.theta"}
SKIP = "affine_skip_connection"  # [d_in, d_out]


def read(folder: Folder, allow_pickle: bool = False) -> Parts:
    state = read_npz(folder, NPZ) if folder.has(NPZ) else read_safetensors(folder, SAFETENSORS)
    tensors = {NAMES.get(theirs, theirs): t for theirs, t in state.items()}
    if SKIP in tensors:
        tensors["W_skip"] = tensors.pop(SKIP).T
    return Parts(tensors, JumpReLU, apply_b_dec_to_input=False)


def write(parts: Parts, path: Path) -> None:
    raise FormatError("gemma_scope is read only: save as saelens")
