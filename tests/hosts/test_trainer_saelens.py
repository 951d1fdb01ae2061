"""Our trainer beside SAELens' SAETrainer: in lock-step from its weights, and running freely from the same start.

Free-running, selection and thresholds amplify rounding: SAELens with its latents in another order does not follow itself. So
what selects is measured against that distance.
"""

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from fastsae.config import DataConfig, LossConfig, OptimConfig, SAEConfig, TrainConfig
from fastsae.data.synthetic import Superposition
from fastsae.dead import DeadLatents
from fastsae.member import Member

N, D, F, K, STEPS, WINDOW, LR = 32, 12, 96, 6, 300, 5, 3e-3
WARM, DECAY = 10, 50
NAMES = {"threshold": "activation.theta"}

ARCHITECTURES = {  # theirs, ours
    "topk": ({"k": K}, SAEConfig(activation="topk", k=K, d_sae=F), LossConfig()),
    "batchtopk": ({"k": K}, SAEConfig(activation="batchtopk", k=K, d_sae=F), LossConfig()),
    "standard": (
        {"l1_coefficient": 0.1, "l1_warm_up_steps": 50},
        SAEConfig(activation="relu", d_sae=F),
        LossConfig(coefficient=0.1, warm_up=50),
    ),
    "jumprelu": (
        {"l0_coefficient": 0.01, "l0_warm_up_steps": 50, "jumprelu_bandwidth": 0.2, "pre_act_loss_coefficient": 0.02,
         "jumprelu_init_threshold": 0.3},
        SAEConfig(activation="jumprelu", bandwidth=0.2, d_sae=F),
        LossConfig(coefficient=0.01, warm_up=50, dead="pre_act", dead_coefficient=0.02),
    ),
}


def batches(dtype):
    return Superposition(D, 48, 4.0, batch_size=N, seed=3, dtype=dtype)


def stock(architecture, dtype, options):
    torch.manual_seed(5)
    cls, config_class = get_sae_training_class(architecture)
    sae = cls(config_class(d_in=D, d_sae=F, dtype=str(dtype).removeprefix("torch."), device="cpu", **options))
    for p in sae.parameters():
        p.data = p.data.to(dtype)  # SAELens keeps the threshold in fp32
    config = SAETrainerConfig(
        total_training_samples=STEPS * N, train_batch_size_samples=N, lr=LR, lr_end=LR, lr_warm_up_steps=WARM,
        lr_decay_steps=DECAY, dead_feature_window=WINDOW,
    )  # fmt: skip
    return SAETrainer(config, sae, batches(dtype))


def ours(dtype, sae_config, loss, theirs):
    config = TrainConfig(
        sae=sae_config,
        loss=LossConfig(**{**vars(loss), "dead_window": WINDOW * N}),
        optim=OptimConfig(lr=LR, lr_warm_up=WARM, lr_decay=DECAY),
        data=DataConfig(buffer=N),
        tokens=STEPS * N,
        batch_size=N,
    )
    member = Member(config, D, None, torch.device("cpu"))
    member.sae.to(dtype)
    copy_weights(member.sae, theirs)
    return member


@torch.no_grad()
def copy_weights(sae, theirs):
    mine = dict(sae.named_parameters())
    for name, p in theirs.named_parameters():
        mine[NAMES.get(name, name)].copy_(p)


def near(a, b, tolerance, what):
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: {error:.2g} relative"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lock_step(architecture, dtype):
    """At each of 300 steps, from the stock trainer's current weights: loss and every gradient."""
    options, sae_config, loss = ARCHITECTURES[architecture]
    trainer = stock(architecture, dtype, options)
    member = ours(dtype, sae_config, loss, trainer.sae)
    member.stepper.optimizer.release()  # gradients to look at
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    saw_dead = False
    for step, x in zip(range(STEPS), batches(dtype), strict=False):
        mask = trainer.dead_neurons
        given = TrainStepInput(
            sae_in=x, coefficients=trainer.get_coefficients(), dead_neuron_mask=mask,
            n_training_steps=step, is_logging_step=False,
        )  # fmt: skip
        theirs = trainer.sae.training_forward_pass(step_input=given).loss
        copy_weights(member.sae, trainer.sae)
        dead = mask.nonzero().squeeze(1)
        mine = member.objective(member.sae.train(), x, x, DeadLatents(dead, torch.ones_like(dead).bool(), False), step).loss
        near(mine.detach().to(dtype), theirs.detach(), tolerance, f"loss of step {step}")
        names, parameters = zip(*trainer.sae.named_parameters(), strict=True)
        expected = torch.autograd.grad(theirs, parameters)
        found = dict(member.sae.named_parameters())
        got = torch.autograd.grad(mine, [found[NAMES.get(n, n)] for n in names])
        for name, a, b in zip(names, got, expected, strict=True):
            near(a, b, tolerance, f"{name} in step {step}")
        saw_dead |= bool(mask.any())
        trainer.step(x)
        trainer.n_training_steps += 1
    assert saw_dead or architecture == "standard"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_logged(architecture):
    """Every number that the stock trainer logs, of each of 20 steps, under its name."""
    options, sae_config, loss = ARCHITECTURES[architecture]
    trainer = stock(architecture, torch.float64, options)
    member = ours(torch.float64, sae_config, loss, trainer.sae)
    if architecture == "batchtopk":
        member.sae.activation.set_threshold(0.0)  # where theirs starts; ours at the first batch's
    for step, x in zip(range(20), batches(torch.float64), strict=False):
        output = trainer.step(x)
        expected = trainer.build_train_step_log_dict(output, trainer.n_training_samples) | trainer._build_sparsity_log_dict()
        trainer._reset_running_sparsity_stats()
        trainer.n_training_steps += 1
        member.step(x, step)
        found = member.measure(step + 1)
        assert set(expected) - set(found) == {"plots/feature_density_line_chart"}
        assert set(found) - set(expected) == {"sparsity/skipped_steps", "sparsity/skipped_rows"}
        for name in set(found) & set(expected):
            # theirs counts firings in fp32
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-9), f"{name} in step {step}"


def run_free(architecture, dtype, order=None):
    """Weights after 300 steps of (stock, ours), or of stock with its latents in another order."""
    options, sae_config, loss = ARCHITECTURES[architecture]
    trainer = stock(architecture, dtype, options)
    if order is not None:
        permute(trainer.sae, order)
    member = ours(dtype, sae_config, loss, trainer.sae) if order is None else None
    for step, x in zip(range(STEPS), batches(dtype), strict=False):
        trainer.step(x)
        trainer.n_training_steps += 1
        if member is not None:
            member.step(x, step)
    if order is not None:
        permute(trainer.sae, order.argsort())
        return trainer.sae
    return trainer.sae, member.sae


@torch.no_grad()
def permute(sae, order):
    for name, p in sae.named_parameters():
        if name != "b_dec":
            p.copy_(p[:, order] if name == "W_enc" else p[order])


def distance(a, b):
    return float(max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True)))


def fvu(sae, dtype):
    x = next(Superposition(D, 48, 4.0, batch_size=4096, seed=3, stream=1, dtype=dtype))
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_running_free(architecture, dtype):
    theirs, mine = run_free(architecture, dtype)
    pairs = dict(mine.named_parameters())
    named = dict(theirs.named_parameters())
    apart = distance([pairs[NAMES.get(n, n)] for n in named], named.values())
    if dtype == torch.float64 and architecture != "jumprelu":
        assert apart <= 1e-9
    else:
        torch.manual_seed(0)
        itself = distance(run_free(architecture, dtype, torch.randperm(F)).parameters(), named.values())
        assert apart <= max(3 * itself, 1e-9), f"{apart:.2g} from stock, which is {itself:.2g} from itself"
    assert fvu(mine, dtype) == pytest.approx(fvu(theirs, dtype), rel=0.01)
