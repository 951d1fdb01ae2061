"""Loss and every gradient against SAELens' training classes: same weights, same batch."""

import copy

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler

from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK, losses, schedules

N, D, F, K = 40, 12, 96, 6
COEFFICIENT = 0.37
NAMES = {"b_gate": "b_enc", "threshold": "activation.theta", "r_mag": "activation.r_mag", "b_mag": "activation.b_mag"}
FEW, MANY = 4, 50  # dead latents, fewer and more than D / 2


class Pair:
    """A SAELens training SAE, ours with its weights, and a batch."""

    def __init__(self, architecture, activation, dtype, dead=0, **config):
        cls, config_class = get_sae_training_class(architecture)
        self.theirs = cls(config_class(d_in=D, d_sae=F, dtype=str(dtype).removeprefix("torch."), device="cpu", **config))
        rescale = getattr(self.theirs.cfg, "rescale_acts_by_decoder_norm", False)
        self.ours = SAE(D, F, activation, dtype=dtype, rescale_acts_by_decoder_norm=rescale)
        with torch.no_grad():
            for p in self.theirs.parameters():
                p.data = p.data.to(dtype)  # SAELens keeps the threshold in fp32
                p += torch.randn_like(p) * 0.3
            self.theirs.W_dec *= torch.rand(F, 1).to(dtype) + 0.5
            if architecture == "jumprelu":
                self.theirs.threshold.abs_()
            mine = dict(self.ours.named_parameters())
            self.parameters = {name: (mine[NAMES.get(name, name)], p) for name, p in self.theirs.named_parameters()}
            for a, b in self.parameters.values():
                a.copy_(b)
        assert len(self.parameters) == len(mine)
        self.x = torch.randn(N, D, dtype=dtype)
        self.mask = torch.zeros(F, dtype=torch.bool)
        self.mask[torch.randperm(F)[:dead]] = True
        self.dead = self.mask.nonzero().squeeze(1)
        self.code = self.ours.encode_sparse(self.x)
        self.norms = self.ours.W_dec.norm(dim=1)

    def reconstruct(self, code=None, **options):
        return losses.reconstruct(self.ours, self.code if code is None else code, self.x, **options)

    def part(self, ids=None):
        return losses.part(self.ours, self.x, self.dead if ids is None else ids)

    def check(self, agree, ours):
        given = TrainStepInput(
            sae_in=self.x,
            coefficients={"l0": COEFFICIENT, "l1": COEFFICIENT},
            dead_neuron_mask=self.mask,
            n_training_steps=0,
            is_logging_step=False,
        )
        agree(ours, self.theirs.training_forward_pass(step_input=given).loss, self.parameters)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_standard(p, dtype, agree):
    pair = Pair("standard", ReLU(), dtype, lp_norm=p)
    r = pair.reconstruct(weight=pair.norms)
    sparsity = losses.l1(r) if p == 1 else losses.lp(pair.code, p, pair.norms, root=True)
    pair.check(agree, losses.mse(r) + COEFFICIENT * sparsity)


def test_gated(dtype, agree):
    """SAELens lets the gate's terms train the decoder, which the paper does not: `frozen` is the paper's (below, and
    test_losses_dictionary_learning.py)."""
    pair = Pair("gated", Gated(), dtype)
    via_gate = pair.reconstruct(losses.gate(pair.code), weight=pair.norms)
    pair.check(agree, losses.mse(pair.reconstruct()) + losses.mse(via_gate) + COEFFICIENT * losses.l1(via_gate))


@pytest.mark.parametrize("dead", [0, FEW, MANY])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("architecture", "activation"), [("topk", TopK), ("abstopk", AbsTopK), ("batchtopk", BatchTopK)], ids=lambda a: str(a)
)
def test_topk_family(architecture, activation, rescale, dead, dtype, agree):
    pair = Pair(architecture, activation(K), dtype, dead, k=K, rescale_acts_by_decoder_norm=rescale, aux_loss_coefficient=0.7)
    r = pair.reconstruct()
    aux = losses.auxk(pair.part(), r.error[:, -1], magnitude=architecture == "abstopk")
    pair.check(agree, losses.mse(r) + 0.7 * aux)


@pytest.mark.parametrize("dead", [0, FEW, MANY])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("by_level", [False, True])
def test_matryoshka(by_level, rescale, dead, dtype, agree):
    widths = [10, 40, F]
    pair = Pair(
        "matryoshka_batchtopk", BatchTopK(K), dtype, dead, k=K, rescale_acts_by_decoder_norm=rescale,
        matryoshka_widths=list(widths), use_matryoshka_aux_loss=by_level,
    )  # fmt: skip
    r = pair.reconstruct(prefixes=widths)
    if by_level:
        ends = torch.tensor(widths)
        level = torch.bucketize(pair.dead, ends, right=True)
        aux = sum(losses.auxk(pair.part(pair.dead[level == p]), r.error[:, p]) for p in range(len(widths)))
    else:
        aux = losses.auxk(pair.part(), r.error[:, -1])
    pair.check(agree, losses.mse(r) + aux)


@pytest.mark.parametrize("dead", [None, 0, FEW, MANY])
@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("mode", ["step", "tanh", "quadratic"])
def test_jumprelu(mode, to_input, dead, dtype, agree):
    jump = JumpReLU(bandwidth=0.4, ste_to_input=to_input)
    config = {"jumprelu_sparsity_loss_mode": mode, "target_l0": 9.0, "pre_act_loss_coefficient": None if dead is None else 0.2}
    pair = Pair("jumprelu", jump, dtype, dead or 0, jumprelu_bandwidth=0.4, jumprelu_ste_to_input=to_input, **config)
    window = (pair.code.pre - jump.theta[pair.code.latents]).abs() < 0.2
    assert window.any() and not window.all()
    if mode == "tanh":
        sparsity = losses.l0_tanh(pair.code, pair.norms)
    else:
        l0 = losses.l0(pair.code, jump)
        sparsity = l0.mean() if mode == "step" else losses.l0_to_target(l0, 9.0)
    loss = losses.mse(pair.reconstruct()) + COEFFICIENT * sparsity
    if dead is not None:
        loss = loss + 0.2 * losses.pre_act(pair.part(), jump.theta[pair.dead])
    pair.check(agree, loss)


def test_transcoder_input_is_not_centred(dtype, agree):
    pair = Pair("topk", TopK(K), dtype, MANY, k=K, rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False)
    pair.ours.apply_b_dec_to_input = False
    pair.code = pair.ours.encode_sparse(pair.x)
    r = pair.reconstruct()
    pair.check(agree, losses.mse(r) + losses.auxk(pair.part(), r.error[:, -1]))


def test_the_threshold_is_projected_as_theirs():
    """Below zero after an optimizer's step, it is zero in the next forward pass of both, with its gradient alive."""
    pair = Pair("jumprelu", JumpReLU(), torch.float64)
    with torch.no_grad():
        for p in pair.parameters["threshold"]:
            p.sub_(0.3)
    ours = copy.deepcopy(pair.ours)
    ours.encode_sparse(pair.x)
    given = TrainStepInput(
        sae_in=pair.x, coefficients={"l0": 1.0}, dead_neuron_mask=pair.mask, n_training_steps=0, is_logging_step=False
    )
    pair.theirs.training_forward_pass(step_input=given)
    assert torch.equal(ours.activation.theta, pair.theirs.threshold) and (ours.activation.theta == 0).any()


@pytest.mark.parametrize("name", ["constant", "cosineannealing"])
@pytest.mark.parametrize(("warm", "decays"), [(0, 0), (5, 0), (5, 8)])
def test_learning_rates(name, warm, decays):
    total, lr, lr_end = 40, 3e-4, 3e-5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = get_lr_scheduler(name, optimizer, total, lr, warm, decays, lr_end, 1)
    floor = 1.0 if name == "constant" else lr_end / lr
    for t in range(total):
        factor = schedules.warm_up(t + 1, warm) * schedules.cosine(t, warm, total - decays, floor)
        factor *= schedules.decay(t, total - decays, total)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * factor, rel=1e-9), t
        optimizer.step()
        scheduler.step()


def test_coefficients():
    theirs = CoefficientScheduler(warm_up_steps=7, final_value=2.0)
    for t in range(10):
        assert theirs.value == pytest.approx(2.0 * schedules.warm_up(t, 7))
        theirs.step()
