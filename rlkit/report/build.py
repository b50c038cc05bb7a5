"""Assembly of the report's page from its template, plots and tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup

from rlkit.errors import UserError
from rlkit.files import atomic_write
from rlkit.report.figures import breakdown_panels, color_of, health_panels, learning_panels, reward_panels
from rlkit.report.run import read_run
from rlkit.report.summary import evaluation_rows, facts, headline
from rlkit.report.table import rollout_table

HERE = Path(__file__).parent


def build_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about one or more runs and return its path.

    The page is self-contained: plotly.js is inside, and nothing is loaded from the network.

    Args:
        run_dirs: Run directories, in the order of the page.
        out: Path of the page. Defaults to `report.html` in the run directory, or for several runs next to the
            first run directory.

    Raises:
        UserError: If there is no run, a path is not a run directory, or plotly is not installed.
    """
    if not run_dirs:
        raise UserError("a report needs at least one run directory")
    run_dirs = [Path(path) for path in run_dirs]
    runs = [read_run(path) for path in run_dirs]
    sections = (
        ("Learning", "wide", learning_panels(runs)),
        ("Held-out results", "wide", breakdown_panels(runs)),
        ("Rewards", "small", reward_panels(runs)),
        ("Training", "small", health_panels(runs)),
    )
    table = rollout_table(runs)
    if out is None:
        out = (run_dirs[0] if len(runs) == 1 else run_dirs[0].parent) / "report.html"
    page = template("page.html").render(
        title=" · ".join(run.name for run in runs),
        runs=[
            {
                "name": run.name,
                "color": color_of(i),
                "path": run.path,
                "rollouts": link(run.path / "rollouts", out),
                "files": len(list((run.path / "rollouts").glob("*.parquet"))),
                "headline": headline(run),
                "facts": facts(run),
                "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
                "notes": run.notes,  # comes last: `headline` may add one
            }
            for i, run in enumerate(runs)
        ],
        evaluations=evaluation_rows(runs),
        sections=[section for section in sections if section[2]],
        table=table,
        data={"rows": table["rows"], "figures": [panel for *_, panels in sections for panel in panels]},
        css=trusted("page.css"),
        js=trusted("page.js"),
        plotly=plotly_js(),
    )
    atomic_write(out, page)
    return out


def template(name: str) -> jinja2.Template:
    """Return the template of a page.

    Model outputs are untrusted HTML, so everything is escaped except the files that `trusted` reads.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template(name)


def plotly_js() -> Markup:
    """Return the source of plotly.js; raise UserError if the package plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("reports need plotly: pip install plotly") from None
    return Markup(get_plotlyjs())


def link(folder: Path, page: Path) -> str:
    """Return the URL of a folder, relative to the page."""
    return quote(Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()) + "/"


def trusted(name: str) -> Markup:
    """Return a file of this package as markup that is not escaped."""
    return Markup((HERE / name).read_text(encoding="utf-8"))
