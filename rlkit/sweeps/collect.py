"""The results of a sweep: one table and one page."""

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
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlkit.files import atomic_write
from rlkit.report.build import template, trusted
from rlkit.report.figures import Panel, colour, learning_panels, panel
from rlkit.report.run import read_run
from rlkit.sweeps.point import Point, objective_name
from rlkit.sweeps.spec import FAILED, FINISHED, Sweep
from rlkit.sweeps.study import open_study

TABLE, PAGE = "table.csv", "report.html"
SHOWN = 6  # points whose learning curves are drawn, the best ones
MOST_TICKS = 6  # values of a logarithmic axis that are labeled one by one
LOG_RATIO = 10  # of the largest value to the smallest, from which an axis is logarithmic
RATE = re.compile(r"(learning_rate|(^|[._])lr)$")
LEAST = 4  # finished points below which nothing is said of the keys' importance


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return one row for each point that was begun, the best first."""
    found = []
    for point in points:
        keys, outcome = point.keys(), point.outcome()
        if keys is None:
            continue
        by_seed = {seed: point.value(seed) for seed in point.sweep.seeds}
        known = [value for value in by_seed.values() if value is not None]
        found.append(
            {
                "point": point.number,
                **keys,
                "state": outcome.state if outcome else "unfinished",
                "mean": statistics.fmean(known) if known else None,
                "deviation": statistics.stdev(known) if len(known) > 1 else None,
                **{f"seed {seed}": value for seed, value in by_seed.items()},
                "error": outcome.error if outcome else None,
                "folder": str(point.folder),
            }
        )
    return sorted(found, key=lambda row: _order(row, points[0].sweep.direction))


def _order(row: dict[str, Any], direction: str) -> tuple[bool, bool, float]:
    value = row["mean"] if row["mean"] is not None else 0.0
    return row["state"] != FINISHED, row["mean"] is None, -value if direction == "maximize" else value


def importance(sweep: Sweep) -> dict[str, float]:
    """How much of the spread of the values each key explains (PED-ANOVA); empty for too few points."""
    study = open_study(sweep)
    finished = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if len(finished) < LEAST or len({trial.value for trial in finished}) < 2:
        return {}
    return optuna.importance.get_param_importances(study)


def collect(sweep: Sweep, points: Sequence[Point], found: Sequence[dict[str, Any]]) -> tuple[Path, Path]:
    """Write the table and the page of what `rows` found, and return their paths."""
    names = column_names(found, objective_name(points))
    text = io.StringIO()
    if found:
        writer = csv.writer(text)
        writer.writerow(names.values())
        writer.writerows([row[column] for column in names] for row in found)
    atomic_write(sweep.folder / TABLE, text.getvalue())
    page = sweep.folder / PAGE
    panels = page_panels(sweep, points, found)
    html = template("sweep.html").render(
        title=sweep.folder.name,
        headline=headline(sweep, points, found),
        columns={column: name for column, name in names.items() if column != "folder"},
        rows=[
            {name: str(value) if name in sweep.keys else shown(value) for name, value in row.items()}
            for row in found
        ],
        curves=[
            {"name": f"point {row['point']}", "colour": colour(i)}
            for i, row in enumerate(row for row in found[:SHOWN] if row["state"] == FINISHED)
        ],
        panels=panels,
        data={"figures": panels},
        css=trusted("page.css"),
        js=trusted("page.js"),
        plotly=Markup(get_plotlyjs()),
    )
    atomic_write(page, html)
    return sweep.folder / TABLE, page


def column_names(found: Sequence[dict[str, Any]], objective: str) -> dict[str, str]:
    """Return the columns of the table with the names that users read: `mean` is the mean of what?"""
    named = {"mean": f"mean {objective}", "deviation": f"deviation of {objective}"}
    return {column: named.get(column, column) for column in (found[0] if found else {})}


def headline(sweep: Sweep, points: Sequence[Point], found: Sequence[dict[str, Any]]) -> str:
    """What was found, in a sentence or two."""
    ended = [row for row in found if row["state"] == FINISHED]
    failed = sum(row["state"] == FAILED for row in found)
    text = (
        f"{len(ended)} of {len(points)} points are finished" + (f", {failed} failed" if failed else "") + "."
    )
    if not ended:
        return text
    best = ended[0]
    keys = ", ".join(f"{key} {best[key]}" for key in sweep.keys)
    spread = (
        f" ± {best['deviation']:.2g} over {len(sweep.seeds)} seeds" if best["deviation"] is not None else ""
    )
    return f"{text} Best: {keys}, {objective_name(points)} {best['mean']:.4g}{spread}."


def shown(value: object) -> str:
    """A value of the table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def page_panels(sweep: Sweep, points: Sequence[Point], found: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the plots of a sweep: importance and values of the keys that vary, and the best curves."""
    panels = []
    ended = [row for row in found if row["state"] == FINISHED]
    varied = [key for key in sweep.keys if len({json.dumps(row[key]) for row in ended}) > 1]
    weights = {key: weight for key, weight in importance(sweep).items() if key in varied}
    if weights:
        bars = {
            "type": "bar",
            "orientation": "h",
            "x": list(weights.values())[::-1],
            "y": list(weights)[::-1],
        }
        axes = {"xaxis": {"title": "share of the spread that the key explains"}, "yaxis": {"title": ""}}
        panels.append(panel("Importance of each key", "PED-ANOVA, of finished points.", [bars], axes))
    for key in varied:
        panels.append(_against(sweep, key, ended, objective_name(points)))
    best = [row["point"] for row in ended[:SHOWN]]
    runs = [read_run(points[number].run_dir(sweep.seeds[0])) for number in best]
    return panels + (learning_panels(runs) if runs else [])


def _against(sweep: Sweep, key: str, ended: Sequence[dict[str, Any]], objective: str) -> Panel:
    values = [row[key] for row in ended]
    deviations = [row["deviation"] or 0.0 for row in ended]
    axis: dict[str, Any] = {"title": key}
    if not all(map(_is_number, values)):
        values = [value if isinstance(value, str) else json.dumps(value) for value in values]
        axis["type"] = "category"
    elif _on_log_scale(key, values, sweep.keys[key]):
        axis |= {"type": "log", "exponentformat": "e"}
        distinct = sorted(set(values))
        if len(distinct) <= MOST_TICKS:
            axis |= {"tickvals": distinct, "ticktext": [f"{value:.4g}" for value in distinct]}
        elif distinct[-1] / distinct[0] >= 100:
            axis["dtick"] = 1  # powers of ten alone: plotly shortens 2e-5 between them to "2"
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": [row["mean"] for row in ended],
        "error_y": {"type": "data", "array": deviations, "visible": any(deviations), "thickness": 1},
        "text": [f"point {row['point']}" for row in ended],
    }
    layout = {"xaxis": axis, "yaxis": {"title": objective}}
    return panel(f"{objective} against {key}", "A dot for each point.", [dots], layout)


def _on_log_scale(key: str, values: Sequence[float], values_or_range: list[Any] | dict[str, Any]) -> bool:
    """Return whether an axis of these numbers is logarithmic: those of learning rates and their like."""
    if min(values) <= 0:
        return False
    declared = isinstance(values_or_range, dict) and bool(values_or_range.get("log"))
    return declared or bool(RATE.search(key)) or max(values) / min(values) >= LOG_RATIO


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
