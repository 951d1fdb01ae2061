"""What an SAE consists of, apart from the module: what every format reads into and writes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..activations import AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from ..host_memory import fill
from ..kernels import check
from ..sae import SAE
from .safe import FormatError

# the constructor arguments of each activation that a file can hold
ARGUMENTS: dict[type[Activation], tuple[str, ...]] = {
    ReLU: (),
    TopK: ("k",),
    AbsTopK: ("k",),
    BatchTopK: ("k", "threshold_lr"),
    JumpReLU: ("bandwidth", "ste_to_input"),
    Gated: (),
}


@dataclass
class Parts:
    """An SAE taken apart. Tensors have the names of `SAE.state_dict`."""

    tensors: dict[str, Tensor]
    activation: type[Activation]
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize: str = "none"
    transcodes: bool = False
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where the SAE belongs (model_name, hook_name, ...): free, kept from file to file."""

    @property
    def d_in(self) -> int:
        return self.tensors["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        return self.tensors["W_enc"].shape[1]

    @property
    def d_out(self) -> int:
        return self.tensors["W_dec"].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["W_enc"].dtype

    @property
    def skip(self) -> bool:
        return "W_skip" in self.tensors

    def skeleton(self, dtype: torch.dtype | None = None) -> SAE:
        """The SAE without its numbers. Raises unless these tensors are exactly what it needs, in name and shape."""
        for name in ("W_enc", "W_dec"):
            if (t := self.tensors.get(name)) is None or t.dim() != 2 or not t.numel():
                raise FormatError(f"{name} is {'missing' if t is None else list(t.shape)}: expected a matrix")
        for name, t in self.tensors.items():
            if not t.is_floating_point():
                raise FormatError(f"{name} is {t.dtype}: expected floats")
        try:
            sae = SAE(
                self.d_in,
                self.d_sae,
                self.activation(**self.arguments),
                d_out=self.d_out if self.transcodes or self.d_out != self.d_in else None,
                skip=self.skip,
                apply_b_dec_to_input=self.apply_b_dec_to_input,
                rescale_acts_by_decoder_norm=self.rescale_acts_by_decoder_norm,
                normalize=self.normalize,
                device="meta",
                dtype=dtype or self.dtype,
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"the files describe an SAE that cannot be: {error}") from None
        expected = {name: t.shape for name, t in sae.state_dict().items()}
        for name, shape in expected.items():
            if name not in self.tensors or self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape) if name in self.tensors else "missing"
                raise FormatError(f"{name} is {found}: expected {list(shape)}")
        if surplus := self.tensors.keys() - expected.keys():
            raise FormatError(f"the files hold {', '.join(sorted(surplus))[:200]}, which this SAE has no place for")
        return sae

    def check_sizes(self, d_in: int, d_sae: int, d_out: int) -> None:
        """That a config speaks of these tensors."""
        self.skeleton()
        if (d_in, d_sae, d_out) != (self.d_in, self.d_sae, self.d_out):
            raise FormatError(
                f"the config says d_in={d_in}, d_sae={d_sae}, d_out={d_out}: "
                f"the weights have {self.d_in}, {self.d_sae}, {self.d_out}"
            )

    def refuse_beyond_plain(self, library: str, transcodes: bool = False) -> None:
        """What SAELens alone has: ranking by decoder norm, and normalisation; and unless said, transcoders."""
        if self.rescale_acts_by_decoder_norm:
            raise FormatError(f"{library} does not rank latents by decoder norm: only an SAE without it can be written so")
        if self.normalize != "none":
            raise FormatError(f"{library} does not normalize rows: {self.normalize} cannot be written so")
        if not transcodes and (self.transcodes or self.skip):
            raise FormatError(f"{library} has no transcoders: only an SAE without d_out and skip can be written so")

    def difference(self, other: "Parts") -> str | None:
        """The name of something in which the two are not equal; how they were trained is not compared."""
        for name in ("activation", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize"):
            if getattr(self, name) != getattr(other, name):
                return name
        if self.arguments.get("k") != other.arguments.get("k"):
            return "k"
        for name in self.tensors.keys() | other.tensors.keys():
            mine, its = self.tensors.get(name), other.tensors.get(name)
            if mine is None or its is None or not torch.equal(mine.to(self.dtype), its.to(self.dtype)):
                return name
        return None if self.dtype == other.dtype else "dtype"

    def to(self, dtype: torch.dtype) -> "Parts":
        """The weights in this dtype; BatchTopK's threshold is none of them."""
        tensors = {name: t if name == "activation.threshold" else t.to(dtype) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors)

    def scale_input(self, s: float) -> None:
        """From data multiplied by s, target included, to data as they are: W_enc · s, W_dec / s, b_dec / s."""
        if not (math.isfinite(s) and s > 0):
            raise FormatError(f"data scaled by {s}: expected a finite number > 0")
        t = self.tensors
        t["W_enc"], t["W_dec"], t["b_dec"] = t["W_enc"] * s, t["W_dec"] / s, t["b_dec"] / s
        if self.activation is BatchTopK and self.rescale_acts_by_decoder_norm:  # the threshold is in units of |W_dec|
            least = t["activation.threshold"]
            t["activation.threshold"] = torch.where(least > 0, least / s, least)

    def threshold(self) -> Tensor:
        """[F] The pre-activation above which each latent fires, of JumpReLU and of BatchTopK outside training."""
        if self.activation is not BatchTopK:
            return self.tensors["activation.theta"]
        least = self.tensors["activation.threshold"].to(self.dtype)
        if least < 0:
            raise FormatError("this BatchTopK has no threshold yet: calibrate it first, calibrate.calibrate_threshold")
        norms = self.tensors["W_dec"].norm(dim=1)
        scale = norms if self.rescale_acts_by_decoder_norm else torch.ones_like(norms)
        most = torch.finfo(self.dtype).max  # a latent without a decoder row never fires, but what is written is finite
        return (least / scale).nan_to_num(nan=most)


def take_apart(sae: SAE, metadata: Mapping[str, Any] | None = None, input_scale: float = 1.0) -> Parts:
    """The parts of `sae`; `input_scale`, with which its data were multiplied in training, is folded in."""
    activation = type(sae.activation)
    if activation not in ARGUMENTS:
        known = ", ".join(a.__name__ for a in ARGUMENTS)
        raise FormatError(f"no file format knows the activation {activation.__name__}: they know {known}")
    tensors = {name: t.detach() for name, t in sae.state_dict().items()}
    parts = Parts(
        tensors=tensors,
        activation=activation,
        arguments={name: getattr(sae.activation, name) for name in ARGUMENTS[activation]},
        apply_b_dec_to_input=sae.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=sae.rescale_acts_by_decoder_norm,
        normalize=sae.normalize,
        transcodes=sae.transcodes,
        metadata={**sae.metadata, **(metadata or {})},
    )
    if input_scale != 1:
        parts.scale_input(input_scale)
    return parts


def put_together(parts: Parts, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """The SAE of these parts, whose names, shapes and values are checked here for all formats."""
    sae = parts.skeleton(dtype)
    state: dict[str, Tensor] = {}
    for name, expected in sae.state_dict().items():
        # a copy, latent by latent as the SAE has it, and so that the file can be replaced while the SAE lives
        t = state[name] = fill(torch.empty_like(expected, device=device), parts.tensors[name])
        if not check.all_finite(t):
            raise FormatError(f"{name} has {int((~torch.isfinite(t)).sum())} non-finite values of {t.numel()}")
    if "activation.theta" in state:
        state["activation.theta"].clamp_(min=0)  # every host takes the relu too
    sae.load_state_dict(state, assign=True)
    sae.metadata = parts.metadata
    return sae
