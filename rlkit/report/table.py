"""Table of rollouts in a report: which rollouts a page shows, and the cells of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rlkit.report.run import SavedRun
from rlkit.runs.record import prompt_text

MAX_ROWS = 1000  # per page
MAX_CHARACTERS = 12_000  # per prompt, completion, turn or answer
COLUMNS = (
    *("task_id", "prompt", "completion", "turns", "answer", "score"),
    *("reward", "advantage", "length", "truncated", "invalid"),
)


def rollout_table(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Return {"rows", "total"}: up to `MAX_ROWS` rollouts of all steps, and how many rollouts there are.

    At most half of the rows come from evaluations if there are rollouts of training.
    """
    rows: list[dict[str, Any]] = []
    total = 0
    for run in runs:
        limit = MAX_ROWS // len(runs)
        training, evaluation = training_rollouts(run), evaluation_rollouts(run)
        total += len(training) + len(evaluation)
        shown = sample_evenly(evaluation, "source", limit // 2 if len(training) else limit)
        shown = pd.concat([shown, sample_evenly(training, "step", limit - len(shown))])
        shown = shown.sort_values("step", kind="stable")
        shown["truncated"] = shown["truncated"].eq(True)  # a missing value counts as not truncated
        extra = [str(c) for c in shown if c not in COLUMNS and c not in ("step", "source")]
        rows += [_table_row(run, record, extra) for record in shown.to_dict("records")]
    return {"rows": rows, "total": total}


def training_rollouts(run: SavedRun) -> pd.DataFrame:
    """Return the rollouts of training; those saved by versions without a `score` column get the metric."""
    if not len(run.rollouts):
        return pd.DataFrame(columns=["step", "source", *COLUMNS])
    frame = run.rollouts.assign(source="training")
    metric = frame.get(f"rewards/{run.metric}", frame.get("reward"))
    if "score" not in frame:
        frame["score"] = metric
    elif run.metric is not None and metric is not None:  # such a run was resumed by a newer version
        frame["score"] = frame["score"].fillna(metric)
    return frame.reindex(columns=list(dict.fromkeys(["step", "source", *COLUMNS, *frame.columns])))


def evaluation_rollouts(run: SavedRun) -> pd.DataFrame:
    """Return the completions of all evaluations, with the training step of each evaluation."""
    frames = [
        pd.DataFrame(list(e.completions)).assign(source=name, step=run.step_of(name))
        for name, e in run.evaluations.items()
        if e.completions
    ]
    columns = ["step", "source", *COLUMNS]
    if not frames:
        return pd.DataFrame(columns=columns)
    frame = pd.concat(frames, ignore_index=True)
    return frame.reindex(columns=list(dict.fromkeys([*columns, *frame.columns])))


def sample_evenly(frame: pd.DataFrame, by: str, limit: int) -> pd.DataFrame:
    """Return up to `limit` rows, equally many for each value of `by`.

    A hash of the task id decides which rows are chosen. Evaluations on the same tasks therefore show the same
    tasks.
    """
    if len(frame) <= limit:
        return frame
    sibling = frame.groupby([by, "task_id"]).cumcount()
    order = pd.util.hash_array(
        (frame["task_id"].astype(str) + "/" + sibling.astype(str)).to_numpy(dtype=object)
    )
    frame = frame.iloc[np.argsort(order, kind="stable")].sort_values(by, kind="stable")
    # Take all rows of rank 0 (one per group), then of rank 1, and so on, while a complete rank fits. What
    # remains of the limit is spread evenly over the groups that have a row of the next rank.
    rank = frame.groupby(by).cumcount().to_numpy()
    num_rows_up_to = np.cumsum(np.bincount(rank))
    num_full_ranks = int(np.searchsorted(num_rows_up_to, limit, side="right"))
    num_chosen = int(num_rows_up_to[num_full_ranks - 1]) if num_full_ranks else 0
    next_rank = np.flatnonzero(rank == num_full_ranks)
    spread = np.linspace(0, len(next_rank) - 1, limit - num_chosen).astype(int)
    chosen = np.concatenate([np.flatnonzero(rank < num_full_ranks), next_rank[spread]])
    return frame.iloc[np.sort(chosen)]


def _table_row(run: SavedRun, record: Mapping[Any, Any], extra: Sequence[str]) -> dict[str, Any]:
    """Return the cells of one rollout, in JSON types; `extra` names the environment's and reward columns."""
    score, invalid = _finite(record["score"]), record["invalid"]
    return {
        "run": run.name,
        "source": record["source"],
        "step": _finite(record["step"]),
        "task": str(record["task_id"]),
        "tags": _labeled_values(record, [c for c in extra if not c.startswith("rewards/")]),
        "prompt": truncate(prompt_text(record["prompt"])),
        "completion": truncate(record["completion"]),
        "turns": _conversation(record["turns"]),
        "truth": truncate(record["answer"]),
        "score": score,
        "reward": _finite(record["reward"]),
        "parts": _labeled_values(record, ["advantage", *[c for c in extra if c.startswith("rewards/")]]),
        "length": _finite(record["length"]),
        "truncated": record["truncated"],
        "status": status(score, invalid),
        "reason": invalid if isinstance(invalid, str) else "",
    }


def _conversation(turns: object) -> list[tuple[bool, str]]:
    """Return (whether the model wrote it, content) for each turn; empty for a single turn, the completion."""
    if not isinstance(turns, Sequence | np.ndarray) or len(turns) < 2:
        return []
    return [(turn["role"] == "assistant", truncate(turn["content"])) for turn in turns]


def status(score: float | None, invalid: object) -> str:
    """Return "correct", "wrong", "invalid", or "unscored" if the metric does not apply."""
    if isinstance(invalid, str):
        return "invalid"
    if score is None:
        return "unscored"
    return "correct" if score >= 1.0 else "wrong"


def _labeled_values(record: Mapping[Any, Any], columns: Sequence[str]) -> str:
    """Return the columns that have a scalar value as `name value · name value`."""
    labeled = []
    for column in columns:
        value = record[column]
        if pd.api.types.is_scalar(value) and not pd.isna(value):
            formatted = f"{value:.4g}" if isinstance(value, float) else str(value)
            labeled.append(f"{column.removeprefix('rewards/').replace('_', ' ')} {formatted}")
    return " · ".join(labeled)


def _finite(value: float | None) -> float | None:
    """Return a number with six digits, or None if it is missing or not finite: JSON has no NaN."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def truncate(content: object) -> str:
    """Return a string cut to `MAX_CHARACTERS`, with a remark on its length; other types become empty."""
    if not isinstance(content, str):
        return ""
    excess = len(content) - MAX_CHARACTERS
    return content if excess <= 0 else f"{content[:MAX_CHARACTERS]}\n[… {excess:,} more characters]"
