import json

import pytest

from rlkit.report.figures import (
    breakdown_panels,
    environment_panels,
    health_panels,
    learning_panels,
    reward_panels,
)
from rlkit.report.run import read_run


def titles(panels):
    return [panel["title"] for panel in panels]


def test_run_has_the_panels_of_its_metrics(make_run):
    runs = [read_run(make_run(steps=40))]
    assert titles(learning_panels(runs)) == ["correct", "Reward"]
    assert titles(breakdown_panels(runs)) == ["correct by level", "correct by relevant size"]
    assert titles(reward_panels(runs)) == ["correct", "correct: errors", "format"]
    assert "Warm start: loss" in titles(health_panels(runs))


def test_panels_are_named_for_the_metric(make_run):
    runs = [read_run(make_run(steps=10, metric="ndcg"))]
    curves, *bars = [learning_panels(runs)[0], *breakdown_panels(runs)]
    assert titles([curves, *bars]) == ["ndcg", "ndcg by level", "ndcg by relevant size"]
    for panel in (curves, *bars):
        assert panel["layout"]["yaxis"]["title"] == {"text": "mean ndcg"}
    assert "accuracy" not in json.dumps([curves, *bars]).lower()


def test_runs_with_different_metrics_have_separate_panels(make_run):
    runs = [read_run(make_run(name, steps=10, metric=name)) for name in ("correct", "ndcg")]
    assert titles(learning_panels(runs)) == ["correct", "ndcg", "Reward"]
    for name, panel in zip(("correct", "ndcg"), learning_panels(runs), strict=False):
        assert [trace["name"] for trace in panel["traces"]] == [name, f"{name}, held out"]
    assert titles(breakdown_panels(runs)) == [
        "correct by level",
        "correct by relevant size",
        "ndcg by level",
        "ndcg by relevant size",
    ]
    names = [trace["name"] for trace in breakdown_panels(runs)[2]["traces"]]
    assert names == ["ndcg, before", "ndcg, after"]


def test_rank_run_has_its_own_curves_and_both_held_out_points(make_run):
    runs = [read_run(make_run(steps=12, metric="ndcg", objective="infonce"))]
    held_out, utility = learning_panels(runs)
    assert held_out["title"] == "ndcg" and held_out["note"].startswith("Diamonds")
    (points,) = held_out["traces"]
    assert points["x"] == [0, 12] and points["text"] == ["before", "after"]
    assert utility["title"] == "Utility of the sampled rankings" and len(utility["traces"][0]["x"]) == 12
    assert titles(health_panels(runs)) == ["Loss", "Gradient norm", "Learning rate"]


def test_train_and_rank_runs_share_panels(make_run):
    runs = [read_run(make_run("lm", steps=20, metric="ndcg"))]
    runs.append(read_run(make_run("encoder", steps=12, metric="ndcg", objective="plackett_luce")))
    panels = learning_panels(runs)
    assert titles(panels) == ["ndcg", "Reward", "Utility of the sampled rankings"]
    held_out = {trace["name"]: trace["x"] for trace in panels[0]["traces"] if trace["mode"] == "markers"}
    assert held_out == {"lm, held out": [0, 20], "encoder, held out": [0, 12]}


def test_held_out_points_are_drawn_at_their_steps(make_run):
    runs = [read_run(make_run(steps=40, evaluations=("before", "step-20", "after", "other")))]
    points = learning_panels(runs)[0]["traces"][-1]
    assert points["x"] == [0, 20, 40] and points["text"] == ["before", "step-20", "after"]
    assert all(low > 0 for low in points["error_y"]["arrayminus"])


def test_long_curve_has_a_running_mean_over_its_raw_values(make_run):
    runs = [read_run(make_run(steps=100, rollouts=0))]
    raw, running = learning_panels(runs)[1]["traces"]
    assert raw["opacity"] < 1 and len(raw["y"]) == len(running["y"]) == 100


def test_each_run_has_one_color(make_run):
    runs = [read_run(make_run(name, steps=5)) for name in ("a", "b")]
    first, second = learning_panels(runs)[1]["traces"]
    assert first["line"]["color"] != second["line"]["color"]
    names = [trace["name"] for trace in breakdown_panels(runs)[0]["traces"]]
    assert names == ["a, before", "a, after", "b, before", "b, after"]


def test_run_without_logs_has_no_panels(make_run):
    path = make_run(steps=1, evaluations=(), rollouts=0)
    (path / "metrics.jsonl").unlink()
    runs = [read_run(path)]
    assert learning_panels(runs) == breakdown_panels(runs) == reward_panels(runs) == health_panels(runs) == []


def test_health_panels_include_metrics_of_the_environment(make_run):
    run = make_run(steps=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "train" and line["step"] > 0]
    for line in steps:
        line["environment/noise"] = line["step"] / 8
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (panel,) = (panel for panel in health_panels([read_run(run)]) if panel["title"] == "Noise")
    assert panel["traces"][0]["x"] == [1, 2, 3, 4] and panel["traces"][0]["y"] == [0.125, 0.25, 0.375, 0.5]


def test_time_panel_stacks_the_parts_of_a_step(make_run):
    timed, untimed = make_run(steps=4), make_run("untimed", steps=4)
    lines = [json.loads(line) for line in (timed / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "train" and line["step"] > 0]
    for step, line in enumerate(steps):
        line |= {"time/generation": 3.0 + step % 2, "time/forward_backward": 5.0}
    (timed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [read_run(timed), read_run(untimed)]
    panel = next(panel for panel in health_panels(runs) if panel["title"] == "Where the time goes")
    assert panel["layout"]["barmode"] == "stack"
    bars = {trace["name"]: trace["x"] for trace in panel["traces"]}
    assert bars == {"generation": [3.5, 0.0], "forward and backward": [5.0, 0.0]}
    assert "Where the time goes" not in titles(health_panels(runs[1:]))


def test_environment_panels_include_the_plots_of_query_v2(make_run):
    """query-v4 plots its metric against the share of augmented queries."""
    path = make_run(steps=4, evaluations=("before", "after"))
    assert environment_panels([read_run(path)]) == []
    (path / "config.yaml").write_text("environment: query-v4\n")
    assert environment_panels([read_run(path)]) == []
    for name, share, gain in (("before", 0.9, -0.1), ("after", 0.4, 0.2)):
        file = path / "evaluation" / f"{name}.json"
        evaluation = json.loads(file.read_text())
        evaluation["rewards"] |= {"augmented": share, "gain": gain}
        file.write_text(json.dumps(evaluation))
    run = read_run(path)
    (panel,) = environment_panels([run])
    (trace,) = panel["traces"]
    assert trace["text"] == ["never", "before", "after"] and trace["x"] == [0, 0.9, 0.4]
    means = [run.evaluations[name].accuracy.mean for name in ("before", "after")]
    assert trace["y"] == pytest.approx([means[0] + 0.1, *means], rel=1e-5)
    assert panel["layout"]["xaxis"]["title"] == {"text": "share of augmented queries"}
    assert "retrieval against the share of augmented queries" in titles(learning_panels([run]))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no disk')", "OSError: no disk"),
        ("return [{'title': 'x'}]", "TypeError"),
    ],
)
def test_failing_environment_panels_become_a_note(make_run, tmp_path, code, reason):
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlkit import Environment\n\n\nclass Mine(Environment):\n    @classmethod\n"
        f"    def report_panels(cls, runs):\n        {code}\n"
    )
    path = make_run(steps=4, evaluations=("before", "after"))
    (path / "config.yaml").write_text(f"environment: {file}:Mine\n")
    run = read_run(path)
    assert environment_panels([run]) == []
    (note,) = run.notes
    assert "are missing" in note and reason in note
    file.unlink()
    (path / "config.yaml").write_text("environment: moved.py:Mine\n")
    run = read_run(path)
    assert environment_panels([run]) == [] and run.notes == []
