"""`rlkit sft`: fine-tune a model on an environment's answers, as a baseline or to initialize a policy."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.arguments.help import print_help
from rlkit.runs.launch import check_start, launch_or_prepare, split

SUMMARY = "Fine-tune a model on an environment's reference answers, worked solutions or both."


def main(argv: Sequence[str]) -> int:
    """Fine-tune a model and return the exit code."""
    if print_help("sft", SUMMARY, argv):
        return 0
    options, argv = split(argv)
    check_start("sft", argv)  # fails within a second, before importing torch or launching processes
    launch_or_prepare("sft", options, argv)
    from rlkit.arguments.parse import parse_sft
    from rlkit.training.sft import sft

    sft(parse_sft(argv))
    return 0
