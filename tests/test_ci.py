"""CI: which skipped tests fail it, and configs of published recipes."""

import importlib.util

import pytest

from rlkit.arguments.parse import parse_train
from rlkit.training.session import load_run_rewards, make_environment
from tests.quick import ROOT

CASE = '<testsuite><testcase classname="a" name="b"><skipped type="{}" message="{}"/></testcase></testsuite>'


@pytest.fixture(scope="module")
def skips():
    spec = importlib.util.spec_from_file_location("skips", ROOT / ".ci" / "skips.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("skip", "has_data", "count"),
    [
        (("pytest.skip", "there is no Chromium on this machine"), False, 1),
        (("pytest.skip", "could not import 'pgmpy'"), True, 1),
        (("pytest.skip", "this test needs a GPU"), True, 0),
        (("pytest.skip", "the RLCausal items are not at /x"), False, 0),
        (("pytest.skip", "the RLCausal items are not at /x"), True, 1),
        (("pytest.xfail", "known"), True, 0),
    ],
)
def test_unexpected_returns_skips_that_are_not_allowed(skips, tmp_path, skip, has_data, count):
    file = tmp_path / "tests.xml"
    file.write_text(CASE.format(*skip))
    assert len(skips.unexpected(file, has_data=has_data)) == count


@pytest.mark.parametrize("level", ["association", "intervention", "counterfactual"])
def test_rlcausal_configs_match_the_published_recipes(level):
    file = ROOT / "configs" / "causal" / f"rlcausal_{level}.yaml"
    run = parse_train(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    assert run.args.mapping("environment_args")["level"] == level
    args = run.trainer_args
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 8 * args.num_generations
    assert (args.loss_type, args.epsilon, args.epsilon_high, args.delta) == ("dapo", 0.2, 0.28, 10.0)
    environment = make_environment(run.args)
    assert environment.reward_weights == {"parsed": 0.1, "right_length": 0.1, "distribution": 0.8}
    assert "THOUGHT PROCESS" in environment.tasks("train", 1)[0]["prompt"][0]["content"]


@pytest.mark.parametrize("name", ["ds_1.5b", "dsr_1.5b", "qwen_1.5b"])
def test_hapo_configs_match_the_published_recipes(name):
    file = ROOT / "configs" / "hapo" / f"{name}.yaml"
    run = parse_train(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    args = run.trainer_args
    assert 4 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert (args.num_generations, args.beta, args.temperature, args.max_completion_length) == (
        2,
        0.04,
        0.7,
        32768,
    )
    assert run.args.mapping("environment_args")["dataset"].startswith("agentica-org/DeepScaleR")
    run.args.environment_args = "{}"  # do not download the dataset
    rewards, weights = load_run_rewards(run, make_environment(run.args))
    assert dict(zip(rewards, weights, strict=True)) == {"correct": 1.0, "hapo": 1.0}
    assert (rewards["hapo"].weight, rewards["hapo"].floor, rewards["hapo"].shape) == (1.0, -0.7, "cosine")
