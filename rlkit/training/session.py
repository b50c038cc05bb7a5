"""The frame of a training run, shared by `rlkit sft`, `rlkit train` and `rlkit rank`.

A `Session` checks settings, opens the run directory, evaluates on held-out tasks before, during and after
training, resumes from checkpoints, and saves the model and the report.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import httpx
import jinja2
import torch
import transformers

from rlkit.arguments.keys import TaskArguments
from rlkit.arguments.parse import RunConfig, TrainConfig, resolved_text
from rlkit.arguments.presets import PRESETS
from rlkit.environment import Environment
from rlkit.errors import UserError, first_line, one_line
from rlkit.evaluation import Evaluation, compare, evaluate
from rlkit.evaluation.splits import load_tasks, read_fold
from rlkit.files import atomic_folder
from rlkit.models.cpu import FreedMemoryCallback, tune_for_cpu, warn_if_bfloat16_is_slow
from rlkit.models.load import save_gathered, save_model
from rlkit.models.patches import shard_on_cpu
from rlkit.registry import author_frames, load_environment
from rlkit.report import build_report
from rlkit.report.summary import changes_by_column
from rlkit.reward import Reward
from rlkit.runs.callbacks import (
    EvaluateCallback,
    Finished,
    FinishedCallback,
    MetricsCallback,
    ProgressCallback,
)
from rlkit.runs.checkpoints import last_checkpoint, read_manifest
from rlkit.runs.directory import RunDirectory, no_empty_folder, write_errors
from rlkit.runs.guards import Guards
from rlkit.runs.preemption import PreemptionCallback
from rlkit.runs.trackers import check_wandb, continued_wandb_run, log_to_wandb
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.training.held_out import Answer, Check, MainProcessRunner, evaluating, shard_and_gather
from rlkit.training.identity import check_unchanged, identity_of
from rlkit.training.metrics import progress
from rlkit.training.processes import on_main_process
from rlkit.training.resume import CheckpointCallback, Stateful, log_end_of_training
from rlkit.training.start_checks import check_trainer

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
AnyTrainer = TypeVar("AnyTrainer", bound=transformers.Trainer)


class Session:
    """A training run, from an empty run directory to a report.

    Args:
        run: Arguments of the run.
        stage: Kind of run: "sft", "train" or "rank".
        environment: Environment of the training and evaluation tasks.
        max_completion_length: Maximum number of tokens of a completion in evaluations, or None for an
            encoder, whose answers have no tokens.

    Raises:
        UserError: No run directory is given, or the file of the folds cannot be read.
    """

    def __init__(
        self,
        run: RunConfig[Any, Any],
        stage: str,
        environment: Environment,
        max_completion_length: int | None = None,
    ):
        if not run.trainer_args.output_dir:
            raise UserError("no run directory given: set the key 'output_dir', e.g. runs/my-run")
        if run.trainer_args.device.type == "cpu":
            tune_for_cpu()
            shard_on_cpu()
            if run.trainer_args.bf16 and run.trainer_args.process_index == 0:
                warn_if_bfloat16_is_slow("--bf16 false")
        self.run = run
        self.environment = environment
        self.max_completion_length = max_completion_length
        self.directory = RunDirectory(Path(run.trainer_args.output_dir), stage)
        self.guards: Guards | None = None
        self.check: Check | None = None
        self._signal_handlers = ExitStack()
        # Read only once: a long run must not fail in its last evaluation because the file was deleted.
        self.fold = None if run.args.fold is None else read_fold(run.args.fold, environment)

    def tasks(self) -> datasets.Dataset:
        """Return the training tasks, as `load_training_tasks` does."""
        return load_training_tasks(self.run, self.environment, self.fold)

    def prepare(self) -> None:
        """Check the settings before the model is loaded; raise UserError if one is wrong.

        The run directory is checked but not changed. A learning rate schedule is built and discarded, because
        transformers checks its arguments only when training begins.
        """
        args, trainer_args = self.run.args, self.run.trainer_args
        resolved_text(self.run)
        if trainer_args.process_index == 0:
            self.directory.prepare(resume=args.resume, overwrite=args.overwrite)
            check_wandb(trainer_args.report_to)
        with library_errors_as_user_errors("lr_scheduler_type, lr_scheduler_kwargs: "):
            transformers.get_scheduler(
                trainer_args.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=trainer_args.learning_rate),
                num_warmup_steps=0,
                num_training_steps=1,
                scheduler_specific_kwargs=dict(trainer_args.lr_scheduler_kwargs or {}),
            )

    def make_trainer(
        self, make: Callable[Parameters, AnyTrainer], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> AnyTrainer:
        """Return the trainer `make(*args, **kwargs)`, after opening the run directory.

        The directory is opened last, so that with `overwrite` a run that TRL or transformers rejects has not
        deleted the previous one.

        Raises:
            UserError: TRL or transformers rejects an argument, or the run could not be saved at its end.
        """
        # Trainers set the seed only after they have initialized LoRA adapters, which must be the same on all
        # processes.
        transformers.set_seed(self.run.trainer_args.seed)
        folder, resume, overwrite = self.directory.path, self.run.args.resume, self.run.args.overwrite
        with no_empty_folder(folder):
            with library_errors_as_user_errors():
                trainer = make(*args, **kwargs)
                # Raises ImportError if the optimizer's package is missing; training would notice much later.
                trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(Any, trainer.model))
            on_main_process(
                trainer.accelerator,
                lambda: check_trainer(trainer, folder, resume=resume, overwrite=overwrite),
            )
        self.open()
        return trainer

    def open(self) -> None:
        """Open the run directory on the main process, and write the resolved config of a new run."""
        args, trainer_args = self.run.args, self.run.trainer_args
        with trainer_args.main_process_first(local=False, desc="opening the run directory"):
            if trainer_args.process_index == 0:
                self.directory.open(resume=args.resume, overwrite=args.overwrite)
                if not args.resume:  # on resume, `_checkpoint` first checks that the run can be resumed
                    self._save_config()

    def close(self) -> None:
        """Restore the signal handlers, and release the lock of the run directory."""
        self._signal_handlers.close()
        self.directory.close()

    def _save_config(self) -> None:
        self.directory.save_config(resolved_text(self.run))

    def fit(
        self,
        trainer: transformers.Trainer,
        parts: dict[str, Stateful],
        runner: RewardRunner,
        *,
        watch: dict[str, str],
        answer: Answer,
        guards: Guards | None = None,
        check: Check | None = None,
    ) -> None:
        """Evaluate, train, evaluate, save the model, write the report and print a summary.

        Args:
            trainer: Trainer of TRL or transformers.
            parts: Stateful objects, by name, that checkpoints hold besides what transformers saves.
            runner: Runner of the rewards for held-out tasks.
            watch: Metrics to show in the progress bar, by label.
            answer: Function that answers held-out tasks greedily with the current weights. All processes call
                it at the same time, each with its shard of the tasks.
            guards: Guards that warn of or stop a run that does not learn.
            check: Another evaluation before and after training.
        """
        self.guards, self.check = guards, check
        preemption = PreemptionCallback()
        trainer.add_callback(preemption)
        # Until `close`: a second signal must not kill the process while it exits because of the first.
        self._signal_handlers.enter_context(preemption.listening())
        try:
            with write_errors(self.directory.path):
                self._fit(trainer, parts, runner, watch=watch, answer=answer, preemption=preemption)
        finally:
            preemption.finish()

    def _fit(
        self,
        trainer: transformers.Trainer,
        parts: dict[str, Stateful],
        runner: RewardRunner,
        *,
        watch: dict[str, str],
        answer: Answer,
        preemption: PreemptionCallback,
    ) -> None:
        args, guards = self.run.args, self.guards
        # transformers prints to the terminal, too; rlkit's ProgressCallback replaces that.
        for default in (transformers.trainer_callback.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(default)
        if self.run.trainer_args.device.type == "cpu":
            trainer.add_callback(FreedMemoryCallback())
        trainer.add_callback(FinishedCallback())
        trainer.add_callback(MetricsCallback(self.directory))
        if guards is not None:
            parts = parts | {"Guards": guards}
            trainer.add_callback(guards)
        trainer.add_callback(ProgressCallback(watch))
        if args.evaluation_steps:
            trainer.add_callback(
                EvaluateCallback(
                    lambda name: self.evaluate(trainer, runner, answer, name),
                    args.evaluation_steps,
                    self._evaluated,
                )
            )
        identity = identity_of(
            self.run, self.directory.stage, self.environment, runner, trainer.accelerator.num_processes
        )
        checkpoint = on_main_process(trainer.accelerator, lambda: self._checkpoint(identity))
        saver = CheckpointCallback(
            trainer,
            parts,
            self.directory,
            identity,
            resume_from=checkpoint,
            resume_anyway=args.resume_anyway,
        )
        trainer.callback_handler.callbacks.insert(0, saver)
        self.evaluate(trainer, runner, answer, "before")
        self._run_check(trainer, "before")
        with self.directory:
            try:
                with saver.loading(), self._wandb_run(trainer):
                    trainer.train(resume_from_checkpoint=checkpoint)
            except Finished:  # the checkpoint is from the last step: what follows training may be missing
                step, max_steps = trainer.state.global_step, trainer.state.max_steps
                logger.info("nothing is left to train: the checkpoint is from step %s of %s", step, max_steps)
                log_end_of_training(trainer)
        preemption.finish_training(trainer.state)
        self.evaluate(trainer, runner, answer, "after")
        self._run_check(trainer, "after")
        self._save_model(trainer)
        if trainer.accelerator.is_main_process:
            self.directory.flush()
            print(self.summary(), flush=True)
        trainer.accelerator.wait_for_everyone()  # a process may read the saved model as soon as it returns

    def _wandb_run(self, trainer: transformers.Trainer) -> AbstractContextManager[None]:
        if not trainer.accelerator.is_main_process:
            return nullcontext()
        return continued_wandb_run(self.directory.path, trainer.args.report_to or ())

    def _save_model(self, trainer: transformers.Trainer) -> None:
        """Save the trained model atomically: a run that is killed meanwhile leaves none."""
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        with ExitStack() as stack:
            folder = self.directory.path / "model"
            if trainer.accelerator.is_main_process:
                folder = stack.enter_context(atomic_folder(folder))
            if is_sharded:
                save_gathered(trainer, folder)  # only the main process writes
            elif trainer.accelerator.is_main_process:
                model = trainer.accelerator.unwrap_model(trainer.model)
                save_model(model, trainer.processing_class, folder)

    def _checkpoint(self, identity: dict[str, Any]) -> str | None:
        """Return the checkpoint to resume from, or None; remove what was logged and saved after it.

        Raises:
            UserError: The checkpoint is of a run with other settings, or all checkpoints are damaged.
        """
        if not self.run.args.resume:
            return None
        checkpoint = last_checkpoint(self.directory.path)
        if checkpoint is None:
            logger.warning("there is no checkpoint to resume from; starting from the beginning")
            self._save_config()
            self.directory.rewind(0)
            return None
        saved = read_manifest(checkpoint)
        check_unchanged(saved["identity"], identity, checkpoint, resume_anyway=self.run.args.resume_anyway)
        self._save_config()
        self.directory.rewind(saved["step"], saved.get("num_metrics"))
        return str(checkpoint)

    def _evaluated(self, name: str) -> bool:
        return (self.directory.path / "evaluation" / f"{name}.json").exists()

    def evaluate(
        self, trainer: transformers.Trainer, runner: RewardRunner, answer: Answer, name: str
    ) -> None:
        """Evaluate on the held-out tasks with greedy decoding, and save and log the result.

        All processes take part. A resumed run reads the result "before" if it exists.
        """
        args = self.run.args
        path = self.directory.path / "evaluation" / f"{name}.json"
        if not args.evaluation_tasks:
            return
        if args.resume and name == "before":
            # Only the main process looks: the other machines may not see its files.
            earlier = on_main_process(
                trainer.accelerator, lambda: Evaluation.load(path) if path.exists() else None
            )
            if earlier is not None:
                self._report_to_guards(earlier, trainer.state.global_step)
                return
        with evaluating(trainer):
            result = evaluate(
                lambda tasks, samples: shard_and_gather(trainer.accelerator, tasks, samples, answer),
                self.environment,
                MainProcessRunner(trainer.accelerator, runner),
                split=args.evaluation_split,
                n=args.evaluation_tasks,
                seed=self.run.trainer_args.seed,
                fold=self.fold,
                name=name,
                model=str(self.run.model_args.model_name_or_path),
                environment_args=args.mapping("environment_args"),
                temperature=0.0,
                max_length=self.max_completion_length,
                trainer_state=progress(trainer),
            )
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            result.save(path)
            if result.invalid:
                reasons = (
                    record["invalid"] for record in result.completions if record["invalid"] is not None
                )
                logger.warning(
                    "%s of %s held-out rollouts are invalid, the first because: %s",
                    result.invalid,
                    len(result.completions),
                    first_line(next(reasons)),
                )
            step = trainer.state.global_step
            means = {"evaluation/length": result.length, f"evaluation/{result.metric}": result.accuracy.mean}
            self.directory.log(step, means)
            log_to_wandb(means | {"train/global_step": step})
        self._report_to_guards(result, trainer.state.global_step)

    def _report_to_guards(self, result: Evaluation, step: int) -> None:
        if self.guards is not None:
            self.guards.evaluated(
                step,
                result.accuracy.mean,
                len(result.scores),
                metric=result.metric,
                last=result.name == "after",
            )

    def _run_check(self, trainer: transformers.Trainer, name: str) -> None:
        if self.check is not None:
            with evaluating(trainer):
                self.check.run(trainer, self.directory, name, resume=self.run.args.resume)

    def summary(self) -> str:
        """Write the report; return the held-out accuracy before and after, and the paths of the results."""
        lines = []
        folder = self.directory.path / "evaluation"
        if (folder / "before.json").exists() and (folder / "after.json").exists():
            before, after = (Evaluation.load(folder / f"{name}.json") for name in ("before", "after"))
            line = (
                f"{after.metric} on {len(after.scores)} held-out {after.split} tasks: "
                f"{before.accuracy.mean:.1%} -> {after.accuracy.mean:.1%}"
            )
            try:
                lines.append(f"{line} (paired permutation p = {compare(before, after)['p']:.2g})")
                if changes := changes_by_column(before, after):
                    lines.append(changes)
            except UserError as error:  # no task is valid in both: still write the report
                lines.append(f"{line} (no paired test: {error})")
            if self.check is not None:
                change = after.accuracy.mean - before.accuracy.mean
                lines += self.check.summary(self.directory, change)
        lines.append(f"model:  {self.directory.path / 'model'}")
        try:
            lines.append(f"report: {build_report([self.directory.path])}")
        except UserError as error:  # plotly is not installed: the run itself is complete
            lines.append(f"report: not written: {error} (afterwards: rlkit report {self.directory.path})")
        return "\n".join(lines)


@contextmanager
def library_errors_as_user_errors(keys: str = "") -> Iterator[None]:
    """Turn an argument error that a library raises into a UserError of one line, which starts with `keys`.

    Errors that are raised by rlkit or by a user's own code, and errors of a device such as out of memory, are
    not about an argument. They keep their traceback.
    """
    try:
        yield
    except (
        ValueError, TypeError, OSError, ImportError, RuntimeError, httpx.HTTPError, jinja2.TemplateError,
    ) as error:  # fmt: skip
        # torch's device errors, such as OutOfMemoryError, are subclasses of RuntimeError.
        is_device_error = isinstance(error, RuntimeError) and type(error) not in (
            RuntimeError,
            NotImplementedError,
        )
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        is_rlkit_error = innermost.f_globals["__name__"].startswith("rlkit.")
        if is_device_error or is_rlkit_error or author_frames(error):
            raise
        logger.debug("a library rejected an argument", exc_info=True)
        raise UserError(keys + one_line(error)) from error


def make_environment(args: TaskArguments) -> Environment:
    """Build the environment of a run; raise UserError if none is given or it cannot be loaded."""
    if args.environment is None:
        raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
    return load_environment(args.environment, **args.mapping("environment_args"))


def load_training_tasks(
    run: RunConfig[Any, Any], environment: Environment, fold: Mapping[str, Set[str]] | None
) -> datasets.Dataset:
    """Return the training tasks of a run, after trying one held-out task if the run evaluates.

    The environment may need something else for held-out tasks, such as another search engine, and a fault of
    it must show before the model is loaded.

    Raises:
        UserError: The tasks cannot be loaded, or lack a column that tasks need.
    """
    args, seed = run.args, run.trainer_args.seed
    if args.evaluation_tasks:
        load_tasks(environment, args.evaluation_split, 1, seed)
    return load_tasks(environment, "train", args.num_tasks, seed, fold)


def make_runner(
    args: TaskArguments,
    rewards: Mapping[str, Reward],
    environment: Environment,
    excluded: Collection[str] = (),
) -> RewardRunner:
    """Return the runner of the rewards of a run, except for those that are excluded.

    Like `reward_args`, `reward_concurrency` has the names in `rewards`, such as "mine.py:brief", under which
    the reward is not necessarily logged.
    """
    aliases = dict(zip(getattr(args, "rewards", None) or [], rewards, strict=False))
    max_concurrent = {
        aliases.get(name, name): maximum for name, maximum in args.mapping("reward_concurrency").items()
    }
    return RewardRunner(
        {name: reward for name, reward in rewards.items() if name not in excluded},
        args.reward_time_limit,
        args.reward_workers,
        metric=environment.metric,
        max_concurrent={name: m for name, m in max_concurrent.items() if name not in excluded},
        num_retries=args.reward_retries,
    )


def load_run_rewards(run: TrainConfig, environment: Environment) -> tuple[dict[str, Reward], list[float]]:
    """Return the rewards of a run by name, and their weights.

    They are those that the config lists, or the environment's defaults, and those of the algorithm, such as
    HAPO's length reward.
    """
    args, weights = run.args, run.trainer_args.reward_weights
    names = list(environment.reward_weights) if args.rewards is None else list(args.rewards)
    added = [name for name in PRESETS[args.algorithm].rewards if name not in names]
    weights = None if weights is None else [*weights, *(1.0 for _ in added)]
    return load_rewards([*names, *added], environment, weights, args.mapping("reward_args"))
