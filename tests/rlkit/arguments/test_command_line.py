"""Keys are checked before anything heavy is imported, and every option has a single spelling."""

import datetime
import json
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig

from rlkit.arguments.command_line import CommandParser, check_keys, read_keys
from rlkit.arguments.help import GROUPS, short_help
from rlkit.arguments.parse import trl_parser
from rlkit.arguments.schema import INSTALLED, all_keys, class_fields, rlkit_keys
from rlkit.errors import UserError
from tests.quick import ROOT

RUN = ["--environment", "causal-v1", "--model_name_or_path", "none", "-o", "runs/x"]
IMPORTED = {"train": GRPOConfig, "sft": SFTConfig, "rank": TrainingArguments}


def error_of(*argv, command="train"):
    with pytest.raises(UserError) as caught:
        check_keys(command, [*RUN, *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", INSTALLED)
def test_all_keys_equal_the_fields_of_the_imported_classes(command):
    imported = {f.name for cls in (IMPORTED[command], ModelConfig) for f in fields(cls) if f.init}
    assert set(all_keys(command)) == imported | set(rlkit_keys(command))


def test_rlkit_keys_returns_the_same_types_after_a_parse():
    before = {command: rlkit_keys(command) for command in INSTALLED}
    for command in INSTALLED:
        trl_parser(command)
    assert {command: rlkit_keys(command) for command in INSTALLED} == before
    assert before["sft"]["fold"] == before["train"]["fold"] == "str | None"


def test_class_fields_names_a_missing_class_or_package():
    with pytest.raises(UserError, match=r"no class Nothing in trainer/grpo_config\.py"):
        class_fields("trl", "trainer/grpo_config.py", "Nothing")
    with pytest.raises(UserError, match="pip install no_such_package"):
        class_fields("no_such_package", "a.py", "A")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["train", *RUN, "--learning_rat", "1"], "'--learning_rat' (did you mean 'learning_rate'?)"),
        (["train", *RUN, "--num_generations", "0"], "num_generations must be at least 1, not 0"),
        (["train", *RUN, "--vllm_mode", "colocat"], "(did you mean 'colocate'?)"),
        (["train", *RUN, "--accelerate", "ddpp", "--beta", "-1"], "no accelerate config 'ddpp'"),
        (["train", *RUN, "--accelerate", "ddp", "--beta", "-1"], "beta must be at least 0, not -1"),
        (["sft", *RUN, "--beta", "1"], "it is a key of `rlkit train`, not of `rlkit sft`"),
        (["rank", *RUN, "--objective", "infonc"], "(did you mean 'infonce'?)"),
        (["train", *RUN, "--environment_args.num_node", "3"], "(did you mean 'num_nodes'?)"),
        (["train", *RUN, "--num_nodes", "3"], "set --environment_args.num_nodes"),
        (["train", *RUN, "--model_name_or_path", "./none"], "there is no model folder './none'"),
        (["train", *RUN, "--model_name_or_path", "docs"], "the folder has no config.json"),
        (["rank", *RUN, "--model_name_or_path", "./none"], "there is no model folder './none'"),
        (["sft", *RUN, "--model_name_or_path", "bundled:x"], "there is no model 'bundled:x'"),
        (["train", *RUN, "--fold", "docs:a"], "fold: docs is a folder; name a file"),
        (["sft", *RUN, "--demonstrations", "best:"], "demonstrations: an empty path"),
        (["train", *RUN, "--rewards", "x" * 300 + ".py:f"], "File name too long"),
        (["train", *RUN, "--use_peft", "--lora_target_modules", "("], "not a valid regular expression"),
        (["train", *RUN, "--guards", "{length: stop, length: off}"], "guards: the key 'length' is set twice"),
        (["serve", "docs"], "the folder has no config.json"),
        (["serve", "m", "--port", "70000"], "--port must be at least 1 and at most 65,535"),
        (["serve", "m", "--dtype", "half"], "unknown --dtype 'half'"),
        (["check", "causal-v1", "--split", "validation"], "(did you mean 'dev'?)"),
        (["sft", *RUN, "--demonstrations", "anser"], "(did you mean 'answer'?)"),
        (["train", *RUN, "--resume"], "there is no run directory runs/x to resume"),
        (["train", *RUN, "--resume", "--overwrite", "true"], "set --resume or --overwrite, not both"),
        (["train", *RUN[:4], "-o", "README.md"], "README.md is a file"),
        (["train", *RUN[:4], "-o", "docs"], "resume it with --resume"),
        (["train", *RUN[:4], "-o", "docs", "--resume"], "cannot resume docs: it is not a run directory"),
        (["train", *RUN, "--rewards", "none.py:f"], "there is no file 'none.py'"),
        (["eval", "m", "--environment", "causal-v1", "-o", "docs"], "docs is a folder; name a file"),
        (["eval", "m", "--environment", "causal-v1", "--dtype", "bf"], "unknown dtype 'bf'"),
        (["index", "a.jsonl", "-o", "b", "--k1", "-1"], "--k1 must be at least 0"),
        (["report", "runs/x", "-o", "README.md/a.html"], "README.md is not a folder"),
        (["train", "--model_name_or_path", "m"], "no environment given"),
        (["train", "--environment", "casual-v1"], "(did you mean 'causal-v1'?)"),
        (["train", "--environment", "causal-v1"], "model_name_or_path"),
        (["train", *RUN[:4]], "output_dir"),
        (["train", "configs/causal/smolm2.yaml"], "(did you mean 'configs/causal/smollm2.yaml'?)"),
        (["eval", "m", "--environment", "causal-v1", "--top_p", "2"], "top_p must be above 0 and at most 1"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_usage_error_is_one_line_before_heavy_imports(argv, line):
    program = (
        "import sys; sys.argv = ['rlkit', *sys.argv[1:]]\n"
        "from rlkit.commands.main import main\n"
        "code = main()\n"
        "print(code, sorted({'torch', 'trl', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.stdout == "2 []\n", result.stderr
    assert result.stderr.startswith("rlkit: ") and result.stderr.count("\n") == 1
    assert line in result.stderr


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning-rate", "1"], "did you mean 'learning_rate'"),
        (["--no_shared_prefix"], "write --shared_prefix false"),
        (["--no-shared-prefix"], "write --shared_prefix false"),
        (["--args", "a=1"], "did you mean 'environment_args'"),
        (["--split", "dev"], "did you mean 'evaluation_split'"),
        (["--dry-run"], "did you mean 'dry_run'"),
        (["-lr", "3"], "did you mean '--learning_rate'"),
        (["-x"], "keys start with --"),
        (["-n", "3"], "did you mean '--evaluation_tasks'"),
        (["--zzzzzz", "1"], "`rlkit train --help`"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "1", "2"], "takes one value"),
        (["--rewards"], "--rewards needs a value"),
        (["--config", "a.yaml", "--config=b.yaml"], "only one config file"),
        (["--environment_args.level", "a", "b"], "takes one value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_check_keys_suggests_the_right_spelling(argv, expected):
    assert expected in error_of(*argv)


@pytest.mark.parametrize("key", ["accelerate", "dry_run"])
def test_read_keys_rejects_command_line_options_in_a_file(key, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"{key}: ddp")
    with pytest.raises(UserError, match="a command-line option, not a config key"):
        read_keys("train", [str(path)])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("true", True), ("True", True), ("None", None), ("no", "no"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("[1, a]", [1, "a"]), ('{"a": 1}', {"a": 1}), ("a: b", "a: b"),
    ],
)  # fmt: skip
def test_read_keys_parses_values_of_parts(text, value):
    parsed = read_keys("train", [*RUN, "--environment_args.x", text]).values["environment_args"]["x"]
    assert parsed == value and type(parsed) is type(value)


def test_read_keys_accepts_null_for_optional_keys_only():
    keys = read_keys("train", [*RUN, "--num_tasks", "null", "--reward_args=null"])
    assert keys.values["num_tasks"] is keys.values["reward_args"] is None
    assert not {"num_tasks", "reward_args"} & keys.from_command_line
    assert "must be a number" in error_of("--learning_rate", "null")


def test_read_keys_converts_python_values_to_plain_ones(tmp_path):
    overrides = {
        "model_name_or_path": tmp_path / "model",
        "rewards": ("a", "b"),
        "learning_rate": np.float64(0.5),
        "environment_args": {"folder": tmp_path, "sizes": (1, np.int64(2)), "day": datetime.date(2024, 1, 2)},
        "scale_rewards": False,
    }
    values = read_keys("train", RUN, overrides).values
    assert values["model_name_or_path"] == str(tmp_path / "model") and values["rewards"] == ["a", "b"]
    assert type(values["learning_rate"]) is float and values["scale_rewards"] == "none"
    assert values["environment_args"] == {"folder": str(tmp_path), "sizes": [1, 2], "day": "2024-01-02"}
    json.dumps(values)
    with pytest.raises(UserError, match=r"environment_args\.f must be .* not function"):
        read_keys("train", RUN, {"environment_args": {"f": lambda: 1}})


def test_read_keys_accepts_yaml_mappings_on_the_command_line():
    argv = [*RUN, "--guards", "{length: stop, gradient: off}", "--generation_kwargs={min_new_tokens: 2}"]
    values = read_keys("train", argv).values
    assert values["guards"] == {"length": "stop", "gradient": False}
    assert values["generation_kwargs"] == {"min_new_tokens": 2}
    assert "is not valid JSON" in error_of("--guards", "length: stop")
    assert "is not valid JSON" in error_of("--guards", "{length: stop")


def test_read_keys_rejects_values_that_no_key_can_hold(tmp_path):
    path = tmp_path / "a.yaml"
    for text, expected in {
        "environment_args: &a {b: *a}": "environment_args contains itself",
        'model_name_or_path: "a\\0b"': "model_name_or_path must not contain a NUL character",
        "output_dir: [a, b]": "output_dir must be a string",
        "seed: 2024-13-01": "not valid YAML",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            read_keys("train", [str(path)])


HOSTILE = [
    "\x85",
    "\u2028-1",
    "nan",
    "-inf",
    "1e999",
    "9" * 5000,
    "{",
    "[",
    "{a: b}",
    "null",
    "a b",
    "ü",
    "١",
]
TEXT = st.text(max_size=20) | st.sampled_from(HOSTILE)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | TEXT,
    lambda values: st.lists(values, max_size=2) | st.dictionaries(TEXT, values, max_size=2),
    max_leaves=3,
)


@given(st.sampled_from([(c, key) for c in INSTALLED for key in sorted(all_keys(c))]), VALUES)
def test_read_keys_parses_or_rejects_any_value(command_and_key, value):
    command, key = command_and_key
    arguments = [f"--{key}={value}"] if isinstance(value, str) else []
    overrides = {} if isinstance(value, str) else {key: value}
    try:
        read_keys(command, arguments, overrides)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2500


def test_read_keys_rejects_an_argument_without_a_key():
    with pytest.raises(UserError, match="unexpected argument 'extra'"):
        read_keys("train", ["configs/causal/smollm2.yaml", "extra"])


def test_read_keys_accepts_short_options_and_bare_flags():
    keys = read_keys("train", [*RUN, "--use_peft", "--rewards", "a", "b", "--seed=3"])
    values = keys.values
    assert (values["output_dir"], values["use_peft"], values["rewards"]) == ("runs/x", True, ["a", "b"])
    assert values["seed"] == "3" and {"seed", "output_dir"} <= keys.from_command_line


def test_read_keys_lets_overrides_win_without_changing_them():
    arguments = {"level": {"deep": 1}}
    argv = [*RUN, "--seed", "1", "--environment_args.level.deep", "2"]
    keys = read_keys("train", argv, {"seed": 2, "environment_args": arguments})
    assert keys.values["seed"] == 2 and "seed" not in keys.from_command_line
    assert keys.values["environment_args"] == {"level": {"deep": 2}}
    assert arguments == {"level": {"deep": 1}}
    with pytest.raises(UserError, match=r"'learning_rat' \(did you mean 'learning_rate'\?\)"):
        read_keys("train", RUN, {"learning_rat": 1})


@given(
    st.sampled_from(sorted(all_keys("train"))),
    st.integers(0, 40),
    st.characters(codec="ascii", categories=["Ll"]),
)
def test_read_keys_rejects_every_misspelled_key(key, position, letter):
    """Insert one letter anywhere in any key."""
    index = position % (len(key) + 1)
    misspelled = key[:index] + letter + key[index:]
    if misspelled in all_keys("train"):
        return
    assert repr(f"--{misspelled}") in error_of(f"--{misspelled}", "1")


@pytest.mark.parametrize("command", INSTALLED)
def test_short_help_fits_a_terminal_and_lists_every_rlkit_key_once(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = short_help(command, "Train.")
    lines = text.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 80
    for key in rlkit_keys(command):
        assert sum(line.startswith(f"  --{key} ") for line in lines) == 1, key
    assert f"{len(all_keys(command)) - len(rlkit_keys(command))} keys" in text.replace("\n", " ")
    assert f"rlkit {command} --help_all" in text.replace("\n", " ")


def test_every_rlkit_key_has_one_heading():
    grouped = [key for keys in GROUPS.values() for key in keys]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {key for command in INSTALLED for key in rlkit_keys(command)}


@pytest.fixture
def parser():
    parser = CommandParser(prog="rlkit command")
    parser.add_argument("-n", "--evaluation_tasks", type=int)
    parser.add_argument("-o", "--out", required=True)
    parser.add_environment_args()
    return parser


def test_command_parser_collects_parts_of_environment_args(parser):
    argv = ["-o", "a", "--environment_args.level", "x", "--environment_args.rate=1e-3", "-n", "3"]
    options = parser.parse_args(argv)
    assert options.environment_args == {"level": "x", "rate": 0.001}
    assert (options.out, options.evaluation_tasks) == ("a", 3)
    assert parser.parse_args(["-o", "a"]).environment_args == {}
    for text in ('{"a": [1]}', "{a: [1]}"):
        assert parser.parse_args(["-o", "a", "--environment_args", text]).environment_args == {"a": [1]}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required"),
        (["--ouput", "x"], "'--ouput'"),
        (["-o", "a", "--evaluation-tasks", "3"], "did you mean '--evaluation_tasks'"),
        (["-o", "a", "--args", "x=1"], "did you mean '--environment_args'"),
        (["-o", "a", "--evaluation_task", "3"], "did you mean '--evaluation_tasks'"),
        (["-o", "a", "-n", "x"], "invalid int value"),
        (["-o", "a", "--environment_args", "x=1"], "must be a mapping such as '{a: 1}'"),
        (["-o", "a", "--environment_args", "[1]"], "must be a mapping"),
        (["-o", "a", "--environment_args.x"], "needs a value"),
        (["-o", "a", "--environment_args", "{}", "--environment_args.x", "1"], "not both"),
        (["-o", "a", "more"], "'more'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_command_parser_raises_one_line_errors(parser, argv, expected):
    with pytest.raises(UserError) as caught:
        parser.parse_args(argv)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
