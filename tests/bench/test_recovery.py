"""The quality benchmarks, at a few steps."""

import json
from dataclasses import replace

import pytest

from bench.recovery import RUNS, goals, main, page


@pytest.fixture
def short(monkeypatch):
    """Twenty small steps of the synthetic runs."""
    for name in ("topk", "batchtopk", "jumprelu"):
        config = RUNS[name].config
        data = replace(config.data, buffer=128)
        config = replace(config, tokens=20 * 128, batch_size=128, data=data)
        monkeypatch.setitem(RUNS, name, replace(RUNS[name], config=config))


def test_a_run_is_measured_judged_and_shown(short, tmp_path):
    results, shown = tmp_path / "recovery.json", tmp_path / "recovery.md"
    assert main(["jumprelu", "topk"], results, shown) == 1, "twenty steps find no features"
    found = json.loads(results.read_text())
    assert list(found) == ["topk", "jumprelu"], "in the order of RUNS"
    ours = found["topk"]["trained"]["fastsae"]
    assert ours["l0"] == pytest.approx(5, abs=0.01)
    assert 0.3 < ours["matched"] <= ours["mmcs"] < 0.9 and 0 < ours["fvu"] < 2 and ours["seconds"] > 0
    assert found["topk"]["steps"] == 20 and found["topk"]["settings"]["k"] == 5
    assert shown.read_text() == page(found)
    assert "## topk" in shown.read_text() and "at least 0.98: not met" in shown.read_text()
    assert main(["batchtopk"], results, shown) == 1
    assert list(json.loads(results.read_text())) == ["topk", "batchtopk", "jumprelu"], "the others are kept"


def test_goals():
    def judged(ours, theirs, goal=None):
        return list(goals({"goal": goal, "trained": {"fastsae": ours, "SAELens": theirs}}).values())

    one = {"fvu": 0.1, "mmcs": 0.98, "ce_loss_score": 0.9}
    assert judged(one, one, goal=0.98) == [True, True, True]
    assert judged(one | {"fvu": 0.1011}, one) == [False, True]
    assert judged(one | {"ce_loss_score": 0.89}, one) == [True, False]
    assert judged(one | {"mmcs": 0.97}, one, goal=0.98) == [False, True, True]
    assert list(goals({"goal": 4, "ms": {}, "ratio": 3.9}).values()) == [False]


def test_an_unknown_run_is_refused(capsys):
    assert main(["topkk"]) == 2
    assert "unknown ['topkk']" in capsys.readouterr().err
