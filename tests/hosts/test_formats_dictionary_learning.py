"""dictionary_learning folders: what we write it loads, what it writes we load, with the same function and the same bits."""

import json

import pytest
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

import fastsae.formats
from fastsae import SAE, AbsTopK, BatchTopK, Gated, JumpReLU, ReLU, TopK
from fastsae.formats import FormatError

D, F, K = 8, 20, 3
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))

THEIRS = {
    AutoEncoder: (ReLU, {}),
    AutoEncoderNew: (ReLU, {}),
    GatedAutoEncoder: (Gated, {}),
    JumpReluAutoEncoder: (JumpReLU, {}),
    AutoEncoderTopK: (TopK, {"k": K}),
    BatchTopKSAE: (BatchTopK, {"k": K}),
    MatryoshkaBatchTopKSAE: (BatchTopK, {"k": K, "group_sizes": [5, 15]}),
}
OURS = {
    "AutoEncoder": (ReLU, {}),
    "AutoEncoderNew": (ReLU, {"apply_b_dec_to_input": False}),
    "GatedAutoEncoder": (Gated, {}),
    "JumpReluAutoEncoder": (JumpReLU, {"apply_b_dec_to_input": False}),
    "AutoEncoderTopK": (lambda: TopK(K), {}),
    "BatchTopKSAE": (lambda: BatchTopK(K, threshold=0.3), {}),
}
REFUSED = {
    "AbsTopK": (lambda: AbsTopK(K), {}),
    "transcoders": (ReLU, {"d_out": 6}),
    "decoder norm": (lambda: TopK(K), {"rescale_acts_by_decoder_norm": True}),
    "normalize": (ReLU, {"normalize": "layer_norm"}),
    "apply_b_dec_to_input=True": (JumpReLU, {}),
}


def scrambled(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn_like(p) * 0.4)
            if "thre" in name or "theta" in name:
                p.abs_()
        if "decoder.weight" in dict(module.named_parameters()):
            module.decoder.weight /= module.decoder.weight.norm(dim=0)  # AutoEncoder.from_pretrained folds other norms
    return module.eval()


@torch.no_grad()
def same_function(ours, theirs):
    for mine, its in ((ours.encode(X), theirs.encode(X)), (ours(X), theirs(X))):
        assert (its != 0).any() and (mine - its).abs().max() / its.abs().max() <= 1e-6


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def write_as_the_library_does(dictionary, folder, **config):
    folder.mkdir()
    torch.save({k: t.cpu() for k, t in dictionary.state_dict().items()}, folder / "ae.pt")
    trainer = {"dict_class": type(dictionary).__name__, "activation_dim": D, "dict_size": F, "lr": 1e-3, **config}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 16}}))


@pytest.mark.parametrize("cls", THEIRS, ids=lambda cls: cls.__name__)
def test_what_the_library_writes_we_load_and_write_again(tmp_path, cls):
    activation, options = THEIRS[cls]
    theirs = scrambled(cls(D, F, **options))
    if "k" in options:
        theirs.threshold.fill_(0.3)
    write_as_the_library_does(theirs, tmp_path / "theirs", k=K, lm_name="some-model")
    ours = fastsae.formats.load(tmp_path / "theirs", allow_pickle=True)
    assert type(ours.activation) is activation
    same_function(ours, theirs)
    fastsae.formats.save(ours, tmp_path / "ours", format="dictionary_learning")
    same_bits(torch.load(tmp_path / "ours/ae.pt"), torch.load(tmp_path / "theirs/ae.pt"))
    again, config = load_dictionary(str(tmp_path / "ours"), "cpu")
    assert type(again) is cls and config["trainer"]["lm_name"] == "some-model" and config["buffer"] == {"ctx_len": 16}
    same_bits(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_the_library_loads_and_we_load_again(tmp_path, name):
    activation, options = OURS[name]
    sae = SAE(D, F, activation(), **options)
    with torch.no_grad():
        scrambled(sae)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    fastsae.formats.save(sae, tmp_path, format="dictionary_learning", metadata={"hook_name": "blocks.0.hook_resid_post"})
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert type(theirs).__name__ == name
    same_function(sae, theirs)
    again = fastsae.formats.load(tmp_path, allow_pickle=True)
    assert vars(again)["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    assert torch.equal(again(X), sae(X))
    for tensor in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(again, tensor), getattr(sae, tensor))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_library_cannot_say_is_refused(tmp_path, reason):
    activation, options = REFUSED[reason]
    with pytest.raises(FormatError, match=reason):
        fastsae.formats.save(SAE(D, F, activation(), **options), tmp_path, format="dictionary_learning")
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_not_opened_unless_allowed(tmp_path):
    write_as_the_library_does(scrambled(AutoEncoder(D, F)), tmp_path / "theirs")
    with pytest.raises(FormatError, match="allow_pickle=True"):
        fastsae.formats.load(tmp_path / "theirs")
