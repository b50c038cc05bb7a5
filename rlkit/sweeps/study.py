"""Optuna study of a sweep: its points and their values, in a journal file that many workers share."""

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
STUDY_NAME = "sweep"
IDENTITY = "rlkit sweep"  # user attribute of the study
POINT = "point"  # user attribute of a trial
LOCK_SECONDS = 30  # then a lock is taken to belong to a worker that was killed while it wrote


def open_study(sweep: Sweep, worker: int = 0) -> optuna.Study:
    """Open the study of a sweep, or create it.

    Args:
        sweep: Sweep whose journal is opened.
        worker: Number of the point that the caller works on. It enters the sampler's seed, so that workers
            that share a journal draw different values.

    Raises:
        UserError: If the file is not a journal, or belongs to another sweep or study.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / JOURNAL
    journal = str(path.resolve())  # the lock is a symbolic link to it, so a relative path would dangle
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if sweep.pruning else optuna.pruners.NopPruner()
    try:
        lock = JournalFileSymlinkLock(journal, LOCK_SECONDS)
        _repair(journal, lock)
        storage = JournalStorage(JournalFileBackend(journal, lock))
        study_names = optuna.get_all_study_names(storage)
        study = optuna.create_study(
            storage=storage,
            study_name=STUDY_NAME,
            sampler=_sampler(sweep, worker),
            pruner=pruner,
            direction=StudyDirection[sweep.direction.upper()],
            load_if_exists=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not the journal of a sweep ({type(error).__name__}); move the file or set output_dir"
        ) from error
    identity = study.user_attrs.get(IDENTITY)
    if identity is None:
        if study.trials or study_names not in ([], [STUDY_NAME]):
            raise UserError(
                f"{path} was written by another study ({', '.join(study_names)}); set another output_dir"
            )
        study.set_user_attr(IDENTITY, sweep.identity())
        return study
    if sweep.objective is None:
        # Earlier versions called the environment's metric "accuracy".
        identity = identity.replace('"objective": "accuracy"', '"objective": null')
    if identity != sweep.identity():
        changed = ", ".join(_changed_fields(identity, sweep))
        raise UserError(f"{path} was written by another sweep: {changed} changed; set another output_dir")
    return study


def _repair(journal: str, lock: JournalFileSymlinkLock) -> None:
    """Truncate an incomplete last line, such as a power failure leaves.

    Optuna tolerates it at the end of the journal, but would append to it and then fail to read the file.
    """
    if not os.path.exists(journal):
        return
    with get_lock_file(lock), open(journal, "rb+") as file:
        content = file.read()
        # Only a journal: another file that happens to have the name must survive.
        if content.startswith(b'{"op_code":') and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _sampler(sweep: Sweep, worker: int) -> optuna.samplers.BaseSampler:
    seed = sweep.sampler_seed * 100_003 + worker
    if sweep.search == "optuna":
        # constant_liar keeps workers that sample at the same time from choosing nearly the same point.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _changed_fields(identity: str, sweep: Sweep) -> list[str]:
    recorded, current = json.loads(identity), json.loads(sweep.identity())
    return [key for key in current if recorded.get(key) != current[key]]


def _to_optuna(sweep: Sweep, key: str, value: object) -> object:
    """Return a value as Optuna stores it: JSON for listed values, since a category must be a scalar."""
    return json.dumps(value) if isinstance(sweep.keys[key], list) else value


def suggest(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """Return the keys of a trial, sampled where the trial does not fix them."""
    values: dict[str, Any] = {}
    for key, domain in sweep.keys.items():
        if isinstance(domain, list):
            categories = [json.dumps(value) for value in domain]
            values[key] = json.loads(trial.suggest_categorical(key, categories))
            continue
        low, high, step = domain["low"], domain["high"], domain.get("step")
        log = bool(domain.get("log"))
        if isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int)):
            values[key] = trial.suggest_int(key, low, high, step=step or 1, log=log)
        else:
            values[key] = trial.suggest_float(key, low, high, step=step, log=log)
    return values


def start_trial(study: optuna.Study, sweep: Sweep, point: int, keys: Mapping[str, Any] | None) -> Trial:
    """Start a trial for a point, with these keys, or if they are None with keys that Optuna samples."""
    if keys is None:
        trial = study.ask()
        trial.set_user_attr(POINT, point)
        return trial
    stored = {key: _to_optuna(sweep, key, value) for key, value in keys.items()}
    study.enqueue_trial(stored, user_attrs={POINT: point})
    enqueued = _last_trial(study, point, TrialState.WAITING)
    assert enqueued is not None
    # Not `ask`: it might return a trial that another worker has enqueued.
    study._storage.set_trial_state_values(enqueued._trial_id, TrialState.RUNNING)
    return Trial(study, enqueued._trial_id)


def running_trial(study: optuna.Study, point: int) -> Trial | None:
    """Return the running trial of a point, or None if it has none."""
    trial = _last_trial(study, point, TrialState.RUNNING)
    return None if trial is None else Trial(study, trial._trial_id)


def _last_trial(study: optuna.Study, point: int, state: TrialState) -> optuna.trial.FrozenTrial | None:
    trials = study.get_trials(deepcopy=False, states=(state,))
    return next((trial for trial in reversed(trials) if trial.user_attrs.get(POINT) == point), None)
