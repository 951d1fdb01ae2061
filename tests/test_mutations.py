"""The tests can fail: with one line of a kernel wrong, the tests of that kernel say so.

Each mutant is a copy of the package with one piece of text replaced, in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tests/kernels/"

# (file, text, what it becomes, tests that must fail[, which of them: the Triton path unless said])
MUTANTS = {
    "decode stores past the end of a row": (
        "kernels/decode.py", "acc.to(y.dtype.element_ty), mask=inside)", "acc.to(y.dtype.element_ty))",
        KERNELS + "test_bounds.py::test_decode",
    ),
    "the loss stores past the end of a row": (
        "kernels/loss.py", "acc.to(error.dtype.element_ty), mask=inside)", "acc.to(error.dtype.element_ty))",
        KERNELS + "test_bounds.py::test_decode_loss",
    ),
    "dW is 2 % too large": (
        "kernels/latent_backward.py", "row.to(gradient.dtype.element_ty)", "(row * 1.02).to(gradient.dtype.element_ty)",
        KERNELS + "test_latent_backward.py::test_matches_reference",
    ),
    "dW is 2 % too large on a CPU": (
        "kernels/latent_backward.py", "dW_dec = segment_rows(g,", "dW_dec = 1.02 * segment_rows(g,",
        KERNELS + "test_latent_backward.py::test_matches_reference", "torch",
    ),
    "the last part of a split latent is left out": (
        "kernels/latent_backward.py", "for part in range(count):", "for part in range(count - 1):",
        KERNELS + "test_latent_backward.py::test_matches_reference",
    ),
    "rows are taken for bags": (
        "kernels/latent_backward.py", "x + bag // levels * stride_x", "x + bag * stride_x",
        KERNELS + "test_latent_backward.py::test_matches_reference",
    ),
    "the GEMM forgets the bias": (
        "kernels/dense_encode.py", "pre = acc + tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]", "pre = acc",
        KERNELS + "test_encode.py::test_dense_encode_matches_reference",
    ),
    "a tile that ties is not opened": (
        "kernels/topk.py", "(top.to(tl.int64) >= (worst >> 32))", "(top.to(tl.int64) > (worst >> 32))",
        KERNELS + "test_properties.py::test_a_tile_that_is_opened_late_still_wins_its_ties",
    ),
    "ties go to the higher latent": (
        "kernels/topk.py", "low = 4294967295 - (first + at).to(tl.int64)", "low = (first + at).to(tl.int64)",
        KERNELS + "test_select.py::test_ties_go_to_the_lower_latent",
    ),
    "the end of a ragged tile is searched": (
        "kernels/topk.py", "candidates = tl.where(at < C, (_ordered(score).to(tl.int64) << 32) | low, LOWEST)",
        "candidates = (_ordered(score).to(tl.int64) << 32) | low", KERNELS + "test_select.py::test_topk_is_exact",
    ),
    "a later one of equal tiles replaces an earlier": (
        "kernels/topk.py", "_best(known, self.k, ids)", "_best(known, self.k)",
        KERNELS + "test_select.py::test_tiles_kept_from_piece_to_piece_hold_the_best", "",
    ),
    "a threshold that is just met fires": (
        "kernels/threshold.py", "over = pre > theta", "over = pre >= theta",
        KERNELS + "test_select.py::test_threshold_is_exact", "torch",
    ),
    "levels get only their own gradient": (
        "kernels/loss.py", "g[:, p] += g[:, p + 1]", "pass",
        KERNELS + "test_loss.py::test_matches_reference", "torch",
    ),
    "theta is pushed the wrong way": (
        "fastsae/activations.py", "-straight_through, None", "straight_through, None",
        "tests/test_activations.py::test_equals_its_definition_in_fp64", "Jump",
    ),
}  # fmt: skip


def copy_of_the_package(to: Path) -> None:
    for folder in ("fastsae", "kernels", "tests/kernels"):
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py", "tests/helpers.py", "tests/test_activations.py"):
        shutil.copy(ROOT / name, to / name)
    assert (to / "fastsae/kernels").resolve() == (to / "kernels").resolve()


def run(root: Path, *tests: str) -> subprocess.CompletedProcess:
    # no plugins that this does not need: each costs start-up time
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", "--tb=line", "--timeout=100"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "FASTSAE_EXAMPLES": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=root, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_is_caught(mutant, tmp_path):
    file, text, becomes, tests, *which = MUTANTS[mutant]
    copy_of_the_package(tmp_path)
    source = (tmp_path / file).read_text()
    assert source.count(text) == 1, f"{file} no longer holds {text!r} once: change the mutant with it"
    (tmp_path / file).write_text(source.replace(text, becomes))
    result = run(tmp_path, tests, "-k", *(which or ["triton"]))
    # 1: tests failed. Reading outside may also kill the process, by a signal.
    assert result.returncode == 1 or result.returncode < 0, f"survived {tests} {which}\n{result.stdout}{result.stderr}"
    assert result.returncode < 0 or "1 failed" in result.stdout, result.stdout


def test_the_copy_itself_passes(tmp_path):
    """Otherwise mutants might fail for being copies."""
    copy_of_the_package(tmp_path)
    (tmp_path / "tests/test_origin.py").write_text(
        "from fastsae import kernels\nfrom pathlib import Path\n\n"
        "def test_origin():\n    assert Path(kernels.__file__).is_relative_to(Path.cwd())\n"
    )
    tests = [KERNELS + name for name in ("test_bounds.py", "test_loss.py", "test_by_latent.py::test_gather_latents")]
    result = run(
        tmp_path, "tests/test_origin.py", *tests, "tests/test_activations.py::test_whole_numbers_hold_ties_and_thresholds"
    )
    assert result.returncode == 0, result.stdout + result.stderr
