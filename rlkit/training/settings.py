"""What a GRPOTrainer checks before it trains: its arguments, and settings that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlkit.arguments.bounds import CHOICES, LOSS_TYPES
from rlkit.arguments.generation import check_generation_kwargs
from rlkit.arguments.train_keys import UNUSED_BY_TRAINER, check_unused
from rlkit.errors import UserError, check_choice
from rlkit.reward import RewardCall

if TYPE_CHECKING:
    from rlkit.training.grpo import GRPOTrainer

# Arguments of TRL's GRPOTrainer that rlkit's step does not read, and what to use instead.
REPLACED_ARGUMENTS = {
    "reward_funcs": "pass the rewards as runner=RewardRunner({...}), which also calls TRL's reward functions",
    "reward_processing_classes": "a reward model loads its tokenizer, see rlkit.scoring.reward_model",
    "rollout_func": "write an Environment, whose `respond` continues a rollout",
    "environment_factory": "write an Environment, whose `respond` continues a rollout",
    "tools": "write an Environment, whose `respond` calls the tools",
}


def check_constructor(arguments: Mapping[str, object]) -> None:
    """Raise UserError if an argument of TRL's GRPOTrainer is set that rlkit's step would ignore.

    Args:
        arguments: Keyword arguments for TRL's GRPOTrainer.
    """
    for name, remedy in REPLACED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise UserError(f"GRPOTrainer must be built without {name}: {remedy}")


def check_settings(trainer: GRPOTrainer) -> None:
    """Raise UserError if settings of a trainer contradict each other, or one would be ignored."""
    _check_keys(trainer)
    args = trainer.args
    if args.sync_ref_model and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise UserError(
            "sync_ref_model does not work with FSDP or DeepSpeed: checkpoints cannot hold a sharded "
            "reference model yet; set sync_ref_model: false"
        )
    if trainer.samples_with_trl and trainer.loop.limits.max_turns > 1:
        raise UserError(
            f"{trainer.environment.id} has several turns, which transformers cannot sample with FSDP 1, "
            "ds3_gather_for_generation: false or continuous batching; set use_vllm: true"
        )
    if (
        trainer.kl_in_reward
        and trainer.advantages is None
        and args.multi_objective_aggregation == "normalize_then_sum"
    ):
        raise UserError("kl_in_reward requires multi_objective_aggregation: sum_then_normalize")
    _check_groups(trainer)


def _check_keys(trainer: GRPOTrainer) -> None:
    args, limits = trainer.args, trainer.loop.limits
    choices = ("scale_rewards", "multi_objective_aggregation", "vllm_importance_sampling_mode")
    for key in (*choices, "importance_sampling_level"):
        check_choice(key, getattr(args, key), CHOICES[key])
    check_choice("loss_type", args.loss_type, LOSS_TYPES["train"])
    check_unused(UNUSED_BY_TRAINER, vars(args), "rlkit's GRPOTrainer")
    check_generation_kwargs(
        args.generation_kwargs or {},
        use_vllm=args.use_vllm,
        continuous_batching=args.use_transformers_continuous_batching,
        max_tokens=limits.max_turn_tokens or limits.max_tokens,
        max_turns=limits.max_turns,
    )


def _check_groups(trainer: GRPOTrainer) -> None:
    args, G = trainer.args, trainer.num_generations
    need_groups = [
        f"the reward {name!r}"
        for name, reward in trainer.runner.rewards.items()
        if RewardCall(reward).scope == "group"
    ]
    if need_groups and G == 1:
        raise UserError(f"{need_groups[0]} needs at least 2 rollouts per task; increase num_generations")
    if trainer.dynamic_sampling:
        need_groups.append("dynamic_sampling")
    B = args.per_device_train_batch_size * args.steps_per_generation
    if need_groups and B % G:
        raise UserError(
            f"{need_groups[0]} needs whole groups, but each process samples {B} rollouts at a time "
            "(per_device_train_batch_size * steps_per_generation); make that a multiple of "
            f"num_generations ({G})"
        )
