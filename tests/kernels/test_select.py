"""Selections: exact against whole sorts on small-integer data, where every sum is exact and ties abound."""

import pytest
import torch

from fastsae import kernels
from fastsae.kernels import batch_topk, score_tiles, scores, threshold, topk

SHAPES = [  # N, D, F
    (1, 1, 1),
    (5, 3, 64),
    (4, 8, 129),  # one over a tile
    (3, 5, 1031),  # a prime
    (2, 4, 4100),  # a second chunk with less in it than k
    (6, 2, 700),
]


def integers(N, D, F, device, dtype=torch.float32, seed=0):
    """Inputs whose products are exact in every dtype, so that equal scores are exactly equal."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randint(-2, 3, size, generator=generator).to(device, dtype)  # noqa: E731
    scale = torch.randint(1, 3, (F,), generator=generator).to(device, dtype)
    return draw(N, D), draw(F, D).T, draw(F), scale


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b)


RANKS = ["pre", "scaled", "magnitude"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("N", "D", "F"), SHAPES)
def test_topk_is_exact(N, D, F, rank, fused, device):
    x, W, b, scale = integers(N, D, F, device)
    by = (scale if rank == "scaled" else None, rank == "magnitude")
    for k in {1, min(7, F), F if F < 130 else 33}:
        same(kernels.select_topk(x, W, b, k, *by, fused=fused), kernels.select_topk_reference(x, W, b, k, *by))


@pytest.mark.parametrize(("rank", "fused"), [("pre", False), ("scaled", True), ("magnitude", False)])
@pytest.mark.parametrize(("N", "D", "F"), SHAPES[:-1])
def test_batch_topk_is_exact(N, D, F, rank, fused, device):
    x, W, b, scale = integers(N, D, F, device)
    x[0] *= 3  # one row owns far more than its share
    by = (scale if rank == "scaled" else None, rank == "magnitude")
    for k in {1, min(7, F)}:
        got = kernels.select_batch_topk(x, W, b, k, *by, fused=fused)
        same(got, kernels.select_batch_topk_reference(x, W, b, k, *by))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_16_bits_are_widened_before_selection(rank, fused, device, dtypes, monkeypatch):
    """Sums of about 3,000 are not whole in 16 bits: selection by rounded scores would see ties that are none."""
    monkeypatch.setattr(topk, "FEW_SCORES", 0)  # on a CPU the k tiles of a row are searched, not all of it
    for module in (topk, batch_topk):
        monkeypatch.setattr(module, "CPU_TILE", 4)
    for dtype in dtypes[1:]:
        x, W, b, scale = integers(3, 64, 200, device, dtype)
        x *= 67
        by = (scale if rank == "scaled" else None, rank == "magnitude")
        wide = [t.float() for t in (x, W, b)]
        wide_by = (None if by[0] is None else by[0].float(), by[1])
        for select, reference in (
            (kernels.select_topk, kernels.select_topk_reference),
            (kernels.select_batch_topk, kernels.select_batch_topk_reference),
        ):
            pre, *where = reference(*wide, 9, *wide_by)
            same(select(x, W, b, 9, *by, fused=fused), (pre.to(dtype), *where))


def test_batch_topk_where_one_row_owns_everything(device):
    x, W, b, _ = integers(6, 4, 300, device)
    x[1:] = 0
    got = kernels.select_batch_topk(x * 50, W, b * 0, 20)
    same(got, kernels.select_batch_topk_reference(x * 50, W, b * 0, 20))


@pytest.mark.parametrize(("N", "D", "F"), [*SHAPES, (20, 3, 5000)])
def test_threshold_is_exact(N, D, F, device, dtypes):
    for dtype in dtypes[: 2 if N < 10 else 1]:
        x, W, b, scale = integers(N, D, F, device, dtype)  # many pre-activations stand exactly at the threshold
        same(kernels.select_threshold(x, W, b, scale), kernels.select_threshold_reference(x, W, b, scale))


def test_threshold_beyond_its_first_pool(device):
    """Everything fires: far over the capacity a sparse code is given at first."""
    x, W, b, scale = integers(3, 2, 1500, device)
    same(kernels.select_threshold(x, W, b, scale - 100), kernels.select_threshold_reference(x, W, b, scale - 100))


def test_threshold_limit(device):
    x, W, b, scale = integers(5, 3, 600, device)
    E = kernels.select_threshold_reference(x, W, b, scale)[0].shape[0]
    assert kernels.select_threshold(x, W, b, scale, limit=E - 1) is None
    same(kernels.select_threshold(x, W, b, scale, limit=E), kernels.select_threshold_reference(x, W, b, scale))


def test_no_rows(device):
    x, W, b, scale = integers(0, 3, 9, device)
    pre, latents = kernels.select_topk(x, W, b, 4)
    assert pre.shape == latents.shape == (0,)
    for pre, latents, offsets in (kernels.select_batch_topk(x, W, b, 4), kernels.select_threshold(x, W, b, scale)):
        assert pre.shape == latents.shape == (0,) and offsets.tolist() == [0]


@pytest.mark.parametrize("seed", range(10))
def test_ties_go_to_the_lower_latent(seed, device):
    """1,000 rows full of ties, at every chunking: 100 a seed."""
    x, W, b, scale = integers(100, 2, 140, device, seed=seed)
    expected = kernels.select_topk_reference(x, W, b, 5, scale)
    same(kernels.select_topk(x, W, b, 5, scale, fused=bool(seed % 2)), expected)


@pytest.mark.parametrize("chunk", [128, 384])
def test_chunking_changes_nothing(chunk, device, monkeypatch):
    x, W, b, scale = integers(20, 3, 700, device)
    for module in (topk, threshold, scores):
        monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", chunk * 7)
    same(kernels.select_topk(x, W, b, 11), kernels.select_topk_reference(x, W, b, 11))
    same(kernels.select_batch_topk(x, W, b, 11), kernels.select_batch_topk_reference(x, W, b, 11))
    expected = kernels.select_threshold_reference(x, W, b, scale)
    same(kernels.select_threshold(x, W, b, scale), expected)
    same(kernels.select_threshold(x, W, b, scale, limit=len(expected[0])), expected)
    assert kernels.select_threshold(x, W, b, scale, limit=len(expected[0]) - 1) is None


def test_pieces_hold_whole_tiles():
    assert scores.PANEL % score_tiles.CPU_TILE == 0


@pytest.mark.parametrize("F", [704, 701])
@pytest.mark.parametrize("k, scaled, magnitude", [(1, False, False), (3, False, True), (5, True, False), (11, True, True)])
def test_tiles_kept_from_piece_to_piece_hold_the_best(k, scaled, magnitude, F, monkeypatch):
    """Rows of ties, of rising and of falling scores, over pieces with and without a ragged end, a few scores at a time."""
    for module in (topk, batch_topk):
        monkeypatch.setattr(module, "CPU_TILE", 8)
    monkeypatch.setattr(score_tiles, "SCORES_AT_ONCE", 400)
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 1800)
    monkeypatch.setattr(scores, "CHUNK", 128)
    x, W, b, scale = integers(30, 3, F, "cpu", seed=k)
    x[0] = 0
    b[:] = torch.arange(F) // 50
    x[1], x[2:4], W[0] = torch.tensor([-1.0, 0, 0]), 0, 2 * b
    seen = [(rows, columns) for rows, columns, _ in scores.pieces(x, W, b, 4 * k * 8)]
    assert len({columns.start for _, columns in seen}) > 1
    scale = scale if scaled else None
    same(kernels.select_topk(x, W, b, k, scale, magnitude), kernels.select_topk_reference(x, W, b, k, scale, magnitude))
    batch = kernels.select_batch_topk(x, W, b, k, scale, magnitude)
    same(batch, kernels.select_batch_topk_reference(x, W, b, k, scale, magnitude))
    b[3:] = -torch.inf  # fewer finite scores than k
    if not magnitude:
        same(kernels.select_topk(x, W, b, k, scale), kernels.select_topk_reference(x, W, b, k, scale))


def test_a_batch_of_equal_scores_keeps_no_more_of_them_than_it_needs(monkeypatch):
    """All rows zero: the pool of candidates stays near the N·k entries that are asked for."""
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 1 << 12)
    x, W, b, _ = integers(64, 3, 2048, "cpu")
    pools, keep_best = [], batch_topk._keep_best
    monkeypatch.setattr(batch_topk, "_keep_best", lambda score, m: (pools.append(score.numel()), keep_best(score, m))[1])
    same(kernels.select_batch_topk(x * 0, W, b * 0, 4), kernels.select_batch_topk_reference(x * 0, W, b * 0, 4))
    assert max(pools) <= 2 * 64 * 4 + (1 << 12)


@pytest.mark.parametrize("latents", [1, 100, 256, 10**6])
@pytest.mark.parametrize("N", [1, 7, 40])
def test_pieces_cover_every_score_once(N, latents, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", 2000)
    x, W, b, _ = integers(N, 3, 700, "cpu")
    found, at = torch.full((N, 700), float("nan")), (0, 0)
    for rows, columns, pre in scores.pieces(x, W, b, latents):
        assert (rows.start, columns.start) >= at and found[rows, columns].isnan().all()
        assert pre.shape[1] >= min(latents, 700 - columns.start) and pre.numel() <= max(2000, min(latents, 700))
        found[rows, columns], at = pre, (rows.start, columns.start)
    assert torch.equal(found, x @ W + b)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 8, 9, 17, 64, 65])
@pytest.mark.parametrize("F", [8192, 8200])
@pytest.mark.parametrize("latent_major", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_few_rows_take_other_gemms_to_the_same_scores(N, F, latent_major, dtype, monkeypatch):
    monkeypatch.setattr(scores, "STRIP", 4096)
    x, W, b, _ = (t.to(dtype) for t in integers(N, 5, F, "cpu"))
    W = W if latent_major else W.contiguous()
    ((_, _, pre),) = scores.pieces(x, W, b)
    assert torch.equal(pre, x @ W + b)


@pytest.mark.parametrize("N", [8, 16, 100])
def test_scores_are_the_same_inside_an_autocast_region(N):
    x, W, b = torch.randn(N, 64), torch.randn(64, 512), torch.randn(512)
    plain = kernels.select_topk(x, W.T.contiguous().T, b, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ((_, _, pre),) = scores.pieces(x, W.T.contiguous().T, b)
        same(kernels.select_topk(x, W.T.contiguous().T, b, 5), plain)
    assert float((pre - (x.double() @ W.double() + b)).abs().max()) < 1e-4


def test_many_candidates_a_row_are_asked_for_only_where_needed(device, monkeypatch):
    """With one candidate per k the batch cut comes up short in most rows, and is still exact."""
    monkeypatch.setattr(batch_topk, "SPARE", 2)
    x, W, b, _ = integers(8, 4, 500, device, seed=3)
    same(kernels.select_batch_topk(x, W, b, 3), kernels.select_batch_topk_reference(x, W, b, 3))


def test_more_keys_than_a_program_holds(device, monkeypatch):
    """Above MOST_SLOTS a row goes by pieces on a GPU too: plain top-k, and the repair of a batch with one huge row."""
    for module in (topk, batch_topk):
        monkeypatch.setattr(module, "MOST_SLOTS", 8)
    x, W, b, _ = integers(4, 3, 150, device)
    same(kernels.select_topk(x, W, b, 9), kernels.select_topk_reference(x, W, b, 9))
    x[1:] = 0
    same(kernels.select_batch_topk(x, W, b * 0, 6), kernels.select_batch_topk_reference(x, W, b * 0, 6))


def test_nonzero_flat_finds_what_nonzero_finds():
    for size in (0, 7, 1 << 16, (1 << 16) + 13):
        mask = torch.rand(size) < 0.01
        assert torch.equal(threshold.nonzero_flat(mask), mask.nonzero().squeeze(1))


def test_rows_of_negative_zero_tie_with_zero(device):
    """-0.0 and 0.0 are one score."""
    W = torch.tensor([[0.0, -0.0, 0.0, -0.0]], device=device)
    pre, latents = kernels.select_topk(torch.ones(1, 1, device=device), W, torch.full((4,), -0.0, device=device), 2)
    assert latents.tolist() == [0, 1]


def test_batch_topk_keeps_its_promise_with_nan(device):
    """A GPU cannot afford to look for NaN in x; N·k entries with real latents come out all the same."""
    x, W, b, _ = integers(4, 3, 150, device)
    W = W.clone()
    W[:, 7] = float("nan")
    pre, latents, offsets = kernels.select_batch_topk(x, W, b, 5)
    assert len(pre) == 20 and offsets[-1] == 20 and bool(((latents >= 0) & (latents < 150)).all())
    assert torch.isfinite(pre).all()
