"""Each algorithm's advantages and loss against its formula written out in numpy, on fixed numbers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlkit.arguments.parse import parse_train
from rlkit.arguments.presets import PRESETS
from rlkit.registry import load_object
from rlkit.scoring import ErrorBudget, RewardRunner
from rlkit.training.grpo import GRPOTrainer
from rlkit.training.step import sample
from rlkit.training.train import trainer_options
from tests.quick import TOY

Letters = load_object(f"{TOY}:Letters")
G, B, T = 4, 8, 5
LENGTHS = [1, 3, 5, 2, 4, 5, 1, 3]
REWARDS = np.array([1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 1.0, 1.5])
HOPS = [1, 1, 1, 2, 2, 3, 3, 4]


class Given:
    """A reward with memory, so that it runs in this process: one number after the other."""

    def __init__(self, values):
        self.values = list(values)
        self.calls = 0

    def __call__(self, completion: str) -> float:
        self.calls += 1
        return float(self.values[(self.calls - 1) % len(self.values)])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Hops(Letters):
    """Letters with a number of hops: 1, 1, 1, 2, 2, 3, 3, 4, …"""

    def tasks(self, split, n=None, seed=0):
        tasks = super().tasks(split, n, seed)
        return tasks.add_column("hops", [HOPS[i % B] for i in range(len(tasks))])


@pytest.fixture
def make(tmp_path, open_run, tiny_folder, tiny_tokenizer):
    def make(algorithm, *words, rewards=REWARDS):
        keys = {
            "algorithm": algorithm,
            "output_dir": tmp_path,
            "use_cpu": "true",
            "bf16": "false",
            "gradient_checkpointing": "false",
            "report_to": "none",
            "per_device_train_batch_size": B,
            "max_completion_length": T,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "shuffle_dataset": "false",
        }
        keys |= {"group_by": "hops"} if algorithm == "hrpo" else {"num_generations": G}
        run = parse_train([*(str(w) for k, v in keys.items() for w in (f"--{k}", v)), *words])
        environment = Hops()
        judge = {"given": Given(rewards), environment.metric: environment.rewards[environment.metric]}
        run.trainer_args.reward_weights = [1.0, 0.0]
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_folder),
            args=run.trainer_args,
            train_dataset=environment.tasks("train", 26),
            processing_class=tiny_tokenizer,
            environment=environment,
            runner=RewardRunner(judge, metric=environment.metric),
            budget=ErrorBudget(),
            run=open_run(tmp_path),
            **trainer_options(run, environment),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def sampled(trainer):
    return sample(trainer, next(iter(trainer.get_train_dataloader()))).batch


def std(x, **kwargs):
    return x.std(ddof=1, **kwargs)


GROUPS = REWARDS.reshape(-1, G)
CENTRED = GROUPS - GROUPS.mean(1, keepdims=True)
NORMALISED = CENTRED / (std(GROUPS, axis=1, keepdims=True) + 1e-4)
ADVANTAGES = {
    "grpo": NORMALISED,
    "dapo": NORMALISED,
    "gspo": NORMALISED,
    "cispo": NORMALISED,
    "hapo": NORMALISED,
    "dr_grpo": CENTRED,
    "rloo": GROUPS - (GROUPS.sum(1, keepdims=True) - GROUPS) / (G - 1),
    "reinforce_pp": CENTRED / (std(REWARDS) + 1e-4),
}


def by_hop():
    advantages = np.zeros(B)
    for hop in set(HOPS):
        rows = [i for i in range(B) if HOPS[i] == hop]
        if len(rows) > 1:
            advantages[rows] = (REWARDS[rows] - REWARDS[rows].mean()) / (std(REWARDS[rows]) + 1e-6)
    return advantages


ADVANTAGES["hrpo"] = by_hop()


@pytest.mark.parametrize("algorithm", PRESETS)
def test_advantages(make, algorithm):
    words = ["--beta", "0"] if algorithm in ("rloo", "hapo") else []
    output = sampled(make(algorithm, *words))
    np.testing.assert_allclose(output["advantages"], ADVANTAGES[algorithm].flatten(), rtol=1e-4, atol=1e-6)


def test_the_worked_advantages():
    """r = 1, 0, 0, 0: the values that papers and TRL's documentation give."""
    np.testing.assert_allclose(CENTRED[0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(ADVANTAGES["rloo"][0], [1, -1 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(NORMALISED[0], [1.5, -0.5, -0.5, -0.5], atol=1e-3)


def clipped(ratio, advantages, low, high):
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)


def token_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def reference(algorithm, arrays):
    """The loss of a batch, from arrays (B, T) and advantages (B, 1)."""
    log_probs, old, mask, advantages, reference_log_probs = arrays
    ratio = np.exp(log_probs - old)
    if algorithm == "grpo":
        return ((clipped(ratio, advantages, 0.2, 0.2) * mask).sum(1) / mask.sum(1)).mean()
    if algorithm == "dr_grpo":
        return (clipped(ratio, advantages, 0.2, 0.2) * mask).sum() / (B * T)
    if algorithm == "dapo":
        return token_mean(clipped(ratio, advantages, 0.2, 0.28), mask)
    if algorithm == "gspo":
        sequence = np.exp(((log_probs - old) * mask).sum(1) / mask.sum(1))[:, None]
        return clipped(sequence, advantages, 3e-4, 4e-4).mean()
    if algorithm == "cispo":
        return token_mean(-np.minimum(ratio, 5.0) * advantages * log_probs, mask)
    if algorithm == "rloo":
        return (clipped(ratio, advantages, 0.2, 0.2) * mask).sum(1).mean()
    if algorithm == "hapo":
        log_ratio = reference_log_probs - log_probs
        per_token = clipped(ratio, advantages, 0.2, 0.2) + 0.04 * (np.exp(log_ratio) - log_ratio - 1)
        return ((per_token * mask).sum(1) / mask.sum(1)).mean()
    return token_mean(clipped(ratio, advantages, 0.2, 0.2), mask)  # reinforce_pp, hrpo


@pytest.mark.parametrize("algorithm", PRESETS)
def test_loss(make, algorithm):
    trainer = make(algorithm)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    prompts = torch.randint(5, 90, (2, 6), generator=generator).repeat_interleave(G, 0)
    completions = torch.randint(5, 90, (B, T), generator=generator)
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([torch.ones_like(prompts), mask], 1)
    with torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, T)[0]
    # Ratios on both sides of every clipping bound, with advantages of both signs.
    old = log_probs + torch.randn(B, T, generator=generator)
    advantages = torch.linspace(-2, 2, B)
    ref = log_probs + 0.5 * torch.randn(B, T, generator=generator)
    loss = trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions,
            "completion_mask": mask,
            "advantages": advantages,
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        },
    )
    arrays = [x.double().numpy() for x in (log_probs, old, mask, advantages[:, None], ref)]
    np.testing.assert_allclose(loss.item(), reference(algorithm, arrays), rtol=1e-4, atol=1e-6)


def test_rloo_subtracts_the_kl_divergence_from_the_reward(make):
    trainer = make("rloo", "--beta", "0.3")
    ref = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    trainer._get_per_token_logps_and_entropies = lambda model, ids, mask, size, *a, **k: (
        ref if model is trainer.ref_model else torch.zeros(B, size),
        None,
        None,
    )
    output = sampled(trainer)
    mask = output["completion_mask"].numpy()
    rewards = (REWARDS + 0.3 * (ref[:, : mask.shape[1]].numpy() * mask).sum(1)).reshape(-1, G)
    expected = rewards - (rewards.sum(1, keepdims=True) - rewards) / (G - 1)
    np.testing.assert_allclose(output["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    assert trainer.beta == 0.0, "the loss would penalize it a second time"


def test_difficulty_weighting(make):
    """One correct of four: it weighs much when it is good, and little when it is bad."""
    trainer = make("grpo", "--difficulty_weighting", "true")
    trainer.runner = RewardRunner({"given": Given(REWARDS), "correct": Given([1, 0, 0, 0, 1, 1, 1, 1])})
    weight = lambda x: 0.4 + 1.1 / (1 + np.exp(10 * (x - 0.75)))  # noqa: E731
    advantages = NORMALISED.flatten()
    rate = np.repeat([0.25, 1.0], G)
    expected = advantages * np.where(advantages > 0, weight(rate), weight(1 - rate))
    np.testing.assert_allclose(sampled(trainer)["advantages"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([weight(0), weight(0.75), weight(1)], [1.499, 0.95, 0.483], atol=1e-3)


@pytest.mark.parametrize("algorithm", [a for a in PRESETS if a != "grpo"])
def test_a_few_real_steps(make, algorithm):
    trainer = make(algorithm, "--max_steps", "3", "--logging_steps", "1")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = sum((p - q).norm() ** 2 for p, q in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.state.global_step == 3 and moved > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
