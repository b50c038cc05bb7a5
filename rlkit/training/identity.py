"""Settings of a run that must not change when it is resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError
from rlkit.runs.checkpoints import differences

if TYPE_CHECKING:
    from pathlib import Path

    from rlkit.arguments.parse import RunConfig
    from rlkit.environment import Environment
    from rlkit.scoring import RewardRunner

logger = logging.getLogger(__name__)

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

# Settings that determine which weights a checkpoint has, and the state of their optimizer. Not even
# --resume_anyway can change them: the libraries would ignore weights that are missing, or fail.
STRUCTURE_KEYS = ("stage", "cross_encoder", "adapter_rank", "adapter_side", "listwise", "lora", "optim")

# Keys of "lora". The first ones determine the adapter's weights; with another scale (`lora_alpha`,
# `use_rslora`), the same weights would be another model.
LORA_KEYS = (
    "lora_r",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_dora",
    "lora_alpha",
    "use_rslora",
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
    if stage == "rank":
        structure_keys = ("cross_encoder", "adapter_rank", "adapter_side", "listwise")
        identity |= {key: getattr(args, key) or None for key in structure_keys}
    lora = {key: getattr(run.model_args, key) for key in LORA_KEYS}
    identity |= {"lora": lora if run.model_args.use_peft else None, "optim": trainer_args.optim}
    return json.loads(json.dumps(identity))


def check_unchanged(
    saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path, *, resume_anyway: bool
) -> None:
    """Check that a run may resume from a checkpoint, and log which settings have changed.

    Args:
        saved: Identity in the manifest of the checkpoint.
        now: Identity of the run.
        folder: Folder of the checkpoint.
        resume_anyway: Whether settings may change that do not determine the weights.

    Raises:
        UserError: A setting has changed that must not change.
    """
    if now.get("adapter_side") and not saved.get("adapter_side"):
        raise UserError(
            f"{folder} was saved by a version of rlkit without adapter_side, whose adapter weights have "
            "other names: choose another output_dir"
        )
    # Checkpoints of earlier versions lack some of the keys.
    now = {key: value for key, value in now.items() if key in saved or key not in STRUCTURE_KEYS}
    if saved.get("lora") and now["lora"]:
        now["lora"] = {key: value for key, value in now["lora"].items() if key in saved["lora"]}
    changed = differences(saved, now)
    if not changed:
        return
    message = f"the settings differ from those of {folder}: {'; '.join(changed)}"
    if any(saved.get(key) != now.get(key) for key in STRUCTURE_KEYS):
        raise UserError(
            f"{message}; its weights and optimizer state do not fit: restore the settings, or choose another "
            "--output_dir"
        )
    if not resume_anyway:
        raise UserError(f"{message}; --resume_anyway resumes with the new settings")
    logger.warning(message)
