"""What a CPU step may cost, next to its own encoder GEMM and to the dense step, in one interleaved run: `make bench`.

Two threads, fp32, D 768, F 24,576, N 1024, k 32. Ratios, not milliseconds: they hold on another machine too.
"""

import statistics

import pytest
import torch

from bench.cases import Case, Shape
from bench.measure import interleave, reads
from bench.providers import Fastsae, Task
from bench.providers.dense import Dense, EncoderGemm
from fastsae import functional

CPU = torch.device("cpu")
SHAPE = Shape("C", 1024, 768, 24_576, 32)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def medians(calls, rounds: int) -> dict[str, float]:
    """Milliseconds of each call."""
    samples = interleave(calls, CPU, seconds=0, least=rounds)
    assert all(isinstance(taken, list) for taken in samples.values()), samples
    return {name: statistics.median(taken) for name, taken in samples.items()}


@pytest.mark.parametrize("activation", ["TopK", "BatchTopK"])
def test_forward_and_backward(activation, benchmark):
    """With stored gradients: at most 1.8 encoder GEMMs for TopK, and 3.3 times as fast as the dense step."""
    task = Task(Case("loss", activation), SHAPE, "fp32", CPU)
    inputs = task.inputs(8)
    jobs = {"ours": Fastsae().job(task), "dense": Dense().job(task), "gemm": EncoderGemm().job(task)}
    calls = {name: lambda turn, job=job: job.call(inputs[turn % 8]) for name, job in jobs.items()}
    ms = medians(calls, rounds=7)
    ratios = {"gemms": ms["ours"] / ms["gemm"], "dense": ms["dense"] / ms["ours"]}
    benchmark.extra_info.update({name: round(value, 2) for name, value in (ratios | ms).items()})
    benchmark.pedantic(jobs["ours"].call, (inputs[0],), rounds=3)
    if activation == "TopK":
        assert ratios["gemms"] <= 1.8, ms
    assert ratios["dense"] >= 3.3, ms


def test_few_rows(benchmark):
    """A few rows against a wide dictionary: next to one read of W_enc, the least that finding their latents takes."""
    D, F, k = 768, 65_536, 32
    W, b = torch.randn(F, D).T, torch.zeros(F)
    rows = {f"N={n}": torch.randn(n, D) for n in (1, 8, 32)}
    encode = {name: lambda _, x=x: functional.encode_topk(x, W, b, k) for name, x in rows.items()}
    ms = medians(reads(W) | encode, rounds=9)
    read = min(ms[name] for name in reads(W))
    ratios = {name: ms[name] / read for name in rows}
    benchmark.extra_info.update({name: round(value, 2) for name, value in ratios.items()} | {"read_ms": round(read, 2)})
    benchmark.pedantic(encode["N=1"], (0,), rounds=5)
    assert ratios["N=1"] <= 1.3, ms
