"""Every format: what is saved comes back the same, what cannot be said is refused. Beside the real libraries: tests/hosts."""

import copy
import json
import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsae.formats
from fastsae import SAE, AbsTopK, Activation, BatchTopK, Gated, JumpReLU, ReLU, SparseCode, TopK
from fastsae.formats import FormatError

D, F, K = 6, 14, 3
X = torch.randn(30, D, generator=torch.Generator().manual_seed(1))

ACTIVATIONS = {
    "relu": ReLU,
    "topk": lambda: TopK(K),
    "abstopk": lambda: AbsTopK(K),
    "batchtopk": lambda: BatchTopK(K, threshold=0.3, threshold_lr=0.02),
    "jumprelu": lambda: JumpReLU(bandwidth=0.2, ste_to_input=True),
    "gated": Gated,
}


def make(activation, **options) -> SAE:
    sae = SAE(D, F, ACTIVATIONS[activation](), **options)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn_like(p) * 0.4)
            if name == "activation.theta":
                p.abs_()
    return sae.eval()


def same(a: SAE, b: SAE) -> None:
    assert repr(a) == repr(b) and not a.training
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for name in state:
        assert state[name].dtype == other[name].dtype and torch.equal(state[name], other[name]), name
    assert torch.equal(a(X.to(a.W_enc.dtype)), b(X.to(b.W_enc.dtype)))


def test_an_sae_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    before, after = make("batchtopk"), make("topk")
    fastsae.formats.save(before, tmp_path)
    (tmp_path / "mine.txt").write_text("not of any format")
    with monkeypatch.context() as patch:
        patch.setattr(fastsae.formats.saelens, "save_tensors", lambda path, tensors: path.write_bytes(b"half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fastsae.formats.save(after, tmp_path)
    same(fastsae.formats.load(tmp_path), before)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.0}))
    fastsae.formats.save(after, tmp_path)
    same(fastsae.formats.load(tmp_path), after)  # neither the scaler nor the file beside a BatchTopK is its own
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cfg.json", "mine.txt", "sae_weights.safetensors"]


def test_a_crash_between_two_files_leaves_no_mixture(tmp_path, monkeypatch):
    fastsae.formats.save(make("topk"), tmp_path)
    replace = type(tmp_path).replace
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", lambda new, to: 1 / 0 if to.suffix == ".safetensors" else replace(new, to))
        with pytest.raises(ZeroDivisionError):
            fastsae.formats.save(make("topk"), tmp_path)
    with pytest.raises(FormatError, match="holds no SAE"):
        fastsae.formats.load(tmp_path)


def test_a_folder_holds_one_format(tmp_path):
    fastsae.formats.save(make("topk"), tmp_path)
    with pytest.raises(FileExistsError, match="in format 'saelens': name another folder for 'fastsae'"):
        fastsae.formats.save(make("topk"), tmp_path, "fastsae")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_is_loaded(tmp_path, activation, dtype):
    sae = make(activation, dtype=dtype)
    fastsae.formats.save(sae, tmp_path / "new" / "sae")
    loaded = fastsae.formats.load(tmp_path / "new" / "sae")
    same(loaded, sae)
    assert loaded.W_enc.stride(0) == 1  # a latent's row is whole, as in any SAE
    for name, value in vars(sae.activation).items():
        if isinstance(value, (int, float, bool)) and name != "initial_theta":
            assert getattr(loaded.activation, name) == value, name


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_metadata_goes_from_file_to_file(tmp_path, format):
    sae = make("topk")
    fastsae.formats.save(sae, tmp_path / "a", format, metadata={"model_name": "m", "hook_name": "h", "context_size": 8})
    loaded = fastsae.formats.load(tmp_path / "a", allow_pickle=True)
    fastsae.formats.save(loaded, tmp_path / "b", "saelens", metadata={"hook_name": "other"})
    metadata = json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"], metadata["context_size"]) == ("m", "other", 8)


def test_weights_are_written_row_major_for_everybody(tmp_path):
    fastsae.formats.save(make("topk"), tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert weights["W_enc"].shape == (D, F) and all(t.is_contiguous() for t in weights.values())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_readable_by_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        fastsae.formats.save(make("batchtopk"), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "fastsae.json", "sae_weights.safetensors"]


def test_loading_in_another_dtype(tmp_path):
    sae = make("batchtopk", dtype=torch.float64)
    fastsae.formats.save(sae, tmp_path)
    half = fastsae.formats.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.W_dec, sae.W_dec.bfloat16())
    assert half.get_buffer("activation.threshold") == 0.3  # not a weight, so not rounded
    assert half.get_buffer("activation.threshold").dtype == torch.float64


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
    sae = make("relu")
    with torch.no_grad():
        sae.W_dec[0, 0] = 1e6
    fastsae.formats.save(sae, tmp_path)
    with pytest.raises(FormatError, match="W_dec has 1 non-finite values"):
        fastsae.formats.load(tmp_path, dtype=torch.float16)


def test_a_loaded_sae_does_not_depend_on_its_file(tmp_path):
    sae, other = make("topk"), make("topk")
    fastsae.formats.save(sae, tmp_path)
    loaded = fastsae.formats.load(tmp_path)
    fastsae.formats.save(other, tmp_path)  # over the file that was mapped
    same(loaded, sae)
    same(fastsae.formats.load(tmp_path), other)


def test_another_architecture_over_an_older_one(tmp_path):
    """No fastsae.json of the BatchTopK that was here before is left."""
    for activation in ("batchtopk", "topk", "jumprelu", "relu"):
        sae = make(activation)
        fastsae.formats.save(sae, tmp_path)
        same(fastsae.formats.load(tmp_path), sae)


def test_saving_leaves_the_sae_alone(tmp_path):
    sae = make("batchtopk", rescale_acts_by_decoder_norm=True)
    before, metadata = copy.deepcopy(sae), {"a": 1}
    for format in ("saelens",):
        fastsae.formats.save(sae, tmp_path, format, metadata=metadata, input_scale=3.0)
    same(sae, before)
    assert metadata == {"a": 1}


def test_a_batchtopk_without_threshold_is_refused(tmp_path):
    sae = SAE(D, F, BatchTopK(K))
    with pytest.raises(FormatError, match="calibrate it first"):
        fastsae.formats.save(sae, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_latent_without_a_decoder_row_can_be_written(tmp_path):
    sae = make("batchtopk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        sae.W_dec[3] = 0
    fastsae.formats.save(sae, tmp_path)
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].isfinite().all()
    same(fastsae.formats.load(tmp_path), sae)


@pytest.mark.parametrize(
    ("activation", "options", "reason"),
    [
        ("gated", {"d_out": 4}, "no inference architecture for a Gated transcoder"),
        ("topk", {"d_out": 4}, "TopK transcoder: it has standard, gated"),
        ("abstopk", {"skip": True}, "AbsTopK transcoder with skip"),
        ("jumprelu", {"skip": True}, "apply_b_dec_to_input=False"),
        ("relu", {"rescale_acts_by_decoder_norm": True}, "does not rank"),
    ],
)
def test_what_saelens_cannot_say_is_refused(tmp_path, activation, options, reason):
    with pytest.raises(FormatError, match=reason):
        fastsae.formats.save(make(activation, **options), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_activation_of_ones_own_is_refused_by_name(tmp_path):
    class Own(Activation):
        def select(self, pre: torch.Tensor) -> SparseCode: ...

    with pytest.raises(FormatError, match="the activation Own: they know ReLU"):
        fastsae.formats.save(SAE(D, F, Own()), tmp_path)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_input_scales_are_refused(tmp_path, scale):
    with pytest.raises(FormatError, match="data scaled by"):
        fastsae.formats.save(make("relu"), tmp_path, input_scale=scale)


def test_the_folder_and_the_format_are_named_when_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        fastsae.formats.load(tmp_path / "gone")
    with pytest.raises(FormatError, match="looked for sae_weights.safetensors of saelens; sae.safetensors of sparsify"):
        fastsae.formats.load(tmp_path)
    with pytest.raises(ValueError, match="format='gguf': pass one of saelens, sparsify"):
        fastsae.formats.save(make("relu"), tmp_path, format="gguf")
    with pytest.raises(FormatError, match="read only"):
        fastsae.formats.save(make("relu"), tmp_path, format="gemma_scope")


CONVERTS = {
    ("relu", "dictionary_learning"): {},
    ("gated", "dictionary_learning"): {},
    ("topk", "dictionary_learning"): {},
    ("batchtopk", "dictionary_learning"): {},
    ("jumprelu", "dictionary_learning"): {"apply_b_dec_to_input": False},
    ("topk", "sparsify"): {},
}


@pytest.mark.parametrize(("activation", "to"), CONVERTS)
def test_there_and_back_is_the_same(tmp_path, activation, to):
    sae = make(activation, **CONVERTS[activation, to])
    fastsae.formats.save(sae, tmp_path / "a", metadata={"hook_name": "h"})
    fastsae.formats.convert(tmp_path / "a", tmp_path / "b", to)
    fastsae.formats.convert(tmp_path / "b", tmp_path / "c", "saelens", allow_pickle=True)
    back = fastsae.formats.load(tmp_path / "c")
    assert torch.equal(back(X), sae(X)) and vars(back)["metadata"]["hook_name"] == "h"
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(back, name), getattr(sae, name))


def test_convert_refuses_what_would_be_lost_and_leaves_nothing(tmp_path):
    fastsae.formats.save(make("batchtopk"), tmp_path / "a")
    with pytest.raises(FormatError, match="sparsify has TopK only"):
        fastsae.formats.convert(tmp_path / "a", tmp_path / "b", "sparsify")
    with pytest.raises(FileExistsError, match="name a new folder"):
        fastsae.formats.convert(tmp_path / "a", tmp_path / "a", "saelens")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_convert_compares_what_it_wrote(tmp_path, monkeypatch):
    from fastsae.formats import sparsify

    write = sparsify.write
    monkeypatch.setattr(sparsify, "write", lambda parts, path: write(parts.to(torch.bfloat16).to(torch.float32), path))
    fastsae.formats.save(make("topk"), tmp_path / "a")
    with pytest.raises(FormatError, match="cannot hold all of this SAE: .* comes back different"):
        fastsae.formats.convert(tmp_path / "a", tmp_path / "b", "sparsify")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def gemma_arrays(d_out=D):
    random = np.random.default_rng(0)
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,), "threshold": (F,)}
    return {name: random.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def jumprelu(a, x):
    pre = x @ a["W_enc"] + a["b_enc"]
    return np.maximum(pre, 0) * (pre > a["threshold"]) @ a["W_dec"] + a["b_dec"]


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_gemma_scope_npz(tmp_path, savez):
    arrays = gemma_arrays()
    savez(tmp_path / "params.npz", **arrays)
    sae = fastsae.formats.load(tmp_path)
    np.testing.assert_allclose(sae(X).detach().numpy(), jumprelu(arrays, X.numpy()), rtol=0, atol=2e-6)
    fastsae.formats.convert(tmp_path, tmp_path / "b", "saelens")
    same(fastsae.formats.load(tmp_path / "b"), sae)


def test_gemma_scope_npz_of_more_than_4_gb_is_recognised_by_its_zip64_directory(tmp_path):
    np.savez(tmp_path / "params.npz", **gemma_arrays())
    data = (tmp_path / "params.npz").read_bytes()
    body, end = data[:-22], data[-22:]
    entries, size, start = int.from_bytes(end[10:12], "little"), end[12:16], end[16:20]
    wide = b"PK\6\6" + (44).to_bytes(8, "little") + bytes([45, 3, 45, 0]) + bytes(8)
    wide += entries.to_bytes(8, "little") * 2 + size + bytes(4) + start + bytes(4)
    locator = b"PK\6\7" + bytes(4) + len(body).to_bytes(8, "little") + (1).to_bytes(4, "little")
    unknown = b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    (tmp_path / "params.npz").write_bytes(body + wide + locator + unknown)
    assert fastsae.formats.load(tmp_path).d_sae == F


def test_gemma_scope_2_with_skip(tmp_path):
    arrays, skip = gemma_arrays(d_out=4), np.random.default_rng(1).standard_normal((D, 4)).astype("f4")
    tensors = {name.lower(): torch.from_numpy(array) for name, array in arrays.items()}
    save_file({**tensors, "affine_skip_connection": torch.from_numpy(skip)}, tmp_path / "params.safetensors")
    sae = fastsae.formats.load(tmp_path)
    truth = jumprelu(arrays, X.numpy()) + X.numpy() @ skip
    np.testing.assert_allclose(sae(X).detach().numpy(), truth, rtol=0, atol=2e-6)
