"""The points of a sweep and their values: an Optuna study in a journal file that many workers can share."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from rlkit.errors import UserError
from rlkit.sweeps.spec import Sweep

JOURNAL = "study.journal"
NAME = "sweep"
IDENTITY = "rlkit sweep"


def open_study(sweep: Sweep, worker: int = 0) -> optuna.Study:
    """The study of a sweep, made if there is none; its grid waits in it.

    Args:
        worker: the point that is worked on: workers that share a journal draw different numbers.

    Raises:
        UserError: the journal is another sweep's, or no journal.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / JOURNAL
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
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
    if found is None and names:
        raise UserError(
            f"{path} was written by another study ({', '.join(names)}): choose another output_dir"
        )
    if found is not None and found != sweep.identity():
        raise UserError(
            f"{path} was written by another sweep: {_changed(found, sweep)}; choose another output_dir"
        )
    if found is None:
        study.set_user_attr(IDENTITY, sweep.identity())
        if sweep.search == "grid":
            for point in sweep.grid():
                study.enqueue_trial({key: _label(sweep, key, value) for key, value in point.items()})
    return study


def _sampler(sweep: Sweep, worker: int) -> optuna.samplers.BaseSampler:
    seed = sweep.sampler_seed * 100_003 + worker
    if sweep.search == "optuna":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _changed(found: str, sweep: Sweep) -> str:
    before, now = json.loads(found), json.loads(sweep.identity())
    changed = [key for key in now if before.get(key) != now[key]]
    return f"{', '.join(changed)} changed"


def _label(sweep: Sweep, key: str, value: Any) -> Any:
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


def again(study: optuna.Study, number: int) -> Trial:
    """A new trial with the parameters of one that failed."""
    study.enqueue_trial(study.trials[number].params, user_attrs={"again": number})
    new = next(t for t in reversed(study.trials) if t.user_attrs.get("again") == number)
    study._storage.set_trial_state_values(new._trial_id, TrialState.RUNNING)  # `ask` might take another one
    return Trial(study, new._trial_id)


def trial_of(study: optuna.Study, number: int) -> Trial:
    """A trial that is being worked on, by its number."""
    return Trial(study, study.trials[number]._trial_id)
