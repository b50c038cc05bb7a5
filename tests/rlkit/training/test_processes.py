"""Calls that succeed or fail on all processes together."""

import pytest

from rlkit.errors import RewardError, UserError
from rlkit.training.processes import on_every_process


def test_error_of_any_process_is_raised_on_every_process(monkeypatch):
    def fail():
        raise UserError("the weights do not fit")

    gathered = []

    def gather(errors):
        gathered.extend(errors)
        return [None, RewardError("a reward worker failed to start"), *errors]

    assert on_every_process(lambda: 3) == 3
    monkeypatch.setattr("rlkit.training.processes.gather_object", gather)
    with pytest.raises(RewardError, match="a reward worker failed to start"):
        on_every_process(lambda: 3)
    with pytest.raises(UserError, match="the weights do not fit"):  # its own error comes first
        on_every_process(fail)
    assert gathered[0] is None and isinstance(gathered[1], UserError)
