"""What only a GPU can answer, with the prediction made beforehand:  python -m bench.questions [--out PATH]

Asked in order, the most telling first; every answer is saved before the next question. docs/gpu.md is generated from this
list and the saved answers (python -m bench.report). On a machine without a GPU, --tiny asks them at tiny sizes, which
answers nothing and shows that they can be asked.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import ask
from .ask import Answer, Here
from .environment import ROOT, environment
from .measure import ceilings, free_memory
from .table import markdown


@dataclass(frozen=True)
class Question:
    name: str
    asks: str
    prediction: str
    """for an H100 (798 TFLOP/s bf16, 3.0 TB/s), made before any run"""
    ask: Callable[[Here], Answer]


QUESTIONS = (
    Question(
        "cublas", "cuBLAS at R, bf16: one product, and fp32 chunks of 4096 latents", "22 ms; chunks 1.05 times that", ask.cublas
    ),
    Question(
        "selection", "each TopK selection at R, as a ratio to that product", "vendor GEMM 1.10, own GEMM 1.15", ask.selection
    ),
    Question(
        "step_R",
        "a training step at R against its floor",
        "Adam on bf16 41 ms, 85 %; FusedAdam fp32 80 ms, 80 %; split master 46 ms, with bf16 moments 41 ms",
        ask.step("R"),
    ),
    Question("latent_backward", "latent_backward at R", "3.5 ms, 75 % of copy", ask.latent_backward),
    Question("fused_update", "FusedAdam's update at M", "6.5 ms, 85 % of copy", ask.fused_update),
    Question(
        "update_formats",
        "FusedAdam's update at M by master/moments",
        "split/fp32 6.8 ms, 80 % of copy; with bf16 moments 4.8 ms, 75 %",
        ask.update_formats,
    ),
    Question("decode", "decode at R", "0.9 ms, 75 % of copy", ask.decode),
    Question("torch_topk", "torch.topk of stored [N, F] at R, which peers call", "bf16 9.3 ms, fp32 18.7 ms", ask.torch_topk),
    Question("own_gemm", "the Triton GEMM with tile maxima at M", "85 % of the vendor's", ask.own_gemm),
    Question(
        "tiles_gemm",
        "tile candidates of the 16-bit GEMM",
        "128 x 256 x 64 with 8 warps beats 128 x 128 x 64 by 10 %",
        ask.tile_candidates("gemm_16"),
    ),
    Question(
        "tiles_latent",
        "warps of latent_backward at width 4096",
        "8 warps, as shipped, within 3 % of the best",
        ask.tile_candidates("latent"),
    ),
    Question(
        "tiles_decode",
        "tile candidates of decode at width 4096",
        "1024 wide with 4 warps within 5 % of the best",
        ask.tile_candidates("decode"),
    ),
    Question(
        "tiles_topk",
        "warps of the row top-k at k 64",
        "4 warps, as shipped, within 3 % of the best",
        ask.tile_candidates("topk"),
    ),
    Question("chunk", "latents per chunk of a selection at R", "4096 to 8192 best, 16,384 leaves L2 and loses 3 %", ask.chunk),
    Question(
        "split",
        "entries of one latent per program, 8 latents firing everywhere",
        "512 to 1024 best; unsplit 3 times slower",
        ask.split,
    ),
    Question(
        "batch_topk",
        "BatchTopK selection against TopK at R",
        "1.15 times, nearly all of it 4k instead of k candidates",
        ask.batch_topk,
    ),
    Question("threshold", "JumpReLU selection against TopK at R", "1.0 times", ask.threshold),
    Question("step_S", "a training step at S against its floor", "Adam on bf16 1.6 ms, 50 %: launches", ask.step("S")),
    Question("step_M", "a training step at M against its floor", "Adam on bf16 14 ms, 80 %", ask.step("M")),
)


def answer_all(here: Here, answers: dict[str, Any], path: Path, command: str, deadline: float) -> None:
    """Ask each question in turn and save after each; none begins after `deadline` (time.perf_counter)."""
    for question in QUESTIONS:
        if time.perf_counter() > deadline:
            found: Answer = {"not asked": "out of time"}
        else:
            here.failures = {}
            try:
                with torch.no_grad() if not question.name.startswith(("step", "fused", "update")) else torch.enable_grad():
                    found = question.ask(here)
                found |= {f"{name} failed": _told(error) for name, error in here.failures.items()}
            except Exception as error:
                found = {"failed": _told(error)}
            free_memory(here.device)
        answers["answers"][question.name] = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
        save(path, answers)
        print(f"{question.name:<16} {said(answers['answers'][question.name])}", flush=True)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300].replace(str(ROOT), ".")


def page(answers: list[dict[str, Any]]) -> str:
    """docs/gpu.md."""
    head = """# Open questions for a GPU

Generated by `python -m bench.report` from `bench/questions.py` and, after a run, its answers. One command asks them all, with
the kernel tests before and compute-sanitizer after, needs no network and ends within nine minutes:

    bash bench/gpu.sh [OUT_DIR]

It needs the checkout and a python3 with torch, triton, numpy, safetensors, pytest and hypothesis. Copy what it writes into
`bench/results/` and run `python -m bench.report`. Predictions are for an H100 (798 TFLOP/s bf16, 3.0 TB/s), made before any
run. R is N 8192, D 4096, F 262,144, k 64; M is N 8192, D 2304, F 147,456, k 64; S is N 4096, D 768, F 49,152, k 32.
"""
    lines = []
    for i, question in enumerate(QUESTIONS, 1):
        found = [
            f"{said(a['answers'][question.name])} ({a['environment']['device']}, {a['environment']['date'][:10]})"
            for a in answers
            if question.name in a["answers"] and "not asked" not in a["answers"][question.name]
        ]
        lines.append([str(i), question.asks, question.prediction, "<br>".join(found) or "not yet measured"])
    return f"{head}\n{markdown(['', 'question', 'prediction', 'answer'], lines)}\n"


def said(answer: Answer) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name}: {value}" for name, value in answer.items())


def save(path: Path, answers: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(answers, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.questions", description="Ask a GPU the open questions.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-questions.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="no question begins later (default 240)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--show", type=Path, metavar="PATH", help="only print saved answers")
    chosen = parser.parse_args(arguments)
    if chosen.show:
        saved = json.loads(chosen.show.read_text())["answers"]
        for question in QUESTIONS:
            print(f"{question.name:<16} {said(saved.get(question.name, {'not asked': 'yet'}))}")
        return 0
    if not (torch.cuda.is_available() or chosen.tiny):
        print("bench.questions needs a GPU: none is visible to torch (--tiny asks at tiny sizes on a CPU)", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + chosen.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = chosen.tiny or device.type == "cpu"
    limits = ceilings(device, ("fp32",) if tiny else ("bf16", "tf32", "fp32"), small=tiny)
    command = "bash bench/gpu.sh"
    answers = {"environment": environment(device, command), "ceilings": asdict(limits), "tiny": tiny, "answers": {}}
    save(chosen.out, answers)
    rates = ", ".join(f"{rate:.4g} TFLOP/s {name}" for name, rate in limits.gemm_tflops.items())
    print(f"{answers['environment']['device']}: copies {limits.copy_gbs:.4g} GB/s, multiplies {rates}", flush=True)
    answer_all(Here(device, limits, tiny), answers, chosen.out, command, deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
