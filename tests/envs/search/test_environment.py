"""search-v2 with a real index over a generated world."""

import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.environment import Turn
from rlkit.envs.search.simulated import Simulated
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.documents import EngineError, Result
from rlkit.retrieval.engines.index import build_index
from rlkit.rollouts.text_generation import Written


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def environment():
    return load_environment("search-v2", world_size=1000, hops=[1, 2, 3, 4], unanswerable=0.2)


def turn(task, *said):
    messages = [*task["prompt"]]
    for one in said:
        messages += [{"role": "assistant", "content": one}, {"role": "user", "content": "…"}]
    return Turn(task, messages[:-1])


def scores(environment, row):
    from rlkit.reward import call_reward

    return {name: call_reward(reward, row) for name, reward in environment.rewards.items()}


def test_it_is_sound(environment):
    assert [check for check in check_environment(environment, n=64) if not check.passed] == []


def test_the_oracle_finds_the_passages_and_is_right(environment):
    tasks = list(environment.tasks("dev", 200))
    scripts = [environment.script(task) for task in tasks]
    known = [(task, script) for task, script in zip(tasks, scripts, strict=True) if script is not None]
    assert len(known) >= 0.9 * len(tasks)
    for row in play(environment, *map(list, zip(*known, strict=True))):
        found = scores(environment, row)
        assert found["f1"] == found["exact_match"] == found["recall"] == 1
        assert found["searches"] == row["hops"] and found["backed"] in (1, None)
        assert (found["backed"] is None) == (not row["answerable"])


def test_who_does_not_search_or_answer_gets_nothing(environment):
    tasks = list(environment.tasks("dev", 100))
    rows = play(environment, tasks, [["I would have to look that up."]] * 100)
    assert all(scores(environment, row)["f1"] == 0 for row in rows)
    right = play(environment, tasks, [[environment.answer(task)] for task in tasks])
    assert sum(scores(environment, row)["backed"] or 0 for row in right) == 0  # known, but not found


def test_searches_are_counted_and_the_last_turn_can_only_answer(environment):
    task = environment.tasks("train", 1)[0]
    search = f"<search>{task['queries'][0]}</search>"
    said = [search] * environment.max_searches
    (reply,) = environment.respond([turn(task, *said)])
    assert not reply.done and task["supporting"][0] in reply.record["documents"]
    (reply,) = environment.respond([turn(task, *said, search)])
    assert reply.done and reply.text is None and not reply.record
    (reply,) = environment.respond([turn(task, *said, environment.answer(task))])
    assert reply.done


def test_a_turn_without_an_action_is_told_so(environment):
    task = environment.tasks("train", 1)[0]
    silent, empty = environment.respond([turn(task, "hm"), turn(task, "<search> </search>")])
    assert silent == empty and not silent.done and "was not valid" in silent.text
    assert silent.invalid is None  # the model's fault, not the environment's


def test_replies_are_in_the_order_of_the_turns(environment):
    tasks = list(environment.tasks("train", 3))
    asked = [
        turn(tasks[0], f"<search>{tasks[0]['queries'][0]}</search>"),
        turn(tasks[1], "<answer>x</answer>"),
        turn(tasks[2], f"<search>{tasks[2]['queries'][0]}</search>"),
    ]
    first, second, third = environment.respond(asked)
    assert second.done and second.text is None
    for task, reply in ((tasks[0], first), (tasks[2], third)):
        assert task["supporting"][0] in reply.record["documents"]


class Broken:
    def __init__(self, error):
        self.error = error

    def search(self, queries, k):
        if isinstance(self.error, Exception):
            raise self.error
        return [Result(error=self.error) if "two" in query.text else Result() for query in queries]


def test_a_failed_search_makes_rollouts_invalid_and_nothing_else():
    environment = load_environment("search-v2", world_size=100)
    tasks = list(environment.tasks("train", 3))
    said = ["<search>one</search>", "<search>two</search>", "<answer>x</answer>"]
    turns = [turn(task, text) for task, text in zip(tasks, said, strict=True)]
    environment.engine = Broken(EngineError("it is down"))
    one, two, answer = environment.respond(turns)
    assert one.invalid == two.invalid == "the search failed: it is down" and answer.done
    environment.engine = Broken("it is down")
    one, two, answer = environment.respond(turns)
    assert one.invalid is None and "<information></information>" in one.text and one.record["documents"] == []
    assert two.invalid == "the search failed: it is down" and answer.invalid is None


@pytest.mark.parametrize(
    ("arguments", "words"),
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
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(UserError, match=words):
        load_environment("search-v2", **arguments)


def test_engines_that_do_not_exist(tmp_path):
    for engine, words in (("bn25", "there is no engine 'bn25'"), (str(tmp_path), str(tmp_path))):
        with pytest.raises(UserError, match=words):  # before anything is sampled
            load_environment("search-v2", engine=engine, world_size=100).tasks("train", 1)


def test_an_index_folder_must_be_of_the_same_world(tmp_path):
    folder = str(build_index(World(0, 200).passages(), tmp_path / "index"))
    environment = load_environment("search-v2", engine=folder, world_size=200)
    assert environment.script(environment.tasks("train", 1)[0])
    for other in ({"world_size": 100}, {"world_size": 200, "world_seed": 1}):
        with pytest.raises(UserError, match="no index of this world's passages"):
            load_environment("search-v2", engine=folder, **other).tasks("train", 1)


def test_a_failed_search_is_no_missing_script(environment):
    broken = load_environment("search-v2", world_size=100)
    task = broken.tasks("train", 1)[0]
    broken.engine = Broken(EngineError("it is down"))
    with pytest.raises(UserError, match="the search failed: it is down"):
        broken.script(task)


def test_where_nothing_may_answer_the_prompt_says_how_to_refuse(environment):
    assert "answer unknown" in environment.tasks("train", 1)[0]["prompt"][0]["content"]
    plain = load_environment("search-v2", world_size=100).tasks("train", 1)[0]
    assert "unknown" not in plain["prompt"][0]["content"]


class Scribe:
    """A writer that obeys: useful documents hold the answer, noise does not."""

    name = "scribe"

    def write(self, prompts, seeds):
        texts = [prompt[0]["content"] for prompt in prompts]
        answers = [text.partition("Its answer is: ")[2].partition("\n")[0] for text in texts]
        useful = ["Useful output" in text for text in texts]
        return [
            Written(f"Doc 1: It is {answer}." if u else "Doc 1: It rains.")
            for answer, u in zip(answers, useful, strict=True)
        ]


@pytest.fixture
def simulated(monkeypatch):
    monkeypatch.setattr("rlkit.envs.search.environment.open_simulated", lambda model: Simulated(Scribe()))
    noise = {"schedule": "linear", "start": 0.0, "end": 1.0}
    return load_environment(
        "search-v2", engine="simulated", engine_args={"model": "m"}, noise=noise, world_size=200, topk=1
    )


def answered(environment, task):
    asked = turn(task, "<search>anything</search>")
    return environment.respond([asked])[0]


def test_a_simulated_engine_helps_at_first_and_then_less_and_less(simulated):
    tasks = list(simulated.tasks("train", 60))
    shares = []
    for step in (0, 5, 10):
        simulated.advance(step, 10, 0.5)
        labels = [answered(simulated, task).record["label"] for task in tasks]
        shares.append(labels.count("noisy") / len(labels))
    assert shares[0] == 0 and 0.3 < shares[1] < 0.7 and shares[2] == 1
    assert simulated.advance(10, 10, 0.5) == {"noise": 1.0}  # of the sampling that is over


def test_held_out_questions_are_asked_of_a_real_engine(simulated):
    task = simulated.tasks("dev", 1)[0]
    reply = simulated.respond([turn(task, f"<search>{task['queries'][0]}</search>")])[0]
    assert reply.record["documents"] == [task["supporting"][0]] and "label" not in reply.record
    both = [simulated.tasks("train", 1)[0], task]
    replies = simulated.respond([turn(one, "<search>anything in the year</search>") for one in both])
    assert ["label" in reply.record for reply in replies] == [True, False]


def test_the_noise_goes_on_where_it_was(simulated):
    simulated.advance(5, 10, None)
    state = simulated.state_dict()
    simulated.advance(9, 10, None)
    simulated.load_state_dict(state)
    assert simulated.advance(6, 10, None) == {"noise": 0.5}


def test_whether_a_simulator_obeys_is_logged(simulated):
    assert {"useful_hits", "noisy_hits"} <= simulated.reward_weights.keys()
    task = simulated.tasks("train", 1)[0]
    for step, name, other in ((0, "useful_hits", "noisy_hits"), (10, "noisy_hits", "useful_hits")):
        simulated.advance(step, 10, None)
        (row,) = play(simulated, [task], [["<search>anything</search>", simulated.answer(task)]])
        found = scores(simulated, row)
        assert found[name] == (step == 0) and found[other] is None


def test_a_writer_that_fails_makes_a_rollout_invalid(simulated, monkeypatch):
    task = simulated.tasks("train", 1)[0]
    monkeypatch.setattr(Scribe, "write", lambda self, prompts, seeds: [Written(error="ill") for _ in prompts])
    assert answered(simulated, task).invalid == "the search failed: ill"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"engine": "simulated"}, "engine_args"),
        ({"engine": "simulated", "engine_args": {"model": "m"}, "unanswerable": 0.1}, "unanswerable"),
        ({"engine": "simulated", "engine_args": {"model": "m"}, "held_out_engine": "simulated"}, "real one"),
        ({"noise": 0.3}, "real one"),
        ({"noise": {"schedul": "linear"}, "engine": "simulated", "engine_args": {"model": "m"}}, "schedule"),
        ({"data": "a.jsonl"}, "passages"),
        ({"data": "a.jsonl", "engine": "simulated", "engine_args": {"model": "m"}}, "held_out_engine"),
    ],
)
def test_engines_that_do_not_fit(arguments, words):
    with pytest.raises(UserError, match=words):
        load_environment("search-v2", **arguments)


@pytest.mark.parametrize(
    ("engine", "arguments", "words"),
    [
        ("bm25", {"k1": 1}, "takes none"),
        ("http://127.0.0.1:9", {"pacience": 1}, "patience"),
        ("simulated", {"model": "bundled:smollm2-135m", "prompt": "tuned"}, "prompts"),
    ],
)
def test_engine_args_that_do_not_fit(engine, arguments, words):
    environment = load_environment("search-v2", engine=engine, engine_args=arguments, world_size=100)
    with pytest.raises(UserError, match=words):
        environment.tasks("train", 1)
