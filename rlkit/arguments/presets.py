"""Algorithm presets: the values that each algorithm sets for TRL's and rlkit's keys.

A preset's `sets` are defaults, which any explicitly set key overrides. Its `needs` define the algorithm:
setting one of them to another value is an error. docs/algorithms/ has a page for each algorithm with the
formula and the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlkit.errors import UserError


@dataclass(frozen=True)
class Preset:
    """The config of one algorithm.

    Attributes:
        needs: Keys that define the algorithm, with their required values.
        sets: Keys with default values.
        rewards: Names of rewards that belong to the algorithm; they are added if the config omits them.
    """

    needs: Mapping[str, Any]
    sets: Mapping[str, Any] = field(default_factory=dict)
    rewards: tuple[str, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        """All keys that the preset sets, with their values."""
        return {**self.sets, **self.needs}


ESTIMATORS = ("reinforce", "loo", "placement", "placement_loo", "pl_rank")
UTILITIES = ("ndcg", "rr")
ON_POLICY = {"num_iterations": 1}
CLIP = {"epsilon": 0.2, "beta": 0.0}

PRESETS = {
    # Loss: mean over sequences of the mean over tokens. Advantage: group mean and standard deviation.
    "grpo": Preset({}, {"loss_type": "grpo", "scale_rewards": "group", **CLIP}),
    # Divides the loss by a constant instead of the length, and does not divide advantages by the standard
    # deviation. Either division is a bias, so both keys are required.
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
    # One importance ratio per sequence, and the mean over sequences.
    "gspo": Preset(
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0, "scale_rewards": "group"},
    ),
    # Here epsilon_high is an absolute cap on the importance ratio. If unset, TRL uses epsilon, 0.2.
    "cispo": Preset({"loss_type": "cispo"}, {"epsilon_high": 5.0, "beta": 0.0, "scale_rewards": "group"}),
    # Sum over tokens, mean over sequences. On policy all ratios are 1, so that token-level and sequence-level
    # ratios have the same gradient.
    "rloo": Preset({"loss_type": "luspo", "scale_rewards": "none", **ON_POLICY}, {"beta": 0.05}),
    "reinforce_pp": Preset({"scale_rewards": "batch"}, {"loss_type": "dapo", **CLIP}),
    "hapo": Preset(
        {},
        {
            # The published runs used bnpo with one sequence per device. That equals grpo, which does not
            # depend on how a batch is split.
            "loss_type": "grpo",
            "scale_rewards": "group",
            "epsilon": 0.2,
            "beta": 0.04,
            "use_bias_correction_kl": False,  # the published version used the plain k3 estimator
            **ON_POLICY,
        },
        rewards=("hapo",),
    ),
    "hrpo": Preset({}, {"num_generations": 1, "loss_type": "dapo", "scale_rewards": "group", **CLIP}),
}


def check_preset(algorithm: str, keys: Mapping[str, Any]) -> None:
    """Raise UserError if the keys of a run contradict its algorithm or each other.

    Args:
        algorithm: Name of the algorithm, a key of `PRESETS`.
        keys: All keys of the run with their values.
    """
    for key, value in PRESETS[algorithm].needs.items():
        if keys[key] != value:
            raise UserError(
                f"algorithm {algorithm} requires {key}: {value}, not {keys[key]}; "
                "algorithm grpo does not fix this key"
            )
    if algorithm == "hrpo" and keys["group_by"] is None:
        raise UserError(
            "algorithm hrpo requires group_by, the column that defines the groups, such as 'hops'"
        )
    if algorithm != "hrpo" and keys["group_by"] is not None:
        raise UserError(f"group_by requires algorithm hrpo, not {algorithm}")
    if algorithm != "hrpo" and keys["num_generations"] < 2:
        raise UserError(
            f"algorithm {algorithm} compares the rollouts of a prompt; num_generations must be at least 2"
        )
    _check_combinations(algorithm, keys)


def _check_combinations(algorithm: str, keys: Mapping[str, Any]) -> None:
    sums_first = keys["multi_objective_aggregation"] == "sum_then_normalize"
    is_dynamic = keys["dynamic_sampling"]
    is_aligned = keys["gradient_accumulation_steps"] % keys["steps_per_generation"] == 0
    low, high = keys["epsilon"], keys["epsilon_high"]
    is_hrpo, is_rloo = algorithm == "hrpo", algorithm == "rloo"
    contradictions = [
        (
            (is_hrpo or "scale_rewards" in PRESETS[algorithm].needs) and not sums_first,
            f"algorithm {algorithm} has its own baseline; remove multi_objective_aggregation",
        ),
        (
            is_hrpo and keys["scale_rewards"] == "batch",
            "algorithm hrpo requires scale_rewards: group or none, not batch",
        ),
        (
            is_hrpo and (is_dynamic or keys["difficulty_weighting"]),
            "dynamic_sampling and difficulty_weighting need several rollouts per prompt, but algorithm hrpo "
            "samples one",
        ),
        (
            is_dynamic and (keys["scale_rewards"] == "batch" or not sums_first),
            "dynamic_sampling samples a batch in parts, so advantages cannot be normalized over the batch: "
            "use scale_rewards group or none with sum_then_normalize",
        ),
        (
            is_rloo and not is_aligned,
            "algorithm rloo is on-policy: gradient_accumulation_steps must be a multiple of "
            "steps_per_generation",
        ),
        (
            is_rloo and keys["mask_truncated_completions"],
            "algorithm rloo uses the rewards of all completions of a prompt; "
            "remove mask_truncated_completions",
        ),
        (
            keys["loss_type"] != "cispo" and high is not None and high < low,
            f"epsilon_high {high} must not be below epsilon {low}",
        ),
        (
            keys["sync_ref_model"] and (not keys["beta"] or keys["use_peft"]),
            "sync_ref_model updates the reference model, so it requires beta above 0 and no LoRA",
        ),
        (
            keys["use_peft"] and "lm_head" in (keys["lora_target_modules"] or ()),
            "lora_target_modules must not contain lm_head: log-probabilities are computed from its weight, "
            "so the adapter would not be trained",
        ),
    ]
    for is_contradiction, message in contradictions:
        if is_contradiction:
            raise UserError(message)


# Sampling parameters that leave the model's distribution unchanged.
ALL_TOKENS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def warnings_for(keys: Mapping[str, Any]) -> list[str]:
    """Return warnings about keys that are valid but probably a mistake."""
    warnings = []
    if keys["num_generations"] == 2 and keys["scale_rewards"] == "group":
        warnings.append(
            "with num_generations 2 and scale_rewards group every advantage is +0.71 or -0.71, no matter how "
            "much the rewards differ; raise num_generations or set scale_rewards: none"
        )
    if keys["loss_type"] == "cispo" and keys["epsilon_high"] is None:
        warnings.append(
            "loss_type cispo without epsilon_high caps importance ratios at epsilon, 0.2; "
            "set epsilon_high: 5.0"
        )
    narrow = [name for name, all_tokens in ALL_TOKENS.items() if keys.get(name) not in (None, all_tokens, -1)]
    if narrow:
        warnings.append(
            f"{' and '.join(narrow)}: these keys change the sampling distribution, but the trainer computes "
            "log-probabilities without them; remove them for training"
        )
    # All other settings that change the distribution are rejected (`check_generation_kwargs`).
    for name in keys.get("generation_kwargs") or ():
        warnings.append(
            f"generation_kwargs.{name} suppresses EOS tokens at the start of a turn, but the trainer "
            "computes log-probabilities without it; remove it for training"
        )
    return warnings
