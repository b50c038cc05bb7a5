"""Calls that succeed or fail on all processes together."""

import pytest
from accelerate import Accelerator

from rlkit.errors import GuardError, RewardError, UserError
from rlkit.training.processes import on_every_process, on_main_process


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


@pytest.mark.parametrize("kind", [UserError, RewardError, GuardError])
def test_on_every_process_raises_each_kind_of_error_for_the_user(kind):
    with pytest.raises(kind, match="all servers are down"):
        on_every_process(lambda: (_ for _ in ()).throw(kind("all servers are down")))


def test_on_main_process_returns_its_result_or_raises_its_error():
    def fail():
        raise RewardError("a reward worker failed to start")

    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: 3) == 3
    with pytest.raises(RewardError, match="a reward worker failed to start"):
        on_main_process(accelerator, fail)
