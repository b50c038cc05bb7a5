"""`rlkit train`: train a language model on an environment's tasks with a policy gradient algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlkit.arguments.bounds import POSITIVE, check_number
from rlkit.arguments.command_line import check_keys
from rlkit.arguments.help import print_help
from rlkit.runs.launch import check_start, launch_or_prepare, split

SUMMARY = "Train a language model on an environment's tasks with reinforcement learning."


def main(argv: Sequence[str]) -> int:
    """Train a model, or print the plan of the run with `--dry_run`, and return the exit code."""
    if print_help("train", SUMMARY, argv):
        return 0
    options, argv = split(argv, dry_run=True)
    if "--dry_run" in options:
        check_keys("train", argv)
        return dry_run(options, argv)
    check_start("train", argv)  # fails within a second, before importing torch or launching processes
    launch_or_prepare("train", options, argv)
    from rlkit.arguments.parse import parse_train
    from rlkit.training.train import train

    train(parse_train(argv))
    return 0


def dry_run(options: Mapping[str, str], argv: Sequence[str]) -> int:
    """Print the plan of a run and return the exit code: 0 if it fits into device memory, else 1.

    Args:
        options: Options of the launcher (`rlkit.runs.launch.split`).
        argv: Command line without them.
    """
    memory = options.get("--memory")
    if memory is not None:
        check_number("--memory (in GiB)", memory, POSITIVE)
    from rlkit.arguments.parse import parse_train
    from rlkit.training.plan import plan

    memory_gib = None if memory is None else float(memory)
    return 0 if plan(parse_train(argv), options, memory_gib) else 1
