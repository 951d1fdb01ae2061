"""What a run says while it runs: a line of metrics.jsonl, the same to wandb or tensorboard, a bar or a plain line."""

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from .config import TrainConfig
from .optional import need
from .settings import to_dict
from .strict_json import finite

Metrics = Mapping[str, Mapping[str, float]]
"""By SAE, then by name."""
Sink = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
"""Takes (step, metrics); and what ends it."""
PLAIN_EVERY = 30.0
"""Seconds between lines where there is no terminal."""
SHOWN = {
    "loss": "losses/overall_loss",
    "EV": "metrics/explained_variance",
    "L0": "metrics/l0",
    "dead": "sparsity/dead_features",
}


class Log:
    """metrics.jsonl always; a logger that fails is dropped with one warning, and the run goes on.

    A run that goes on from `step` forgets what an attempt wrote after it that did not live to save.
    """

    def __init__(self, config: TrainConfig, run: Path, step: int):
        path = run / "metrics.jsonl"
        path.touch()
        lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
        staged = path.with_suffix(".tmp")
        staged.write_text("".join(line + "\n" for line in lines))
        staged.replace(path)
        self._file = path.open("a")
        self._sinks: dict[str, Sink] = {}
        for name in config.loggers:
            self._guarded(name, lambda name=name: self._sinks.update({name: SINKS[name](config, run, step)}))

    def write(self, step: int, found: Metrics) -> None:
        for name, metrics in found.items():
            self._file.write(json.dumps({"step": step} | ({"sae": name} if name else {}) | finite(metrics)) + "\n")
        self._file.flush()
        flat = {f"{name}/{key}" if name else key: value for name, metrics in found.items() for key, value in metrics.items()}
        for name, (send, _) in list(self._sinks.items()):
            self._guarded(name, lambda send=send: send(step, flat))

    def close(self) -> None:
        self._file.close()
        for name, (_, finish) in list(self._sinks.items()):
            self._guarded(name, finish)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sinks.pop(name, None)
            warnings.warn(f"{name} gets no more metrics, metrics.jsonl still does: {error}", stacklevel=2)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line that was cut off
        return sys.maxsize


def _wandb(config: TrainConfig, run: Path, step: int) -> Sink:
    """A run that goes on is the same run there."""
    wandb, kept = need("wandb", "wandb"), run / "wandb-id"
    known = kept.read_text() if step and kept.is_file() else None
    session: Any = wandb.init(
        project=config.wandb_project, name=run.name, dir=str(run), config=to_dict(config), id=known, resume="allow"
    )
    kept.write_text(session.id)
    return lambda step, metrics: session.log(metrics, step=step), session.finish


def _tensorboard(config: TrainConfig, run: Path, step: int) -> Sink:
    need("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def send(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


SINKS = {"wandb": _wandb, "tensorboard": _tensorboard}


class Progress:
    """A bar on a terminal; elsewhere one plain line every 30 s."""

    def __init__(self, steps: int, done: int, quiet: bool):
        self.steps, self.done, self.quiet = steps, done, quiet
        self.bar: Any = tqdm(total=steps, initial=done, unit="step", file=sys.stderr, disable=quiet or not sys.stderr.isatty())
        self.text, self._said = "", time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.close()

    def show(self, found: Metrics) -> None:
        first = next(iter(found.values()), {})
        self.text = " ".join(f"{short} {first[name]:.4g}" for short, name in SHOWN.items() if name in first)
        self.bar.set_postfix_str(self.text, refresh=False)

    def advance(self) -> None:
        self.done += 1
        self.bar.update()
        if not self.quiet and self.bar.disable and time.monotonic() - self._said > PLAIN_EVERY:
            self._said = time.monotonic()
            print(f"step {self.done}/{self.steps} {self.text}", file=sys.stderr, flush=True)
