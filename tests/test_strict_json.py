"""What JSON may not say here."""

import json

import pytest

from fastsae import strict_json
from fastsae.strict_json import read_json, write_json


def test_what_is_written_is_read(tmp_path):
    content = {"a": [1, -0.0, 0.1, 10**40, True, None, "ä\ud800"], "b": {}}
    write_json(tmp_path / "x.json", content)
    assert json.dumps(read_json(tmp_path / "x.json")) == json.dumps(content)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"k": 1, "d": {"a": 1, "b": 2, "a": 3}}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e999]", "1e999 is too large"),
        ("[" * 100_000, "recursion"),
        ("1" * 10_000, "digits"),
        ('{"a": 1', "delimiter"),
        ("", "Expecting value"),
        (b"\xff\xfe\xfd", "decode"),
        (b"\0" * 100, "Expecting value"),
    ],
)
def test_refuses_by_name(tmp_path, text, complaint):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_large_file_is_not_parsed(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text(" " * strict_json.LIMIT + "1")
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ValueError, match=f"{path} is larger than"):
        read_json(path)


@pytest.mark.parametrize("content", [float("nan"), ["x" * strict_json.LIMIT]])
def test_what_could_not_be_read_is_not_written(tmp_path, content):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", content)
    assert not list(tmp_path.iterdir())
