"""Help of `train`, `sft` and `rank`: rlkit's own keys by group, and how to list the hundreds of others."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import fields

from rlkit.arguments.schema import ARGUMENT_CLASSES, all_keys

NAME_WIDTH = 30
MIN_WIDTH, MAX_WIDTH = 60, 100
# The headings of rlkit's own keys, in order.
GROUPS = {
    "tasks": ("environment", "environment_args", "fold", "num_tasks"),
    "run directory": ("resume", "resume_anyway", "overwrite", "guards"),
    "evaluation": (
        "evaluation_tasks", "evaluation_steps", "evaluation_split", "evaluation_batch_size",
        "max_completion_length", "first_stage_documents",
    ),
    "rewards": (
        "rewards", "reward_args", "reward_time_limit", "reward_workers", "reward_concurrency",
        "reward_retries", "reward_error_budget", "reward_error_patience",
    ),
    "algorithm": (
        "algorithm", "dynamic_sampling", "dynamic_sampling_attempts", "group_by", "group_minimum",
        "difficulty_weighting", "shared_prefix",
    ),
    "rollouts": ("max_turns", "max_turn_tokens", "max_reply_tokens", "reply_time_limit", "weights_dir"),
    "demonstrations": ("demonstrations",),
    "objective": ("objective", "utility", "cutoff", "rankings", "estimator", "infonce_weight"),
    "scorer": (
        "cross_encoder", "temperature", "similarity", "adapter_rank", "adapter_side", "listwise",
        "max_seq_length", "query_prompt", "passage_prompt", "trust_remote_code",
    ),
}  # fmt: skip
LAUNCH = {
    "--accelerate NAME": "accelerate config: ddp, zero3, ... (configs/accelerate).",
    "--num_processes N": "Number of processes. Default: one per GPU.",
    "--dry_run": "Print the plan and the memory estimate, then exit.",
    "--memory GIB": "With --dry_run: device memory. Default: detected.",
    "--help_all": "Print all keys and exit.",
}
# Keys of TRL, transformers and PEFT that nearly every run sets.
COMMON_KEYS = {
    "train": (
        "model_name_or_path, output_dir (-o), seed, max_steps, learning_rate, num_generations, "
        "per_device_train_batch_size, gradient_accumulation_steps, max_completion_length, beta, use_vllm, "
        "use_peft"
    ),
    "sft": (
        "model_name_or_path, output_dir (-o), seed, max_steps, learning_rate, per_device_train_batch_size, "
        "gradient_accumulation_steps, max_length, use_peft"
    ),
    "rank": (
        "model_name_or_path, output_dir (-o), seed, max_steps, learning_rate, per_device_train_batch_size"
    ),
}
OWNERS = {
    "train": "TRL's GRPOConfig and ModelConfig",
    "sft": "TRL's SFTConfig and ModelConfig",
    "rank": "transformers' TrainingArguments and TRL's ModelConfig",
}


def print_help(command: str, summary: str, argv: Sequence[str]) -> bool:
    """Print the help if the command line asks for it, and return whether it did."""
    if "-h" in argv or "--help" in argv:
        print(short_help(command, summary))
    elif "--help_all" in argv:
        from rlkit.arguments.parse import trl_parser

        trl_parser(command).print_help()
    else:
        return False
    return True


def short_help(command: str, summary: str) -> str:
    """Return the help of `train`, `sft` or `rank`: rlkit's own keys and the launcher's options.

    The width is that of the terminal, within `MIN_WIDTH` and `MAX_WIDTH`.
    """
    width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, MAX_WIDTH))
    lines = [f"usage: rlkit {command} [CONFIG.yaml] [--KEY VALUE ...]", "", summary]
    keys = {f.name: f for f in fields(ARGUMENT_CLASSES[command])}
    for group, names in GROUPS.items():
        members = [keys[name] for name in names if name in keys]
        if members:
            lines += ["", f"{group}:"]
        for key in members:
            lines += _entry(f"--{key.name}", key.metadata["help"] + _default(key.default), width)
    lines += ["", "launch:"]
    for name, description in LAUNCH.items():
        if command == "train" or name not in ("--dry_run", "--memory GIB"):
            lines += _entry(name, description, width)
    num_library_keys = len(all_keys(command)) - len(keys)
    footer = (
        f"All {num_library_keys} keys of {OWNERS[command]} are accepted under their own names. The most "
        f"common ones: {COMMON_KEYS[command]}. `rlkit {command} --help_all` prints all keys."
    )
    return "\n".join([*lines, "", *textwrap.wrap(footer, width)])


def _entry(name: str, description: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(description, width - NAME_WIDTH)
    first = f"  {name:{NAME_WIDTH - 1}} "[: max(NAME_WIDTH, len(name) + 3)]
    return [first + wrapped[0], *(" " * NAME_WIDTH + line for line in wrapped[1:])]


def _default(value: object) -> str:
    if value is None or value is False:
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"
