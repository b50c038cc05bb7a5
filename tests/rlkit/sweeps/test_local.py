"""Sweeps of real runs on this machine: results, stop and resume, failure and retry; and the live table."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlkit.commands.sweep import main
from rlkit.sweeps.local import gpu_shares, live_view, table
from rlkit.sweeps.point import Outcome, Point, last_error
from rlkit.sweeps.spec import FAILED, FINISHED, Sweep, load_sweep
from tests.quick import ROOT
from tests.rlkit.report.conftest import write_run
from tests.waiting import wait_until


def read_table(sweep):
    with (sweep.folder / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "log, code, line",
    [
        ("rlkit: no tasks\n", 2, "rlkit: no tasks"),
        ("Traceback ...\n  x\nValueError: bad\nclosing\n", 1, "ValueError: bad"),
        ("[rank1]: a.OutOfMemoryError: 3 GiB\nx.ChildFailedError:\n==\n", 1, "a.OutOfMemoryError: 3 GiB"),
        ("step 3\n", -9, "killed by SIGKILL"),
        ("step 3\n", 1, "step 3"),
        ("", 1, "exit code 1"),
    ],
)
def test_last_error_finds_the_cause_in_a_log(log, code, line):
    assert last_error(log, code) == line


def test_gpu_shares_split_the_gpus_evenly():
    gpus = ["4", "5", "6", "7"]
    assert gpu_shares(2, gpus) == ["4,5", "6,7"] and gpu_shares(4, gpus) == gpus
    assert gpu_shares(3, gpus) == ["4", "5", "6,7"]
    assert gpu_shares(3, ["0", "1"]) == ["0", "1", "0"] and gpu_shares(2, []) == ["", ""]


def rendered(view):
    """Return what a terminal of 80 columns shows."""
    console = Console(width=80, file=io.StringIO())
    console.print(view)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return text


def cells(text, column):
    """Return the lines of a column of a rendered table, without the header."""
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return [line[column].strip() for line in lines]


@pytest.fixture
def begin(tmp_path):
    """Write the keys and the outcome of a new point, and return all points so far."""
    sweep = Sweep("base.yaml", {"beta": [0.0]}, output_dir=str(tmp_path / "sweep"))
    points: list[Point] = []

    def begin(keys=None, outcome=None):
        point = Point(sweep, len(points))
        point.folder.mkdir(parents=True)
        if keys is not None:
            (point.folder / "point.json").write_text(json.dumps({"keys": keys}))
        if outcome is not None:
            (point.folder / "outcome.json").write_text(json.dumps(vars(outcome)))
        points.append(point)
        return points

    return begin


def test_table_shows_every_key_and_value_in_full_at_80_columns(begin):
    keys = {
        "learning_rate": 1e-05,
        "weight_decay": 0.00012345678901234567,
        "environment_args.level": 3,
        "reward_args.length.level": 4,
        "lora_target_modules": ["q", "v"],
        "shuffle_dataset": False,
    }
    begin(keys)
    text = rendered(table(begin(keys, Outcome(FINISHED, value=0.51234))))
    lines = cells(text, 1)
    assert lines == [f"{key}={value}" for key, value in keys.items()] * 2
    assert "weight_decay=0.00012345678901234567" in lines
    assert "0.5123" in cells(text, 4) and "…" not in text


def test_table_folds_values_wider_than_80_columns(begin):
    model = "/" + "/".join(f"folder_{i}" for i in range(20)) + "/model[red]"
    prompt = "Answer in one word. " * 8 + "[/b] [q]"
    text = rendered(table(begin({"model_name_or_path": model, "system_prompt": prompt})))
    joined = "".join(cells(text, 1))
    assert f"model_name_or_path={model}" in joined
    assert f"system_prompt={prompt}".replace(" ", "") in joined.replace(" ", "")


def test_live_view_shows_long_errors_in_full_and_keys_unbroken(begin):
    error = "ValueError: " + "no such thing as [rank0] [/x], " * 9 + "at all"
    keys = {"environment_args.num_candidates": 20, "learning_rate": 1.5e-06}
    points = begin(keys, Outcome(FAILED, error=error))
    text = rendered(live_view(points))
    assert cells(text, 1) == [f"{key}={value}" for key, value in keys.items()]
    below = "".join(text.split("┘")[1].split())
    assert below == "".join(f"point 0 failed: {error} ({points[0].folder})".split())


def test_table_names_the_metric_as_soon_as_a_run_is_evaluated(begin):
    (point,) = begin({"beta": 0.1})
    header = rendered(table([point])).splitlines()[1]
    assert "held out" in header
    write_run(point.run_dir(0), steps=1, evaluations=("before",), metric="ndcg")
    header = rendered(table([point])).splitlines()[1]
    assert [cell.strip() for cell in header.split("┃")][1:-1] == ["point", "keys", "state", "step", "ndcg"]


def test_live_view_shows_running_points_first_and_waiting_points_last(begin):
    begin()
    begin({"beta": 0.1}, Outcome(FINISHED, value=0.5))
    text = rendered(live_view(begin({"beta": 0.2})))
    assert cells(text, 0) == ["2", "1", "0"]
    assert cells(text, 2) == ["seed 0", "finished", "waiting"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_grid_reports_a_failed_point_and_retries_it(write, capsys, tmp_path):
    """Point 1 names a folder without weights; once they exist, --retry finishes the point."""
    base = load_sweep(write(keys={"beta": [0.0]})).base  # it names a model that exists
    model = next(line.split(": ")[1] for line in Path(base).read_text().splitlines() if "model_name" in line)
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "config.json").write_text('{"model_type": "llama"}')
    keys = {"model_name_or_path": [model, str(missing)], "learning_rate": [0.01]}
    path = write(keys=keys, seeds=[0, 1], parallel=2)
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 points finished, 1 failed" in out
    assert "point 1 failed: rlkit: " in out and str(missing) in out.replace("\n", "") and "--retry" in out
    sweep = load_sweep(path)
    first, second = read_table(sweep)
    assert (first["state"], second["state"]) == (FINISHED, FAILED)
    values = [float(first[f"seed {seed}"]) for seed in (0, 1)]
    for seed, value in zip((0, 1), values, strict=True):
        after = json.loads((Point(sweep, 0).run_dir(seed) / "evaluation" / "after.json").read_text())
        assert after["accuracy"]["mean"] == value and after["seed"] == seed
    assert float(first["mean even"]) == pytest.approx(sum(values) / 2)
    page = (sweep.folder / "report.html").read_text()
    assert "1 of 2 points finished" in page and "point 0" in page

    # Runs log and print the metric under its own name, not as "accuracy".
    run = Point(sweep, 0).run_dir(0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation/even"] for line in lines if "evaluation/even" in line][-1] == values[0]
    assert not any("evaluation/accuracy" in line for line in lines)
    log = (Point(sweep, 0).folder / "seed-0.log").read_text()
    assert re.search(r"step 2/2  reward \S+  even \S+  length", log)

    shutil.rmtree(missing)
    missing.symlink_to(model)
    assert main([str(path)]) == 1  # without --retry, a failed point stays failed
    assert main([str(path), "--retry"]) == 0
    assert [row["state"] for row in read_table(sweep)] == [FINISHED, FINISHED]
    assert main([str(path), "--collect"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_stopped_sweep_resumes_from_a_checkpoint(write):
    """Two points of 24 steps; SIGTERM stops the first, which later resumes from its checkpoint."""
    path = write(changes={"max_steps": 24, "save_steps": 1000}, keys={"learning_rate": [0.01, 0.02]})
    sweep = load_sweep(path)
    command = [sys.executable, "-m", "rlkit", "sweep", str(path)]
    metrics = Point(sweep, 0).run_dir(0) / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        wait_until(lambda: metrics.exists() and '"step": 3' in metrics.read_text(), process=process)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=100)[0]
    assert "rerun the command to resume" in out
    checkpoints = list(Point(sweep, 0).run_dir(0).glob("checkpoint-*/rlkit.json"))
    assert len(checkpoints) == 1 and Point(sweep, 0).outcome() is None
    resumed = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "2 of 2 points finished" in resumed.stdout
    log = (Point(sweep, 0).folder / "seed-0.log").read_text()
    assert "stopped by SIGUSR1 after step" in log


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_optuna_prunes_the_worst_point(write):
    """The reward depends on the key. The worst point has 1000 steps, so that polling cannot miss it."""
    changes = {"evaluation_steps": 1, "environment": f"{ROOT / 'tests' / 'toy.py'}:Constant"}
    keys = {"environment_args.value": [0.9, 0.8, 0.7, 0.6, 0.1], "max_steps": [2, 1000]}
    sweep = load_sweep(write(changes=changes, keys=keys, search="optuna", trials=6, pruning=True))
    import optuna

    from rlkit.sweeps.study import open_study

    study = open_study(sweep)
    for value in keys["environment_args.value"]:
        steps = 1000 if value == 0.1 else 2
        study.enqueue_trial({"environment_args.value": json.dumps(value), "max_steps": json.dumps(steps)})
    outcomes = [Point(sweep, number).work() for number in range(5)]
    assert [outcome.state for outcome in outcomes] == [FINISHED] * 4 + ["pruned"]
    assert outcomes[0].value == pytest.approx(0.9) and outcomes[4].value == pytest.approx(0.1)
    assert not (Point(sweep, 4).run_dir(0) / "evaluation" / "after.json").exists()
    states = [trial.state for trial in study.trials]
    assert states == [optuna.trial.TrialState.COMPLETE] * 4 + [optuna.trial.TrialState.PRUNED]
    assert main([str(sweep.folder.parent / "sweep.yaml"), "--collect"]) == 0
    assert "Importance of each key" in (sweep.folder / "report.html").read_text()
