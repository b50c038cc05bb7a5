"""What a checkpoint holds besides the weights, and how a trainer of TRL saves and restores it."""

from __future__ import annotations

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

from rlkit.errors import UserError, first_line
from rlkit.runs.checkpoints import checkpoints, seal, step_of

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
            for later in checkpoints(folder.parent):
                if step_of(later) > self.state.global_step:
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
            raise UserError(f"cannot read {path}: {first_line(error)}") from error
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


class TrainerPosition:
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
