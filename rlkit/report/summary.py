"""Headline, facts and table of evaluations at the top of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlkit.errors import UserError
from rlkit.evaluation import Evaluation, Interval, compare, compare_by
from rlkit.report.figures import color_of
from rlkit.report.run import SavedRun

# Objectives of `rlkit rank`, as the literature spells them.
OBJECTIVES = {
    "plackett_luce": "Plackett-Luce",
    "infonce": "InfoNCE",
    "ranknet": "RankNet",
    "softmax_margin": "Softmax margin (PROP)",
    "pointwise": "Pointwise cross-entropy",
    "distillation": "Listwise distillation",
    "wasserstein": "Wasserstein loss",
}


MAX_KINDS = 8  # of tasks in the headline; more would hide the result


def headline(run: SavedRun) -> dict[str, str]:
    """Return {"figure", "sentence"}: the metric before and after training, short and as a tested statement.

    Two evaluations that cannot be paired become a note of the run.
    """
    first, last = _first_and_last(run)
    if not last:
        return {"figure": "", "sentence": f"{_subject(run)}. There is no held-out evaluation yet."}
    after = _percent(last.accuracy)
    tasks = f"{last.accuracy.n:,} held-out {last.split} tasks of {last.environment}"
    if not first:
        sentence = f"{_subject(run)}: mean {last.metric} {_with_interval(last.accuracy)} on {tasks}."
        return {"figure": f"{last.metric} {after}", "sentence": sentence}
    try:
        result = compare(first, last)
    except UserError as error:
        run.notes.append(f"no paired test: {error}")
        verb, test = "changed", ""
    else:
        verb = _verb(result["difference"], result["p"])
        test = f" Difference: {_points(result)} (paired permutation test, {format_p_value(result['p'])})."
        test += f" {changes}" if (changes := changes_by_column(first, last)) else ""
    sentence = (
        f"{_algorithm(run)} {verb} the mean {last.metric} of {last.model} from "
        f"{_with_interval(first.accuracy)} to {_with_interval(last.accuracy)} on {tasks}.{test}"
    )
    return {"figure": f"{last.metric} {_percent(first.accuracy)} → {after}", "sentence": sentence}


def changes_by_column(first: Evaluation, last: Evaluation) -> str:
    """Return a sentence about which kinds of tasks changed, or "" if there are no kinds to compare.

    They are the values of the first column of the breakdown that has at least two, and not more than
    `MAX_KINDS`. A kind counts as changed if its Holm-corrected p is below 0.05.
    """
    sizes = {column: sum(i.n > 0 for i in intervals.values()) for column, intervals in last.breakdown.items()}
    column = next((column for column, size in sizes.items() if 2 <= size <= MAX_KINDS), None)
    if column is None:
        return ""
    changes: dict[str, list[str]] = {"raised": [], "lowered": [], "did not measurably change": []}
    for kind, result in compare_by(first, last, column).items():
        means = f"{kind} ({100 * result['before']:.0f}% → {100 * result['after']:.0f}%, n = {result['n']})"
        changes[_verb(result["difference"], result["corrected_p"])].append(means)
    clauses = "; ".join(f"{verb} {', '.join(means)}" for verb, means in changes.items() if means)
    return f"{last.metric} by {column.replace('_', ' ')}: training {clauses}."


def _first_and_last(run: SavedRun) -> tuple[Evaluation | None, Evaluation | None]:
    """Return the two evaluations that the headline compares: the last one, and the first by the same metric.

    Evaluations outside training, such as one by `rlkit eval`, count only if there are no others.
    """
    during_training = [
        e for name, e in run.evaluations.items() if run.step_of(name) is not None or name == "after"
    ]
    evaluations = during_training or list(run.evaluations.values())
    if not evaluations:
        return None, None
    last = evaluations[-1]
    first = next(e for e in evaluations if e.metric == last.metric)
    return (None if first is last else first), last


def _subject(run: SavedRun) -> str:
    """Return the algorithm, model and environment, as far as config and evaluations name them."""
    model = run.config.get("model_name_or_path")
    if not model:
        model = next((e.model for e in run.evaluations.values()), run.name)
    environment = run.config.get("environment")
    return f"{_algorithm(run)}: {model}" + (f" on {environment}" if environment else "")


def _algorithm(run: SavedRun) -> str:
    if run.stage == "sft" and len(run.training):
        return "SFT"
    if run.stage == "rank":
        objective = str(run.config.get("objective", "ranking"))
        return OBJECTIVES.get(objective, objective)
    return str(run.config["algorithm"]).upper() if run.config.get("algorithm") else "Training"


def _verb(difference: float, p: float) -> str:
    """Return what training did to the metric; without significance at 5% the headline claims no change."""
    if p >= 0.05:
        return "did not measurably change"
    return "raised" if difference > 0 else "lowered"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f}%" if math.isfinite(interval.mean) else "unknown"


def _with_interval(interval: Interval) -> str:
    """Return a mean in percent with its 95% interval, if that is finite."""
    if not math.isfinite(interval.low):
        return _percent(interval)
    return f"{_percent(interval)} (95% CI {100 * interval.low:.1f}–{100 * interval.high:.1f})"


def _points(result: dict[str, float]) -> str:
    """Return a difference in percentage points with its 95% interval."""
    points = f"{100 * result['difference']:+.1f} points"
    if math.isfinite(result["low"]):
        points += f", 95% CI {100 * result['low']:+.1f} to {100 * result['high']:+.1f}"
    return points


def format_p_value(p: float) -> str:
    """Return a p value with two significant digits, or as "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def facts(run: SavedRun) -> list[tuple[str, str]]:
    """Return the (name, value) pairs under the headline: what was trained, how, and for how long."""
    pairs = [
        ("model", run.config.get("model_name_or_path")),
        ("environment", run.config.get("environment")),
        *dict(run.config.get("environment_args") or {}).items(),
        ("algorithm", _algorithm(run)),
        ("steps", f"{run.training['step'].max():,.0f}" if len(run.training) else None),
        ("time", format_duration(run.metrics["seconds"].max())),
    ]
    return [(str(name).replace("_", " "), _format_value(value)) for name, value in pairs if value is not None]


def _format_value(value: object) -> str:
    """Return a value of a config without brackets, such as "given 1, row 1, arithmetic 3"."""
    if isinstance(value, dict):
        value = [f"{name} {_format_value(item)}" for name, item in value.items()]
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    return str(value)


def format_duration(seconds: float) -> str | None:
    """Return seconds as "2 h 02 min" or "21 min 20 s"; None if they are not finite."""
    if not math.isfinite(seconds):
        return None
    minutes, remaining_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {remaining_seconds:02} s"


def evaluation_rows(runs: Sequence[SavedRun]) -> list[dict[str, Any]]:
    """Return a row for each evaluation, for the table under the headline."""
    rows = []
    for i, run in enumerate(runs):
        for name, evaluation in run.evaluations.items():
            rows.append(
                {"run": run.name, "color": color_of(i), "name": name, **_evaluation_cells(evaluation)}
            )
    return rows


def _evaluation_cells(evaluation: Evaluation) -> dict[str, str]:
    if evaluation.temperature == 0:
        decoding = "greedy"
    else:
        decoding = f"T = {evaluation.temperature:g}, {evaluation.samples} samples"
    return {
        "split": evaluation.split,
        "decoding": decoding,
        "metric": evaluation.metric,
        "mean": _with_interval(evaluation.accuracy),
        "tasks": f"{evaluation.accuracy.n:,}",
        # pass@1 would repeat the mean.
        "pass_at": ", ".join(f"{100 * value:.1f}% @{k}" for k, value in evaluation.pass_at.items() if k > 1),
        "rewards": " · ".join(
            f"{reward.replace('_', ' ')} {value:.3g}"
            for reward, value in evaluation.rewards.items()
            if reward != evaluation.metric and math.isfinite(value)
        ),
        "length": f"{evaluation.length:,.0f}",
        "truncated": f"{100 * evaluation.truncated:.1f}%",
        "invalid": f"{evaluation.invalid:,}",
    }
