"""Tile choices: how each kernel cuts its work, by kernel, architecture and row width. Data, not code.

A row reads: for rows up to `width` elements, use these constants. Every row says what chose it; "untuned" means that no
GPU has measured it yet. `python -m bench.aot` compiles each of them for each architecture and reads off registers,
spills and shared memory.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    constants: dict[str, int]
    warps: int
    stages: int = 3
    registers: int | None = None  # a thread's at most; see `limits`
    width: int = 1 << 30
    why: str = "untuned"


# rows that are not 16-byte aligned are loaded through one address per element: 64 deep, that spills where products read
# their operands from registers (sm_80, sm_120), and 32 deep it does not
_GEMM_16 = Tile(
    {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 32, "GROUP_N": 8},
    warps=8,
    stages=4,
    why="untuned: compiled clean, 230 registers on sm_80 for unaligned rows, 128 for aligned ones",
)
_GEMM_16_WIDE = Tile(
    {"BLOCK_N": 128, "BLOCK_F": 128, "BLOCK_D": 64, "GROUP_N": 8},
    warps=8,
    why="untuned: compiled clean, 255 registers on sm_90 for unaligned rows, 110 for aligned ones",
)
# fp32 operands are twice as wide: half the depth keeps three stages within 96 KB, which every target launches
_GEMM_32 = Tile({"BLOCK_N": 64, "BLOCK_F": 128, "BLOCK_D": 32, "GROUP_N": 8}, warps=8)

# kernel -> architecture ("any" where a target has no row of its own) -> rows by ascending width
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "gemm_16": {"any": (_GEMM_16,), "sm_90": (_GEMM_16_WIDE,), "sm_100": (_GEMM_16_WIDE,)},
    "gemm_32": {"any": (_GEMM_32,)},
    # one program keeps its row's k best keys in registers: the width is k, the warps keep it at 16 keys a thread. Above
    # 8192, which only a batch top-k's repair of a very skewed batch asks for, it spills some bytes and still runs
    "topk": {
        "any": (
            Tile({}, warps=4, width=1024, why="untuned: compiled clean, 80 registers on sm_90 for 1024"),
            Tile({}, warps=8, width=4096, why="untuned: compiled clean, 114 registers on sm_90 for 4096"),
            Tile({}, warps=16, why="untuned: compiled clean, 114 registers on sm_90 for 8192"),
        )
    },
    "threshold": {"any": (Tile({"BLOCK": 1024}, warps=4),)},
    "decode": {
        "any": (
            Tile({"BLOCK_D": 256}, warps=2, width=256),
            Tile({"BLOCK_D": 512}, warps=4, width=512),
            Tile({"BLOCK_D": 1024}, warps=4),
        )
    },
    # the whole row stays in registers: the block is the next power of two, the warps keep it at 16 elements a thread
    "latent": {
        "any": (
            Tile({"BLOCK_D": 256}, warps=1, width=256),
            Tile({"BLOCK_D": 1024}, warps=2, width=1024),
            Tile({"BLOCK_D": 2048}, warps=4, width=2048),
            Tile({"BLOCK_D": 4096}, warps=8, width=4096),
            Tile({"BLOCK_D": 8192}, warps=16, width=8192),
        )
    },
    # one row of the matrix, its two moments and its gradient in registers; 4096 at 8 warps spilled 8 bytes on sm_80
    "update": {
        "any": (
            Tile({"BLOCK_D": 256}, warps=1, width=256),
            Tile({"BLOCK_D": 1024}, warps=2, width=1024),
            Tile({"BLOCK_D": 2048}, warps=4, width=2048),
            Tile({"BLOCK_D": 4096}, warps=16, width=4096),
            Tile({"BLOCK_D": 8192}, warps=16, width=8192),
        )
    },
    # the same with the matrix or its moments in 16 bits: at 16 elements a thread, unaligned rows of 8192 spilled 88 bytes on
    # sm_80; at 8, and with nothing said about registers, rows of any width spilled 8 for one or the other target
    "update_16": {
        "any": (
            Tile({"BLOCK_D": 256}, warps=1, registers=128, width=256),
            Tile({"BLOCK_D": 1024}, warps=4, registers=128, width=1024),
            Tile({"BLOCK_D": 2048}, warps=8, registers=128, width=2048),
            Tile({"BLOCK_D": 4096}, warps=16, registers=128, width=4096),
            Tile({"BLOCK_D": 8192}, warps=32, registers=64, width=8192),
        )
    },
}


def architecture(device: torch.device) -> str:
    """sm_90 and the like for an NVIDIA GPU, gfx942 and the like for an AMD one, otherwise the device's type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_tma(device: torch.device) -> bool:
    """Whether a copy engine loads whole tiles by descriptor: NVIDIA, from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90


def tile(kernel: str, device: torch.device, width: int = 0) -> Tile:
    """The tile of `kernel` for rows of `width` elements on `device`; the widest there is where none reaches."""
    by_architecture = TILES[kernel]
    rows = by_architecture.get(architecture(device), by_architecture["any"])
    return next((row for row in rows if width <= row.width), rows[-1])


def limits(chosen: Tile, device: torch.device) -> dict[str, int]:
    """Launch options: how many registers NVIDIA's compiler may use, so that it does not spill to use fewer."""
    nvidia = architecture(device).startswith("sm_")
    return {"maxnreg": chosen.registers} if nvidia and chosen.registers is not None else {}
