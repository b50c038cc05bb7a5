"""`rlkit train`: improve a model on an environment's tasks with a policy optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlkit.errors import UserError
from rlkit.runs.launch import launch_or_prepare, split


def main(argv: Sequence[str]) -> int:
    """Train as the keys say, or with `--dry-run` say what a run would do; return the exit code."""
    options, argv = split(argv)
    if "--dry-run" in argv:
        return dry_run(options, [word for word in argv if word != "--dry-run"])
    launch_or_prepare("train", options, argv)
    from rlkit.arguments.parse import parse_train

    run = parse_train(argv)  # a mistake in the keys is found before the trainer is imported
    from rlkit.training.train import train

    train(run)
    return 0


def dry_run(options: Mapping[str, str], argv: Sequence[str]) -> int:
    """Print the plan of a run and return 0 if it fits into memory, else 1."""
    from rlkit.arguments.parse import parse_train

    run = parse_train(argv)
    try:
        memory = float(options["--memory"]) if "--memory" in options else None
    except ValueError as error:
        raise UserError(f"--memory is a number of GiB, not {options['--memory']!r}") from error
    from rlkit.training.plan import plan

    return 0 if plan(run, options, memory) else 1
