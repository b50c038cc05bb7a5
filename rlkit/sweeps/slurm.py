"""Points of a sweep as a Slurm job array, by submitit: one job a point, started by srun once on each node."""

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
from rlkit.sweeps.point import Point, start_name
from rlkit.sweeps.spec import Sweep

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

JOBS = "jobs.json"
OWN = ("grace", "container", "setup")  # keys of `slurm` that are not sbatch's
GRACE_SECONDS = 120
MINUTES = 24 * 60
NODES_WAIT = 3600.0  # seconds for the first node to choose the point's keys
LOOK_SECONDS = 1.0


class Job:
    """What a job of the array does; submitit pickles it."""

    def __init__(self, sweep: Sweep, number: int):
        self.sweep = sweep
        self.number = number

    def __call__(self) -> None:
        """Work on the point. A thread does, so that a signal can be answered in the meantime."""
        self._point = point = Point(self.sweep, self.number)
        work = point.work if os.environ.get("SLURM_NODEID", "0") == "0" else self._help
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit when the job must leave: it is queued again and goes on."""
        from submitit.helpers import DelayedSubmission

        self._point.leave()
        return DelayedSubmission(Job(self.sweep, self.number))

    def _help(self) -> None:
        """On another node than the first: start what that starts."""
        point = self._point
        for seed in self.sweep.seeds:
            deadline = time.monotonic() + NODES_WAIT
            while (line := self._started(seed)) is None:
                if point.finished(seed) or point.outcome() is not None:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError("the first node began no run")
                time.sleep(LOOK_SECONDS)
            else:
                with (point.folder / f"seed-{seed}.node-{os.environ['SLURM_NODEID']}.log").open("ab") as log:
                    subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False)

    def _started(self, seed: int) -> list[str] | None:
        path = self._point.start_file(seed)
        found = json.loads(path.read_text()) if path.exists() else {}
        return found["command"] if found.get("start") == start_name() else None


def submit(sweep: Sweep, points: Sequence[Point]) -> tuple[str, list[Point]]:
    """Submit the points that are not in the queue, and return the array's job id and these points.

    Raises:
        UserError: there is no Slurm, no such partition, or an option that sbatch refuses.
    """
    check(sweep.slurm)
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    queued = in_queue(sweep)
    points = [point for point in points if queued.get(point.number) is None]
    if not points:
        return "", []
    executor = SlurmExecutor(folder=sweep.folder / "slurm")
    executor.update_parameters(**parameters(sweep))
    try:
        with executor.batch():
            jobs = [executor.submit(Job(sweep, point.number)) for point in points]
        ids = [job.job_id for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError) as error:
        raise UserError(f"Slurm refused the sweep: {_last_line(str(error))}") from error
    known = jobs_of(sweep) | {str(point.number): job for point, job in zip(points, ids, strict=True)}
    atomic_write(sweep.folder / JOBS, json.dumps(known))
    return ids[0].split("_")[0], points


def check(options: Mapping[str, Any]) -> None:
    """Raise UserError where there is no Slurm that answers, or no such partition."""
    if shutil.which("sbatch") is None:
        raise UserError("there is no Slurm here (no sbatch): use --launcher local, or go to a login node")
    found = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise UserError(f"Slurm does not answer: {_last_line(found.stderr)}")
    partitions = sorted(set(found.stdout.split()))
    wanted = options.get("partition")
    for name in str(wanted).split(",") if wanted else ():
        if name not in partitions:
            raise UserError(f"there is no partition {name!r}{nearest(name, partitions)}")


def parameters(sweep: Sweep) -> dict[str, Any]:
    """What submitit is told."""
    options = dict(sweep.slurm)
    container, setup = options.pop("container", None), options.pop("setup", None)
    found: dict[str, Any] = {
        "job_name": sweep.folder.name,
        "time": int(options.pop("time", MINUTES)),
        "nodes": int(options.pop("nodes", 1)),
        "ntasks_per_node": 1,  # accelerate starts the processes of a node
        "signal_delay_s": int(options.pop("grace", GRACE_SECONDS)),
        "array_parallelism": sweep.parallel,
        "stderr_to_stdout": True,
    }
    if setup:
        found["setup"] = [setup] if isinstance(setup, str) else list(setup)
    if container:
        found["srun_args"] = [f"--container-image={container}", f"--container-mounts={os.getcwd()}"]
    direct = ("partition", "account", "qos", "gpus_per_node", "cpus_per_task", "mem", "constraint", "exclude")
    found |= {key: options.pop(key) for key in direct if key in options}
    if options:
        found["additional_parameters"] = {key.replace("_", "-"): value for key, value in options.items()}
    return found


def jobs_of(sweep: Sweep) -> dict[str, str]:
    """The job of each point that was submitted."""
    path = sweep.folder / JOBS
    return json.loads(path.read_text()) if path.exists() else {}


def in_queue(sweep: Sweep) -> dict[int, str]:
    """The state of each point whose job waits or runs."""
    jobs = {job: int(number) for number, job in jobs_of(sweep).items()}
    if not jobs:
        return {}
    command = ["squeue", "-h", "-r", "-o", "%i %T", "--me"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    states = dict(line.split() for line in lines)
    arrays = {f"{job}": state for job, state in states.items()}
    return {number: arrays[job] for job, number in jobs.items() if job in arrays}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [text])[-1].removeprefix("sbatch: error: ")
