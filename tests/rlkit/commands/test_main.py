"""The command line: a usage error exits with 2 and prints one line to stderr, never a traceback."""

import importlib
import re
import resource
import subprocess
import sys

import pytest

from rlkit.commands import main as cli
from rlkit.errors import RewardError
from tests.quick import ROOT, TOY

ENVIRONMENT = """
import json
from rlkit import Environment

class A(Environment):
    id = "a-v1"
    metric = "m"
    rewards = {{"m": lambda completion: 1.0}}
    reward_weights = {{"m": 1.0}}

    def __init__(self):
        {init}

    def tasks(self, split, n=None, seed=0):
        {tasks}

    def answer(self, task):
        return ""
"""


def command(*argv):
    return subprocess.run([sys.executable, "-m", "rlkit", *argv], capture_output=True, text=True, check=False)


@pytest.fixture
def rlkit(monkeypatch, capsys):
    """Return a function that runs the command line in this process and returns exit code and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["rlkit", *argv])
        code = cli.main()
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def train(rlkit, tmp_path, tiny_folder):
    """Return a function that runs `rlkit train` with valid keys, some of which the test replaces."""

    def run(*argv, **keys):
        defaults = {
            "environment": f"{TOY}:Letters",
            "model_name_or_path": tiny_folder,
            "output_dir": str(tmp_path / "run"),
            "use_cpu": "true",
            "bf16": "false",
            "report_to": "none",
            "max_steps": "1",
        }
        key_argv = []
        for key, value in (defaults | keys).items():
            if value:
                key_argv += [f"--{key}", value]
        return rlkit("train", *key_argv, *argv)

    return run


def assert_one_line(result, *expected):
    code, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("rlkit: ")]
    assert code == 2
    assert len(lines) == 1 and stderr.splitlines()[-1] == lines[0] and "Traceback" not in stderr
    assert all(fragment in lines[0] for fragment in expected), lines[0]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["rlkit", *argv])
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "sft", "eval", "report", "envs", "check"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_underscored_options(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["rlkit", name, "--help"])
    try:
        code = cli.main()
    except SystemExit as exit:  # argparse exits after printing the help
        code = exit.code
    text = capsys.readouterr().out
    assert code == 0 and f"rlkit {name}" in text
    options = {word.strip(",[]") for word in text.split() if word.strip("[").startswith("--")}
    assert not [word for word in options if "-" in word[2:]], "options are spelled with underscores"


def test_help_all_lists_the_keys_of_the_libraries(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlkit", "rank", "--help_all"])
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in ("objective", "adam_beta1", "lora_r"))
    assert "--adam-beta1" not in text and "--no_" not in text


def test_unknown_command_names_the_nearest():
    result = command("trian")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "rlkit: there is no command 'trian' (did you mean 'train'?)\n"


def test_unknown_key_names_the_nearest():
    result = command("train", "--learning_rat", "1")
    assert result.returncode == 2
    assert result.stderr == "rlkit: unknown key '--learning_rat' (did you mean 'learning_rate'?)\n"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"environment": "casual-v1"}, ["'casual-v1'", "'causal-v1'"]),
        ({"environment": None}, ["environment"]),
        ({"environment": "none.py:Letters"}, ["none.py"]),
        ({"environment": f"{TOY}:Leters"}, ["'Letters'"]),
        ({"environment": f"{TOY}:correct"}, ["Environment"]),
        ({"environment_args": '{"lenght": 2}'}, ["'lenght'", "'length'"]),
        ({"environment": "causal-v1", "environment_args": '{"num_nodes": 1}'}, ["num_nodes"]),
        ({"environment": "causal-v1", "environment_args": '{"level": "x"}'}, ["level"]),
        ({"environment": f"{TOY}:NoPrompt"}, ["letters-v1", "'prompt'"]),
        ({"environment": f"{TOY}:NoTask"}, ["letters-v1", "no task"]),
        ({"max_turns": "0"}, ["max_turns", "at least 1"]),
        ({"rewards": "corect"}, ["'corect'", "'correct'"]),
        ({"rewards": "needs_a_column"}, ["'wisdom'"]),
        ({"rewards": f"{TOY}:datasets"}, ["cannot be called"]),
        ({"reward_weights": "3", "rewards": None, "environment": "causal-v1"}, ["weights"]),
        ({"model_name_or_path": None}, ["model_name_or_path"]),
        ({"model_name_or_path": "bundled:smollm"}, ["bundled:smollm2-135m"]),
        ({"model_name_or_path": "./no/such/model"}, ["./no/such/model"]),
        ({"model_name_or_path": str(ROOT / "tests")}, ["cannot load"]),
        ({"model_name_or_path": "no-such-organisation/no-such-model"}, ["cannot load"]),
        ({"dtype": "float17"}, ["float17"]),
        ({"use_peft": "true", "lora_target_modules": "nope"}, ["invalid adapter", "nope"]),
        ({"attn_implementation": "flash_attention_9"}, ["flash_attention_9"]),
        ({"reward_time_limit": "0"}, ["reward_time_limit", "above 0"]),
        ({"reward_error_budget": "3"}, ["reward_error_budget", "at most 1"]),
        ({"num_generations": "3"}, ["num_generations"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_train_usage_error_is_one_line(train, keys, expected):
    assert_one_line(train(**keys), *expected)


def test_train_rejects_an_existing_run_directory(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert_one_line(train(), "exists", "--resume", "--overwrite")


def snapshot(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model_name_or_path": "./no/such/model"}, ["./no/such/model"]),
        ({"environment_args": '{"lenght": 2}'}, ["'length'"]),
        ({"rewards": "corect"}, ["'correct'"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["min_lr"]),
        ({"lr_scheduler_kwargs": '{"foo": 1}', "lr_scheduler_type": "cosine"}, ["foo"]),
        ({"optim": "adamw_bnb_8bit"}, ["bitsandbytes"]),
        ({"lr_scheduler_kwargs": "{power: x}", "lr_scheduler_type": "polynomial"}, ["lr_scheduler_kwargs"]),
        ({"use_peft": "true", "lora_modules_to_save": "lm_haed"}, ["'lm_head'"]),
        ({"use_peft": "true", "lora_target_parameters": "norm.wieght"}, ["'norm.weight'"]),
        ({"router_aux_loss_coef": "0.1"}, ["Mixture-of-Experts"]),
        ({"use_peft": "true", "lora_target_modules": "lm_head"}, ["lm_head"]),
        ({"num_tasks": "1", "num_generations": "4", "per_device_train_batch_size": "8"}, ["1 tasks"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_overwrite_deletes_nothing_before_the_new_run_can_start(train, tmp_path, keys, expected):
    run = tmp_path / "run"
    for name in ("config.yaml", "checkpoint-2/model.safetensors", "metrics.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    before = snapshot(run)
    assert_one_line(train(**keys, overwrite="true"), *expected)
    after = {path: time for path, time in snapshot(run).items() if path.name != ".lock"}
    assert after == before


def test_rejected_run_creates_no_directory(train, tmp_path):
    assert_one_line(train(model_name_or_path="./no/such/model"), "./no/such/model")
    assert not (tmp_path / "run").exists()


def test_sft_rejects_a_max_length_that_leaves_nothing_to_learn(rlkit, tmp_path, tiny_folder):
    argv = ["--environment", f"{TOY}:Letters", "--model_name_or_path", tiny_folder, "--use_cpu", "true"]
    argv += ["--report_to", "none", "--output_dir", str(tmp_path / "run"), "--max_length", "1"]
    code, stderr = rlkit("sft", *argv)
    assert code == 2 and "raise max_length" in stderr.splitlines()[-1]


def test_train_neither_resumes_nor_deletes_a_folder_without_config(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    for key in ("resume", "overwrite"):
        assert_one_line(train(**{key: "true"}), "is not a run directory")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_train_with_failing_rewards_only_fails_and_logs_the_reason(train, tmp_path, capsys):
    """Also if the run is too short to exhaust the error budget."""
    keys = {"num_generations": "2", "per_device_train_batch_size": "2", "evaluation_tasks": "2"}
    code, stderr = train(rewards="broken", max_completion_length="4", **keys)
    assert code == 1 and not (tmp_path / "run" / "model").exists()
    assert re.search(r"all \d+ rollouts of this run are invalid.*the judge is down", stderr)
    assert "2 of 2 held-out rollouts are invalid, the first because: " in stderr
    assert "the judge is down" in stderr


def test_resume_names_the_nearest_run_directory(train, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").touch()
    assert_one_line(train(resume="true"), "no run directory", "to resume", f"'{tmp_path / 'runs'}'")


def test_train_rejects_a_run_directory_that_cannot_be_created(train, tmp_path):
    (tmp_path / "file").touch()
    assert_one_line(
        train(output_dir=str(tmp_path / "file" / "run")), "cannot create the run directory", "is a file"
    )
    assert_one_line(train(output_dir=str(tmp_path / "file")), "cannot create the run directory", "is a file")
    assert_one_line(train(output_dir="/proc/none/run"), "/proc")


@pytest.mark.parametrize("save_only_model", ["true", "false"])
def test_full_disk_is_a_one_line_error(train, tmp_path, save_only_model):
    """A limit on the file size fails like a full disk: in safetensors, or in torch.save."""
    limit = 60_000 if save_only_model == "true" else 150_000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        keys = {"save_steps": "1", "num_generations": "2", "per_device_train_batch_size": "2"}
        result = train(**keys, save_only_model=save_only_model, max_completion_length="4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    code, stderr = result
    assert code == 2 and "Traceback" not in stderr
    line = stderr.splitlines()[-1]
    assert line.startswith("rlkit: cannot write a ") and f"checkpoints in {tmp_path / 'run'} are kept" in line


def test_train_rejects_a_folder_without_a_model(train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line(train(model_name_or_path=str(tmp_path / "empty")), "cannot load", "config.json")


def test_train_rejects_a_fold_without_a_file(train):
    assert_one_line(train(fold="x"), "fold must be FILE:NAME", "'x'")


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        (ENVIRONMENT.format(init="1 / 0", tasks="raise"), "ZeroDivisionError: division by zero"),
        (ENVIRONMENT.format(init="pass", tasks="json.loads('{')"), "JSONDecodeError"),
    ],
    ids=["syntax", "import", "constructor", "tasks"],
)
def test_exception_in_an_environment_shows_only_its_frames(train, tmp_path, source, last):
    file = tmp_path / "mine.py"
    file.write_text(source)
    code, stderr = train(environment=f"{file}:A")
    assert code == 2
    lines = stderr.splitlines()
    assert lines[-1].startswith(f"rlkit: {file}, line ") and last in stderr
    frames = [line for line in lines if line.lstrip().startswith("File ")]
    assert frames and all(str(file) in line for line in frames)
    assert "rlkit/" not in stderr.replace(str(tmp_path), "")


@pytest.mark.parametrize("name", ["mine.py", "random.py"])  # the second is also a standard module
def test_exception_in_a_reward_file_shows_only_its_frames(train, tmp_path, name):
    file = tmp_path / name
    file.write_text("import helper_that_is_missing\n")
    code, stderr = train(rewards=f"{file}:reward")
    assert code == 2 and f'File "{file}", line 1' in stderr


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("pass", "self.rewards = ['m']", "rewards must be a mapping by name"),
        ("raise", "return []", "must return a datasets.Dataset, not list"),
    ],
)
def test_environment_that_breaks_the_contract_is_a_one_line_error(train, tmp_path, old, new, expected):
    file = tmp_path / "mine.py"
    parts = {"init": "pass", "tasks": "raise"}
    file.write_text(
        ENVIRONMENT.format(**{name: new if text == old else text for name, text in parts.items()})
    )
    assert_one_line(train(environment=f"{file}:A"), expected)


def test_incomplete_environment_is_a_one_line_error(train, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(ENVIRONMENT.format(init="pass", tasks="raise").partition("    def answer")[0])
    assert_one_line(train(environment=f"{file}:A"), "mine.py:A does not define answer")
    file = tmp_path / "other.py"
    source = ENVIRONMENT.format(init="pass", tasks="raise")
    file.write_text(source.replace('    metric = "m"\n', ""))
    assert_one_line(train(environment=f"{file}:A"), "other.py:A does not define metric")


def test_author_frames_excludes_installed_packages(monkeypatch):
    from rlkit.registry import author_frames, load_object

    load_object("trl.rewards:think_format_reward")
    load_object("json:loads")
    for fail in ("trl.GRPOConfig('x', top_k='x', generation_batch_size=7)", "json.loads('{')"):
        with pytest.raises(Exception) as caught:
            eval(fail, {"trl": importlib.import_module("trl"), "json": importlib.import_module("json")})
        assert author_frames(caught.value) == []


def test_run_command_propagates_bugs():
    def bug():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        cli.run_command(bug)


def test_train_requires_a_chat_template(train, tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert_one_line(train(model_name_or_path=str(tmp_path / "base")), "chat template")


def test_sft_rejects_an_environment_without_worked_solutions(rlkit, tmp_path):
    argv = [
        "--environment",
        f"{TOY}:Letters",
        "--demonstrations",
        "solution",
        "--model_name_or_path",
        "none",
    ]
    result = rlkit("sft", *argv, "--output_dir", str(tmp_path / "run"))
    assert_one_line(result, "letters-v1", "no worked solution")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["--environment"]),
        (["model", "--environment", "casual-v1"], ["'causal-v1'"]),
        (["model", "--environment", "causal-v1", "-n", "0"], ["evaluation_tasks"]),
        (["model", "--environment", "causal-v1", "--samples", "4"], ["temperature"]),
        (["model", "--environment", "causal-v1", "--environment_args", "num_nodes"], ["mapping"]),
        (["./nowhere", "--environment", "causal-v1"], ["./nowhere"]),
        (["--compare", "a.json", "b.json"], ["a.json"]),
    ],
    ids=" ".join,
)
def test_eval_usage_error_is_one_line(rlkit, argv, expected):
    assert_one_line(rlkit("eval", *argv), *expected)


def test_run_command_returns_1_for_a_reward_error(capsys):
    def stop():
        raise RewardError("rewards failed")

    assert cli.run_command(stop) == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("can_resume", [True, False])
def test_run_command_returns_130_for_keyboard_interrupt(capsys, can_resume):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.run_command(interrupted, can_resume=can_resume) == 130
    assert ("--resume" in capsys.readouterr().err) is can_resume


def test_envs_lists_each_environment(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlkit", "envs"])
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert "causal-v1" in text and "num_nodes=10" in text and "distribution" in text
