"""Selecting, joining, shuffling and splitting batches keeps the tensors of a rollout together."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.training.batches import concatenate, shuffle_groups, split, take


def batch_of(rows, prompt=3, completion=2, first=0):
    ids = torch.arange(first, first + rows)[:, None]
    return {
        "prompt_ids": ids.repeat(1, prompt) + 10,
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": ids.repeat(1, completion) + 10,
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "advantages": ids[:, 0].float(),
        "num_items_in_batch": torch.tensor(7),
    }


@given(groups=st.integers(1, 6), size=st.integers(1, 5), key=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_shuffle_groups_keeps_groups_together_and_is_reproducible(groups, size, key):
    shuffled = shuffle_groups(batch_of(groups * size), size, key)
    rows = shuffled["advantages"].long()
    assert sorted(rows.tolist()) == list(range(groups * size))
    assert (rows.view(-1, size) // size == (rows.view(-1, size) // size)[:, :1]).all()
    assert (shuffled["prompt_ids"][:, 0] - 10 == rows).all()
    repeated = shuffle_groups(batch_of(groups * size), size, key)
    assert torch.equal(repeated["advantages"], shuffled["advantages"])


def test_shuffle_groups_orders_by_the_key():
    orders = {tuple(shuffle_groups(batch_of(8), 1, (0, i))["advantages"].tolist()) for i in range(5)}
    assert len(orders) == 5


def test_shuffle_groups_permutes_blocks_if_groups_are_split():
    """A process with 6 rollouts of groups of 4 has blocks of gcd(6, 4) = 2."""
    rows = shuffle_groups(batch_of(6), 4, (0, 1))["advantages"].view(-1, 2).long()
    assert (rows[:, 0] % 2 == 0).all() and (rows[:, 1] == rows[:, 0] + 1).all()


def test_split_makes_equal_parts_and_copies_scalars():
    parts = split(batch_of(6), 3)
    assert [part["advantages"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert all(part["num_items_in_batch"] == 7 for part in parts)


def test_concatenate_pads_prompts_left_and_completions_right():
    joined = concatenate([batch_of(1, 3, 2), batch_of(1, 1, 4, first=5)], pad_id=2)
    assert joined["prompt_ids"].tolist() == [[10, 10, 10], [2, 2, 15]]
    assert joined["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert joined["completion_ids"].tolist() == [[10, 10, 2, 2], [15, 15, 15, 15]]
    assert joined["completion_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert joined["advantages"].tolist() == [0, 5]


def test_take_selects_rows_in_the_given_order():
    assert take(batch_of(4), [3, 0])["advantages"].tolist() == [3, 0]
