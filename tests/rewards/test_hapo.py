"""HAPO: values worked out by hand, updates of the history, and its checkpoints."""

import io
import json
import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.rewards.hapo import HistoryLength

LENGTHS = st.integers(0, 40_000)


def rollouts(*pairs, task="a"):
    """Return rollouts of one task from (length, correct) pairs."""
    return [{"task_id": task, "length": length, "correct": float(correct)} for length, correct in pairs]


def hapo(h=100, **options):
    reward = HistoryLength(**options)
    reward.observe(rollouts((h, 1)))
    return reward


def total(reward, length, correct, task="a"):
    return correct + reward(task, length, float(correct))


@pytest.mark.parametrize(
    ("length", "if_correct", "if_wrong"),
    [(50, 1.707, 0), (100, 1, 0), (110, 0.844, -0.156), (150, 0.3, -0.707), (200, 0.3, -1), (9000, 0.3, -1)],
)
def test_cosine_shape(length, if_correct, if_wrong):
    assert total(hapo(), length, 1) == pytest.approx(if_correct, abs=5e-4)
    assert total(hapo(), length, 0) == pytest.approx(if_wrong, abs=5e-4)


@pytest.mark.parametrize(
    ("length", "if_correct", "if_wrong"),
    [
        (0, 1, 0),
        (40, 0.6, 0),
        (100, 0, 0),
        (110, 0, 0),
        (130, -0.2, -0.2),
        (180, -0.7, -0.7),
        (300, -0.7, -1),
    ],
)
def test_linear_shape(length, if_correct, if_wrong):
    reward = hapo(shape="linear")
    assert reward("a", length, 1.0) == pytest.approx(if_correct)
    assert reward("a", length, 0.0) == pytest.approx(if_wrong)


def test_floor_applies_from_1_494_h():
    assert hapo(h=1000)("a", 1493, 1.0) > -0.7 and hapo(h=1000)("a", 1494, 1.0) == -0.7
    assert hapo(floor=-0.2)("a", 150, 1.0) == -0.2


def test_weight_scales_the_reward():
    assert hapo(weight=0.1)("a", 50, 1.0) == pytest.approx(0.1 * hapo()("a", 50, 1.0))
    assert hapo(weight=0.0)("a", 9000, 1.0) == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_reward_without_history_is_0(shape):
    for length in (0, 1, 10**6):
        assert total(HistoryLength(shape=shape), length, 1) == 1
        assert total(HistoryLength(shape=shape), length, 0) == 0
    assert total(hapo(shape=shape), 10**6, 0, task="another") == 0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_zero_lengths_do_not_divide_by_zero(shape):
    reward = hapo(h=0, shape=shape)
    assert reward("a", 0, 1.0) == pytest.approx(hapo(shape=shape)("a", 100, 1.0))
    assert reward("a", 1, 1.0) == -0.7 and reward("a", 1, 0.0) == -1
    assert hapo(shape=shape)("a", 0, 1.0) == 1 and hapo(shape=shape)("a", 0, 0.0) == 0


@given(
    shape=st.sampled_from(["cosine", "linear"]),
    history=st.sampled_from(["min", "mean"]),
    weight=st.floats(0, 1),
    observed=st.lists(LENGTHS, max_size=4),
    correct_length=LENGTHS,
    wrong_length=LENGTHS,
)
def test_correct_answers_outscore_wrong_ones(
    *, shape, history, weight, observed, correct_length, wrong_length
):
    reward = HistoryLength(weight, shape=shape, history=history)
    reward.observe(rollouts(*((length, 1) for length in observed)))
    assert total(reward, correct_length, 1) > 0 >= total(reward, wrong_length, 0)
    if observed and wrong_length <= reward.reference("a"):
        assert total(reward, wrong_length, 0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.1}, "weight must be between 0 and 1, not 1.1"),
        ({"weight": -0.1}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"floor": 0.0}, "floor must be at least -1 and below 0, not 0.0"),
        ({"floor": -1.1}, "floor"),
        ({"shape": "square"}, "there is no shape 'square'; use cosine or linear"),
        ({"history": "max"}, "there is no history 'max'; use min or mean"),
        ({"capacity": 0}, "capacity"),
    ],
)
def test_invalid_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        HistoryLength(**options)


def test_scoring_does_not_change_the_history():
    reward = hapo()
    before = reward.state_dict()
    assert [reward("a", length, 1.0) for length in (50, 50)] == [reward("a", 50, 1.0)] * 2
    reward("b", 10, 1.0)
    assert reward.state_dict() == before


def test_min_history_never_grows():
    reward = HistoryLength()
    history = []
    for pairs in ([(10, 0)], [(300, 1), (200, 1), (5, 0)], [(250, 1)], [(1, 0)], [(120, 1)], [(9000, 1)]):
        reward.observe(rollouts(*pairs))
        history.append(reward.reference("a"))
    assert history == [None, 200, 200, 200, 120, 120]


def test_mean_history_counts_every_correct_answer():
    reward = HistoryLength(history="mean")
    reward.observe(rollouts((100, 1), (100, 1), (400, 1), (9, 0)))
    assert reward.reference("a") == 200
    reward.observe(rollouts((1000, 1)))
    assert reward.reference("a") == 400
    reward.observe(rollouts((5, 0)))
    assert reward.reference("a") == 400


def test_partial_credit_counts_as_wrong():
    reward = HistoryLength()
    reward.observe(rollouts((10, 0.99)))
    assert reward.reference("a") is None
    assert hapo()("a", 50, 0.99) == 0


@pytest.mark.parametrize("history", ["min", "mean"])
@given(
    steps=st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), LENGTHS, st.booleans()), min_size=4, max_size=16),
        max_size=4,
    ),
    data=st.data(),
)
def test_history_does_not_depend_on_the_sharding(history, steps, data):
    single_rank, four_ranks = HistoryLength(history=history), HistoryLength(history=history)
    for step in steps:
        rows = [row for task, length, y in step for row in rollouts((length, y), task=task)]
        single_rank.observe(rows)
        shards = [data.draw(st.permutations(rows[rank::4])) for rank in range(4)]
        four_ranks.observe([row for shard in shards for row in shard])
    for task in "abc":
        assert single_rank.reference(task) == four_ranks.reference(task)


@pytest.mark.parametrize("history", ["min", "mean"])
def test_state_dict_survives_torch_and_json(history):
    import torch

    reward = HistoryLength(history=history)
    reward.observe(rollouts((100, 1), (300, 1)) + rollouts((70, 1), task="b"))
    file = io.BytesIO()
    torch.save(reward.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), json.loads(json.dumps(reward.state_dict()))):
        resumed = HistoryLength(history=history)
        resumed.load_state_dict(state)
        assert resumed.reference("a") == reward.reference("a") == (100 if history == "min" else 200)
        for each in (resumed, reward):
            each.observe(rollouts((50, 1)) + rollouts((80, 1), task="b"))
        assert resumed.state_dict() == reward.state_dict()
        reward.load_state_dict(state)


def test_load_state_dict_rejects_the_other_kind_of_history():
    with pytest.raises(ValueError, match="saved history is 'min', but this run uses 'mean'"):
        HistoryLength(history="mean").load_state_dict(hapo().state_dict())


@pytest.mark.parametrize("history", ["min", "mean"])
def test_least_recently_solved_task_is_evicted(history):
    reward = HistoryLength(history=history, capacity=2)
    for task in "aba":
        reward.observe(rollouts((100, 1), task=task))
    reward.observe(rollouts((100, 0), task="b") + rollouts((100, 1), task="c"))
    assert [reward.reference(task) for task in "abc"] == [100, None, 100]
    assert len(reward.state_dict()["tasks"]) == 2
    small = HistoryLength(history=history, capacity=1)
    small.load_state_dict(reward.state_dict())
    assert [small.reference(task) for task in "abc"] == [None, None, 100]


@pytest.mark.parametrize(("history", "max_bytes"), [("min", 160), ("mean", 230)])
def test_memory_per_task(history, max_bytes):
    num_tasks, rng = 200_000, random.Random(0)
    reward = HistoryLength(history=history)
    tracemalloc.start()
    for start in range(0, num_tasks, 1000):
        step = (
            {"task_id": f"task-{i}-" + "x" * 100, "length": rng.randrange(300, 9000), "correct": 1.0}
            for i in range(start, start + 1000)
        )
        reward.observe(step)
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes / num_tasks < max_bytes  # 121 and 173 measured with CPython 3.11
