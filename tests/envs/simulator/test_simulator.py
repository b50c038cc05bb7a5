"""simulator-v3: tasks from a generated world and from rollouts of a run, and its rewards."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.envs.search.protocol import write_results
from rlkit.envs.simulator.environment import split_of
from rlkit.envs.simulator.examples import read_examples
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import Document
from rlkit.reward import call_reward
from rlkit.rewards.simulation import holds_answer
from tests.quick import ROOT

ROW = {
    "question": "Who?",
    "answers": ["Ann"],
    "query": "who",
    "documents": "Doc 1: It was Ann.",
    "label": "useful",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def environment():
    return load_environment("simulator-v3", topk=2, world_size=500)


def test_environment_passes_all_checks(environment):
    assert [check for check in check_environment(environment, n=40) if not check.passed] == []


def test_useful_documents_contain_the_answer_and_noisy_ones_rarely_do(environment):
    tasks = list(environment.tasks("train", 200))
    assert [task["label"] for task in tasks] == ["useful", "noisy"] * 100
    holds = {label: [t["holds"] for t in tasks if t["label"] == label] for label in ("useful", "noisy")}
    # Not all useful documents do: the passage of a first hop does not contain the final answer.
    assert sum(holds["useful"]) > 50 and sum(holds["noisy"]) < 10
    assert {task["asked"] for task in tasks} == {2}
    for task in tasks[:20]:
        assert f"2 {task['label']} documents" in task["prompt"][0]["content"]
        assert task["answers"][0] in task["prompt"][0]["content"]


def test_obeys_is_0_for_documents_of_the_other_kind(environment):
    tasks = list(environment.tasks("dev", 60))
    useful = next(task for task in tasks if task["holds"])
    noisy = next(task for task in tasks if not task["holds"] and task["label"] == "noisy")
    answer = useful["answers"][0]
    assert environment.score(useful, "Doc 1: It rains.\nDoc 2: It snows.") == {"obeys": 0, "form": 1}
    assert environment.score(noisy, f"Doc 1: It is {noisy['answers'][0]}.\nDoc 2: b") == {
        "obeys": 0,
        "form": 1,
    }
    assert environment.score(useful, answer) == {"obeys": 0, "form": 0}


def test_each_question_of_a_file_is_in_one_split(tmp_path):
    rows = [ROW | {"question": f"Who was {i % 100}?", "query": f"q{i}"} for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = load_environment("simulator-v3", data=str(path))
    task_ids = {split: set(environment.tasks(split)["task_id"]) for split in ("train", "dev", "test")}
    assert sum(map(len, task_ids.values())) == 200
    assert {split_of(f"Who was {i}?") for i in range(100)} == {"train", "dev", "test"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1: not valid JSON"),
        ("[1]", ":1: missing or empty: question"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW | {"query": ""}), ":2: missing or empty: query"),
        (json.dumps(ROW | {"label": "bad"}), ":1: label must be one of useful, noisy, not 'bad'"),
        (json.dumps(ROW | {"answers": ["The"]}), ":1: the answer 'The' is empty"),
        ("", "no rows"),
    ],
)
def test_read_examples_reports_invalid_rows(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_examples(tmp_path / "a.jsonl")


def write_run(tmp_path, *, documents="search_r1", reward="f1"):
    """Write a run of search-v3: oracle searches, half with the correct final answer, half with a wrong one.

    Returns the rows of the rollouts and the number of those with the correct answer. The first is invalid.
    """
    search = load_environment(
        "search-v3", world_size=500, topk=2, hops=[1], prompt_style="short", document_format=documents
    )
    tasks = [task for task in search.tasks("train", 30) if search.script(task)]
    scripts = [search.script(task) for task in tasks]
    half = len(tasks) // 2
    scripts[half:] = [[*turns[:-1], "<answer>nobody</answer>"] for turns in scripts[half:]]
    rows = [
        {
            "prompt": row["prompt"][0]["content"],
            "completion": row["completion"],
            "answer": search.answer(row),
            "turns": row["turns"],
            "invalid": None if i else "the search failed",
            f"rewards/{reward}": float(call_reward(search.rewards[reward], row)),
        }
        for i, row in enumerate(play(search, tasks, scripts))
    ]
    write_rollouts(tmp_path, rows)
    return rows, half


def write_rollouts(tmp_path, rows):
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(tmp_path / "run" / "rollouts" / "step-000001.parquet")


def run_script(*argv):
    command = [sys.executable, str(ROOT / "scripts" / "build_simulator_data.py"), *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("label", "documents", "reward"),
    [
        ("answer", "search_r1", "f1"),
        ("documents", "zerosearch", "f1"),
        ("answer", "zerosearch", "exact_match"),
        ("answer", "search_r1", "cover_match"),  # which does not compare whole answers
        ("answer", "search_r1", "searches"),
    ],
)
def test_script_builds_examples_from_rollouts(tmp_path, label, documents, reward):
    rows, num_correct = write_run(tmp_path, documents=documents, reward=reward)
    result = run_script(tmp_path / "run", "--out", tmp_path / "data.jsonl", "--label", label)
    assert result.returncode == 0, result.stderr
    examples = read_examples(tmp_path / "data.jsonl")
    assert len(examples) == len(rows) - 1  # without the invalid rollout
    useful = [example.label == "useful" for example in examples]
    if label == "answer":
        assert useful == [True] * (num_correct - 1) + [False] * (len(rows) - num_correct)
    else:
        assert all(useful)
    assert all(holds_answer(example.documents, example.answers) for example in examples)
    assert all(example.question.endswith("?") for example in examples)
    start = "Doc 1(Title: " if documents == "search_r1" else "Doc 1: "
    assert all(example.documents.startswith(start) for example in examples)
    environment = load_environment("simulator-v3", data=str(tmp_path / "data.jsonl"))
    task = environment.tasks("train", 1)[0]
    assert environment.score(task, environment.answer(task))["obeys"] == 1


def test_script_builds_an_example_of_each_query_of_a_tool_call(tmp_path):
    search = load_environment("search-v3", protocol="tools", world_size=500, topk=2, hops=[2])
    tasks = [task for task in search.tasks("train", 10) if search.script(task)]
    calls = ["\n".join(search.script(task)[:-1]) for task in tasks]
    rows = play(search, tasks, [[call, search.answer(task)] for call, task in zip(calls, tasks, strict=True)])
    rollouts = [
        {
            "prompt": row["prompt"][0]["content"],
            "answer": search.answer(row),
            "turns": row["turns"],
            "invalid": None,
            "rewards/f1": 1.0,
        }
        for row in rows
    ]
    write_rollouts(tmp_path, rollouts)
    result = run_script(tmp_path / "run", "--out", tmp_path / "data.jsonl")
    assert result.returncode == 0, result.stderr
    examples = read_examples(tmp_path / "data.jsonl")
    assert [example.query for example in examples] == [query for task in tasks for query in task["queries"]]
    assert all(example.documents.count("Doc 1(") == 1 for example in examples)


def test_script_writes_documents_without_title_as_text(tmp_path):
    documents = [Document("1", "", "It was Ann (1950)."), Document("2", "", "It rained.")]
    turns = [
        {"role": "assistant", "content": "<search>who</search>"},
        {"role": "user", "content": write_results(documents, 9), "query": "who", "documents": ["1", "2"]},
    ]
    row = {"prompt": "Question: Who?\n", "completion": "", "answer": "<answer>Ann</answer>", "turns": turns}
    write_rollouts(tmp_path, [row | {"invalid": None}])
    result = run_script(tmp_path / "run", "--out", tmp_path / "data.jsonl", "--label", "documents")
    assert result.returncode == 0, result.stderr
    (example,) = read_examples(tmp_path / "data.jsonl")
    assert example.documents == "Doc 1: It was Ann (1950).\nDoc 2: It rained."
    assert example.label == "useful"


def test_script_rejects_a_run_without_searches(tmp_path):
    row = {"prompt": "Question: Who?\n", "completion": "", "answer": None, "invalid": None}
    write_rollouts(tmp_path, [row | {"turns": [{"role": "assistant", "content": "Ann"}]}])
    result = run_script(tmp_path / "run", "--out", tmp_path / "data.jsonl")
    assert result.returncode == 2 and "no valid rollout of these runs has a search" in result.stderr


def test_script_rejects_a_folder_that_is_not_a_run(tmp_path):
    result = run_script(tmp_path, "--out", tmp_path / "data.jsonl")
    assert result.returncode == 2 and "is not a run directory" in result.stderr
    assert "Traceback" not in result.stderr
