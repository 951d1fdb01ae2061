"""sparsify folders: cfg.json and sae.safetensors, a SparseCoder with TopK, transcoder and skip connection included."""

from pathlib import Path

from ..activations import TopK
from ..state_files import save_tensors
from ..strict_json import write_json
from .parts import Parts
from .safe import Folder, FormatError, read_json, read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES, RECOGNISED_BY = (CONFIG, WEIGHTS), (WEIGHTS,)

OWN = "sparsify"  # in the metadata: the fields of cfg.json that say how it was trained
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}


def read(folder: Folder, allow_pickle: bool = False) -> Parts:
    cfg = read_json(folder, CONFIG)
    cfg.choice("activation", ["topk"], "topk")
    if cfg.flag("signed", False):
        raise FormatError(f"{CONFIG} says signed=true: that removed variant of TopK is not known")
    state = read_safetensors(folder, WEIGHTS)
    transcodes = cfg.flag("transcode", False)
    parts = Parts(
        tensors={NAMES.get(theirs, theirs): t.T if theirs == "encoder.weight" else t for theirs, t in state.items()},
        activation=TopK,
        arguments={"k": cfg.whole("k")},
        apply_b_dec_to_input=not transcodes,
        transcodes=transcodes,
        metadata={**cfg.section("metadata"), OWN: {name: cfg[name] for name in cfg if name != "metadata"}},
    )
    d_in = cfg.whole("d_in")
    d_sae = cfg.whole("num_latents") if cfg.get("num_latents") else d_in * cfg.whole("expansion_factor")
    parts.check_sizes(d_in, d_sae, d_in)
    if parts.skip != cfg.flag("skip_connection", False):
        raise FormatError(f"{CONFIG} says skip_connection={not parts.skip}, {WEIGHTS} says otherwise")
    return parts


def write(parts: Parts, path: Path) -> None:
    parts.refuse_beyond_plain("sparsify", transcodes=True)
    if parts.activation is not TopK:
        raise FormatError(f"sparsify has TopK only: a {parts.activation.__name__} cannot be written so")
    if parts.d_out != parts.d_in:
        raise FormatError(
            f"sparsify's transcoders keep the width: d_out={parts.d_out} with d_in={parts.d_in} cannot be written so"
        )
    metadata = dict(parts.metadata)
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, parts.d_sae // parts.d_in),
        "normalize_decoder": True,
        "multi_topk": False,
        **metadata.pop(OWN, {}),
        "num_latents": parts.d_sae,
        "k": parts.arguments["k"],
        "skip_connection": parts.skip,
        "transcode": not parts.apply_b_dec_to_input,
        "d_in": parts.d_in,
        "metadata": metadata,
    }
    theirs = {ours: name for name, ours in NAMES.items()}
    tensors = {theirs[ours]: (t.T if ours == "W_enc" else t) for ours, t in parts.tensors.items()}
    write_json(path / CONFIG, cfg)
    save_tensors(path / WEIGHTS, tensors)
