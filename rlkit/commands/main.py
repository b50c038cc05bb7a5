"""The command `rlkit`: find the sub-command and run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from rlkit.commands.run import run_command
from rlkit.errors import UserError, nearest

# Name of a sub-command and what --help says. Its module is imported when it is called: most need torch, some
# must not.
COMMANDS = {
    "train": "improve a model on an environment's tasks (GRPO)",
    "sft": "teach a model an environment's answers or worked solutions",
    "rank": "train an encoder to rank documents (Plackett-Luce policy gradient)",
    "sweep": "run a config with many keys: a grid, at random, by Optuna; on Slurm",
    "eval": "answer held-out tasks with one model, or compare two",
    "report": "write the HTML page of one run, or of several side by side",
    "export": "write a run's model as plain safetensors, adapters merged",
    "index": "build the index of a corpus for searching",
    "serve": "start a vLLM server for training",
    "serve-search": "serve a search index over HTTP",
    "view": "browse a run's rollouts in the terminal",
    "envs": "list the environments and what they offer",
    "check": "validate an environment with no model",
}
IN_SEVERAL = (
    "train, sft and rank run in several processes with --accelerate NAME, a file of configs/accelerate."
)


def main() -> int:
    """Run the command line and return the exit code (`rlkit.commands.run`)."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = argv
    return run_command(lambda: find(name)(rest))


def usage() -> str:
    """Return the text of `rlkit --help`."""
    lines = [f"  {name:14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: rlkit COMMAND [options]", "", *lines, "", "rlkit COMMAND --help says more.", IN_SEVERAL]
    )


def find(name: str) -> Callable[[Sequence[str]], int]:
    """Return the function of a sub-command; raises UserError for an unknown one."""
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    return importlib.import_module(f"rlkit.commands.{name.replace('-', '_')}").main
