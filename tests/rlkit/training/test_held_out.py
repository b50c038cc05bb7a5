"""Evaluations on held-out tasks during a run."""

from types import SimpleNamespace

import pytest

from rlkit.training.held_out import evaluating


def test_evaluating_turns_dropout_off_and_restores_the_mode(tiny_model):
    model = tiny_model().train()
    trainer = SimpleNamespace(model=model)
    with evaluating(trainer):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluating(trainer):
        raise RuntimeError
    assert model.training
