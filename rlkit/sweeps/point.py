"""One point of a sweep, from its first run to its outcome; a later worker resumes what an earlier one left.

A point is trained once for each seed. Its state is on disk alone: run directories, logs, `outcome.json`.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import Trial, TrialState

from rlkit.errors import PREEMPTED, UserError
from rlkit.evaluation.result import Evaluation
from rlkit.files import atomic_write
from rlkit.sweeps.spec import FAILED, FINISHED, PRUNED, Sweep, no_such_objective
from rlkit.sweeps.study import open_study, running_trial, start_trial, suggest

POLL_SECONDS = 1.0
# A preempted run logs this (`rlkit.runs.preemption`). The exit code is not enough: torchrun's is always 1.
PREEMPTED_ERROR = "rlkit: stopped by SIG"
RANK = re.compile(r"^\[rank\d+\]: ")
ERROR = re.compile(r"^(rlkit: .*|[\w.]*(Error|Exception|Killed|Interrupt)\b.*)")


@dataclass
class Outcome:
    """Final result of a point, saved as `outcome.json`.

    Attributes:
        state: `finished`, `failed` or `pruned`.
        value: Objective, as the mean over the seeds.
        values: Objective by seed.
        error: Error message of a failed point.
    """

    state: str
    value: float | None = None
    values: Mapping[str, float] | None = None
    error: str | None = None


class Point:
    """One point of a sweep: a choice of keys and a run for each seed.

    Args:
        sweep: Sweep that the point belongs to.
        number: Number of the point, from 0.
    """

    def __init__(self, sweep: Sweep, number: int):
        self.sweep = sweep
        self.number = number
        self.folder = sweep.folder / "points" / f"{number:04d}"
        self._process: subprocess.Popen[bytes] | None = None
        self._preempted = threading.Event()
        self._log_start = 0  # offset of the current run in its log, in bytes: a resumed run appends to it

    def outcome(self) -> Outcome | None:
        """Return how the point ended, or None if it has not."""
        path = self.folder / "outcome.json"
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def keys(self) -> dict[str, Any] | None:
        """Return the keys of the point, or None if no worker has started it."""
        path = self.folder / "point.json"
        return json.loads(path.read_text())["keys"] if path.exists() else None

    def run_dir(self, seed: int) -> Path:
        """Return the run directory of a seed."""
        return self.folder / f"seed-{seed}"

    def value(self, seed: int, name: str = "after") -> float | None:
        """Return the objective of a seed in one evaluation, or None if there is no such evaluation.

        Args:
            seed: Seed of the run.
            name: `before`, `after` or `step-<n>`.
        """
        path = self.run_dir(seed) / "evaluation" / f"{name}.json"
        if not path.exists():
            return None
        evaluation = Evaluation.load(path)
        objective = self.sweep.objective
        if objective is None or objective == evaluation.metric:
            return evaluation.accuracy.mean
        if objective not in evaluation.rewards:
            raise UserError(f"{path}: {no_such_objective(objective, evaluation.metric, evaluation.rewards)}")
        return evaluation.rewards[objective]

    def is_finished(self, seed: int) -> bool:
        """Return whether the run of a seed is complete, report included."""
        return all((self.run_dir(seed) / name).exists() for name in ("evaluation/after.json", "report.html"))

    def work(self) -> Outcome | None:
        """Train the seeds that are not finished and record the outcome; None if preempted before that."""
        previous = self.outcome()
        # Seeds may be added to a sweep: its finished points are then incomplete again.
        complete = all(map(self.is_finished, self.sweep.seeds))
        if previous is not None and (previous.state != FINISHED or complete):
            return previous
        trial = self.open_trial(previous)
        for seed in self.sweep.seeds:
            if self.is_finished(seed):
                continue
            code, pruned = self._run(seed, trial if seed == self.sweep.seeds[0] else None)
            if pruned:
                return self.record(trial, Outcome(PRUNED, value=self.latest_value(seed)))
            if self._preempted.is_set():
                return None
            if code != 0 or not self.is_finished(seed):
                log = self._log(seed).read_bytes()[self._log_start :].decode(errors="replace")
                error = last_error(log, code)
                if code == PREEMPTED or error.startswith(PREEMPTED_ERROR):
                    return None
                return self.record(trial, Outcome(FAILED, error=error))
        values: dict[str, float] = {}
        for seed in self.sweep.seeds:
            value = self.value(seed)
            if value is None or math.isnan(value):
                return self.record(trial, Outcome(FAILED, error=f"seed {seed}: no held-out result"))
            values[str(seed)] = float(value)
        return self.record(trial, Outcome(FINISHED, sum(values.values()) / len(values), values))

    def preempt(self) -> None:
        """Stop the current run with a checkpoint and wait for it to exit; a later worker resumes it."""
        self._preempted.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            process.wait()

    def reset(self) -> None:
        """Delete the outcome of a failed point: it is retried with the same keys, from its checkpoints."""
        (self.folder / "outcome.json").unlink()

    def open_trial(self, previous: Outcome | None) -> Trial | None:
        """Return the running trial of the point, or start one.

        Args:
            previous: Outcome from before seeds were added to the sweep. Optuna cannot change the value of a
                completed trial, so the result is then None.
        """
        study = open_study(self.sweep, self.number)
        if previous is not None:
            return None
        keys = self.keys()
        if keys is not None and (trial := running_trial(study, self.number)) is not None:
            return trial
        if keys is None and self.sweep.search == "grid":
            keys = list(self.sweep.grid())[self.number]
        trial = start_trial(study, self.sweep, self.number, keys)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "point.json", json.dumps({"keys": suggest(self.sweep, trial)}))
        return trial

    def record(self, trial: Trial | None, outcome: Outcome) -> Outcome:
        """Report the outcome to Optuna, save it and return it."""
        if trial is not None:
            states = {FAILED: TrialState.FAIL, PRUNED: TrialState.PRUNED, FINISHED: None}
            value = outcome.value if outcome.state == FINISHED else None
            open_study(self.sweep).tell(trial.number, value, state=states[outcome.state])
        atomic_write(self.folder / "outcome.json", json.dumps(vars(outcome)))
        return outcome

    def command(self, seed: int) -> list[str]:
        """Return the command line of a seed's run; it resumes a run that exists."""
        sweep, run_dir = self.sweep, self.run_dir(seed)
        argv = [*sweep.to_argv(self.keys() or {}), f"--seed={seed}", f"--output_dir={run_dir}"]
        if (run_dir / "config.yaml").exists():
            argv += ["--resume"]
        if sweep.accelerate:
            argv += ["--accelerate", sweep.accelerate]
        if sweep.num_processes:
            argv += ["--num_processes", str(sweep.num_processes)]
        return [sys.executable, "-m", "rlkit", sweep.command, sweep.base, *argv]

    def start_file(self, seed: int) -> Path:
        """Return the path of a file with the last command that was started for a seed, and its start id."""
        return self.folder / f"seed-{seed}.start.json"

    def _log(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.log"

    def _run(self, seed: int, trial: Trial | None) -> tuple[int, bool]:
        """Run the command of a seed; return its exit code and whether the point was pruned."""
        if self._preempted.is_set():
            return 0, False
        pruned = False
        prunable = None if not self.sweep.pruning else trial
        reported_steps: set[int] = set()
        command = self.command(seed)
        # The other nodes of a Slurm job read this file and start the same command (`rlkit.sweeps.slurm`).
        atomic_write(self.start_file(seed), json.dumps({"start": start_id(), "command": command}))
        with self._log(seed).open("ab") as log:
            self._log_start = log.tell()
            self._process = process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                # Ctrl-C must reach the sweep alone: the sweep then lets the run write a checkpoint.
                start_new_session=True,
            )
            while (code := _poll(process)) is None:
                if prunable is None or pruned:
                    continue
                if self._should_prune(seed, prunable, reported_steps):
                    pruned = True
                    process.terminate()
        if prunable is not None and not pruned:
            # Report what the run wrote after the last poll: later points are compared with it.
            self._should_prune(seed, prunable, reported_steps)
        return code, pruned

    def _should_prune(self, seed: int, trial: Trial, reported_steps: set[int]) -> bool:
        """Report new held-out results to Optuna; return whether one of them is below the median."""
        for step in self._evaluated_steps(seed):
            value = None if step in reported_steps else self.value(seed, f"step-{step}")
            if value is not None and not math.isnan(value):
                reported_steps.add(step)
                trial.report(value, step)
                if trial.should_prune():  # considers the last reported step only, so ask after each one
                    return True
        return False

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "RLKIT_SWEEP_POINT": str(self.number)}

    def _evaluated_steps(self, seed: int) -> list[int]:
        paths = (self.run_dir(seed) / "evaluation").glob("step-*.json")
        return sorted(int(path.stem.split("-")[1]) for path in paths)

    def latest_value(self, seed: int) -> float | None:
        """Return the objective of a seed in the last evaluation during training, or None."""
        steps = self._evaluated_steps(seed)
        return self.value(seed, f"step-{steps[-1]}") if steps else None


def objective_name(points: Sequence[Point]) -> str:
    """Return the name of the value that is compared: the objective, or the metric of the evaluations."""
    for point in points:
        if point.sweep.objective is not None:
            return point.sweep.objective
        for path in point.folder.glob("seed-*/evaluation/*.json"):
            return Evaluation.load(path).metric
    return "held out"  # no run has been evaluated yet


def start_id() -> str:
    """Return an id of this start of this Slurm job; it changes when the job is requeued."""
    return ".".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))


def _poll(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def last_error(log: str, code: int) -> str:
    """Return the line of a log that best explains why a run failed: its last error, else its last line."""
    lines = [RANK.sub("", line).strip() for line in log.splitlines() if line.strip()]
    # torchrun appends a ChildFailedError, which hides the worker's own error.
    errors = [line for line in lines if ERROR.match(line) and "ChildFailedError" not in line]
    if not errors and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (errors or lines or [f"exit code {code}"])[-1][:300]
