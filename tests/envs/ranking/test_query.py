"""query-v2: what is read as queries, how lists are joined, the oracle, and who makes no effort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.query import fuse, interleave
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import EngineError
from rlkit.reward import call_reward
from rlkit.rewards.retrieval import measure
from rlkit.rollouts import Sampling
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.scripted import ScriptedEngine

NAME = "generated:300:0"
END = 2  # the tiny tokenizer's end token


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = {}

        def make(**arguments):
            key = str(arguments)
            made.setdefault(key, load_environment("query-v2", **{"collection": NAME} | arguments))
            return made[key]

        yield make


def test_it_is_sound(make):
    """The oracle has room for a query for each of the ten best documents."""
    checks = check_environment(make(max_queries=10), n=24)
    assert [check for check in checks if not check.passed] == []


def scores(environment, tasks, texts, name="retrieval"):
    rows = play(environment, tasks, [[text] for text in texts])
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_the_idle_and_the_silent_one(make):
    environment = make()
    tasks = list(environment.tasks("test"))
    idle = scores(environment, tasks, [f"<query>{task['query']}</query>" for task in tasks])
    assert 0 < np.mean(idle) < 0.7
    own = [measure("ndcg@10", t["original"], dict(zip(t["judged"], t["grades"], strict=True))) for t in tasks]
    assert idle == pytest.approx(own)
    assert scores(environment, tasks, ["a castle"] * len(tasks)) == [0.0] * len(tasks)
    gains = scores(environment, tasks, [f"<query>{task['query']}</query>" for task in tasks], "gain")
    assert gains == pytest.approx([0] * len(tasks))


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("<query>a b</query>", ["a b"]),
        ("<query> a\n b </query> and <query>c</query>", ["a b", "c"]),
        ("<think><query>x</query></think><query>a</query>", ["a"]),
        ("<query>a</query><query>a</query><query> </query>", ["a"]),
        ("<query>1</query><query>2</query><query>3</query><query>4</query>", ["1", "2", "3"]),
        ("<query>a", None),
        ("a", None),
        ("", None),
        ("<query></query>", None),
    ],
)
def test_what_is_read(make, text, queries):
    assert make().read(text, "own") == queries


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("/embed", ["own"]),
        (" /embed\n", ["own"]),
        ("/augment red  wine", ["own red wine"]),
        ("<think>hm /augment x</think>/embed", ["own"]),
        ("/augment", None),
        ("/augmented x", None),
        ("I would /embed it", None),
        ("", None),
    ],
)
def test_the_actions_of_an_adaptive_one(make, text, queries):
    assert make(adaptive=True).read(text, "own") == queries


def test_leaving_the_query_as_it_is_costs_nothing(make):
    environment = make(adaptive=True)
    tasks = list(environment.tasks("test", 30))
    left, changed = (scores(environment, tasks, [text] * 30, "priced") for text in ("/embed", "/augment zzz"))
    assert np.mean(left) - np.mean(changed) == pytest.approx(0.05)  # "zzz" finds nothing more
    assert scores(environment, tasks, ["/augment zzz"] * 30, "augmented") == [1] * 30
    assert environment.reward_weights["priced"] == 1 and environment.reward_weights["augmented"] == 0


def test_a_failed_search_is_invalid_and_not_0(make, monkeypatch):
    environment = make()
    (task,) = environment.tasks("test", 1)

    class Ill:
        def search(self, queries, k):
            raise EngineError("it is ill")

    monkeypatch.setitem(environment.__dict__, "engine", Ill())
    message = {"role": "assistant", "content": "<query>a</query>"}
    (reply,) = environment.respond([Turn(task, [*task["prompt"], message])])
    assert reply.invalid == "the search failed: it is ill"


def test_in_the_loop_of_training(make, tiny_tokenizer):
    """What was found stands in the model's own turn, and nothing is sampled after it."""
    environment = make()
    (task,) = environment.tasks("test", 1)
    engine = ScriptedEngine(tiny_tokenizer, [["<query>windmill</query>", "more"], ["windmill", "more"]], END)
    loop = Loop(environment, tiny_tokenizer, RolloutLimits(500, turns=environment.max_turns), [END])
    prompt = tiny_tokenizer.apply_chat_template(task["prompt"], add_generation_prompt=True)["input_ids"]
    asked, silent = loop(engine, Sampling((END,)), [task] * 2, [prompt] * 2)
    assert [len(rollout.turns) for rollout in (asked, silent)] == [1, 1]
    assert asked.turns[0]["ranking"] and asked.turns[0]["augmented"] is True
    assert "ranking" not in silent.turns[0] and asked.mask == [1] * len(asked.ids)
    row = task | asked.columns()
    assert call_reward(environment.rewards["augmented"], row) == 1


names = st.lists(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=7), max_size=4)


def test_joined_by_hand():
    assert interleave(["abc", "cad"]) == ["a", "c", "b", "d"]
    assert fuse(["abc", "cad"]) == ["a", "c", "b", "d"]  # a: 1/61 + 1/62, c: 1/63 + 1/61


@given(names)
def test_joined_lists_have_each_document_once(lists):
    for joined in (interleave(lists), fuse(lists)):
        assert sorted(joined) == sorted({name for one in lists for name in one})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "fused"}, "no combine 'fused'"),
        ({"prompt_style": "rewriting"}, "no prompt_style 'rewriting'"),
        ({"measure": "ndgc@10"}, "there is no measure 'ndgc@10'"),
        ({"depth": 0}, "depth must be from 1"),
        ({"max_queries": 21}, "max_queries from 1 to 20"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("query-v2", **{"collection": NAME} | arguments)
