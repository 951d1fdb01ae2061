"""Compile every Triton kernel for every GPU target, without a GPU:  python -m bench.aot

What is compiled is what can be launched (launches.py): a kernel or a row of TILES that no launch reaches is an error. Every
compiled kernel is read for registers, spills, shared memory, tensor-core and copy-engine instructions, float atomics, and
row offsets multiplied in int32 (ttir.py). The exit status is 1 where anything is at fault.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
import triton
from triton.compiler import ASTSource

from .launches import TARGETS, Launch, record, unreached
from .ttir import int32_row_offsets

# bytes of shared memory one program can have: Triton compiles more without a word, and then the launch fails
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
GATED = ("sm_80", "sm_90")  # where spills, and 16-bit products off the tensor cores, are faults


@dataclass
class Record:
    """What the compiler made of one launch. Bytes, or counts of instructions."""

    kernel: str
    tile: str
    variant: str
    target: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_cores: int = 0
    tma: int = 0
    float_atomics: int = 0
    int32_rows: list[str] = field(default_factory=list)
    wants_tensor_cores: bool = False
    seconds: float = 0.0
    error: str | None = None


def inspect(launch: Launch) -> Record:
    """Compile one launch and read the machine code."""
    record = Record(launch.kernel, launch.tile(), launch.variant(), launch.target)
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    began = time.perf_counter()
    try:
        compiled = triton.compile(source, target=TARGETS[launch.target], options=dict(launch.options))
    except Exception as error:  # whatever a compiler throws is a finding
        record.error = (str(error).strip() or type(error).__name__)[-2000:]
        return record
    finally:
        record.seconds = round(time.perf_counter() - began, 2)
    ttir = compiled.asm["ttir"]
    record.shared = compiled.metadata.shared
    record.int32_rows = int32_row_offsets(ttir)
    record.wants_tensor_cores = bool(re.search(r"tt\.dot .*xb?f16>", ttir))
    if "cubin" in compiled.asm:
        _read_cubin(record, compiled.asm["cubin"], ttir)
    else:
        _read_amdgcn(record, compiled.asm["amdgcn"])
    record.float_atomics = max(record.float_atomics, len(re.findall(r"tt\.atomic_rmw fadd", ttir)))
    return record


def _read_cubin(record: Record, cubin: bytes, ttir: str) -> None:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tools.cuobjdump.path, "-res-usage", file.name], text=True)
        record.registers, record.stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # the disassembler takes 0.3 s, half of all the time here: it is asked where there can be something to count
        if not record.stack and not re.search(r"tt\.dot|tt\.atomic|tensordesc", ttir):
            return
        code = subprocess.check_output([tools.nvdisasm.path, "-ndf", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    for opcode in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE):
        name, *modifiers = opcode.split(".")
        record.spills += name in ("LDL", "STL")
        record.tensor_cores += bool(re.fullmatch(r"[A-Z]G?MMA|UTC\w*MMA", name))
        record.tma += name == "UTMALDG"
        atomic = name in ("RED", "REDG", "ATOM", "ATOMG", "ATOMS", "UTMAREDG", "UBLKRED")
        record.float_atomics += atomic and any(re.match(r"B?F(16|32|64)", m) for m in modifiers)


def _read_amdgcn(record: Record, text: str) -> None:
    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, text)))

    record.registers = total(r"\.vgpr_count:\s+(\d+)")
    record.stack = total(r"\.private_segment_fixed_size:\s+(\d+)")
    record.spills = total(r"\.[sv]gpr_spill_count:\s+(\d+)")
    record.tensor_cores = len(re.findall(r"^\s*v_s?mfmac?_", text, re.MULTILINE))
    adds = r"^\s*(?:(?:global|flat|buffer)_atomic|ds)_(?:pk_)?add_(?:rtn_)?b?f(?:16|32|64)"
    record.float_atomics = len(re.findall(adds, text, re.MULTILINE))


def faults(record: Record) -> list[str]:
    """Why this kernel may not ship; empty where it may."""
    if record.error:
        return ["does not compile"]
    found = []
    gated = record.target in GATED
    if gated and (record.stack or record.spills):
        found.append(f"spills: {record.stack} bytes of stack, {record.spills} accesses")
    if record.shared > SHARED[record.target]:
        found.append(f"{record.shared} bytes of shared memory exceed {SHARED[record.target]}")
    if gated and record.wants_tensor_cores and not record.tensor_cores:
        found.append("16-bit product without tensor cores")
    if record.float_atomics:
        found.append(f"{record.float_atomics} float atomics: another sum every run")
    if record.int32_rows:
        found.append(f"int32 row offset: {', '.join(record.int32_rows)}")
    return found


# --------------------------------------------------------------------------------------------------------------- report


def line(record: Record) -> str:
    numbers = (record.registers, record.stack, record.spills, record.shared, record.tensor_cores, record.tma)
    cells = " ".join(f"{n:>{w}}" for n, w in zip(numbers, (4, 6, 7, 8, 4, 4), strict=True))
    verdict = "; ".join(faults(record)) or "ok"
    return f"{record.target:7}{cells}  {record.kernel} [{record.variant}] {record.tile}: {verdict}"


HEADER = f"{'target':7}{'regs':>4} {'stack':>6} {'spills':>7} {'shared':>8} {'mma':>4} {'tma':>4}"


def main(arguments: list[str] | None = None) -> int:
    description = "Compile every kernel for every GPU target, without a GPU."
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=description)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", metavar="PATH", help="write all records there")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    chosen = parser.parse_args(arguments)

    began = time.perf_counter()
    torch.set_num_threads(1)  # the launchers' tensors are tiny
    recorder = record()
    missing = unreached(recorder)
    launches = [
        launch
        for launch in recorder.launches.values()
        if launch.target in (chosen.target or TARGETS) and (chosen.kernel or "") in launch.kernel
    ]
    print(f"triton {triton.__version__}: {len(launches)} kernels\n{HEADER}", flush=True)
    records = []
    # a cache of our own: what an earlier run compiled must not count; workers inherit it
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(inspect, launches):
                records.append(result)
                print(line(result), flush=True)
                if result.error:
                    print(result.error)
    for what in missing:
        print(f"never launched: {what}")
    failed = [r for r in records if faults(r)]
    counts = ", ".join(f"{n} on {target}" for target, n in Counter(r.target for r in records).items())
    print(f"{counts}: {len(failed)} at fault, in {time.perf_counter() - began:.0f} s")
    if chosen.json:
        content = {"triton": triton.__version__, "unreached": missing, "records": [asdict(r) for r in records]}
        with open(chosen.json, "w") as file:
            json.dump(content, file, indent=1)
    return int(bool(failed or missing or not records))


if __name__ == "__main__":
    sys.exit(main())
