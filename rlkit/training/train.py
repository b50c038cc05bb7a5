"""Train a model on an environment's tasks with GRPO or one of its variants (`rlkit train`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from trl import get_peft_config

from rlkit.arguments.parse import TrainConfig
from rlkit.arguments.presets import PRESETS, warnings_for
from rlkit.arguments.train_keys import keys_without_effect
from rlkit.environment import Environment
from rlkit.errors import UserError, nearest
from rlkit.models.load import check_is_model, load_model
from rlkit.rollouts.loop import RolloutLimits
from rlkit.rollouts.tokenize import require_chat_template
from rlkit.rollouts.types import Rollout
from rlkit.runs.guards import Guards
from rlkit.scoring import ErrorBudget, check_columns
from rlkit.training.advantages import by_key, leave_one_out
from rlkit.training.grpo import Advantages, GRPOTrainer
from rlkit.training.session import Session, load_run_rewards, make_environment, make_runner
from rlkit.training.start_checks import check_states

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def train(run: TrainConfig) -> None:
    """Train a policy, evaluate before and after, and save the model and a report."""
    args, trainer_args = run.args, run.trainer_args
    environment = make_environment(args)
    session = Session(run, "train", environment, trainer_args.max_completion_length)
    with closing(session):
        session.prepare()
        check_is_model(run.model_args.model_name_or_path)
        rewards, trainer_args.reward_weights = load_run_rewards(run, environment)
        if trainer_args.process_index == 0:
            for warning in warnings_for(run.keys()) + keys_without_effect(changed_keys(run), run.keys()):
                logger.warning(warning)
        guards = Guards(args.mapping("guards"), record=session.directory.log)
        tasks = session.tasks()
        check_columns(rewards, tasks.column_names)
        if len(tasks) < (prompts := trainer_args.generation_batch_size // trainer_args.num_generations):
            raise UserError(
                f"there are {len(tasks)} tasks, but each sampling step needs {prompts}; increase num_tasks "
                "or decrease the batch size"
            )
        if args.group_by:
            check_group_column(tasks, args.group_by)
        if run.model_args.model_revision != "main":  # TRL loads the reference model itself, from "main"
            trainer_args.model_init_kwargs = {
                **(trainer_args.model_init_kwargs or {}),
                "revision": run.model_args.model_revision,
            }
        # Before the model is loaded, because a reward may turn out to be unusable.
        with make_runner(args, rewards, environment) as runner:
            check_states(runner, environment)
            model, tokenizer = load_model(run.model_args, trust_remote_code=trainer_args.trust_remote_code)
            require_chat_template(tokenizer, tasks[:1]["prompt"])
            options = trainer_options(run, environment)
            if options["limits"].max_turns > 1 and "vllm_importance_sampling_mode" not in run.explicit:
                # TRL's default, sequence_mask, multiplies the ratios of all tokens. In a long rollout the
                # product soon exceeds the limit, and the rollout is masked out.
                trainer_args.vllm_importance_sampling_mode = "token_truncate"
            trainer = session.make_trainer(
                GRPOTrainer,
                model,
                args=trainer_args,
                train_dataset=tasks,
                processing_class=tokenizer,
                peft_config=get_peft_config(run.model_args),
                environment=environment,
                runner=runner,
                budget=ErrorBudget(args.reward_error_budget, args.reward_error_patience),
                run_dir=session.directory,
                **options,
            )
            watch = {
                "reward": "reward",
                environment.metric: f"rewards/{environment.metric}/mean",
                "length": "completions/mean_length",
            }
            with closing(trainer):
                session.fit(
                    trainer,
                    trainer.stateful(),
                    runner,
                    watch=watch,
                    answer=partial(answer, trainer, args.evaluation_batch_size),
                    guards=guards,
                )


def answer(
    trainer: GRPOTrainer, batch_size: int, tasks: Sequence[dict[str, Any]], samples: int
) -> list[list[Rollout]]:
    """Return `samples` greedy rollouts of each held-out task, sampled by the engine of training."""
    with trainer.engine(batch_size) as engine:
        return trainer.sampler(engine, tasks, samples)


def changed_keys(run: TrainConfig) -> set[str]:
    """Return the keys that are neither at their default nor at the value of the algorithm's preset."""
    defaults = {f.name: f.default for config in (run.args, run.trainer_args) for f in fields(config)}
    defaults |= PRESETS[run.args.algorithm].keys
    keys = run.keys()
    return {key for key in run.explicit if key in defaults and keys[key] != defaults[key]}


def check_group_column(tasks: Dataset, column: str) -> None:
    """Raise UserError if tasks cannot be grouped by a column: it is missing, or has no labels."""
    if column not in tasks.column_names:
        raise UserError(f"group_by: tasks have no column {column!r}{nearest(column, tasks.column_names)}")
    for value in tasks[column]:
        if not isinstance(value, str | int):
            raise UserError(
                f"group_by: column {column!r} must contain strings or integers, not {value!r:.60}"
            )


def trainer_options(run: TrainConfig, environment: Environment) -> dict[str, Any]:
    """Return the arguments of `GRPOTrainer`, besides TRL's, that the config of a run determines."""
    args, trainer_args = run.args, run.trainer_args
    advantages: Advantages | None = None
    if args.algorithm == "hrpo":
        advantages = partial(by_key, minimum=args.group_minimum, scale=trainer_args.scale_rewards == "group")
    if args.algorithm == "rloo":
        advantages = leave_one_out
    limits = RolloutLimits(
        trainer_args.max_completion_length,
        max_turns=args.max_turns or environment.max_turns,
        max_turn_tokens=args.max_turn_tokens,
        max_reply_tokens=args.max_reply_tokens,
        reply_timeout=args.reply_time_limit,
    )
    return {
        "limits": limits,
        "weights_dir": args.weights_dir,
        "shared_prefix": args.shared_prefix,
        "advantages": advantages,
        "group_by": args.group_by,
        "difficulty_weighting": args.difficulty_weighting,
        "kl_in_reward": args.algorithm == "rloo",
        "dynamic_sampling": args.dynamic_sampling_attempts if args.dynamic_sampling else 0,
    }
