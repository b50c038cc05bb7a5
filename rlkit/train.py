"""`rlkit train`: improve a model on an environment's tasks with a policy optimizer.

Also a module for launchers: `accelerate launch -m rlkit.train --config FILE`. torch and TRL are imported
inside, so that `rlkit --help` and the reward workers start fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the keys say and return the exit code."""
    import sys

    from rlkit.config import parse_train

    run = parse_train(sys.argv[1:] if arguments is None else arguments)
    train(run)
    return 0


def train(run: Any) -> None:
    """Train: rewards, model, trainer, evaluation before and after, model and report at the end."""
    from trl import get_peft_config

    from rlkit.algorithms.grpo import GRPOTrainer
    from rlkit.models import load_model
    from rlkit.rewarding import ErrorBudget, RewardRunner, check_columns, load_rewards
    from rlkit.rollouts.generator import require_chat_template
    from rlkit.session import Session

    keys, args = run.task, run.trainer
    environment = keys.make_environment()
    rewards, weights = load_rewards(keys.rewards, environment, args.reward_weights)
    if environment.metric not in rewards:  # run and logged as accuracy, with no say in the reward
        rewards[environment.metric] = environment.rewards[environment.metric]
        weights.append(0.0)
    args.reward_weights = weights
    session = Session(run, "train", environment, args.max_completion_length)
    tasks = session.tasks()
    check_columns(rewards, tasks.column_names)
    model, tokenizer = load_model(run.model, trust_remote_code=args.trust_remote_code)
    require_chat_template(tokenizer, tasks[:1]["prompt"])
    session.open()
    with RewardRunner(rewards, keys.reward_time_limit, keys.reward_workers) as runner:
        trainer = GRPOTrainer(
            model,
            args=args,
            train_dataset=tasks,
            processing_class=tokenizer,
            peft_config=get_peft_config(run.model),
            environment=environment,
            runner=runner,
            budget=ErrorBudget(keys.reward_error_budget, keys.reward_error_patience),
            run=session.directory,
            shared_prefix=keys.shared_prefix,
        )
        watch = {"reward": "reward", "accuracy": f"rewards/{environment.metric}/mean"}
        session.fit(trainer, runner, watch | {"length": "completions/mean_length"})


if __name__ == "__main__":
    from rlkit.cli import run_command

    raise SystemExit(run_command(main))
