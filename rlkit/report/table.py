"""The table of rollouts: which rows a page shows, and what each row says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rlkit.report.run import SavedRun
from rlkit.runs.record import prompt_text

ROWS = 1000  # of a page
CHARACTERS = 12_000  # of one text
COLUMNS = (
    *("task_id", "prompt", "completion", "turns", "answer", "score"),
    *("reward", "advantage", "length", "truncated", "invalid"),
)


def rollout_table(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """Return {"rows", "total"}: up to `ROWS` rollouts of all steps, at most half of them from evaluations."""
    rows: list[dict[str, Any]] = []
    total = 0
    for run in runs:
        limit = ROWS // len(runs)
        training, evaluation = training_rollouts(run), evaluation_rollouts(run)
        total += len(training) + len(evaluation)
        shown = sample_evenly(evaluation, "source", limit // 2 if len(training) else limit)
        shown = pd.concat([shown, sample_evenly(training, "step", limit - len(shown))])
        shown = shown.sort_values("step", kind="stable")
        shown["truncated"] = shown["truncated"].eq(True)  # not known is not truncated
        extra = [str(c) for c in shown if c not in COLUMNS and c not in ("step", "source")]
        rows += [table_row(run, record, extra) for record in shown.to_dict("records")]
    return {"rows": rows, "total": total}


def training_rollouts(run: SavedRun) -> pd.DataFrame:
    """The rollouts of training, with a score also where they were saved before records had one."""
    if not len(run.rollouts):
        return pd.DataFrame(columns=["step", "source", *COLUMNS])
    frame = run.rollouts.assign(source="training")
    metric = frame.get(f"rewards/{run.metric}", frame.get("reward"))
    if "score" not in frame:
        frame["score"] = metric
    elif run.metric is not None and metric is not None:  # a run that was resumed with a newer rlkit
        frame["score"] = frame["score"].fillna(metric)
    return frame.reindex(columns=list(dict.fromkeys(["step", "source", *COLUMNS, *frame.columns])))


def evaluation_rollouts(run: SavedRun) -> pd.DataFrame:
    """The completions of all evaluations, at the step where each was made."""
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
    """Up to `limit` rows, as many from each value of `by`; which ones depends on the task alone.

    So evaluations, which hold the same tasks, show the same tasks.
    """
    if len(frame) <= limit:
        return frame
    sibling = frame.groupby([by, "task_id"]).cumcount()
    order = pd.util.hash_array(
        (frame["task_id"].astype(str) + "/" + sibling.astype(str)).to_numpy(dtype=object)
    )
    frame = frame.iloc[np.argsort(order, kind="stable")].sort_values(by, kind="stable")
    rank = frame.groupby(by).cumcount().to_numpy()
    taken = np.cumsum(np.bincount(rank))  # rows up to and with each rank
    full = int(np.searchsorted(taken, limit, side="right"))
    rest = np.flatnonzero(rank == full)
    rest = rest[np.linspace(0, len(rest) - 1, limit - (int(taken[full - 1]) if full else 0)).astype(int)]
    return frame.iloc[np.sort(np.concatenate([np.flatnonzero(rank < full), rest]))]


def table_row(run: SavedRun, record: Mapping[Any, Any], extra: Sequence[str]) -> dict[str, Any]:
    """What the page says of one rollout, in JSON's types."""
    score, invalid = number(record["score"]), record["invalid"]
    return {
        "run": run.name,
        "source": record["source"],
        "step": number(record["step"]),
        "task": str(record["task_id"]),
        "tags": details(record, [c for c in extra if not c.startswith("rewards/")]),
        "prompt": cut(prompt_text(record["prompt"])),
        "completion": cut(record["completion"]),
        "turns": conversation(record["turns"]),
        "truth": cut(record["answer"]),
        "score": score,
        "reward": number(record["reward"]),
        "parts": details(record, ["advantage", *[c for c in extra if c.startswith("rewards/")]]),
        "length": number(record["length"]),
        "truncated": record["truncated"],
        "status": status(score, invalid),
        "reason": invalid if isinstance(invalid, str) else "",
    }


def conversation(turns: object) -> list[tuple[bool, str]]:
    """Each turn of several: whether the model wrote it, and its text. Of one turn the completion says all."""
    if not isinstance(turns, Sequence | np.ndarray) or len(turns) < 2:
        return []
    return [(turn["role"] == "assistant", cut(turn["content"])) for turn in turns]


def status(score: float | None, invalid: object) -> str:
    """Correct, wrong, invalid, or unscored where the metric does not apply."""
    if isinstance(invalid, str):
        return "invalid"
    if score is None:
        return "unscored"
    return "correct" if score >= 1.0 else "wrong"


def details(record: Mapping[Any, Any], columns: Sequence[str]) -> str:
    """The columns that have a value, as `name value · name value`."""
    texts = []
    for column in columns:
        value = record[column]
        if pd.api.types.is_scalar(value) and not pd.isna(value):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            texts.append(f"{column.removeprefix('rewards/').replace('_', ' ')} {text}")
    return " · ".join(texts)


def number(value: float | None) -> float | None:
    """A finite number, or None."""
    return float(f"{value:.6g}") if value is not None and np.isfinite(value) else None


def cut(text: object) -> str:
    """A text as the page holds it; very long ones lose their end."""
    text = text if isinstance(text, str) else ""
    left_out = len(text) - CHARACTERS
    return text if left_out <= 0 else f"{text[:CHARACTERS]}\n[… {left_out:,} more characters]"
