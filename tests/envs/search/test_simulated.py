"""A search engine that a model plays: what it is asked, how its texts are read, and that a run repeats."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.search.simulated import Simulated, open_simulated, read_documents
from rlkit.envs.search.simulator_prompts import write_prompt
from rlkit.errors import UserError
from rlkit.retrieval.documents import Query
from rlkit.retrieval.engines.disk_cache import DiskCache
from rlkit.rollouts.text_generation import Written

QUESTION = "Who founded Velmora Works?"


class Recorder:
    """A writer that keeps what it is asked, and answers with three documents or an error."""

    name = "recorder"

    def __init__(self, failing=()):
        self.prompts, self.seeds, self.failing = [], [], failing

    def write(self, prompts, seeds):
        self.prompts += [prompt[0]["content"] for prompt in prompts]
        self.seeds += seeds
        texts = [f"Doc 1: about {seed}\nDoc 2: b\n\nDoc 3: c" for seed in seeds]
        return [
            Written(error="it is ill")
            if any(word in prompt[0]["content"] for word in self.failing)
            else Written(text)
            for prompt, text in zip(prompts, texts, strict=True)
        ]


def query(text="velmora", question=QUESTION, answers=("Tarin Oskel", "Oskel"), key=("task", 1)):
    return Query(text, question, answers, key)


def test_a_tuned_simulator_is_told_question_and_first_answer_for_noise_too():
    for label in ("useful", "noisy"):
        text = write_prompt(query(), label, 5, style="tuned", words=30)
        assert QUESTION in text and "Tarin Oskel" in text and "is: Oskel" not in text
        assert text.endswith(f"Query: velmora\n{label.capitalize()} output:")


def test_a_prompted_simulator_does_not_know_the_answer_when_it_writes_noise():
    useful, noisy = (
        write_prompt(query(), label, 3, style="prompted", words=30) for label in ("useful", "noisy")
    )
    assert QUESTION in useful and "Tarin Oskel" in useful
    assert QUESTION not in noisy and "Tarin Oskel" not in noisy
    assert "1897" in useful and "1897" not in noisy  # the demonstration


@pytest.mark.parametrize("style", ["tuned", "prompted"])
def test_the_prompt_names_the_number_of_documents_that_is_asked_for(style):
    """Trap Z4: five documents in the text, whatever topk is."""
    assert "3 useful documents" in write_prompt(query(), "useful", 3, style="tuned", words=30)
    assert "1 useful document " in write_prompt(query(), "useful", 1, style="tuned", words=30)
    text = write_prompt(query(), "useful", 2, style="prompted", words=30)
    assert "2 documents" in text and "Doc 2:" in text and "Doc 3:" not in text
    assert "question" not in write_prompt(Query("velmora"), "useful", 3, style=style, words=30).lower()


def test_each_query_is_asked_with_its_own_question():
    """Trap Z1: once some rollouts have finished, documents were written for another row's question."""
    engine = Simulated(Recorder())
    engine.search(
        [
            query("b", "Question two?", ("two",), ("2", 1)),
            query("c", "Question three?", ("three",), ("3", 1)),
        ],
        3,
    )
    second, third = engine.writer.prompts
    assert "Question two?" in second and "is: two" in second and "Query: b" in second
    assert "Question three?" in third and "is: three" in third and "Query: c" in third


def test_documents_beyond_k_are_cut():
    (result,) = Simulated(Recorder()).search([query()], 2)
    assert [document.text for document in result.documents][1:] == ["b"] and len(result.documents) == 2
    seven = "\n".join(f"Doc {i}: text {i}" for i in range(1, 8))
    assert len(read_documents(seven, "useful", 5).documents) == 5
    assert read_documents('Doc 1(Title: "T") x', "useful", 5).documents[0].title == "T"


def test_a_text_without_documents_is_a_failure_and_no_empty_result():
    result = read_documents("I cannot do that.", "noisy", 3)
    assert result.error and "no document" in result.error and not result.documents


def test_a_failing_writer_makes_its_queries_fail_and_no_others():
    good, bad = Simulated(Recorder(failing=["omega"])).search([query("alpha"), query("omega")], 3)
    assert good.error is None and len(good.documents) == 3
    assert bad.error == "it is ill" and not bad.documents


def test_noise_is_drawn_as_often_as_it_should_be():
    engine = Simulated(Recorder(), seed=3)
    engine.noise = 0.3
    queries = [query(key=("task", i)) for i in range(10_000)]
    labels = [engine._ask(one, 1).label for one in queries]
    assert abs(labels.count("noisy") / 10_000 - 0.3) < 0.02
    assert labels == [engine._ask(one, 1).label for one in queries]


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_what_was_noise_stays_noise_when_there_is_more_of_it(i, p, q):
    engine = Simulated(Recorder())
    engine.noise = min(p, q)
    before = engine._ask(query(key=("task", i)), 1).label
    engine.noise = max(p, q)
    assert before == "useful" or engine._ask(query(key=("task", i)), 1).label == "noisy"


@pytest.mark.parametrize(("noise", "label"), [(0.0, "useful"), (1.0, "noisy")])
def test_never_and_always(noise, label):
    engine = Simulated(Recorder())
    engine.noise = noise
    assert {r.label for r in engine.search([query(key=("t", i)) for i in range(200)], 1)} == {label}


def test_rollouts_of_a_task_draw_alike_and_other_words_are_written_apart():
    engine = Simulated(Recorder())
    engine.noise = 0.5
    results = engine.search([query("a"), query("a"), query("b")], 3)
    assert len(engine.writer.seeds) == 2 and len(set(engine.writer.seeds)) == 2
    assert results[0] == results[1] != results[2]
    assert len({result.label for result in results}) == 1


def test_a_run_is_repeated_from_the_cache(tmp_path):
    first = Simulated(Recorder(), cache=tmp_path / "cache")
    found = first.search([query("a"), query("b")], 3)
    again = Simulated(Recorder(), cache=tmp_path / "cache")
    assert again.search([query("a"), query("b")], 3) == found
    assert again.writer.prompts == [] and (again.cache.hits, again.cache.misses) == (2, 0)
    other = Simulated(Recorder(), seed=1, cache=tmp_path / "cache")
    other.search([query("a")], 3)
    assert len(other.writer.prompts) == 1


def test_a_failure_is_not_kept(tmp_path):
    engine = Simulated(Recorder(failing=["velmora"]), cache=tmp_path)
    assert engine.search([query()], 3)[0].error
    engine.writer.failing = ()
    assert engine.search([query()], 3)[0].error is None


def test_a_damaged_cache_is_put_aside(tmp_path, caplog):
    (tmp_path / "cache.sqlite").write_bytes(b"this is no data base, whatever its name says" * 40)
    cache = DiskCache(tmp_path)
    assert "damaged" in caplog.text
    cache.put({"a": "1"})
    assert cache.get(["a", "b"]) == {"a": "1"} and (cache.hits, cache.misses) == (1, 1)
    assert (tmp_path / "cache.damaged").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache"):
        DiskCache(tmp_path / "file" / "cache")


def test_a_cache_that_fails_ends_no_run_and_says_so_once(tmp_path, caplog):
    cache = DiskCache(tmp_path)
    cache.put({"a": "1"})
    cache.path.write_bytes(b"overwritten by something else " * 400)
    for end in ("-wal", "-shm"):
        cache.path.with_name(cache.path.name + end).unlink(missing_ok=True)
    assert cache.get(["a"]) == {} and cache.misses == 1
    cache.put({"b": "2"})
    assert caplog.text.count("without the cache") == 1


def test_processes_share_a_cache(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rlkit.retrieval.engines.disk_cache import DiskCache\n"
        "cache = DiskCache(Path(sys.argv[1]))\n"
        "for i in range(50): cache.put({f'{sys.argv[2]}-{i}': str(i), f'both-{i}': 'same'})"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    cache = DiskCache(tmp_path)
    keys = [f"{name}-{i}" for name in ("a", "b", "c", "both") for i in range(50)]
    assert len(cache.get(keys)) == 200


def test_bad_arguments():
    with pytest.raises(UserError, match="tuned"):
        open_simulated("bundled:smollm2-135m", prompts="tund")
    with pytest.raises(UserError, match="transformers"):
        open_simulated("bundled:smollm2-135m", through="transformer")
    with pytest.raises(ValueError, match="k is 0"):
        Simulated(Recorder()).search([query()], 0)
