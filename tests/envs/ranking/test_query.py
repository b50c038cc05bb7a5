"""query-v3: parsing of queries, merging of rankings, the oracle, and uninformed policies."""

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
EOS = 2  # EOS token id of the tiny tokenizer


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        environments = {}

        def make(**arguments):
            key = str(arguments)
            environments.setdefault(key, load_environment("query-v3", **{"collection": NAME} | arguments))
            return environments[key]

        yield make


def test_environment_passes_all_checks(make):
    """With 10 queries, the oracle can send one query for each of the ten best documents."""
    checks = check_environment(make(max_queries=10), n=24)
    assert [check for check in checks if not check.passed] == []


def scores(environment, tasks, completions, name="retrieval"):
    rows = play(environment, tasks, [[completion] for completion in completions])
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_unchanged_query_has_no_gain_and_no_query_scores_0(make):
    environment = make()
    tasks = list(environment.tasks("test"))
    unchanged = [f"<query>{task['query']}</query>" for task in tasks]
    rewards = scores(environment, tasks, unchanged)
    assert 0 < np.mean(rewards) < 0.7
    original_ndcg = []
    for task in tasks:
        qrels = dict(zip(task["judged"], task["grades"], strict=True))
        original_ndcg.append(measure("ndcg@10", task["original"], qrels))
    assert rewards == pytest.approx(original_ndcg)
    assert scores(environment, tasks, unchanged, "gain") == pytest.approx([0] * len(tasks))
    assert scores(environment, tasks, ["a castle"] * len(tasks)) == [0.0] * len(tasks)


@pytest.mark.parametrize(
    ("completion", "queries"),
    [
        ("<query>a b</query>", ["a b"]),
        ("<query> a\n b </query> and <query>c</query>", ["a b", "c"]),
        ("<think><query>x</query></think><query>a</query>", ["a"]),
        ("<query>a</query><think><query>x</query>", ["a"]),
        ("<think><query>x</query>", None),
        ("<query>a</query><query>a</query><query> </query>", ["a"]),
        ("<query>1</query><query>2</query><query>3</query><query>4</query>", ["1", "2", "3"]),
        ("<query>a", None),
        ("a", None),
        ("", None),
        ("<query></query>", None),
    ],
)
def test_parse_queries(make, completion, queries):
    assert make().parse_queries(completion, "original") == queries


@pytest.mark.parametrize(
    ("completion", "queries"),
    [
        ("/embed", ["original"]),
        (" /embed\n", ["original"]),
        ("/augment red  wine", ["original red wine"]),
        ("<think>hm /augment x</think>/embed", ["original"]),
        ("<think>hm /augment x", None),
        ("/augment", None),
        ("/augmented x", None),
        ("I would /embed it", None),
        ("", None),
    ],
)
def test_parse_queries_of_adaptive_actions(make, completion, queries):
    assert make(adaptive=True).parse_queries(completion, "original") == queries


def test_priced_reward_charges_only_changed_queries(make):
    environment = make(adaptive=True)
    tasks = list(environment.tasks("test", 30))
    unchanged = scores(environment, tasks, ["/embed"] * 30, "priced")
    changed = scores(environment, tasks, ["/augment zzz"] * 30, "priced")  # no document has the word "zzz"
    assert np.mean(unchanged) - np.mean(changed) == pytest.approx(0.05)
    assert scores(environment, tasks, ["/augment zzz"] * 30, "augmented") == [1] * 30
    assert environment.reward_weights["priced"] == 1 and environment.reward_weights["augmented"] == 0


def test_failed_search_makes_the_rollout_invalid(make, monkeypatch):
    environment = make()
    (task,) = environment.tasks("test", 1)

    class FailingEngine:
        def search(self, queries, k):
            raise EngineError("the engine is down")

    monkeypatch.setitem(environment.__dict__, "engine", FailingEngine())
    message = {"role": "assistant", "content": "<query>a</query>"}
    (reply,) = environment.respond([Turn(task, [*task["prompt"], message])])
    assert reply.invalid == "the search failed: the engine is down"


def test_loop_records_the_ranking_in_the_models_turn(make, tiny_tokenizer):
    """The rollout ends after the first turn: nothing is sampled after the search."""
    environment = make()
    (task,) = environment.tasks("test", 1)
    engine = ScriptedEngine(tiny_tokenizer, [["<query>windmill</query>", "more"], ["windmill", "more"]], EOS)
    loop = Loop(environment, tiny_tokenizer, RolloutLimits(500, max_turns=environment.max_turns), [EOS])
    prompt = tiny_tokenizer.apply_chat_template(task["prompt"], add_generation_prompt=True)["input_ids"]
    with_query, without_query = loop(engine, Sampling((EOS,)), [task] * 2, [prompt] * 2)
    assert [len(rollout.turns) for rollout in (with_query, without_query)] == [1, 1]
    assert with_query.turns[0]["ranking"] and with_query.turns[0]["augmented"] is True
    assert "ranking" not in without_query.turns[0] and with_query.mask == [1] * len(with_query.ids)
    row = task | with_query.columns()
    assert call_reward(environment.rewards["augmented"], row) == 1


ranking_lists = st.lists(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=7), max_size=4)


def test_interleave_and_fuse_of_two_rankings():
    assert interleave(["abc", "cad"]) == ["a", "c", "b", "d"]
    assert fuse(["abc", "cad"]) == ["a", "c", "b", "d"]  # a: 1/61 + 1/62, c: 1/63 + 1/61


@given(ranking_lists)
def test_merged_rankings_have_each_document_once(rankings):
    for merged in (interleave(rankings), fuse(rankings)):
        assert sorted(merged) == sorted({name for ranking in rankings for name in ranking})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combine": "fused"}, "unknown combine 'fused'"),
        ({"prompt_style": "rewriting"}, "unknown prompt_style 'rewriting'"),
        ({"measure": "ndgc@10"}, "there is no measure 'ndgc@10'"),
        ({"depth": 0}, "depth must be an integer from 1"),
        ({"max_queries": 21}, "max_queries must be an integer from 1 to 20"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("query-v3", **{"collection": NAME} | arguments)
