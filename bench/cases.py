"""What is measured: cases, shapes and sweeps, as data; and what each costs at least.

N rows, D model width, F latents, k active per row. A case is a piece of work with one activation. Its floor is the time of
its phases on this machine's own ceilings, each phase the longer of arithmetic and memory:

    encode   2 N D F            W_enc read once, x read, N k entries written
    decode   2 N k D            the decoder rows that fire read once, y written
    loss     encode, decode, then both weights' gradients written once and the rows they sum read
    step     encode, then parameters and both moments of Adam read and written; no gradient need ever be stored
    forward  encode and decode
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    name: str
    N: int
    D: int
    F: int
    k: int

    def __str__(self) -> str:
        return f"{self.name}: N {self.N}, D {self.D}, F {self.F}, k {self.k}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 4096, 768, 49_152, 32),
        Shape("M", 8192, 2304, 147_456, 64),
        Shape("R", 8192, 4096, 262_144, 64),
        Shape("XL", 4096, 8192, 524_288, 128),
        Shape("C", 1024, 768, 24_576, 32),
        Shape("smoke", 64, 64, 1024, 8),
    )
}
# Where a provider is compared with the reference before it is timed: D and F as sparsify's Triton kernels want them.
CHECKED = Shape("check", 32, 64, 1024, 8)


@dataclass(frozen=True)
class Case:
    """A piece of work: encode, decode, loss (forward and backward), step (with the optimizer) or forward (inference)."""

    work: str
    activation: str
    rows: int | None = None
    """N, where the case sets it"""
    gpu_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.work}/{self.activation}" + (f"/N={self.rows}" if self.rows else "")

    @property
    def trains(self) -> bool:
        return self.work in ("loss", "step")


CASES = (
    *(Case("encode", activation) for activation in ("TopK", "BatchTopK", "JumpReLU", "ReLU")),
    Case("decode", "TopK"),
    Case("loss", "TopK"),
    Case("loss", "BatchTopK"),
    Case("step", "TopK"),
    Case("step", "BatchTopK"),
    *(Case("forward", "TopK", rows) for rows in (1, 32, 4096)),
    Case("forward", "JumpReLU", 4096),
    # 65,536 rows make a dense code of 6 GB and more
    Case("forward", "TopK", 65_536, gpu_only=True),
)

STEP = Case("step", "TopK")


@dataclass(frozen=True)
class Entry:
    """One group of rows of the table: a case at a shape, all providers side by side."""

    case: Case
    shape: Shape
    precision: str
    sweep: str | None = None
    """the letter that a scaling plot varies"""
    memory_gb: float | None = None
    """what a provider may allocate, where that is limited"""

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.shape.name} {self.precision}"


def sweep(base: Shape, letter: str, values: tuple[int, ...]) -> list[Shape]:
    return [replace(base, name=f"{letter}={value}", **{letter: value}) for value in values]


_CPU = Shape("", 256, 768, 12_288, 32)
# So wide that memory runs out, and few rows, since the weights' own traffic is what takes the time there.
_WIDE = Shape("", 64, 768, 12_288, 32)
CPU_MEMORY_GB = 8.0
"""In the sweep over F on a CPU, so that it ends alike on machines of 12 GB and of 1 TB."""
_GPU = Shape("", 4096, 768, 49_152, 32)
SWEEPS = {
    "cpu": {
        "F": sweep(_WIDE, "F", (6144, 24_576, 98_304, 262_144, 393_216, 524_288, 786_432)),
        "N": sweep(_CPU, "N", (64, 256, 1024)),
        "k": sweep(_CPU, "k", (8, 32, 128)),
        "D": sweep(_CPU, "D", (256, 768, 1536)),
    },
    "cuda": {
        "F": sweep(_GPU, "F", (16_384, 49_152, 147_456, 442_368, 1_327_104)),
        "N": sweep(_GPU, "N", (256, 1024, 4096, 16_384)),
        "k": sweep(_GPU, "k", (16, 32, 64, 128, 256)),
        "D": sweep(_GPU, "D", (512, 768, 2304, 4096)),
    },
}


def plan(device: str, smoke: bool = False, shapes: list[str] | None = None, cases: list[str] | None = None) -> list[Entry]:
    """Every entry for a type of device, most telling first, narrowed to the named shapes, sweeps and cases."""
    return [entry for entry in _everything(device, smoke) if _wanted(entry, shapes, cases)]


def _everything(device: str, smoke: bool) -> Iterator[Entry]:
    gpu = device == "cuda"
    if smoke:
        for case in CASES:
            if case.rows is None or case.rows == 32:
                yield _entry(case, SHAPES["smoke"], "fp32")
        return
    order = sorted((case for case in CASES if gpu or not case.gpu_only), key=lambda case: case != STEP)
    for name in ("S", "M", "R", "XL") if gpu else ("C",):
        for precision in ("bf16", "tf32") if gpu else ("fp32",):
            for case in order:
                yield _entry(case, SHAPES[name], precision)
    for letter, swept in SWEEPS[device].items():
        for shape in swept:
            memory = CPU_MEMORY_GB if letter == "F" and not gpu else None
            yield Entry(STEP, shape, "bf16" if gpu else "fp32", letter, memory)


def _entry(case: Case, shape: Shape, precision: str) -> Entry:
    return Entry(case, shape if case.rows is None else replace(shape, N=case.rows), precision)


def _wanted(entry: Entry, shapes: list[str] | None, cases: list[str] | None) -> bool:
    by_shape = shapes is None or entry.shape.name in shapes or (entry.sweep is not None and entry.sweep in shapes)
    return by_shape and (cases is None or any(entry.case.name.startswith(wanted) for wanted in cases))


# ---------------------------------------------------------------------------------------------------------------- costs

Phase = tuple[float, float]
"""(FLOPs, bytes)"""


def phases(case: Case, shape: Shape, element: int) -> list[Phase]:
    """What the case costs at least; `element` is the size of a parameter in bytes."""
    N, D, F, k = shape.N, shape.D, shape.F, shape.k
    entries = N * k
    fired = F * (1 - (1 - 1 / F) ** entries)  # latents that fire at all, where all are equally likely
    encode = (2 * N * D * F, (F * D + N * D) * element + entries * (element + 4))
    decode = (2 * entries * D, (fired * D + N * D) * element + entries * (element + 4))
    gradients = (6 * entries * D, (2 * F * D + fired * D + 2 * N * D) * element)
    # read and write weight, first and second moment in fp32; 16-bit operands are the upper halves of the weights
    update = (0, 2 * F * D * 24)
    return {
        "encode": [encode],
        "decode": [decode],
        "forward": [encode, decode],
        "loss": [encode, decode, gradients],
        "step": [encode, decode, (6 * entries * D, (fired * D + 2 * N * D) * element), update],
    }[case.work]
