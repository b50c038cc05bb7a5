"""Plots of a report as plain plotly.js figures: one color per run, paler for earlier evaluations.

A panel is {"title", "note", "traces", "layout"}; `page.js` adds the fonts and colors of the page's theme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rlkit.environment import HeldOutMeans
from rlkit.errors import UserError, first_line
from rlkit.evaluation import Interval
from rlkit.evaluation.result import without_nan
from rlkit.registry import environment_class
from rlkit.report.run import SavedRun

Panel = dict[str, Any]
Trace = dict[str, Any]

# Legible on a light and on a dark page.
COLORS = ("#3b7dd8", "#d9730d", "#2f9e6e", "#b0529b", "#c9444f", "#7a6ff0", "#1b98a6", "#8f7a2f")
ERROR_BAR_GRAY = "#808080"
PERCENT_AXIS = {"tickformat": "~%"}
OPACITY = {"before": 0.35, "warm-start": 0.6, "after": 1.0}  # by evaluation: the earlier, the paler
MIN_STEPS_TO_SMOOTH = 60  # from here on, a running mean is drawn over the raw values
SMOOTHING_FRACTION = 25  # the window of the running mean is this fraction (1/25) of the steps

# Metric in metrics.jsonl, title, y axis.
LEARNING = (
    ("reward", "Reward", {"title": "mean reward"}),
    ("utility", "Utility of the sampled rankings", {"title": "mean utility"}),
)
HEALTH = (
    ("completions/mean_length", "Completion length", {"title": "tokens, mean"}),
    ("completions/clipped_ratio", "Truncated completions", {"title": "share of completions", **PERCENT_AXIS}),
    ("frac_reward_zero_std", "Groups with equal rewards", {"title": "share of groups", **PERCENT_AXIS}),
    ("entropy", "Policy entropy", {"title": "nats per token"}),
    ("kl", "KL to the reference", {"title": "nats per token"}),
    ("loss", "Loss", {"title": "loss"}),
    ("mean_token_accuracy", "Token accuracy", {"title": "share of tokens", **PERCENT_AXIS}),
    ("grad_norm", "Gradient norm", {"title": "norm"}),
    ("learning_rate", "Learning rate", {"title": "learning rate", "exponentformat": "e"}),
)


def color_of(index: int) -> str:
    """Return the color of the run with this index; it is the same in all plots and tables."""
    return COLORS[index % len(COLORS)]


def _with_opacity(color: str, opacity: float) -> str:
    """Return a hex color as rgba(). Unlike the opacity of a trace, it applies in the legend, too."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def learning_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Return the metrics in training and on held-out tasks, the reward, and the environments' own plots."""
    panels = [_metric_panel(runs, metric) for metric in dict.fromkeys(run.metric for run in runs)]
    panels += [_curve_panel(runs, metric, title, yaxis) for metric, title, yaxis in LEARNING]
    return [panel for panel in panels if panel] + environment_panels(runs)


def reward_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Return the mean of each reward, and for a reward that failed the share of invalid rollouts."""
    names: dict[str, None] = {}
    for run in runs:
        for metric in map(str, run.metrics):
            if metric.startswith("rewards/"):
                names[metric.removeprefix("rewards/").rpartition("/")[0]] = None
    return [panel for name in names for panel in _panels_of_reward(runs, name)]


def _panels_of_reward(runs: Sequence[SavedRun], name: str) -> Iterator[Panel]:
    if panel := _curve_panel(runs, f"rewards/{name}/mean", name, {"title": "mean reward"}):
        yield panel
    error_rate = f"rewards/{name}/error_rate"
    if any(run.metrics.get(error_rate, pd.Series(dtype=float)).gt(0).any() for run in runs):
        yaxis = {"title": "share of rollouts", **PERCENT_AXIS}
        if panel := _curve_panel(runs, error_rate, f"{name}: errors", yaxis):
            yield panel


def health_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Return length, reward spread, entropy, loss and the like, the step time, and the warm start's loss."""
    panels = [_curve_panel(runs, metric, title, yaxis) for metric, title, yaxis in HEALTH]
    metrics = dict.fromkeys(str(metric) for run in runs for metric in run.metrics)
    for metric in metrics:
        if metric.startswith("environment/"):
            title = metric.removeprefix("environment/")
            panels.append(_curve_panel(runs, metric, title.capitalize(), {"title": title}))
    return [panel for panel in (*panels, _time_panel(runs), _warm_start_panel(runs)) if panel]


def _time_panel(runs: Sequence[SavedRun]) -> Panel | None:
    """Return how the seconds of a step split up: a stacked bar per run, of means over its steps."""
    means = [run.training.filter(like="time/").mean().dropna() for run in runs]
    parts = dict.fromkeys(str(part) for mean in means for part in mean.index)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [_rounded(mean.get(part, 0.0)) for mean in means],
            "y": [run.name for run in runs],
            "name": part.removeprefix("time/").replace("_", " and "),
            "marker": {"color": color_of(i)},
        }
        for i, part in enumerate(parts)
    ]
    layout = {
        "xaxis": {"title": "seconds per step"},
        "yaxis": {"title": "", "automargin": True},
        "barmode": "stack",
        "showlegend": True,
    }
    return panel("Where the time goes", "Mean over the steps.", traces, layout) if traces else None


def _warm_start_panel(runs: Sequence[SavedRun]) -> Panel | None:
    """Return the loss of the supervised steps before reinforcement learning."""
    traces = []
    for i, run in enumerate(runs):
        if run.stage == "train":
            traces += _curve(run, "loss", "sft", color_of(i))
    layout = {"xaxis": {"title": "warm-start step"}, "yaxis": {"title": "loss, nats per token"}}
    return panel("Warm start: loss", "", traces, layout) if traces else None


def _curve_panel(runs: Sequence[SavedRun], metric: str, title: str, yaxis: dict[str, Any]) -> Panel | None:
    """Return one metric over the training steps, a curve per run, or None if no run logged it."""
    traces = []
    for i, run in enumerate(runs):
        traces += _curve(run, metric, run.stage, color_of(i))
    return panel(title, "", traces, {"xaxis": {"title": "training step"}, "yaxis": yaxis}) if traces else None


def _curve(run: SavedRun, metric: str, stage: str, color: str) -> list[Trace]:
    """Return a metric as a line; a long one as a running mean over its pale raw values."""
    if metric not in run.metrics:
        return []
    lines = run.metrics.loc[run.metrics["stage"] == stage, ["step", metric]].dropna()
    if not len(lines):
        return []
    raw = _line(lines["step"], lines[metric], run.name, color)
    if len(lines) < MIN_STEPS_TO_SMOOTH:
        marker_size = 4 if len(lines) > 1 else 8  # a single point has no line to draw attention to it
        return [raw | {"mode": "lines+markers", "marker": {"size": marker_size, "color": color}}]
    window = len(lines) // SMOOTHING_FRACTION
    running_mean = lines[metric].rolling(window, center=True, min_periods=1).mean()
    return [
        raw | {"opacity": 0.25, "hoverinfo": "skip"},
        _line(lines["step"], running_mean, run.name, color, width=2.4),
    ]


def _line(x: pd.Series, y: pd.Series, name: str, color: str, width: float = 1.5) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [int(step) for step in x],
        "y": [_rounded(value) for value in y],
        "name": name,
        "line": {"color": color, "width": width},
    }


def _metric_panel(runs: Sequence[SavedRun], metric: str | None) -> Panel | None:
    """Return the mean of a metric: over training batches as a line, over held-out tasks as points."""
    lines, points = [], []
    for i, run in enumerate(runs):
        if run.metric == metric:
            lines += _curve(run, f"rewards/{metric}/mean", run.stage, color_of(i))
            points += _held_out_points(run, color_of(i))
    if not lines + points:
        return None
    note = "Diamonds: held-out tasks, 95% intervals."
    if lines:
        note = f"Line: training batches. {note}"
    layout = {
        "xaxis": {"title": "training step"},
        "yaxis": {"title": f"mean {metric}", "rangemode": "tozero", **PERCENT_AXIS},
    }
    return panel(str(metric), note, lines + points, layout)


def environment_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Return the plots that the environments of the runs add to the report (`Environment.report_panels`)."""
    by_environment: dict[str, list[HeldOutMeans]] = {}
    for i, run in enumerate(runs):
        if run.evaluations and (name := run.config.get("environment")):
            by_environment.setdefault(str(name), []).append(_held_out_means(run, color_of(i)))
    panels = []
    for name, means in by_environment.items():
        try:
            environment = environment_class(name)
        except UserError:  # the environment's file has moved: the report lacks these plots alone
            continue
        try:
            panels += [panel(**without_nan(fields)) for fields in environment.report_panels(means)]
        except Exception as error:  # user code: one failed plot must not cost the report
            for run in runs:
                if run.config.get("environment") == name:
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    run.notes.append(f"the plots of {name} are missing: {reason}")
    return panels


def _held_out_means(run: SavedRun, color: str) -> HeldOutMeans:
    return HeldOutMeans(
        run.name,
        color,
        {name: evaluation.accuracy.mean for name, evaluation in run.evaluations.items()},
        {name: evaluation.rewards for name, evaluation in run.evaluations.items()},
    )


def _held_out_points(run: SavedRun, color: str) -> list[Trace]:
    """Return the held-out means of the run's metric at the training steps of their evaluations."""
    steps, names, intervals = [], [], []
    for name, evaluation in run.evaluations.items():
        step = run.step_of(name)
        if evaluation.metric == run.metric and step is not None and evaluation.accuracy.n:
            steps.append(step)
            names.append(name)
            intervals.append(evaluation.accuracy)
    if not steps:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": steps,
            "y": [_rounded(interval.mean) for interval in intervals],
            "error_y": _error_bars(intervals, color),
            "text": names,
            "name": f"{run.name}, held out",
            "marker": {
                "size": 11,
                "symbol": "diamond",
                "color": [_with_opacity(color, OPACITY.get(name, 1.0)) for name in names],
                "line": {"color": color, "width": 1.5},
                "opacity": 1,
            },
        }
    ]


def breakdown_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Return a metric by each column of its breakdown: bars before, after a warm start and after training."""
    columns = {(e.metric, c): None for run in runs for e in run.evaluations.values() for c in e.breakdown}
    panels = []
    for metric, column in columns:
        traces: list[Trace] = []
        for i, run in enumerate(runs):
            traces += _bars(run, metric, column, color_of(i), name_run=len(runs) > 1)
        if any(len(trace["x"]) > 1 for trace in traces):  # a single bar breaks nothing down
            title = column.replace("_", " ")
            layout = {
                "xaxis": {"title": title, "type": "category"},
                "yaxis": {"title": f"mean {metric}", "range": [0, 1.02], **PERCENT_AXIS},
                "barmode": "group",
                "showlegend": True,
            }
            panels.append(panel(f"{metric} by {title}", "Held-out tasks, 95% intervals.", traces, layout))
    return panels


def _bars(run: SavedRun, metric: str, column: str, color: str, name_run: bool) -> Iterator[Trace]:
    """Yield a group of bars for each evaluation by this metric, the earlier the paler."""
    for name, opacity in OPACITY.items():
        evaluation = run.evaluations.get(name)
        if evaluation is None or evaluation.metric != metric:
            continue
        intervals = {
            value: interval for value, interval in evaluation.breakdown.get(column, {}).items() if interval.n
        }
        yield {
            "type": "bar",
            "x": list(intervals),
            "y": [_rounded(interval.mean) for interval in intervals.values()],
            "error_y": _error_bars(list(intervals.values()), ERROR_BAR_GRAY),
            "customdata": [interval.n for interval in intervals.values()],
            "hovertemplate": "%{y:.1%} of %{customdata} tasks",
            "name": f"{run.name}, {name}" if name_run else name,
            "marker": {"color": _with_opacity(color, opacity)},
        }


def _error_bars(intervals: Sequence[Interval], color: str) -> dict[str, Any]:
    """Return intervals as plotly wants them: as distances from the mean."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [_rounded(interval.high - interval.mean) for interval in intervals],
        "arrayminus": [_rounded(interval.mean - interval.low) for interval in intervals],
        "color": color,
        "thickness": 1.4,
        "width": 4,
    }


def panel(title: str, note: str, traces: Sequence[Trace], layout: Mapping[str, Any]) -> Panel:
    """Return a plot with its caption; the axis titles in `layout` are strings, plotly.js wants objects."""
    axes = {axis: {**layout[axis], "title": {"text": layout[axis]["title"]}} for axis in ("xaxis", "yaxis")}
    return {"title": title, "note": note, "traces": traces, "layout": {"showlegend": False, **layout, **axes}}


def _rounded(value: float) -> float | None:
    """Return a number for JSON: None if it is not finite, else six digits, which keeps the page small."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
