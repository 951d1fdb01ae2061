"""The training loop: what a step does to weights and counters, and that a stopped run goes on bit for bit."""

import copy
import dataclasses
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from fastsae import SAE, interrupt, load
from fastsae.config import DataConfig, OptimConfig, SAEConfig, TrainConfig, with_values
from fastsae.data.source import NotResumable
from fastsae.interrupt import Interrupted
from fastsae.logs import SINKS
from fastsae.member import Member, NonFinite
from fastsae.objective import Objective
from fastsae.resample import resample
from fastsae.state_files import load_tree
from fastsae.trainer import DataEnded, OutOfMemory, train

SMALL = TrainConfig(
    sae=SAEConfig(k=3, d_sae=64),
    optim=OptimConfig(lr=1e-2, lr_warm_up=2, lr_decay=4),
    data=DataConfig(source="synthetic", features=32, d_in=16, active=3, buffer=64),
    tokens=12 * 32,
    batch_size=32,
    log_every=4,
    save_every=5,
)


def small(out, **changes):
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    config = dataclasses.replace(SMALL, out=str(out), **{k: v for k, v in changes.items() if k in own})
    return with_values(config, {k: v for k, v in changes.items() if k not in own})


VARIANTS = {
    "topk": {},
    "abstopk": {"activation": "abstopk"},
    "batchtopk": {"activation": "batchtopk", "dead_window": 32},
    "jumprelu": {"activation": "jumprelu", "sparsity": "l0_to_target", "target_l0": 3.0, "dead": "pre_act", "dead_window": 32},
    "jumprelu tanh": {"activation": "jumprelu", "sparsity": "l0_tanh", "coefficient": 0.01},
    "relu": {"activation": "relu", "coefficient": 0.05, "p_end": 0.5, "warm_up": 6},
    "gated": {"activation": "gated", "coefficient": 0.05},
    "matryoshka": {"activation": "batchtopk", "prefixes": (8, 24)},
    "hierarchical": {"ks": (1, 2)},
    "ghost": {"activation": "relu", "coefficient": 0.05, "dead": "ghost", "dead_window": 32},
    "auxk_normalised, fvu": {"dead": "auxk_normalised", "dead_window": 32, "error": "fvu", "unit_norm": True},
    "resample": {"dead": "resample", "dead_window": 64},
    "scaled": {"normalize": "expected_average_only_in", "b_dec": "geometric_median"},
    "layer_norm": {"normalize": "layer_norm", "dead": "none", "b_dec": "mean"},
    "micro-batches": {"micro_batch": 8},
    "k falls": {"k_first": 12, "k_steps": 6},
    "Adam, bf16": {"optimizer": "AdamW", "compute_dtype": "bfloat16"},
    "Adam": {"optimizer": "Adam", "unit_norm": True},
    "SGD": {"optimizer": "SGD"},
    "split master": {"compute_dtype": "bfloat16", "moments": "bf16"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_stopped_run_ends_with_the_same_bits(changes, tmp_path, monkeypatch):
    """Stopped by a signal after steps 2, 5 and 9 and gone on with: weights, moments, counters and log as without."""
    whole = train(small(tmp_path / "whole", **changes), quiet=True)
    parts = small(tmp_path / "parts", **changes)
    for stop in (2, 5, 9):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Member, "step", signalling(Member.step, stop))
            patch.setattr(interrupt, "ECHO", 0.0)
            train(parts, quiet=True)
        assert (tmp_path / "parts" / f"step-{stop:06d}" / "MANIFEST.json").exists()
    train(parts, quiet=True)
    assert_same(*(load_tree(tmp_path / run / "step-000012", "training") for run in ("whole", "parts")))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    moved = [not torch.equal(a, b) for a, b in zip(whole.sae.parameters(), fresh(parts).parameters(), strict=True)]
    assert any(moved)


def signalling(step, stop):
    def stepping(self, batch, number):
        step(self, batch, number)
        if number + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    return stepping


def fresh(config) -> SAE:
    return Member(config, config.data.d_in, None, torch.device("cpu")).sae


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), path
    else:
        assert a == b or (isinstance(a, float) and math.isnan(a)), path


# ── guards ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def member(**changes):
    return Member(small("unused", **changes), 16, None, torch.device("cpu"))


def weights(made):
    return [t.detach().clone() for t in made.finished().parameters()]


def some_steps(made, n=3):
    for step in range(n):
        made.step(torch.randn(32, 16), step)


KINDS = [(activation, "fused_adam") for activation in ("topk", "batchtopk", "jumprelu", "relu", "gated")] + [("topk", "Adam")]


@pytest.mark.parametrize(("activation", "optimizer"), KINDS)
@pytest.mark.parametrize(("place", "bad"), [("x", math.nan), ("target", math.inf), ("loss", -math.inf)])
def test_what_is_not_finite_never_reaches_the_weights(place, activation, bad, optimizer, monkeypatch):
    made = member(activation=activation, optimizer=optimizer)
    some_steps(made)
    before, skipped = weights(made), int(made.skipped)
    x, target = torch.randn(32, 16), torch.randn(32, 16)
    with monkeypatch.context() as patch:
        if place == "loss":
            real = Objective.__call__
            patch.setattr(Objective, "__call__", lambda *a: real(*a)._replace(loss=real(*a).loss * bad))
        else:
            {"x": x, "target": target}[place][7, 3] = bad
        made.step((x, target), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True))
    assert int(made.skipped) == skipped + 1 and made.measure(4)["sparsity/skipped_steps"] == skipped + 1
    made.step(torch.randn(32, 16), 4)
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(made), strict=True)), "and training goes on"


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_a_weight_that_is_not_finite_moves_no_other(name):
    """Whatever reads it is skipped: the loss, or a row's gradient."""
    made = member()
    some_steps(made)
    with torch.no_grad():
        made.sae.get_parameter(name)[..., 5] = math.nan
    before = weights(made)
    some_steps(made)
    for a, b in zip(before, weights(made), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        # a latent whose scores are NaN fires nowhere, and the others train on
        assert torch.equal(a[~a.isnan()], b[~a.isnan()]) or name in ("W_enc", "b_enc")


def poison(monkeypatch, factor):
    """Gradients, and not the loss, times that."""
    real = Objective.__call__

    def poisoned(*arguments):
        outcome = real(*arguments)
        outcome.loss.register_hook(lambda g: g * factor)
        return outcome

    monkeypatch.setattr(Objective, "__call__", poisoned)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("optimizer", "max_norm"), [("fused_adam", 1.0), ("fused_adam", None), ("Adam", 1.0), ("Adam", None)])
def test_a_gradient_that_is_not_finite(optimizer, max_norm, bad, monkeypatch):
    """Skips the step where a norm of all of them is taken, else the rows that it belongs to."""
    made = member(optimizer=optimizer, max_norm=max_norm)
    some_steps(made)
    before, untouched = weights(made), made.since_fired.clone()
    poison(monkeypatch, bad)
    made.step(torch.randn(32, 16), 3)
    after = weights(made)
    assert all(torch.equal(p[~q.isfinite()], q[~q.isfinite()]) for p, q in zip(before, after, strict=True))
    by_row = optimizer == "fused_adam" and max_norm is None
    assert by_row or all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert torch.equal(made.since_fired, untouched) != by_row
    found = made.measure(4)
    assert found["sparsity/skipped_steps"] == (not by_row) and (found["sparsity/skipped_rows"] > 0) == by_row


SPOILT = {
    "a spike": lambda patch, x: x * 1000,
    "a gradient": lambda patch, x: poison(patch, math.nan) or x,
    "an input": lambda patch, x: torch.full_like(x, math.nan),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("changes", [{"activation": "batchtopk"}, {"micro_batch": 8}, {"dead": "resample"}], ids=str)
def test_a_skipped_step_leaves_everything_as_it_was(changes, spoil, monkeypatch):
    made = member(spike=5.0, dead_window=32, **changes)  # and every step is one that resamples
    some_steps(made)
    before = copy.deepcopy(made.state_dict())
    made.step(spoil(monkeypatch, torch.randn(32, 16)), 3)
    after = made.state_dict()
    assert after["skipped"] == before["skipped"] + 1
    for name in ("skipped", "mean_loss", "slots"):  # the guard's own, and what was dead when the step began
        del before[name], after[name]
    assert_same(before, after)


def test_a_first_step_that_is_skipped_sets_no_threshold(monkeypatch):
    made, calm = member(activation="batchtopk"), member(activation="batchtopk")
    with monkeypatch.context() as patch:
        poison(patch, math.nan)
        made.step(torch.randn(32, 16), 0)
    assert not made.sae.activation.knows_threshold
    x = torch.randn(32, 16)
    for m in (made, calm):
        m.step(x, 1)
    assert made.sae.activation.knows_threshold
    assert torch.equal(made.sae.activation.threshold, calm.sae.activation.threshold)


@pytest.mark.parametrize(("optimizer", "max_norm"), [("fused_adam", 1.0), ("fused_adam", None), ("Adam", None)])
def test_stop_instead_of_skip(optimizer, max_norm, tmp_path, monkeypatch):
    settings = {"on_nonfinite": "stop", "optimizer": optimizer, "max_norm": max_norm}
    with pytest.raises(NonFinite, match="activations of step 0 are not finite"):
        train(small(tmp_path / "x", **settings), [torch.full((64, 16), math.nan)], quiet=True)
    poison(monkeypatch, math.nan)
    with pytest.raises(NonFinite, match="a gradient of step 0 is not finite"):
        train(small(tmp_path / "gradient", **settings), quiet=True)


def test_a_spike_stops_nothing():
    made = member(spike=5.0, on_nonfinite="stop")
    some_steps(made)
    made.step(torch.randn(32, 16) * 1000, 3)
    assert int(made.skipped) == 1


def test_a_spike_is_skipped_and_forgotten():
    calm, struck = member(spike=5.0), member(spike=5.0)
    for step in range(12):
        x = torch.randn(32, 16)
        calm.step(x, step)
        struck.step(x, step)
        if step == 6:
            before = weights(struck)
            struck.step(x * 1000, step)
            assert all(torch.equal(a, b) for a, b in zip(before, weights(struck), strict=True))
    assert int(struck.skipped) == 1 and int(calm.skipped) == 0
    assert float(struck.mean_loss) == pytest.approx(float(calm.mean_loss), rel=0.05)


def test_a_loss_that_stays_high_is_no_spike_for_ever():
    made = member(spike=3.0)
    for step in range(150):
        made.step(torch.randn(32, 16) * (1 if step < 5 else 4), step)
    assert 0 < int(made.skipped) < 120


def test_memory_that_is_not_there_is_answered_with_numbers(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Member, "step", full)
    with pytest.raises(OutOfMemory, match="32 rows .*20.00 GiB.*micro_batch=16"):
        train(small(tmp_path / "run"), quiet=True)


# ── shapes of data ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_micro_batches_add_up():
    whole, parts = member(), member(micro_batch=8)
    for step in range(3):
        x = torch.randn(32, 16)
        whole.step(x, step)
        parts.step(x, step)
    for a, b in zip(whole.sae.parameters(), parts.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoder(skip, tmp_path):
    A = torch.randn(16, 5) / 4
    pairs = [(x, x @ A) for x in torch.randn(40, 64, 16)]
    run = train(small(tmp_path / "run", skip=skip, tokens=60 * 32), pairs, quiet=True)
    assert run.sae.d_out == 5 and not run.sae.apply_b_dec_to_input and (run.sae.W_skip is not None) == skip
    assert run.evaluation.fvu < (0.3 if skip else 0.9)


@pytest.mark.parametrize("activation", ["topk", "gated", "batchtopk"])
def test_what_saelens_has_no_file_for_is_written_in_our_own(activation, tmp_path):
    pairs = [(x, x[:, :5]) for x in torch.randn(40, 64, 16)]
    run = train(small(tmp_path / "run", activation=activation), pairs, quiet=True)
    again = load(tmp_path / "run" / "final")
    for a, b in zip(run.sae.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) or activation == "batchtopk"  # as a jumprelu its threshold is written per latent, and as k
    x = torch.randn(9, 16)
    torch.testing.assert_close(again(x), run.sae(x))


def test_a_finished_sae_trains_on_with_any_optimizer(tmp_path):
    sae = train(small(tmp_path / "run"), quiet=True).sae
    sae(torch.randn(4, 16)).sum().backward()
    assert sae.W_enc.grad is not None and sae.W_dec.grad is not None


def test_b_dec_is_of_the_data_as_they_are(tmp_path):
    """Also where training sees them scaled: one step at a learning rate of zero leaves b_dec as it was taken."""
    x = torch.randn(8, 64, 16) * 100 + 700
    settings = {"normalize": "expected_average_only_in", "b_dec": "mean", "lr": 0.0}
    sae = train(small(tmp_path / "run", **settings), list(x), quiet=True).sae
    torch.testing.assert_close(sae.b_dec.data, x.flatten(0, 1).mean(0), rtol=0.2, atol=0)


def test_a_sweep_reads_values_as_their_setting_does():
    members = TrainConfig(sweep=("dead=none,auxk", "normalize=none,layer_norm", "lr=none,1e-3")).members()
    found = [(c.loss.dead, c.sae.normalize, c.optim.lr) for c in members.values()]
    assert found == [("none", "none", None), ("auxk", "layer_norm", 1e-3)]
    with pytest.raises(ValueError, match="sweep=d_in"):
        TrainConfig(sweep=("d_in=1,2",))


def test_crosscoder_is_an_sae_of_layers_side_by_side(tmp_path):
    layers = [torch.randn(64, 3, 8) for _ in range(20)]
    run = train(small(tmp_path / "run"), layers, quiet=True)
    assert (run.sae.d_in, run.sae.d_out) == (24, 24)


def test_a_sweep_trains_each_as_alone(tmp_path):
    """Two k, two hooks, from one stream of batches; and it resumes as one."""
    batches = [{"a": torch.randn(64, 16), "b": torch.randn(64, 16)} for _ in range(20)]
    both = train(small(tmp_path / "both", sweep=("k=2,4", "hook=a,b")), batches, quiet=True)
    assert list(both.saes) == ["k=2,hook=a", "k=4,hook=b"]
    for k, hook in ((2, "a"), (4, "b")):
        alone = train(small(tmp_path / hook, k=k, hook=hook), [{"a": b[hook], "b": b[hook]} for b in batches], quiet=True)
        for p, q in zip(alone.sae.parameters(), both.saes[f"k={k},hook={hook}"].parameters(), strict=True):
            assert torch.equal(p, q)
        assert (tmp_path / "both" / "final" / f"k={k},hook={hook}" / "sae_weights.safetensors").exists()
    assert {line["sae"] for line in lines(tmp_path / "both")} == set(both.saes)
    with pytest.raises(ValueError, match="has 2 saes"):
        _ = both.sae


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    a, b, c = (train(small(tmp_path / str(i), seed=seed), quiet=True).sae for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)


def test_nobody_elses_random_numbers_are_touched(tmp_path):
    before = torch.get_rng_state()
    train(small(tmp_path / "run"), quiet=True)
    assert torch.equal(before, torch.get_rng_state())


def test_data_that_end_too_early(tmp_path):
    with pytest.raises(DataEnded, match="ended after 64 of 384 tokens"):
        train(small(tmp_path / "run"), iter([torch.randn(64, 16)]), quiet=True)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(small(tmp_path / "run"), quiet=True)
    with pytest.raises(ValueError, match="another k: 3, not 4"):
        train(small(tmp_path / "run", k=4), quiet=True)
    with pytest.raises(FileExistsError, match="resume=auto"):
        train(small(tmp_path / "run", resume="never"), quiet=True)


def test_a_source_that_cannot_go_back_says_so(tmp_path, monkeypatch):
    not_resumable = pytest.warns(UserWarning, match="place in the data is not")
    with monkeypatch.context() as patch, pytest.raises(Interrupted), not_resumable:
        patch.setattr(Member, "step", signalling(Member.step, 2))
        train(small(tmp_path / "run"), iter(torch.randn(40, 64, 16)), quiet=True)
    with pytest.raises(NotResumable):
        train(small(tmp_path / "run"), iter(torch.randn(40, 64, 16)), quiet=True)


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(small(tmp_path / "run", save_every=2), quiet=True)
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-000010", "step-000012"]


def test_a_logger_that_fails_is_dropped(tmp_path, monkeypatch):
    def sink(config, run, step):
        def send(step, metrics):
            raise OSError("no network")

        return send, lambda: None

    monkeypatch.setitem(SINKS, "wandb", sink)
    with pytest.warns(UserWarning, match="wandb gets no more metrics.*no network"):
        train(small(tmp_path / "run", loggers=("wandb",)), quiet=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [4, 8, 12]


def test_a_run_that_goes_on_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    """One that begins anew in the folder, having saved nothing, is another."""
    made, sent = [], []

    def init(**settings):
        made.append((settings["id"], settings["resume"]))
        log = lambda metrics, step: sent.append(step)  # noqa: E731
        return SimpleNamespace(id=settings["id"] or f"run-{len(made)}", log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = small(tmp_path / "run", loggers=("wandb",))
    for stop, error in ((2, RuntimeError), (2, Interrupted), (6, Interrupted)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(Member, "step", signalling(Member.step, stop) if error is Interrupted else failing)
            train(config, quiet=True)
    train(config, quiet=True)
    assert made == [(None, "allow"), (None, "allow"), ("run-2", "allow"), ("run-2", "allow")] and sent == [4, 8, 12]


def failing(*_):
    raise RuntimeError


def test_resampled_latents_point_at_what_was_missed():
    """Weights in place, moments gone, b_enc zero, only for the dead."""
    made = member(dead="resample", dead_window=1)
    some_steps(made)
    dead = torch.tensor([3, 60])
    x = torch.randn(32, 16)
    sse = torch.zeros(32)
    sse[9] = 5.0
    before = weights(made)
    with made.stepper.edit() as sae:
        resample(sae, dead, x, x, sse, torch.Generator().manual_seed(0))
    made.stepper.forget(dead)
    direction = torch.nn.functional.normalize(x[9] - made.sae.b_dec, dim=0)
    for W in (made.sae.W_dec[dead], made.sae.W_enc[:, dead].T):
        torch.testing.assert_close(torch.nn.functional.normalize(W, dim=1), direction.expand(2, -1))
    state = made.stepper.optimizer.state
    for p, rows in ((made.sae.W_dec, lambda t: t), (made.sae.W_enc, lambda t: t.T), (made.sae.b_enc, lambda t: t)):
        assert not rows(state[p]["exp_avg"])[dead].any() and rows(state[p]["exp_avg"]).any()
    living = torch.ones(64, dtype=torch.bool)
    living[dead] = False
    for a, b in zip(before, weights(made), strict=True):
        if a.dim() == 2:
            rows = (lambda t: t.T) if a.shape == (16, 64) else (lambda t: t)
            assert torch.equal(rows(a)[living], rows(b)[living]) and not torch.equal(rows(a)[dead], rows(b)[dead])
