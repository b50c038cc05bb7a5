"""The plots of a report, as plain plotly.js figures: one colour per run, paler for earlier evaluations.

A panel is {"title", "note", "traces", "layout"}; `page.js` adds the fonts and colours of the page's theme.
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

# Readable on a light and on a dark page.
COLOURS = ("#3b7dd8", "#d9730d", "#2f9e6e", "#b0529b", "#c9444f", "#7a6ff0", "#1b98a6", "#8f7a2f")
SHARE = {"tickformat": "~%"}
OPACITY = {"before": 0.35, "warm-start": 0.6, "after": 1.0}  # of an evaluation's colour
SMOOTH_FROM = 60  # steps from which a curve is shown as a running mean over the raw values

# Metric in metrics.jsonl, title, y axis.
LEARNING = (
    ("reward", "Reward", {"title": "mean reward"}),
    ("utility", "Utility of the sampled rankings", {"title": "mean utility"}),
)
HEALTH = (
    ("completions/mean_length", "Completion length", {"title": "tokens, mean"}),
    ("completions/clipped_ratio", "Truncated completions", {"title": "share of completions", **SHARE}),
    ("frac_reward_zero_std", "Groups without reward spread", {"title": "share of groups", **SHARE}),
    ("entropy", "Policy entropy", {"title": "nats per token"}),
    ("kl", "KL to the reference", {"title": "nats per token"}),
    ("loss", "Loss", {"title": "loss"}),
    ("mean_token_accuracy", "Token accuracy", {"title": "share of tokens", **SHARE}),
    ("grad_norm", "Gradient norm", {"title": "norm"}),
    ("learning_rate", "Learning rate", {"title": "learning rate", "exponentformat": "e"}),
)


def colour(index: int) -> str:
    """The colour of a run, everywhere on the page."""
    return COLOURS[index % len(COLOURS)]


def mixed(color: str, opacity: float) -> str:
    """A colour that lets the page through; unlike a trace's opacity it shows in the legend too."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def learning_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """The metrics, in training and held out, and what else says how well the training goes."""
    panels = [metric_panel(runs, metric) for metric in dict.fromkeys(run.metric for run in runs)]
    panels += [curve_panel(runs, metric, title, yaxis) for metric, title, yaxis in LEARNING]
    return [panel for panel in panels if panel] + environment_panels(runs)


def reward_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """The mean of each reward, and the share of rollouts that a failing reward made invalid."""
    metrics = (str(metric) for run in runs for metric in run.metrics)
    names = dict.fromkeys(
        metric.removeprefix("rewards/").rpartition("/")[0]
        for metric in metrics
        if metric.startswith("rewards/")
    )
    return [panel for name in names for panel in one_reward(runs, name)]


def one_reward(runs: Sequence[SavedRun], name: str) -> Iterator[Panel]:
    """The panels of one reward."""
    if panel := curve_panel(runs, f"rewards/{name}/mean", name, {"title": "mean reward"}):
        yield panel
    failing = f"rewards/{name}/error_rate"
    if any(run.metrics.get(failing, pd.Series(dtype=float)).gt(0).any() for run in runs):
        panel = curve_panel(runs, failing, f"{name}: errors", {"title": "share of rollouts", **SHARE})
        yield from [panel] if panel else []


def health_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """Length, spread, entropy, loss and the like, and the loss of the warm start."""
    panels = [curve_panel(runs, metric, title, yaxis) for metric, title, yaxis in HEALTH]
    said = (str(metric) for run in runs for metric in run.metrics)
    for metric in dict.fromkeys(name for name in said if name.startswith("environment/")):
        title = metric.removeprefix("environment/")
        panels.append(curve_panel(runs, metric, title.capitalize(), {"title": title}))
    return [panel for panel in (*panels, time_panel(runs), warm_start_panel(runs)) if panel]


def time_panel(runs: Sequence[SavedRun]) -> Panel | None:
    """Where the seconds of a step go: a stacked bar per run, of means over its steps."""
    means = [run.training.filter(like="time/").mean().dropna() for run in runs]
    parts = dict.fromkeys(str(part) for mean in means for part in mean.index)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [short(mean.get(part, 0.0)) for mean in means],
            "y": [run.name for run in runs],
            "name": part.removeprefix("time/").replace("_", " and "),
            "marker": {"color": colour(i)},
        }
        for i, part in enumerate(parts)
    ]
    layout = {
        "xaxis": {"title": "seconds a step"},
        "yaxis": {"title": "", "automargin": True},
        "barmode": "stack",
        "showlegend": True,
    }
    return panel("Where the time goes", "Means over the steps.", traces, layout) if traces else None


def warm_start_panel(runs: Sequence[SavedRun]) -> Panel | None:
    """The loss of the supervised steps before reinforcement learning."""
    traces = [
        t for i, run in enumerate(runs) if run.stage == "train" for t in curve(run, "loss", "sft", colour(i))
    ]
    layout = {"xaxis": {"title": "warm-start step"}, "yaxis": {"title": "loss, nats per token"}}
    return panel("Warm start: loss", "", traces, layout) if traces else None


def curve_panel(runs: Sequence[SavedRun], metric: str, title: str, yaxis: dict[str, Any]) -> Panel | None:
    """One metric over the steps of training, a curve per run; None where no run logged it."""
    traces = [t for i, run in enumerate(runs) for t in curve(run, metric, run.stage, colour(i))]
    return panel(title, "", traces, {"xaxis": {"title": "training step"}, "yaxis": yaxis}) if traces else None


def curve(run: SavedRun, metric: str, stage: str, color: str) -> list[Trace]:
    """A metric as a line; a long one as a running mean over its pale raw values."""
    if metric not in run.metrics:
        return []
    lines = run.metrics.loc[run.metrics["stage"] == stage, ["step", metric]].dropna()
    if not len(lines):
        return []
    raw = line(lines["step"], lines[metric], run.name, color)
    if len(lines) < SMOOTH_FROM:
        return [
            raw | {"mode": "lines+markers", "marker": {"size": 4 if len(lines) > 1 else 8, "color": color}}
        ]
    running = lines[metric].rolling(len(lines) // 25, center=True, min_periods=1).mean()
    return [raw | {"opacity": 0.25, "hoverinfo": "skip"}, line(lines["step"], running, run.name, color, 2.4)]


def line(x: pd.Series, y: pd.Series, name: str, color: str, width: float = 1.5) -> Trace:
    """A line through finite points."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [int(step) for step in x],
        "y": [short(value) for value in y],
        "name": name,
        "line": {"color": color, "width": width},
    }


def metric_panel(runs: Sequence[SavedRun], metric: str | None) -> Panel | None:
    """A metric's mean over training batches as a line, and over held-out tasks as points with intervals."""
    lines, points = [], []
    for i, run in enumerate(runs):
        if run.metric == metric:
            lines += curve(run, f"rewards/{metric}/mean", run.stage, colour(i))
            points += held_out(run, colour(i))
    if not lines + points:
        return None
    note = "Diamonds: held-out tasks, 95 % intervals."
    if lines:
        note = f"Line: training batches. {note}"
    layout = {
        "xaxis": {"title": "training step"},
        "yaxis": {"title": f"mean {metric}", "rangemode": "tozero", **SHARE},
    }
    return panel(str(metric), note, lines + points, layout)


def environment_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """What the environments of the runs add to the report (`Environment.report_panels`)."""
    by_environment: dict[str, list[HeldOutMeans]] = {}
    for i, run in enumerate(runs):
        if run.evaluations and (name := run.config.get("environment")):
            by_environment.setdefault(str(name), []).append(held_out_means(run, colour(i)))
    panels = []
    for name, means in by_environment.items():
        try:
            environment = environment_class(name)
        except UserError:  # its file has been moved: nothing of the run is lost but such plots
            continue
        try:
            found = environment.report_panels(means)
            panels += [panel(**without_nan(one)) for one in found]
        except Exception as error:  # user code: the report of a run is worth more than one plot of it
            for run in runs:
                if run.config.get("environment") == name:
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    run.notes.append(f"the plots of {name} are missing: {reason}")
    return panels


def held_out_means(run: SavedRun, color: str) -> HeldOutMeans:
    """The means of a run's evaluations, for its environment."""
    return HeldOutMeans(
        run.name,
        color,
        {name: evaluation.accuracy.mean for name, evaluation in run.evaluations.items()},
        {name: evaluation.rewards for name, evaluation in run.evaluations.items()},
    )


def held_out(run: SavedRun, color: str) -> list[Trace]:
    """Held-out means of the metric at the steps of their checkpoints."""
    evaluations = {name: e for name, e in run.evaluations.items() if e.metric == run.metric}
    placed = [(run.step_of(name), name, e.accuracy) for name, e in evaluations.items()]
    points = [(step, name, interval) for step, name, interval in placed if step is not None and interval.n]
    if not points:
        return []
    steps, names, intervals = zip(*points, strict=True)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": list(steps),
            "y": [short(interval.mean) for interval in intervals],
            "error_y": error_bars(intervals, color),
            "text": list(names),
            "name": f"{run.name}, held out",
            "marker": {
                "size": 11,
                "symbol": "diamond",
                "color": [mixed(color, OPACITY.get(name, 1.0)) for name in names],
                "line": {"color": color, "width": 1.5},
                "opacity": 1,
            },
        }
    ]


def breakdown_panels(runs: Sequence[SavedRun]) -> list[Panel]:
    """A metric by each column of its breakdown: bars before, after a warm start, and after training."""
    columns = {(e.metric, c): None for run in runs for e in run.evaluations.values() for c in e.breakdown}
    panels = []
    for metric, column in columns:
        traces = [
            t for i, run in enumerate(runs) for t in bars(run, metric, column, colour(i), len(runs) > 1)
        ]
        if traces and any(len(trace["x"]) > 1 for trace in traces):
            title = column.replace("_", " ")
            layout = {
                "xaxis": {"title": title, "type": "category"},
                "yaxis": {"title": f"mean {metric}", "range": [0, 1.02], **SHARE},
                "barmode": "group",
                "showlegend": True,
            }
            panels.append(panel(f"{metric} by {title}", "Held-out tasks, 95 % intervals.", traces, layout))
    return panels


def bars(run: SavedRun, metric: str, column: str, color: str, name_run: bool) -> Iterator[Trace]:
    """One group of bars per evaluation by the metric: paler the earlier it was made."""
    shown = [name for name in OPACITY if name in run.evaluations and run.evaluations[name].metric == metric]
    for name in shown:
        values = run.evaluations[name].breakdown.get(column, {})
        values = {value: interval for value, interval in values.items() if interval.n}
        yield {
            "type": "bar",
            "x": list(values),
            "y": [short(interval.mean) for interval in values.values()],
            "error_y": error_bars(list(values.values()), "#808080"),
            "customdata": [interval.n for interval in values.values()],
            "hovertemplate": "%{y:.1%} of %{customdata} tasks",
            "name": f"{run.name}, {name}" if name_run else name,
            "marker": {"color": mixed(color, OPACITY[name])},
        }


def error_bars(intervals: Sequence[Interval], color: str) -> dict[str, Any]:
    """The intervals as plotly's distances from the mean."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [short(interval.high - interval.mean) for interval in intervals],
        "arrayminus": [short(interval.mean - interval.low) for interval in intervals],
        "color": color,
        "thickness": 1.4,
        "width": 4,
    }


def panel(title: str, note: str, traces: Sequence[Trace], layout: Mapping[str, Any]) -> Panel:
    """A plot with its caption; plotly wants the title of an axis as an object."""
    axes = {axis: {**layout[axis], "title": {"text": layout[axis]["title"]}} for axis in ("xaxis", "yaxis")}
    return {"title": title, "note": note, "traces": traces, "layout": {"showlegend": False, **layout, **axes}}


def short(value: float) -> float | None:
    """Six digits are more than a plot can show; JSON has no NaN."""
    return float(f"{value:.6g}") if np.isfinite(value) else None
