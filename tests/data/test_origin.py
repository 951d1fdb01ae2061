"""Where an SAE belongs travels from the data to its files, and from there to an evaluation."""

import pytest
import torch

from fastsae import load
from fastsae.config import DataConfig, SAEConfig, TrainConfig
from fastsae.data import Plain, write_shards
from fastsae.data.origin import completed, origin
from fastsae.trainer import train

SAID = {"model": "gpt2", "hook": "blocks.8.hook_resid_pre", "dataset": "texts", "context": 64, "rows": "other"}
KNOWN = {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "dataset_path": "texts", "context_size": 64}


def test_shards_tell_the_sae(tmp_path):
    write_shards(Plain(iter(torch.randn(10, 64, 8))), tmp_path / "acts", metadata=SAID)
    data = DataConfig(source="shards", path=str(tmp_path / "acts"), buffer=64)
    config = TrainConfig(SAEConfig(k=2, d_sae=16), data=data, tokens=256, batch_size=32, out=str(tmp_path / "run"))
    train(config, quiet=True)
    found = load(tmp_path / "run" / "final").metadata
    assert {name: found.get(name) for name in KNOWN} == KNOWN and "rows" not in found
    read = completed(DataConfig(hook="blocks.2.hook_resid_post"), found)
    assert (read.model, read.hook, read.context, read.dataset) == ("gpt2", KNOWN["hook_name"], 64, "embedded")
    assert completed(DataConfig(model="gpt2-xl"), found).model == "gpt2-xl", "what is given stays"


def test_shards_of_several_hooks(tmp_path):
    write_shards(Plain(iter([{"a": torch.randn(9, 4), "b": torch.randn(9, 4)}])), tmp_path / "acts", metadata={"model": "m"})
    data = DataConfig(source="shards", path=str(tmp_path / "acts"), hook="a", target_hook="b")
    assert origin(data) == {"model_name": "m", "hook_name": "a", "hook_name_out": "b"}


@pytest.mark.parametrize("source", ["synthetic", "given"])
def test_what_comes_from_nowhere_belongs_nowhere(source):
    assert origin(DataConfig(source=source)) == {}
