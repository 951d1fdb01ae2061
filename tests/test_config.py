"""Settings: checked by name, and the same from Python, plain values and back."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsae.config import DataConfig, LossConfig, OptimConfig, SAEConfig, TrainConfig, with_values
from fastsae.settings import from_dict, to_dict

CONFIGS = st.builds(
    TrainConfig,
    sae=st.builds(
        SAEConfig,
        activation=st.sampled_from(["topk", "batchtopk", "jumprelu"]),
        k=st.integers(1, 100),
        d_sae=st.none() | st.integers(1, 10**6),
        theta=st.floats(0, 1),
        apply_b_dec_to_input=st.none() | st.booleans(),
    ),
    loss=st.builds(LossConfig, coefficient=st.floats(0, 1e3), prefixes=st.sampled_from([(), (3, 5)])),
    optim=st.builds(OptimConfig, lr=st.none() | st.floats(0, 1), betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))),
    data=st.builds(DataConfig, hook=st.text(), buffer=st.integers(1024, 10**6)),
    sweep=st.sampled_from([(), ("k=1,2", "lr=1e-3,2")]),
)


@given(CONFIGS)
def test_plain_values_and_back(config):
    assert from_dict(to_dict(config), TrainConfig) == config


BAD = {
    "setting 'sea'": {"sea": {}},
    "did you mean 'k'": {"sae": {"kk": 3}},
    "setting 'sae.zebra': pass one of": {"sae": {"zebra": 1}},
    "k='3': pass a whole number": {"sae": {"k": "3"}},
    "k=0: pass a number >= 1": {"sae": {"k": 0}},
    "k=True": {"sae": {"k": True}},
    "k=4.0": {"sae": {"k": 4.0}},
    "lr=nan": {"optim": {"lr": float("nan")}},
    "betas=(0.9,)": {"optim": {"betas": [0.9]}},
    "pass two numbers from 0 to below 1": {"optim": {"betas": [0.9, 1.0]}},
    "activation='tpok': pass one of topk": {"sae": {"activation": "tpok"}},
    "prefixes=[5, 3]": {"loss": {"prefixes": [5, 3]}},
    "prefixes=[3] and ks=[2]": {"loss": {"prefixes": [3], "ks": [2]}},
    "pass target_l0": {"loss": {"sparsity": "l0_to_target"}},
    "source='shards' without a path": {"data": {"source": "shards"}},
    "tokens=5 is below batch_size=1024": {"tokens": 5},
    "no multiple of micro_batch=3": {"optim": {"micro_batch": 3}},
    "buffer=8 is below batch_size": {"data": {"buffer": 8}},
    "sweep='k'": {"sweep": ["k"]},
    "different lengths": {"sweep": ["k=1,2", "lr=1"]},
    "same SAE twice": {"sweep": ["k=2,2"]},
    "did you mean 'bandwidth'": {"sweep": ["bandwith=1,2"]},
    "the config is 3": 3,
    "sae. is [1]": {"sae": [1]},
}


@pytest.mark.parametrize(("message", "values"), BAD.items())
def test_impossible_settings_are_refused_by_name(message, values):
    with pytest.raises(ValueError) as refused:
        from_dict(values, TrainConfig)
    assert message in str(refused.value)


def test_a_sweep_is_one_config_for_each_sae():
    members = TrainConfig(sweep=("k=8,16", "lr=1e-3,2e-3")).members()
    assert list(members) == ["k=8,lr=0.001", "k=16,lr=0.002"]
    assert members["k=16,lr=0.002"] == with_values(TrainConfig(), {"k": 16, "lr": 2e-3})
    assert TrainConfig().members() == {"": TrainConfig()}


def test_every_setting_has_one_home_and_a_help_text():
    """Flags have no prefixes, so names must differ between groups."""
    names = [f.name for kind in (SAEConfig, LossConfig, OptimConfig, DataConfig, TrainConfig) for f in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_making_one_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TrainConfig(out="somewhere")
    assert not list(tmp_path.iterdir())
