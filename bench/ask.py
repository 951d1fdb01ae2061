"""How each open question is put to a machine: what questions.py lists calls these."""

from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from fastsae.kernels import by_latent, tiles, topk
from fastsae.optim import FusedAdam

from . import workloads as w
from .cases import SHAPES, Case, Shape, phases
from .environment import ROOT
from .measure import Ceilings, Timing, free_memory, interleave
from .providers import Fastsae, Task
from .providers.ours import sae_of
from .tune import describe, tune

Answer = dict[str, float | str]


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300].replace(str(ROOT), ".")


@dataclass
class Here:
    """The machine that is asked."""

    device: torch.device
    limits: Ceilings
    tiny: bool
    failures: dict[str, str] = field(default_factory=dict)
    """of the question under way; in words, since an exception would keep its tensors alive"""

    @property
    def precision(self) -> str:
        return "fp32" if self.tiny else "bf16"

    def shape(self, name: str) -> Shape:
        return Shape("tiny", 32, 64, 1024, 8) if self.tiny else SHAPES[name]

    def ms(self, calls: dict[str, Callable[[], object]], seconds: float = 3.0) -> dict[str, float]:
        """Medians. A call that fails is left out and named in `failures`, unless all do."""
        each = {name: lambda _, call=call: call() for name, call in calls.items()}
        samples = interleave(each, self.device, 0 if self.tiny else seconds)
        medians = {name: Timing.of(taken).median for name, taken in samples.items() if isinstance(taken, list)}
        failures = {name: taken for name, taken in samples.items() if not isinstance(taken, list)}
        if not medians:
            raise next(iter(failures.values()))
        self.failures |= {name: told(failure) for name, failure in failures.items()}
        return medians

    def gbs(self, workload: w.Workload) -> Answer:
        ms = self.ms({"it": workload.call})["it"]
        rate = workload.moved / ms / 1e6
        return {"ms": ms, "GB/s": rate, "% of copy": 100 * rate / self.limits.copy_gbs}


def cublas(here: Here) -> Answer:
    shape = here.shape("R")
    task = w.task_of(shape, here.device)
    W, x = task.weights().W_enc, task.inputs(1)[0]
    whole = torch.empty(shape.N, shape.F, dtype=x.dtype, device=here.device)
    chunk = torch.empty(shape.N, min(topk.CHUNK, shape.F), dtype=torch.float32, device=here.device)

    def chunked() -> None:
        for first in range(0, shape.F, topk.CHUNK):
            columns = W[:, first : first + topk.CHUNK]
            topk.chunk_gemm(x, columns, chunk[:, : columns.shape[1]])

    ms = here.ms({"whole": lambda: torch.mm(x, W, out=whole), "fp32 chunks": chunked})
    rate = 2 * shape.N * shape.D * shape.F / ms["whole"] / 1e9
    return {**ms, "TFLOP/s": rate, "chunks / whole": ms["fp32 chunks"] / ms["whole"]}


def selection(here: Here) -> Answer:
    shape = here.shape("R")
    task = w.task_of(shape, here.device)
    W, x = task.weights().W_enc, task.inputs(1)[0]
    buffer = torch.empty(shape.N, shape.F, dtype=x.dtype, device=here.device)
    variants = {"vendor GEMM + row top-k": False, "own GEMM with tile maxima": True}
    calls = {name: w.select_topk(shape, here.device, fused).call for name, fused in variants.items()}
    ms = here.ms({"GEMM": lambda: torch.mm(x, W, out=buffer), **calls}, 5.0)
    return {**ms, **{f"{name} / GEMM": ms[name] / ms["GEMM"] for name in variants if name in ms}}


def own_gemm(here: Here) -> Answer:
    shape = here.shape("M")
    workload = w.encoder_gemm(shape, here.device)
    ms = here.ms({"it": workload.call})["it"]
    rate = workload.flops / ms / 1e9
    return {"ms": ms, "TFLOP/s": rate, "% of vendor": 100 * rate / here.limits.gemm_tflops[here.precision]}


def torch_topk(here: Here) -> Answer:
    answer: Answer = {}
    for name, dtype in (("bf16 ms", torch.bfloat16), ("fp32 ms", torch.float32)):
        answer[name] = here.ms({"it": w.torch_topk(here.shape("R"), here.device, dtype).call})["it"]
        free_memory(here.device)
    return answer


def latent_backward(here: Here) -> Answer:
    return here.gbs(w.latent_backward(here.shape("R"), here.device))


def fused_update(here: Here) -> Answer:
    return _update(here, "fp32", "fp32")


def update_formats(here: Here) -> Answer:
    formats = (("split", "fp32"), ("fp32", "bf16"), ("split", "bf16"))
    found = {f"{master}/{moments}": _update(here, master, moments) for master, moments in formats}
    return {f"{name} {unit}": value for name, answer in found.items() for unit, value in answer.items()}


def _update(here: Here, master: str, moments: str) -> Answer:
    shape = here.shape("M")  # fp32 parameters, gradient factors and both moments fit any data-centre GPU
    task = Task(Case("step", "TopK"), shape, "fp32", here.device)
    sae = sae_of(task)
    optimizer = FusedAdam(sae, lr=1e-4, master=master, moments=moments)  # type: ignore[arg-type]
    code = sae.encode_sparse(task.inputs(1)[0].to(sae.W_dec.dtype))
    sae.decode(code).square().sum().backward()
    ms = here.ms({"it": optimizer.step})["it"]
    # read and written: a weight in 4 bytes, split or not, and two moments
    rate = 2 * (4 + 2 * (4 if moments == "fp32" else 2)) * 2 * shape.F * shape.D / ms / 1e6
    return {"ms": ms, "GB/s": rate, "% of copy": 100 * rate / here.limits.copy_gbs}


def decode(here: Here) -> Answer:
    return here.gbs(w.decode(here.shape("R"), here.device))


def step(name: str) -> Callable[[Here], Answer]:
    def ask(here: Here) -> Answer:
        shape = here.shape(name)
        answer: Answer = {}
        for optimizer, provider, precision in (
            ("Adam", Fastsae(), here.precision),
            ("FusedAdam fp32", Fastsae(fused_adam=True), "fp32" if here.tiny else "tf32"),
            ("FusedAdam split", Fastsae(fused_adam=True), here.precision),
            ("FusedAdam split, bf16 moments", Fastsae(fused_adam=True, bf16_moments=True), here.precision),
        ):
            task = Task(Case("step", "TopK"), shape, precision, here.device)
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            try:
                job, x = provider.job(task), task.inputs(1)[0]
                ms = here.ms({"it": lambda job=job, x=x: job.call(x)})["it"]
                floor = here.limits.floor_ms(phases(task.case, shape, task.dtype.itemsize), precision)
                answer |= {f"{optimizer} ms": ms, f"{optimizer} % of floor": 100 * floor / ms}
            except torch.OutOfMemoryError:
                answer[f"{optimizer} ms"] = "out of memory"
            finally:
                torch.set_float32_matmul_precision(before)
                job = None
                free_memory(here.device)
        return answer

    return ask


def batch_topk(here: Here) -> Answer:
    shape = here.shape("R")
    selections = {"TopK": w.select_topk, "BatchTopK": w.select_batch_topk}
    ms = here.ms({name: select(shape, here.device).call for name, select in selections.items()}, 5.0)
    return {**ms, "ratio": ms["BatchTopK"] / ms["TopK"]}


def threshold(here: Here) -> Answer:
    shape = here.shape("R")
    selections = {"TopK": w.select_topk, "JumpReLU": w.select_threshold}
    ms = here.ms({name: select(shape, here.device).call for name, select in selections.items()}, 5.0)
    return {**ms, "ratio": ms["JumpReLU"] / ms["TopK"]}


def chunk(here: Here) -> Answer:
    call = w.select_topk(here.shape("R"), here.device).call

    def with_chunk(size: int) -> Callable[[], object]:
        def run() -> object:
            with patch.object(topk, "CHUNK", size):
                return call()

        return run

    return {f"{size} ms": ms for size, ms in _by_size(here, with_chunk, (2048, 4096, 8192, 16_384)).items()}


def split(here: Here) -> Answer:
    """Eight latents that fire in every row are the longest segments there can be."""
    call = w.latent_backward(here.shape("R"), here.device, everywhere=min(8, here.shape("R").k)).call

    def with_split(size: int) -> Callable[[], object]:
        def run() -> object:
            with patch.object(by_latent, "SPLIT", size):
                return call()

        return run

    return {f"{size} ms": ms for size, ms in _by_size(here, with_split, (256, 512, 1024, 2048, 1 << 30)).items()}


def _by_size(here: Here, call: Callable[[int], Callable[[], object]], sizes: tuple[int, ...]) -> dict[int, float]:
    found = here.ms({str(size): call(size) for size in sizes}, 5.0)
    return {int(size): ms for size, ms in found.items()}


def tile_candidates(kernel: str) -> Callable[[Here], Answer]:
    def ask(here: Here) -> Answer:
        by_architecture = tiles.TILES[kernel]
        rows = by_architecture.get(tiles.architecture(here.device), by_architecture["any"])
        # the row that R uses
        row = tiles.tile(kernel, here.device, {"latent": 4096, "decode": 4096, "topk": 64}.get(kernel, 0))
        assert row in rows
        outcome = tune(kernel, row, here.device, 0.1 if here.tiny else 15.0, small=here.tiny)
        best, timing = outcome.best
        return {
            "current ms": outcome.current_ms, "best ms": timing.median, "best": describe(best),
            "tried": float(len(outcome.timings)), "out": float(len(outcome.failed)),
        }  # fmt: skip

    return ask
