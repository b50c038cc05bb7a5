"""The words and numbers at the top of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, Interval, compare
from rlkit.report.figures import colour
from rlkit.report.run import SavedRun

# Names of `rlkit rank`'s objectives as people write them.
OBJECTIVES = {
    "plackett_luce": "Plackett-Luce",
    "infonce": "InfoNCE",
    "ranknet": "RankNet",
    "distillation": "Listwise distillation",
    "wasserstein": "Wasserstein loss",
}


def headline(run: SavedRun) -> dict[str, str]:
    """Return {"figure", "sentence"}: the metric before and after, large and in a sentence with its test."""
    first, last = first_and_last(run)
    if not last:
        return {"figure": "", "sentence": f"{subject(run)}. There is no held-out evaluation yet."}
    after = percent(last.accuracy)
    where = f"{last.accuracy.n:,} held-out {last.split} tasks of {last.environment}"
    if not first:
        sentence = f"{subject(run)}: mean {last.metric} {spread(last.accuracy)} on {where}."
        return {"figure": f"{last.metric} {after}", "sentence": sentence}
    try:
        result = compare(first, last)
    except UserError as error:
        run.notes.append(f"no paired test: {error}")
        change, test = "changed", ""
    else:
        change = verb(result["difference"], result["p"])
        test = f" The difference is {points(result)} (paired permutation test, {p_value(result['p'])})."
    sentence = (
        f"{algorithm(run)} {change} the mean {last.metric} of {last.model} from {spread(first.accuracy)} "
        f"to {spread(last.accuracy)} on {where}.{test}"
    )
    return {"figure": f"{last.metric} {percent(first.accuracy)} → {after}", "sentence": sentence}


def first_and_last(run: SavedRun) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluations that the headline compares: before training, and after it or the latest there is."""
    placed = [e for name, e in run.evaluations.items() if run.step_of(name) is not None or name == "after"]
    evaluations = placed or list(run.evaluations.values())
    if not evaluations:
        return None, None
    last = evaluations[-1]
    first = next(e for e in evaluations if e.metric == last.metric)
    return (None if first is last else first), last


def subject(run: SavedRun) -> str:
    """The model, environment and algorithm, as far as the config names them."""
    model = run.config.get("model_name_or_path") or next(
        (e.model for e in run.evaluations.values()), run.name
    )
    environment = run.config.get("environment")
    return f"{algorithm(run)}: {model}" + (f" on {environment}" if environment else "")


def algorithm(run: SavedRun) -> str:
    """The algorithm's name as people write it."""
    if run.stage == "sft" and len(run.training):
        return "SFT"
    if run.stage == "rank":
        objective = str(run.config.get("objective", "ranking"))
        return OBJECTIVES.get(objective, objective)
    return str(run.config["algorithm"]).upper() if run.config.get("algorithm") else "Training"


def verb(difference: float, p: float) -> str:
    """What training did, said only as strongly as the test allows."""
    if p >= 0.05:
        return "did not measurably change"
    return "raised" if difference > 0 else "lowered"


def percent(interval: Interval) -> str:
    """A mean in percent."""
    return f"{100 * interval.mean:.1f} %" if math.isfinite(interval.mean) else "unknown"


def spread(interval: Interval) -> str:
    """A mean in percent with its 95 % interval."""
    if not math.isfinite(interval.low):
        return percent(interval)
    return f"{percent(interval)} (95 % CI {100 * interval.low:.1f}–{100 * interval.high:.1f})"


def points(result: dict[str, float]) -> str:
    """A difference in percentage points with its 95 % interval."""
    text = f"{100 * result['difference']:+.1f} points"
    if math.isfinite(result["low"]):
        text += f", 95 % CI {100 * result['low']:+.1f} to {100 * result['high']:+.1f}"
    return text


def p_value(p: float) -> str:
    """A p value as it is printed."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def facts(run: SavedRun) -> list[tuple[str, str]]:
    """Small numbers under the headline: what was run, for how long."""
    pairs = [
        ("model", run.config.get("model_name_or_path")),
        ("environment", run.config.get("environment")),
        *dict(run.config.get("environment_args") or {}).items(),
        ("algorithm", algorithm(run)),
        ("steps", f"{run.training['step'].max():,.0f}" if len(run.training) else None),
        ("time", duration(run.metrics["seconds"].max())),
    ]
    return [(str(name).replace("_", " "), str(value)) for name, value in pairs if value is not None]


def duration(seconds: float) -> str | None:
    """Seconds as hours and minutes."""
    if not math.isfinite(seconds):
        return None
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def evaluation_rows(runs: Sequence[SavedRun]) -> list[dict[str, Any]]:
    """One line per evaluation, for the table under the headline."""
    return [
        {
            "run": run.name,
            "colour": colour(i),
            "name": name,
            "split": e.split,
            "decoding": "greedy" if e.temperature == 0 else f"T = {e.temperature:g}, {e.samples} samples",
            "metric": e.metric,
            "mean": spread(e.accuracy),
            "tasks": f"{e.accuracy.n:,}",
            "pass_at": ", ".join(f"{100 * value:.1f} % @{k}" for k, value in e.pass_at.items() if k > 1),
            "rewards": " · ".join(
                f"{reward.replace('_', ' ')} {value:.3g}"
                for reward, value in e.rewards.items()
                if reward != e.metric and math.isfinite(value)
            ),
            "length": f"{e.length:,.0f}",
            "truncated": f"{100 * e.truncated:.1f} %",
            "invalid": f"{e.invalid:,}",
        }
        for i, run in enumerate(runs)
        for name, e in run.evaluations.items()
    ]
