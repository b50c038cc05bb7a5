"""The journal holds the points; many workers share it, and another sweep's is refused."""

import subprocess
import sys

import optuna
import pytest

from rlkit.errors import UserError
from rlkit.sweeps.spec import load_sweep
from rlkit.sweeps.study import JOURNAL, again, open_study, suggest

RATES = {"learning_rate": [0.1, 0.2], "num_generations": {"low": 2, "high": 4, "step": 2}}
RANGES = {"learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}, "num_generations": {"low": 2, "high": 9}}


def draw(sweep, worker):
    return suggest(sweep, open_study(sweep, worker).ask())


def test_a_grid_is_asked_for_once(write):
    sweep = load_sweep(write(keys=RATES))
    found = [draw(sweep, worker) for worker in range(4)]
    assert found == list(sweep.grid())


def test_values_keep_their_types(write):
    lists = {"lora_target_modules": [["q"], ["q", "v"]], "shuffle_dataset": [True, False], "beta": [0, 0.5]}
    sweep = load_sweep(write(keys=lists))
    assert [draw(sweep, i) for i in range(8)] == list(sweep.grid())


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
        "from rlkit.sweeps.study import *; s = load_sweep(Path(sys.argv[1]));"
        "[print(suggest(s, open_study(s, i).ask())['max_steps']) for i in range(3)]"
    )
    command = [sys.executable, "-c", code, str(path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    found = sorted(int(line) for worker in workers for line in worker.communicate(timeout=120)[0].split())
    assert found == list(range(1, 13))


def test_a_point_that_failed_is_made_again_whatever_waits(write):
    sweep = load_sweep(write(keys=RATES))
    study = open_study(sweep)
    trial = study.ask()
    keys = suggest(sweep, trial)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    new = again(study, trial.number)
    assert suggest(sweep, new) == keys
    study.tell(new.number, 0.5)
    assert draw(sweep, 1) == list(sweep.grid())[1]


def test_another_sweeps_journal_is_refused(write):
    open_study(load_sweep(write(keys=RATES)))
    with pytest.raises(UserError, match=r"study\.journal was written by another sweep: keys changed"):
        open_study(load_sweep(write(keys={"beta": [1]})))


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
