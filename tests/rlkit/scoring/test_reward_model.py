"""The reward `reward_model`, on tiny random classifiers: its values are those of TRL's trainer."""

import inspect
import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.scoring.reward_model import RewardModel
from tests.conftest import make_tokenizer
from tests.quick import QUICK_GRPO, QUICK_GRPO_CONFIG, ROOT, TOY

KINDS = ("llama", "qwen3", "bert")


def save_classifier(folder, kind="llama", dtype=torch.float32, tokenizer=None, **options):
    """Save a random classifier and its tokenizer to a folder; return the folder's name."""
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "num_labels": 1,
    }
    if kind != "bert":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | options))
    AutoModelForSequenceClassification.from_config(config, dtype=dtype).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a classifier of each of `KINDS`."""
    return {kind: save_classifier(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def reward_model(folders):
    return RewardModel(folders["llama"])


def chat(*contents):
    """Return chat messages of alternating roles, starting with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def answer(*contents):
    """Return the messages that follow a prompt, starting with the assistant."""
    return chat("", *contents)[1:]


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


PROMPTS = [chat("Hi"), chat("Say aaa!"), chat("What is 2 + 2?", "4", "Sure?"), chat("Count.")]
TOOL_TURNS = [*answer("<search>x"), {"role": "tool", "content": "document 1"}, *answer("It is x.")]
COMPLETIONS = [answer("Hello, how are you?"), answer("aaa"), answer("y" * 60, "Really?", "no"), TOOL_TURNS]
STRINGS = [message[-1]["content"] for message in COMPLETIONS]


@pytest.fixture(scope="module")
def trl_rewards(tiny_folder, tiny_tokenizer, tmp_path_factory):
    """Return a function that scores prompts and completions with TRL's own trainer and a classifier."""
    from trl import GRPOConfig, GRPOTrainer

    def trl_rewards(folder, prompts, completions):
        trainer = GRPOTrainer(
            model=tiny_folder,
            reward_funcs=folder,
            args=GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **QUICK_GRPO_CONFIG),
            train_dataset=load_environment(f"{TOY}:Letters").tasks("train", 26),
            processing_class=tiny_tokenizer,
        )
        rows = [{"prompt": prompt} for prompt in prompts]
        return trainer._calculate_rewards(rows, prompts, completions, None)[:, 0].tolist()

    return trl_rewards


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_trls_trainer(folders, trl_rewards, kind):
    reward_model = RewardModel(folders[kind], batch_size=3)
    expected = trl_rewards(folders[kind], PROMPTS, COMPLETIONS)
    assert reward_model(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    strings = [prompt[-1]["content"] for prompt in PROMPTS]
    expected = trl_rewards(folders[kind], strings, STRINGS)
    assert reward_model(strings, STRINGS) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=30)
@given(st.data())
def test_values_depend_neither_on_batch_size_nor_on_order(folders, data):
    kind = data.draw(st.sampled_from(KINDS))
    lengths = data.draw(st.lists(st.integers(0, 80), min_size=1, max_size=9))
    rows = [(chat(f"Task {i}"), answer(chr(97 + i) * length)) for i, length in enumerate(lengths)]
    alone = RewardModel(folders[kind], batch_size=1)
    expected = [alone([prompt], [completion])[0] for prompt, completion in rows]
    order = data.draw(st.permutations(range(len(rows))))
    batched = RewardModel(folders[kind], batch_size=data.draw(st.integers(2, 5)))
    values = batched([rows[i][0] for i in order], [rows[i][1] for i in order])
    assert values == pytest.approx([expected[i] for i in order], abs=1e-5)


# Without the token id in the config, transformers raises. With a wrong one, it silently reads the logit of
# the padding.
@pytest.mark.parametrize("declared", [None, 0])
def test_padding_is_not_read_if_the_tokenizer_has_no_pad_token(tmp_path, declared):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    folder = save_classifier(tmp_path, tokenizer=tokenizer, pad_token_id=declared)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    reward_model = RewardModel(folder)
    alone = [reward_model(["ab"], [text])[0] for text in STRINGS]
    assert reward_model(["ab"] * len(STRINGS), STRINGS) == pytest.approx(alone, abs=1e-5)
    reward_model.load().config.pad_token_id = 0
    wrong = reward_model(["ab"] * len(STRINGS), STRINGS)
    assert wrong != pytest.approx(alone, abs=1e-2)


def test_overlong_and_empty_inputs_fail_alone(folders):
    reward_model = RewardModel(folders["llama"], max_length=40)
    valid, overlong, empty = reward_model(["a", "a", ""], ["b" * 39, "b" * 40, ""])
    assert valid == pytest.approx(RewardModel(folders["llama"])(["a"], ["b" * 39])[0], abs=1e-5)
    assert isinstance(overlong, ValueError) and "has 41 tokens, more than 40" in str(overlong)
    assert isinstance(empty, ValueError) and "is empty" in str(empty)
    (limited,) = RewardModel(folders["llama"])(["a"], ["b" * 256])
    assert "has 257 tokens, more than 256" in str(limited)  # max_position_embeddings


def test_the_tokenizer_may_have_the_lower_limit(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 30
    folder = save_classifier(tmp_path, tokenizer=tokenizer)
    assert RewardModel(folder).max_length == 30
    assert RewardModel(folder, max_length=50).max_length == 50


def test_a_conversation_that_the_template_rejects_fails_alone(folders):
    reward_model = RewardModel(folders["llama"])
    reward_model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    *values, rejected = reward_model(PROMPTS, COMPLETIONS)
    assert all(isinstance(value, float) for value in values)
    assert str(rejected) == "no tools"


def test_the_classifier_is_frozen_and_draws_no_random_numbers(tmp_path):
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    reward_model = RewardModel(save_classifier(tmp_path, "bert", **dropout))
    state = torch.get_rng_state()
    values = reward_model(PROMPTS, COMPLETIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert reward_model(PROMPTS, COMPLETIONS) == values
    model = reward_model.load()
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_weight_bytes_are_those_of_the_loaded_weights(tmp_path, dtype):
    reward_model = RewardModel(save_classifier(tmp_path, dtype=torch.bfloat16), dtype=dtype)
    estimated = reward_model.weight_bytes()
    model = reward_model.load()
    assert model.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert estimated == sum(weight.nbytes for weight in model.parameters())
    assert isinstance(reward_model(["a"], ["b"])[0], float)


def test_zero3_does_not_shard_the_classifier(folders, reward_model, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    expected = reward_model(PROMPTS, COMPLETIONS)
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    sharded = RewardModel(folders["llama"])
    assert sharded(PROMPTS, COMPLETIONS) == expected
    assert not any(hasattr(weight, "ds_id") for weight in sharded.load().parameters())
    assert is_deepspeed_zero3_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    del config
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "./missing"}, r"there is no model folder './missing'"),
        ({"model": ""}, "model must be the name or the folder of a reward model, not ''"),
        ({"device": "gpu"}, "unknown device 'gpu': use cpu, cuda or cuda:1"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": 1}, "unknown device 1: use cpu, cuda or cuda:1"),
        ({"dtype": "float23"}, r"unknown dtype 'float23' \(did you mean 'float32'\?\)"),
        ({"max_length": 257}, "max_length must be an integer from 1 to 256, not 257"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"truncate": True}, "has no argument 'truncate'"),
    ],
)
def test_invalid_arguments_are_user_errors(folders, arguments, message):
    arguments = {"reward_model": {"model": folders["llama"]} | arguments}
    with pytest.raises(UserError, match=f"reward 'reward_model'.*{message}"):
        load_rewards(["reward_model"], load_environment(f"{TOY}:Letters"), arguments=arguments)


def test_the_model_is_required():
    with pytest.raises(UserError, match="reward 'reward_model' needs 'model'; set reward_args"):
        load_rewards(["reward_model"], load_environment(f"{TOY}:Letters"))


def test_an_absent_cuda_device_is_an_error_on_loading(folders):
    name = f"cuda:{torch.cuda.device_count()}"
    reward_model = RewardModel(folders["llama"], device=name)
    with pytest.raises(UserError, match=f"there is no device '{name}': this machine has"):
        reward_model(PROMPTS, COMPLETIONS)


def test_models_that_are_not_classifiers_with_one_label_are_user_errors(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="not a sequence classifier: its architecture is LlamaForCausalLM"):
        RewardModel(tiny_folder)
    folder = save_classifier(tmp_path / "labels", num_labels=3)
    with pytest.raises(UserError, match=r"must have one label, but '.*/labels' has 3 \(num_labels\)"):
        RewardModel(folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter: merge it into its model"):
        RewardModel(str(tmp_path / "adapter"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load the reward model '.*/empty'"):
        RewardModel(str(tmp_path / "empty"))


def test_weights_without_the_head_are_a_user_error(tmp_path):
    """transformers only warns, and initializes the head at random."""
    folder = save_classifier(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    edit_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match=r"lack score\.weight, or have another shape .*: use a model"):
        RewardModel(folder)(PROMPTS, COMPLETIONS)


def test_weights_of_other_shapes_or_formats_are_user_errors(tmp_path):
    folder = save_classifier(tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(UserError, match=r"lack model\.layers\..*\.weight, or have another shape"):
        RewardModel(folder)(PROMPTS, COMPLETIONS)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load the reward model .*safetensors"):
        RewardModel(folder)(PROMPTS, COMPLETIONS)


def test_chats_without_a_chat_template_are_a_user_error(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    reward_model = RewardModel(save_classifier(tmp_path, tokenizer=tokenizer))
    assert isinstance(reward_model(["a"], ["b"])[0], float)
    with pytest.raises(UserError, match=r"the tokenizer of the reward model .* has no chat template"):
        reward_model(PROMPTS, COMPLETIONS)


def test_a_run_stops_if_the_weights_cannot_be_loaded(tmp_path):
    """It must not continue with rollouts that are all invalid."""
    folder = save_classifier(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with RewardRunner({"reward_model": RewardModel(folder)}) as runner:
        row = {"prompt": PROMPTS[0], "completion": COMPLETIONS[0]}
        with pytest.raises(UserError, match="cannot load the reward model"):
            runner([row], 1)


def test_runner_makes_only_overlong_rows_invalid(folders):
    reward_model = RewardModel(folders["llama"], max_length=60)
    rows = [{"prompt": "a", "completion": "b" * length} for length in (5, 60, 59)]
    with RewardRunner({"reward_model": reward_model}) as runner:
        scores = runner(rows, 1)
    reason = "reward_model: ValueError: the input of the reward model has 61 tokens, more than 60"
    assert scores.invalid == [None, reason, None]
    expected = reward_model(["a"] * 2, ["b" * 5, "b" * 59])
    assert scores.values[[0, 2], 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_docs_list_exactly_the_arguments():
    page = (ROOT / "docs/rewards/reward_model.md").read_text()
    arguments = set(inspect.signature(RewardModel).parameters)
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == arguments


def test_config_of_the_docs_loads(folders):
    page = (ROOT / "docs/rewards/reward_model.md").read_text()
    keys = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    keys["reward_args"]["reward_model"] |= {"model": folders["llama"], "max_length": 256}
    rewards, weights = load_rewards(
        keys["rewards"],
        load_environment(keys["environment"]),
        keys["reward_weights"],
        keys["reward_args"],
    )
    assert isinstance(rewards["reward_model"], RewardModel) and weights == [1.0, 0.1]


def test_training_uses_the_reward_model(make_trainer, reward_model):
    trainer = make_trainer({"reward_model": reward_model})
    trainer.train()
    trainer.run_dir.flush()
    (file,) = (trainer.run_dir.path / "rollouts").glob("*.parquet")
    rows = pd.read_parquet(file)
    prompts = [chat(prompt) for prompt in rows["prompt"]]
    expected = reward_model(prompts, [answer(text) for text in rows["completion"]])
    assert rows["rewards/reward_model"].tolist() == pytest.approx(expected, abs=1e-5)
    (mean,) = [log["rewards/reward_model/mean"] for log in trainer.state.log_history if "reward" in log]
    assert mean == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert min(expected) < max(expected)


@pytest.fixture(scope="module")
def train(tmp_path_factory, folders, tiny_folder):
    """Return a function that trains with the reward model; it returns its mean in each step."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *argv, batch_size):
        keys = QUICK_GRPO | {
            "environment": f"{TOY}:Letters",
            "model_name_or_path": tiny_folder,
            "output_dir": str(folder / name),
            "rewards": ["reward_model"],
            "reward_args": {"reward_model": {"model": folders["llama"]}},
            "per_device_train_batch_size": batch_size,
            "gradient_checkpointing": False,
            "num_tasks": 20,
            "max_steps": 2,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys))
        command = [sys.executable, "-m", "rlkit", "train", str(path), *argv]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert process.returncode == 0, process.stderr[-3000:]
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [line["rewards/reward_model/mean"] for line in lines if "loss" in line]

    return train


@pytest.fixture(scope="module")
def means_of_one_process(train):
    return train("single", batch_size=8)


# Under FSDP2, `from_pretrained` would fill the weights of every process but the first with zeros.
@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
@pytest.mark.parametrize("shards", ["zero3", "fsdp2"])
def test_two_sharded_processes_log_the_rewards_of_one(train, means_of_one_process, shards):
    means = train(shards, "--accelerate", shards, "--num_processes", "2", batch_size=4)
    assert len(means) == 2
    assert means == pytest.approx(means_of_one_process, abs=1e-4)
