"""`--accelerate NAME`: several processes, started by accelerate with a file of configs/accelerate.

The same as `accelerate launch --config_file configs/accelerate/NAME.yaml -m rlkit train ...`, where rlkit
fills in how many GPUs there are and, under `srun` on several machines, who is who.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlkit.arguments.bounds import COUNT, TRUE, check_number
from rlkit.arguments.command_line import check_keys
from rlkit.errors import UserError, nearest
from rlkit.registry import PACKAGE, find_config, load_yaml
from rlkit.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

FOLDER = Path("configs") / "accelerate"
OPTIONS = ("--accelerate", "--num_processes", "--memory")
GRACE_SECONDS = 300  # for processes to write a checkpoint after SIGTERM; torchrun would kill them after 30
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # by torchrun, to the processes that train
FIRST_PORT, PORTS = 20000, 20000


def split(argv: Sequence[str], *, dry_run: bool = False) -> tuple[dict[str, str], list[str]]:
    """Return the launcher's options, by name, and the command's own arguments.

    Args:
        argv: the command line after the command.
        dry_run: whether the command has the options `--dry_run` and `--memory`.

    Raises:
        UserError: an option has no value, goes with another, or is not of this command.
    """
    options: dict[str, str] = {}
    others: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name == "--dry_run":
            if equals:
                raise UserError("--dry_run takes no value")
            options[name] = ""
        elif name in OPTIONS:
            options[name] = value or next(remaining, "")
            if not options[name] or options[name].startswith("--"):
                raise UserError(f"{name} needs a value")
        else:
            others.append(argument)
    if "--num_processes" in options:
        check_number("--num_processes", options["--num_processes"], COUNT, whole=True)
        if "--accelerate" not in options:
            raise UserError("--num_processes needs --accelerate, e.g. --accelerate ddp --num_processes 4")
    if ("--memory" in options or "--dry_run" in options) and not dry_run:
        raise UserError("only `rlkit train` has --dry_run and --memory")
    if "--memory" in options and "--dry_run" not in options:
        raise UserError("--memory needs --dry_run")
    if "--accelerate" in options:
        config_file(options["--accelerate"])
    return options, others


def config_file(name: str) -> Path:
    """The accelerate config of a name or path; raises UserError with the names there are."""
    if name.endswith((".yaml", ".yml", ".json")):
        path = find_config(name)
        if not path.is_file():
            raise UserError(f"there is no file {name}")
        return path
    path = find_config(FOLDER / f"{name}.yaml")
    if not path.is_file():
        known = {path.stem for folder in (FOLDER, PACKAGE / FOLDER) for path in folder.glob("*.yaml")}
        raise UserError(f"there is no accelerate config {name!r} in {FOLDER}{nearest(name, known)}")
    return path


def machines(
    environment: Mapping[str, str], hostnames: Callable[[str], list[str]] | None = None
) -> dict[str, str]:
    """accelerate's options for the machines of an `srun` step; none on one machine.

    Args:
        environment: the process's variables.
        hostnames: turns Slurm's short list of nodes into names; default: `scontrol show hostnames`.

    Raises:
        UserError: more tasks than machines, or a job of several machines that was started without srun.
    """
    nodes = int(environment.get("SLURM_NNODES", "1"))
    if nodes == 1:
        return {}
    if "SLURM_STEP_NODELIST" not in environment:
        raise UserError(f"this job has {nodes} machines: start the command by srun --ntasks-per-node 1")
    nodes = int(environment["SLURM_STEP_NUM_NODES"])
    if nodes == 1:
        return {}
    if int(environment["SLURM_STEP_NUM_TASKS"]) != nodes:
        raise UserError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks on {nodes} machines, but accelerate "
            "starts the processes of a machine: use --ntasks-per-node 1"
        )
    first = (hostnames or _hostnames)(environment["SLURM_STEP_NODELIST"])[0]
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS
    return {
        "--num_machines": str(nodes),
        "--machine_rank": environment["SLURM_NODEID"],
        "--main_process_ip": first,
        "--main_process_port": str(port),
    }


def _hostnames(nodelist: str) -> list[str]:
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def command_line(command: str, options: Mapping[str, str], words: Sequence[str], count: int) -> list[str]:
    """The command line of accelerate.

    Args:
        command: what to run, e.g. "train".
        options: as `split` returns them.
        count: of the GPUs of this machine; without any the file says how many processes there are.
    """
    path = config_file(options["--accelerate"])
    if load_yaml(path).get("distributed_type") == "NO":  # accelerate's launcher passes no signals on
        return [sys.executable, "-m", "rlkit", command, *words]
    given = {"--config_file": str(path)} | machines(os.environ)
    here = int(given.get("--num_machines", "1"))
    if "--num_processes" in options:
        given["--num_processes"] = options["--num_processes"]
    elif count:
        given["--num_processes"] = str(count * here)
    if here == 1:
        given["--main_process_port"] = "0"  # any that is free: several runs may share a machine
    flags = [part for pair in given.items() for part in pair]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "rlkit", command, *words]


def gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named[:count] if any(named) else [str(i) for i in range(count)]


def use_one_gpu() -> None:
    """Hide all GPUs but the first from a process that no launcher started.

    transformers' Trainer would spread its batches over them by DataParallel, which knows nothing of a group's
    shared prompt, and a batch would be that many times as large as its keys say.
    """
    found = gpus()
    if len(found) > 1 and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = found[0]
        logger.warning("this run uses one of %s GPUs; --accelerate ddp uses all", len(found))


def check_start(command: str, argv: Sequence[str], overrides: Mapping[str, Any] | None = None) -> None:
    """Raise UserError, within a second, for what can be known to be wrong before anything is imported."""
    keys = check_keys(command, argv, overrides)
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_NODEID")):
        return  # the main process of the first machine may have created the directory meanwhile
    path = Path(str(keys["output_dir"]))
    resume, overwrite = (str(keys.get(key)).lower() in TRUE for key in ("resume", "overwrite"))
    if resume and not overwrite and not path.is_dir():
        runs = [str(run) for run in path.parent.glob("*") if (run / "config.yaml").is_file()]
        raise UserError(
            f"there is no run directory {path} to resume{nearest(str(path), runs)}: start it without --resume"
        )
    directory = RunDirectory(path, command)
    directory.check(resume=resume, overwrite=overwrite)
    if resume and directory.is_used() and not (path / "config.yaml").is_file():
        # A mistyped path must not become a run, which the next --overwrite would delete.
        raise UserError(f"{path} is not a run directory (it has no config.yaml): it is not resumed")


def launch_or_prepare(command: str, options: Mapping[str, str], words: Sequence[str]) -> None:
    """Launch several processes if `--accelerate` is given, else make this process ready to train."""
    if "--accelerate" in options:
        launch(command, options, words)
    use_one_gpu()
    children_ignore_signals()


def children_ignore_signals() -> None:
    """Let processes that are started from now on ignore the user signals: a scheduler sends them to all."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


def launch(command: str, options: Mapping[str, str], words: Sequence[str]) -> NoReturn:
    """Replace this process with accelerate's launcher of `rlkit COMMAND` (exec)."""
    count = len(gpus())
    line = command_line(command, options, words, count)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", PASSED_ON)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    if count == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logger.debug("launching: %s", shlex.join(line))
    sys.stdout.flush()
    os.execv(line[0], line)
