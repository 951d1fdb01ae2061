"""The command line: help without torch, mistakes answered in a line, settings equal from Python, YAML and flags."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import transformers
import yaml
from hypothesis import given
from test_config import CONFIGS

from fastsae import cli
from fastsae.cli.doctor import faults
from fastsae.cli.parse import train_config, write_yaml
from fastsae.config import TrainConfig
from fastsae.data import LanguageModel, Superposition, write_shards
from fastsae.settings import to_dict

SMALL = ["--source", "synthetic", "--d-in", "16", "--features", "32", "--active", "3", "--buffer", "64", "--batch-size", "32",
         "--tokens", "256", "--k", "3", "--d-sae", "64", "--log-every", "4"]  # fmt: skip


def as_flags(config):
    """Every setting as flags, from the nested plain values."""
    flags = []

    def add(values):
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, dict):
                add(value)
            elif isinstance(value, bool):
                flags.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, list):
                flags.extend([flag, *map(str, value)])
            else:
                flags.append(f"{flag}={value}")

    add(to_dict(config))
    return flags


@given(CONFIGS)
def test_flags_yaml_and_python_say_the_same(config):
    booleans = dataclasses.replace(config, sae=dataclasses.replace(config.sae, apply_b_dec_to_input=None))
    assert train_config(as_flags(booleans), "") == booleans


@given(CONFIGS)
def test_yaml_and_back(config):
    assert yaml.safe_load(yaml.safe_dump(to_dict(config))) == to_dict(config)


def test_flags_go_on_top_of_yaml(tmp_path):
    write_yaml(TrainConfig(batch_size=512), tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("sae: {k: 7, activation: batchtopk}\ntokens: 5000\n")
    assert train_config(["--config", str(tmp_path / "a.yaml"), "--k", "5"], "").batch_size == 512
    config = train_config(["--config", str(tmp_path / "b.yaml"), "--k", "9"], "")
    assert (config.sae.k, config.sae.activation, config.tokens) == (9, "batchtopk", 5000)


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)], ids=str)
def test_help_needs_no_torch(command):
    code = f"import sys; from fastsae.cli import main; c = main({[*command, '--help']}); sys.exit(c or 'torch' in sys.modules)"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5 and time.perf_counter() - begun < 30


MISTAKES = {  # arguments, then what the answer must hold
    "an unknown command": (["trian"], "did you mean 'train'"),
    "no such command": (["zzz"], "pass one of train"),
    "a typo in a flag": (["train", "--batch-sise", "3"], "--batch-size"),
    "a typo in eval": (["eval", "--btches", "3"], "--batches"),
    "no number": (["train", "--k", "many"], "--k"),
    "a fraction": (["train", "--k", "1.5"], "--k"),
    "out of range": (["train", "--k", "0"], "k=0: pass a number >= 1"),
    "negative": (["train", "--lr", "-1"], "lr=-1.0: pass a number >= 0"),
    "no choice": (["train", "--activation", "topp"], "topk"),
    "no value": (["train", "--hook"], "--hook"),
    "k beyond d_sae": (["train", *SMALL, "--k", "65", "--out", "{tmp}/r"], "k=65 exceeds d_sae=64"),
    "two that fight": (["train", "--prefixes", "3", "--ks", "2"], "pass one of them"),
    "pre_act without thresholds": (["train", *SMALL, "--dead", "pre_act", "--out", "{tmp}/r"], "activation='jumprelu'"),
    "an unknown optimizer": (["train", *SMALL, "--optimizer", "Adm", "--out", "{tmp}/r"], "'Adam'"),
    "no config": (["train", "--config", "{tmp}/none.yaml"], "is not there"),
    "--config alone": (["train", "--config"], "pass --config FILE.yaml"),
    "no YAML": (["train", "--config", "{tmp}/broken.yaml"], "no YAML"),
    "an unknown key": (["train", "--config", "{tmp}/unknown.yaml"], "did you mean 'tokens'"),
    "shards without a path": (["train", "--source", "shards"], "pass path"),
    "no shards there": (["train", "--source", "shards", "--path", "{tmp}", "--out", "{tmp}/r"], "index.json"),
    "no run": (["eval", "{tmp}/nothing"], "nothing"),
    "a run that did not finish": (["eval", "{tmp}/unfinished"], "let the run finish"),
    "no run to plot": (["plot", "{tmp}/nothing"], "metrics.jsonl is not there"),
    "nothing to convert": (["convert", "{tmp}/nothing", "{tmp}/new", "--to", "saelens"], "nothing"),
    "no such format": (["convert", "{tmp}", "{tmp}/new", "--to", "onnx"], "saelens"),
}


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_answered_in_a_few_lines(arguments, answer, tmp_path, capfd):
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "unknown.yaml").write_text("tokns: 3")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text(json.dumps(to_dict(TrainConfig())))
    assert cli.main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    said = "".join(capfd.readouterr())
    assert answer in " ".join(said.split()), said
    assert "Traceback" not in said and len(said.splitlines()) <= 40


def test_train_eval_plot_and_go_on(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", *SMALL, "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "FVU" in said and "tokens/s" in said and f"fastsae eval {run}" in said
    assert (run / "training.png").stat().st_size > 1000 and (run / "final" / "sae_weights.safetensors").exists()
    assert cli.main(["eval", str(run), "--json", str(tmp_path / "e.json"), "--batches", "2"]) == 0
    assert 0 < json.loads((tmp_path / "e.json").read_text())[""]["fvu"] < 2
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "plots")]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"training.png", "runs.csv", "sparsity.png", "density.png"}
    assert cli.main(["train", *SMALL, "--out", str(run)]) == 0, "a finished run is not trained again"
    assert cli.main(["train", *SMALL, "--out", str(run), "--k", "4"]) == 2, "nor with other settings"
    assert cli.main(["train", *SMALL, "--out", str(run), "--resume", "never"]) == 2


def test_the_language_model_is_loaded_once_and_quietly(tmp_path, monkeypatch, capfd):
    transformers.utils.logging.enable_progress_bar()  # another test may have turned bars off before they were first asked for
    loads, load = [], LanguageModel.load
    monkeypatch.setattr(LanguageModel, "load", lambda *a: loads.append(a) or load(*a))
    tiny = ["--tokens", "256", "--batch-size", "64", "--buffer", "256", "--context", "16", "--sequences", "8", "--d-sae", "64"]
    sweep = ["--k", "4", "--sweep", "hook=blocks.0.hook_resid_post,blocks.1.hook_resid_post"]
    assert cli.main(["train", *tiny, *sweep, "--out", str(tmp_path / "run")]) == 0
    said = capfd.readouterr()
    assert len(loads) == 1 and "Loading weights" not in said.err
    assert "CE recovered" in said.out and "held-out" not in said.out
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_data_without_a_held_out_part_are_named_as_such(tmp_path, capsys):
    write_shards(Superposition(16, 32, 3.0, batch_size=64), tmp_path / "acts", rows=2_000)
    shards = ["--source", "shards", "--path", str(tmp_path / "acts")]
    assert cli.main(["train", *SMALL, *shards, "--out", str(tmp_path / "run")]) == 0
    assert "on data that training read too" in capsys.readouterr().out
    assert cli.main(["eval", str(tmp_path / "run"), "--json", str(tmp_path / "e.json")]) == 0
    assert "on data that training read too" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())[""]["held_out"] == 0


def test_convert_and_back(tmp_path):
    assert cli.main(["train", *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["convert", str(tmp_path / "run" / "final"), str(tmp_path / "there"), "--to", "saelens"]) == 0
    refused = ["convert", str(tmp_path / "run" / "final"), str(tmp_path / "gemma"), "--to", "gemma_scope"]
    assert cli.main(refused) == 2 and not (tmp_path / "gemma").exists()


@pytest.mark.parametrize(
    ("versions", "gpu", "cuda", "answer"),
    [
        ({"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6"}, False, False, None),
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5"}, True, True, None),
        ({"torch": "2.9.1"}, False, False, "too old"),
        ({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.4.6"}, False, False, "numpy<2.4"),
        ({"torch": "2.13.0"}, False, True, "nvidia-smi"),
        ({"torch": "2.13.0"}, True, True, "fastsae[triton]"),
    ],
)
def test_doctor_knows_what_breaks(versions, gpu, cuda, answer):
    found = faults(versions, gpu, cuda)
    assert not found if answer is None else len(found) == 1 and answer in found[0]
