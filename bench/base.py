"""Compare fastsae with another commit of itself:  python -m bench --base REF

Two worker processes, one with REF's fastsae from a git worktree and one with this tree's, take turns on the same inputs:
A B, B A, A B, ... What counts is the ratio within a pair, since both halves saw the same machine. Both run this tree's
bench, so they are measured alike. Refused while the kernels' tests are red: a fast wrong kernel proves nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Entry, Shape
from .environment import ROOT
from .measure import Timing, milliseconds

# fastsae from the tree that is asked for; bench, and all else, from this one
BOOT = """
import sys
tree, root = sys.argv[1:]
sys.path.insert(0, tree)
import fastsae, fastsae.kernels
assert fastsae.__file__.startswith(tree), f"{fastsae.__file__} is not in {tree}"
sys.path.remove(tree)
sys.path.insert(0, root)
from bench.base import serve
serve()
"""


def compare(ref: str, plan: Sequence[Entry], device: torch.device, seconds: float) -> int:
    """Print a line per entry; the exit status is 1 where something could not be compared."""
    print("the kernels' tests first ...", flush=True)
    if not tests_are_green(device):
        print("refused: the kernels' tests are red here, so a comparison would say nothing", file=sys.stderr)
        return 2
    entries = [entry for entry in plan if entry.sweep is None] or list(plan)
    with worktree(ref) as tree, worker(tree) as base, worker(ROOT) as here:
        print(f"{'case':<22}{'shape':>8} {'':4} {ref[:12] + ' ms':>16}{'here ms':>10}{'here / base':>13}  quartiles")
        failed = False
        for entry in entries:
            start = f"{entry.case.name:<22}{entry.shape.name:>8} {entry.precision}"
            try:
                for process in (base, here):
                    process.ask(prepare=_as_json(entry))
                pairs = _pairs(base, here, seconds)
            except RuntimeError as error:
                print(f"{start} {error}", flush=True)
                failed = True
                continue
            before, after = (Timing.of([pair[i] for pair in pairs]) for i in (0, 1))
            ratio = Timing.of([b / a for a, b in pairs])
            numbers = f"{before.median:>16.4g}{after.median:>10.4g}{ratio.median:>13.3f}"
            print(f"{start} {numbers}  {ratio.low:.3f} to {ratio.high:.3f} of {ratio.rounds} pairs", flush=True)
    return int(failed)


def _pairs(base: "Worker", here: "Worker", seconds: float) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < 5 or (time.perf_counter() - began < seconds and len(pairs) < 100):
        turn = len(pairs)
        order = (base, here) if turn % 2 == 0 else (here, base)
        taken = {process: process.ask(time=turn)["ms"] for process in order}
        pairs.append((taken[base], taken[here]))
    return pairs


def tests_are_green(device: torch.device) -> bool:
    """On a CPU without the interpreted kernels, which take minutes and are not what a CPU runs."""
    narrowed = [] if device.type == "cuda" else ["-k", "not triton"]
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-x", *narrowed]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FASTSAE_EXAMPLES": "5"}, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-1000:], sep="\n", file=sys.stderr)
    return done.returncode == 0


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        made = subprocess.run(["git", "worktree", "add", "--detach", str(tree), ref], cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"git has no worktree of {ref!r}: {made.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)


class Worker:
    def __init__(self, process: subprocess.Popen):
        self.process = process

    def ask(self, **question: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "its process ended"}')
        except BrokenPipeError:
            answer = {"error": "its process ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


@contextmanager
def worker(tree: Path) -> Iterator[Worker]:
    command = [sys.executable, "-c", BOOT, str(tree), str(ROOT)]
    # elsewhere than in a checkout, whose fastsae would come first
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.Popen(command, cwd=elsewhere, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield Worker(process)
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def _as_json(entry: Entry) -> dict[str, Any]:
    return {"case": vars(entry.case), "shape": vars(entry.shape), "precision": entry.precision}


def serve() -> None:
    """A worker's loop: a line of JSON in, a line of JSON out."""
    from .check import check
    from .providers import Fastsae, Task
    from .run import grad, precision

    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anyone prints goes to stderr
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    provider = Fastsae()
    task = job = inputs = None
    repeats = 1
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if wanted := question.get("prepare"):
                task = Task(Case(**wanted["case"]), Shape(**wanted["shape"]), wanted["precision"], device, brief=True)
                job = None
                with precision(task):
                    check(provider, task)
                    job, inputs = provider.job(task), task.inputs(8)
                    inputs = [job.prepare(given) for given in inputs]
                    with grad(task):
                        job.call(inputs[0])
                        once = milliseconds(lambda job=job, given=inputs[1]: job.call(given), device)
                repeats = max(1, min(200, int(5 / max(once, 1e-3))))
                answer = {"ready": True}
            else:
                given = inputs[question["time"] % len(inputs)]
                with precision(task), grad(task):
                    answer = {"ms": milliseconds(lambda job=job, given=given: job.call(given), device, repeats)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=channel)
