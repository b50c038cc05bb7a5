"""The algorithms by name: which of TRL's and rlkit's keys each one sets, and which it cannot do without.

A preset's `sets` are defaults that any key given by hand overrides; its `needs` make the algorithm what its
name says, and another value is an error. docs/algorithms/ has a page for each, with the formula and paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlkit.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What one algorithm is made of."""

    needs: Mapping[str, Any]
    sets: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()  # rewards that are part of it, added unless they are listed

    @property
    def keys(self) -> dict[str, Any]:
        """All keys that it sets."""
        return {**self.sets, **self.needs}


ESTIMATORS = ("reinforce", "loo", "placement", "placement_loo", "pl_rank")
UTILITIES = ("ndcg", "rr")
ON_POLICY = {"num_iterations": 1}
CLIP = {"epsilon": 0.2, "beta": 0.0}

PRESETS = {
    # Sequence mean of token means, group mean and standard deviation.
    "grpo": Preset({}, {"loss_type": "grpo", "scale_rewards": "group", **CLIP}),
    # A constant instead of the length, and no standard deviation: both, or a bias stays.
    "dr_grpo": Preset({"loss_type": "dr_grpo", "scale_rewards": "none"}, CLIP),
    "dapo": Preset(
        {"loss_type": "dapo"},
        {
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "beta": 0.0,
            "scale_rewards": "group",
            "mask_truncated_completions": True,
            "dynamic_sampling": True,
        },
        rewards=("soft_overlong",),
    ),
    # One ratio a sequence, with a mean over sequences.
    "gspo": Preset(
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0, "scale_rewards": "group"},
    ),
    # epsilon_high is an absolute cap on the ratio here; unset, TRL would take epsilon, 0.2.
    "cispo": Preset({"loss_type": "cispo"}, {"epsilon_high": 5.0, "beta": 0.0, "scale_rewards": "group"}),
    # The sum over tokens and the mean over sequences. On policy, the ratio of sequences is that of tokens.
    "rloo": Preset({"loss_type": "luspo", "scale_rewards": "none", **ON_POLICY}, {"beta": 0.05}),
    "reinforce_pp": Preset({"scale_rewards": "batch"}, {"loss_type": "dapo", **CLIP}),
    "hapo": Preset(
        {},
        {
            # The published runs had bnpo with one sequence a device, which is this, however a batch is split.
            "loss_type": "grpo",
            "scale_rewards": "group",
            "epsilon": 0.2,
            "beta": 0.04,
            "use_bias_correction_kl": False,  # the published version had the plain k3 estimate
            **ON_POLICY,
        },
        rewards=("hapo",),
    ),
    "hrpo": Preset({}, {"num_generations": 1, "loss_type": "dapo", "scale_rewards": "group", **CLIP}),
}


def check_preset(algorithm: str, keys: Mapping[str, Any]) -> None:
    """Raise UserError where the keys of a run contradict its algorithm or each other."""
    for key, value in PRESETS[algorithm].needs.items():
        if keys[key] != value:
            raise UserError(
                f"algorithm {algorithm} needs {key}: {value}, not {keys[key]}; "
                "algorithm: grpo takes any combination"
            )
    if (keys["group_by"] is None) == (algorithm == "hrpo"):
        raise UserError(
            "algorithm hrpo needs group_by, the column whose values group rollouts, such as 'hops'"
            if algorithm == "hrpo"
            else f"group_by belongs to algorithm hrpo, not to {algorithm}"
        )
    if algorithm != "hrpo" and keys["num_generations"] < 2:
        raise UserError(
            f"algorithm {algorithm} compares the rollouts of a prompt: num_generations must be at least 2"
        )
    _check_combinations(algorithm, keys)


def _check_combinations(algorithm: str, keys: Mapping[str, Any]) -> None:
    summed = keys["multi_objective_aggregation"] == "sum_then_normalize"
    dynamic = keys["dynamic_sampling"]
    aligned = keys["gradient_accumulation_steps"] % keys["steps_per_generation"] == 0
    low, high = keys["epsilon"], keys["epsilon_high"]
    hrpo, rloo = algorithm == "hrpo", algorithm == "rloo"
    contradictions = [
        (
            (hrpo or "scale_rewards" in PRESETS[algorithm].needs) and not summed,
            f"algorithm {algorithm} has a baseline of its own: no multi_objective_aggregation",
        ),
        (
            hrpo and keys["scale_rewards"] == "batch",
            "algorithm hrpo scales by the group or not at all: scale_rewards is group or none",
        ),
        (
            hrpo and (dynamic or keys["difficulty_weighting"]),
            "dynamic_sampling and difficulty_weighting look at a prompt's rollouts; hrpo has one",
        ),
        (
            dynamic and (keys["scale_rewards"] == "batch" or not summed),
            "dynamic_sampling samples in parts: advantages may not be scaled by the batch",
        ),
        (
            rloo and not aligned,
            "algorithm rloo is on policy: gradient_accumulation_steps is a multiple of steps_per_generation",
        ),
        (
            rloo and keys["mask_truncated_completions"],
            "algorithm rloo compares whole rewards: no mask_truncated_completions",
        ),
        (
            keys["loss_type"] != "cispo" and high is not None and high < low,
            f"epsilon_high {high} is below epsilon {low}",
        ),
        (
            keys["sync_ref_model"] and (not keys["beta"] or keys["use_peft"]),
            "sync_ref_model refreshes a reference model: it needs beta above 0, and no LoRA",
        ),
        (
            keys["use_peft"] and "lm_head" in (keys["lora_target_modules"] or ()),
            "lora_target_modules must not contain lm_head: log-probabilities are computed from its weight, "
            "so the adapter would not be trained",
        ),
    ]
    for found, message in contradictions:
        if found:
            raise UserError(message)


# What samples from all tokens as the trainer takes it.
ALL_TOKENS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def warnings_for(keys: Mapping[str, Any]) -> list[str]:
    """What is allowed, and probably not meant."""
    found = []
    if keys["num_generations"] == 2 and keys["scale_rewards"] == "group":
        found.append(
            "with num_generations 2 and scale_rewards group every advantage is +0.71 or -0.71, however much "
            "the rewards differ: use more generations, or scale_rewards: none"
        )
    if keys["loss_type"] == "cispo" and keys["epsilon_high"] is None:
        found.append(
            "loss_type cispo without epsilon_high caps ratios at epsilon, 0.2: set epsilon_high: 5.0"
        )
    narrow = [name for name, all_tokens in ALL_TOKENS.items() if keys.get(name) not in (None, all_tokens, -1)]
    if narrow:
        found.append(
            f"{' and '.join(narrow)}: the sampler changes probabilities and the trainer does not know of it: "
            "leave the keys away in training"
        )
    return found
