"""One point of a sweep, from its first run to its outcome; a later worker goes on where one stopped."""

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
from rlkit.sweeps.study import begin, open_study, suggest, trial_of

LOOK_SECONDS = 1.0
TOLD_TO_LEAVE = "rlkit: stopped by SIG"
RANK = re.compile(r"^\[rank\d+\]: ")
ERROR = re.compile(r"^(rlkit: .*|[\w.]*(Error|Exception|Killed|Interrupt)\b.*)")


@dataclass
class Outcome:
    """What became of a point."""

    state: str
    value: float | None = None  # mean of the seeds
    values: Mapping[str, float] | None = None  # by seed
    error: str | None = None


class Point:
    """A point's folder.

    Args:
        sweep: the sweep.
        number: of the point, from 0.
    """

    def __init__(self, sweep: Sweep, number: int):
        self.sweep = sweep
        self.number = number
        self.folder = sweep.folder / "points" / f"{number:04d}"
        self._process: subprocess.Popen[bytes] | None = None
        self._leave = threading.Event()
        self._begun = 0  # where the log of this start begins

    def outcome(self) -> Outcome | None:
        """How it ended; None: it has not."""
        path = self.folder / "outcome.json"
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def keys(self) -> dict[str, Any] | None:
        """Its keys; None: nobody has begun with it."""
        path = self.folder / "point.json"
        return json.loads(path.read_text())["keys"] if path.exists() else None

    def run_dir(self, seed: int) -> Path:
        """The run directory of a seed."""
        return self.folder / f"seed-{seed}"

    def value(self, seed: int, name: str = "after") -> float | None:
        """What a seed reached in an evaluation by the sweep's objective; None: it was not made."""
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

    def finished(self, seed: int) -> bool:
        """Whether the run of a seed is complete."""
        return all((self.run_dir(seed) / name).exists() for name in ("evaluation/after.json", "report.html"))

    def work(self) -> Outcome | None:
        """Make the runs that are left, and record the outcome; None: it was told to leave before that."""
        done = self.outcome()
        if done is not None and (done.state != FINISHED or all(map(self.finished, self.sweep.seeds))):
            return done
        trial = self._begin(done)
        for seed in self.sweep.seeds:
            if self.finished(seed):
                continue
            code, pruned = self._run(seed, trial if seed == self.sweep.seeds[0] else None)
            if pruned:
                return self._end(trial, Outcome(PRUNED, value=self.last(seed)))
            if self._leave.is_set():
                return None
            if code != 0 or not self.finished(seed):
                error = last_error(self._log(seed).read_bytes()[self._begun :].decode(errors="replace"), code)
                if code == PREEMPTED or error.startswith(TOLD_TO_LEAVE):
                    return None
                return self._end(trial, Outcome(FAILED, error=error))
        values = {str(seed): self.value(seed) for seed in self.sweep.seeds}
        if bad := [seed for seed, value in values.items() if value is None or math.isnan(value)]:
            return self._end(trial, Outcome(FAILED, error=f"seed {bad[0]}: no held-out result"))
        known = {seed: float(value) for seed, value in values.items() if value is not None}
        return self._end(trial, Outcome(FINISHED, sum(known.values()) / len(known), known))

    def leave(self) -> None:
        """Have the run write a checkpoint and end, and wait for that; a later worker goes on."""
        self._leave.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            process.wait()

    def reset(self) -> None:
        """Let a failed point be tried again, with the same keys; its runs go on from their checkpoints."""
        (self.folder / "outcome.json").unlink()

    def _begin(self, done: Outcome | None) -> Trial | None:
        """The point's trial: the one it has, or a new one; None: its value is told already."""
        study = open_study(self.sweep, self.number)
        if done is not None:
            return None  # more seeds: Optuna keeps the value that it was told
        keys = self.keys()
        if keys is not None and (trial := trial_of(study, self.number)) is not None:
            return trial
        if keys is None and self.sweep.search == "grid":
            keys = list(self.sweep.grid())[self.number]
        trial = begin(study, self.sweep, self.number, keys)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / "point.json", json.dumps({"keys": suggest(self.sweep, trial)}))
        return trial

    def _end(self, trial: Trial | None, outcome: Outcome) -> Outcome:
        if trial is not None:
            states = {FAILED: TrialState.FAIL, PRUNED: TrialState.PRUNED, FINISHED: None}
            value = outcome.value if outcome.state == FINISHED else None
            open_study(self.sweep).tell(trial.number, value, state=states[outcome.state])
        atomic_write(self.folder / "outcome.json", json.dumps(vars(outcome)))
        return outcome

    def command(self, seed: int) -> list[str]:
        """The command line of a seed's run."""
        sweep, run = self.sweep, self.run_dir(seed)
        words = [*sweep.words(self.keys() or {}), f"--seed={seed}", f"--output_dir={run}"]
        words += ["--resume"] if (run / "config.yaml").exists() else []
        words += ["--accelerate", sweep.accelerate] if sweep.accelerate else []
        words += ["--num_processes", str(sweep.num_processes)] if sweep.num_processes else []
        return [sys.executable, "-m", "rlkit", sweep.command, sweep.base, *words]

    def start_file(self, seed: int) -> Path:
        """What was started last for a seed, and by which start of which job."""
        return self.folder / f"seed-{seed}.start.json"

    def _log(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.log"

    def _run(self, seed: int, trial: Trial | None) -> tuple[int, bool]:
        """Make a run: its exit code, and whether it was pruned."""
        if self._leave.is_set():
            return 0, False
        pruned = False
        told: set[int] = set()
        line = self.command(seed)
        # Other nodes of the same job start the same line (`rlkit.sweeps.slurm`).
        atomic_write(self.start_file(seed), json.dumps({"start": start_name(), "command": line}))
        with self._log(seed).open("ab") as log:
            self._begun = log.tell()
            self._process = process = subprocess.Popen(
                line,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the sweep, which lets the run write a checkpoint
            )
            while (code := _wait(process)) is None:
                if trial is not None and self.sweep.pruning and not pruned and self._worse(seed, trial, told):
                    pruned = True
                    process.terminate()
        return code, pruned

    def _worse(self, seed: int, trial: Trial, told: set[int]) -> bool:
        """Tell Optuna of the held-out results since the last look; whether one is below the median."""
        for step in self._evaluated(seed):
            value = None if step in told else self.value(seed, f"step-{step}")
            if value is not None and not math.isnan(value):
                told.add(step)
                trial.report(value, step)
                if trial.should_prune():  # which looks at the last step alone: so ask at each
                    return True
        return False

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "RLKIT_SWEEP_POINT": str(self.number)}

    def _evaluated(self, seed: int) -> list[int]:
        """The steps after which held-out tasks were answered."""
        paths = (self.run_dir(seed) / "evaluation").glob("step-*.json")
        return sorted(int(path.stem.split("-")[1]) for path in paths)

    def last(self, seed: int) -> float | None:
        """The newest held-out result in training."""
        steps = self._evaluated(seed)
        return self.value(seed, f"step-{steps[-1]}") if steps else None


def objective_name(points: Sequence[Point]) -> str:
    """Return the name of what is compared: the sweep's objective, or the metric of the runs' evaluations."""
    for point in points:
        if point.sweep.objective is not None:
            return point.sweep.objective
        for path in point.folder.glob("seed-*/evaluation/*.json"):
            return Evaluation.load(path).metric
    return "held out"  # no run has been evaluated yet


def start_name() -> str:
    """This start of this job: a job that is queued again starts anew."""
    return ".".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def last_error(log: str, code: int) -> str:
    """The line of a log that says why a run ended."""
    lines = [RANK.sub("", line).strip() for line in log.splitlines() if line.strip()]
    found = [line for line in lines if ERROR.match(line) and "ChildFailedError" not in line]  # torchrun's
    if not found and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return (found or lines or [f"exit code {code}"])[-1][:300]
