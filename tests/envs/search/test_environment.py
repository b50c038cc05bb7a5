"""`SearchEnvironment` over a generated world, with a real index and with a simulated engine."""

import threading

import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.search.protocol import MAX_QUERY_CHARACTERS, results_text
from rlkit.envs.search.simulated import SimulatedEngine
from rlkit.envs.search.tool_calls import write_call
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import Document, EngineError, Result
from rlkit.retrieval.engines.index import build_index
from rlkit.rollouts import Sampling
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.scripted import ScriptedEngine
from rlkit.rollouts.text_generation import Generation
from rlkit.rollouts.tokenize import tokenize
from tests.rlkit.retrieval.serving import DictionaryEngine, serving


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def environment():
    return load_environment("search-v3", world_size=1000, hops=[1, 2, 3, 4], unanswerable=0.2)


def turn(task, *contents):
    """Return the turn after the given contents of assistant messages."""
    messages = [*task["prompt"]]
    for content in contents:
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "…"}]
    return Turn(task, messages[:-1])


def scores(environment, row):
    from rlkit.reward import call_reward

    return {name: call_reward(reward, row) for name, reward in environment.rewards.items()}


def test_environment_is_sound(environment):
    assert [check for check in check_environment(environment, n=64) if not check.passed] == []


def test_script_retrieves_the_passages_and_earns_all_rewards(environment):
    tasks, scripts = [], []
    for task in environment.tasks("dev", 200):
        if (script := environment.script(task)) is not None:
            tasks.append(task)
            scripts.append(script)
    assert len(scripts) >= 0.9 * 200
    for row in play(environment, tasks, scripts):
        rewards = scores(environment, row)
        assert rewards["f1"] == rewards["exact_match"] == rewards["recall"] == 1
        assert rewards["searches"] == row["hops"] and rewards["backed"] in (1, None)
        assert (rewards["backed"] is None) == (not row["answerable"])


def test_verbose_script_has_a_thought_before_each_action():
    plain, verbose, mixed = (
        load_environment("search-v3", world_size=1000, hops=[2], unanswerable=0.3, solution_style=style)
        for style in ("steps", "verbose", "mixed")
    )
    tasks = [task for task in plain.tasks("dev", 100) if plain.script(task) is not None]
    scripts = [verbose.script(task) for task in tasks]
    for task, script in zip(tasks, scripts, strict=True):
        for turn, action in zip(script, plain.script(task), strict=True):
            thought, _, last_part = turn.partition("</think>\n")
            assert thought.startswith("<think>") and last_part == action
        conclusion = "the answer is" if task["answerable"] else "do not answer the question"
        assert conclusion in script[-1]
    assert all(scores(verbose, row)["f1"] == 1 for row in play(verbose, tasks, scripts))
    num_verbose = sum(mixed.script(task) == script for task, script in zip(tasks, scripts, strict=True))
    num_plain = sum(mixed.script(task) == plain.script(task) for task in tasks)
    assert num_verbose + num_plain == len(tasks)
    assert 0.1 < num_plain / len(tasks) < 0.4  # a quarter, drawn by chance


def test_rewards_are_0_without_an_answer_or_a_search(environment):
    tasks = list(environment.tasks("dev", 100))
    rows = play(environment, tasks, [["I would have to look that up."]] * 100)
    assert all(scores(environment, row)["f1"] == 0 for row in rows)
    right = play(environment, tasks, [[environment.answer(task)] for task in tasks])
    assert sum(scores(environment, row)["backed"] or 0 for row in right) == 0  # right, but not retrieved


def test_respond_ends_the_rollout_after_max_searches(environment):
    task = environment.tasks("train", 1)[0]
    search = f"<search>{task['queries'][0]}</search>"
    searches = [search] * environment.max_searches
    (reply,) = environment.respond([turn(task, *searches)])
    assert not reply.done and task["supporting"][0] in reply.record["documents"]
    (reply,) = environment.respond([turn(task, *searches, search)])
    assert reply.done and reply.text is None and not reply.record
    (reply,) = environment.respond([turn(task, *searches, environment.answer(task))])
    assert reply.done


def test_respond_to_a_turn_without_an_action(environment):
    task = environment.tasks("train", 1)[0]
    silent, empty = environment.respond([turn(task, "hm"), turn(task, "<search> </search>")])
    assert silent == empty and not silent.done and "was not valid" in silent.text
    assert silent.invalid is None  # the model's fault, not the environment's


def test_respond_replies_in_the_order_of_the_turns(environment):
    tasks = list(environment.tasks("train", 3))
    turns = [
        turn(tasks[0], f"<search>{tasks[0]['queries'][0]}</search>"),
        turn(tasks[1], "<answer>x</answer>"),
        turn(tasks[2], f"<search>{tasks[2]['queries'][0]}</search>"),
    ]
    first, second, third = environment.respond(turns)
    assert second.done and second.text is None
    for task, reply in ((tasks[0], first), (tasks[2], third)):
        assert task["supporting"][0] in reply.record["documents"]


class BrokenEngine:
    """Search engine that raises an `EngineError`, or fails for queries that contain "two"."""

    def __init__(self, error):
        self.error = error

    def search(self, queries, k):
        if isinstance(self.error, Exception):
            raise self.error
        return [Result(error=self.error) if "two" in query.text else Result() for query in queries]


class PoisonedEngine:
    """Search engine that raises if one of the queries contains "poison", and records the queries."""

    def __init__(self):
        self.queries = []

    def search(self, queries, k):
        self.queries += [query.text for query in queries]
        if any("poison" in query.text for query in queries):
            raise EngineError("the encoder failed")
        return [Result((Document("1", "", "text"),)) for _ in queries]


def test_query_that_makes_the_engine_raise_invalidates_only_its_rollout():
    environment = load_environment("search-v3", world_size=100)
    tasks = list(environment.tasks("train", 3))
    environment.engine = PoisonedEngine()
    contents = ["<search>one</search>", "<search>poison</search>", "<search>two</search>"]
    first, second, third = environment.respond([turn(t, c) for t, c in zip(tasks, contents, strict=True)])
    assert first.record["documents"] == third.record["documents"] == ["1"]
    assert second.invalid == "the search failed: the encoder failed"


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_long_query_is_truncated(protocol):
    environment = load_environment("search-v3", world_size=100, protocol=protocol)
    environment.engine = PoisonedEngine()
    task = environment.tasks("train", 1)[0]
    write = write_call if protocol == "tools" else "<search>{}</search>".format
    (reply,) = environment.respond([turn(task, write("red\n deer " * 2000))])
    assert (
        reply.record["query"]
        == environment.engine.queries[0]
        == ("red deer " * 223)[:MAX_QUERY_CHARACTERS].strip()
    )
    assert reply.record["documents"] == ["1"]


class HangingEngine:
    """Search engine that never answers, until the test ends."""

    def __init__(self):
        self.event = threading.Event()

    def search(self, queries, k):
        self.event.wait(60)
        raise EngineError("too late")


def test_answers_and_invalid_actions_survive_an_engine_that_hangs(tiny_tokenizer):
    environment = load_environment("search-v3", world_size=100, max_searches=1, hops=[1])
    tasks = list(environment.tasks("train", 4))
    environment.engine = HangingEngine()
    scripts = [
        [environment.answer(tasks[0])],
        ["hm", environment.answer(tasks[1])],
        ["<search>elk</search>"],
        ["hm", "<search>one too many</search>"],
    ]
    limits = RolloutLimits(2000, max_turns=environment.max_turns, reply_timeout=0.5)
    loop = Loop(environment, tiny_tokenizer, limits, [2])
    engine = ScriptedEngine(tiny_tokenizer, scripts, 2)
    prompts = tokenize(tiny_tokenizer, [task["prompt"] for task in tasks])
    rollouts = loop(engine, Sampling((2,), tuple(environment.stop)), tasks, prompts)
    environment.engine.event.set()
    invalid = [rollout.invalid for rollout in rollouts]
    assert invalid == [None, None, "the environment did not reply within 0.5 s", None]
    assert [scores(environment, tasks[i] | rollouts[i].columns())["f1"] for i in (0, 1)] == [1, 1]


def test_failed_search_invalidates_only_its_rollout():
    environment = load_environment("search-v3", world_size=100)
    tasks = list(environment.tasks("train", 3))
    contents = ["<search>one</search>", "<search>two</search>", "<answer>x</answer>"]
    turns = [turn(task, content) for task, content in zip(tasks, contents, strict=True)]
    environment.engine = BrokenEngine(EngineError("it is down"))
    first, second, answer = environment.respond(turns)
    assert first.invalid == second.invalid == "the search failed: it is down" and answer.done
    environment.engine = BrokenEngine("it is down")
    first, second, answer = environment.respond(turns)
    assert first.invalid is None and "<information></information>" in first.text
    assert first.record["documents"] == []
    assert second.invalid == "the search failed: it is down" and answer.invalid is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hops": [1, 5]}, "hops"),
        ({"hops": []}, "hops"),
        ({"unanswerable": 1.0}, "unanswerable"),
        ({"world_size": 10}, "world_size"),
        ({"topk": 0}, "topk"),
        ({"hops": [3], "max_searches": 2}, "raise max_searches"),
        ({"prompt_style": "shrt"}, "'short'"),
        ({"world": 3}, "no argument 'world'"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("search-v3", **arguments)


def test_tasks_raises_if_the_engine_does_not_exist(tmp_path):
    for engine, message in (("bn25", "there is no engine 'bn25'"), (str(tmp_path), str(tmp_path))):
        with pytest.raises(UserError, match=message):
            load_environment("search-v3", engine=engine, world_size=100).tasks("train", 1)


def test_index_folder_must_contain_the_passages_of_the_world(tmp_path):
    folder = str(build_index(World(0, 200).passages(), tmp_path / "index"))
    environment = load_environment("search-v3", engine=folder, world_size=200)
    assert environment.script(environment.tasks("train", 1)[0])
    for world in ({"world_size": 100}, {"world_size": 200, "world_seed": 1}):
        with pytest.raises(UserError, match="not an index of this world's passages"):
            load_environment("search-v3", engine=folder, **world).tasks("train", 1)


def test_script_raises_if_the_search_fails():
    broken = load_environment("search-v3", world_size=100)
    task = broken.tasks("train", 1)[0]
    broken.engine = BrokenEngine(EngineError("it is down"))
    with pytest.raises(UserError, match="the search failed: it is down"):
        broken.script(task)


def test_prompt_says_how_to_refuse_if_questions_may_be_unanswerable(environment):
    assert "answer unknown" in environment.tasks("train", 1)[0]["prompt"][0]["content"]
    plain = load_environment("search-v3", world_size=100).tasks("train", 1)[0]
    assert "unknown" not in plain["prompt"][0]["content"]


class ObedientModel:
    """Text model whose useful documents contain the answer and whose noise does not."""

    name = "obedient"

    def generate(self, prompts, seeds):
        texts = [prompt[0]["content"] for prompt in prompts]
        answers = [text.partition("Its answer is: ")[2].partition("\n")[0] for text in texts]
        useful = ["Useful output" in text for text in texts]
        return [
            Generation(f"Doc 1: It is {answer}." if is_useful else "Doc 1: It rains.")
            for answer, is_useful in zip(answers, useful, strict=True)
        ]


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr(
        "rlkit.envs.search.environment.open_simulated", lambda model: SimulatedEngine(ObedientModel())
    )
    noise = {"schedule": "linear", "start": 0.0, "end": 1.0}
    return load_environment(
        "search-v3", engine="simulated", engine_args={"model": "m"}, noise=noise, world_size=200, topk=1
    )


def search_anything(environment, task):
    """Return the reply to a search."""
    return environment.respond([turn(task, "<search>anything</search>")])[0]


def test_noise_of_simulated_engine_follows_the_schedule(simulated):
    tasks = list(simulated.tasks("train", 60))
    shares = []
    assert simulated.advance(1, 10**6, None) == {"noise": 0.0}  # before the first sampling step
    for step in (0, 5, 10):
        simulated.advance(step, 10, 0.5)
        labels = [search_anything(simulated, task).record["label"] for task in tasks]
        shares.append(labels.count("noisy") / len(labels))
    assert shares[0] == 0 and 0.3 < shares[1] < 0.7 and shares[2] == 1
    assert simulated.advance(10, 10, 0.5) == {"noise": 1.0}  # of the sampling step that has just ended


def test_dev_split_is_searched_with_the_held_out_engine(simulated):
    task = simulated.tasks("dev", 1)[0]
    reply = simulated.respond([turn(task, f"<search>{task['queries'][0]}</search>")])[0]
    assert reply.record["documents"] == [task["supporting"][0]] and "label" not in reply.record
    both = [simulated.tasks("train", 1)[0], task]
    replies = simulated.respond([turn(task, "<search>anything in the year</search>") for task in both])
    assert ["label" in reply.record for reply in replies] == [True, False]


def test_state_dict_restores_the_noise_schedule(simulated):
    simulated.advance(5, 10, None)
    state = simulated.state_dict()
    simulated.advance(9, 10, None)
    simulated.load_state_dict(state)
    assert simulated.advance(6, 10, None) == {"noise": 0.5}


def test_useful_hits_and_noisy_hits_are_logged(simulated):
    assert {"useful_hits", "noisy_hits"} <= simulated.reward_weights.keys()
    task = simulated.tasks("train", 1)[0]
    for step, hits, opposite in ((0, "useful_hits", "noisy_hits"), (10, "noisy_hits", "useful_hits")):
        simulated.advance(step, 10, None)
        (row,) = play(simulated, [task], [["<search>anything</search>", simulated.answer(task)]])
        rewards = scores(simulated, row)
        assert rewards[hits] == (step == 0) and rewards[opposite] is None


def test_failed_generation_invalidates_the_rollout(simulated, monkeypatch):
    def fail(self, prompts, seeds):
        return [Generation(error="overloaded") for _ in prompts]

    task = simulated.tasks("train", 1)[0]
    monkeypatch.setattr(ObedientModel, "generate", fail)
    assert search_anything(simulated, task).invalid == "the search failed: overloaded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "simulated"}, "engine_args"),
        ({"data": "a.jsonl", "engine": "index", "held_out_engine": "simulated"}, "requires a model"),
        ({"engine": "simulated", "engine_args": {"model": "m"}, "unanswerable": 0.1}, "unanswerable"),
        (
            {"engine": "simulated", "engine_args": {"model": "m"}, "held_out_engine": "simulated"},
            "set held_out_engine to an index folder",
        ),
        ({"noise": {"schedul": "linear"}, "engine": "simulated", "engine_args": {"model": "m"}}, "schedule"),
        ({"noise": {"schedul": "linear"}, "engine": "bm25"}, "schedule"),
        (
            {"document_format": "zerosaerch"},
            r"unknown document_format 'zerosaerch' \(did you mean 'zerosearch'",
        ),
        ({"solution_style": "long"}, "unknown solution_style 'long'"),
        ({"solution_style": "mixed", "protocol": "tools"}, "solution_style must be 'steps', because"),
        ({"data": "a.jsonl"}, "passages"),
        ({"data": "a.jsonl", "engine": "simulated", "engine_args": {"model": "m"}}, "held_out_engine"),
    ],
)
def test_engine_arguments_that_contradict_raise(arguments, message):
    with pytest.raises(UserError, match=message):
        load_environment("search-v3", **arguments)


@pytest.mark.parametrize(
    ("engine", "arguments", "message"),
    [
        ("bm25", {"k1": 1}, "engine_args has no argument 'k1' for any engine"),
        ("bm25", {"modle": "m"}, "did you mean 'model'"),
        ("http://127.0.0.1:9", {"retry_timout": 1}, "retry_timeout"),
        ("simulated", {"model": "bundled:smollm2-135m", "prompt": "tuned"}, "prompts"),
    ],
)
def test_invalid_engine_args_raise(engine, arguments, message):
    environment = load_environment("search-v3", engine=engine, engine_args=arguments, world_size=100)
    with pytest.raises(UserError, match=message):
        environment.tasks("train", 1)


SIMULATED = {
    "engine": "simulated",
    "engine_args": {"model": "m", "words": 20, "tokens": 300, "retry_timeout": 7, "cache": None},
    "noise": {"schedule": "exponential", "start": 0.1, "end": 0.5},
    "world_size": 200,
}


def test_change_of_engine_replaces_the_simulator_by_a_real_one(tmp_path, caplog):
    build_index(World(0, 200).passages(), tmp_path / "index", "bm25")
    for engine in ("bm25", str(tmp_path / "index")):
        caplog.clear()
        environment = load_environment("search-v3", **SIMULATED | {"engine": engine})
        assert [record.message for record in caplog.records if "noise" in record.message] == [
            f"noise is ignored, because engine is {engine!r}, not 'simulated'"
        ]
        assert environment.advance(1, 2, None) == {}
        for split in ("train", "dev"):
            reply = search_anything(environment, environment.tasks(split, 1)[0])
            assert "label" not in reply.record and reply.invalid is None
    caplog.clear()
    with serving(DictionaryEngine()) as url:
        remote = load_environment("search-v3", **SIMULATED | {"engine": url})
        assert remote.engine is remote.held_out and remote.engine.retry_timeout == 7
    assert caplog.text.count("noise is ignored") == 1


def test_held_out_server_takes_its_own_arguments_beside_a_simulated_engine(monkeypatch):
    opened = []

    def open_simulated(**arguments):
        opened.append(arguments)
        return SimulatedEngine(ObedientModel())

    monkeypatch.setattr("rlkit.envs.search.environment.open_simulated", open_simulated)
    with serving(DictionaryEngine()) as url:
        environment = load_environment("search-v3", **SIMULATED | {"held_out_engine": url})
        assert environment.held_out.retry_timeout == 7
    assert isinstance(environment.engine, SimulatedEngine)
    assert opened == [{"model": "m", "words": 20, "tokens": 300, "cache": None}]


def test_real_engine_becomes_simulated_with_a_model(monkeypatch):
    monkeypatch.setattr(
        "rlkit.envs.search.environment.open_simulated", lambda model: SimulatedEngine(ObedientModel())
    )
    real = {"engine": "http://127.0.0.1:9", "engine_args": {"retry_timeout": 7}, "world_size": 200}
    with pytest.raises(UserError, match="requires a model"):
        load_environment("search-v3", **real | {"engine": "simulated"})
    arguments = real["engine_args"] | {"model": "m"}
    environment = load_environment("search-v3", **real | {"engine": "simulated", "engine_args": arguments})
    assert "label" in search_anything(environment, environment.tasks("train", 1)[0]).record


@pytest.mark.parametrize("protocol", ["tags", "tools"])
def test_both_engines_show_documents_in_the_format_of_the_environment(simulated, monkeypatch, protocol):
    for document_format, start in (
        (None, "Doc 1: "),
        ("search_r1", "Doc 1(Title: "),
        ("zerosearch", "Doc 1: "),
    ):
        environment = load_environment(
            "search-v3",
            engine="simulated",
            engine_args={"model": "m"},
            document_format=document_format,
            protocol=protocol,
            world_size=200,
        )
        for split in ("train", "dev"):
            task = environment.tasks(split, 1)[0]
            call = environment.script(task)[0]
            text = environment.respond([turn(task, call)])[0].text
            assert results_text(text).startswith(start), text
    real = load_environment("search-v3", world_size=200)
    assert real.document_format == "search_r1"
