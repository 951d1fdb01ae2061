"""What a training step with FusedAdam needs: bytes by purpose, what fits, and the time that no step can be faster than.

    print(plan(d_in=4096, d_sae=262_144, batch=8192, k=64, moments="bf16", memory_bytes=80e9, gpu="H100"))

What is kept from step to step depends on the state formats (optim.py); the rest comes and goes, and a step is at its fullest
in one of three places: while it selects, in the backward pass, or in the update. Coefficients of a CPU are fits to the memory
events of torch's profiler (tests/test_plan.py); those of a GPU are counted from the code and not yet measured on one. torch
itself, the data source, a language model and a term for dead latents are not in it.

Imports nothing, so that the command line answers at once.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

# bytes per parameter of W_enc and W_dec
WEIGHT = {"fp32": 4, "split": 2}
LOW_BITS = {"fp32": 0, "split": 2}
MOMENTS = {"fp32": 8, "bf16": 4}

# as in kernels/scores.py, score_tiles.py and update.py, which a test holds against these
BLOCK_ELEMENTS = 1 << 24
CPU_TILE = 64
SLICE = 1 << 20
CHUNK = 4096
GPU_SPLIT = 1024
# fp32 copies of a slice that are alive at once in the CPU's update
SLICES = {("fp32", "fp32"): 2, ("split", "fp32"): 6, ("fp32", "bf16"): 6, ("split", "bf16"): 9}


@dataclass(frozen=True)
class GPU:
    """A card by its maker's data sheet: dense tensor-core rates, without sparsity, with fp32 accumulation."""

    bf16: float
    """TFLOP/s"""
    tf32: float
    """TFLOP/s"""
    bandwidth: float
    """GB/s"""
    memory: float
    """GB"""


# NVIDIA's data sheets: H100 SXM, H200 SXM, A100 SXM 80 GB, L4; for the RTX 4090 the whitepaper of the Ada architecture
GPUS = {
    "H200": GPU(bf16=989, tf32=495, bandwidth=4800, memory=141),
    "H100": GPU(bf16=989, tf32=495, bandwidth=3350, memory=80),
    "A100": GPU(bf16=312, tf32=156, bandwidth=2039, memory=80),
    "L4": GPU(bf16=121, tf32=60, bandwidth=300, memory=24),
    "RTX 4090": GPU(bf16=165, tf32=82.6, bandwidth=1008, memory=24),
}


@dataclass(frozen=True)
class Plan:
    """The answer for one set of settings; `str(plan)` is the text of `fastsae plan`."""

    d_in: int
    d_sae: int
    batch: int
    micro_batch: int
    k: int
    activation: Literal["topk", "batchtopk"]
    master: Literal["fp32", "split"]
    moments: Literal["fp32", "bf16"]
    device: Literal["cpu", "cuda"]
    memory_bytes: int | None
    gpu: str | None

    @property
    def element(self) -> int:
        """Bytes of an activation: the SAE computes in fp32, or in bf16 where its weights are split."""
        return WEIGHT[self.master]

    def kept(self) -> dict[str, int]:
        """Bytes that stay from step to step, by purpose."""
        large, small = 2 * self.d_in * self.d_sae, self.d_sae + self.d_in
        kept = {
            "weights": WEIGHT[self.master] * (large + small),
            "low bits of the weights": LOW_BITS[self.master] * (large + small),
            "moments": MOMENTS[self.moments] * large + 8 * small,
            "batch": self.element * self.batch * self.d_in,
        }
        if self.device == "cpu":
            kept["piece of scores"] = 4 * math.prod(self._piece())
        return kept

    def passing(self) -> dict[str, dict[str, int]]:
        """Bytes that come and go, by purpose, in each of the three places where a step can be at its fullest."""
        row, n = self.element * self.d_in, self.micro_batch
        before = self.batch - n  # rows whose gradients already wait, as factors

        def waiting(rows: int) -> dict[str, int]:
            return {
                "centred input and error": 2 * row * rows,
                "entries and their order": 28 * self.k * rows,
                "gradients of biases": self.element * (self.d_sae + self.d_in),
            }

        chosen = {"centred input of a pass": row * n, "entries of a pass": 8 * self.k * n, "selection": self._selection()}
        return {
            "select": {**waiting(before), **chosen},
            "backward": {**waiting(self.batch), "gradients of activations": max(2 * row * n, self._dots())},
            "update": {**waiting(self.batch), "row updates": self._update()},
        }

    def _piece(self) -> tuple[int, int]:
        """Rows and latents of a piece of scores on a CPU."""
        least = min(self.d_sae, 4 * self.k * CPU_TILE if self.activation == "topk" else CHUNK)
        passes = -(-self.micro_batch // max(1, BLOCK_ELEMENTS // least))
        rows = -(-self.micro_batch // passes)
        return rows, min(self.d_sae, max(least, BLOCK_ELEMENTS // rows))

    def _selection(self) -> int:
        if self.device == "cuda":
            candidates = self.k if self.activation == "topk" else 4 * self.k
            return self.micro_batch * (4 * min(CHUNK, self.d_sae) + 28 * candidates)
        (rows, latents), tile = self._piece(), CPU_TILE
        maxima = 4 * rows * latents // tile
        if self.activation == "batchtopk":  # every tile that one of the best may be in
            return maxima + 10 * min(tile * self.micro_batch * self.k, rows * latents)
        return maxima + 6 * rows * self.k * tile if 2 * self.k * tile < self.d_sae else 40 * rows * self.k

    def _dots(self) -> int:
        """Rows gathered in both types to make dvalues; an fp32 CPU has an operator that gathers nothing."""
        gathers = self.device == "cpu" and self.master == "split"
        return 12 * min(self.micro_batch * self.k * self.d_in, SLICE) if gathers else 0

    def _update(self) -> int:
        entries, cells = self.batch * self.k, self.batch * self.d_in
        joined = 0 if self.micro_batch == self.batch else 2 * (self.element * cells + 28 * entries)
        if self.device == "cuda":  # partial sums of long segments
            return joined + 4 * 2 * (entries // GPU_SPLIT) * self.d_in
        wide = 4 * cells if self.master == "split" else 0
        slices = 4 * min(SLICE, self.d_in * self.d_sae) * SLICES[self.master, self.moments]
        return joined + wide + 8 * entries + slices

    def by_purpose(self) -> dict[str, int]:
        """Bytes where the step is at its fullest, by purpose."""
        fullest = max(self.passing().values(), key=lambda place: sum(place.values()))
        return {**self.kept(), **fullest}

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.by_purpose().values())

    @property
    def fits(self) -> bool:
        """Whether that is no more than the memory there is."""
        return self.memory_bytes is None or self.total <= self.memory_bytes

    def widest(self) -> int:
        """The largest d_sae, in steps of 64, that fits with everything else as it is; 0 if none does."""
        if self.memory_bytes is None:
            raise ValueError("memory_bytes is None: pass the memory that it should fit")
        low, high = 0, 64 + self.memory_bytes // (2 * self.d_in)  # at high, one byte a parameter is too much already
        while high - low > 64:
            middle = (low + high) // 128 * 64
            low, high = (middle, high) if replace(self, d_sae=middle).fits else (low, middle)
        return low if low >= self.k else 0

    def advice(self) -> str:
        """What to change where it does not fit: the first of these that is enough, the mildest first."""
        if self.fits:
            return "nothing has to change"
        passes = [n for s in range(1, 8) if (n := self.micro_batch >> s)]
        tries = [("moments='bf16'", replace(self, moments="bf16"))]
        tries += [(f"micro_batch={n}", replace(self, micro_batch=n)) for n in passes]
        tries += [(f"moments='bf16' and micro_batch={n}", replace(self, micro_batch=n, moments="bf16")) for n in passes]
        for words, other in tries:
            if other.fits:
                return f"pass {words}: {_size(other.total)}"
        narrow = replace(self, moments="bf16", micro_batch=min([self.micro_batch, *passes]))
        if width := narrow.widest():
            return f"pass d_sae={width}, moments='bf16' and micro_batch={narrow.micro_batch}: the widest that fits"
        return f"no width of d_in={self.d_in} fits with batch={self.batch}: lower the batch, or take more memory"

    def floor(self) -> dict[str, float]:
        """Milliseconds of a step on `gpu` at the rates of its data sheet, which no step reaches."""
        if self.gpu is None:
            raise ValueError(f"gpu is None: pass one of {', '.join(GPUS)}")
        card, parameters, entries = GPUS[self.gpu], 2 * self.d_in * self.d_sae, self.batch * self.k
        rate = card.bf16 if self.master == "split" else card.tf32
        state = WEIGHT[self.master] + LOW_BITS[self.master] + MOMENTS[self.moments]
        read_and_written = 2 * state * parameters
        gathered = 2 * self.element * entries * self.d_in  # decoder rows, for the reconstruction and for dvalues
        return {
            "encoder GEMM": self.batch * parameters / rate / 1e9,
            "weights and moments, read and written": read_and_written / card.bandwidth / 1e6,
            "decoder rows gathered": gathered / card.bandwidth / 1e6,
        }

    def __str__(self) -> str:
        what = f"d_in {self.d_in:,}, d_sae {self.d_sae:,} ({self.d_sae / self.d_in:.3g}x), batch {self.batch:,}, k {self.k}"
        lines = [f"{what}, {self.activation}, master {self.master}, moments {self.moments}, on {self.device}", ""]
        purposes = sorted(self.by_purpose().items(), key=lambda item: -item[1])
        lines += [f"  {_size(n):>9}  {purpose}" for purpose, n in purposes if n]
        lines += [f"  {_size(self.total):>9}  in all, at the fullest"]
        if self.device == "cuda":
            lines += ["             (counted, not yet measured on a GPU; torch's own context comes on top)"]
        if self.memory_bytes is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines += ["", f"{verdict} into {_size(self.memory_bytes)}: {self.advice()}"]
            lines += [f"the widest that fits as it stands: d_sae {self.widest():,}"]
        if self.gpu is not None:
            times = self.floor()
            operand = "bf16" if self.master == "split" else "tf32"
            least = f"{sum(times.values()):.1f} ms (by its data sheet, {operand})"
            lines += ["", f"no step on a {self.gpu} takes less than {least}:"]
            lines += [f"  {t:9.1f}  {name}" for name, t in times.items()]
        return "\n".join(lines)


def plan(
    d_in: int,
    d_sae: int,
    batch: int,
    k: int,
    activation: Literal["topk", "batchtopk"] = "topk",
    master: Literal["fp32", "split"] = "fp32",
    moments: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] | None = None,
    memory_bytes: float | None = None,
    gpu: str | None = None,
    micro_batch: int | None = None,
) -> Plan:
    """A Plan, with the memory of `gpu` where a GPU is named and no memory is. `micro_batch`: the rows of one pass."""
    rows = batch if micro_batch is None else micro_batch
    for name, number in (("d_in", d_in), ("d_sae", d_sae), ("batch", batch), ("k", k), ("micro_batch", rows)):
        if number < 1:
            raise ValueError(f"{name}={number}: pass a whole number >= 1")
    if k > d_sae:
        raise ValueError(f"k={k} exceeds d_sae={d_sae}: pass k <= d_sae")
    if memory_bytes is not None and not memory_bytes > 0:
        raise ValueError(f"memory_bytes={memory_bytes}: pass a number > 0")
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r}: pass one of {', '.join(GPUS)}")
    choices = {"activation": ("topk", "batchtopk"), "master": tuple(WEIGHT), "moments": tuple(MOMENTS)}
    given = {"activation": activation, "master": master, "moments": moments}
    for name, allowed in choices.items():
        if given[name] not in allowed:
            raise ValueError(f"{name}={given[name]!r}: pass one of {', '.join(map(repr, allowed))}")
    device = device or ("cpu" if gpu is None else "cuda")
    memory = GPUS[gpu].memory * 1e9 if memory_bytes is None and gpu is not None else memory_bytes
    memory = None if memory is None else int(memory)
    return Plan(d_in, d_sae, batch, min(rows, batch), k, activation, master, moments, device, memory, gpu)


def _size(n: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.{2 if n < 10 * scale else 1}f} {unit}"
    return f"{n:.0f} B"
