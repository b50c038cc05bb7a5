"""Results of a sweep: a table (`table.csv`) and a page (`report.html`)."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from rlkit.files import atomic_write
from rlkit.report.build import plotly_js, template, trusted
from rlkit.report.figures import Panel, color_of, learning_panels, panel
from rlkit.report.run import read_run
from rlkit.sweeps.point import Point, objective_name
from rlkit.sweeps.spec import FAILED, FINISHED, Sweep
from rlkit.sweeps.study import open_study

TABLE, PAGE = "table.csv", "report.html"
MAX_CURVES = 6  # learning curves are drawn for this many of the best points
MAX_TICKS = 6  # a logarithmic axis with more values has a tick at each power of ten instead of each value
MIN_LOG_RATIO = 10  # largest by smallest value from which an axis is logarithmic
LEARNING_RATE = re.compile(r"(learning_rate|(^|[._])lr)$")
MIN_POINTS_FOR_IMPORTANCE = 4  # finished points; from fewer, the estimate is noise


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return a row for each point that has been started, the best one first."""
    table = []
    for point in points:
        keys, outcome = point.keys(), point.outcome()
        if keys is None:
            continue
        by_seed = {seed: point.value(seed) for seed in point.sweep.seeds}
        values = [value for value in by_seed.values() if value is not None]
        table.append(
            {
                "point": point.number,
                **keys,
                "state": outcome.state if outcome else "unfinished",
                "mean": statistics.fmean(values) if values else None,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                **{f"seed {seed}": value for seed, value in by_seed.items()},
                "error": outcome.error if outcome else None,
                "folder": str(point.folder),
            }
        )
    return sorted(table, key=lambda row: _order(row, points[0].sweep.direction))


def _order(row: dict[str, Any], direction: str) -> tuple[bool, bool, float]:
    """Return a sort key: finished points first, points without a value last, then by value."""
    value = row["mean"] if row["mean"] is not None else 0.0
    return row["state"] != FINISHED, row["mean"] is None, -value if direction == "maximize" else value


def importance(sweep: Sweep) -> dict[str, float]:
    """Return the share of the values' variance that each key explains (PED-ANOVA, arXiv 2304.10255).

    It is empty for fewer than `MIN_POINTS_FOR_IMPORTANCE` finished points, or if all have the same value.
    """
    study = open_study(sweep)
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(finished) < MIN_POINTS_FOR_IMPORTANCE or len({trial.value for trial in finished}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)


def collect(sweep: Sweep, points: Sequence[Point], table: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the table and the page of a sweep from the result of `rows`, and return their paths."""
    names = column_names(table, objective_name(points))
    text = io.StringIO()
    if table:
        writer = csv.writer(text)
        writer.writerow(names.values())
        writer.writerows([row[column] for column in names] for row in table)
    atomic_write(sweep.folder / TABLE, text.getvalue())

    cells = []
    for row in table:
        # Values of keys are shown in full: two learning rates must not look the same.
        cells.append({name: str(v) if name in sweep.keys else format_cell(v) for name, v in row.items()})
    best = [row for row in table[:MAX_CURVES] if row["state"] == FINISHED]
    panels = page_panels(sweep, points, table)
    html = template("sweep.html").render(
        title=sweep.folder.name,
        headline=headline(sweep, points, table),
        columns={column: name for column, name in names.items() if column != "folder"},
        rows=cells,
        curves=[{"name": f"point {row['point']}", "color": color_of(i)} for i, row in enumerate(best)],
        panels=panels,
        data={"figures": panels},
        css=trusted("page.css"),
        js=trusted("page.js"),
        plotly=plotly_js(),
    )
    atomic_write(sweep.folder / PAGE, html)
    return sweep.folder / TABLE, sweep.folder / PAGE


def column_names(table: Sequence[dict[str, Any]], objective: str) -> dict[str, str]:
    """Return the columns of the table with their headers, which name the objective."""
    headers = {"mean": f"mean {objective}", "deviation": f"deviation of {objective}"}
    return {column: headers.get(column, column) for column in (table[0] if table else {})}


def headline(sweep: Sweep, points: Sequence[Point], table: Sequence[dict[str, Any]]) -> str:
    """Return one or two sentences: the number of finished points, and the best one."""
    finished = [row for row in table if row["state"] == FINISHED]
    num_failed = sum(row["state"] == FAILED for row in table)
    text = f"{len(finished)} of {len(points)} points finished"
    text += f", {num_failed} failed." if num_failed else "."
    if not finished:
        return text
    best = finished[0]
    keys = ", ".join(f"{key} {best[key]}" for key in sweep.keys)
    text += f" Best: {keys}, {objective_name(points)} {best['mean']:.4g}"
    if best["deviation"] is not None:
        text += f" ± {best['deviation']:.2g} over {len(sweep.seeds)} seeds"
    return f"{text}."


def format_cell(value: object) -> str:
    """Return a value of the table with four significant digits; None becomes empty."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page_panels(sweep: Sweep, points: Sequence[Point], table: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the plots of a sweep: key importance, the objective against each key, and the best curves.

    Keys that have the same value in all finished points are not plotted.
    """
    panels = []
    finished = [row for row in table if row["state"] == FINISHED]
    varied = [key for key in sweep.keys if len({json.dumps(row[key]) for row in finished}) > 1]
    weights = {key: weight for key, weight in importance(sweep).items() if key in varied}
    if weights:
        bars = {
            "type": "bar",
            "orientation": "h",
            "x": list(weights.values())[::-1],
            "y": list(weights)[::-1],
        }
        axes = {"xaxis": {"title": "share of the variance that the key explains"}, "yaxis": {"title": ""}}
        panels.append(panel("Importance of each key", "PED-ANOVA over finished points.", [bars], axes))
    for key in varied:
        panels.append(_objective_panel(sweep, key, finished, objective_name(points)))
    runs = [read_run(points[row["point"]].run_dir(sweep.seeds[0])) for row in finished[:MAX_CURVES]]
    return panels + (learning_panels(runs) if runs else [])


def _objective_panel(sweep: Sweep, key: str, finished: Sequence[dict[str, Any]], objective: str) -> Panel:
    """Return the objective of each finished point against one key."""
    values = [row[key] for row in finished]
    deviations = [row["deviation"] or 0.0 for row in finished]
    axis: dict[str, Any] = {"title": key}
    if not all(map(_is_number, values)):
        values = [value if isinstance(value, str) else json.dumps(value) for value in values]
        axis["type"] = "category"
    elif _on_log_scale(key, values, sweep.keys[key]):
        axis |= {"type": "log", "exponentformat": "e"}
        distinct = sorted(set(values))
        if len(distinct) <= MAX_TICKS:
            axis |= {"tickvals": distinct, "ticktext": [f"{value:.4g}" for value in distinct]}
        elif distinct[-1] / distinct[0] >= 100:
            axis["dtick"] = 1  # powers of ten only: plotly labels the ticks in between "2" instead of "2e-5"
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": [row["mean"] for row in finished],
        "error_y": {"type": "data", "array": deviations, "visible": any(deviations), "thickness": 1},
        "text": [f"point {row['point']}" for row in finished],
    }
    layout = {"xaxis": axis, "yaxis": {"title": objective}}
    return panel(f"{objective} against {key}", "One dot per point.", [dots], layout)


def _on_log_scale(key: str, values: Sequence[float], domain: list[Any] | dict[str, Any]) -> bool:
    """Return whether a key's axis is logarithmic: if declared so, for learning rates, and for wide ranges."""
    if min(values) <= 0:
        return False
    if isinstance(domain, dict) and domain.get("log"):
        return True
    return bool(LEARNING_RATE.search(key)) or max(values) / min(values) >= MIN_LOG_RATIO


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
