"""What a checkpoint holds besides the weights, and how it is saved and restored."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from rlkit.errors import UserError, first_line
from rlkit.runs.checkpoints import checkpoints, seal, step_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from trl.trainer.utils import RepeatSampler

    from rlkit.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

# accelerate calls the CPU of its second process cpu:1, and torch.load knows only "cpu".
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
PLAIN = (type(None), bool, int, float, str, bytes)  # not numpy's numbers, which are subclasses of some


class Stateful(Protocol):
    """An object with state: plain values and tensors, read with `torch.load(weights_only=True)`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""


class CheckpointCallback(TrainerCallback):
    """Saves and restores on each process what transformers does not keep, and seals checkpoints.

    It must be the first of the trainer's callbacks, so that the others find restored state when training
    begins: `trainer.callback_handler.callbacks.insert(0, …)`.

    Args:
        trainer: Any trainer of transformers or TRL.
        parts: The stateful objects of the run by name.
        directory: The run directory; its rollouts are on the disk before a checkpoint is sealed.
        identity: What the run is, kept in the manifest (see `rlkit.runs.checkpoints.differences`).
        resume_from: The checkpoint that the trainer resumes from, or None.
        resume_anyway: Log what the checkpoint lacks and start it from the beginning, instead of raising.
    """

    def __init__(
        self,
        trainer: Trainer,
        parts: Mapping[str, Stateful],
        directory: RunDirectory,
        identity: Mapping[str, Any],
        *,
        resume_from: str | None = None,
        resume_anyway: bool = False,
    ):
        self.trainer = trainer
        self.parts = parts
        self.directory = directory
        self.identity = identity
        self.resume_from = resume_from
        self.resume_anyway = resume_anyway
        # transformers deletes old checkpoints once the new one is written; here, once it is sealed.
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the state of this process; raises UserError where the checkpoint lacks a part."""
        if self.resume_from is not None:
            self._restore(Path(self.resume_from))
        if self.trainer.accelerator.is_main_process:
            # A killed run may have left incomplete checkpoints of later steps. Rotation would take them for
            # the newest.
            for folder in checkpoints(self.directory.path):
                if step_of(folder) > state.global_step:
                    shutil.rmtree(folder)
        self.trainer.accelerator.wait_for_everyone()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Add the state of all processes to the checkpoint that transformers has written, and seal it."""
        accelerator = self.trainer.accelerator
        folder = self.directory.path / f"checkpoint-{state.global_step}"
        states = {name: check_plain(name, part.state_dict()) for name, part in self.parts.items()}
        folder.mkdir(exist_ok=True)  # with save_only_model only the main process has written to it
        torch.save(states, folder / _state_file(accelerator.process_index))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.directory.flush()
            seal(folder, state.global_step, self.identity)
            rotate_checkpoints(str(self.directory.path), self.limit, state.best_model_checkpoint)
        accelerator.wait_for_everyone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Give the trainer its `save_total_limit` back."""
        args.save_total_limit = self.limit

    def _restore(self, folder: Path) -> None:
        if not any(folder.glob("rng_state*")):
            self._lacks(f"{folder} holds the model alone, as save_only_model has it")
        rank = self.trainer.accelerator.process_index
        path = folder / _state_file(rank)
        if not path.exists():  # with more processes than before, which is a difference of the run
            self._lacks(f"{folder} has no state of process {rank}, only that of process 0")
            path = folder / _state_file(0)
        try:
            states = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}") from error
        for name, part in self.parts.items():
            if name not in states:
                self._lacks(f"{folder} has no state of {name!r}")
                continue
            try:
                part.load_state_dict(states[name])
            except (KeyError, ValueError, TypeError) as error:
                self._lacks(f"{folder}: the state of {name!r} does not fit: {error}")

    def _lacks(self, what: str) -> None:
        if not self.resume_anyway:
            raise UserError(f"{what}: cannot resume from it; --resume_anyway resumes without it")
        logger.warning("%s: resuming without it", what)


def check_plain(name: str, state: Any) -> Any:
    """Return a state that can be read again with `weights_only`; raises UserError for one that cannot.

    Checked on save, because a failure on resume is too late.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            check_plain(name, key)
            check_plain(name, value)
    elif isinstance(state, list | tuple):
        for value in state:
            check_plain(name, value)
    elif type(state) not in PLAIN and not isinstance(state, torch.Tensor):
        kind = f"{type(state).__module__}.{type(state).__name__}"
        raise UserError(f"the state of {name!r} has a {kind}: only plain values and tensors are kept")
    return state


def _state_file(rank: int) -> str:
    return f"rlkit_state_{rank}.pt"


class SinceLog:
    """What a trainer has summed up since it last logged: the loss, and its metrics.

    Args:
        trainer: Any trainer of transformers or TRL.
        metrics: Its lists of values since the last log, by name.
    """

    def __init__(self, trainer: Trainer, metrics: dict[str, list[float]]):
        self.trainer = trainer
        self.metrics = metrics

    def state_dict(self) -> dict[str, Any]:
        """Losses of this process since the last log and before it, the step of that log, and metrics."""
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.item(),
            "loss_before": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "metrics": {name: [float(v) for v in values] for name, values in self.metrics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sums. transformers sets its own to zero when training begins, before callbacks run."""
        self.metrics.clear()
        for name, values in state["metrics"].items():
            self.metrics[name] = list(values)
        self.trainer._tr_loss.fill_(state["loss"])
        self.trainer._total_loss_scalar = state["loss_before"]
        self.trainer._globalstep_last_logged = state["logged"]


class Reference:
    """The weights of a reference model that is refreshed; one that is not is loaded again as it was."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights."""
        self.model.load_state_dict(state)


class InEpoch(Sampler[int]):
    """TRL's sampler with an order that depends on seed and epoch, so that a resumed run finds its place.

    On its own it would start again with the order of the first epoch.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            seed = self.sampler.seed or 0  # which TRL always gives it
            self.sampler.generator.manual_seed(seed + 1_000_003 * self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
