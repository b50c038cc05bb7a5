"""State that survives: what a checkpoint holds besides the weights, and whether it was written whole.

A checkpoint is sealed last, by a manifest with the size of each of its files; older ones are deleted only
after that. So whenever the power fails, one whole checkpoint is left, and one that was cut short is known.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler
from transformers.trainer_utils import rotate_checkpoints

from rlkit.errors import UserError

MANIFEST = "rlkit.json"


class Stateful(Protocol):
    """Something that remembers: plain values and tensors, read with `torch.load(weights_only=True)`."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember that instead."""


class Checkpoints:
    """Mixin for a transformers Trainer: saves and restores `stateful()` on each rank, and seals checkpoints.

    Attributes:
        identity: what the run is, kept in the manifest (see `differences`).
    """

    args: Any
    state: Any
    accelerator: Any
    identity: Mapping[str, Any] = {}

    def stateful(self) -> dict[str, Stateful]:
        """What remembers, by name."""
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        main = self.accelerator.is_main_process
        if main and folder.exists():  # what a killed run left of it
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        states = {name: part.state_dict() for name, part in self.stateful().items()}
        torch.save(states, folder / _state_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if main:
            seal(folder, self.state.global_step, self.identity)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, folder: Path) -> None:
        path = folder / _state_file(self.accelerator.process_index)
        if not path.exists():  # with more processes than before
            path = folder / _state_file(0)
        states = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in self.stateful().items():
            if name not in states:
                raise UserError(f"{folder} has no state of {name!r}: it cannot go on from there")
            try:
                part.load_state_dict(states[name])
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{folder}: the state of {name!r} does not fit: {error}") from error


def _state_file(rank: int) -> str:
    return f"rlkit_state_{rank}.pt"


class Progress:
    """Where a TRL policy trainer stands between two optimizer steps.

    A generation may serve several steps: the rest of it is kept, or a resumed run would sample anew.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches and samplings so far, rollouts still to be learned from, metrics not yet logged."""
        trainer = self.trainer
        every = trainer.args.steps_per_generation * trainer.num_iterations
        rest = trainer._buffered_inputs if trainer._step % every else None
        metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
        return {
            "step": trainer._step,
            "generation": trainer.generation,
            "buffered": rest,
            "metrics": metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there again."""
        trainer = self.trainer
        trainer._step, trainer.generation = state["step"], state["generation"]
        device = trainer.accelerator.device
        if state["buffered"] is not None:
            trainer._buffered_inputs = [
                {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                for batch in state["buffered"]
            ]
        for name, values in state["metrics"].items():
            trainer._metrics["train"][name].extend(values)


class InEpoch(Sampler):
    """TRL's sampler with an order that depends on seed and epoch, so that a resumed run finds its place.

    On its own it would start again with the order of the first epoch.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + 1_000_003 * self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def seal(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Declare a checkpoint whole: everything is on the disk before the manifest says so."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps({"step": step, "identity": dict(identity), "files": sizes}, indent=1))
    _sync(partial)
    os.replace(partial, folder / MANIFEST)
    _sync(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; raises ValueError saying what is missing."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError("it was not finished") from None
    for name, size in found["files"].items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise ValueError(
                f"{name} has {actual} of {size} bytes" if path.is_file() else f"{name} is missing"
            )
    return found


def last_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; those cut short are skipped with a warning.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    folders = [path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for folder in sorted(folders, key=lambda path: -int(path.name.split("-")[1])):
        try:
            manifest(folder)
            return folder
        except ValueError as problem:
            print(f"rlkit: {folder} is cut short and skipped: {problem}", file=sys.stderr, flush=True)
    if folders:
        raise UserError(f"{run} has no whole checkpoint to go on from: --overwrite starts anew")
    return None


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was in the run that wrote a checkpoint, a line each."""
    return [
        f"{key}: {saved.get(key)} -> {now.get(key)}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]
