"""`rlkit envs`: list the environments that come with rlkit, with their arguments and rewards."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rlkit.arguments.command_line import CommandParser
from rlkit.errors import first_line
from rlkit.registry import ENVIRONMENTS, load_environment


def main(argv: Sequence[str]) -> int:
    """Print each environment with its arguments, rewards and weights."""
    parser = CommandParser(
        prog="rlkit envs",
        description="List the environments that come with rlkit. Name your own as package.module:Class or "
        "path/file.py:Class.",
    )
    parser.parse_args(argv)
    for name in ENVIRONMENTS:
        print(describe(name))
    return 0


def describe(name: str) -> str:
    """Return a description of one environment in a few lines: arguments, rewards with weights, and metric."""
    environment = load_environment(name)
    summary = first_line(inspect.getdoc(type(environment)) or "")
    parameters = inspect.signature(type(environment)).parameters.values()
    arguments = ", ".join(f"{p.name}={p.default!r}" for p in parameters)
    weights = environment.reward_weights
    rewards = ", ".join(f"{r} ({weights[r]:g})" if r in weights else r for r in environment.rewards)
    return (
        f"{name}: {summary}\n  arguments: {arguments}\n  rewards (weight): {rewards}\n"
        f"  metric: {environment.metric}"
    )
