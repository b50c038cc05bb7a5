"""`rlkit sft`: teach a model the environment's own answers, as a baseline or as the start of a policy."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.runs.launch import launch_or_prepare, split


def main(argv: Sequence[str]) -> int:
    """Fine-tune as the keys say and return the exit code."""
    options, argv = split(argv)
    launch_or_prepare("sft", options, argv)
    from rlkit.arguments.parse import parse_sft

    run = parse_sft(argv)  # a mistake in the keys is found before the trainer is imported
    from rlkit.training.sft import sft

    sft(run)
    return 0
