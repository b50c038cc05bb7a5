"""Read a run directory. What is missing or damaged becomes a note on the page, not an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rlkit.errors import UserError
from rlkit.evaluation import Evaluation
from rlkit.runs.record import RolloutFiles

# Where an evaluation stands on the axis of training steps; `step-40` stands at 40.
BEFORE_TRAINING = ("before", "warm-start")
AFTER_TRAINING = "after"
# A report is passed around; these keys of TRL's and of trackers are nobody's business.
SECRET = re.compile(r"token$|api_key|password|secret")
NOT_SECRET = re.compile(r"^(bos|eos|pad|unk)_token$")


@dataclass
class SavedRun:
    """What a run directory holds.

    `metrics` has one line per stage and step, `rollouts` one per rollout; both may be empty. `evaluations`
    are in the order of training: before, warm-start, step-N, after, then any other.
    """

    path: Path
    name: str
    config: dict[str, Any]
    metrics: pd.DataFrame
    rollouts: pd.DataFrame
    evaluations: dict[str, Evaluation]
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str | None:
        """The environment's metric, by which held-out results are reported; known from an evaluation only."""
        return next((e.metric for e in self.evaluations.values()), None)

    @property
    def stage(self) -> str:
        """What the run is about: "train" or "rank", or "sft" where there was nothing after it."""
        stages = set(self.metrics["stage"])
        return next((stage for stage in ("train", "rank") if stage in stages), "sft")

    @property
    def training(self) -> pd.DataFrame:
        """The metrics of the steps of that stage, without those of a warm start."""
        return self.metrics[(self.metrics["stage"] == self.stage) & (self.metrics["step"] > 0)]

    def step_of(self, evaluation: str) -> int | None:
        """The training step at which an evaluation was made, where its name tells."""
        if evaluation in BEFORE_TRAINING:
            return 0
        if evaluation == AFTER_TRAINING:
            return int(self.training["step"].max()) if len(self.training) else None
        match = re.fullmatch(r"step-(\d+)", evaluation)
        return int(match[1]) if match else None


def read_run(path: Path) -> SavedRun:
    """Read a run directory.

    Raises:
        UserError: the path is not a run directory: it has no config.yaml, metrics.jsonl or evaluation/.
    """
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "evaluation")):
        raise UserError(f"{path} is not a run directory: no config.yaml, metrics.jsonl or evaluation/ in it")
    notes: list[str] = []
    run = SavedRun(
        path=path,
        name=path.resolve().name,
        config=read_config(path / "config.yaml", notes),
        metrics=read_metrics(path / "metrics.jsonl", notes),
        rollouts=read_rollouts(path, notes),
        evaluations=read_evaluations(path / "evaluation", notes),
        notes=notes,
    )
    note_what_is_missing(run)
    return run


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read config.yaml, with secrets masked."""
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        notes.append(f"config.yaml cannot be read: {' '.join(str(error).split())}")
        return {}
    return {
        key: "***" if value and SECRET.search(key) and not NOT_SECRET.match(key) else value
        for key, value in config.items()
    }


def read_metrics(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read metrics.jsonl, one line per stage and step. Of a value logged twice, the later one counts."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for line in parsed_lines(path, notes):
        key = (line["stage"], line["step"])
        # A value at a time: TRL logs a step's training, evaluation and closing metrics on lines of their own.
        merged.setdefault(key, {}).update(line)
    frame = pd.DataFrame(list(merged.values()))
    for column in ("stage", "step", "seconds"):
        if column not in frame:
            frame[column] = pd.Series(dtype=object if column == "stage" else float)
    for column in frame.columns.drop("stage"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    return frame.sort_values("step", kind="stable", ignore_index=True)


def parsed_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics.jsonl that are metrics. A last line cut short by a kill needs no note."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            yield {**line, "stage": line["stage"], "step": int(line["step"])}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                notes.append(f"metrics.jsonl: line {number} cannot be read and is left out")


def read_rollouts(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read the training rollouts of a run directory as one frame; empty where it has none."""
    try:
        files = RolloutFiles(path)
    except UserError:
        return pd.DataFrame()
    frames = []
    for step in files.files:
        try:
            frames.append(files.frame(step))
        except UserError as error:
            notes.append(f"a step's rollouts are left out: {error}")
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def read_evaluations(folder: Path, notes: list[str]) -> dict[str, Evaluation]:
    """Read evaluation/*.json, in the order of training."""
    evaluations = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: evaluation_order(path.stem)):
        try:
            evaluations[path.stem] = Evaluation.load(path)
        except UserError as error:
            notes.append(f"evaluation/{path.name} cannot be read: {error}")
    return evaluations


def evaluation_order(name: str) -> tuple[int, int, str]:
    """Sort key: before, warm-start, step-N by N, after, then any other by name."""
    if name in BEFORE_TRAINING:
        return (0, BEFORE_TRAINING.index(name), "")
    if match := re.fullmatch(r"step-(\d+)", name):
        return (1, int(match[1]), "")
    return (2, 0, "") if name == AFTER_TRAINING else (3, 0, name)


def note_what_is_missing(run: SavedRun) -> None:
    """Say what the page will not show, and why."""
    if not len(run.training):
        run.notes.append("no training step was logged, so there are no curves")
    elif len(run.training) == 1:
        run.notes.append("only one training step was logged: the curves are single points")
    if not run.evaluations:
        run.notes.append("no held-out evaluation: run `rlkit eval` to make one")
    if not len(run.rollouts):
        run.notes.append("no training rollouts were kept")
