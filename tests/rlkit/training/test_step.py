"""The GRPO step agrees with recorded steps, and each of its functions with a formula."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from rlkit.rollouts.types import Rollout
from rlkit.training.advantages import nan_std
from rlkit.training.step import (
    collate,
    group_advantages,
    importance_ratio,
    loss_mask,
    mask_untrainable,
    weighted_totals,
)
from tests.rlkit.training.recorded_steps import RECORDED, SETTINGS, train_two_steps

# Tensors that are compared only where completion_mask is 1. TRL computed log-probabilities for invalid
# rollouts but not for truncated ones; neither are in the loss.
TOKEN_TENSORS = ("tool_mask", "old_per_token_logps", "ref_per_token_logps")


@pytest.fixture(scope="module")
def recorded():
    """Return the recorded tensors by name, and the logged metrics by setting."""
    with safe_open(RECORDED, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
        return tensors, json.loads(file.metadata()["logs"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_steps_equal_the_recorded_ones(setting, recorded, tmp_path, tiny_tokenizer):
    """Allow 1e-6 (relative) for batches and weights, and 1e-5 for metrics, which are sums of float32."""
    tensors, logs = recorded
    expected = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{setting}/")}
    trained, lines = train_two_steps(setting, tmp_path, tiny_tokenizer)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        actual = torch.as_tensor(trained[name])
        assert actual.shape == tensor.shape and actual.dtype == tensor.dtype, name
        batch, _, kind = name.partition("/")
        mask = expected[f"{batch}/completion_mask"] if kind in TOKEN_TENSORS else 1
        difference = ((actual - tensor) * mask).double().norm()
        assert difference <= 1e-6 * (tensor * mask).double().norm(), name
    assert len(lines) == len(logs[setting])
    for line, expected_line in zip(lines, logs[setting], strict=True):
        # Metrics that were added since are not in the recording.
        recorded_line = {name: line.get(name) for name in expected_line}
        assert recorded_line == pytest.approx(expected_line, rel=1e-5, abs=1e-6)


def test_recorded_steps_have_gradients(recorded):
    """A recording in which no weight changes would test nothing."""
    tensors, logs = recorded
    assert set(logs) == set(SETTINGS)
    for setting, lines in logs.items():
        assert max(line["grad_norm"] for line in lines) > 0.1, setting
        assert tensors[f"{setting}/batch0/advantages"].abs().max() > 0.1, setting
    masks = tensors["masked_truncation/batch1/completion_mask"].sum(1) == 0
    assert masks.any() and not masks.all()


REWARDS = st.lists(st.one_of(st.just(math.nan), st.floats(-10, 10, width=32)), min_size=4, max_size=4)


@given(groups=st.lists(REWARDS, min_size=1, max_size=4), scale=st.sampled_from(["group", "batch", "none"]))
def test_group_advantages_ignore_invalid_rollouts(groups, scale):
    """Compare with the formula for the valid rewards, computed in plain Python."""
    advantages = group_advantages(torch.tensor(groups).flatten(), 4, scale)
    all_valid = [r for group in groups for r in group if not math.isnan(r)]
    for group, values in zip(groups, advantages.view(-1, 4).tolist(), strict=True):
        valid = [r for r in group if not math.isnan(r)]
        pool = valid if scale == "group" else all_valid  # the standard deviation is that of the pool
        for reward, advantage in zip(group, values, strict=True):
            if math.isnan(reward) or (scale != "none" and len(pool) < 2):
                assert advantage == 0.0
                continue
            expected = reward - sum(valid) / len(valid)
            if scale != "none":
                mean = sum(pool) / len(pool)
                expected /= math.sqrt(sum((r - mean) ** 2 for r in pool) / (len(pool) - 1)) + 1e-4
            assert advantage == pytest.approx(expected, rel=1e-3, abs=2e-2 if scale != "none" else 1e-4)


def test_group_advantages_of_the_worked_example():
    """The rewards 1, 0, 0, 0 have a standard deviation of 0.5; see TRL's documentation."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_advantages(rewards, 4, "none"), torch.tensor([0.75, *[-0.25] * 3]))
    expected = torch.tensor([0.75, *[-0.25] * 3]) / (0.5 + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, "group"), expected)


def test_nan_std_of_fewer_than_two_values_is_nan():
    rows = torch.tensor([[1.0, 3.0, math.nan], [1.0, math.nan, math.nan], [math.nan] * 3])
    assert nan_std(rows).squeeze(1).tolist() == pytest.approx([math.sqrt(2), math.nan, math.nan], nan_ok=True)


TOKENS = st.lists(st.integers(3, 90), min_size=1, max_size=6)


@given(
    rollouts=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5),
    multiple_of=st.sampled_from([None, 4]),
)
def test_collate_pads_prompts_left_and_completions_right(rollouts, multiple_of):
    masks = [[i % 2 for i in range(len(completion))] for _, completion in rollouts]
    parts = [
        Rollout(prompt, completion, mask, log_probs=[-0.5] * len(completion))
        for (prompt, completion), mask in zip(rollouts, masks, strict=True)
    ]
    batch = collate(parts, pad_token_id=2, log_probs=True, multiple_of=multiple_of)
    for i, (prompt, completion) in enumerate(rollouts):
        assert batch["tool_mask"][i].tolist()[: len(completion)] == masks[i]
        assert set(batch["completion_ids"][i].tolist()[len(completion) :]) <= {2}
        assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == prompt
        assert batch["prompt_ids"][i].tolist()[-len(prompt) :] == prompt
        assert batch["completion_ids"][i].tolist()[: len(completion)] == completion
        assert batch["completion_mask"][i].tolist()[: len(completion)] == [1] * len(completion)
        assert batch["completion_mask"][i].sum() == len(completion)
        assert batch["sampling_per_token_logps"][i].sum() == pytest.approx(-0.5 * len(completion))
    if multiple_of:
        assert batch["prompt_ids"].size(1) % 4 == batch["completion_ids"].size(1) % 4 == 0


@given(
    rollouts=st.lists(st.tuples(TOKENS, st.booleans(), st.booleans()), min_size=1, max_size=5),
    truncated=st.booleans(),
)
def test_mask_untrainable_masks_whole_rollouts(rollouts, truncated):
    parts = [Rollout([5], ids, [i % 2 for i in range(len(ids))], truncated=cut) for ids, _, cut in rollouts]
    batch = collate(parts, pad_token_id=2)
    invalid = torch.tensor([broken for _, broken, _ in rollouts])
    mask_untrainable(batch, parts, invalid, mask_truncated=truncated)
    learned = loss_mask(batch).sum(1).tolist()
    for (ids, broken, cut), count in zip(rollouts, learned, strict=True):
        assert count == (0 if broken or (truncated and cut) else len(ids) // 2)


def test_weighted_totals_of_no_weighted_reward_are_nan():
    """A metric of weight 0 alone gives no total, and a reward that does not apply does not count as 0."""
    rewards = torch.tensor([[1.0, 0.5], [math.nan, 1.0], [2.0, math.nan], [math.nan, math.nan]])
    totals = weighted_totals(rewards, torch.tensor([2.0, 0.0]))
    assert totals.tolist() == pytest.approx([2.0, math.nan, 4.0, math.nan], nan_ok=True)
    totals = weighted_totals(rewards, torch.tensor([2.0, 1.0]))
    assert totals.tolist() == pytest.approx([2.5, 1.0, 4.0, math.nan], nan_ok=True)


# exp(log ratio) is 2, 1/2, 1 (NaN) and 1 (masked) in the first row, 4 and 1 in the second. The third rollout
# is invalid: all of its tokens are masked.
RATIOS = {
    "token_truncate": [[2.0, 0.5, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0], [1.0] * 4],
    "token_mask": [[2.0, 0.5, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0] * 4],
    "sequence_truncate": [[1.0], [3.0], [1.0]],
    "sequence_mask": [[1.0], [0.0], [1.0]],
}


@pytest.mark.parametrize("mode", RATIOS)
def test_importance_ratio_is_clipped_or_masked_by_token_or_rollout(mode):
    two, four = math.log(2), math.log(4)
    old = torch.tensor([[two, 0.0, -1.0, 9.0], [four, 0.0, 0.0, 0.0], [9.0] * 4])
    sampled = torch.tensor([[0.0, two, math.nan, 0.0], [0.0] * 4, [0.0] * 4])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    batch = {"old_per_token_logps": old, "sampling_per_token_logps": sampled, "completion_mask": mask}
    batch["tool_mask"] = torch.tensor([[1, 1, 1, 0], [1] * 4, [1] * 4])
    args = SimpleNamespace(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=None)
    args.vllm_importance_sampling_clip_max = 3.0
    torch.testing.assert_close(importance_ratio(batch, args), torch.tensor(RATIOS[mode]))
