"""The page of a sweep in a real browser: what was found, its plots, and all points, the best first."""

import csv
import json

import pytest
from playwright.sync_api import expect

from rlkit.sweeps.collect import collect, headline, rows
from rlkit.sweeps.point import FAILED, FINISHED, Outcome, Point
from rlkit.sweeps.spec import Sweep
from rlkit.sweeps.study import open_study, suggest
from tests.rlkit.report.conftest import write_run

HOSTILE = "<img src=x onerror=\"document.title='broken out'\">"


@pytest.fixture
def sweep(tmp_path):
    """Six points of two keys with two seeds each; more with a higher rate, and one that failed."""
    keys = {"learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}, "num_generations": [4, 8]}
    sweep = Sweep(
        "base.yaml", keys, search="random", trials=6, seeds=[0, 1], output_dir=str(tmp_path / "sweep")
    )
    for number in range(6):
        point, study = Point(sweep, number), open_study(sweep, number)
        point.folder.mkdir(parents=True)
        trial = study.ask()
        found = suggest(sweep, trial)
        (point.folder / "point.json").write_text(json.dumps({"trial": trial.number, "keys": found}))
        if number == 5:
            point._end(trial, Outcome(FAILED, error=f"ValueError: {HOSTILE}"))
            continue
        for seed in sweep.seeds:
            write_run(point.run_dir(seed), steps=10, gain=0.1 + 0.12 * number, seed=10 * number + seed)
        values = {str(seed): point.value(seed) for seed in sweep.seeds}
        point._end(trial, Outcome(FINISHED, sum(values.values()) / 2, values))
    return sweep


def test_rows_are_sorted_and_show_each_seed(sweep):
    points = [Point(sweep, number) for number in range(6)]
    found = rows(points)
    means = [row["mean"] for row in found[:5]]
    assert means == sorted(means, reverse=True) and found[5]["state"] == FAILED
    for row in found[:5]:
        assert row["mean"] == pytest.approx((row["seed 0"] + row["seed 1"]) / 2)
        assert row["deviation"] == pytest.approx(abs(row["seed 0"] - row["seed 1"]) / 2**0.5)
    text = headline(sweep, points, found)
    assert "5 of 6 points are finished, 1 failed" in text and "over 2 seeds" in text
    sweep.direction = "minimize"
    assert [row["mean"] for row in rows(points)[:5]] == sorted(means)


def test_the_page(open_page, sweep):
    points = [Point(sweep, number) for number in range(6)]
    table, path = collect(sweep, points, rows(points))
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == 6
    page = open_page(path)
    assert "broken out" not in page.title()
    expect(page.locator("p.sentence")).to_contain_text("5 of 6 points are finished")
    titles = page.locator("figcaption").all_inner_texts()
    assert any("Importance of each key" in title for title in titles)
    assert any("Accuracy against learning_rate" in title for title in titles)
    for i in range(page.locator(".plot").count()):
        shapes = page.locator(f"#figure-{i}").locator(".scatterlayer .trace path, .barlayer .point path")
        assert shapes.count() > 0, titles[i]
    assert page.locator(".legend span .dot").count() == 5
    assert page.locator("tbody tr").count() == 6
    expect(page.locator("tbody tr").last).to_contain_text("<img src=x")


def test_a_sweep_that_has_not_begun(open_page, tmp_path):
    sweep = Sweep("base.yaml", {"beta": [0, 1]}, output_dir=str(tmp_path / "sweep"))
    open_study(sweep)
    page = open_page(collect(sweep, [Point(sweep, 0), Point(sweep, 1)], [])[1])
    expect(page.locator("p.sentence")).to_contain_text("0 of 2 points are finished")
