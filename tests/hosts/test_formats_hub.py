"""SAELens' list of releases: the same SAE as SAELens itself loads, from a small server on loopback that holds tiny ones."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import Hub
from safetensors.torch import save_file

D, F, OUT, K = 8, 20, 6, 3

# what the entry is for -> (release, sae_id, repository, path there)
ENTRIES = {
    "SAELens 5": (
        "gpt2-small-res-jb", "blocks.0.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.0.hook_resid_pre"
    ),
    "scaled data": (
        "gpt2-small-mlp-tm", "blocks.0.hook_mlp_out", "tommmcgrath/gpt2-small-mlp-out-saes",
        "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1",
    ),
    "normalisation from the list": (
        "mistral-7b-res-wg", "blocks.8.hook_resid_pre", "JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_8"
    ),
    "skip transcoder of Gemma Scope 2": (
        "gemma-scope-2-4b-pt-transcoders-all", "layer_0_width_16k_l0_big_affine", "google/gemma-scope-2-4b-pt",
        "transcoder_all/layer_0_width_16k_l0_big_affine",
    ),
    "pickled": (
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0",
        "canrager/saebench_gemma-2-2b_width-2pow12_date-1109",
        "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12/trainer_0",
    ),
}  # fmt: skip

SCRIPT = """
import json, sys, warnings
import torch
from sae_lens import SAE
from fastsae import hub

warnings.simplefilter("ignore")
answers, x = {}, torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
for name, (release, sae_id) in json.loads(sys.argv[1]).items():
    ours, theirs = hub.from_pretrained(release, sae_id, allow_pickle=True), SAE.from_pretrained(release, sae_id)
    with torch.no_grad():
        acts, y = theirs.encode(x), theirs(x)
        answers[name] = {
            "encode": ((ours.encode(x) - acts).abs().max() / acts.abs().max()).item(),
            "forward": ((ours(x) - y).abs().max() / y.abs().max()).item(),
            "hooks": [vars(ours)["metadata"]["hook_name"], theirs.cfg.metadata.hook_name],
        }

def error(*arguments):
    try:
        hub.from_pretrained(*arguments)
    except ValueError as e:
        return f"{type(e).__name__}: {e}"

release, sae_id = json.loads(sys.argv[1])["pickled"]
answers["errors"] = [error(release, sae_id), error("gpt2-small-res-jv", "x"), error("gpt2-small-res-jb", "blocks.0.hook_resid")]
print("ANSWERS" + json.dumps(answers))
"""


def weights(d_out=D):
    random = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,)}
    return {name: torch.randn(shape, generator=random) * 0.4 for name, shape in shapes.items()}


def publish(server, folder, name, config, tensors, config_name="cfg.json", weights_name="sae_weights.safetensors"):
    folder.mkdir()
    (folder / config_name).write_text(json.dumps(config))
    (torch.save if weights_name.endswith(".pt") else save_file)(tensors, folder / weights_name)
    server.add(*ENTRIES[name][2:], folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    work, server = tmp_path_factory.mktemp("hub"), Hub()
    old = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "m", "hook_point": "h", "device": "cpu"}
    publish(server, work / "old", "SAELens 5", old, weights())
    average = {**old, "normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": False}
    publish(server, work / "average", "scaled data", average, weights())
    publish(server, work / "normalized", "normalisation from the list", old, weights())

    gemma = {name.lower(): t for name, t in weights(OUT).items()}
    gemma |= {"threshold": torch.full((F,), 0.2), "affine_skip_connection": torch.randn(D, OUT)}
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "affine_connection": True}
    publish(server, work / "gemma", "skip transcoder of Gemma Scope 2", config, gemma, "config.json", "params.safetensors")

    own = weights()
    state = {"encoder.weight": own["W_enc"].T, "encoder.bias": own["b_enc"], "decoder.weight": own["W_dec"].T}
    state |= {"b_dec": own["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": K, "layer": 12}
    trainer |= {"lm_name": "google/gemma-2-2b", "submodule_name": "resid_post_layer_12", "trainer_class": "TrainerTopK"}
    config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
    publish(server, work / "pickled", "pickled", config, state, "config.json", "ae.pt")

    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(work / "home")}
    environment |= {"HF_TOKEN": "none", "HF_HUB_OFFLINE": "0"}
    asked = json.dumps({name: entry[:2] for name, entry in ENTRIES.items()})
    done = subprocess.run([sys.executable, "-c", SCRIPT, asked], env=environment, capture_output=True, text=True)
    server.close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])


@pytest.mark.parametrize("name", ENTRIES)
def test_a_release_is_what_saelens_loads(answers, name):
    assert answers[name]["encode"] <= 1e-6 and answers[name]["forward"] <= 1e-6
    mine, theirs = answers[name]["hooks"]
    assert mine == theirs is not None


def test_what_is_not_in_the_list_is_answered_with_the_nearest(answers):
    pickled, release, sae_id = answers["errors"]
    assert "is published as pickles (dictionary_learning_1)" in pickled and "allow_pickle=True" in pickled
    assert (
        release.startswith("ValueError: 'gpt2-small-res-jv' is no release: the nearest of ") and "gpt2-small-res-jb" in release
    )
    assert "'blocks.0.hook_resid' is no sae_id of gpt2-small-res-jb" in sae_id and "blocks.0.hook_resid_pre" in sae_id
