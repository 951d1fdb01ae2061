"""The two ways to a loss, entry by entry and by chunks of latents, and how the second makes place for the first."""

import pytest
import torch
from test_trainer import VARIANTS, small

from fastsae import functional
from fastsae.member import Member
from fastsae.sae import SAE


def member(changes, out) -> tuple[Member, torch.Tensor]:
    """In fp64, with weights that fire now and then, and rows."""
    torch.manual_seed(0)
    made = Member(small(out, optimizer="Adam", **changes), 16, None, torch.device("cpu"))
    sae = made.sae.double()
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn_like(p) / 4)
        if changes["activation"] == "jumprelu":
            sae.activation.theta.abs_()
    return made, torch.randn(32, 16, dtype=torch.float64)


DENSE = {name: changes for name, changes in VARIANTS.items() if changes.get("activation") in ("relu", "jumprelu", "gated")}


@pytest.mark.parametrize("changes", DENSE.values(), ids=DENSE)
def test_both_ways_are_one_loss(changes, tmp_path, monkeypatch):
    """With its gradients, b_dec's among them, and what fired; in chunks with a ragged last one."""
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", 32 * 7)
    monkeypatch.setattr(functional, "LEAST_CHUNK", 1)
    found = []
    for below in (0.0, 1.0):
        monkeypatch.setattr(functional, "SPARSE_BELOW", below)
        made, x = member(changes, tmp_path)
        outcome = made.objective(made.sae.train(), x, x, None, step=9)
        outcome.loss.backward()
        gradients = {name: p.grad for name, p in made.sae.named_parameters()}
        assert gradients["b_dec"].any() and outcome.fired.any() and made.objective.was_dense == (below == 0)
        found.append((outcome, gradients))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_dense_code_is_asked_for_in_few_rows(tmp_path, monkeypatch):
    """Where an eighth of the rows has too many entries already; a code that has become sparse is noticed at once."""
    rows, encode = [], SAE.encode_sparse_within
    monkeypatch.setattr(SAE, "encode_sparse_within", lambda sae, x, *a, **k: rows.append(len(x)) or encode(sae, x, *a, **k))
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1 / 32)
    made, x = member({"activation": "relu"}, tmp_path)
    for _ in range(2):
        made.objective(made.sae, x, x, None, step=0)
    assert rows == [32, 4]
    with torch.no_grad():
        made.sae.b_enc.fill_(-9.0)
    for _ in range(2):
        made.objective(made.sae, x, x, None, step=0)
    assert rows == [32, 4, 4, 32, 32]


def test_one_row_is_not_held_against_an_eighth_of_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1 / 32)  # two entries
    made, x = member({"activation": "relu"}, tmp_path)
    made.objective(made.sae, x[:1], x[:1], None, step=0)
    assert made.objective.was_dense
    with torch.no_grad():
        made.sae.b_enc.fill_(-9.0)[3] = 9.0
    made.objective(made.sae, x[:1], x[:1], None, step=0)
    assert not made.objective.was_dense
