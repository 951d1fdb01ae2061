"""fastsae.patch("sparsify") beside the library itself: values, gradients, its trainer, and what the host gets wrong."""

import copy
import os
import pickle
from contextlib import contextmanager

import pytest
import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer, sparse_coder
from sparsify.fused_encoder import EncoderOutput
from test_memory import Largest

from fastsae import hosts

N, D, F, K = 40, 12, 96, 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@contextmanager
def patched():
    hosts.patch("sparsify")
    try:
        yield
    finally:
        hosts.unpatch("sparsify")


def near(a, b, dtype, what=""):
    assert a.shape == b.shape, what
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
    assert a.equal(b) or error <= TOLERANCE[dtype], f"{what}: {error:.2g} relative"


def coder(dtype=torch.float32, **config) -> SparseCoder:
    made = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **config), dtype=dtype)
    with torch.no_grad():
        for p in made.parameters():
            p += torch.randn_like(p) * 0.3
    return made


def dense(out) -> torch.Tensor:
    """What delphi makes of an output: a matrix of activations."""
    acts, indices = (out.top_acts, out.top_indices) if hasattr(out, "top_acts") else (out.latent_acts, out.latent_indices)
    return acts.new_zeros(*acts.shape[:-1], F).scatter_(-1, indices, acts)


def gradients(made, loss, x=None):
    made.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None} | ({} if x is None else {"x": x.grad})


def dead_mask(count):
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F)[:count]] = True
    return mask


# ── forward, encode, decode ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["patch", "accelerate"])
@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_forward_and_every_gradient_are_the_hosts(activation, transcode, skip, x_learns, way, dtype):
    made = coder(dtype, activation=activation, transcode=transcode, skip_connection=skip)
    x = torch.randn(N, D, dtype=dtype, requires_grad=x_learns)
    y = torch.randn(N, D, dtype=dtype) if transcode else None
    direction = torch.randn(N, D, dtype=dtype)

    def run():
        mine = x.detach().requires_grad_(x_learns)
        out = made(mine, y)
        loss = out.fvu + (out.sae_out * direction).sum() + out.latent_acts.square().sum()  # as end-to-end training would
        return out, gradients(made, loss, mine if x_learns else None)

    theirs, its_gradients = run()
    with Largest() as seen:
        if way == "patch":
            with patched():
                ours, our_gradients = run()
        else:
            hosts.accelerate(made)
            ours, our_gradients = run()
    assert {"encode_entries", "decode_loss_forward"} <= seen.operators
    assert type(ours) is type(theirs) and ours.latent_indices.dtype == torch.int64
    for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        near(getattr(ours, name), getattr(theirs, name), dtype, name)
    near(dense(ours), dense(theirs), dtype, "code")
    assert our_gradients.keys() == its_gradients.keys()
    for name, gradient in our_gradients.items():
        near(gradient, its_gradients[name], dtype, name)


@pytest.mark.parametrize("chunked", [False, True])
def test_total_variance_of_the_whole_batch_scales_a_chunk(chunked, dtype):
    made, x = coder(dtype), torch.randn(N, D, dtype=dtype)
    options = {"total_variance": (x - x.mean(0)).square().sum()} if chunked else {}
    theirs = made(x[:10], **options)
    with patched():
        near(made(x[:10], **options).fvu, theirs.fvu, dtype)


@pytest.mark.parametrize("dead", [4, 30])  # fewer and more than D / 2
def test_auxk_and_multi_topk_train_the_encoder(dead, dtype):
    """WRONG in theirs: the fused encoder ignores the gradient of pre_acts, so neither term reaches it. Values and the
    decoder's gradients are equal; the encoder's are those of the definition."""
    made, mask, x = coder(dtype, multi_topk=True), dead_mask(dead), torch.randn(N, D, dtype=dtype)
    theirs = made(x, dead_mask=mask)
    its_aux, its_multi = (gradients(made, made(x, dead_mask=mask)._asdict()[n]) for n in ("auxk_loss", "multi_topk_fvu"))
    assert not its_aux["encoder.weight"].any() and not its_multi["encoder.weight"].any()

    def by_definition():
        pre = torch.relu((x - made.b_dec) @ made.encoder.weight.T + made.encoder.bias)

        def decoded(pre, k):
            best = pre.topk(k)
            return torch.zeros_like(pre).scatter(1, best.indices, best.values)

        variance = (x - x.mean(0)).square().sum()
        e = x - decoded(pre, K) @ made.W_dec - made.b_dec
        k = min(D // 2, dead)
        e_hat = decoded(pre[:, mask], k) @ made.W_dec[mask]
        aux = min(dead / (D // 2), 1) * (e_hat - e.detach()).square().sum() / variance
        return aux, (decoded(pre, 4 * K) @ made.W_dec + made.b_dec - x).square().sum() / variance

    aux, multi = by_definition()
    near(aux.detach(), theirs.auxk_loss.detach(), dtype, "the definition")
    expected = gradients(made, aux), gradients(made, multi)
    with patched():
        ours = made(x, dead_mask=mask)
        got = tuple(gradients(made, made(x, dead_mask=mask)._asdict()[n]) for n in ("auxk_loss", "multi_topk_fvu"))
    for name in ("fvu", "auxk_loss", "multi_topk_fvu", "sae_out"):
        near(getattr(ours, name), getattr(theirs, name), dtype, name)
    near(dense(ours), dense(theirs), dtype, "the 4k")
    for mine, definition, its in zip(got, expected, (its_aux, its_multi), strict=True):
        near(mine["W_dec"], its["W_dec"], dtype, "W_dec")
        assert mine["encoder.weight"].any()
        for name, gradient in definition.items():
            near(mine[name], gradient, dtype, name)


def test_a_latent_that_only_fills_a_row_up_to_k_does_not_learn():
    """WRONG in theirs: which of the zeros top-k takes is its whim, and their backward pass leaves the relu out.
    Kept: the pick is among the indices, so their trainer counts it as fired."""
    made, x = coder(), torch.randn(N, D)
    made.encoder.bias.data.fill_(-100.0)  # nothing is positive: every pick is zero
    its_gradients = gradients(made, made(x).fvu)
    with patched():
        out = made(x)
        our_gradients = gradients(made, out.fvu)
    assert not out.latent_acts.any() and out.latent_indices.shape == (N, K)
    assert its_gradients["encoder.weight"].any() and not our_gradients["encoder.weight"].any()
    near(our_gradients["b_dec"], -2 * (x - made.b_dec).sum(0) / (x - x.mean(0)).square().sum(), torch.float32)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_multi_topk_leaves_the_skip_term_out(activation, dtype):
    """WRONG in theirs, and kept: the second decoding adds no skip term, and is what forward returns."""
    made, x = coder(dtype, multi_topk=True, skip_connection=True, activation=activation), torch.randn(N, D, dtype=dtype)
    theirs = made(x)
    with patched():
        ours = made(x)
    for name in ("fvu", "multi_topk_fvu", "sae_out"):
        near(getattr(ours, name), getattr(theirs, name), dtype, name)
    near(ours.sae_out, made.decode(ours.latent_acts, ours.latent_indices), dtype, "without x W_skip")


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_encode_is_the_hosts_output_and_pre_acts_come_when_read(activation, dtype):
    made, x = coder(dtype, activation=activation), torch.randn(N, D, dtype=dtype)
    theirs = made.encode(x)
    with patched():
        ours = made.encode(x)
    assert isinstance(ours, EncoderOutput) and len(ours) == 3
    near(dense(ours), dense(theirs), dtype, "code")
    acts, indices, pre = ours
    assert acts is ours[0] and indices is ours[-2] and pre is ours.pre_acts
    assert pre is ours[2] is ours[1:][1] is ours._asdict()["pre_acts"]
    near(pre, theirs.pre_acts, dtype, "pre_acts")
    with patched(), torch.no_grad():
        copied = pickle.loads(pickle.dumps(made.encode(x)))  # noqa: S301
    assert type(copied) is EncoderOutput and copied.pre_acts.equal(pre)
    assert ours._replace(top_indices=indices + 1).pre_acts is pre
    grads = gradients(made, pre.square().sum())
    assert grads["encoder.weight"].any()


def test_pre_acts_are_not_made_unless_read():
    made = SparseCoder(16, SparseCoderConfig(num_latents=8192, k=K))
    x, limit = torch.randn(2048, 16), 2048 * 8192 // 4
    with patched(), pytest.MonkeyPatch.context() as patch:
        from fastsae.kernels import scores

        patch.setattr(scores, "BLOCK_ELEMENTS", limit)
        with Largest() as seen:
            out = made(x, dead_mask=torch.arange(8192) < 90)
            (out.fvu + out.auxk_loss / 32).backward()
            code = made.encode(x)
            made.decode(code.top_acts, code.top_indices)
    assert 8192 * 16 <= seen.elements <= limit, f"{seen.by} made {seen.elements}"


def test_what_delphi_does_with_an_output():
    """It flattens, encodes, scatters to a matrix and looks for what is not zero."""
    made, tokens = coder(), torch.randn(3, 7, D)

    def latents():
        out = made.encode(tokens.flatten(0, 1))
        buffer = torch.zeros(21, made.num_latents, dtype=out.top_acts.dtype)
        found = buffer.scatter_(-1, out.top_indices, out.top_acts.to(buffer.dtype)).reshape(3, 7, -1)
        return found, torch.nonzero(found.abs() > 1e-5)

    found, where = latents()
    with patched():
        ours, our_where = latents()
    near(ours, found, torch.float32)
    assert our_where.equal(where) and len(where) > 21


def test_leading_dimensions_are_kept_by_encode_and_decode(dtype):
    """In theirs encode has no backward pass for them and decode refuses them."""
    made, x = coder(dtype), torch.randn(3, 7, D, dtype=dtype)
    with patched():
        out, flat = made.encode(x), made.encode(x.flatten(0, 1))
        assert out.top_acts.equal(flat.top_acts.view(3, 7, K)) and out.top_indices.equal(flat.top_indices.view(3, 7, K))
        y = made.decode(out.top_acts, out.top_indices)
        y.sum().backward()
    near(y, made.decode(flat.top_acts, flat.top_indices).view(3, 7, D), dtype)


def test_decode_takes_pairs_in_any_order_and_twice(dtype):
    made = coder(dtype)
    acts, indices = torch.randn(N, K, dtype=dtype, requires_grad=True), torch.randint(F, (N, K))
    direction = torch.randn(N, D, dtype=dtype)

    def run():
        acts.grad = None
        y = made.decode(acts, indices)
        return y.detach(), {**gradients(made, (y * direction).sum()), "acts": acts.grad.clone()}

    expected, its_gradients = run()
    with patched():
        got, our_gradients = run()
    near(got, expected, dtype)
    assert (indices.sort().values.diff() == 0).any()
    for name, gradient in our_gradients.items():
        near(gradient, its_gradients[name], dtype, name)


def test_a_cpu_needs_no_triton(monkeypatch):
    """Theirs picks the Triton decoder wherever Triton is installed, and Triton has no CPU."""

    def triton_decode(*_):
        raise RuntimeError("0 active drivers")

    made, x = coder(multi_topk=True), torch.randn(N, D)
    monkeypatch.setattr(sparse_coder, "decoder_impl", triton_decode)
    with pytest.raises(RuntimeError, match="drivers"):
        made(x)
    with patched():
        out = made(x, dead_mask=dead_mask(9))
        (out.fvu + out.auxk_loss + out.multi_topk_fvu).backward()
    assert all(p.grad.any() for p in made.parameters())


# ── the decoder's norm, files, what stays ────────────────────────────────────────────────────────────────────────────────


def test_the_gradient_along_a_row_goes_and_rows_have_unit_norm(dtype):
    made, x = coder(dtype), torch.randn(N, D, dtype=dtype)
    made.set_decoder_norm_to_unit_norm()
    made(x).fvu.backward()
    before = made.W_dec.grad.clone()
    made.remove_gradient_parallel_to_decoder_directions()
    expected = made.W_dec.grad.clone()
    with patched():
        made.W_dec.grad = before
        made.remove_gradient_parallel_to_decoder_directions()
        assert made.W_dec.grad is before
        near(before, expected, dtype)
        made.W_dec.data *= 3
        made.set_decoder_norm_to_unit_norm()
    near(made.W_dec.norm(dim=1), torch.ones(F, dtype=dtype), dtype)


@pytest.mark.parametrize("decoder", [True, False])
def test_files_go_through_the_host(decoder, tmp_path):
    made, x = coder(skip_connection=True), torch.randn(N, D)
    with patched():
        made.save_to_disk(tmp_path / "layers.3")
        loaded = SparseCoder.load_from_disk(tmp_path / "layers.3", decoder=decoder)
        many = SparseCoder.load_many(str(tmp_path), local=True, decoder=decoder)
        assert many.keys() == {"layers.3"}
        near(dense(loaded.encode(x)), dense(made.encode(x)), torch.float32)
        if decoder:
            assert loaded(x).sae_out.equal(made(x).sae_out)
        else:
            with pytest.raises(AssertionError, match="Decoder weight"):
                loaded(x)


def test_unpatch_and_restore_leave_the_class_as_it_was():
    before, made = dict(vars(SparseCoder)), coder()
    with patched():
        assert dict(vars(SparseCoder)) != before
    assert dict(vars(SparseCoder)) == before
    fast = hosts.accelerate(made)
    assert fast is made and isinstance(made, SparseCoder) and type(made) is not SparseCoder
    assert copy.deepcopy(made)(torch.ones(2, D)).sae_out.equal(made(torch.ones(2, D)).sae_out)
    assert type(hosts.restore(made)) is SparseCoder


def test_a_subclass_and_a_listener_get_the_hosts_steps():
    class Doubled(SparseCoder):
        def encode(self, x):
            acts, indices, pre = super().encode(x)
            return EncoderOutput(2 * acts, indices, pre)

    doubled, listened, x, heard = Doubled(D, SparseCoderConfig(num_latents=F, k=K)), coder(), torch.randn(N, D), []
    expected = doubled(x).sae_out
    # the host's encoder is never called as a module, but may have been replaced by one that is not a plain layer
    listened.encoder.register_forward_hook(lambda *_: heard.append(1))
    with patched(), Largest() as seen:
        assert doubled(x).sae_out.equal(expected)
        listened(x)
    assert not seen.operators


def test_nan_and_a_method_on_the_object_get_the_hosts_steps():
    made, x = coder(), torch.randn(N, D)
    broken = x.clone()
    broken[3, 2] = torch.nan

    def results():
        nan = made(broken).sae_out
        acts, indices, pre = made.encode(x)
        made.encode = lambda _: EncoderOutput(torch.ones_like(acts), torch.zeros_like(indices), pre)
        constant = made(x).sae_out
        del made.encode
        return nan.nan_to_num(7.0), constant

    expected = results()
    with patched():
        assert all(a.equal(b) for a, b in zip(results(), expected, strict=True))
    assert (expected[0] == 7).any()


# ── its trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(tmp_path, name, steps=8, **options):
    """The host's Trainer on a small model with random weights."""
    from datasets import Dataset
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=64, n_positions=16, n_embd=D, n_layer=2, n_head=2))
    tokens = torch.randint(64, (4 * steps, 16), generator=torch.Generator().manual_seed(1))
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    coder_options = options.pop("sae", {})
    config = TrainConfig(
        SparseCoderConfig(**{"num_latents": F, "k": K} | coder_options), batch_size=4, layers=[1], log_to_wandb=False,
        save_dir=str(tmp_path), run_name=name, optimizer="adam", lr=1e-3, lr_warmup_steps=1, **options,
    )  # fmt: skip
    trainer = Trainer(config, dataset, model)
    start = {n: p.detach().clone() for n, p in trainer.saes["h.1"].named_parameters()}
    trainer.fit()
    return trainer, start


@pytest.mark.parametrize("options", [{}, {"sae": {"activation": "groupmax", "skip_connection": True}}, {"micro_acc_steps": 2},
                                     {"sae": {"transcode": True}}], ids=str)  # fmt: skip
def test_its_trainer_runs_unchanged_to_the_same_weights(options, tmp_path):
    stock, _ = train(tmp_path, "stock", **copy.deepcopy(options))
    with patched(), Largest() as seen:
        fast, start = train(tmp_path, "fast", **copy.deepcopy(options))
    assert {"encode_entries", "decode_loss_forward"} <= seen.operators
    for name, p in stock.saes["h.1"].named_parameters():
        mine = fast.saes["h.1"].get_parameter(name)
        assert not mine.equal(start[name])
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-4)
    for hookpoint, counts in stock.num_tokens_since_fired.items():
        assert counts.equal(fast.num_tokens_since_fired[hookpoint])
    # and each reads the other's files
    fast.load_state(str(tmp_path / "stock"))
    loaded = SparseCoder.load_from_disk(tmp_path / "fast" / "h.1")
    assert loaded.state_dict().keys() == stock.saes["h.1"].state_dict().keys()


def test_its_trainer_lets_k_decay(tmp_path):
    with patched():
        trainer, start = train(tmp_path, "fast", k_decay_steps=4)
    assert trainer.initial_k == F > trainer.saes["h.1"].cfg.k == K
    assert not trainer.saes["h.1"].W_dec.equal(start["W_dec"])


def test_its_trainer_revives_dead_latents_only_when_patched(tmp_path):
    """WRONG in theirs: with auxk_alpha a dead latent's decoder row moves and its encoder row never does."""
    options = {"auxk_alpha": 1 / 4, "dead_feature_threshold": 0, "steps": 12, "sae": {"num_latents": 512}}

    def moved(name):
        trainer, start = train(tmp_path, name, **copy.deepcopy(options))
        made, dead = trainer.saes["h.1"], trainer.num_tokens_since_fired["h.1"] >= 12 * 4 * 16
        assert 0 < dead.sum() < 512
        return [(made.get_parameter(n) - start[n])[dead].norm() for n in ("encoder.weight", "W_dec")]

    encoder, decoder = moved("stock")
    assert encoder == 0 < decoder
    with patched():
        encoder, decoder = moved("fast")
    assert encoder > 1e-3 and decoder > 1e-3
