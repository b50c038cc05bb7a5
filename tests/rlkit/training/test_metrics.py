"""Metrics of reward calls, and the progress that rewards see."""

from types import SimpleNamespace

import numpy as np

from rlkit.reward import TrainerState
from rlkit.scoring import Scores
from rlkit.training.metrics import progress, reward_call_metrics


def make_trainer(global_step, max_steps, epoch, max_steps_arg):
    state = SimpleNamespace(global_step=global_step, max_steps=max_steps, epoch=epoch, num_train_epochs=2)
    return SimpleNamespace(state=state, args=SimpleNamespace(max_steps=max_steps_arg))


def test_progress_before_and_during_training():
    assert progress(make_trainer(3, 10, 0.5, -1)) == TrainerState(3, 10, 0.5, 2)
    # Before training begins, transformers has not set the number of steps.
    assert progress(make_trainer(0, 0, None, 10)) == TrainerState(0, 10, 0.0, 2)
    assert progress(make_trainer(0, 0, None, -1)) == TrainerState(0, 1, 0.0, 2)


def test_reward_call_metrics_pool_the_calls_of_all_processes(monkeypatch):
    def scores(latencies, metrics):
        return Scores(np.zeros((1, 1)), [None], {}, latencies=latencies, metrics=metrics)

    processes = [
        scores({"a": [1.0, 2.0]}, {"tokens": [10.0]}),
        scores({"a": [6.0], "b": [0.5]}, {}),
        scores({}, {"tokens": [20.0, 30.0], "hits": [1.0]}),
    ]
    gathered = [(s.latencies, s.metrics) for s in processes]
    monkeypatch.setattr("rlkit.training.metrics.gather_object", lambda local: gathered)
    assert reward_call_metrics(["a", "b", "never_called"], processes[0]) == {
        "rewards/a/latency": 3.0,
        "rewards/a/latency_max": 6.0,
        "rewards/b/latency": 0.5,
        "rewards/b/latency_max": 0.5,
        "tokens": 20.0,
        "hits": 1.0,
    }
