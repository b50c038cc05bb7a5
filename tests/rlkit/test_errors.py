"""Error messages: one line, and the nearest valid name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError, check_arguments, check_choice, first_line


@given(st.text())
def test_first_line_is_one_line_of_any_message(message):
    line = first_line(ValueError(message))
    assert line and line.splitlines() == [line] and (line in message or line == "ValueError")


def test_first_line_of_a_message_that_begins_with_blank_lines():
    assert first_line(OSError("\n  \n disk is full \nhint")) == "disk is full"
    assert first_line(RuntimeError()) == "RuntimeError"  # here `splitlines()[0]` would raise an IndexError
    assert first_line("") == ""


def test_check_choice_names_the_nearest():
    assert check_choice("level", "low", ("low", "high")) == "low"
    with pytest.raises(UserError, match=r"unknown level 'hihg' \(did you mean 'high'\?\)"):
        check_choice("level", "hihg", {"low": 1, "high": 2})


def test_check_arguments_names_the_nearest():
    def target(size, *, seed=0): ...

    check_arguments(target, {"size": 1, "seed": 2})
    with pytest.raises(UserError, match=r"target has no argument 'sede' \(did you mean 'seed'\?\)"):
        check_arguments(target, {"sede": 1})
