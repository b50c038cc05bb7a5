"""Reading of a run directory. A missing or damaged file becomes a note on the page, not an error."""

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

# Names of evaluations that are drawn at the first and the last training step; `step-40` is drawn at 40.
BEFORE_TRAINING = ("before", "warm-start")
AFTER_TRAINING = "after"
# Reports are shared, and configs of TRL and of experiment trackers may hold credentials.
SECRET = re.compile(r"token$|api_key|password|secret")
NOT_SECRET = re.compile(r"^(bos|eos|pad|unk)_token$")


@dataclass
class SavedRun:
    """Content of a run directory.

    Attributes:
        path: Path of the directory.
        name: Name of the directory.
        config: Content of config.yaml, with secrets masked.
        metrics: One row per stage and step; may be empty.
        rollouts: One row per training rollout; may be empty.
        evaluations: Evaluations by name, in the order of training: before, warm-start, step-N, after, then
            all others.
        notes: Problems that the page reports to the reader.
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
        """Name of the environment's metric; None without an evaluation, which alone records it."""
        return next((e.metric for e in self.evaluations.values()), None)

    @property
    def stage(self) -> str:
        """Main stage of the run: "train" or "rank", or "sft" if no other stage followed."""
        stages = set(self.metrics["stage"])
        return next((stage for stage in ("train", "rank") if stage in stages), "sft")

    @property
    def training(self) -> pd.DataFrame:
        """Metrics of the steps of the main stage, so without those of a warm start."""
        return self.metrics[(self.metrics["stage"] == self.stage) & (self.metrics["step"] > 0)]

    def step_of(self, evaluation: str) -> int | None:
        """Return the training step of an evaluation, or None if its name does not determine one."""
        if evaluation in BEFORE_TRAINING:
            return 0
        if evaluation == AFTER_TRAINING:
            return int(self.training["step"].max()) if len(self.training) else None
        match = re.fullmatch(r"step-(\d+)", evaluation)
        return int(match[1]) if match else None


def read_run(path: Path) -> SavedRun:
    """Read a run directory.

    Raises:
        UserError: If the path is not a run directory: it has no config.yaml, metrics.jsonl or evaluation/.
    """
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "evaluation")):
        raise UserError(f"{path} is not a run directory: it has no config.yaml, metrics.jsonl or evaluation/")
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
    _note_missing_parts(run)
    return run


def read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read config.yaml and mask its secrets."""
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
    """Read metrics.jsonl into one row per stage and step; of a value logged twice, the later one counts."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for line in _parsed_lines(path, notes):
        key = (line["stage"], line["step"])
        # Merge, not replace: TRL logs the training, evaluation and final metrics of a step on separate lines.
        merged.setdefault(key, {}).update(line)
    frame = pd.DataFrame(list(merged.values()))
    for column in ("stage", "step", "seconds"):
        if column not in frame:
            frame[column] = pd.Series(dtype=object if column == "stage" else float)
    for column in frame.columns.drop("stage"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    return frame.sort_values("step", kind="stable", ignore_index=True)


def _parsed_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of metrics.jsonl; note invalid ones, except a last line that a kill truncated."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            yield {**values, "stage": values["stage"], "step": int(values["step"])}
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                notes.append(f"metrics.jsonl: line {number} is invalid and was skipped")


def read_rollouts(path: Path, notes: list[str]) -> pd.DataFrame:
    """Read the training rollouts of a run directory into one frame, which is empty if there are none."""
    try:
        files = RolloutFiles(path)
    except UserError:
        return pd.DataFrame()
    frames = []
    for step in files.files:
        try:
            frames.append(files.frame(step))
        except UserError as error:
            notes.append(f"the rollouts of step {step} were skipped: {error}")
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def read_evaluations(folder: Path, notes: list[str]) -> dict[str, Evaluation]:
    """Read evaluation/*.json, in the order of training; invalid files become notes."""
    evaluations = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: evaluation_order(path.stem)):
        try:
            evaluations[path.stem] = Evaluation.load(path)
        except UserError as error:
            notes.append(f"evaluation/{path.name} cannot be read: {error}")
    return evaluations


def evaluation_order(name: str) -> tuple[int, int, str]:
    """Return a sort key: before, warm-start, step-N by N, after, then all others by name."""
    if name in BEFORE_TRAINING:
        return (0, BEFORE_TRAINING.index(name), "")
    if match := re.fullmatch(r"step-(\d+)", name):
        return (1, int(match[1]), "")
    return (2, 0, "") if name == AFTER_TRAINING else (3, 0, name)


def _note_missing_parts(run: SavedRun) -> None:
    if not len(run.training):
        run.notes.append("no training step was logged, so there are no curves")
    elif len(run.training) == 1:
        run.notes.append("only one training step was logged, so the curves are single points")
    if not run.evaluations:
        run.notes.append("no held-out evaluation yet: run `rlkit eval` to add one")
    if not len(run.rollouts):
        run.notes.append("no training rollouts were saved")
