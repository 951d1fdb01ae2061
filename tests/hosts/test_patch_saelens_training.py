"""SAELens training, patched, against SAELens itself from the same weights."""

import copy
from itertools import count

import pytest
import sae_lens
import torch
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from saelens_modules import TRAINING, D, F, K, Largest, build, near, tolerance

from fastsae import functional, hosts
from fastsae.hosts.sae_lens import training
from fastsae.hosts.sae_lens.lazy import LazyTensor
from fastsae.hosts.sae_lens.trainer import LayoutAwareAdam
from fastsae.kernels import scores

N = 40


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """All sizes take the sparse path. Which steps ours made: "sparse" or "dense"."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1.0)
    made = []
    for name in ("sparse", "dense"):
        real = getattr(training, f"_{name}")
        monkeypatch.setattr(training, f"_{name}", lambda *a, real=real, name=name: made.append(name) or real(*a))
    return made


def pair(which, dtype=torch.float32, **config):
    name, own = TRAINING[which]
    stock = build(name, dtype, **(copy.deepcopy(own) | config))
    return stock, hosts.accelerate(copy.deepcopy(stock))


def step_input(x, dead, width=F):
    mask = None
    if dead is not None:
        mask = torch.zeros(width, dtype=torch.bool)
        mask[torch.arange(dead) * 3 % width] = True
    return TrainStepInput(
        sae_in=x, coefficients={"l0": 0.3, "l1": 0.3}, dead_neuron_mask=mask, n_training_steps=0, is_logging_step=False
    )


def outcome(sae, given):
    """All that a step returns, and its gradients."""
    sae.zero_grad()
    output = sae.training_forward_pass(step_input=given)
    firing = output.feature_acts.bool().float()
    counts = {"fired": firing.sum(-2).bool(), "frequency": firing.sum(0), "l0": firing.sum(-1).to_dense()}
    dense = {"acts": output.feature_acts * 1, "pre": output.hidden_pre * 1}
    output.loss.backward()
    return output, {
        "loss": output.loss, "sae_out": output.sae_out, **output.losses, **counts, **dense,
        **{name: torch.as_tensor(value) for name, value in output.metrics.items()},
        **{name: p.grad for name, p in sae.named_parameters()}, **{f"buffer {n}": b for n, b in sae.named_buffers()},
    }  # fmt: skip


def assert_same_step(stock, fast, given, dtype):
    (theirs, expected), (ours, got) = outcome(stock, given), outcome(fast, given)
    assert list(theirs.losses) == list(ours.losses) and list(theirs.metrics) == list(ours.metrics)
    assert list(expected) == list(got) and type(ours) is type(theirs) and ours.sae_in is given.sae_in
    for name, value in expected.items():
        limit = tolerance(torch.float32 if name == "threshold" else dtype)  # SAELens keeps that one in fp32
        near(got[name], value, limit, name)
    return ours


@pytest.mark.parametrize("dead", [None, 0, 4, 30])  # fewer and more than D / 2
@pytest.mark.parametrize("which", TRAINING)
def test_loss_parts_gradients_and_bookkeeping(which, dead, dtype, steps):
    stock, fast = pair(which, dtype)
    ours = assert_same_step(stock, fast, step_input(torch.randn(N, D, dtype=dtype), dead), dtype)
    assert steps == ["sparse"] and isinstance(ours.feature_acts, LazyTensor)


@pytest.mark.parametrize("which", [w for w in TRAINING if w.split()[0] in ("standard", "gated", "jumprelu")])
def test_chunks_where_the_code_is_not_sparse(which, dtype, steps, monkeypatch):
    """At the start of a run half of all latents fire."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1e-9)
    monkeypatch.setattr(functional, "BLOCK_ELEMENTS", 700)  # 17 latents
    monkeypatch.setattr(training, "BLOCK_ELEMENTS", 700)
    stock, fast = pair(which, dtype)
    assert_same_step(stock, fast, step_input(torch.randn(N, D, dtype=dtype), 4), dtype)
    assert steps == ["dense"]
    monkeypatch.setattr(training, "BLOCK_ELEMENTS", N * F)  # small enough for SAELens itself
    assert_same_step(stock, fast, step_input(torch.randn(N, D, dtype=dtype), 4), dtype)
    assert steps == ["dense"]


@pytest.mark.parametrize("which", ["topk", "matryoshka", "jumprelu step", "standard", "gated"])
def test_autocast(which, steps):
    """Types as in SAELens, and no further from fp32 than SAELens is."""
    stock, fast = pair(which)
    given = step_input(torch.randn(1000, D), 30)
    _, exact = outcome(stock, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, theirs = outcome(stock, given)
        ours, got = outcome(fast, given)
    assert steps == ["sparse"]
    assert {n: v.dtype for n, v in theirs.items() if v is not None} == {n: v.dtype for n, v in got.items() if v is not None}
    for name in ("loss", "sae_out", "W_dec", "W_enc", "b_dec"):
        worst = (theirs[name] - exact[name]).abs().mean()
        assert (got[name] - exact[name]).abs().mean() <= 2 * worst + 2**-9 * exact[name].abs().mean(), name


@pytest.mark.parametrize("which", TRAINING)
def test_without_gradients(which):
    """What an evaluation during training asks."""
    stock, fast = pair(which, torch.float64)
    given = step_input(torch.randn(N, D, dtype=torch.float64), 4)
    with torch.no_grad():
        theirs, ours = (sae.training_forward_pass(step_input=given) for sae in (stock, fast))
    near(ours.loss, theirs.loss, 1e-9)
    near(ours.feature_acts.bool().float().sum(0), theirs.feature_acts.bool().float().sum(0), 0)


@pytest.mark.parametrize("which", ["topk", "jumprelu step"])
def test_whoever_listens_gets_the_dense_step(which, steps):
    stock, fast = pair(which, torch.float64)
    given = step_input(torch.randn(N, D, dtype=torch.float64), 4)
    for hook in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"):
        seen = []
        for sae in (stock, fast):
            with sae.hooks([(hook, lambda t, hook, seen=seen: seen.append(t))]):
                sae.training_forward_pass(step_input=given)
        near(seen[1], seen[0], 1e-9, hook)
    assert not steps


def test_run_time_norms_are_left_to_saelens(steps):
    for normalize in ("layer_norm", "constant_norm_rescale"):
        stock, fast = pair("topk", torch.float64, normalize_activations=normalize)
        x = torch.randn(N, D, dtype=torch.float64)
        assert_same_step(stock, fast, step_input(x, 0), torch.float64)
        for sae in (stock, fast):
            with pytest.raises(ValueError, match="does not support activation normalization"):
                sae.training_forward_pass(step_input=step_input(x, 4))
    assert not steps


def test_another_loss_in_a_subclass_is_used(patched, steps):
    class Mine(sae_lens.TopKTrainingSAE):
        def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
            return {"mine": feature_acts.sum()}

    sae = Mine(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    output = sae.training_forward_pass(step_input=step_input(torch.randn(N, D), 4))
    assert list(output.losses) == ["mse_loss", "mine"] and not steps


# ── the activations of a step ────────────────────────────────────────────────────────────────────────────────────────────


def test_activations_are_a_tensor_to_everybody():
    stock, fast = pair("topk", torch.float64)
    given = step_input(torch.randn(N, D, dtype=torch.float64), 0)
    theirs, ours = (sae.training_forward_pass(step_input=given) for sae in (stock, fast))
    acts, lazy = theirs.feature_acts, ours.feature_acts
    assert isinstance(lazy, torch.Tensor) and not lazy.is_sparse and lazy.made is None
    assert (lazy.shape, lazy.dtype, lazy.device, lazy.ndim, len(lazy)) == (acts.shape, acts.dtype, acts.device, 2, N)
    assert lazy.made is None
    near((lazy > 0).float().sum(-1), (acts > 0).float().sum(-1), 0)
    near(lazy.sum(0), acts.sum(0), 1e-12)
    near(torch.stack([lazy, lazy])[1, :, 3], acts[:, 3], 1e-12)
    near(lazy.detach().cpu() @ fast.W_dec, acts @ stock.W_dec, 1e-12)
    lazy.sum().backward(retain_graph=True)  # somebody's own penalty
    acts.sum().backward(retain_graph=True)
    near(fast.W_enc.grad, stock.W_enc.grad, 1e-9)
    with torch.no_grad():
        lazy[:, 0] = 7.0  # stays
    assert (lazy[:, 0] == 7).all() and float(lazy.bool().float().sum(0)[0]) == N
    assert lazy.is_sparse is False and "tensor" in repr(lazy)


def test_a_promise_does_not_outlive_its_weights(monkeypatch):
    _, fast = pair("topk")
    output = fast.training_forward_pass(step_input=step_input(torch.randn(N, D), 0))
    acts = output.feature_acts * 1
    with torch.no_grad():
        fast.W_enc.mul_(2)
    assert torch.equal(output.feature_acts * 1, acts)
    with pytest.raises(RuntimeError, match="weights changed since this step"):
        output.hidden_pre.sum()


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("which", "start"),
    [(which, "sparse") for which in ("topk", "batchtopk", "matryoshka", "jumprelu step")] + [("jumprelu step", "dense")],
)
def test_no_step_holds_the_code(which, start, patched, monkeypatch, steps):
    """A whole step of the trainer, with dead latents. JumpReLU starts with half of all latents firing."""
    monkeypatch.setattr(functional, "SPARSE_BELOW", 1 / 256)
    for module in (functional, scores, training):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1 << 20)
    rows, width, d_in = 512, 16384, 24
    name, config = TRAINING[which]
    config = config | ({"matryoshka_widths": [4096, width]} if which == "matryoshka" else {})
    sae = build(name, d_in=d_in, d_sae=width, noise=0.0, **config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn_like(sae.W_enc) / d_in**0.5)
        if "jumprelu" in which:
            sae.threshold.fill_(3.1 if start == "sparse" else 0.0)
    train = trainer(sae, batch=rows)
    train.n_forward_passes_since_fired[::40] = 10**6
    with Largest() as seen:
        output = train.step(torch.randn(rows, d_in))
    assert steps == [start]
    assert width * d_in <= seen.elements <= rows * width // 4, seen.by
    assert output.feature_acts.made is None and 0 < float(train.act_freq_scores.sum()) < rows * width


# ── the trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def trainer(sae, batch=N, **options):
    defaults = {
        "n_checkpoints": 0, "checkpoint_path": None, "save_final_checkpoint": False, "total_training_samples": 10 * batch,
        "device": "cpu", "autocast": False, "lr": 3e-2, "lr_end": 3e-3, "lr_scheduler_name": "cosineannealing",
        "lr_warm_up_steps": 2, "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_decay_steps": 0, "n_restart_cycles": 1,
        "train_batch_size_samples": batch, "dead_feature_window": 2, "feature_sampling_window": 100,
        "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    data = (torch.randn(batch, sae.cfg.d_in) for _ in count())
    return SAETrainer(SAETrainerConfig(**(defaults | options)), sae, data_provider=data)


def assert_same_state(got, expected, limit):
    for (name, p), q in zip(got.sae.named_parameters(), expected.sae.parameters(), strict=True):
        near(p, q, limit, name)
        for key, moment in expected.optimizer.state[q].items():
            near(got.optimizer.state[p][key], moment, limit, (name, key))
    near(got.act_freq_scores, expected.act_freq_scores, 0)
    near(got.n_forward_passes_since_fired, expected.n_forward_passes_since_fired, 0)
    assert got.n_frac_active_samples == expected.n_frac_active_samples
    assert got.lr_scheduler.get_last_lr() == expected.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("which", TRAINING)
def test_trainer_step_by_step(which, dtype, steps, tmp_path):
    """Each step starts from SAELens' own weights and optimizer, brought over in its trainer_state.pt."""
    name, config = TRAINING[which]
    stock = trainer(build(name, dtype, **copy.deepcopy(config)))
    assert type(stock.optimizer) is torch.optim.Adam
    hosts.patch("sae_lens")
    try:
        fast = trainer(copy.deepcopy(stock.sae))
    finally:
        hosts.unpatch("sae_lens")
    assert type(fast.optimizer) is LayoutAwareAdam
    limit = tolerance(torch.float32 if "jumprelu" in which else dtype)
    for _ in range(4):
        stock.save_trainer_state(tmp_path)
        fast.load_trainer_state(tmp_path)
        fast.sae.load_state_dict(stock.sae.state_dict())
        x = 3 * torch.randn(N, D, dtype=dtype)
        theirs = stock.step(x)
        hosts.patch("sae_lens")
        try:
            ours = fast.step(x)
        finally:
            hosts.unpatch("sae_lens")
        near(ours.loss, theirs.loss, limit)
        assert_same_state(fast, stock, 100 * limit if dtype == torch.float32 else 10 * limit)
        stock.n_training_steps += 1
        logs = [t.build_train_step_log_dict(o, 0) for t, o in ((stock, theirs), (fast, ours))]
        assert list(logs[0]) == list(logs[1])
        for key, value in logs[0].items():
            assert logs[1][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert steps == ["sparse"] * 4 and fast.dead_neurons.any() == stock.dead_neurons.any()


def test_an_accelerated_module_trains_in_saelens_own_trainer(steps):
    """Its bookkeeping asks the activations how often they fired, and gets the same answer."""
    runs = [trainer(sae) for sae in pair("topk", torch.float64)]
    x = torch.randn(N, D, dtype=torch.float64)
    for run in runs:
        assert type(run.optimizer) is torch.optim.Adam
        run.step(x)
    assert_same_state(runs[1], runs[0], 1e-9)
    assert steps == ["sparse"]


def test_trainer_state_loads_both_ways(tmp_path):
    sae = build("TopKTrainingSAE", k=K)
    runs = {}
    for kind in ("stock", "fast"):
        if kind == "fast":
            hosts.patch("sae_lens")
        runs[kind] = trainer(copy.deepcopy(sae))
        torch.manual_seed(1)
        runs[kind].step(torch.randn(N, D))
        runs[kind].save_trainer_state(tmp_path / kind)
        hosts.unpatch("sae_lens")
    states = {kind: torch.load(tmp_path / kind / "trainer_state.pt", weights_only=True) for kind in runs}
    assert states["stock"].keys() == states["fast"].keys()
    a, b = (states[kind]["optimizer"] for kind in ("stock", "fast"))
    assert a["param_groups"] == b["param_groups"] and list(a["state"]) == list(b["state"])
    for index, state in a["state"].items():
        assert list(state) == list(b["state"][index])
        for key in state:
            near(b["state"][index][key], state[key], 1e-4, (index, key))
    for kind, other in (("stock", "fast"), ("fast", "stock")):
        runs[kind].load_trainer_state(tmp_path / other)
        runs[kind].step(torch.randn(N, D))


def test_fused_adam_only_where_layouts_agree(patched):
    """A transposed parameter, whose moments came from elsewhere: what a fused step would silently get wrong."""
    sae = build("TopKTrainingSAE", torch.float64, k=K)
    twin = copy.deepcopy(sae)
    twin.W_enc = torch.nn.Parameter(twin.W_enc.detach().T.contiguous().T)
    runs = [trainer(s) for s in (sae, twin)]
    for _ in range(3):
        x = torch.randn(N, D, dtype=torch.float64)
        for run in runs:
            run.step(x)
        near(twin.W_enc, sae.W_enc, 1e-9)
        assert all(run.optimizer.param_groups[0]["fused"] for run in runs)
        runs[1].optimizer.load_state_dict(copy.deepcopy(runs[0].optimizer.state_dict()))
        assert runs[1].optimizer.state[twin.W_enc]["exp_avg"].stride() == twin.W_enc.stride() == (1, D)
    runs[0].optimizer.state[sae.W_enc]["exp_avg"] = runs[1].optimizer.state[twin.W_enc]["exp_avg"].clone()
    for run in runs:
        run.step(x)
    assert not runs[0].optimizer.param_groups[0]["fused"]
    near(twin.W_enc, sae.W_enc, 1e-9)


def test_fit_folds_the_normalisation_and_saves(patched, tmp_path, steps):
    sae = build("BatchTopKTrainingSAE", k=K, normalize_activations="expected_average_only_in")
    saves = {"checkpoint_path": str(tmp_path), "save_final_checkpoint": True, "n_checkpoints": 1}
    run = trainer(sae, n_batches_for_norm_estimate=3, **saves)
    trained = run.fit()
    assert steps == ["sparse"] * 10 and trained.cfg.normalize_activations == "none" and trained.cfg.metadata.l0 > 0
    folder = tmp_path / f"final_{10 * N}"
    again = sae_lens.TrainingSAE.load_from_disk(folder)
    assert type(again) is sae_lens.BatchTopKTrainingSAE
    trained.save_inference_model(tmp_path / "inference")
    final = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert type(final) is sae_lens.JumpReLUSAE and (final.threshold == trained.topk_threshold.float()).all()
