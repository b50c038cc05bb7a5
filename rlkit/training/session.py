"""What every kind of training run shares: its folder, its held-out evaluations, its end."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object

from rlkit.arguments.keys import TaskArguments
from rlkit.arguments.parse import RunConfig, TrainConfig, resolved_text
from rlkit.arguments.presets import PRESETS
from rlkit.environment import Environment
from rlkit.errors import UserError, first_line, one_line
from rlkit.evaluation import Evaluation, compare, evaluate
from rlkit.evaluation.splits import load_tasks, read_fold
from rlkit.files import atomic_write
from rlkit.models.cpu import tune_for_cpu
from rlkit.models.load import save_gathered, save_model
from rlkit.models.patches import shard_on_cpu
from rlkit.registry import author_frames, load_environment
from rlkit.report import build_report
from rlkit.reward import Reward
from rlkit.rollouts.types import Rollout
from rlkit.runs.callbacks import (
    EvaluateCallback,
    Finished,
    FinishedCallback,
    MetricsCallback,
    ProgressCallback,
)
from rlkit.runs.checkpoints import differences, last_checkpoint, manifest
from rlkit.runs.directory import RunDirectory, write_errors
from rlkit.runs.guards import Guards
from rlkit.runs.preemption import PreemptionCallback
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.training.resume import CheckpointCallback, Stateful

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator
    from torch import nn

logger = logging.getLogger(__name__)

# Of the trainer's keys those that decide which task is learned from at which step.
ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "shuffle_dataset",
)

# answer(tasks, samples) returns `samples` rollouts for each task.
Answer = Callable[[Sequence[dict[str, Any]], int], Sequence[list[Rollout]]]
Decision = TypeVar("Decision")
Parameters = ParamSpec("Parameters")
AnyTrainer = TypeVar("AnyTrainer", bound=transformers.Trainer)


class Session:
    """One training run from an empty folder to a report.

    Args:
        run: the parsed keys.
        stage: "sft", "train" or "rank".
        environment: gives the tasks to train on and those to evaluate on.
        max_completion_length: limit of an answer in evaluations, in tokens; None where it has no tokens.
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
        self.run = run
        self.environment = environment
        self.max_completion_length = max_completion_length
        self.directory = RunDirectory(Path(run.trainer_args.output_dir), stage)
        self.guards: Guards | None = None
        # Read once: the file may be gone when the last evaluation comes.
        self.fold = None if run.args.fold is None else read_fold(run.args.fold, environment)

    def tasks(self) -> datasets.Dataset:
        """The tasks to train on; raises UserError where they are not tasks."""
        return load_tasks(
            self.environment, "train", self.run.args.num_tasks, self.run.trainer_args.seed, self.fold
        )

    def prepare(self) -> None:
        """Find out what is wrong before the model loads; raises UserError.

        The run directory is checked and left as it is. The learning rate schedule is built once and
        discarded, to validate its arguments.
        """
        args, trainer_args = self.run.args, self.run.trainer_args
        resolved_text(self.run)
        if trainer_args.process_index == 0:
            self.directory.prepare(resume=args.resume, overwrite=args.overwrite)
        with refusals():
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
        """Return `make(*args, **kwargs)`, a trainer, and then open the run directory.

        What TRL or transformers refuses is a UserError of one line, and nothing was deleted. All processes
        begin with the same random numbers, for adapters: trainers set the seed after they have made them.
        """
        transformers.set_seed(self.run.trainer_args.seed)
        with refusals():
            trainer = make(*args, **kwargs)
            trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(Any, trainer.model))  # is it installed?
        self.open()
        return trainer

    def open(self) -> None:
        """Create the run directory; write the resolved config of a new run. The main process does."""
        args, trainer_args = self.run.args, self.run.trainer_args
        with trainer_args.main_process_first(local=False, desc="opening the run directory"):
            if trainer_args.process_index == 0:
                self.directory.open(resume=args.resume, overwrite=args.overwrite)
                if not args.resume:  # a run that cannot be resumed keeps its config
                    self._save_config()

    def close(self) -> None:
        """Let other processes write to the run directory."""
        self.directory.close()

    def _save_config(self) -> None:
        atomic_write(self.directory.path / "config.yaml", resolved_text(self.run))

    def fit(
        self,
        trainer: transformers.Trainer,
        parts: dict[str, Stateful],
        runner: RewardRunner,
        *,
        watch: dict[str, str],
        answer: Answer,
        guards: Guards | None = None,
    ) -> None:
        """Evaluate, train, evaluate, save the model, write the report and say what was learned.

        Args:
            trainer: any trainer of TRL or transformers.
            parts: what its checkpoints keep besides what transformers saves, by name.
            runner: judges the answers to held-out tasks.
            watch: metrics to show in the progress bar, by label.
            answer: answers this rank's share of the held-out tasks, greedily.
            guards: stop a run that cannot learn.
        """
        self.guards = guards
        preemption = PreemptionCallback()
        trainer.add_callback(preemption)
        with preemption.listening(), write_errors(self.directory.path):
            self._fit(trainer, parts, runner, watch=watch, answer=answer, preemption=preemption)

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
        for default in (transformers.trainer_callback.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(default)
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
        identity = self.identity(runner, trainer.accelerator.num_processes)
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
        with self.directory, suppress(Finished):
            trainer.train(resume_from_checkpoint=checkpoint)
        preemption.trained(trainer.state)
        self.evaluate(trainer, runner, answer, "after")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            save_gathered(trainer, self.directory.path / "model")
        elif trainer.accelerator.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_model(model, trainer.processing_class, self.directory.path / "model")
        if trainer.accelerator.is_main_process:
            print(self.summary(), flush=True)
        trainer.accelerator.wait_for_everyone()  # what others read next is written

    def identity(self, runner: RewardRunner, processes: int) -> dict[str, Any]:
        """What may not change when a run goes on, in values that JSON can say."""
        args, trainer_args = self.run.args, self.run.trainer_args
        identity = {
            "stage": self.directory.stage,
            "environment": self.environment.id,
            "environment_args": args.mapping("environment_args"),
            "fold": args.fold,
            "num_tasks": args.num_tasks,
            "algorithm": getattr(args, "algorithm", None),
            "model": self.run.model_args.model_name_or_path,
            "processes": processes,
        }
        own = ("demonstrations", "group_by", "dynamic_sampling")
        identity |= {key: getattr(args, key, None) for key in own}
        identity |= {key: getattr(trainer_args, key, None) for key in ORDER}
        if self.directory.stage == "train":
            weights = dict(zip(runner.names, trainer_args.reward_weights, strict=True))
            identity |= {"rewards": weights, "reward_args": args.mapping("reward_args")}
        return json.loads(json.dumps(identity))

    def _checkpoint(self, identity: dict[str, Any]) -> str | None:
        """Where a resumed run goes on from; what was written after it is taken back."""
        if not self.run.args.resume:
            return None
        checkpoint = last_checkpoint(self.directory.path)
        if checkpoint is None:
            logger.warning("there is no checkpoint yet: starting from the beginning")
            self._save_config()
            self.directory.rewind(0)
            return None
        saved = manifest(checkpoint)
        changed = differences(saved["identity"], identity)
        if changed:
            text = f"this run is not the one that wrote {checkpoint}: {'; '.join(changed)}"
            if not self.run.args.resume_anyway:
                raise UserError(f"{text}; --resume_anyway resumes it anyway")
            logger.warning(text)
        self._save_config()
        self.directory.rewind(saved["step"])
        return str(checkpoint)

    def _evaluated(self, name: str) -> bool:
        return (self.directory.path / "evaluation" / f"{name}.json").exists()

    def evaluate(
        self, trainer: transformers.Trainer, runner: RewardRunner, answer: Answer, name: str
    ) -> None:
        """Answer the held-out tasks greedily; all ranks take part. A resumed run has `before` already."""
        args = self.run.args
        path = self.directory.path / "evaluation" / f"{name}.json"
        if not args.evaluation_tasks or (args.resume and name == "before" and path.exists()):
            return
        with evaluating(trainer):
            result = evaluate(
                lambda tasks, samples: in_shares(trainer.accelerator, tasks, samples, answer),
                self.environment,
                runner,
                split=args.evaluation_split,
                n=args.evaluation_tasks,
                seed=self.run.trainer_args.seed,
                fold=self.fold,
                name=name,
                model=str(self.run.model_args.model_name_or_path),
                environment_args=args.mapping("environment_args"),
                temperature=0.0,
                max_length=self.max_completion_length,
            )
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            result.save(path)
            if result.invalid:
                reasons = (one["invalid"] for one in result.completions if one["invalid"] is not None)
                logger.warning(
                    "%s of %s held-out rollouts are invalid, the first because: %s",
                    result.invalid,
                    len(result.completions),
                    first_line(next(reasons)),
                )
            step = trainer.state.global_step
            means = {"evaluation/length": result.length, f"evaluation/{result.metric}": result.accuracy.mean}
            self.directory.log(step, means)
            _tell_wandb(means | {"train/global_step": step})
        if self.guards is not None:
            self.guards.evaluated(
                trainer.state.global_step,
                result.accuracy.mean,
                len(result.scores),
                metric=result.metric,
                last=name == "after",
            )

    def summary(self) -> str:
        """Write the report and say in two or three lines what was learned and where things are."""
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
            except UserError as error:  # a run is worth its report though all its rewards failed
                lines.append(f"{line} (no paired test: {error})")
        lines.append(f"model:  {self.directory.path / 'model'}")
        lines.append(f"report: {build_report([self.directory.path])}")
        return "\n".join(lines)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what a library refuses into a UserError of one line.

    Errors that rlkit or a user's own code raises, and those of a device, keep their traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
        of_device = isinstance(error, RuntimeError) and type(error) not in (RuntimeError, NotImplementedError)
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        if of_device or author_frames(error) or innermost.f_globals["__name__"].startswith("rlkit."):
            raise
        logger.debug("refused", exc_info=True)
        raise UserError(one_line(error)) from error


def make_environment(args: TaskArguments) -> Environment:
    """Build the environment that the keys of a run name; raises UserError."""
    if args.environment is None:
        raise UserError("no environment given: set the key 'environment', e.g. --environment causal-v1")
    return load_environment(args.environment, **args.mapping("environment_args"))


def load_run_rewards(run: TrainConfig, environment: Environment) -> tuple[dict[str, Reward], list[float]]:
    """The rewards of a run and their weights: those listed, and those that are part of its algorithm."""
    args, weights = run.args, run.trainer_args.reward_weights
    names = list(environment.reward_weights) if args.rewards is None else list(args.rewards)
    added = [name for name in PRESETS[args.algorithm].rewards if name not in names]
    weights = None if weights is None else [*weights, *(1.0 for _ in added)]
    return load_rewards([*names, *added], environment, weights, args.mapping("reward_args"))


def _tell_wandb(numbers: dict[str, Any]) -> None:
    # The run of transformers' callback, from the first step on: what W&B's sweeps compare.
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.log(numbers)


def in_shares(
    accelerator: Accelerator, tasks: Sequence[dict[str, Any]], samples: int, answer: Answer
) -> list[list[Rollout]]:
    """Answer tasks, each rank its share, and gather the answers on all ranks in order."""
    share = list(enumerate(tasks))[accelerator.process_index :: accelerator.num_processes]
    # Also with an empty share: gathering the weights of a sharded model takes all ranks.
    answers = answer([task for _, task in share], samples)
    mine = [(index, answered) for (index, _), answered in zip(share, answers, strict=True)]
    return [answered for _, answered in sorted(gather_object(mine), key=lambda pair: pair[0])]


@contextmanager
def evaluating(trainer: transformers.Trainer) -> Iterator[None]:
    """Without dropout; the model's mode is afterwards what it was."""
    model: nn.Module = trainer.model  # type: ignore[assignment]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def on_main_process(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """Let the main process decide, and return on all ranks what it did or raise its UserError."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
