"""fastsae beside plain torch, in about 20 seconds on a CPU:  python -m bench.demo"""

import sys

import torch

from fastsae import kernels

from .cases import STEP, Shape
from .check import check
from .environment import device_name
from .measure import Timing, interleave, peak_memory
from .providers import Fastsae, Task
from .providers.dense import Dense

SHAPE = Shape("demo", 1024, 768, 24_576, 32)


def main() -> int:
    device = torch.device("cpu")
    providers = [Fastsae(), Dense()]
    task = Task(STEP, SHAPE, "fp32", device)
    print(f"One TopK training step with Adam in fp32 on {device_name(device)}.\n{SHAPE}.")
    for provider in providers:
        check(provider, task)
    print("Both make the same gradients as fp64 does, to rounding. Now timing them in turn ...", flush=True)
    inputs = task.inputs(8)
    jobs, peaks = {}, {}
    for provider in providers:
        made = peak_memory(lambda provider=provider: provider.job(task), lambda job: job.call(inputs[0]), device)
        jobs[provider.name], peaks[provider.name] = made
    calls = {name: lambda turn, job=job: job.call(inputs[turn % 8]) for name, job in jobs.items()}
    timings = {}
    for name, taken in interleave(calls, device, seconds=5).items():
        if isinstance(taken, Exception):
            raise taken
        timings[name] = Timing.of(taken)
    print(f"\n{'':<12}{'ms a step':>10}  {'quartiles':<14}{'rows a second':>14}{'peak MB':>9}")
    for name, t in timings.items():
        rate, quartiles = SHAPE.N / t.median * 1e3, f"{t.low:.0f} to {t.high:.0f}"
        print(f"{name:<12}{t.median:>10.0f}  {quartiles:<14}{rate:>14.0f}{peaks[name] / 1e6:>9.0f}")
    ours, dense = (timings[provider.name].median for provider in providers)
    print(f"\nfastsae is {dense / ours:.1f} times as fast. It runs {kernels.describe(device)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
