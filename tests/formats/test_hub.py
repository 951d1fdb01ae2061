"""The Hub, as a small server on loopback. In processes of their own: huggingface_hub reads its settings when it is imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import Hub

import fastsae.formats
from fastsae import SAE, TopK

D, F, K = 6, 14, 3

HEAD = """
import json, sys, torch
from fastsae import SAE, TopK, BatchTopK, hub

def error(f, *arguments, **options):
    try:
        f(*arguments, **options)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "no error"

answers = {}
"""


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def ask(server, tmp_path_factory):
    """Run lines that fill `answers`, in a process that knows this Hub alone."""
    home = tmp_path_factory.mktemp("home")

    def run(code: str, **environment) -> dict:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "none", "HF_HUB_DISABLE_TELEMETRY": "1"}
        script = HEAD + code + "\nprint('ANSWERS' + json.dumps(answers))"
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **settings, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.split("ANSWERS")[1])

    return run


def make(activation) -> SAE:
    torch.manual_seed(0)
    return SAE(D, F, activation).eval()


@pytest.fixture(scope="module")
def online(server, ask, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sae")
    fastsae.formats.save(make(TopK(K)), folder, metadata={"hook_name": "blocks.0.hook_resid_post"})
    server.add("me/saes", "layer_0[a]/x", folder)
    server.add("me/one", "", folder)
    server.repos["me/text"] = {"README.md": b"no SAE"}
    server.broken.add("me/broken")
    pickled = tmp_path_factory.mktemp("pickled")
    fastsae.formats.save(make(TopK(K)), pickled, "dictionary_learning")
    server.add("me/pickled", "", pickled)
    return ask("""
sae = hub.from_pretrained("me/saes", "layer_0[a]/x", dtype=torch.float64)
answers["sum"] = sae.W_enc.sum().item()
answers["metadata"] = sae.metadata["hook_name"]
answers["root"] = hub.from_pretrained("me/one").d_sae
answers["folder"] = error(hub.from_pretrained, "me/saes", "layer_0[a]/y")
answers["none"] = error(hub.from_pretrained, "me/saes")
answers["text"] = error(hub.from_pretrained, "me/text")
answers["repo"] = error(hub.from_pretrained, "me/gone", "x")
answers["broken"] = error(hub.from_pretrained, "me/broken", "x")
answers["name"] = error(hub.from_pretrained, "gemma-scope")
answers["pickle"] = error(hub.from_pretrained, "me/pickled")
answers["allowed"] = hub.from_pretrained("me/pickled", allow_pickle=True).d_sae

torch.manual_seed(0)
sae = SAE(6, 14, BatchTopK(3, threshold=0.3)).eval()
facts = {"hook_name": "blocks.1.hook_mlp_out", "model_name": "m"}
answers["url"] = hub.push_to_hub(sae, "you/new", "layer_1", metadata=facts, metrics={"fvu": 0.12345})
hub.push_to_hub(sae, "you/new", "layer_2")
again = hub.from_pretrained("you/new", "layer_1")
answers["same"] = all(torch.equal(t, again.state_dict()[n]) for n, t in sae.state_dict().items())
answers["repr"] = repr(again) == repr(sae)
""")


def test_a_folder_of_a_repository(online):
    assert online["sum"] == pytest.approx(make(TopK(K)).W_enc.double().sum().item(), abs=1e-12)
    assert online["metadata"] == "blocks.0.hook_resid_post"
    assert online["root"] == F


def test_only_the_files_of_one_sae_are_fetched(online, server):
    fetched = {request.split("/resolve/")[1].split("/", 1)[1] for request in server.requests if "/me/saes/resolve/" in request}
    assert fetched == {"layer_0[a]/x/cfg.json", "layer_0[a]/x/sae_weights.safetensors"}


def test_what_is_not_there_is_said(online):
    assert online["folder"] == "ValueError: 'layer_0[a]/y' is no sae_id of me/saes: the nearest of 1 are layer_0[a]/x"
    assert "layer_0[a]/x" in online["none"]
    assert online["text"].startswith("FormatError: me/text holds no SAE of a known format")
    assert online["repo"].startswith("FileNotFoundError: me/gone is not on the Hub, or closed")
    assert online["broken"] == "FileNotFoundError: x of me/broken is not in the cache, and the Hub cannot be reached"
    assert "'gemma-scope' is no repository (owner/name), and release names need sae-lens" in online["name"]


def test_pickles_are_not_opened_unless_allowed(online):
    assert online["pickle"].startswith("FormatError: ae.pt is a pickle") and online["allowed"] == F


def test_offline_the_cache_serves_and_what_it_lacks_is_said(online, ask, server):
    before = len(server.requests)
    answers = ask(
        """
answers["cached"] = hub.from_pretrained("me/one").d_sae
answers["gone"] = error(hub.from_pretrained, "me/other", "x")
answers["folder"] = error(hub.from_pretrained, "me/saes", "layer_1")
""",
        HF_HUB_OFFLINE="1",
    )
    assert answers["cached"] == F
    assert answers["gone"] == "FileNotFoundError: x of me/other is not in the cache, and HF_HUB_OFFLINE is set"
    assert answers["folder"] == "FileNotFoundError: layer_1 of me/saes is not in the cache, and HF_HUB_OFFLINE is set"
    assert len(server.requests) == before


def test_push_writes_a_card_once_and_what_was_pushed_comes_back(online, server):
    assert online["same"] and online["repr"] and "/you/new/commit/" in online["url"]
    files = server.repos["you/new"]
    expected = {f"layer_{i}/{name}" for i in (1, 2) for name in ("cfg.json", "fastsae.json", "sae_weights.safetensors")}
    assert files.keys() == expected | {"README.md", ".gitattributes"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: saelens\n")
    for line in ("| fvu | 0.1235 |", "| d_sae | 14 |", "| hook_name | blocks.1.hook_mlp_out |", "| activation | BatchTopK(k=3"):
        assert line in card
    assert "fastsae.from_pretrained('you/new', 'layer_1')" in card and "SAE.from_pretrained('you/new', 'layer_1')" in card
