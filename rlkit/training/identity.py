"""Settings of a run that must not change when it is resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkit.arguments.parse import RunConfig
    from rlkit.environment import Environment
    from rlkit.scoring import RewardRunner

# Arguments of the trainer that determine which tasks are in the batch of which step. They must not change
# when a run is resumed.
TASK_ORDER_KEYS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "shuffle_dataset",
)


def identity_of(
    run: RunConfig[Any, Any], stage: str, environment: Environment, runner: RewardRunner, num_processes: int
) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed, as JSON values.

    Args:
        run: Arguments of the run.
        stage: Kind of run: "sft", "train" or "rank".
        environment: Environment of the run.
        runner: Runner of the rewards, whose names are part of a policy gradient run.
        num_processes: Number of processes of the run.
    """
    args, trainer_args = run.args, run.trainer_args
    identity = {
        "stage": stage,
        "environment": environment.id,
        "environment_args": args.mapping("environment_args"),
        "fold": args.fold,
        "num_tasks": args.num_tasks,
        "algorithm": getattr(args, "algorithm", None),
        "model": run.model_args.model_name_or_path,
        "processes": num_processes,
    }
    keys = ("demonstrations", "group_by", "dynamic_sampling")
    identity |= {key: getattr(args, key, None) for key in keys}
    identity |= {key: getattr(trainer_args, key, None) for key in TASK_ORDER_KEYS}
    if stage == "train":
        weights = dict(zip(runner.names, trainer_args.reward_weights, strict=True))
        identity |= {"rewards": weights, "reward_args": args.mapping("reward_args")}
    if stage == "rank":  # other values give the scorer other weights
        model_args = run.model_args
        identity |= {key: getattr(args, key) or None for key in ("cross_encoder", "adapter_rank")}
        lora = {key: getattr(model_args, key) for key in ("lora_r", "lora_target_modules", "use_dora")}
        identity["lora"] = lora if model_args.use_peft else None
    return json.loads(json.dumps(identity))
