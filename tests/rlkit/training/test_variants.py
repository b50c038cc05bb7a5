"""The advantages and the loss of each algorithm agree with its formula in numpy, on fixed numbers."""

import numpy as np
import pytest
import torch

from rlkit.arguments.parse import parse_train
from rlkit.arguments.presets import PRESETS
from rlkit.registry import load_object
from rlkit.scoring import RewardRunner
from rlkit.training.step import sample
from rlkit.training.train import trainer_options
from tests.quick import TOY

Letters = load_object(f"{TOY}:Letters")
G, B, T = 4, 8, 5
LENGTHS = [1, 3, 5, 2, 4, 5, 1, 3]
REWARDS = np.array([1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 1.0, 1.5])
HOPS = [1, 1, 1, 2, 2, 3, 3, 4]


class FixedRewards:
    """A reward that returns a list of numbers in turn. It has state, so that it runs in this process."""

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
    """Letters with a column `hops`: 1, 1, 1, 2, 2, 3, 3, 4, …"""

    def tasks(self, split, n=None, seed=0):
        tasks = super().tasks(split, n, seed)
        return tasks.add_column("hops", [HOPS[i % B] for i in range(len(tasks))])


@pytest.fixture
def make(make_trainer, tmp_path):
    """Return a function that builds the trainer of an algorithm's preset, ready for one call of the step."""

    def make(algorithm, *argv, rewards=REWARDS):
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
        run = parse_train([*(str(word) for k, v in keys.items() for word in (f"--{k}", v)), *argv])
        environment = Hops()
        run.trainer_args.reward_weights = [1.0, 0.0]
        metric = environment.metric
        runner = RewardRunner(
            {"given": FixedRewards(rewards), metric: environment.rewards[metric]}, metric=metric
        )
        trainer = make_trainer(
            runner, environment, args=run.trainer_args, **trainer_options(run, environment)
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def sample_batch(trainer):
    """Return the batch of one sampling step, without training on it."""
    return sample(trainer, next(iter(trainer.get_train_dataloader()))).batch


def sample_std(x, **kwargs):
    return x.std(ddof=1, **kwargs)


GROUPS = REWARDS.reshape(-1, G)
CENTERED = GROUPS - GROUPS.mean(1, keepdims=True)
NORMALIZED = CENTERED / (sample_std(GROUPS, axis=1, keepdims=True) + 1e-4)
ADVANTAGES = {
    "grpo": NORMALIZED,
    "dapo": NORMALIZED,
    "gspo": NORMALIZED,
    "cispo": NORMALIZED,
    "hapo": NORMALIZED,
    "dr_grpo": CENTERED,
    "rloo": GROUPS - (GROUPS.sum(1, keepdims=True) - GROUPS) / (G - 1),
    "reinforce_pp": CENTERED / (sample_std(REWARDS) + 1e-4),
}


def hrpo_advantages():
    """Return the rewards normalized over the rollouts with the same number of hops; 0 for a lone one."""
    advantages = np.zeros(B)
    for hop in set(HOPS):
        rows = [i for i in range(B) if HOPS[i] == hop]
        if len(rows) > 1:
            group = REWARDS[rows]
            advantages[rows] = (group - group.mean()) / (sample_std(group) + 1e-6)
    return advantages


ADVANTAGES["hrpo"] = hrpo_advantages()


@pytest.mark.parametrize("algorithm", PRESETS)
def test_advantages_equal_the_formula(make, algorithm):
    # Without a KL term the advantages are those of the rewards alone.
    argv = ["--beta", "0"] if algorithm in ("rloo", "hapo") else []
    output = sample_batch(make(algorithm, *argv))
    np.testing.assert_allclose(output["advantages"], ADVANTAGES[algorithm].flatten(), rtol=1e-4, atol=1e-6)


def test_formulas_give_the_published_advantages_of_an_example():
    """Papers and TRL's documentation give these values for the rewards 1, 0, 0, 0."""
    np.testing.assert_allclose(CENTERED[0], [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(ADVANTAGES["rloo"][0], [1, -1 / 3, -1 / 3, -1 / 3])
    np.testing.assert_allclose(NORMALIZED[0], [1.5, -0.5, -0.5, -0.5], atol=1e-3)


def clipped(ratio, advantages, low, high):
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)


def token_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def reference_loss(algorithm, arrays):
    """Return the loss of a batch, from arrays (B, T) and advantages (B, 1)."""
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
def test_loss_equals_the_formula(make, algorithm):
    trainer = make(algorithm)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    prompts = torch.randint(5, 90, (2, 6), generator=generator).repeat_interleave(G, 0)
    completions = torch.randint(5, 90, (B, T), generator=generator)
    ids, attention = torch.cat([prompts, completions], 1), torch.cat([torch.ones_like(prompts), mask], 1)
    with torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, T)[0]
    # Random, so that there are ratios on both sides of every clipping bound, with advantages of both signs.
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
    np.testing.assert_allclose(loss.item(), reference_loss(algorithm, arrays), rtol=1e-4, atol=1e-6)


def test_rloo_subtracts_the_kl_divergence_from_the_reward(make):
    trainer = make("rloo", "--beta", "0.3")
    ref = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    trainer._get_per_token_logps_and_entropies = lambda model, ids, mask, size, *a, **k: (
        ref if model is trainer.ref_model else torch.zeros(B, size),
        None,
        None,
    )
    output = sample_batch(trainer)
    mask = output["completion_mask"].numpy()
    rewards = (REWARDS + 0.3 * (ref[:, : mask.shape[1]].numpy() * mask).sum(1)).reshape(-1, G)
    expected = rewards - (rewards.sum(1, keepdims=True) - rewards) / (G - 1)
    np.testing.assert_allclose(output["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    assert trainer.beta == 0.0, "the loss would penalize it a second time"


def test_difficulty_weighting_gives_rare_outcomes_a_larger_weight(make):
    """In the first group one of four rollouts is correct: its weight is large, those of the others small."""
    trainer = make("grpo", "--difficulty_weighting", "true")
    is_correct = [1, 0, 0, 0, 1, 1, 1, 1]
    trainer.runner = RewardRunner({"given": FixedRewards(REWARDS), "correct": FixedRewards(is_correct)})

    def weight(x):
        return 0.4 + 1.1 / (1 + np.exp(10 * (x - 0.75)))

    advantages = NORMALIZED.flatten()
    rate = np.repeat([0.25, 1.0], G)
    expected = advantages * np.where(advantages > 0, weight(rate), weight(1 - rate))
    np.testing.assert_allclose(sample_batch(trainer)["advantages"], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([weight(0), weight(0.75), weight(1)], [1.499, 0.95, 0.483], atol=1e-3)


@pytest.mark.parametrize("algorithm", [a for a in PRESETS if a != "grpo"])
def test_training_changes_the_weights_and_they_stay_finite(make, algorithm):
    trainer = make(algorithm, "--max_steps", "3", "--logging_steps", "1")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    moved = sum((p - q).norm() ** 2 for p, q in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.state.global_step == 3 and moved > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
