"""`rlkit sft`: teach a model the environment's own answers, as a baseline or as the start of a policy."""

from __future__ import annotations

from collections.abc import Sequence

from rlkit.arguments.help import print_help
from rlkit.runs.launch import check_start, launch_or_prepare, split

SUMMARY = "Teach a model an environment's answers or worked solutions."


def main(argv: Sequence[str]) -> int:
    """Fine-tune as the keys say and return the exit code."""
    if print_help("sft", SUMMARY, argv):
        return 0
    options, argv = split(argv)
    check_start("sft", argv)  # before torch and TRL are imported, and before any process is launched
    launch_or_prepare("sft", options, argv)
    from rlkit.arguments.parse import parse_sft
    from rlkit.training.sft import sft

    sft(parse_sft(argv))
    return 0
