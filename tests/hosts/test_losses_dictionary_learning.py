"""Loss and every gradient against dictionary_learning's trainers, and what they get wrong."""

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.trainers.trainer import get_lr_schedule, get_sparsity_warmup_fn

from fastsae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, losses, schedules

N, D, F, K = 40, 12, 96, 6
NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec",
    "decoder_bias": "b_dec", "gate_bias": "b_enc", "r_mag": "activation.r_mag", "mag_bias": "activation.b_mag",
    "threshold": "activation.theta",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_fp64(dtype, monkeypatch):
    """Their auxiliary loss asks for .float(): where all is fp64, it stays fp64."""
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", lambda t: t.double())


class Pair:
    """A trainer of theirs, our SAE with its weights, and a batch."""

    def __init__(self, trainer, activation, dtype, centred=True, **config):
        self.trainer = trainer(
            steps=10, warmup_steps=1, activation_dim=D, dict_size=F, layer=0, lm_name="none", device="cpu", **config
        )
        theirs = self.trainer.ae.to(dtype)
        self.ours = SAE(D, F, activation, dtype=dtype, apply_b_dec_to_input=centred)
        mine = dict(self.ours.named_parameters())
        self.parameters = {name: (mine[NAMES.get(name, name)], p) for name, p in theirs.named_parameters()}
        assert len(self.parameters) == len(mine)
        with torch.no_grad():
            for name, (a, b) in self.parameters.items():
                b += torch.randn_like(b) * 0.3
                if name == "threshold":
                    b.abs_()
                a.copy_(b if a.shape == b.shape else b.T)
        self.x = torch.randn(N, D, dtype=dtype)
        self.code = self.ours.encode_sparse(self.x)

    def reconstruct(self, code=None, **options):
        return losses.reconstruct(self.ours, self.code if code is None else code, self.x, **options)

    def auxk(self, r):
        return losses.auxk_normalised(losses.part(self.ours, self.x, self.dead), r.error[:, -1]) / 32


def dead_pair(trainer, activation, dead, dtype, **config):
    """With some latents dead: silent for long, and in this batch too, since in theirs who fires comes alive at once."""
    pair = Pair(trainer, activation(K), dtype, k=K, **config)
    pair.dead = torch.randperm(F)[:dead].sort().values
    with torch.no_grad():
        for name in {"encoder.bias", "b_enc"} & set(pair.parameters):
            for p in pair.parameters[name]:
                p[pair.dead] -= 4.0
    pair.code = pair.ours.encode_sparse(pair.x)
    assert not torch.isin(pair.code.latents[pair.code.values > 0].long(), pair.dead).any()
    pair.trainer.num_tokens_since_fired[pair.dead] = pair.trainer.dead_feature_threshold
    return pair


@pytest.mark.parametrize("dead", [0, 4, 30])  # fewer and more than D / 2
@pytest.mark.parametrize(("trainer", "activation"), [(TopKTrainer, TopK), (BatchTopKTrainer, BatchTopK)])
def test_topk_and_batch_topk(trainer, activation, dead, dtype, agree):
    pair = dead_pair(trainer, activation, dead, dtype)
    r = pair.reconstruct()
    loss = losses.mse(r) + (pair.auxk(r) if dead else 0)
    agree(loss, pair.trainer.loss(pair.x, step=0), pair.parameters)


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("dead", [0, 4, 30])
def test_matryoshka(dead, weights, dtype, agree):
    """Theirs averages levels that are already weighted, so a level counts weight / G; without weights that is 1 / G²."""
    pair = dead_pair(
        MatryoshkaBatchTopKTrainer, BatchTopK, dead, dtype, group_fractions=[0.125, 0.375, 0.5], group_weights=weights
    )
    assert pair.trainer.group_sizes == [12, 36, 48]
    r = pair.reconstruct(prefixes=[12, 48, F])
    loss = losses.mse(r, [w / 3 for w in weights or [1 / 3] * 3]) + (pair.auxk(r) if dead else 0)
    agree(loss, pair.trainer.loss(pair.x, step=0), pair.parameters)


def test_a_pick_of_value_zero_has_not_fired():
    """WRONG in theirs: a latent that top-k picks with value zero counts as fired, so it is never dead. Ours asks the value."""
    pair = Pair(TopKTrainer, TopK(K), torch.float32, k=K)
    with torch.no_grad():
        for p in pair.parameters["encoder.bias"]:
            p.fill_(-100.0)  # nothing is positive: every pick is zero
    pair.trainer.num_tokens_since_fired[:] = 5
    pair.trainer.loss(pair.x, step=0)
    assert (pair.trainer.num_tokens_since_fired == 0).any()
    code = pair.ours.encode_sparse(pair.x)
    assert code.values.shape == (N * K,) and not code.l0().any()


def test_gated(dtype, agree):
    pair = Pair(GatedSAETrainer, Gated(), dtype, sparsity_warmup_steps=None)
    via_gate = pair.reconstruct(losses.gate(pair.code), frozen=True)
    loss = losses.mse(pair.reconstruct()) + losses.mse(via_gate) + 0.1 * losses.l1(via_gate)
    agree(loss, pair.trainer.loss(pair.x, step=0), pair.parameters)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_p_anneal(p, root, dtype, agree):
    pair = Pair(
        PAnnealTrainer, ReLU(), dtype, sparsity_warmup_steps=None, anneal_start=4, anneal_end=9, n_sparsity_updates=2,
        sparsity_function="Lp" if root else "Lp^p",
    )  # fmt: skip
    pair.trainer.p = p
    loss = losses.mse(pair.reconstruct()) + 0.1 * losses.lp(pair.code, p, root=root)
    agree(loss, pair.trainer.loss(pair.x, step=0), pair.parameters)


def test_jumprelu(dtype, agree):
    """The batch-mean quadratic. WRONG in theirs: the step's straight-through window looks at the activation instead of the
    pre-activation, so every silent latent whose threshold is under half the bandwidth pulls at that threshold. Loss and the
    other gradients are equal; theta's is checked against the definition."""
    bandwidth = 0.25  # exact in fp32, to which theirs rounds it
    jump = JumpReLU(bandwidth=bandwidth)
    pair = Pair(
        JumpReluTrainer, jump, dtype, centred=False, bandwidth=bandwidth, target_l0=9.0, sparsity_warmup_steps=None
    )
    theirs = pair.trainer.loss(pair.x, step=0)
    mine, other = pair.parameters.pop("threshold")
    r, l0 = pair.reconstruct(), losses.l0(pair.code, jump)
    agree(losses.mse(r) + losses.mean_l0_to_target(l0, 9.0), theirs, pair.parameters)

    with torch.no_grad():
        pre = pair.x @ pair.ours.W_enc + pair.ours.b_enc
        window = (pre - mine).abs() < bandwidth / 2
        g = 2 / N * r.error[:, -1] @ pair.ours.W_dec.T  # of mse to activations
        slope = 2 * (l0.mean() / 9.0 - 1) / 9.0 / N  # of the quadratic to each row's L0
        expected = -(window / bandwidth * (mine * g + slope)).sum(0)
        as_theirs = -(window * mine / bandwidth * g).sum(0)
        as_theirs -= ((pre * (pre > mine) - mine).abs() < bandwidth / 2).sum(0) / bandwidth * slope
    torch.testing.assert_close(mine.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.grad, as_theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mine.grad, other.grad, rtol=0.1)


def test_ghost_gradients(dtype, agree):
    """Theirs has the forward pass only: the dead latents' exponentials, decoded without bias."""
    theirs = AutoEncoder(D, F).to(dtype)
    ours = SAE(D, F, ReLU(), dtype=dtype)
    with torch.no_grad():
        ours.W_enc.copy_(theirs.encoder.weight.T)
        ours.W_dec.copy_(theirs.decoder.weight.T)
        ours.b_enc.copy_(theirs.encoder.bias)
    x = torch.randn(N, D, dtype=dtype)
    mask = torch.rand(F) < 0.3
    x_hat, g = theirs(x, ghost_mask=mask)
    r = (x - x_hat).detach()
    miss = (g * (r.norm(dim=1, keepdim=True) / 2 / g.norm(dim=1, keepdim=True)).detach() - r).square().sum(1)
    expected = ((r.square().sum(1) / miss).detach() * miss).mean()
    got = losses.ghost(losses.part(ours, x, mask.nonzero().squeeze(1)), -r)
    agree(got, expected, {n: (getattr(ours, NAMES[n]), p) for n, p in theirs.named_parameters()})


def test_schedules():
    rate, penalty = get_lr_schedule(40, 5, decay_start=30), get_sparsity_warmup_fn(40, 7)
    for t in range(40):
        assert rate(t) == pytest.approx(schedules.warm_up(t, 5) * schedules.decay(t, 30, 40))
        assert penalty(t) == pytest.approx(schedules.warm_up(t, 7))
