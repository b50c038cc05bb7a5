"""`--accelerate NAME`: start several processes with accelerate and a file in configs/accelerate.

It is equivalent to `accelerate launch --config_file configs/accelerate/NAME.yaml -m rlkit train ...`, except
that rlkit fills in the number of GPUs and, under `srun` on several machines, the rank and address of each.
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
from rlkit.runs.directory import CONFIG, OVERWRITING, RunDirectory

logger = logging.getLogger(__name__)

FOLDER = Path("configs") / "accelerate"
OPTIONS = ("--accelerate", "--num_processes", "--memory")
GRACE_SECONDS = 300  # to write a checkpoint after SIGTERM; torchrun's default kills processes after 30
FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # from torchrun to the workers
FIRST_PORT, NUM_PORTS = 20000, 20000  # for the rendezvous; the job id selects one


def split(argv: Sequence[str], *, dry_run: bool = False) -> tuple[dict[str, str], list[str]]:
    """Split a command line into the launcher's options, by name, and the remaining arguments.

    Args:
        argv: Command line after the command.
        dry_run: Whether the command supports `--dry_run` and `--memory`.

    Raises:
        UserError: An option lacks a value, requires another option, or is not supported by the command.
    """
    options: dict[str, str] = {}
    command_argv: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "--dry_run":
            if equals:
                raise UserError("--dry_run takes no value")
            options[name] = ""
        elif name in OPTIONS:
            options[name] = value or next(arguments, "")
            if not options[name] or options[name].startswith("--"):
                raise UserError(f"{name} needs a value")
        else:
            command_argv.append(argument)
    if "--num_processes" in options:
        check_number("--num_processes", options["--num_processes"], COUNT, is_integer=True)
        if "--accelerate" not in options:
            raise UserError("--num_processes requires --accelerate, e.g. --accelerate ddp --num_processes 4")
    if ("--memory" in options or "--dry_run" in options) and not dry_run:
        raise UserError("only `rlkit train` supports --dry_run and --memory")
    if "--memory" in options and "--dry_run" not in options:
        raise UserError("--memory requires --dry_run")
    if "--accelerate" in options:
        config_file(options["--accelerate"])
    return options, command_argv


def config_file(name: str) -> Path:
    """Return the path of an accelerate config.

    Args:
        name: File name in configs/accelerate without its extension, or the path of a YAML or JSON file.

    Raises:
        UserError: There is no such config; the message lists the available names.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        path = find_config(name)
        if not path.is_file():
            raise UserError(f"there is no file {name}")
        return path
    path = find_config(FOLDER / f"{name}.yaml")
    if not path.is_file():
        names = {path.stem for folder in (FOLDER, PACKAGE / FOLDER) for path in folder.glob("*.yaml")}
        raise UserError(f"there is no accelerate config {name!r} in {FOLDER}{nearest(name, names)}")
    return path


def machines(
    environment: Mapping[str, str], hostnames: Callable[[str], list[str]] | None = None
) -> dict[str, str]:
    """Return accelerate's options for the machines of an `srun` step; an empty dict on a single machine.

    Args:
        environment: Environment variables of the process.
        hostnames: Function that expands Slurm's node list, such as "gpu[3-4]", to host names. The default
            is `scontrol show hostnames`.

    Raises:
        UserError: The number of tasks differs from the number of machines, or a job on several machines was
            started without srun.
    """
    num_nodes = int(environment.get("SLURM_NNODES", "1"))
    if num_nodes == 1:
        return {}
    if "SLURM_STEP_NODELIST" not in environment:
        raise UserError(
            f"this Slurm job has {num_nodes} nodes: start the command with srun --ntasks-per-node 1"
        )
    num_nodes = int(environment["SLURM_STEP_NUM_NODES"])
    if num_nodes == 1:
        return {}
    num_tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if num_tasks != num_nodes:
        raise UserError(
            f"srun started {num_tasks} tasks on {num_nodes} nodes, but accelerate needs one task per node "
            "and starts the other processes itself: use --ntasks-per-node 1"
        )
    main_host = (hostnames or _hostnames)(environment["SLURM_STEP_NODELIST"])[0]
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS
    return {
        "--num_machines": str(num_nodes),
        "--machine_rank": environment["SLURM_NODEID"],
        "--main_process_ip": main_host,
        "--main_process_port": str(port),
    }


def _hostnames(nodelist: str) -> list[str]:
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def command_line(command: str, options: Mapping[str, str], argv: Sequence[str], num_gpus: int) -> list[str]:
    """Return the command line of accelerate's launcher.

    Args:
        command: Command to run, e.g. "train".
        options: Options of the launcher, as `split` returns them.
        argv: Arguments of the command.
        num_gpus: Number of GPUs of this machine. If it is 0, the config determines the number of processes.
    """
    path = config_file(options["--accelerate"])
    # A single process needs no launcher; accelerate's would not forward signals to it.
    if load_yaml(path).get("distributed_type") == "NO":
        return [sys.executable, "-m", "rlkit", command, *argv]
    values = {"--config_file": str(path)} | machines(os.environ)
    num_machines = int(values.get("--num_machines", "1"))
    if "--num_processes" in options:
        values["--num_processes"] = options["--num_processes"]
    elif num_gpus:
        values["--num_processes"] = str(num_gpus * num_machines)
    if num_machines == 1:
        values["--main_process_port"] = "0"  # any free port, since several runs may share a machine
    flags = [part for pair in values.items() for part in pair]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "rlkit", command, *argv]


def gpus() -> list[str]:
    """Return the GPUs that this process can use, in the notation of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[:count] if any(visible) else [str(i) for i in range(count)]


def use_one_gpu() -> None:
    """Hide all GPUs except the first, unless a launcher started this process.

    With several visible GPUs, transformers' Trainer would wrap the model in DataParallel. That multiplies the
    configured batch size and does not support the shared prompt of a group.
    """
    available = gpus()
    if len(available) > 1 and "LOCAL_RANK" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = available[0]
        logger.warning("using 1 of %s GPUs; use all with --accelerate ddp", len(available))


def check_start(command: str, argv: Sequence[str], overrides: Mapping[str, Any] | None = None) -> None:
    """Check the keys and the run directory within a second, before anything heavy is imported.

    Args:
        command: "train", "sft" or "rank".
        argv: Command line without the launcher's options.
        overrides: Keys with Python values; they override the command line.

    Raises:
        UserError: A key is missing or invalid, or the run directory cannot be used.
    """
    keys = check_keys(command, argv, overrides)
    # The main process may have created the run directory before the others get here.
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_NODEID")):
        return
    path = Path(str(keys["output_dir"]))
    resume = str(keys.get("resume")).lower() in TRUE
    overwrite = str(keys.get("overwrite")).lower() in TRUE
    if resume and not overwrite and not path.is_dir():
        runs = [str(run) for run in path.parent.glob("*") if (run / "config.yaml").is_file()]
        hint = nearest(str(path), runs)
        raise UserError(
            f"there is no run directory {path} to resume{hint}; remove --resume to start a new run"
        )
    directory = RunDirectory(path, command)
    directory.check(resume=resume, overwrite=overwrite)
    is_run = any((path / name).is_file() for name in (CONFIG, OVERWRITING))
    if resume and directory.is_used() and not is_run:
        # Otherwise a folder named by mistake would become a run, which a later --overwrite would delete.
        raise UserError(f"cannot resume {path}: it is not a run directory (it has no config.yaml)")


def launch_or_prepare(command: str, options: Mapping[str, str], argv: Sequence[str]) -> None:
    """Launch several processes if `--accelerate` is set, else prepare this process for training."""
    if "--accelerate" in options:
        launch(command, options, argv)
    use_one_gpu()
    children_ignore_signals()


def children_ignore_signals() -> None:
    """Make child processes that start from now on ignore SIGUSR1 and SIGUSR2.

    A scheduler sends them to all processes of a job, and their default action would kill reward workers.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)


def launch(command: str, options: Mapping[str, str], argv: Sequence[str]) -> NoReturn:
    """Replace this process with accelerate's launcher of `rlkit COMMAND` (exec)."""
    num_gpus = len(gpus())
    launcher_argv = command_line(command, options, argv, num_gpus)
    # torchrun reads its settings from PET_* variables.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", FORWARDED_SIGNALS)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    if num_gpus == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logger.debug("launching: %s", shlex.join(launcher_argv))
    sys.stdout.flush()
    os.execv(launcher_argv[0], launcher_argv)
