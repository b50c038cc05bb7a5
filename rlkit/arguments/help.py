"""`rlkit train --help`: rlkit's own keys by group, and where to find the hundreds of others."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import Field, fields

from rlkit.arguments.keys import group_of
from rlkit.arguments.schema import OWN, all_keys

NAME_WIDTH = 28
MAX_WIDTH = 100
LAUNCH = {
    "--accelerate NAME": "Several processes: a file of configs/accelerate, e.g. ddp, zero3.",
    "--num_processes N": "Number of processes. Default: one per GPU.",
    "--dry_run": "Print the plan and the memory a device needs; train nothing.",
    "--memory GIB": "With --dry_run: memory of a device. Default: this machine's.",
    "--help_all": "Print every key.",
}
# Keys of TRL, transformers and PEFT that nearly every run sets.
USUAL = {
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
    """Print the help that a command line asks for, and return whether it does."""
    if "-h" in argv or "--help" in argv:
        print(short_help(command, summary))
    elif "--help_all" in argv:
        from rlkit.arguments.parse import trl_parser

        trl_parser(command).print_help()
    else:
        return False
    return True


def short_help(command: str, summary: str) -> str:
    """Return the help of `train`, `sft` or `rank`: rlkit's own keys and the launcher's options."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    lines = [f"usage: rlkit {command} [CONFIG.yaml] [--KEY VALUE ...]", "", f"{summary}"]
    groups: dict[str, list[Field[object]]] = {}
    for own in fields(OWN[command]):
        groups.setdefault(group_of(own), []).append(own)
    for group, members in groups.items():
        lines += ["", f"{group}:"]
        for own in members:
            lines += _entry(f"--{own.name}", own.metadata["help"] + _default(own.default), width)
    lines += ["", "launch:"]
    for name, text in LAUNCH.items():
        if command == "train" or name not in ("--dry_run", "--memory GIB"):
            lines += _entry(name, text, width)
    others = len(all_keys(command)) - len(fields(OWN[command]))
    text = (
        f"Also any of the {others} keys of {OWNERS[command]} under its own name; the usual ones: "
        f"{USUAL[command]}. `rlkit {command} --help_all` prints every key."
    )
    return "\n".join([*lines, "", *textwrap.wrap(text, width)])


def _entry(name: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, width - NAME_WIDTH - 2)
    first = f"  {name:{NAME_WIDTH - 1}} "[: max(NAME_WIDTH, len(name) + 3)]
    return [first + wrapped[0], *(" " * NAME_WIDTH + line for line in wrapped[1:])]


def _default(value: object) -> str:
    if value is None or value is False:
        return ""
    return f" [{str(value).lower() if isinstance(value, bool) else value}]"
