"""SAELens modules with weights away from their initial values, and how to compare two of them."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

D, F, K = 12, 96, 6
TRANSCODES = {"d_out": 8, "apply_b_dec_to_input": False}

INFERENCE = {
    "standard": ("StandardSAE", {}),
    "topk": ("TopKSAE", {"k": K}),
    "topk rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("AbsTopKSAE", {"k": K}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "transcoder": ("Transcoder", TRANSCODES),
    "skip_transcoder": ("SkipTranscoder", TRANSCODES),
    "jumprelu_transcoder": ("JumpReLUTranscoder", TRANSCODES),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", TRANSCODES),
}
WIDTHS = {"k": K, "matryoshka_widths": [10, 40, F]}
JUMP = {"jumprelu_bandwidth": 0.4}
TRAINING = {
    "standard": ("StandardTrainingSAE", {}),
    "standard lp": ("StandardTrainingSAE", {"lp_norm": 0.5}),
    "gated": ("GatedTrainingSAE", {}),
    "topk": ("TopKTrainingSAE", {"k": K}),
    "topk raw": ("TopKTrainingSAE", {"k": K, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": 0.7}),
    "abstopk": ("AbsTopKTrainingSAE", {"k": K}),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": K}),
    "batchtopk fraction": ("BatchTopKTrainingSAE", {"k": 5.33}),
    "matryoshka": ("MatryoshkaBatchTopKTrainingSAE", WIDTHS),
    "matryoshka by level": ("MatryoshkaBatchTopKTrainingSAE", WIDTHS | {"use_matryoshka_aux_loss": True}),
    "jumprelu step": ("JumpReLUTrainingSAE", JUMP | {"pre_act_loss_coefficient": 0.2}),
    "jumprelu tanh": ("JumpReLUTrainingSAE", JUMP | {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}),
    "jumprelu quadratic": ("JumpReLUTrainingSAE", JUMP | {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 9.0}),
    "jumprelu not centred": ("JumpReLUTrainingSAE", JUMP | {"apply_b_dec_to_input": False}),
}


def build(name: str, dtype: torch.dtype = torch.float32, d_in: int = D, d_sae: int = F, noise: float = 0.3, **config):
    import sae_lens

    config = {"d_in": d_in, "d_sae": d_sae, "dtype": str(dtype).removeprefix("torch."), **config}
    sae = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**config))
    with torch.no_grad():
        for key, p in sae.named_parameters():
            p += (noise * torch.randn(p.shape, dtype=torch.float64)).to(p.dtype)
            if key == "threshold":
                p.abs_()
    return sae


def near(got: Tensor | None, expected: Tensor | None, tolerance: float, what: object = "") -> None:
    """Relative to the largest number. No gradient is a gradient of zero."""
    if got is None or expected is None:
        assert (got is None or not got.any()) and (expected is None or not expected.any()), what
        return
    assert got.shape == expected.shape and got.dtype == expected.dtype, (what, got.dtype, expected.dtype)
    if not got.equal(expected):
        error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{what}: {error:.2g} relative"


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 1e-5


class Largest(TorchDispatchMode):
    """The most elements of any tensor that any torch operation makes, inside our operators too."""

    def __init__(self):
        super().__init__()
        self.elements, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from fastsae.kernels import backend

        if func.namespace == "fastsae":
            with self:
                return backend.IMPLEMENTATIONS[func._opname](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((result, kwargs)):
            if isinstance(t, Tensor):
                sparse = t.layout != torch.strided
                held = t._nnz() if sparse else min(t.numel(), t.untyped_storage().nbytes() // t.element_size())
                if held > self.elements:
                    self.elements, self.by = held, str(func)
        return result
