"""The page of a sweep in a real browser: headline, plots, and the table of points, best first."""

import csv
import json

import pytest
from playwright.sync_api import expect

from rlkit.errors import UserError
from rlkit.sweeps.collect import collect, headline, page_panels, rows
from rlkit.sweeps.point import Outcome, Point, objective_name
from rlkit.sweeps.spec import FAILED, FINISHED, Sweep
from rlkit.sweeps.study import open_study, start_trial, suggest
from tests.rlkit.report.conftest import write_run

HOSTILE = "<img src=x onerror=\"document.title='broken out'\">"


@pytest.fixture
def finished(tmp_path):
    """Return a function that writes a sweep with a finished point for each of `values`.

    `objective` is the sweep's objective, `ranking` that of `rlkit rank`; `options` are those of `write_run`.
    """

    def finished(keys, values, objective=None, ranking=None, **options):
        sweep = Sweep("base.yaml", keys, objective=objective, output_dir=str(tmp_path / "sweep"))
        study = open_study(sweep)
        points = [Point(sweep, number) for number in range(len(values))]
        for point, point_keys in zip(points, values, strict=True):
            point.folder.mkdir(parents=True)
            (point.folder / "point.json").write_text(json.dumps({"keys": point_keys}))
            write_run(point.run_dir(0), steps=4, tasks=30, seed=point.number, objective=ranking, **options)
            value = point.value(0)
            trial = start_trial(study, sweep, point.number, point_keys)
            assert suggest(sweep, trial) == point_keys
            point.record(trial, Outcome(FINISHED, value, {"0": value}))
        return sweep, points

    return finished


@pytest.fixture
def sweep(tmp_path):
    """Sweep over two keys with two seeds: five finished points, each better than the last, and a failure."""
    keys = {"learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}, "num_generations": [4, 8]}
    sweep = Sweep(
        "base.yaml", keys, search="random", trials=6, seeds=[0, 1], output_dir=str(tmp_path / "sweep")
    )
    for number in range(6):
        point, study = Point(sweep, number), open_study(sweep, number)
        point.folder.mkdir(parents=True)
        trial = study.ask()
        point_keys = suggest(sweep, trial)
        (point.folder / "point.json").write_text(json.dumps({"trial": trial.number, "keys": point_keys}))
        if number == 5:
            point.record(trial, Outcome(FAILED, error=f"ValueError: {HOSTILE}"))
            continue
        for seed in sweep.seeds:
            write_run(point.run_dir(seed), steps=10, gain=0.1 + 0.12 * number, seed=10 * number + seed)
        values = {str(seed): point.value(seed) for seed in sweep.seeds}
        point.record(trial, Outcome(FINISHED, sum(values.values()) / 2, values))
    return sweep


def test_rows_are_sorted_and_have_each_seed(sweep):
    points = [Point(sweep, number) for number in range(6)]
    table = rows(points)
    means = [row["mean"] for row in table[:5]]
    assert means == sorted(means, reverse=True) and table[5]["state"] == FAILED
    for row in table[:5]:
        assert row["mean"] == pytest.approx((row["seed 0"] + row["seed 1"]) / 2)
        assert row["deviation"] == pytest.approx(abs(row["seed 0"] - row["seed 1"]) / 2**0.5)
    text = headline(sweep, points, table)
    assert "5 of 6 points finished, 1 failed." in text and "over 2 seeds" in text
    sweep.direction = "minimize"
    assert [row["mean"] for row in rows(points)[:5]] == sorted(means)


def test_page_shows_headline_plots_and_points(open_page, sweep):
    points = [Point(sweep, number) for number in range(6)]
    table, path = collect(sweep, points, rows(points))
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == 6
    page = open_page(path)
    assert "broken out" not in page.title()
    expect(page.locator("p.sentence")).to_contain_text("5 of 6 points finished")
    titles = page.locator("figcaption").all_inner_texts()
    assert any("Importance of each key" in title for title in titles)
    assert any("correct against learning_rate" in title for title in titles)
    for i in range(page.locator(".plot").count()):
        shapes = page.locator(f"#figure-{i}").locator(".scatterlayer .trace path, .barlayer .point path")
        assert shapes.count() > 0, titles[i]
    assert not any("ccuracy" in title for title in titles)
    assert page.locator(".legend span .dot").count() == 5
    assert page.locator("tbody tr").count() == 6
    expect(page.locator("tbody tr").last).to_contain_text("<img src=x")


def test_page_of_a_sweep_without_started_points(open_page, tmp_path):
    sweep = Sweep("base.yaml", {"beta": [0, 1]}, output_dir=str(tmp_path / "sweep"))
    open_study(sweep)
    page = open_page(collect(sweep, [Point(sweep, 0), Point(sweep, 1)], [])[1])
    expect(page.locator("p.sentence")).to_contain_text("0 of 2 points finished")


def axes(sweep, points):
    """Return the x axes of the plots of the objective against a key, by key."""
    panels = page_panels(sweep, points, rows(points))
    layouts = {panel["title"]: panel["layout"] for panel in panels if " against " in panel["title"]}
    return {title.split(" against ")[1]: layout["xaxis"] for title, layout in layouts.items()}


def test_page_names_the_metric(finished):
    sweep, points = finished({"beta": [0.1, 0.2]}, [{"beta": 0.1}, {"beta": 0.2}], metric="ndcg")
    assert objective_name(points) == "ndcg"
    assert ", ndcg 0." in headline(sweep, points, rows(points))
    panels = {panel["title"]: panel for panel in page_panels(sweep, points, rows(points))}
    assert panels["ndcg against beta"]["layout"]["yaxis"]["title"] == {"text": "ndcg"}
    assert "ndcg" in panels and "ccuracy" not in json.dumps(panels)
    table, page = collect(sweep, points, rows(points))
    with table.open() as file:
        assert [float(row["mean ndcg"]) for row in csv.DictReader(file)] == sorted(
            (point.value(0) for point in points), reverse=True
        )
    text = page.read_text(encoding="utf-8")
    assert "<th>mean ndcg</th><th>deviation of ndcg</th>" in text


def test_page_names_a_reward_that_is_the_objective(finished):
    sweep, points = finished(
        {"beta": [0.1, 0.2]}, [{"beta": 0.1}, {"beta": 0.2}], objective="format", metric="ndcg"
    )
    assert [point.value(0) for point in points] == [0.9, 0.9]
    assert "format 0.9." in headline(sweep, points, rows(points))
    assert "format against beta" in [panel["title"] for panel in page_panels(sweep, points, rows(points))]


def test_rows_reject_an_unknown_objective(finished):
    sweep, points = finished({"beta": [0.1, 0.2]}, [{"beta": 0.1}, {"beta": 0.2}], metric="ndcg")
    sweep.objective = "accuracy"
    with pytest.raises(UserError, match=r"unknown objective 'accuracy' .*remove objective .*ndcg") as caught:
        rows(points)
    assert "\n" not in str(caught.value)


def test_page_omits_plots_of_constant_keys(finished):
    keys = {"beta": [0.1, 0.2, 0.3, 0.4], "max_steps": [200], "optim": ["adamw_torch", "sgd"]}
    values = [{"beta": beta, "max_steps": 200, "optim": "sgd"} for beta in keys["beta"]]
    sweep, points = finished(keys, values)
    assert list(axes(sweep, points)) == ["beta"]
    (bars,) = (p for p in page_panels(sweep, points, rows(points)) if p["title"] == "Importance of each key")
    assert bars["traces"][0]["y"] == ["beta"]


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("learning_rate", [1e-5, 2e-5], "log"),
        ("optim_args.embedding_lr", [0.1, 0.2], "log"),
        ("adapter_learning_rate", [0.1, 0.2], "log"),
        ("adapter_rank", [4, 16, 64], "log"),
        ("num_generations", [4, 8], None),
        ("color", [4, 8], None),
        ("beta", [0.0, 0.001, 0.1], None),
        ("learning_rate", [0.0, 1e-5], None),
        ("offset", [-10.0, 1.0, 100.0], None),
        ("optim", ["sgd", "1"], "category"),
        ("shuffle_dataset", [False, True], "category"),
        ("max_steps", [1, "100"], "category"),
        ("lora_target_modules", [["q"], ["q", "v"]], "category"),
    ],
)
def test_axis_of_a_key_is_logarithmic_for_rates_and_wide_ranges(finished, key, values, scale):
    sweep, points = finished({key: values}, [{key: value} for value in values])
    assert axes(sweep, points)[key].get("type") == scale


def test_axis_of_a_key_declared_log_is_logarithmic(finished):
    declared = {"low": 2.0, "high": 6.0, "log": True}
    sweep, points = finished({"temperature": declared}, [{"temperature": 2.5}, {"temperature": 5.0}])
    axis = axes(sweep, points)["temperature"]
    assert axis["type"] == "log" and axis["ticktext"] == ["2.5", "5"]


def test_logarithmic_axis_has_ticks_at_the_values(open_page, finished):
    rates = [1e-5, 2e-5, 4e-5]
    sweep, points = finished({"learning_rate": rates}, [{"learning_rate": rate} for rate in rates])
    page = open_page(collect(sweep, points, rows(points))[1])
    plot = page.locator("#figure-0")
    assert plot.locator(".points path").count() == 3
    assert plot.locator(".xtick text").all_text_contents() == ["1e-05", "2e-05", "4e-05"]


def test_page_of_rank_runs_shows_their_results_after_training(open_page, finished):
    values = [{"temperature": 0.01}, {"temperature": 0.05}]
    sweep, points = finished({"temperature": [0.01, 0.05]}, values, metric="ndcg", ranking="infonce")
    panels = {panel["title"]: panel for panel in page_panels(sweep, points, rows(points))}
    held_out = [trace for trace in panels["ndcg"]["traces"] if trace["mode"] == "markers"]
    assert [trace["x"] for trace in held_out] == [[0, 4], [0, 4]]
    assert "Utility of the sampled rankings" in panels
    open_page(collect(sweep, points, rows(points))[1])
