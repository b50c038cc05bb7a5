"""What every kind of run shares."""

from types import SimpleNamespace

import pytest

from rlkit.training.session import evaluating


def test_evaluations_are_without_dropout_and_leave_the_mode_as_it_was(tiny_model):
    model = tiny_model().train()
    trainer = SimpleNamespace(model=model)
    with evaluating(trainer):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    with pytest.raises(RuntimeError), evaluating(trainer):
        raise RuntimeError
    assert model.training
