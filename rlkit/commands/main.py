"""The command `rlkit`: find the sub-command and run it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from rlkit.commands.run import run_command
from rlkit.errors import UserError, nearest

# Sub-commands with their lines in `rlkit --help`. The module of a sub-command is imported only when it runs,
# because most need torch and some must work without it.
COMMANDS = {
    "train": "train a language model with GRPO and its variants",
    "sft": "fine-tune on reference answers, worked solutions or both",
    "rank": "train an encoder to rank documents",
    "sweep": "search hyperparameters: grid, random or Optuna; locally or on Slurm",
    "eval": "evaluate a model or a retriever, or compare results",
    "report": "write the HTML report of one or more runs",
    "export": "save a run's model as safetensors, with adapters merged",
    "index": "build a search index of a corpus",
    "serve": "start a vLLM server for training and evaluation",
    "serve-search": "serve a search index over HTTP",
    "view": "browse a run's rollouts in the terminal",
    "envs": "list the environments that come with rlkit",
    "check": "validate an environment without a model",
}
RESUMABLE = ("train", "sft", "rank")  # with --resume
FOOTER = """\
`rlkit COMMAND --help` describes a command. train, sft and rank start several
processes with --accelerate NAME, a file in configs/accelerate.

exit codes: 0 success, 1 failure, 2 usage error, 75 preempted"""


def main() -> int:
    """Run the sub-command in `sys.argv` and return its exit code (`rlkit.commands.run`)."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *arguments = argv
    return run_command(lambda: load_command(name)(arguments), can_resume=name in RESUMABLE)


def usage() -> str:
    """Return the output of `rlkit --help`."""
    lines = [f"  {name:14}{description}" for name, description in COMMANDS.items()]
    return "\n".join(["usage: rlkit COMMAND [options]", "", "commands:", *lines, "", FOOTER])


def load_command(name: str) -> Callable[[Sequence[str]], int]:
    """Import a sub-command and return its `main`; raises UserError if there is no such command."""
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    return importlib.import_module(f"rlkit.commands.{name.replace('-', '_')}").main
