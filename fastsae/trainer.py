"""The main job: activations in, trained SAEs out, through whatever happens in between.

    runs/sae/  config.json        what was asked for
               metrics.jsonl      one line every log_every steps
               step-000300/       checkpoints (checkpoint.py): a SAELens folder, and training.safetensors to go on from
               final/             the finished SAE, or one folder for each of a sweep
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import formats
from .checkpoint import newest, run_lock, write_checkpoint
from .config import TrainConfig, with_values
from .data.open import Load, chosen_device, load_model, opened
from .data.source import Batch, NotResumable, Source, as_source, batch_of, fields
from .formats.safe import FormatError
from .interrupt import Interrupt, Interrupted, poll
from .kernels.backend import describe
from .logs import Log, Progress
from .member import Member
from .metrics import Evaluation, evaluate
from .objective import Objective
from .sae import SAE
from .settings import flat, from_dict, to_dict
from .state_files import load_tree, save_tensors, save_tree
from .strict_json import finite, read_json, write_json

START_BATCHES = 8
"""Batches from which a scale of the input or a first b_dec is taken; they are trained on after that."""
EVAL_BATCHES = 16
"""Batches of the evaluation at the end; fresh ones."""
MAY_CHANGE = {
    "resume", "save_every", "keep", "log_every", "loggers", "wandb_project", "device", "out",
    "tokens", "micro_batch", "prefetch", "model_device",
}  # fmt: skip
"""What may be another when a run goes on."""


class DataEnded(ValueError):
    """There was less data than the config asks for."""


class OutOfMemory(MemoryError):
    """A step did not fit."""


@dataclass(frozen=True)
class Run:
    """What a training run made."""

    path: Path
    saes: dict[str, SAE]
    """By the name in the sweep; one named "" where there is none."""
    evaluations: dict[str, Evaluation]
    tokens_per_second: float

    @property
    def sae(self) -> SAE:
        """The SAE, of a run without a sweep."""
        return _only(self.saes, "saes")

    @property
    def evaluation(self) -> Evaluation:
        """Its evaluation."""
        return _only(self.evaluations, "evaluations")


def _only(found: dict[str, Any], what: str) -> Any:
    if len(found) != 1:
        raise ValueError(f"this run has {len(found)} {what}: take one by name, run.{what}[...], of {list(found)}")
    return next(iter(found.values()))


def train(
    config: TrainConfig, source: Iterable[Batch] | None = None, quiet: bool = False, load: Load = load_model
) -> Run:
    """Train what `config` describes, on its own data or on batches of `source`, of any number of rows each.

    SIGTERM and SIGINT save a checkpoint and raise Interrupted. Called again, it goes on from the newest checkpoint. `load` is
    how to come by the language model, where somebody else needs it too.
    """
    if source is not None:
        config = with_values(config, {"source": "given"})
    for member in config.members().values():
        Objective(member)  # what cannot be is refused before anything is loaded
    run = Path(config.out)
    with run_lock(run), Interrupt() as interrupt:
        resumed = newest(run)
        _remember(config, run, resumed)
        device = chosen_device(config.device)
        with opened(config, None if source is None else as_source(source), device, poll, load) as data:
            training = _Training(config, run, data, device, interrupt, quiet)
            return training.run(resumed)


def _remember(config: TrainConfig, run: Path, resumed: Path | None) -> None:
    """Write config.json, or check that the run that is there was asked for in the same words."""
    path = run / "config.json"
    if resumed is not None:
        if config.resume == "never":
            raise FileExistsError(f"{run} holds a run, {resumed.name}: pass resume=auto to go on with it, or another out")
        before, now = (flat(to_dict(c)) for c in (from_dict(read_json(path), TrainConfig), config))
        for name in before:
            if name not in MAY_CHANGE and before[name] != now[name]:
                raise ValueError(
                    f"{run} holds a run with another {name}: {before[name]}, not {now[name]}; "
                    "go on with the same settings, or pass another out"
                )
    with (staged := path.with_suffix(".tmp")).open("w") as file:
        file.write(json.dumps(to_dict(config), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # an empty file would be worse than none
    staged.replace(path)


class _Training:
    def __init__(self, config: TrainConfig, run: Path, data: Source, device: torch.device, interrupt: Interrupt, quiet: bool):
        self.config, self.path, self.data, self.device, self.interrupt = config, run, data, device, interrupt
        self.quiet = quiet
        self.step = 0
        self.members: dict[str, Member] = {}
        """By name in the sweep; none until the first batch has shown its width."""
        self.pending: list[Batch] = []
        """Batches that were looked at and not yet trained on."""
        self.saved: int | None = None
        """The step of the newest checkpoint."""

    # ── from start to end ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, resumed: Path | None) -> Run:
        if resumed is not None:
            self._resume(resumed)
        self.log = Log(self.config, self.path, self.step)
        try:
            if not self.members:
                self._begin()
            if not self.quiet:
                print(f"{describe(self.device)}; {next(iter(self.members.values())).stepper.says}", file=sys.stderr)
            speed = self._train()
            self._checkpoint()
            saes = {name: member.finished() for name, member in self.members.items()}
            evaluations = self._evaluate(saes)
        except (Interrupted, DataEnded):
            self._checkpoint()
            raise
        finally:
            self.log.close()
        for name, member in self.members.items():
            self._finish(member, saes[name].eval(), evaluations.get(name), self.path / "final" / _folder(name))
            member.stepper.release()
        return Run(self.path, saes, evaluations, speed)

    def _begin(self) -> None:
        self._look_at(1)
        first = fields(self.pending[0])
        members = {name: Member(config, *_sizes(config, first), self.device) for name, config in self.config.members().items()}
        if any(member.needs_start() for member in members.values()):
            self._look_at(min(START_BATCHES, self.config.steps))
            for member in members.values():
                member.start(self.pending)
        self.members = members

    def _look_at(self, n: int) -> None:
        while len(self.pending) < n:
            self.pending.append(self._next_of(self.data))

    def _train(self) -> float:
        """Tokens a second."""
        begun, first = time.perf_counter(), self.step
        with Progress(self.config.steps, self.step, self.quiet) as progress:
            while self.step < self.config.steps:
                batch = self.pending.pop(0) if self.pending else self._next_of(self.data)
                with _advice(self.config):
                    for member in self.members.values():
                        member.step(batch, self.step)
                self.step += 1
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    found = {name: member.measure(self.step) for name, member in self.members.items()}
                    self.log.write(self.step, found)
                    progress.show(found)
                progress.advance()
                if self.interrupt.requested is not None:
                    raise Interrupted(self.interrupt.requested)
                if self.config.save_every and self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self._checkpoint()
        return (self.step - first) * self.config.batch_size / (time.perf_counter() - begun)

    def _next_of(self, source: Iterator[Batch]) -> Batch:
        batch = next(source, None)
        if batch is None:
            raise DataEnded(
                f"the data ended after {self.step * self.config.batch_size:,} of {self.config.tokens:,} tokens: "
                "pass fewer tokens, or data that go on"
            )
        return batch

    def _evaluate(self, saes: dict[str, SAE]) -> dict[str, Evaluation]:
        """On the batches that come next: nobody has trained on them, unless the data have begun again."""
        fresh: list[Batch] = []
        while len(fresh) < EVAL_BATCHES and (batch := next(self.data, None)) is not None:
            fresh.append(batch)
        if not fresh:
            warnings.warn("the data ended with the training: there is nothing fresh to evaluate on", stacklevel=2)
            return {}
        found: dict[str, Evaluation] = {}
        for name, member in self.members.items():
            dtype = saes[name].W_dec.dtype
            found[name] = evaluate(saes[name], _polled(member.view(batch, dtype) for batch in fresh))
        return found

    def _finish(self, member: Member, sae: SAE, evaluation: Evaluation | None, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._save(member, sae, folder)
        if evaluation is not None:
            write_json(folder / "evaluation.json", finite(evaluation.scalars()))
            # SAELens' file of this name
            save_tensors(folder / "sparsity.safetensors", {"sparsity": (evaluation.feature_density + 1e-10).log10().float()})

    # ── what survives ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _checkpoint(self) -> None:
        if self.saved != self.step:
            write_checkpoint(self.path, self.step, self._write, keep=self.config.keep)
            self.saved = self.step

    def _write(self, folder: Path) -> None:
        for name, member in self.members.items():
            inside = folder / _folder(name)
            inside.mkdir(exist_ok=True)
            self._save(member, member.finished(), inside)
            save_tree(inside, "training", member.state_dict())
        try:
            data = self.data.state_dict()
        except NotResumable as error:
            warnings.warn(f"the weights are saved, the place in the data is not: {error}", stacklevel=2)
            data = None
        tree = {
            "step": self.step,
            "data": data,
            "pending": [fields(batch) for batch in self.pending],
            "members": list(self.members),
            "rng": torch.get_rng_state(),
        }
        save_tree(folder, "run", tree)

    def _resume(self, folder: Path) -> None:
        state = load_tree(folder, "run")
        if state["data"] is None:
            raise NotResumable(f"{folder} does not say where in the data it was, which its source could not: pass another out")
        self.step = self.saved = state["step"]
        self.data.load_state_dict(state["data"])
        self.pending = [batch_of(batch) for batch in state["pending"]]
        torch.set_rng_state(state["rng"])
        configs = self.config.members()
        for name in state["members"]:
            saved = load_tree(folder / _folder(name), "training")
            self.members[name] = Member(configs[name], saved["d_in"], saved["d_out"], self.device)
            self.members[name].load_state_dict(saved)
        if not self.quiet:
            print(f"going on from {folder}", file=sys.stderr)

    def _save(self, member: Member, sae: SAE, folder: Path) -> None:
        """The SAE as SAELens reads it, or where SAELens has no such SAE in our own layout."""
        metadata = member.metadata(self.step)
        try:
            formats.save(sae, folder, metadata=metadata)
        except FormatError as error:
            if self.step == self.config.steps:
                warnings.warn(f"only fastsae can read {folder}: {error}", stacklevel=2)
            formats.save(sae, folder, "fastsae", metadata)


def _folder(name: str) -> str:
    return name or "."


def _sizes(config: TrainConfig, batch: dict[str, Tensor]) -> tuple[int, int | None]:
    """(d_in, d_out) of the SAE that `config` describes; d_out is None where it reconstructs its input."""

    def width(t: Tensor) -> int:
        return t[0].numel()

    hook, target = config.data.hook, config.data.target_hook
    if "x" not in batch:
        if missing := {hook, target or hook} - set(batch):
            raise ValueError(f"the data have the hooks {sorted(batch)}, not {missing.pop()!r}: pass hook, one of these")
        return width(batch[hook]), width(batch[target]) if target else None
    return width(batch["x"]), width(batch["target"]) if "target" in batch else None


def _polled(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        poll()
        yield batch


@contextmanager
def _advice(config: TrainConfig) -> Generator[None]:
    """What did not fit, and what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise OutOfMemory(
            f"a step of {config.batch_size} rows did not fit into memory ({str(error).splitlines()[0]}): pass micro_batch="
            f"{max(1, (config.optim.micro_batch or config.batch_size) // 2)}, a lower expansion, or moments=bf16 "
            "(fastsae plan says what fits)"
        ) from error
