"""The package as a whole: what it imports, what it installs, and how it sits beside its neighbours."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer may import the ones before it. A module that stands in no layer yet fails test_every_module_has_a_layer.
LAYERS = [
    {"kernels", "optional", "settings", "strict_json", "schedules", "interrupt", "embedded", "host_memory"},
    {"sparse_code", "normalize", "config", "state_files"},
    {"functional", "checkpoint"},
    {"activations", "plan"},
    {"sae"},
    {"losses", "optim", "metrics", "calibrate", "dead", "data"},
    {"objective", "initialise", "resample", "logs", "splice", "plots", "formats"},
    {"steppers", "hub"},
    {"member"},
    {"trainer", "evaluation"},
    {"hosts", "analysis"},
    {"cli"},
]
# sae.save(path) and fastsae.load are one pair of names to users
UPWARD = {("sae", "formats")}
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
CORE = ["kernels", "sparse_code", "functional", "activations", "sae", "losses", "optim"]
MAY_IMPORT = {"fastsae", "torch", "triton", "numpy", "safetensors"}


def python(code: str, *, cwd: Path = ROOT, executable: Path | str = sys.executable, **env: str) -> str:
    """What `code` prints in a fresh process, where the working directory comes first on sys.path."""
    # no triton interpreter: conftest sets it for this process, and users do not
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run([executable, "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def sources(name: str) -> list[Path]:
    """The files of fastsae.<name>, be it a module or a folder. None if it is not written yet."""
    folder = ROOT / "fastsae" / name
    return sorted(folder.resolve().rglob("*.py")) if folder.is_dir() else [f for f in [folder.with_suffix(".py")] if f.exists()]


def imports(file: Path, package: str) -> Iterator[str]:
    """Full names of what `file`, a module of `package`, imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def imports_of(name: str) -> set[tuple[str, str]]:
    """(file, imported name) of fastsae.<name>."""
    found: set[tuple[str, str]] = set()
    for file in sources(name):
        home = ROOT / "fastsae" / name
        inside = file.relative_to(home.resolve()).parts[:-1] if home.is_dir() else ()
        package = ".".join(["fastsae", *([name] if home.is_dir() else []), *inside])
        found |= {(str(file.relative_to(ROOT)), full) for full in imports(file, package)}
    return found


# ── imports ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bare_kernels_is_empty():
    """transformers probes for an unrelated package of that name; from the checkout root it finds ours."""
    public = python("import kernels; print(kernels.__version__, [n for n in vars(kernels) if not n.startswith('_')])")
    assert public == "0.0.0 []"


def test_import_is_light():
    heavy = "torch triton transformers datasets matplotlib tyro".split()
    assert python(f"import sys, fastsae; print([m for m in {heavy} if m in sys.modules])") == "[]"
    heavy = "transformers datasets matplotlib tyro".split()
    assert python(f"import sys, fastsae; fastsae.SAE; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
import torch
from fastsae import SAE, TopK, kernels
sae = SAE(d_in=4, d_sae=8, activation=TopK(k=2))
x = torch.randn(3, 4)
sae(x).sum().backward()
code = sae.encode_sparse(x)
assert torch.allclose(sae.decode(code), code.dense() @ sae.W_dec + sae.b_dec, atol=1e-6)
assert kernels.describe().count("\\n") == 0
print(kernels.describe())
"""
    assert "torch" in python(code)


def test_core_runs_with_torch_alone():
    """An import by core code or bench of anything but torch, triton, numpy, safetensors and the standard library fails."""
    needs_more = {"__main__", "embedded_lm"}  # the second makes a file that is shipped, with tokenizers and transformers
    bench = [f.stem for f in (ROOT / "bench").glob("*.py") if f.stem not in needs_more and not f.stem.startswith("test_")]
    code = f"""
import builtins, importlib, sys
import_ = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {{}}).get("__name__", "").split(".")[0] in ("fastsae", "bench")
    if ours and level == 0 and name.split(".")[0] not in {MAY_IMPORT} | {{"bench"}} | sys.stdlib_module_names:
        raise ImportError(f"{{globals['__name__']}} imports {{name}}")
    return import_(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
import torch
from fastsae import SAE, TopK
SAE(d_in=4, d_sae=8, activation=TopK(k=2))(torch.randn(3, 4)).sum().backward()
for name in {[f"fastsae.{name}" for name in CORE if sources(name)] + [f"bench.{name}" for name in bench]}:
    importlib.import_module(name)
"""
    python(code)


def test_core_imports_nothing_else():
    """The same by reading, which sees imports inside functions too."""
    found = {pair for name in CORE for pair in imports_of(name)}
    assert not {(file, full) for file, full in found if full.split(".")[0] not in MAY_IMPORT | sys.stdlib_module_names}


def test_imports_point_one_way():
    for name, layer in LAYER.items():
        for file, full in imports_of(name):
            top, _, rest = full.partition(".")
            assert top not in ("tests", "bench"), f"{file} imports {full}"
            other = rest.split(".")[0]
            if top == "fastsae" and other in LAYER and (name, other) not in UPWARD:
                assert other == name or LAYER[other] < layer, f"{file}, layer {name}, imports {full}"


def test_every_module_has_a_layer():
    modules = {p.stem for p in (ROOT / "fastsae").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert modules - {"__init__", "__main__"} <= set(LAYER)


# ── neighbours ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.hosts
def test_transformers_and_sae_lens_work_from_the_checkout():
    """Where `import kernels` finds this repository's folder."""
    interpreter = ROOT / ".venv-hosts" / "bin" / "python"
    assert interpreter.exists(), "no .venv-hosts: run `make .venv-hosts`"
    code = """
import torch, transformers
config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
logits = transformers.GPT2LMHeadModel(config)(torch.arange(4)[None]).logits
assert logits.shape == (1, 4, 16)
import sae_lens
import kernels
print(kernels.__version__)
"""
    assert python(code, executable=interpreter, HF_HUB_OFFLINE="1", WANDB_MODE="offline").endswith("0.0.0")


# ── distribution ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build reads: setuptools writes beside it."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastsae", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_wheel_and_sdist(checkout, tmp_path):
    """`build` makes the wheel from the sdist, so this proves both complete."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path, checkout]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    [sdist] = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "sdist", filter="data")
    zipfile.ZipFile(wheel).extractall(tmp_path / "wheel")

    files = {str(f.relative_to(ROOT)) for f in (ROOT / "fastsae").rglob("*.py")}
    files |= {f"fastsae/kernels/{f.name}" for f in (ROOT / "kernels").glob("*.py")}
    files |= {"fastsae/py.typed", "fastsae/__init__.pyi"}
    for place in (tmp_path / "wheel", next((tmp_path / "sdist").iterdir())):
        assert files <= {str(f.relative_to(place)) for f in place.rglob("*")}
        # through sys.modules, because the attribute of that name is the function
        where = python("import sys, fastsae.kernels.decode; print(sys.modules['fastsae.kernels.decode'].__file__)", cwd=place)
        assert Path(where) == place / "fastsae" / "kernels" / "decode.py"
    assert {p.name for p in (tmp_path / "wheel").iterdir()} == {"fastsae", "fastsae-0.1.0.dist-info"}


def test_install_changes_nothing_that_is_there(checkout, tmp_path):
    """Into an environment that has torch, pip installs fastsae and neither torch, numpy nor triton again."""
    report = tmp_path / "report.json"
    # without an index a changed version could not be found, and pip would fail rather than wait for the network
    flags = ["--dry-run", "--no-index", "--no-build-isolation", "--report", report]
    install = [sys.executable, "-m", "pip", "install", *flags, f"{checkout}[triton,dev]"]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert names == {"fastsae"}


# ── nothing of one machine ───────────────────────────────────────────────────────────────────────────────────────────────


def test_no_machine_paths():
    """No absolute home or work folder, and no package registry of its own, in any file that git would commit."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    local = re.compile(r"(?<![\w.])/(home|root|Users|work|workspace|mnt|opt)/\w|index-url|find-links|file:///")
    wrong = []
    for file in (ROOT / name for name in filter(None, listed.stdout.split("\0"))):
        if file != Path(__file__) and file.is_file():
            lines = enumerate(file.read_text(errors="replace").splitlines(), 1)
            wrong += [f"{file.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in lines if local.search(line)]
    assert not wrong, "\n".join(wrong)
