"""Train a tiny model for two optimizer steps under many settings, to compare with recorded steps.

`recorded_steps.safetensors` was recorded at commit 7ef35d9, whose trainer used TRL's own sampling step
(`GRPOTrainer._generate_and_score_completions`). If you change the arithmetic of the step on purpose, record
it again with `python -m tests.rlkit.training.recorded_steps`, and say in the commit message what changed and
why.
"""

import copy
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig

from rlkit.registry import load_environment
from rlkit.rollouts.loop import RolloutLimits
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.advantages import by_key, leave_one_out
from rlkit.training.grpo import GRPOTrainer
from tests import toy
from tests.quick import QUICK_GRPO_CONFIG, TOY

RECORDED = Path(__file__).with_suffix(".safetensors")


class InProcessReward:
    """A reward with state, which therefore runs in this process: a worker would first import torch."""

    calls = 0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class ToyReward(InProcessReward):
    """One of the rewards of the toy environment."""

    def __init__(self, reward):
        self.reward = reward

    def __call__(self, completion: str) -> float:
        return self.reward(completion)


class Judge(InProcessReward):
    """Returns 0, 1, 2, 0, 1, 2, …, and raises in the calls with an index in `failing`."""

    def __init__(self, failing=()):
        self.failing = failing

    def __call__(self, completion: str) -> float:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise ValueError("the judge is down")
        return float((self.calls - 1) % 3)


class Sometimes(InProcessReward):
    """Applies to three of four rollouts: returns 1, 0, 0.5, None, 1, 0, 0.5, None, …"""

    def __call__(self, completion: str) -> float | None:
        self.calls += 1
        return [None, 1.0, 0.0, 0.5][self.calls % 4]


# Each setting has rewards and may have an environment, arguments of GRPOConfig ("config") and of GRPOTrainer
# ("trainer").
PLAIN = {"rewards": {"variety": ToyReward(toy.variety)}}
TWO = {"rewards": {"variety": ToyReward(toy.variety), "sometimes": Sometimes()}}
SETTINGS = {
    "plain": PLAIN,
    "kl_penalty": PLAIN | {"config": {"beta": 0.1}},
    "invalid_rollouts": {"rewards": {"judge": Judge({1, 8, 9, 10, 11})}},
    "invalid_rollouts_kl_penalty": {"rewards": {"judge": Judge({1, 9})}, "config": {"beta": 0.1}},
    "steps_per_generation": PLAIN | {"config": {"steps_per_generation": 2, "num_iterations": 2}},
    "generations_per_step": PLAIN | {"config": {"steps_per_generation": 1, "gradient_accumulation_steps": 2}},
    "batch_scaling": PLAIN | {"config": {"scale_rewards": "batch"}},
    "no_scaling": PLAIN | {"config": {"scale_rewards": "none"}},
    "masked_truncation": PLAIN
    | {"config": {"mask_truncated_completions": True, "max_completion_length": 40, "beta": 0.1}},
    "several_turns": PLAIN | {"environment": "Talk", "turns": 3, "config": {"max_completion_length": 24}},
    "several_turns_masked": PLAIN
    | {
        "environment": "Talk",
        "turns": 3,
        "config": {"max_completion_length": 120, "mask_truncated_completions": True},
    },
    "dynamic_sampling": {"rewards": {"even": ToyReward(toy.even)}, "trainer": {"dynamic_sampling": 3}},
    "hrpo": PLAIN
    | {
        "environment": "Even",
        "trainer": {"group_by": "hops", "advantages": partial(by_key, minimum=2)},
    },
    "rloo_kl_in_reward": PLAIN
    | {"trainer": {"advantages": leave_one_out, "kl_in_reward": True}, "config": {"beta": 0.1}},
    "lora": PLAIN | {"config": {"beta": 0.1}, "lora": True},
    "two_rewards": TWO | {"config": {"reward_weights": [0.5, 2.0]}},
    "normalize_then_sum": TWO
    | {"config": {"reward_weights": [0.5, 2.0], "multi_objective_aggregation": "normalize_then_sum"}},
    "difficulty_weighting": {
        "rewards": {"even": ToyReward(toy.even), "variety": ToyReward(toy.variety)},
        "environment": "Even",
        "trainer": {"difficulty_weighting": True},
    },
    "padding": PLAIN
    | {"config": {"pad_to_multiple_of": 8, "beta": 0.1}, "trainer": {"shared_prefix": False}},
}


def save_tiny_model(folder):
    """Return a Llama with 4,000 weights, large enough for samples to differ.

    It is loaded from `folder`, because TRL loads the reference model from the model's path.
    """
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1, "max_position_embeddings": 512}
    config = AutoConfig.for_model(
        "llama", initializer_range=0.2, tie_word_embeddings=True, **sizes, **heads, **tokens
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[config.eos_token_id] = 3 * embeddings[3]  # some samples end with EOS, others are truncated
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def train_two_steps(name, folder, tokenizer):
    """Train under the setting `name` for two steps.

    Returns:
        The tensors of each sampled batch and the final weights, by name, and the logged metrics.
    """
    setting = SETTINGS[name]
    environment = load_environment(f"{TOY}:{setting.get('environment', 'Letters')}")
    for reward in setting["rewards"].values():
        reward.calls = 0
    config = QUICK_GRPO_CONFIG | {
        "output_dir": str(folder),
        "optim": "sgd",  # Adam divides by the gradient's scale and would amplify rounding differences
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "seed": 3,
    }
    config |= setting.get("config", {})
    run = RunDirectory(Path(folder), "train")
    run.open(resume=True, overwrite=False)
    model = save_tiny_model(Path(folder) / "start")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model,
        args=GRPOConfig(**config),
        train_dataset=environment.tasks("train", 26),
        processing_class=without_special_tokens(tokenizer),
        peft_config=lora if setting.get("lora") else None,
        environment=environment,
        runner=RewardRunner(setting["rewards"]),
        budget=ErrorBudget(1.0, 9),
        run_dir=run,
        limits=RolloutLimits(config["max_completion_length"], max_turns=setting.get("turns", 1)),
        **setting.get("trainer", {}),
    )
    batches = []
    sample = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda tasks: batches.append(sample(tasks)) or batches[-1]
    with trainer.runner:
        trainer.train()
    run.close()
    tensors = {f"batch{i}/{key}": value for i, batch in enumerate(batches) for key, value in batch.items()}
    trained = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    tensors["weights"] = torch.cat(trained)
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    # Times differ from run to run.
    logs = [{k: v for k, v in row.items() if not is_duration(k)} for row in rows]
    return tensors, logs


def without_special_tokens(tokenizer):
    """Return a copy of a tokenizer that omits special tokens from all text.

    The steps were recorded with such text. A random model samples many special tokens, and since then they
    are part of the text, except for the EOS token at its end.
    """
    tokenizer = copy.deepcopy(tokenizer)
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, skip_special_tokens=True: decode(ids, skip_special_tokens=True)
    return tokenizer


def is_duration(metric):
    return metric == "step_time" or metric.startswith("time/") or "/latency" in metric


def record(path, tokenizer):
    """Train under all settings, and save the results to a file."""
    tensors, logs = {}, {}
    for name in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            trained, logs[name] = train_two_steps(name, folder, tokenizer)
        tensors |= {f"{name}/{key}": torch.as_tensor(value).contiguous() for key, value in trained.items()}
    save_file(tensors, path, metadata={"logs": json.dumps(logs)})


if __name__ == "__main__":
    from tests.conftest import make_tokenizer

    record(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED, make_tokenizer())
