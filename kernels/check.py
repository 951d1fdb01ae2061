"""What an op accepts. Every error says what came, what is allowed and what to do; nothing wrong reaches a kernel.

Shapes, dtypes, devices and k are checked always. Values are checked on eager CPU tensors only: on a GPU reading one is a
host sync.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}: pass a torch.Tensor")


def floating(**tensors: Tensor | None) -> None:
    """Every tensor is a float tensor, and all share one dtype and one device."""
    first_name, first = "", None
    for name, t in tensors.items():
        if t is None:
            continue
        tensor(name, t)
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} is {t.dtype}: pass float32, bfloat16, float16 or float64, e.g. {name}.float()")
        if first is None:
            first_name, first = name, t
        elif t.dtype != first.dtype:
            raise TypeError(f"{name} is {t.dtype} but {first_name} is {first.dtype}: convert one with .to()")
        elif t.device != first.device:
            raise ValueError(f"{name} is on {t.device} but {first_name} is on {first.device}: move one with .to()")


def shape(name: str, t: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`t` has the expected shape; None stands for any size. `meaning` spells it in letters, e.g. "[D, F]"."""
    if t.dim() != len(expected) or any(e is not None and int(e) != s for e, s in zip(expected, t.shape, strict=True)):
        wanted = "[" + ", ".join("any" if e is None else str(int(e)) for e in expected) + "]"
        raise ValueError(f"{name} has shape {list(t.shape)}: expected {meaning} = {wanted}")


def encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, **per_latent: Tensor | None) -> None:
    """x [N, D], W_enc [D, F], b_enc [F] and further [F] tensors fit together."""
    floating(x=x, W_enc=W_enc, b_enc=b_enc, **per_latent)
    shape("W_enc", W_enc, (None, None), "[D, F]")
    D, F = W_enc.shape
    shape("x", x, (None, D), "[N, D]")
    for name, t in {"b_enc": b_enc, **per_latent}.items():
        if t is not None:
            shape(name, t, (F,), "[F]")
    finite("x", x)


def finite(name: str, t: Tensor) -> None:
    """No NaN or infinity, where looking costs no host sync."""
    if _values_can_be_read(t) and not all_finite(t):
        bad = int((~torch.isfinite(t)).sum())
        raise ValueError(f"{name} has {bad} non-finite values of {t.numel()}: drop or repair those rows before encoding")


def all_finite(t: Tensor) -> bool:
    """Whether t has no NaN and no infinity. Reads it."""
    # a sum is one pass and shows every NaN and infinity; it may overflow without one, so look closer then
    return bool(t.sum().isfinite() or t.isfinite().all())


def non_negative(name: str, t: Tensor) -> None:
    if _values_can_be_read(t) and not (t >= 0).all():
        low = float(t.detach().min())
        raise ValueError(f"{name} has a minimum of {low:g}: it must be >= 0; clamp it with {name}.clamp_(min=0)")


def k_fits(k: int, F: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k={k!r} is a {type(k).__name__}: pass a whole number")
    if k < 1:
        raise ValueError(f"k={k} keeps nothing: pass 1 <= k <= d_sae={F}")
    if k > F:
        raise ValueError(f"k={k} exceeds d_sae={F}: pass k <= d_sae")


def entries(values: Tensor, latents: Tensor, offsets: Tensor) -> None:
    """values [E], latents [E] and offsets describe one list of entries."""
    for name, t in (("latents", latents), ("offsets", offsets)):
        tensor(name, t)
        if t.dtype != torch.int32:
            raise TypeError(f"{name} is {t.dtype}: pass int32, {name}.int()")
        if t.device != values.device:
            raise ValueError(f"{name} is on {t.device} but values is on {values.device}: move one with .to()")
    shape("values", values, (None,), "[E]")
    shape("latents", latents, (values.shape[0],), "[E]")
    shape("offsets", offsets, (None,), "[N+1]")
    if offsets.shape[0] < 1:
        raise ValueError("offsets is empty: for N rows pass N + 1 offsets, [0] for none")
    if _values_can_be_read(offsets) and (
        int(offsets[0]) != 0 or int(offsets[-1]) != values.shape[0] or bool((offsets.diff() < 0).any())
    ):
        raise ValueError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}: they must rise from 0 to the {values.shape[0]} entries"
        )


def latents_in_range(latents: Tensor, F: int) -> None:
    if _values_can_be_read(latents) and latents.numel():
        low, high = (int(v) for v in latents.aminmax())
        if low < 0 or high >= F:
            raise ValueError(f"latents run from {low} to {high}: they must lie in 0 .. d_sae - 1 = {F - 1}")


def _values_can_be_read(t: Tensor) -> bool:
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
