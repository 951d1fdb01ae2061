"""A padded part gives what the dead latents alone give; how many they are is never read."""

import pytest
import torch
from dense_sae import DEAD, F, K, inputs, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae import JumpReLU, TopK, losses
from fastsae.dead import dead_latents, slots_for, without_padding

WINDOW = 1000
LIVING = [f for f in range(F) if f not in DEAD.tolist()]


def since_fired(dead: Tensor = DEAD) -> Tensor:
    return torch.randint(0, WINDOW, (F,)).index_fill(0, dead, WINDOW)


def test_all_of_them_where_they_fit():
    for slots in (len(DEAD), len(DEAD) + 3, F):
        found = dead_latents(since_fired(), WINDOW, slots, seed=1)
        assert found.latents[found.valid].tolist() == sorted(DEAD.tolist())
        assert found.latents.unique().numel() == slots and found.latents.tolist() == sorted(found.latents.tolist())


def test_otherwise_a_random_share():
    counts = torch.zeros(F)
    for seed in range(300):
        found = dead_latents(since_fired(), WINDOW, 4, seed)
        assert found.valid.all() and set(found.latents.tolist()) <= set(DEAD.tolist())
        counts[found.latents] += 1
    expected = 300 * 4 / len(DEAD)
    assert (counts[DEAD] - expected).abs().max() < 5 * expected**0.5


def test_the_same_for_the_same_seed():
    same, other = (dead_latents(since_fired(), WINDOW, 4, seed).latents for seed in (5, 6))
    assert torch.equal(dead_latents(since_fired(), WINDOW, 4, 5).latents, same) and not torch.equal(same, other)


def test_none_and_no_slots():
    alive = torch.zeros(F, dtype=torch.int64)
    found = dead_latents(alive, WINDOW, 5, 0)
    assert len(found.latents) == 5 and not found.valid.any() and found.share(8) == 0
    assert dead_latents(alive, WINDOW, 0, 0).latents.shape == (0,)
    with pytest.raises(ValueError, match=f"slots={F + 1}: pass a number from 0 to d_sae={F}"):
        dead_latents(alive, WINDOW, F + 1, 0)


@pytest.mark.parametrize("k", [1, 8, 20])
@pytest.mark.parametrize("term", ["auxk", "relu", "magnitude", "rescaled", "ghost", "pre_act"])
@pytest.mark.parametrize("slots", [len(DEAD), F - 1, F])
def test_padding_is_worth_nothing(slots, term, k):
    sae = make(JumpReLU(theta=0.3) if term == "pre_act" else TopK(K), rescale_acts_by_decoder_norm=term == "rescaled")
    x = inputs()
    error = losses.reconstruct(sae, sae.encode_sparse(x), x).error[:, -1].detach()
    found = dead_latents(since_fired(), WINDOW, slots, seed=3)
    results = []
    for padded in (False, True):
        part = losses.part(sae, x, found.latents if padded else found.latents[found.valid])
        if padded:
            W_enc, b_enc, W_dec = without_padding(part.W_enc, part.b_enc, part.W_dec, found.valid, term == "magnitude")
            part = part._replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
        if term == "ghost":
            loss = losses.ghost(part, error)
        elif term == "pre_act":
            loss = losses.pre_act(part, torch.full_like(part.b_enc, 0.3))
        else:
            options = {term: True} if term in ("relu", "magnitude") else {}
            loss = losses.auxk(part, error, k, scaled=not padded, **options) * (found.share(k, error.dtype) if padded else 1)
        results.append([loss, *torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.W_dec])])
    assert results[0][0] > 0
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)
    assert all(not g[..., LIVING].any() for g in results[1][1:3]) and not results[1][3][LIVING].any()


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item"), name
        indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
        assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_nothing_is_read():
    counters = since_fired()
    with NothingIsRead():
        found = dead_latents(counters, WINDOW, 8, 0)
        sae = make(TopK(K))
        without_padding(sae.W_enc[:, :8], sae.b_enc[:8], sae.W_dec[:8], found.valid)
        found.share(4)
    with pytest.raises(AssertionError, match="nonzero|index"), NothingIsRead():
        counters[counters >= WINDOW]


def test_slots_follow_the_last_count():
    assert [slots_for(n, 100) for n in (0, 1, 2, 3, 16, 17, 40, 1000)] == [0, 2, 4, 8, 32, 64, 100, 100]
