"""The journal holds the points; many workers share it, and another sweep's is refused."""

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
from rlkit.sweeps.study import JOURNAL, open_study, suggest, trial_of

RATES = {"learning_rate": [0.1, 0.2], "num_generations": {"low": 2, "high": 4, "step": 2}}
RANGES = {"learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}, "num_generations": {"low": 2, "high": 9}}


def draw(sweep, worker):
    return suggest(sweep, open_study(sweep, worker).ask())


def begun(sweep, number):
    """The keys of a point that is begun."""
    point = Point(sweep, number)
    assert point._begin(None) is not None
    return point.keys()


def test_each_point_of_a_grid_has_its_own_keys_in_any_order(write):
    sweep = load_sweep(write(keys=RATES))
    found = {number: begun(sweep, number) for number in (2, 0, 3, 1)}
    assert [found[number] for number in range(4)] == list(sweep.grid())
    assert [trial.state for trial in open_study(sweep).trials] == [TrialState.RUNNING] * 4


def test_values_keep_their_types(write):
    lists = {"lora_target_modules": [["q"], ["q", "v"]], "shuffle_dataset": [True, False], "beta": [0, 0.5]}
    sweep = load_sweep(write(keys=lists))
    assert [begun(sweep, i) for i in range(8)] == list(sweep.grid())


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_workers_draw_different_points_in_their_ranges(write, search):
    sweep = load_sweep(write(keys=RANGES, search=search, trials=12))
    found = [draw(sweep, worker) for worker in range(12)]
    assert len({point["learning_rate"] for point in found}) == 12
    for point in found:
        assert 1e-6 <= point["learning_rate"] <= 1e-2
        assert isinstance(point["num_generations"], int) and 2 <= point["num_generations"] <= 9


def test_workers_in_many_processes_lose_no_point(write):
    sweep = load_sweep(path := write(keys={"max_steps": list(range(1, 13))}))
    open_study(sweep)
    code = (
        "import sys; from pathlib import Path; from rlkit.sweeps.spec import load_sweep;"
        "from rlkit.sweeps.point import Point; sweep = load_sweep(Path(sys.argv[1]));"
        "[Point(sweep, 3 * int(sys.argv[2]) + i)._begin(None) for i in range(3)]"
    )
    command = [sys.executable, "-c", code, str(path)]
    workers = [subprocess.Popen([*command, str(worker)]) for worker in range(4)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
    study = open_study(sweep)
    assert [Point(sweep, number).keys()["max_steps"] for number in range(12)] == list(range(1, 13))
    for number in range(12):
        assert suggest(sweep, trial_of(study, number)) == {"max_steps": number + 1}
    assert len(study.trials) == 12


def test_a_point_that_failed_is_made_again_with_its_keys(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=3))
    keys, other = begun(sweep, 0), begun(sweep, 1)
    point = Point(sweep, 0)
    point._end(trial_of(open_study(sweep), 0), Outcome(FAILED, error="ill"))
    point.reset()
    assert point.outcome() is None and begun(sweep, 0) == keys != other
    states = [trial.state for trial in open_study(sweep).trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING]


def test_a_point_goes_on_with_its_trial(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=2))
    assert begun(sweep, 0) == begun(sweep, 0) and len(open_study(sweep).trials) == 1


def test_a_journal_that_is_moved_away_costs_no_point_its_keys(write):
    sweep = load_sweep(write(keys=RANGES, search="random", trials=2))
    keys = [begun(sweep, number) for number in range(2)]
    (sweep.folder / JOURNAL).unlink()
    assert [begun(sweep, number) for number in (1, 0)] == keys[::-1]


def test_a_journal_that_was_cut_short_goes_on(write):
    sweep = load_sweep(write(keys=RATES))
    begun(sweep, 0)
    journal = sweep.folder / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":5,"worker_id":"x","tri')
    first = next(sweep.grid())
    assert begun(sweep, 0) == first and journal.read_bytes().startswith(whole + b'{"op_code":')
    for size in range(0, len(whole), 37):  # at any place
        journal.write_bytes(whole[:size])
        assert begun(sweep, 0) == first


def test_a_worker_that_was_killed_holds_no_lock_for_ever(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # and the folder of the sweep is a relative one
    sweep = replace(load_sweep(write(keys=RATES)), output_dir="sweep")
    open_study(sweep)
    os.symlink((sweep.folder / JOURNAL).resolve(), sweep.folder / f"{JOURNAL}.lock")
    monkeypatch.setattr(study_module, "LOCK_SECONDS", 3)
    assert begun(sweep, 1) == list(sweep.grid())[1]


def test_another_sweeps_journal_is_refused(write):
    open_study(load_sweep(write(keys=RATES)))
    with pytest.raises(UserError, match=r"study\.journal was written by another sweep: keys changed"):
        open_study(load_sweep(write(keys={"beta": [1]})))


def test_sweep_begun_when_the_metric_was_called_accuracy_can_be_continued(write):
    sweep = load_sweep(write(keys=RATES))
    open_study(replace(sweep, objective="accuracy"))
    assert open_study(sweep).trials == []
    with pytest.raises(UserError, match="objective changed"):
        open_study(replace(sweep, objective="variety"))


def test_more_trials_continue(write):
    open_study(load_sweep(write(keys=RANGES, search="random", trials=2))).ask()
    more = load_sweep(write(keys=RANGES, search="random", trials=4, seeds=[0, 1]))
    assert open_study(more, 1).ask().number == 1


def test_another_studys_journal_is_refused(write):
    sweep = load_sweep(write(keys=RATES))
    sweep.folder.mkdir()
    backend = optuna.storages.journal.JournalFileBackend(str(sweep.folder / JOURNAL))
    optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="mine")
    with pytest.raises(UserError, match=r"written by another study \(mine\)"):
        open_study(sweep)


@pytest.mark.parametrize("text", ["not a journal\n", '{"a": 1}\n', "[]\n", "\x00\x01"])
def test_what_is_no_journal_is_refused(write, text):
    sweep = load_sweep(write(keys=RATES))
    sweep.folder.mkdir()
    (sweep.folder / JOURNAL).write_text(text)
    with pytest.raises(UserError, match="is no journal of a sweep"):
        open_study(sweep)
