"""Every ```python block of README.md and docs/*.md runs. The blocks of a file share their names."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(file: Path) -> list[str]:
    """Its code, each block behind blank lines, so that a traceback shows the line number in the file."""
    text = file.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: m.start(1)].count("\n") + m[1] for m in found]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_code_runs(file, tmp_path, monkeypatch):
    if file.name == "drop-in.md" and find_spec("sae_lens") is None:
        pytest.skip("tests/hosts/test_drop_in_page.py runs it where the host libraries are")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(file):
        exec(compile(code, file, "exec"), names)
