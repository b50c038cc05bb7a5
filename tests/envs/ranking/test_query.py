"""query-v4: parsing of queries, merging of rankings, the oracle, and uninformed policies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.query import interleave
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.engines.hybrid import fuse
from rlkit.reward import call_reward
from rlkit.rewards.retrieval import measure
from rlkit.rollouts import Sampling
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.scripted import ScriptedEngine
from tests.envs.ranking.folders import write_beir

NAME = "generated:300:0"
EOS = 2  # EOS token id of the tiny tokenizer


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        environments = {}

        def make(**arguments):
            key = str(arguments)
            environments.setdefault(key, load_environment("query-v4", **{"collection": NAME} | arguments))
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
        ("\n \n a  b \nc", ["a b"]),
        ("<think>x</think>\na\nb", ["a"]),
        ("first\n<query>a</query>", ["a"]),
        ("<query> </query>\nfirst", None),
        (" \n", None),
    ],
)
def test_first_line_is_the_query_if_no_tag_is_required(make, completion, queries):
    assert make(require_tag=False).parse_queries(completion, "original") == queries


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
    assert list(fuse(["abc", "cad"])) == ["a", "c", "b", "d"]  # a: 1/61 + 1/62, c: 1/63 + 1/61


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
        ({"require_tag": "no"}, "require_tag must be true or false, not 'no'"),
        ({"require_tag": False, "adaptive": True}, "adaptive answers have no tags"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("query-v4", **{"collection": NAME} | arguments)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that opens the environment over three documents."""
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    judged = {"1": {"1": 1, "2": 2}, "2": {"1": 1}}
    documents = {"1": "red wine", "2": "red red river", "3": "a red red red hill"}
    queries = {"1": "red [3]\nQuery: x", "2": "red"}
    folder = write_beir(tmp_path / "collection", documents, queries, {"train": judged, "test": judged})
    return lambda **arguments: load_environment("query-v4", collection=folder, **arguments)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("nDCG@10", "ndcg@10"), ("MRR@10", "rr@10"), ("map", "ap"), ("MRR(rel=2)", "rr(rel=2)")],
)
def test_measures_have_their_usual_spellings(small, spelling, name):
    environment = small(measure=spelling)
    assert environment.measure == name
    for task in environment.tasks("test"):
        qrels = environment.collection.judged("test")[task["query_id"]]
        (reward,) = scores(environment, [task], ["<query>red river</query>"])
        (row,) = play(environment, [task], [["<query>red river</query>"]])
        assert reward == pytest.approx(measure(name, row["turns"][0]["ranking"], qrels))


@pytest.mark.parametrize(("name", "num_relevant"), [("ndcg@10", 2), ("rr@10", 1), ("recall@5", 2)])
def test_minimum_grade_applies_to_its_kind_of_measure(small, caplog, name, num_relevant):
    """As in TREC DL. Queries without a relevant document are left out of training and score 0 in tests."""
    environment = small(measure=name)
    environment.collection = replace(environment.collection, min_grades={"rr": 2})
    tasks = {task["query_id"]: task for task in environment.tasks("test")}
    assert len(tasks) == 2 and len(tasks["1"]["judged"]) == num_relevant
    assert len(environment.tasks("train")) == (1 if name == "rr@10" else 2)
    assert ("1 of 2 training queries have no document that is relevant for rr@10" in caplog.text) == (
        name == "rr@10"
    )
    qrels = environment.collection.judged("test")["1"]
    expected = measure(name, tasks["1"]["original"], qrels, 2 if name == "rr@10" else 1)
    assert scores(environment, [tasks["1"]], ["<query>red [3] Query: x</query>"]) == pytest.approx([expected])
    if name == "rr@10":
        assert scores(environment, [tasks["2"]], ["<query>red wine</query>"]) == [0]


@pytest.mark.parametrize(("measure", "num_relevant"), [("rprec", 1), ("precision@5", 1), ("ap", 2)])
def test_r_precision_has_the_minimum_grade_of_precision_as_in_eval(small, measure, num_relevant):
    environment = small(measure=measure)
    environment.collection = replace(environment.collection, min_grades={"precision": 2})
    tasks = {task["query_id"]: task for task in environment.tasks("test")}
    assert len(tasks["1"]["judged"]) == num_relevant


@pytest.mark.parametrize(("measure", "judged"), [("ndcg@10", ["1", "2"]), ("recall@5", ["2"]), ("ap", ["2"])])
def test_binary_judgments_replace_graded_ones_except_for_ndcg(small, measure, judged):
    environment = small(measure=measure)
    binary = {"test": {"1": {"2": 1}}}
    environment.collection = replace(environment.collection, binary=binary, min_grades={"ap": 3})
    tasks = {task["query_id"]: task for task in environment.tasks("test")}
    assert sorted(tasks["1"]["judged"]) == judged
    assert tasks["2"]["judged"] == ["1"]  # a query without binary judgments keeps its graded ones


def test_document_with_the_querys_id_is_dropped_on_request(small):
    kept, dropped = (
        {task["query_id"]: task for task in small(drop_query_id=drop).tasks("test")} for drop in (None, True)
    )
    assert set(kept["1"]["original"]) == {"1", "2", "3"} and set(dropped["1"]["original"]) == {"2", "3"}
    assert dropped["1"]["judged"] == kept["1"]["judged"]  # as in trec_eval
    environment = small(drop_query_id=True)
    assert environment.script(dropped["2"]) is not None and environment.script(dropped["1"]) is None


def test_judged_documents_missing_from_the_collection_are_not_in_scripts(small):
    environment = small()
    environment.collection.qrels["test"]["1"]["gone"] = 3
    (task,) = (task for task in environment.tasks("test") if task["query_id"] == "1")
    assert environment.script(task) is None


def test_query_is_one_line_of_the_prompt(small):
    for adaptive in (False, True):
        (task,) = (task for task in small(adaptive=adaptive).tasks("test") if task["query_id"] == "1")
        assert task["prompt"][0]["content"].endswith(": red (3) Query: x")
        assert task["query"] == "red [3]\nQuery: x"


def test_retriever_that_finds_nothing_is_reported(small, caplog):
    environment = small()
    environment.collection = replace(environment.collection, queries={"1": "红", "2": "red"})
    environment.tasks("test")
    assert "bm25 found no document for 1 of 2 queries" in caplog.text
