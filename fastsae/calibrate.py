"""One threshold for all rows, instead of k for each batch: found exactly, and turned into a JumpReLU.

An entry's score is pre · select_scale, and it fires where its score is above t. The exact t lets k · N entries of N rows fire.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .activations import BatchTopK, JumpReLU, TopK
from .kernels.scores import pieces
from .sae import SAE

BITS = 15  # of a positive float's 31: a first pass counts the upper 16, a second one the rest


@torch.no_grad()
def find_threshold(sae: SAE, data: Tensor | Sequence[Tensor], k: float) -> float:
    """The t at which k entries a row fire on average over all rows of `data`: the score of entry number k · N + 1.

    Exact to the last bit of the fp32 score, by two passes over the data that count scores by their bits. Ties at t stay off.
    """
    batches = [data] if isinstance(data, Tensor) else data
    rows = sum(x.numel() // sae.d_in for x in batches)
    if not rows:
        raise ValueError("data has no rows: pass activations [N, d_in] or a list of such batches")
    wanted = round(k * rows)  # as many fire: t is the score of the next one
    upper = _first_reaching(_counts(sae, batches, lambda key: key >> BITS, 1 << (31 - BITS)), wanted)
    if upper is None:  # fewer positive scores than that: all of them fire
        return 0.0
    high, above = upper
    lower = _first_reaching(
        _counts(sae, batches, lambda key: (key & ((1 << BITS) - 1))[key >> BITS == high], 1 << BITS), wanted - above
    )
    low = 0 if lower is None else lower[0]
    return float(torch.tensor(high << BITS | low, dtype=torch.int32).view(torch.float32))


def calibrate_threshold(sae: SAE, data: Tensor | Sequence[Tensor], k: float | None = None) -> float:
    """Set a BatchTopK SAE's threshold so that on `data` L0 is k on average (its own k unless given); returns it."""
    if not isinstance(sae.activation, BatchTopK):
        name = type(sae.activation).__name__
        raise TypeError(f"the activation is {name}: only BatchTopK keeps a threshold; to_jumprelu converts TopK")
    threshold = find_threshold(sae, data, sae.activation.k if k is None else k)
    sae.activation.set_threshold(threshold)
    return threshold


@torch.no_grad()
def to_jumprelu(sae: SAE, data: Tensor | Sequence[Tensor] | None = None, bandwidth: float = 0.05) -> SAE:
    """A JumpReLU SAE with the same weights, firing over a threshold: a BatchTopK's own, or the one that `data` gives.

    With norm-weighted ranking the threshold of latent f is t / |W_dec[f]|.
    """
    if not isinstance(sae.activation, TopK) or type(sae.activation) not in (TopK, BatchTopK):
        raise TypeError(f"the activation is {type(sae.activation).__name__}: pass an SAE with TopK or BatchTopK")
    if data is not None:
        t = find_threshold(sae, data, sae.activation.k)
    elif isinstance(sae.activation, BatchTopK) and sae.activation.knows_threshold:
        t = float(sae.activation.threshold)
    else:
        raise ValueError("no threshold is known: pass data, activations on which L0 is to be k on average")
    made = SAE(
        sae.d_in, sae.d_sae, JumpReLU(bandwidth=bandwidth), d_out=sae.d_out if sae.transcodes else None,
        skip=sae.W_skip is not None, apply_b_dec_to_input=sae.apply_b_dec_to_input, normalize=sae.normalize,
        device=sae.W_dec.device, dtype=sae.W_dec.dtype,
    )  # fmt: skip
    made.load_state_dict({**dict(sae.named_parameters()), "activation.theta": made.get_parameter("activation.theta")})
    scale = sae.select_scale()
    made.get_parameter("activation.theta").copy_(torch.full_like(sae.b_enc, t) if scale is None else t / scale)
    return made.train(sae.training)


def _counts(sae: SAE, batches: Iterable[Tensor], bins: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """How many positive scores fall in each bin of their bits. [size]"""
    counts = torch.zeros(size, dtype=torch.int64, device=sae.W_enc.device)
    scale = sae.select_scale()
    for x in batches:
        rows = sae.encoder_input(x).reshape(-1, sae.d_in)
        for _, columns, pre in pieces(rows, sae.W_enc, sae.b_enc):
            score = (pre if scale is None else pre * scale[columns]).float()
            keys = score[score > 0].view(torch.int32)  # ordered as the floats are
            counts += torch.bincount(bins(keys), minlength=size)
    return counts


def _first_reaching(counts: Tensor, wanted: int) -> tuple[int, int] | None:
    """From the top: the bin in which entry number wanted + 1 lies, and how many lie above that bin."""
    total = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(total, wanted, right=True))
    if place == len(counts):
        return None
    return len(counts) - 1 - place, int(total[place - 1]) if place else 0
