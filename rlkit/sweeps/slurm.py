"""Points of a sweep as a Slurm job array: submitit submits one job per point, srun starts it on each node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError, nearest
from rlkit.files import atomic_write
from rlkit.sweeps.point import Point, start_id
from rlkit.sweeps.spec import Sweep

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

JOBS = "jobs.json"
GRACE_SECONDS = 120
TIME_MINUTES = 24 * 60
FIRST_NODE_TIMEOUT_SECONDS = 3600.0  # the first node has to import torch and choose the point's keys
POLL_SECONDS = 1.0
SUBMITIT_OPTIONS = (
    "partition",
    "account",
    "qos",
    "gpus_per_node",
    "cpus_per_task",
    "mem",
    "constraint",
    "exclude",
)


class Job:
    """Function that a job of the array calls on each of its nodes; submitit pickles it."""

    def __init__(self, sweep: Sweep, number: int):
        self.sweep = sweep
        self.number = number

    def __call__(self) -> None:
        """Work on the point, in a thread: the main thread has to stay free for signal handlers."""
        self._point = point = Point(self.sweep, self.number)
        is_first_node = os.environ.get("SLURM_NODEID", "0") == "0"
        thread = threading.Thread(target=point.work if is_first_node else self._follow, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)

    def checkpoint(self) -> DelayedSubmission:
        """Preempt the run and return the job to requeue.

        submitit calls this when Slurm signals that the time is up or that the job is preempted.
        """
        from submitit.helpers import DelayedSubmission

        self._point.preempt()
        return DelayedSubmission(Job(self.sweep, self.number))

    def _follow(self) -> None:
        """On a node other than the first: run each command that the first node starts."""
        point = self._point
        for seed in self.sweep.seeds:
            command = self._wait_for_command(seed)
            if command is not None:
                log_file = point.folder / f"seed-{seed}.node-{os.environ['SLURM_NODEID']}.log"
                with log_file.open("ab") as log:
                    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)

    def _wait_for_command(self, seed: int) -> list[str] | None:
        """Return the command that the first node has started for a seed, or None if it need not run."""
        deadline = time.monotonic() + FIRST_NODE_TIMEOUT_SECONDS
        while (command := self._started_command(seed)) is None:
            if self._point.is_finished(seed) or self._point.outcome() is not None:
                return None
            if time.monotonic() > deadline:
                raise TimeoutError(f"the first node started no run within {FIRST_NODE_TIMEOUT_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        return command

    def _started_command(self, seed: int) -> list[str] | None:
        path = self._point.start_file(seed)
        started = json.loads(path.read_text()) if path.exists() else {}
        # A file from before the job was requeued must not start anything.
        return started["command"] if started.get("start") == start_id() else None


def submit(sweep: Sweep, points: Sequence[Point]) -> tuple[str, list[Point]]:
    """Submit the points that are not in the queue; return the id of the job array and these points.

    Raises:
        UserError: If Slurm is not available, has no such partition, or rejects an option.
    """
    check(sweep.slurm)
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    queued = in_queue(sweep)
    points = [point for point in points if queued.get(point.number) is None]
    if not points:
        return "", []
    executor = SlurmExecutor(folder=sweep.folder / "slurm")
    executor.update_parameters(**submitit_parameters(sweep))
    try:
        with executor.batch():
            jobs = [executor.submit(Job(sweep, point.number)) for point in points]
        job_ids = [job.job_id for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise UserError(f"Slurm rejected the sweep: {_last_line(str(error))}") from error
    jobs_by_point = jobs_of(sweep)
    for point, job_id in zip(points, job_ids, strict=True):
        jobs_by_point[str(point.number)] = job_id
    atomic_write(sweep.folder / JOBS, json.dumps(jobs_by_point))
    return job_ids[0].split("_")[0], points


def check(options: Mapping[str, Any]) -> None:
    """Raise UserError if Slurm is not installed, does not respond, or has no such partition."""
    if shutil.which("sbatch") is None:
        raise UserError("Slurm is not installed here (no sbatch): use --launcher local, or a login node")
    sinfo = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False)
    if sinfo.returncode != 0:
        raise UserError(f"Slurm does not respond: {_last_line(sinfo.stderr)}")
    available = sorted(set(sinfo.stdout.split()))
    partition = options.get("partition")
    requested = str(partition).split(",") if partition else []
    for name in requested:
        if name not in available:
            raise UserError(f"unknown Slurm partition {name!r}{nearest(name, available)}")


def submitit_parameters(sweep: Sweep) -> dict[str, Any]:
    """Return the parameters of submitit's executor; it passes unknown ones on to sbatch."""
    options = dict(sweep.slurm)
    container, setup = options.pop("container", None), options.pop("setup", None)
    parameters: dict[str, Any] = {
        "job_name": sweep.folder.name,
        "time": int(options.pop("time", TIME_MINUTES)),
        "nodes": int(options.pop("nodes", 1)),
        "ntasks_per_node": 1,  # accelerate starts the processes of a node
        "signal_delay_s": int(options.pop("grace", GRACE_SECONDS)),
        "array_parallelism": sweep.parallel,
        "stderr_to_stdout": True,
    }
    if setup:
        parameters["setup"] = [setup] if isinstance(setup, str) else list(setup)
    if container:
        mounts = f"--container-mounts={os.getcwd()}"
        parameters["srun_args"] = [f"--container-image={container}", mounts]
    parameters |= {key: options.pop(key) for key in SUBMITIT_OPTIONS if key in options}
    if options:
        parameters["additional_parameters"] = {key.replace("_", "-"): value for key, value in options.items()}
    return parameters


def jobs_of(sweep: Sweep) -> dict[str, str]:
    """Return the last submitted job id of each point, by the point's number."""
    path = sweep.folder / JOBS
    return json.loads(path.read_text()) if path.exists() else {}


def in_queue(sweep: Sweep) -> dict[int, str]:
    """Return the Slurm state of each point whose job is pending or running."""
    point_of_job = {job: int(number) for number, job in jobs_of(sweep).items()}
    if not point_of_job:
        return {}
    command = ["squeue", "-h", "-r", "-o", "%i %T", "--me"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    states = dict(line.split() for line in lines)
    return {number: states[job] for job, number in point_of_job.items() if job in states}


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines or [output])[-1].removeprefix("sbatch: error: ")
