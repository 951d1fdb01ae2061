"""A tree comes back as it was, to the bit and the type; what is not a tree's file is refused by name."""

import json
import math
import random
import struct
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsae import SAE, TopK, state_files
from fastsae.optim import FusedAdam
from fastsae.state_files import load_tensors, load_tree, save_tensors, save_tree
from fastsae.strict_json import read_json, write_json

DTYPES = list(state_files._DTYPES)


def bits(value):
    """Comparable, and equal only if every type and every bit is: NaN payloads, -0.0, 1 and True and 1.0."""
    if isinstance(value, Tensor):
        return "tensor", value.dtype, tuple(value.shape), bytes(value.detach().contiguous().view(-1).view(torch.uint8).tolist())
    if isinstance(value, dict):
        return "dict", [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if isinstance(value, float):
        return float, "nan" if math.isnan(value) else struct.pack("d", value)
    return type(value), value


def there_and_back(folder, tree):
    save_tree(folder, "state", tree)
    return load_tree(folder, "state")


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    raw = torch.randint(0, 256, [math.prod(shape) * dtype.itemsize], dtype=torch.uint8)  # NaN, infinities and denormals too
    t = (raw.view(-1) % 2).bool() if dtype == torch.bool else raw.view(dtype)
    t = t.view(shape)
    return t.transpose(0, -1) if t.dim() and draw(st.booleans()) else t


keys = st.text(max_size=3) | st.sampled_from(["$tensor", "a/b", "a", "__metadata__"]) | st.integers()
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | tensors()
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=4) | st.lists(t, max_size=4).map(tuple) | st.dictionaries(keys, t, max_size=4)
)


@given(tree=st.dictionaries(keys, trees, max_size=5))
def test_any_tree_comes_back_to_the_bit(tmp_path, tree):
    assert bits(there_and_back(tmp_path, tree)) == bits(tree)


def test_trees_with_names_that_collide(tmp_path):
    a, b, c = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    tree = {"a/b": a, "a": {"b": b}, "n": {0: a, "0": b}, "a/b'": c}
    assert bits(there_and_back(tmp_path, tree)) == bits(tree)


def test_optimizer_scheduler_and_random_states_go_on_as_if_never_saved(tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        sae = SAE(8, 24, TopK(3))
        optimizer = FusedAdam(sae)
        generators = random.Random(seed), np.random.default_rng(seed), torch.Generator().manual_seed(seed)  # noqa: S311
        return sae, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50), *generators

    def step(sae, optimizer, schedule, python, numpy, generator):
        x = torch.randn(6, 8, generator=generator) * python.random() + numpy.random()
        optimizer.zero_grad()
        (sae(x) - x).square().sum().backward()
        optimizer.step()
        schedule.step()

    first, second = make(0), make(1)
    for _ in range(3):
        step(*first)
    sae, optimizer, schedule, python, numpy, generator = first
    state = {
        "model": sae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "python": python.getstate(), "numpy": numpy.bit_generator.state, "generator": generator.get_state(),
    }  # fmt: skip
    loaded = there_and_back(tmp_path, state)
    assert bits(loaded) == bits(state)

    sae, optimizer, schedule, python, numpy, generator = second
    sae.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])
    python.setstate(loaded["python"])
    numpy.bit_generator.state = loaded["numpy"]
    generator.set_state(loaded["generator"])
    for _ in range(3):
        step(*first)
        step(*second)
    assert bits(first[0].state_dict()) == bits(second[0].state_dict())


def test_every_dtype_is_read_by_the_safetensors_library(tmp_path):
    ours = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in DTYPES} | {"scalar": torch.tensor(7), "none": torch.ones(0, 3)}
    save_tensors(tmp_path / "x.safetensors", ours)
    theirs = load_file(tmp_path / "x.safetensors")
    assert {name: bits(t) for name, t in theirs.items()} == {name: bits(t) for name, t in ours.items()}


def test_what_is_loaded_owns_its_memory(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1000)})
    loaded = load_tensors(tmp_path / "x.safetensors")["a"]
    (tmp_path / "x.safetensors").write_bytes(b"\1" * 4064)
    assert bool((loaded == 1).all()) and loaded.untyped_storage().nbytes() == 4000 and not loaded.requires_grad


def test_saving_holds_one_copy_at_a_time(tmp_path, monkeypatch):
    """The largest thing that is written at once is one tensor, and transposed ones are copied only then."""
    alive = largest = 0
    fill = state_files.fill

    def counted(new, values):
        nonlocal alive, largest
        t = fill(new, values)
        alive += 1
        largest = max(largest, alive)
        weakref.finalize(t, gone)
        return t

    def gone():
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(state_files, "fill", counted)
    save_tensors(tmp_path / "x.safetensors", {str(i): torch.ones(50, 40).T for i in range(6)})
    assert largest == 1


@pytest.mark.parametrize(
    "value, complaint",
    [
        (np.float64(1.0), "/a/0 is a numpy.float64"),
        ({1, 2}, "/a/0 is a builtins.set"),
        (np.zeros(3), "numpy.ndarray"),
        (print, "builtin_function"),
        ({1.5: 0}, "/a/0 has the key 1.5"),
        ({True: 0}, "has the key True"),
        (torch.zeros(2, device="meta"), "/a/0 is torch.float32, torch.strided on meta"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_refuses_what_would_not_come_back(tmp_path, value, complaint):
    with pytest.raises(TypeError, match=complaint):
        save_tree(tmp_path, "state", {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_too_many_tensors_are_refused_before_they_are_written(tmp_path):
    t = torch.zeros(1)
    with pytest.raises(ValueError, match="30000 tensors need a header of"):
        save_tree(tmp_path, "state", {"a": [t] * 30_000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"a": {"$tensor": "/missing"}, "t": {"$tensor": "/t"}},
        {"a": {"$tensor": "/t"}, "b": {"$tensor": "/t"}},
        {"t": {"$tensor": ["/t"]}},
        {"t": {"$tensor": "/t", "more": 1}},
        {},  # leaves /t over
        {"t": {"$tensor": "/t"}, "a": {"$pickle": "gASV"}},
        {"t": {"$tensor": "/t"}, "a": {"$float": "many"}},
        {"t": {"$tensor": "/t"}, "a": {"$items": [[1]]}},
        {"t": {"$tensor": "/t"}, "a": {"$items": [[[], 1]]}},
        {"t": {"$tensor": "/t"}, "a": {"$tuple": None}},
    ],
)
def test_a_tree_that_was_never_saved_is_refused(tmp_path, content):
    save_tree(tmp_path, "state", {"t": torch.zeros(2)})
    write_json(tmp_path / "state.json", content)
    with pytest.raises(ValueError, match="state.json is not"):
        load_tree(tmp_path, "state")


def test_a_deep_tree_is_refused(tmp_path):
    save_tree(tmp_path, "state", {})
    for depth in (600, 900, 5000):
        (tmp_path / "state.json").write_text('{"a":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ValueError, match="state.json"):
            load_tree(tmp_path, "state")


def header(entries: object, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",  # a pickle
        header({}, 2**60),
        header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),  # no data
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        header({"a": {"dtype": "OBJECT", "shape": [], "data_offsets": [0, 0]}}),
        header(b"[" * 100_000),
        header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}) + b"12",  # a byte too many
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        load_tensors(path)


def test_a_long_header_is_not_parsed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header(b"{}" + b" " * state_files.HEADER_LIMIT))
    assert load_file(path) == {}
    with pytest.raises(ValueError, match=f"{path} says that its header has"):
        load_tensors(path)


def test_json_and_tensors_lie_in_the_open(tmp_path):
    save_tree(tmp_path, "state", {"lr": 0.1, "state": {0: {"exp_avg": nn.Parameter(torch.ones(2))}}, "nan": math.nan})
    assert read_json(tmp_path / "state.json") == {
        "lr": 0.1,
        "state": {"$items": [[0, {"exp_avg": {"$tensor": "/state/0/exp_avg"}}]]},
        "nan": {"$float": "nan"},
    }
    assert list(load_file(tmp_path / "state.safetensors")) == ["/state/0/exp_avg"]
