"""Whatever the sizes, strides and values: every op against its reference, on both paths.

Sizes are tiny, because the interpreter takes about a millisecond per program and step; their extremes are what matters: no
rows, one row, k = 1, k = all, empty and ragged rows, widths around a tile, stride 0, denormals, latents that many rows share.
FASTSAE_EXAMPLES sets how many examples each property gets (conftest.py).
"""

from dataclasses import dataclass

import pytest
import torch
from helpers import assert_no_worse, check_op
from torch import Tensor

from fastsae import kernels
from fastsae.kernels import by_latent

pytest.importorskip("hypothesis")
from hypothesis import example, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ROWS = st.one_of(st.sampled_from([0, 1]), st.integers(2, 6))
WIDTHS = st.one_of(st.sampled_from([1, 2, 16, 17]), st.integers(1, 20))
LAYOUTS = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "every other": lambda t: t.repeat_interleave(2, 0)[::2],
    "one row": lambda t: t[:1].expand_as(t),
    "one column": lambda t: t[:, :1].expand_as(t),
}


def strided(t: Tensor, layout: str) -> Tensor:
    """Differentiable; also for a vector, which has no other layouts than dense, spaced and expanded."""
    if not t.numel():
        return t
    return LAYOUTS[layout](t) if t.dim() == 2 else LAYOUTS[layout](t[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------ selections


@dataclass
class Selection:
    N: int
    D: int
    F: int
    k: int
    seed: int
    layout: str
    row_major: bool
    rank: str
    fused: bool
    tiny: bool
    limit: int | None

    def data(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, W, b, scale (or theta): small whole numbers, or as small multiples of the smallest denormal. Sums are exact."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*size: int, low: int = -2) -> Tensor:
            return torch.randint(low, 3, size, generator=generator).to(device, dtype)

        unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if self.tiny else 1.0  # the smallest denormal
        x, W, b, scale = draw(self.N, self.D), draw(self.F, self.D) * unit, draw(self.F) * unit, draw(self.F, low=1)
        W = W.T.contiguous() if self.row_major else W.T
        b, scale = (strided(t, self.layout) for t in (b, scale))
        return strided(x, self.layout), W, b, scale

    def by(self, scale: Tensor) -> tuple[Tensor | None, bool]:
        return (scale if self.rank == "scaled" else None), self.rank == "magnitude"


@st.composite
def selections(draw) -> Selection:
    F = draw(st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 127, 128, 129, 130, 200])))
    # the interpreter takes k steps a row: all of many latents is for the torch path's own tests
    k = draw(st.one_of(st.just(1), st.just(F), st.integers(1, F)) if F <= 12 else st.integers(1, 8))
    limit = draw(st.none() | st.integers(0, 40))
    return Selection(
        draw(ROWS), draw(WIDTHS), F, k, draw(st.integers(0, 999)), draw(st.sampled_from(sorted(LAYOUTS))), draw(st.booleans()),
        draw(st.sampled_from(["pre", "scaled", "magnitude"])), draw(st.booleans()), draw(st.booleans()), limit,
    )  # fmt: skip


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@given(case=selections())
@example(case=Selection(3, 1, 130, 5, 0, "one row", False, "pre", True, False, None))  # all rows alike, ties everywhere
def test_select_topk(case, device, dtypes):
    x, W, b, scale = case.data(device, dtypes[case.seed % len(dtypes)])
    by = case.by(scale)
    same(kernels.select_topk(x, W, b, case.k, *by, fused=case.fused), kernels.select_topk_reference(x, W, b, case.k, *by))


@pytest.mark.parametrize("fused", [False, True])
def test_a_tile_that_is_opened_late_still_wins_its_ties(fused, device):
    """The second tile holds the best score and is searched first; the first tile's ties with its next best have lower ids."""
    scores = torch.zeros(256, device=device)
    scores[130], scores[131:135], scores[5:7] = 3.0, 1.0, 1.0
    x, b = torch.ones(1, 1, device=device), torch.zeros(256, device=device)
    for k, expected in ((2, [5, 130]), (3, [5, 6, 130]), (4, [5, 6, 130, 131])):
        assert kernels.select_topk(x, scores[None], b, k, fused=fused)[1].tolist() == expected


@given(case=selections())
@example(case=Selection(6, 1, 9, 2, 0, "one column", False, "magnitude", False, False, None))
def test_select_batch_topk(case, device, dtypes):
    x, W, b, scale = case.data(device, dtypes[case.seed % len(dtypes)])
    by = case.by(scale)
    got = kernels.select_batch_topk(x, W, b, case.k, *by, fused=case.fused)
    same(got, kernels.select_batch_topk_reference(x, W, b, case.k, *by))
    assert got[0].numel() == case.N * case.k


@given(case=selections())
@example(case=Selection(6, 2, 12, 1, 0, "as it is", False, "pre", False, False, 0))
def test_select_threshold(case, device, dtypes):
    x, W, b, theta = case.data(device, dtypes[case.seed % len(dtypes)])
    theta = theta * W.abs().amax() - theta  # many pre-activations stand exactly at it
    expected = kernels.select_threshold_reference(x, W, b, theta)
    got = kernels.select_threshold(x, W, b, theta, case.limit)
    if case.limit is not None and expected[0].numel() > case.limit:
        assert got is None
    else:
        same(got, expected)


@given(case=selections(), jump=st.booleans())
def test_dense_encode(case, jump, device, dtypes):
    """Whole numbers again: a rounding must not decide which side of a kink an entry is on."""
    x, W, b, theta = case.data(device, dtypes[case.seed % len(dtypes)])
    theta = theta if jump else None
    check_op(
        lambda x, W, b: kernels.dense_encode(strided(x, case.layout), W, strided(b, case.layout), theta),
        lambda x, W, b: kernels.dense_encode_reference(
            strided(x, case.layout), W, strided(b, case.layout), None if theta is None else theta.to(x.dtype)
        ),
        (x, W, b),
        [torch.randint(-2, 3, (case.N, case.F), device=device)],
    )


# --------------------------------------------------------------------------------------------------------------- entries


@dataclass
class Entries:
    N: int
    D: int
    F: int
    levels: int
    density: float
    seed: int
    layout: str
    row_major: bool
    denormal: bool
    split: int

    def code(self, device: str) -> tuple[Tensor, Tensor]:
        """(latents, offsets) of N · levels ragged bags."""
        generator = torch.Generator().manual_seed(self.seed)
        bags = self.N * self.levels
        appetite = torch.rand(bags, 1, generator=generator).round(decimals=1)  # some rows are empty
        fires = torch.rand(bags, self.F, generator=generator) < (appetite * 2 * self.density)
        offsets = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0)).int()
        return fires.nonzero()[:, 1].int().to(device), offsets.to(device)

    def randn(self, *size: int, device: str, dtype: torch.dtype) -> Tensor:
        """Normal numbers, a third of them denormal if so asked; the first never is."""
        t = torch.randn(size)
        if self.denormal and t.numel():
            small = torch.rand(size) < 1 / 3
            small.view(-1)[0] = False
            t = torch.where(small, t.sign() * torch.finfo(dtype).smallest_normal / 8, t)
        return t.to(device, dtype)

    def weights(self, W: Tensor) -> Tensor:
        return W.T.contiguous().T if self.row_major else W


ENTRIES = st.builds(
    Entries,
    N=ROWS, D=WIDTHS, F=st.one_of(st.just(1), st.integers(2, 9)), levels=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.2, 0.5, 1.0]), seed=st.integers(0, 999), layout=st.sampled_from(sorted(LAYOUTS)),
    row_major=st.booleans(), denormal=st.booleans(), split=st.sampled_from([2, 3, 1024]),
)  # fmt: skip


@pytest.fixture
def split(monkeypatch):
    """Sets after how many entries a latent's segment is split."""
    return lambda case: monkeypatch.setattr(by_latent, "SPLIT", case.split)


@given(case=ENTRIES)
@example(case=Entries(6, 17, 1, 1, 1.0, 0, "one row", True, False, 2))  # one latent that every row shares, cut into three
def test_decode(case, device, dtypes, split):
    split(case)
    case.levels = 1
    torch.manual_seed(case.seed)
    latents, offsets = case.code(device)
    make = lambda *size: case.randn(*size, device=device, dtype=dtypes[case.seed % len(dtypes)])  # noqa: E731
    seed = strided(torch.randn(case.N, case.D, device=device), case.layout)

    def run(decode):
        return lambda v, W, *b: decode(
            strided(v, case.layout), latents, offsets, case.weights(W), *(strided(t, case.layout) for t in b)
        )

    bias = [make(case.D)] if case.seed % 3 else []
    check_op(run(kernels.decode), run(kernels.decode_reference), (make(len(latents)), make(case.F, case.D), *bias), [seed])


@given(case=ENTRIES)
@example(case=Entries(5, 1, 1, 3, 1.0, 0, "one column", False, True, 2))
def test_decode_loss(case, device, dtypes, split):
    split(case)
    torch.manual_seed(case.seed)
    latents, bounds = case.code(device)
    make = lambda *size: case.randn(*size, device=device, dtype=dtypes[case.seed % len(dtypes)])  # noqa: E731
    P = case.levels if case.N else 1
    seeds = [torch.randn(case.N, P, case.D), torch.rand(case.N, P), torch.rand(case.N)]
    weight = [make(case.F).abs()] if case.seed % 3 else []

    def run(loss):
        # the target comes with the sign that makes all terms of the error add up where all inputs are positive
        return lambda v, W, b, t, *w: loss(
            strided(v, case.layout), latents, bounds, case.weights(W), strided(b, case.layout), strided(-t, case.layout),
            *(strided(t, case.layout) for t in w),
        )  # fmt: skip

    inputs = (make(len(latents)), make(case.F, case.D), make(case.D), make(case.N, case.D), *weight)
    check_op(run(kernels.decode_loss), run(kernels.decode_loss_reference), inputs, [s.to(device) for s in seeds], squares=[1])


@given(case=ENTRIES)
@example(case=Entries(6, 3, 1, 1, 1.0, 0, "one row", False, False, 2))
def test_encode(case, device, dtypes, split):
    split(case)
    case.levels = 1
    torch.manual_seed(case.seed)
    latents, offsets = case.code(device)
    make = lambda *size: case.randn(*size, device=device, dtype=dtypes[case.seed % len(dtypes)])  # noqa: E731
    x, W, b = make(case.N, case.D), make(case.F, case.D), make(case.F)

    def reference(x, W, b):
        return kernels.encode_reference(strided(x, case.layout), case.weights(W).T, strided(b, case.layout), latents, offsets)

    pre = reference(x, W, b)
    check_op(
        lambda x, W, b: kernels.encode(
            strided(x, case.layout), case.weights(W).T, strided(b, case.layout), pre, latents, offsets
        ),
        reference,
        (x, W, b),
        [strided(torch.randn(len(latents), device=device), case.layout)],
    )


@given(case=ENTRIES, half=st.sampled_from(["decoder", "encoder", "both"]), options=st.integers(0, 7), D_in=WIDTHS)
@example(case=Entries(6, 16, 1, 2, 1.0, 0, "one column", True, False, 2), half="both", options=7, D_in=17)
def test_latent_backward(case, half, options, D_in, device, dtypes, split):
    split(case)
    torch.manual_seed(case.seed)
    latents, offsets = case.code(device)
    E, bags = len(latents), case.N * case.levels
    make = lambda *size: case.randn(*size, device=device, dtype=dtypes[case.seed % len(dtypes)])  # noqa: E731
    given_ = {}
    if half != "encoder":
        given_ |= {
            "g": strided(make(bags, case.D), case.layout),
            "values": make(E),
            "W_dec": case.weights(make(case.F, case.D)),
        }
        given_ |= {"scale": make(bags)} if options & 1 else {}
    if half != "decoder":
        given_ |= {"x": strided(make(case.N, D_in), case.layout)}
        given_ |= {"direct": make(E)} if options & 2 or half == "encoder" else {}
        given_ |= {"jac": make(E)} if options & 4 else {}
    order, starts = kernels.sort_by_latent(latents, case.F)

    def reference(change):
        return kernels.latent_backward_reference(
            latents, offsets, case.F, case.levels, **{name: change(t) for name, t in given_.items()}
        )

    got = kernels.latent_backward(order, starts, latents, offsets, case.levels, **given_)
    truth, size = reference(Tensor.double), reference(lambda t: t.double().abs())
    for four in zip(got, reference(lambda t: t), truth, size, strict=True):
        if four[1] is None:
            assert four[0] is None
        else:
            assert_no_worse(*four)
    again = kernels.latent_backward(order, starts, latents, offsets, case.levels, **given_)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, again, strict=True))
