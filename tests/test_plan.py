"""The plan's bytes against the memory events of real steps, its choices, and the figures that it stands on."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastsae import SAE, BatchTopK, TopK, losses
from fastsae import plan as module
from fastsae.kernels import by_latent, score_tiles, scores, update
from fastsae.optim import FusedAdam
from fastsae.plan import plan

# what comes and goes is 9 to 95 % of the peak: a plan of weights and moments alone would not do
SHAPES = [
    (256, 8192, 1024, 32, "topk", "fp32", "fp32"),
    (256, 8192, 1024, 32, "topk", "fp32", "bf16"),
    (256, 8192, 1024, 32, "topk", "split", "fp32"),
    (256, 8192, 1024, 32, "topk", "split", "bf16"),
    (256, 8192, 512, 32, "batchtopk", "fp32", "fp32"),
    (512, 8192, 1024, 16, "batchtopk", "split", "bf16"),
    (384, 6144, 2048, 64, "topk", "fp32", "fp32"),
    (128, 32768, 256, 8, "topk", "split", "bf16"),
    (768, 12288, 256, 32, "topk", "fp32", "fp32"),
    (64, 4096, 4096, 16, "topk", "fp32", "bf16"),
    (64, 65536, 1024, 32, "topk", "fp32", "fp32"),  # four pieces of scores
    (384, 6144, 2048, 64, "topk", "split", "bf16", 256),
    (384, 6144, 2048, 64, "batchtopk", "fp32", "fp32", 512),
    (384, 6150, 2048, 64, "batchtopk", "fp32", "fp32", 512),  # a ragged tile
]


def measured(d_in, d_sae, batch, k, activation, master, moments, micro_batch=None) -> tuple[int, int]:
    """(bytes that stay, bytes at the peak) of a step after the first, ranked and clipped as the trainer does unless told."""
    choose = {"topk": TopK, "batchtopk": BatchTopK}[activation]
    sae = SAE(d_in, d_sae, choose(k), rescale_acts_by_decoder_norm=True)
    optimizer = FusedAdam(sae, master=master, moments=moments, max_norm=1.0)
    x = torch.randn(batch, d_in, dtype=sae.W_dec.dtype)

    def train() -> None:
        optimizer.zero_grad()
        for rows in x.split(micro_batch or batch):
            losses.mse(losses.reconstruct(sae, sae.encode_sparse(rows), rows)).backward()
        optimizer.step()

    train()
    optimizer.zero_grad()
    scores._spare.clear()  # the piece of scores counts
    with torch.profiler.profile(profile_memory=True) as profile:
        train()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = torch.tensor([e.nbytes() for e in events if e.name() == "[memory]"]).cumsum(0)
    kept = sum(p.nbytes for p in sae.parameters()) + sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    return kept + x.nbytes, kept + x.nbytes + int(held.max())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_within_a_tenth_of_what_a_step_takes(shape):
    kept, peak = measured(*shape)
    p = plan(*shape[:7], micro_batch=shape[7] if len(shape) > 7 else None)
    assert abs(p.total / peak - 1) < 0.10, (p.total, peak)
    block = p.kept()["piece of scores"]
    assert abs((sum(p.kept().values()) - block) / kept - 1) < 0.001
    assert 1 - kept / peak > 0.09


def test_it_speaks_of_the_code_as_it_is():
    assert (module.BLOCK_ELEMENTS, module.CPU_TILE, module.SLICE) == (scores.BLOCK_ELEMENTS, score_tiles.CPU_TILE, update.SLICE)
    assert (module.CHUNK, module.GPU_SPLIT) == (scores.CHUNK, by_latent.SPLIT)


def test_the_shapes_of_the_design():
    """R with fp32 state takes 26 GB, with split masters and bf16 moments 17; XL fits 80 GB only with those."""
    r = {"d_in": 4096, "d_sae": 262144, "batch": 8192, "k": 64, "gpu": "H100"}
    xl = {"d_in": 8192, "d_sae": 524288, "batch": 4096, "k": 128, "gpu": "H100"}
    assert 25.8e9 < plan(**r).total < 28e9 and 17.2e9 < plan(**r, master="split", moments="bf16").total < 19e9
    assert plan(**xl, master="split", moments="bf16").fits and not plan(**xl, master="split").fits
    assert "pass moments='bf16'" in plan(**xl, master="split").advice()
    floor = plan(**r, master="split").floor()
    assert abs(floor["encoder GEMM"] - 17.79) < 0.01  # 2 · 8192 · 4096 · 262144 / 989 TFLOP/s
    assert abs(floor["weights and moments, read and written"] - 15.39) < 0.01  # 24 B · 2^31 / 3350 GB/s


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("memory", [1e8, 3e9, 2e10])
def test_the_widest_fits_and_64_more_do_not(memory, device):
    p = plan(512, 4096, 1024, 32, device=device, memory_bytes=memory)
    width = p.widest()
    assert replace(p, d_sae=width).fits and not replace(p, d_sae=width + 64).fits
    assert f"{width:,}" in str(p)


def test_advice_is_enough():
    """What it says to change is changed, and then it fits."""
    p = plan(1024, 16384, 8192, 64, memory_bytes=1e12)
    for share in (0.95, 0.8, 0.7, 0.6, 0.4):
        small = replace(p, memory_bytes=int(p.total * share))
        words = small.advice()
        changes: dict = {"moments": "bf16"} if "moments='bf16'" in words else {}
        for name in ("micro_batch", "d_sae"):
            if f"{name}=" in words:
                changes[name] = int(words.split(f"{name}=")[1].split()[0].strip(",:"))
        assert changes and replace(small, **changes).fits, words
    assert "no width" in replace(p, memory_bytes=1000).advice()


def test_text():
    text = str(plan(4096, 262144, 8192, 64, master="split", memory_bytes=20e9, gpu="H100"))
    for part in ("does not fit into 20.0 GB", "moments", "low bits", "in all", "H100", "ms", "64x"):
        assert part in text


def test_no_torch():
    code = "import sys; import fastsae.plan; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 9000}, "k=9000 exceeds d_sae=4096"),
        ({"gpu": "GTX"}, "gpu='GTX': pass one of H200"),
        ({"master": "bf16"}, "master='bf16'"),
        ({"memory_bytes": -1}, "memory_bytes=-1"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"d_in": 64, "d_sae": 4096, "batch": 16, "k": 4, **change})


def test_without_a_memory_or_a_card_there_is_no_answer():
    p = plan(64, 4096, 16, 4)
    assert p.fits and p.advice() == "nothing has to change"
    with pytest.raises(ValueError, match="memory_bytes is None"):
        p.widest()
    with pytest.raises(ValueError, match="gpu is None"):
        p.floor()
