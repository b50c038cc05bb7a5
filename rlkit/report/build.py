"""Put the page of a report together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.report.figures import breakdown_panels, colour, health_panels, learning_panels, reward_panels
from rlkit.report.run import read_run
from rlkit.report.summary import evaluation_rows, facts, headline
from rlkit.report.table import rollout_table

HERE = Path(__file__).parent


def build_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about one run or several, and return its path.

    The page needs nothing but itself: plotly.js is inside. `out` defaults to `report.html` in the run
    directory, or beside the first one where there are several.

    Raises:
        UserError: no run is given, or a path is not a run directory.
    """
    if not run_dirs:
        raise UserError("a report needs a run directory")
    run_dirs = [Path(path) for path in run_dirs]
    runs = [read_run(path) for path in run_dirs]
    sections = (
        ("Learning", "wide", learning_panels(runs)),
        ("Held-out results", "wide", breakdown_panels(runs)),
        ("Rewards", "small", reward_panels(runs)),
        ("Training", "small", health_panels(runs)),
    )
    table = rollout_table(runs)
    out = out or (run_dirs[0] if len(runs) == 1 else run_dirs[0].parent) / "report.html"
    page = template("page.html").render(
        title=" · ".join(run.name for run in runs),
        runs=[
            {
                "name": run.name,
                "colour": colour(i),
                "path": run.path,
                "rollouts": link(run.path / "rollouts", out),
                "files": len(list((run.path / "rollouts").glob("*.parquet"))),
                "headline": headline(run),
                "facts": facts(run),
                "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
                "notes": run.notes,  # comes last: the headline may add one
            }
            for i, run in enumerate(runs)
        ],
        evaluations=evaluation_rows(runs),
        sections=[section for section in sections if section[2]],
        table=table,
        data={"rows": table["rows"], "figures": [panel for *_, panels in sections for panel in panels]},
        css=trusted("page.css"),
        js=trusted("page.js"),
        plotly=Markup(get_plotlyjs()),
    )
    atomic_write(out, page)
    return out


def template(name: str) -> jinja2.Template:
    """A page's template. Texts of models are hostile: everything is escaped but what `trusted` reads."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template(name)


def link(folder: Path, page: Path) -> str:
    """The address of a folder as it is written in a page."""
    return quote(Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()) + "/"


def trusted(name: str) -> Markup:
    """A file of this package, put into the page as it is."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
