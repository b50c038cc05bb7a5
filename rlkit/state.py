"""State that survives: what a checkpoint holds besides the weights, and whether it was written whole.

A checkpoint is sealed last, by a manifest with the size of each of its files; older ones are deleted only
after that. So whenever the power fails, one whole checkpoint is left, and one that was cut short is known.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rlkit.errors import UserError
from rlkit.run_directory import sync, write_whole

MANIFEST = "rlkit.json"
# accelerate calls the CPU of its second process cpu:1, and torch.load knows only "cpu".
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
PLAIN = (type(None), bool, int, float, str, bytes)  # not numpy's numbers, which are subclasses of some


class Stateful(Protocol):
    """Something that remembers: plain values and tensors, read with `torch.load(weights_only=True)`."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember that instead."""


class Checkpoints:
    """Mixin for a trainer of TRL: saves and restores `stateful()` on each rank, and seals checkpoints.

    Attributes:
        run: the run directory, if it saves rollouts: they are on the disk before a checkpoint is sealed.
        identity: what the run is, kept in the manifest (see `differences`).
        resume_anyway: what a checkpoint lacks is said and starts anew, instead of being an error.
    """

    args: Any
    state: Any
    accelerator: Any
    run: Any = None
    identity: Mapping[str, Any] = {}
    resume_anyway: bool = False

    def stateful(self) -> dict[str, Stateful]:
        """What remembers, by name."""
        return {}

    def _stateful(self) -> dict[str, Stateful]:
        return {"since the last log": SinceLog(self), **self.stateful()}

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
        states = {name: _checked(name, part.state_dict()) for name, part in self._stateful().items()}
        torch.save(states, folder / _state_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if main:
            if self.run is not None:
                self.run.flush()
            seal(folder, self.state.global_step, self.identity)
            # One of a later step was cut short in a run before this: rotation would take it for the newest.
            for later in _checkpoints(folder.parent):
                if _step(later) > self.state.global_step:
                    shutil.rmtree(later)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, folder: Path) -> None:
        if not any(folder.glob("rng_state*")):
            self._lacks(f"{folder} holds the model alone, as save_only_model has it")
        rank = self.accelerator.process_index
        path = folder / _state_file(rank)
        if not path.exists():  # with more processes than before, which is a difference of the run
            self._lacks(f"{folder} has no state of process {rank}, only that of process 0")
            path = folder / _state_file(0)
        try:
            states = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        for name, part in self._stateful().items():
            if name not in states:
                self._lacks(f"{folder} has no state of {name!r}")
                continue
            try:
                part.load_state_dict(states[name])
            except (KeyError, ValueError, TypeError) as error:
                self._lacks(f"{folder}: the state of {name!r} does not fit: {error}")

    def _lacks(self, what: str) -> None:
        if not self.resume_anyway:
            raise UserError(f"{what}: it cannot go on from there; --resume_anyway goes on without")
        print(f"rlkit: {what}: going on without", file=sys.stderr, flush=True)


def _checked(name: str, state: Any) -> Any:
    """A state that can be read again, which is better known now than when it is needed."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            _checked(name, key)
            _checked(name, value)
    elif isinstance(state, list | tuple):
        for value in state:
            _checked(name, value)
    elif type(state) not in PLAIN and not isinstance(state, torch.Tensor):
        kind = f"{type(state).__module__}.{type(state).__name__}"
        raise UserError(f"the state of {name!r} has a {kind}: only plain values and tensors are kept")
    return state


def _state_file(rank: int) -> str:
    return f"rlkit_state_{rank}.pt"


class SinceLog:
    """What a trainer of TRL has summed up since it last logged: the loss, and the metrics.

    transformers sets its part to zero after a checkpoint is loaded and before `on_train_begin`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Losses of this process since the last log and before it, the step of that log, and metrics."""
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.item(),
            "loss_before": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "metrics": {k: [float(v) for v in values] for k, values in trainer._metrics["train"].items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on summing up, once the training begins."""
        metrics = self.trainer._metrics["train"]
        metrics.clear()
        metrics.update({name: list(values) for name, values in state["metrics"].items()})
        losses = state["loss"], state["loss_before"], state["logged"]
        self.trainer.add_callback(_Losses(self.trainer, *losses))


class _Losses(TrainerCallback):
    def __init__(self, trainer: Any, loss: float, before: float, logged: int):
        self.trainer = trainer
        self.loss, self.before, self.logged = loss, before, logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._tr_loss.fill_(self.loss)
        self.trainer._total_loss_scalar = self.before
        self.trainer._globalstep_last_logged = self.logged


class Progress:
    """Where a TRL policy trainer stands between two optimizer steps.

    A generation may serve several steps: the rest of it is kept, or a resumed run would sample anew.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Micro-batches and samplings so far, and the rollouts still to be learned from."""
        trainer = self.trainer
        every = trainer.args.steps_per_generation * trainer.num_iterations
        rest = trainer._buffered_inputs if trainer._step % every else None
        return {
            "step": trainer._step,
            "generation": trainer.generation,
            "buffered": rest,
            "shape": self._shape(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there again; where generations are dealt out otherwise than before, begin with a new one."""
        trainer = self.trainer
        trainer.generation = state["generation"]
        if state["shape"] != self._shape():
            return
        trainer._step = state["step"]
        device = trainer.accelerator.device
        if state["buffered"] is not None:
            trainer._buffered_inputs = [
                {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                for batch in state["buffered"]
            ]

    def _shape(self) -> list[int]:
        """What a generation is dealt out to: processes, micro-batches, passes, and rollouts of each."""
        trainer, args = self.trainer, self.trainer.args
        passes = [args.steps_per_generation, trainer.num_iterations]
        return [trainer.accelerator.num_processes, *passes, args.per_device_train_batch_size]


class Reference:
    """The weights of a reference model that is refreshed; one that is not is loaded anew as it was."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """Its weights."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take these."""
        self.model.load_state_dict(state)


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
    paths = sorted(folder.rglob("*"))
    for path in (*paths, folder):
        sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    text = json.dumps({"step": step, "identity": dict(identity), "files": sizes}, indent=1)
    write_whole(folder / MANIFEST, text)
    sync(folder.parent)


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint; raises ValueError saying what is missing."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files = dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError("it was not finished") from None
    for name, size in files.items():
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
    folders = _checkpoints(run)
    for folder in sorted(folders, key=_step, reverse=True):
        try:
            manifest(folder)
            return folder
        except ValueError as problem:
            print(f"rlkit: {folder} is cut short and skipped: {problem}", file=sys.stderr, flush=True)
    if folders:
        raise UserError(f"{run} has no whole checkpoint to go on from: --overwrite starts anew")
    return None


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was in the run that wrote a checkpoint, a line each."""
    return [
        f"{key}: {_say(saved.get(key))} -> {_say(now.get(key))}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]


def _say(value: Any) -> str:
    """A value of an identity as a person would write it: `even=1.0, variety=0.5`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_say(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_say, value)) or "none"
    return "none" if value is None else str(value)
