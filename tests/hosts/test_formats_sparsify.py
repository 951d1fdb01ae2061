"""sparsify folders: what we write it loads, what it writes we load, with the same function and the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig

import fastsae.formats
from fastsae import SAE, BatchTopK, TopK
from fastsae.formats import FormatError

D, F, K = 8, 32, 3
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))

KINDS = {
    "autoencoder": {},
    "autoencoder with skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "trained with multi-topk": {"multi_topk": True, "normalize_decoder": False},
}
REFUSED = {
    "TopK only": (lambda: BatchTopK(K, threshold=0.1), {}),
    "d_out=6": (lambda: TopK(K), {"d_out": 6}),
    "decoder norm": (lambda: TopK(K), {"rescale_acts_by_decoder_norm": True}),
    "normalize": (lambda: TopK(K), {"normalize": "layer_norm"}),
}


def scrambled(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    return module.eval()


def near(a, b):
    assert (a - b).abs().max() / b.abs().max() <= 1e-6


@torch.no_grad()
def same_function(ours, theirs):
    code, out = theirs.encode(X), theirs(X)
    near(ours.encode(X), torch.zeros(len(X), F).scatter(1, code.top_indices, code.top_acts))
    if not theirs.cfg.multi_topk:  # there sparsify returns the reconstruction of 4k
        near(ours(X), out.sae_out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latents", [{"expansion_factor": 4}, {"num_latents": F}], ids=["factor", "latents"])
def test_what_sparsify_writes_we_load_and_write_again(tmp_path, kind, latents):
    theirs = scrambled(SparseCoder(D, SparseCoderConfig(k=K, **latents, **KINDS[kind])))
    theirs.save_to_disk(tmp_path / "theirs")
    ours = fastsae.formats.load(tmp_path / "theirs")
    same_function(ours, theirs)
    fastsae.formats.save(ours, tmp_path / "ours", format="sparsify")
    mine, before = (load_file(tmp_path / who / "sae.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == before.keys() and all(torch.equal(mine[name], before[name]) for name in mine)
    mine, before = (json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("ours", "theirs"))
    assert {**mine, "metadata": None} == {**before, "num_latents": F, "metadata": None}
    again = SparseCoder.load_from_disk(tmp_path / "ours")
    assert again.num_latents == F
    for name, t in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"d_out": D}, {"d_out": D, "skip": True}, {"skip": True}], ids=str)
def test_what_we_write_sparsify_loads_and_we_load_again(tmp_path, options, dtype):
    sae = scrambled(SAE(D, F, TopK(K), dtype=dtype, **options))
    fastsae.formats.save(sae, tmp_path, format="sparsify", metadata={"hook_name": "layers.0"})
    theirs = SparseCoder.load_from_disk(tmp_path)
    assert theirs.dtype == dtype and torch.equal(theirs.encoder.weight.T, sae.W_enc)
    if dtype == torch.float32:
        same_function(sae, theirs)
    again = fastsae.formats.load(tmp_path)
    assert vars(again)["metadata"]["hook_name"] == "layers.0"
    for name, t in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], t)
    assert torch.equal(again(X.to(dtype)), sae(X.to(dtype)))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_sparsify_cannot_say_is_refused(tmp_path, reason):
    activation, options = REFUSED[reason]
    with pytest.raises(FormatError, match=reason):
        fastsae.formats.save(SAE(D, F, activation(), **options), tmp_path, format="sparsify")
    assert not list(tmp_path.iterdir())


def test_groupmax_is_refused_by_name(tmp_path):
    SparseCoder(D, SparseCoderConfig(k=4, expansion_factor=4, activation="groupmax")).save_to_disk(tmp_path)
    with pytest.raises(FormatError, match="activation='groupmax'"):
        fastsae.formats.load(tmp_path)
