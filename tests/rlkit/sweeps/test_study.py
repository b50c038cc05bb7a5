"""The study journal: many workers share it, and a journal of another sweep is rejected."""

import os
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from rlkit.errors import UserError
from rlkit.sweeps import study as study_module
from rlkit.sweeps.point import FAILED, Outcome, Point
from rlkit.sweeps.spec import load_sweep
from rlkit.sweeps.study import JOURNAL, open_study, running_trial, suggest

RATES = {"learning_rate": [0.1, 0.2], "num_generations": {"low": 2, "high": 4, "step": 2}}
RANGES = {"learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}, "num_generations": {"low": 2, "high": 9}}


def draw(sweep, worker):
    return suggest(sweep, open_study(sweep, worker).ask())


def start_point(sweep, number):
    """Start or resume a point and return its keys."""
    point = Point(sweep, number)
    assert point.open_trial(None) is not None
    return point.keys()


def test_grid_points_have_their_keys_in_any_order_of_start(write):
    sweep = load_sweep(write(keys=RATES))
    keys = {number: start_point(sweep, number) for number in (2, 0, 3, 1)}
    assert [keys[number] for number in range(4)] == list(sweep.grid())
    assert [trial.state for trial in open_study(sweep).trials] == [TrialState.RUNNING] * 4


def test_trials_preserve_the_types_of_values(write):
    lists = {"lora_target_modules": [["q"], ["q", "v"]], "shuffle_dataset": [True, False], "beta": [0, 0.5]}
    sweep = load_sweep(write(keys=lists))
    assert [start_point(sweep, i) for i in range(8)] == list(sweep.grid())


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_workers_draw_different_points_in_their_ranges(write, search):
    sweep = load_sweep(write(keys=RANGES, search=search, trials=12))
    drawn = [draw(sweep, worker) for worker in range(12)]
    assert len({keys["learning_rate"] for keys in drawn}) == 12
    for keys in drawn:
        assert 1e-6 <= keys["learning_rate"] <= 1e-2
        assert isinstance(keys["num_generations"], int) and 2 <= keys["num_generations"] <= 9


def test_worker_processes_share_the_journal_without_losing_points(write):
    sweep = load_sweep(path := write(keys={"max_steps": list(range(1, 13))}))
    open_study(sweep)
    code = (
        "import sys; from pathlib import Path; from rlkit.sweeps.spec import load_sweep;"
        "from rlkit.sweeps.point import Point; sweep = load_sweep(Path(sys.argv[1]));"
        "[Point(sweep, 3 * int(sys.argv[2]) + i).open_trial(None) for i in range(3)]"
    )
    command = [sys.executable, "-c", code, str(path)]
    workers = [subprocess.Popen([*command, str(worker)]) for worker in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
    study = open_study(sweep)
    assert [Point(sweep, number).keys()["max_steps"] for number in range(12)] == list(range(1, 13))
    for number in range(12):
        assert suggest(sweep, running_trial(study, number)) == {"max_steps": number + 1}
    assert len(study.trials) == 12


def test_reset_point_is_retried_with_its_keys(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=3))
    keys, other_keys = start_point(sweep, 0), start_point(sweep, 1)
    point = Point(sweep, 0)
    point.record(running_trial(open_study(sweep), 0), Outcome(FAILED, error="ill"))
    point.reset()
    assert point.outcome() is None and start_point(sweep, 0) == keys != other_keys
    states = [trial.state for trial in open_study(sweep).trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]


def test_resumed_point_keeps_its_trial(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=2))
    assert start_point(sweep, 0) == start_point(sweep, 0) and len(open_study(sweep).trials) == 1


def test_points_keep_their_keys_without_the_journal(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=2))
    keys = [start_point(sweep, number) for number in range(2)]
    (sweep.folder / JOURNAL).unlink()
    assert [start_point(sweep, number) for number in (1, 0)] == keys[::-1]


def test_open_study_repairs_a_truncated_journal(write):
    sweep = load_sweep(write(keys=RATES))
    start_point(sweep, 0)
    journal = sweep.folder / JOURNAL
    content = journal.read_bytes()
    journal.write_bytes(content + b'{"op_code":5,"worker_id":"x","tri')
    first = next(sweep.grid())
    assert start_point(sweep, 0) == first and journal.read_bytes().startswith(content + b'{"op_code":')
    for size in range(0, len(content), 37):
        journal.write_bytes(content[:size])
        assert start_point(sweep, 0) == first


def test_lock_of_a_killed_worker_expires(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the folder of the sweep is relative
    sweep = replace(load_sweep(write(keys=RATES)), output_dir="sweep")
    open_study(sweep)
    os.symlink((sweep.folder / JOURNAL).resolve(), sweep.folder / f"{JOURNAL}.lock")
    monkeypatch.setattr(study_module, "LOCK_SECONDS", 3)
    assert start_point(sweep, 1) == list(sweep.grid())[1]


def test_open_study_rejects_the_journal_of_another_sweep(write):
    open_study(load_sweep(write(keys=RATES)))
    with pytest.raises(UserError, match=r"study\.journal was written by another sweep: keys changed"):
        open_study(load_sweep(write(keys={"beta": [1]})))


def test_open_study_resumes_sweeps_that_called_the_metric_accuracy(write):
    sweep = load_sweep(write(keys=RATES))
    open_study(replace(sweep, objective="accuracy"))
    assert open_study(sweep).trials == []
    with pytest.raises(UserError, match="objective changed"):
        open_study(replace(sweep, objective="variety"))


def test_open_study_resumes_with_more_trials(write):
    open_study(load_sweep(write(keys=RANGES, search="random", trials=2))).ask()
    more = load_sweep(write(keys=RANGES, search="random", trials=4, seeds=[0, 1]))
    assert open_study(more, 1).ask().number == 1


def test_open_study_rejects_the_journal_of_another_study(write):
    sweep = load_sweep(write(keys=RATES))
    sweep.folder.mkdir()
    backend = optuna.storages.journal.JournalFileBackend(str(sweep.folder / JOURNAL))
    optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="mine")
    with pytest.raises(UserError, match=r"written by another study \(mine\)"):
        open_study(sweep)


@pytest.mark.parametrize("content", ["not a journal\n", '{"a": 1}\n', "[]\n", "\x00\x01"])
def test_open_study_rejects_other_files(write, content):
    sweep = load_sweep(write(keys=RATES))
    sweep.folder.mkdir()
    (sweep.folder / JOURNAL).write_text(content)
    with pytest.raises(UserError, match="is not the journal of a sweep"):
        open_study(sweep)
