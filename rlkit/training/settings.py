"""Checks of a GRPOTrainer's arguments and settings before training."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jinja2
import torch
import trl
from datasets import Dataset
from jinja2.meta import find_undeclared_variables

from rlkit.arguments.bounds import CHOICES, LOSS_TYPES
from rlkit.arguments.generation import check_generation_kwargs
from rlkit.arguments.train_keys import UNUSED_BY_TRAINER
from rlkit.arguments.unused_keys import check_defaults
from rlkit.errors import UserError, check_choice, nearest
from rlkit.reward import RewardCall
from rlkit.rollouts.tokenize import check_prompts

if TYPE_CHECKING:
    from rlkit.training.grpo import GRPOTrainer

# Arguments of TRL's GRPOTrainer that rlkit's step does not read, and what to use instead.
REPLACED_ARGUMENTS = {
    "reward_funcs": "pass the rewards as runner=RewardRunner({...}), which also calls TRL's reward functions",
    "reward_processing_classes": "use rlkit.scoring.reward_model:RewardModel",
    "rollout_func": "write an Environment, whose `respond` continues a rollout",
    "environment_factory": "write an Environment, whose `respond` continues a rollout",
    "tools": "write an Environment, whose `respond` calls the tools",
}
# Arguments of `apply_chat_template` that the loop sets itself, and the reasons.
TEMPLATE_ARGUMENTS = {
    "chat_template": "the template is part of the model's tokenizer",
    "tools": "the environment declares its tools as `Environment.tools`",
    **dict.fromkeys(
        (
            "add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages",
            "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
            "tokenizer_kwargs", "truncation",
        ),
        "the rollout loop sets it",
    ),
}  # fmt: skip


def check_constructor(positional: Sequence[object], keywords: Mapping[str, object]) -> None:
    """Raise UserError if an argument of TRL's GRPOTrainer is set that rlkit's step would ignore.

    Args:
        positional: Positional arguments for TRL's GRPOTrainer.
        keywords: Keyword arguments for it.
    """
    names = inspect.signature(trl.GRPOTrainer).parameters
    arguments = {**dict(zip(names, positional, strict=False)), **keywords}
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


def disable_attention_dropout(model: torch.nn.Module) -> None:
    """Set attention dropout to 0; most models store it as a number, not as a module.

    TRL's `disable_dropout` changes only modules. With attention dropout, the log-probabilities of the old
    policy and of the loss differ, and so do those of two calls.
    """
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _check_keys(trainer: GRPOTrainer) -> None:
    args, limits = trainer.args, trainer.loop.limits
    choices = ("scale_rewards", "multi_objective_aggregation", "vllm_importance_sampling_mode")
    for key in (*choices, "importance_sampling_level"):
        check_choice(key, getattr(args, key), CHOICES[key])
    check_choice("loss_type", args.loss_type, LOSS_TYPES["train"])
    check_defaults(UNUSED_BY_TRAINER, vars(args), "rlkit's GRPOTrainer")
    _check_chat_template_kwargs(trainer)
    if trainer.accelerator.dataloader_config.dispatch_batches:
        raise UserError("accelerator_config: dispatch_batches must be false, because tasks are not tensors")
    if isinstance(trainer.train_dataset, Dataset):
        check_prompts(trainer.tokenizer, trainer.train_dataset[:8]["prompt"], **trainer.chat_template_kwargs)
    check_generation_kwargs(
        args.generation_kwargs or {},
        use_vllm=args.use_vllm,
        continuous_batching=args.use_transformers_continuous_batching,
        max_tokens=limits.max_turn_tokens or limits.max_tokens,
        max_turns=limits.max_turns,
    )


def _check_chat_template_kwargs(trainer: GRPOTrainer) -> None:
    """Raise UserError for the first entry of `chat_template_kwargs` that the chat template would ignore."""
    template = str(trainer.tokenizer.chat_template or "")
    for name in trainer.chat_template_kwargs:
        if name in TEMPLATE_ARGUMENTS:
            raise UserError(
                f"chat_template_kwargs must not contain {name!r}: {TEMPLATE_ARGUMENTS[name]}; remove it"
            )
        if not template:
            raise UserError(
                "chat_template_kwargs must be empty, because the tokenizer of the model has no chat template"
            )
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"chat_template_kwargs: the chat template of the model has no variable {name!r}"
                f"{nearest(name, _variables(template))}"
            )


def _variables(template: str) -> set[str]:
    """Return the variables of a chat template that `chat_template_kwargs` may set."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateSyntaxError:  # transformers adds a tag, `generation`
        return set()
    helpers = {"raise_exception", "strftime_now"}
    return {name for name in names - TEMPLATE_ARGUMENTS.keys() - helpers if not name.endswith("_token")}


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
