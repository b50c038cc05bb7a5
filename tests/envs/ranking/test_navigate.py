"""navigate-v2: the oracle, those who know nothing, what is read, how a search ends, and calibration."""

import numpy as np
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.navigate import read
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.reward import call_reward

NAME = "generated:300:0"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield lambda **arguments: load_environment("navigate-v2", **{"collection": NAME} | arguments)


@pytest.mark.parametrize("arguments", [{}, {"anchors": 3, "turns": 12}])
def test_it_is_sound(make, arguments):
    checks = check_environment(make(**arguments), n=16)
    assert [check for check in checks if not check.passed] == []


def scores(environment, tasks, scripts, name="found"):
    rows = play(environment, tasks, scripts)
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_the_oracle_and_those_who_know_nothing(make):
    environment = make()
    tasks = list(environment.tasks("test", 30))
    scripts = [environment.script(task) for task in tasks]
    known = [(task, script) for task, script in zip(tasks, scripts, strict=True) if script]
    assert len(known) > 25
    assert scores(environment, *zip(*known, strict=True)) == pytest.approx([1.0] * len(known))
    assert [len(script) for _, script in known] == [task["fewest"] for task, _ in known]
    everything = "\n".join(f"[{i}] 50" for i in range(1, 60))
    assert np.mean(scores(environment, tasks, [[everything] * 10] * 30)) < 0.2
    nothing = "\n".join(f"[{i}] 0" for i in range(1, 60))
    assert scores(environment, tasks, [[nothing] * 10] * 30) == [0.0] * 30
    assert scores(environment, tasks, [["I like bridges."]] * 30) == [0.0] * 30


def test_turns_that_are_not_needed_cost(make):
    """One who opens everything in the order of the tree, after what the oracle opens."""
    environment = make(turns=20)
    task = next(task for task in environment.tasks("test") if task["fewest"] <= 4)
    script = [*environment.script(task)[:-1]]
    lazy = [turn.replace("] 0", "] 1") for turn in script]
    last = environment.script(task)[-1].replace("] 0", "] 1")
    rows = play(environment, [task], [[*lazy, last, *["[1] 1"] * 16]])
    steps = call_reward(environment.rewards["steps"], rows[0])
    found, priced = (call_reward(environment.rewards[name], rows[0]) for name in ("found", "priced"))
    assert steps > task["fewest"] and priced == pytest.approx(found - 0.02 * (steps - task["fewest"]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1] 80\n[2] 0\n[3] 100", [[0.8, 0.0], [1.0]]),
        ("[3]: 5, [1] = 10", [[0.1, 0.0], [0.05]]),
        ("[1] 10 [1] 90", [[0.1, 0.0], [0.0]]),
        ("[1] 101 [2] 7", [[0.0, 0.07], [0.0]]),
        ("[4] 50 [0] 50 [2] 1", [[0.0, 0.01], [0.0]]),
        ("<think>[1] 90</think>[2] 5", [[0.0, 0.05], [0.0]]),
        ("[1] 0.5 [2] 5", [[0.0, 0.05], [0.0]]),
        ("[1] 1000", None),
        ("<think>[1] 90", [[0.9, 0.0], [0.0]]),
        ("1: 80", None),
        ("", None),
    ],
)
def test_what_is_read(text, found):
    assert read(text, [2, 1]) == found


def reply(environment, task, *said):
    messages, answer = list(task["prompt"]), None
    for text in said:
        messages.append({"role": "assistant", "content": text})
        (answer,) = environment.respond([Turn(task, messages)])
        if answer.done:
            break
        messages.append({**answer.record, "role": "user", "content": answer.text})
    return answer, messages


def test_how_a_search_ends(make):
    environment = make(turns=3)
    task = environment.tasks("test", 1)[0]
    answer, _ = reply(environment, task, "[1] 50")
    assert not answer.done and answer.text.startswith("[1] ")
    assert reply(environment, task, "[1] 50\nstop")[0].done
    assert not reply(environment, task, "[1] 50, don't stop")[0].done
    assert reply(environment, task, "<think>\nstop\n</think>[1] 50")[0].done is False
    assert reply(environment, task, "[1] 0")[0].done  # nothing to open
    assert reply(environment, task, "hm")[0].done
    ended, messages = reply(environment, task, "[1] 50", "[1] 50", "[1] 50", "[1] 50")
    assert ended.done and sum(message["role"] == "assistant" for message in messages) == 3


def test_a_turn_without_scores_keeps_what_was_found(make):
    environment = make(turns=10)
    task = next(t for t in environment.tasks("test") if environment.script(t) is not None)
    script = environment.script(task)
    whole, _ = reply(environment, task, *script)
    half, _ = reply(environment, task, *script[:-1])
    broken, _ = reply(environment, task, *script[:-1], "no idea")
    assert broken.done and broken.record["ranking"] == half.record["ranking"] != whole.record["ranking"]


def test_the_same_scores_show_the_same_slates(make):
    environment = make(anchors=4, width=3)
    task = environment.tasks("test", 1)[0]
    said = ["\n".join(f"[{i}] {90 - 3 * i}" for i in range(1, 25))] * 4
    _, first = reply(environment, task, *said)
    _, second = reply(environment, task, *said)
    assert first == second
    shown = [one["shown"][1] for message in first for one in message.get("slates", ())]
    assert any(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branching": 1}, "branching must be from 2"),
        ({"width": 0}, "width from 1"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"anchors": -1}, "anchors from 0"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)


def test_a_bad_embedder_is_said_when_the_tree_is_needed(make):
    with pytest.raises(UserError, match="no embedder"):
        make(embedder="nothing").tasks("test", 1)
