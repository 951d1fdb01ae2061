"""SAE: parameters, and the path of x through them. No loss, and no question which activation it has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .activations import Activation, gather
from .kernels import check
from .kernels.deferred import deferred
from .normalize import NORMALIZE
from .sparse_code import SparseCode


class SAE(nn.Module):
    """A sparse autoencoder, or with `d_out` a transcoder, or with `skip` one that adds a linear map of its input."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        d_out: int | None = None,
        skip: bool = False,
        apply_b_dec_to_input: bool | None = None,
        decoder_norm: float = 0.1,
        rescale_acts_by_decoder_norm: bool = False,
        normalize: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_sae", d_sae), ("d_out", d_in if d_out is None else d_out)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r}: pass a whole number >= 1")
        if not isinstance(activation, Activation):
            what = f"the class {activation.__name__}" if isinstance(activation, type) else f"a {type(activation).__name__}"
            raise TypeError(f"activation is {what}: pass an instance of an Activation, for example TopK(k=32)")
        if dtype is not None and dtype not in check.DTYPES:
            raise TypeError(f"dtype is {dtype}: pass float32, bfloat16, float16 or float64")
        self.transcodes = d_out is not None  # even where d_out == d_in
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out if d_out is not None else d_in
        # b_dec is the mean of the output, which is the mean of the input only where they are the same thing
        self.apply_b_dec_to_input = not self.transcodes if apply_b_dec_to_input is None else apply_b_dec_to_input
        if self.apply_b_dec_to_input and self.d_out != d_in:
            raise ValueError(f"apply_b_dec_to_input needs d_out == d_in, got {self.d_out} and {d_in}: pass False")

        if normalize != "none" and (normalize not in NORMALIZE or self.transcodes or skip):
            raise ValueError(
                f"normalize={normalize!r} with d_out={d_out}, skip={skip}: pass one of {['none', *NORMALIZE]}; a transcoder's "
                "output is on another scale than its input, so it takes 'none'"
            )
        self.rescale_acts_by_decoder_norm, self.normalize = rescale_acts_by_decoder_norm, normalize

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, device=device, dtype=dtype)

        W_dec = nn.init.kaiming_uniform_(empty(d_sae, self.d_out))
        W_dec *= decoder_norm / W_dec.norm(dim=1, keepdim=True)
        encoder = W_dec.clone() if self.d_out == d_in else nn.init.kaiming_uniform_(empty(d_sae, d_in))
        self.W_enc = nn.Parameter(encoder.T)  # [d_in, d_sae], in memory latent by latent like W_dec
        self.W_dec = nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(empty(d_sae).zero_())
        self.b_dec = nn.Parameter(empty(self.d_out).zero_())
        self.W_skip = nn.Parameter(empty(self.d_out, d_in).zero_()) if skip else None
        self.metadata: dict[str, Any] = {}
        """Where the SAE belongs (model_name, hook_name, ...), as files keep it."""
        self.activation = activation
        activation.attach(d_sae, device, dtype)
        self.register_load_state_dict_post_hook(SAE._latent_major)

    def _latent_major(self, *_: object) -> None:
        """Loading with assign=True brings whatever layout the file had; gradients and kernels want one latent's row whole."""
        if self.W_enc.stride(0) != 1:
            self.W_enc = nn.Parameter(self.W_enc.detach().T.contiguous().T, self.W_enc.requires_grad)

    def encoder_input(self, x: Tensor) -> Tensor:
        """What the encoder sees of x [..., d_in]."""
        check.tensor("x", x)
        if x.shape[-1:] != (self.d_in,):
            raise ValueError(f"x has shape {list(x.shape)}: expected [..., d_in={self.d_in}]")
        if x.dtype != self.W_enc.dtype or x.device != self.W_enc.device:
            raise TypeError(
                f"x is {x.dtype} on {x.device} but this SAE is {self.W_enc.dtype} on {self.W_enc.device}: "
                "convert one of them with .to()"
            )
        row = NORMALIZE[self.normalize](x).encoded if self.normalize != "none" else x
        return row - self.b_dec if self.apply_b_dec_to_input else row

    def select_scale(self) -> Tensor | None:
        """[F] With `rescale_acts_by_decoder_norm`, latents rank by pre · |W_dec[f]|; values are unchanged by it."""
        return self.W_dec.detach().norm(dim=1) if self.rescale_acts_by_decoder_norm else None

    def _activate(self, code: SparseCode) -> SparseCode:
        return code.with_values(self.activation.activate(code.values, gather(code), self.b_enc))

    def encode_sparse(self, x: Tensor, latents: Tensor | None = None) -> SparseCode:
        """The code of x [..., d_in]; with `latents`, only the entries of these, under their own ids."""
        code = self._activate(self.activation.encode(self.encoder_input(x), self.W_enc, self.b_enc, self.select_scale()))
        return code if latents is None else code.restrict(latents)

    def encode_sparse_within(self, x: Tensor, limit: int | None, observe: bool = False) -> SparseCode | None:
        """The same, or None where it has more than `limit` entries and a dense path is exact (functional.reconstruct_dense).

        Without a limit there is always a code. With `observe` the activation learns from it what a trainer lets it learn
        (Activation.observe).
        """
        scale = self.select_scale()
        code = self.activation.encode_within(self.encoder_input(x), self.W_enc, self.b_enc, limit, scale)
        if code is None:
            return None
        code = self._activate(code)
        if observe:
            self.activation.observe(code, scale)
        return code

    def encode(self, x: Tensor) -> Tensor:
        """Activations as a dense [..., d_sae], what every host library's users expect."""
        return self.activation.dense(self.encoder_input(x), self.W_enc, self.b_enc, self.select_scale())

    def decode(self, code: SparseCode | Tensor, like: Tensor | None = None) -> Tensor:
        """Reconstruction [..., d_out] of a sparse code or of dense activations.

        Where the SAE normalizes, `like` is the input that was encoded: its rows' scales are put back.
        """
        if self.normalize != "none" and like is None:
            raise ValueError(f"this SAE has normalize={self.normalize!r}: decode(code, like=x), with the x that was encoded")
        return self._on_scale_of(like, self._decode(code))

    def _on_scale_of(self, x: Tensor | None, y: Tensor) -> Tensor:
        if self.normalize == "none" or x is None:
            return y
        n = NORMALIZE[self.normalize](x)
        return torch.addcmul(n.shift, n.scale, y)

    def _decode(self, code: SparseCode | Tensor) -> Tensor:
        if isinstance(code, SparseCode):
            return functional.decode(code, self.W_dec, self.b_dec)
        if not isinstance(code, Tensor):
            raise TypeError(f"code is a {type(code).__name__}: pass a SparseCode, or dense activations [..., d_sae]")
        if code.shape[-1:] != (self.d_sae,):
            raise ValueError(f"activations have shape {list(code.shape)}: expected [..., d_sae={self.d_sae}]")
        check.floating(activations=code, W_dec=self.W_dec)
        return code @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x [..., d_in] without ever building [..., d_sae]."""
        centred, scale = self.encoder_input(x), self.select_scale()
        if torch.compiler.is_compiling():  # a graph cannot branch on how many entries there are
            code = self.activation.encode(centred, self.W_enc, self.b_enc, scale)
        else:
            limit = int(x.numel() // self.d_in * self.d_sae * functional.SPARSE_BELOW)
            code = self.activation.encode_within(centred, self.W_enc, self.b_enc, limit, scale)
        if code is None:
            y, _ = functional.reconstruct_dense(
                centred, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.activation.activate
            )
        else:
            y = self._decode(self._activate(code))
        y = self._on_scale_of(x, y)
        return y if self.W_skip is None else y + x @ self.W_skip.T

    def save(
        self,
        path: str | Path,
        format: str = "saelens",
        metadata: Mapping[str, Any] | None = None,
        input_scale: float = 1.0,
    ) -> None:
        """Write the SAE into the folder `path`, as SAELens reads it unless another `format` is named (formats.save)."""
        from . import formats

        formats.save(self, path, format, metadata, input_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, deferred ones too."""
        super().zero_grad(set_to_none)
        for W in (self.W_enc, self.W_dec):
            if (waiting := deferred(W)) is not None:
                waiting.clear()

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, d_out={self.d_out}, skip={self.W_skip is not None}"
