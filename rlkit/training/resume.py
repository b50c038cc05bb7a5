"""Save and restore the state that transformers does not put into checkpoints.

transformers saves weights, optimizer, schedule and random states. `CheckpointCallback` adds the state of
every `Stateful` object: rewards, the environment, metrics since the last log, micro-batches not trained on
yet. A resumed run then takes the same steps as one that was never interrupted.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import TrainerCallback

from rlkit.errors import UserError, first_line, one_line
from rlkit.runs.checkpoints import checkpoints, delete_checkpoint, rotate, seal, step_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
    from trl.trainer.utils import RepeatSampler

    from rlkit.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

# accelerate calls the CPU of its second process cpu:1, a location that torch.load does not know.
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
# `check_plain` compares exact types: numpy's scalars are subclasses of some of these and cannot be loaded.
PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


# Errors from loading weights or optimizer states that are damaged or do not fit.
LOADING_ERRORS = (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


class Stateful(Protocol):
    """An object with state of plain values and tensors, which `torch.load(weights_only=True)` can load."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""


class CheckpointCallback(TrainerCallback):
    """Saves and restores the state of each process that transformers does not save, and seals checkpoints.

    It must be the first of the trainer's callbacks, so that state is restored before other callbacks read it
    when training begins: `trainer.callback_handler.callbacks.insert(0, …)`.

    Args:
        trainer: Trainer of transformers or TRL.
        parts: Stateful objects of the run by name.
        directory: Run directory, whose rollouts are flushed to disk before a checkpoint is sealed.
        identity: Settings that identify the run, saved in the manifest (see
            `rlkit.runs.checkpoints.differences`).
        resume_from: Checkpoint that the trainer resumes from, or None.
        resume_anyway: Whether to log missing state and start it from scratch instead of raising.
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
        self.is_loading = resume_from is not None
        self.optimizer_settings = None if resume_from is None else OptimizerSettings(trainer)
        # transformers deletes old checkpoints as soon as a new one is written. If the run were killed before
        # that one is sealed, no complete one might be left. `on_save` deletes them after sealing instead.
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Turn an error from loading the checkpoint into a UserError of one line."""
        try:
            yield
        except LOADING_ERRORS as error:
            # transformers loads the random states only before the first step.
            is_loading = self.is_loading or _is_raised_in(error, "_load_rng_state")
            if not is_loading or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.debug("the checkpoint cannot be loaded", exc_info=True)
            raise UserError(f"cannot resume from {self.resume_from}: {one_line(error)[:300]}") from error

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the state of this process; raise UserError if the checkpoint lacks a part of it."""
        self.is_loading = False
        if self.resume_from is not None and self.optimizer_settings is not None:
            self._restore(Path(self.resume_from))
            self.optimizer_settings.apply()
        if self.trainer.accelerator.is_main_process:
            # A killed run may have left incomplete checkpoints of later steps. transformers would write into
            # these folders, and a file that it does not overwrite would be sealed with the others.
            for folder in checkpoints(self.directory.path):
                if step_of(folder) > state.global_step:
                    delete_checkpoint(folder)
            if self.resume_from is not None:  # the run may have been killed before this
                rotate(self.directory.path, self.limit, state.best_model_checkpoint)
        self.trainer.accelerator.wait_for_everyone()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Add the state of all processes to the checkpoint that transformers has written, and seal it."""
        accelerator = self.trainer.accelerator
        folder = self.directory.path / f"checkpoint-{state.global_step}"
        states = {name: check_plain(name, part.state_dict()) for name, part in self.parts.items()}
        # With save_only_model only the main process writes before this, and it may not have begun.
        folder.mkdir(exist_ok=True)
        torch.save(states, folder / _state_file(accelerator.process_index))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.directory.flush()
            seal(folder, state.global_step, self.identity, self.directory.num_metrics())
            rotate(self.directory.path, self.limit, state.best_model_checkpoint)
        accelerator.wait_for_everyone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore `save_total_limit` of the trainer's arguments."""
        args.save_total_limit = self.limit

    def _restore(self, folder: Path) -> None:
        if not any(folder.glob("rng_state*")):
            self._report_missing(f"{folder} has only the model, since it was saved with save_only_model")
        rank = self.trainer.accelerator.process_index
        path = folder / _state_file(rank)
        if not path.exists():  # the run has more processes now, and resume_anyway accepted that
            self._report_missing(f"{folder} has no state of process {rank}, only that of process 0")
            path = folder / _state_file(0)
        try:
            states = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}") from error
        for name, part in self.parts.items():
            if name not in states:
                self._report_missing(f"{folder} has no state of {name!r}")
                continue
            try:
                part.load_state_dict(states[name])
            except (KeyError, ValueError, TypeError) as error:
                self._report_missing(f"{folder}: the state of {name!r} does not fit: {error}")

    def _report_missing(self, problem: str) -> None:
        if not self.resume_anyway:
            raise UserError(f"cannot resume: {problem}; --resume_anyway starts that state from scratch")
        logger.warning("%s; that state starts from scratch", problem)


class OptimizerSettings:
    """The optimizer's settings in the config of a run that resumes, such as its learning rate.

    A checkpoint contains the settings of the run that wrote it, which would silently replace them.

    Args:
        trainer: Trainer that will load the checkpoint.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._groups: list[dict[str, Any]] = []
        create_scheduler = trainer.create_scheduler

        # There is no callback between the creation of the optimizer and the loading of its state.
        def record_groups(*args: Any, **kwargs: Any) -> Any:
            scheduler = create_scheduler(*args, **kwargs)
            groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
            self._groups = [{key: value for key, value in g.items() if key != "params"} for g in groups]
            return scheduler

        trainer.create_scheduler = record_groups  # type: ignore[method-assign]

    def apply(self) -> None:
        """Replace the loaded settings, and set the learning rate of the next step.

        A schedule that depends on the results so far, such as reduce_lr_on_plateau, keeps its learning rate.
        """
        groups = self.trainer.optimizer.param_groups  # type: ignore[union-attr]
        for group, new in zip(groups, self._groups, strict=True):
            group |= {key: value for key, value in new.items() if key != "lr"}
        scheduler: Any = getattr(self.trainer.lr_scheduler, "scheduler", self.trainer.lr_scheduler)
        if not isinstance(scheduler, LambdaLR):
            return
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [
            rate * factor(scheduler.last_epoch)
            for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(groups, scheduler._last_lr, strict=True):
            if group["lr"] != rate:
                logger.info("the learning rate changes from %g to %g", group["lr"], rate)
            group["lr"] = rate


def check_plain(name: str, state: Any) -> Any:
    """Return a state if `torch.load(weights_only=True)` can load it; raise UserError if not.

    States are checked when they are saved, because an error on resume comes too late.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            check_plain(name, key)
            check_plain(name, value)
    elif isinstance(state, list | tuple):
        for value in state:
            check_plain(name, value)
    elif type(state) not in PLAIN_TYPES and not isinstance(state, torch.Tensor):
        kind = f"{type(state).__module__}.{type(state).__name__}"
        raise UserError(
            f"state_dict() of {name!r} contains a {kind}; return only None, numbers, strings, bytes, "
            "tensors, lists and dicts"
        )
    return state


def _is_raised_in(error: BaseException, function: str) -> bool:
    return any(frame.f_code.co_name == function for frame, _ in traceback.walk_tb(error.__traceback__))


def _state_file(rank: int) -> str:
    return f"rlkit_state_{rank}.pt"


class RunningMetrics:
    """State of what a trainer has accumulated since it last logged: the loss, and the values of metrics.

    Args:
        trainer: Trainer of transformers or TRL.
        metrics: Values since the last log by name; the trainer logs their means.
    """

    def __init__(self, trainer: Trainer, metrics: dict[str, list[float]]):
        self.trainer = trainer
        self.metrics = metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the losses since the last log and before it, the step of that log, and the metrics."""
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.item(),
            "loss_before": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "metrics": {name: [float(v) for v in values] for name, values in self.metrics.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sums. transformers zeroes them when training begins, before it calls callbacks."""
        self.metrics.clear()
        for name, values in state["metrics"].items():
            self.metrics[name] = list(values)
        self.trainer._tr_loss.fill_(state["loss"])
        self.trainer._total_loss_scalar = state["loss_before"]
        self.trainer._globalstep_last_logged = state["logged"]


def log_end_of_training(trainer: Trainer) -> None:
    """Log what transformers logs after the last step, in a run that resumes from that step's checkpoint.

    The times are left out: they are those of the process that trained.
    """
    loss = trainer._total_loss_scalar + trainer._tr_loss.item()
    steps = max(trainer.state.global_step, 1)
    trainer.log({"total_flos": trainer.state.total_flos, "train_loss": loss / steps})
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


class ReferenceWeights:
    """State of a reference model that `sync_ref_model` updates. A constant one is loaded again instead."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights."""
        self.model.load_state_dict(state)


class EpochSeededSampler(Sampler[int]):
    """TRL's sampler of tasks, with an order that depends on the seed and the epoch only.

    TRL's own order depends on how many epochs the process has drawn before. A run that resumes in the second
    epoch would draw the order of the first one.

    Args:
        sampler: TRL's sampler.
        epoch: Function that returns the current epoch, counted from 0.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            seed = self.sampler.seed or 0  # TRL's trainer always sets one
            self.sampler.generator.manual_seed(seed + 1_000_003 * self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)
