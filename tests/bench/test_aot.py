"""The compile report: what it lets pass, what it does not, and that it looks at everything that can be launched.

The compiler needs real @triton.jit functions. Without a GPU this process has interpreted ones, so compiling happens in one
subprocess without TRITON_INTERPRET, which prints what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot import Record, faults
from bench.ttir import int32_row_offsets

ROOT = Path(__file__).parents[2]

PROBE = """
import json
import triton
import triton.language as tl
from bench import aot, launches

@triton.jit
def bad(x, out, stride, BLOCK: tl.constexpr):
    n, d = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(out + d, tl.load(x + n * stride + d))

@triton.jit
def bad_in_loops(x, out, stride, rows, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    at = d
    n = tl.program_id(0)
    while n < rows:
        for i in range(rows):
            if i > n:
                at += n * stride
        n += 1
    tl.store(out + at, 1.0)

@triton.jit
def good(x, out, stride, rows, BLOCK: tl.constexpr):
    n, d = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < stride * rows  # a product that reaches no address
    at = tl.program_id(0).to(tl.int64) * stride + d
    tl.store(out + at, tl.load(x + at, mask=inside), mask=inside)

@triton.jit
def atomic(x, out, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.atomic_add(out + d % 2, tl.load(x + d))

def probe(kernel, target):
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n == "BLOCK" else "*fp32" if n in ("x", "out") else "i32" for n in names}
    options = {"num_warps": 4, "num_stages": 3}
    launch = launches.Launch(__name__, kernel.fn.__name__, target, signature, {(len(names) - 1,): 128}, {}, options)
    return aot.inspect(launch)

recorder = launches.record()
chosen = {}
for launch in recorder.launches.values():
    if launch.target == "sm_90":
        chosen.setdefault(launch.kernel, launch)
    if launch.kernel == "_gemm_kernel" and launch.target == "sm_90" and "TMA" in launch.variant():
        chosen["gemm"] = launch
records = [probe(kernel, t) for kernel in (bad, bad_in_loops, good, atomic) for t in ("sm_90", "gfx942")]
records += [aot.inspect(chosen[name]) for name in ("_decode_kernel", "gemm")]
missing = launches.unreached(recorder)
few = launches.Recorder()
few.launches = {k: v for k, v in recorder.launches.items() if v.kernel != "_count_kernel"}
print(json.dumps({
    "records": [[r.kernel, r.target, aot.faults(r), vars(r)] for r in records],
    "missing": missing,
    "missing_without_one": launches.unreached(few),
    "seen": sorted({launch.kernel for launch in recorder.launches.values()}),
}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("aot")
    (folder / "probe.py").write_text(PROBE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    # as a module, so that kernels can be found again by name
    command = [sys.executable, "-c", "import probe"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_faults_of_compiled_kernels(compiled, target):
    found = {kernel: texts for kernel, where, texts, _ in compiled["records"] if where == target}
    assert found["bad"] and found["bad"][0].startswith("int32 row offset")
    assert found["bad_in_loops"] and found["bad_in_loops"][0].startswith("int32 row offset")
    assert found["good"] == []
    assert found["atomic"] and "float atomics" in found["atomic"][0]


def test_real_kernels_pass_on_sm_90(compiled):
    records = {kernel: record | {"faults": texts} for kernel, _, texts, record in compiled["records"]}
    for kernel in ("_decode_kernel", "_gemm_kernel"):
        assert records[kernel]["faults"] == [] and records[kernel]["registers"] > 0
    assert records["_gemm_kernel"]["tensor_cores"] > 0 and records["_gemm_kernel"]["tma"] > 0


def test_every_kernel_and_every_tile_is_recorded(compiled):
    assert compiled["missing"] == []
    assert "_latent_kernel" in compiled["seen"] and "_finish_row" not in compiled["seen"]
    # a kernel that no launch reaches, and rows of TILES that none chooses, are named
    assert "kernel _count_kernel" in compiled["missing_without_one"]
    assert any(text.startswith("TILES['latent']") for text in compiled["missing_without_one"])


def record(**changes) -> Record:
    clean = {"kernel": "_k", "tile": "", "variant": "", "target": "sm_90", "registers": 64, "shared": 1024}
    return Record(**clean | changes)


def test_verdicts():
    assert faults(record()) == []
    assert faults(record(stack=8)) and faults(record(spills=1, target="sm_80"))
    assert not faults(record(stack=8, target="sm_120"))  # reported there, and no fault
    assert faults(record(float_atomics=1, target="gfx942"))
    assert not faults(record(shared=232_448)) and faults(record(shared=232_449))
    assert faults(record(shared=65_537, target="gfx942")) and faults(record(shared=166_913, target="sm_80"))
    assert faults(record(wants_tensor_cores=True)) and not faults(record(wants_tensor_cores=True, tensor_cores=1))
    assert faults(record(int32_rows=["row"])) and faults(record(error="no"))


TTIR = """
module {{
  tt.func public @k(%p: !tt.ptr<f32>, %n: i32, %stride: i32) {{
    %c = arith.constant 64 : i32
    %cst = arith.constant dense<3> : tensor<8xi32>
    %pid = tt.get_program_id x : i32
    %row = {product}
    %wide = arith.extsi %row : i32 to i64
    %q = tt.addptr %p, %wide : !tt.ptr<f32>, i64
    tt.return
  }}
}}
"""


def test_rule_on_text():
    assert int32_row_offsets(TTIR.format(product="arith.muli %pid, %stride : i32")) == ["%row"]
    assert int32_row_offsets(TTIR.format(product="arith.muli %pid, %stride : i32 loc(#loc1)")) == ["%row"]
    assert int32_row_offsets(TTIR.format(product="arith.muli %pid, %c : i32")) == []
    assert int32_row_offsets(TTIR.format(product="arith.addi %pid, %stride : i32")) == []
