"""The points of a sweep and their values: an Optuna study in a journal file that many workers can share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from rlkit.errors import UserError
from rlkit.sweeps.spec import Sweep

JOURNAL = "study.journal"
NAME = "sweep"
IDENTITY = "rlkit sweep"
POINT = "point"
LOCK_SECONDS = 30  # a worker that was killed while it wrote may hold the journal as long


def open_study(sweep: Sweep, worker: int = 0) -> optuna.Study:
    """The study of a sweep, made if there is none.

    Args:
        worker: the point that is worked on: workers that share a journal draw different numbers.

    Raises:
        UserError: the journal is another sweep's, or no journal.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / JOURNAL
    journal = str(path.resolve())  # the lock is a link to it, which must lead there from any folder
    try:
        lock = JournalFileSymlinkLock(journal, LOCK_SECONDS)
        _mend(journal, lock)
        storage = JournalStorage(JournalFileBackend(journal, lock))
        names = optuna.get_all_study_names(storage)
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            sampler=_sampler(sweep, worker),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4)
            if sweep.pruning
            else optuna.pruners.NopPruner(),
            direction=StudyDirection[sweep.direction.upper()],
            load_if_exists=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no journal of a sweep: move it away ({type(error).__name__})") from error
    found = study.user_attrs.get(IDENTITY)
    if found is None and (study.trials or names not in ([], [NAME])):
        raise UserError(
            f"{path} was written by another study ({', '.join(names)}): choose another output_dir"
        )
    if found is not None and sweep.objective is None:
        # Earlier versions called the environment's metric "accuracy".
        found = found.replace('"objective": "accuracy"', '"objective": null')
    if found is not None and found != sweep.identity():
        raise UserError(
            f"{path} was written by another sweep: {_changed(found, sweep)}; choose another output_dir"
        )
    if found is None:
        study.set_user_attr(IDENTITY, sweep.identity())
    return study


def _mend(journal: str, lock: JournalFileSymlinkLock) -> None:
    """Cut off a last line that a power failure left unfinished: with more after it nothing can be read."""
    if not os.path.exists(journal):
        return
    with get_lock_file(lock), open(journal, "rb+") as file:
        text = file.read()
        if text.startswith(b'{"op_code":') and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


def _sampler(sweep: Sweep, worker: int) -> optuna.samplers.BaseSampler:
    seed = sweep.sampler_seed * 100_003 + worker
    if sweep.search == "optuna":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _changed(found: str, sweep: Sweep) -> str:
    before, now = json.loads(found), json.loads(sweep.identity())
    changed = [key for key in now if before.get(key) != now[key]]
    return f"{', '.join(changed)} changed"


def _label(sweep: Sweep, key: str, value: object) -> object:
    """What Optuna keeps of a value: it knows no lists and mappings."""
    return json.dumps(value) if isinstance(sweep.keys[key], list) else value


def suggest(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """The keys of a trial."""
    found: dict[str, Any] = {}
    for key, one in sweep.keys.items():
        if isinstance(one, list):
            found[key] = json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in one]))
            continue
        low, high, step = one["low"], one["high"], one.get("step")
        if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
            found[key] = trial.suggest_int(key, low, high, step=step or 1, log=bool(one.get("log")))
        else:
            found[key] = trial.suggest_float(key, low, high, step=step, log=bool(one.get("log")))
    return found


def begin(study: optuna.Study, sweep: Sweep, point: int, keys: Mapping[str, Any] | None) -> Trial:
    """A trial of a point: with given keys, or with those that Optuna chooses."""
    if keys is None:
        trial = study.ask()
        trial.set_user_attr(POINT, point)
        return trial
    labels = {key: _label(sweep, key, value) for key, value in keys.items()}
    study.enqueue_trial(labels, user_attrs={POINT: point})
    new = _last(study, point, TrialState.WAITING)
    assert new is not None
    study._storage.set_trial_state_values(new._trial_id, TrialState.RUNNING)  # `ask` might take another one
    return Trial(study, new._trial_id)


def trial_of(study: optuna.Study, point: int) -> Trial | None:
    """The trial of a point that is being worked on; None: there is none."""
    found = _last(study, point, TrialState.RUNNING)
    return None if found is None else Trial(study, found._trial_id)


def _last(study: optuna.Study, point: int, state: TrialState) -> optuna.trial.FrozenTrial | None:
    trials = study.get_trials(deepcopy=False, states=(state,))
    return next((trial for trial in reversed(trials) if trial.user_attrs.get(POINT) == point), None)
