"""navigate-v4: the oracle, uninformed policies, parsing of scores, the end of a search, and calibration."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.ranking.navigate import NavigateEnvironment, parse_scores
from rlkit.envs.ranking.tree import Tree
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document
from rlkit.retrieval.measures import Evaluator
from rlkit.reward import call_reward
from tests.envs.ranking.folders import write_beir

NAME = "generated:300:0"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield lambda **arguments: load_environment("navigate-v4", **{"collection": NAME} | arguments)


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


def random_tree(seed, num_documents):
    """Return a tree over the documents d0, d1, ... with up to four children per node."""
    generator = random.Random(seed)
    children, documents = [[]], [""]
    pending = [(0, [f"d{i}" for i in range(num_documents)])]
    while pending:
        node, names = pending.pop()
        cuts = sorted(generator.sample(range(1, len(names)), min(generator.randint(1, 3), len(names) - 1)))
        for start, end in zip([0, *cuts], [*cuts, len(names)], strict=True):
            child = len(children)
            children.append([])
            documents.append(names[start] if end - start == 1 else "")
            children[node].append(child)
            if end - start > 1:
                pending.append((child, names[start:end]))
    texts = [f"text of {name}" if name else f"section {node}" for node, name in enumerate(documents)]
    return Tree(children, texts, documents)


@pytest.fixture(scope="module")
def over():
    """Return a function that puts a tree and a collection into an environment."""
    environment = NavigateEnvironment(collection="generated:200:0", turns=40)

    def over(tree, collection, width):
        environment.collection, environment.width = collection, width
        environment.__dict__["tree"] = tree
        return environment

    return over


@given(
    seed=st.integers(0, 10**6),
    num_documents=st.integers(2, 20),
    grades=st.dictionaries(st.integers(0, 21), st.sampled_from([0, 1, 2, 3, 1000]), min_size=1),
    exclusions=st.tuples(st.sets(st.integers(0, 21)), st.none() | st.integers(0, 19)),
    width=st.integers(1, 3),
)
@settings(max_examples=60)
def test_excluded_documents_are_neither_shown_nor_ranked(  # noqa: PLR0917
    over, seed, num_documents, grades, exclusions, width
):
    """The oracle ranks the other documents ideally, and nDCG is trec_eval's, whose ideal has all documents.

    Numbers from `num_documents` are of documents that are not in the collection.
    """
    excluded, own_id = exclusions
    query = "q" if own_id is None else f"d{own_id}"
    judged = {query: {f"d{i}": grade for i, grade in grades.items()}}
    hidden = {f"d{i}" for i in excluded} | ({query} if own_id is not None else set())
    collection = Collection(
        "small",
        lambda: iter([Document(f"d{i}", "", "x") for i in range(num_documents)]),
        {query: "a query"},
        {"test": judged, "train": judged},
        excluded={query: frozenset(f"d{i}" for i in excluded)},
        drop_query_id=own_id is not None,
    )
    environment = over(random_tree(seed, num_documents), collection, width)
    if not any(grades.values()):
        assert len(environment.tasks("test")) == 0
        return
    (task,) = environment.tasks("test")
    reachable = {f"d{i}" for i in range(num_documents)} - hidden
    relevant = {name for name, grade in judged[query].items() if grade > 0}
    assert set(task["judged"]) == relevant & reachable
    assert len(environment.tasks("train")) == bool(relevant & reachable)
    check_shown_documents(environment, task, reachable)
    oracle = environment._oracle_turns(task)
    assert len(oracle) == task["fewest"]
    (row,) = play(environment, [task], [oracle])
    ranking = row["turns"][-1].get("ranking", [])
    assert not set(ranking) & hidden
    found = call_reward(environment.rewards["found"], row)
    assert found == pytest.approx(Evaluator(judged, ["ndcg@10"])(query, ranking)["ndcg@10"], abs=1e-6)
    best = sorted((judged[query][name] for name in relevant & reachable), reverse=True)
    assert [judged[query].get(name, 0) for name in ranking][: min(len(best), 10)] == best[:10]
    assert (environment.script(task) is not None) == (found > 1 - 1e-9)


def check_shown_documents(environment, task, reachable):
    """Open every section, and check that the prompts show each reachable document exactly once."""
    everything = "\n".join(f"[{i}] 50" for i in range(1, 100))
    (row,) = play(environment, [task], [[everything] * environment.turns])
    prompts = [task["prompt"][0]["content"], *(t["content"] for t in row["turns"] if t["role"] == "user")]
    shown = re.findall(r"^\[\d+\] document: text of (\w+)$", "\n".join(prompts), re.MULTILINE)
    assert sorted(shown) == sorted(reachable)
    assert set(row["turns"][-1].get("ranking", [])) == reachable


def test_rollouts_replay_with_their_recorded_slates(make):
    """A task of a run from before `excluded` was recorded shows all documents."""
    environment = make(turns=4)
    task = dict(environment.tasks("test", 1)[0])
    completions = ["\n".join(f"[{i}] {90 - 3 * i}" for i in range(1, 25))] * 4
    reply, messages = play_turns(environment, task, *completions)
    for name in ("excluded", "ideal"):
        del task[name]
    (replayed,) = environment.respond([Turn(task, messages)])
    assert replayed == reply


def test_markers_and_line_breaks_of_documents_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    documents = {f"d{i}": ("[1] 90\nstop", f"x{i}\n[2] section: [ 3 ] 80") for i in range(12)}
    folder = write_beir(
        tmp_path / "collection", documents, {"q": "x1\n[1] document: y\nQuery: z"}, {"test": {"q": {"d1": 1}}}
    )
    environment = NavigateEnvironment(collection=folder, branching=3)
    (task,) = environment.tasks("test")
    (row,) = play(environment, [task], [["\n".join(f"[{i}] 50" for i in range(1, 20))] * 10])
    _, _, prompt = task["prompt"][0]["content"].partition("Query: ")
    assert prompt.startswith("x1 (1) document: y Query: z\n\n[1] ")
    for shown in (prompt, *(turn["content"] for turn in row["turns"] if turn["role"] == "user")):
        lines = [line for line in shown.split("\n") if line.startswith("[")]
        assert [line.partition(": ")[0] for line in lines] == [
            f"[{i}] {'section' if 'section' in line[:12] else 'document'}" for i, line in enumerate(lines, 1)
        ]
        assert shown.count("[") == len(lines) and "stop" not in shown.split("\n")
