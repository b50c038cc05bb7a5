"""navigate-v3: the oracle, uninformed policies, parsing of scores, the end of a search, and calibration."""

import numpy as np
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.navigate import parse_scores
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.reward import call_reward

NAME = "generated:300:0"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield lambda **arguments: load_environment("navigate-v3", **{"collection": NAME} | arguments)


@pytest.mark.parametrize("arguments", [{}, {"anchors": 3, "turns": 12}])
def test_environment_passes_all_checks(make, arguments):
    checks = check_environment(make(**arguments), n=16)
    assert [check for check in checks if not check.passed] == []


def scores(environment, tasks, scripts, name="found"):
    rows = play(environment, tasks, scripts)
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_oracle_earns_1_and_uninformed_scores_earn_little(make):
    environment = make()
    tasks = list(environment.tasks("test", 30))
    scripts = [environment.script(task) for task in tasks]
    solved = [(task, script) for task, script in zip(tasks, scripts, strict=True) if script]
    assert len(solved) > 25
    assert scores(environment, *zip(*solved, strict=True)) == pytest.approx([1.0] * len(solved))
    assert [len(script) for _, script in solved] == [task["fewest"] for task, _ in solved]
    equal_scores = "\n".join(f"[{i}] 50" for i in range(1, 60))
    assert np.mean(scores(environment, tasks, [[equal_scores] * 10] * 30)) < 0.2
    zero_scores = "\n".join(f"[{i}] 0" for i in range(1, 60))
    assert scores(environment, tasks, [[zero_scores] * 10] * 30) == [0.0] * 30
    assert scores(environment, tasks, [["I like bridges."]] * 30) == [0.0] * 30


def test_priced_reward_charges_unnecessary_turns(make):
    """The policy opens what the oracle opens, then everything else in the order of the tree."""
    environment = make(turns=20)
    task = next(task for task in environment.tasks("test") if task["fewest"] <= 4)
    # A section scored 0 would never be opened.
    oracle_turns = [turn.replace("] 0", "] 1") for turn in environment.script(task)]
    rows = play(environment, [task], [[*oracle_turns, *["[1] 1"] * 16]])
    steps = call_reward(environment.rewards["steps"], rows[0])
    ndcg, priced = (call_reward(environment.rewards[name], rows[0]) for name in ("found", "priced"))
    assert steps > task["fewest"] and priced == pytest.approx(ndcg - 0.02 * (steps - task["fewest"]))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("[1] 80\n[2] 0\n[3] 100", [[0.8, 0.0], [1.0]]),
        ("[3]: 5, [1] = 10", [[0.1, 0.0], [0.05]]),
        ("[1] 10 [1] 90", [[0.1, 0.0], [0.0]]),
        ("[1] 101 [2] 7", [[0.0, 0.07], [0.0]]),
        ("[4] 50 [0] 50 [2] 1", [[0.0, 0.01], [0.0]]),
        ("<think>[1] 90</think>[2] 5", [[0.0, 0.05], [0.0]]),
        ("[1] 0.5 [2] 5", [[0.0, 0.05], [0.0]]),
        ("[1] 1000", None),
        ("<think>[1] 90", None),
        ("[1] 90 <think>[1] 10", [[0.9, 0.0], [0.0]]),
        ("1: 80", None),
        ("", None),
    ],
)
def test_parse_scores(completion, expected):
    assert parse_scores(completion, [2, 1]) == expected


def play_turns(environment, task, *completions):
    """Play completions until the rollout ends; return the last reply and all messages."""
    messages, reply = list(task["prompt"]), None
    for completion in completions:
        messages.append({"role": "assistant", "content": completion})
        (reply,) = environment.respond([Turn(task, messages)])
        if reply.done:
            break
        messages.append({**reply.record, "role": "user", "content": reply.text})
    return reply, messages


def test_respond_ends_the_search(make):
    environment = make(turns=3)
    task = environment.tasks("test", 1)[0]
    reply, _ = play_turns(environment, task, "[1] 50")
    assert not reply.done and reply.text.startswith("[1] ")
    assert play_turns(environment, task, "[1] 50\nstop")[0].done
    assert not play_turns(environment, task, "[1] 50, don't stop")[0].done
    assert play_turns(environment, task, "<think>\nstop\n</think>[1] 50")[0].done is False
    assert play_turns(environment, task, "[1] 0")[0].done  # no node to open
    assert play_turns(environment, task, "hm")[0].done
    reply, messages = play_turns(environment, task, "[1] 50", "[1] 50", "[1] 50", "[1] 50")
    assert reply.done and sum(message["role"] == "assistant" for message in messages) == 3


def test_turn_without_scores_keeps_the_ranking(make):
    environment = make(turns=10)
    task = next(t for t in environment.tasks("test") if environment.script(t) is not None)
    script = environment.script(task)
    complete, _ = play_turns(environment, task, *script)
    partial, _ = play_turns(environment, task, *script[:-1])
    broken, _ = play_turns(environment, task, *script[:-1], "no idea")
    assert broken.done and broken.record["ranking"] == partial.record["ranking"]
    assert broken.record["ranking"] != complete.record["ranking"]


def test_anchors_are_reproducible(make):
    environment = make(anchors=4, width=3)
    task = environment.tasks("test", 1)[0]
    completions = ["\n".join(f"[{i}] {90 - 3 * i}" for i in range(1, 25))] * 4
    _, first = play_turns(environment, task, *completions)
    _, second = play_turns(environment, task, *completions)
    assert first == second
    anchors = [slate["shown"][1] for message in first for slate in message.get("slates", ())]
    assert any(anchors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branching": 1}, "branching must be an integer from 2"),
        ({"width": 0}, "width must be an integer from 1"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"anchors": -1}, "anchors must be an integer from 0"),
    ],
)
def test_invalid_arguments_are_errors(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)


def test_unknown_embedder_is_an_error_when_the_tree_is_built(make):
    with pytest.raises(UserError, match="no embedder"):
        make(embedder="nothing").tasks("test", 1)
