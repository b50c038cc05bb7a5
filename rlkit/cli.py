"""The command `rlkit`: find the sub-command, run it, and turn bad input into one line."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from rlkit.errors import GuardError, Preempted, RewardError, UserError, nearest
from rlkit.launch import launch, split

# name: (module, what --help says). Modules are imported when called: most need torch, some must not.
COMMANDS = {
    "train": ("rlkit.train", "improve a model on an environment's tasks (GRPO)"),
    "sft": ("rlkit.sft", "teach a model an environment's answers or worked solutions"),
    "rank": ("rlkit.rank", "train an encoder to rank documents (Plackett-Luce policy gradient)"),
    "sweep": ("rlkit.sweeps.command", "run a config with many keys: a grid, at random, by Optuna; on Slurm"),
    "eval": ("rlkit.eval", "answer held-out tasks with one model, or compare two"),
    "report": ("rlkit.report", "write the HTML page of one run, or of several side by side"),
    "export": ("rlkit.export", "write a run's model as plain safetensors, adapters merged"),
    "serve": ("rlkit.serve", "start a vLLM server for training"),
    "serve-search": ("envs.search.server", "serve a search index over HTTP"),
    "view": ("rlkit.view", "browse a run's rollouts in the terminal"),
    "envs": ("rlkit.envs", "list the environments and what they offer"),
    "check": ("rlkit.check", "validate an environment with no model"),
}
PREEMPTED = 75  # sysexits.h: try again later
IN_SEVERAL = (
    "train, sft and rank run in several processes with --accelerate NAME, a file of configs/accelerate."
)
IN_PROCESSES = ("train", "sft", "rank")  # commands that know --accelerate


def main() -> int:
    """Run the command line and return the exit code: 0 well, 1 failed, 2 bad input, 75 told to leave."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    return run_command(lambda: _call(name, rest))


def usage() -> str:
    """The text of `rlkit --help`."""
    lines = [f"  {name:14}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: rlkit COMMAND [options]", "", *lines, "", "rlkit COMMAND --help says more.", IN_SEVERAL]
    )


def _call(name: str, words: Sequence[str]) -> int:
    if name in IN_PROCESSES:
        options, words = split(words)
        if name == "train" and "--dry-run" in words:
            return _plan(options, words)
        if "--memory" in options or "--dry-run" in words:
            raise UserError("--memory goes with --dry-run, and that with rlkit train")
        if "--accelerate" in options:
            launch(COMMANDS[name][0], options, words)
    return _find(name)(words)


def _plan(options: dict[str, str], words: Sequence[str]) -> int:
    from rlkit.config import parse_train
    from rlkit.plan import plan

    words = [word for word in words if word != "--dry-run"]
    try:
        memory = float(options["--memory"]) if "--memory" in options else None
    except ValueError as error:
        raise UserError(f"--memory is a number of GiB, not {options['--memory']!r}") from error
    return 0 if plan(parse_train(words), options, memory) else 1


def _find(name: str) -> Callable[[Sequence[str]], int]:
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    return importlib.import_module(COMMANDS[name][0]).main


def run_command(command: Callable[[], int]) -> int:
    """Run a command; bad input is one line and exit code 2, a run that had to stop is exit code 1."""
    try:
        return command()
    except UserError as error:
        print(f"rlkit: {error}", file=sys.stderr)
        return 2
    except RewardError as error:
        print(
            f"rlkit: {error}\nThe checkpoints are kept: mend the reward and go on with --resume.",
            file=sys.stderr,
        )
        return 1
    except GuardError as error:
        print(f"rlkit: {error}\nThe checkpoints are kept: go on with --resume.", file=sys.stderr)
        return 1
    except Preempted as reason:
        if os.environ.get("RANK", "0") == "0":
            print(f"rlkit: {reason}; go on with --resume", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("rlkit: stopped; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    # A process that ends inside one is aborted, and its exit code lost. A trainer is full of cycles, and one
    # that is not collected keeps the group's threads alive.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
