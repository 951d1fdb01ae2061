"""fp32 as two halves comes back exactly; rounding at random is right on average."""

import pytest
import torch

from fastsae.kernels.halves import joined, round_randomly, split


def halves_of(w):
    high, low = torch.empty_like(w, dtype=torch.bfloat16), torch.empty_like(w, dtype=torch.int16)
    split(w, high, low)
    return high, low


def equal_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("top", [0, 1, 0x7F, 0x80, 0x3F80, 0x3F7F, 0x4049, 0x7F7E, 0x7F7F])
def test_every_low_half_comes_back(top):
    """All 2^16 patterns under zero, denormals, powers of two and the largest numbers, of both signs."""
    bits = torch.arange(2**16, dtype=torch.int64) + (top << 16)
    for sign in (0, 2**31):
        w = ((bits + sign + 2**31) % 2**32 - 2**31).int().view(torch.float32)
        assert equal_bits(joined(*halves_of(w)), w)


def test_random_patterns_come_back():
    w = torch.randint(-(2**31), 2**31, (1 << 22,), dtype=torch.int64).int().view(torch.float32)
    w = w[~w.isnan()]
    assert equal_bits(joined(*halves_of(w)), w)


def test_the_high_half_is_the_nearest_bf16():
    w = torch.cat([torch.randn(1 << 20), torch.randn(1 << 20) * 1e-30])
    high, _ = halves_of(w)
    ties = (w.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~ties], w.bfloat16()[~ties])
    tie = torch.tensor([0x3F808000, 0x3F818000], dtype=torch.int32).view(torch.float32)  # torch: one down, one up
    assert halves_of(tie)[0].view(torch.int16).tolist() == [0x3F81, 0x3F82]


def test_a_high_half_that_was_overwritten_counts():
    """To within the rounding of a bf16, and zeros of both signs to within the smallest denormal of one."""
    high = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-38]).bfloat16()
    for low in (-(2**15), -1, 0, 1, 2**15 - 1):
        got = joined(high, torch.full((5,), low, dtype=torch.int16))
        assert (((got - high.float()).abs()) <= high.float().abs() / 256 + 5e-41).all()


def test_layouts_stay():
    w = torch.randn(5, 7).T
    high, low = halves_of(w)
    assert high.stride() == low.stride() == w.stride() and torch.equal(joined(high, low), w)


@pytest.mark.parametrize("x", [1.0 + 2**-9, -3.3e-7, 0.1, 1e-40, 123456.0])
def test_rounding_is_right_on_average(x):
    noise = torch.arange(2**16, dtype=torch.int32)
    out = torch.empty(2**16, dtype=torch.bfloat16)
    round_randomly(torch.full((2**16,), x), noise, out)
    exact = torch.tensor(x).double()
    assert out.unique().numel() <= 2
    torch.testing.assert_close(out.double().mean(), exact, rtol=1e-6, atol=0)


def test_what_is_a_bf16_already_stays():
    x = torch.tensor([0.0, -0.0, 1.5, -(2.0**-130), float("inf")])
    out = torch.empty(5, dtype=torch.bfloat16)
    round_randomly(x, torch.full((5,), 2**16 - 1, dtype=torch.int32), out)
    assert torch.equal(out.float(), x) and torch.equal(out.signbit(), x.signbit())
