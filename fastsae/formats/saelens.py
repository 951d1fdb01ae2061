"""SAELens folders, the native layout: cfg.json and sae_weights.safetensors, and fastsae.json for what these cannot say.

Reads what SAELens writes for inference and for training, of version 6 and before. Writes inference SAEs. There a BatchTopK is
a jumprelu with one threshold per latent; k and the common threshold stay in fastsae.json, so that what was saved comes back.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from ..kernels.check import DTYPES
from ..normalize import NORMALIZE
from ..state_files import save_tensors
from ..strict_json import write_json
from .parts import Parts
from .safe import Config, Folder, FormatError, read_json, read_safetensors

CONFIG, WEIGHTS, BESIDE, SCALER = "cfg.json", "sae_weights.safetensors", "fastsae.json", "activation_scaler.json"
FILES, RECOGNISED_BY = (CONFIG, WEIGHTS, BESIDE, SCALER), (WEIGHTS,)

# The SAELens whose cfg.json this is. It must be said, and be 6.0.0 at least: SAELens drops the metadata of older files.
VERSION = "6.54.12"

# No step of the SAE but a scale of its training data: folded where the factor is known.
AVERAGE = "expected_average_only_in"

READS: dict[str, type[Activation]] = {
    "standard": ReLU,
    "gated": Gated,
    "topk": TopK,
    "abstopk": AbsTopK,
    "jumprelu": JumpReLU,
    "batchtopk": BatchTopK,  # this and the next are training checkpoints
    "matryoshka_batchtopk": BatchTopK,
    "transcoder": ReLU,
    "skip_transcoder": ReLU,
    "jumprelu_transcoder": JumpReLU,
    "jumprelu_skip_transcoder": JumpReLU,
}
# (activation, transcodes, skip) -> architecture
WRITES: dict[tuple[type[Activation], bool, bool], str] = {
    (ReLU, False, False): "standard",
    (Gated, False, False): "gated",
    (TopK, False, False): "topk",
    (AbsTopK, False, False): "abstopk",
    (JumpReLU, False, False): "jumprelu",
    (BatchTopK, False, False): "jumprelu",
    (ReLU, True, False): "transcoder",
    (ReLU, True, True): "skip_transcoder",
    (JumpReLU, True, False): "jumprelu_transcoder",
    (BatchTopK, True, False): "jumprelu_transcoder",
    (JumpReLU, True, True): "jumprelu_skip_transcoder",
    (BatchTopK, True, True): "jumprelu_skip_transcoder",
}
# theirs -> ours, where the names differ
RENAME: dict[type[Activation], dict[str, str]] = {
    JumpReLU: {"threshold": "activation.theta"},
    BatchTopK: {"topk_threshold": "activation.threshold"},
    Gated: {"b_gate": "b_enc", "r_mag": "activation.r_mag", "b_mag": "activation.b_mag"},
}


def read(folder: Folder, allow_pickle: bool = False) -> Parts:
    cfg = read_json(folder, CONFIG)
    parts = from_state(cfg, read_safetensors(folder, WEIGHTS))
    scaler = read_json(folder, SCALER) if folder.has(SCALER) else Config({}, SCALER)
    fold_average(parts, cfg, None if scaler.get("scaling_factor") is None else scaler.number("scaling_factor"))
    return _recall(parts, read_json(folder, BESIDE)) if folder.has(BESIDE) else parts


def fold_average(parts: Parts, cfg: Config, factor: float | None) -> None:
    """Fold the factor by which the training data were scaled, where it lies outside the SAE."""
    if factor is not None:
        parts.scale_input(factor)
    elif cfg.get("normalize_activations") == AVERAGE:
        warnings.warn("this SAE saw data scaled by a factor that its files do not say: taken as 1", stacklevel=2)


def from_state(cfg: Config, state: dict[str, Tensor]) -> Parts:
    """The parts of an SAE from a SAELens config and state dict."""
    cfg = _modern(cfg)
    architecture = cfg.choice("architecture", list(READS))
    activation = READS[architecture]
    normalize = cfg.choice("normalize_activations", ["none", AVERAGE, *NORMALIZE], "none")
    dtypes = {str(t).removeprefix("torch."): t for t in DTYPES}
    parts = Parts(
        tensors=_ours(activation, state),
        activation=activation,
        arguments=_arguments(activation, cfg),
        apply_b_dec_to_input=cfg.flag("apply_b_dec_to_input", True),
        rescale_acts_by_decoder_norm=issubclass(activation, TopK) and cfg.flag("rescale_acts_by_decoder_norm", False),
        normalize=normalize if normalize in NORMALIZE else "none",
        transcodes="transcoder" in architecture,
        metadata={name: value for name, value in cfg.section("metadata").items() if name != "sae_lens_version"},
    )
    if cfg.get("reshape_activations", "none") != "none":
        parts.metadata["reshape_activations"] = cfg["reshape_activations"]
    parts.check_sizes(cfg.whole("d_in"), cfg.whole("d_sae"), cfg.whole("d_out" if "transcoder" in architecture else "d_in"))
    return parts.to(dtypes[cfg.choice("dtype", [*dtypes, *map(str, DTYPES)], "float32").removeprefix("torch.")])


def _ours(activation: type[Activation], state: dict[str, Tensor]) -> dict[str, Tensor]:
    rename = RENAME.get(activation, {})
    tensors = {rename.get(name, name): t for name, t in state.items()}
    if (scaling := tensors.pop("scaling_factor", None)) is not None and not (scaling == 1).all():
        raise FormatError("this SAE has a finetuning scaling_factor, which SAELens 6 does not apply either")
    if (least := tensors.get("activation.threshold")) is not None:
        tensors["activation.threshold"] = torch.where(least > 0, least.double(), -1.0)  # 0: no step was taken yet
    return tensors


def _arguments(activation: type[Activation], cfg: Config) -> dict[str, Any]:
    if issubclass(activation, BatchTopK):
        return {"k": cfg.whole("k"), "threshold_lr": cfg.number("topk_threshold_lr", 0.01)}
    if issubclass(activation, TopK):
        return {"k": cfg.whole("k")}
    if activation is JumpReLU:
        window, ste = cfg.number("jumprelu_bandwidth", 0.05), cfg.flag("jumprelu_ste_to_input", False)
        return {"bandwidth": window, "ste_to_input": ste}
    return {}


def _modern(cfg: Config) -> Config:
    """The config as version 6 would have written it."""
    version = cfg.section("metadata").get("sae_lens_version") or cfg.get("sae_lens_version")
    major = str(version).split(".")[0]
    if major.isdecimal() and int(major) >= 6:
        return cfg
    new = {"architecture": "standard", **cfg}
    if cfg.get("activation_fn", cfg.get("activation_fn_str")) == "topk":
        new["architecture"], new["k"] = "topk", cfg.section("activation_fn_kwargs").get("k")
    if not isinstance(cfg.get("normalize_activations"), str):  # once a yes or no
        new["normalize_activations"] = AVERAGE if cfg.get("normalize_activations") else "none"
    metadata = {name: cfg[name] for name in OLD_METADATA if name in cfg}
    if "hook_point" in cfg:
        metadata["hook_name"] = cfg["hook_point"]
    if "hook_z" in str(metadata.get("hook_name")):
        new.setdefault("reshape_activations", "hook_z")
    return Config({**new, "metadata": metadata}, cfg.source)


OLD_METADATA = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "prepend_bos",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "exclude_special_tokens",
    "neuronpedia_id",
    "sae_lens_training_version",
)


def _recall(parts: Parts, beside: Config) -> Parts:
    """What cfg.json could not say: which BatchTopK this jumprelu was, or the window with which it trains."""
    if parts.activation is not JumpReLU:
        raise FormatError(f"{BESIDE} belongs to a jumprelu but {CONFIG} is another SAE: remove it")
    if beside.choice("activation", ["BatchTopK", "JumpReLU"]) == "JumpReLU":
        window, ste = beside.number("bandwidth"), beside.flag("ste_to_input", False)
        return replace(parts, arguments={"bandwidth": window, "ste_to_input": ste})
    theta = parts.tensors.pop("activation.theta")
    parts = replace(
        parts,
        tensors={**parts.tensors, "activation.threshold": torch.tensor(beside.number("threshold"), dtype=torch.float64)},
        activation=BatchTopK,
        arguments={"k": beside.whole("k"), "threshold_lr": beside.number("threshold_lr")},
        rescale_acts_by_decoder_norm=beside.flag("rescale_acts_by_decoder_norm", False),
    )
    if not torch.allclose(theta, parts.threshold(), rtol=8 * torch.finfo(theta.dtype).eps):
        raise FormatError(f"{BESIDE} and {WEIGHTS} differ in their thresholds: remove {BESIDE} to read a JumpReLU")
    return parts


def write(parts: Parts, path: Path) -> None:
    architecture = _architecture(parts)
    metadata = {"sae_lens_version": VERSION, "sae_lens_training_version": None, **parts.metadata}
    cfg = {
        "d_in": parts.d_in,
        "d_sae": parts.d_sae,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": parts.apply_b_dec_to_input,
        "normalize_activations": parts.normalize,
        "reshape_activations": metadata.pop("reshape_activations", "none"),
        "metadata": metadata,
        "architecture": architecture,
    }
    if "transcoder" in architecture:
        cfg["d_out"] = parts.d_out
    if "topk" in architecture:
        cfg |= {"k": parts.arguments["k"], "rescale_acts_by_decoder_norm": parts.rescale_acts_by_decoder_norm}
    theirs = {ours: name for name, ours in RENAME.get(parts.activation, {}).items()}
    tensors = {theirs.get(name, name): t for name, t in parts.tensors.items()}
    beside = {"activation": parts.activation.__name__, **parts.arguments}
    if parts.activation is BatchTopK:
        beside["threshold"] = float(tensors.pop("topk_threshold"))
        beside["rescale_acts_by_decoder_norm"] = parts.rescale_acts_by_decoder_norm
        tensors["threshold"] = parts.threshold()
    write_json(path / CONFIG, cfg)
    save_tensors(path / WEIGHTS, tensors)
    if parts.activation in (BatchTopK, JumpReLU):
        write_json(path / BESIDE, beside)


def _architecture(parts: Parts) -> str:
    transcodes = parts.transcodes or parts.skip
    name = f"{parts.activation.__name__}{' transcoder' * transcodes}{' with skip' * parts.skip}"
    architecture = WRITES.get((parts.activation, transcodes, parts.skip))
    if architecture is None:
        known = ", ".join(dict.fromkeys(WRITES.values()))
        raise FormatError(f"SAELens has no inference architecture for a {name}: it has {known}")
    if transcodes and parts.apply_b_dec_to_input:
        raise FormatError(f"SAELens' {architecture} does not subtract b_dec from its input: pass apply_b_dec_to_input=False")
    if parts.rescale_acts_by_decoder_norm and not issubclass(parts.activation, TopK):
        raise FormatError(f"SAELens' {architecture} does not rank latents: it knows no rescale_acts_by_decoder_norm")
    return architecture
