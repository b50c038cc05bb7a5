"""Log lines on stderr: their prefix, the levels, which ranks write them, and hidden notices of libraries."""

import logging
import os

import pytest

from rlkit.commands.run import run_command
from rlkit.errors import UserError
from rlkit.logs import configure_logging, hide_weight_bars, reset_logging

LEVELS = ("debug", "info", "warning", "error")
VARIABLES = ("RANK", "WORLD_SIZE", "RLKIT_LOG_LEVEL")


@pytest.fixture
def log(monkeypatch, capsys):
    """Return a function that configures logging, logs at each level, and returns stdout and stderr."""

    def log(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        configure_logging()
        for level in LEVELS:
            getattr(logging.getLogger("rlkit.runs.directory"), level)("a message at %s", level)
        return capsys.readouterr()

    yield log
    reset_logging()


def lines(*levels, prefix="rlkit"):
    return "".join(f"{prefix}: a message at {level}\n" for level in levels)


def test_log_lines_of_one_process_are_prefixed_and_on_stderr_only(log):
    out, err = log()
    assert (out, err) == ("", lines("info", "warning", "error"))
    assert log(RANK="0", WORLD_SIZE="1").err == lines("info", "warning", "error")


def test_log_lines_name_the_rank_of_several_processes(log):
    first = log(RANK="0", WORLD_SIZE="2").err
    assert first == lines("info", "warning", "error", prefix="rlkit [rank 0]")
    assert log(RANK="1", WORLD_SIZE="2").err == lines("warning", "error", prefix="rlkit [rank 1]")


@pytest.mark.parametrize("number", range(4))
def test_log_level_variable_applies_to_every_rank(log, number):
    level, expected = LEVELS[number], LEVELS[number:]
    assert log(RLKIT_LOG_LEVEL=level).err == lines(*expected)
    assert log(RLKIT_LOG_LEVEL=level.upper()).err == lines(*expected)
    err = log(RLKIT_LOG_LEVEL=level, RANK="1", WORLD_SIZE="2").err
    assert err == lines(*expected, prefix="rlkit [rank 1]")


def test_empty_log_level_means_the_default(log):
    assert log(RLKIT_LOG_LEVEL="").err == lines("info", "warning", "error")


def test_unknown_log_level_names_the_choices(monkeypatch, capsys):
    monkeypatch.setenv("RLKIT_LOG_LEVEL", "Inof")
    message = "RLKIT_LOG_LEVEL must be debug, info, warning or error, not 'Inof'"
    with pytest.raises(UserError) as caught:
        configure_logging()
    assert str(caught.value) == message
    assert run_command(lambda: 0) == 2
    assert capsys.readouterr().err == f"rlkit: {message}\n"


def test_configuring_twice_writes_each_line_once(log):
    log()
    assert log().err == lines("info", "warning", "error")
    assert len(logging.getLogger("rlkit").handlers) == 1


def test_handler_of_the_root_logger_does_not_repeat_lines(log, caplog):
    log()  # caplog's handler is on the root logger
    assert caplog.messages == []


def test_command_restores_the_logging_of_its_caller(capsys, caplog):
    def command():
        logging.getLogger("rlkit.runs").info("in the command")
        return 0

    assert run_command(command) == 0
    assert capsys.readouterr().err == "rlkit: in the command\n" and caplog.messages == []
    logging.getLogger("rlkit.runs").warning("after it")
    assert capsys.readouterr().err == "" and caplog.messages == ["after it"]
    logger = logging.getLogger("rlkit")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)


def test_usage_error_is_printed_at_every_level(monkeypatch, capsys):
    def command():
        raise UserError("no such key")

    monkeypatch.setenv("RLKIT_LOG_LEVEL", "error")
    assert run_command(command) == 2
    assert capsys.readouterr().err == "rlkit: no such key\n"


ALIGNED = "The tokenizer has new PAD/BOS/EOS tokens that differ. Updated tokens: {'%s': None}."
TRITON = "Triton is installed, but `triton.backends` could not be imported. Disabling Triton."


def test_notices_of_libraries_are_hidden_and_their_other_warnings_shown(log, caplog):
    def shown(name, *messages):
        caplog.clear()
        for message in messages:
            logging.getLogger(name).warning(message)
        return caplog.messages

    messages = (ALIGNED % "bos_token_id", ALIGNED % "eos_token_id", "CUDA is not available")
    log()
    assert shown("transformers.trainer_utils", *messages) == list(messages[1:])
    assert shown("transformers.trainer", *messages) == list(messages)
    log(RLKIT_LOG_LEVEL="error")
    assert shown("transformers.trainer_utils", *messages) == list(messages[1:])
    log(RLKIT_LOG_LEVEL="debug")
    assert shown("transformers.trainer_utils", *messages) == list(messages)
    log()
    reset_logging()
    assert shown("transformers.trainer_utils", *messages) == list(messages)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_notice_about_triton_is_hidden_only_with_the_cpu_build_of_vllm(log, caplog, monkeypatch, on_cpu):
    monkeypatch.setattr("rlkit.logs._has_vllm_for_cpu", lambda: on_cpu)
    log()
    logging.getLogger("vllm.triton_utils.importing").warning(TRITON)
    assert caplog.messages == ([] if on_cpu else [TRITON])


def test_bars_of_datasets_are_hidden_unless_the_user_set_its_variable(log, monkeypatch):
    name = "HF_DATASETS_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(name, raising=False)
    log()
    assert os.environ[name] == "1"
    log(RLKIT_LOG_LEVEL="debug")
    assert name not in os.environ
    log()
    reset_logging()
    assert name not in os.environ
    monkeypatch.setenv(name, "0")
    log()
    assert os.environ[name] == "0"
    reset_logging()
    assert os.environ[name] == "0"


def test_bars_of_transformers_are_hidden_while_a_command_runs(log, capsys):
    from transformers.utils.logging import tqdm

    def bar():
        hide_weight_bars()
        list(tqdm(range(3), desc="Loading weights"))
        return capsys.readouterr().err

    assert "Loading weights" in bar()  # no command is running
    log()
    assert bar() == ""
    reset_logging()
    assert "Loading weights" in bar()
    log(RLKIT_LOG_LEVEL="debug")
    assert "Loading weights" in bar()
