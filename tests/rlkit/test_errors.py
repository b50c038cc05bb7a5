"""Error messages: one line, and the nearest valid name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError, check_arguments, check_choice, first_line, nearest


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


@pytest.mark.parametrize(
    ("name", "choice"),
    [("extra", "beta"), ("num_generations", "demonstrations"), ("logging_dir", "logging_first_step")],
)
def test_nearest_does_not_suggest_an_unrelated_name(name, choice):
    assert nearest(name, [choice]) == f" (choices: {choice})"


def test_nearest_knows_other_words_for_the_dev_split():
    for name in ("val", "validation", "valid"):
        assert nearest(name, ["train", "dev", "test"]) == " (did you mean 'dev'?)"
    assert "dev" not in nearest("validation", ["train", "test"])


def test_check_arguments_names_the_nearest():
    def target(size, *, seed=0): ...

    check_arguments(target, {"size": 1, "seed": 2})
    with pytest.raises(UserError, match=r"target has no argument 'sede' \(did you mean 'seed'\?\)"):
        check_arguments(target, {"sede": 1})
