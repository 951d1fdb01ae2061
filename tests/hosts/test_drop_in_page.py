"""The code of docs/drop-in.md, where the host libraries are."""

from pathlib import Path

from test_docs import blocks


def test_code_runs():
    file = Path(__file__).parents[2] / "docs" / "drop-in.md"
    names: dict[str, object] = {"__name__": "__main__"}
    assert blocks(file)
    for code in blocks(file):
        exec(compile(code, file, "exec"), names)
